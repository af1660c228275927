"The card of the voices: distances by hand, a growing journal, dropped clips, every voice is on it"

import json
import math
from importlib.resources import files

import pytest
import soundfile
import torch

from diffuspeech.data.builtin import JOURNAL, Clip, fingerprint, path_of, read_journal
from diffuspeech.evaluate.voices import (
    CARD_VOICES,
    card_row,
    clips_of_corpus,
    voice_distances,
)


def test_distances_by_hand():
    unit = lambda degrees: [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]
    voices = [torch.tensor([unit(0.0), unit(10.0)]), torch.tensor([unit(60.0), unit(60.0)])]
    voices.append(torch.tensor([unit(180.0), unit(180.0)]))
    (own, nearest, which), (same, _, back), (_, far, third) = voice_distances(voices)
    cosine = lambda degrees: math.cos(math.radians(degrees))
    assert own.tolist() == pytest.approx([1 - cosine(10.0)] * 2, abs=1e-6), "from the mean of the other clips"
    assert nearest.tolist() == pytest.approx([1 - cosine(60.0), 1 - cosine(50.0)], abs=1e-6)
    assert (which, back, third) == (1, 0, 1) and same.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    assert far.tolist() == pytest.approx([1.5, 1.5], abs=1e-6)


@pytest.fixture
def corpus(tmp_path):
    "Six clips of a voice in the journal, one of them dropped, one with noise; and a line cut short"
    clips = [Clip(f"dev-af_sky-{i}", "dev", "af_sky", f"text {i}", "bible", f"text {i}") for i in range(7)]
    clips[5] = Clip("dev-af_sky-5", "dev", "af_sky", "text 5", "bible", "text 5", condition="noise")
    lines = []
    for i, clip in enumerate(clips[:6]):
        found = dict(words=10, wrong=4 if i == 2 else i % 2, seconds=0.1, made_of=fingerprint(clip))
        lines.append(dict(id=clip.id, kept=i != 2) | found)
        if i != 2:
            path_of(tmp_path, clip).parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path_of(tmp_path, clip), torch.full((1600,), 0.1 * (i + 1)).numpy(), 16_000)
    (tmp_path / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"id": "dev-af')
    return tmp_path, clips


def test_clips_of_a_corpus_that_is_being_built(corpus):
    folder, clips = corpus
    journal = read_journal(folder, clips)
    assert len(journal) == 6 and read_journal(folder / "none", clips) == {}
    found = clips_of_corpus(clips, journal, folder, 2)
    assert found.dropped == 1 and len(found.waves) == 2, "dropped clips have errors, and no wave"
    assert [round(w[0].item(), 1) for w in found.waves] == [0.1, 0.5], "spread, without noise"
    row = card_row("af_sky", found)
    assert (row["clips"], row["words"], row["dropped"], row["role"]) == (6, 60, 1, "train")
    assert row["wer"] == pytest.approx(7 / 60, abs=1e-4) and row["wer_low"] <= row["wer"] <= row["wer_high"]
    assert clips_of_corpus(clips, journal, folder, 5) is None, "too few: they are synthesized"


def test_the_committed_card_has_every_voice():
    card = json.loads((files("diffuspeech") / "assets" / "voices" / "voices.json").read_text())
    rows = card["voices"]
    assert [row["voice"] for row in rows] == CARD_VOICES and len(CARD_VOICES) == 28
    for row in rows:
        assert 0 <= row["wer_low"] <= row["wer"] <= row["wer_high"] and 1 < row["distillmos"] < 5
        assert 0 < row["distance_own"] < 1 and 0 < row["distance_nearest"] < 1 and row["judged"] >= 10
        assert row["nearest"] in CARD_VOICES and row["nearest"] != row["voice"]
    assert "evaluate voices" in card["command"] and len(card["judges"]) == 3
    readme = (files("diffuspeech") / "assets" / "voices" / "README.md").read_text()
    for row in rows:
        assert f"| {row['voice']} |" in readme and f"{100 * row['wer']:.1f}" in readme
