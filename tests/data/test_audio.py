"Damaged sound files, loudness, long files in bounded memory, and the page of the player in a browser"

import io
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from browser import CHROMIUM
from PIL import Image
from playwright.sync_api import sync_playwright

from diffuspeech.data import audio


@pytest.fixture(scope="module")
def wave():
    return audio.load_clip()


def sound(wave, kind, subtype=None, rate=16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.asarray(wave), rate, format=kind, subtype=subtype)
    return file.getvalue()


def part(kind, share, subtype=None):
    return lambda wave: (data := sound(wave, kind, subtype))[: int(len(data) * share)]


def with_value(value, rate=16_000, at=1.0):
    def make(wave):
        wave = wave.clone()
        wave[int(at * rate)] = value
        return sound(wave, "WAV", "FLOAT", rate)

    return make


BAD = {
    "nothing in it": ("a.wav", lambda w: b"", "empty, 0 bytes"),
    "an empty ogg": ("a.ogg", lambda w: b"", "empty, 0 bytes"),
    "text": ("a.wav", lambda w: b"this is not audio", "not an audio file.*ffmpeg -i"),
    "a web page": (
        "a.mp3",
        lambda w: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "not an audio file",
    ),
    "zeros": ("a.wav", lambda w: bytes(5000), "not an audio file"),
    "raw samples": ("a.raw", lambda w: (w.numpy() * 32767).astype("<i2").tobytes(), "not an audio file"),
    "RIFF and nothing more": ("a.wav", lambda w: b"RIFF", "not an audio file"),
    "a header cut off": ("a.wav", lambda w: sound(w, "WAV")[:30], "not an audio file"),
    "wav without samples": ("a.wav", lambda w: sound(w[:0], "WAV"), "holds no audio, 0 samples"),
    "flac without samples": (
        "a.flac",
        lambda w: sound(w[:0], "FLAC"),
        "empty, 0 bytes",
    ),  # libsndfile writes no bytes
    "wav cut to a half": ("a.wav", part("WAV", 0.5), "breaks off; its header promises 180940 bytes"),
    "wav short of one percent": ("a.wav", part("WAV", 0.99), "breaks off; its header promises"),
    "wav cut to its header": ("a.wav", lambda w: sound(w, "WAV")[:46], "breaks off"),
    "aiff cut to a half": ("a.aiff", part("AIFF", 0.5), "breaks off; its header promises"),
    "flac cut to a half": ("a.flac", part("FLAC", 0.5), "breaks off or is damaged"),
    "flac short of one percent": ("a.flac", part("FLAC", 0.99), "breaks off or is damaged"),
    "mp3 cut to a half": ("a.mp3", part("MP3", 0.5), r"breaks off after .* of 5.65 s"),
    "ogg cut to a half": ("a.ogg", part("OGG", 0.5), "breaks off inside its last page"),
    "ogg short of one percent": ("a.ogg", part("OGG", 0.99), "breaks off inside its last page"),
    "opus cut to a half": ("a.opus", part("OGG", 0.5, "OPUS"), "breaks off inside its last page"),
    "four bytes of ogg": ("a.ogg", lambda w: b"OggS", "breaks off inside its last page"),
    "ogg and then something else": (
        "a.ogg",
        lambda w: sound(w, "OGG")[:4000] + bytes(4000),
        "breaks off|not an audio file|holds no audio",
    ),
    "flac with a hole": (
        "a.flac",
        lambda w: (d := sound(w, "FLAC"))[:40_000] + bytes(20_000) + d[60_000:],
        "breaks off or is damaged|holds no audio",
    ),
    "a NaN": (
        "a.wav",
        with_value(float("nan")),
        r"the sample at 1.000 s is nan, not finite; write the file again",
    ),
    "a NaN at the end": ("a.wav", with_value(float("nan"), at=5.65), r"the sample at 5.650 s is nan"),
    "an infinity": ("a.wav", with_value(float("inf")), r"the sample at 1.000 s is inf"),
    "minus infinity at 8 kHz": ("a.wav", with_value(-float("inf"), 8_000), r"the sample at 1.000 s is -inf"),
    "a rate of 1 Hz": (
        "a.wav",
        lambda w: sound(w, "WAV", rate=1),
        "1 samples a second, not between 4000 and 768000",
    ),
    "a rate of 3999 Hz": ("a.wav", lambda w: sound(w, "WAV", rate=3_999), "3999 samples a second"),
    "a rate of 2 GHz": ("a.wav", lambda w: sound(w, "WAV", rate=2**31 - 1), "2147483647 samples a second"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("method", ["load", "blocks", "memory"])
def test_bad_files(tmp_path, wave, name, method):
    file, make, message = BAD[name]
    path = tmp_path / file
    path.write_bytes(make(wave))
    with pytest.raises(ValueError, match=message) as error:
        if method == "load":
            audio.load(path)
        elif method == "blocks":
            for _ in audio.load_chunks(path, seconds=0.5):
                pass
        else:
            audio.load(io.BytesIO(path.read_bytes()), name=str(path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_paths_that_are_not_files(tmp_path):
    for path, message in (
        (tmp_path, "a folder"),
        (tmp_path / "no.wav", "no such file"),
        (tmp_path / "no" / "where.wav", "no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            audio.load(path)
    os.mkfifo(tmp_path / "pipe.wav")  # opening it would block forever
    with pytest.raises(ValueError, match="not a regular file"):
        audio.load(tmp_path / "pipe.wav")


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(offset=9.0), "lasts 5.65 s, but offset=9"),
        (dict(offset=-1.0), "offset at least 0"),
        (dict(seconds=0.0), "above 0"),
        (dict(seconds=-2.0), "above 0"),
        (dict(seconds=float("nan")), "above 0"),
        (dict(offset=float("inf")), "offset at least 0"),
    ],
)
def test_bad_offsets_and_lengths(tmp_path, wave, options, message):
    audio.save(tmp_path / "a.wav", wave)
    with pytest.raises(ValueError, match=message):
        audio.load(tmp_path / "a.wav", **options)


@pytest.mark.parametrize("kind, db", [("wav", -80), ("flac", -80), ("ogg", -20), ("opus", -20), ("mp3", -20)])
def test_round_trip(tmp_path, wave, kind, db):
    audio.save(tmp_path / f"a.{kind}", wave)
    again = audio.load(tmp_path / f"a.{kind}")
    assert len(wave) <= len(again) < len(wave) + 2400
    error = (again[: len(wave)] - wave).pow(2).mean().sqrt() / wave.std()
    assert 20 * torch.log10(error + 1e-9) < db
    middle = audio.load(tmp_path / f"a.{kind}", seconds=2.0, offset=1.5)
    assert len(middle) == 32_000
    assert (middle - again[24_000:56_000]).abs().max() < (
        0.05 if kind in ("mp3", "opus") else 1e-4
    )  # these two decoders restart at a seek
    assert os.listdir(tmp_path) == [f"a.{kind}"]


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 22_050, 44_100, 44_099, 48_000, 96_000])
def test_chunks_equal_the_whole_file(tmp_path, rate):
    wave = torch.randn(int(2.3 * rate), generator=torch.Generator().manual_seed(rate)) * 0.1
    soundfile.write(tmp_path / "a.wav", wave.numpy(), rate, subtype="FLOAT")
    whole = audio.resample(wave, rate)
    for seconds in (0.11, 0.73, 2.3, 60.0):
        pieces = list(audio.load_chunks(tmp_path / "a.wav", seconds))
        assert torch.cat(pieces).shape == whole.shape
        assert (torch.cat(pieces) - whole).abs().max() < 1e-5
        assert len({len(p) for p in pieces[:-1]}) <= 1 and 0 < len(pieces[-1]) <= len(pieces[0])


@pytest.mark.parametrize("samples", [1, 2, 15, 16, 17, 1600, 1601])
def test_short_files(tmp_path, samples):
    for rate in (8_000, 16_000, 48_000):
        wave = torch.linspace(-0.5, 0.5, samples)
        soundfile.write(tmp_path / "a.wav", wave.numpy(), rate, subtype="FLOAT")
        assert (audio.load(tmp_path / "a.wav") - audio.resample(wave, rate)).abs().max() < 1e-6


def test_channels_are_averaged(tmp_path, wave):
    gains = torch.linspace(0.1, 0.8, 8)
    soundfile.write(tmp_path / "a.wav", (wave[:, None] * gains).numpy(), 16_000, subtype="FLOAT")
    assert torch.allclose(audio.load(tmp_path / "a.wav"), wave * gains.mean(), atol=1e-6)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF])
def test_a_wav_written_to_a_pipe(tmp_path, wave, size):
    data = bytearray(sound(wave, "WAV"))
    at = data.find(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    assert len(audio.load(tmp_path / "a.wav")) == len(wave)


@pytest.mark.parametrize(
    "wave, message",
    [
        (torch.zeros(0), "empty"),
        (torch.ones(1599), "lasts 0.100 s; speech takes at least 0.1 s"),
        (torch.zeros(16_000), "silent"),
        (torch.full((16_000,), 9e-4), "silent"),
        (torch.full((16_000,), float("nan")), "not finite"),
        (torch.tensor([float("inf")] * 1600), "not finite"),
        (torch.ones(1, 16_000), "one dimension|lasts"),
    ],
)
def test_refuses_what_cannot_be_speech(wave, message):
    with pytest.raises(ValueError, match=f"^hall.wav: .*({message})"):
        audio.check_speech(wave, "hall.wav")


def test_silence_loads(tmp_path):
    audio.save(tmp_path / "a.wav", torch.zeros(16_000))
    assert audio.load(tmp_path / "a.wav").abs().max() == 0
    assert audio.loudness(torch.zeros(16_000)) == -float("inf")
    with pytest.raises(ValueError, match="loud enough"):
        audio.normalize_loudness(torch.zeros(16_000))


@pytest.mark.parametrize(
    "path, wave, message",
    [
        ("a.m4a", torch.ones(10), "the extension gives the format"),
        ("a", torch.ones(10), "the extension"),
        ("a.wav", torch.ones(2, 10), "one dimension"),
        ("a.wav", torch.zeros(0), "at least one sample"),
        ("a.wav", torch.tensor([0.0, float("nan")]), "not finite"),
    ],
)
def test_refuses_to_save(tmp_path, path, wave, message):
    (tmp_path / "a.wav").write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        audio.save(tmp_path / path, wave)
    assert (tmp_path / "a.wav").read_bytes() == b"old" and os.listdir(tmp_path) == ["a.wav"]


def test_loudness_follows_the_standard(wave):
    t = torch.arange(20 * 16_000) / 16_000
    sine = torch.sin(2 * torch.pi * 1000 * t)
    level = {db: audio.loudness(sine * 10 ** (db / 20)) for db in (0, -20, -40, -66)}
    assert all(abs(level[db] - (db - 3.01)) < 0.03 for db in level), level
    # EBU Tech 3341, case 3: 10 s quiet, 60 s loud, 10 s quiet; the gate excludes the quiet parts
    a, b = sine[:160_000] * 10 ** (-36 / 20), sine.repeat(3) * 10 ** (-23 / 20)
    assert abs(audio.loudness(torch.cat([a, b, a])) - (-26.01)) < 0.1
    # chunks of 60 s make no difference
    torchaudio = audio.import_torchaudio()
    at48 = audio.resample(wave[8_000:16_000], 16_000, 48_000)  # its filter is a Python loop: half a second
    assert (
        abs(audio.loudness(wave[8_000:16_000]) - torchaudio.functional.loudness(at48[None], 48_000).item())
        < 0.15
    )
    noise = torch.randn(130 * 16_000, generator=torch.Generator().manual_seed(0)) * 0.1
    assert abs(audio.loudness(noise) - audio.loudness(noise[: 59 * 16_000])) < 0.05


def test_normalize_loudness(wave):
    assert abs(audio.loudness(audio.normalize_loudness(wave, -30.0)) + 30) < 0.01
    assert audio.normalize_loudness(wave, 10.0).abs().max() == pytest.approx(10 ** (-1 / 20))


LONG = """
import re, sys
from diffuspeech.data import audio
audio.resample(audio.load_clip(), 8_000)  # loads what is imported once
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000
before, samples = peak(), 0
for piece in audio.load_chunks(sys.argv[1], seconds=10.0):
    samples += len(piece)
print(samples, peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind, minutes", [("flac", 180), ("ogg", 10)])
def test_long_files_in_bounded_memory(tmp_path, wave, kind, minutes):
    minute = audio.resample(wave, 16_000, 8_000).repeat(12)[: 60 * 8_000]
    with soundfile.SoundFile(tmp_path / f"a.{kind}", "w", 8_000, 1) as file:
        for _ in range(minutes):
            file.write(minute.numpy())
    done = subprocess.run(
        [sys.executable, "-c", LONG, tmp_path / f"a.{kind}"], capture_output=True, text=True, check=True
    )
    samples, megabytes = done.stdout.split()
    print(f"{kind}: {minutes} min, {float(megabytes):.0f} MB more")
    assert int(samples) == minutes * 60 * 16_000
    assert float(megabytes) < 36  # the wave of ten minutes has 38 MB, of three hours 691


def test_torchaudio_imported_while_a_model_is_built():
    "Its constants are not on the meta device, where models are built first"
    program = """
import torch
from diffuspeech.data.audio import import_torchaudio
with torch.device("meta"):
    import_torchaudio()
    assert torch.empty(1).is_meta
from torchaudio.compliance import kaldi
assert kaldi.EPSILON.device.type == "cpu"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.needs("chromium")
def test_player_page(tmp_path, wave):
    body = (
        audio.view_wave(wave, 'a <b>"clip"</b> </script>')._repr_html_()
        + audio.view_waves({"one": wave[:24_000], "two": wave[:32_000]})._repr_html_()
    )
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><meta charset=utf-8>{body}")
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"],
        )
        tab, outside, errors = chrome.new_page(), [], []
        tab.on(
            "request",
            lambda r: None if r.url.startswith(("data:", "blob:", "file:")) else outside.append(r.url),
        )
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.goto((tmp_path / "page.html").as_uri())
        drawn = """() => {
            const all = [];
            const walk = n => {
              if (n.tagName == 'CANVAS') all.push(n);
              for (const c of [...(n.shadowRoot?.children ?? []), ...(n.children ?? [])]) walk(c);
            };
            walk(document.body);
            const pixels = c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
            return all.filter(c => c.width && new Set(pixels(c)).size > 2).length }"""
        one, two = tab.frames[1:]
        for frame, rows in ((one, 1), (two, 2)):
            frame.wait_for_function(
                f"({drawn})() >= {2 * rows}", timeout=10_000
            )  # each a wave and a spectrogram
        assert 'a <b>"clip"</b> </script>' in one.inner_text(".head")
        dark = "document.documentElement.style.cssText = 'color-scheme: dark; background: rgb(22, 24, 29)'"
        tab.evaluate(dark)
        corner = Image.open(io.BytesIO(tab.locator("iframe").first.screenshot())).convert("RGB")
        assert corner.getpixel((corner.width - 4, 4)) == (22, 24, 29), "no white slab in a dark page"
        two.locator("button").nth(0).click()
        two.wait_for_function("players[0].getCurrentTime() > 0.2", timeout=10_000)
        two.locator("button").nth(1).click()
        two.wait_for_function("players[1].isPlaying() && !players[0].isPlaying()", timeout=10_000)
        chrome.close()
    assert not outside and not errors, (outside, errors)


def test_without_wavesurf(wave, monkeypatch):
    monkeypatch.setitem(sys.modules, "wavesurf", None)
    page = audio.view_wave(wave[:16_000], "a clip")._repr_html_()
    assert "<audio" in page and "<img" in page and "iframe" not in page
