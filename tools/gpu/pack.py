"""A plan of runs, and all that they need, as parts that another machine can be given.

python tools/gpu/pack.py PLAN -o FOLDER [--part-size 61MB] [--wheels FOLDER] [--packages NAME ...]
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

from parts import parse_size, write_parts

from diffuspeech.base.pretrained import PRETRAINED, expand_home, local_folder
from diffuspeech.train.config import TrainConfig
from diffuspeech.train.task import resolve_preset

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
TOOLS = ("parts.py", "unpack.py", "drive.py", "collect.py", "README.md")
# what a machine with torch and transformers may lack; those with compiled code come as wheels of its Python
PACKAGES = ("soundfile", "cffi", "pycparser", "vector-quantize-pytorch", "einx", "frozendict")
PACKAGES += ("torch-einops-utils", "loguru", "einops", "accelerate", "tqdm")
UNUSED = ("clips", "pack", "paper", "voices", "workbench")  # assets that no training reads
MODELS = ("recogniser", "tokenizer", "language_model", "init_from", "codec")  # options that name one
SPEECH = ("diffuspeech.tasks.decoder:", "diffuspeech.tasks.distill:", "diffuspeech.tasks.duration:")
TALK = ("diffuspeech.tasks.talk",)


def read_runs(path: Path) -> list[dict]:
    "The runs of a plan, checked"
    runs, names = json.loads(path.read_text(encoding="utf-8")), set()
    for run in runs:
        unexpected = set(run) - {"name", "preset", "set", "after", "steps", "weight"}
        if unexpected or not {"name", "preset"} <= set(run):
            raise ValueError(f"{path}: {run}: has name, preset, and perhaps set, after, steps, weight")
        if run["name"] in names or Path(run["name"]).name != run["name"]:
            raise ValueError(f"{path}: {run['name']}: the name stands twice, or is not that of a folder")
        if run.get("after") and run["after"] not in names:
            raise ValueError(
                f"{path}: {run['name']}: comes after {run['after']}, which has to stand before it"
            )
        names.add(run["name"])
    return runs


def configure(run: dict) -> TrainConfig:
    "The training of a run"
    changes = [f"{name}={json.dumps(value)}" for name, value in run.get("set", {}).items()]
    if run.get("after"):
        changes.append(f"options.init_from=runs/{run['after']}/model")
    return resolve_preset(run["preset"], changes)


def folder_files(folder: Path, name: str) -> list[tuple[str, bytes]]:
    "All files of a folder, below another name"
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return [(f"{name}/{p.relative_to(folder).as_posix()}", p.read_bytes()) for p in paths]


def code_files(models: set[str]) -> list[tuple[str, bytes]]:
    "The library as it is committed, with the built-in models that are needed"
    git = ["git", "-C", str(REPO), "archive", "HEAD", "diffuspeech"]
    archive = subprocess.run(git, capture_output=True, check=True).stdout
    found = []
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            parts = Path(member.name).parts
            unused = parts[1:2] == ("assets",) and parts[2:3] and parts[2] in UNUSED
            if parts[1:3] == ("assets", "models") and len(parts) > 3:
                unused = parts[3] not in models
            if member.isfile() and not unused:
                opened = tar.extractfile(member)
                assert opened is not None
                found.append((f"code/{member.name}", opened.read()))
    return found


def site_files(packages: list[str], wheels: Path | None) -> list[tuple[str, bytes]]:
    "Packages of this environment, those with code for one Python alone from wheels"
    found, lacking = {}, []
    for wheel in sorted(wheels.glob("*.whl")) if wheels else []:
        with zipfile.ZipFile(wheel) as z:
            found |= {f"site/{n}": z.read(n) for n in z.namelist() if not n.endswith("/")}
        packages = [p for p in packages if canonical(p) != canonical(wheel.name.split("-")[0])]
    for name in packages:
        files = metadata.files(name) or []
        if any(f.suffix == ".so" and ".cpython-" in f.name for f in files):
            lacking.append(f"{name}=={metadata.version(name)}")
        for f in files:
            if f.suffix != ".pyc" and ".." not in f.parts and Path(str(f.locate())).is_file():
                found[f"site/{f.as_posix()}"] = Path(str(f.locate())).read_bytes()
    if lacking:
        print(
            f"note: {', '.join(lacking)}: compiled for this Python alone; for another one get wheels: "
            f"pip download --no-deps --only-binary :all: --python-version 3.12 -d WHEELS {' '.join(lacking)}",
            file=sys.stderr,
        )
    return list(found.items())


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def encode_shard(folder: Path, shard: str, rows: list[dict], kbps: float) -> bytes:
    "The recordings of a shard as Opus after a line that describes them; copies are made from them again"
    from safetensors import safe_open

    from diffuspeech.data.shards import encode_opus

    file, sounds, samples = safe_open(folder / shard, "pt"), [], {}
    for row in rows:
        wave = file.get_tensor(f"{row['id']}/wave")
        samples[row["id"]] = len(wave)
        if row["copy_of"] is None:
            sounds.append(encode_opus(wave.float() / 32767, kbps))
    about = dict(rows=rows, samples=samples, sizes=[len(sound) for sound in sounds])
    return json.dumps(about).encode() + b"\n" + b"".join(sounds)


def speech_files(folder: Path, name: str, kbps: float, work: Path) -> list[tuple[str, bytes]]:
    "A corpus of recordings; prepared first where it is not yet"
    from diffuspeech.voice.prepared import prepare_corpus, read_index

    found = []
    for split in ("dev", "train"):
        prepared = folder / "prepared" / split
        if not (prepared / "index.json").is_file():
            prepared = prepare_corpus(folder / f"{split}.jsonl", work / name / split, vocoder="none")
        index, target = read_index(prepared), f"home/corpora/{name}/prepared/{split}"
        found += [(f"{target}/{p.name}", p.read_bytes()) for p in sorted(prepared.glob("ids-*.safetensors"))]
        index["vocoder"] = "none"  # features are not carried
        found.append((f"{target}/index.json", json.dumps(index).encode()))
        with ProcessPoolExecutor() as pool:
            jobs = [(prepared, shard, rows, kbps) for shard, rows in index["shards"].items()]
            sounds = list(pool.map(encode_shard, *zip(*jobs)))
        found += [(f"{target}/{shard}.opus", data) for shard, data in zip(index["shards"], sounds)]
    return found


def talk_files(folder: Path, name: str, tokenizer: str) -> list[tuple[str, bytes]]:
    "A corpus of spoken questions as text and speech tokens, without the recordings"
    from diffuspeech.talk.qa import read_questions
    from diffuspeech.tasks.speech import load_tokenizer
    from diffuspeech.tasks.talk import question_tokens

    found, model = [], load_tokenizer(tokenizer)
    for split in ("train", "dev"):
        question_tokens(read_questions(folder / f"{split}.jsonl", thought=False), model, folder, split)
        names = (f"{split}.jsonl", f"tokens-{model.version}-{split}.safetensors")
        found += [(f"home/corpora/{name}/{n}", (folder / n).read_bytes()) for n in names]
    return found


class Pack:
    "What the runs of a plan need, collected run by run"

    def __init__(self, kbps: float, work: Path):
        self.kbps, self.work, self.kept = kbps, work, {}
        self.models, self.names, self.runs = {"speech-tokens"}, set(), []

    def add_run(self, run: dict):
        "Data and models of a run; those of this machine get their places on the other one"
        config, changes = configure(run), dict(run.get("set", {}))
        for option in MODELS:
            value = config.options.get(option, "")
            if value in PRETRAINED:
                self.keep(f"home/weights/{value}", local_folder(value))
            elif value == "small" and option == "recogniser":
                self.models.add("recogniser")
            elif (
                value and value not in ("small", "tiny") and not (option == "init_from" and run.get("after"))
            ):
                changes[f"options.{option}"] = self.add_model(option, value)
        if config.options.get("language_model", "smollm2") == "smollm2" and config.task.startswith(TALK):
            self.keep("home/weights/smollm2", local_folder("smollm2"))
        data = expand_home(config.data).resolve()
        changes["data"] = f"~/.cache/diffuspeech/corpora/{data.name}"
        if str(data) not in self.names:
            self.names.add(str(data))
            self.add_corpus(config, data)
        self.runs.append(run | {"set": changes})

    def add_corpus(self, config: TrainConfig, data: Path):
        if config.task.startswith(SPEECH):
            files = speech_files(data, data.name, self.kbps, self.work)
        elif config.task.startswith(TALK):
            files = talk_files(data, data.name, config.options.get("tokenizer", "small"))
        else:
            raise ValueError(f"task={config.task}: needs a vocoder's features, which are not packed")
        self.kept |= dict(files)

    def add_model(self, option: str, value: str) -> str:
        "A model's folder, and where it is on the other machine"
        if option == "init_from" and value == "ddm":
            self.models.add("ddm")
            return value
        if not Path(value).is_dir():
            raise ValueError(f"options.{option}={value}: no such folder; train or fetch it first")
        name = f"models/{'-'.join(Path(value).resolve().parts[-3:])}"
        self.keep(name, Path(value))
        return name

    def keep(self, name: str, folder: Path):
        if not any(kept.startswith(f"{name}/") for kept in self.kept):
            self.kept |= dict(folder_files(folder, name))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--part-size", type=parse_size, default="61MB")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for the other machine's Python")
    parser.add_argument("--packages", nargs="*", default=[], help="more packages of this environment")
    parser.add_argument("--kbps", type=float, default=24.0, help="of Opus")
    args = parser.parse_args()
    work = args.output / "work"
    pack = Pack(args.kbps, work)
    for run in read_runs(args.plan):
        pack.add_run(run)
    first = {"plan.json": json.dumps(pack.runs, indent=1).encode()}
    first |= dict(code_files(pack.models)) | dict(site_files([*PACKAGES, *args.packages], args.wheels))
    files = first | dict(sorted(pack.kept.items(), key=lambda item: len(item[1])))
    paths = write_parts(files.items(), args.output, args.part_size)
    shutil.rmtree(work, ignore_errors=True)
    for name in TOOLS:
        if (HERE / name).is_file():
            shutil.copy(HERE / name, args.output)
    size = sum(path.stat().st_size for path in paths)
    print(f"{len(paths)} parts, {size / 1e6:.1f} MB, {len(pack.runs)} runs: {args.output}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        main()
    except (ValueError, RuntimeError) as e:
        sys.exit(f"pack: {e}")
