"A corpus is prepared, tokenizer and flow are trained for a few steps, and the exported codec synthesizes"

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import prepare_clips, random_hifigan

from diffuspeech.data import audio
from diffuspeech.data.manifest import Manifest, write_manifest
from diffuspeech.tasks.flow import FlowTask
from diffuspeech.tasks.tokenizer import TokenizerTask
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.journal import history
from diffuspeech.train.loop import train
from diffuspeech.train.task import single_batch
from diffuspeech.voice.codec import SpeechCodec
from diffuspeech.voice.flow import speaker_embedding
from diffuspeech.voice.prepared import PreparedCorpus, prepare_corpus
from diffuspeech.voice.vocoder import Vocos, VocosConfig

TOKENIZER = dict(hidden=32, encoder_layers=1, ctc_layers=1, heads=2, ffn_dim=32, channels=8)
FLOW = dict(dim=32, layers=1, heads=2, ffn_dim=32)
HOW = dict(
    steps=4,
    lr=1e-3,
    warmup_steps=1,
    ema_decay=0.0,
    precision="fp32",
    batch_seconds=10.0,
    validate_every=2,
    save_every=4,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voice")
    prepare_clips(folder, train=4, dev=2)
    return folder


@pytest.fixture(scope="module")
def tokens(corpus):
    "A run of the tokenizer"
    run = TrainConfig(
        "diffuspeech.tasks.tokenizer:TokenizerTask",
        str(corpus),
        TOKENIZER,
        dict(augment_after=1, quantizer_warmup=2),
        **HOW,
    )
    train(run, corpus / "codec" / "speech-tokens", device="cpu", progress_bar=False)
    return run


def flow_run(corpus):
    return TrainConfig(
        "diffuspeech.tasks.flow:FlowTask",
        str(corpus),
        FLOW,
        dict(tokenizer=str(corpus / "codec" / "speech-tokens" / "model")),
        **HOW,
    )


def test_trained_models_synthesize(corpus, tokens):
    train(flow_run(corpus), corpus / "codec" / "flow", device="cpu", progress_bar=False)
    for part in ("speech-tokens", "flow"):
        log = history(corpus / "codec" / part)
        assert len(log["validation"]["score"]) == 2 and torch.tensor(log["train"]["loss"]).isfinite().all(), (
            part
        )
    codec, wave = SpeechCodec.from_pretrained(corpus / "codec"), audio.load_clip()
    ids, lengths = codec.encode(wave[None])
    made = codec.decode(ids, lengths, reference=[wave])
    assert made.shape == (1, int(lengths) * 640) and made.isfinite().all() and codec.vocoder.name == "world"
    metadata = json.loads((corpus / "codec" / "flow" / "model" / "config.json").read_text())["metadata"]
    assert metadata["tokenizer"] == codec.version and metadata["vocoder"] == "world"


def test_a_flow_for_another_vocoder(corpus, tokens, tmp_path):
    random_hifigan(32).save_pretrained(tmp_path / "gan")
    for split, n in (("train", 4), ("dev", 2)):
        rows = [replace(u, audio=u.audio.resolve()) for u in Manifest(corpus / f"{split}.jsonl")]
        write_manifest(tmp_path / f"{split}.jsonl", rows)
        assert len(rows) == n
        prepare_corpus(tmp_path / f"{split}.jsonl", speed_copies=0, vocoder=str(tmp_path / "gan"), workers=1)
    run = replace(flow_run(corpus), data=str(tmp_path))
    train(run, tmp_path / "codec" / "flow", device="cpu", progress_bar=False)
    (tmp_path / "codec" / "speech-tokens").symlink_to(corpus / "codec" / "speech-tokens")
    codec = SpeechCodec.from_pretrained(tmp_path / "codec")
    ids, lengths = codec.encode(audio.load_clip()[None])
    assert (
        codec.flow.config.feature_dim == 80
        and codec.vocoder.dim == 80
        and codec.decode(ids, lengths).shape == (1, int(lengths) * 640)
    )
    with pytest.raises(ValueError, match="80 features, but the vocoder world needs 43"):
        SpeechCodec.from_pretrained(tmp_path / "codec", vocoder="world")


def test_a_flow_on_mels_and_its_vocoder(corpus, tokens, tmp_path):
    "The codec takes the Vocos beside the flow, and no network that reads other features"
    for split in ("train", "dev"):
        rows = [replace(u, audio=u.audio.resolve()) for u in Manifest(corpus / f"{split}.jsonl")]
        write_manifest(tmp_path / f"{split}.jsonl", rows)
        prepare_corpus(tmp_path / f"{split}.jsonl", speed_copies=0, vocoder="mel", workers=1)
    train(
        replace(flow_run(corpus), data=str(tmp_path)), tmp_path / "c/flow", device="cpu", progress_bar=False
    )
    (tmp_path / "c/speech-tokens").symlink_to(corpus / "codec" / "speech-tokens")
    Vocos(VocosConfig(dim=16, layers=1, ffn_dim=16)).save_pretrained(tmp_path / "c/vocoder")
    codec, wave = SpeechCodec.from_pretrained(tmp_path / "c"), audio.load_clip()
    assert codec.vocoder.name == "vocos" and codec.vocoder.config.dim == 16
    assert codec.flow.config.feature_dim == codec.flow.config.level_features == 80
    ids, lengths = codec.encode(wave[None])
    made = codec.decode(ids, lengths, reference=[wave])
    assert made.shape == (1, int(lengths) * 640) and made.isfinite().all()
    random_hifigan(32).save_pretrained(tmp_path / "gan")
    with pytest.raises(ValueError, match="predicts the features of mel, and the vocoder hifigan-gan reads"):
        SpeechCodec.from_pretrained(tmp_path / "c", vocoder=str(tmp_path / "gan"))
    with pytest.raises(ValueError, match="80 features, but the vocoder world needs 43"):
        SpeechCodec.from_pretrained(tmp_path / "c", vocoder="world")


def test_the_louder_frames_are_by_the_mean_of_all_bands():
    "A first band that is loud where speech is not does not choose the frames"
    features = torch.zeros(1, 11, 80)
    features[0, :6, 1:], features[0, 5:, 0] = 1.0, 5.0
    frames = torch.tensor([11])
    assert speaker_embedding(features, frames, 80)[0, 1:80].eq(1).all()
    assert speaker_embedding(features, frames)[0, 1:80].lt(0.5).all()


@pytest.mark.parametrize("task", ["tokens", "flow"])
def test_all_tensors_move_to_the_device(corpus, tokens, task):
    "On the meta device an operation with a tensor left on the CPU fails, as on a GPU"
    task = TokenizerTask(tokens) if task == "tokens" else FlowTask(flow_run(corpus))
    task.model.to("meta")
    batch = task.train.batch([0, 1])
    if isinstance(task, FlowTask):
        assert task.loss(batch, single_batch(task, batch))["loss"].is_meta
    else:
        hidden, counts = task.model.tokenizer.extract_features(
            batch.waves.to("meta"), batch.lengths.to("meta")
        )
        assert hidden.is_meta and counts.is_meta


def clips(folder, rows):
    write_manifest(folder / "dev.jsonl", rows)
    return prepare_corpus(folder / "dev.jsonl", speed_copies=0, vocoder="none", workers=1)


def test_a_corpus_that_changed_is_prepared_again(corpus, tmp_path):
    rows = [replace(u, audio=u.audio.resolve()) for u in Manifest(corpus / "train.jsonl")]
    assert len(PreparedCorpus(clips(tmp_path, rows[:2]))) == 2
    (shard,) = (tmp_path / "prepared/dev").glob("shard-0000-*.safetensors")
    was = shard.stat().st_mtime_ns
    assert len(PreparedCorpus(clips(tmp_path, rows[:2]))) == 2 and shard.stat().st_mtime_ns == was, (
        "an unchanged shard is not written"
    )
    made = PreparedCorpus(clips(tmp_path, [rows[1], replace(rows[0], text="something else"), *rows[2:]]))
    assert [r["id"] for r in made.rows] == [rows[1].id, rows[0].id, *(u.id for u in rows[2:])] and made.rows[
        1
    ]["text"] == "something else"


def test_what_is_kept_of_a_corpus_grows_with_it(corpus, tmp_path):
    rows = [replace(u, audio=u.audio.resolve()) for u in Manifest(corpus / "train.jsonl")]
    asked = []

    def cached(rows, value):
        made = PreparedCorpus(clips(tmp_path, rows))
        asked.clear()

        def make(part):
            asked.extend(row["id"] for row in part.rows)
            return {id: torch.full((1,), value) for id in asked}

        return {id: float(x) for id, x in made.cached(tmp_path / "kept", make).items()}

    a, b, c = (u.id for u in rows[:3])
    assert cached(rows[:2], 1.0) == {a: 1, b: 1} and asked == [a, b]
    assert cached(rows[:2], 2.0) == {a: 1, b: 1} and not asked
    assert cached(rows[:3], 3.0) == {a: 1, b: 1, c: 3} and asked == [c], "only the new one"
    changed = replace(rows[0], text="something else")
    assert cached([changed, rows[2]], 4.0) == {a: 4, c: 3} and asked == [a], "only what changed"
    (tmp_path / "kept").write_bytes(b"damaged")
    assert cached(rows[:1], 5.0) == {a: 5} and asked == [a]


def test_bad_lines_are_skipped(corpus, tmp_path):
    rows = [replace(u, audio=u.audio.resolve()) for u in Manifest(corpus / "train.jsonl")]
    bad = replace(rows[2], audio=tmp_path / "gone.wav"), replace(rows[3], text="<beep>")
    write_manifest(tmp_path / "dev.jsonl", [*rows[:2], *bad])
    with open(tmp_path / "dev.jsonl", "a") as f:
        f.write('{"audio_filepath": \n')
    made = PreparedCorpus(prepare_corpus(tmp_path / "dev.jsonl", speed_copies=0, vocoder="none", workers=1))
    assert (
        len(made) == 2
        and len(made.skipped) == 3
        and "dev.jsonl:3" in made.skipped[0]
        and "gone.wav" in made.skipped[0]
        and f"{rows[3].id}: '<beep>' holds no word" in made.skipped[1]
        and "dev.jsonl:5" in made.skipped[2]
    )


def test_a_prepared_corpus_refuses_test_clips(corpus, tmp_path):
    rows = [
        replace(u, audio=Path(u.audio).resolve(), split="test-clean")
        for u in Manifest(corpus / "train.jsonl")
    ]
    with pytest.raises(ValueError, match=f"holds {rows[0].id}, a test clip"):
        PreparedCorpus(clips(tmp_path, rows[:1]))
