"Words that are not in the speech: found in real generations, and named, in Python and in a shell"

import warnings

import pytest
import torch

from diffuspeech.cli import main
from diffuspeech.data import audio
from diffuspeech.data.manifest import load_audio
from diffuspeech.evaluate.clips import load_bundled_clips
from diffuspeech.models import coverage
from diffuspeech.models.coverage import lost_from_sound, lost_words, skipped_words
from diffuspeech.models.reconstructor import Reconstructor

CLIP = load_bundled_clips()[0]
WORDS = CLIP.text.lower().rstrip(".").split()


@pytest.fixture(scope="module")
def model():
    return Reconstructor.from_pretrained()


def test_a_short_canvas_is_reported_and_one_of_the_right_length_is_not(model):
    wave = load_audio(CLIP)
    with pytest.warns(UserWarning, match=r"text 0: the speech seems to lack \d of 6 words: .*again later"):
        short = model.reconstruct(wave, CLIP.text, scale=0.5)
    assert short.lost_words[0][-2:] == WORDS[-2:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.reconstruct(wave, CLIP.text).lost_words == [[]]
        assert model.reconstruct(wave, CLIP.text, scale=0.5, check_words=False).lost_words is None
        assert model.synthesize(CLIP.text, check_words=False, steps=1).lost_words is None
    with pytest.warns(UserWarning, match="text 1: the speech seems to lack"):
        both = model.synthesize([CLIP.text, CLIP.text * 2], length="ratio", scale=0.4)
    assert all(both.lost_words), both.lost_words


def test_a_shell_names_the_recording(tmp_path, capsys):
    "Half of a recording, with the text of the whole"
    wave = load_audio(CLIP)
    for name, some in (("half", wave[: len(wave) // 2]), ("whole", wave)):
        audio.save(tmp_path / f"{name}.wav", some)
    words = ["reconstruct", str(tmp_path / "half.wav"), "-o", str(tmp_path / "a.wav"), "--text", CLIP.text]
    assert main(words) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and "reconstruct: warning: half: the speech seems to lack" in lines[0], lines
    words[1], words[3] = str(tmp_path / "whole.wav"), str(tmp_path / "b.wav")
    assert main(words) == 0 and "warning" not in capsys.readouterr().err


def test_the_sound_alone_tells(model):
    "As for a codec that is no recognizer"
    wave, other = load_audio(CLIP), object()
    assert lost_from_sound(wave, WORDS) == []
    half = lost_from_sound(wave[: len(wave) // 2], WORDS)
    assert half and half[-1] == len(WORDS) - 1, "the last words are not there"
    assert lost_words(other, torch.zeros(9), wave, CLIP.text) == []
    assert lost_from_sound(wave[:800], WORDS) == list(range(6)), "nothing fits"


def test_what_cannot_be_found_out(model, monkeypatch):
    assert lost_words(model.codec, torch.zeros(9).long(), torch.zeros(9), "你好") is None
    assert lost_words(model.codec, torch.zeros(0).long(), torch.zeros(0), "hello you") == ["hello", "you"]

    def missing():
        raise ImportError("pocketsphinx")

    monkeypatch.setattr(coverage, "pocketsphinx", missing)
    assert lost_words(object(), torch.zeros(9), load_audio(CLIP), CLIP.text) is None


def test_a_word_in_the_middle():
    "Symbols 1 and 2 spell two words, and 3 stands between words"
    frames = torch.full((6, 4), -9.0)
    for t, symbol in enumerate((1, 1, 0, 3, 2, 0)):
        frames[t, symbol] = 0.0
    text = [[1], [3, 1], [3, 2]]
    assert skipped_words(frames, text, penalty=5.0) == [1]
    assert skipped_words(frames, text, penalty=50.0) == []
