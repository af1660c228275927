"Packs for another machine: parts, models there and back, and steps that fit a budget"

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "gpu"
sys.path.insert(0, str(TOOLS))

import drive  # noqa: E402
import parts  # noqa: E402
import torch  # noqa: E402
import unpack  # noqa: E402


def test_parts_stay_below_their_size_and_come_back(tmp_path):
    torch.manual_seed(0)
    weights = torch.randn(300_000).bfloat16().view(torch.uint8).numpy().tobytes()
    files = {"a/weights": weights, "empty": b"", "text": b"word " * 10_000, "odd": weights[:12_345]}
    found = parts.write_parts(files.items(), tmp_path / "parts", 200_000)
    assert len(found) > 2 and all(path.stat().st_size <= 200_000 for path in found)
    assert sum(path.stat().st_size for path in found) < 0.9 * len(weights), "16-bit floats shrink by planes"
    there, missing = parts.check_parts(tmp_path / "parts")
    written, incomplete = parts.read_parts(there, tmp_path / "out")
    assert not missing and not incomplete and set(written) == set(files)
    for name, data in files.items():
        assert (tmp_path / "out" / name).read_bytes() == data
    written, incomplete = parts.read_parts(there[:1], tmp_path / "some")
    assert incomplete == ["a/weights"]
    there[-1].write_bytes(there[-1].read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="its hash is not the listed one; carry it again"):
        parts.check_parts(tmp_path / "parts")
    there[-1].unlink()
    assert parts.check_parts(tmp_path / "parts")[1] == [there[-1].name]


def test_a_file_stays_inside_its_folder(tmp_path):
    parts.write_parts([("../outside", b"x")], tmp_path / "parts", 200_000)
    with pytest.raises(ValueError, match="leads out of"):
        parts.read_parts(parts.check_parts(tmp_path / "parts")[0], tmp_path / "out")
    assert not (tmp_path / "outside").exists()


def test_models_are_collected(tmp_path):
    (tmp_path / "runs/a/model/decoder").mkdir(parents=True)
    (tmp_path / "runs/b").mkdir()
    (tmp_path / "runs/a/model/decoder/model.safetensors").write_bytes(bytes(range(256)) * 100)
    (tmp_path / "runs/a/log.jsonl").write_text("{}\n")

    def collect(*arguments):
        command = [sys.executable, TOOLS / "collect.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert collect("pack", "runs", "-o", "out").returncode == 0
    assert collect("unpack", "out", "-o", "home").stdout == "1 runs: a\n"
    name = "a/model/decoder/model.safetensors"
    assert (tmp_path / "home" / name).read_bytes() == (tmp_path / "runs" / name).read_bytes()
    done = collect("pack", "runs", "b", "-o", "out")
    assert done.returncode and done.stderr == "collect: runs: no exported model of b\n"


def test_missing_first_part_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="no such file; carry the list of hashes"):
        parts.check_parts(tmp_path)
    assert unpack.flags() == ([] if not sys.flags.no_site else ["-S"])


def test_all_runs_end_in_time():
    runs = [dict(name="a"), dict(name="b", after="a", weight=0.5), dict(name="c")]
    second = drive.share_seconds(runs, 2, 300.0, {})
    assert 299 < drive.makespan(runs, 2, second, {}) <= 300
    assert abs(1.5 * second - (300 - 2 * drive.START)) < 1, "a and then b are the longest"
    left = drive.share_seconds(runs[1:2], 1, 200.0, {"a": 100.0})
    assert abs(0.5 * left - (100 - drive.START)) < 1, "b waits for what is left of a"


def test_steps_follow_the_measured_pace(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(drive.time, "monotonic", lambda: clock[0])
    config, said = SimpleNamespace(steps=10_000, warmup_steps=60, validate_every=500, save_every=500), []
    pace, step = drive.Pace(config, 100.0, say=said.append), 0
    while step < config.steps:
        step, clock[0] = step + 1, clock[0] + 0.1
        pace(dict(step=step))
    assert 980 <= step <= 1000 and clock[0] <= 100.1, "ten updates a second for a hundred seconds"
    assert said[0]["event"] == "pace" and said[0]["step"] <= 60, "set within the warm-up"
    clock[0], step = 1e6, 500
    config.steps = 10_000
    pace.next = 10_000
    pace(dict(step=step))
    assert config.steps == 501 and said[-1] == dict(event="cut", step=500)
    json.dumps(said)
