"Before the tests: is the export what the notebooks say, are the notebooks clean, does ruff agree?"

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENV = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def differing(a: Path, b: Path, endings: tuple[str, ...]) -> list[str]:
    "Paths under `a` or `b` whose files are not the same"
    names = {
        p.relative_to(top)
        for top in (a, b)
        for e in endings
        for p in top.rglob(f"*{e}")
        if not {"__pycache__", ".ipynb_checkpoints"} & set(p.parts)
    }
    return sorted(
        str(n)
        for n in names
        if not ((a / n).exists() and (b / n).exists() and filecmp.cmp(a / n, b / n, shallow=False))
    )


def main():
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "repo"
        hide = shutil.ignore_patterns(
            ".git",
            ".venv",
            "_*cs",
            "_build",
            "_proc",
            "runs",
            "__pycache__",
            ".ipynb_checkpoints",
            "*.egg-info",
        )
        shutil.copytree(REPO, copy, ignore=hide)
        shutil.rmtree(copy / "diffuspeech")
        shutil.copytree(
            REPO / "diffuspeech", copy / "diffuspeech", ignore=shutil.ignore_patterns("*.py", "__pycache__")
        )
        (copy / "diffuspeech" / "__init__.py").write_text((REPO / "diffuspeech" / "__init__.py").read_text())
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run([BIN / command], cwd=copy, env=ENV, check=True, capture_output=True)
        stale = differing(REPO / "diffuspeech", copy / "diffuspeech", (".py",))
        unclean = differing(REPO / "nbs", copy / "nbs", (".ipynb",))
    if stale:
        sys.exit(
            f"stale export: {', '.join(stale)} in diffuspeech/ are not what the notebooks export.\n"
            "The notebooks are the source: change nbs/, then `make format`, and commit what it wrote."
        )
    if unclean:
        sys.exit(
            f"not clean: {', '.join(unclean)} in nbs/ hold execution counts or other debris. "
            "Run `make format` and commit."
        )
    if subprocess.run([BIN / "ruff", "check", "-q", "--output-format=concise", "."], cwd=REPO).returncode:
        sys.exit("ruff found the above. `make format` mends what it can.")
    print("export, notebooks and lint are up to date", flush=True)


if __name__ == "__main__":
    main()
