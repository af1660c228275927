"""A real JupyterLab in a real browser, for tests.

    def test_slider(lab):
        page = lab.open("nbs/explore/trajectory.ipynb").run_all()
        page.move_slider(-4)
        page.assert_changed("picture", "sound")
        page.screenshot("trajectory")

The server runs on a copy of the repo with a home of its own, so that neither the working tree nor the user's
Jupyter is touched. A page error, an error box in an output or a request to another machine fails the test
when it ends; nobody has to ask for it.
"""

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[2]
SCREENSHOTS = REPO / "_build" / "screenshots"
CHROMIUM = shutil.which("chromium")


def wait(ready, seconds: float, every: float = 0.1):
    "Poll until `ready()` is true; what it returned last, true or not"
    end = time.monotonic() + seconds
    while not (found := ready()) and time.monotonic() < end:
        time.sleep(every)
    return found


class Server:
    "`make lab` without the browser, on a copy of the repo in `folder`"

    def __init__(self, folder: Path):
        self.root, self.log, home = folder / "repo", folder / "lab.log", folder / "home"
        home.mkdir()
        for name in "nbs", "diffuspeech", "tools":
            shutil.copytree(
                REPO / name,
                self.root / name,
                ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
            )
        shutil.copy2(REPO / "settings.ini", self.root)
        # a new HOME moves every folder of Jupyter, IPython and matplotlib, unless a variable names it;
        # PYTHONPATH wins over the editable install
        env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("JUPYTER", "IPYTHON", "XDG", "MPLCONFIGDIR", "PLOTLY"))
        }
        env |= {"HOME": str(home), "PYTHONPATH": str(self.root)}
        cmd = [
            sys.executable,
            "-m",
            "jupyter",
            "lab",
            "--config=tools/jupyter_config.py",
            "--no-browser",
            "--port=0",
            "--LabApp.expose_app_in_browser=True",
        ]
        with self.log.open("w") as log:
            die_with_us = (
                partial(ctypes.CDLL(None).prctl, 1, signal.SIGTERM) if sys.platform == "linux" else None
            )  # PR_SET_PDEATHSIG: a killed pytest leaves no server behind
            self.process = psutil.Popen(
                cmd,
                cwd=self.root,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_us,
            )
        self.runtime = home / ".local/share/jupyter/runtime"
        try:
            if not wait(self._started, 60):
                raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()[-3000:]}")
        except BaseException:
            self.stop()
            raise

    def _started(self) -> bool:
        "Has the server said where it listens, and does it answer? `url` and `token` are then known"
        if not self.process.is_running():
            return False
        try:
            info = json.loads((self.runtime / f"jpserver-{self.process.pid}.json").read_text())
            self.url, self.token = info["url"], info["token"]
            return self.rest("api/status") is not None
        except (OSError, ValueError):
            return False

    def rest(self, path: str, method: str = "GET", data=None, token: str | None = None):
        "One call of the server's REST API; an answer of 400 or more is a `urllib.error.HTTPError`"
        token = self.token if token is None else token
        headers = {"Authorization": f"token {token}"} if token else {}
        body = None if data is None else json.dumps(data).encode()
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, body, headers, method=method), timeout=60
        ) as answer:
            return json.loads(answer.read() or "{}")

    def stop(self):
        "End the server and its kernels, which are in process groups of their own"
        if not self.process.is_running():
            return
        family = [self.process, *self.process.children(recursive=True)]
        self.process.terminate()
        for process in psutil.wait_procs(family, timeout=10)[1]:
            process.kill()
        self.process.wait(10)


# JupyterLab's own state, not what is drawn of it: a prompt far down the page may not be drawn
IDLE = """() => { const s = window.jupyterapp?.shell.currentWidget?.sessionContext, k = s?.session?.kernel;
    return Boolean(s?.isReady && k?.status == 'idle' && k?.connectionStatus == 'connected') }"""
RUN = "() => { jupyterapp.commands.execute('notebook:run-all-cells') }"
CLEAR = "() => jupyterapp.commands.execute('notebook:clear-all-cell-outputs')"
CELLS = """() => [...jupyterapp.shell.currentWidget.content.model.cells]
    .filter(c => c.type == 'code' && c.sharedModel.getSource().trim())
    .map(c => ({source: c.sharedModel.getSource(), count: c.executionCount,
                error: c.outputs.toJSON().filter(o => o.output_type == 'error')
                    .map(o => o.traceback.join('\\n')).join('\\n')}))"""
# what a person sees and hears in the outputs; sounds are decoded, so that silence and broken files are seen
STATE = """async () => {
    const all = css => [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output')]
        .filter(e => !e.parentElement.closest('.jp-OutputArea-output'))
        .flatMap(e => [e, ...e.querySelectorAll('*')].filter(e => e.matches(css)));
    const listen = async audio => {
        const source = audio.src || audio.querySelector('source')?.src || '';
        try {
            const bytes = await (await fetch(source)).arrayBuffer();
            const wave = await new OfflineAudioContext(1, 1, 44100).decodeAudioData(bytes);
            const x = wave.getChannelData(0);
            const loudness = Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length);
            return {seconds: wave.duration, loudness, source};
        } catch (error) { return {seconds: 0, loudness: 0, source: `${error} in ${source.slice(0, 60)}`} }
    };
    return {
        picture: [...all('.js-plotly-plot .mlayer, .js-plotly-plot .shapelayer').map(e => e.innerHTML),
                  ...all('img').map(e => e.src), ...all('canvas').map(e => e.toDataURL())],
        sound: await Promise.all(all('audio').map(listen)),
        text: all('.widget-html-content, .jp-RenderedText, .jp-RenderedHTMLCommon, .gtitle')
            .map(e => e.textContent),
    } }"""
# red boxes and widgets that cannot be shown; a library's warning is in a box of this type, too, but names no
# error
ERRORS = """() => [...document.querySelectorAll(
    '[data-mime-type="application/vnd.jupyter.stderr"], .jupyter-widgets-error-widget')]
    .map(e => e.textContent).filter(text => /Error|Traceback/.test(text))"""
HEIGHT = """() => [...document.querySelectorAll('.jp-Notebook .jp-Cell')]
    .reduce((sum, cell) => sum + cell.offsetHeight + 2, 0)"""
TOP = """() => {
    const panel = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer');
    panel.scrollTop = 0 }"""


class Page:
    "One notebook in JupyterLab. `page.tab` is Playwright's page, for what is not here"

    def __init__(self, browser, server: Server, path: str):
        self.server, self.path, self.errors = server, path, []
        self.tab = browser.new_page(viewport=dict(width=1280, height=1400))
        self.tab.on("pageerror", lambda error: self.errors.append(f"page error: {error}"))
        self.tab.on("request", lambda request: self._visit(request.url))
        self.tab.on("websocket", lambda socket: self._visit(socket.url.replace("ws", "http", 1)))
        answer = self.tab.goto(f"{server.url}lab/tree/{path}?token={server.token}&reset")
        assert answer.ok, f"JupyterLab answers {answer.status}:\n{server.log.read_text()[-3000:]}"
        self._idle(120)

    def _visit(self, url: str):
        if not url.startswith((self.server.url, "data:", "blob:")):
            self.errors.append(f"request to another machine: {url}")

    def _idle(self, seconds: float):
        self.tab.wait_for_function(IDLE, timeout=1000 * seconds, polling=100)

    def run_all(self, timeout: float = 180) -> "Page":
        "Run every cell and wait for the last; a cell that fails is an `AssertionError` with its traceback"
        self.tab.evaluate(CLEAR)
        end, idle = (
            time.monotonic() + timeout,
            99,
        )  # idle: for how many looks in a row the kernel had nothing to do
        while time.monotonic() < end:
            # Run All on a fresh kernel can be lost, wholly or in part, without a sign of it: wait, run again
            if idle > 12:
                self._idle(60)
                self.tab.wait_for_timeout(1500)
                self.tab.evaluate(RUN)
                idle = 0
            self.tab.wait_for_timeout(250)
            cells, idle = self.tab.evaluate(CELLS), idle + 1 if self.tab.evaluate(IDLE) else 0
            for cell in cells:
                assert not cell["error"], (
                    f"{self.path}: this cell failed\n\n{cell['source']}\n\n{cell['error']}"
                )
            missing = [cell["source"] for cell in cells if not cell["count"]]
            if idle and not missing:
                return self
        first = (missing or ["none: the kernel is busy"])[0]
        raise AssertionError(
            f"{self.path}: not every cell ran in {timeout} s. The first that did not:\n\n{first}"
        )

    def widget(self, css: str, which: int | str = 0):
        "The n-th widget of a kind in the outputs, or the one with this label"
        found = self.tab.locator(
            f".jp-OutputArea .jupyter-widgets:has(> .widget-label):has({css})"
        )  # the label's parent: not a box around it
        return (
            (found.nth(which) if isinstance(which, int) else found.filter(has_text=which).first)
            .locator(css)
            .first
        )

    def move_slider(self, by: int, which: int | str = 0) -> str:
        "Move a slider by so many steps with the arrow keys; the number that it then shows"
        self.before = self.settled()
        handle = self.widget(".noUi-handle", which)
        start = handle.get_attribute("aria-valuenow")
        handle.focus()
        for _ in range(abs(by)):
            handle.press("ArrowRight" if by > 0 else "ArrowLeft")
        assert wait(lambda: handle.get_attribute("aria-valuenow") != start, 5), (
            f"{self.path}: slider {which} cannot move by {by} from {start}: it is at its end"
        )
        return self.widget(".widget-readout", which).inner_text()

    def choose(self, option: str, which: int | str = 0):
        "Choose in a drop-down list"
        self.before = self.settled()
        self.widget("select", which).select_option(label=option)

    def click(self, text: str):
        "Press the button with this text"
        self.before = self.settled()
        self.tab.locator(".jp-OutputArea button.jupyter-button").filter(has_text=text).first.click()

    def state(self) -> dict:
        "Hashes of what the outputs show and play: `picture`, `sound`, `text`; `sounds`: (seconds, loudness)"
        state = self.tab.evaluate(STATE)
        prints = {
            kind: hashlib.sha256(json.dumps(state[kind]).encode()).hexdigest() if state[kind] else ""
            for kind in state
        }
        return prints | {"sounds": [(sound["seconds"], sound["loudness"]) for sound in state["sound"]]}

    def settled(self) -> dict:
        "The state once it is the same in two looks: a plot that is still being drawn has not changed"
        self._idle(60)
        seen = [None, self.state()]
        while seen[-1] != seen[-2] and len(seen) < 40:
            self.tab.wait_for_timeout(250)
            seen.append(self.state())
        assert seen[-1] == seen[-2], f"{self.path}: the outputs never come to rest"
        return seen[-1]

    def assert_changed(self, *kinds: str, timeout: float = 20):
        "Each of `picture`, `sound`, `text` differs from before the last move; a new sound can be heard"
        end = time.monotonic() + timeout
        while (
            any(self.before[kind] == (now := self.state())[kind] for kind in kinds) and time.monotonic() < end
        ):
            self.tab.wait_for_timeout(200)
        now = self.settled()
        same = [kind for kind in kinds if now[kind] in ("", self.before[kind])]
        assert not same, f"{self.path}: the move did not change: {', '.join(same)}"
        if "sound" in kinds:
            new = [sound for sound in now["sounds"] if sound not in self.before["sounds"]]
            assert all(seconds > 0 and loudness > 1e-4 for seconds, loudness in new), (
                f"{self.path}: broken or silent: {new}"
            )

    def screenshot(self, name: str) -> Path:
        "The whole notebook, in _build/screenshots/"
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        size = self.tab.viewport_size
        self.tab.set_viewport_size(
            dict(width=size["width"], height=min(self.tab.evaluate(HEIGHT) + 150, 12000))
        )
        self.tab.evaluate(TOP)
        self.settled()  # plots are drawn anew for the new size
        self.tab.screenshot(path=SCREENSHOTS / f"{name}.png")
        self.tab.set_viewport_size(size)
        return SCREENSHOTS / f"{name}.png"

    def close(self):
        "Close the tab and end its kernel; what went wrong in the page, if anything"
        self.errors += [f"error box: {text}" for text in self.tab.evaluate(ERRORS)]
        self.tab.close()
        for session in self.server.rest("api/sessions"):
            self.server.rest(f"api/sessions/{session['id']}", "DELETE")
        return [f"{self.path}: {error}" for error in self.errors]


class Lab:
    "The server and a browser"

    def __init__(self, server: Server, browser):
        self.server, self.browser, self.pages = server, browser, []

    def open(self, path: str) -> Page:
        "A notebook of the repo, or one that the test wrote below `lab.server.root`"
        self.pages.append(Page(self.browser, self.server, path))
        return self.pages[-1]

    def write(self, path: str, *cells: str) -> str:
        "Write a notebook of these code cells into the copy of the repo"
        nb = {
            "cells": [
                dict(cell_type="code", id=f"c{k}", metadata={}, outputs=[], execution_count=None, source=cell)
                for k, cell in enumerate(cells)
            ],
            "metadata": {"kernelspec": dict(display_name="python3", language="python", name="python3")},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (self.server.root / path).write_text(json.dumps(nb))
        return path
