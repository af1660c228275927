"What a command may write: nothing that was there is lost, whatever is typed"

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffuspeech.base.files import atomic_write
from diffuspeech.cli import main

CLIP = files("diffuspeech") / "assets" / "clips" / "vm-intro.flac"


def snapshot(folder: Path) -> dict[str, tuple]:
    "Kind, permissions and content of all that is below a folder"
    found = {}
    for path in sorted(folder.rglob("*")):
        info = path.lstat()
        if stat.S_ISREG(info.st_mode):
            content = path.read_bytes()
        else:
            content = os.readlink(path) if path.is_symlink() else None
        found[str(path.relative_to(folder))] = (stat.S_IFMT(info.st_mode), info.st_mode & 0o777, content)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder as a user may have it: recordings, manifests, links, a pipe"
    folder = tmp_path_factory.mktemp("place")
    (folder / "rec").mkdir()
    for name in ("a", "b"):
        (folder / "rec" / f"{name}.flac").write_bytes(CLIP.read_bytes())
    (folder / "m.jsonl").write_text(
        '{"audio_filepath": "rec/a.flac", "duration": 1.0, "text": "x", "id": "a"}\n'
    )
    (folder / "t.jsonl").write_text('{"id": "a", "audio_filepath": "rec/a.wav", "ids": [1, 2, 3]}\n')
    (folder / "rec" / "a.wav").write_bytes(b"RIFF, the user's own")
    (folder / "notes.json").write_text("[1]")
    (folder / "voice.wav").write_bytes(b"RIFF")
    (folder / "LICENSE").write_text("mine")
    (folder / "link.json").symlink_to("notes.json")
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch, place):
    monkeypatch.setenv("DIFFUSPEECH_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(place)


@pytest.mark.parametrize(
    "words, message",
    [
        ("encode rec/a.flac -o rec/a.flac", "is an input"),
        ("encode rec/a.flac -o rec/a.flac --overwrite", "is an input"),
        ("encode ./rec/../rec/a.flac -o rec/a.flac --overwrite", "is an input"),
        ("encode rec -o rec/a.flac --overwrite", "lies among the inputs"),
        ("encode rec -o rec", "is a folder"),
        ("encode m.jsonl -o m.jsonl --overwrite", "is an input"),
        ("encode m.jsonl -o rec/a.flac --overwrite", "is listed in m.jsonl"),
        ("encode rec -o notes.json", "exists already; --overwrite"),
        ("encode rec -o link.json", "exists already; --overwrite"),
        ("encode rec -o /dev/null", "not a regular file"),
        ("encode rec -o /dev/null --overwrite", "not a regular file"),
        ("encode rec -o pipe --overwrite", "not a regular file"),
        ("encode rec -o circle", "circle"),
        ("encode rec -o gone/x.jsonl", "there is no folder gone"),
        ("encode rec -o notes.json/x.jsonl", "there is no folder notes.json"),
        ("encode rec -o /proc/x.jsonl", "cannot be written"),
        ("decode t.jsonl -o t.jsonl", "is a file; the name of a folder"),
        ("decode t.jsonl -o notes.json/x", "is a file"),
        ("decode t.jsonl -o pipe", "not a regular file"),
        ("synthesize x -o rec", "is a folder"),
        ("synthesize x -o voice.wav", "exists already"),
        ("synthesize x --reference voice.wav -o voice.wav --overwrite", "is an input"),
        ("synthesize x -o new.wav --trajectory notes.json", "is a file"),
        ("reconstruct rec/a.flac -o rec/a.flac", "is an input"),
        ("judge rec --json rec/b.flac --overwrite", "lies among the inputs"),
        ("judge m.jsonl --json m.jsonl", "is an input"),
        ("judge m.jsonl --json rec/a.flac --overwrite", "is listed in"),
        ("judge rec --original rec --json rec/a.wav --overwrite", "lies among the inputs"),
        ("evaluate speech --json /dev/null", "not a regular file"),
        ("evaluate external --waves rec --json rec/a.wav --overwrite", "lies among the inputs"),
        ("evaluate reconstruct --json new.json --protocol new.json", "is also the name of --json"),
        ("plan ddm --json notes.json", "exists already"),
        ("plan ddm --json link.json", "exists already"),
        ("bench law --json notes.json", "exists already"),
        ("bench sampler --json gone/x.json", "there is no folder"),
        ("train ddm -o rec", "holds something else"),
        ("train ddm -o notes.json", "is a file"),
        ("train mine.json -o pipe", "not a regular file"),
        ("corpus build tiny -o rec", "holds something else"),
        ("corpus build tiny -o notes.json", "is a file"),
        ("corpus pack m.jsonl --license LICENSE -o rec", "holds something else"),
        ("corpus prepare m.jsonl -o rec", "holds something else"),
        ("corpus prepare m.jsonl -o m.jsonl", "is a file"),
        ("convert LICENSE -o rec", "holds something else"),
        ("convert LICENSE -o LICENSE", "is a file"),
    ],
)
def test_what_would_be_lost_is_refused_before_any_work(words, message, place, capsys):
    before, null = snapshot(place), os.stat(os.devnull)
    status, error = main(shlex.split(words)), capsys.readouterr().err
    assert status == 1 and message in error and error.count("\n") == 1, error
    assert snapshot(place) == before and os.stat(os.devnull).st_mode == null.st_mode


VERBS = [
    "encode {} -o {}",
    "decode {} -o {}",
    "synthesize hello --reference {} -o {}",
    "reconstruct {} --text hello -o {}",
    "judge {} --json {}",
    "plan {} --json {}",
    "train {} -o {}",
    "corpus pack {} --license LICENSE -o {}",
    "corpus prepare {} -o {}",
    "convert {} -o {}",
    "evaluate external --waves {} --json {}",
]
PATHS = ["rec", "rec/a.flac", "rec/a.wav", "m.jsonl", "t.jsonl", "notes.json", "voice.wav", "LICENSE"]
PATHS += ["link.json", "circle", "pipe", ".", "..", "/dev/null"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(VERBS),
    st.sampled_from(PATHS),
    st.sampled_from(PATHS),
    st.sampled_from(["", "./", "rec/../"]),
)
def test_nothing_that_exists_is_changed(place, monkeypatch, verb, source, target, prefix):
    "No verb changes an existing file of which it does not know that the same job wrote it"
    from diffuspeech import cli

    def run(args):
        raise ValueError("the gate let it pass")

    for command in cli.all_commands().values():
        monkeypatch.setitem(vars(command), "run", run)
    before = snapshot(place)
    name = target if target.startswith(("/", "..")) else prefix + target
    status = main(shlex.split(verb.format(source, name)))
    assert status in (1, 2) and snapshot(place) == before
    if Path(target).is_file():
        from diffuspeech.cli import find_command

        _, command, rest = find_command(shlex.split(verb.format(source, name)))
        args = command.parser("x").parse(rest)
        with pytest.raises(ValueError):
            cli.check_outputs(command.outputs(args), command.inputs(args), "a job")


REAL_VERBS = [
    "encode {source} -o {target}",
    "encode {source} -o {target} --overwrite",
    "decode {source} -o {target}",
    "decode {source} -o {target} --overwrite",
    "plan duration --json {target}",
    "plan duration --json {target} --overwrite",
    "corpus check {source}",
    "corpus pack {source} --license LICENSE -o {target} --workers 1",
    "corpus prepare {source} -o {target} --vocoder none --workers 1",
    "corpus prepare {source} --vocoder none --workers 1",
    "convert {source} -o {target}",
    "train {source} -o {target} --device cpu",
]
NEW = ["new", "new.json", "rec/new.jsonl", "rec/new", "gone/new.json"]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.sampled_from(REAL_VERBS), st.sampled_from(PATHS), st.sampled_from([*PATHS, *NEW]))
def test_real_verbs_change_nothing_but_what_they_are_told_to(place, verb, source, target):
    "Whatever a verb does with random paths, all that existed before is as it was, but for the named target"
    before, null = snapshot(place), os.stat(os.devnull)
    if "--overwrite" in verb and Path(target).is_file():
        target = "new.json"  # what is asked for in so many words is no accident
    main(shlex.split(verb.format(source=source, target=target)))
    after = snapshot(place)
    assert {name: after.get(name) for name in before} == before, (verb, source, target)
    assert os.stat(os.devnull).st_mode == null.st_mode
    made = set(after) - set(before)
    allowed = ("" if target == "." else target, "prepared", f"{source}.shards")
    assert all(name.startswith(allowed) for name in made), (verb, source, target, made)
    for name in sorted(made, reverse=True):
        path = place / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


def test_a_rerun_replaces_its_own_result_and_no_changed_one(tmp_path, capsys):
    words = ["plan", "duration", "--json", str(tmp_path / "p.json")]
    assert main(words) == main(words) == 0
    assert main([*words, "--gpus", "2"]) == 1, "another job"
    (tmp_path / "p.json").write_text("my notes")
    assert main(words) == 1 and (tmp_path / "p.json").read_text() == "my notes"
    assert main([*words, "--overwrite"]) == main(words) == 0
    assert "exists already" in capsys.readouterr().err


def test_nothing_encoded_replaces_nothing(tmp_path, capsys):
    (tmp_path / "bad.wav").write_text("no sound")
    (tmp_path / "t.jsonl").write_text("good")
    assert main(["encode", str(tmp_path / "bad.wav"), "-o", str(tmp_path / "t.jsonl"), "--overwrite"]) == 1
    assert (tmp_path / "t.jsonl").read_text() == "good" and "0 encoded" in capsys.readouterr().err


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_users_umask(umask, mode, tmp_path):
    import torch

    from diffuspeech.base.checkpoint import write_tensors

    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "w", lambda temp_path: write_tensors(temp_path, {"x": torch.zeros(2)}))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w").stat().st_mode) == mode


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, signal, sys; from diffuspeech.base.files import atomic_write\n"
        "def die(part): part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "atomic_write(sys.argv[1], die)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")]).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    atomic_write(tmp_path / "y", lambda temp_path: temp_path.write_text("whole"))
    assert os.listdir(tmp_path) == ["y"]


def test_decode_goes_on_and_keeps_what_is_not_its_own(tmp_path, capsys):
    assert main(["encode", str(CLIP), "-o", str(tmp_path / "t.jsonl")]) == 0
    words = ["decode", str(tmp_path / "t.jsonl"), "-o", str(tmp_path / "out")]
    assert main(words) == 0
    (wave,) = (tmp_path / "out").iterdir()
    first = wave.stat().st_mtime_ns
    assert main(words) == 0 and wave.stat().st_mtime_ns == first, "made already"
    wave.write_bytes(b"mine")
    assert main(words) == 1 and wave.read_bytes() == b"mine"
    assert "exists already; --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and wave.stat().st_size > 1000


# ---- signals


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("seconds", [0.6, 2.5])
def test_a_signal_leaves_one_line_and_nothing_else(number, status, seconds, tmp_path):
    (tmp_path / "rec").mkdir()
    for n in range(12):
        (tmp_path / "rec" / f"{n}.flac").write_bytes(CLIP.read_bytes())
    words = [sys.executable, "-m", "diffuspeech", "encode", "rec", "-o", "t.jsonl"]
    process = subprocess.Popen(
        words,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    time.sleep(seconds)
    process.send_signal(number)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == status
    lines = [line for line in error.replace("\r", "\n").splitlines() if line.startswith("diffuspeech")]
    assert len(lines) == 1 and "Traceback" not in error
    assert os.listdir(tmp_path) == ["rec"]


def test_fetch_leaves_no_pip_behind(tmp_path, monkeypatch):
    "A pip that never ends is ended with the command"
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__init__.py").write_text("")
    (tmp_path / "pip" / "__main__.py").write_text(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    words = [sys.executable, "-m", "diffuspeech", "fetch", "whisper-tiny.en"]
    process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
    until = time.time() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert process.poll() is None and time.time() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143 and "ended by a signal" in process.stderr.read()
    pid = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]
    assert not [p for p in (tmp_path / "home").rglob("*") if ".part" in p.name]
