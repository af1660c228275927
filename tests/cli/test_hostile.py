"What a user may type or point at by mistake: a clear line, an exit status, and nothing lost"

import ctypes
import json
import os
import re
import shlex
import struct
import sys
import time
import traceback
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from diffuspeech.base.output import Results, Unfinished
from diffuspeech.cli import main
from diffuspeech.data import shards
from diffuspeech.data.manifest import Manifest, ManifestError
from diffuspeech.data.text import MAX_WORDS, describe_unspoken, normalize_text, split_text, spoken_words
from diffuspeech.diffusion import trajectory
from diffuspeech.evaluate.metrics import Cache
from diffuspeech.voice.jobs import collect_utterances

CLIP = files("diffuspeech") / "assets" / "clips" / "vm-intro.flac"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    "An empty folder, and a home of its own"
    monkeypatch.setenv("DIFFUSPEECH_HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(capsys, words) -> tuple[int, str]:
    "Exit status and what was printed to stderr"
    capsys.readouterr()
    status = main(shlex.split(words) if isinstance(words, str) else list(map(str, words)))
    return status, capsys.readouterr().err


# ---- numbers

COUNTS = ("0", "-1", "1.5", "nan", "inf", "1e9", "", "x")
NUMBERS = {
    "synthesize hi -o x.wav --steps": (*COUNTS, "1000000000"),
    "synthesize hi -o x.wav --temperature": ("-1", "nan", "inf", "-inf", "1e999", "x", ""),
    "synthesize hi -o x.wav --seed": ("-1", "1.5", "nan", "9223372036854775808", "x"),
    "reconstruct a.wav -o x.wav --steps": COUNTS,
    "decode t.jsonl -o out --flow-steps": COUNTS,
    "corpus prepare m.jsonl --speed-copies": ("-0.1", "1.1", "nan", "inf", "x"),
    "corpus prepare m.jsonl --workers": COUNTS,
    "corpus build tiny --workers": COUNTS,
    "plan ddm --gpus": COUNTS,
    "plan ddm --mfu": ("0", "-1", "2", "nan", "inf", "x"),
    "bench law --samples": COUNTS,
    "evaluate speech --mos-clips": ("1", *COUNTS),
}


@pytest.mark.parametrize("words, value", [(words, value) for words in NUMBERS for value in NUMBERS[words]])
def test_a_number_has_a_type_and_a_range(words, value, capsys):
    option = words.rsplit(" ", 1)[1]
    status, error = run(capsys, [*words.split()[:-1], f"{option}={value}"])
    assert status == 2 and option in error and error.count("\n") == 1, error
    assert "no such option" not in error


SETTINGS = """steps=0 steps=-1 steps=NaN steps=Infinity steps=1e999 steps=1.5 steps=x steps=true steps=[]
steps=null lr=0 lr=-1 lr=NaN lr=Infinity lr=x lr=[1] batch_seconds=0 batch_seconds=NaN betas=[2,2]
betas=[0.9] betas=x betas=[NaN,0.9] precision=fp8 seed=-1 seed=1.5 ema_decay=1 ema_decay=NaN
warmup_steps=-1 save_every=0 save_total_limit=0 nosuch=1 task=diffuspeech.cli:main task=os:system
task=nosuch:X model.dim=NaN model.dim="192" model.heads=0 model.heads=true model.nosuch=1 model=3
model=[] options=[] options.nosuch=1 model.dropout=2 model.dim=1000000000000""".split()


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_has_its_fields_type(setting, capsys):
    status, error = run(capsys, ["train", "ddm", "--set", setting, "-o", "out"])
    name = setting.split("=")[0].rpartition(".")[2]
    assert status == 1 and name in error and error.count("\n") == 1, error
    assert not Path("out").exists()


# ---- lines of tokens

LINE = {"id": "a", "ids": [5, 6, 7]}
BAD_LINES = [
    {"id": True},
    {"id": ["a"]},
    {"id": {}},
    {"id": 1.5},
    {"id": "x" * 300},
    {"id": "../a"},
    {"id": "/tmp/a"},
    {"id": "a\0b"},
    {"id": "\ud800"},
    {"ids": [True, 5]},
    {"ids": [-1, 5]},
    {"ids": [5, -1]},
    {"ids": [-7]},
    {"ids": [1.5]},
    {"ids": [10**30]},
    {"ids": [4096]},
    {"ids": [[1]]},
    {"ids": []},
    {"ids": "abc"},
    {"ids": None},
    {"ids": {"a": 1}},
    {"ids": [float("nan")]},
    {"ids": [None]},
    {"tokenizer": "another"},
]


@pytest.mark.parametrize("change", BAD_LINES, ids=lambda change: json.dumps(change)[:40])
def test_a_bad_line_of_tokens_is_named_and_the_others_are_decoded(change, capsys):
    lines = [LINE | {"id": "first"}, LINE | change, LINE | {"id": "last"}]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, error = run(capsys, "decode t.jsonl -o out")
    assert status == 1 and "t.jsonl:2" in error and "2 decoded to out, 1 skipped" in error, error
    assert sorted(os.listdir("out")) == ["first.wav", "last.wav"]


def test_equal_ids_do_not_replace_each_other(capsys):
    lines = [LINE, LINE | {"ids": [9, 9]}, LINE | {"ids": ["bad"], "id": "b"}, LINE | {"id": "b"}]
    Path("t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    status, error = run(capsys, "decode t.jsonl -o out")
    assert status == 1 and "t.jsonl:2: has the same id as line 1" in error and "2 decoded" in error, error


# ---- recordings


def tone(level: float, seconds: float = 1.0) -> np.ndarray:
    return (level * np.sin(np.arange(int(16_000 * seconds)) / 10)).astype(np.float32)


def write_float(path, wave):
    soundfile.write(path, wave, 16_000, subtype="FLOAT", format="WAV")


SOUNDS = {
    "fifo.wav": (os.mkfifo, "FIFO"),
    "gone.wav": (lambda path: os.symlink("nowhere", path), "no such file"),
    "circle.wav": (lambda path: os.symlink(path.name, path), "symbolic links"),
    "device.wav": (lambda path: os.symlink("/dev/zero", path), "device"),
    "empty.wav": (lambda path: path.write_bytes(b""), "empty|not an audio"),
    "text.wav": (lambda path: path.write_text("no sound"), "not an audio file"),
    "half.flac": (lambda path: path.write_bytes(CLIP.read_bytes()[:20_000]), "breaks off|damaged|holds"),
    "loud.wav": (lambda path: write_float(path, tone(100.0)), "dB above full scale"),
    "huge.wav": (lambda path: write_float(path, tone(1e30)), "dB above full scale"),
    "nan.wav": (lambda path: write_float(path, tone(0.1) * np.nan), "not finite"),
    "inf.wav": (lambda path: write_float(path, tone(0.1) / 0), "not finite"),
    "silent.wav": (lambda path: write_float(path, tone(0.0)), "silent"),
    "short.wav": (lambda path: write_float(path, tone(0.1, 0.01)), "short|0.1 s"),
    "unreadable": (lambda path: (path.mkdir(), path.chmod(0)), "permission denied"),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", SOUNDS)
def test_one_bad_recording_ends_no_batch(name, place, capsys):
    make, message = SOUNDS[name]
    (place / "rec").mkdir()
    (place / "rec" / "good.flac").write_bytes(CLIP.read_bytes())
    make(place / "rec" / name)

    def encode():
        status, error = run(capsys, "encode rec -o t.jsonl")
        assert status == 1 and "1 encoded to t.jsonl, 1 skipped" in error, error
        assert name in error and re.search(message, error), error

    without_root(encode) if name == "unreadable" else encode()
    assert json.loads(Path("t.jsonl").read_text())["id"] == "good"


def test_a_name_that_is_not_utf8_is_named(place, capsys):
    (place / "rec").mkdir()
    (place / "rec" / "good.flac").write_bytes(CLIP.read_bytes())
    Path(os.fsdecode(os.fsencode(place) + b"/rec/\xff.flac")).write_bytes(CLIP.read_bytes())
    status, error = run(capsys, "encode rec -o t.jsonl")
    assert status == 1 and r"rec/\xff.flac: its name is not UTF-8; rename it" in error, error
    assert json.loads(Path("t.jsonl").read_text())["id"] == "good"


@pytest.mark.parametrize(
    "words",
    [
        "decode pipe -o out",
        "corpus check pipe",
        "corpus pack m.jsonl --license pipe",
        "corpus prepare pipe",
        "train pipe -o out",
        "plan pipe",
        "convert pipe -o out",
        "synthesize hi --reference pipe -o x.wav",
        "synthesize hi --reference /dev/zero -o x.wav",
        "synthesize hi --model pipe -o x.wav",
        "synthesize hi --codec pipe -o x.wav",
    ],
)
def test_a_pipe_is_seen_before_it_is_read(words, capsys):
    os.mkfifo("pipe")
    status, error = run(capsys, words)
    assert status == 1 and "a device, pipe or socket" in error and error.count("\n") == 1, error


# ---- going on


def test_encode_goes_on_where_it_stopped(place, monkeypatch, capsys):
    from diffuspeech.voice import jobs

    (place / "rec").mkdir()
    for n in range(3):
        (place / "rec" / f"{n}.flac").write_bytes(CLIP.read_bytes())
    assert run(capsys, "encode rec -o whole.jsonl")[0] == 0
    real, calls = jobs.encode_utterance, []

    def encode(tokenizer, u):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(u.id)
        return real(tokenizer, u)

    monkeypatch.setattr(jobs, "encode_utterance", encode)
    assert run(capsys, "encode rec -o t.jsonl")[0] == 130 and not Path("t.jsonl").exists()
    calls.clear()
    monkeypatch.setattr(jobs, "encode_utterance", lambda *args: (calls.append(args[1].id), real(*args))[1])
    assert run(capsys, "encode rec -o t.jsonl")[0] == 0 and calls == ["2"]
    assert Path("t.jsonl").read_bytes() == Path("whole.jsonl").read_bytes()
    assert not list((place.parent / "home" / "results").glob("*.jsonl"))


def test_unfinished_lines_survive_what_a_killed_process_left(place):
    unfinished = Unfinished(place / "t.jsonl", "job")
    unfinished.add("a", "1\n")
    with open(unfinished.file, "a") as file:
        file.write('\n["b", "2')
    found = Unfinished(place / "t.jsonl", "job")
    found.add("c", "3\n")
    again = Unfinished(place / "t.jsonl", "job")
    assert (again.get("a"), again.get("b"), again.get("c")) == ("1\n", None, "3\n")
    assert Unfinished(place / "t.jsonl", "another job").get("a") is None


def test_no_rows_replace_no_table(place, capsys):
    from diffuspeech.cli.output import write_rows

    (place / "t.json").write_text("[1]")
    write_rows([], place / "t.json")
    assert (place / "t.json").read_text() == "[1]"


# ---- texts


@pytest.mark.parametrize(
    "text, words",
    [
        ("café", "cafe"),
        ("naïve Straße", "naive strasse"),
        ("Ærø Łódź", "aero lodz"),
        ("ＡＢＣ", "abc"),
        ("ﬁne", "fine"),
        ("don’t", "don't"),
        ("<laugh> hello [noise]", "hello"),
        ("50%", "fifty percent"),
    ],
)
def test_what_can_be_folded_is(text, words):
    assert normalize_text(text) == words


@pytest.mark.parametrize(
    "text, message",
    [
        ("hello 你好", "2 characters of 8 have no letters here: 你好"),
        ("hello 🎉", "1 character of 7 has no letters here: 🎉"),
        ("привет hello", "6 characters"),
        ("<b>hello</b>", "not spoken: <b> </b>"),
        ("hello, world!", ""),
        ("café", ""),
    ],
)
def test_what_is_not_spoken_is_named(text, message, capsys):
    assert message in describe_unspoken(text) and bool(message) == bool(describe_unspoken(text))
    status, error = run(capsys, ["synthesize", text, "-o", "x.wav", "--steps", "1"])
    assert status == 0 and (message in error) and error.count("warning") == bool(message), error


@pytest.mark.parametrize("text", ["", " ", "你好", "!!!", "<b>", "🎉", "a" * 2000, "hello " + "b" * 2000])
def test_what_cannot_be_spoken_is_refused_at_once(text, capsys):
    started = time.monotonic()
    status, error = run(capsys, ["synthesize", text, "-o", "x.wav"])
    assert status == 1 and error.count("\n") == 1 and time.monotonic() - started < 60, error
    assert not Path("x.wav").exists()


def test_a_long_text_is_spoken_in_parts():
    text = " ".join(f"This is sentence {n} of a long text, which costs 3.5 dollars." for n in range(500))
    parts = split_text(text)
    assert " ".join(parts) == text and all(len(part.split()) <= MAX_WORDS for part in parts)
    assert split_text("Good morning. Hello.") == ["Good morning. Hello."]
    assert all(spoken_words(part) for part in parts)


# ---- files of this library that are damaged


def changed(data: bytes, n: int) -> bytes:
    "One of some ways to damage a file"
    size = struct.unpack("<Q", data[:8])[0]
    ways = [b"", data[:20], data[:-5], b"\0" * 8 + data[8:], b"\xff" * 8 + data[8:], data + b"more"]
    header = json.loads(data[8 : 8 + size])
    for key in header:
        for other in ({**header, key: 3}, {k: v for k, v in header.items() if k != key}):
            text = json.dumps(other).encode()
            ways.append(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return ways[n % len(ways)]


@pytest.fixture(scope="module")
def saved_trajectory(tmp_path_factory):
    path, mask = tmp_path_factory.mktemp("trajectory") / "t.safetensors", 9
    trajectory.save(
        trajectory.Trajectory(
            start=torch.tensor([[mask, mask, 3, mask]]),
            final=torch.tensor([[1, 2, 3, 4]]),
            lengths=torch.tensor([4]),
            commit_step=torch.tensor([[1, 0, -2, 1]], dtype=torch.int16),
            confidence=torch.tensor([[0.4, 0.9, torch.nan, 0.5]]),
            entropy=torch.tensor([[1.0, 0.2, torch.nan, 0.9]]),
            mask_id=mask,
            steps=2,
            rule="by hand",
        ),
        path,
    )
    return path


@pytest.mark.parametrize("n", range(20))
def test_a_damaged_trajectory_is_one_line(n, saved_trajectory, place):
    (place / "t.safetensors").write_bytes(changed(saved_trajectory.read_bytes(), n))
    with pytest.raises(ValueError, match="t.safetensors") as e:
        trajectory.load(place / "t.safetensors")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name, change",
    [
        ("lengths", lambda t: t + 1),
        ("lengths", lambda t: -t),
        ("lengths", lambda t: t.float()),
        ("final", lambda t: t[:, :2].contiguous()),
        ("final", lambda t: -t),
        ("commit_step", lambda t: t + 5),
        ("commit_step", lambda t: t.long()),
        ("confidence", lambda t: t.double()),
        ("start", lambda t: t[0].contiguous()),
    ],
)
def test_a_trajectory_has_its_shapes_types_and_ranges(name, change, saved_trajectory, place):
    from safetensors import safe_open

    tensors, header = load_file(saved_trajectory), safe_open(saved_trajectory, "pt").metadata()
    save_file(tensors | {name: change(tensors[name])}, place / "t.safetensors", header)
    with pytest.raises(ValueError, match="damaged, or not a trajectory"):
        trajectory.load(place / "t.safetensors")


@pytest.fixture
def packed(place):
    (place / "a.flac").write_bytes(CLIP.read_bytes())
    line = dict(audio_filepath="a.flac", duration=2.0, text="hello", id="a")
    (place / "m.jsonl").write_text(json.dumps(line) + "\n")
    shards.pack(Manifest(place / "m.jsonl"), place / "pack", "mine")
    return place / "pack"


@pytest.mark.parametrize(
    "change",
    [
        lambda header, places, seconds: ({**header, "shards": 3}, places, seconds),
        lambda header, places, seconds: ({**header, "shards": [{"name": "x"}]}, places, seconds),
        lambda header, places, seconds: ({**header, "skipped": 3}, places, seconds),
        lambda header, places, seconds: ([], places, seconds),
        lambda header, places, seconds: (header, places + 2**40, seconds),
        lambda header, places, seconds: (header, -places, seconds),
        lambda header, places, seconds: (header, places.astype(np.float64), seconds),
        lambda header, places, seconds: (header, places[:, :3], seconds),
        lambda header, places, seconds: (header, places, seconds * np.nan),
        lambda header, places, seconds: (header, places, -seconds),
        lambda header, places, seconds: (header, places, np.concatenate([seconds, seconds])),
    ],
)
def test_the_table_of_a_pack_is_checked(change, packed):
    header, places, seconds = change(*shards.read_table(packed / "00000.npz"))
    np.savez(packed / "00000.npz", about=np.array(json.dumps(header)), places=places, seconds=seconds)
    with pytest.raises(ManifestError, match="00000.npz: missing or damaged"):
        shards.Shards(packed)


@pytest.mark.parametrize("content", ["", "[]", "3", "{}", '{"diffuspeech_pack": 1}', "\xff"])
def test_the_index_of_a_pack_is_checked(content, packed):
    (packed / "index.json").write_text(content, encoding="latin-1")
    with pytest.raises(ManifestError, match="not the index of a pack"):
        shards.Shards(packed)


def test_an_empty_answer_of_a_judge_is_asked_for_again(place):
    def judge(waves):
        return [1.5 for _ in waves]

    judge.name = "a judge"
    cache, wave = Cache(place / "judged"), torch.randn(16_000) * 0.1
    assert cache(judge, [wave]) == [1.5]
    (file,) = (place / "judged").rglob("*.json")
    for content in ("", "{", "\xff"):
        file.write_text(content, encoding="latin-1")
        assert cache(judge, [wave]) == [1.5] and json.loads(file.read_text()) == 1.5


def test_a_license_that_is_not_utf8_is_named(packed, place, capsys):
    (place / "L").write_bytes(b"mine \xff")
    status, error = run(capsys, "corpus pack m.jsonl --license L -o other")
    assert status == 1 and "L: byte 6 is not UTF-8" in error, error


def test_fetch_goes_on_with_the_other_names(monkeypatch, capsys):
    from diffuspeech.base import pretrained

    asked = []

    def fetch(name):
        asked.append(name)
        if len(asked) == 1:
            raise pretrained.MissingDependency("no network")

    monkeypatch.setattr(pretrained, "fetch", fetch)
    names = list(pretrained.PRETRAINED)[:3]
    status, error = run(capsys, ["fetch", *names])
    assert status == 3 and asked == names and "no network" in error


# ---- without root


def drop_root() -> None:
    "Without the capabilities by which root reads and writes whatever permissions say"
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = struct.pack("II", 0x20080522, 0), bytearray(24)
    buffer = (ctypes.c_char * 24).from_buffer(data)
    assert libc.capget(header, buffer) == 0
    words = list(struct.unpack("6I", data))
    for i in (0, 1):  # those that take effect, and those that may
        words[i] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    data[:] = struct.pack("6I", *words)
    assert libc.capset(header, buffer) == 0


def without_root(check) -> None:
    "Run a check with only what permissions grant: as root in a process of its own"
    if os.getuid():
        return check()
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)  # the threads of OpenMP are not there in a fork
            drop_root()
            check()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("encode rec -o closed/t.jsonl", "the folder .* cannot be written"),
        ("synthesize hi -o closed/x.wav", "cannot be written"),
        ("decode t.jsonl -o closed", "cannot be written"),
        ("decode t.jsonl -o closed/new", "cannot be written"),
        ("plan ddm --json closed/p.json", "cannot be written"),
        ("plan ddm --json locked.json --overwrite", "its permissions forbid it"),
        ("train ddm -o closed/run", "cannot be written"),
        ("corpus build tiny -o closed/c", "cannot be written"),
        ("corpus pack m.jsonl --license t.jsonl -o closed/p", "cannot be written"),
        ("corpus prepare m.jsonl -o closed/p", "cannot be written"),
        ("corpus check secret.jsonl", "permission denied"),
        ("decode secret.jsonl -o out", "permission denied"),
    ],
)
def test_permissions_are_seen_before_any_work(words, message, place, capsys):
    (place / "rec").mkdir()
    (place / "rec" / "a.flac").write_bytes(CLIP.read_bytes())
    for name in ("t.jsonl", "m.jsonl", "locked.json", "secret.jsonl"):
        (place / name).write_text("{}")
    (place / "locked.json").chmod(0o400)
    (place / "secret.jsonl").chmod(0)
    (place / "closed").mkdir(0o500)

    def check():
        status, error = run(capsys, words)
        assert status == 1 and re.search(message, error) and error.count("\n") == 1, error

    without_root(check)
    assert os.listdir(place / "closed") == [] and (place / "locked.json").read_text() == "{}"


def test_collected_errors_name_what_cannot_be_read(place):
    (place / "rec" / "sub").mkdir(parents=True)
    (place / "rec" / "a.flac").write_bytes(CLIP.read_bytes())
    (place / "rec" / "sub").chmod(0)

    def check():
        job = collect_utterances([place / "rec"])
        assert [u.id for u in job.utterances] == ["a"] and "sub: permission denied" in job.errors[0]

    without_root(check)


def test_a_file_of_another_is_not_passed_over(place):
    (place / "a.wav").write_text("mine")
    with pytest.raises(ValueError, match="exists already; --overwrite"):
        Results("job").is_done(place / "a.wav")
