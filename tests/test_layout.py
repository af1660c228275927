"The layout: allowed imports, reading order, sizes, pins, and a library that needs no notebook server"

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packages import PACKAGES, cell_sources

REPO = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    p.relative_to(REPO / "nbs").as_posix()
    for p in (REPO / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in p.parts
)
MODULES = sorted(
    p
    for p in (REPO / "diffuspeech").rglob("*.py")
    if p.name != "_modidx.py" and p != REPO / "diffuspeech" / "__init__.py"
)

# Each part may use itself and the parts before it; `diffusion` uses `base` alone
PARTS = [
    "base",
    "data",
    "asr",
    "tokenizers",
    "voice",
    "diffusion",
    "models",
    "talk",
    "train",
    "tasks",
    "evaluate",
    "workbench",
    "cli",
]
CLOSED = {("diffusion", part) for part in ("data", "asr", "tokenizers", "voice")}


def part(module: str) -> str:
    "`diffuspeech.diffusion.sample` -> `diffusion`; `python -m diffuspeech` is the command line"
    return module.removeprefix("diffuspeech.").split(".")[0].replace("__main__", "cli")


def imports(path: Path) -> list[str]:
    "The project's modules that a file imports, also inside functions"
    found = []
    package = path.relative_to(REPO).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(
            node, ast.ImportFrom
        ):  # the export writes relative imports: `from ..base.keys import fold`
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module.startswith("diffuspeech."):
                found += [
                    f"{module}.{a.name}" if (REPO / module.replace(".", "/")).is_dir() else module
                    for a in node.names
                ]
            elif module == "diffuspeech":
                found += [
                    f"diffuspeech.{a.name}"
                    for a in node.names
                    if (REPO / "diffuspeech" / a.name).is_dir()
                    or (REPO / "diffuspeech" / f"{a.name}.py").exists()
                ]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("diffuspeech.")]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(REPO / "diffuspeech").as_posix())
def test_allowed_imports(path):
    here = part(path.relative_to(REPO).with_suffix("").as_posix().replace("/", "."))
    assert here in PARTS, f"{path.name}: the part '{here}' is not in the plan (PARTS in tests/test_layout.py)"
    for module in imports(path):
        there = part(module)
        open_ = there in PARTS and PARTS.index(there) <= PARTS.index(here) and (here, there) not in CLOSED
        assert open_, (
            f"forbidden import: {path.relative_to(REPO)} imports {module}, "
            f"but '{here}' may not use '{there}'. "
            "Move the code to a part that may, or pass what it needs as an argument."
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(REPO / "diffuspeech").as_posix())
def test_a_module_fits_in_one_sitting(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 600, (
        f"{path.relative_to(REPO)} is over 600 lines ({lines}): split it by what each half is for"
    )


# Notebooks with longer export cells; names leave this list, none is added
LONG_CELLS = {"cli/options.ipynb"}  # the table of shared options
MAX_LINES = 60
COMPREHENSIONS = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


def density(tree: ast.Module) -> list[str]:
    "Functions over 60 lines, and comprehensions inside comprehensions"
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= MAX_LINES:
            found.append(f"{node.name} has {node.end_lineno - node.lineno + 1} lines: make two of it")
        if isinstance(node, COMPREHENSIONS):
            inner = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS) and n is not node]
            found += [f"line {n.lineno}: a comprehension inside a comprehension; use a loop" for n in inner]
    return found


def test_density_is_measured():
    long = "def f():\n" + "    pass\n" * MAX_LINES
    assert density(ast.parse(long)) and not density(ast.parse("def f():\n" + "    pass\n" * (MAX_LINES - 1)))
    assert density(ast.parse("[[x for x in y] for y in z]")) and not density(
        ast.parse("[x for y in z for x in y]")
    )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(REPO / "diffuspeech").as_posix())
def test_functions_are_short(path):
    found = density(ast.parse(path.read_text()))
    assert not found, f"{path.relative_to(REPO)}: {'; '.join(found)}"


def long_export_cells(name: str) -> list[int]:
    "Lines of the export cells that are too long; a class alone in its cell is held by its methods' length"
    found = []
    for cell in json.loads((REPO / "nbs" / name).read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or not source.startswith("#| export"):
            continue
        lines = len(source.splitlines()) - 1
        body = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
        if lines > MAX_LINES and not (len(body) == 1 and isinstance(body[0], ast.ClassDef)):
            found.append(lines)
    return found


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_export_cells_are_short(name):
    "One definition a cell, at most 60 lines"
    found = long_export_cells(name)
    if name in LONG_CELLS:
        assert found, f"nbs/{name} is clean: take it out of LONG_CELLS"
    else:
        assert not found, f"nbs/{name}: export cells of {found} lines; split them"


# Notebooks over 800 kB; names leave this list, none is added
LARGE = {"voice/codec.ipynb", "voice/vocoder.ipynb"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_small_and_numberless(name):
    size, limit = (REPO / "nbs" / name).stat().st_size, 1_000_000 if name in LARGE else 800_000
    assert size <= limit, (
        f"nbs/{name} is over {limit // 1000} kB ({size // 1000}): store fewer or shorter outputs "
        "(a picture instead of a player, a part instead of all)"
    )
    assert name not in LARGE or size > 800_000, f"nbs/{name} is small: take it out of LARGE"
    assert not re.search(r"(^|/)\d", name) and "copy" not in name.lower(), (
        f"nbs/{name}: no leading numbers and no copies in names; the order is in nbs/sidebar.yml"
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_ran_without_errors(name):
    for cell in json.loads((REPO / "nbs" / name).read_text())["cells"]:
        for out in cell.get("outputs", []):
            assert out["output_type"] != "error", (
                f"nbs/{name} stores an error: run it again (make notebooks NB=nbs/{name})"
            )
            assert str(REPO) not in json.dumps(out) and "site-packages" not in json.dumps(out), (
                f"nbs/{name} stores a path of this machine: {json.dumps(out)[:300]}"
            )
            assert out.get("name") != "stderr", f"nbs/{name} stores warnings: {''.join(out['text'])[:300]}"


def test_autoreload_reaches_imported_names():
    "Plain `%autoreload 2` reloads `from x import f` only once, and then never again (IPython 9.18)"
    for name in NOTEBOOKS:
        for line in re.findall(r"%autoreload .*", (REPO / "nbs" / name).read_text()):
            assert line.startswith("%autoreload 2 --full"), f"nbs/{name}: write `%autoreload 2 --full`"


def sidebar() -> list:
    return yaml.safe_load((REPO / "nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]


def reading_order() -> list[str]:
    def flat(items):
        for item in items:
            if isinstance(item, str):
                yield item
            elif "contents" in item:
                yield from flat(item["contents"])
            else:
                yield item["href"]

    return list(flat(sidebar()))


def test_reading_order():
    order = reading_order()
    for name in NOTEBOOKS:
        assert name in order, f"nbs/{name} is not in the reading order: add it to nbs/sidebar.yml"
    for name in order:
        assert name in NOTEBOOKS, f"nbs/sidebar.yml lists {name}, which does not exist: remove it there"
    assert len(order) == len(set(order)), "nbs/sidebar.yml lists a notebook twice"
    sections = [item["section"] for item in sidebar() if isinstance(item, dict)]
    assert sections == ["Explore", "Paper", "Train", "How it works", "Reference"]


def test_the_list_of_modules_is_complete():
    def cells(name):
        found = json.loads((REPO / "nbs" / name).read_text())["cells"]
        return "".join("".join(c["source"]) for c in found if c["cell_type"] == "markdown")

    listed = re.findall(r"\| \[[\w ]+\]\(([\w/]+\.ipynb)\)", cells("modules.ipynb"))
    expected = [name for name in reading_order() if "/" in name]
    assert sorted(listed) == sorted(expected), (
        f"nbs/modules.ipynb and nbs/sidebar.yml differ in {sorted(set(listed) ^ set(expected))}"
    )
    parts = re.findall(r"^\| \[(\w+)\]", cells("index.ipynb"), re.M)
    written = [part for part in PARTS if (REPO / "nbs" / part).is_dir()]
    assert parts == written, f"the parts in nbs/index.ipynb are {parts}, and the folders of nbs are {written}"


def settings() -> dict:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(REPO / "settings.ini")
    return dict(config["DEFAULT"])


def test_cell_flags_are_known():
    "A misspelt directive would be ignored, and the cell run where its package is absent"
    flags = settings()["tst_flags"].split()
    assert set(flags) == {"slow", "gpu"} | PACKAGES.keys(), (
        "tst_flags in settings.ini and tools/packages.py differ"
    )
    known = {"default_exp", "export", "exporti", "exports", "hide", "hide_input", "hide_output", *flags}
    for name in NOTEBOOKS:
        for cell in cell_sources(REPO / "nbs" / name):
            for flag in re.findall(r"^#\|\s*([^\s:]+)(?=\s|$)", cell, re.M):
                assert flag in known, f"nbs/{name}: no such directive: #| {flag}"


def canonical(requirement: str) -> str:
    return re.split(r"[<>=!\[]", requirement)[0].lower().replace("_", "-")


def test_everything_is_pinned_once():
    pins = [
        line
        for line in (REPO / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", p) for p in pins), [
        p for p in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", p)
    ]
    assert "torch==2.13.0" in pins
    pinned = {canonical(p) for p in pins}
    wanted = {canonical(r) for k, v in settings().items() if k.endswith("requirements") for r in v.split()}
    assert wanted <= pinned, f"not pinned in constraints.txt: {sorted(wanted - pinned)}"


def test_environment_yml_agrees_with_settings_ini():
    env = yaml.safe_load((REPO / "environment.yml").read_text())
    python, pip, rest = env["dependencies"]
    low = settings()["min_python"]
    assert python == f"python>={low},<3.13" and pip == "pip"
    assert rest["pip"] == ["-c constraints.txt", "-e .[lab,align,judges,corpora,docs,dev]"], (
        "environment.yml installs what `make env` does, at the same pins"
    )


def test_a_home_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    env = os.environ | {"HOME": str(tmp_path / "file"), "DIFFUSPEECH_HOME": ""}
    done = subprocess.run(["make", "-s", "home"], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode and len(done.stdout.splitlines()) == 1 and "DIFFUSPEECH_HOME" in done.stdout
    env["DIFFUSPEECH_HOME"] = str(tmp_path / "else")
    subprocess.run(["make", "-s", "home"], cwd=REPO, env=env, check=True)
    assert (tmp_path / "else").is_dir()


def run(code: str, **kw) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import torch; between = time.perf_counter();"
        "import diffuspeech, diffuspeech.cli; print((time.perf_counter() - between) / (between - start));"
        "heavy = 'torchaudio transformers IPython plotly matplotlib nbdev fastcore'.split();"
        "print([m for m in heavy if m in sys.modules])"
    )
    share, heavy = min((run(code).split("\n")[:2] for _ in range(3)), key=lambda r: float(r[0]))
    assert float(share) < 0.5, f"import diffuspeech takes {share} times as long as torch"
    assert heavy == "[]", f"import diffuspeech also imports {heavy}"


def test_shim_is_off_where_the_real_extension_loads():
    "torchaudio's own loader decides; the stand-in is used exactly when that fails"
    real = subprocess.run([sys.executable, "-c", "import torchaudio"], capture_output=True).returncode == 0
    out = run(
        "from diffuspeech.data.audio import import_torchaudio; t = import_torchaudio(); import sys;"
        "print(hasattr(sys.modules['torchaudio._extension'], '__file__'))"
    )
    assert out.strip() == str(real), (
        f"torchaudio's extension loads: {real}; our import used the real one: {out.strip()}"
    )
    fake = (
        "import sys, types; t = types.ModuleType('torchaudio'); t.real = True; sys.modules['torchaudio'] = t;"
        "from diffuspeech.data.audio import import_torchaudio; print(import_torchaudio() is t)"
    )
    assert run(fake).strip() == "True", "a torchaudio that loads must be left alone"


def test_commit_hook_cleans_and_exports(tmp_path):
    "tools/hooks/pre-commit, in a clone with a home of its own: what it does, and that it writes nowhere else"
    clone, home = tmp_path / "clone", tmp_path / "home"
    home.mkdir()
    who = {
        "GIT_AUTHOR_NAME": "t",
        "GIT_AUTHOR_EMAIL": "t@t",
        "GIT_COMMITTER_NAME": "t",
        "GIT_COMMITTER_EMAIL": "t@t",
    }
    env = (
        os.environ
        | who
        | {"HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    )

    def sh(*cmd):
        return subprocess.run(cmd, cwd=clone, env=env, check=True, capture_output=True, text=True).stdout

    clone.mkdir()
    for name in ("settings.ini", "nbs", "diffuspeech", "tools"):
        (shutil.copytree if (REPO / name).is_dir() else shutil.copy)(REPO / name, clone / name)
    sh("git", "init", "-q")
    sh("git", "add", ".")
    sh("git", "commit", "-qm", "as it is")
    sh("git", "config", "core.hooksPath", "tools/hooks")
    nb = json.loads((clone / "nbs/base/style.ipynb").read_text())
    cell = next(c for c in nb["cells"] if "BLUE, ORANGE" in "".join(c["source"]))
    cell |= {"execution_count": 7, "source": "".join(cell["source"]).replace("#3f6fe0", "#3f6fe1")}
    (clone / "nbs/base/style.ipynb").write_text(json.dumps(nb))
    sh("git", "add", "nbs")
    sh("git", "commit", "-qm", "another blue")
    shown = sh("git", "show", "--stat", "HEAD")
    assert (
        "diffuspeech/base/style.py" in shown
        and "#3f6fe1" in (clone / "diffuspeech/base/style.py").read_text()
    )
    assert (
        'execution_count": 7' not in (clone / "nbs/base/style.ipynb").read_text()
        and sh("git", "status", "--porcelain") == ""
    )
    assert not [p for p in home.rglob("*") if p.is_file() and "cache" not in p.as_posix().lower()], list(
        home.rglob("*")
    )


def runtime_files() -> set[str]:
    "The top-level names in site-packages of all that the library requires, extras left out"
    seen, todo, files = set(), ["diffuspeech"], set()
    while todo:
        name = todo.pop()
        if canonical(name) in seen:
            continue
        seen.add(canonical(name))
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        todo += [re.split(r"[^\w.-]", r)[0] for r in package.requires or [] if "extra ==" not in r]
        if name != "diffuspeech":
            files |= {f.parts[0] for f in package.files or [] if f.parts[0] not in ("..", "__pycache__")}
    return files


def test_wheel_in_a_bare_environment(tmp_path):
    "The exported library from a wheel, without Jupyter, in another working directory"
    source = tmp_path / "source"  # a copy: what an earlier build left in build/ would end up in the wheel
    shutil.copytree(
        REPO / "diffuspeech", source / "diffuspeech", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", tmp_path, source],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    wheel = next(tmp_path.glob("*.whl"))
    bare = tmp_path / "bare"
    venv.create(bare, with_pip=False)
    site = next(bare.glob("lib/python*/site-packages"))
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel],
        check=True,
        capture_output=True,
    )
    # link what `pip install diffuspeech` would install, and nothing that only notebooks need
    here = Path(sysconfig.get_path("purelib"))
    for name in runtime_files():
        if (here / name).exists() and not (site / name).exists():
            (site / name).symlink_to(here / name)
    code = (
        "import diffuspeech, importlib.util as u, sys; import torch;"
        "from diffuspeech.data import audio; from diffuspeech.tokenizers import spectral;"
        "from diffuspeech.diffusion.sample import sample; from diffuspeech.diffusion.rules import ConfTopK;"
        "from diffuspeech.diffusion.oracle import MarkovChain;"
        "w = audio.load_clip(); c = spectral.SpectralTokenizer(w); ids = c.encode(w)[None];"
        "x = ids.clone(); x[:, ::2] = 64;"
        "o = sample(MarkovChain.fit(ids[0], 64), x, ConfTopK(), 64, steps=4);"
        "assert (o.tokens != 64).all(); c.decode(o.tokens[0]);"
        "absent = 'IPython jupyterlab ipywidgets nbdev fastcore'.split();"
        "assert not any(u.find_spec(m) for m in absent); print(diffuspeech.__file__)"
    )
    work = tmp_path / "elsewhere"
    work.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [bare / "bin/python", "-c", code], cwd=work, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(bare) in done.stdout, f"imported from {done.stdout}, not from the wheel"
    assert (bare / "lib").exists() and "console_scripts" in next(
        site.glob("diffuspeech-*.dist-info/entry_points.txt")
    ).read_text()
