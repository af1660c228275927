"Models from outside: what is wrong with config or weights is one clear error, quickly, in little memory"

import json
import math
import random
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffuspeech.base.checkpoint import Metadata, builtin_checkpoint, digest, read_config, read_metadata
from diffuspeech.models.decoder import DecoderConfig, SpeechDecoder
from diffuspeech.models.duration import DurationConfig, DurationPredictor
from diffuspeech.voice.codec import SpeechCodec
from diffuspeech.voice.flow import Flow, FlowConfig

SMALL = DecoderConfig(
    text_vocab_size=10,
    vector_dim=4,
    speech_vocab_size=12,
    dim=16,
    embedding_dim=8,
    encoder_layers=1,
    decoder_layers=1,
    heads=2,
    ffn_dim=16,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A small decoder in a folder, and its content"
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = SpeechDecoder(SMALL).eval()
    model.save_pretrained(folder)
    return model, folder


def copy_of(folder, target, **changes):
    "A copy of a model's folder with changed fields of config.json"
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def load_or_error(cls, folder):
    "A model, or one line that says why not; anything else that is raised fails the test"
    try:
        return cls.from_pretrained(folder), ""
    except ValueError as e:
        assert str(e) and "\n" not in str(e)
        return None, str(e)


BAD_VALUES = [
    0,
    -1,
    2**40,
    10**6,
    2**70,
    1.5,
    math.nan,
    math.inf,
    -math.inf,
    True,
    None,
    "16",
    "",
    [16],
    {},
    [[]],
]
SIZES = [name for name, value in vars(SMALL).items() if type(value) is int]


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_a_whole_number_that_fits_the_weights(saved, tmp_path, name):
    model, folder = saved
    for i, value in enumerate(BAD_VALUES):
        if value == getattr(SMALL, name) and type(value) is int:
            continue  # no change
        config = read_config(folder)["config"] | {name: value}
        copy = copy_of(folder, tmp_path / str(i), config=config, digest="")
        found, message = load_or_error(SpeechDecoder, copy)
        assert found is None, (name, value)
        assert name in message or any(
            words in message for words in ("config requires", "missing", "unexpected")
        )


@pytest.mark.parametrize("value", ["x", math.nan, math.inf, -1, True, None, [0.1], {}, 2])
def test_a_share_is_a_finite_number(saved, tmp_path, value):
    copy = copy_of(saved[1], tmp_path / "copy", config=read_config(saved[1])["config"] | {"dropout": value})
    assert "config.dropout=" in load_or_error(SpeechDecoder, copy)[1]


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "not JSON"),
        (b"[]", "format None"),
        (b"null", "format None"),
        (b'"a"', "format None"),
        (b"3", "format None"),
        (b"{}", "format None"),
        (b"[" * 50_000, "not JSON"),
        (b'{"diffuspeech": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b'{"diffuspeech": true}', "format True"),
        (b'{"diffuspeech": 1}', "model is missing"),
        (b'{"diffuspeech": 1, "model": "SpeechDecoder"}', "config is missing"),
        (b'{"diffuspeech": 1, "model": 3, "config": {}}', "model=3"),
        (b'{"diffuspeech": 1, "model": "SpeechDecoder", "config": []}', "config=.*should be a record"),
        (b'{"diffuspeech": 1, "model": "SpeechDecoder", "config": {}, "metadata": []}', "metadata="),
        (b'{"diffuspeech": 1, "model": "SpeechDecoder", "config": {}, "more": 1}', "more: no such field"),
    ],
)
def test_a_config_has_its_shape(saved, tmp_path, content, words):
    shutil.copytree(saved[1], tmp_path / "copy")
    (tmp_path / "copy" / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        SpeechDecoder.from_pretrained(tmp_path / "copy")


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.to(torch.int8), "of type int8"),
        (lambda t: t.bool(), "of type bool"),
        (lambda t: t.long(), "of type int64"),
        (lambda t: t.to(torch.complex64), "of type C64"),
        (lambda t: t.to(torch.float8_e4m3fn), "of type F8_E4M3"),
        (lambda t: t * math.nan, "not finite"),
        (lambda t: t + math.inf, "not finite"),
        (lambda t: t.double() * 1e300, "not finite"),
        (lambda t: t[:1], "shape"),
        (lambda t: t[None], "shape"),
        (lambda t: t.T, "shape"),
        (lambda t: t[:0], "shape"),
    ],
)
def test_weights_have_their_types_and_are_finite(saved, tmp_path, change, words):
    copy = copy_of(saved[1], tmp_path / "copy", digest="")
    weights = load_file(copy / "model.safetensors")
    name = next(n for n, t in weights.items() if t.ndim == 2 and t.shape[0] != t.shape[1])
    save_file(weights | {name: change(weights[name]).contiguous()}, copy / "model.safetensors")
    with pytest.raises(ValueError, match=words):
        SpeechDecoder.from_pretrained(copy)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_another_precision_is_converted(saved, tmp_path, dtype):
    copy = copy_of(saved[1], tmp_path / "copy", digest="")
    weights = {name: t.to(dtype) for name, t in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors")
    assert next(SpeechDecoder.from_pretrained(copy).parameters()).dtype == torch.float32


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    model = Flow(FlowConfig(dim=16, heads=2, ffn_dim=8, layers=1, encoder_layers=1))
    model.out_proj.bias.data[3] = math.nan
    with pytest.raises(ValueError, match="out_proj.bias holds values that are not finite"):
        model.save_pretrained(tmp_path / "flow")
    assert not (tmp_path / "flow" / "config.json").exists()


def same(model, other):
    "Whether two models give the same outputs"
    weights, others = model.state_dict(), other.state_dict()
    return model.config == other.config and all(torch.equal(weights[name], others[name]) for name in weights)


def places(value, at=()):
    "The places in a JSON value"
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed_json(content, draw):
    "A JSON value with one place changed, removed or named otherwise"
    content = json.loads(json.dumps(content))
    at = draw.choice([place for place in places(content) if place])
    inner = content
    for key in at[:-1]:
        inner = inner[key]
    what = draw.randrange(4)
    if what == 0:
        del inner[at[-1]]
    elif what == 1 and isinstance(inner, dict):
        inner[f"{at[-1]}x"] = inner.pop(at[-1])
    elif what == 2 and type(inner[at[-1]]) in (int, float):
        inner[at[-1]] = inner[at[-1]] * draw.choice([2, -1, 0.5, 1000, 10**9, 10**30]) + draw.choice([0, 1])
    else:
        inner[at[-1]] = draw.choice(BAD_VALUES)
    return content


def changed_bytes(data, draw):
    "Bytes with one to four of them changed, removed or put in"
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        i = draw.randrange(len(data))
        data[i : i + draw.choice([0, 1, 1, 3])] = bytes(
            draw.randrange(256) for _ in range(draw.choice([0, 1, 2]))
        )
    return bytes(data)


@pytest.mark.parametrize("digest_kept", [True, False])
def test_fuzz_of_configs_and_headers(saved, tmp_path, digest_kept):
    "1,000 mutations: an error, or a model that gives the same outputs, which only the digest can promise"
    model, folder = saved
    copy = copy_of(folder, tmp_path / "copy")
    draw = random.Random(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content = json.loads((copy / "config.json").read_text())
    content = content if digest_kept else {k: v for k, v in content.items() if k != "digest"}
    text, weights = json.dumps(content, indent=1), (copy / "model.safetensors").read_bytes()
    size = int.from_bytes(weights[:8], "little")
    header, rest = json.loads(weights[8 : 8 + size]), weights[8 + size :]
    errors = 0
    for i in range(500):
        new_text, new_weights = text.encode(), weights
        if i % 4 == 0:
            new_text = json.dumps(changed_json(content, draw)).encode()
        elif i % 4 == 1:
            new_text = changed_bytes(new_text, draw)
        elif i % 4 == 2:
            new_header = json.dumps(changed_json(header, draw)).encode()
            new_weights = len(new_header).to_bytes(8, "little") + new_header + rest
        else:
            new_weights = changed_bytes(weights[: 8 + size], draw) + rest
        (copy / "config.json").write_bytes(new_text)
        (copy / "model.safetensors").write_bytes(new_weights)
        found, _ = load_or_error(SpeechDecoder, copy)
        errors += found is None
        if found and (digest_kept and b'"digest"' in new_text):
            assert same(model, found), (i, new_text)
    assert errors > 300
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "more than a gigabyte"


def test_metadata_has_types(tmp_path):
    DurationPredictor(DurationConfig(text_vocab_size=8)).save_pretrained(
        tmp_path / "good", max_span=3, score=math.pi
    )
    assert read_metadata(tmp_path / "good") == Metadata(max_span=3)
    for name, value in (
        ("max_span", "3"),
        ("max_span", 0),
        ("tokens_per_piece", math.nan),
        ("tokens_per_piece", [1]),
        ("tokens_per_piece", -1),
        ("tokenizer", 5),
        ("vocoder", ["world"]),
        ("run", 3),
    ):
        DurationPredictor(DurationConfig(text_vocab_size=8)).save_pretrained(
            tmp_path / "bad", **{name: value}
        )
        with pytest.raises(ValueError, match=f"metadata.{name}="):
            read_metadata(tmp_path / "bad")


def test_a_codec_does_not_choose_what_is_downloaded(tmp_path, monkeypatch):
    import huggingface_hub

    for part, name in (("speech-tokens", "speech-tokens"), ("flow", "flow")):
        shutil.copytree(builtin_checkpoint(name), tmp_path / part)
    path = tmp_path / "flow" / "config.json"
    content = json.loads(path.read_text())
    content["metadata"]["vocoder"] = "somebody/a-vocoder"
    path.write_text(json.dumps(content))
    asked = []

    def snapshot_download(name, local_files_only=False, **options):
        asked.append((name, local_files_only))
        raise OSError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match="names the vocoder somebody/a-vocoder.*hf download"):
        SpeechCodec.from_pretrained(tmp_path)
    assert asked == [("somebody/a-vocoder", True)]


def test_digest_is_of_config_and_weights(saved):
    _, folder = saved
    content = read_config(folder)
    weights = folder / "model.safetensors"
    assert content["digest"] == digest("SpeechDecoder", content["config"], weights)
    assert content["digest"] != digest("SpeechDecoder", content["config"] | {"heads": 4}, weights)
