"""The missing trainings of the paper's plan as a plan of runs: python tools/gpu/grid.py -o runs.json

With --steps plan the runs keep their registered steps, so that their results count as the plan's.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from diffuspeech.evaluate.paper_cells import Results
from diffuspeech.evaluate.paper_jobs import missing_jobs
from diffuspeech.evaluate.paper_plan import plan_jobs, read_plan, repository_folder, run_folder, train_config
from diffuspeech.train.config import load_preset


def differences(values: dict, base: dict, path: str = "") -> dict:
    "The fields that differ from those of a preset, as --set names them"
    found = {}
    for name, value in values.items():
        old = base.get(name)
        if isinstance(value, dict) and isinstance(old, dict) and path.count(".") < 2:
            found |= differences(value, old, f"{path}{name}.")
        elif value != old:
            found[path + name] = value
    return found


def planned_runs(plan, scale, jobs: list, keep_steps: bool) -> list[dict]:
    "Trainings as runs of a pack, each after the one that it starts from"
    runs = []
    for job in (job for job in jobs if job.kind == "train"):
        run = plan.run(job.run)
        preset = scale.presets[run.decoder][run.stage]
        plain = lambda config: json.loads(json.dumps(asdict(config)))
        config = plain(train_config(plan, scale, run, job.seed, Path("runs")))
        steps, minutes = config.pop("steps"), scale.minutes[run.decoder][run.stage]
        changes = differences(
            json.loads(json.dumps(config)), json.loads(json.dumps(asdict(load_preset(preset))))
        )
        entry = dict(name=run_folder(Path(), job.run, job.seed).name, preset=preset, set=changes)
        entry |= dict(weight=minutes)
        if run.init:
            changes.pop("options.init_from", None)
            entry |= dict(after=run_folder(Path(), run.init, job.seed).name)
        runs.append(entry | (dict(steps=steps) if keep_steps else {}))
    longest = max((run["weight"] for run in runs), default=1.0)
    return [run | dict(weight=round(run["weight"] / longest, 3)) for run in runs]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--plan", type=Path, default=(repository_folder() or Path()) / "plan.json")
    parser.add_argument("--scale", default="small")
    parser.add_argument("--runs", type=Path, help="trained models; default runs/paper-SCALE/runs")
    parser.add_argument("--results", type=Path, help="rows; default results/SCALE beside the plan")
    parser.add_argument("--steps", choices=("budget", "plan"), default="budget")
    args = parser.parse_args()
    plan = read_plan(args.plan)
    scale = plan.scale(args.scale)
    results = Results(args.results or args.plan.parent / "results" / args.scale)
    trained = args.runs or Path("runs", f"paper-{args.scale}", "runs")
    jobs = missing_jobs(plan_jobs(plan, scale), plan, scale, trained, results)
    runs = planned_runs(plan, scale, jobs, args.steps == "plan")
    args.output.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    print(f"{len(runs)} runs: {args.output}")


if __name__ == "__main__":
    main()
