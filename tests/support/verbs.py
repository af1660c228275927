"Verbs in processes of their own that share one import of torch, so that signals reach them at any moment"

import json
import os
import signal
import sys
import time
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from diffuspeech import cli
from diffuspeech.base import pretrained
from diffuspeech.data import builtin
from diffuspeech.data.batches import LazyMap
from diffuspeech.train.task import Task

CLIP = files("diffuspeech") / "assets" / "clips" / "vm-intro.flac"
PIP = """import sys, time, zipfile
folder = sys.argv[sys.argv.index("-d") + 1]
with zipfile.ZipFile(folder + "/weights-1-py3-none-any.whl", "w") as wheel:
    with wheel.open("w/model.bin", "w") as file:
        for i in range(20):
            file.write(bytes([i]) * 1000)
            time.sleep(0.02)
"""
MODEL = b"".join(bytes([i]) * 1000 for i in range(20))


class Toy(Task):
    "Learns a sum, slowly"

    def __init__(self, run):
        self.run, self.model = run, nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))

    def batches(self, epoch):
        def batch(i):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * epoch + i))
            return SimpleNamespace(ids=list(range(8)), x=x)

        return LazyMap(batch, range(5))

    def loss(self, batch, update):
        time.sleep(0.02)
        return {"loss": update.share((self.model(batch.x) - batch.x.sum(1, keepdim=True)).square().sum())}

    def validate(self, model):
        return {"score": model(torch.ones(1, 4)).abs().sum()}

    def export(self, folder, **metadata):
        folder.mkdir(exist_ok=True)
        weights = {name: tensor.tolist() for name, tensor in self.model.state_dict().items()}
        (folder / "weights.json").write_text(json.dumps(weights))


def prepare(folder: Path):
    "What the verbs of the tests read"
    (folder / "rec").mkdir(parents=True)
    lines = []
    for n in range(6):
        (folder / "rec" / f"{n}.flac").write_bytes(CLIP.read_bytes())
        fields = dict(audio_filepath=f"rec/{n}.flac", duration=5.0, text="hello", id=f"c{n}")
        lines.append(json.dumps(fields))
    (folder / "m.jsonl").write_text("\n".join(lines) + "\n")
    options = dict(steps=20, warmup_steps=2, save_every=3, precision="fp32", validate_every=10)
    (folder / "toy.json").write_text(json.dumps(dict(options, lr=0.01)))
    (folder / "pip").mkdir()
    (folder / "pip" / "__init__.py").write_text("")
    (folder / "pip" / "__main__.py").write_text(PIP)


def run(words: list[str], folder: Path, home: Path, log: Path, ready: Path):
    "`diffuspeech WORDS` in a folder; what it prints goes to the log"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    os.chdir(folder)
    os.environ |= {"DIFFUSPEECH_HOME": str(home), "PYTHONPATH": str(folder)}
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    os.dup2(2, 1)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)
    torch.set_num_threads(1)
    import hashlib

    entry = dict(packages=["pypi:weights==1"], files={"model.bin": hashlib.sha256(MODEL).hexdigest()})
    pretrained.PRETRAINED |= {"toy": entry | dict(licence="mine", megabytes=1)}
    voices = {"flite-slt": 1, "flite-rms": 2}
    splits = [builtin.Split(name, voices, mix, checked=False) for name, mix in SPLITS.items()]
    builtin.PLANS["tiny"] = splits
    real = cli.stop_on_signals

    def stop_on_signals(words):
        real(words)
        ready.touch()

    cli.stop_on_signals, sys.argv = stop_on_signals, ["diffuspeech", *words]
    status = cli.main()
    sys.stdout.flush()
    os._exit(status)  # a signal after this would be taken for an error by the fork server


SPLITS = {"test-clean": "test", "dev": "train", "train": "train"}
