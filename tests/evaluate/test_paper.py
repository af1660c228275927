"The paper's size: its numbers, and its whole path on small fakes of what the hub holds"

import inspect
import json
import re
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from archives import SMALL, pack, parts, random_canary
from published import FLOW, HIFT, small_campplus
from small import prepare_clips
from tqdm import tqdm

from diffuspeech.asr.canary import CANARY_180M_FLASH, Canary, CanaryConfig
from diffuspeech.cli import main
from diffuspeech.data.audio import save
from diffuspeech.data.manifest import load_audio
from diffuspeech.diffusion.loss import diffusion_loss
from diffuspeech.evaluate.metrics import Cache, Judges
from diffuspeech.evaluate.reconstruct import default_systems, reconstruct_table
from diffuspeech.evaluate.report import SweepConfig
from diffuspeech.evaluate.systems import CodecOracle, Decoder, External
from diffuspeech.models.decoder import DecoderConfig
from diffuspeech.models.reconstructor import Reconstructor
from diffuspeech.tasks.decoder import DecoderOptions, read_options
from diffuspeech.tasks.speech import TasteOptions, build_model
from diffuspeech.tokenizers.public import import_s3tokenizer, tiny_tokenizer
from diffuspeech.tokenizers.quantize import QuantizerConfig
from diffuspeech.tokenizers.taste import TasteConfig
from diffuspeech.train.config import list_presets, load_preset
from diffuspeech.train.loop import train
from diffuspeech.train.plan import components, plan
from diffuspeech.voice.cosyvoice import CosyVoice
from diffuspeech.voice.cosyvoice_flow import CosyFlow
from diffuspeech.voice.hift import Hift

SAID = json.loads((files("diffuspeech") / "assets" / "paper" / "ddm_taste.json").read_text())["training"]
number = lambda text: float(re.search(r"\d[\d,.]*(e-?\d+)?", text)[0].replace(",", ""))


def test_the_presets_are_the_papers(tmp_path):
    "Each field of the training block"
    assert set(SAID) == {
        "gpus",
        "batch",
        "stage1",
        "stage2",
        "trainable_parameters",
        "optimizer",
        "learning_rate",
        "dropout",
        "rvq",
        "encoder_and_aggregator",
        "sampler",
        "dropout_swept",
        "speech_tokens",
        "objective",
    }, "a new field wants a line here"
    first, second = load_preset("paper-vectors"), load_preset("paper")
    taste = TasteOptions()
    assert (
        "last layer gives keys and values" in SAID["encoder_and_aggregator"]
        and taste.key_layer == taste.value_layer == -1
        and "taste" not in first.options
    )
    rows = default_systems(
        *(
            SimpleNamespace(
                decoder=SimpleNamespace(config=DecoderConfig(causal=causal)),
                taste=SimpleNamespace(config=TasteConfig()),
                duration=None,
                codec=None,
                encoder_only=False,
            )
            for causal in (False, True)
        )
    )
    assert (
        SAID["sampler"].startswith("Conf-TopK")
        and SweepConfig().rule == "conf_topk"
        and int(re.search(r"(\d+) steps", SAID["sampler"])[1]) in {row.steps for row in rows}
    )
    low, high = (float(x) / 100 for x in re.findall(r"\d+", SAID["dropout_swept"]))
    assert all(
        low <= load_preset(name).model.get("dropout", 0.0) <= high
        for name in ("paper-vectors", "paper", "ar-vectors", "ar", "ddm-vectors", "ddm")
    )
    assert (
        "without the ELBO weight" in SAID["objective"]
        and inspect.signature(diffusion_loss).parameters["weight"].default == "plain"
    )
    assert QuantizerConfig(kind="rvq").commitment_weight > 0 and "commitment" in SAID["objective"]
    assert first.batches_per_update == second.batches_per_update == number(
        SAID["gpus"]
    ) and first.batch_seconds == second.batch_seconds == number(SAID["batch"])
    assert (
        first.steps == number(SAID["stage1"]) * 1000
        and "without quantizer" in SAID["stage1"]
        and "quantizer" not in first.options.get("taste", {})
    )
    assert (
        second.steps == number(SAID["stage2"]) * 1000
        and "encoder frozen" in SAID["stage2"]
        and second.options["encoder"] == "frozen"
        and second.options["taste"]["quantizer"] == dict(kind="fsq", layers=4)
    )
    trained = sum(p.parameters for p in components(first) if p.trained)
    assert abs(trained / (number(SAID["trainable_parameters"]) * 1e6) - 1) < 0.05
    assert (
        SAID["optimizer"] == "Adam"
        and first.weight_decay == second.weight_decay == 0
        and first.betas == (0.9, 0.999)
    )
    high, warmup_steps, low = (
        float(x.replace(",", "")) for x in re.findall(r"[\d,]+e-\d+|\d+,\d+", SAID["learning_rate"])
    )
    for run in (first, second):
        assert (run.lr, run.warmup_steps, run.lr * run.min_lr_ratio) == (
            high,
            warmup_steps,
            pytest.approx(low),
        )
        assert run.model.get("dropout", 0.0) == SAID["dropout"]["DDM"] and not run.model["causal"]
    for name, diffusion in (("paper-ar-vectors", first), ("paper-ar", second)):
        twin, at = (
            load_preset(name),
            lambda options: json.dumps(options).replace("paper-ar-vectors", "paper-vectors"),
        )
        assert twin.model == diffusion.model | dict(causal=True, dropout=SAID["dropout"]["AR"]), (
            "the same network"
        )
        assert at(twin.options) == at(diffusion.options) and replace(
            twin, description="", model={}, options={}
        ) == replace(diffusion, description="", model={}, options={}), "the same training"
    assert (
        load_preset("ar").model["dropout"]
        == load_preset("ar-vectors").model["dropout"]
        == SAID["dropout"]["AR"]
        and load_preset("ddm").model.get("dropout", 0.0) == SAID["dropout"]["DDM"]
    )
    assert (
        first.options["recogniser"].endswith("canary-180m-flash")
        and "canary-180m-flash" in SAID["encoder_and_aggregator"]
        and first.options["encoder"] == "trained"
    )
    codes, size = map(int, re.findall(r"\d+", SAID["rvq"]))
    assert (QuantizerConfig(kind="rvq").codebook_size, QuantizerConfig(kind="rvq").codebook_dim) == (
        codes,
        size,
    )
    ids, rate = (
        float(x.replace(",", "")) for x in re.findall(r"([\d,]+) codes at (\d+) Hz", SAID["speech_tokens"])[0]
    )
    assert (FLOW.__class__().vocab_size, FLOW.__class__().frame_rate) == (ids, rate) and first.options[
        "tokenizer"
    ] == "paper"
    assert (DecoderOptions().condition_dropout, DecoderOptions().eos_padding) == (0.1, 0.5)
    for name in ("paper-vectors", "paper", "paper-ar-vectors", "paper-ar"):
        run = load_preset(name)
        off = (run.options["condition_dropout"], run.options["eos_padding"], run.ema_decay, run.max_grad_norm)
        assert off == (0, 0, 0, 0), "nothing of this is in the paper"


def test_the_plan():
    needs = plan(load_preset("paper-vectors"), gpus=32)
    assert (
        needs["fits"]
        and needs["audio_hours"] == round(100_000 * 32 * 375 / 3600)
        and 1 < needs["hours"] < 100
    )
    assert plan(load_preset("paper-vectors"), gpus=32, fsdp=True)["memory_gb"] < needs["memory_gb"]
    second = plan(load_preset("paper"), gpus=32)
    assert (
        second["parameters"] == pytest.approx(needs["parameters"], rel=0.02)
        and second["trained"] < needs["trained"]
    )
    for name in list_presets():
        if (
            name.startswith("paper") or name == "vocoder"
        ):  # that one is of convolutions, which the plan does not know
            continue
        needs = plan(load_preset(name))
        assert needs["fits"] and needs["trained"] <= needs["parameters"] < 1e8 and needs["memory_gb"] < 40, (
            name
        )


def test_the_whole_path_on_fakes(tmp_path, monkeypatch, capsys):
    "A NeMo archive is converted, both stages take two steps over CosyVoice's tokens, the result is judged"
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    try:
        import_s3tokenizer()
    except ImportError as e:
        pytest.skip(str(e))
    (tmp_path / "hub").mkdir()
    pack(tmp_path / "hub" / "canary-180m-flash.nemo", *parts(random_canary(SMALL)))
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda name, file: str(tmp_path / "hub" / file) if name == "nvidia/canary-180m-flash" else 1 / 0,
    )
    assert main(["convert", "nvidia/other", "-o", str(tmp_path / "canary")]) == 1
    assert "other.nemo could not be downloaded from the hub" in capsys.readouterr().err
    assert main(["convert", "nvidia/canary-180m-flash", "-o", str(tmp_path / "canary")]) == 0
    torch.manual_seed(0)
    CosyVoice(
        CosyFlow(FLOW),
        Hift(HIFT),
        tiny_tokenizer("s3", name="speech_tokenizer_v1", n_codebook_size=64),
        small_campplus(tmp_path / "campplus.onnx"),
    ).save_pretrained(tmp_path / "cosyvoice")
    clips = prepare_clips(tmp_path / "corpus", train=4, dev=2)
    small = dict(
        data=str(tmp_path / "corpus"),
        model=dict(
            dim=32, embedding_dim=16, ffn_dim=48, encoder_layers=1, decoder_layers=2, position_scale=9.4
        ),
        steps=2,
        warmup_steps=1,
        batch_seconds=10.0,
        batches_per_update=2,
        validate_every=2,
        save_every=2,
    )
    here = dict(
        tokenizer=str(tmp_path / "cosyvoice"),
        codec=str(tmp_path / "cosyvoice"),
        recogniser=str(tmp_path / "canary"),
    )
    first = load_preset("paper-vectors")
    train(replace(first, **small, options=first.options | here), tmp_path / "one", "cpu", progress_bar=False)
    encoder = [
        Canary.from_pretrained(f).model.encoder.state_dict()
        for f in (tmp_path / "canary", tmp_path / "one/model/recogniser")
    ]
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(*(e.values() for e in encoder))), (
        "the first stage trains the encoder"
    )
    second = load_preset("paper")
    train(
        replace(
            second,
            **small,
            options=second.options
            | here
            | dict(recogniser=str(tmp_path / "one/model/recogniser"), init_from=str(tmp_path / "one/model")),
        ),
        tmp_path / "two",
        "cpu",
        progress_bar=False,
    )
    assert not (tmp_path / "two/model/recogniser").exists(), "the second one does not"
    assert {path.name.split("-")[1] for path in (tmp_path / "two/samples").glob("*.wav")} == {
        "decoded",
        "oracle",
    }, "the samples of a validation are kept"
    model = Reconstructor.from_pretrained(
        tmp_path / "two/model", tmp_path / "cosyvoice", tmp_path / "one/model/recogniser"
    )
    with pytest.raises(ValueError, match="this model cannot transcribe"):
        model.transcribe([load_audio(clips[0])])
    with pytest.raises(ValueError, match="trained with the recogniser"):
        Reconstructor.from_pretrained(tmp_path / "two/model", tmp_path / "cosyvoice", tmp_path / "canary")
    model.require_quantizer("fsq4")
    with pytest.raises(ValueError, match="quantizer=rvq4: this model has fsq4"):
        model.require_quantizer("rvq4")

    class Judge:  # the real ones are tested in test_judges.py
        def __init__(self, answer):
            self.name, self.answer = f"constant-{type(answer).__name__}", answer

        def __call__(self, waves):
            return [self.answer] * len(waves)

    judges = Judges(dict(wer=Judge("the")), Judge(3.0), Judge([1.0, 0.0]))
    for u in clips:
        save(tmp_path / "theirs" / f"{u.id}.wav", load_audio(u))
    systems = [
        External("theirs", tmp_path / "theirs"),
        Decoder("DDM-4L-FSQ", model, steps=2),
        CodecOracle(model.codec, baseline="oracle"),
    ]
    rows = reconstruct_table(
        systems,
        clips,
        judges,
        mos_clips=2,
        cache=Cache(tmp_path / "judged"),
        progress=lambda **k: tqdm(disable=True, **k),
    )
    for r in rows:
        if r["system"] == "theirs":
            assert r["total_seconds"] is None and r["nfe"] is None and r["wer_over_oracle"] == 0
    assert (
        {r["system"] for r in rows} == {"S3-Oracle", "DDM-4L-FSQ", "theirs"}
        and all(r["wer"] > 0 for r in rows)
        and {r["nfe"] for r in rows if r["steps"]} == {2.0}
    )
    assert all(r["bitrate"] > 0 for r in rows if r["steps"])
    assert {
        "system",
        "split",
        "steps",
        "length_mode",
        "wer",
        "wer_low",
        "wer_high",
        "wer_over_oracle",
        "wer_over_ar",
        "distillmos",
        "spksim",
        "semitones",
        "f0_correlation",
        "duration_correlation",
        "decoder_seconds",
        "total_seconds",
        "nfe",
        "tokens_per_call",
        "runaways",
        "loops",
    } <= rows[-1].keys()


@pytest.mark.parametrize("name, dropout", [("ddm", 0.0), ("ar", 0.1), ("paper-vectors", 0.0)])
def test_one_dropout_everywhere(name, dropout):
    "The recogniser was trained with 0.1; what begins with its weights has the decoder's"
    run = load_preset(name)
    with torch.device("meta"):
        options, config = read_options(run), CanaryConfig() if name != "paper-vectors" else CANARY_180M_FLASH
        model = build_model(run.model, options.taste, Canary(config), 4096, options.encoder == "trained")
    trained = [model.taste.aggregator, model.decoder] + ([model.encoder] if model.encoder is not None else [])
    found = {
        float(p)
        for part in trained
        for m in part.modules()
        for p in (
            [m.p]
            if isinstance(m, torch.nn.Dropout)
            else [getattr(m, n, None) for n in ("dropout", "attention_dropout", "activation_dropout")]
        )
        if isinstance(p, float)
    }
    assert len(list(model.decoder.blocks)) == run.model.get("encoder_layers", 2) and all(
        block.drop.p == dropout for block in model.decoder.blocks
    )
    assert found == {dropout} and (model.encoder is not None) == (name == "paper-vectors")
