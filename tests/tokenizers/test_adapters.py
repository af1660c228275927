"Public tokenizers: shapes, rates, independent rows, saving and loading, and errors"

import json
import math
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("soundfile")

from safetensors.torch import load_file, save_file

from diffuspeech.data import audio
from diffuspeech.tokenizers.codecs import CodecTokenizer
from diffuspeech.tokenizers.public import (
    S3_HOPS,
    TOKENIZERS,
    S3Tokenizer,
    import_s3tokenizer,
    load_tokenizer,
    tiny_tokenizer,
)

try:
    import_s3tokenizer()
    no_s3 = None
except ImportError as e:
    no_s3 = str(e)

S3_ONE = dict(n_codebook_size=64)
EXAMPLES = {
    "s3 v1": ("s3", dict(name="speech_tokenizer_v1", **S3_ONE), {}),
    "s3 v1 slow": ("s3", dict(name="speech_tokenizer_v1_25hz", **S3_ONE), {}),
    "s3 v2": ("s3", {}, {}),
    "s3 v3": ("s3", dict(name="speech_tokenizer_v3_25hz"), {}),
    "mimi": ("mimi", {}, {}),
    "mimi two": ("mimi", {}, dict(num_codebooks=2)),
    "mimi one": ("mimi", {}, dict(num_codebooks=1)),
    "encodec": ("encodec", {}, dict(bandwidth=1.5)),
    "encodec one": ("encodec", {}, {}),
    "dac": ("dac", {}, {}),
    "dac two": ("dac", {}, dict(num_codebooks=2)),
    "dac odd": ("dac", dict(sampling_rate=44_100, downsampling_ratios=[2, 4, 8, 8]), {}),
    "xcodec": ("xcodec", {}, {}),
    "xcodec low": ("xcodec", {}, dict(bandwidth=0.5)),
    "xcodec2": ("xcodec2", {}, {}),
}
CODEBOOKS = {
    "mimi": 4,
    "mimi two": 2,
    "encodec": 4,
    "dac": 3,
    "dac two": 2,
    "dac odd": 3,
    "xcodec": 4,
    "xcodec low": 2,
}
RATES = {
    "s3 v1": 50,
    "s3 v1 slow": 25,
    "s3 v2": 25,
    "s3 v3": 25,
    "mimi": 12.5,
    "mimi two": 12.5,
    "mimi one": 12.5,
    "encodec": 75,
    "encodec one": 75,
    "dac odd": 44_100 / 512,
}


def make_adapter(name) -> CodecTokenizer:
    kind, config, options = EXAMPLES[name]
    if kind == "s3" and no_s3:
        pytest.skip(no_s3)
    return tiny_tokenizer(kind, options=options, **config)


@pytest.fixture(scope="module")
def tokenizers():
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = make_adapter(name)
        return cache[name]

    return get


@pytest.fixture(scope="module")
def batch():
    wave = audio.load_clip()
    return torch.stack(
        [wave[:16_000], wave[20_000:36_000], wave[40_000:56_000], wave[60_000:76_000]]
    ), torch.tensor([16_000, 9_137, 1, 0])


each = pytest.mark.parametrize("name", EXAMPLES)
decoding = pytest.mark.parametrize("name", [name for name in EXAMPLES if not name.startswith("s3")])


@each
def test_shapes_and_rates(name, tokenizers, batch):
    t = tokenizers(name)
    waves, lengths = batch
    ids, n = t.encode(waves, lengths)
    assert (
        t.num_codebooks == CODEBOOKS.get(name, 1)
        and t.frame_rate == RATES.get(name, 50) == t.sample_rate / t.hop
    )
    assert ids.dtype == n.dtype == torch.int64 and ids.shape == (
        4,
        n.max(),
        *([t.num_codebooks] if t.num_codebooks > 1 else []),
    )
    expected = [
        math.ceil(s / audio.SAMPLE_RATE * t.frame_rate - 0.5) for s in lengths.tolist()
    ]  # S3 drops a last half frame, the others pad it
    assert all(w <= got <= w + 1 for w, got in zip(expected, n.tolist())) and n[2] == 1 and n[3] == 0
    for row, length in zip(ids, n.tolist()):
        assert (
            (row[length:] == -1).all() and (row[:length] >= 0).all() and (row[:length] < t.vocab_size).all()
        )
    assert ids[0].unique().numel() > 3  # otherwise the tests of rows below would be trivial
    seconds = 5
    assert (
        abs(
            len(t.encode(audio.load_clip()[None, : seconds * audio.SAMPLE_RATE])[0][0]) / seconds
            - t.frame_rate
        )
        <= 1 / seconds
    )


@each
def test_rows_are_independent(name, tokenizers, batch):
    t = tokenizers(name)
    waves, lengths = batch
    ids, n = t.encode(waves, lengths)
    loud = waves.clone()
    for row, length in enumerate(lengths.tolist()):
        alone, m = t.encode(waves[row : row + 1, :length])
        assert m[0] == n[row] and torch.equal(alone[0], ids[row, : n[row]])
        loud[row, length:] = torch.nan
    assert torch.equal(t.encode(loud, lengths)[0], ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(t.encode(waves, lengths)[0], ids)
    t.train()
    assert not t.model.training and torch.equal(t.encode(waves, lengths)[0], ids)


@decoding
def test_round_trip(name, tokenizers, batch):
    t = tokenizers(name)
    waves, lengths = batch
    ids, n = t.encode(waves, lengths)
    back = t.decode(ids, n)
    assert (
        back.ndim == 2
        and torch.isfinite(back).all()
        and torch.equal(back, t.decode(ids))
        and back[0].abs().max() > 0
    )
    frame = audio.SAMPLE_RATE / t.frame_rate
    for row, (length, frames) in enumerate(zip(lengths.tolist(), n.tolist())):
        end = math.ceil(frames * frame)
        assert length <= end < length + frame + 1 and (back[row, end:] == 0).all()
        assert torch.equal(t.decode(ids[row : row + 1, :frames])[0], back[row, :end])
    behind = torch.cat([ids, torch.full_like(ids[:, :2], 10**6)], 1)
    assert torch.equal(t.decode(behind, n), back)  # given lengths end a row, whatever follows


@decoding
def test_refuses_invalid_ids(name, tokenizers):
    t = tokenizers(name)
    many = t.num_codebooks > 1
    ids = torch.zeros(2, 4, *([t.num_codebooks] if many else []), dtype=torch.long)
    at = (1, 2, t.num_codebooks - 1) if many else (1, 2)
    for bad in (t.vocab_size, -2, -1):
        wrong = ids.clone()
        wrong[at] = bad
        with pytest.raises(ValueError) as caught:
            t.decode(wrong, torch.tensor([4, 4]))
        assert f"ids holds {bad} at {at}; an id is from 0 to {t.vocab_size - 1}" in str(caught.value)
    hole = ids.clone()
    hole[1, 2] = -1
    with pytest.raises(ValueError, match=r"ids holds (-1|0) at \(1, [23]"):
        t.decode(hole)
    for wrong in (ids.float(), ids[0], ids[..., None], ids.bool()):
        with pytest.raises(ValueError, match="not integers of"):
            t.decode(wrong)
    with pytest.raises(ValueError, match="lengths holds 5 for row 0, which has 4 frames"):
        t.decode(ids, torch.tensor([5, 1]))
    assert t.decode(ids[:, :0]).shape == (2, 0)


def test_refuses_invalid_waves(tokenizers, batch):
    t = tokenizers("dac")
    waves, _ = batch
    for wrong in (waves[0], waves[None], (waves * 32_767).short(), waves.bool()):
        with pytest.raises(ValueError, match=r"not float of \(B, samples\) at 16000 Hz"):
            t.encode(wrong)
    for lengths, words in (
        (torch.tensor([1, 2]), "not one integer for each of 4 rows"),
        (torch.ones(4), "not one integer for each"),
        (torch.tensor([1, 1, 1, 16_001]), "16001 for row 3"),
        (torch.tensor([1, -1, 1, 1]), "-1 for row 1"),
    ):
        with pytest.raises(ValueError, match=words):
            t.encode(waves, lengths)
    waves = waves.clone()
    waves[2, 5] = torch.inf
    with pytest.raises(ValueError, match="not finite in row 2"):
        t.encode(waves)


def test_resamples_to_the_rate_of_the_model(tokenizers, batch):
    t = tokenizers("encodec")
    wave = batch[0][0]
    with torch.no_grad():
        want = (
            t.model.encode(audio.resample(wave, audio.SAMPLE_RATE, 24_000)[None, None], bandwidth=1.5)
            .audio_codes[0, 0]
            .T
        )
    assert torch.equal(t.encode(wave[None])[0][0], want)
    assert not torch.equal(
        t.model.encode(wave[None, None], bandwidth=1.5).audio_codes[0, 0].T[:10], want[:10]
    )


def test_fewer_codebooks_are_a_prefix(tokenizers, batch):
    for some, every in (("mimi two", "mimi"), ("dac two", "dac"), ("encodec one", "encodec")):
        a, b = tokenizers(some), tokenizers(every)
        ids = a.encode(*batch)[0]
        assert torch.equal(
            ids if ids.ndim == 3 else ids[..., None], b.encode(*batch)[0][..., : a.num_codebooks]
        )


def test_version_names_codebooks_and_weights():
    a, b, other = tiny_tokenizer("dac"), tiny_tokenizer("dac"), tiny_tokenizer("dac", seed=1)
    assert (
        a.version == b.version != other.version
        and a.version.startswith("dac-50hz-3x32-")
        and len(a.version.rsplit("-", 1)[1]) == 8
    )
    state = torch.get_rng_state()
    tiny_tokenizer("encodec", seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.requires_grad for p in a.parameters())


def test_cached_codebooks_follow_a_move(tokenizers, batch):
    t = make_adapter("mimi")
    t.encode(*batch)
    assert any(m._embed is not None for m in t.model.modules() if hasattr(m, "_embed"))
    t.to("cpu")
    assert all(m._embed is None for m in t.model.modules() if hasattr(m, "_embed"))


@pytest.mark.parametrize(
    "name", ["mimi two", "encodec", "dac", "xcodec", "xcodec2", "s3 v1", "s3 v2", "s3 v3"]
)
def test_save_and_load(name, tokenizers, batch, tmp_path):
    t = tokenizers(name)
    t.save_pretrained(tmp_path)
    again = load_tokenizer(f"{t.kind}:{tmp_path}", **EXAMPLES[name][2])
    assert (
        type(again) is type(t)
        and again.version == t.version
        and torch.equal(again.encode(*batch)[0], t.encode(*batch)[0])
    )
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    whole = file.read_bytes()
    gone = next(key for key in sorted(weights) if weights[key].ndim > 1)
    save_file({key: value for key, value in weights.items() if key != gone}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="lack|missing"):
        load_tokenizer(f"{t.kind}:{tmp_path}")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="did not load|truncated"):
        load_tokenizer(f"{t.kind}:{tmp_path}")


def test_refuses_invalid_folders(tokenizers, tmp_path):
    t = tokenizers("dac")
    t.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'dac', not 'mimi'"):
        load_tokenizer(f"mimi:{tmp_path}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 24_000}))
    with pytest.raises(ValueError, match="preprocessor_config.json has 24000 Hz, and config.json 16000 Hz"):
        load_tokenizer(f"dac:{tmp_path}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"sampling_rate": 16_000}))
    load_tokenizer(f"dac:{tmp_path}", num_codebooks=1)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"no \*.safetensors; pytorch_model.bin is a pickle, which is never read"
    ):
        load_tokenizer(f"dac:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_tokenizer(f"dac:{tmp_path}")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json"):
        load_tokenizer(f"dac:{tmp_path}")


def test_error_without_the_hub(monkeypatch):
    import huggingface_hub

    def nothing(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    with pytest.raises(ValueError) as caught:
        load_tokenizer("mimi:kyutai/mimi", num_codebooks=8)
    assert "\n" not in str(caught.value) and all(
        words in str(caught.value)
        for words in (
            "mimi:kyutai/mimi",
            "could not be downloaded from the hub (ConnectionError)",
            "mimi:path/to/folder",
        )
    )


def test_refuses_unknown_names_and_options(tokenizers):
    for name in ("snac:x/y", "kyutai/mimi", "mimi:", ""):
        with pytest.raises(ValueError, match="one of the kinds s3, mimi, encodec, dac, xcodec, xcodec2"):
            load_tokenizer(name)
    for kind, options, words in (
        ("mimi", dict(num_codebooks=5), "num_codebooks=5 must be from 1 to 4"),
        ("dac", dict(num_codebooks=0), "num_codebooks=0 must be from 1 to 3"),
        ("encodec", dict(bandwidth=2.0), "bandwidth=2.0 must be one of 0.375, 1.5, 3.0"),
        ("xcodec", dict(bandwidth=9), "bandwidth=9 must be one of"),
    ):
        with pytest.raises(ValueError, match=words):
            tiny_tokenizer(kind, options=options)


def test_refuses_an_option_of_another_kind(tokenizers, tmp_path):
    tokenizers("dac").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bandwidth"):
        load_tokenizer(f"dac:{tmp_path}", bandwidth=6.0)


def test_refuses_models_that_need_more_than_ids():
    for config in (dict(normalize=True), dict(audio_channels=2), dict(chunk_length_s=1.0, overlap=0.01)):
        with pytest.raises(ValueError, match="use the 24 kHz one"):
            tiny_tokenizer("encodec", **config)
    with pytest.raises(ValueError, match="frames of 160 samples, but its spectrogram has frames of 320"):
        tiny_tokenizer("xcodec2", downsampling_ratios=[2, 2, 2, 4, 5])
    with pytest.raises(
        ValueError, match="24000 Hz and 10.0 frames a second, but its strides make frames of 1920 samples"
    ):
        tiny_tokenizer("mimi", frame_rate=10.0)


s3 = pytest.mark.skipif(bool(no_s3), reason=str(no_s3))


@s3
def test_s3_has_no_decoder(tokenizers):
    with pytest.raises(ValueError, match="speech_tokenizer_v2_25hz has no decoder.*CosyVoice's flow"):
        tokenizers("s3 v2").decode(torch.zeros(1, 3, dtype=torch.long))


@s3
@pytest.mark.parametrize("name", ["s3 v1", "s3 v2", "s3 v3"])
def test_s3_encodes_more_than_its_window(name, tokenizers):
    wave = audio.load_clip().repeat(7)[None, : 35 * audio.SAMPLE_RATE]  # a window is 30 s
    t = tokenizers(name)
    ids, n = t.encode(wave)
    assert n[0] == 35 * t.frame_rate and torch.equal(
        ids[0, : int(20 * t.frame_rate)],
        t.encode(wave[:, : 30 * audio.SAMPLE_RATE])[0][0, : int(20 * t.frame_rate)],
    )


@s3
def test_s3_removes_the_empty_onnx():
    assert getattr(sys.modules.get("onnx"), "__file__", True)


@s3
def test_s3_files_and_names(tmp_path, monkeypatch):
    from diffuspeech.tokenizers import public

    with pytest.raises(
        ValueError, match="s3:whisper: no such folder or file, and not one of speech_tokenizer_v1, "
    ):
        load_tokenizer("s3:whisper")
    with pytest.raises(ValueError, match="neither config.json and model.safetensors, nor a speech_tokenizer"):
        load_tokenizer(f"s3:{tmp_path}")
    real = public._build_model
    monkeypatch.setattr(
        public,
        "_build_model",
        lambda name, **sizes: real(name, **(dict(n_audio_state=64, n_audio_head=1, n_audio_layer=1) | sizes)),
    )
    t = tiny_tokenizer("s3", n_mels=128)
    file = tmp_path / "speech_tokenizer_v2.pt"
    torch.save(t.model.state_dict(), file)
    for name in (file, tmp_path):  # CosyVoice's file or its folder
        assert load_tokenizer(f"s3:{name}").version == t.version
    torch.save({"encoder.conv1.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="missing, unexpected or of another shape: encoder.blocks"):
        load_tokenizer(f"s3:{file}")
    torch.save({"a": print}, file)
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        load_tokenizer(f"s3:{file}")
    unknown = tmp_path / "mine.pt"
    unknown.touch()
    with pytest.raises(ValueError, match="its name must be one of"):
        load_tokenizer(f"s3:{unknown}")


@s3
def test_s3_published_without_onnx_or_network(monkeypatch, tmp_path):
    from diffuspeech.tokenizers import public

    monkeypatch.setattr(public, "_require_onnx", lambda what: None)
    monkeypatch.setenv("HOME", str(tmp_path))

    def nothing(name, root):
        raise OSError("no route")

    monkeypatch.setattr(import_s3tokenizer(), "_download", nothing)
    with pytest.raises(ValueError) as caught:
        load_tokenizer("s3:speech_tokenizer_v2_25hz")
    assert (
        "\n" not in str(caught.value)
        and "could not be downloaded (OSError)" in str(caught.value)
        and "s3:path/to/folder" in str(caught.value)
    )
    monkeypatch.undo()
    if public.importlib.util.find_spec("onnx") is None:
        with pytest.raises(ImportError, match="pip install onnx"):
            load_tokenizer("s3:speech_tokenizer_v2_25hz")


@s3
def test_s3_refuses_an_invalid_config(tokenizers, tmp_path):
    tokenizers("s3 v2").save_pretrained(tmp_path)
    made = json.loads((tmp_path / "config.json").read_text())
    for wrong in (made | {"layers": 3}, made | {"name": "v9"}, {"n_mels": 80}):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match="not of an S3 tokenizer"):
            S3Tokenizer.from_pretrained(tmp_path)


def test_every_kind_is_tested():
    assert {kind for kind, _, _ in EXAMPLES.values()} == set(TOKENIZERS)
    assert {
        config.get("name", "speech_tokenizer_v2_25hz")
        for kind, config, _ in EXAMPLES.values()
        if kind == "s3"
    } == set(S3_HOPS)
