"""All tests, as `make test` runs them: python tools/test.py [--quick]

Checks of the sources first, then every notebook, then every test. What needs a package that is not installed
is skipped (tools/packages.py lists what that may be). The last line says what passed, what was skipped and
why, how long it took and where the log is. --quick opens only the notebooks and the test files that name
such a package: enough to see that a machine without them passes.
"""

import argparse
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

from packages import PACKAGES, REPO, absent, cell_sources, mentions_a_package, needs, reason

BIN = Path(sys.executable).parent
LOG = REPO / "_build" / "test.log"
JUNIT = REPO / "_build" / "tests.xml"
ENV = os.environ | {
    "DIFFUSPEECH_SCALE": os.environ.get("DIFFUSPEECH_SCALE", "tiny"),  # the same code on fewer clips
    "OMP_NUM_THREADS": "1",
    "KINETO_LOG_LEVEL": "6",  # torch's profiler logs each start and stop
    "PLOTLY_RENDERER": "plotly_mimetype",
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}


def run(*command) -> int:
    "Run a command; what it prints goes to the screen and to the log"
    with open(LOG, "ab") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=REPO,
            env=ENV,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.flush()
            log.write(line)
    return process.wait()


def require(step: str, *command):
    "Stop at the first step that fails"
    if run(*command):
        sys.exit(f"{step} failed, see above; log: {LOG.relative_to(REPO)}")


def notebooks(quick: bool) -> list[Path]:
    "All notebooks; with `quick` those that name a package"
    found = [p for p in sorted((REPO / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    return [p for p in found if not quick or mentions_a_package(p)]


def skipped_cells(paths: list[Path], flags: set[str]) -> Counter:
    "How many cells are skipped for the lack of which packages"
    reasons = Counter()
    for cell in (cell for path in paths for cell in cell_sources(path)):
        if lacking := needs(cell) & flags:
            reasons[reason(sorted(lacking))] += 1
    return reasons


def test_notebooks(paths: list[Path], missing: list[str]) -> Counter:
    "Run the notebooks, without the cells that need what is missing; the reasons of those that were skipped"
    names = "|".join(sorted({re.escape(path.stem) for path in paths}))
    here = " ".join(name for name in PACKAGES if name not in missing)
    only = ("--file_re", rf"^({names})\.ipynb$", "--flags", here)
    require("A notebook", BIN / "nbdev_test", "--n_workers", 2, "--timing", *only)
    return skipped_cells(paths, set(missing))


def read_junit() -> tuple[int, Counter]:
    "Passed tests, and the reasons of those that were skipped"
    cases = list(ET.parse(JUNIT).iter("testcase"))
    reasons = Counter(
        s.get("message", "").removeprefix("Skipped: ") for c in cases for s in c.iter("skipped")
    )
    return len(cases) - reasons.total(), reasons


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def summary(notebooks: int, cells: Counter, tests: int, skips: Counter, seconds: float) -> str:
    "The closing line"
    reasons = []
    for why in sorted(cells | skips):
        numbers = [counted(n, noun) for n, noun in ((cells[why], "cell"), (skips[why], "test")) if n]
        reasons.append(f"{why}: {' and '.join(numbers)}")
    skipped = f"skipped {counted(cells.total(), 'cell')} and {counted(skips.total(), 'test')}"
    passed = f"passed {counted(notebooks, 'notebook')} and {counted(tests, 'test')}"
    why = f" ({'; '.join(reasons)})" if reasons else ""
    return f"{passed}, {skipped}{why}, in {seconds:,.0f} s; log: {LOG.relative_to(REPO)}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only what names a package that may be absent")
    quick = parser.parse_args().quick
    start = time.monotonic()
    LOG.parent.mkdir(exist_ok=True)
    LOG.unlink(missing_ok=True)
    run(sys.executable, "tools/packages.py")
    for name in ("whisper-tiny.en", "whisper-base", "shakespeare"):
        fetched = run(BIN / "diffuspeech", "fetch", name)
        if fetched not in (0, 3):  # 3: no network; what needs these files is skipped
            sys.exit(fetched)
    if not quick:
        require("A check of the sources", sys.executable, "tools/check.py")
        require("The type checker", BIN / "pyrefly", "check", "--output-format", "min-text")
        require("A test of the layout", sys.executable, "-m", "pytest", "tests/test_layout.py")
    missing, paths = absent(), notebooks(quick)
    cells = test_notebooks(paths, missing)
    tests = (
        [p for p in sorted((REPO / "tests").rglob("test_*.py")) if mentions_a_package(p)]
        if quick
        else ["tests"]
    )
    require("A test", sys.executable, "-m", "pytest", f"--junitxml={JUNIT}", "--durations=15", *tests)
    print(summary(len(paths), cells, *read_junit(), time.monotonic() - start))


if __name__ == "__main__":
    main()
