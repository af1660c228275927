"Packs that are resumed, cut and changed; tars and cuts of others that are wrong"

import gzip
import io
import json
import os
import tarfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from diffuspeech.data import audio
from diffuspeech.data.batches import batches
from diffuspeech.data.external import WebDataset, read_lhotse
from diffuspeech.data.manifest import Manifest, ManifestError, Utterance, load_audio, write_manifest
from diffuspeech.data.shards import Shards, pack

N = 12


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(N):
        audio.save(folder / f"{n}.flac", audio.load_clip()[n * 4000 : n * 4000 + 16_000 + n * 1000])
    write_manifest(
        folder / "corpus.jsonl",
        (
            Utterance(
                folder / f"{n}.flac",
                (16_000 + n * 1000) / 16_000,
                text=f"text “{n}”",
                speaker=f"s{n % 3}",
                id=f"clip-{n}",
                split="train",
                lang="en",
                extra={"n": n, "nested": {"a": [1]}},
            )
            for n in range(N)
        ),
    )
    return Manifest(folder / "corpus.jsonl")


make = partial(pack, licence="ours", max_megabytes=0.05)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".npz"}


def ids(wave):
    return (wave[: len(wave) // 320 * 320].view(-1, 320).abs().mean(1) * 4000).long()


def test_round_trip(manifest, tmp_path):
    index = make(manifest, tmp_path)
    assert index["utterances"] == N and len(index["shards"]) > 1 and index["written"] == index["ranges"]
    assert all((tmp_path / s["name"]).stat().st_size == s["bytes"] <= 50_000 for s in index["shards"])
    assert (tmp_path / "LICENSE").read_text() == "ours\n" and index["licence"] == "ours"
    shards = Shards(tmp_path)
    shards.verify()
    for i, u in enumerate(manifest):
        s = shards[i]
        assert (s.id, s.text, s.speaker, s.split, s.lang, s.extra, s.duration) == (
            u.id,
            u.text,
            u.speaker,
            u.split,
            u.lang,
            u.extra,
            u.duration,
        )
        wave, was = shards.wave(i), load_audio(u)
        assert wave.shape == was.shape and torch.equal(wave, load_audio(s))
        assert torch.nn.functional.cosine_similarity(wave, was, 0) > 0.9
    assert shards[-1].id == f"clip-{N - 1}"
    with pytest.raises(IndexError):
        shards[N]


def test_tokens(manifest, tmp_path):
    make(manifest, tmp_path, kind="tokens", encode=ids)
    shards = Shards(tmp_path)
    assert all(
        torch.equal(shards.tokens(i), ids(load_audio(u))) and shards.tokens(i).dtype == torch.int64
        for i, u in enumerate(manifest)
    )
    with pytest.raises(ManifestError):
        shards.wave(0)
    make(manifest, tmp_path / "opus")
    with pytest.raises(ValueError, match="a pack of opus"):
        Shards(tmp_path / "opus").tokens(0)


def test_processes_and_runs_make_the_same_bytes(manifest, tmp_path):
    tokens = partial(
        make, manifest, kind="tokens", encode=ids, max_megabytes=0.06
    )  # an Opus file has a serial number, new each time
    assert tokens(tmp_path / "one")["ranges"] == tokens(tmp_path / "two", workers=2)["ranges"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_resumes(manifest, tmp_path, monkeypatch):
    from diffuspeech.data import shards as module

    whole = make(manifest, tmp_path / "whole")
    waves = [Shards(tmp_path / "whole").wave(i) for i in range(N)]
    calls, real = [], module.load_audio

    def dies(u):
        calls.append(u.id)
        if len(calls) == N - 2:
            raise KeyboardInterrupt
        return real(u)

    monkeypatch.setattr(module, "load_audio", dies)
    with pytest.raises(KeyboardInterrupt):
        make(manifest, tmp_path / "cut")
    assert not [p for p in os.listdir(tmp_path / "cut") if "part" in p]
    with pytest.raises(ManifestError, match="run pack again to finish"):
        Shards(tmp_path / "cut")
    done = len(calls)
    index = make(manifest, tmp_path / "cut")
    assert 0 < index["written"] < index["ranges"] and len(calls) - done < N
    assert contents(tmp_path / "cut").keys() == contents(tmp_path / "whole").keys()
    assert all(torch.equal(Shards(tmp_path / "cut").wave(i), wave) for i, wave in enumerate(waves))
    assert (
        make(manifest, tmp_path / "cut")["written"] == 0
        and make(manifest, tmp_path / "cut", kbps=24)["written"] == whole["ranges"]
    )


def test_a_changed_line_is_packed_again(manifest, tmp_path):
    utterances = list(manifest)
    make(utterances, tmp_path)
    utterances[0] = Utterance(utterances[0].audio, utterances[0].duration, text="mended", id="clip-0")
    assert make(utterances, tmp_path)["written"] == 1 and Shards(tmp_path)[0].text == "mended"


def test_a_range_that_grows_becomes_two_tars(tmp_path):
    noise = torch.randn(16_000 * 20, generator=torch.Generator().manual_seed(0)) * 0.3
    audio.save(tmp_path / "a.wav", noise)
    index = make(
        [Utterance(tmp_path / "a.wav", 2.0, 2.0 * n, id=str(n)) for n in range(10)],
        tmp_path / "pack",
        kind="tokens",
        encode=lambda wave: (wave.abs() * 1e4).long(),
    )
    assert any(not s["name"].endswith("-00.tar") for s in index["shards"])
    assert [u.id for u in Shards(tmp_path / "pack")] == [str(n) for n in range(10)]


def damage_cut(folder, index):
    path = folder / index["shards"][1]["name"]
    path.write_bytes(path.read_bytes()[:5000])
    return path, "has 5000 bytes"


def damage_missing(folder, index):
    path = folder / index["shards"][1]["name"]
    path.unlink()
    return path, "is missing"


def damage_table(folder, index):
    path = folder / "00001.npz"
    path.write_bytes(path.read_bytes()[:100])
    return path, "missing or damaged"


def damage_index(folder, index):
    (folder / "index.json").write_text('{"diffuspeech_pack": 1, "shar')
    return folder / "index.json", "not the index of a pack"


def damage_version(folder, index):
    (folder / "index.json").write_text('{"diffuspeech_pack": 2}')
    return folder / "index.json", "format 2"


@pytest.mark.parametrize("damage", [damage_cut, damage_missing, damage_table, damage_index, damage_version])
def test_damaged_packs(manifest, tmp_path, damage):
    before = make(manifest, tmp_path)
    path, message = damage(tmp_path, before)
    with pytest.raises(ManifestError, match=message) as error:
        Shards(tmp_path)
    assert str(error.value).startswith(str(path))
    assert make(manifest, tmp_path)["written"] <= 1  # the suggested command works
    Shards(tmp_path).verify()


def test_a_changed_byte(manifest, tmp_path):
    make(manifest, tmp_path)
    shards = Shards(tmp_path)
    shard, start, size, *_ = shards.offsets[5].tolist()
    path = tmp_path / shards.shards[shard]["name"]
    data = bytearray(path.read_bytes())
    data[start + size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match=f"^{path}:{start}: not what was packed"):
        shards[5]
    with pytest.raises(ManifestError, match=f"^{path}: its sha256"):
        shards.verify()
    assert shards[4].id == "clip-4"
    with pytest.raises(ManifestError, match="not what was packed"):
        list(batches(shards, seconds=10.0, workers=1))
    skipping = Shards(tmp_path, on_bad="skip")
    assert sum(len(b.ids) for b in batches(skipping, seconds=10.0)) == N - 1 and skipping.skipped.count == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches(manifest, tmp_path, workers):
    make(manifest, tmp_path)
    shards, seen = Shards(tmp_path), {}
    for batch in batches(shards, seconds=6.0, seed=3, workers=workers):
        seen |= dict(zip(batch.ids, batch.lengths.tolist()))
    assert seen == {f"clip-{n}": 16_000 + n * 1000 for n in range(N)}
    assert [b.ids for b in batches(shards, seconds=6.0, seed=3)] == [
        b.ids for b in batches(manifest, seconds=6.0, seed=3)
    ]


def test_bad_sound(manifest, tmp_path):
    lines = [
        json.dumps({"audio_filepath": str(u.audio), "duration": u.duration, "text": u.text, "id": u.id})
        for u in manifest
    ]
    lines[3] = json.dumps({"audio_filepath": "no.wav", "duration": 1.0, "text": "x"})
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    with pytest.raises(ManifestError, match="corpus.jsonl:4: .*no such file"):
        make(Manifest(tmp_path / "corpus.jsonl"), tmp_path / "pack")
    index = make(Manifest(tmp_path / "corpus.jsonl", on_bad="skip"), tmp_path / "pack")
    assert (
        index["utterances"] == N - 1
        and index["skipped"] == 1
        and "corpus.jsonl:4" in index["first_skipped"][0]
    )


def test_refuses_tokens_of_silence(tmp_path):
    audio.save(tmp_path / "a.wav", torch.zeros(16_000))
    with pytest.raises(ManifestError, match="^hall: silent"):
        make([Utterance(tmp_path / "a.wav", 1.0, id="hall")], tmp_path / "pack", kind="tokens", encode=ids)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(kind="mp3"), "opus or tokens"),
        (dict(kind="tokens"), "tokens need encode"),
        (dict(encode=ids), "tokens need encode"),
        (dict(kbps=2), "6 to 256"),
        (dict(max_megabytes=0), "0.05 to 4000"),
        (dict(workers=0), "at least 1"),
        (dict(licence=" "), "the licence is empty"),
    ],
)
def test_bad_settings(manifest, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(manifest, tmp_path / "pack", **settings)
    assert not (tmp_path / "pack").exists()


# WebDataset


def sound(kind="WAV", rate=16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, audio.load_clip()[:8000].numpy(), rate, format=kind)
    return file.getvalue()


def tar(path, files: dict, mode="w"):
    with tarfile.open(path, mode) as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_external_formats(tmp_path, kind, mode):
    files = {
        f"deep/a.b/{n}.{ending}": data
        for n in range(3)
        for ending, data in (
            (kind, sound(kind.upper())),
            ("json", json.dumps({"text": f"t{n}", "speaker": n, "snr": 3}).encode()),
        )
    }
    found = list(WebDataset(tar(tmp_path / "a.tar", files, mode)))
    assert [(u.id, u.text, u.speaker, u.extra) for u in found] == [
        (f"deep/a.b/{n}", f"t{n}", str(n), {"snr": 3}) for n in range(3)
    ]
    assert all(
        abs(len(wave) - 8000) < 2400 and u.duration == len(wave) / 16_000
        for u in found
        for wave in [load_audio(u)]
    )


def test_txt_braces_and_ranks(tmp_path):
    for n in range(6):
        tar(
            tmp_path / f"c-{n:03d}.tar",
            {f"{n}-{m}.{e}": d for m in range(2) for e, d in (("flac", sound("FLAC")), ("txt", b"hello\n"))},
        )
    urls = f"{tmp_path}/c-{{000..005}}.tar"
    assert [u.id for u in WebDataset(urls)] == [f"{n}-{m}" for n in range(6) for m in range(2)]
    shares = [
        [u.id for u in DataLoader(WebDataset(urls, rank, 2), batch_size=None, num_workers=2)]
        for rank in range(2)
    ]
    assert sorted(sum(shares, [])) == [f"{n}-{m}" for n in range(6) for m in range(2)] and all(shares)


def test_from_a_web_server(tmp_path):
    tar(tmp_path / "a.tar", {"1.wav": sound(), "1.txt": b"one"})

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert [u.text for u in WebDataset(f"{address}/a.tar")] == ["one"]
        with pytest.raises(ManifestError, match="no.tar: .*404"):
            list(WebDataset(f"{address}/no.tar"))
    finally:
        server.shutdown()
        server.server_close()


WRONG = {
    "no sound": ({"a.txt": b"x"}, "a.tar:a: no audio among txt"),
    "bad sound": ({"a.wav": b"nothing", "a.txt": b"x"}, "a.tar:a: not an audio file"),
    "cut sound": ({"a.wav": sound()[:5000], "a.txt": b"x"}, "a.tar:a: breaks off"),
    "empty sound": ({"a.wav": b"", "a.txt": b"x"}, "a.tar:a: the file is empty"),
    "bad json": ({"a.wav": sound(), "a.json": b"{"}, "a.tar:a: its text cannot be read"),
    "json list": ({"a.wav": sound(), "a.json": b"[1]"}, "a.tar:a: its text cannot be read"),
    "bad txt": ({"a.wav": sound(), "a.txt": b"\xff\xfe"}, "a.tar:a: its text cannot be read"),
    "no text": ({"a.wav": sound()}, 'a.tar:a: "text" is empty'),
    "bad speaker": ({"a.wav": sound(), "a.json": b'{"text": "x", "speaker": [1]}'}, 'a.tar:a: "speaker" is'),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_samples(tmp_path, name):
    files, message = WRONG[name]
    path = tar(tmp_path / "a.tar", {**files, "b.wav": sound(), "b.txt": b"good"})
    with pytest.raises(ManifestError, match=message):
        list(WebDataset(path))
    skipping = WebDataset(path, on_bad="skip")
    assert [u.id for u in skipping] == ["b"] and skipping.skipped.count == 1


def test_bad_tars(tmp_path):
    whole = tar(
        tmp_path / "a.tar", {f"{n}.{e}": d for n in range(3) for e, d in (("wav", sound()), ("txt", b"x"))}
    ).read_bytes()
    zipped = tar(tmp_path / "z.tar", {"1.wav": sound(), "1.txt": b"x"}, "w:gz").read_bytes()
    for data in (
        whole[:20_000],
        whole[: len(whole) // 2 + 100],
        b"not a tar at all",
        b"",
        zipped[: len(zipped) // 2],
    ):
        (tmp_path / "b.tar").write_bytes(data)
        with pytest.raises(
            ManifestError, match="b.tar: breaks off, or is not a tar|b.tar:.*(no audio|breaks off)"
        ):
            list(WebDataset(tmp_path / "b.tar"))
    with pytest.raises(ManifestError, match="no.tar: no such file"):
        list(WebDataset(tmp_path / "no.tar"))
    with pytest.raises(ValueError, match="rank"):
        WebDataset([], rank=1)


# Lhotse


def line(**changes):
    recording = {
        "id": "r",
        "sources": [{"type": "file", "channels": [0], "source": "a.wav"}],
        "sampling_rate": 16000,
        "num_samples": 8000,
        "duration": 0.5,
    }
    known = {
        "id": "c",
        "start": 0.1,
        "duration": 0.3,
        "channel": 0,
        "type": "MonoCut",
        "recording": recording | changes.pop("recording", {}),
        "supervisions": [
            {"id": "s2", "start": 0.2, "duration": 0.1, "text": "there", "speaker": "x", "language": "en"},
            {"id": "s1", "start": 0.0, "duration": 0.1, "text": "hello", "speaker": "x", "language": "en"},
        ],
    }
    return json.dumps(known | changes)


@pytest.mark.parametrize("zipped", [False, True])
def test_lhotse(tmp_path, zipped):
    (tmp_path / "a.wav").write_bytes(sound())
    path = tmp_path / ("cuts.jsonl.gz" if zipped else "cuts.jsonl")
    with (gzip.open if zipped else open)(path, "wt") as file:
        file.write(line() + "\n\n" + line(id="d", start=0.0) + "\n")
    one, two = read_lhotse(path)
    assert (one.id, one.text, one.speaker, one.lang, one.offset, one.duration) == (
        "c",
        "hello there",
        "x",
        "en",
        0.1,
        0.3,
    )
    assert torch.equal(load_audio(one), audio.load(tmp_path / "a.wav")[1600:6400])
    assert write_manifest(tmp_path / "m.jsonl", read_lhotse(path)) == 2 and [
        u.id for u in Manifest(tmp_path / "m.jsonl")
    ] == ["c", "d"]


CUTS = {
    "torn": (line()[:80], "not JSON"),
    "a list": ("[1]", "not a cut"),
    "a number": ("7", "not a cut"),
    "mixed": (line(type="MixedCut", tracks=[]), "a MixedCut"),
    "padding": (line(type="PaddingCut"), "a PaddingCut"),
    "several channels": (line(type="MultiCut"), "a MultiCut"),
    "no recording": ('{"id": "a", "start": 0, "duration": 1}', "not a cut with a recording"),
    "null recording": ('{"id": "a", "start": 0, "duration": 1, "recording": null}', "not a cut"),
    "a command": (
        line(recording={"sources": [{"type": "command", "channels": [0], "source": "rm x"}]}),
        "type command",
    ),
    "no sources": (line(recording={"sources": []}), "0 sources"),
    "two sources": (
        line(recording={"sources": [{"type": "file", "channels": [0], "source": "a"}] * 2}),
        "2 sources",
    ),
    "stereo": (
        line(recording={"sources": [{"type": "file", "channels": [0, 1], "source": "a.wav"}]}),
        "one channel of a recording that has 2",
    ),
    "faster": (line(recording={"transforms": [{"name": "Speed"}]}), "transformed"),
    "no duration": (line(duration=None), '"duration" is missing'),
    "negative": (line(duration=-1), '"duration" is -1'),
    "no start": (line(start=None), "not a cut"),
    "no text": (line(supervisions=[]), '"text" is empty'),
    "text is a list": (line(supervisions=[{"text": [1]}]), "not a cut"),
}


@pytest.mark.parametrize("name", CUTS)
def test_bad_cuts(tmp_path, name):
    text, message = CUTS[name]
    (tmp_path / "cuts.jsonl").write_text(line() + "\n" + text + "\n")
    with pytest.raises(ManifestError, match=f"cuts.jsonl:2: .*{message}"):
        list(read_lhotse(tmp_path / "cuts.jsonl"))


def test_bad_cut_files(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((line() + "\n").encode() * 50)[:100])
    (tmp_path / "b.jsonl.gz").write_text(line())
    for path, message in (
        (tmp_path / "a.jsonl.gz", "breaks off"),
        (tmp_path / "b.jsonl.gz", "is not gzip"),
        (tmp_path / "no.jsonl", "no such file"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(ManifestError, match=message):
            list(read_lhotse(path))
