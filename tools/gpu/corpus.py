"""The sentences of the built-in corpus, spoken on another machine.

python tools/gpu/corpus.py pack SPLIT=SHARE ... -o FOLDER [--part-size 61MB] [--corpus FOLDER]
python tools/gpu/corpus.py unpack SOUNDS [--corpus FOLDER] [--workers N]

`pack` takes that share of each split's clips which are not made yet; `unpack` checks each sound against its
text and files it as `diffuspeech corpus build small` does, which goes on from there.
"""

import argparse
import io
import json
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import soundfile
import torch
from parts import parse_size, write_parts
from tqdm import tqdm

from diffuspeech.base.pretrained import expand_home, local_folder
from diffuspeech.base.workers import run_jobs
from diffuspeech.data import builtin
from diffuspeech.data.audio import resample
from diffuspeech.data.voices import VOICES, Voice, kokoro_ids, trim
from diffuspeech.data.voices import speak as speak_here

COMPRESSION = {"train": 0.92, "dev": 0.85}  # of Opus: about 26 and 44 kbit/s; test clips as dev
CORPUS = "~/.cache/diffuspeech/corpora/small"


def choose(shares: dict[str, float], folder: Path) -> list[builtin.Clip]:
    "The first clips of each voice that Kokoro speaks and that are not made yet, equal shares of all voices"
    clips = builtin.plan_corpus("small")
    done, chosen = builtin.read_journal(folder, clips), []
    jobs = builtin._plan_jobs(clips, {}, folder, dict.fromkeys(builtin.ORDER, True))
    for split, share in shares.items():
        own = [clip for some, *_ in jobs for clip in some if (clip.split, clip.engine) == (split, "kokoro")]
        chosen += [clip for clip in own[: round(share * len(own))] if clip.id not in done]
    return chosen


def sentence(clip: builtin.Clip) -> str:
    "A line of the plan"
    styles = VOICES[clip.voice].styles
    line = dict(id=clip.id, ids=kokoro_ids(styles, clip.source), styles=styles, speed=clip.speed)
    return json.dumps(line | dict(compression=COMPRESSION.get(clip.split, COMPRESSION["dev"])))


def sentences(clips: Sequence[builtin.Clip]) -> list[str]:
    "Lines of the plan"
    return [sentence(clip) for clip in clips]


def pack(clips: Sequence[builtin.Clip], output: Path, limit: int):
    "Kokoro, its styles and the plan, in parts"
    jobs = [(clips[k : k + 100],) for k in range(0, len(clips), 100)]
    spoken = dict(tqdm(run_jobs(sentences, jobs), desc="phonemes", total=len(jobs), unit="hundred clips"))
    lines = [line for k in sorted(spoken) for line in spoken[k]]
    names = sorted({style for line in lines for style in json.loads(line)["styles"]})
    voices = local_folder("kokoro-voices")
    files = [("sentences.jsonl", ("\n".join(lines) + "\n").encode())]
    files += [(f"styles/{name}.bin", (voices / f"{name}.bin").read_bytes()) for name in names]
    files += [("kokoro/part.bin", (local_folder("kokoro") / "part.bin").read_bytes())]
    paths = write_parts(files, output, limit)
    print(
        f"{len(lines)} sentences in {len(paths)} parts, {sum(p.stat().st_size for p in paths) / 1e6:.0f} MB"
    )


def read_sounds(folder: Path) -> dict[str, bytes]:
    "Opus files by the clip's id"
    found = {}
    for path in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                found[Path(name).stem] = archive.read(name)
    return found


def file_clips(spoken: list[tuple[builtin.Clip, bytes]], folder: Path) -> tuple[list[dict], list[str]]:
    "Lines of the journal, as of clips that are made here"
    waves = {}
    for clip, sound in spoken:
        wave, rate = soundfile.read(io.BytesIO(sound), dtype="float32")
        wave = trim(resample(torch.from_numpy(wave), rate))
        waves[clip.voice, clip.source, clip.speed] = wave * min(1.0, 0.95 / wave.abs().max().item())

    def speak(voice: Voice, source: str, speed: float = 1.0) -> torch.Tensor:  # another speed is spoken here
        known = waves.get((voice.name, source, speed))
        return speak_here(voice, source, speed) if known is None else known

    builtin.speak = speak
    try:
        return builtin.make([clip for clip, _ in spoken], folder)
    finally:
        builtin.speak = speak_here


def unpack(sounds: dict[str, bytes], folder: Path, workers: int):
    "Check and file what was spoken"
    clips = builtin.plan_corpus("small")
    done = builtin.read_journal(folder, clips)
    new = [clip for clip in clips if clip.id in sounds and clip.id not in done]
    jobs = [([(c, sounds[c.id]) for c in some], folder) for some in builtin.pieces(new)]
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / builtin.JOURNAL, "a") as journal,
        tqdm(total=len(new), desc="check", unit="clip") as bar,
    ):
        for _, (lines, errors) in run_jobs(file_clips, jobs, workers):
            journal.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            journal.flush()
            bar.update(len(lines))
            for error in errors:
                bar.write(error)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", type=expand_home, default=expand_home(CORPUS))
    verbs = parser.add_subparsers(dest="verb", required=True)
    packed = verbs.add_parser("pack")
    packed.add_argument("shares", nargs="+", help="train=0.4 dev=1")
    packed.add_argument("-o", "--output", type=Path, required=True)
    packed.add_argument("--part-size", type=parse_size, default="61MB")
    spoken = verbs.add_parser("unpack")
    spoken.add_argument("sounds", type=Path)
    spoken.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    if args.verb == "unpack":
        return unpack(read_sounds(args.sounds), args.corpus, args.workers)
    shares = {split: float(share) for split, share in (text.split("=") for text in args.shares)}
    if unknown := set(shares) - set(builtin.ORDER):
        sys.exit(f"{', '.join(unknown)}: no such split; there are {', '.join(builtin.ORDER)}")
    pack(choose(shares, args.corpus), args.output, args.part_size)


if __name__ == "__main__":
    main()
