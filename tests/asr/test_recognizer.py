"Canary: rows are independent, training works, and NeMo archives are converted exactly"

import os
import tarfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from archives import (
    ENGLISH,
    GERMAN,
    SMALL,
    SPECIALS,
    TINY,
    pack,
    parts,
    random_canary,
    sentencepiece_model,
)
from small import prepare_clips

from diffuspeech.asr import nemo
from diffuspeech.asr.canary import CANARY_180M_FLASH, Canary, CanaryConfig, LogMelFeatures, repetition_length
from diffuspeech.data import text
from diffuspeech.data.audio import load_clip
from diffuspeech.tasks.asr import ASRTask
from diffuspeech.train.config import TrainConfig, load_preset
from diffuspeech.train.journal import history
from diffuspeech.train.loop import train


@pytest.fixture(scope="module")
def canary():
    return random_canary()


def rows(*sizes):
    wave = load_clip()
    waves = [wave[k * 3_000 : k * 3_000 + n] for k, n in enumerate(sizes)]
    return waves, torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), torch.tensor(sizes)


def test_rows_are_independent(canary):
    waves, batch, lengths = rows(20_000, 159, 7_777, 12_800, 1_281)
    everything = range(TINY.layers + 1)
    together, mask = canary.encode(batch, lengths, everything)
    garbage = batch.masked_fill(
        torch.arange(batch.shape[1]) >= lengths[:, None], 7.0
    )  # the padding has no effect
    assert torch.equal(canary.encode(garbage, lengths)[0][0], together[-1])
    for i, wave in enumerate(waves):
        alone, inside = canary.encode(wave[None], None, everything)
        assert inside.all() and mask[i].sum() == inside.shape[1]
        for a, b in zip(alone, together):
            assert (a[0] - b[i, mask[i]]).abs().max() < 1e-5
    assert canary.transcribe(batch, lengths) == [canary.transcribe(w[None])[0] for w in waves]
    assert canary.transcribe_ctc(batch, lengths) == [canary.transcribe_ctc(w[None])[0] for w in waves]


def test_layers_are_counted_from_the_subsampling(canary):
    _, batch, lengths = rows(9_000, 5_000)
    every, mask = canary.encode(batch, lengths, (0, 1, 2))
    assert torch.equal(canary.encode(batch, lengths, (-1, 0))[0][0], every[2]) and torch.equal(
        canary.encode(batch, lengths, (-3,))[0][0], every[0]
    )
    features, inside = canary.features(batch, lengths)
    assert torch.allclose(canary.model.encoder.subsampling(features, inside), every[0])
    for bad in (3, -4):
        with pytest.raises(ValueError, match=f"no {bad}$"):
            canary.encode(batch, lengths, (0, bad))


def test_features_equal_those_of_transformers():
    from transformers import ParakeetFeatureExtractor

    waves, batch, lengths = rows(20_000, 9_999)
    theirs = ParakeetFeatureExtractor(feature_size=128)(
        [w.numpy() for w in waves], sampling_rate=16_000, return_tensors="pt"
    )
    ours, mask = LogMelFeatures(128)(batch, lengths)
    assert torch.equal(theirs["attention_mask"][:, : mask.shape[1]].bool(), mask)
    assert (theirs["input_features"][:, : mask.shape[1]] - ours).abs().max() < 1e-3


def test_reasons_to_stop(canary):
    _, batch, lengths = rows(9_000, 5_000)
    model = random_canary()
    with torch.no_grad():
        model.output_bias[TINY.eos_token_id] = 100
        assert model.generate(batch, lengths) == ([[], []], ["end", "end"]) and model.transcribe(
            batch, lengths
        ) == ["", ""]
        model.output_bias[TINY.eos_token_id], model.output_bias[9] = 0, 100
        assert model.generate(batch, lengths, max_tokens_per_second=40) == ([[9], [9]], ["loop", "loop"])
        assert model.generate(batch, lengths, max_tokens_per_second=1) == ([[9] * 5, [9] * 5], ["cap", "cap"])
    assert (
        repetition_length([1, 2] + [3, 4, 5] * 4) == 9
        and not repetition_length([3, 4, 5] * 3)
        and not repetition_length([3] * 11)
    )


def test_ctc_has_two_outputs_per_frame():
    "A text with more characters than encoder frames can be aligned"
    model, wave = random_canary(), load_clip()[:32_000]
    (hidden,), mask = model.encode(wave[None])
    logp = model.ctc_log_probs(hidden)
    letters = torch.tensor(text.char_tokenizer.encode("forty two letters in two seconds are many"))
    assert mask.sum() == 25 < len(letters) < logp.shape[1] == 50
    assert torch.isfinite(
        F.ctc_loss(logp.transpose(0, 1), letters[None], torch.tensor([50]), torch.tensor([len(letters)]))
    )


def test_save_and_load(canary, tmp_path):
    _, batch, lengths = rows(9_000, 5_000)
    canary.save_pretrained(tmp_path / "a", score=1.0)
    again = Canary.from_pretrained(tmp_path / "a")
    assert (
        again.config == TINY
        and torch.equal(again.encode(batch, lengths)[0][0], canary.encode(batch, lengths)[0][0])
        and again.transcribe(batch, lengths) == canary.transcribe(batch, lengths)
    )
    canary.save_pretrained(tmp_path / "half", bf16=True)
    assert torch.equal(
        Canary.from_pretrained(tmp_path / "half").enc_to_dec_proj.weight,
        canary.enc_to_dec_proj.weight.bfloat16().float(),
    )
    (tmp_path / "a" / "pieces.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer"):
        Canary.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / "pieces.json").unlink()
    with pytest.raises(ValueError, match="diffuspeech convert .* -o FOLDER"):
        Canary.from_pretrained(tmp_path / "a")


def test_initialization_passes_the_signal():
    "transformers' own initialization leaves a millionth of the signal, which LayerNorm treats as zero"
    torch.manual_seed(0)
    (first,), _ = (
        Canary(CanaryConfig(layers=1, decoder_layers=1)).eval().encode(load_clip()[None], layers=(0,))
    )
    assert first.std(1).mean() > 1e-5**0.5


def test_the_size_of_the_paper():
    with torch.device("meta"):
        model = Canary(CANARY_180M_FLASH)
    assert (
        round(sum(p.numel() for p in model.parameters()) / 1e6) == 183
        and sum(p.numel() for p in model.parameters()) == 182_643_840
    )  # the model card rounds down to 182
    assert len(model.model.encoder.layers) == 17 and len(model.model.decoder.layers) == 4
    with pytest.raises(ValueError, match="no CTC head"):
        model.ctc_log_probs(None)


# Training


def test_both_losses_fall(tmp_path):
    shape = dict(
        hidden=48,
        layers=2,
        heads=2,
        ffn_dim=96,
        channels=8,
        decoder_hidden=48,
        decoder_layers=1,
        decoder_heads=2,
        decoder_ffn_dim=96,
        dropout=0.0,
    )
    prepare_clips(tmp_path, second=4, dev=4)
    run = TrainConfig(
        task="diffuspeech.tasks.asr:ASRTask",
        data=str(tmp_path),
        model=shape,
        options={"augment_after": 20},
        steps=40,
        lr=4e-3,
        warmup_steps=4,
        min_lr_ratio=0.5,
        ema_decay=0,
        precision="fp32",
        batch_seconds=20,
        seed=1,
        validate_every=1000,
        save_every=1000,
    )
    said = train(run, tmp_path / "run", device="cpu", progress_bar=False)
    log = history(tmp_path / "run")["train"]
    for name in ("loss", "ctc", "attention"):
        assert sum(log[name][-5:]) / 5 < 0.8 * sum(log[name][:3]) / 3, (name, log[name])
    assert {"score", "ctc", "attention", "wer", "wer_ctc", "no_eos"} <= said.keys() and said["score"] == said[
        "loss"
    ]
    assert Canary.from_pretrained(tmp_path / "run" / "model").config.hidden == 48


def test_the_preset():
    run, tokenizer = load_preset("recogniser"), load_preset("speech-tokens")
    assert run.seed != tokenizer.seed and run.options["split"] == "second" != tokenizer.options.get(
        "split", "train"
    )  # they share no data
    assert CanaryConfig(**run.model) == CanaryConfig() and run.task.endswith(f":{ASRTask.__name__}")


# NeMo's archive


def nemo_decoder(w, ids, memory, heads):
    "NeMo's decoder, from its description: interleaved positions, pre-norm, q and k each scaled by d**-1/4"
    norm = lambda x, n: F.layer_norm(x, x.shape[-1:], w[f"{n}.weight"], w[f"{n}.bias"])
    linear = lambda x, n: F.linear(x, w[f"{n}.weight"], w[f"{n}.bias"])

    def attend(x, y, n, causal):
        q, k, v = (
            linear(z, f"{n}.{kind}_net").unflatten(-1, (heads, -1)).transpose(1, 2)
            for z, kind in ((x, "query"), (y, "key"), (y, "value"))
        )
        scores = (q / q.shape[-1] ** 0.25) @ (k / k.shape[-1] ** 0.25).mT
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -1e4)
        return linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{n}.out_projection")

    at = torch.arange(ids.shape[1])[:, None] / 10000 ** (
        torch.arange(0, memory.shape[-1], 2) / memory.shape[-1]
    )
    positions = torch.zeros(ids.shape[1], memory.shape[-1])
    positions[:, 0::2], positions[:, 1::2] = at.sin(), at.cos()
    x = norm(
        w["transf_decoder._embedding.token_embedding.weight"][ids] + positions / memory.shape[-1] ** 0.5,
        "transf_decoder._embedding.layer_norm",
    )
    for k in range(sum(n.endswith("layer_norm_1.weight") for n in w)):
        layer = f"transf_decoder._decoder.layers.{k}."
        y = norm(x, layer + "layer_norm_1")
        x = x + attend(y, y, layer + "first_sub_layer", True)
        x = x + attend(norm(x, layer + "layer_norm_2"), memory, layer + "second_sub_layer", False)
        x = x + linear(
            linear(norm(x, layer + "layer_norm_3"), layer + "third_sub_layer.dense_in").relu(),
            layer + "third_sub_layer.dense_out",
        )
    return linear(norm(x, "transf_decoder._decoder.final_layer_norm"), "log_softmax.mlp.layer0")


@pytest.mark.parametrize("mode, start", [("w", "./"), ("w:gz", "")])
def test_a_converted_archive_computes_the_same(tmp_path, mode, start):
    model = random_canary(SMALL)
    settings, weights, others = parts(model)
    nemo.convert(pack(tmp_path / "some.nemo", settings, weights, others, mode, start), tmp_path / "out")
    again = Canary.from_pretrained(tmp_path / "out")
    assert replace(again.config, dropout=TINY.dropout) == SMALL
    _, batch, lengths = rows(20_000, 9_999)
    (a,), mask = model.encode(batch, lengths)
    (b,), _ = again.encode(batch, lengths)
    ids = torch.tensor([SMALL.prompt_ids + (30, 31, 32)]).expand(2, -1)
    with torch.no_grad():
        assert (a - b).abs().max() < 1e-6 and (
            model.decoder_logits(a, mask, ids)[0] - again.decoder_logits(b, mask, ids)[0]
        ).abs().max() < 1e-6
        theirs = nemo_decoder(
            weights,
            ids[:1],
            F.linear(b[:1], weights["encoder_decoder_proj.weight"], weights["encoder_decoder_proj.bias"]),
            SMALL.decoder_heads,
        )
        assert (
            again.decoder_logits(b, mask, ids)[0][:1] - theirs
        ).abs().max() < 1e-5  # mask[0] has no padding
    said = again.text_tokenizer.encode("The cat, in a hat")
    first = len(SPECIALS)
    assert (
        again.text_tokenizer.decode(said) == "the cat in a hat"
        and said[0] == first + ENGLISH.index("▁the")
        and all(first <= i < first + len(ENGLISH) for i in said)
    )
    assert (
        again.text_tokenizer.decode([*SMALL.prompt_ids, *said, SMALL.eos_token_id]) == "the cat in a hat"
        and len(again.text_tokenizer) == SMALL.vocab_size
    )


class Code:
    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return os.mkdir, (str(self.place),)


def link(name, to):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, to
    return info


def without(d, *keys):
    return {k: v for k, v in d.items() if k not in keys}


def deep(d, path, value):
    first, _, rest = path.partition(".")
    return d | {first: deep(d[first], rest, value) if rest else value}


Q = "encoder.layers.1.self_attn.linear_q.weight"
DAMAGE = {  # changes (settings, weights, others), and the message of the error
    "a path that climbs": (lambda s, w, o: (s, w, o | {"../evil": b"x"}), r"evil.* not a plain file"),
    "a path that starts at the root": (
        lambda s, w, o: (s, w, o | {"/etc/evil": b"x"}),
        r"evil.* not a plain file",
    ),
    "a link": (lambda s, w, o: (s, w, o | {"l": link("./l", "model_config.yaml")}), "not a plain file"),
    "no config": (lambda s, w, o: (None, w, o), "no model_config.yaml"),
    "no weights": (lambda s, w, o: (s, None, o), "no model_weights.ckpt"),
    "no tokenizer": (lambda s, w, o: (s, w, without(o, "e_tokenizer.model")), "no e_tokenizer.model"),
    "a config that is code": (
        lambda s, w, o: (b"!!python/object/apply:os.mkdir ['EVIL']", w, o),
        "not YAML of plain data",
    ),
    "a config that is no record": (lambda s, w, o: (b"- 1\n- 2\n", w, o), "prompt_format is None"),
    "a causal encoder": (
        lambda s, w, o: (deep(s, "encoder.causal_downsampling", True), w, o),
        "encoder.causal_downsampling is True",
    ),
    "norms after": (
        lambda s, w, o: (deep(s, "transf_decoder.config_dict.pre_ln", False), w, o),
        "pre_ln is False",
    ),
    "an interpolation": (
        lambda s, w, o: (deep(s, "encoder.d_model", "${model_defaults.asr_enc_hidden}"), w, o),
        r"encoder.d_model is '\$",
    ),
    "another size": (lambda s, w, o: (deep(s, "encoder.n_heads", 4), w, o), "pos_bias_u has shape"),
    "weights that are code": (
        lambda s, w, o: (s, w | {"x": Code(o["place"])}, without(o, "place")),
        "more than tensors",
    ),
    "weights that are noise": (
        lambda s, w, o: (s, None, o | {"model_weights.ckpt": b"noise" * 200}),
        "model_weights.ckpt is damaged",
    ),
    "weights that are a list": (lambda s, w, o: (s, [1, 2], o), "should hold tensors by name"),
    "a missing tensor": (lambda s, w, o: (s, without(w, Q), o), f"missing {Q}"),
    "a tensor too many": (
        lambda s, w, o: (s, w | {"encoder.layers.9.odd": torch.zeros(1)}, o),
        "unexpected encoder.layers.9.odd",
    ),
    "a wrong shape": (
        lambda s, w, o: (s, w | {Q: torch.zeros(3, 24)}, o),
        r"linear_q.weight has shape \(3, 24\)",
    ),
    "other positions": (
        lambda s, w, o: (s, w | {nemo.POSITIONS: w[nemo.POSITIONS] + 0.1}, o),
        "not interleaved sines and cosines",
    ),
    "two embeddings": (
        lambda s, w, o: (s, w | {nemo.OUTPUT_WEIGHT: w[nemo.OUTPUT_WEIGHT] + 0.1}, o),
        "is not the embedding",
    ),
    "another front end": (
        lambda s, w, o: (s, w | {"preprocessor.featurizer.window": torch.ones(400)}, o),
        "featurizer.window differs from what",
    ),
    "a tokenizer of another kind": (
        lambda s, w, o: (s, w, o | {"e_tokenizer.model": sentencepiece_model(ENGLISH, 1)}),
        "e_tokenizer.model: should be a SentencePiece model of kind BPE",
    ),
    "a tokenizer cut off": (
        lambda s, w, o: (s, w, o | {"e_tokenizer.model": sentencepiece_model(ENGLISH)[:-3]}),
        "not a SentencePiece model",
    ),
    "too few pieces": (
        lambda s, w, o: (s, w, o | {"d_tokenizer.model": sentencepiece_model(GERMAN[:-1])}),
        "head.num_classes=.* pieces",
    ),
    "no prompt": (
        lambda s, w, o: (
            s,
            w,
            o | {"s_tokenizer.model": sentencepiece_model([p.replace("nopnc", "pnc") for p in SPECIALS])},
        ),
        r"has no <\|nopnc\|>",
    ),
}


@pytest.fixture(scope="module")
def whole():
    return parts(random_canary(SMALL))


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_archive_is_an_error_of_one_line(tmp_path, whole, damage, message):
    place = tmp_path / "made by code"
    settings, weights, others = damage(
        *whole[:2], whole[2] | {"place": place} if message == "more than tensors" else whole[2]
    )
    with pytest.raises(ValueError, match=message) as caught:
        nemo.convert(pack(tmp_path / "bad.nemo", settings, weights, others), tmp_path / "out")
    assert "\n" not in str(caught.value) and "bad.nemo" in str(caught.value)
    assert not (tmp_path / "out").exists() and not place.exists() and not os.path.exists("EVIL")


def test_truncated_archives(tmp_path, whole):
    data = pack(tmp_path / "a.nemo", *whole).read_bytes()
    for name, kept in (
        ("half", data[: len(data) // 2]),
        ("start", data[:700]),
        ("empty", b""),
        ("no tar", b"hello" * 1000),
    ):
        (tmp_path / name).write_bytes(kept)
        with pytest.raises(
            ValueError, match="truncated, or not a tar archive|no model_config.yaml"
        ) as caught:
            nemo.convert(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no such file"):
        nemo.convert(tmp_path / "absent.nemo", tmp_path / "out")


def test_a_member_that_is_too_large(tmp_path, whole, monkeypatch):
    archive = pack(tmp_path / "a.nemo", *whole)
    monkeypatch.setitem(nemo.MAX_BYTES, "ckpt", 1000)
    with pytest.raises(ValueError, match="more than the limit of 1000"):
        nemo.convert(archive, tmp_path / "out")


def test_an_archive_may_lack_what_can_be_computed(tmp_path, whole):
    settings, weights, others = whole
    lean = without(
        weights,
        nemo.POSITIONS,
        nemo.OUTPUT_WEIGHT,
        "preprocessor.featurizer.fb",
        "preprocessor.featurizer.window",
    )
    nemo.convert(pack(tmp_path / "a.nemo", settings, lean, others), tmp_path / "out")
    assert torch.allclose(
        Canary.from_pretrained(tmp_path / "out").features.mel_filters,
        weights["preprocessor.featurizer.fb"][0],
    )
