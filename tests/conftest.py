"What several tests share"

import packages
import pytest
from browser import CHROMIUM, Lab, Server
from playwright.sync_api import sync_playwright

from diffuspeech.data.audio import load_clip, save
from diffuspeech.evaluate.metrics import MissingDependency


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "needs(*names): skipped where one of these of tools/packages.py is not here"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    needs = {name for mark in item.iter_markers("needs") for name in mark.args}
    if missing := sorted(name for name in needs if not packages.PACKAGES[name].is_here()):
        pytest.skip(packages.reason(missing))


@pytest.fixture(scope="session")
def judge_or_skip():
    "judge_or_skip(Judge, ...): the judge, or a skip that names it"

    def make(judge, *args):
        try:
            return judge(*args)
        except MissingDependency as e:
            pytest.skip(str(e))

    return make


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    "JupyterLab on a copy of the repo, for the whole session"
    server = Server(tmp_path_factory.mktemp("lab"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def microphone(tmp_path_factory):
    "What Chromium's fake microphone hears"
    path = tmp_path_factory.mktemp("microphone") / "speech.wav"
    save(path, load_clip())
    return path


@pytest.fixture
def lab(server, microphone):
    """JupyterLab in a browser: see tests/support/browser.py

    The browser is new for each test: Playwright's event loop would disturb other tests.
    """
    with sync_playwright() as playwright:
        # the host rule keeps this browser, and with it the test, on this machine; requests to others are
        # still seen, and fail the test
        args = [
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            "--use-fake-ui-for-media-stream",  # the microphone is allowed, and hears this recording
            "--use-fake-device-for-media-stream",
            f"--use-file-for-fake-audio-capture={microphone}",
        ]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        lab = Lab(server, browser)
        yield lab
        errors = [error for page in lab.pages for error in page.close()]
        browser.close()
    assert not errors, "\n".join(errors)
