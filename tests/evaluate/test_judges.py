"More judges: phoneme errors by hand, tiny networks read strictly, absent judges by name, bad waves"

import json
import sys
import types
from importlib import metadata

import pytest
import torch

from diffuspeech.data import audio
from diffuspeech.data.audio import SAMPLE_RATE, import_torchaudio
from diffuspeech.evaluate import judges, metrics
from diffuspeech.evaluate.judges import (
    UNSUPPORTED,
    Dnsmos,
    FastConformer,
    Phonemes,
    Plcmos,
    Squim,
    Utmos,
    WavLM,
    per,
    raise_unsupported,
)
from diffuspeech.evaluate.metrics import Cache, MissingDependency, cosine

TEXT = "Please leave your message after the tone. When done, hang up or press the pound key."


@pytest.fixture(scope="module")
def clip():
    return audio.load_clip()


# Phonemes


@pytest.mark.parametrize(
    "said, heard, ins, dele, sub",
    [
        ("p l i z", "p l i z", 0, 0, 0),
        ("p l i z", "p l i z ə", 1, 0, 0),
        ("p l i z", "l i z", 0, 1, 0),
        ("p l i z", "b l i z", 0, 0, 1),
        ("p l i z", "", 0, 4, 0),
        ("d͡ʒ oʊ", "d ʒ oʊ", 1, 0, 1),  # an affricate is one phoneme, however many letters
    ],
)
def test_phoneme_errors_by_hand(said, heard, ins, dele, sub):
    e = per([said], [heard])
    assert [e.insertions.item(), e.deletions.item(), e.substitutions.item()] == [ins, dele, sub]
    assert (
        e.rate
        == pytest.approx((ins + dele + sub) / len(said.split()))
        == pytest.approx(sum(e.rates[k] for k in ("ins", "del", "sub")))
    )


def test_rates_are_of_the_table():
    e = per(["a", "b c d e f g h i j"], ["x", "b c d e f g h i j"])
    assert e.count.tolist() == [1, 0] and e.rate == pytest.approx(0.1)


def test_phonemes_that_cannot_be_counted():
    with pytest.raises(ValueError, match="reference 1 has no phonemes"):
        per(["a", " "], ["a", "b"])
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        per(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="put this one in a list"):
        per("p l i z", "p l i z")


def test_texts_are_read_as_bare_words(judge_or_skip):
    judge = judge_or_skip(Phonemes)
    assert (
        judge.phonemize(["hang up"])
        == judge.phonemize(["Hang up."])
        == judge.phonemize(["“HANG - up!”"])
        == ["h æ ŋ ʌ p"]
    )
    assert judge.phonemize(["don't"]) == judge.phonemize(["don’t"]) != judge.phonemize(["don t"])
    for bad, word in {"press 1": "digits", "...": "no words"}.items():
        with pytest.raises(ValueError, match=f"text 1 has {word}"):
            judge.phonemize(["fine", bad])


def test_transcript_of_the_clip(clip, judge_or_skip):
    judge = judge_or_skip(Phonemes)
    noise = torch.randn(len(clip), generator=torch.Generator().manual_seed(0)) * clip.std()
    heard = judge([clip, clip[:40000], clip + noise])
    said = judge.phonemize([TEXT])
    assert per(said, heard[:1]).rate < 0.15 < 0.4 < per(said, heard[2:]).rate
    assert heard[1] == judge([clip[:40000]])[0] and heard[1][:11] == heard[0][:11]
    assert judge([torch.full((100,), 0.1)]) == [""]  # too short for a phoneme: nothing is heard


# Quality


def test_dnsmos_is_the_package(clip, judge_or_skip):
    judge, clip = (
        judge_or_skip(Dnsmos),
        clip[: 5 * SAMPLE_RATE],
    )  # twice this is one window; a shorter one is repeated into many
    noisy = clip + 0.05 * torch.randn(len(clip), generator=torch.Generator().manual_seed(0))
    answers = judge([clip, noisy.clamp(-1, 1)])
    from speechmos import dnsmos

    package = dnsmos.run(clip.numpy(), SAMPLE_RATE)
    assert answers[0] == pytest.approx({k: float(v) for k, v in package.items()}) and set(answers[0]) == {
        "p808_mos",
        "sig_mos",
        "bak_mos",
        "ovrl_mos",
    }
    assert (
        answers[0]["p808_mos"] > answers[1]["p808_mos"] and answers[0]["bak_mos"] > answers[1]["bak_mos"] + 1
    )


def test_plcmos_is_deterministic(clip, judge_or_skip):
    judge = judge_or_skip(Plcmos)
    lost = clip.clone()
    for start in range(0, len(clip), 3200):
        lost[start : start + 960] = 0  # 60 ms of each 200 ms never came
    whole, gaps = judge([clip, lost])
    assert [whole, gaps] == judge([clip, lost]) and 1 < gaps < whole - 0.5 and whole < 5


@pytest.mark.parametrize("make", [Dnsmos, Plcmos], ids=lambda m: m.__name__)
def test_waves_beyond_one_are_refused(make, clip, judge_or_skip):
    judge = judge_or_skip(make)
    with pytest.raises(ValueError, match=r"wave 1 reaches 1\.500.*\.clamp"):
        judge([clip, 1.5 * clip / clip.abs().max()])


# Networks of torchaudio and of a wheel, random weights


@pytest.fixture(scope="module")
def squim_file(tmp_path_factory):
    import_torchaudio()
    from torchaudio.models import squim_objective_base

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("squim") / "squim_objective_dns2020.pth"
    torch.save(squim_objective_base().state_dict(), file)
    return file


def test_squim_reads_its_file(squim_file, clip):
    judge = Squim(squim_file)
    assert judge.name == f"SQUIM-torchaudio{metadata.version('torchaudio')}-{metrics.sha256(squim_file)[:8]}"
    short, shorter = clip[:SAMPLE_RATE], clip[: SAMPLE_RATE // 2]
    answers = judge([short, shorter])
    model = judges.load_weights(sys.modules["torchaudio"].models.squim_objective_base(), squim_file, "SQUIM")
    with torch.inference_mode():
        assert list(answers[0].values()) == [s.item() for s in model(short[None])]
    assert (
        list(answers[0]) == ["squim_stoi", "squim_pesq", "squim_si_sdr"]
        and answers[1] == judge([shorter])[0] != answers[0]
    )
    assert 0 < answers[0]["squim_stoi"] < 1 < answers[0]["squim_pesq"] < 5
    with pytest.raises(ValueError, match="wave 0 has 1000 samples, and SQUIM needs at least 1600"):
        judge([clip[:1000]])


def test_squim_refuses_other_files(squim_file, tmp_path):
    state = torch.load(squim_file, weights_only=True)
    lacking = {k: v for k, v in state.items() if k != "encoder.conv1d.weight"}
    for name, content in {
        "lacking": lacking,
        "extra": state | {"more": torch.ones(1)},
        "pickled": {"code": types.SimpleNamespace()},
    }.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "cut").write_bytes(squim_file.read_bytes()[:1000])
    for name, word in {"lacking": "encoder.conv1d.weight", "extra": "more", "pickled": "", "cut": ""}.items():
        with pytest.raises(ValueError, match=f"{name}: not the weights of SQUIM.*{word}"):
            Squim(tmp_path / name)


def test_squim_that_cannot_be_fetched_is_missing(monkeypatch, tmp_path, squim_file):
    import_torchaudio()
    from torchaudio import pipelines

    def no_network(self):
        raise OSError("no route")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(type(pipelines.SQUIM_OBJECTIVE), "get_model", no_network)
    with pytest.raises(
        MissingDependency, match="SQUIM: its weights could not be fetched.*squim_objective_dns2020.pth"
    ):
        Squim()
    with pytest.raises(MissingDependency, match="SQUIM: .*nothing.pth is not there"):
        Squim(tmp_path / "nothing.pth")
    there = tmp_path / "hub/torchaudio/models/squim_objective_dns2020.pth"
    there.parent.mkdir(parents=True)
    there.write_bytes(squim_file.read_bytes())
    assert Squim().name == Squim(squim_file).name


class FakeUtmos(torch.nn.Module):
    "What UTMOSModel is from outside: frames of one grade around 0"

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv1d(1, 1, 400, 320)

    def forward(self, wav, domains, judge_id):
        assert domains.tolist() == [0] and judge_id.tolist() == [288]
        return self.layer(wav).transpose(1, 2)


def test_utmos_reads_strictly_and_scales(monkeypatch, tmp_path, clip):
    module = types.ModuleType("utmos_pytorch.utmos_torch")
    module.UTMOSModel = FakeUtmos
    monkeypatch.setattr(judges, "require_package", lambda name, *about: module)
    monkeypatch.setattr(judges.metadata, "version", lambda name: "0")
    torch.manual_seed(0)
    state = FakeUtmos().state_dict()
    torch.save(
        state | {"feature_extractors.0.ssl_model.mask_emb": torch.ones(3)}, tmp_path / "utmos_state_dict.pt"
    )
    judge = Utmos(tmp_path / "utmos_state_dict.pt")
    frames = torch.nn.functional.conv1d(clip[None, None], state["layer.weight"], state["layer.bias"], 320)
    assert judge([clip]) == pytest.approx([frames.mean().item() * 2 + 3], abs=1e-5) and judge.name.startswith(
        "UTMOS22-strong-"
    )
    torch.save({"layer.weight": state["layer.weight"]}, tmp_path / "half.pt")
    with pytest.raises(ValueError, match="half.pt: not the weights of UTMOS.*layer.bias"):
        Utmos(tmp_path / "half.pt")
    with pytest.raises(MissingDependency, match="UTMOS: .*none.pt is not there"):
        Utmos(tmp_path / "none.pt")


def test_utmos_is_the_package(tmp_path, clip):
    original = pytest.importorskip("utmos_pytorch.utmos_torch", reason="UTMOS: pip install utmos-pytorch")
    torch.manual_seed(0)
    torch.save(original.UTMOSModel().state_dict(), tmp_path / "utmos_state_dict.pt")
    theirs = original.UTMOSScoreTorch(str(tmp_path / "utmos_state_dict.pt")).score(clip[:SAMPLE_RATE])
    assert Utmos(tmp_path / "utmos_state_dict.pt")([clip[:SAMPLE_RATE]]) == pytest.approx(
        theirs.tolist(), abs=1e-4
    )


# Networks of transformers, tiny


@pytest.fixture(scope="module")
def parakeet(tmp_path_factory):
    "A FastConformer of a few thousand parameters, with a processor"
    import_torchaudio()
    from tokenizers import Tokenizer, decoders, models
    from transformers import (
        ParakeetCTCConfig,
        ParakeetFeatureExtractor,
        ParakeetForCTC,
        ParakeetProcessor,
        ParakeetTokenizer,
    )

    torch.manual_seed(0)
    vocabulary = {"<unk>": 0} | {f"▁{c}": i for i, c in enumerate("abcdefgh", 1)} | {"<pad>": 9}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    processor = ParakeetProcessor(
        ParakeetFeatureExtractor(feature_size=16),
        ParakeetTokenizer(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"),
    )
    small = dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_mel_bins=16,
        subsampling_conv_channels=8,
        conv_kernel_size=3,
    )
    model = ParakeetForCTC(
        ParakeetCTCConfig(
            vocab_size=10,
            pad_token_id=9,
            encoder_config=small | dict(initializer_range=0.5),
            initializer_range=0.5,
        )
    )
    folder = tmp_path_factory.mktemp("parakeet") / "tiny-parakeet"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wavlm(tmp_path_factory):
    import_torchaudio()
    from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        num_buckets=16,
        conv_dim=(8,) * 7,
        tdnn_dim=(8, 8, 8, 8, 12),
        xvector_output_dim=6,
        classifier_proj_size=4,
    )
    folder = tmp_path_factory.mktemp("wavlm") / "tiny-wavlm"
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(folder)
    return folder


def test_fastconformer_is_transformers(parakeet, clip):
    judge = FastConformer(parakeet, batch_size=2)
    waves = [clip[:32000], clip[32000:48000], clip[:24000]]
    texts = judge(waves)
    assert judge.name.startswith(
        f"tiny-parakeet-{metrics.sha256(parakeet / 'model.safetensors')[:8]}-transformers"
    )
    from transformers import AutoProcessor, ParakeetForCTC

    processor, model = (
        AutoProcessor.from_pretrained(parakeet),
        ParakeetForCTC.from_pretrained(parakeet).eval(),
    )
    with torch.inference_mode():
        ids = model(**processor(waves[0].numpy(), sampling_rate=SAMPLE_RATE)).logits[0].argmax(-1).tolist()
    kept = [i for k, i in enumerate(ids) if i != 9 and (k == 0 or ids[k - 1] != i)]  # CTC by hand
    assert len(kept) > 1 and texts[0].split() == ["abcdefgh"[i - 1] for i in kept if i]
    assert texts == [judge([wave])[0] for wave in waves]  # whatever its neighbours are


def test_wavlm_is_transformers(wavlm, clip):
    judge = WavLM(wavlm)
    assert judge.min_samples == 5200  # 16 frames, of which two are left behind the last layer
    embeddings = judge([clip, clip[: judge.min_samples], clip])
    from transformers import WavLMForXVector

    with torch.inference_mode():
        expected = WavLMForXVector.from_pretrained(wavlm).eval()(clip[None]).embeddings
    assert torch.allclose(
        torch.tensor(embeddings[0]), torch.nn.functional.normalize(expected[0], dim=0), atol=1e-5
    )
    assert cosine(embeddings[:1], embeddings[2:]).item() == pytest.approx(1) and all(
        p == p for p in embeddings[1]
    )
    with pytest.raises(ValueError, match="wave 0 has 5199 samples, and WavLM needs at least 5200"):
        judge([clip[: judge.min_samples - 1]])


def test_half_a_network_is_refused(wavlm, parakeet, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(wavlm / "model.safetensors")
    (tmp_path / "config.json").write_text((wavlm / "config.json").read_text())
    with pytest.raises(MissingDependency, match="WavLM: .* holds no weights"):
        WavLM(tmp_path)
    save_file(
        {k: v for k, v in state.items() if k != "projector.weight"},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match="missing projector.weight"):
        WavLM(tmp_path)
    with pytest.raises(ValueError, match="holds a parakeet_ctc, and WavLM is a wavlm"):
        WavLM(parakeet)
    with pytest.raises(ValueError, match="holds a wavlm, and FastConformer is a parakeet_ctc"):
        FastConformer(wavlm)


# Absent


@pytest.mark.parametrize("make", [FastConformer, WavLM], ids=lambda m: m.__name__)
def test_a_hub_that_does_not_answer_is_named(make, monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")

    def no_hub(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(hub, "snapshot_download", no_hub)
    with pytest.raises(
        MissingDependency, match=f"{make.__name__}: .*/.* is no folder here, and could not be downloaded"
    ):
        make()
    with pytest.raises(
        MissingDependency, match=f"{make.__name__}: .*nowhere is no folder here, and no hub id"
    ):
        make(str(tmp_path / "nowhere"))


def test_a_hub_id_fetches_no_pickle_where_it_has_safetensors(wavlm, monkeypatch, clip):
    hub, asked = pytest.importorskip("huggingface_hub"), []
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda source, revision, allow_patterns: (
            asked.append((source, revision, allow_patterns)) or str(wavlm)
        ),
    )
    judge = WavLM("owner/model", revision="v1")
    assert judge.name.startswith("owner--model-") and "/" not in judge.name
    assert [a[:2] for a in asked] == [("owner/model", "v1")] and not any("bin" in p for p in asked[0][2])


@pytest.mark.parametrize(
    "make, needs",
    [(Phonemes, "hama"), (Dnsmos, "speechmos"), (Plcmos, "speechmos"), (Utmos, "utmos_pytorch")],
)
def test_absent_packages_are_named(make, needs, monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(
        MissingDependency, match=f"needs the package {needs}, which is not installed: pip install"
    ):
        make()


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_judges_name_an_alternative(name):
    with pytest.raises(MissingDependency, match=f"^{name}: .*Instead: "):
        raise_unsupported(name)
    with pytest.raises(ValueError, match=f"{name.lower()}.*known and missing: .*{name}"):
        raise_unsupported(name.lower())


@pytest.mark.parametrize("make", [Phonemes, Dnsmos, Plcmos], ids=lambda m: m.__name__)
def test_bad_waves_and_the_cache(make, tmp_path, clip, judge_or_skip):
    judge, cache = judge_or_skip(make), Cache(tmp_path)
    for bad, word in (
        (torch.zeros(16000), "silent"),
        (torch.ones(0), "empty"),
        (clip * torch.nan, "not finite"),
        (clip[None], "one-dimensional"),
    ):
        with pytest.raises(ValueError, match=f"wave 1.*{word}"):
            judge([clip, bad])
    short = clip[: 5 * SAMPLE_RATE]
    assert cache(judge, [short]) == judge([short]) == cache(judge, [short]) and [
        p.name for p in tmp_path.iterdir()
    ] == [judge.name]
    assert json.loads(next(tmp_path.rglob("*.json")).read_text()) == judge([short])[0]
