"""Make a trained model one that comes with the library: python tools/adopt.py runs/flow flow

Copies what a finished run exported, and a thinned log of it, to diffuspeech/assets/models/NAME, and says what they weigh. The card
(README.md) is written by hand, from the log and from what `diffuspeech evaluate` says.
"""
import json
import shutil
import sys
from pathlib import Path

BUDGET = {"speech-tokens": 8, "flow": 9, "recogniser": 6, "ddm": 6.5, "ar": 6.5, "duration": 0.5, "talker": 5}  # MiB: HOUSE.md has 40 for all

run, name = Path(sys.argv[1]), sys.argv[2]
target = Path(__file__).parent.parent / "diffuspeech" / "assets" / "models" / name
shutil.copytree(run / "model", target, dirs_exist_ok=True)
lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
kept = [line for line in lines if "validation" in line or line["step"] % 100 == 0 or line["step"] == 1]
(target / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
size = sum(f.stat().st_size for f in target.rglob("*") if f.is_file()) / 2**20
print(f"{target.name}: {size:.2f} MiB of {BUDGET[name]}, {len(kept)} of {len(lines)} lines of the log; validation {kept[-1].get('validation')}")
if not (target / "README.md").exists():
    print(f"{target / 'README.md'} is missing: data, licences, command, time, hardware, scores")
sys.exit(size > BUDGET[name])
