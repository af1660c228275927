"Files in numbered parts below a size limit, checked by hash. The standard library alone"

import hashlib
import io
import json
import lzma
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

BLOCK = 512  # of a tar
SUMS = "SHA256SUMS"
UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3}


def parse_size(text: str) -> int:
    "61MB -> 61000000"
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"{text}: should be a size, as 61MB")
    return int(float(found[1]) * UNITS[found[2].upper()])


PRESET = 2  # of xz: higher ones take much longer, and gain a percent on weights


def shrink(data: bytes, sample: int = 1 << 18) -> bytes:
    "x and xz of the data, or r and the data where a sample of it hardly shrinks"
    start = max(0, len(data) // 2 - sample // 2)
    some = data[start : start + sample]
    if len(lzma.compress(some, preset=PRESET)) > 0.97 * len(some):
        return b"r" + data
    return b"x" + lzma.compress(data, preset=PRESET)


def grow(data: bytes) -> bytes:
    "What was shrunk"
    return lzma.decompress(data[1:]) if data[:1] == b"x" else data[1:]


def squeeze(data: bytes, sample: int = 1 << 18) -> tuple[str, bytes]:  # the form, for `expand`
    "Data whole, or its even and odd bytes apart, which is smaller for 16-bit floats"
    start = max(0, len(data) // 2 - sample // 2) & ~1
    some = data[start : start + sample]
    sizes = [len(lzma.compress(x, preset=PRESET)) for x in (some, some[0::2], some[1::2])]
    if sizes[0] <= sizes[1] + sizes[2]:
        return "whole", shrink(data)
    low, high = shrink(data[0::2]), shrink(data[1::2])
    return "planes", len(low).to_bytes(8, "little") + low + high


def expand(form: str, data: bytes) -> bytes:
    "What was squeezed"
    if form == "whole":
        return grow(data)
    size = int.from_bytes(data[:8], "little")
    low, high = grow(data[8 : 8 + size]), grow(data[8 + size :])
    whole = bytearray(len(low) + len(high))
    whole[0::2], whole[1::2] = low, high
    return bytes(whole)


def write_parts(
    files: Iterable[tuple[str, bytes]],
    folder: Path,
    limit: int,  # bytes of a part
    name: str = "part",
) -> list[Path]:
    "Squeeze files into tars in their order, a file that does not fit in several pieces, and list the hashes"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}-*.tar"):
        old.unlink()
    budget = limit - 4 * BLOCK - 10240  # a table of contents, and the end of a tar
    if budget < 64 * BLOCK:
        raise ValueError(f"a part of {limit} bytes is too small; at least 100KB")
    pieces: list[list[tuple[str, bytes]]] = [[]]
    room, contents = budget, {}
    for path, data in files:
        form, small = squeeze(data)
        contents[path] = dict(form=form, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        offset = 0
        while offset == 0 or offset < len(small):
            if room < 8 * BLOCK:
                pieces.append([])
                room = budget
            piece = small[offset : offset + room - 2 * BLOCK]
            entry = json.dumps([path, offset, len(small), contents[path]])
            pieces[-1].append((entry, piece))
            room -= 2 * BLOCK + -(-len(piece) // BLOCK) * BLOCK + len(entry) + 8
            offset += max(len(piece), 1)
    paths = []
    for number, some in enumerate(pieces, 1):
        paths.append(folder / f"{name}-{number:03d}-of-{len(pieces):03d}.tar")
        write_tar(paths[-1], some)
        assert paths[-1].stat().st_size <= limit, "the room of a part is counted above"
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in paths)
    (folder / SUMS).write_text(sums)
    return paths


def write_tar(path: Path, pieces: list[tuple[str, bytes]]):
    "A table of contents, and the pieces in its order"
    table = "\n".join(entry for entry, _ in pieces).encode()
    members = [("contents", table), *((f"{k:05d}", data) for k, (_, data) in enumerate(pieces))]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def check_parts(folder: Path) -> tuple[list[Path], list[str]]:  # there, missing
    "The parts of a folder whose hashes are right, and the names of the others"
    file = folder / SUMS
    if not file.is_file():
        raise ValueError(f"{file}: no such file; carry the list of hashes with each part")
    there, missing = [], []
    for line in file.read_text().splitlines():
        expected, name = line.split("  ", 1)
        path = folder / Path(name).name
        if not path.is_file():
            missing.append(path.name)
            continue
        with open(path, "rb") as opened:
            if hashlib.file_digest(opened, "sha256").hexdigest() != expected:
                raise ValueError(f"{path}: its hash is not the listed one; carry it again")
        there.append(path)
    return there, missing


def read_parts(parts: Iterable[Path], folder: Path) -> tuple[list[str], list[str]]:  # written, incomplete
    "Write the files that are complete in some parts, all of them inside the folder"
    found: dict[str, list[tuple[int, int, bytes, dict]]] = {}
    for part in parts:
        with tarfile.open(part) as tar:
            entries = read_member(tar, "contents").decode().splitlines()
            for k, entry in enumerate(entries):
                path, offset, total, about = json.loads(entry)
                found.setdefault(path, []).append((offset, total, read_member(tar, f"{k:05d}"), about))
    written, incomplete = [], []
    for path, pieces in found.items():
        pieces.sort(key=lambda piece: piece[0])
        small, (_, total, _, about) = b"".join(data for _, _, data, _ in pieces), pieces[0]
        if len(small) != total:
            incomplete.append(path)
            continue
        target = folder / path
        if not target.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path}: leads out of {folder}")
        data = expand(about["form"], small)
        if hashlib.sha256(data).hexdigest() != about["sha256"]:
            raise ValueError(f"{path}: is not what was packed; pack it again")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        written.append(path)
    return written, incomplete


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    "A file of a tar"
    opened = tar.extractfile(name)
    assert opened is not None, "parts hold plain files"
    return opened.read()
