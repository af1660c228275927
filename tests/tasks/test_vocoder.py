"Vocoders: what goes wrong in use, and agreement with other people's code"

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from diffuspeech.data import audio
from diffuspeech.data.manifest import Utterance, write_manifest
from diffuspeech.tasks.vocoder import HifiGanConfig, HifiGanTask, hifigan
from diffuspeech.train.task import Update, single_batch
from diffuspeech.voice.vocoder import MAX_FRAMES, MEL_CONFIG, HifiGan, World, log10_mel, split_points

audio.import_torchaudio()
SMALL = dict(channels=16, blocks=(3,), dilations=(1,))


@pytest.fixture(scope="module")
def clip():
    return audio.load_clip()[:32000]


@pytest.fixture
def manifest(tmp_path):
    rows = []
    for i, part in enumerate(audio.load_clip()[:80000].split(16000)):
        audio.save(tmp_path / f"{i}.wav", part)
        rows.append(
            Utterance(tmp_path / f"{i}.wav", soundfile.info(tmp_path / f"{i}.wav").duration, id=str(i))
        )
    write_manifest(tmp_path / "train.jsonl", rows)
    return tmp_path / "train.jsonl"


def task(manifest):
    return HifiGanTask(
        SimpleNamespace(
            model=SMALL, options=dict(frames=16, held_out=1), seed=0, data=manifest, batch_seconds=0.32
        )
    )


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
    model = hifigan(HifiGanConfig(**SMALL))
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


def test_hifigan_learns_one_clip(manifest):
    t = task(manifest)
    batch = t.batches(0)[0]
    optimizer = torch.optim.AdamW(t.model.parameters(), 3e-3)
    losses = []
    for step in range(25):
        out = t.loss(batch, single_batch(t, batch, step + 1))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert all(np.isfinite(losses)) and losses[-1] < 0.8 * losses[0]


def test_the_loss_does_not_depend_on_how_the_batch_is_cut(manifest):
    t = task(manifest)
    batch = t.batches(0)[0]
    whole = t.loss(batch, single_batch(t, batch))["loss"]
    parts = [t.loss(row[None], Update(1, num_rows=len(batch)))["loss"] for row in batch]
    assert len(batch) > 1 and torch.allclose(sum(parts), whole, rtol=1e-5)


def test_batches_do_not_depend_on_where_the_epoch_is_entered(manifest):
    whole = list(task(manifest).batches(2))
    assert len(whole) == 2 and torch.equal(whole[1], task(manifest).batches(2)[1])
    assert not torch.equal(whole[0], task(manifest).batches(3)[0])


def test_export_is_read_again(manifest, tmp_path, clip):
    t = task(manifest)
    assert t.validate(t.model)["score"] > 0 and len(t.valid) == 1 and len(t.train) == 4
    t.export(tmp_path / "out", note="test")
    one, two = HifiGan(t.model), HifiGan(tmp_path / "out")
    assert torch.equal(one.synthesize(one.analyze(clip)), two.synthesize(two.analyze(clip)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["metadata"]["note"] == "test"


def test_a_config_that_cannot_be_built_is_named():
    with pytest.raises(ValueError, match="larger than it by an even number"):
        HifiGanConfig(kernels=(10, 8, 8, 4))
    with pytest.raises(ValueError, match="channels=100 must be divisible by 16"):
        HifiGanConfig(channels=100)
