"""How fast the player is, in a real browser: python tools/measure_player.py [-o numbers.json]

From opening the first explore notebook to the first sound; the sounds of all steps of a clip of about five
seconds; and fifty moves of the slider, to the picture and to the sound of the new step. The load of the
machine is noted beside them, since the numbers mean little without it."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests" / "support")]

from browser import CHROMIUM, RUN, Page, Server
from playwright.sync_api import sync_playwright

from diffuspeech.evaluate.clips import load_bundled_clips

NOTEBOOK = "nbs/explore/trajectory.ipynb"
VIEW = "document.querySelector('.ds-player').parentElement.player"
READY = ".ds-player[data-sound=ready]"
ALL_READY = f"""() => {{ const v = {VIEW}, i = v.active, run = v.runs[i]
    const mode = left => (left && run.candidates ? 'guess' : 'silent')
    return run.left.every((left, n) => v.buffers[`${{i}}/${{mode(left)}}/${{n}}`]) }}"""
# each move: the event, then the next frame with the new picture, and the sound that the play button plays
MOVES = (
    "async count => { const v = "
    + VIEW
    + """, slider = v.$('slider'), times = []
    const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)))
    for (let i = 0; i < count; i++) {
        const step = (i * 7 + 3) % (v.main.steps + 1), began = performance.now()
        slider.value = step; slider.dispatchEvent(new Event('input', {bubbles: true}))
        while (!v.sound.buffer || v.sound.buffer !== v.buffers[v.key_()]) await frame()
        await frame()
        if (v.root.dataset.step !== String(step)) throw new Error('another step is shown')
        times.push(performance.now() - began)
    }
    return times }"""
)


STORED = ".jp-RenderedHTML .ds-player"  # a page with its sounds inside, of the notebook's file
LIVE = ".jp-OutputArea-output:not(.jp-RenderedHTML) .ds-player"  # drawn by the kernel's widget
CELL_DONE = """at => { const c = jupyterapp.shell.currentWidget.content.model.cells.get(at)
    return c.executionCount !== null && c.executionState !== 'running' }"""
ALL_DONE = """() => [...jupyterapp.shell.currentWidget.content.model.cells].filter(c => c.type === 'code')
    .every(c => c.executionCount !== null && c.executionState !== 'running')"""


def open_notebook(page: Page, began: float) -> dict[str, float]:
    "Seconds since the notebook was opened: the stored run is seen, heard; the kernel; a live one, too"
    found = dict(page_and_kernel=time.monotonic() - began)

    def lap(name, css):
        page.tab.wait_for_selector(css, timeout=120_000)
        found[name] = time.monotonic() - began

    page.tab.wait_for_selector(f"{STORED}[data-painted]", timeout=120_000)
    painted = page.tab.evaluate(f"Number(document.querySelector('{STORED}').dataset.painted)")
    found["stored_picture"] = painted / 1000  # which was there before the kernel, perhaps
    lap("stored_sound", f"{STORED}[data-sound=ready]")
    page.tab.locator(f"{STORED} .ds-play").first.click()
    lap("stored_sound_heard", f"{STORED}[data-playing=true]")
    page.tab.evaluate(RUN)
    kinds = page.tab.evaluate("[...jupyterapp.shell.currentWidget.content.model.cells].map(c => c.type)")
    code = [at for at, kind in enumerate(kinds) if kind == "code"]
    for name, at in zip(("autoreload", "imports", "model_and_run"), code):
        page.tab.wait_for_function(CELL_DONE, arg=at, timeout=120_000, polling=20)
        found[name] = time.monotonic() - began
    lap("live_picture", f"{LIVE}[data-painted]")
    lap("live_sound", f"{LIVE}[data-sound=ready]")
    return found


def all_sounds(page: Page, clip: str) -> dict[str, float]:
    "Seconds for a new run of a clip, and for the sounds of all its steps"
    player = page.tab.locator(".ds-player").first
    player.locator(".ds-clip").select_option(clip)
    began = time.monotonic()
    player.locator(".ds-start").click()
    page.tab.wait_for_function("document.querySelector('.ds-active').options.length == 2", timeout=120_000)
    run = time.monotonic() - began
    page.tab.wait_for_selector(READY, timeout=120_000)
    first = time.monotonic() - began
    page.tab.wait_for_function(ALL_READY, timeout=120_000, polling=20)
    return dict(new_run=run, its_first_sound=first, all_its_sounds=time.monotonic() - began)


def measure() -> dict:
    clip = min(load_bundled_clips(), key=lambda u: abs(u.duration - 5))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        began = time.monotonic()
        server = Server(Path(folder))
        server_start = time.monotonic() - began
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            began = time.monotonic()
            page = Page(browser, server, NOTEBOOK)
            seconds = open_notebook(page, began)
            page.tab.wait_for_function(ALL_READY, timeout=120_000)
            moves = sorted(page.tab.evaluate(MOVES, 50))
            page.tab.wait_for_function(ALL_DONE, timeout=300_000)  # the other cells of the page
            sounds = all_sounds(page, clip.id)
        finally:
            browser.close()
            server.stop()
    return dict(
        server_start=server_start,
        notebook_opened=seconds,
        clip=dict(id=clip.id, seconds=clip.duration) | sounds,
        moves=dict(median_ms=statistics.median(moves), p95_ms=moves[47], most_ms=moves[-1]),
        load=os.getloadavg(),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path)
    output, text = parser.parse_args().output, json.dumps(measure(), indent=1)
    print(text)
    if output:
        output.write_text(text + "\n")


if __name__ == "__main__":
    main()
