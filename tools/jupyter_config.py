"JupyterLab as `make lab` starts it: on localhost, with a token, exporting a library notebook as soon as it is saved"
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def export_on_save(model, os_path, contents_manager, **kwargs):
    "Clean a saved notebook of nbs/ and export it, so that `%autoreload` shows the change in open explore notebooks"
    path = Path(os_path)
    if model["type"] != "notebook" or REPO / "nbs" not in path.parents or ".ipynb_checkpoints" in path.parts:
        return
    done = subprocess.run([sys.executable, "-c", "import sys; from nbdev.export import nb_export; nb_export(sys.argv[1])", str(path)],
                          cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        contents_manager.log.warning(f"{path.name} was saved but not exported: {done.stderr.strip().splitlines()[-1]}")


c = get_config()  # noqa: F821
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.root_dir = str(REPO)
c.ServerApp.allow_root = True
c.FileContentsManager.post_save_hook = export_on_save
