"""The page in a real browser: every control does what it says, and nothing is an error.

Skipped where Chromium or playwright is missing.
"""

import shutil

import pytest

from flashinfer.cli.main import main
from flashinfer.cli.run import demo_model

sync = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A page of 12 tokens of the demo model, near its least budget."""
    path = tmp_path_factory.mktemp("watch") / "watch.html"
    arguments = ["-p", "def f(", "-n", "12", "--temp", "0", "--device", "rpi5-nvme"]
    assert main(["watch", str(demo_model()), *arguments, "-o", str(path)]) == 0
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture(params=["desktop", "phone"])
def shown(request, browser, address):
    """(the page, its errors)."""
    phone = request.param == "phone"
    context = browser.new_context(
        viewport={"width": 390, "height": 800} if phone else {"width": 1280, "height": 900},
        color_scheme="dark" if phone else "light",
        reduced_motion="reduce" if phone else "no-preference",
    )
    page, errors = context.new_page(), []
    page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda asked: errors.append(asked.url) if asked.url != address else None)
    page.goto(address)
    yield page, errors
    assert not errors
    context.close()


def test_every_control_is_used(shown):
    page, _ = shown
    steps = int(page.get_attribute("#at", "max")) + 1
    said = page.text_content("#said")
    assert "Token 1 of 11, layer 0" in said and steps % 11 == 0
    page.click("#next")
    assert "layer 1" in page.text_content("#said")
    page.click("#back")
    assert page.text_content("#said") == said
    page.select_option("#unit", "token")
    page.click("#next")
    assert "Token 2 of 11, layer 0" in page.text_content("#said")
    page.fill("#at", str(steps - 1))
    assert "Token 11 of 11" in page.text_content("#said")
    page.click("#play")  # at the end it stops by itself
    page.wait_for_function("document.querySelector('#play').textContent === 'Play'")
    page.fill("#at", "0")
    page.click("#play")
    assert page.get_attribute("#play", "aria-pressed") == "true"
    page.wait_for_function("document.querySelector('#at').value > 0")
    page.click("#play")
    assert page.get_attribute("#play", "aria-pressed") == "false"


def test_settings_and_ideas_change_the_plan(shown):
    page, _ = shown
    for name, worst in (("memory", "0"), ("window", "0"), ("disk", "3"), ("chunk", "0")):
        before = page.text_content("#o-" + name), page.text_content("#planned")
        at = page.input_value("#" + name)
        page.fill("#" + name, worst if at != worst else "1")
        assert page.text_content("#o-" + name) != before[0]
        page.fill("#" + name, at)
        assert (page.text_content("#o-" + name), page.text_content("#planned")) == before
    for idea in ("predict", "keep", "bundle", "many"):
        page.fill("#memory", "1")
        before = page.text_content("#planned")
        page.uncheck("#" + idea)
        assert page.text_content("#planned") != before, idea
        page.check("#" + idea)
        assert page.text_content("#planned") == before


def test_keys_work_and_everything_fits(shown):
    page, _ = shown
    page.keyboard.press("ArrowRight")
    assert "layer 1" in page.text_content("#said")
    page.keyboard.press("ArrowLeft")
    assert "layer 0" in page.text_content("#said")
    page.keyboard.press(" ")
    assert page.text_content("#play") == "Pause"
    page.keyboard.press(" ")
    assert page.text_content("#play") == "Play"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "back"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    drawn = page.evaluate(
        """[...document.querySelectorAll('canvas')].map(canvas => {
            const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
            return new Set(new Uint32Array(data.data.buffer)).size; })"""
    )
    assert len(drawn) == 4 and min(drawn) >= 3


def test_a_live_page_follows(browser):
    """Runs that come while it is open appear, and its end is told."""
    from flashinfer.study.watch.live import LiveServer
    from flashinfer.study.watch.page import filled

    layer = {"begin": 0, "end": 5, "used": [1], "active": [1], "place": [2], "slots": [0],
             "changed": [[0, 1]]}  # fmt: skip
    one = {"text": "a", "begin": 0, "end": 9, "layers": [layer], "reads": [[0, 4, 0, 1, 512]]}
    data = {"title": "x", "made": "y", "prompt": "p", "layers": [{"units": 4, "slots": 2}],
            "runs": [], "live": True, "planned": None}  # fmt: skip
    with LiveServer(filled(data)) as server:
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server.address)
        assert "Waiting" in page.text_content("#said")
        assert page.is_hidden("#plan")
        server.add(one)
        page.wait_for_function("document.querySelector('#said').textContent.includes('of 1,')")
        server.add(one)
        page.wait_for_function("document.querySelector('#said').textContent.includes('Token 2')")
        server.finish(5.0)
        page.wait_for_function("document.querySelector('#made').textContent.includes('ended')")
        assert not errors
        page.close()
