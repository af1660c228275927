"NeMo's archive of a small Canary with random weights, written from NeMo's description alone"

import io
import struct
import tarfile
from dataclasses import replace

import torch
import yaml

from diffuspeech.asr import nemo
from diffuspeech.asr.canary import Canary, CanaryConfig

TINY = CanaryConfig(
    hidden=24,
    layers=2,
    heads=2,
    ffn_dim=48,
    channels=4,
    n_mels=40,
    decoder_hidden=32,
    decoder_layers=2,
    decoder_heads=4,
    decoder_ffn_dim=40,
    max_positions=64,
)


def random_canary(config=TINY, seed=0):
    "A network in which every parameter has an effect: no zero biases, no unit norms"
    torch.manual_seed(seed)
    model = Canary(config).eval()
    for name, t in model.state_dict().items():
        if t.is_floating_point() and not name.startswith("features."):
            t.copy_(
                torch.rand_like(t) + 0.5
                if name.endswith("running_var")
                else torch.randn_like(t) * (0.2 if t.ndim > 1 else 0.1)
                + ("norm" in name and name.endswith("weight"))
            )
    return model


SPECIALS = ["<unk>", "<|nospeech|>", "<pad>", "<|endoftext|>", *dict.fromkeys(nemo.PROMPT), "<|de|>", "▁"]


ENGLISH = ["<unk>", "th", "▁t", "▁a", "▁th", "▁the", "in", *"▁abcdefghijklmnopqrstuvwxyz'"]


GERMAN = ["<unk>", "en", "▁the", "ß"]


SMALL = replace(
    TINY,
    vocab_size=len(SPECIALS) + len(ENGLISH) + len(GERMAN),
    pad_token_id=2,
    eos_token_id=3,
    prompt_ids=tuple(map(SPECIALS.index, nemo.PROMPT)),
    ctc_upsampling=0,
)


def message(*pairs):
    "A protobuf message: text and messages, floats, small integers"
    out = b""
    for number, value in pairs:
        if isinstance(value, float):
            out += bytes([number << 3 | 5]) + struct.pack("<f", value)
        elif isinstance(value, int):
            out += bytes([number << 3, value])
        else:
            value = value.encode() if isinstance(value, str) else value
            out += (
                bytes([number << 3 | 2, len(value) % 128 | (128 if len(value) > 127 else 0)])
                + (bytes([len(value) // 128]) if len(value) > 127 else b"")
                + value
            )
    return out


def sentencepiece_model(pieces, kind=2):
    return b"".join(
        message(
            (
                1,
                message(
                    (1, p),
                    (2, -float(k)),
                    *([(3, 2)] if p == "<unk>" else [(3, 4)] if p.startswith("<") else []),
                ),
            )
        )
        for k, p in enumerate(pieces)
    ) + message((2, message((3, kind))))


def parts(model):
    "The content of this model's archive: settings, weights, other files"
    c = model.config
    settings = yaml.safe_load(f"""
        sample_rate: 16000
        prompt_format: canary2
        tokenizer:
          type: agg
          langs:
            spl_tokens: {{type: bpe, model_path: "nemo:s_tokenizer.model"}}
            en: {{type: bpe, model_path: "nemo:e_tokenizer.model"}}
            de: {{model_path: "nemo:d_tokenizer.model"}}
        preprocessor: {{sample_rate: 16000, normalize: per_feature, window_size: 0.025, window_stride: 0.01,
          window: hann, features: {c.n_mels}, n_fft: 512, log: true, frame_splicing: 1, dither: 1.0e-05}}
        encoder: {{feat_in: {c.n_mels}, feat_out: -1, n_layers: {c.layers}, d_model: {c.hidden},
          subsampling: dw_striding, subsampling_factor: {c.subsampling_factor},
          subsampling_conv_channels: {c.channels}, causal_downsampling: false, reduction: null,
          ff_expansion_factor: {c.ffn_dim // c.hidden}, self_attention_model: rel_pos, n_heads: {c.heads},
          att_context_size: [-1, -1], xscaling: false, untie_biases: true, conv_kernel_size: {c.kernel},
          conv_norm_type: batch_norm, conv_context_size: null}}
        transf_encoder: {{num_layers: 0}}
        transf_decoder:
          pre_ln_final_layer_norm: true
          config_dict: {{max_sequence_length: {c.max_positions}, learn_positional_encodings: false,
            hidden_size: {c.decoder_hidden}, inner_size: {c.decoder_ffn_dim},
            num_layers: {c.decoder_layers}, num_attention_heads: {c.decoder_heads}, hidden_act: relu,
            pre_ln: true}}
        head: {{num_layers: 1, num_classes: {c.vocab_size}}}""")
    back = nemo.deinterleave(c.decoder_hidden).argsort()
    weights = {
        nemo.nemo_name(n): nemo.reorder_channels(nemo.nemo_name(n), t, back).clone()
        for n, t in model.state_dict().items()
    }
    weights["preprocessor.featurizer.fb"] = weights["preprocessor.featurizer.fb"][None]
    weights[nemo.POSITIONS], weights[nemo.OUTPUT_WEIGHT] = (
        nemo.interleaved_positions(c.max_positions, c.decoder_hidden),
        weights[nemo.EMBEDDING].clone(),
    )
    return (
        settings,
        weights,
        {
            "s_tokenizer.model": sentencepiece_model(SPECIALS),
            "e_tokenizer.model": sentencepiece_model(ENGLISH),
            "d_tokenizer.model": sentencepiece_model(GERMAN),
            "s_vocab.txt": b"not read",
        },
    )


def pack(path, settings, weights, others, mode="w", start="./"):
    held = dict(others)
    if settings is not None:
        held["model_config.yaml"] = (
            settings if isinstance(settings, bytes) else yaml.safe_dump(settings, sort_keys=False).encode()
        )
    if weights is not None:
        file = io.BytesIO()
        torch.save(weights, file)
        held["model_weights.ckpt"] = file.getvalue()
    with tarfile.open(path, mode) as tar:
        for name, data in held.items():
            info = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(start + name)
            info.size = 0 if info is data else len(data)
            tar.addfile(info, None if info is data else io.BytesIO(data))
    return path
