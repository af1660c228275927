"The decoders that come with the library, on recordings that come with it too"

from dataclasses import replace
from pathlib import Path

import jiwer
import pytest
import torch

import diffuspeech
from diffuspeech.data import audio
from diffuspeech.data.audio import SAMPLE_RATE
from diffuspeech.data.manifest import Manifest
from diffuspeech.data.text import normalize_text
from diffuspeech.models.decoder import Condition
from diffuspeech.models.reconstructor import Reconstructor, pad_rows

PACK = Manifest(Path(diffuspeech.__file__).parent / "assets" / "pack" / "pack.jsonl")


@pytest.fixture(scope="module")
def clips():
    "One of each synthetic speaker, longest last"
    found = {u.speaker: u for u in PACK if u.split == "test-clean" and not u.extra["human"]}
    return sorted(found.values(), key=lambda u: u.duration)


@pytest.fixture(scope="module")
def encoded(clips):
    "The diffusion decoder, the condition of the clips, and their tokens"
    ddm = Reconstructor.from_pretrained("ddm")
    waves = [audio.load(u.audio) for u in clips]
    condition, codes = ddm.encode(waves, [u.text for u in clips])
    assert codes is not None and codes.shape[-1] == 4
    return ddm, condition, ddm.codec.encode(*pad_rows(waves, torch.device("cpu")))[0]


def token_accuracy(ddm, condition, ids):
    "Share of tokens that come out as they were, in ten steps on canvases of the given length"
    lengths = (ids >= 0).sum(1)
    right = [
        ((ddm.decode(condition, lengths, seed=seed)[0] == ids) & (ids >= 0)).sum() / lengths.sum()
        for seed in range(3)
    ]
    return float(sum(right)) / len(right)


def character_error_rate(codec, tokens, lengths, clips):
    "As the speech tokenizer reads what the codec makes of them"
    waves = codec.decode(
        tokens.masked_fill(torch.arange(tokens.shape[1]) >= lengths[:, None], -1),
        lengths,
        [audio.load(u.audio) for u in clips],
    )
    heard = [
        codec.tokenizer.transcribe(wave[None, : int(n * SAMPLE_RATE / codec.frame_rate)])[0]
        for wave, n in zip(waves, lengths)
    ]
    return jiwer.cer([normalize_text(u.text, u.id) for u in clips], heard)


def test_vectors_are_listened_to(encoded):
    ddm, condition, ids = encoded
    turned = Condition(condition.text, condition.lengths, condition.vectors.roll(1, 1))
    own, none, wrong = (
        token_accuracy(ddm, given, ids) for given in (condition, condition.without(vectors=True), turned)
    )
    assert own > 1.3 * none and own > 1.3 * wrong and own > 0.12, (
        f"own vectors {own:.3f}, none {none:.3f}, each a place too far {wrong:.3f}"
    )


def test_ten_steps_are_better_than_one(encoded, clips):
    "One look has more tokens right (each the likeliest alone), and they do not make words together"
    ddm, condition, ids = encoded
    lengths, wrong = (ids >= 0).sum(1), {}
    for steps in (1, 10):
        tokens, _, run = ddm.decode(condition, lengths, steps=steps)
        wrong[steps] = character_error_rate(ddm.codec, tokens, lengths, clips)
        assert int(run.calls.max()) == steps
    assert wrong[10] < 0.7 * wrong[1] and wrong[10] < 0.3, (
        f"letters that the speech tokenizer reads wrong, by steps: {wrong}"
    )


def test_a_canvas_that_is_too_long_ends_where_the_speech_does(encoded):
    ddm, condition, ids = encoded
    true = (ids >= 0).sum(1)
    frames = ddm.canvas_lengths(condition, "eos")
    _, lengths, _ = ddm.decode(condition, frames, stop_at_eos=True)
    assert (lengths > 0).all() and (lengths < frames).any()
    off = (lengths - true).abs() / true
    assert float(off.median()) < 0.25 and float(off.max()) < 0.6, off.tolist()


def test_the_autoregressive_baseline_reconstructs_and_ends(encoded, clips):
    ddm, _, ids = encoded
    ar, true = Reconstructor.from_pretrained("ar"), (ids >= 0).sum(1)
    assert (
        ar.decoder.config.causal
        and replace(ar.decoder.config, causal=False, dropout=0.0) == ddm.decoder.config
    ), "the same network"
    condition, codes = ar.encode([audio.load(u.audio) for u in clips], [u.text for u in clips])
    tokens, lengths, run = ar.decode(condition, seed=0)
    off = (lengths - true).abs() / true
    assert codes.shape[-1] == 4 and run.ended.all() and float(off.median()) < 0.15, off.tolist()
    wrong = character_error_rate(ar.codec, tokens, lengths, clips)
    assert wrong < 0.3, f"letters that the speech tokenizer reads wrong: {wrong}"
