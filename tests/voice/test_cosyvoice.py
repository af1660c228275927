"""CosyVoice's flow, vocoder and loader: published names and shapes, lengths, independent rows, chunks.

The networks were compared with another implementation of the same architecture, which tests do not install:
chatterbox-tts 0.1.7 (MIT: encoder layers, estimator, Euler loop with guidance, HiFT, mel), at the published
sizes, with the same random weights loaded strictly by name; all 1,185 and 227 names and shapes are equal.
Largest differences in float32: encoder 7e-7 of 4.2, mu 1e-6 of 2.0, velocity 0 of 2.0, mel after 10 steps
1e-6 of 4.7, pitch 0 of 135, source 2e-6 of 0.14, wave 3e-7 of 0.068, mel analysis 6e-6 of 4.4."""

import os
import pickle

import pytest
import torch
from published import FLOW, HIFT, small_campplus

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("soundfile")

from diffuspeech.base.checkpoint import find_checkpoint
from diffuspeech.data import audio
from diffuspeech.tokenizers.public import import_s3tokenizer, tiny_tokenizer
from diffuspeech.tokenizers.quantize import seeded_rng
from diffuspeech.voice.cosyvoice import (
    CHUNK,
    CROSSFADE,
    FILE_PATTERNS,
    LEFT_CONTEXT,
    CosyVoice,
    SpeakerEncoder,
    load_published,
)
from diffuspeech.voice.cosyvoice_flow import CosyFlow, CosyFlowConfig, interpolate
from diffuspeech.voice.hift import Hift, HiftConfig, mel_frames


@pytest.fixture(scope="module")
def parts():
    with seeded_rng(torch.device("cpu"), 0, "test"):
        return CosyFlow(FLOW).eval(), Hift(HIFT).eval()


@pytest.fixture(scope="module")
def codec(parts):
    return CosyVoice(*parts)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(64, (3, 70), generator=torch.Generator().manual_seed(0))


# names and shapes of the published files, written independently of the code


def linear(name, into, out, bias=True):
    return {f"{name}.weight": (out, into)} | ({f"{name}.bias": (out,)} if bias else {})


def norm(name, size):
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def conv(name, into, out, kernel):
    return {f"{name}.weight": (out, into, kernel), f"{name}.bias": (out,)}


def normed(name, into, out, kernel, turned=False):
    "Weight norm: its size is that of the first dimension, which in a transposed convolution is the input"
    first, second = (into, out) if turned else (out, into)
    return {
        f"{name}.parametrizations.weight.original0": (first, 1, 1),
        f"{name}.parametrizations.weight.original1": (first, second, kernel),
        f"{name}.bias": (out,),
    }


def flow_table():
    want = (
        {"input_embedding.weight": (4096, 512)}
        | linear("spk_embed_affine_layer", 192, 80)
        | linear("encoder_proj", 512, 80)
    )
    want |= (
        linear("encoder.embed.out.0", 512, 512)
        | norm("encoder.embed.out.1", 512)
        | norm("encoder.after_norm", 512)
    )
    for i in range(6):
        at = f"encoder.encoders.{i}"
        for n in ("q", "k", "v", "out"):
            want |= linear(f"{at}.self_attn.linear_{n}", 512, 512)
        want |= linear(f"{at}.self_attn.linear_pos", 512, 512, bias=False) | {
            f"{at}.self_attn.pos_bias_{n}": (8, 64) for n in "uv"
        }
        want |= (
            linear(f"{at}.feed_forward.w_1", 512, 2048)
            | linear(f"{at}.feed_forward.w_2", 2048, 512)
            | norm(f"{at}.norm_ff", 512)
            | norm(f"{at}.norm_mha", 512)
        )
    for i in range(4):
        want |= conv(f"length_regulator.model.{3 * i}", 80, 80, 3) | norm(
            f"length_regulator.model.{3 * i + 1}", 80
        )
    want |= conv("length_regulator.model.12", 80, 80, 1)
    unet = "decoder.estimator"
    want |= linear(f"{unet}.time_mlp.linear_1", 320, 1024) | linear(f"{unet}.time_mlp.linear_2", 1024, 1024)
    places = [
        ("down_blocks.0", 320),
        ("down_blocks.1", 256),
        *((f"mid_blocks.{i}", 256) for i in range(12)),
        ("up_blocks.0", 512),
        ("up_blocks.1", 512),
    ]
    for place, into in places:
        at = f"{unet}.{place}"
        want |= linear(f"{at}.0.mlp.1", 1024, 256) | conv(f"{at}.0.res_conv", into, 256, 1)
        for block, wide in (("block1", into), ("block2", 256)):
            want |= conv(f"{at}.0.{block}.block.0", wide, 256, 3) | norm(f"{at}.0.{block}.block.1", 256)
        for j in range(4):
            want |= (
                norm(f"{at}.1.{j}.norm1", 256)
                | norm(f"{at}.1.{j}.norm3", 256)
                | linear(f"{at}.1.{j}.attn1.to_out.0", 512, 256)
            )
            for n in "qkv":
                want |= linear(f"{at}.1.{j}.attn1.to_{n}", 256, 512, bias=False)
            want |= linear(f"{at}.1.{j}.ff.net.0.proj", 256, 1024) | linear(f"{at}.1.{j}.ff.net.2", 1024, 256)
    want |= conv(f"{unet}.down_blocks.0.2.conv", 256, 256, 3) | conv(f"{unet}.down_blocks.1.2", 256, 256, 3)
    want |= conv(f"{unet}.up_blocks.0.2.conv", 256, 256, 4) | conv(f"{unet}.up_blocks.1.2", 256, 256, 3)
    return (
        want
        | conv(f"{unet}.final_block.block.0", 256, 256, 3)
        | norm(f"{unet}.final_block.block.1", 256)
        | conv(f"{unet}.final_proj", 256, 80, 1)
    )


def hift_table():
    want = (
        linear("m_source.l_linear", 9, 1)
        | normed("conv_pre", 80, 512, 7)
        | normed("conv_post", 128, 18, 7)
        | linear("f0_predictor.classifier", 512, 1)
    )
    for i in range(5):
        want |= normed(f"f0_predictor.condnet.{2 * i}", 512 if i else 80, 512, 3)
    want |= normed("ups.0", 512, 256, 16, turned=True) | normed("ups.1", 256, 128, 16, turned=True)
    want |= conv("source_downs.0", 18, 256, 16) | conv("source_downs.1", 18, 128, 1)
    blocks = [(f"resblocks.{3 * i + j}", 256 // 2**i, k) for i in range(2) for j, k in enumerate((3, 7, 11))]
    for at, wide, kernel in [*blocks, ("source_resblocks.0", 256, 7), ("source_resblocks.1", 128, 11)]:
        for j in range(3):
            want |= (
                normed(f"{at}.convs1.{j}", wide, wide, kernel)
                | normed(f"{at}.convs2.{j}", wide, wide, kernel)
                | {f"{at}.activations{n}.{j}.alpha": (wide,) for n in (1, 2)}
            )
    return want


@pytest.mark.parametrize(
    "made, table, tensors, parameters",
    [
        (lambda: CosyFlow(CosyFlowConfig()), flow_table, 1185, 104_874_752),
        (lambda: Hift(HiftConfig()), hift_table, 227, 20_460_591),
    ],
    ids=["flow", "hift"],
)
def test_published_names_and_shapes(made, table, tensors, parameters):
    with torch.device("meta"):
        model = made()
    have = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    assert (
        have == table() and len(have) == tensors and sum(p.numel() for p in model.parameters()) == parameters
    )


# lengths


@pytest.mark.parametrize("n", [1, 2, 3, 20, 40, 41, 50, 255, 256, 1024, 1500])
def test_frames_of_tokens(parts, n):
    assert parts[0].num_frames(n) == int(n / 50 * 22050 / 256)
    assert interpolate(torch.zeros(1, n, 4), parts[0].num_frames(n), parts[0].num_frames(20)).shape == (
        1,
        4,
        parts[0].num_frames(n),
    )


def test_chunks_are_whole_frames(parts):
    assert (
        all(parts[0].num_frames(LEFT_CONTEXT * k) == 441 * k for k in (1, 2, 3, 4))
        and CHUNK == 4 * LEFT_CONTEXT
        and CROSSFADE < 441
    )


@pytest.mark.parametrize("n", [1, 2, 7, 41, 70])
def test_a_token_is_320_samples(codec, ids, n):
    assert codec.decode(ids[:1, :n], steps=1).shape == (1, 320 * n)


@pytest.mark.parametrize("samples", [385, 512, 1000, 22050])
def test_mel_frames(samples):
    mel = mel_frames(torch.randn(samples, generator=torch.Generator().manual_seed(0)))
    assert mel.shape == (samples // 256, 80) and torch.isfinite(mel).all()


# independence of rows


def test_rows_are_independent(codec, ids):
    lengths = torch.tensor([70, 33, 0])
    together = codec.decode(ids, lengths, steps=2)
    for i, n in enumerate(lengths.tolist()):
        assert (together[i, n * 320 :] == 0).all()
        if n:
            wide = torch.full((1, 90), -1)
            wide[0, :n] = ids[i, :n]
            assert torch.equal(codec.decode(wide, steps=2)[0, : n * 320], together[i, : n * 320])


def test_seed_and_global_generator(codec, ids):
    one = codec.decode(ids[:1], steps=2)
    torch.manual_seed(7)
    assert torch.equal(one, codec.decode(ids[:1], steps=2))
    assert not torch.equal(one, codec.decode(ids[:1], steps=2, seed=1))


def test_guidance(parts, ids):
    flow = parts[0]
    with torch.no_grad():
        mu = flow.prior_mean(ids[:1], ids[:1, :0], 0)
        voice, zero = flow.embed_speaker(torch.ones(1, 192)), torch.zeros_like(mu)
        noise, net = (
            torch.randn(mu.shape, generator=torch.Generator().manual_seed(0)),
            flow.decoder["estimator"],
        )
        cond, uncond = (
            net(noise, mu, torch.zeros(1), voice, zero),
            net(noise, zero, torch.zeros(1), torch.zeros_like(voice), zero),
        )
        for w in (0.0, 0.7, 2.0):
            assert torch.allclose(
                flow.sample(mu, voice, zero, noise, 1, w), noise + cond + w * (cond - uncond), atol=1e-5
            )


def test_steps_go_from_zero_to_one(parts):
    flow, seen = parts[0], []
    handle = flow.decoder["estimator"].register_forward_pre_hook(
        lambda module, args: seen.append(args[2][0].item())
    )
    one = torch.zeros(1, 80, 8)
    flow.sample(one, torch.zeros(1, 80), one, one)
    handle.remove()
    assert seen == pytest.approx(
        [1 - torch.cos(torch.tensor(k * torch.pi / 20)).item() for k in range(10)], abs=1e-6
    )


# chunks


def test_source_is_the_sum_of_its_harmonics(parts):
    hift, pitch = parts[1], torch.tensor([[100.0, 130.0, 170.0, 5.0, 220.0]])
    offset, noise = (
        torch.linspace(-3, 3, 9)[None],
        torch.randn(1, 5 * 256, 9, generator=torch.Generator().manual_seed(0)),
    )
    each = pitch.repeat_interleave(256, 1).double()
    sines = 0.1 * torch.stack(
        [torch.sin(2 * torch.pi * h * each.cumsum(1) / 22050 + offset[:, h - 1]) for h in range(1, 10)], -1
    )
    voiced = (each > 10)[..., None]
    mixed = torch.where(voiced, sines + 0.003 * noise, 0.1 / 3 * noise).float()
    start_phase = torch.nn.functional.pad((pitch.double() * 256 / 22050).cumsum(1), (1, 0))[:, :-1]
    with torch.no_grad():
        assert torch.allclose(
            hift.source(pitch, start_phase, offset, noise)[0, 0],
            torch.tanh(hift.m_source["l_linear"](mixed))[0, :, 0],
            atol=1e-6,
        )


def test_vocoder_chunks_equal_the_whole(parts):
    hift, mel = parts[1], torch.randn(150, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # half of the frames voiced, so that both kinds of source are used
        weight = hift.f0_predictor["classifier"].weight
        kept, hift.f0_predictor["classifier"].weight.data = weight.data.clone(), weight.data * 1000
        pitch = hift.predict_f0(mel.mT[None])
        whole, apart = hift.synthesize(mel), [hift.synthesize(mel, chunk=n) for n in (37, 64, 149)]
        weight.data = kept
    assert 0.1 < (pitch > 10).float().mean() < 1 and whole.abs().max() > 1e-3
    assert all((one - whole).abs().max() < 1e-4 * whole.abs().max() for one in apart)


class Drifting(torch.nn.Module):
    "An estimator whose frames have the mean of the known ones, plus a half: each chunk differs from the last"

    def forward(self, x, mu, t, speaker, known):
        if t[0] == 0:
            inside = known[0].abs().sum(0) > 0
            self.velocity = (known[0][:, inside].mean() if inside.any() else 1.0) + 0.5 - x
        return self.velocity


def test_flow_chunks_are_continuous(parts):
    flow = CosyFlow(FLOW).eval()
    flow.decoder["estimator"] = Drifting()
    mel = CosyVoice(flow, parts[1]).features(torch.zeros(700, dtype=torch.long), steps=3, chunk=256)
    assert len(mel) == flow.num_frames(700)
    for i, (start, stop) in enumerate(
        ((0, 441 - CROSSFADE), (441, 882 - CROSSFADE), (882, len(mel)))
    ):  # each chunk continues the one before
        assert torch.allclose(mel[start:stop], torch.tensor(1.5 + 0.5 * i), atol=0.03)
    assert (mel[1:] - mel[:-1]).abs().max() < 0.5 / CROSSFADE  # in small steps


def test_a_chunk_depends_on_the_one_before(codec):
    ids = torch.randint(64, (600,), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:200] = (other[:200] + 1) % 64
    a, b = codec.features(ids, steps=2, chunk=256), codec.features(other, steps=2, chunk=256)
    assert (a[441:800] - b[441:800]).abs().max() > 1e-4  # through the prompt
    assert torch.equal(codec.features(ids[:256], steps=2), codec.features(ids[:256], steps=2, chunk=256))


def test_memory_is_that_of_a_chunk(codec):
    longest = []
    handle = codec.flow.decoder["estimator"].register_forward_pre_hook(
        lambda module, args: longest.append(args[0].shape[2])
    )
    codec.features(torch.zeros(1400, dtype=torch.long), steps=1, chunk=256)
    handle.remove()
    assert len(longest) == 6 and max(longest) == 2 * 441


# files


def published(folder, parts, old=True, prefix=""):
    flow, hift = parts
    torch.save(flow.state_dict(), folder / "flow.pt")
    names = (
        {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
        if old
        else {}
    )
    weights = {}
    for name, tensor in hift.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        weights[prefix + name] = tensor
    torch.save(weights, folder / "hift.pt")


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("prefix", ["", "generator."])
def test_both_names_of_weight_norm(tmp_path, parts, old, prefix):
    published(tmp_path, parts, old, prefix)
    for model, name, first in ((CosyFlow(FLOW), "flow.pt", parts[0]), (Hift(HIFT), "hift.pt", parts[1])):
        assert all(
            torch.equal(p, q)
            for p, q in zip(
                load_published(model, tmp_path / name).state_dict().values(), first.state_dict().values()
            )
        )


def test_folder_without_pickles(tmp_path, parts, codec, ids):
    codec.save_pretrained(tmp_path / "new")
    assert {p.name for p in (tmp_path / "new").rglob("*") if p.is_file()} == {
        "config.json",
        "model.safetensors",
    }
    assert torch.equal(
        CosyVoice.from_pretrained(tmp_path / "new").decode(ids, steps=1), codec.decode(ids, steps=1)
    )


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def corrupt_files(kind, folder, parts):
    "Write a bad flow.pt; the message of its error"
    path, weights = folder / "flow.pt", dict(parts[0].state_dict())
    name = "encoder.encoders.0.norm_ff.bias"
    torch.save(weights, path)
    if kind in ("truncated", "half"):
        path.write_bytes(path.read_bytes()[: 3000 if kind == "truncated" else path.stat().st_size // 2])
        return "truncated"
    if kind == "empty":
        path.write_bytes(b"")
        return "truncated"
    if kind == "text":
        path.write_text("<!DOCTYPE html>")
        return "truncated"
    if kind == "code":
        torch.save({"weight": Code()}, path)
        return "tensors alone"
    if kind == "raw pickle":
        path.write_bytes(pickle.dumps(Code()))
        return "tensors alone"
    if kind == "list":
        torch.save(list(weights.values()), path)
        return "not a dict of names"
    if kind == "missing":
        del weights[name]
    if kind == "extra":
        weights["surplus"] = torch.zeros(1)
    if kind == "shape":
        weights[name] = torch.zeros(7)
    if kind == "number":
        weights[name] = 7
    torch.save(weights, path)
    return {
        "missing": f"missing {name}",
        "extra": "unexpected surplus",
        "shape": rf"{name} has shape \(7,\); the config requires \(32,\)",
        "number": f"{name} has shape",
    }[kind]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "half",
        "empty",
        "text",
        "code",
        "raw pickle",
        "list",
        "missing",
        "extra",
        "shape",
        "number",
    ],
)
def test_bad_files(tmp_path, monkeypatch, parts, kind):
    monkeypatch.chdir(tmp_path)
    words = corrupt_files(kind, tmp_path, parts)
    with pytest.raises(ValueError, match=words) as e:
        load_published(CosyFlow(FLOW), tmp_path / "flow.pt")
    assert "flow.pt" in str(e.value) and "\n" not in str(e.value) and not (tmp_path / "ran").exists()


def test_missing_files(tmp_path, parts):
    published(tmp_path, parts)
    with pytest.raises(ValueError, match="no speech_tokenizer_v1.onnx"):
        CosyVoice.from_pretrained(tmp_path, FLOW, HIFT)
    with pytest.raises(ValueError, match="no flow.pt, hift.pt, speech_tokenizer_v1.onnx"):
        CosyVoice.from_pretrained(tmp_path / "..", FLOW, HIFT)
    with pytest.raises(ValueError, match="flow.pt"):
        load_published(CosyFlow(FLOW), tmp_path / "elsewhere" / "flow.pt")
    (tmp_path / "speech_tokenizer_v1.onnx").write_bytes(b"x")
    with pytest.raises(
        ValueError, match="flow.pt: "
    ):  # the published sizes do not match the small network in the file
        CosyVoice.from_pretrained(
            tmp_path,
            CosyFlowConfig(
                vocab_size=65,
                dim=32,
                heads=4,
                ffn_dim=64,
                layers=3,
                channels=(32, 32),
                num_blocks=1,
                num_mid_blocks=1,
            ),
            HIFT,
        )


@pytest.mark.parametrize("name", ["nothing", "/nowhere/at/all", "~/cosyvoice", "./here", "a/b/c", ""])
def test_no_such_folder(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    if name:
        with pytest.raises(ValueError, match="no such folder"):
            find_checkpoint(name, FILE_PATTERNS)
    else:
        with pytest.raises(ValueError, match="no flow.pt"):  # an empty name is the working directory
            CosyVoice.from_pretrained(name)


def test_downloads_only_what_is_used(monkeypatch, tmp_path):
    hub, asked = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed"), {}

    def snapshot(name, allow_patterns):
        asked[name] = allow_patterns
        return tmp_path

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert find_checkpoint("FunAudioLLM/CosyVoice-300M", FILE_PATTERNS) == tmp_path and set(asked) == {
        "FunAudioLLM/CosyVoice-300M"
    }
    assert {"flow.pt", "hift.pt", "speech_tokenizer_v1.onnx", "campplus.onnx"} <= set(asked.popitem()[1])


# ids


@pytest.mark.parametrize(
    "bad, words",
    [
        (torch.full((1, 3), 64), "ids holds 64 at"),
        (torch.tensor([[1, -2]]), "ids holds -2"),
        (torch.tensor([[1, -1, 1]]), "padding comes last"),
        (torch.zeros(3, dtype=torch.long), "not integers"),
        (torch.zeros(1, 3), "not integers"),
        (torch.zeros(1, 0, dtype=torch.long), "not integers"),
        (torch.zeros(1, 2, 1, dtype=torch.long), "not integers"),
    ],
)
def test_bad_ids(codec, bad, words):
    with pytest.raises(ValueError, match=words):
        codec.decode(bad)


def test_bad_arguments(codec, ids):
    with pytest.raises(ValueError, match="lengths="):
        codec.decode(ids, torch.tensor([70, 71, 3]))
    for options in (dict(steps=0), dict(chunk=300), dict(chunk=0)):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            codec.features(ids[0], **options)
    with pytest.raises(ValueError, match="reference has 1 waves, but ids 3 rows"):
        codec.decode(ids, reference=[torch.zeros(16_000)])
    with pytest.raises(ValueError, match="no campplus.onnx"):
        codec.decode(ids[:1], reference=[audio.load_clip()])
    with pytest.raises(ValueError, match="silent"):
        codec.decode(ids[:1], reference=[torch.zeros(16_000)])
    for call in (lambda: codec.encode(audio.load_clip()[None]), lambda: codec.version):
        with pytest.raises(ValueError, match="no tokenizer"):
            call()


# references


@pytest.fixture(scope="module")
def voiced(tmp_path_factory, parts):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    try:
        import_s3tokenizer()
    except ImportError as e:
        pytest.skip(str(e))
    return CosyVoice(
        *parts,
        tiny_tokenizer("s3", name="speech_tokenizer_v1", n_codebook_size=64),
        small_campplus(tmp_path_factory.mktemp("cosyvoice") / "campplus.onnx"),
    )


def test_reference(voiced, ids):
    wave = audio.load_clip()[:24_000]
    prompt_ids, prompt_mel, vector = voiced.prompt(wave)
    assert (
        prompt_ids.shape == (1, 75)
        and prompt_mel.shape == (1, 80, 1.5 * 22050 // 256)
        and vector.shape == (1, 192)
        and vector.abs().max() > 0
    )
    alone = voiced.decode(ids[:1], steps=2)
    one, other = (
        voiced.decode(ids[:2], reference=[wave, wave.flip(0)], steps=2),
        voiced.decode(ids[:1], reference=[wave.flip(0)], steps=2),
    )
    assert one.shape == (2, 70 * 320) and not torch.equal(one[:1], alone) and not torch.equal(one[:1], other)
    assert torch.equal(one[:1], voiced.decode(ids[:1], reference=[wave], steps=2))


def test_a_long_reference_is_cut(voiced):
    wave = audio.load_clip().repeat(8)[: 14 * 16_000]
    assert all(torch.equal(a, b) for a, b in zip(voiced.prompt(wave), voiced.prompt(wave[: 10 * 16_000])))


def test_encode_and_version(voiced, tmp_path):
    waves = torch.stack([audio.load_clip()[:16_000]] * 2)
    got, lengths = voiced.encode(waves, torch.tensor([16_000, 8_000]))
    assert (
        lengths.tolist() == [50, 25]
        and (got[1, 25:] == -1).all()
        and voiced.version.startswith("s3-50hz-1x64")
    )
    assert voiced.decode(got, lengths, steps=1).shape == (2, 16_000)
    voiced.save_pretrained(tmp_path)
    again = CosyVoice.from_pretrained(tmp_path)
    assert again.version == voiced.version and torch.equal(again.encode(waves)[0], voiced.encode(waves)[0])
    assert torch.equal(
        again.decode(got[:1, :20], reference=waves[:1], steps=1),
        voiced.decode(got[:1, :20], reference=waves[:1], steps=1),
    )


def test_bad_campplus(parts, voiced, tmp_path):
    wave = audio.load_clip()[:16_000]
    (tmp_path / "campplus.onnx").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="campplus.onnx: not an ONNX model") as e:
        SpeakerEncoder(tmp_path / "campplus.onnx")
    assert "\n" not in str(e.value)
    with pytest.raises(ValueError, match="has an output of 64 numbers, but the flow needs 192"):
        CosyVoice(*parts, voiced.tokenizer, small_campplus(tmp_path / "small.onnx", 64)).prompt(wave)
    with pytest.raises(ValueError, match="has 64 ids at 25 a second, but the flow needs 64 at 50"):
        CosyVoice(*parts, tiny_tokenizer("s3", name="speech_tokenizer_v1_25hz", n_codebook_size=64))
