"Jobs on many files: errors are listed and counted, the rest is processed, and no partial files are left"

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from small import prepare_clips

from diffuspeech.base.workers import run_jobs
from diffuspeech.cli import main
from diffuspeech.data import audio, builtin, texts
from diffuspeech.data.batches import check_waves
from diffuspeech.data.manifest import Manifest
from diffuspeech.tasks import tokenizer
from diffuspeech.tokenizers.public import tiny_tokenizer
from diffuspeech.tokenizers.s3 import Tokenizer, TokenizerConfig
from diffuspeech.voice import prepared
from diffuspeech.voice.codec import SpeechCodec, check_ids
from diffuspeech.voice.flow import Flow, FlowConfig
from diffuspeech.voice.jobs import collect_utterances, load_codec


def run(*words) -> int:
    "The exit status of a command"
    return main(list(map(str, words)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A codec with random weights, in folders as the real one"
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("codec")
    Tokenizer(
        TokenizerConfig(hidden=32, encoder_layers=1, ctc_layers=1, heads=2, ffn_dim=32, channels=8)
    ).save_pretrained(folder / "speech-tokens")
    flow = Flow(FlowConfig(dim=32, layers=1, heads=2, ffn_dim=32))
    torch.nn.init.normal_(flow.out_proj.weight, std=0.1)
    torch.nn.init.normal_(flow.modulation.weight, std=0.1)
    world = SpeechCodec(Tokenizer.from_pretrained(folder / "speech-tokens"), flow).vocoder.analyze(
        audio.load_clip()
    )
    flow.feature_stats.copy_(torch.stack([world.mean(0), world.std(0).clamp_min(1e-3)]))
    flow.save_pretrained(folder / "flow")
    return folder


@pytest.fixture()
def good(tmp_path):
    audio.save(tmp_path / "good.wav", audio.load_clip()[:32000])
    return tmp_path / "good.wav"


def write(path, data):
    Path(path).write_bytes(data)


def truncated(path):
    audio.save(path, audio.load_clip())
    Path(path).write_bytes(Path(path).read_bytes()[:5000])


BAD = {
    "empty.wav": (lambda p: write(p, b""), "not an audio file|empty"),
    "text.wav": (lambda p: write(p, b"this is no sound"), "not an audio file"),
    "no_samples.wav": (lambda p: soundfile.write(p, np.zeros(0), 16000), "no audio|empty|no sample"),
    "silent.wav": (lambda p: soundfile.write(p, np.zeros(16000), 16000), "silent"),
    "whisper.wav": (lambda p: soundfile.write(p, 1e-5 * np.ones(16000), 16000), "silent"),
    "short.wav": (lambda p: soundfile.write(p, 0.1 * np.ones(200), 16000), "short|0.1 s"),
    "nan.wav": (
        lambda p: soundfile.write(p, np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT"),
        "finite",
    ),
    "inf.wav": (
        lambda p: soundfile.write(p, np.full(16000, np.inf, np.float32), 16000, subtype="FLOAT"),
        "finite",
    ),
    "cut.wav": (truncated, "breaks off|truncated|cut|promises"),
    "noise.mp3": (lambda p: write(p, os.urandom(2000)), "not an audio file"),
    "folder.wav": (lambda p: Path(p).mkdir(), "no sound file below it"),
    "gone.wav": (lambda p: None, "no such file"),
    "lines.jsonl": (lambda p: write(p, b'{"audio_filepath": "good.wav"}\n'), "lines.jsonl:1"),
    "broken.jsonl": (lambda p: write(p, b'{"audio_filepath": \n'), "broken.jsonl:1"),
    "binary.jsonl": (lambda p: write(p, b"\xff\xfe\x00"), "binary.jsonl"),
    "none.jsonl": (lambda p: write(p, b""), "none.jsonl"),
    "points_nowhere.jsonl": (
        lambda p: write(p, b'{"audio_filepath": "nowhere.wav", "duration": 1.0}\n'),
        "points_nowhere.jsonl:1.*nowhere.wav",
    ),
    "too_long.jsonl": (
        lambda p: write(p, b'{"audio_filepath": "good.wav", "duration": 9.0}\n'),
        "too_long.jsonl:1",
    ),
    "negative.jsonl": (
        lambda p: write(p, b'{"audio_filepath": "good.wav", "duration": -1}\n'),
        "negative.jsonl:1",
    ),
    "list.jsonl": (lambda p: write(p, b"[1, 2]\n"), "list.jsonl:1"),
}


@pytest.mark.parametrize("name", BAD)
def test_encode_skips_bad_inputs(name, good, model, tmp_path, capsys):
    make, message = BAD[name]
    make(tmp_path / name)
    status = run("encode", tmp_path / name, good, "-o", tmp_path / "out.jsonl", "--codec", model)
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("skipped: ")]
    assert status == 1 and "1 encoded" in err and "1 skipped" in err and len(lines) == 1
    import re

    assert name in lines[0] and re.search(message, lines[0]), lines
    (line,) = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert (
        line["id"] == "good"
        and len(line["ids"]) == 50
        and line["tokenizer"] == Tokenizer.from_pretrained(model / "speech-tokens").version
    )


def test_channels_are_averaged(model, tmp_path):
    wave = audio.load_clip()[:16000].numpy()
    soundfile.write(tmp_path / "eight.wav", np.stack([wave] * 8, 1), 16000)
    audio.save(tmp_path / "one.wav", audio.load_clip()[:16000])
    assert (
        run(
            "encode",
            tmp_path / "eight.wav",
            tmp_path / "one.wav",
            "-o",
            tmp_path / "t.jsonl",
            "--codec",
            model,
        )
        == 0
    )
    eight, one = [json.loads(x)["ids"] for x in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert eight == one


def test_long_audio_is_encoded_in_chunks(model, tmp_path):
    "Chunks give the ids of the whole, except for a few at the joints"
    tokenizer = Tokenizer.from_pretrained(model / "speech-tokens")
    wave = audio.load_clip().repeat(25)
    soundfile.write(tmp_path / "long.flac", wave.numpy(), 16000)
    from diffuspeech.voice.jobs import encode_utterance

    (u,) = collect_utterances([tmp_path / "long.flac"]).utterances
    assert u.duration > 120
    ids, whole = encode_utterance(tokenizer, u), tokenizer.encode(wave[None])[0][0]
    assert len(ids) == len(whole) and (ids == whole).float().mean() > 0.97


LONG = """
import re, sys, torch
from diffuspeech.data import audio
from diffuspeech.voice.jobs import encode_utterance, collect_utterances
class Stub:
    frame_rate = 25.0
    def encode(self, waves):
        return torch.zeros(1, -(-waves.shape[1] // 640), dtype=torch.int64), None
audio.resample(audio.load_clip(), 8_000)  # loads what is imported once
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1000
before = peak()
ids = encode_utterance(Stub(), collect_utterances([sys.argv[1]]).utterances[0])
print(len(ids), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_three_hours_in_bounded_memory(tmp_path):
    minute = audio.resample(audio.load_clip(), 16_000, 8_000).repeat(12)[: 60 * 8_000]
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 8_000, 1) as file:
        for _ in range(180):
            file.write(minute.numpy())
    done = subprocess.run(
        [sys.executable, "-c", LONG, tmp_path / "long.flac"], capture_output=True, text=True, check=True
    )
    tokens, megabytes = map(float, done.stdout.split())
    assert tokens == 180 * 60 * 25 and megabytes < 100, f"{megabytes:.0f} MB; the wave has 691"


def test_round_trip(model, good, tmp_path):
    assert run("encode", good, "-o", tmp_path / "t.jsonl", "--codec", model) == 0
    for k, extra in enumerate(([], ["--reference", str(good)])):
        assert (
            run(
                "decode",
                tmp_path / "t.jsonl",
                "-o",
                tmp_path / f"out{k}",
                "--codec",
                model,
                "--flow-steps",
                "2",
                *extra,
            )
            == 0
        )
    a, b = [audio.load(tmp_path / f"out{k}" / "good.wav") for k in range(2)]
    assert len(a) == len(b) == 32000 and not torch.equal(a, b)


def test_a_truncated_long_file(model, good, tmp_path, capsys):
    audio.save(tmp_path / "long.wav", audio.load_clip().repeat(20))
    whole = (tmp_path / "long.wav").read_bytes()
    (tmp_path / "long.wav").write_bytes(whole[: len(whole) * 9 // 10])
    status = run("encode", tmp_path / "long.wav", good, "-o", tmp_path / "t.jsonl", "--codec", model)
    assert status != 0
    err = capsys.readouterr().err
    assert "long.wav: breaks off" in err and "1 encoded" in err and "1 skipped" in err


def test_equal_names_are_an_error(model, good, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    audio.save(tmp_path / "other" / "good.wav", audio.load_clip()[16000:])
    status = run(
        "encode", good, tmp_path / "other" / "good.wav", "-o", tmp_path / "t.jsonl", "--codec", model
    )
    assert status != 0
    err = capsys.readouterr().err
    assert "other/good.wav: has the same name, good, as" in err and "1 encoded" in err
    assert [u.id for u in collect_utterances([tmp_path]).utterances] == ["good", "other/good"], (
        "names relative to a common folder differ"
    )


def test_pack_skips_bad_clips(model, good, tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text(
        '{"audio_filepath": "good.wav", "duration": 2.0, "text": "hello"}\n{"audio_filepath": \n'
    )
    (tmp_path / "LICENCE").write_text("ours")
    for k, extra in enumerate(([], ["--codec", str(model)])):
        status = run(
            "corpus",
            "pack",
            tmp_path / "m.jsonl",
            "-o",
            tmp_path / f"pack{k}",
            "--license",
            tmp_path / "LICENCE",
            "--workers",
            "1",
            *extra,
        )
        err = capsys.readouterr().err
        assert status == 1 and "m.jsonl:2" in err and "1 skipped" in err
    index = json.loads((tmp_path / "pack1" / "index.json").read_text())
    assert (
        index["kind"] == "tokens"
        and index["tokenizer"] == load_codec(model).version
        and index["utterances"] == 1
    )


def test_round_trip_of_a_public_codec(good, tmp_path, capsys):
    tiny_tokenizer("dac").save_pretrained(tmp_path / "dac")
    name = f"dac:{tmp_path / 'dac'}"
    assert run("encode", good, "-o", tmp_path / "t.jsonl", "--codec", name) == 0
    line = json.loads((tmp_path / "t.jsonl").read_text())
    assert line["tokenizer"] == load_codec(name).version and len(line["ids"][0]) == 3, "three codebooks"
    assert run("decode", tmp_path / "t.jsonl", "-o", tmp_path / "out", "--codec", name) == 0
    assert abs(len(audio.load(tmp_path / "out" / "good.wav")) - 32000) <= load_codec(name).hop
    (tmp_path / "flat.jsonl").write_text(json.dumps(line | {"ids": [1, 2]}))
    status = run("decode", tmp_path / "flat.jsonl", "-o", tmp_path / "out", "--codec", name)
    assert status != 0
    assert "of 3 for each frame" in capsys.readouterr().err


def test_refuses_a_flow_of_other_ids(model, tmp_path):
    shutil.copytree(model, tmp_path / "codec")
    Flow.from_pretrained(model / "flow").save_pretrained(
        tmp_path / "codec" / "flow", tokenizer="s3-small-00000000"
    )
    with pytest.raises(ValueError, match="was trained on ids of s3-small-00000000"):
        SpeechCodec.from_pretrained(tmp_path / "codec")


@pytest.mark.parametrize(
    "line, message",
    [
        (b"nonsense", "not a line of tokens"),
        (b"{}", "not a line of tokens"),
        (b'{"ids": "a"}', "not a line of tokens"),
        (b'{"ids": []}', "at least one"),
        (b'{"ids": [0.5]}', "integer"),
        (b'{"ids": [4096]}', "4096"),
        (b'{"ids": [-7]}', "-7"),
        (b'{"ids": [[1], [2]]}', "shape"),
        (b'{"ids": [1], "tokenizer": "s3-small-00000000"}', "encode again"),
        (b'{"ids": [1], "id": "../../evil"}', "leads out"),
        (b'{"ids": [-1, 3]}', "padding comes last"),
    ],
)
def test_decode_skips_bad_lines(line, message, model, tmp_path, capsys):
    (tmp_path / "t.jsonl").write_bytes(line + b'\n{"id": "fine", "ids": [1, 2, 3]}\n')
    status = run(
        "decode", tmp_path / "t.jsonl", "-o", tmp_path / "out", "--codec", model, "--flow-steps", "1"
    )
    err = capsys.readouterr().err
    assert status == 1 and "1 decoded" in err and "1 skipped" in err and "t.jsonl:1" in err and message in err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["fine.wav"]


@pytest.mark.parametrize(
    "waves, lengths, message",
    [
        (torch.zeros(16000), None, r"wave\[None\]"),
        (torch.zeros(1, 9, dtype=torch.int64), None, "not floats"),
        (torch.zeros(2, 9), torch.tensor([9]), "one for each of 2"),
        (torch.zeros(1, 9), torch.tensor([0]), "from 1 to 9"),
        (torch.zeros(1, 9), torch.tensor([10]), "from 1 to 9"),
        (torch.tensor([[1.0, torch.nan]]), None, "wave 0 holds"),
    ],
)
def test_refuses_invalid_waves(waves, lengths, message):
    with pytest.raises(ValueError, match=message):
        check_waves(waves, lengths)


@pytest.mark.parametrize(
    "ids, lengths, message",
    [
        (torch.zeros(3).long(), None, "shape"),
        (torch.zeros(1, 3), None, "not integers"),
        (torch.tensor([[1, 4096]]), None, "4096 at \\(0, 1\\)"),
        (torch.tensor([[1, -2]]), None, "-2 at"),
        (torch.tensor([[1, 2]]), torch.tensor([3]), "from 0 to 2"),
        (torch.tensor([[-1, 2]]), None, "padding comes last"),
    ],
)
def test_refuses_invalid_ids(ids, lengths, message):
    with pytest.raises(ValueError, match=message):
        check_ids(ids, lengths, 4096)


@pytest.mark.needs("asterisk", "bible", "fortunes", "shakespeare")
def test_splits_share_no_texts_and_no_test_voices():
    clips = builtin.plan_corpus("small")
    owner = {}
    for clip in clips:
        for gram in texts.ngrams(clip.text):
            if len(gram.split()) == 5:
                assert owner.setdefault(gram, clip.split) == clip.split, (
                    f"{gram!r} is in {owner[gram]} and {clip.split}"
                )
    by = {split.name: [c for c in clips if c.split == split.name] for split in builtin.PLANS["small"]}
    count = {split: sum(len(texts.words(c.text)) for c in members) for split, members in by.items()}
    assert count["test-clean"] > 30_000 and count["test-other"] > 10_000 and count["dev"] > 5_000
    assert all(len(texts.words(c.text)) >= 5 for split in by if split != "train" for c in by[split]), (
        "a shorter text may be part of a longer one of another split"
    )
    assert (
        sum(Path(c.source).stat().st_size / 8000 for c in by["test-clean"] if c.voice == builtin.HUMAN)
        >= 8 * 60
    )
    heard = {style for c in [*by["train"], *by["dev"]] for style in builtin.VOICES[c.voice].styles}
    assert not heard & {*builtin.TEST_VOICES, *builtin.FLITE_VOICES}, (
        "a test voice is heard in training, perhaps inside a blend"
    )
    assert not {style for c in by["train"] for style in builtin.VOICES[c.voice].styles} & {
        *builtin.DEV_VOICES
    }
    read_by_four = [
        t
        for t in {c.text for c in by["test-clean"]}
        if len({c.voice for c in by["test-clean"] if c.text == t}) == 4
    ]
    assert len(read_by_four) == 100


def test_an_id_may_end_as_it_likes(tmp_path):
    "Copies are known by a field: no utterance is dropped because of its name, with any share of copies"
    ids = ["a", "b~", "~", "c~~", "d~/e", "~f"]
    audio.save(tmp_path / "a.flac", audio.load_clip()[:16_000])
    line = dict(audio_filepath="a.flac", text="hello", duration=1.0)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line | dict(id=id)) + "\n" for id in ids))
    for share in (0, 0.5, 1):
        folder = prepared.prepare_corpus(
            tmp_path / "train.jsonl", speed_copies=share, vocoder="none", workers=1
        )
        corpus, plain = prepared.PreparedCorpus(folder), prepared.PreparedCorpus(folder, speed_copies=False)
        assert [row["id"] for row in plain.rows] == ids and all(row["copy_of"] is None for row in plain.rows)
        copies = [row["copy_of"] for row in corpus.rows if row["copy_of"] is not None]
        assert len(copies) == len(corpus) - len(ids) and set(copies) <= set(ids)
        assert len(copies) == {0: 0, 1: len(ids)}.get(share, len(copies))
        labels = tokenizer.label_phones(corpus, tmp_path / f"phones-{share}.safetensors")
        assert labels.keys() == {row["id"] for row in corpus.rows}


def test_a_copy_and_an_utterance_of_one_name_are_refused(tmp_path):
    audio.save(tmp_path / "a.flac", audio.load_clip()[:16_000])
    line = dict(audio_filepath="a.flac", text="hello", duration=1.0)
    lines = "".join(json.dumps(line | dict(id=id)) + "\n" for id in ("a", "a~"))
    (tmp_path / "train.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="a~ is the id of 2 clips"):
        prepared.prepare_corpus(tmp_path / "train.jsonl", speed_copies=1, vocoder="none", workers=1)
    prepared.prepare_corpus(tmp_path / "train.jsonl", speed_copies=0, vocoder="none", workers=1)


def test_training_refuses_test_clips(tmp_path):
    "A prepared corpus with a test clip is an error, since choices come from train and dev alone"
    from diffuspeech.voice.prepared import PreparedCorpus

    tmp_path.joinpath("index.json").write_text(
        json.dumps(
            {
                "manifest": "dev.jsonl",
                "vocoder": "none",
                "skipped": [],
                "shards": {
                    "shard-0000-00000000.safetensors": [
                        {
                            "id": "test-clean-allison-00001",
                            "seconds": 1.0,
                            "text": "x",
                            "speaker": "allison",
                            "split": "",
                            "copy_of": None,
                        }
                    ]
                },
            }
        )
    )
    with pytest.raises(ValueError, match="test-clean-allison-00001.*test"):
        PreparedCorpus(tmp_path)


def test_a_shard_of_another_analysis_is_made_again(tmp_path):
    from safetensors.torch import load_file, save_file
    from small import prepare_clips

    prepare_clips(tmp_path, dev=1)
    (shard,) = (tmp_path / "prepared/dev").glob("shard-0000-*.safetensors")
    was, tensors = shard.stat().st_mtime_ns, load_file(shard)
    prepare_clips(tmp_path, dev=1)
    assert shard.stat().st_mtime_ns == was
    save_file(
        {name: 0 * t for name, t in tensors.items()},
        shard,
        {"analysis": "World(envelope=40, tracker='dio')", "speed_copies": "0"},
    )
    prepare_clips(tmp_path, dev=1)
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(shard).items())
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged.*corpus prepare again"):
        prepared.PreparedCorpus(tmp_path / "prepared/dev").batch([0])
    prepare_clips(tmp_path, dev=1)
    assert all(torch.equal(t, tensors[name]) for name, t in load_file(shard).items())


def test_bundled_clips_are_test_clips_with_licenses():
    from diffuspeech.evaluate.clips import load_bundled_clips

    clips = load_bundled_clips()
    folder = clips[0].audio.parent.parent
    assert 50 <= len(clips) <= 70 and {u.split for u in clips} == {"test-clean", "test-other"}
    assert sum(u.extra["human"] for u in clips) >= 10
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 5e6
    licence = (folder / "LICENSE.md").read_text()
    assert all(words in licence for words in ("CC-BY-SA-3.0", "flite", "Apache-2.0", "Allison Smith"))
    for u in clips:
        assert abs(soundfile.info(u.audio).duration - u.duration) < 0.01


BUILD = """
from diffuspeech.data.builtin import build
if __name__ == "__main__":
    build({folder!r}, "tiny", workers=2)
"""


@pytest.mark.needs("bible", "flite")
def test_a_killed_build_resumes_without_partial_files(tmp_path):
    script, folder = tmp_path / "b.py", tmp_path / "corpus"
    script.write_text(BUILD.format(folder=str(folder)))
    for kill_at in (1, 12):
        p = subprocess.Popen(
            [sys.executable, script],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.time() + 60
        while len(list(folder.rglob("*.flac"))) < kill_at and time.time() < end and p.poll() is None:
            time.sleep(0.02)
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
        for file in folder.rglob("[!.]*.flac"):
            assert soundfile.info(file).frames > 8000  # whole, whenever it was
        assert not list(folder.glob("t*.jsonl")), "the manifests come last"
    clips = builtin.plan_corpus("tiny")
    listed = [
        builtin.path_of(folder, c) for c in clips if c.id in builtin.read_journal(folder, clips)
    ]  # the others were made, and not yet written down
    times, contents = (
        {f: f.stat().st_mtime_ns for f in listed},
        {f: f.read_bytes() for f in folder.rglob("[!.]*.flac")},
    )
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    assert listed and all(f.stat().st_mtime_ns == t for f, t in times.items()), (
        "what the journal lists is not made again"
    )
    assert all(f.read_bytes() == content for f, content in contents.items()), (
        "and the clips made again are the same"
    )
    n = {split.name: len(Manifest(folder / f"{split.name}.jsonl")) for split in builtin.PLANS["tiny"]}
    assert n == {split.name: sum(split.clips.values()) for split in builtin.PLANS["tiny"]}


def test_an_error_cancels_jobs_that_have_not_started(tmp_path):
    jobs = [(["false"],)] + [(["sh", "-c", f"sleep 0.3; touch {tmp_path}/{k}"],) for k in range(20)]
    with pytest.raises(subprocess.CalledProcessError):
        list(run_jobs(subprocess.check_call, jobs, 2))
    assert len(list(tmp_path.iterdir())) < 10


def test_workers_exit_with_a_killed_parent(tmp_path):
    script = tmp_path / "s.py"
    script.write_text(
        "import time\nfrom diffuspeech.base.workers import run_jobs\n"
        "if __name__ == '__main__':\n    list(run_jobs(time.sleep, [(60,), (60,)], 2))\n"
    )
    p = subprocess.Popen([sys.executable, script])
    children = lambda: [
        int(child) for child in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()
    ]
    end = time.time() + 60
    while len(children()) < 3 and time.time() < end:  # two workers and the resource tracker
        time.sleep(0.05)
    time.sleep(2)
    workers = children()
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    alive = lambda: [
        w for w in workers if Path(f"/proc/{w}").exists() and ") Z" not in Path(f"/proc/{w}/stat").read_text()
    ]
    while alive() and time.time() < end:
        time.sleep(0.05)
    assert len(workers) == 3 and not alive()


def test_a_preparation_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    prepare_clips(tmp_path, train=3)
    folder = tmp_path / "prepared" / "train"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real = prepared.run_jobs

    def full(fn, jobs, workers):
        yield from list(real(fn, jobs, 1))
        raise OSError("the disk is full")

    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:2]))
    monkeypatch.setattr(prepared, "run_jobs", full)
    for words in ({}, {"vocoder": "nosuch"}):
        with pytest.raises((OSError, ValueError)):
            prepared.prepare_corpus(tmp_path / "train.jsonl", speed_copies=0, **words)
        assert len(prepared.PreparedCorpus(folder)) == 3
        assert all((folder / name).read_bytes() == data for name, data in before.items())
    with pytest.raises(ValueError, match="no prepared corpus; make it"):
        prepared.PreparedCorpus(tmp_path / "prepared" / "dev")
    monkeypatch.undo()
    assert (
        len(prepared.PreparedCorpus(prepared.prepare_corpus(tmp_path / "train.jsonl", speed_copies=0))) == 2
    )
    assert not any(name.startswith("shard") and (folder / name).exists() for name in before), "removed last"


def test_prepare_refuses_bad_manifests(tmp_path):
    audio.save(tmp_path / "a.flac", audio.load_clip())
    for lines, message in (
        (
            [dict(audio_filepath="a.flac")],
            "train.jsonl: none of its clips can be used; .*train.jsonl:1: .*text",
        ),
        (
            [dict(audio_filepath="a.flac", text="hello", id="a")] * 2,
            "a is the id of 2 clips; give each its own",
        ),
        ([], "train.jsonl"),
    ):
        (tmp_path / "train.jsonl").write_text(
            "".join(json.dumps(line | dict(duration=1.0)) + "\n" for line in lines)
        )
        with pytest.raises(ValueError, match=message):
            prepared.prepare_corpus(tmp_path / "train.jsonl", speed_copies=0, vocoder="none", workers=1)
        assert not (tmp_path / "prepared/train/index.json").exists()


def test_train_and_dev_share_no_ids(tmp_path):
    prepare_clips(tmp_path, train=3, dev=2)
    train, dev = (prepared.PreparedCorpus(tmp_path / "prepared" / split) for split in ("train", "dev"))
    prepared.check_unique_ids(train, dev)
    dev.rows[1]["text"] = "something else"
    with pytest.raises(ValueError, match="c1 is one clip in train and another in dev"):
        prepared.check_unique_ids(train, dev)


def test_a_build_lists_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DIFFUSPEECH_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(RuntimeError) as caught:
        builtin.build(tmp_path / "corpus", "small")
    for words in (
        "diatheke",
        "apt-get install flite",
        "diffuspeech fetch kokoro",
        "diffuspeech fetch whisper-base",
    ):
        assert words in str(caught.value)


def test_noise_and_reverberation_are_the_same_on_every_cpu():
    "Clips are identified by hashes of their samples, so every build must round equally"
    code = """
import hashlib, torch
from diffuspeech.data.augment import roughen
wave = 0.5 * torch.sin(torch.arange(48_000) / 20.0)
print(torch.backends.cpu.get_cpu_capability())
for condition in ("clean", "noise", "reverb"):
    samples = (roughen(wave, condition, "some clip") * 32767).round().short()
    print(hashlib.sha256(samples.numpy().tobytes()).hexdigest())
"""
    plain = dict(ATEN_CPU_CAPABILITY="default", MKL_CBWR="COMPATIBLE", OMP_NUM_THREADS="1")
    (fast, *first), (slow, *second) = (
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | settings,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.split("\n")
        for settings in ({}, plain)
    )
    assert slow == "DEFAULT" and first == second and len(set(first)) == 4, (
        f"{fast} and {slow} round differently"
    )


def test_truncated_or_outdated_recordings_are_made_again(tmp_path):
    clips = [
        builtin.Clip(f"train-flite-slt-{k}", "train", "flite-slt", f"text {k}", "bible", f"text {k}")
        for k in range(3)
    ]
    for clip in clips:
        audio.save(builtin.path_of(tmp_path, clip), torch.randn(16_000) / 10)
    lines = [dict(id=c.id, kept=True, seconds=1.0, made_of=builtin.fingerprint(c)) for c in clips]
    (tmp_path / builtin.JOURNAL).write_text("\n".join(map(json.dumps, lines)) + '\n{"id": "train-fl')
    assert builtin.read_journal(tmp_path, clips).keys() == {c.id for c in clips}
    builtin.path_of(tmp_path, clips[1]).write_bytes(builtin.path_of(tmp_path, clips[1]).read_bytes()[:3000])
    assert builtin.read_journal(tmp_path, [*clips[:2], builtin.replace(clips[2], text="another")]).keys() == {
        clips[0].id
    }
