"A judge that cannot run away: loops are caught, no right hypothesis is cut, what was refused is counted"

import re

import pytest
import torch

from diffuspeech.data import audio
from diffuspeech.data.builtin import plan_corpus
from diffuspeech.data.voices import MissingDependency
from diffuspeech.evaluate.clips import ClipSet, load_bundled_clips
from diffuspeech.evaluate.hypotheses import (
    Hypothesis,
    cut_length,
    cut_loops,
    find_loop,
    max_words,
    runs_away,
    transcribe,
    words_of,
)
from diffuspeech.evaluate.metrics import Cache, Judges, Whisper, wer
from diffuspeech.evaluate.score import judge_clips, score_row

WORDS = "a great wheel runs down the hill let go thy hold lest it break thy neck with following".split()


class Scripted:
    "A recognizer with a hypothesis for each length of a wave"

    def __init__(self, name, texts, retry=None):
        self.name, self.texts, self.asked = name, texts, []
        if retry:
            self.retry = retry

    def __call__(self, waves):
        self.asked += [len(wave) for wave in waves]
        return [self.texts[len(wave)] for wave in waves]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 17])
@pytest.mark.parametrize("start", [0, 1, 9])
@pytest.mark.parametrize("rest", [0, 1, 9])
def test_a_loop_is_caught_wherever_it_stands(size, start, rest):
    phrase = WORDS[:size]
    before, after = [f"x{i}" for i in range(start)], [f"y{i}" for i in range(rest)]
    times = max(4, -(-12 // size))
    for n in (times, times + 1, 30):
        looped = [*before, *phrase * n, *after]
        assert find_loop(looped) == (start, start + n * size, size)
        text = ", ".join(looped).capitalize() + "."
        assert runs_away(text, 1000.0) == "loop"
        left = [w.group().lower() for w in words_of(cut_loops(text))]
        assert left == [*before, *phrase, *after], "the phrase stays, once"
    assert not find_loop([*before, *phrase * (times - 1), *after]) or size == 1 and times - 1 >= 12


def test_part_of_a_phrase_at_the_end_of_a_loop():
    text = "press one, " * 20 + "press"
    assert cut_loops(text) == "press one" and runs_away(text, 60.0) == "loop"


def test_phrases_that_people_repeat_are_no_loop():
    for text in ("Never, never, never, never, never!", "no no no no", "one two one two one two", "ha " * 11):
        assert not runs_away(text, 10.0) and cut_loops(text) == text


def test_the_cap_cuts_no_right_hypothesis():
    "Every text of the bundled clips, at twice their speed; a clip without a text that its length allows"
    for u in load_bundled_clips():
        assert not runs_away(u.text, u.duration / 2), u.id
        assert cut_length(cut_loops(u.text), u.duration / 2) == u.text
    for seconds in (0.0, 0.4, 3.0, 30.0):
        allowed = " ".join(f"w{i}" for i in range(max_words(seconds)))
        assert not runs_away(allowed, seconds) and cut_length(allowed, seconds) == allowed
        assert runs_away(f"{allowed} more", seconds) == "length"
        assert cut_length(f"{allowed} more", seconds) == allowed


def test_no_text_of_the_corpus_is_a_loop():
    try:
        clips = plan_corpus("small")
    except MissingDependency as e:
        pytest.skip(str(e))
    assert [clip.id for clip in clips if find_loop([w.group().lower() for w in words_of(clip.text)])] == []


def test_decoded_again_once_and_counted(tmp_path):
    looped, spoken = "press one, " * 50 + "press", "press the pound key"
    lengths = {16_000: "hang up", 16_001: looped, 16_002: " ".join(map(str, range(99))), 16_003: looped}
    again = Scripted("again", {16_001: spoken, 16_002: "hang up", 16_003: looped})
    judge = Scripted("first", lengths, again)
    waves = [torch.full((n,), 0.5) for n in lengths]
    plain, loop, long, stubborn = transcribe(judge, waves, Cache(tmp_path))
    assert again.asked == [16_001, 16_002, 16_003], "only what ran away"
    assert plain == Hypothesis("hang up") and loop == Hypothesis(spoken, "loop", looped)
    assert (long.retry, long.text, long.cut) == ("length", "hang up", False)
    assert (stubborn.text, stubborn.retry, stubborn.cut) == ("press one", "loop", True)
    assert transcribe(judge, waves, Cache(tmp_path))[1] == loop and len(again.asked) == 3, "kept"
    without = transcribe(Scripted("without", lengths), waves, Cache(tmp_path))
    assert [h.cut for h in without] == [False, True, True, True], "a judge that has no other way"
    assert len(words_of(without[2].text)) == max_words(16_002 / 16_000)


def test_a_row_does_not_depend_on_a_loop(tmp_path):
    "One hypothesis of 200 words made 47.8% of 27.4%: its row is what the second decoding says"
    clips = ClipSet.load(load_bundled_clips()[:12])
    texts = {len(w): u.text for u, w in zip(clips.utterances, clips.waves)}
    ran = len(clips.waves[3])
    looped = {n: " ".join([text] * 40) if n == ran else text for n, text in texts.items()}
    judge = Scripted("loops", looped, Scripted("again", texts))
    rows = judge_clips(clips.waves, clips, Judges(dict(wer=judge)), Cache(tmp_path))
    assert sum(r["errors"] for r in rows) == 0 and [bool(r["retry"]) for r in rows].index(True) == 3
    assert rows[3]["first_transcript"] == looped[ran] and "first_transcript" not in rows[2]
    row = score_row(rows)
    assert (row["wer"], row["retries"], row["cut"]) == (0, 1, 0)
    assert wer([texts[ran]], [looped[ran]]).rate > 30, "what it would have counted"


def test_whisper_decodes_in_another_way(judge_or_skip):
    judge, clip = judge_or_skip(Whisper), audio.load_clip()
    again = judge.retry
    assert again.name == f"{judge.name}-ngram4" and again.decode_options["no_repeat_ngram_size"] == 4
    assert "no_repeat_ngram_size" not in judge.decode_options
    assert again([clip]) == judge([clip]), "a right hypothesis stays"
    spoken_again = torch.cat([clip[:24_000]] * 8)
    words = re.findall(r"\w+", again([spoken_again])[0].lower())
    four = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    assert len(four) - len(set(four)) <= 1, "tokens, which are at most words"
    assert Judges(dict(wer=judge)).names["wer"] == f"{judge.name}, then -ngram4"
