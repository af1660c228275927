"The CTC aligner compared with brute force in small cases, and properties of alignments by any aligner"

import itertools
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffuspeech.asr.align import (
    Alignment,
    CTCAligner,
    Word,
    align,
    ctc_align,
    duration_correlation,
    guess_pronunciation,
    ipa_to_arpabet,
    normalize_word,
    speaking_rate,
    split_words,
    word_durations,
)
from diffuspeech.data import audio
from diffuspeech.data.manifest import load_audio
from diffuspeech.evaluate.clips import load_bundled_clips

quick = settings(max_examples=60, deadline=None, derandomize=True)
needs_pocketsphinx = pytest.mark.skipif(
    find_spec("pocketsphinx") is None, reason="pocketsphinx is not installed"
)
TEXT = "Please leave your message after the tone. When done, hang up, or press the pound key."


def posteriors(seed, *shape, sharp=3.0):
    return (sharp * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def collapse(path, blank):
    return [s for s, _ in itertools.groupby(path) if s != blank]


def as_path(spans, ids, T, blank):
    path = [blank] * T
    for (start, end), symbol in zip(spans.tolist(), ids):
        assert 0 <= start < end <= T
        path[start:end] = [symbol] * (end - start)
    return path


def brute_force(log_probs, ids, blank):
    T, V = log_probs.shape
    return max(
        sum(log_probs[t, s].item() for t, s in enumerate(path))
        for path in itertools.product(range(V), repeat=T)
        if collapse(path, blank) == ids
    )


@quick
@given(
    T=st.integers(1, 6),
    V=st.integers(2, 4),
    blank=st.integers(0, 3),
    symbols=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
)
def test_finds_the_best_of_all_paths(T, V, blank, symbols, seed):
    blank, ids = blank % V, [s % V for s in symbols if s % V != blank % V]
    repeats = sum(a == b for a, b in zip(ids, ids[1:]))
    log_probs = posteriors(seed, T, V)
    if not ids or T < len(ids) + repeats:
        with pytest.raises(ValueError):
            ctc_align(log_probs, torch.tensor(ids, dtype=torch.int64), blank)
        return
    path = as_path(ctc_align(log_probs, torch.tensor(ids), blank), ids, T, blank)
    assert collapse(path, blank) == ids
    assert sum(log_probs[t, s].item() for t, s in enumerate(path)) == pytest.approx(
        brute_force(log_probs, ids, blank), abs=1e-4
    )


@pytest.mark.parametrize("ids", [[1, 1], [1, 1, 1], [1, 2, 2, 1], [2, 2, 1, 1]])
def test_repeats_in_the_fewest_frames(ids):
    "Each symbol has one frame, with a blank between equal ones, however unlikely the blank"
    T = len(ids) + sum(a == b for a, b in zip(ids, ids[1:]))
    log_probs = torch.tensor([1e-6, 0.6, 0.4]).log().expand(T, 3)
    spans = ctc_align(log_probs, torch.tensor(ids))
    assert (spans[:, 1] - spans[:, 0] == 1).all() and collapse(as_path(spans, ids, T, 0), 0) == ids
    with pytest.raises(ValueError, match=f"row 0 has {T - 1} frames and its text needs at least {T}"):
        ctc_align(log_probs[1:], torch.tensor(ids))


@quick
@given(frames=st.lists(st.integers(6, 12), min_size=1, max_size=4), seed=st.integers(0, 10**6))
def test_rows_are_independent(frames, seed):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 4, (len(frames),), generator=rng)
    ids = torch.randint(1, 5, (len(frames), 3), generator=rng)
    log_probs = posteriors(seed, len(frames), 12, 5)
    for row, n in enumerate(frames):
        log_probs[row, n:] = torch.nan
    together = ctc_align(log_probs, ids, 0, torch.tensor(frames), lengths)
    for row, (n, k) in enumerate(zip(frames, lengths.tolist())):
        assert torch.equal(together[row, :k], ctc_align(log_probs[row, :n], ids[row, :k]))
        assert (together[row, k:] == -1).all()


def test_ctc_refuses_impossible_texts():
    log_probs = posteriors(0, 5, 3)
    for ids in ([0, 1], [3], [-1]):
        with pytest.raises(ValueError, match="from 0 to 2, without the blank 0"):
            ctc_align(log_probs, torch.tensor(ids))
    never = log_probs.clone()
    never[:, 2] = -torch.inf
    with pytest.raises(ValueError, match="probability zero"):
        ctc_align(never, torch.tensor([2]))


def test_words_of_one_hot_posteriors():
    "ab|b: the words are where the recognizer puts them, whether it is peaky or not"
    path = [0, 1, 1, 0, 2, 2, 0, 3, 0, 2, 2, 0]
    log_probs = torch.nn.functional.one_hot(torch.tensor(path), 4).float().clamp_min(1e-9).log()
    aligner = CTCAligner(
        lambda wave: log_probs,
        lambda word: ["-ab|".index(c) for c in word],
        "-ab|",
        frame_seconds=0.02,
        word_separator=3,
    )
    got = align(torch.full((12 * 320,), 0.1), "ab, b!", aligner)
    assert [(w.word, round(w.start / 0.02), round(w.end / 0.02)) for w in got.words] == [
        ("ab", 1, 6),
        ("b", 9, 11),
    ]
    assert [(p.phone, p.index, round(p.start / 0.02), round(p.end / 0.02)) for p in got.phones] == [
        ("a", 0, 1, 4),
        ("b", 0, 4, 6),
        ("b", 1, 9, 11),
    ]
    assert got.confidence == pytest.approx(1) and got.seconds == pytest.approx(0.24)


def test_split_words():
    assert split_words("It's 3.5 km -- “well-known”, isn’t it?") == [
        "It's",
        "3.5",
        "km",
        "well",
        "known",
        "isn't",
        "it",
    ]
    assert split_words("") == split_words("—… ?!") == [] and normalize_word("Señor") == "senor"
    assert (
        ipa_to_arpabet("dʒˈʌdʒ") == ["JH", "AH", "JH"]
        and ipa_to_arpabet("ɹɪŋ") == ["R", "IH", "NG"]
        and ipa_to_arpabet("ħa") is None
    )


@pytest.mark.skipif(find_spec("hama") is None, reason="hama is not installed")
def test_a_word_outside_the_dictionary():
    assert guess_pronunciation("zyzzyva") == "Z IH Z IH V AH".split()
    for word in ("привет", "安", "½"):
        with pytest.raises(ValueError, match=f"'{word}'"):
            guess_pronunciation(word)


def alignment_of(*spans):
    return Alignment([Word(f"w{i}", start, end, 1.0) for i, (start, end) in enumerate(spans)], [], 9.0)


def test_durations_rate_and_correlation():
    a, b = alignment_of((0, 1), (1, 3), (4, 7)), alignment_of((0, 2), (2, 6), (6, 12))
    assert (
        word_durations(a).tolist() == [1, 2, 3]
        and speaking_rate(a)["words"] == pytest.approx(3 / 7)
        and speaking_rate(a)["pause"] == pytest.approx(1 / 7)
    )
    assert duration_correlation(a, b) == pytest.approx(1) and duration_correlation(
        a, alignment_of((0, 3), (3, 5), (5, 6))
    ) == pytest.approx(-1)
    assert duration_correlation([a, a], [b, a]) < 1
    for x, y, words in (
        (a, alignment_of((0, 1)), "different words"),
        ([a], [a, a], "1 and 2 clips"),
        (alignment_of((0, 1)), alignment_of((0, 1)), "three words"),
    ):
        with pytest.raises(ValueError, match=words):
            duration_correlation(x, y)


@needs_pocketsphinx
def test_human_speech():
    wave = audio.load_clip("vm-intro")
    first = align(wave, TEXT)
    assert [w.word for w in first.words] == split_words(TEXT)
    assert (
        all(0 <= a.start < a.end <= b.start + 1e-9 for a, b in zip(first.words, first.words[1:]))
        and first.words[-1].end <= len(wave) / audio.SAMPLE_RATE
    )
    wrong = align(wave, "The birch canoe slid on the smooth planks, and rice is often served in round bowls.")
    assert first.confidence > 0.7 > 0.35 > wrong.confidence
    assert align(wave, TEXT) == first, "an alignment must not depend on the clips before it"
    later = align(torch.cat([torch.zeros(8000), wave]), TEXT)
    shifts = torch.tensor([b.start - a.start for a, b in zip(first.words[1:], later.words[1:])])
    assert (shifts - 0.5).abs().median() <= 0.01 and ((shifts - 0.5).abs() <= 0.03).float().mean() > 0.8


@needs_pocketsphinx
def test_refuses_what_cannot_be_aligned():
    wave = audio.load_clip("vm-intro")
    for bad, text, words in (
        (wave, "", "text is empty"),
        (wave, "?!", "no word"),
        (wave[:4000], TEXT, "lasts 0.25 s"),
        (wave * 0, TEXT, "silent"),
        (wave[:0], TEXT, "shape"),
        (wave / 0, TEXT, "finite"),
        (wave.int(), TEXT, "float"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            align(bad, text)
        assert "\n" not in str(error.value)


@needs_pocketsphinx
def test_an_alignment_does_not_depend_on_the_clips_before_it():
    "The decoder's estimate of the noise was carried from clip to clip"
    clips = sorted(load_bundled_clips(), key=lambda u: u.duration)[:12]
    pairs = [(load_audio(u), u.text) for u in clips]
    forward, backward = [align(*pair) for pair in pairs], [align(*pair) for pair in reversed(pairs)]
    assert forward == backward[::-1]
