"""Train the runs of a pack in a budget of seconds: python drive.py FOLDER/plan.json --seconds N

A few processes at once, each run after the one that it starts from. Within the warm-up of the learning
rate, in which a step does not depend on the number of steps, a run measures how many updates a second it
does, and sets its steps so that the schedule ends in its share of the time. Started again, it does what is
left. All that happens is a line of FOLDER/drive.jsonl.
"""

import argparse
import heapq
import json
import subprocess
import sys
import time
from pathlib import Path
from queue import Queue
from threading import Thread

from unpack import environment, flags

MARGIN = 0.04  # of a run's time, for what was not foreseen
START = 25.0  # seconds until a run does its first step
CHECKS = 8  # how often a run looks whether it is in time, and corrects its steps


def done(folder: Path, name: str) -> bool:
    "Whether a run has exported its model"
    return (folder / "runs" / name / "model" / "done.json").is_file()


def makespan(
    runs: list[dict],  # that have not begun
    processes: int,
    second: float,  # for which a run of weight 1 trains
    running: dict[str, float],  # the seconds that each still has
) -> float:
    "When the last run ends"
    ends, waiting = dict(running), list(runs)
    free = [*running.values(), *[0.0] * (processes - len(running))]
    heapq.heapify(free)
    ready = lambda run: ends.get(run.get("after"), 0.0)
    while waiting:  # a run stands after the one that it starts from
        run = min(waiting, key=lambda r: 1e9 if r.get("after") in {w["name"] for w in waiting} else ready(r))
        waiting.remove(run)
        start = max(heapq.heappop(free), ready(run))
        ends[run["name"]] = start + START + second * run.get("weight", 1.0)
        heapq.heappush(free, ends[run["name"]])
    return max(ends.values(), default=0.0)


def share_seconds(runs: list[dict], processes: int, seconds: float, running: dict[str, float]) -> float:
    "How long a run of weight 1 may train, so that all end in time"
    low, high = 0.0, seconds
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if makespan(runs, processes, middle, running) <= seconds else (low, middle)
    return max(low, 1.0)


class Pace:
    "Sets the steps of a run, seen from its `on_step`"

    def __init__(
        self,
        config,  # TrainConfig, whose steps are changed while it trains
        deadline: float,  # of the training, on the monotonic clock
        warmup: int = 5,  # steps before the clock starts
        measured: int = 25,  # steps that are measured first
        say=print,
    ):
        self.config, self.deadline, self.say = config, deadline, say
        self.warmup = min(warmup, max(1, config.warmup_steps // 3))
        self.first = max(self.warmup + 1, min(self.warmup + measured, config.warmup_steps))
        self.next = self.first
        self.clock, self.at = 0.0, 0

    def set(self, **changes):
        "Change the configuration of the run; the loop looks at it before each step"
        for name, value in changes.items():
            object.__setattr__(self.config, name, value)  # frozen for everybody else

    def __call__(self, line: dict):
        step, now = line["step"], time.monotonic()
        if self.at == 0 and step >= self.warmup:
            self.clock, self.at = now, step
        elif step >= self.next and step < self.config.steps and step > self.at:
            rate = (step - self.at) / (now - self.clock)
            left = int(rate * (self.deadline - now))
            steps = max(step + 1, step + left)
            if step == self.first or abs(steps - self.config.steps) > 0.02 * self.config.steps:
                every = max(1, -(-steps // 3)) if step == self.first else self.config.validate_every
                self.set(steps=steps, validate_every=every, save_every=steps)
                self.say(dict(event="pace", step=step, updates_per_second=round(rate, 3), steps=steps))
            self.next = step + max(1, (steps - step) // CHECKS)
            self.clock, self.at = now, step
        elif now > self.deadline and step < self.config.steps - 1:
            self.set(steps=step + 1)  # one more step ends the run, which is validated and exported
            self.say(dict(event="cut", step=step))


def configure(run: dict):
    "The training of a run"
    from diffuspeech.train.task import resolve_preset

    changes = dict(run.get("set", {}))
    if run.get("after"):
        changes["options.init_from"] = f"runs/{run['after']}/model"
    if run.get("steps"):
        changes["steps"] = run["steps"]
    return resolve_preset(run["preset"], [f"{k}={json.dumps(v)}" for k, v in changes.items()])


def train_one(run: dict, seconds: float, device: str):
    "One run, in a process of its own"
    import torch

    from diffuspeech.train.loop import train

    torch.set_num_threads(1)
    begin = time.monotonic()
    say = lambda line: print(json.dumps(line | dict(run=run["name"])), flush=True)
    config, folder = configure(run), Path("runs") / run["name"]
    pace = None if run.get("steps") else Pace(config, begin + seconds * (1 - MARGIN), say=say)
    found = train(config, folder, device, False, pace)
    if "stopped" in found:
        raise SystemExit(f"stopped after step {found['stopped']:.0f}")
    took = round(time.monotonic() - begin, 1)
    (folder / "model" / "done.json").write_text(json.dumps(dict(steps=config.steps, seconds=took)) + "\n")
    say(dict(event="end", steps=config.steps, seconds=took) | {k: round(v, 5) for k, v in found.items()})


def prepare(runs: list[dict]):
    "Encode the corpora, once before all runs: the states of a frozen encoder, kept beside them"
    from diffuspeech.train.task import find_task

    kept = set()
    for run in runs:
        config = configure(run)
        options = {k: v for k, v in config.options.items() if k in ("recogniser", "tokenizer", "taste")}
        taste = options.pop("taste", {})
        key = json.dumps(
            [config.data, config.task, options, taste.get("key_layer"), taste.get("value_layer")]
        )
        if key in kept or run.get("after"):
            continue  # a later stage has the states of its first one
        kept.add(key)
        start = time.monotonic()
        find_task(config.task)(config)
        print(json.dumps(dict(event="prepared", run=run["name"], seconds=round(time.monotonic() - start, 1))))


class Driver:
    "Starts processes, and writes down what they say"

    def __init__(self, plan: Path, device: str):
        self.plan, self.folder, self.device = plan, plan.parent.resolve(), device
        self.start, self.lines = time.monotonic(), Queue()

    def log(self, line: dict):
        line = dict(at=round(time.monotonic() - self.start, 1)) | line
        with open(self.folder / "drive.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def spawn(self, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, *flags(), str(Path(__file__).resolve()), str(self.plan.resolve())]
        command += [*arguments, "--device", self.device]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=environment(self.folder),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        Thread(target=self.listen, args=(process, arguments), daemon=True).start()
        return process

    def listen(self, process: subprocess.Popen, arguments: tuple[str, ...]):
        "Lines of JSON are for the log; of all else the end is kept, to be shown if the process fails"
        tail: list[str] = []
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith('{"'):
                self.lines.put(json.loads(text))
            else:
                tail = [*tail[-15:], text.rstrip()]
        code = process.wait()
        name = arguments[1] if arguments[0] == "--run" else arguments[0]
        ended = dict(event="exit", run=name, code=code)
        self.lines.put(ended | (dict(output=tail) if code else {}))

    def wait(self) -> dict:
        "The next end of a process; what is said meanwhile is logged"
        while True:
            line = self.lines.get()
            self.log(line)
            if line["event"] == "exit":
                return line


def drive(driver: Driver, runs: list[dict], seconds: float, processes: int) -> list[str]:  # that failed
    "All runs, as soon as each can start"
    deadline = driver.start + seconds
    driver.spawn("--prepare")
    if driver.wait()["code"]:
        return ["prepare"]
    waiting, running, failed = [run for run in runs if not done(driver.folder, run["name"])], {}, []
    while waiting or running:
        for run in list(waiting):
            if run.get("after") in failed:
                waiting.remove(run)
                failed.append(run["name"])
        ready = [run for run in waiting if not run.get("after") or done(driver.folder, run["after"])]
        for run in ready[: processes - len(running)]:
            now = time.monotonic()
            left = {name: max(end - now, 0.0) for name, end in running.items()}
            own = START + share_seconds(waiting, processes, deadline - now, left) * run.get("weight", 1.0)
            waiting.remove(run)
            running[run["name"]] = now + own
            driver.log(dict(event="start", run=run["name"], seconds=round(own, 1)))
            driver.spawn("--run", run["name"], "--seconds", f"{own:.1f}")
        if not running:
            failed += [run["name"] for run in waiting]
            break
        ended = driver.wait()
        running.pop(ended["run"])
        if ended["code"] or not done(driver.folder, ended["run"]):
            failed.append(ended["run"])
    return failed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("--seconds", type=float, default=540.0, help="for all runs together")
    parser.add_argument("--processes", type=int, default=6, help="runs at once")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = json.loads(args.plan.read_text(encoding="utf-8"))
    if args.prepare:
        prepare(runs)
    elif args.run:
        run = next(run for run in runs if run["name"] == args.run)
        train_one(run, args.seconds, args.device)
    else:
        failed = drive(Driver(args.plan, args.device), runs, args.seconds, args.processes)
        if failed:
            raise ValueError(
                f"{len(failed)} runs failed: {', '.join(failed)}; see {args.plan.parent / 'drive.jsonl'}"
            )


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"drive: {e}")
