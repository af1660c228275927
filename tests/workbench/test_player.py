"The trajectory player in a real browser: as a page without a kernel, and in JupyterLab"

import base64
import re

import av
import pytest
import torch
from browser import CHROMIUM, SCREENSHOTS
from playwright.sync_api import expect, sync_playwright

from diffuspeech.data.audio import SAMPLE_RATE
from diffuspeech.diffusion.oracle import MarkovChain
from diffuspeech.diffusion.sample import sample
from diffuspeech.workbench.branch import branch
from diffuspeech.workbench.player import player
from diffuspeech.workbench.view import RunView

CHAIN = MarkovChain.random(vocab_size=12, seed=3)
LENGTH, STEPS, HOP = 60, 10, 640


def decode(tokens):
    "A tone for each token, silence for a mask"
    time = torch.arange(HOP) / SAMPLE_RATE
    pitch = 200 + 100 * tokens[:, None]
    return (0.4 * torch.sin(2 * torch.pi * pitch * time) * (tokens != CHAIN.mask_id)[:, None]).flatten()


def table(tokens, lengths, t=None, where=None, batch=None):
    "A denoiser whose predictions depend on the place alone, and no two places are equally sure"
    logits = torch.randn(LENGTH, CHAIN.mask_id + 1, generator=torch.Generator().manual_seed(1)) * 2
    return logits[where % LENGTH]


def generate(rule="conf_topk", denoiser=CHAIN, **options):
    canvas = torch.full((1, LENGTH), CHAIN.mask_id)
    canvas[0, 20:24] = 5
    return sample(denoiser, canvas, rule, CHAIN.mask_id, **dict(steps=STEPS, candidates=8) | options)


@pytest.fixture(scope="module")
def browser():
    "A browser that reaches no other machine and plays without a click"
    with sync_playwright() as playwright:
        rules = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", rules]
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=[*args, "--autoplay-policy=no-user-gesture-required"]
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    "open_page(player, ...): its saved file in a tab; an error or a request in the page fails the test"
    wrong, tabs = [], []

    def open_(shown, name="run", **options):
        path = tmp_path / f"{name}.html"
        shown.save(path)
        tab = browser.new_page(**dict(viewport=dict(width=1200, height=800)) | options)
        tabs.append(tab)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(("file:", "blob:")) else None)
        tab.goto(path.as_uri())
        tab.wait_for_selector(
            ".ds-player[data-sound=ready]" if shown.data["modes"] else ".ds-player[data-step]"
        )
        return tab

    yield open_
    for tab in tabs:
        tab.close()
    assert not wrong, wrong


def fact(tab, name):
    return tab.locator(".ds-player").get_attribute(f"data-{name}")


def pixels(tab):
    return tab.evaluate("document.querySelector('.ds-stage canvas').toDataURL()")


def press(tab, *keys):
    for key in keys:
        tab.keyboard.press(key)


VIEW = "document.querySelector('.ds-player').parentElement.player"
LOUDNESS = f"""() => {{ const x = {VIEW}.sound.buffer.getChannelData(0);
    return Math.sqrt(x.reduce((sum, v) => sum + v * v, 0) / x.length) }}"""


def test_a_branch_goes_on_with_the_denoiser():
    "With the rule of the run and the steps that are left, if no others are given"
    both = player(generate(), decode, denoiser=CHAIN).branch(4, {40: 3})
    first, other = (view.trajectory for view in both.views)
    assert other.final[0, 40] == 3 and other.steps == STEPS and (other.final != CHAIN.mask_id).all()
    assert other.rule == "conf_topk to step 4, then conf_topk" and (other.canvas(3) == first.canvas(3)).all()
    assert both.data["runs"][1]["by_hand"] == [[4, 40, 3]] and both.data["rules"]


@pytest.mark.needs("chromium")
def test_steps_by_keyboard(open_page):
    tab = open_page(player(generate(), decode, title="by keyboard"))
    tab.locator(".ds-slider").focus()
    assert fact(tab, "step") == "10"
    seen = {pixels(tab)}
    for keys, step in (
        (["ArrowLeft"], 9),
        (["Home"], 0),
        (["ArrowRight", "ArrowRight"], 2),
        (["End", "ArrowLeft"], 9),
    ):
        press(tab, *keys)
        expect(tab.locator(".ds-player")).to_have_attribute("data-step", str(step))
        left = re.compile(f"step {step} of 10, .*tokens left")
        expect(tab.locator(".ds-slider")).to_have_attribute("aria-valuetext", left)
        seen.add(pixels(tab))
    assert len(seen) == 4, "each of the steps 10, 9, 0 and 2 has its picture"
    expect(tab.locator(".ds-settings")).to_contain_text("sampler conf_topk · steps 10 · temperature 0")
    expect(tab.locator(".ds-rerun"), "no kernel is there to make another run").to_be_hidden()
    expect(tab.locator(".ds-readout")).not_to_contain_text("0 masked again")
    for n, color in enumerate(("state", "commit step", "confidence", "entropy", "token"), 1):
        press(tab, str(n))
        expect(tab.locator(".ds-color")).to_have_value(color)
        seen.add(pixels(tab))
    assert len(seen) == 8, "five colours, of which one was there"


@pytest.mark.needs("chromium")
def test_sound_goes_on_from_its_place(open_page):
    tab = open_page(player(generate(), decode))
    tab.locator(".ds-slider").focus()
    press(tab, "ArrowLeft", "ArrowLeft", "ArrowLeft", " ")
    tab.wait_for_function("Number(document.querySelector('.ds-player').dataset.time) > 0.3")
    before, loud = float(fact(tab, "time")), tab.evaluate(LOUDNESS)
    press(tab, "ArrowLeft")
    tab.wait_for_timeout(100)
    expect(tab.locator(".ds-player")).to_have_attribute("data-step", "6")
    assert fact(tab, "playing") == "true" and before <= float(fact(tab, "time")) < before + 1
    assert loud > 0.01
    press(tab, " ")
    expect(tab.locator(".ds-player")).to_have_attribute("data-playing", "false")
    tab.wait_for_timeout(100)
    stopped = fact(tab, "time")
    press(tab, "ArrowLeft", "ArrowLeft")
    tab.wait_for_timeout(200)
    assert fact(tab, "playing") == "false" and fact(tab, "time") == stopped, "it waits where it was"


@pytest.mark.needs("chromium")
def test_masked_places_are_silent_or_guessed(open_page):
    tab = open_page(player(generate(), decode))
    tab.locator(".ds-slider").focus()
    press(tab, "Home", "ArrowRight")
    guess = tab.evaluate(LOUDNESS)
    press(tab, "m")
    expect(tab.locator(".ds-mode")).to_have_value("silent")
    tab.wait_for_function("document.querySelector('.ds-player').dataset.sound == 'ready'")
    silent = tab.evaluate(LOUDNESS)
    assert 0.01 < silent < guess / 1.5
    plain = open_page(player(generate(candidates=0), decode), "plain")
    expect(plain.locator(".ds-mode"), "nothing was recorded to guess from").to_be_hidden()
    expect(plain.locator(".ds-other")).to_be_hidden()


@pytest.mark.needs("chromium")
def test_hover_tells_of_a_token(open_page):
    out = generate()
    view = RunView(out.trajectory, decode)
    tab = open_page(player(out, decode))
    tab.evaluate(f"{VIEW}.go(4)")
    place, step = int((view.cells.state[4] == 1).nonzero()[0]), 4
    x, y = tab.evaluate(
        f"""([p, n]) => {{ const v = {VIEW}, box = v.maps[0], [a, b] = v.span(v.run, p);
        const frame = v.$("over").getBoundingClientRect();
        const y = box.y + box.height * (n + 0.5) / (v.run.steps + 1);
        return [frame.left + (a + b) / 2, frame.top + y] }}""",
        [place, step],
    )
    tab.mouse.move(x, y)
    tip = tab.locator(".ds-tip")
    ids, log_probs = (
        t[step, 0, place] for t in (out.trajectory.candidates.tokens, out.trajectory.candidates.log_probs)
    )
    told = (
        f"position {place} · {place * 0.04:.2f}–{(place + 1) * 0.04:.2f} s",
        "step 4: best guess",
        "entropy",
        f"committed at step {int(view.cells.committed[-1, place])}",
    )
    for text in told:
        expect(tip).to_contain_text(text)
    lines = tip.locator("tr").all_inner_texts()
    assert len(lines) == 5 and lines[0].split()[0] == str(int(ids[0]))
    assert lines[0].split()[1] == f"{100 * float(log_probs[0].float().exp()):.0f}%"
    tab.mouse.move(x, y + tab.evaluate(f"{VIEW}.maps[0].height / 11"))
    expect(tip).to_contain_text("not yet reached")


@pytest.mark.needs("chromium")
def test_other_settings_without_the_network(open_page):
    "At the run's own settings the preview is the run; at others it says what would differ"
    tab = open_page(player(generate(denoiser=table), decode))
    tab.evaluate(f"{VIEW}.go(3)")
    tab.locator(".ds-other summary").click()
    tab.wait_for_function(f"{VIEW}.other")
    count = f"{VIEW}.run.fresh[4]"
    other = tab.evaluate(f"{VIEW}.other")
    assert len(other) == tab.evaluate(count) and all(c["same"] for c in other), other
    same = pixels(tab)
    tab.locator(".ds-ranking").select_option("left to right")
    places = tab.evaluate(f"{VIEW}.other.map(c => c.p)")
    left = tab.evaluate(f"[...{VIEW}.run.state.slice(180, 240)].flatMap((s, p) => s === 1 ? [p] : [])")
    assert places == left[: len(places)] and pixels(tab) != same
    expect(tab.locator(".ds-preview")).to_contain_text(f"would commit {len(places)} tokens")
    tab.locator(".ds-temperature").fill("3")
    assert tab.evaluate(f"{VIEW}.other.some(c => !c.same)")
    tab.locator(".ds-top-p").fill("0.05")
    best = tab.evaluate(f"{VIEW}.other.every(c => c.token === {VIEW}.run.best(3, c.p, 1)[0][0])")
    assert best, "a nucleus of one token leaves nothing to draw"


TYPED_SOON = f"""() => {{ const v = {VIEW}; v.run.live = true; v.$("hand").style.display = ""; v.go(0)
    v.openHand(); v.$("token").focus(); document.execCommand("insertText", false, "1")
    return new Promise(done => v.$("hand").addEventListener("toggle", done, {{ once: true }})) }}"""


@pytest.mark.needs("chromium")
def test_a_typed_token_is_not_lost(open_page):
    "The browser tells late that the panel opened, a sound comes when it is made: both digits count"
    tab = open_page(player(generate(), decode))
    tab.evaluate(TYPED_SOON)
    press(tab, "1", "Tab")
    expect(tab.locator(".ds-changes")).to_contain_text("0 → 11")
    tab.locator(".ds-token").focus()
    press(tab, "1")
    tab.evaluate(f"{VIEW}.busy('')")
    press(tab, "0", "Tab")
    expect(tab.locator(".ds-changes")).to_contain_text("0 → 10")
    tab.locator(".ds-take").last.click()
    expect(tab.locator(".ds-take[aria-pressed=true]")).to_be_focused()
    press(tab, "u")
    expect(tab.locator(".ds-changes")).to_contain_text("0 → 10")


@pytest.mark.needs("chromium")
def test_two_runs_are_compared(open_page):
    "Aligned by the share of tokens that is committed; one key changes which is played"
    runs = {"surest first": generate(), "random": generate("random", steps=20, seed=1)}
    tab = open_page(player(runs, decode, title="Two orders"))
    tab.evaluate(f"{VIEW}.go(8)")
    shares = tab.evaluate(f"{VIEW}.runs.map(run => run.share({VIEW}.stepOf(run)))")
    assert abs(shares[0] - shares[1]) < 0.08 and 0.3 < shares[0] < 0.5
    assert tab.evaluate(f"{VIEW}.differing") > 0
    first, loud = fact(tab, "step"), pixels(tab)
    tab.locator(".ds-slider").focus()
    press(tab, "a")
    expect(tab.locator(".ds-player")).to_have_attribute("data-step", "8")
    expect(tab.locator(".ds-active")).to_have_value("1")
    assert first == "4" and pixels(tab) != loud


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_themes_and_widths(open_page, scheme, width):
    "It takes the page's theme, and nothing is wider than the window"
    options = dict(viewport=dict(width=width, height=800), color_scheme=scheme)
    tab = open_page(player(generate(), decode, title="Themes and widths"), **options)
    expect(tab.locator(".ds-player.ds-dark")).to_have_count(int(scheme == "dark"))
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    before = pixels(tab)
    tab.evaluate("document.documentElement.dataset.theme = 'light'")
    tab.wait_for_function("!document.querySelector('.ds-player').classList.contains('ds-dark')")
    assert (pixels(tab) != before) == (scheme == "dark"), "drawn anew when the page changes its theme"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    tab.evaluate("delete document.documentElement.dataset.theme")
    tab.wait_for_timeout(400)
    tab.screenshot(path=SCREENSHOTS / f"player-{scheme}-{width}.png", full_page=True)


@pytest.mark.needs("chromium")
def test_broken_states_are_messages(open_page, tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        player(tmp_path / "gone.safetensors").save(tmp_path / "x.html")
    assert "no such file" in player(tmp_path / "gone.safetensors").html()
    tab = open_page(player(generate()))
    expect(tab.locator(".ds-player")).to_have_attribute("data-sound", "none")
    expect(tab.locator(".ds-sounds")).to_contain_text("without a decoder")
    expect(tab.locator(".ds-play")).to_be_disabled()
    shown = player(generate(), decode)
    path = tmp_path / "broken.html"
    shown.save(path)
    sound = base64.b64encode(b"no sound at all").decode()
    text = path.read_text()
    start = text.index('"0/silent/10":"') + len('"0/silent/10":"')
    path.write_text(text[:start] + sound + text[text.index('"', start) :])
    tab.goto(path.as_uri())
    tab.wait_for_selector(".ds-player[data-sound=failed]")
    expect(tab.locator(".ds-message")).to_contain_text("No sound of step 10")


@pytest.mark.needs("chromium")
def test_a_move_is_seen_at_once(open_page):
    "Fifty moves of the slider: the next frame has the new picture; how fast is in tools/measure_player.py"
    canvas = torch.full((1, 125), CHAIN.mask_id)
    out = sample(CHAIN, canvas, "conf_topk", CHAIN.mask_id, steps=10, candidates=8)
    tab = open_page(player(out, decode))
    shown = tab.evaluate(
        """async () => {
        const [slider, root] = ['slider', 'player'].map(n => document.querySelector(`.ds-${n}`)), shown = []
        const frame = () => new Promise(done => requestAnimationFrame(() => setTimeout(done)))
        for (let i = 0; i < 50; i++) {
            slider.value = i * 7 % 11; slider.dispatchEvent(new Event('input', {bubbles: true}))
            await frame()
            shown.push([root.dataset.step, document.querySelector('.ds-stage canvas').toDataURL()])
        }
        return shown }"""
    )
    assert [step for step, _ in shown] == [str(i * 7 % 11) for i in range(50)]
    assert len({picture for _, picture in shown}) == 11 == len(set(map(tuple, shown)))


def test_a_sampling_run_goes_on_with_its_denoiser():
    "Of a `Generation` as of its trajectory"
    run = generate()
    for shown in (player(run, decode, denoiser=CHAIN), player(run.trajectory, decode, denoiser=CHAIN)):
        (view,) = shown.views
        other = branch(view, 4, {0: 3}, seed=1).trajectory
        assert other.final[0, 0] == 3 and (other.final != CHAIN.mask_id).all()
        assert torch.equal(other.canvas(3), view.canvas(3)[None])


def test_a_video_has_picture_and_sound(tmp_path):
    "Each step for as long as it sounds, and what is saved by name is a video"
    shown = player(generate(steps=3), decode)
    shown.save(tmp_path / "run.mp4", dpi=50, seconds=0.2)
    with av.open(str(tmp_path / "run.mp4")) as file:
        (video,), (audio,) = file.streams.video, file.streams.audio
        lengths = [float(s.duration * s.time_base) for s in (video, audio)]
        kinds = video.codec_context.name, audio.codec_context.name
    expected = 4 * LENGTH * HOP / SAMPLE_RATE + 3 * 0.2 + 0.6
    assert all(abs(seconds - expected) < 0.15 for seconds in lengths), (lengths, expected)
    assert kinds == ("h264", "aac")
    player(generate(steps=3)).save(tmp_path / "silent.mp4", dpi=50)
    with av.open(str(tmp_path / "silent.mp4")) as file:
        assert len(file.streams.video) == 1 and not file.streams.audio
    with pytest.raises(ValueError, match="should end in .html, .gif, .mp4"):
        shown.save(tmp_path / "run.avi")
