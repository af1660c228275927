"The tokenizer on Whisper's kept states: its losses, a short training, and a codec on top of it"

from dataclasses import replace

import pytest
import torch
from small import prepare_clips, save_random_whisper

from diffuspeech.asr.align import PHONES, Alignment, Phone
from diffuspeech.base import random
from diffuspeech.data.audio import load_clip
from diffuspeech.tasks.flow import FlowTask
from diffuspeech.tasks.s3_whisper import S3WhisperTask, mask_time
from diffuspeech.tasks.tokenizer import frame_phones
from diffuspeech.tokenizers.s3_whisper import S3Whisper
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.journal import history
from diffuspeech.train.loop import train
from diffuspeech.train.task import single_batch
from diffuspeech.voice.codec import SpeechCodec
from diffuspeech.voice.vocoder import Vocos, VocosConfig

HOW = dict(warmup_steps=1, ema_decay=0.0, precision="fp32", batch_seconds=12.0)
SMALL = dict(layer=1, hidden=16, encoder_layers=1, ctc_layers=1, heads=2, ffn_dim=16, dropout=0.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("states")
    prepare_clips(folder, vocoder="mel", train=4, dev=2)
    save_random_whisper(folder / "whisper")
    return folder


def run_of(corpus, frame_rate=50, **options):
    model = SMALL | dict(recogniser=str(corpus / "whisper"), frame_rate=frame_rate)
    options = dict(quantizer_warmup=2, text_share=1.0, mask_share=0.0) | options
    task = "diffuspeech.tasks.s3_whisper:S3WhisperTask"
    return TrainConfig(task, str(corpus), model, options, steps=12, lr=0.01, **HOW, validate_every=6)


@pytest.mark.parametrize("frame_rate", [50, 25])
def test_some_steps_lower_the_loss_and_the_codec_synthesizes(corpus, tmp_path, frame_rate):
    train(run_of(corpus, frame_rate), tmp_path / "c/speech-tokens", device="cpu", progress_bar=False)
    scores = history(tmp_path / "c/speech-tokens")["validation"]
    assert scores["score"][-1] < scores["score"][0] and min(scores["text"]) > 0, scores
    tokens = str(tmp_path / "c/speech-tokens/model")
    flow = TrainConfig(
        "diffuspeech.tasks.flow:FlowTask",
        str(corpus),
        dict(dim=16, encoder_layers=1, layers=1, heads=2, ffn_dim=16),
        dict(tokenizer=tokens),
        steps=2,
        **HOW,
        validate_every=2,
    )
    train(flow, tmp_path / "c/flow", device="cpu", progress_bar=False)
    Vocos(VocosConfig(dim=16, layers=1, ffn_dim=16)).save_pretrained(tmp_path / "c/vocoder")
    codec, wave = SpeechCodec.from_pretrained(tmp_path / "c"), load_clip()
    assert codec.frame_rate == frame_rate and codec.version.startswith("s3-whisper-")
    assert codec.flow.config.frames_per_id == 100 // frame_rate and codec.flow.config.level_features == 80
    ids, lengths = codec.encode(wave[None])
    made = codec.decode(ids, lengths, reference=[wave])
    assert made.shape == (1, int(lengths) * 16000 // frame_rate) and made.isfinite().all()
    long = codec.features(ids.repeat(1, 5)[:, : 13 * frame_rate], codec.speaker_embeddings([wave]), steps=2)
    assert long.shape == (1, 1300, 80) and long.isfinite().all(), "in windows of seconds, whatever the rate"
    with pytest.raises(ValueError, match=f"for {100 // frame_rate} of 100 frames; leave it out"):
        FlowTask(replace(flow, model=flow.model | dict(frames_per_id=8)))


def test_kept_states_give_the_ids_of_the_waves(corpus):
    task = S3WhisperTask(run_of(corpus))
    batch, tokenizer = task.train.batch([0, 1]), S3Whisper(task.model.tokenizer.config, task.whisper).eval()
    tokenizer.load_state_dict(task.model.tokenizer.state_dict())
    task.model.eval()
    with torch.no_grad():
        hidden, counts = task.features(batch)
        ids = tokenizer.quantizer.encode(hidden, counts)[..., 0]
    found, lengths = tokenizer.encode(batch.waves, batch.lengths)
    assert torch.equal(counts, lengths) and (ids == found).float().mean() > 0.9, "but for bfloat16"


def test_the_text_is_read_through_the_frozen_decoder(corpus):
    task = S3WhisperTask(run_of(corpus, text_weight=2.0))
    batch = task.train.batch([0, 1, 2])
    parts = task.loss(batch, single_batch(task, batch))
    weighted = (("ctc", 1), ("early_ctc", 0.5), ("phones", 1), ("feature", 1), ("text", 2))
    assert torch.isclose(parts["loss"], sum(weight * parts[name] for name, weight in weighted))
    parts["text"].backward()
    below = task.model.tokenizer.in_proj.weight.grad
    assert below.abs().sum() > 0 and all(p.grad is None for p in task.whisper.parameters())
    none = S3WhisperTask(run_of(corpus, text_share=0.0))
    assert none.loss(batch, single_batch(none, batch))["text"] == 0
    off = S3WhisperTask(run_of(corpus, text_weight=0.0))
    assert off.model.text_head is None and "text" not in off.loss(batch, single_batch(off, batch))


def test_spans_of_states_are_masked(corpus):
    keys = random.row_keys(0, 3)
    masked = mask_time(torch.ones(3, 3000, 2), keys, 0.2) == 0
    assert 0.17 < masked.float().mean() < 0.23 and torch.equal(masked[..., 0], masked[..., 1])
    assert torch.equal(masked[1:2], mask_time(torch.ones(1, 3000, 2), keys[1:2], 0.2) == 0)
    task = S3WhisperTask(run_of(corpus, mask_share=0.5))
    batch = task.train.batch([0])
    with torch.no_grad():
        clean, augmented = (task.features(batch, u)[0] for u in (None, single_batch(task, batch)))
    assert not torch.equal(clean, augmented)


def test_phones_at_both_rates():
    "A token's phone is the one in its middle"
    alignment = Alignment([], [Phone("AA", 0.1, 0.2, 0), Phone("B", 0.2, 0.24, 0)], 0.4)
    at_50 = frame_phones(alignment, 20, frame_rate=50)
    expected = [0] * 5 + [1 + PHONES.index("AA")] * 5 + [1 + PHONES.index("B")] * 2 + [0] * 8
    assert at_50.tolist() == expected
    middles = [int((k + 0.5) / 25 * 50) for k in range(10)]
    assert frame_phones(alignment, 10).tolist() == at_50[middles].tolist()
