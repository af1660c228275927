"Whisper as a network: files, windows, long recordings"

import shutil
from importlib.resources import files

import jiwer
import pytest
import torch

from diffuspeech.asr.whisper import (
    Whisper,
    WhisperTokenizer,
    read_ctranslate2,
    restore_first_merge,
    split_at_silence,
)
from diffuspeech.base.pretrained import MissingDependency, local_folder
from diffuspeech.data.audio import SAMPLE_RATE, import_torchaudio, load, load_clip
from diffuspeech.data.manifest import Manifest
from diffuspeech.data.text import normalize_text

PACK = files("diffuspeech") / "assets" / "pack" / "pack.jsonl"


@pytest.fixture(scope="module")
def folder():
    try:
        return local_folder("whisper-base")
    except MissingDependency as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def hub_folder(folder, tmp_path_factory):
    "A small Whisper with random weights, as a folder of the hub"
    import_torchaudio()
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    target = tmp_path_factory.mktemp("hub")
    size = dict(encoder_layers=2, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    config = WhisperConfig(vocab_size=51865, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, **size)
    WhisperForConditionalGeneration(config).save_pretrained(target)
    shutil.copy(folder / "tokenizer.json", target)
    return target


def test_loads_a_folder_of_the_hub(hub_folder):
    model = Whisper.from_pretrained(hub_folder)
    states, mask = model.encode(load_clip()[None, :16000], layers=(0, 1, 2))
    assert [s.shape for s in states] == [(1, 100, 32)] * 3 and mask.all(), "one second, and one of silence"
    assert model.fingerprint() == Whisper.from_pretrained(hub_folder).fingerprint()
    with pytest.raises(ValueError, match="0 .before the first. to 2, not 3"):
        model.encode(load_clip()[None], layers=(3,))


def test_decoder_logits_do_not_depend_on_the_cache(hub_folder):
    model = Whisper.from_pretrained(hub_folder)
    (hidden,), mask = model.encode(load_clip()[None, :16000])
    ids = torch.tensor([[*model.prompt_ids, 5, 6, 7]])
    with torch.no_grad():
        whole, none = model.decoder_logits(hidden, mask, ids)
        first, cache = model.decoder_logits(hidden, mask, ids[:, :4], use_cache=True)
        second, _ = model.decoder_logits(hidden, mask, ids[:, 4:], cache, use_cache=True)
    assert none is None and torch.allclose(whole, torch.cat([first, second], 1), atol=1e-4)


def test_text_trains_what_lies_below_the_frozen_decoder(hub_folder):
    model = Whisper.from_pretrained(hub_folder).requires_grad_(False)
    (hidden,), mask = model.encode(load_clip()[None, :16000])
    hidden = hidden.detach().requires_grad_()
    logits, _ = model.decoder_logits(hidden, mask, torch.tensor([[*model.prompt_ids, 5]]))
    logits[0, -1, 6].backward()
    assert hidden.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())


def test_prompts_of_both_kinds(folder):
    assert WhisperTokenizer(folder / "tokenizer.json").prompt_ids == [50258, 50259, 50359, 50363]
    try:
        english = WhisperTokenizer(local_folder("whisper-tiny.en") / "tokenizer.json")
    except MissingDependency as e:
        pytest.skip(str(e))
    assert english.prompt_ids == [50257, 50362] and english.eos_token_id == 50256


def test_words_are_cut_as_in_training(folder):
    "The file of whisper-base lacks the first merge of all, and every word that begins with t fell in two"
    tokenizer = WhisperTokenizer(folder / "tokenizer.json")
    ids = tokenizer.encode("The table that they took to the tone.")
    found = [tokenizer.tokenizer.id_to_token(i) for i in ids]
    assert found == ["Ġthe", "Ġtable", "Ġthat", "Ġthey", "Ġtook", "Ġto", "Ġthe", "Ġtone"]
    assert tokenizer.version.endswith("-50000")
    whole = dict(model=dict(vocab={"Ġt": 0}, merges=[["Ġ", "t"], ["Ġt", "h"]]))
    assert restore_first_merge(whole)["model"]["merges"] == [["Ġ", "t"], ["Ġt", "h"]]


def test_files_that_are_no_models(folder, tmp_path):
    data = (folder / "model.bin").read_bytes()
    for name, content in (
        ("half", data[: len(data) // 2]),
        ("empty", b""),
        ("version", b"\7\0\0\0" + data[4:100]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: truncated, or not a model of CTranslate2"):
            read_ctranslate2(tmp_path / name)


def test_a_long_recording_is_transcribed_in_parts(folder):
    whisper, clips = Whisper.from_pretrained("whisper-base"), list(Manifest(PACK))[:16]
    waves = [load(clip.audio) for clip in clips]
    recording = torch.cat([x for wave in waves for x in (wave, torch.zeros(SAMPLE_RATE // 2))])
    assert len(recording) > 40 * SAMPLE_RATE and len(split_at_silence(recording)) > 1
    apart, (whole,) = (
        " ".join(whisper.transcribe(wave[None])[0] for wave in waves),
        whisper.transcribe(recording[None]),
    )
    assert jiwer.wer(normalize_text(apart), normalize_text(whole)) < 0.1
