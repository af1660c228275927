"""Speak a plan of sentences with Kokoro on all cores.

python speak.py PARTS -o OUT [--seconds 500] [--workers N]

PARTS has what `corpus.py pack` wrote. Needs numpy, onnxruntime and soundfile alone.
"""

import argparse
import io
import json
import os
import sys
import time
import zipfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import soundfile
from parts import check_parts, read_parts

RATE = 24_000  # of Kokoro


def start(work: Path):
    "What each process loads once"
    import onnxruntime

    global network, styles
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = (work / "kokoro" / "part.bin").read_bytes()
    network = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    styles = {
        path.stem: np.fromfile(path, np.float32).reshape(510, 256) for path in (work / "styles").glob("*.bin")
    }


def speak(line: dict) -> tuple[str, bytes]:
    "One sentence, as Opus"
    ids = line["ids"]
    style = np.stack([styles[name][len(ids)] for name in line["styles"]]).mean(
        0, keepdims=True, dtype=np.float32
    )
    inputs = {
        "tokens": np.array([[0, *ids, 0]]),
        "style": style,
        "speed": np.array([line["speed"]], np.float32),
    }
    wave, file = np.asarray(network.run(None, inputs)[0]).reshape(-1), io.BytesIO()
    wave = wave * min(1.0, 0.95 / max(float(np.abs(wave).max()), 1e-9))
    # 0 is 256 kbit/s and 1 is 6 kbit/s for one channel
    soundfile.write(file, wave, RATE, format="OGG", subtype="OPUS", compression_level=line["compression"])
    return line["id"], file.getvalue()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=500.0, help="then no sentence is begun")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--file-size", type=int, default=15_500_000, help="bytes of one file at most, about")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    work = args.parts / "unpacked"
    there, missing = check_parts(args.parts)
    if missing:
        sys.exit(f"{args.parts}: still to come: {', '.join(missing)}")
    read_parts(there, work)
    lines = [json.loads(text) for text in (work / "sentences.jsonl").read_text().splitlines()]
    args.output.mkdir(parents=True, exist_ok=True)
    number, size, count, archive = 0, 0, 0, None
    with get_context("spawn").Pool(args.workers, start, (work,)) as pool:
        for id, sound in pool.imap_unordered(speak, lines, chunksize=1):
            if archive is None or size + len(sound) > args.file_size:
                if archive:
                    archive.close()
                archive = zipfile.ZipFile(args.output / f"sounds-{number:02d}.zip", "w")
                number, size = number + 1, 0
            archive.writestr(f"{id}.opus", sound)
            size, count = size + len(sound) + 250, count + 1
            if time.monotonic() > end:
                pool.terminate()
                break
    if archive:
        archive.close()
    print(f"{count} of {len(lines)} sentences in {number} files")


if __name__ == "__main__":
    main()
