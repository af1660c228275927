"Vocoders: what goes wrong in use, and agreement with other people's code"

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from small import prepare_clips, random_hifigan

from diffuspeech.base.pretrained import expand_home
from diffuspeech.data import audio
from diffuspeech.tasks.tokenizer import feature_stats, feature_weights
from diffuspeech.tasks.vocoder import Discriminators, VocoderTask, adversarial_losses, mel_distance
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.loop import train
from diffuspeech.train.task import Update, single_batch
from diffuspeech.voice import vocoder
from diffuspeech.voice.prepared import PreparedCorpus, prepare_corpus
from diffuspeech.voice.vocoder import (
    HOP,
    LOG_FLOOR,
    MAX_FRAMES,
    MEL_CONFIG,
    HifiGan,
    Mel,
    Vocos,
    VocosConfig,
    World,
    inverse_stft,
    load_vocoder,
    log10_mel,
    log_mel,
    split_points,
)

audio.import_torchaudio()
SMALL = dict(dim=16, layers=2, ffn_dim=32)


@pytest.fixture(scope="module")
def clip():
    return audio.load_clip()[:32000]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "Its features are mels, which the task does not need"
    folder = tmp_path_factory.mktemp("vocoder")
    prepare_clips(folder, train=6, dev=2, vocoder="mel")
    return folder


@pytest.fixture
def run(corpus):
    "Eight segments of 0.2 s in an update, discriminators from the second one on"
    return TrainConfig(
        "diffuspeech.tasks.vocoder:VocoderTask",
        str(corpus),
        SMALL,
        dict(frames=20, adversarial_after=1, channels=2),
        steps=4,
        lr=1e-3,
        warmup_steps=1,
        precision="fp32",
        batch_seconds=1.6,
        validate_every=2,
        save_every=2,
    )


@pytest.fixture(scope="module")
def vocos():
    "Random, and loud enough for differences to be seen"
    torch.manual_seed(0)
    model = Vocos(VocosConfig(**SMALL)).eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    return model


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1.0, 3.0])
def test_world_keeps_the_level(clip, scale):
    back = World().synthesize(World().analyze(scale * clip))
    assert abs(20 * torch.log10(back.std() / (scale * clip).std())) < 2


def test_world_is_deterministic(clip):
    a, b = World().analyze(clip), World().analyze(clip)
    assert torch.equal(a, b) and torch.equal(World().synthesize(a), World().synthesize(b))


def test_world_finds_and_makes_a_tone():
    at = torch.arange(16000, dtype=torch.float64) / 16000
    buzz = 0.02 * sum(torch.cos(2 * torch.pi * 123.0 * k * at) for k in range(1, 30)).float()
    for tracker in ("dio", "harvest", "both"):
        features = World(tracker=tracker).analyze(buzz)
        middle = features[20:80]
        assert (middle[:, -1] == 1).all() and (middle[:, -2].exp() - 123).abs().max() < 1
        features[:, -2] += np.log(1.5)
        again = World(tracker=tracker).analyze(World().synthesize(features))[20:80, -2].exp()
        assert (again - 184.5).abs().median() < 2


@pytest.mark.parametrize("samples", [1, 159, 160, 161, 1600])
def test_world_on_very_short_and_silent_waves(samples):
    for wave in (
        torch.zeros(samples),
        torch.full((samples,), 0.5),
        0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(samples)),
    ):
        features = World().analyze(wave)
        assert (
            features.shape == (samples // 160 + 1, 43)
            and features.dtype == torch.float32
            and features.isfinite().all()
        )
        back = World().synthesize(features)
        assert len(back) == 160 * len(features) and back.isfinite().all()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e30, float("nan"), float("inf")])
def test_world_survives_any_features(size):
    features = size * torch.randn(60, 43, generator=torch.Generator().manual_seed(0))
    assert World().synthesize(features).isfinite().all()


def test_bad_input_is_named(clip):
    for bad in (
        torch.zeros(2, 100),
        torch.zeros(100, dtype=torch.int16),
        torch.zeros(0),
        [0.0],
        torch.tensor([torch.inf]),
    ):
        with pytest.raises(ValueError, match="wave"):
            World().analyze(bad)
    for bad in (torch.zeros(0, 43), torch.zeros(43), torch.zeros(3, 42)):
        with pytest.raises(ValueError, match=r"\(frames, 43\)"):
            World().synthesize(bad)
    with pytest.raises(ValueError, match="tracker='yin'"):
        World(tracker="yin")


def test_rests_are_where_nothing_is_voiced():
    rng = np.random.default_rng(0)
    voiced, level = rng.random(10_000) < 0.9, rng.standard_normal(10_000)
    cuts = split_points(voiced, level)
    assert cuts[0] == 0 and cuts[-1] == 10_000 and not voiced[cuts[1:-1]].any()
    assert (
        all(MAX_FRAMES // 2 <= b - a <= MAX_FRAMES for a, b in zip(cuts, cuts[1:-1]))
        and cuts[-1] - cuts[-2] <= MAX_FRAMES
    )
    assert (
        split_points(np.ones(7000, bool), np.zeros(7000))[-1] == 7000
    )  # voiced throughout: cut all the same
    assert split_points(voiced[:MAX_FRAMES], level[:MAX_FRAMES]) == [0, MAX_FRAMES]


def test_pieces_are_as_loud_as_the_whole(clip):
    "Frame by frame, pieces and one whole are the same speech"
    world = World()
    features = world.analyze(audio.load_clip()).repeat(6, 1)
    pieces = world.synthesize(features)
    whole = torch.from_numpy(world._synthesize_chunk(features.double().numpy())).float()
    a, b = (audio.log_mel(x, n_mels=40).clamp_min(-12) for x in (pieces, whole))
    cut = split_points((features[:, -1] > 0.5).numpy(), features[:, 0].numpy())[1]
    assert (a - b)[:, cut - 20 : cut + 20].abs().mean() < 2 * (a - b)[
        :, cut + 100 : cut + 500
    ].abs().mean() + 0.3


def test_long_features_take_little_memory():
    program = (
        "import resource, torch; from diffuspeech.voice.vocoder import World; w = World()\n"
        "f = torch.zeros(2, 43); w.synthesize(f)\n"
        "f = torch.zeros(12000, 43); f[:, :40] -= 1; f[:, -2], f[:, -1] = 4.5, 1; f[::500, -1] = 0\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); w.synthesize(f); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 120  # MB for two minutes; at once it is about 200


def test_mel_is_that_of_speecht5(clip):
    from transformers import SpeechT5FeatureExtractor

    theirs = SpeechT5FeatureExtractor()(audio_target=clip.numpy(), sampling_rate=16000, return_tensors="pt")[
        "input_values"
    ][0]
    ours = log10_mel(clip, 256)
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 2e-3


def test_hifigan_from_a_folder_and_from_nowhere(tmp_path, clip, monkeypatch):
    model = random_hifigan()
    model.save_pretrained(tmp_path / "m")
    one, two = HifiGan(model), HifiGan(tmp_path / "m")
    assert one.mel == two.mel == MEL_CONFIG and one.frame_rate == 100.0
    assert torch.equal(one.synthesize(one.analyze(clip)), two.synthesize(two.analyze(clip)))
    assert len(one.synthesize(one.analyze(clip))) == 160 * (len(clip) // 160 + 1)
    assert one.synthesize(torch.full((5, 80), torch.nan)).isfinite().all() and one.analyze(
        clip[:3]
    ).shape == (1, 80)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # a network that is absent, without waiting for it
    for nowhere, words in (
        ("nobody/nothing-here", "nobody/nothing-here: no HiFi-GAN could be loaded"),
        (tmp_path, "no HiFi-GAN could be loaded"),
    ):
        with pytest.raises(ValueError, match=words):
            HifiGan(nowhere)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(
        json.dumps(config | dict(resblock_kernel_sizes=[3, 5], resblock_dilation_sizes=[[1], [1]]))
    )
    with pytest.raises(ValueError, match="these weights do not match"):
        HifiGan(tmp_path / "m")


def test_the_inverse_transform_gives_the_wave_back(clip):
    "Also its last samples, under which only one or two windows lie"
    bins = torch.arange(vocoder.WINDOW // 2 + 1)
    hann = torch.hann_window(vocoder.WINDOW, dtype=torch.float64)
    spectrum = torch.stft(clip.double(), vocoder.WINDOW, HOP, window=hann, return_complex=True).T[None]
    log_amplitude = spectrum.abs().clamp_min(1e-30).log()
    back = inverse_stft(log_amplitude, spectrum.angle() + torch.pi * bins)[
        0
    ]  # phase from the window's center
    assert len(back) == HOP * (len(clip) // HOP + 1) and (back[: len(clip)] - clip).abs().max() < 1e-5


def test_mel_of_any_batch_and_type(clip):
    rows = torch.stack([clip, -clip, 0 * clip])
    mel = log_mel(rows)
    assert mel.shape == (3, len(clip) // HOP + 1, 80) and torch.allclose(
        mel[0], Mel().analyze(clip), atol=1e-3
    )
    assert torch.allclose(mel[0], mel[1], atol=1e-4) and torch.allclose(mel[2], torch.tensor(LOG_FLOOR))
    louder = log_mel(10 * clip) - mel[0]
    assert louder[mel[0] > LOG_FLOOR + 1].sub(np.log(10)).abs().max() < 1e-3, (
        "a natural logarithm of amplitude"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(log_mel(rows), mel), "not rounded where a network's layers are"


def test_a_flow_on_mels_weighs_all_bands_alike(corpus):
    "The weights were made for features of WORLD that hardly move; none of the bands is one"
    prepared = PreparedCorpus(corpus / "prepared" / "train")
    assert prepared.vocoder == "mel" and prepared.batch([0]).features.shape[2] == 80
    assert (feature_weights(feature_stats(prepared)[1]) == 1).all()


def test_mel_has_no_network():
    with pytest.raises(ValueError, match="folder of a trained one"):
        Mel().synthesize(torch.zeros(5, 80))


@pytest.mark.parametrize("frames", [1, 2, 30, 137])
def test_vocos_makes_a_hop_for_each_frame(vocos, frames):
    mel = torch.randn(frames, 80, generator=torch.Generator().manual_seed(0))
    assert vocos.synthesize(mel).shape == (HOP * frames,)
    assert vocos.synthesize(mel).isfinite().all() and vocos.synthesize(torch.nan * mel).isfinite().all()
    assert vocos.synthesize(1e30 * mel).abs().max() < 1e3, "amplitudes are limited"


def test_vocos_in_chunks_is_the_whole(vocos, monkeypatch):
    mel = torch.randn(200, 80, generator=torch.Generator().manual_seed(0)) - 4
    whole = vocos.synthesize(mel)
    for size in (50, 33, 1):
        monkeypatch.setattr(vocoder, "MAX_FRAMES", size)
        assert torch.allclose(vocos.synthesize(mel), whole, atol=1e-5), size


def test_vocos_begins_with_the_amplitudes_of_the_mel(clip):
    "Without training the spectrum is already near, since the bands are inverted and not learned"
    torch.manual_seed(0)
    model, mel = Vocos(VocosConfig(**SMALL)).eval(), log_mel(clip)
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        distance = (log_mel(model(mel[None])[0, : len(clip)]) - mel).abs().mean()
    assert distance < 0.6 and (mel - mel.mean(0)).abs().mean() > 1


def test_rows_of_vocos_are_independent(vocos):
    mel = torch.randn(3, 40, 80, generator=torch.Generator().manual_seed(0)) - 4
    assert torch.allclose(vocos(mel)[1], vocos(mel[1:2])[0], atol=1e-5)


def test_vocos_is_found_by_its_folder(vocos, tmp_path, clip):
    vocos.save_pretrained(tmp_path / "v")
    for made_once in (vocoder.mel_transform, vocoder.mel_inverse):
        made_once.cache_clear()  # a process's first call is on the meta device, where sizes are checked
    again = load_vocoder(str(tmp_path / "v"))
    assert isinstance(again, Vocos) and again.features == Mel().features == load_vocoder("mel").features
    assert torch.equal(again.synthesize(again.analyze(clip)), vocos.synthesize(vocos.analyze(clip)))
    random_hifigan().save_pretrained(tmp_path / "h")
    assert isinstance(load_vocoder(str(tmp_path / "h")), HifiGan) and load_vocoder("world").name == "world"


def test_a_corpus_names_the_features_and_not_the_network(corpus, vocos, tmp_path):
    vocos.save_pretrained(tmp_path / "v")
    made = PreparedCorpus(
        prepare_corpus(
            corpus / "dev.jsonl", tmp_path / "p", speed_copies=0, vocoder=str(tmp_path / "v"), workers=1
        )
    )
    known = PreparedCorpus(corpus / "prepared" / "dev")
    assert made.vocoder == known.vocoder == "mel"
    assert torch.equal(made.batch([0]).features, known.batch([0]).features)


def test_vocos_sizes_are_checked():
    with pytest.raises(ValueError, match="kernel=6 must not be even"):
        VocosConfig(kernel=6)


def test_each_loss_reaches_its_own_side():
    torch.manual_seed(0)
    judges, real = Discriminators(2), 0.1 * torch.randn(3, 3200)
    made = (0.1 * torch.randn(3, 3200)).requires_grad_()
    weights = list(judges.parameters())
    parts = adversarial_losses(judges, real, made)
    assert all(part.shape == (3,) for part in parts.values())
    for name, part in parts.items():
        wave, *rest = torch.autograd.grad(part.sum(), [made, *weights], retain_graph=True, allow_unused=True)
        if name == "discriminator":
            assert wave is None and all(g is not None for g in rest)
        else:
            assert wave.abs().sum() > 0 and all(g is None for g in rest)


def test_losses_of_discriminators_that_are_right_and_wrong():
    "Least squares of scores 1 and 0; nothing to match where the waves are the same"

    class Constant(torch.nn.Module):
        def forward(self, wave):
            return [[wave[:, None], (wave.mean(1, keepdim=True) > 0).float()]]

    one, two = torch.ones(2, 8), -torch.ones(2, 8)
    right, wrong, same = (adversarial_losses(Constant(), *x) for x in ((one, two), (two, one), (one, one)))
    assert right["discriminator"].tolist() == [0, 0] and wrong["discriminator"].tolist() == [2, 2]
    assert right["generator"].tolist() == [1, 1] and wrong["generator"].tolist() == [0, 0]
    assert right["matching"].tolist() == [2, 2] and same["matching"].tolist() == [0, 0]


def test_rows_are_judged_apart():
    torch.manual_seed(0)
    judges = Discriminators(2)
    real, made = 0.1 * torch.randn(2, 3, 3200)
    whole = adversarial_losses(judges, real, made)
    for i in range(3):
        for name, part in adversarial_losses(judges, real[i : i + 1], made[i : i + 1]).items():
            assert torch.allclose(part[0], whole[name][i], rtol=1e-4), name


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(run):
    t = VocoderTask(run)
    batch = t.batches(0)[0]
    n = len(batch.ids)
    whole = t.loss(batch, single_batch(t, batch, step=2))
    parts = []
    for some in (slice(0, 3), slice(3, n)):
        piece = replace(batch, ids=batch.ids[some], starts=batch.starts[some], ends=batch.ends[some])
        parts.append(t.loss(piece, Update(2, num_rows=n)))
    assert n == 8 and all(torch.allclose(parts[0][k] + parts[1][k], v, rtol=1e-4) for k, v in whole.items())


def test_discriminators_join_after_the_warm_start(run):
    t = VocoderTask(run)
    batch = t.batches(0)[0]
    before, after = (t.loss(batch, single_batch(t, batch, step)) for step in (1, 2))
    assert before.keys() == after.keys() and before["mel"] == after["mel"]
    assert before["discriminator"] == before["generator"] == before["matching"] == 0
    assert before["loss"].item() == pytest.approx(45 * before["mel"].item(), rel=1e-5)
    rest = after["discriminator"] + after["generator"] + 2 * after["matching"]
    assert rest > 1 and after["loss"].item() == pytest.approx((before["loss"] + rest).item(), rel=1e-5)


def test_an_epoch_cuts_all_speech_at_places_of_its_own(run, corpus):
    t = VocoderTask(run)
    first, again, other = (list(t.batches(epoch)) for epoch in (2, 2, 3))
    assert [b.ids for b in first] == [b.ids for b in again]
    assert all(torch.equal(a.starts, b.starts) for a, b in zip(first, again))
    assert t.batches(2)[1].ids == first[1].ids, "wherever the epoch is entered"
    assert sorted(torch.cat([b.starts for b in first])) != sorted(torch.cat([b.starts for b in other]))
    begins = dict(zip(t.ids, (t.ends - t.starts).cumsum(0) - (t.ends - t.starts)))
    counts = dict.fromkeys(t.ids, 0)
    for batch in first:
        assert len(batch.ids) == 8 and batch.seconds == pytest.approx(1.6)
        for id, start, end in zip(batch.ids, batch.starts.tolist(), batch.ends.tolist()):
            assert begins[id] <= start and start + t.length <= end
            counts[id] += 1
    possible = {id: int(n) // 3200 for id, n in zip(t.ids, t.ends - t.starts)}
    assert sum(possible.values()) - 8 < sum(counts.values()) <= sum(possible.values())
    assert all(counts[id] <= n for id, n in possible.items())


def test_segments_are_the_recordings_samples(run):
    t = VocoderTask(run)
    prepared = PreparedCorpus(expand_home(run.data) / "prepared" / "train")
    batch = t.batches(0)[0]
    cut = t.cut(batch, torch.device("cpu"))
    for id, start, segment in zip(batch.ids, batch.starts.tolist(), cut):
        i = t.ids.index(id)
        at = start - int(t.starts[i])
        assert torch.equal(segment, prepared.batch([i]).waves[0, at : at + t.length])
    short = replace(batch, ends=batch.starts + 100)
    assert (t.cut(short, torch.device("cpu"))[:, 100:] == 0).all(), "silence beyond a recording's end"


def test_it_learns_and_resumes(run, tmp_path):
    "25 updates at once are those of two starts, byte for byte, and the distance of spectra falls"
    run = replace(run, steps=25, save_every=10, validate_every=25, lr=5e-3, ema_decay=0.9)
    run = replace(run, min_lr_ratio=1.0)  # the rate of a shorter run is then the same
    before = VocoderTask(run)
    start = before.validate(before.model)["score"]
    train(run, tmp_path / "whole", "cpu", progress_bar=False)
    train(replace(run, steps=10), tmp_path / "parts", "cpu", progress_bar=False)
    done = train(replace(run, steps=25), tmp_path / "parts", "cpu", progress_bar=False)
    files = [f"{name}.safetensors" for name in ("model", "ema", "moments")]
    whole, parts = (tmp_path / name / "step-00000025" for name in ("whole", "parts"))
    assert done["score"] < 0.9 * start and done["stft"] > 0
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert all(line["discriminator"] > 0 for line in log[5:] if "loss" in line)
    assert torch.isfinite(torch.tensor([line["loss"] for line in log if "loss" in line])).all()
    assert all((whole / f).read_bytes() == (parts / f).read_bytes() for f in files)


def test_export_is_vocos_alone(run, tmp_path, clip):
    t = VocoderTask(run)
    t.export(tmp_path / "out", note="test")
    model = load_vocoder(str(tmp_path / "out"))
    assert isinstance(model, Vocos) and model.config == VocosConfig(**SMALL)
    weights = dict(t.model.generator.named_parameters())
    for name, p in model.named_parameters():
        kept = weights[name].bfloat16().float() if p.ndim > 1 else weights[name]
        assert torch.equal(p, kept), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["metadata"]["note"] == "test"


def test_samples_are_waves_of_dev(run):
    t = VocoderTask(run)
    with torch.no_grad():
        waves = t.samples(t.model.eval())
    assert len(waves) == 2 and all(w.ndim == 1 and w.isfinite().all() for w in waves.values())


def test_the_distance_of_mels_ignores_phase_and_not_level(clip):
    rows = clip[None, :16000]
    assert mel_distance(-rows, rows) < 1e-4 and mel_distance(2 * rows, rows) == pytest.approx(
        np.log(2), abs=0.05
    )


def test_the_loss_is_the_weighted_sum_of_its_parts(corpus):
    for weights in (dict(mel_weight=45.0, matching_weight=2.0), dict(mel_weight=7.0, matching_weight=0.5)):
        options = dict(frames=20, channels=2) | weights
        task = VocoderTask(TrainConfig("vocoder", str(corpus), SMALL, options, batch_seconds=1.6))
        parts = task.loss(task.batches(0)[0], Update(1, num_rows=8))
        expected = weights["mel_weight"] * parts["mel"] + weights["matching_weight"] * parts["matching"]
        expected = expected + parts["discriminator"] + parts["generator"]
        assert torch.allclose(parts["loss"], expected)
