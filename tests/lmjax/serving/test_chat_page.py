"""The chat page in headless Chromium: real clicks and keys, and what is then asked and shown.

Skipped where there is no Chromium; Debian's package is `chromium`.
"""

import shutil

import jax
import pytest

from lmjax.data.chat.messages import Message
from lmjax.data.chat.templates import PLAIN
from lmjax.generation import Sampling
from tests.lmjax.serving.servers import KEY, mesh, served, text_generator

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
MARKUP = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>"


@pytest.fixture(scope="module")
def server():
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    """Chromium; as root, who tests in containers, it has no sandbox."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """A page whose key is known; fails where it asks another server, or its script fails."""
    context, asked, failures = browser.new_context(reduced_motion="reduce"), [], []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.goto(f"{server.url}/#key={KEY}")
    page.locator("#text:enabled").wait_for()
    yield page
    context.close()
    assert failures == []
    assert all(url.startswith((server.url, "data:")) for url in asked)


def settle(page):
    """Waits until an answer is whole."""
    page.locator("#send:visible").wait_for(timeout=60_000)


def choose(page, **settings):
    """Sets settings in the panel."""
    if not page.locator("#settings").is_visible():
        page.get_by_role("button", name="Settings").click()
    for name, value in settings.items():
        if name == "tokens":
            page.locator("#tokens").set_checked(value)
        else:
            page.locator(f"#{name}").fill(value)


def say(page, text):
    """Writes a message, and sends it by the key."""
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")
    settle(page)


def shown(page):
    """Roles and texts of the conversation."""
    read = "all => all.map(one => [one.classList[1], one.querySelector('.body').textContent])"
    return [tuple(pair) for pair in page.eval_on_selector_all(".message", read)]


def replied(*messages, most=10):
    """The model's reply, as `lmjax.generation` gives it."""
    with jax.set_mesh(mesh()):
        talk = [Message(*message) for message in messages]
        greedy = Sampling(temperature=0.0)
        return "".join(text_generator().reply(PLAIN, talk, greedy, most))


def test_a_conversation(page):
    assert page.url.endswith("/") and KEY not in page.url
    choose(page, temperature="0", max_tokens="10")
    say(page, "one")
    first = replied(("user", "one"))
    assert shown(page) == [("user", "one"), ("assistant", first)]
    assert page.get_by_text("tokens, ").count() == 1
    say(page, MARKUP)
    talk = ("user", "one"), ("assistant", first), ("user", MARKUP)
    assert shown(page) == [*talk, ("assistant", replied(*talk))]
    assert page.title() == "Chat"
    page.get_by_role("button", name="New").click()
    assert shown(page) == []
    choose(page, system="be brief")
    say(page, "two")
    assert shown(page)[1][1] == replied(("system", "be brief"), ("user", "two"))


@pytest.mark.slow
def test_what_was_said_is_changed_and_answered_again(page):
    choose(page, temperature="0", max_tokens="10")
    say(page, "one")
    say(page, "two")
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("changed message").fill("three")
    page.get_by_role("button", name="Save").click()
    settle(page)
    assert shown(page) == [("user", "three"), ("assistant", replied(("user", "three")))]
    choose(page, temperature="1", seed="5")
    page.get_by_role("button", name="Regenerate").click()
    settle(page)
    other = shown(page)[1][1]
    assert len(shown(page)) == 2
    page.get_by_role("button", name="Regenerate").click()
    settle(page)
    assert shown(page)[1][1] == other  # the seed is the same
    page.get_by_role("button", name="Edit").last.click()
    page.get_by_label("changed message").fill("my own")
    page.get_by_role("button", name="Save").click()
    assert shown(page)[1] == ("assistant", "my own")


def test_an_answer_is_stopped(page, server):
    before = server.model.engine.counts["finished_cancelled"]
    choose(page, temperature="1", max_tokens="200", seed="1")
    # Each step takes a while, as of a larger model.
    step = server.model.engine.step
    server.model.engine.step = lambda: (page_pause(), step())[1]
    try:
        page.locator("#text").fill("go on")
        page.get_by_role("button", name="Send").click()
        page.locator(".message.assistant .body").filter(has_text="").wait_for()
        page.wait_for_timeout(400)
        page.get_by_role("button", name="Stop").click()
        settle(page)
        server.wait_idle()
    finally:
        server.model.engine.step = step
    assert page.get_by_text("stopped").count() == 1
    assert server.model.engine.counts["finished_cancelled"] == before + 1


def page_pause():
    """Waits as long as a step of a large model takes."""
    import time

    time.sleep(0.02)


def test_tokens_show_their_probabilities(page):
    choose(page, temperature="0", max_tokens="6", tokens=True)
    say(page, "one")
    tokens = page.locator(".token")
    assert tokens.count() == 6
    tokens.nth(2).hover()
    rows = page.locator("#tip tr")
    assert rows.count() == 5 and page.locator("#tip .chosen").count() == 1
    shares = [float(text.split()[-2]) for text in rows.all_inner_texts()]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 100.3
    page.get_by_role("heading", name="Chat").hover()
    assert page.locator("#tip").count() == 0


@pytest.mark.slow
def test_settings_are_kept_and_the_key_is_asked_for(browser, server):
    context = browser.new_context()
    page = context.new_page()
    page.goto(server.url)
    page.get_by_label("Key of the server").fill("wrong")
    page.get_by_role("button", name="Enter").click()
    page.get_by_text("the key is missing or wrong").wait_for()
    page.get_by_label("Key of the server").fill(KEY)
    page.get_by_role("button", name="Enter").click()
    page.locator("#text:enabled").wait_for()
    assert not page.get_by_label("Key of the server").is_visible()
    choose(page, temperature="0.3", system="kept")
    page.reload()
    page.locator("#text:enabled").wait_for()
    choose(page)
    assert page.locator("#system").input_value() == "kept"
    assert page.locator("#temperature-shown").inner_text() == "0.30"
    context.close()


def test_a_refusal_is_told(page):
    choose(page, max_tokens="5000")
    say(page, "one")
    page.get_by_text("this server allows 200 at most").wait_for()
    assert shown(page) == [("user", "one")]
