"A signal at any moment: one line, nothing left over, and the same command goes on to the same result"

import contextlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import verbs
from safetensors.torch import load_file

from diffuspeech.data.builtin import whats_missing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["verbs", "diffuspeech.train.loop", "diffuspeech.voice.jobs", "torch._dynamo"])
VERBS = {
    "encode": ["encode", "rec", "-o", "out.jsonl"],
    "decode": ["decode", "t.jsonl", "-o", "out"],
    "prepare": ["corpus", "prepare", "m.jsonl", "-o", "out", "--vocoder", "none", "--workers", "1"],
    "pack": ["corpus", "pack", "m.jsonl", "--license", "toy.json", "-o", "out", "--codec", "small"],
    "build": ["corpus", "build", "tiny", "-o", "out", "--workers", "1"],
    "fetch": ["fetch", "toy"],
    "train": ["train", "toy.json", "--set", "task=verbs:Toy", "-o", "out", "--device", "cpu"],
}
MOMENTS = 20
OTHER = (".lock", "process.json", "output.log")  # what a training keeps of its process


class Command:
    "A verb in a folder of its own"

    def __init__(self, words, folder):
        self.words, self.folder, self.home, self.log = words, folder / "here", folder / "home", folder / "log"
        self.ready = folder / "ready"
        verbs.prepare(self.folder)

    def start(self):
        self.ready.unlink(missing_ok=True)
        job = SERVER.Process(
            target=verbs.run, args=(self.words, self.folder, self.home, self.log, self.ready)
        )
        job.start()
        while not self.ready.exists():
            assert job.is_alive() or self.ready.exists(), self.log.read_text()
            time.sleep(0.002)
        return job

    def finish(self):
        job = self.start()
        job.join(120)
        assert job.exitcode == 0, self.log.read_text()

    def reset(self):
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        shutil.rmtree(self.home, ignore_errors=True)
        (self.folder / "out.jsonl").unlink(missing_ok=True)

    def result(self):
        "What it has written, less clocks and the order in which workers were ready"
        found, out = {}, self.folder / "out"
        for path in [self.folder / "out.jsonl", *out.rglob("*"), *(self.home / "weights").rglob("*")]:
            if not path.is_file() or path.name in OTHER or "board" in path.parts:
                continue
            if path.parent.name.startswith("step-") and path.parent.name != "step-00000020":
                continue  # an interrupted training saves where it stopped
            text = path.read_bytes()
            if path.suffix == ".safetensors":
                text = str({name: t.tolist() for name, t in load_file(path).items()}).encode()
            if path.name in ("log.jsonl", "state.json", "made.jsonl"):
                text = re.sub(rb'"seconds": [0-9.e-]+,?', b"", text)
                text = b"\n".join(sorted(set(text.splitlines())))
            found[str(path.relative_to(self.folder.parent))] = text.replace(str(self.folder).encode(), b"")
        return found


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if ".part" in p.name]


def children(folder: Path) -> list[str]:
    "Processes that a command has left behind: those in whose environment its folder is named"
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            found += [path.parent.name] if str(folder).encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


@pytest.mark.parametrize("name", VERBS)
def test_signals_at_twenty_moments(name, tmp_path):
    if name == "build" and whats_missing("tiny"):
        pytest.skip("the corpus is made by flite and diatheke, which are not here")
    dice = random.Random(name)
    whole, stopped = Command(VERBS[name], tmp_path / "whole"), Command(VERBS[name], tmp_path / "stopped")
    if name == "decode":
        tokens = Command(["encode", "rec", "-o", "t.jsonl"], tmp_path / "tokens")
        tokens.finish()
        for command in (whole, stopped):
            shutil.copy(tokens.folder / "t.jsonl", command.folder)
    whole.finish()
    started = time.monotonic()
    whole.reset()
    whole.finish()
    seconds, expected, interrupted = time.monotonic() - started, whole.result(), 0
    for moment in range(MOMENTS):
        number = dice.choice([signal.SIGINT, signal.SIGTERM])
        job, started = stopped.start(), time.monotonic()
        job.join(dice.uniform(0, 0.9 * seconds))
        if job.is_alive():
            with contextlib.suppress(ProcessLookupError):  # it may end just now
                os.kill(job.pid, number)
        job.join(120)
        printed = stopped.log.read_text()
        assert job.exitcode in (0, 128 + number), (moment, printed)
        assert not leftovers(stopped.folder) and not leftovers(stopped.home), moment
        assert "Traceback" not in printed, printed
        lines = re.findall(r"^diffuspeech .*(?:interrupted|ended by a signal|stopped after)", printed, re.M)
        assert len(lines) == (job.exitcode > 0), printed
        interrupted += job.exitcode > 0
        if job.exitcode == 0:
            seconds = min(seconds, time.monotonic() - started)
            assert stopped.result() == expected, moment
            stopped.reset()
    assert interrupted >= 5 or name == "train", "too few of the signals came in time"
    stopped.finish()
    assert stopped.result() == expected
    assert not leftovers(stopped.folder) and not children(stopped.folder)
