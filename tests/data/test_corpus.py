"Manifests that are wrong in every way we could think of, and batches that are exact"

import json
import os
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from diffuspeech.data import audio, manifest
from diffuspeech.data.batches import batches, collate, plan_batches
from diffuspeech.data.corpora import librispeech, ljspeech
from diffuspeech.data.manifest import (
    Manifest,
    ManifestError,
    Utterance,
    check_manifest,
    load_audio,
    write_manifest,
)

LINES = {"tiny": 200_000, "full": 1_000_000}.get(os.environ.get("DIFFUSPEECH_SCALE", "tiny"), 200_000)
GOOD = b'{"audio_filepath": "clip.wav", "duration": 1.5, "text": "please leave"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    audio.save(folder / "clip.wav", audio.load_clip())
    return folder


def write(folder, *lines, name="corpus.jsonl", end=b"\n"):
    (folder / name).write_bytes(b"".join(line + end for line in lines))
    return folder / name


def line(**fields) -> bytes:
    known = {"audio_filepath": "clip.wav", "duration": 1.5, "text": "please leave"} | fields
    return json.dumps({k: v for k, v in known.items() if v is not ...}).encode()


BAD = {
    "torn": (b'{"audio_filepath": "clip.wav", "duration": 1.5, "te', "not JSON"),
    "torn inside": (b'{"audio_filepath": "clip.wav", "duration": 1.5, "text": "a" "b"}', "not JSON"),
    "two objects": (GOOD + GOOD, "not JSON"),
    "a list": (b'["clip.wav", 1.5]', "a JSON list"),
    "a number": (b"17", "a JSON int"),
    "deep": (b"[" * 100_000, "not JSON"),
    "a number of 5000 digits": (
        b'{"audio_filepath": "clip.wav", "duration": ' + b"9" * 5000 + b', "text": "x"}',
        "not JSON|a number of seconds",
    ),
    "no path": (line(audio_filepath=...), '"audio_filepath" is missing'),
    "empty path": (line(audio_filepath=""), '"audio_filepath" is missing'),
    "a path with a NUL": (line(audio_filepath="a\0b.wav"), "not a path"),
    "a path that is a list": (line(audio_filepath=["a.wav"]), '"audio_filepath" is .* it must be a string'),
    "no duration": (line(duration=...), '"duration" is missing'),
    "null duration": (line(duration=None), '"duration" is missing'),
    "negative duration": (line(duration=-1), '"duration" is -1'),
    "zero duration": (line(duration=0), '"duration" is 0; .*above 0'),
    "NaN duration": (line(duration=float("nan")), '"duration" is NaN'),
    "infinite duration": (line(duration=float("inf")), '"duration" is Infinity'),
    "overflowing duration": (line().replace(b"1.5", b"1e999"), '"duration" is Infinity'),
    "duration as text": (line(duration="1.5"), '"duration" is "1.5"'),
    "duration true": (line(duration=True), '"duration" is true'),
    "negative offset": (line(offset=-0.5), '"offset" is -0.5'),
    "NaN offset": (line(offset=float("nan")), '"offset" is NaN'),
    "text a number": (line(text=5), '"text" is 5; it must be a string'),
    "text a list": (line(text=["a"]), '"text" is .* it must be a string'),
    "no text": (line(text=...), '"text" is empty'),
    "empty text": (line(text=""), '"text" is empty'),
    "blank text": (line(text=" \t"), '"text" is empty'),
    "half a surrogate": (line(text="\ud800"), "surrogate"),
    "speaker a list": (line(speaker=[1]), '"speaker" is'),
    "Latin-1": (line(text="caf@").replace(b"@", b"\xe9"), "byte .* is not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_line(folder, kind):
    "One clear message with file and line; with on_bad='skip' the others are read, and the bad one is counted"
    bad, message = BAD[kind]
    path = write(folder, GOOD, b"", GOOD, bad, GOOD)
    with pytest.raises(ManifestError, match=message) as e:
        list(Manifest(path))
    assert str(e.value).startswith(f"{path}:4: ") and "\n" not in str(e.value) and len(str(e.value)) < 400, (
        str(e.value)
    )
    lenient = Manifest(path, on_bad="skip")
    assert [u.where for u in lenient] == [f"{path}:{n}" for n in (1, 3, 5)]
    assert lenient.skipped.count == 1 and lenient.skipped.messages == [str(e.value)]
    assert check_manifest(lenient).messages[0] == str(e.value)
    lenient = Manifest(path, on_bad="skip")
    assert sum(len(b.ids) for b in batches(lenient, seconds=10)) == 3 and lenient.skipped.messages == [
        str(e.value)
    ]


def broken_sounds(folder):
    "Lines with bad audio, and the error for each"
    data = (folder / "clip.wav").read_bytes()
    (folder / "cut.wav").write_bytes(data[: len(data) // 2])
    audio.save(folder / "whole.flac", audio.load_clip())
    flac = (folder / "whole.flac").read_bytes()
    (folder / "cut.flac").write_bytes(flac[: len(flac) // 2])
    (folder / "nothing.wav").write_bytes(b"")
    (folder / "text.wav").write_text("this is not sound")
    (folder / "folder.wav").mkdir(exist_ok=True)
    soundfile.write(folder / "nan.wav", np.full(16_000, np.nan, np.float32), 16_000, subtype="FLOAT")
    soundfile.write(folder / "silent.wav", np.zeros(0, np.float32), 16_000)
    return {
        "gone": (line(audio_filepath="gone.wav"), "gone.wav: no such file; check the path"),
        "a folder": (line(audio_filepath="folder.wav"), "a folder"),
        "no bytes": (line(audio_filepath="nothing.wav"), "cannot be read as sound"),
        "not sound": (line(audio_filepath="text.wav"), "cannot be read as sound"),
        "no samples": (line(audio_filepath="silent.wav"), "ends at 0.00 s"),
        "half a wav": (line(audio_filepath="cut.wav", duration=5.6), "ends at|breaks off|cannot be read"),
        "half a flac": (line(audio_filepath="cut.flac", duration=5.6), "ends at|breaks off|cannot be read"),
        "half a flac, its end": (
            line(audio_filepath="cut.flac", offset=5, duration=0.6),
            "ends at|breaks off|cannot be read",
        ),
        "offset beyond the end": (line(offset=60), "ends at 5.65 s, but the utterance is 60.00 to 61.50 s"),
        "offset at the end": (line(offset=5.65, duration=0.05), "ends at|breaks off"),
        "longer than the file": (line(duration=9), "the utterance is 0.00 to 9.00 s"),
        "not finite": (line(audio_filepath="nan.wav", duration=1), "not finite"),
    }


def test_bad_sound(folder):
    wrong = broken_sounds(folder)
    for kind, (bad, message) in wrong.items():
        path = write(folder, GOOD, bad)
        with pytest.raises(ManifestError, match=message) as e:
            load_audio(Manifest(path)[1])
        assert str(e.value).startswith(f"{path}:2: ") and "\n" not in str(e.value), (kind, str(e.value))
    path = write(folder, GOOD, *(bad for bad, _ in wrong.values()), GOOD)
    job = Manifest(path, on_bad="skip")
    got = list(batches(job, seconds=20))
    assert sum(len(b.ids) for b in got) == 2 and sum(len(b.skipped) for b in got) == job.skipped.count == len(
        wrong
    )
    with pytest.raises(ManifestError, match=r"corpus\.jsonl:\d+: "):
        list(batches(Manifest(path), seconds=20))


def test_a_batch_without_valid_rows(folder):
    job = Manifest(write(folder, line(audio_filepath="gone.wav")), on_bad="skip")
    (batch,) = batches(job, seconds=20)
    assert (
        batch.ids == []
        and batch.waves.shape == (0, 0)
        and batch.lengths.shape == (0,)
        and batch.seconds == 0
        and job.skipped.count == 1
    )


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no lines"),
        (b"\n\n  \n", "no lines"),
        (b"\xef\xbb\xbf", "no lines"),
        (b"[" + GOOD + b"]", "one JSON array"),
        (b"\x1f\x8b\x08\x00abc", "gunzip"),
        (GOOD.decode().encode("utf-16"), "UTF-16"),
    ],
    ids=["empty", "blank", "only a mark", "array", "gzip", "utf-16"],
)
def test_bad_file(folder, content, message):
    (folder / "file.jsonl").write_bytes(content)
    for on_bad in ("raise", "skip"):
        with pytest.raises(ManifestError, match=message) as e:
            Manifest(folder / "file.jsonl", on_bad=on_bad)
        assert "file.jsonl" in str(e.value)


def test_missing_manifest(folder):
    with pytest.raises(ManifestError, match="a folder, not a manifest"):
        Manifest(folder)
    with pytest.raises(ManifestError, match="nowhere.jsonl: no such file"):
        Manifest(folder / "nowhere.jsonl")
    with pytest.raises(ValueError, match="on_bad='ignore'"):
        Manifest(write(folder, GOOD), on_bad="ignore")


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        GOOD + b"\r\n",
        b"\xef\xbb\xbf" + GOOD + b"\n",
        b"\r\n\r\n" + GOOD + b"\r\n\r\n",
        b"  " + GOOD + b" \n",
    ],
    ids=["no newline at the end", "CRLF", "byte order mark", "blank CRLF lines", "spaces"],
)
def test_harmless_variations(folder, content):
    (folder / "odd.jsonl").write_bytes(content)
    (u,) = Manifest(folder / "odd.jsonl")
    assert u.text == "please leave" and u.duration == 1.5 and len(load_audio(u)) == 24_000
    assert u.where == f"{folder / 'odd.jsonl'}:{content[: content.index(b'{')].count(bytes([10])) + 1}"


def test_duplicate_ids_are_found(folder):
    path = write(folder, line(id="a"), line(), line(id="a"), line(offset=1), line(), line(id="b"))
    messages = check_manifest(Manifest(path)).messages
    assert (
        len(messages) == 2
        and messages[0].startswith(f"{path}:3: the id 'a' is that of line 1")
        and messages[1].startswith(f"{path}:5: the id 'clip.wav' is that of line 2")
    )


DURATIONS = [
    (b'{"duration":2,"audio_filepath":"a","text":"x"}', 2),
    (b'{"audio_filepath":"a","text":"x","duration" : 2.5e0 }', 2.5),
    (b'{"audio_filepath":"a","text":"\\"duration\\": 9","duration":2}', 2),
    (b'{"audio_filepath":"a","text":"duration","duration":2}', 2),
    (b'{"audio_filepath":"a","text":"x","duration":2,"more":{"duration":9}}', 2),
    (b'{"more":{"duration":9},"audio_filepath":"a","duration":2,"text":"x"}', 2),
    (b'{"audio_filepath":"a","duration":9,"duration":2,"text":"x"}', 2),
    (b'{"audio_filepath":"a","durat\\u0069on":2,"text":"x"}', 2),
    (b'{"audio_filepath":"a","x\\"duration":9,"durat\\u0069on":2,"text":"x"}', 2),
    (b'{"audio_filepath":"a","duration":2,"text":"{"}', 2),
    (b'{"audio_filepath":"a","text":"x","more":{"duration":9}}', np.nan),
    (b'{"audio_filepath":"a","duration":"2","text":"x"}', np.nan),
]


@pytest.mark.parametrize("raw, seconds", DURATIONS, ids=range(len(DURATIONS)))
def test_quick_duration_agrees_with_the_parser(raw, seconds):
    np.testing.assert_equal(manifest.quick_duration(raw), seconds)
    if not np.isnan(seconds):
        assert manifest.parse(raw, Path()).duration == seconds


def test_paths(folder, monkeypatch):
    "Relative paths start at the manifest's folder, in any working directory; absolute ones stay"
    (folder / "lists").mkdir(exist_ok=True)
    path = write(
        folder / "lists", line(audio_filepath="../clip.wav"), line(audio_filepath=str(folder / "clip.wav"))
    )
    for start, name in (
        (folder / "lists", Path("corpus.jsonl")),
        (folder, Path("lists/corpus.jsonl")),
        (Path("/"), path),
    ):
        monkeypatch.chdir(start)
        assert [len(load_audio(u)) for u in Manifest(name)] == [24_000, 24_000]
        assert Manifest(name)[0].where == f"{name}:1"
        assert Manifest(name)[0].id == "../clip.wav", "ids do not depend on where the corpus lies"


def test_granary_round_trip(folder):
    "The fields of Granary's pipeline (NeMo-speech-data-processor, dataset_configs/multilingual/granary)"
    fields = {
        "audio_filepath": "en/a1.flac",
        "offset": 12.34,
        "duration": 5.06,
        "text": "Good evening — “caf\u00e9”\u2028.",
        "source_lang": "en",
        "target_lang": "it",
        "answer": "Buonasera.",
        "segment_id": 3,
        "decodercontext": "",
        "emotion": "<|emo:undefined|>",
        "pnc": "pnc",
        "itn": "itn",
        "timestamp": "notimestamp",
        "diarize": "nodiarize",
    }
    (u,) = Manifest(write(folder, json.dumps(fields).encode()))
    assert (u.audio, u.offset, u.duration, u.text, u.lang, u.id) == (
        folder / "en/a1.flac",
        12.34,
        5.06,
        fields["text"],
        "en",
        "en/a1.flac@12.34",
    )
    write_manifest(folder / "again.jsonl", [u])
    assert json.loads((folder / "again.jsonl").read_text()) == fields | {"id": u.id, "lang": "en"}


def test_round_trip(folder, tmp_path):
    there = [
        Utterance(
            folder / "clip.wav",
            0.1 + i / 7,
            i / 3,
            f'тест {i} "quoted"\n{{}}',
            f"s{i}",
            f"id-{i}",
            "train",
            "ru",
            {"more": {"duration": i}, "list": [1, None]},
        )
        for i in range(20)
    ]
    for path in (folder / "there.jsonl", tmp_path / "elsewhere.jsonl"):
        assert write_manifest(path, there) == 20
        back = list(Manifest(path))
        assert back == there and [u.where for u in back] == [f"{path}:{i + 1}" for i in range(20)]
        assert np.allclose(Manifest(path).durations, [u.duration for u in there])
    assert json.loads((folder / "there.jsonl").read_text().split("\n")[0])["audio_filepath"] == "clip.wav"
    numbers = Manifest(write(folder, line(speaker=84, utt_id=7)))[0]
    assert numbers.speaker == "84" and numbers.id == "7"
    assert Manifest(write(folder, line(offset=None, text=...)), need_text=False)[0].offset == 0


def test_writing_is_all_or_nothing(folder):
    path = write(folder, GOOD, name="kept.jsonl")

    def fails():
        yield Utterance(folder / "clip.wav", 1.0, text="x", id="x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_manifest(path, fails())
    with pytest.raises(ManifestError, match="kept.jsonl:1: x cannot be written"):
        write_manifest(path, [Utterance(folder / "clip.wav", float("nan"), text="x", id="x")])
    assert path.read_bytes() == GOOD + b"\n" and not list(folder.glob(".kept*"))


def test_index_follows_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MIN_INDEXED_BYTES", 0)
    path, stored = tmp_path / "corpus.jsonl", tmp_path / "corpus.jsonl.index.npz"
    built = []
    build = manifest.build_index
    monkeypatch.setattr(manifest, "build_index", lambda p: built.append(p) or build(p))
    write(tmp_path, GOOD, b"", GOOD)
    first = Manifest(path)
    assert stored.exists() and len(first) == 2 and len(built) == 1
    second = Manifest(path)
    assert second[1].where.endswith(":3") and list(second) == list(first) and len(built) == 1, (
        "the stored index was used"
    )
    write(tmp_path, GOOD, GOOD, line(duration=3))
    for stale in (lambda: first[0], lambda: list(first)):
        with pytest.raises(ManifestError, match="changed since it was opened"):
            stale()
    assert len(Manifest(path)) == 3 and len(built) == 2
    size, when = path.stat().st_size, path.stat().st_mtime_ns
    write(tmp_path, GOOD, GOOD, line(duration=4))
    os.utime(path, ns=(when + 10_000_000, when + 10_000_000))
    assert path.stat().st_size == size and Manifest(path).durations[2] == 4, "same size, another time"
    for broken in (b"", b"not an index", stored.read_bytes()[:-30]):
        stored.write_bytes(broken)
        assert Manifest(path).durations[2] == 4
    stored.unlink()
    stored.mkdir()  # cannot be written, even by root
    assert Manifest(path).durations[2] == 4 and not list(tmp_path.glob(".corpus*"))
    stored.rmdir()
    threads = [threading.Thread(target=Manifest, args=(path,)) for _ in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert Manifest(path).durations[2] == 4 and not list(tmp_path.glob(".corpus*"))


def memory(kind) -> int:
    "kB; the kernel's own counts, since getrusage hands the parent's peak down to a child"
    return int(
        next(
            row for row in Path("/proc/self/status").read_text().split("\n") if row.startswith(kind)
        ).split()[1]
    )


def open_big(path, out):
    "In a new process, to measure its own peak"
    before = memory("VmHWM")
    began = time.perf_counter()
    m = Manifest(path)
    first = time.perf_counter() - began
    began = time.perf_counter()
    Manifest(path)
    again = time.perf_counter() - began
    sample = [m[i].duration for i in range(0, len(m), len(m) // 50)]
    out.put(
        (len(m), first, again, memory("VmHWM") - before, np.allclose(sample, m.durations[:: len(m) // 50]))
    )


def test_many_lines(tmp_path):
    path = tmp_path / "big.jsonl"
    with open(path, "w") as file:
        file.writelines(
            f'{{"audio_filepath": "yt/{i % 999:03}/{i}.flac", "offset": {i % 77}.5, '
            f'"duration": {1 + i % 2900 / 100:.2f}, "text": "a sentence of some words, number {i}, '
            'as long as most of them are in such a corpus, about fifteen", '
            '"source_lang": "en", "target_lang": "en", "pnc": "pnc", "itn": "itn"}\n'
            for i in range(LINES)
        )
    context = get_context("spawn")
    out = context.Queue()
    process = context.Process(target=open_big, args=(path, out))
    process.start()
    n, first, again, kib, same = out.get(timeout=120)
    process.join()
    print(
        f"{n} lines, {path.stat().st_size / 1e6:.0f} MB: opened in {first:.2f} s, again in {again:.3f} s, "
        f"{kib / 1024:.0f} MiB more at the peak"
    )
    assert n == LINES and same
    assert again < first / 4
    assert kib * 1024 < 60 * LINES + (16 << 20), (
        "memory is the index's, a few dozen bytes a line while it is built"
    )


LENGTHS = {
    "like speech": np.random.default_rng(0).gamma(4, 3, 5000).clip(0.5, 40).astype(np.float32),
    "all the same": np.full(1000, 7.5, np.float32),
    "one": np.array([3.0], np.float32),
    "each a batch": np.full(5, 300.0, np.float32),
    "exactly the budget": np.array([375.0, 375.0, 187.5, 187.5], np.float32),
    "with bad ones": np.where(np.arange(500) % 7 == 0, np.nan, np.linspace(1, 20, 500)).astype(np.float32),
}


@pytest.mark.parametrize("world_size", [1, 2, 7])
@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize(
    "options", [{}, {"max_rows": 3}, {"length_jitter": 0}, {"length_jitter": float("inf")}], ids=str
)
def test_plan_is_exact(kind, world_size, options):
    d = LENGTHS[kind]
    ranks = [
        plan_batches(d, seed=1, epoch=4, rank=r, world_size=world_size, **options) for r in range(world_size)
    ]
    assert len({len(r) for r in ranks}) == 1, "as many steps on each rank"
    every = np.concatenate([rows for r in ranks for rows in r])
    assert (np.sort(every) == np.flatnonzero(~np.isnan(d))).all(), "each once"
    for rows in (rows for r in ranks for rows in r):
        assert len(rows) <= options.get("max_rows", len(d)) and d[rows].max(initial=0) * len(rows) <= 375 * (
            1 + 1e-6
        )
    again = [
        plan_batches(d, seed=1, epoch=4, rank=r, world_size=world_size, **options) for r in range(world_size)
    ]
    assert all(np.array_equal(a, b) for x, y in zip(ranks, again) for a, b in zip(x, y))


def test_plan_changes_with_seed_and_epoch_and_nothing_else():
    d = LENGTHS["like speech"]
    state = torch.get_rng_state()
    one = plan_batches(d)
    for other in (plan_batches(d, seed=1), plan_batches(d, epoch=1)):
        assert {tuple(b) for b in other} != {tuple(b) for b in one}
    torch.manual_seed(5)
    np.random.seed(5)
    assert all(np.array_equal(a, b) for a, b in zip(plan_batches(d), one))
    torch.set_rng_state(state)
    padding = 1 - d.sum() / sum(d[b].max() * len(b) for b in one)
    assert padding < 0.13


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"seconds": 0}, "seconds=0"),
        ({"seconds": 10}, "row 1 lasts 300.00 s"),
        ({"max_rows": 0}, "max_rows=0"),
        ({"length_jitter": -1}, "length_jitter=-1"),
        ({"length_jitter": float("nan")}, "length_jitter=nan"),
    ],
    ids=str,
)
def test_plan_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        plan_batches(np.array([2.0, 300.0]), **options)
    with pytest.raises(ValueError, match="no utterance"):
        plan_batches(np.array([np.nan]))


@pytest.fixture(scope="module")
def pieces(folder):
    write_manifest(
        folder / "pieces.jsonl",
        [
            Utterance(folder / "clip.wav", 0.5 + i % 7 / 4, i % 13 / 4, f"piece {i}", id=f"piece-{i}")
            for i in range(50)
        ],
    )
    return Manifest(folder / "pieces.jsonl")


def test_batches_resume_ranks_and_workers(pieces):
    state = torch.get_rng_state()
    whole = list(batches(pieces, seconds=12, epoch=3))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"
    assert sorted(i for b in whole for i in b.ids) == sorted(u.id for u in pieces)
    for b in whole:
        assert b.seconds <= 12 and b.waves.shape == (len(b.ids), b.lengths.max())
        for u, wave, n in zip(b.utterances, b.waves, b.lengths):
            assert (
                torch.equal(wave[:n], load_audio(u))
                and n == round(u.duration * audio.SAMPLE_RATE)
                and not wave[n:].any()
            )
    rest = list(batches(pieces, seconds=12, epoch=3, start=4, workers=2))
    assert [b.ids for b in rest] == [b.ids for b in whole[4:]] and all(
        torch.equal(a.waves, b.waves) for a, b in zip(rest, whole[4:])
    )
    assert list(batches(pieces, seconds=12, epoch=3, start=len(whole))) == []
    ranks = [[b.ids for b in batches(pieces, seconds=12, rank=r, world_size=4)] for r in range(4)]
    assert (
        sorted(i for r in ranks for b in r for i in b) == sorted(u.id for u in pieces)
        and len({len(r) for r in ranks}) == 1
    )


def test_an_error_in_a_worker_is_one_line(folder):
    path = write(folder, GOOD, line(audio_filepath="gone.wav"), line(duration=99))
    with pytest.raises(ManifestError) as e:
        list(batches(Manifest(path), seconds=50))
    assert str(e.value).startswith(f"{path}:3: lasts 99.00 s") and 'on_bad="skip"' in str(e.value)
    with pytest.raises(ManifestError) as e:
        list(batches(Manifest(path), seconds=100, workers=1))
    assert "\n" not in str(e.value) and str(e.value).startswith(f"{path}:")
    job = Manifest(path, on_bad="skip")
    assert sum(len(b.ids) for b in batches(job, seconds=50, workers=1)) == 1 and job.skipped.count == 2, (
        "counted here, though a worker met it"
    )
    with pytest.raises(ManifestError, match="gone.wav: no such file"):
        collate([job[1]])


def test_offsets_at_another_rate(folder):
    "8 and 44.1 kHz, stereo: the right segment is read"
    for rate in (8000, 44_100):
        t = np.arange(3 * rate) / rate
        tone = np.sin(2 * np.pi * np.where(t < 1, 300, np.where(t < 2, 600, 900)) * t)
        soundfile.write(folder / "tones.wav", np.stack([tone, tone], 1) / 2, rate)
        for second, hertz in enumerate((300, 600, 900)):
            wave = load_audio(Utterance(folder / "tones.wav", 1.0, float(second)))
            assert len(wave) == audio.SAMPLE_RATE and torch.fft.rfft(wave).abs().argmax() == hertz


def test_public_corpora(tmp_path):
    for speaker, n in ((84, 2), (174, 1)):
        book = tmp_path / "LibriSpeech" / "test-clean" / str(speaker) / "121"
        book.mkdir(parents=True)
        for i in range(n):
            audio.save(book / f"{speaker}-121-{i:04}.flac", audio.load_clip()[: 16_000 * (i + 1)])
        (book / f"{speaker}-121.trans.txt").write_text(
            "".join(f"{speaker}-121-{i:04} WORDS {i}\n" for i in range(n))
        )
    read = librispeech(str(tmp_path), "test-clean")
    assert [(u.id, u.speaker, u.text, u.duration, u.split) for u in read] == [
        ("174-121-0000", "174", "WORDS 0", 1.0, "test-clean"),
        ("84-121-0000", "84", "WORDS 0", 1.0, "test-clean"),
        ("84-121-0001", "84", "WORDS 1", 2.0, "test-clean"),
    ]
    assert len(load_audio(read[-1])) == 32_000
    write_manifest(tmp_path / "test.jsonl", read)
    assert list(Manifest(tmp_path / "test.jsonl")) == list(read)
    with pytest.raises(ValueError, match="dev-murky"):
        librispeech(tmp_path, "dev-murky")
    with pytest.raises(FileNotFoundError, match="download=True"):
        librispeech(tmp_path, "dev-other")
    (tmp_path / "LibriSpeech/test-clean/174/121/174-121-0000.flac").write_bytes(b"fLaC")
    with pytest.raises(ManifestError, match="174-121-0000.flac: cannot be read as sound"):
        read[0]
    with pytest.raises(FileNotFoundError, match="LJSpeech-1.1"):
        ljspeech(tmp_path)
