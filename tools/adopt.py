"""Make a trained model one that comes with the library: python tools/adopt.py runs/flow flow

Copies what a finished run exported, and a thinned log of it (and in first/, second/, ... those of the stages before it), to diffuspeech/assets/models/NAME, and says what they weigh. The card
(README.md) is written by hand, from the log and from what `diffuspeech evaluate` says.
"""

import json
import shutil
import sys
from pathlib import Path

BUDGET = {"speech-tokens": 8, "flow": 9, "recogniser": 6, "ddm": 6.5, "ar": 6.5, "duration": 0.5}  # MiB
ALL = 40e6  # bytes


def size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


run, name = Path(sys.argv[1]), sys.argv[2]
if name not in BUDGET or size(run / "model") > BUDGET[name] * 2**20:
    sys.exit(
        f"{name}: {size(run / 'model') / 2**20:.2f} MiB; there is room for "
        + ", ".join(f"{k} ({v})" for k, v in BUDGET.items())
    )
models = Path(__file__).parent.parent / "diffuspeech" / "assets" / "models"
target = models / name
shutil.copytree(run / "model", target, dirs_exist_ok=True)
for file in target.rglob("*"):
    file.chmod(0o755 if file.is_dir() else 0o644)


def thin_log(log: Path, to: Path) -> list[dict]:
    kept = [
        line
        for line in map(json.loads, log.read_text().splitlines())
        if "validation" in line or line["step"] % 100 == 0 or line["step"] == 1
    ]
    to.parent.mkdir(exist_ok=True)
    to.write_text("".join(json.dumps(line) + "\n" for line in kept))
    return kept


kept = thin_log(run / "log.jsonl", target / "log.jsonl")
stages, model = [], target
while start := json.loads(next(model.rglob("config.json")).read_text())["metadata"]["run"]["options"].get(
    "init_from"
):
    model = Path(start)
    stages.insert(0, model.parent / "log.jsonl")
for log, place in zip(stages, ("first", "second", "third"), strict=False):
    thin_log(log, target / place / "log.jsonl")
print(
    f"{name}: {size(target) / 2**20:.2f} MiB of {BUDGET[name]}, all models {size(models) / 1e6:.1f} MB of {ALL / 1e6:.0f}, {len(kept)} lines of the log; validation {kept[-1].get('validation')}"
)
if not (target / "README.md").exists():
    print(f"{target / 'README.md'} is missing: data, licences, command, time, hardware, scores")
sys.exit(size(models) > ALL)
