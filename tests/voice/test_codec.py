"The built-in codec: its ids are pinned, every digit is alive, what it says can be understood"

import json
from pathlib import Path

import pytest
import torch

from diffuspeech.base.checkpoint import builtin_checkpoint, read_config
from diffuspeech.data import text
from diffuspeech.data.audio import load_clip
from diffuspeech.data.manifest import load_audio
from diffuspeech.evaluate.clips import load_bundled_clips
from diffuspeech.evaluate.metrics import Whisper, wer
from diffuspeech.tasks.tokenizer import edit_distance
from diffuspeech.voice.codec import SpeechCodec
from diffuspeech.voice.flow import speaker_embedding

GOLDEN = Path(__file__).with_name("golden_ids.json")


@pytest.fixture(scope="module")
def codec():
    return SpeechCodec.from_pretrained()


@pytest.fixture(scope="module")
def pack():
    clips = load_bundled_clips()
    return clips, [load_audio(u) for u in clips]


def test_ids_are_pinned(codec):
    """Another id than in golden_ids.json is another tokenizer: every model trained on the old one is void.
    After training a new one on purpose: python tests/voice/test_codec.py"""
    golden = json.loads(GOLDEN.read_text())
    assert codec.version == golden["version"]
    assert codec.encode(load_clip()[None])[0][0].tolist() == golden["ids"]


def test_every_level_of_every_digit_is_used(codec, pack):
    clips, waves = pack
    codes = torch.cat([codec.encode(w[None])[0][0] for w in waves])
    for place, levels in enumerate(codec.tokenizer.config.levels):
        assert (torch.bincount(codes // 4**place % 4, minlength=levels) > 0.02 * len(codes)).all(), (
            f"digit {place}"
        )


def test_codebook_usage():
    "Over the train split, counted when the weights were written"
    metadata = read_config(builtin_checkpoint("speech-tokens"))["metadata"]["train"]
    assert metadata["used"] > 0.8 and metadata["ids"] > 500_000


def test_transcribes_from_the_ids_alone(codec, pack):
    clips, waves = pack
    errors = words = 0
    for u, wave in zip(clips, waves):
        if u.extra["condition"] == "clean" and not u.extra["unseen"]:
            reference = text.normalize_text(u.text).split()
            errors, words = (
                errors + edit_distance(codec.tokenizer.transcribe(wave[None])[0].split(), reference),
                words + len(reference),
            )
    assert words > 100 and errors / words < 0.45, f"{errors} of {words} words"


def test_decoded_speech_is_intelligible(codec, pack, judge_or_skip):
    judge = judge_or_skip(Whisper)
    some = [(u, w) for u, w in zip(*pack) if u.extra["condition"] == "clean" and not u.extra["unseen"]][::2]
    made = [codec.decode(*codec.encode(w[None]), reference=[w])[0] for _, w in some]
    assert wer([u.text for u, _ in some], judge(made)).rate < 0.25


def test_steps_and_seeds(codec):
    ids, lengths = codec.encode(load_clip()[None, :32000])
    voices = codec.speaker_embeddings([load_clip()])
    one, same, other = (codec.features(ids, voices, seed=s, temperature=1.0) for s in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert (one - codec.features(ids, voices, steps=40, temperature=1.0)).abs().mean() < (
        one - other
    ).abs().mean()  # ten steps are nearer to forty than another seed is


def test_a_reference_is_analysed_once(codec, pack, monkeypatch):
    "And another one, or the same tensor with other samples in it, again"
    first, second = pack[1][0][:16_000].clone(), pack[1][1][:16_000]
    calls, analyze = [], codec.vocoder.analyze
    monkeypatch.setattr(codec.vocoder, "analyze", lambda wave: calls.append(1) or analyze(wave))
    codec.last_reference = None
    a, b = codec.speaker_embeddings([first, first])
    assert len(calls) == 1 and torch.equal(a, b)
    assert not torch.equal(codec.speaker_embeddings([second])[0], a) and len(calls) == 2
    codec.speaker_embeddings([first])
    first *= 0.5
    codec.speaker_embeddings([first])
    assert len(calls) == 4


def test_variance_of_the_spectrum_is_the_references(codec, pack):
    _, waves = pack
    ids, counts = codec.encode(
        torch.nn.utils.rnn.pad_sequence(waves[:2], batch_first=True),
        torch.tensor([len(w) for w in waves[:2]]),
    )
    voices, d, spectral_slice = (
        codec.speaker_embeddings(waves[:2]),
        codec.flow.config.feature_dim,
        codec.vocoder.spectral_slice,
    )
    made = codec.flow.normalize(codec.features(ids, voices))
    for row, voice, n in zip(made, voices, counts.tolist()):
        std = speaker_embedding(row[None, : 4 * n], torch.tensor([4 * n]))[0, d:][spectral_slice]
        ratio = std / voice[d:][spectral_slice]
        assert torch.allclose(ratio[:10], torch.ones(10), atol=0.05) and ratio.max() < 1.1, (
            "the later ones are noise, and stop at twice what the flow made"
        )
    alone = codec.flow.normalize(codec.features(ids[:1, : counts[0]], voices[:1]))[0]
    assert torch.allclose(alone, made[0, : len(alone)], atol=1e-3), (
        "what stands in another row does not matter"
    )


@pytest.mark.parametrize("tokens", [275, 276, 500, 501, 525, 526])  # 250 to a window, 25 around it
def test_lengths_of_long_recordings(codec, tokens):
    ids = torch.randint(0, codec.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    features = codec.features(ids, steps=2)
    assert features.shape[1] == 4 * tokens and torch.isfinite(features).all()
    first = codec.features(ids[:, :275], steps=2)[:, : 4 * 200]
    assert torch.allclose(features[:, : 4 * 200], first, atol=1e-3)


def test_rows_are_independent(codec, pack):
    _, waves = pack
    some = waves[:3]
    lengths = torch.tensor([len(w) for w in some])
    ids, counts = codec.encode(torch.nn.utils.rnn.pad_sequence(some, batch_first=True), lengths)
    together = codec.decode(ids, counts, reference=some)
    for i, w in enumerate(some):
        alone = codec.decode(ids[i : i + 1, : counts[i]], reference=[w])[0]
        assert (together[i, : len(alone)] - alone).abs().mean() < 1e-3 * alone.abs().max()


if __name__ == "__main__":
    made = SpeechCodec.from_pretrained()
    GOLDEN.write_text(
        json.dumps({"version": made.version, "ids": made.encode(load_clip()[None])[0][0].tolist()}) + "\n"
    )
