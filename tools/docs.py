"""The site, in _docs/, without Quarto and without a network

nbdev's processors turn each notebook into a page's source, smalldocs lays the pages out, and what they would
fetch (maths, plotly, fonts) is put beside them. No cell is run: stored outputs are shown."""

import ast
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
NBS, PROC, SITE = REPO / "nbs", REPO / "_proc", REPO / "_docs"
os.chdir(REPO)  # nbdev finds settings.ini from here
sys.path.insert(0, str(REPO))  # and documents this copy of the library, whichever is installed

import plotly
from execnb.nbio import read_nb, write_nb
from fastcore.xtras import dict2obj
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.processors import FilterDefaults, show_doc
from readme import relink
from smalldocs.config import load
from smalldocs.site import Site

# ---- notebooks to page sources: nbdev's processors, four of them replaced


def module(nb) -> str:
    "The module that a notebook exports, or nothing"
    names = [cell.directives_["default_exp"][0] for cell in nb.cells if "default_exp" in cell.directives_]
    return f"diffuspeech.{names[0]}" if names else ""


@cache
def documented_names() -> dict[str, set[str]]:
    "Where a name is documented, under `diffuspeech.base.style.use`, `base.style.use`, `style.use` and `use`"
    found = defaultdict(set)
    for mod, names in importlib.import_module("diffuspeech._modidx").d["syms"].items():
        parts = mod.split(".")
        for full, (href, _) in names.items():
            name = full.removeprefix(f"{mod}.")
            href = names.get(f"{mod}.{name.split('.')[0]}", [href])[
                0
            ]  # a method is documented with its class
            if not name.startswith("_"):
                for i in range(len(parts) + 1):
                    found[".".join([*parts[i:], name])].add(f"/{href}")
            for i in range(len(parts) - 1):
                found[".".join(parts[i:])].add(f"/{href.split('#')[0]}")
    return found


class Links(NbdevLookup):
    "nbdev's links from names in backticks: the page's own first, and none for a name that two modules have"

    def __init__(self, own: str):
        self.own = own

    def doc(self, name):
        found = documented_names().get(f"{self.own}.{name}") or documented_names().get(name, set())
        return next(iter(found)) if len(found) == 1 else None

    def link_line(self, line):
        return (
            line if line.startswith("#") else re.sub(r"(?<!\[)`([^`\s]+?)(?:\(\))?`", self._link_sym, line)
        )  # a link's own text stays


class show_source(Processor):
    "nbdev documents an exported cell and hides its code; we show that too, for half of the chapter is in it"

    def begin(self):
        for cell in self.nb.cells:
            code = [o for o in cell.parsed_() or [] if not isinstance(o, (ast.Import, ast.ImportFrom))]
            if code and "export" in cell.directives_:
                cell.directives_["exports"] = cell.directives_.pop(
                    "export"
                )  # nbdev's word for "export and show"


def methods_of(shown) -> list:
    "What a class defines itself for its users: methods with a docstring"
    if not inspect.isclass(shown):
        return []
    found = []
    for name, value in vars(shown).items():
        method = getattr(value, "__func__", value)  # of a class method
        own = inspect.isfunction(method) and method.__qualname__ == f"{shown.__name__}.{name}"
        if own and method.__doc__ and not name.startswith("_"):
            found.append(getattr(shown, name))
    return found


class document(Processor):
    "`show_doc` on the exported module; nbdev would run every import and export of the notebook for it"

    def begin(self):
        self.names = {"show_doc": show_doc}
        if (name := module(self.nb)) and any("show_doc(" in cell.source for cell in self.nb.cells):
            imported = importlib.import_module(name)
            for node in ast.parse(Path(imported.__file__).read_text(encoding="utf-8")).body:
                if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                    exec(ast.unparse(ast.Module(node.body, [])), vars(imported))  # what only annotations name
            self.names |= vars(imported)

    def cell(self, cell):
        if cell.cell_type == "code" and re.search("^show_doc", cell.source, re.M):
            shown = eval(cell.source, self.names)
            parts = [shown, *(show_doc(method, title_level=4) for method in methods_of(shown.sym))]
            text = "\n\n".join(part._repr_markdown_() for part in parts)
            text = re.sub(r"^\[source\]\(.*\n+", "", text, flags=re.M)  # the source is in the page
            text = re.sub(r"<function <?(\w+)>? at 0x[0-9a-f]+>", r"\1", text)  # a default that is a function
            cell.outputs = [
                dict2obj(dict(output_type="display_data", metadata={}, data={"text/markdown": text}))
            ]


class link(Processor):
    "Links in prose and documentation, not in fenced signatures; a linked file from outside nbs/ is copied"

    def begin(self):
        self.links, self.folder = Links(module(self.nb)), Path(self.nb.path_).parent

    def bring(self, href):
        path, _, anchor = href.partition("#")
        file = (self.folder / path).resolve()  # _proc/ stands beside nbs/, so the way to LICENSE is the same
        if not file.is_file() or PROC in file.parents or REPO not in file.parents:
            return href
        copy = PROC / "repo" / file.relative_to(REPO)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
        return os.path.relpath(copy, self.folder) + (f"#{anchor}" if anchor else "")

    def cell(self, cell):
        if cell.cell_type == "markdown":
            cell.source = relink(self.links.linkify(cell.source), self.bring)
        for output in cell.get("outputs", []):
            if text := output.get("data", {}).get("text/markdown"):
                output["data"]["text/markdown"] = self.links.linkify("".join(text))


class fold_source(Processor):
    """The story first: source stands closed where it was, and what documents its functions moves to the end
    of the page. A cell that only names values is open, for nothing else shows them"""

    def begin(self):
        documentation = [cell for cell in self.nb.cells if getattr(cell, "has_sd", False)]
        if documentation:
            heading = dict2obj(dict(cell_type="markdown", metadata={}, source="## Reference", directives_={}))
            self.nb.cells[:] = [c for c in self.nb.cells if c not in documentation] + [
                heading,
                *documentation,
            ]

    def cell(self, cell):
        if cell.cell_type == "code" and "exports" in cell.directives_:
            names = [o.name for o in cell.parsed_() if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
            if names:
                summary = f"Source of {', '.join(names)}"
                cell.source = f"#| code-fold: true\n#| code-summary: {summary}\n{cell.source}"
        elif cell.cell_type == "code" and not cell.outputs and (parsed := cell.parsed_()):
            if all(isinstance(o, (ast.Import, ast.ImportFrom)) for o in parsed):
                cell.source = f"#| code-fold: true\n#| code-summary: Imports\n{cell.source}"


class Page(FilterDefaults):
    def base_procs(self):
        replacements = {"exec_show_docs": document, "add_links": link, "add_fold": fold_source}
        return [
            show_source,
            *(replacements.get(p.__name__, p) for p in super().base_procs() if p.__name__ != "mv_exports"),
        ]


def plotly_html(figure: dict, name: str) -> str:
    "A stored figure as a div that plotly.js fills once it is there"
    # its buttons would lie over the title of a narrow figure; a double click resets the view, too
    figure["config"] = figure.get("config", {}) | {"responsive": True, "displayModeBar": False}
    height = figure.get("layout", {}).get("height", 450)
    data = json.dumps(figure).replace("</", "<\\/")  # or a title with HTML in it would end the script
    return (
        f'<div id="{name}" style="height:{height}px"></div>'
        f'<script>addEventListener("DOMContentLoaded", () => Plotly.newPlot("{name}", {data}))</script>'
    )


def make_showable(output: dict, name: str) -> bool:
    "Give a stored output the form that a page can show; False if it has none"
    data = output.get("data", {})
    if figure := data.pop("application/vnd.plotly.v1+json", None):
        data["text/html"] = plotly_html(figure, name)
    live = any(
        "widget-view" in mime for mime in data
    )  # no kernel moves it here, and its text is only its repr
    return not live or bool(data.keys() & {"text/html", "image/png"})


def page_sources():
    "All of nbs/ in _proc/, the notebooks processed"
    shutil.rmtree(PROC, ignore_errors=True)
    shutil.copytree(NBS, PROC, ignore=shutil.ignore_patterns(".*", "_proc", "_docs", "_site"))
    os.environ["IN_TEST"] = "1"  # as nbdev does: nothing that is imported here may export
    for path in sorted(PROC.rglob("*.ipynb")):
        nb = read_nb(path)
        try:
            Page()(nb)
        except Exception as error:
            error.add_note(f"while making the page of nbs/{path.relative_to(PROC)}")
            raise
        for i, cell in enumerate(nb.cells):
            if "outputs" in cell:
                cell.outputs = [o for j, o in enumerate(cell.outputs) if make_showable(o, f"plotly-{i}-{j}")]
        write_nb(nb, path)


# ---- pages to a site that needs nothing from outside

# Without noerrors and noundefined a typo in TeX is an error that the tests see, and not a red word
MATHS = """<script>window.MathJax = {startup: {elements: [".math"]}, options: {enableMenu: false},
  svg: {fontCache: "global"}, tex: {packages: {"[-]": ["noerrors", "noundefined"]}}}</script>
<script defer src="{libs}/tex-svg-full.js"></script>"""
# A page opened from a folder may not read search.json, but it may run a script
SEARCH = """<script>if (location.protocol === "file:") window.fetch = url => new Promise((ok, fail) => {
  const s = Object.assign(document.createElement("script"), {src: url.replace(/json$/, "js"), onerror: fail});
  s.onload = () => ok({json: () => window.SEARCH}); document.head.append(s) })</script>"""


# A result marks what was searched for at the beginning of a word, not wer in answer
MARKS = {
    """text.toLowerCase().indexOf(q.toLowerCase().split(/\\s+/)[0] || "")""": (
        """text.search(new RegExp("(?<![a-z])" + (q.match(/[a-z0-9]+/i) || [""])[0], "i"))"""
    ),
    """new RegExp("(" + w.replace(""": """new RegExp("(?<![a-z])(" + w.replace(""",
}


def localise(site: Path):
    "Replace what comes from elsewhere by what is installed here"
    libs, sources = site / "site_libs", {}
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        site_libs = "../" * len(page.relative_to(site).parent.parts) + "site_libs"
        head = [SEARCH]
        text, katex = re.subn(r"<link[^>]*/katex@[^>]*>|<script[^>]*/katex@[^>]*></script>", "", text)
        if katex:  # -full: every TeX extension is in the one file, so MathJax has nothing left to load
            head.append(MATHS.replace("{libs}", site_libs))
            sources["tex-svg-full.js"] = distribution("django-static-mathjax").locate_file(
                "mathjax/static/mathjax/es5/tex-svg-full.js"
            )
        if "Plotly.newPlot" in text:
            head.append(f'<script defer src="{site_libs}/plotly.min.js"></script>')
            sources["plotly.min.js"] = Path(plotly.__file__).parent / "package_data/plotly.min.js"
        page.write_text(text.replace("</head>", "\n".join(head) + "\n</head>", 1), encoding="utf-8")
    for name, source in sources.items():
        shutil.copy(source, libs / name)
    shutil.copy(REPO / "tools/search.js", libs / "fuse/fuse.min.js")  # by words instead of letters
    for script in libs.rglob("smalldocs.js"):
        text = script.read_text(encoding="utf-8")
        for old, new in MARKS.items():
            assert text.count(old) == 1, f"smalldocs.js no longer holds {old}"
            text = text.replace(old, new)
        script.write_text(text, encoding="utf-8")
    for css in libs.rglob("*.css"):  # the themes ask Google for a font; the system's own serve
        css.write_text(
            re.sub(r"@import url\([^)]*\);?", "", css.read_text(encoding="utf-8")), encoding="utf-8"
        )
    (site / "search.js").write_text(
        "window.SEARCH = " + (site / "search.json").read_text(encoding="utf-8"), encoding="utf-8"
    )


def main():
    start = time.monotonic()
    page_sources()
    site = Site(load(PROC), quiet=True)
    pages = site.build()
    localise(site.out)
    shutil.rmtree(SITE, ignore_errors=True)  # only now, so that a failure leaves the last good site
    shutil.move(site.out, SITE)
    for warning in site.warnings:
        if "output-file" not in warning:  # a key that nbdev writes for Quarto
            print(f"docs: {warning}", file=sys.stderr)
    print(f"{pages} pages in {time.monotonic() - start:.0f} s: {SITE / 'index.html'}")


if __name__ == "__main__":
    main()
