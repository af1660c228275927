"One process and several take the same steps: real processes, over gloo"

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small import prepare_clips, save_random_models

from diffuspeech.train import state

SCRIPT = Path(__file__).parents[1] / "support" / "processes.py"
ALONE = [sys.executable, str(SCRIPT)]
DDP = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
SHARED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}  # what `accelerate launch --use_fsdp --fsdp_version 2` says to its processes


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    "Twelve clips, and a tokenizer and a recogniser with random weights"
    folder = tmp_path_factory.mktemp("corpus")
    prepare_clips(folder, train=12, dev=2)
    save_random_models(folder)
    return folder


def launch(command, place, corpus, env=None, **changes):
    "Losses, what was masked, and the last checkpoint of a run"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | (env or {})
    done = subprocess.run(
        [*command, str(place), str(corpus), json.dumps(changes)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    masked = [
        tuple(json.loads(line))
        for file in sorted(place.glob("masked-*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    return (
        {line["step"]: line["loss"] for line in log if "loss" in line},
        masked,
        state.last_checkpoint(place),
    )


@pytest.fixture(scope="module")
def single_process(corpus, tmp_path_factory):
    return launch(ALONE, tmp_path_factory.mktemp("alone"), corpus)


@pytest.mark.parametrize("command, env", [(DDP, {}), (DDP, SHARED)], ids=["ddp", "fsdp"])
def test_two_processes_take_the_steps_of_one(command, env, corpus, single_process, tmp_path):
    losses, masked, last = launch(command, tmp_path / "two", corpus, env)
    assert losses.keys() == single_process[0].keys() and len(losses) == 6
    assert all(abs(a - losses[step]) <= 1e-5 * abs(a) for step, a in single_process[0].items()), (
        single_process[0],
        losses,
    )
    assert (
        (tmp_path / "two/masked-1.jsonl").exists()
        and set(masked) == set(single_process[1])
        and len(set(masked)) > 30
    ), "the same masks to the bit, whoever drew them"
    for name in ("model", "moments", "ema"):
        mine, theirs = (
            load_file(single_process[2] / f"{name}.safetensors"),
            load_file(last / f"{name}.safetensors"),
        )
        assert mine.keys() == theirs.keys()
        counter = "taste.quantizer.step"  # of calls, and each process made half of them
        far, long = (
            sum(f(mine[k].double(), theirs[k].double()).square().sum() for k in mine if k != counter) ** 0.5
            for f in (torch.sub, lambda a, b: a)
        )
        assert far <= 2e-3 * long, (
            name
        )  # Adam makes a step of a gradient that is nothing but rounding, so single weights may differ


def test_from_two_processes_to_one_and_back(corpus, single_process, tmp_path):
    "A checkpoint is the same wherever it was made"
    place = tmp_path / "moved"
    for command, env, steps in ((DDP, SHARED, 2), (ALONE, {}, 4), (DDP, {}, 6)):
        losses = launch(command, place, corpus, env, steps=steps, min_lr_ratio=1.0)[
            0
        ]  # the rate does not depend on how many steps are in view
    straight = launch(ALONE, tmp_path / "straight", corpus, steps=6, min_lr_ratio=1.0)[0]
    assert losses.keys() == straight.keys() and len(straight) == 6
    assert all(abs(losses[step] - straight[step]) <= 1e-5 * straight[step] for step in straight), (
        losses,
        straight,
    )


def test_spread_weights_in_bfloat16(corpus, tmp_path):
    "What is computed in bfloat16 is so in every process, and what is kept is not"
    straight, spread = (
        launch(command, tmp_path / name, corpus, env, precision="bf16", steps=3)
        for name, command, env in (("straight", ALONE, {}), ("spread", DDP, SHARED))
    )
    assert all(abs(spread[0][step] - a) <= 1e-3 * a for step, a in straight[0].items()), (
        straight[0],
        spread[0],
    )
    assert {
        t.dtype for name, t in load_file(spread[2] / "model.safetensors").items() if t.is_floating_point()
    } == {torch.float32}


def test_uneven_shares_are_refused(corpus, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*DDP, str(tmp_path / "x"), str(corpus), json.dumps({"batches_per_update": 3})],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (
        done.returncode != 0
        and "batches_per_update=3: 2 processes cannot share them evenly; --set batches_per_update=4"
        in done.stderr
    )
