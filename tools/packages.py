"""What some tests and some cells of notebooks need beside the Python environment.

`python tools/packages.py` installs the Debian packages when it is root, else it names them.

A test says `@pytest.mark.needs("flite")`, a cell `#| flite`. Where flite is absent both are skipped, and
`make test` counts them under its name.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def program(name: str) -> Callable[[], bool]:
    return lambda: shutil.which(name) is not None


def paths(*names: str) -> Callable[[], bool]:
    return lambda: all(Path(name).exists() for name in names)


def pretrained(name: str) -> Callable[[], bool]:  # what `diffuspeech fetch` brings
    home = Path(os.environ.get("DIFFUSPEECH_HOME") or Path.home() / ".cache" / "diffuspeech")
    return lambda: (home / "weights" / name).is_dir()


class Package:
    "What must all be here, and the Debian packages that bring it"

    def __init__(self, *checks: Callable[[], bool], debian: str = ""):
        self.checks, self.debian = checks, debian

    def is_here(self) -> bool:
        return all(check() for check in self.checks)


PACKAGES = {
    "chromium": Package(program("chromium"), debian="chromium"),  # the browser tests
    "flite": Package(program("flite"), debian="flite"),  # a synthetic voice: corpora, alignment
    "espeak-ng": Package(program("espeak-ng"), debian="espeak-ng"),  # numbers for the aligner
    "g++": Package(program("g++"), debian="g++"),  # torch.compile
    "bible": Package(
        program("diatheke"), paths("/usr/share/sword/modules"), debian="diatheke sword-text-web"
    ),
    "fortunes": Package(  # sayings; each of the packages has one of these files
        paths("/usr/share/games/fortunes/wisdom", "/usr/share/games/fortunes/riddles"),
        debian="fortunes fortunes-min",
    ),
    "asterisk": Package(  # a human voice and what it reads; ffmpeg decodes its g722
        program("ffmpeg"),
        paths(
            "/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
            "/usr/share/asterisk/sounds/en_US_f_Allison",
        ),
        debian="asterisk-core-sounds-en asterisk-core-sounds-en-g722 ffmpeg",
    ),
    "whisper": Package(pretrained("whisper-tiny.en"), pretrained("whisper-base")),
    "shakespeare": Package(pretrained("shakespeare")),
    "smollm2": Package(pretrained("smollm2")),
    "kokoro": Package(  # its phonemes are espeak-ng's
        program("espeak-ng"),
        pretrained("kokoro"),
        pretrained("kokoro-voices"),
        debian="espeak-ng",
    ),
}
NAMES = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, PACKAGES))}|diatheke|ffmpeg)(?![\w-])")


def absent() -> list[str]:
    "The names in `PACKAGES` of what is not here"
    return [name for name, package in PACKAGES.items() if not package.is_here()]


def reason(missing: list[str]) -> str:
    "Why something is skipped"
    return f"{' and '.join(missing)} not here"


def cell_sources(notebook: Path) -> list[str]:
    "The code of each cell"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def needs(cell: str) -> set[str]:
    "The packages that the directives of a cell name"
    return set(re.findall(r"^#\|\s*(\S+)\s*$", cell, re.M)) & PACKAGES.keys()


def mentions_a_package(path: Path) -> bool:
    "Does a notebook's code, or a test file, name a package? A machine without packages must try these"
    text = "\n".join(cell_sources(path)) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    return NAMES.search(text) is not None


def main():
    debian = [PACKAGES[name].debian for name in absent() if PACKAGES[name].debian]
    if not debian:
        return
    names = sorted({name for names in debian for name in names.split()})
    if os.getuid() == 0 and shutil.which("apt-get"):
        quiet = dict(stdout=subprocess.DEVNULL, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        subprocess.run(["apt-get", "update", "-qq"], **quiet)
        done = subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *names], **quiet)
        if done.returncode == 0:
            return
    print(f"Some tests will be skipped. To run them too: sudo apt-get install {' '.join(names)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
