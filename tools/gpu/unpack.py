"""Put a pack in its place: python unpack.py PARTS -o FOLDER

Imports are tried as soon as the first part is there; the corpora are decoded when all parts are.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from parts import check_parts, read_parts

MODULES = ("torch", "numpy", "soundfile", "safetensors.torch", "einops", "tqdm", "tokenizers", "transformers")
MODULES += ("accelerate", "accelerate.utils", "vector_quantize_pytorch", "diffuspeech.train.loop")
CHECK = """
import importlib, json, sys
missing, known = [], {}
def tried(name, load):
    try:
        load()
    except Exception as e:
        missing.append(f"{name}: {type(e).__name__}: {e}")
names, tasks = json.loads(sys.argv[1])
for name in names:
    tried(name, lambda: importlib.import_module(name))
def transformers_models():
    from diffuspeech.data.audio import import_torchaudio
    import_torchaudio()
    from transformers import LlamaForCausalLM, WhisperForConditionalGeneration
tried("transformers' models", transformers_models)
def task(name):
    from diffuspeech.train.task import find_task
    find_task(name)
for name in tasks:
    tried(name, lambda: task(name))
for name in ("torch", "numpy", "transformers", "accelerate", "soundfile"):
    if name in sys.modules:
        module = sys.modules[name]
        known[name] = f"{getattr(module, '__version__', '?')} {getattr(module, '__file__', '')}"
import torch
print(json.dumps(dict(missing=missing, known=known, gpu=torch.cuda.is_available(), python=sys.version)))
"""


def environment(folder: Path) -> dict[str, str]:
    "The variables with which a process finds the pack"
    folder = folder.resolve()
    path = [str(folder / "code"), str(folder / "site"), os.environ.get("PYTHONPATH", "")]
    more = dict(PYTHONPATH=os.pathsep.join(p for p in path if p), OMP_NUM_THREADS="1")
    more |= dict(DIFFUSPEECH_HOME=str(folder / "home"), DIFFUSPEECH_OFFLINE="1", HF_HUB_OFFLINE="1")
    return os.environ | more


def presets_tasks(folder: Path) -> list[str]:
    "The tasks of the plan"
    runs, tasks = json.loads((folder / "plan.json").read_text()), set()
    for name in {run["preset"] for run in runs}:
        while name and ":" not in name:
            values = json.loads((folder / f"code/diffuspeech/assets/presets/{name}.json").read_text())
            name = values.get("task", "") or values.get("extends", "")
        tasks.add(name)
    return sorted(tasks - {""})


def check_imports(folder: Path) -> dict:
    "What a training would import; ends with a list if anything is missing"
    names = json.dumps([MODULES, presets_tasks(folder)])
    command = [sys.executable, *flags(), "-c", CHECK, names]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"the imports could not be tried: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if found["missing"]:
        raise ValueError("missing here:\n" + "\n".join(found["missing"]))
    return found


def flags() -> list[str]:
    "How this Python was started"
    return ["-S"] if sys.flags.no_site else []


def decode_shard(path: Path):
    "A shard of waves from its Opus, as `corpus prepare` writes it"
    import io

    import soundfile
    import torch

    from diffuspeech.base.checkpoint import write_tensors
    from diffuspeech.base.files import atomic_write
    from diffuspeech.voice.prepared import change_speed, copy_speed

    torch.set_num_threads(1)
    head, _, data = path.read_bytes().partition(b"\n")
    about, waves, tensors = json.loads(head), {}, {}
    for row in about["rows"]:
        if row["copy_of"] is None:
            size = about["sizes"].pop(0)
            sound, data = data[:size], data[size:]
            wave = soundfile.read(io.BytesIO(sound), dtype="float32")[0]
            waves[row["id"]] = torch.from_numpy(wave)
    for row in about["rows"]:
        count = about["samples"][row["id"]]
        wave = waves[row["copy_of"] or row["id"]]
        if row["copy_of"] is not None:
            wave = change_speed(wave, copy_speed(row["copy_of"]))
        if abs(len(wave) - count) > 400:
            raise ValueError(f"{path.name}: {row['id']} has {len(wave)} samples, and had {count}")
        wave = torch.nn.functional.pad(wave, (0, max(0, count - len(wave))))[:count]
        tensors[f"{row['id']}/wave"] = (wave * 32767).round().clamp(-32768, 32767).to(torch.int16)
    atomic_write(path.with_suffix(""), lambda temp: write_tensors(temp, tensors))
    path.unlink()


def decode(folder: Path, workers: int):
    "All shards that are still Opus"
    shards = sorted((folder / "home").rglob("*.safetensors.opus"), key=lambda p: -p.stat().st_size)
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(decode_shard, shards))
    print(f"{len(shards)} shards decoded")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", type=Path, help="folder of the parts, or with --decode the pack")
    parser.add_argument("-o", "--output", type=Path, default=Path("pack"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        decode(args.parts, args.workers)
        return
    start = time.monotonic()
    there, missing = check_parts(args.parts)
    if not there or "-001-of-" not in there[0].name:
        raise ValueError(f"{args.parts}: the first part is not here; it holds the code")
    read_parts(there if not missing else there[:1], args.output)
    found = check_imports(args.output)
    print(json.dumps(found["known"] | dict(gpu=found["gpu"], python=found["python"]), indent=1))
    if missing:
        print(f"imports work; still to come: {', '.join(missing)}")
        return
    here = Path(__file__).resolve()
    command = [sys.executable, *flags(), str(here), str(args.output), "--decode"]
    done = subprocess.run([*command, "--workers", str(args.workers)], env=environment(args.output))
    if done.returncode:
        raise ValueError("the corpora could not be decoded, see above")
    print(f"ready in {time.monotonic() - start:.0f} s: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"unpack: {e}")
