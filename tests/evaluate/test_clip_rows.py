"Rows of clips: written beside a table, read back, and differences from them by hand"

import gzip
import json

import pytest
import torch

from diffuspeech.base import random
from diffuspeech.cli import main
from diffuspeech.evaluate.clip_rows import (
    COLUMNS,
    FORMAT,
    clip_rows_file,
    difference_row,
    read_clip_rows,
    write_clip_rows,
)
from diffuspeech.evaluate.intervals import bootstrap, min_detectable_effect
from diffuspeech.evaluate.score import INTERVALS, compare, score_row

VOICES, SENTENCES = 8, 25


def drawn(seed: int, *names) -> float:
    return (random.key(seed, *names) % 10_000) / 10_000


def judged(seed: int, system: float, voices: int = VOICES, spread: float = 0.0) -> list[dict]:
    "A system's clips: errors that depend on the voice (by `spread`), the clip and the system"
    rows = []
    for v in range(voices):
        own = spread * (2 * drawn(seed, "voice", v, system) - 1)
        for s in range(SENTENCES):
            words = 6 + int(8 * drawn(seed, "words", v, s))
            chances = [0.2 + system + own for _ in range(words)]
            errors = sum(drawn(seed, "word", system, v, s, k) < p for k, p in enumerate(chances))
            row = dict(id=f"{v}-{s}", split="dev", speaker=f"v{v}", voices="unseen", text=f"{v} {s}")
            row |= dict(seconds=3.0, transcript="...", errors=errors, words=words, retry="")
            rows.append(row | dict(insertions=0, deletions=0, substitutions=errors))
    return rows


def test_what_is_written_is_read(tmp_path):
    rows = {"one": judged(0, 0.0), "two, 10 steps": judged(0, 0.1)[:7]}
    rows["one"][0] |= dict(retry="loop", first_transcript="a a a", cut=True)
    file = clip_rows_file(tmp_path / "deep" / "table.json")
    about = dict(judges=dict(wer="whisper"), seed=3, systems={"one": None, "two, 10 steps": dict(steps=10)})
    write_clip_rows(file, rows, about)
    assert file.name == "table.clips.jsonl.gz" and sorted(file.parent.iterdir()) == [file]
    header, found = read_clip_rows(file)
    assert found == rows and header == dict(format=FORMAT, columns=COLUMNS) | about
    first = file.read_bytes()
    write_clip_rows(file, found, about)
    assert file.read_bytes() == first, "the same rows, the same bytes"
    lines = [json.loads(line) for line in gzip.decompress(first).decode().splitlines()]
    assert len(lines) == 1 + 200 + 207 and sum("text" in line for line in lines) == 200, "a text stands once"
    assert score_row(found["one"]) == score_row(rows["one"])


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", gzip.compress(b"{}"), gzip.compress(b"[]\n"), None])
def test_what_is_no_file_of_rows(content, tmp_path):
    file = tmp_path / "r.clips.jsonl.gz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="no such file" if content is None else "not rows of clips"):
        read_clip_rows(file)


def test_a_difference_by_hand():
    ours, theirs = judged(0, 0.0), judged(0, 0.1)
    errors = lambda rows: torch.tensor([r["errors"] for r in rows]).double()
    words = torch.tensor([r["words"] for r in ours]).double()
    by_hand = ((errors(ours) - errors(theirs)).sum() / words.sum()).item()
    row = difference_row(ours, theirs)
    assert row["difference"] == pytest.approx(by_hand, abs=1e-4) and row["clips"] == 200
    assert row["difference"] == pytest.approx(row["rate"] - row["baseline"], abs=2e-4)
    by_voice = bootstrap(errors(ours), dict(voice=[r["speaker"] for r in ours]), words, errors(theirs))
    assert row["difference_voices_low"] == pytest.approx(by_voice.low, abs=1e-4)
    assert row["difference_voices_detectable"] == pytest.approx(min_detectable_effect(by_voice), abs=1e-4)
    estimate, found = compare(ours, theirs)
    assert estimate == pytest.approx(by_hand) and list(found) == list(INTERVALS)
    assert found["sentences"].clusters == 200 and found["voices"].clusters == 8
    shuffled = difference_row(ours[::-1], theirs[50:])
    assert shuffled["clips"] == 150, "in any order, on what both have"
    with pytest.raises(ValueError, match="no clip has wer_base of both"):
        difference_row(ours, theirs, "wer_base")


def test_pairing_is_narrower_than_two_intervals():
    hard = judged(1, 0.0, spread=0.15)
    easier = [dict(r, errors=max(0, r["errors"] - (i % 9 == 0))) for i, r in enumerate(hard)]
    easier = [dict(r, substitutions=r["errors"]) for r in easier]
    row, alone = difference_row(easier, hard), score_row(hard)
    assert row["difference_high"] < 0, "a small difference of the same clips is seen"
    assert row["difference_high"] - row["difference_low"] < 0.5 * (alone["wer_high"] - alone["wer_low"])
    assert row["difference_detectable"] < 0.03 < alone["wer_high"] - alone["wer_low"]


def test_coverage_of_each_kind_of_interval():
    "Where voices differ, the interval over voices holds the truth, and one for these voices alone does not"
    covered, tables = dict(sentences=0, voices=0), 60
    for seed in range(tables):
        row = score_row(judged(seed, 0.1, spread=0.2))
        covered["sentences"] += row["wer_low"] < 0.3 < row["wer_high"]
        covered["voices"] += row["wer_voices_low"] < 0.3 < row["wer_voices_high"]
    assert covered["voices"] / tables >= 0.9 and covered["sentences"] / tables < 0.75, covered


def test_coverage_over_sentences_of_these_voices():
    covered, tables = 0, 60
    for seed in range(tables):
        row = score_row(judged(seed, 0.1))  # voices that are alike: the truth is 30%
        covered += row["wer_low"] < 0.3 < row["wer_high"]
    assert covered / tables >= 0.9, covered


def test_compare_from_a_shell(tmp_path, capsys):
    rows = {"AR, length eos": judged(0, 0.1), "DDM, 10 steps": judged(0, 0.0)}
    file = clip_rows_file(tmp_path / "r.json")
    write_clip_rows(file, rows, dict(systems=dict.fromkeys(rows)))
    command = ["evaluate", "compare", str(file), "--baseline", "AR, length eos"]
    assert main([*command, "--json", str(tmp_path / "d.json")]) == 0
    (row,) = json.loads((tmp_path / "d.json").read_text())
    expected = difference_row(rows["DDM, 10 steps"], rows["AR, length eos"])
    assert row == dict(system="DDM, 10 steps", split="dev") | expected
    assert main([*command, "--baseline-rows", str(file)]) == 0
    capsys.readouterr()
    assert main(["evaluate", "compare", str(file), "--baseline", "AR"]) == 1
    assert "there are: AR, length eos; DDM, 10 steps" in capsys.readouterr().err
