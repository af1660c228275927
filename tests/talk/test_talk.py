"Talkers: resumed training, what is fetched, presets, bad input"

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from diffuspeech.base.gguf import read_gguf
from diffuspeech.cli import main
from diffuspeech.data.audio import save
from diffuspeech.talk import joint
from diffuspeech.talk.attention import allowed_pairs, find_leaks
from diffuspeech.talk.backbone import Backbone, BackboneConfig, load_language_model
from diffuspeech.talk.dual import DualModel
from diffuspeech.talk.interleaved import WritingOptions
from diffuspeech.talk.qa import SpokenQuestion
from diffuspeech.talk.sequences import Dialogue, collate
from diffuspeech.talk.systems import SYSTEMS
from diffuspeech.talk.talker import Talker, answer_wave
from diffuspeech.tokenizers.s3 import Tokenizer, TokenizerConfig
from diffuspeech.train.loop import train
from diffuspeech.train.task import resolve_preset

TINY = dict(hidden=16, encoder_layers=1, ctc_layers=0, heads=2, ffn_dim=32, channels=8, levels=(4, 4))
QUESTION = Dialogue("q", "2 + 2?", "Four.", "It is 4.", tuple(range(10)), tuple(range(14)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "Six dialogues of tones"
    folder = tmp_path_factory.mktemp("talk")
    torch.manual_seed(0)
    Tokenizer(TokenizerConfig(**TINY)).save_pretrained(folder / "tokens")
    for split, n in (("train", 6), ("dev", 2)):
        rows = []
        for i in range(n):
            for part in "qa":
                tone = torch.sin(torch.arange(640 * (5 + i)) * 0.05 * (i + 1 + (part == "a")))
                save(folder / f"{split}-{i}-{part}.wav", 0.3 * tone)
            names = [f"{split}-{i}-{part}.wav" for part in "qa"]
            rows.append(SpokenQuestion(f"{split}-{i}", f"{i} + 1?", f"{i + 1}.", *names, thought=f"{i + 1}."))
        lines = [json.dumps(asdict(row)) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def config(corpus: Path, system: str, **changes):
    overrides = [f"data={corpus}", f"options.tokenizer={corpus / 'tokens'}", f"options.system={system}"]
    fixed = "steps=4 save_every=2 validate_every=4 batch_seconds=20 precision=fp32 warmup_steps=1"
    overrides += ["options.language_model=tiny", *fixed.split(), *(f"{k}={v}" for k, v in changes.items())]
    return resolve_preset("diffuspeech.tasks.talk:TalkTask", overrides)


def train_with_a_stop(run, folder):
    "In one piece, and in two: the weights are the same"

    def stop(line):
        if line["step"] == 3:  # the last checkpoint is that of step 2
            raise InterruptedError

    train(run, folder / "whole", "cpu", progress_bar=False)
    with pytest.raises(InterruptedError):
        train(run, folder / "parts", "cpu", progress_bar=False, on_step=stop)
    train(run, folder / "parts", "cpu", progress_bar=False)
    files = [(folder / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


@pytest.mark.parametrize("system", ["text-to-talk", "diffuspeech"])
def test_a_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path, system):
    train_with_a_stop(config(corpus, system), tmp_path)
    talker = Talker.from_pretrained(tmp_path / "parts/model")
    assert talker.system == SYSTEMS[system] and talker.tokenizer_version.startswith("s3-small-")
    assert talker.reply(QUESTION, writing=WritingOptions(max_tokens=20)).nfe > 0


def test_a_resumed_run_with_an_acoustic_head(corpus, tmp_path):
    overrides = [f"data={corpus}", "options.language_model=tiny", "model.head.dim=32", "model.head.layers=1"]
    overrides += [f"options.{name}={corpus / 'tokens'}" for name in ("tokenizer", "acoustic_tokenizer")]
    overrides += "steps=4 save_every=2 validate_every=4 batch_seconds=20 precision=fp32".split()
    run = resolve_preset("diffuspeech.tasks.talk_dual:DualTask", overrides)

    train_with_a_stop(run, tmp_path)
    again = DualModel.from_pretrained(tmp_path / "parts/model", load_language_model("tiny"))
    assert again.config.head.vocab_size == 16 and again.config.head.kind == "diffusion"


def tiny_talker(name: str) -> Talker:
    torch.manual_seed(0)
    return Talker(Backbone(BackboneConfig(audio_size=16), load_language_model("tiny")), SYSTEMS[name])


@pytest.mark.parametrize("name", SYSTEMS)
def test_no_system_leaks(name):
    talker = tiny_talker(name)
    spans = talker.builder.build(replace(QUESTION, question_codes=tuple(range(4))))
    batch = collate([spans], ["q"], talker.backbone.vocabulary)
    assert allowed_pairs(batch, talker.system.attention)[0].diagonal().all()
    assert find_leaks(talker.backbone, batch, talker.system.attention, layers=2) == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_question_longer_than_the_context(name):
    talker = tiny_talker(name)
    long = replace(QUESTION, question_codes=tuple(i % 16 for i in range(1200)))
    with pytest.raises(ValueError, match="shorten the question"):
        talker.reply(long)
    with pytest.raises(ValueError, match="shorten the question"):
        talker.builder.build(long)


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_empty_recording_and_an_empty_thought(name):
    talker = tiny_talker(name)
    with pytest.raises(ValueError, match="recording of the question is empty"):
        talker.reply(replace(QUESTION, question_codes=()))
    with pytest.raises(ValueError, match="recording of the question is empty"):
        answer_wave(talker, None, torch.zeros(0))
    with pytest.raises(ValueError, match="the thought is empty"):
        talker.reply(QUESTION, thought=" \n")


def test_a_folder_that_is_no_talker(tmp_path):
    Backbone(BackboneConfig(audio_size=16), load_language_model("tiny")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names no system"):
        Talker.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no such language model"):
        load_language_model("smol")


def test_a_backbone_without_enough_audio_tokens():
    talker = tiny_talker("diffuspeech")
    with pytest.raises(ValueError, match="the backbone has 16"):
        talker.reply(replace(QUESTION, question_codes=(3, 16)))


def test_block_ends_do_not_wait_for_each_other():
    "Two replies of one canvas size: the thought of one may be given, and only speech is denoised"
    talker = tiny_talker("diffuspeech")
    options = joint.JointOptions(16, 16, 32, text_steps=4, speech_steps=4)
    given = talker.reply(QUESTION, canvas=options, thought="It is 4.")
    kinds = collate([given.spans], ["q"], talker.backbone.vocabulary)
    commit = given.generation.trajectory.commit_step[0]
    assert (commit >= 0).equal(kinds.audio[0] & kinds.target[0])


@pytest.mark.needs("smollm2")
def test_smollm2_is_what_was_fetched():
    "The text of the fetched model, and its size"
    lm = load_language_model()
    assert sum(p.numel() for p in lm.net.parameters()) == 134_515_008
    chat = [dict(role="user", content="What is the capital of France?")]
    text = lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text.endswith("<|im_start|>assistant\n")
    ids = torch.tensor([lm.tokenizer.encode(text)])
    with torch.no_grad():
        found = lm.net.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in lm.tokenizer.decode(found)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--system talk-ar", "no such built-in model; train one (diffuspeech train talk-ar)"),
        ("--system nowhere", "nowhere: no such folder"),
        ("--thought=", "--thought: is empty"),
        ("--steps 0", "--steps: 0 should be a whole number of at least 1"),
        ("--system .", "no config.json"),
    ],
)
def test_bad_input_of_the_shell_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save("q.wav", torch.sin(torch.arange(8000) * 0.1))
    assert main(["talk", "q.wav", "-o", "a.wav", *words.split()]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not Path("a.wav").exists()


def test_questions_that_are_not_there(tmp_path, capsys):
    assert main(["evaluate", "talk", "x", "--dialogues", str(tmp_path)]) == 1
    assert "diffuspeech corpus questions makes a corpus" in capsys.readouterr().err


def test_gguf_is_not_anything(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04" * 40)
    with pytest.raises(ValueError, match="not a GGUF file"):
        read_gguf(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match="no such file"):
        read_gguf(tmp_path / "b.gguf")
