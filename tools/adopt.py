"""Make a trained model one that comes with the library: python tools/adopt.py runs/flow flow

Copies config.json and model.safetensors of a finished run, and a thinned log of it, to diffuspeech/assets/models/NAME, and says what they weigh. The card
(README.md) is written by hand, from the log and from what `diffuspeech evaluate` says.
"""
import json
import shutil
import sys
from pathlib import Path

BUDGET = {"speech-tokens": 8, "flow": 9, "recogniser": 6, "ddm": 6, "ar": 6, "talker": 5}  # MiB

run, name = Path(sys.argv[1]), sys.argv[2]
target = Path(__file__).parent.parent / "diffuspeech" / "assets" / "models" / name
target.mkdir(parents=True, exist_ok=True)
for file in ("config.json", "model.safetensors"):
    shutil.copy(run / "model" / file, target / file)
lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
kept = [line for line in lines if "validation" in line or line["step"] % 100 == 0 or line["step"] == 1]
(target / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
size = sum(f.stat().st_size for f in target.iterdir()) / 2**20
print(f"{target.name}: {size:.2f} MiB of {BUDGET[name]}, {len(kept)} of {len(lines)} lines of the log; validation {kept[-1].get('validation')}")
if not (target / "README.md").exists():
    print(f"{target / 'README.md'} is missing: data, licences, command, time, hardware, scores")
sys.exit(size > BUDGET[name])
