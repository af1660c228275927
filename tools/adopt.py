"""Make a trained model one that comes with the library: python tools/adopt.py runs/flow flow

Copies what a finished run exported, and a thinned log of it (and in first/, second/, third/ those of the stages before it), to
diffuspeech/assets/models/NAME, and prints their sizes. The card (README.md) is written by hand, from the log and from what
`diffuspeech evaluate` says.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "diffuspeech" / "assets" / "models"
BUDGET = {"speech-tokens": 8, "flow": 9, "recogniser": 6, "ddm": 6.5, "ar": 6.5, "duration": 0.5}  # MiB
ALL = 40e6  # bytes


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def thin_log(log: Path, to: Path) -> list[dict]:
    "Keep the validations, the first step and every hundredth"
    lines = map(json.loads, log.read_text().splitlines())
    kept = [line for line in lines if "validation" in line or line["step"] == 1 or line["step"] % 100 == 0]
    to.parent.mkdir(exist_ok=True)
    to.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


def earlier_stages(model: Path) -> list[Path]:
    "The logs of the runs that a model started from, the first run first"
    logs = []
    while True:
        config = json.loads(next(model.rglob("config.json")).read_text())
        start = config["metadata"]["run"]["options"].get("init_from")
        if not start:
            return logs
        model = Path(start)
        logs.insert(0, model.parent / "log.jsonl")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("name", choices=BUDGET, help="the model's name in the library")
    args = parser.parse_args()
    source, target = args.run / "model", MODELS / args.name
    if size(source) > BUDGET[args.name] * 2**20:
        sys.exit(f"{args.name}: {size(source) / 2**20:.2f} MiB, and at most {BUDGET[args.name]} are allowed")
    shutil.copytree(source, target, dirs_exist_ok=True)
    for file in target.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    kept = thin_log(args.run / "log.jsonl", target / "log.jsonl")
    for log, place in zip(earlier_stages(target), ("first", "second", "third"), strict=False):
        thin_log(log, target / place / "log.jsonl")
    print(
        f"{args.name}: {size(target) / 2**20:.2f} MiB of {BUDGET[args.name]}, all models "
        f"{size(MODELS) / 1e6:.1f} MB of {ALL / 1e6:.0f}, {len(kept)} lines of the log; "
        f"validation {kept[-1].get('validation')}"
    )
    if not (target / "README.md").exists():
        print(f"{target / 'README.md'} is missing: data, licences, command, time, hardware, scores")
    sys.exit(size(MODELS) > ALL)


if __name__ == "__main__":
    main()
