"What the decoders are taught with: conditions with parts withheld, canvases that go on behind the end, a time that is told, and durations"

import json
import multiprocessing
import signal
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from small import prepare_clips, save_random_models

from diffuspeech.base import random
from diffuspeech.cli import main
from diffuspeech.models.decoder import SpeechDecoder
from diffuspeech.models.duration import DurationPredictor, DurationTask
from diffuspeech.tasks.decoder import DecoderTask
from diffuspeech.tokenizers.taste import Taste
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.journal import history
from diffuspeech.train.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    prepare_clips(folder, train=8, dev=4)
    save_random_models(folder)
    return folder


def train_config(folder, model=None, **options):
    options = dict(tokenizer=f"{folder}/tokenizer", recogniser=f"{folder}/recogniser") | options
    return TrainConfig(
        "diffuspeech.tasks.decoder:DecoderTask",
        str(folder),
        dict(dim=48, ffn_dim=64, embedding_dim=32) | (model or {}),
        options,
        steps=4,
        lr=3e-3,
        warmup_steps=1,
        ema_decay=0.0,
        precision="fp32",
        batch_seconds=20.0,
        validate_every=4,
        save_every=4,
    )


def test_a_tenth_without_text_a_tenth_without_vectors_a_tenth_without_both(folder):
    task, said = DecoderTask(train_config(folder)), []
    batch = task.batch(task.corpora["train"], [0, 1])
    model = lambda: None
    model.condition = lambda batch, has_text, has_vectors, row_keys: said.append(
        torch.stack([has_text, has_vectors])
    )
    for k in range(200):
        task.condition(batch, model, random.row_keys(k, 100), 0.1)
    text, vectors = torch.cat(said, 1)
    n = len(text)
    for share, of in (
        (~text & vectors, 0.1),
        (text & ~vectors, 0.1),
        (~text & ~vectors, 0.1),
        (text & vectors, 0.7),
    ):
        assert abs(share.float().mean() - of) < 4 * (of * (1 - of) / n) ** 0.5, "within four standard errors"
    task.condition(batch, model, random.row_keys(0, 100), 0.0)
    assert said[-1].all(), "in validation nothing is withheld"


def test_half_of_the_canvases_go_on_behind_the_end(folder):
    task = DecoderTask(train_config(folder))
    batch = task.batch(task.corpora["train"], range(8))
    eos, longer = task.model.decoder.config.eos_token_id, []
    for k in range(200):
        tokens, lengths = task.pad_with_eos(batch, random.row_keys(k, 8))
        assert (
            tokens.shape == (8, int(lengths.max()))
            and (lengths >= batch.lengths).all()
            and (lengths <= (1.8 * batch.lengths).ceil()).all()
        )
        for row, known, n in zip(tokens, batch.target_tokens, batch.lengths):
            assert torch.equal(row[:n], known[:n]) and (row[n:] == eos).all()
        longer.append(lengths / batch.lengths)
    longer = torch.stack(longer)
    assert abs((longer > 1).float().mean() - 0.5) < 4 * (0.25 / longer.numel()) ** 0.5 and longer.max() > 1.75


@pytest.mark.parametrize(
    "model",
    [dict(time_conditioning=True), dict(causal=True, dropout=0.1), dict()],
    ids=["told the time", "from left to right", "by diffusion"],
)
def test_every_kind_trains_validates_and_speaks(folder, tmp_path, model):
    run = train_config(folder, model, taste=dict(quantizer=dict(kind="rvq", layers=2)))
    said = train(run, tmp_path, device="cpu", progress_bar=False)
    assert (
        ("accuracy" in said) == ("causal" in model)
        and ("accuracy_half" in said) == ("causal" not in model)
        and all(v == v for v in said.values())
    )
    assert (tmp_path / "model/taste/config.json").exists() and (
        tmp_path / "model/decoder/config.json"
    ).exists()
    with pytest.raises(
        ValueError,
        match="codec=small: its tokens are s3-small-.*name the codec of options.tokenizer, or none",
    ):
        DecoderTask(replace(run, options=run.options | dict(codec="small")))
    task = DecoderTask(run)
    assert task.samples(task.model) == {}
    task.codec = SimpleNamespace(
        decode=lambda ids, lengths: [torch.zeros(int(n) * 640) for n in lengths]
    )  # the voice is tried elsewhere; here, what it is given
    waves = task.samples(task.model)
    assert (
        len(waves) == 4
        and all(len(w) for w in waves.values())
        and {name.rsplit("-", 1)[1] for name in waves} == {"said", "oracle"}
    )


SERVER = multiprocessing.get_context("forkserver")  # as in test_train
SERVER.set_forkserver_preload(
    ["diffuspeech.train.loop", "diffuspeech.tasks.decoder", "torch._dynamo", "pytest"]
)


def run_in_process(run, folder):
    torch.set_num_threads(1)
    train(run, folder, device="cpu", progress_bar=False)


def start(run, folder):
    job = SERVER.Process(target=run_in_process, args=(run, folder))
    job.start()
    return job


@pytest.mark.parametrize(
    "model", [dict(causal=True, dropout=0.1), dict()], ids=["from left to right", "by diffusion"]
)
def test_killed_five_times(folder, tmp_path, model):
    "As test_train kills a toy, here the decoders themselves: corruption, codebooks that follow their vectors, dropout, EMA"
    run, dice = (
        replace(
            train_config(folder, model, taste=dict(quantizer=dict(kind="rvq", layers=2))),
            steps=60,
            ema_decay=0.9,
            save_every=2,
            validate_every=60,
        ),
        Random(),
    )
    start(run, tmp_path / "whole").join(120)
    step, at = history(tmp_path / "whole")["train"]["seconds"][-1] / run.steps, []
    for _ in range(5):
        known, job = set(tmp_path.glob("killed/step-*")), start(run, tmp_path / "killed")
        while job.is_alive() and set(tmp_path.glob("killed/step-*")) == known:
            time.sleep(0.01)
        time.sleep(dice.uniform(0, 4 * step))
        job.kill()
        job.join()
        assert job.exitcode == -signal.SIGKILL, "it ended by itself"
        at.append(max(path.name for path in tmp_path.glob("killed/step-*")))
    start(run, tmp_path / "killed").join(120)
    weights = [
        {
            str(file.relative_to(tmp_path / name)): file.read_bytes()
            for file in (tmp_path / name).rglob("*.safetensors")
        }
        for name in ("whole", "killed")
    ]
    assert len(set(at)) == 5 and weights[0] == weights[1] and len(weights[0]) > 3


def test_time_is_heard_only_where_it_is_told(folder):
    for told in (True, False):
        task = DecoderTask(train_config(folder, dict(time_conditioning=told)))
        bound = task.model.eval().decoder.bind(
            task.model.condition(batch := task.batch(task.corpora["dev"], [0, 1]))[0]
        )
        early, late = (bound(batch.target_tokens, batch.lengths, torch.full((2,), t)) for t in (0.1, 0.9))
        assert torch.equal(early, late) != told


def test_a_mean_over_dev_is_one_over_tokens(folder):
    task = DecoderTask(replace(train_config(folder), batch_seconds=8.0))
    sizes = []
    said = task.mean_over_dev(
        lambda batch, row_keys: (
            sizes.append((batch.tokens, len(batch.ids))) or dict(loss=torch.tensor(float(batch.tokens)))
        )
    )
    assert len(sizes) > 1 and len({tokens / rows for tokens, rows in sizes}) > 1
    assert (
        said["score"]
        == pytest.approx(sum(tokens**2 for tokens, _ in sizes) / sum(tokens for tokens, _ in sizes))
        != sum(tokens * rows for tokens, rows in sizes) / 4
    )


def test_a_copy_looks_at_the_layers_of_the_original(folder):
    task = DecoderTask(train_config(folder, taste=dict(key_layer=-1, value_layer=0)))
    batch, model = task.batch(task.corpora["dev"], [0, 1]), task.model.eval()
    copy = deepcopy(model)
    assert torch.equal(copy.condition(batch)[0].vectors, model.condition(batch)[0].vectors)
    assert not torch.equal(
        copy.condition(replace(batch, source=batch.source[:, :1]))[0].vectors,
        model.condition(batch)[0].vectors,
    )


def test_an_encoder_learns_up_to_the_layer_that_is_looked_at(folder):
    for layers, taught in (
        (dict(key_layer=1, value_layer=1), [True, False]),
        (dict(key_layer=1), [True, True]),
    ):
        task = DecoderTask(train_config(folder, encoder="trained", taste=layers))
        task.loss(task.batch(task.corpora["train"], [0, 1]), 1)["loss"].backward()
        for layer, learns in zip(task.model.encoder.layers, taught, strict=True):
            assert {p.requires_grad for p in layer.parameters()} == {learns} and all(
                (p.grad is not None) == learns for p in layer.parameters()
            )


def test_another_start_is_refused(folder, tmp_path):
    train(train_config(folder), tmp_path / "first", device="cpu", progress_bar=False)
    start = tmp_path / "first" / "model"
    second = train_config(folder, init_from=str(start), taste=dict(quantizer=dict(kind="fsq", layers=2)))
    train(second, tmp_path / "second", device="cpu", progress_bar=False)
    again = DecoderTask(
        replace(second, options=second.options | dict(init_from=str(tmp_path / "second" / "model")))
    ).model.taste.state_dict()
    kept = Taste.from_pretrained(tmp_path / "second" / "model" / "taste").state_dict()
    assert [name for name in kept if name.startswith("quantizer")] and all(
        torch.equal(again[name], kept[name]) for name in kept
    ), "the same quantizer goes on, another begins anew"
    for odd, said in (
        (dict(condition_dropout=0.4), "condition_dropout=0.4: is taken three times"),
        (dict(eos_padding=0.5), "eos_padding: of the diffusion"),
    ):
        with pytest.raises(ValueError, match=said):
            DecoderTask(train_config(folder, dict(causal="eos_padding" in odd), **odd))
    with pytest.raises(
        ValueError,
        match="was trained with another quantizer .*fsq.*, and each wants to begin at a first stage",
    ):
        DecoderTask(
            train_config(
                folder,
                init_from=str(tmp_path / "second" / "model"),
                taste=dict(quantizer=dict(kind="rvq", layers=2)),
            )
        )
    with pytest.raises(
        ValueError,
        match="options.init_from=.*none/model: no exported model there; the run in .*none leaves it",
    ):
        DecoderTask(
            replace(
                train_config(folder, init_from=str(tmp_path / "none" / "model")),
                data=str(tmp_path / "no corpus"),
            )
        )  # said first
    with pytest.raises(ValueError, match="comes from a run with seed=0, and this one has seed=1"):
        DecoderTask(
            replace(
                train_config(folder, init_from=str(start), taste=dict(quantizer=dict(kind="fsq", layers=2))),
                seed=1,
            )
        )
    with pytest.raises(ValueError, match="its decoder is"):
        DecoderTask(train_config(folder, dict(dim=64), init_from=str(start)))
    DecoderTask(train_config(folder, init_from=str(start), taste=dict(key_layer=2)))  # the last of two
    with pytest.raises(
        ValueError, match="its keys and values come from layers -1 and -1, and these from 0 and -1"
    ):
        DecoderTask(train_config(folder, init_from=str(start), taste=dict(key_layer=0)))
    file = start / "decoder" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(
        json.dumps(config | dict(metadata=config["metadata"] | dict(tokenizer="s3-small-ffffffff")))
    )
    with pytest.raises(ValueError, match="trained with the tokenizer s3-small-ffffffff"):
        DecoderTask(train_config(folder, init_from=str(start)))


def test_a_run_from_a_shell(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "tiny.json").write_text(
        json.dumps({name: value for name, value in asdict(train_config(folder)).items() if value is not None})
    )
    shell = ["train", str(tmp_path / "mine" / "tiny.json"), "--device", "cpu"]
    assert main([*shell, "--set", "steps=2", "--set", "log_every=1"]) == 0
    said, run = capsys.readouterr(), tmp_path / "runs" / "tiny"
    assert (
        f"the model is in {Path('runs/tiny/model')}" in said.out
        and "score" in said.out
        and "2/2" in said.err
        and "tokens/s" in said.err
    )
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {1, 2} <= {row["step"] for row in rows if "loss" in row} and list(run.glob("board/events*"))
    assert SpeechDecoder.from_pretrained(run / "model" / "decoder").config.dim == 48
    monkeypatch.setenv("RANK", "1")
    assert main([*shell, "--set", "steps=2", "--set", "log_every=1"]) == 0
    assert capsys.readouterr().out == "", "of many processes one speaks"


def test_durations_are_learned_from_texts(folder, tmp_path):
    run = TrainConfig(
        "diffuspeech.models.duration:DurationTask",
        str(folder),
        dict(dim=16, ffn_dim=32),
        dict(rows=3),
        steps=60,
        lr=1e-2,
        warmup_steps=5,
        ema_decay=0.0,
        precision="fp32",
        validate_every=30,
        save_every=60,
    )
    task = DurationTask(run)
    seen = [id for batch in task.batches(0) for id in batch.ids]
    assert (
        sorted(seen) == sorted(row[0] for row in task.corpora["train"])
        and seen != [id for batch in task.batches(1) for id in batch.ids]
        and len(task.batches(0)) == 3
    )
    batch = task.batches(0)[0]
    seconds = {row[0]: row[2] for row in task.corpora["train"]}
    assert all(abs(n - 25 * seconds[id]) < 1.001 for id, n in zip(batch.ids, batch.durations.tolist()))
    said = train(run, tmp_path, device="cpu", progress_bar=False)
    loss = history(tmp_path)["train"]["loss"]
    assert (
        sum(loss[-9:]) < 0.5 * sum(loss[:9])
        and {f"coverage_{q:g}" for q in task.model.config.quantiles} < said.keys()
    )
    at = DurationPredictor.from_pretrained(tmp_path / "model")(batch.condition)
    assert (
        task.versions["recordings"]
        == json.loads((tmp_path / "step-00000060/state.json").read_text())["versions"]["recordings"]
    ), "another corpus would be noticed"
    assert (at.diff(dim=1) >= 0).all() and abs(at[:, 3].mean() / batch.durations.mean() - 1) < 0.5
