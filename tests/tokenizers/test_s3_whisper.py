"Speech tokens on top of Whisper: rows, windows, folders, and what is refused"

import json
import math
import shutil
from importlib.resources import files

import pytest
import torch
from small import save_random_s3_whisper, save_random_whisper
from torch.nn.utils.rnn import pad_sequence

from diffuspeech.asr.recognizer import load_asr
from diffuspeech.base.pretrained import MissingDependency, local_folder
from diffuspeech.data.audio import load_clip
from diffuspeech.data.manifest import Manifest, load_audio
from diffuspeech.tasks.speech import load_tokenizer, token_rate
from diffuspeech.tokenizers.s3 import load_builtin_tokenizer
from diffuspeech.tokenizers.s3_whisper import S3Whisper, S3WhisperConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    save_random_whisper(folder / "whisper")
    for rate in (50, 25):
        save_random_s3_whisper(folder / str(rate), folder / "whisper", rate)
    return folder


@pytest.mark.parametrize("rate", [50, 25])
def test_rows_are_independent(folder, rate):
    tokenizer, wave = S3Whisper.from_pretrained(folder / str(rate)), load_clip()
    some = [wave, wave[:30_000], wave[8_000:20_001], wave[:1]]
    sizes = torch.tensor([len(w) for w in some])
    together, counts = tokenizer.encode(pad_sequence(some, batch_first=True), sizes)
    assert counts.tolist() == [math.ceil(len(w) / 16000 * rate) for w in some]
    for w, row, n in zip(some, together, counts.tolist()):
        assert torch.equal(tokenizer.encode(w[None])[0][0], row[:n]) and (row[n:] == -1).all()
    assert len(together[0].unique()) > 10 and together.max() < tokenizer.vocab_size == 4096
    assert tokenizer.frame_rate == rate == 16000 / tokenizer.hop == token_rate(str(folder / str(rate)))


@pytest.mark.parametrize("rate", [50, 25])
def test_long_recordings_are_encoded_in_windows(folder, rate):
    "Each window with its context is what Whisper sees, and more than its 30 s can be encoded"
    tokenizer, wave = S3Whisper.from_pretrained(folder / str(rate)), load_clip().repeat(13)[: 33 * 16000]
    ids, counts = tokenizer.encode(wave[None])
    assert counts.tolist() == [33 * rate] and (ids >= 0).all()
    first, _ = tokenizer.encode(wave[None, : 24 * 16000])
    second, _ = tokenizer.encode(wave[None, 16 * 16000 :])
    assert torch.equal(ids[0], torch.cat([first[0, : 20 * rate], second[0, 4 * rate :]]))
    assert tokenizer.character_log_probs(ids[0].repeat(2)).shape[0] == 66 * rate
    assert isinstance(tokenizer.transcribe(wave[None, :16000])[0], str)


def test_a_folder_holds_what_was_trained(folder):
    tokenizer = load_builtin_tokenizer(folder / "50")
    assert isinstance(tokenizer, S3Whisper) and isinstance(load_tokenizer(str(folder / "50")), S3Whisper)
    assert not any(name.startswith("whisper") for name in tokenizer.state_dict())
    again, wave = S3Whisper.from_pretrained(folder / "50", load_asr(folder / "whisper")), load_clip()[None]
    assert torch.equal(tokenizer.encode(wave)[0], again.encode(wave)[0])
    assert again.version == tokenizer.version != load_builtin_tokenizer(folder / "25").version
    with torch.no_grad():
        again.ctc_encoder[0].out.bias += 1
        assert again.version == tokenizer.version, "layers above the quantizer do not determine the ids"
        again.encoder[0].out.bias += 1
    assert again.version != tokenizer.version and again.version.startswith("s3-whisper-")


def test_a_whisper_that_is_not_there_or_another_one(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no Whisper; load both"):
        S3Whisper(S3WhisperConfig()).encode(torch.zeros(1, 1600))
    with pytest.raises(ValueError, match="frame_rate=30: should be 25 or 50"):
        S3WhisperConfig(frame_rate=30)
    other = save_random_whisper(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="trained on the states of .*whisper [0-9a-f]{8}, and this one is"):
        S3Whisper.from_pretrained(folder / "50", load_asr(other))

    def renamed(name):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(folder / "50", tmp_path / "copy")
        path = tmp_path / "copy" / "config.json"
        content = json.loads(path.read_text())
        content["config"]["recogniser"], content["digest"] = str(name), ""
        path.write_text(json.dumps(content))
        return tmp_path / "copy"

    with pytest.raises(ValueError, match="reads the states of somebody/whisper, which is no folder here"):
        S3Whisper.from_pretrained(renamed("somebody/whisper"))
    with pytest.raises(ValueError, match="reads the states of .*/25, which is no Whisper|cannot be loaded"):
        S3Whisper.from_pretrained(renamed(folder / "25"))
    monkeypatch.setenv("DIFFUSPEECH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DIFFUSPEECH_OFFLINE", "1")
    with pytest.raises(MissingDependency, match="copy: reads the states of whisper-base, which cannot be"):
        S3Whisper.from_pretrained(renamed("whisper-base"))


def test_on_whisper_base():
    try:
        local_folder("whisper-base")
    except MissingDependency as e:
        pytest.skip(str(e))
    torch.manual_seed(0)
    tokenizer = S3Whisper(S3WhisperConfig(), load_asr("whisper-base")).eval()
    waves = [load_audio(u) for u in list(Manifest(files("diffuspeech") / "assets/pack/pack.jsonl"))[:3]]
    sizes = torch.tensor([len(w) for w in waves])
    together, counts = tokenizer.encode(pad_sequence(waves, batch_first=True), sizes)
    for w, row, n in zip(waves, together, counts.tolist()):
        assert (tokenizer.encode(w[None])[0][0] == row[:n]).float().mean() > 0.99
    assert sum(p.numel() for p in tokenizer.parameters()) * 2 < 8e6, "megabytes of a checkpoint"
