"New runs from the head row of the player: the built-in model, asked once more with other settings"

import shutil

import pytest
import torch

from diffuspeech.base.checkpoint import builtin_checkpoint, read_config
from diffuspeech.data.audio import load_clip
from diffuspeech.data.manifest import load_audio
from diffuspeech.diffusion.oracle import MarkovChain
from diffuspeech.diffusion.sample import sample
from diffuspeech.evaluate.clips import load_bundled_clips
from diffuspeech.models import reconstructor
from diffuspeech.models.decoder import DecoderConfig, SpeechDecoder
from diffuspeech.models.reconstructor import Reconstructor
from diffuspeech.workbench import rerun
from diffuspeech.workbench.player import player
from diffuspeech.workbench.rerun import sampling_options
from diffuspeech.workbench.view import run_data

CLIPS = load_bundled_clips()[:3]


@pytest.fixture(scope="module")
def shown():
    model = Reconstructor.from_pretrained("ddm")
    result = model.reconstruct(load_audio(CLIPS[0]), CLIPS[0].text, candidates=4, steps=6)
    return player(result)


def test_other_settings_of_the_same_clip(shown):
    (view,) = shown.views
    chosen = dict(rule="margin", steps=3, temperature=0.5, seed=7, scale=1.2)
    other = view.rerun(None, **sampling_options(chosen))
    assert (
        run_data(other)["settings"] == chosen | dict(model="ddm")
        and run_data(view)["settings"]["scale"] == 1.0
    )
    assert other.length == -(-view.length * 6 // 5) and other.text == view.text
    assert other.label == "margin, 3 steps, temperature 0.5, seed 7, length 1.20"
    assert abs(other.seconds - 1.2 * view.seconds) < 0.05 and other.trajectory.candidates is not None
    back = other.rerun(None, **sampling_options(run_data(view)["settings"]))
    assert torch.equal(back.trajectory.final, view.trajectory.final), "the same settings give the same run"
    own = view.rerun(None, **sampling_options(dict(rule="conf_topp", steps=None)))
    assert run_data(own)["settings"]["rule"] == "conf_topp" and own.steps != view.steps
    hitting = view.rerun(None, **sampling_options(dict(rule="first_hitting", steps=3)))
    assert hitting.steps == hitting.length, "a token at a time, whatever is asked"


def test_another_clip(shown):
    "Its own text, length and voice; from there back to the first"
    (view,) = shown.views
    assert [name for name, _ in shown.data["clips"]][:3] == [u.id for u in CLIPS]
    other = view.rerun(CLIPS[1].id, steps=2)
    assert other.text == CLIPS[1].text and run_data(other)["settings"]["clip"] == CLIPS[1].id
    assert abs(other.seconds - CLIPS[1].duration) < 0.1 and CLIPS[1].id in other.label
    again = other.rerun(CLIPS[1].id, steps=2)
    assert torch.equal(again.trajectory.final, other.trajectory.final)
    with pytest.raises(ValueError, match="no such clip"):
        view.rerun("nobody")


def test_an_utterance_of_ones_own(shown, monkeypatch):
    "A sentence in the voice of the run, a recording with its words, and one without: it is transcribed"
    (view,) = shown.views
    spoken = view.rerun(None, text="the echo test has been completed", steps=2)
    assert (
        spoken.text == "the echo test has been completed"
        and run_data(spoken)["settings"]["clip"] == "your sentence"
    )
    wave = load_audio(CLIPS[1])
    own = view.rerun(None, wave=wave, text=CLIPS[1].text, steps=2)
    assert torch.equal(own.trajectory.final, view.rerun(CLIPS[1].id, steps=2).trajectory.final)
    assert "your recording" in own.label
    monkeypatch.setattr(rerun, "transcribe", lambda wave: "please hold")
    assert view.rerun(None, wave=wave, steps=2).text == "please hold"
    samples = wave.numpy().tobytes()
    given = rerun.own_utterance(" hello ", samples)
    assert given["text"] == "hello" and torch.equal(given["wave"], wave)
    assert rerun.own_utterance("hello", None) == dict(text="hello")
    for text, sound, message in (
        (" ", None, "neither a recording nor a sentence"),
        ("", samples[:400], "the recording has 0.0 s"),
        ("", bytes(4 * 16_000), "the recording is silent"),
    ):
        with pytest.raises(ValueError, match=message):
            rerun.own_utterance(text, sound)


@pytest.mark.needs("whisper")
def test_a_recording_is_transcribed_by_whisper():
    "or by the model's own recognizer, where Whisper base is not here"
    words = rerun.transcribe(load_clip()).lower()
    assert "leave your message" in words and "pound key" in words


@pytest.fixture
def student(tmp_path, monkeypatch):
    "A built-in ddm-few, small and with random weights; its folder is all that there is of it"

    def find(name):
        return (
            tmp_path / name if name == "ddm-few" and (tmp_path / name).is_dir() else builtin_checkpoint(name)
        )

    for module in (reconstructor, rerun):
        monkeypatch.setattr(module, "builtin_checkpoint", find)
    rerun.load_model.cache_clear()
    teacher = builtin_checkpoint("ddm")
    saved = read_config(teacher / "decoder")
    run = saved["metadata"].get("run", {}) | dict(task="diffuspeech.tasks.distill:DistillTask")
    small = dict(dim=32, embedding_dim=16, encoder_layers=1, decoder_layers=1, heads=2, ffn_dim=32)
    model = Reconstructor.from_pretrained("ddm")
    torch.manual_seed(0)
    text = reconstructor.text_table(model.recogniser)
    decoder = SpeechDecoder(DecoderConfig(**saved["config"] | small), text)

    def make():
        shutil.copytree(teacher / "taste", tmp_path / "ddm-few" / "taste")
        decoder.save_pretrained(tmp_path / "ddm-few" / "decoder", **saved["metadata"] | dict(run=run))

    yield make
    rerun.load_model.cache_clear()


def test_the_student_is_offered_when_it_is_there(shown, student):
    "With few steps; from it back to its teacher, for another clip too"
    (view,) = shown.views
    if not (builtin_checkpoint("ddm").parent / "ddm-few").is_dir():
        assert [name for name, _ in rerun.offered_models()] == ["ddm"]
        with pytest.raises(ValueError, match="ddm-few: no such built-in model"):
            view.rerun(None, **sampling_options(dict(model="ddm-few", steps=2)))
    student()
    assert shown.__class__(shown.views, clips=CLIPS).data["models"] == [
        ["ddm", None],
        ["ddm-few", rerun.STUDENT_STEPS],
    ]
    few = view.rerun(None, **sampling_options(dict(model="ddm-few", rule="conf_topk", steps=2)))
    assert run_data(few)["settings"]["model"] == "ddm-few" and few.steps == 2
    assert few.label == "conf_topk, 2 steps, ddm-few" and few.length == view.length
    assert not torch.equal(few.trajectory.final, view.trajectory.final)
    assert len(few.sound(1, "guess")) == len(view.wave)
    other = few.rerun(CLIPS[1].id, steps=2)
    assert (
        run_data(other)["settings"] | dict(model="ddm-few", clip=CLIPS[1].id) == run_data(other)["settings"]
    )
    back = few.rerun(None, **sampling_options(run_data(view)["settings"]))
    assert torch.equal(back.trajectory.final, view.trajectory.final) and back.label.endswith(", ddm")


def test_a_denoiser_starts_again():
    "Without a model of speech there are no clips and no lengths"
    chain = MarkovChain.random(vocab_size=12, seed=3)
    run = sample(chain, torch.full((1, 40), chain.mask_id), "conf_topk", chain.mask_id, steps=8, candidates=4)
    shown = player(run, denoiser=chain)
    data = shown.data
    assert data["runs"][0]["rerun"] and not data["clips"] and "scale" not in data["runs"][0]["settings"]
    other = shown.views[0].rerun(None, **sampling_options(dict(rule="random", steps=4, seed=2)))
    assert (other.steps, other.label) == (4, "random, 4 steps, seed 2")
    assert not player(run).data["runs"][0]["rerun"]


def test_a_page_without_a_kernel_states_the_settings(shown):
    page = shown.html()
    assert '"rerun":false' in page.replace(" ", "") and '"rerun":true' not in page.replace(" ", "")
    assert '"temperature": 0.0' in page or '"temperature":0.0' in page


def test_the_page_adds_runs_and_removes_them():
    "What was given stays, and what cannot be done is a message"
    chain = MarkovChain.random(vocab_size=12, seed=3)
    run = sample(chain, torch.full((1, 20), chain.mask_id), "conf_topk", chain.mask_id, steps=4)
    widget, told = player({"a": run, "b": run}, denoiser=chain).widget, []
    widget.send = lambda message, buffers=None: told.append(message)
    widget._rerun(dict(run=1, clip=None, rule="margin", steps=2, temperature=0.0, seed=1, scale=None))
    assert [r["label"] for r in widget.data["runs"]] == ["a", "b", "margin, 2 steps, seed 1"]
    widget._drop()
    widget._drop()
    assert len(widget.views) == 2 == len(widget.data["runs"])
    widget._try(widget._rerun, dict(type="rerun", run=0, clip="a clip", steps=2))
    assert told[-1]["key"] == "rerun" and "no clips" in told[-1]["text"]
