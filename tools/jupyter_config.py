"JupyterLab as `make lab` starts it: on localhost, with a token; a library notebook is exported when saved"

import os
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
from jupyter_core.paths import jupyter_data_dir
from nbformat.sign import NotebookNotary

REPO = Path(__file__).resolve().parent.parent
# nbdev writes a cell that is not Python without an error, and then the module that every open kernel imports
# is broken: so parse first
EXPORT = """
import ast, re, sys
from execnb.nbio import read_nb
from nbdev.export import nb_export
for k, cell in enumerate(read_nb(sys.argv[1]).cells):
    if cell.cell_type == "code" and re.search(r"^#\\|\\s*export", cell.source, re.M):
        ast.parse(cell.source, f"cell {k}")
nb_export(sys.argv[1])
"""


def is_library_notebook(model: dict, path: Path) -> bool:
    "Is this a notebook of nbs/?"
    return (
        model["type"] == "notebook"
        and REPO / "nbs" in path.parents
        and ".ipynb_checkpoints" not in path.parts
    )


def clean_on_save(model, path, contents_manager, **kwargs):
    "Keep execution counts out of the diff. An error here is logged, and the notebook saved as it is"
    if is_library_notebook(model, REPO / path):
        from nbdev.clean import clean_nb

        clean_nb(model["content"])


def export_on_save(model, os_path, contents_manager, **kwargs):
    "Export a notebook that was just saved: `%autoreload` shows the change in others. Never undoes the save"
    if not is_library_notebook(model, Path(os_path)):
        return
    try:  # a process of its own: an export that fails or hangs does not harm the server
        subprocess.run(
            [sys.executable, "-c", EXPORT, os_path],
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        contents_manager.log.warning("%s was saved but not exported:\n%s", os_path, why)


def no_news(handler, page_config):
    "No question about Jupyter's news over the first notebook: nothing leaves this machine"
    page_config["disabledExtensions"] = [
        *page_config["disabledExtensions"],
        "@jupyterlab/apputils-extension:announcements",
    ]
    return page_config


def trust_stored_pages():
    "Let the stored players of explore and launch run as soon as they are seen, before any kernel is there"
    folder = Path(jupyter_data_dir())
    folder.mkdir(parents=True, exist_ok=True)
    with NotebookNotary(data_dir=str(folder)) as notary:
        for path in sorted([*REPO.glob("nbs/explore/*.ipynb"), *REPO.glob("nbs/launch/*.ipynb")]):
            try:
                notary.sign(nbformat.read(path, as_version=4))
            except Exception as error:  # one that cannot be read now; the server starts without it
                warnings.warn(f"{path.name} stays untrusted: {error}", stacklevel=1)


# a thread that spins while it waits for the other keeps browser and server from the processor: on two busy
# cores a step's sound took twenty times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault(
    "PLOTLY_RENDERER", "plotly_mimetype"
)  # figures are data in the notebook, drawn by JupyterLab: no script from a CDN
c = get_config()  # noqa: F821
c.ServerApp.ip = "127.0.0.1"
c.ServerApp.root_dir = str(REPO)
c.ServerApp.allow_root = True
c.ServerApp.tornado_settings = {"page_config_hook": no_news}
c.LanguageServerManager.autodetect = False  # it would check types on the same cores while the first cells run
c.ServerApp.jpserver_extensions = {"jupyterlab_jupytext": False}  # where it is installed it wraps every save
warnings.filterwarnings(
    "ignore", "Overriding existing (pre|post)_save_hook", UserWarning
)  # the server checks each hook twice, and warns of itself
c.FileContentsManager.pre_save_hook = clean_on_save
c.FileContentsManager.post_save_hook = export_on_save
trust_stored_pages()
