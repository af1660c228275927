"The site: it builds, every link leads somewhere, it needs no network, and a browser shows what it should"

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from browser import CHROMIUM
from playwright.sync_api import sync_playwright

REPO = Path(__file__).resolve().parent.parent
FETCHES = {
    "script": "src",
    "link": "href",
    "img": "src",
    "audio": "src",
    "video": "src",
    "source": "src",
    "iframe": "src",
    "embed": "src",
    "object": "data",
}
OUTSIDE = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""")


def run(script: str, *args: str):
    return subprocess.run(
        [sys.executable, f"tools/{script}", *args], cwd=REPO, capture_output=True, text=True
    )


class Page(HTMLParser):
    "What a page links to, what it fetches, and which anchors it has"

    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.fetched, self.inside = set(), [], [], ""
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        attrs, self.inside = {k: v or "" for k, v in attrs}, tag
        self.ids.add(attrs.get("id"))
        self.links += [attrs[a] for a in ("href", "src") if a in attrs]
        self.fetched += [attrs[FETCHES[tag]]] if FETCHES.get(tag) in attrs else []
        self.fetched += OUTSIDE.findall(attrs.get("style", ""))

    def handle_data(self, data):
        self.fetched += OUTSIDE.findall(data) if self.inside == "style" else []


@pytest.fixture(scope="module")
def site() -> Path:
    done = run("docs.py")
    assert done.returncode == 0, f"tools/docs.py failed:\n{done.stderr[-3000:]}"
    return REPO / "_docs"


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_link_leads_somewhere(site, pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            target = target / "index.html" if target.is_dir() else target
            if url.path.startswith("/") or site not in target.parents or not target.exists():
                broken.append(f"{path.relative_to(site)}: {link} is no file of the site")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids:
                broken.append(f"{path.relative_to(site)}: {link}: the page has no such anchor")
    assert not broken, f"{len(broken)} broken links:\n" + "\n".join(broken)


def test_nothing_comes_from_outside(site, pages):
    asked = [
        f"{path.relative_to(site)}: {link}"
        for path, page in pages.items()
        for link in page.fetched
        if re.match("(https?:)?//", link)
    ]
    asked += [
        f"{css.relative_to(site)}: {link}"
        for css in site.rglob("*.css")
        for link in OUTSIDE.findall(css.read_text(encoding="utf-8"))
    ]
    assert not asked, "the site must work offline; these would be fetched:\n" + "\n".join(asked)


def test_every_notebook_of_the_sidebar_has_its_page(site):
    def notebooks(entry):
        if isinstance(entry, dict | list):
            return [n for e in (entry.values() if isinstance(entry, dict) else entry) for n in notebooks(e)]
        return [entry] if str(entry).endswith(".ipynb") else []

    listed = notebooks(yaml.safe_load((REPO / "nbs/sidebar.yml").read_text(encoding="utf-8")))
    absent = [n for n in listed if not (site / n).with_suffix(".html").exists()]
    assert listed and not absent, f"nbs/sidebar.yml lists notebooks that have no page: {absent}"


def test_no_widget_is_shown_as_its_repr(site, pages):
    shown = [
        str(path.relative_to(site))
        for path, page in pages.items()
        if re.search(r"<pre><code>(\w+Widget|IntSlider|VBox|HBox|Output)\(", page.text)
    ]
    assert not shown, f"a widget's repr is in {shown}"


def test_readme_is_what_the_index_notebook_gives():
    done = run("readme.py", "--check")
    assert done.returncode == 0, done.stderr


# ---- in a browser

ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def chromium():
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    "A tab that asks nobody outside, and remembers that it was told to"
    context = chromium.new_context(viewport=dict(width=1280, height=1000), color_scheme="light")
    page = context.new_page()
    page.asked, page.errors = [], []

    def gate(route):
        if route.request.url.startswith(("file:", "data:", "blob:")):
            return route.continue_()
        page.asked.append(route.request.url)
        route.abort()

    context.route("**/*", gate)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("requestfailed", lambda request: page.errors.append(f"not loaded: {request.url[:200]}"))
    yield page
    context.close()


# What each kind of content must have become: a mark in the page's HTML, and a script that waits for it,
# counts what is right and lists what is wrong
KINDS = {
    "formulas": (
        'class="math',
        "MathJax.startup.promise.then(() => [document.querySelectorAll('mjx-container svg').length,"
        " [...document.querySelectorAll('g[data-mjx-error]')].map(e => e.dataset.mjxError).concat("
        " [...document.querySelectorAll('.math')].filter(e => !e.querySelector('svg'))"
        ".map(e => e.textContent))])",
    ),
    "plotly figures": (
        "Plotly.newPlot",
        "(d => [d.filter(e => e.querySelector('.main-svg')).length,"
        " d.filter(e => !e.querySelector('.main-svg')).map(e => e.id)])"
        "([...document.querySelectorAll('[id^=plotly-]')])",
    ),
    "sounds": (
        "<audio",
        "Promise.all([...document.querySelectorAll('audio')].map(a => new Promise(ok => {"
        " const done = () => ok(a.duration > 0);"
        " a.onloadedmetadata = done; a.onerror = () => ok(false); a.preload = 'metadata';"
        " a.readyState ? done() : a.load() })))"
        ".then(d => [d.filter(Boolean).length, d.flatMap((ok, i) => ok ? [] : [`player ${i}`])])",
    ),
}


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_shows(kind, site, pages, tab):
    mark, script = KINDS[kind]
    having = [path for path, page in pages.items() if mark in page.text]
    if not having:
        pytest.skip(f"no page has {kind}")
    wrong = []
    for path in having:
        tab.goto(path.as_uri())
        good, bad = tab.evaluate(script)
        if bad or not good:
            wrong.append(f"{path.relative_to(site)}: {good} {kind} shown, wrong: {bad}")
    assert not wrong, "\n".join(wrong)
    assert not tab.asked, f"the pages asked for {tab.asked}"
    assert not tab.errors, f"the pages had errors: {tab.errors}"


@pytest.mark.needs("chromium")
def test_the_reader_can_search_and_turn_the_light_off(site, tab):
    tab.goto((site / "index.html").as_uri())
    dark = "document.documentElement.classList.contains('quarto-dark')"
    ground = "getComputedStyle(document.body).backgroundColor"
    assert not tab.evaluate(dark)
    white = tab.evaluate(ground)
    tab.evaluate("smalldocsToggleScheme()")
    tab.wait_for_function(dark)
    tab.reload()
    assert tab.evaluate(dark) and tab.evaluate(ground) != white, "the choice of dark is lost on the next page"
    tab.locator(".smalldocs-search input").first.fill("sampler")
    tab.locator("a.search-result").first.wait_for(timeout=60_000)
    assert not tab.asked and not tab.errors, tab.asked + tab.errors


@pytest.mark.needs("chromium")
@pytest.mark.parametrize(
    "query, page",
    [
        ("wer", "evaluate/metrics.html"),
        ("length mismatch", "diffusion/length.html"),
        ("unmasking order", "explore/order.html"),
        ("samplers", "diffusion/catalogue.html"),
    ],
)
def test_search_finds_words(query, page, site, tab):
    "Whole words and beginnings, not letters in the middle of others"
    tab.goto((site / "index.html").as_uri())
    tab.locator(".smalldocs-search input").first.fill(query)
    tab.locator("a.search-result").first.wait_for(timeout=60_000)
    found = tab.locator("a.search-result").evaluate_all("a => a.map(e => e.getAttribute('href'))")
    assert any(page in href for href in found[:5]), found
    shown = tab.locator(".smalldocs-search-results").first.inner_html()
    assert "<mark>" in shown and not re.search("[a-z]<mark>", shown), "marked in the middle of a word"
    tab.locator(".smalldocs-search input").first.fill("xnswerz")
    tab.locator(".search-none").wait_for(timeout=60_000)


# What is wider than the column and not in a box that scrolls; sound without room for its scrubber
TOO_WIDE = """() => {
    const main = document.querySelector('main'), right = main.getBoundingClientRect().right, found = [];
    if (document.documentElement.scrollWidth > innerWidth) found.push('the page scrolls sideways');
    const boxed = e => {
        for (let p = e.parentElement; p && p !== main; p = p.parentElement)
            if (getComputedStyle(p).overflowX !== 'visible') return true;
        return false };
    for (const e of main.querySelectorAll('table, img, iframe, pre, .js-plotly-plot')) {
        const box = e.getBoundingClientRect();
        if (box.width && box.right > right + 2 && !boxed(e))
            found.push(`${e.tagName} ${(e.innerText || '').slice(0, 40)}`) }
    for (const e of main.querySelectorAll('audio')) {
        const width = e.getBoundingClientRect().width;
        if (width && width < 240) found.push(`audio of ${Math.round(width)} pixels`) }
    return found }"""


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_its_column(width, site, pages, chromium):
    wrong = []
    tab = chromium.new_page(viewport=dict(width=width, height=900))
    for path in pages:
        if "repo" not in path.relative_to(site).parts:
            tab.goto(path.as_uri())
            wrong += [f"{path.relative_to(site)}: {what}" for what in tab.evaluate(TOO_WIDE)]
    tab.close()
    assert not wrong, "\n".join(wrong)


def test_references_are_readable(site):
    "Names and years, not the keys of a .bib file"
    text = (site / "diffusion/catalogue.html").read_text(encoding="utf-8")
    keys = re.findall(r"^@\w+\{(\w+)", (REPO / "nbs/references.bib").read_text(encoding="utf-8"), re.M)
    table = re.search(r"masks again.*?</table>", text, re.S)[0]
    assert keys and not [key for key in keys if key in table] and "Sahoo et al., 2024" in table


def test_methods_have_an_entry(pages, site):
    "Those of a class stand below it"
    ids = pages[site / "models/reconstructor.html"].ids
    assert {"reconstructor.reconstruct", "reconstructor.synthesize", "reconstructor.from_pretrained"} <= ids
    assert "trajectory.canvas" in pages[site / "diffusion/trajectory.html"].ids
