"The decoders that come with the library, on recordings that come with it too"
from pathlib import Path

import pytest
import torch

import diffuspeech
from diffuspeech.models.decoder import Condition
from diffuspeech.models.reconstructor import Reconstructor, padded
from diffuspeech.speech import audio
from diffuspeech.speech.manifest import Manifest

PACK = Manifest(Path(diffuspeech.__file__).parent / "assets" / "pack" / "pack.jsonl")


@pytest.fixture(scope="module")
def clips():
    "One of each synthetic speaker, longest last"
    found = {u.speaker: u for u in PACK if u.split == "test-clean" and not u.extra["human"]}
    return sorted(found.values(), key=lambda u: u.duration)


@pytest.fixture(scope="module")
def sent(clips):
    "The diffusion decoder, the condition of the clips, and their tokens"
    ddm = Reconstructor.from_pretrained("ddm")
    waves = [audio.load(u.audio) for u in clips]
    condition, codes = ddm.condition(waves, [u.text for u in clips])
    assert codes is not None and codes.shape[-1] == 4
    return ddm, condition, ddm.codec.encode(*padded(waves, torch.device("cpu")))[0]


def agree(ddm, condition, ids, seeds=range(3), **how):
    "Share of tokens that come out as they were, on canvases of the given length"
    lengths = (ids >= 0).sum(1)
    right = 0
    for seed in seeds:
        tokens, _, run = ddm.decode(condition, lengths, seed=seed, **how)
        right += ((tokens == ids) & (ids >= 0)).sum()
    return float(right) / len(seeds) / int(lengths.sum()), run


def test_ten_steps_say_more_than_one_and_vectors_more_than_text(sent):
    ddm, condition, ids = sent
    ten, run = agree(ddm, condition, ids, steps=10)
    one, single = agree(ddm, condition, ids, steps=1, seeds=[0])
    text, _ = agree(ddm, condition.without(vectors=True), ids, steps=10)
    turned = Condition(condition.text, condition.lengths, condition.vectors.roll(1, 1))
    wrong, _ = agree(ddm, turned, ids, steps=10)
    assert int(run.calls.max()) == 10 and int(single.calls.max()) == 1
    assert ten > 1.3 * text and ten > 1.3 * wrong, f"own vectors {ten:.3f}, none {text:.3f}, each a place too far {wrong:.3f}"
    assert ten > 0.12, f"{ten:.3f}, one step {one:.3f}"


def test_a_canvas_that_is_too_long_ends_where_the_speech_does(sent):
    ddm, condition, ids = sent
    true = (ids >= 0).sum(1)
    frames = ddm.frames(condition, "eos")
    _, lengths, _ = ddm.decode(condition, frames, ends=True)
    assert (lengths <= frames).all() and (lengths > 0).all()
    off = (lengths - true).abs() / true
    assert float(off.median()) < 0.25 and float(off.max()) < 0.6, off.tolist()
