"""The page in headless Chromium: real clicks, drags and keys, and what is then on disk.

Skipped where there is no Chromium; Debian's package is `chromium`.
"""

import shutil
import threading

import pytest

from lmjax.annotation.answers import ItemAnswers
from lmjax.annotation.desk import Desk
from lmjax.annotation.items import read_items
from tests.lmjax.annotation.desks import LINES, judge, make_desk, read_lines, served, write_lines

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine")
SCRIPT = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
LONG = "word " * 2000


@pytest.fixture(scope="module")
def browser():
    """Chromium; as root, who tests in containers, it has no sandbox."""
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """Opens an address; fails where the page asks another server, or its script fails."""
    contexts, asked, failures = [], [], []

    def open(url, **settings):
        context = browser.new_context(reduced_motion="reduce", **settings)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        page.goto(url)
        return page

    yield open
    for context in contexts:
        context.close()
    assert failures == []
    assert {url.split("/")[2].split(":")[0] for url in asked if not url.startswith("data:")} == {
        "127.0.0.1"
    }


def shown(page):
    """The answers in their ranks, as the page shows them."""
    page.wait_for_selector(".answer")
    read = "tiers => tiers.map(tier => [...tier.querySelectorAll('.text')].map(n => n.textContent))"
    return page.eval_on_selector_all(".tier", read)


def head(page, text):
    """The middle of the part by which an answer is dragged."""
    card = page.locator("#list .answer").filter(has=page.get_by_text(text, exact=True))
    box = card.locator(".head").bounding_box()
    return box["x"] + 70, box["y"] + box["height"] / 2


def drag(page, text, to):
    """Drags an answer to what `to` says, which is asked while answers are dragged."""
    page.mouse.move(*head(page, text))
    page.mouse.down()
    x, y = head(page, text)
    page.mouse.move(x, y + 8, steps=2)
    page.mouse.move(*to(), steps=6)
    page.mouse.up()


def middle(page, tier):
    """The middle of a rank: a drop there is a tie."""
    box = page.locator(".tier").nth(tier).bounding_box()
    return box["x"] + 200, box["y"] + box["height"] / 2


def gap(page, number):
    """Between two ranks."""
    box = page.locator(".gap").nth(number).bounding_box()
    return box["x"] + 200, box["y"] + box["height"] / 2


def line_of(tmp_path, name="comparisons.jsonl"):
    """The one line that holds."""
    (line,) = read_lines(tmp_path / "out/ada" / name)
    return line


def test_answers_are_ranked_by_dragging(opened, tmp_path):
    with served(make_desk(tmp_path)) as url:
        page = opened(url + "?annotator=ada")
        a, b, c, d = (tier[0] for tier in shown(page))
        drag(page, d, lambda: gap(page, 0))
        assert shown(page) == [[d], [a], [b], [c]]
        drag(page, a, lambda: gap(page, 4))
        assert shown(page) == [[d], [b], [c], [a]]
        drag(page, a, lambda: middle(page, 1))
        assert shown(page) == [[d], [a, b], [c]]  # tied ones keep the order of their letters
        drag(page, c, lambda: middle(page, 1))
        assert shown(page) == [[d], [a, b, c]]
        drag(page, b, lambda: gap(page, 2))
        assert shown(page) == [[d], [a, c], [b]]
        drag(page, d, lambda: head(page, d))  # back where it was
        assert shown(page) == [[d], [a, c], [b]]
        page.get_by_label("Why?").fill("d is right\nb is <wrong>")
        page.get_by_role("button", name="Save").click()
        page.get_by_text("1 of 3").wait_for()
        line = line_of(tmp_path)  # on disk as soon as the next item is there
    assert dict(zip(line["answers"], line["ranks"])) == {d: 0, a: 1, c: 1, b: 2}
    assert line["answers"] == LINES[0]["answers"] and line["annotator"] == "ada"
    assert line["reason"] == "d is right\nb is <wrong>"
    assert [line["answers"][n] for n in line["shown"]] == [a, b, c, d]


@pytest.mark.slow
def test_a_drag_goes_beyond_the_screen(opened, tmp_path):
    """At the edge the page moves on: from the last of eight answers to the first."""
    lines = [{"prompt": LONG, "answers": [f"{n} {LONG}" for n in range(8)]}]
    with served(make_desk(tmp_path, lines)) as url:
        page = opened(url + "?annotator=ada", viewport={"width": 900, "height": 600})
        *others, last = (tier[0] for tier in shown(page))
        page.locator("#list .answer .head").last.scroll_into_view_if_needed()
        page.mouse.move(*head(page, last))
        page.mouse.down()
        page.mouse.move(300, 200, steps=3)
        page.mouse.move(300, 5, steps=3)
        while page.evaluate("scrollY") > 0:
            page.wait_for_timeout(20)
        page.mouse.up()
        assert shown(page) == [[last], *([other] for other in others)]


@pytest.mark.slow
def test_a_drag_that_is_broken_off_changes_nothing(opened, tmp_path):
    with served(make_desk(tmp_path)) as url:
        page = opened(url + "?annotator=ada")
        before = shown(page)
        page.mouse.move(*head(page, before[3][0]))
        page.mouse.down()
        page.mouse.move(*middle(page, 0), steps=5)
        assert page.locator(".ghost").count() == 1
        page.keyboard.press("Escape")
        page.mouse.up()
        assert shown(page) == before and page.locator(".ghost, .over, .dragging").count() == 0


@pytest.mark.slow
def test_a_finger_drags_too(opened, tmp_path):
    with served(make_desk(tmp_path)) as url:
        page = opened(url + "?annotator=ada", **PHONE)
        a, b, c, d = (tier[0] for tier in shown(page))
        touch = page.context.new_cdp_session(page)

        def send(kind, *points):
            where = [{"x": x, "y": y} for x, y in points]
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": where})

        x, y = head(page, b)
        send("touchStart", (x, y))
        send("touchMove", (x, y - 10))
        x, y = gap(page, 0)
        for step in range(3):
            send("touchMove", (x, y + 2 - step))
        send("touchEnd")
        assert shown(page) == [[b], [a], [c], [d]]


def test_the_keyboard_is_enough(opened, tmp_path):
    """From the name to the last judgement, without a mouse."""
    with served(make_desk(tmp_path)) as url:
        page = opened(url)
        page.wait_for_selector("#name")
        page.keyboard.type("Ada")
        page.keyboard.press("Enter")
        a, b, c, d = (tier[0] for tier in shown(page))
        press = page.keyboard.press
        press("Shift+ArrowDown")  # a after b
        assert shown(page) == [[b], [a], [c], [d]]
        for key in ("ArrowDown", "ArrowDown", "="):  # d is tied with c
            press(key)
        assert shown(page) == [[b], [a], [c, d]]
        press("Shift+ArrowUp")  # and is above it
        assert shown(page) == [[b], [a], [d], [c]]
        press("=")
        press("=")  # tied with a, and not
        assert shown(page) == [[b], [a], [d], [c]]
        press("Tab")
        page.keyboard.type("s = u")  # letters in a text are no commands
        press("Control+Enter")
        page.get_by_text("1 of 3").wait_for()
        line = line_of(tmp_path)
        assert dict(zip(line["answers"], line["ranks"])) == {b: 0, a: 1, d: 2, c: 3}
        assert line["reason"] == "s = u"
        press("s")
        page.get_by_text("2 of 3, 1 skipped").wait_for()
        press("u")
        page.get_by_text("1 of 3", exact=True).wait_for()
        press("u")
        page.get_by_text("0 of 3").wait_for()
        assert shown(page) == [[b], [a], [d], [c]]  # to be corrected
        assert page.get_by_label("Why?").input_value() == "s = u"


@pytest.mark.slow
def test_buttons_move_and_tie(opened, tmp_path):
    with served(make_desk(tmp_path, LINES[2:])) as url:
        page = opened(url + "?annotator=ada")
        first, second, third = (tier[0] for tier in shown(page))
        page.get_by_role("button", name="move down: answer A").click()
        assert shown(page) == [[second], [first], [third]]
        page.get_by_role("button", name="tie with the one above: answer A").click()
        assert shown(page) == [[first, second], [third]]
        page.get_by_role("button", name="no tie: answer A").click()
        assert shown(page) == [[second], [first], [third]]
        page.get_by_role("button", name="move up: answer C").click()
        assert shown(page) == [[second], [third], [first]]
        assert page.get_by_role("button", name="move up: answer B").is_disabled()
        said = page.locator("#said").text_content()
        assert said == "Answer C: rank 2 of 3"


@pytest.mark.slow
def test_an_order_that_nobody_touched_is_asked_for(opened, tmp_path):
    with served(make_desk(tmp_path)) as url:
        page = opened(url + "?annotator=ada")
        shown(page)
        page.get_by_role("button", name="Save").click()
        page.get_by_role("button", name="Keep this order?").click()
        page.get_by_text("1 of 3").wait_for()
    line = line_of(tmp_path)
    assert [line["ranks"][number] for number in line["shown"]] == [0, 1, 2, 3]


def test_texts_are_only_texts(opened, tmp_path):
    lines = [{"prompt": SCRIPT, "answers": [SCRIPT, "</script>&amp;<b>no</b>", LONG]}]
    with served(make_desk(tmp_path, lines)) as url:
        page = opened(url + "?annotator=ada")
        assert sorted(tier[0] for tier in shown(page)) == sorted(lines[0]["answers"])
        assert page.locator(".message .text").text_content() == SCRIPT
        assert page.locator(".text *").count() == 0 and page.locator("img").count() == 0
        assert page.title() == "0 of 1 – Rank the answers"
        page.get_by_label("Why?").fill(SCRIPT)
        page.get_by_role("button", name="Save").click()
        page.get_by_text("All done, thank you").wait_for()
        page.get_by_role("button", name="Undo last").click()
        page.get_by_text("0 of 1").wait_for()
        assert page.get_by_label("Why?").input_value() == SCRIPT
        assert page.title() == "0 of 1 – Rank the answers"


@pytest.mark.slow
def test_a_long_answer_is_folded_and_can_be_read(opened, tmp_path):
    with served(make_desk(tmp_path, [{"prompt": "p", "answers": [LONG, "short"]}])) as url:
        page = opened(url + "?annotator=ada")
        shown(page)
        card = page.locator(".answer.long")
        folded = card.bounding_box()["height"]
        assert folded < 500
        card.get_by_role("button", name="Show all").click()
        assert card.bounding_box()["height"] > 1000
        card.get_by_role("button", name="Show less").click()
        assert card.bounding_box()["height"] == folded


def test_an_answer_is_written(opened, tmp_path):
    with served(make_desk(tmp_path, task="write")) as url:
        page = opened(url + "?annotator=ada")
        page.wait_for_selector("#completion")
        page.keyboard.press("Control+Enter")
        page.get_by_text("the answer is empty").wait_for()
        page.keyboard.type("It scatters.")
        page.keyboard.press("Enter")
        page.keyboard.type("素数")
        page.get_by_text("3 words").wait_for()
        page.get_by_role("button", name="Save").click()
        page.get_by_text("1 of 3").wait_for()
        assert not page.locator("#note").is_visible()
        page.get_by_role("button", name="Skip").click()
        page.get_by_text("2 of 3, 1 skipped").wait_for()
    line = line_of(tmp_path, "conversations.jsonl")
    assert (line["prompt"], line["completion"]) == (LINES[0]["prompt"], "It scatters.\n素数")


def test_a_second_window_saves_nothing_twice(opened, tmp_path):
    with served(make_desk(tmp_path)) as url:
        first, second = (opened(url + "?annotator=ada") for _ in range(2))
        for page in (first, second):
            shown(page)
            page.get_by_role("button", name="Skip").click()
        second.get_by_text("nothing was saved twice").wait_for()
        second.get_by_text("1 of 3, 1 skipped").wait_for()
    assert len(read_lines(tmp_path / "out/ada/judgements.jsonl")) == 1


@pytest.mark.slow
def test_a_server_that_is_gone_loses_no_text(opened, tmp_path):
    desk = make_desk(tmp_path, task="write")
    with served(desk) as url:
        page = opened(url + "?annotator=ada")
        page.wait_for_selector("#completion")
        page.keyboard.type("long work")
    page.get_by_role("button", name="Save").click()
    page.get_by_text("The server does not answer").wait_for()
    assert page.locator("#completion").input_value() == "long work"
    assert page.get_by_role("button", name="Save").is_enabled()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_answers_appear_when_the_model_has_written_them(opened, tmp_path):
    path = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    items = read_items(str(path), lambda item: None)
    answers = ItemAnswers(items, tmp_path / "out", lambda item: ["one", "two"], {})
    with served(Desk(items, answers, tmp_path / "out")) as url:
        page = opened(url + "?annotator=ada")
        page.get_by_text("The model is writing").wait_for()
        answers.write_missing(threading.Event())
        assert sorted(tier[0] for tier in shown(page)) == ["one", "two"]


LUMINANCE = """
([text, ground]) => {
  const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map(v => v / 255)
      .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const colour = (selector, name) => getComputedStyle(document.querySelector(selector))[name];
  const pair = [light(colour(text, "color")), light(colour(ground, "backgroundColor"))];
  return (Math.max(...pair) + .05) / (Math.min(...pair) + .05);
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_readable_in_both_schemes_and_on_a_phone(opened, tmp_path, scheme):
    """Contrast of at least 4.5 (WCAG 2 AA), nothing wider than the screen, keys large enough."""
    desk = make_desk(tmp_path, [{"prompt": "x" * 300, "answers": ["y" * 300, "z"]}, *LINES])
    judge(desk, "ada", "ranked", ranks=[0, 0])
    judge(desk, "ada", "undone")
    with served(desk) as url:
        page = opened(url + "?annotator=ada", color_scheme=scheme, **PHONE)
        shown(page)
        grounds = {
            "header div.bar #count": "header",
            ".role": ".message",
            ".message .text": ".message",
            ".answer .text": ".cards",
            ".tag": ".cards",
            ".hint": "body",
            "#save": "#save",
            "#skip": "footer",
            ".tier.best .rank": ".tier.best .rank",
        }
        for pair in grounds.items():
            assert page.evaluate(LUMINANCE, list(pair)) >= 4.5, pair
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        sizes = [one.bounding_box() for one in page.locator(".move, footer button").all()]
        assert all(box["width"] >= 36 and box["height"] >= 36 for box in sizes if box)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="light / dark").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
