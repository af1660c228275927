"How decoders are trained: condition dropout, end padding, time conditioning, one denominator; and durations"

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

from diffuspeech.asr.recognizer import load_asr, text_table
from diffuspeech.base import random
from diffuspeech.cli import main
from diffuspeech.diffusion.loss import diffusion_loss
from diffuspeech.models.decoder import SpeechDecoder
from diffuspeech.models.duration import DurationPredictor
from diffuspeech.tasks.decoder import DURATION_WEIGHT, DecoderTask, next_token_loss
from diffuspeech.tasks.duration import DurationTask
from diffuspeech.tokenizers.taste import Taste
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.journal import history
from diffuspeech.train.loop import train
from diffuspeech.train.task import Update, single_batch


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoders")
    prepare_clips(folder, train=8, dev=4)
    save_random_models(folder)
    return folder


def train_config(folder, model=None, **options):
    options = dict(tokenizer=f"{folder}/tokenizer", recogniser=f"{folder}/recogniser") | options
    if not options["recogniser"].endswith("canary"):
        options["taste"] = dict(rank=4, dim=16) | options.get("taste", {})
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
    task, drawn = DecoderTask(train_config(folder)), []
    batch = task.batch(task.corpora["train"], [0, 1])
    model = lambda: None
    model.condition = lambda batch, has_text, has_vectors, row_keys: drawn.append(
        torch.stack([has_text, has_vectors])
    )
    for k in range(200):
        task.condition(batch, model, random.row_keys(k, 100), 0.1)
    text, vectors = torch.cat(drawn, 1)
    n = len(text)
    for share, of in (
        (~text & vectors, 0.1),
        (text & ~vectors, 0.1),
        (~text & ~vectors, 0.1),
        (text & vectors, 0.7),
    ):
        assert abs(share.float().mean() - of) < 4 * (of * (1 - of) / n) ** 0.5, "within four standard errors"
    task.condition(batch, model, random.row_keys(0, 100), 0.0)
    assert drawn[-1].all(), "in validation nothing is dropped"


def test_half_of_the_canvases_go_on_after_the_end(folder):
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
    [
        dict(time_conditioning=True),
        dict(causal=True, dropout=0.1),
        dict(),
        dict(durations=True),
        dict(durations=True, spelling=True),
        dict(causal=True, durations=True, spelling=True),
    ],
    ids=["time conditioning", "autoregressive", "diffusion", "durations", "spelling", "AR with spelling"],
)
def test_every_kind_trains_validates_and_gives_samples(folder, tmp_path, model):
    run = train_config(folder, model, taste=dict(quantizer=dict(kind="rvq", layers=2)))
    metrics = train(run, tmp_path, device="cpu", progress_bar=False)
    assert (
        ("accuracy" in metrics) == ("causal" in model)
        and ("accuracy_half" in metrics) == ("causal" not in model)
        and all(v == v for v in metrics.values())
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
    )  # codecs are tested elsewhere; here, what they get
    waves = task.samples(task.model)
    assert (
        len(waves) == 4
        and all(len(w) for w in waves.values())
        and {name.rsplit("-", 1)[1] for name in waves} == {"decoded", "oracle"}
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
    "model", [dict(causal=True, dropout=0.1), dict()], ids=["autoregressive", "diffusion"]
)
def test_killed_five_times(folder, tmp_path, model):
    "As test_train kills a toy, here the decoders: corruption, codebooks of RVQ, dropout, EMA"
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


def test_time_matters_only_with_time_conditioning(folder):
    for conditioned in (True, False):
        task = DecoderTask(train_config(folder, dict(time_conditioning=conditioned)))
        bound = task.model.eval().decoder.bind(
            task.model.condition(batch := task.batch(task.corpora["dev"], [0, 1]))[0]
        )
        early, late = (bound(batch.target_tokens, batch.lengths, torch.full((2,), t)) for t in (0.1, 0.9))
        assert torch.equal(early, late) != conditioned


def test_a_mean_over_dev_is_one_over_tokens(folder):
    task = DecoderTask(replace(train_config(folder), batch_seconds=8.0))
    sizes = []
    means = task.mean_over_dev(
        lambda batch, row_keys: (
            sizes.append((batch.tokens, len(batch.ids))) or dict(loss=torch.tensor(float(batch.tokens)))
        )
    )
    assert len(sizes) > 1 and len({tokens / rows for tokens, rows in sizes}) > 1
    assert (
        means["score"]
        == pytest.approx(sum(tokens**2 for tokens, _ in sizes) / sum(tokens for tokens, _ in sizes))
        != sum(tokens * rows for tokens, rows in sizes) / 4
    )


def test_a_copy_attends_to_the_layers_of_the_original(folder):
    task = DecoderTask(train_config(folder, taste=dict(key_layer=-1, value_layer=0)))
    batch, model = task.batch(task.corpora["dev"], [0, 1]), task.model.eval()
    copy = deepcopy(model)
    assert torch.equal(copy.condition(batch)[0].vectors, model.condition(batch)[0].vectors)
    assert not torch.equal(
        copy.condition(replace(batch, source=batch.source[:, :1]))[0].vectors,
        model.condition(batch)[0].vectors,
    )


def test_an_encoder_learns_up_to_the_layer_that_is_attended_to(folder):
    for layers, taught in (
        (dict(key_layer=1, value_layer=1), [True, False]),
        (dict(key_layer=1), [True, True]),
    ):
        task = DecoderTask(
            train_config(folder, encoder="trained", recogniser=f"{folder}/canary", taste=layers)
        )
        batch = task.batch(task.corpora["train"], [0, 1])
        task.loss(batch, single_batch(task, batch))["loss"].backward()
        for layer, learns in zip(task.model.encoder.layers, taught, strict=True):
            assert {p.requires_grad for p in layer.parameters()} == {learns} and all(
                (p.grad is not None) == learns for p in layer.parameters()
            )


def test_durations_fill_every_recording(folder):
    "Each piece takes its tokens; the loss is what the prediction is off; other recognizers are refused"
    task = DecoderTask(train_config(folder, dict(durations=True)))
    for name, durations in task.durations.items():
        assert int(durations.sum()) == len(task.ids[name]) and len(durations) == len(task.pieces[name])
    batch = task.batch(task.corpora["train"], [2, 0])
    assert (batch.durations.sum(1) == batch.lengths).all()
    update = single_batch(task, batch)
    with torch.no_grad():
        first = task.loss(batch, update)
        task.model.decoder.placement.rate.bias += 5
        second = task.loss(batch, update)
    assert second["duration"] > first["duration"] and second["ce"] == first["ce"]
    assert second["loss"] - first["loss"] == pytest.approx(
        DURATION_WEIGHT * float(second["duration"] - first["duration"]), rel=1e-3
    )
    with pytest.raises(ValueError, match="choose a Whisper"):
        DecoderTask(train_config(folder, dict(durations=True), recogniser=f"{folder}/canary"))
    with pytest.raises(ValueError, match="set options.encoder=cached"):
        DecoderTask(train_config(folder, dict(durations=True), encoder="frozen"))
    with pytest.raises(ValueError, match="needs durations=True"):
        DecoderTask(train_config(folder, dict(spelling=True)))


def test_an_encoder_of_whisper_is_not_trained(folder):
    with pytest.raises(ValueError, match="encoder=trained: only with a Canary"):
        DecoderTask(train_config(folder, encoder="trained"))


def test_a_batch_has_the_states_of_its_rows(folder):
    "However they are packed, cached or computed in every step"
    cached, frozen = (DecoderTask(train_config(folder, encoder=how)) for how in ("cached", "frozen"))
    corpus = cached.corpora["train"]
    shortest = int(corpus.seconds.argmin())
    rows = [int(corpus.seconds.argmax()), shortest]
    batch = cached.batch(corpus, rows)
    conditions = [t.model.eval().condition(t.batch(t.corpora["train"], rows))[0] for t in (cached, frozen)]
    a, b = (c.vectors for c in conditions)
    assert (a - b).norm() < 0.02 * b.norm(), "they are kept in bfloat16"
    alone = cached.batch(corpus, [shortest])
    n = int(alone.source_lengths)
    assert torch.equal(batch.source[1, :, :n], alone.source[0]) and not batch.source[1, :, n:].any()
    assert int(batch.source_lengths[1]) == n < batch.source.shape[2]


def test_a_share_of_the_context_is_masked_in_training_alone(folder):
    options = dict(context_masking=0.3)
    task = DecoderTask(train_config(folder, dict(causal=True), **options))
    batch, seen = task.batch(task.corpora["train"], range(8)), []
    mask_token_id = task.model.decoder.config.mask_token_id

    class Bound:
        decoder = task.model.decoder

        def __call__(self, past, lengths, where):
            seen.append(past == mask_token_id)
            return torch.zeros(len(where), task.model.decoder.config.speech_vocab_size + 2)

    for k in range(20):
        next_token_loss(Bound(), batch, random.row_keys(k, 8), 0.3)
    masked = torch.stack(seen)
    assert masked[:, :, 0].all(), "the first input is the mask"
    share = masked[:, :, 1:].float()
    assert abs(share.mean() - 0.3) < 4 * (0.21 / share.numel()) ** 0.5
    assert torch.equal(masked[0], (next_token_loss(Bound(), batch, random.row_keys(0, 8), 0.3), seen[-1])[1])
    row_keys, t = task.draw(batch, Update(1, 0, 0, 8))
    totals = task.denominators(batch, row_keys, t)
    with torch.no_grad():
        clean = task.losses(batch, task.model.eval(), row_keys, t, 0.0, totals)["ce"]
        hidden = task.losses(batch, task.model.train(), row_keys, t, 0.0, totals)["ce"]
    assert clean != hidden
    with pytest.raises(ValueError, match="context_masking: only for autoregressive decoders"):
        DecoderTask(train_config(folder, **options))


def test_a_weight_of_the_loss_is_that_of_training_alone(folder):
    "What is minimized is eq. 4 or eq. 3; what dev reports is the same, so that runs can be compared"
    names, found, scores = ("plain", "elbo"), {}, []
    for name in names:
        task = DecoderTask(train_config(folder, loss_weight=name))
        batch = task.batch(task.corpora["train"], [0, 1, 2, 3])
        update = single_batch(task, batch)
        row_keys, t = task.draw(batch, update)
        found[name] = float(task.loss(batch, update)["ce"].detach())
        corrupted = task.corrupt(batch, row_keys, t, name)
        bound = task.model.decoder.bind(task.condition(batch, task.model, row_keys, 0.1)[0])
        normalize = "masked" if name == "plain" else "maskable"
        expected = diffusion_loss(bound, corrupted, name, normalize).loss
        assert found[name] == pytest.approx(float(expected.detach()), rel=1e-5)
        scores.append(task.validate(task.model.eval())["score"])
    assert found["plain"] != found["elbo"] and scores[0] == scores[1]
    with pytest.raises(ValueError, match="options.loss_weight: only for diffusion decoders"):
        DecoderTask(train_config(folder, dict(causal=True), loss_weight="elbo", eos_padding=0.0))


def test_positions_of_text_follow_the_corpus(folder, tmp_path):
    task = DecoderTask(train_config(folder))
    assert task.model.decoder.config.position_scale == round(task.tokens_per_piece, 1)
    given = DecoderTask(train_config(folder, dict(position_scale=5.0)))
    assert given.model.decoder.config.position_scale == 5.0


def test_another_start_is_refused(folder, tmp_path):
    train(train_config(folder), tmp_path / "first", device="cpu", progress_bar=False)
    start = tmp_path / "first" / "model"
    second = train_config(folder, init_from=str(start), taste=dict(quantizer=dict(kind="fsq", layers=2)))
    train(second, tmp_path / "second", device="cpu", progress_bar=False)
    asr = load_asr(folder / "recogniser")
    again = DecoderTask(
        replace(second, options=second.options | dict(init_from=str(tmp_path / "second" / "model")))
    ).model.taste.state_dict()
    kept = Taste.from_pretrained(tmp_path / "second" / "model" / "taste", asr).state_dict()
    assert [name for name in kept if name.startswith("quantizer")] and all(
        torch.equal(again[name], kept[name]) for name in kept
    ), "the same quantizer goes on, another begins anew"
    for options, words in (
        (
            dict(condition_dropout=0.4),
            "condition_dropout=0.4: should be from 0 to 1/3, since it is taken three times",
        ),
        (dict(eos_padding=0.5), "eos_padding: only for diffusion decoders"),
    ):
        with pytest.raises(ValueError, match=words):
            DecoderTask(train_config(folder, dict(causal="eos_padding" in options), **options))
    with pytest.raises(
        ValueError,
        match="was trained with another quantizer .*fsq.*; start from a first stage",
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
        match="options.init_from=.*none/model: no exported model there; the run in .*none exports it",
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
    DecoderTask(
        train_config(folder, init_from=str(start), taste=dict(key_layer=2))
    )  # the last of two, by its number
    with pytest.raises(
        ValueError, match="its keys and values come from layers -1 and -1, and this run's from 0 and -1"
    ):
        DecoderTask(train_config(folder, init_from=str(start), taste=dict(key_layer=0)))
    with pytest.raises(ValueError, match="layers=0, rank=4, dim=16, and this run's 0, 2, 16"):
        DecoderTask(train_config(folder, init_from=str(start), taste=dict(rank=2)))
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
    printed, run = capsys.readouterr(), tmp_path / "runs" / "tiny"
    assert (
        f"the model is in {Path('runs/tiny/model')}" in printed.out
        and "score" in printed.out
        and "2/2" in printed.err
        and "tokens/s" in printed.err
    )
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {1, 2} <= {row["step"] for row in rows if "loss" in row} and list(run.glob("board/events*"))
    assert SpeechDecoder.from_pretrained(run / "model" / "decoder").config.dim == 48
    monkeypatch.setenv("RANK", "1")
    assert main([*shell, "--set", "steps=2", "--set", "log_every=1"]) == 0
    assert capsys.readouterr().out == "", "of many processes one prints"


def test_durations_are_learned_from_texts(folder, tmp_path):
    run = TrainConfig(
        "diffuspeech.tasks.duration:DurationTask",
        str(folder),
        dict(dim=16, ffn_dim=32),
        dict(rows=3, recogniser=f"{folder}/recogniser", tokenizer=f"{folder}/tokenizer"),
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
    metrics = train(run, tmp_path, device="cpu", progress_bar=False)
    loss = history(tmp_path)["train"]["loss"]
    assert (
        sum(loss[-9:]) < 0.5 * sum(loss[:9])
        and {f"coverage_{q:g}" for q in task.model.config.quantiles} < metrics.keys()
    )
    at = DurationPredictor.from_pretrained(tmp_path / "model", text_table(load_asr(folder / "recogniser")))(
        batch.condition
    )
    assert (
        task.versions["recordings"]
        == json.loads((tmp_path / "step-00000060/state.json").read_text())["versions"]["recordings"]
    ), "another corpus would be noticed"
    assert (at.diff(dim=1) >= 0).all() and abs(at[:, 3].mean() / batch.durations.mean() - 1) < 0.5


def batches_of(task, sizes, step=1, epoch=0):
    "Rows 0, 1, ... of the training corpus cut into batches of these sizes, each with its update"
    cuts, batches = [sum(sizes[:k]) for k in range(len(sizes) + 1)], []
    for first, end in zip(cuts, cuts[1:]):
        batch = task.batch(task.corpora["train"], range(first, end))
        batches.append((batch, Update(step, epoch, first, cuts[-1])))
    totals = {}
    for batch, update in batches:
        for name, value in task.counts(batch, update).items():
            totals[name] = totals.get(name, 0) + value
    return [(batch, replace(update, totals=totals)) for batch, update in batches]


def gradient(task, batches):
    "The gradient of an update, and its loss"
    task.model.zero_grad()
    losses = [task.loss(batch, update)["loss"] for batch, update in batches]
    for loss in losses:
        loss.backward()
    grads = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
    return torch.cat(grads), sum(loss.item() for loss in losses)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 7), (3, 3, 2)])
@pytest.mark.parametrize("model", [dict(), dict(causal=True)], ids=["diffusion", "autoregressive"])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(folder, model, sizes):
    quantizer = dict(kind="rvq", layers=2, kmeans_init=False)
    task = DecoderTask(train_config(folder, model, taste=dict(quantizer=quantizer)))
    task.model.taste.quantizer.eval()  # its codebooks would move in every call
    whole, loss = gradient(task, batches_of(task, (8,)))
    parts, same = gradient(task, batches_of(task, sizes))
    assert (parts - whole).norm() < 1e-4 * whole.norm() and abs(same - loss) < 1e-4 * loss
    means, _ = gradient(task, [(batch, single_batch(task, batch)) for batch, _ in batches_of(task, sizes)])
    assert (means / len(sizes) - whole).norm() > 1e-3 * whole.norm(), (
        "the mean of the parts' means is another"
    )


def corrupted_rows(task, batches):
    "For each utterance the number that decides about each of its positions, its time and its masks"
    rows = {}
    for batch, update in batches:
        row_keys, t = task.draw(batch, update)
        c = task.corrupt(batch, row_keys, t)
        for name, key, at, length, mask in zip(batch.ids, row_keys, c.t, c.lengths, c.masked):
            rows[name] = (int(key), float(at), int(length), mask[:length].tolist())
    return rows


def test_times_are_stratified_over_the_whole_update(folder):
    task = DecoderTask(train_config(folder))
    whole = corrupted_rows(task, batches_of(task, (8,)))
    for sizes in ((4, 4), (1, 7), (3, 3, 2)):
        assert corrupted_rows(task, batches_of(task, sizes)) == whole, (
            "the same masks, however the batch is cut"
        )
    times = sorted(t for _, t, _, _ in whole.values())
    assert all(abs((b - a) - 1 / 8) < 1e-6 for a, b in zip(times, times[1:])), "one in each eighth"
    later = corrupted_rows(task, batches_of(task, (8,), step=2))
    assert all(later[name][1] != whole[name][1] for name in whole), "each update shifts them"


def test_masks_are_those_of_the_epoch_and_the_utterance(folder):
    "At one time, whatever batch and step the utterance is in; in another epoch it has others"
    task = DecoderTask(train_config(folder))
    corpus, t = task.corpora["train"], torch.tensor([0.5])

    def masks(rows, epoch, step):
        batch = task.batch(corpus, rows)
        row_keys, _ = task.draw(batch, Update(step, epoch, 0, len(rows)))
        c = task.corrupt(batch, row_keys, t.expand(len(rows)))
        return {name: mask[:n].tolist() for name, n, mask in zip(batch.ids, c.lengths, c.masked)}

    first = masks(range(8), 0, 1)
    assert masks([5, 2, 7], 0, 9) == {name: first[name] for name in masks([5, 2, 7], 0, 9)}
    assert masks([3], 0, 4)[corpus.rows[3]["id"]] == first[corpus.rows[3]["id"]]
    assert all(masks(range(8), 1, 1)[name] != first[name] for name in first)


def test_epochs_are_counted_by_the_loop(folder, tmp_path):
    "An update at the border of two epochs has batches of both, each with its own masks"
    seen = []

    class Watched(DecoderTask):
        def loss(self, batch, update):
            seen.append((update.step, update.epoch, update.first_row, update.num_rows, len(batch.ids)))
            return super().loss(batch, update)

    run = replace(train_config(folder), batch_seconds=8.0, batches_per_update=2, steps=5)
    train(run, tmp_path, "cpu", progress_bar=False, task=Watched)
    epochs = {}
    for step, epoch, first, rows, n in seen:
        epochs.setdefault(step, []).append((epoch, first, rows, n))
    assert len({epoch for _, epoch, *_ in seen}) > 1 and [step for step, *_ in seen] == [
        1,
        1,
        2,
        2,
        3,
        3,
        4,
        4,
        5,
        5,
    ]
    for (_, first, rows, n), (_, second, same, m) in epochs.values():
        assert (first, second, rows, same) == (0, n, n + m, n + m)
