"A decoder is distilled on real clips from the one that it began as"

from dataclasses import replace

import pytest
import torch
from small import prepare_clips, save_random_models

from diffuspeech.asr.recognizer import load_asr
from diffuspeech.base.checkpoint import builtin_checkpoint
from diffuspeech.models.decoder import SpeechDecoder
from diffuspeech.tasks.distill import DistillTask
from diffuspeech.tokenizers.taste import Taste
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.journal import history
from diffuspeech.train.loop import train
from diffuspeech.train.plan import components
from diffuspeech.train.task import resolve_preset


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A folder with a corpus, and in it a decoder after a few steps"
    folder = tmp_path_factory.mktemp("distill")
    prepare_clips(folder, train=6, dev=2)
    save_random_models(folder)
    train(train_config(folder, "decoder:DecoderTask", 20), folder / "first", device="cpu", progress_bar=False)
    return folder


def train_config(folder, task, num_steps, **options):
    options = dict(tokenizer=f"{folder}/tokenizer", recogniser=f"{folder}/recogniser") | (
        options
        if "init_from" in options
        else options | dict(taste=dict(rank=4, dim=16, quantizer=dict(kind="fsq", layers=2)))
    )
    return TrainConfig(
        f"diffuspeech.tasks.{task}",
        str(folder),
        dict(dim=48, ffn_dim=64, embedding_dim=32),
        options,
        steps=num_steps,
        lr=3e-3,
        warmup_steps=2,
        ema_decay=0.0,
        precision="fp32",
        batch_seconds=20.0,
        validate_every=10,
        save_every=10,
    )


def test_a_student_learns_from_its_teacher(first):
    start = first / "first" / "model"
    run = train_config(first, "distill:DistillTask", 30, init_from=str(start), steps=3)
    train(run, first / "few", device="cpu", progress_bar=False)
    log = history(first / "few")["train"]
    assert sum(log["loss"][-5:]) < 0.95 * sum(log["loss"][:5]) and sum(log["ce"][-5:]) < 0.95 * sum(
        log["ce"][:5]
    ), "it learns to predict at once what took three steps"
    made, was = (
        SpeechDecoder.from_pretrained(place / "decoder").state_dict()
        for place in (first / "few" / "model", start)
    )
    assert any((made[name] - was[name]).abs().max() > 1e-3 for name in was)
    taste, kept = (
        Taste.from_pretrained(place / "taste", load_asr(first / "recogniser")).state_dict()
        for place in (first / "few" / "model", start)
    )
    assert all(torch.equal(taste[name], kept[name]) for name in kept), (
        "the vectors stay what they were, quantizer included"
    )


def test_a_teacher_of_other_layers(first):
    run = train_config(first, "decoder:DecoderTask", 2)
    train(
        replace(run, options=run.options | dict(taste=run.options["taste"] | dict(value_layer=0))),
        first / "other",
        device="cpu",
        progress_bar=False,
    )
    task = DistillTask(
        train_config(first, "distill:DistillTask", 2, init_from=str(first / "other" / "model"))
    )
    assert (
        task.model.taste.config.value_layer == 0 and task.batch(task.corpora["dev"], [0]).source.shape[1] == 2
    )


def test_what_cannot_be_distilled(first):
    with pytest.raises(ValueError, match="options.init_from: needs a diffusion decoder"):
        DistillTask(train_config(first, "distill:DistillTask", 2, init_from=""))
    with pytest.raises(ValueError, match="encoder=trained: distillation leaves the encoder as it is"):
        DistillTask(
            train_config(
                first, "distill:DistillTask", 2, init_from=str(first / "first" / "model"), encoder="trained"
            )
        )
    with pytest.raises(ValueError, match="taste"):
        resolve_preset("ddm-few", ['options.taste={"quantizer": {"kind": "rvq"}}'])
    with pytest.raises(ValueError, match="is autoregressive; needs a diffusion decoder"):
        resolve_preset("ddm-few", [f"options.init_from={builtin_checkpoint('ar')}"])


def test_a_teacher_that_does_not_exist_yet(tmp_path):
    "The run can be planned, and is not started"
    run = resolve_preset("ddm-few", [f"options.init_from={tmp_path}/model"])
    assert [part.name for part in components(run)][-1] == "teacher"
    with pytest.raises(ValueError, match="no exported model there"):
        train(run, tmp_path / "run", device="cpu")
