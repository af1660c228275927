"Sentences that are spoken on another machine become clips of the corpus"

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "gpu"
sys.path.insert(0, str(TOOLS))

import corpus  # noqa: E402

from diffuspeech.data import builtin  # noqa: E402
from diffuspeech.data.audio import load  # noqa: E402
from diffuspeech.data.voices import VOICES, speak  # noqa: E402


@pytest.mark.needs("kokoro", "whisper")
def test_clips_go_there_and_back(tmp_path, monkeypatch):
    "Two are spoken, one of them is known already; what comes back is as what is made here, but for the codec"
    said = dict(a="She had your dark suit.", b="Please hold the line.", c="The second floor is closed.")
    clips = [
        builtin.Clip(f"dev-x-{k}", "dev", voice, text, "prose", text, 1.0)
        for (k, text), voice in zip(said.items(), ("af_nova", "bm_lewis", "af_nova"))
    ]
    monkeypatch.setattr(builtin, "plan_corpus", lambda size: clips)
    folder = tmp_path / "corpus"
    lines, _ = builtin.make(clips[2:], folder)
    (folder / builtin.JOURNAL).write_text("".join(corpus.json.dumps(line) + "\n" for line in lines))
    chosen = corpus.choose(dict(dev=1.0), folder)
    assert {clip.id for clip in chosen} == {"dev-x-a", "dev-x-b"}
    corpus.pack(chosen, tmp_path / "parts", 10**9)
    command = [sys.executable, TOOLS / "speak.py", "parts", "-o", "sounds", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == "2 of 2 sentences in 1 files\n", done.stderr
    corpus.unpack(corpus.read_sounds(tmp_path / "sounds"), folder, 1)
    journal = builtin.read_journal(folder, clips)
    assert len(journal) == 3 and all(line["kept"] and line["wrong"] <= 1 for line in journal.values())
    for clip in chosen:
        there, here = load(builtin.path_of(folder, clip)), speak(VOICES[clip.voice], clip.source, clip.speed)
        assert abs(len(there) - len(here)) < 1600 and abs(float(there.std() / here.std()) - 1) < 0.1
    assert not corpus.choose(dict(dev=1.0), folder)
