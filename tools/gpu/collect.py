"""Trained models as small files, and back.

python collect.py pack FOLDER/runs -o OUT [--part-size 16MiB] [NAME ...]
python collect.py unpack OUT -o runs/from-gpu
"""

import argparse
import sys
from pathlib import Path

from parts import check_parts, parse_size, read_parts, write_parts

KEPT = ("log.jsonl",)  # of a run, beside its model


def run_files(runs: Path, names: list[str]) -> list[tuple[str, bytes]]:
    "Models and logs of the finished runs"
    found = []
    for folder in sorted(p for p in runs.iterdir() if p.is_dir()):
        if names and folder.name not in names or not (folder / "model").is_dir():
            continue
        paths = [p for p in sorted((folder / "model").rglob("*")) if p.is_file()]
        paths += [folder / name for name in KEPT if (folder / name).is_file()]
        found += [(p.relative_to(runs).as_posix(), p.read_bytes()) for p in paths]
    lacking = set(names) - {path.split("/")[0] for path, _ in found}
    if lacking or not found:
        raise ValueError(f"{runs}: no exported model of {', '.join(sorted(lacking)) or 'any run'}")
    drive = runs.parent / "drive.jsonl"
    return found + ([("drive.jsonl", drive.read_bytes())] if drive.is_file() else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="pack: these runs alone")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--part-size", type=parse_size, default="16MB")
    args = parser.parse_args()
    if args.what == "pack":
        paths = write_parts(run_files(args.folder, args.names), args.output, args.part_size, "models")
        print(f"{len(paths)} files, {sum(p.stat().st_size for p in paths) / 1e6:.1f} MB: {args.output}")
        return
    there, missing = check_parts(args.folder)
    written, incomplete = read_parts(there, args.output)
    runs = sorted({path.split("/")[0] for path in written if "/" in path})
    print(f"{len(runs)} runs: {', '.join(runs)}")
    if missing or incomplete:
        raise ValueError(f"{len(missing)} files are not here: {', '.join(missing)}; incomplete: {incomplete}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as e:
        sys.exit(f"collect: {e}")
