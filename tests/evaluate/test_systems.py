"From systems to rows: no meaning in order or names, rendered once, transcribers and clusters as data"

from dataclasses import KW_ONLY, dataclass, replace
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from tqdm import tqdm

from diffuspeech.data.manifest import load_audio
from diffuspeech.evaluate import systems
from diffuspeech.evaluate.clip_rows import read_clip_rows
from diffuspeech.evaluate.clips import ClipSet, load_bundled_clips
from diffuspeech.evaluate.metrics import Cache, Judges
from diffuspeech.evaluate.score import judge_clips, prefix, score_row, word_rows
from diffuspeech.evaluate.systems import Recording, System, SystemResult
from diffuspeech.evaluate.table import evaluate_systems, render, shares
from diffuspeech.models.decoder import Condition

CLIPS = load_bundled_clips()[::4]


@dataclass(frozen=True)
class Share(System):
    "A system that says this share of each clip's words, as `Reader` hears it"

    name: str
    share: float
    _: KW_ONLY
    compare_with: tuple[str, ...] = ("oracle", "ar")

    def identity(self):
        return dict(share=self.share)

    def render(self, clips, batch_size=8, seed=0):
        return SystemResult(
            [torch.full_like(w, self.share) for w in clips.waves], seconds=1.0, nfe=[3] * len(CLIPS)
        )


class Reader:
    "A recogniser that knows the clips by their length, and how much was said by the level"

    def __init__(self, name="reader"):
        self.name, self.asked = name, 0
        self.words = {len(load_audio(u)): u.text.split() for u in CLIPS}

    def __call__(self, waves):
        self.asked += len(waves)
        shares = [w[0].item() if w.std() == 0 else 1.0 for w in waves]
        words = [self.words[len(w)] for w in waves]
        return [" ".join(w[: round(share * len(w))]) for w, share in zip(words, shares)]


class Constant:
    def __init__(self, answer):
        self.name, self.answer = f"constant-{answer}", answer

    def __call__(self, waves):
        return [self.answer] * len(waves)


JUDGES = Judges(dict(wer=Reader()), Constant(3.0), Constant([1.0, 0.0]))
SYSTEMS = [
    Recording(),
    Share("tokens", 0.9, baseline="oracle", compare_with=()),
    Share("left to right", 0.3, baseline="ar"),
    Share("ten steps", 0.6),
    Share("a part", 0.7, graded_only=True, compare_with=()),
]


def table(systems, folder, judges=JUDGES, **options):
    return evaluate_systems(
        systems,
        CLIPS,
        lambda u: dict(split=u.split),
        ("oracle", "ar"),
        lambda system, result, clips, rows, graded: dict(rendered=len(result.waves), judged=len(rows)),
        judges,
        3,
        Cache(folder / "judged"),
        lambda **how: tqdm(disable=True, **how),
        **options,
    )


def test_rows_do_not_depend_on_their_order_or_on_names(tmp_path):
    "A comparison was empty for every row above its baseline, and a baseline was known by its name"
    expected = {(r["split"], r["system"]): r for r in table(SYSTEMS, tmp_path)}
    for order in list(permutations(SYSTEMS))[::7]:
        assert {(r["split"], r["system"]): r for r in table(order, tmp_path)} == expected
    empty = {r["system"] for r in expected.values() if r["wer_over_ar"] is None}
    assert empty == {"Original", "tokens", "left to right", "a part"}
    for (_, name), r in expected.items():
        assert (r["wer_over_oracle"] is None) == (name in ("Original", "tokens", "a part"))
        assert r["rendered"] == r["judged"] == (3 if name == "a part" else r["clips"])
        if name == "ten steps":
            assert r["wer_over_oracle"] > 0 > r["wer_over_ar"] and r["wer_over_ar_detectable"] > 0
            assert r["wer_over_ar_voices_detectable"] > 0
    named = [replace(s, name=f"AR-{i} S3-Oracle Original") for i, s in enumerate(SYSTEMS)]
    for r, (_, other) in zip(table(named, tmp_path), expected.items()):
        assert {k: v for k, v in r.items() if k != "system"} == {
            k: v for k, v in other.items() if k != "system"
        }


def test_one_baseline_of_a_comparison(tmp_path):
    with pytest.raises(ValueError, match="baseline ar: left to right and another both claim"):
        table([*SYSTEMS, Share("another", 0.1, baseline="ar")], tmp_path)
    without = table([s for s in SYSTEMS if s.baseline != "ar"], tmp_path)
    assert all(r["wer_over_ar"] is None for r in without), "the columns are there, and empty"


def test_too_few_clips_are_refused_before_anything_is_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(Share, "render", lambda *args, **options: 1 / 0)
    with pytest.raises(ValueError, match="mos_clips=1: at least two clips"):
        evaluate_systems(SYSTEMS, CLIPS, lambda u: dict(split=u.split), (), None, JUDGES, 1)
    with pytest.raises(ValueError, match="need at least two clips"):
        evaluate_systems(SYSTEMS, CLIPS, lambda u: dict(id=u.id), (), None, JUDGES)


def test_transcribers_and_intervals_are_data(tmp_path):
    two = Judges(dict(wer=Reader(), wer_second=Constant("")), *(JUDGES.mos, JUDGES.speaker))
    one = table(SYSTEMS, tmp_path)
    for r, alone in zip(table(SYSTEMS, tmp_path, two), one):
        assert {name: r[name] for name in alone} == alone, "the first recogniser's columns stay"
        assert r["wer_second"] == r["wer_second_del"] == 1 and r["wer_second_vs_asr"] is None
        assert (r["wer_second_over_ar"] is None) == (r["wer_over_ar"] is None)
    assert two.names == dict(wer="reader", wer_second="constant-") | dict(mos="constant-3.0") | dict(
        speaker="constant-[1.0, 0.0]"
    )
    kinds = {k: {k: k} for k in ("speaker", "text")}
    voices, sentences = (table(SYSTEMS, tmp_path, intervals={k: kinds[k]}) for k in kinds)
    assert [r["wer"] for r in voices] == [r["wer"] for r in sentences] == [r["wer"] for r in one]
    assert all(
        a["wer_high"] != b["wer_high"] for a, b in zip(voices, sentences) if a["system"] == "ten steps"
    )
    both = table(SYSTEMS, tmp_path, intervals={k: kinds[k] for k in ("text", "speaker")})
    for a, b, r in zip(sentences, voices, both):
        assert (r["wer_low"], r["wer_speaker_low"]) == (a["wer_low"], b["wer_low"]), "each beside the other"


def test_second_judges_get_the_graded_clips(tmp_path):
    second = Reader("second")
    judges = replace(JUDGES, second=dict(wer_base=second))
    rows = table(SYSTEMS[:4], tmp_path, judges, clip_rows=tmp_path / "t.clips.jsonl.gz")
    assert second.asked == 2 * 4 * 3, "three clips of each split and system, the recordings among them"
    assert judges.names["wer_base"] == "second"
    header, found = read_clip_rows(tmp_path / "t.clips.jsonl.gz")
    assert list(found) == [s.label for s in SYSTEMS[:4]] == list(header["systems"])
    assert header["systems"]["ten steps"] == dict(share=0.6) and header["judges"] == judges.names
    for r in rows:
        own = [c for c in found[r["system"]] if c["split"] == r["split"]]
        graded = [c for c in own if "wer_base_words" in c]
        assert len(graded) == 3 and len(own) == r["clips"] and r["wer_base_retries"] == 0
        for column, some in (("wer", own), ("wer_base", graded)):
            errors = sum(c[prefix(column) + "errors"] for c in some)
            assert r[column] == pytest.approx(errors / sum(c["words"] for c in some), abs=1e-4)
        if r["wer_over_ar"] is not None:
            other = [c for c in found["left to right"] if c["split"] == r["split"]]
            words = sum(c["words"] for c in own)
            by_hand = sum(a["errors"] - b["errors"] for a, b in zip(own, other)) / words
            assert r["wer_over_ar"] == pytest.approx(by_hand, abs=1e-4)


def test_labels_tell_systems_apart(tmp_path):
    with pytest.raises(ValueError, match="the same name, steps and length mode"):
        table([Share("one", 0.5), Share("one", 0.6)], tmp_path)
    assert Share("one", 0.5, steps=10, length="predicted").label == "one, 10 steps, length predicted"
    assert Share("one", 0.5, steps=1).label == "one, 1 step"


class WhisperAttention(nn.Module):
    "Known by its name and width, as transformers' own"

    def __init__(self, embed_dim):
        super().__init__()
        self.embed_dim = embed_dim


@pytest.mark.parametrize(
    "source, width, expected",
    [
        ("whisper-base", 512, "weights of Whisper base"),
        ("openai/whisper-base", 512, "weights of Whisper base"),
        ("whisper-tiny.en", 512, "the family of Whisper"),
        ("whisper-tiny.en", 384, "weights of Whisper tiny"),
        ("nvidia/parakeet", 512, ""),
        ("whisper-base", None, ""),
    ],
)
def test_what_a_judge_shares_is_in_its_row(source, width, expected, tmp_path):
    judge = Reader()
    judge.source = source
    clips = ClipSet.load(CLIPS[:2])
    network = nn.Sequential(WhisperAttention(width)) if width else nn.Linear(1, 1)

    @dataclass(frozen=True)
    class WithParts(Share):
        @property
        def parts(self):
            return (network, SimpleNamespace(tokenizer=network))

    assert shares(judge, WithParts("codec", 0.9), clips) == expected
    assert shares(judge, Recording(), clips) == ""
    chosen = [replace(u, extra=u.extra | dict(kind="bible")) for u in CLIPS[:2]]
    found = shares(judge, Recording(), ClipSet.load(chosen))
    assert found == ("chose the synthetic clips" if source.endswith("base") else "")
    row = table([WithParts("codec", 0.9)], tmp_path, Judges(dict(wer=judge)))[0]
    assert row["wer_shares"] == expected


def test_rendered_once(tmp_path):
    clips, system, calls = ClipSet.load(CLIPS[:3]), SYSTEMS[3], []
    render_again = lambda own, *args, **how: calls.append(own) or Share.render(own, *args, **how)

    class Counted(Share):
        render = render_again

    system = Counted("ten steps", 0.8)
    first = render(system, clips, tmp_path)
    again = render(replace(system, baseline="ar", compare_with=()), clips, tmp_path)
    assert len(calls) == 1 and all(map(torch.equal, first.waves, again.waves)), "its role is no part of it"
    assert {k: v for k, v in vars(first).items() if k != "waves"} == {
        k: v for k, v in vars(again).items() if k != "waves"
    }
    render(replace(system, share=0.7), clips, tmp_path)
    render(system, clips, tmp_path, seed=1)
    render(system, clips.subset([0, 1]), tmp_path)
    assert len(calls) == 4, "other options, another seed, other clips"
    render(Recording(), clips, tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4 and all(f.name.startswith("ten steps ") for f in files)
    for file in files:
        file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="delete it, and the clips are rendered again"):
        render(system, clips, tmp_path)


def test_words_against_the_text_and_against_the_recording():
    rows = word_rows(["a b", "c"], ["a", "c"], ["a b", "[noise]"])
    assert [(r["errors"], r["words"]) for r in rows] == [(1, 2), (0, 1)] and rows[0]["deletions"] == 1
    assert (rows[0]["asr_errors"], rows[0]["asr_words"]) == (1, 2) and "asr_words" not in rows[1]


def test_clips_that_were_not_graded_count_for_words_alone(tmp_path):
    clips = ClipSet.load(CLIPS)
    rows = judge_clips(clips.waves, clips, JUDGES, Cache(tmp_path), graded=[1, 4])
    assert [i for i, row in enumerate(rows) if "distillmos" in row] == [1, 4]
    row = score_row(rows)
    assert row["clips"] == len(CLIPS) and row["mos_clips"] == 2 and row["wer"] == 0 == row["wer_vs_asr"]
    words_only = judge_clips(clips.waves, clips, Judges(JUDGES.transcribers), Cache(tmp_path))
    assert "distillmos" not in score_row(words_only) and score_row(words_only)["mos_clips"] == 0


@pytest.mark.parametrize("control", systems.CONTROLS[:3])
def test_a_control_takes_away_what_its_name_does_not_have(control, monkeypatch):
    clips, found = ClipSet.load(CLIPS[:2]), []
    pieces = Condition(torch.zeros(2, 3, dtype=torch.long), torch.tensor([3, 2]), torch.zeros(2, 3, 4))

    def synthesize(system, condition, some, seed):
        found.append(condition)
        return [(wave, 0.0, 1, 1, False, True, [7]) for wave in some.waves]

    monkeypatch.setattr(systems, "synthesize_batch", synthesize)
    taste = SimpleNamespace(quantizer=SimpleNamespace(bits=36))
    model = SimpleNamespace(encode=lambda waves, texts: (pieces, None), taste=taste)
    result = systems.Decoder("DDM", model, control=control).render(clips)
    has_text, has_vectors = found[0].has_text, found[0].has_vectors
    assert (has_text is None or bool(has_text.all())) == (control != "vectors only")
    assert (has_vectors is None or bool(has_vectors.all())) == (control != "text only")
    assert bool(result.bitrate) == (control != "text only"), "codes are sent beside the text"
    assert result.ids == [[7], [7]]
    with pytest.raises(ValueError, match="is not one of '', 'text only', 'vectors only', 'shuffled'"):
        systems.Decoder("DDM", model, control="text")
