"Training: whatever stops a run, it resumes as if nothing had; and every error is one line"

import errno
import json
import math
import multiprocessing
import re
import shutil
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffuspeech.base import checkpoint as folder_room
from diffuspeech.base import random
from diffuspeech.data.batches import LazyMap
from diffuspeech.train import config, state
from diffuspeech.train.config import TrainConfig, load_preset
from diffuspeech.train.journal import history
from diffuspeech.train.launch import bf16_is_faster
from diffuspeech.train.loop import learning_rate, make_optimizer, train
from diffuspeech.train.task import Task

RUN = TrainConfig(
    "tests",
    steps=24,
    lr=1e-2,
    warmup_steps=4,
    min_lr_ratio=0.1,
    ema_decay=0.9,
    precision="fp32",
    validate_every=10,
    save_every=5,
    save_total_limit=2,
)


@dataclass(frozen=True)
class ToyConfig:
    n: int = 0  # read by nothing, so that a run can have another config


class Toy(Task):
    "Dropout, a norm with buffers, seven batches an epoch; slow on request, so that it can be killed"

    Config = ToyConfig
    pause = 0.0

    def __init__(self, run):
        self.run = run
        self.model = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 1)
        )

    def batches(self, epoch):
        def batch(i):
            g = torch.Generator().manual_seed(random.key(self.run.seed, epoch, i))
            return SimpleNamespace(
                ids=[f"{epoch}-{i}-{r}" for r in range(8)], seconds=8.0, x=torch.randn(8, 4, generator=g)
            )

        return LazyMap(batch, range(7))

    def loss(self, batch, update):
        time.sleep(self.pause)
        return {"loss": update.share((self.model(batch.x) - batch.x.sum(1, keepdim=True)).pow(2).sum())}

    def validate(self, model):
        assert not model.training and not torch.is_grad_enabled()
        x = torch.randn(64, 4)
        return {"score": (model(x) - x.sum(1, keepdim=True)).pow(2).mean()}

    def export(self, folder, **metadata):
        folder.mkdir(exist_ok=True)
        (folder / "about.json").write_text(json.dumps(metadata))
        (folder / "weights.json").write_text(
            json.dumps({n: t.tolist() for n, t in self.model.state_dict().items()})
        )


def run_training(run, folder, task=Toy, **kw):
    return train(run, folder, "cpu", progress_bar=False, task=task, **kw)


def run_to_the_end(run, folder):
    "A TERM that ends the tests, as of `timeout`, stops the run inside them, too: say so"
    done = run_training(run, folder)
    assert "stopped" not in done, f"a signal from outside stopped it at step {done['stopped']:.0f}"


def stop_at(*at, sign=signal.SIGTERM, base=Toy):
    "A task that gets a signal at some steps, as it would from outside"

    class Stopping(base):
        def loss(self, batch, update):
            if update.step in at:
                signal.raise_signal(sign)
            return super().loss(batch, update)

    return Stopping


def final_state(folder):
    "All that a run leaves, less the clock"
    last = state.last_checkpoint(folder)
    saved = state.read_state(last)
    saved["progress"].pop("seconds")
    saved["run"] = None
    log = [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (folder / "log.jsonl").read_text().splitlines()
    ]
    return (
        last.name,
        saved,
        log,
        (folder / "model/weights.json").read_text(),
        {p.name: {n: t.tolist() for n, t in load_file(p).items()} for p in last.glob("*.safetensors")},
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    "Runs are equal bit for bit on the same number of threads: the killed processes have one"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def reference_run(tmp_path_factory):
    "A run that nothing happened to"
    folder = tmp_path_factory.mktemp("whole")
    run_training(RUN, folder)
    return folder


@pytest.mark.parametrize("ema", [0.9, 0.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_is_bit_for_bit(tmp_path, ema, precision):
    "Stopped in mid-epoch, at an epoch's end and at a step that is saved anyway"
    run = replace(RUN, ema_decay=ema, precision=precision)
    done = run_training(run, tmp_path / "a")
    for at in (3, 7, 10):
        found = run_training(run, tmp_path / "b", stop_at(at))
        assert found == {"stopped": at, "signal": signal.SIGTERM}
        assert (
            not (tmp_path / "b/model").exists()
            and state.last_checkpoint(tmp_path / "b").name == f"step-{at:08d}"
        )
    assert run_training(run, tmp_path / "b") == done
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")


def test_a_signal_before_the_first_step_ends_it_at_once(tmp_path):
    "What a task computes when it is made may take minutes"

    class Slow(Toy):
        def __init__(self, run):
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the signal was only noted")

    with pytest.raises(KeyboardInterrupt):
        run_training(RUN, tmp_path, Slow)
    run_to_the_end(RUN, tmp_path)


def test_how_often_one_validates_and_saves_changes_no_weight(tmp_path, reference_run):
    run_training(replace(RUN, validate_every=3, save_every=4, save_total_limit=9), tmp_path)
    assert final_state(tmp_path)[3:] == final_state(reference_run)[3:]


def test_the_global_generator_of_the_caller_is_left_alone(tmp_path):
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    run_training(replace(RUN, steps=2), tmp_path)
    assert torch.equal(torch.rand(3), want)


SERVER = multiprocessing.get_context(
    "forkserver"
)  # imports torch once, and then each process is there at once
SERVER.set_forkserver_preload(
    ["diffuspeech.train.loop", "torch._dynamo", "pytest"]
)  # the optimizer imports the second when it is made


def run_in_process(folder, pause, run):
    torch.set_num_threads(1)
    Toy.pause = pause
    run_training(run, folder)


def process(folder, pause=0.0, run=RUN):
    job = SERVER.Process(target=run_in_process, args=(folder, pause, run))
    job.start()
    return job


def test_killed_twenty_times(tmp_path):
    """SIGKILL at random moments, in the middle of a save or not: every file under a final name is complete,
    and a run that resumes, after one kill or after all, ends as one that was never killed, bit for bit"""
    dice, long = Random(), replace(RUN, steps=400, save_every=3)
    reference_run, folder, steps = tmp_path / "whole", tmp_path / "killed", []
    run_to_the_end(long, reference_run)
    log = folder / "log.jsonl"
    for kill in range(20):
        before = log.stat().st_mtime_ns if log.exists() else 0
        job = process(folder, 0.01, long)
        limit, writes = time.monotonic() + 60, dice.randint(1, 12)
        while time.monotonic() < limit and job.is_alive() and writes:
            now = log.stat().st_mtime_ns if log.exists() else 0
            before, writes = now, writes - (now != before)
            time.sleep(0.002)
        time.sleep(dice.uniform(0, 0.02))
        assert job.is_alive(), f"it ended by itself: {job.exitcode}"
        job.kill()
        job.join()
        assert job.exitcode == -signal.SIGKILL and not (folder / "model").exists()
        for path in state.checkpoints(folder):
            state.read_state(path)
            assert all(load_file(path / f"{name}.safetensors") for name in ("model", "ema", "moments"))
        steps.append(
            state.checkpoint_step(state.last_checkpoint(folder)) if state.last_checkpoint(folder) else 0
        )
        shutil.copytree(folder, tmp_path / f"{kill}")
        run_to_the_end(long, tmp_path / f"{kill}")
        assert final_state(tmp_path / f"{kill}") == final_state(reference_run), f"killed after {steps}"
    assert steps == sorted(steps) and 0 < steps[-1] < 400, "each process resumes where the last one saved"
    job = process(folder, run=long)
    job.join(120)
    assert job.exitcode == 0 and final_state(folder) == final_state(reference_run)


def test_two_processes_in_one_folder(tmp_path):
    job = process(tmp_path, 0.1)
    while job.is_alive() and not (tmp_path / "log.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process is training there"):
        run_training(RUN, tmp_path)
    job.terminate()  # TERM: the step is finished and saved
    job.join(30)
    assert (
        job.exitcode == 0
        and state.last_checkpoint(tmp_path) is not None
        and not (tmp_path / "model").exists()
    )


@pytest.fixture
def stopped(tmp_path):
    "A run with checkpoints at 5, 10 and 12"
    run_training(replace(RUN, save_total_limit=9), tmp_path, stop_at(12))
    return tmp_path


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "moments.safetensors", "state.json"]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated(stopped, name, share):
    path = stopped / "step-00000012" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    log = (stopped / "log.jsonl").read_bytes()
    with pytest.raises(
        ValueError,
        match=f"step-00000012/{name}: truncated.*; delete the folder step-00000012 to resume from",
    ) as e:
        run_training(RUN, stopped)
    assert "\n" not in str(e.value) and (stopped / "log.jsonl").read_bytes() == log, (
        "a refused run changes nothing"
    )


@pytest.mark.parametrize(
    "name", ["model.safetensors", "ema.safetensors", "moments.safetensors", "state.json"]
)
def test_a_missing_file_and_how_to_resume(stopped, reference_run, name):
    (stopped / "step-00000012" / name).unlink()
    with pytest.raises(
        ValueError, match=f"{name}: missing; delete the folder step-00000012 to resume from step-00000010"
    ):
        run_training(RUN, stopped)
    (stopped / "step-00000012").rename(stopped.parent / f"{stopped.name}-gone")
    run_training(RUN, stopped)
    assert final_state(stopped)[3:] == final_state(reference_run)[3:]


def test_other_version_pickle_and_config(stopped):
    path = stopped / "step-00000012/state.json"
    text = path.read_text()
    path.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match="state.json: format 2, and this version of diffuspeech reads 1"):
        run_training(RUN, stopped)
    path.write_text(text)
    for name in ("step-00000012/model.pt", "last.ckpt", "model.bin"):
        (stopped / name).write_bytes(b"\x80\x04")
        with pytest.raises(ValueError, match=f"{name}: a pickle, which is never read"):
            run_training(RUN, stopped)
        (stopped / name).unlink()
    with pytest.raises(
        ValueError,
        match=r"belongs to another run: lr=0.01 \(now 0.02\), model=\{\} \(now \{\"n\": 1\}\), "
        r"seed=0 \(now 3\); start in another folder",
    ):
        run_training(replace(RUN, lr=0.02, seed=3, model={"n": 1}), stopped)

    path.write_text(text.replace('"best_step"', '"best_stepp"'))
    with pytest.raises(ValueError, match="state.json: truncated, or not a state"):
        run_training(RUN, stopped)
    path.write_text(text.replace('"versions": {}', '"versions": {"tokenizer": "s3-small-1"}'))
    with pytest.raises(
        ValueError,
        match="step-00000012: was trained with the tokenizer s3-small-1, and this run's is None",
    ):
        run_training(RUN, stopped)
    path.write_text(text)

    class Wider(Toy):
        def __init__(self, run):
            super().__init__(run)
            self.model[4] = nn.Linear(16, 2)

    with pytest.raises(ValueError, match=r"model.safetensors: does not fit the model at 4.bias, 4.weight"):
        run_training(RUN, stopped, Wider)
    assert (
        run_training(
            replace(RUN, steps=14, validate_every=7, save_every=7, save_total_limit=1, description="shorter"),
            stopped,
        )["score"]
        > 0
    ), "these may change"


def test_half_written_is_ignored_and_removed(stopped):
    half = stopped / ".step-00000020.part99"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    (stopped / ".log.jsonl.part99").write_text("half")
    (stopped / "model").mkdir()
    (stopped / "model" / ".config.json.part99").write_text("half")
    other = stopped / "another run"
    (other / ".step-00000001.part99").mkdir(parents=True)
    (other / ".lock").touch()
    with open(stopped / "log.jsonl", "a") as f:
        f.write('{"step": 13, "lo')
    lines = []
    run_training(RUN, stopped, on_step=lines.append)
    assert [line["step"] for line in lines] == list(range(13, 25))
    assert [p.parent for p in stopped.rglob(".*.part*")] == [other], (
        "files of another run in a folder below are left alone"
    )
    assert history(stopped)["train"]["step"] == list(range(1, 25))


def test_full_disk(tmp_path, monkeypatch, reference_run):
    "For each of its files: no folder under a final name, the old checkpoint stands, and the run can resume"
    real, calls = folder_room.save_file, []

    def full(tensors, path, about=None):
        calls.append(Path(path).name)
        if len(calls) > 3 and Path(path).name == failing:
            raise folder_room.SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            )
        real(tensors, path, about)

    monkeypatch.setattr(folder_room, "save_file", full)
    for failing in ("model.safetensors", "moments.safetensors", "ema.safetensors"):
        folder = tmp_path / failing
        calls.clear()
        with pytest.raises(
            OSError, match="disk is full: step-00000010 of .* could not be saved, step-00000005 is complete"
        ) as e:
            run_training(RUN, folder)
        assert e.value.errno == errno.ENOSPC and [p.name for p in folder.iterdir() if "step" in p.name] == [
            "step-00000005"
        ]
    monkeypatch.undo()
    folder, write_text = tmp_path / "state.json", Path.write_text

    def full(path, text, *more, **how):
        if path.name == "state.json" and '"step": 10' in text:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, *more, **how)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        OSError, match="disk is full: step-00000010 of .* could not be saved, step-00000005 is complete"
    ):
        run_training(RUN, folder)
    assert [p.name for p in folder.iterdir() if "step" in p.name] == ["step-00000005"]
    monkeypatch.undo()
    run_training(RUN, folder)
    assert final_state(folder) == final_state(reference_run)


@pytest.mark.parametrize("name", ["loss", "norm of the gradient"])
def test_not_a_number(tmp_path, name):
    class Bad(Toy):
        def loss(self, batch, update):
            loss = super().loss(batch, update)["loss"]
            if update.step == 8:
                loss = loss * math.nan if name == "loss" else loss + (self.model[0].weight[0, 0] * 0).sqrt()
            return {"loss": loss}

    with pytest.raises(
        FloatingPointError, match=f"step 8: the {name} is (nan|inf) with the rows 1-0-0, 1-0-1, "
    ):
        run_training(RUN, tmp_path, Bad)
    assert [p.name for p in state.checkpoints(tmp_path)] == ["step-00000005"]
    assert all(t.isfinite().all() for t in load_file(tmp_path / "step-00000005/model.safetensors").values())


def test_keeps_the_last_and_the_best(tmp_path):
    class Worse(Toy):
        def validate(self, model):
            return {"score": float(scores.pop(0))}

    scores = [5, 1, 2, 3, 4, 5]
    run_training(replace(RUN, validate_every=4, save_every=4), tmp_path, Worse)
    assert [state.checkpoint_step(p) for p in state.checkpoints(tmp_path)] == [8, 20, 24]
    progress = state.read_state(state.last_checkpoint(tmp_path))["progress"]
    assert progress["best"] == 1 and progress["best_step"] == 8 and not scores
    assert run_training(replace(RUN, validate_every=4, save_every=4), tmp_path, Worse) == {"score": 1.0}, (
        "a finished run is only exported again"
    )
    exported, best, last = (
        json.loads((tmp_path / "model/weights.json").read_text()),
        *(load_file(tmp_path / f"step-{k:08d}/ema.safetensors") for k in (8, 24)),
    )
    assert all(exported[name] == best[name].tolist() for name in best) and not any(
        exported[name] == last[name].tolist() for name in last
    ), "what is exported is the best"


@pytest.mark.parametrize("nothing", [None, [], SimpleNamespace(ids=[])])
def test_empty_batches(tmp_path, nothing):
    class Holes(Toy):
        def batches(self, epoch):
            return [nothing if i in (2, 6) else batch for i, batch in enumerate(super().batches(epoch))]

    run_training(RUN, tmp_path / "a", Holes)
    run_training(RUN, tmp_path / "b", stop_at(5, 12, base=Holes))
    run_training(RUN, tmp_path / "b", stop_at(12, base=Holes))
    run_training(RUN, tmp_path / "b", Holes)
    assert final_state(tmp_path / "a") == final_state(tmp_path / "b")
    progress = state.read_state(state.last_checkpoint(tmp_path / "a"))["progress"]
    assert (progress["epoch"], progress["batch"], progress["empty"]) == (4, 5, 9) and progress[
        "audio"
    ] == 24 * 8

    class Nothing(Toy):
        def batches(self, epoch):
            return [nothing] * 3

    with pytest.raises(ValueError, match="epoch 0 has no batch with anything in it"):
        run_training(RUN, tmp_path / "c", Nothing)


def test_ema_by_hand(tmp_path):
    "Against the formula, from the weights after each step"
    seen = []

    class Watched(Toy):
        def loss(self, batch, update):
            seen.append(self.model[0].weight.detach().clone())
            return super().loss(batch, update)

    run_training(replace(RUN, save_every=24, validate_every=24, ema_decay=0.5), tmp_path, Watched)
    seen.append(load_file(tmp_path / "step-00000024/model.safetensors")["0.weight"])
    by_hand = seen[0].double()
    for k, now in enumerate(seen[1:], 1):
        d = min(0.5, (1 + k) / (10 + k))
        by_hand = d * by_hand + (1 - d) * now.double()
    ema = load_file(tmp_path / "step-00000024/ema.safetensors")["0.weight"]
    assert torch.allclose(ema.double(), by_hand, atol=1e-6) and not torch.allclose(ema, seen[-1], atol=1e-3)
    exported = json.loads((tmp_path / "model/weights.json").read_text())
    assert exported["0.weight"] == ema.tolist(), "the finished model has the averaged weights"
    assert (
        exported["1.running_mean"]
        == load_file(tmp_path / "step-00000024/model.safetensors")["1.running_mean"].tolist()
    ), "and the buffers as they are"
    metadata = json.loads((tmp_path / "model/about.json").read_text())
    assert (
        metadata["step"] == 24 and metadata["run"]["ema_decay"] == 0.5 and metadata["validation"]["score"] > 0
    )


def test_the_rate(tmp_path):
    run = TrainConfig("tests", steps=110, lr=0.5, warmup_steps=10, min_lr_ratio=0.1)
    assert [learning_rate(run, k) for k in (1, 5, 10)] == [0.05, 0.25, 0.5]
    assert learning_rate(run, 60) == pytest.approx(0.5 * 0.55) and learning_rate(run, 110) == pytest.approx(
        0.05
    ) == learning_rate(run, 200)
    assert learning_rate(run, 35) == pytest.approx(0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert learning_rate(replace(run, warmup_steps=0), 1) < 0.5 and learning_rate(
        replace(run, warmup_steps=200), 110
    ) == pytest.approx(0.5 * 110 / 200)
    run_training(RUN, tmp_path)
    assert history(tmp_path)["train"]["lr"] == [learning_rate(RUN, k) for k in range(1, 25)]


def test_clipping_and_decay(tmp_path):
    "Adam does not see the size of a gradient, so the moments are looked at; and what decays is matrices"
    norms = {}
    for clip in (0.0, 0.01):
        folder = tmp_path / str(clip)
        run_training(replace(RUN, steps=1, max_grad_norm=clip), folder)
        moments = load_file(folder / "step-00000001/moments.safetensors")
        norms[clip] = math.sqrt(
            sum((t / 0.1).pow(2).sum().item() for n, t in moments.items() if n.startswith("exp_avg/"))
        )
        assert history(folder)["train"]["grad_norm"][0] == pytest.approx(norms[0.0], rel=1e-3), (
            "the log has the norm before it is cut"
        )
    assert norms[0.01] == pytest.approx(0.01, rel=1e-2) and norms[0.0] > 0.1
    model = Toy(RUN).model
    assert [
        (g["weight_decay"], {p.ndim for p in g["params"]}) for g in make_optimizer(RUN, model).param_groups
    ] == [(0.01, {2}), (0.0, {1})]


@pytest.mark.parametrize("name", config.list_presets())
def test_a_preset_states_its_cost_and_target(name):
    doc = load_preset(name).description
    assert re.search(r"minute|hour", doc, re.I) and re.search(r"\bdev\b", doc), doc


def test_progress_and_log(tmp_path, capfd):
    train(replace(RUN, log_every=10), tmp_path, "cpu", task=Toy)
    err = capfd.readouterr().err
    assert "24/24" in err and "s of audio/s" in err and "loss" in err
    seen = history(tmp_path)
    assert (
        seen["train"]["step"] == [1, 10, 20, 24]
        and seen["train"]["audio"] == [8, 80, 160, 192]
        and seen["validation"]["step"] == [10, 20, 24]
    )


def test_samples_and_board(tmp_path):
    "Samples are kept with each validation, and TensorBoard has the same numbers as log.jsonl"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Sounding(Toy):
        def samples(self, model):
            assert not model.training and not torch.is_grad_enabled()
            return {
                name: torch.sin(torch.arange(1600) * 0.2) * 0.5
                for name in ("tone", "/data/../a clip.wav-decoded")
            }

    run_training(RUN, tmp_path, stop_at(12, base=Sounding), tensorboard=True)
    run_training(RUN, tmp_path, Sounding, tensorboard=True)
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        f"{name}-{step:08d}.wav" for name in ("data-..-a-clip.wav-decoded", "tone") for step in (10, 20, 24)
    ], "an id may be a path, and a path leads nowhere"
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    log = history(tmp_path)
    assert [(e.step, pytest.approx(e.value)) for e in board.Scalars("train/loss")] == list(
        zip(log["train"]["step"], log["train"]["loss"])
    )
    assert [e.step for e in board.Scalars("validation/score")] == [10, 20, 24] and [
        e.step for e in board.Audio("tone")
    ] == [10, 20, 24]


def test_batches_in_one_update(tmp_path):
    "Three batches make one step: their mean gradient, and epochs run on from each other"
    seen = []

    class Watched(Toy):
        def loss(self, batch, update):
            seen.append((update.step, batch.ids[0]))
            return super().loss(batch, update)

    run = replace(RUN, batches_per_update=3, steps=5)
    run_training(run, tmp_path, Watched)
    assert seen == [(1 + k // 3, f"{k // 7}-{k % 7}-0") for k in range(15)]
    progress = state.read_state(state.last_checkpoint(tmp_path))["progress"]
    assert (progress["epoch"], progress["batch"], progress["audio"]) == (2, 1, 15 * 8)


@pytest.mark.parametrize(
    "known, pays",
    [
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": False, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": False}, False),
        ({"architecture": "aarch64"}, True),
        ({}, True),
    ],
)
def test_bf16_is_faster_where_the_processor_has_it(monkeypatch, known, pays):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert bf16_is_faster() == pays
