"Run notebooks, store their outputs, clean them: tools/notebooks.py [PATH ...]; all of nbs/ without a path"

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENV = os.environ | {
    "PLOTLY_RENDERER": "plotly_mimetype",
    "OMP_NUM_THREADS": "1",
    "DIFFUSPEECH_PLAYER": "static",  # pages with their sounds inside, which the docs show
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
}


def run(path: Path) -> str:
    "Execute one notebook in its own folder; the error's last lines if it fails"
    cmd = [
        BIN / "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--inplace",
        "--log-level=ERROR",
        "--ExecutePreprocessor.store_widget_state=False",
        path,
    ]  # widget state would carry megabytes that no page shows
    done = subprocess.run(cmd, cwd=path.parent, env=ENV, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.split("executing the following cell:")[-1][-2500:]


def without_widgets(path: Path):
    "A stored widget shows nothing without its kernel but its Python name"
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if "outputs" in cell:
            cell["outputs"] = [
                out
                for out in cell["outputs"]
                if "application/vnd.jupyter.widget-view+json" not in out.get("data", {})
            ]
    path.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main():
    paths = [Path(p).resolve() for p in sys.argv[1:]] or sorted(
        p for p in (REPO / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts
    )
    failed = 0
    with ThreadPoolExecutor(2) as pool:
        for path, error in zip(paths, pool.map(run, paths)):
            print(f"{'FAILED' if error else 'ok':7}{path.relative_to(REPO)}\n{error}".rstrip(), flush=True)
            failed += bool(error)
    for path in paths:
        without_widgets(path)
        subprocess.run([BIN / "nbdev_clean", "--fname", path], cwd=REPO, env=ENV, check=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
