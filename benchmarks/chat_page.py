"""Pictures of the chat page, for the README.

python -m benchmarks.chat_page model=runs/assistant/policy [folder=FOLDER]

Serves a model, talks to it on its page in headless Chromium, and writes chat_page.png (a
conversation, with the settings) and chat_page_tokens.png (the tokens of an answer with their
probabilities).
"""

import shutil
import tempfile
from pathlib import Path

from benchmarks.serving_load import KEY, ServerProcess, ServingLoad
from lmjax.config import UserError, config
from lmjax.launch import exit_on_user_error, from_command_line

RESULTS = Path(__file__).with_name("results")
MOST_BYTES = 100_000  # of a picture


@config
class ChatPagePictures:
    """The conversation that is shown."""

    model: str = "runs/assistant/policy"  # folder of a model that talks
    asks: tuple[str, ...] = (  # messages of the user
        "What does os.path.join(a, *p) do?",
        "What does this? Return a copy of the list.",
    )
    max_tokens: int = 40  # of each answer
    folder: str = ""  # for the pictures; empty: that of the results


def main() -> None:
    """Talks to the model, and writes the pictures."""
    settings = from_command_line(ChatPagePictures())
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UserError("playwright drives the browser: pip install '.[test]'") from None
    if (chromium := shutil.which("chromium")) is None:
        raise UserError("there is no chromium on this machine: apt-get install chromium")
    folder = Path(settings.folder) if settings.folder else RESULTS
    with tempfile.TemporaryDirectory() as work:
        server = ServerProcess(settings.model, ServingLoad(), Path(work))
        try:
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
                size = {"width": 900, "height": 620}
                page = browser.new_page(viewport=size, reduced_motion="reduce")
                page.goto("http://{}:{}/#key={}".format(*server.address, KEY))
                page.locator("#text:enabled").wait_for()
                talk(page, settings)
                page.screenshot(path=folder / "chat_page.png")
                show_tokens(page)
                page.screenshot(path=folder / "chat_page_tokens.png")
                browser.close()
        finally:
            server.kill()
    for name in ("chat_page.png", "chat_page_tokens.png"):
        found = (folder / name).stat().st_size
        print(f"{folder / name}: {found:,} bytes")
        if found > MOST_BYTES:
            raise UserError(f"{name} has {found} bytes, more than {MOST_BYTES}")


def talk(page, settings: ChatPagePictures) -> None:
    """Has the conversation, greedily, so that the pictures come out alike."""
    page.get_by_role("button", name="Settings").click()
    page.locator("#temperature").fill("0")
    page.locator("#max_tokens").fill(str(settings.max_tokens))
    for _ in range(2):  # the first time all is compiled
        page.get_by_role("button", name="New").click()
        for ask in settings.asks:
            page.locator("#text").fill(ask)
            page.locator("#text").press("Enter")
            page.locator("#send:visible").wait_for(timeout=60_000)


def show_tokens(page) -> None:
    """Has the last answer written again with its probabilities, and points at a token."""
    page.locator("#tokens").set_checked(True)
    for _ in range(2):
        page.get_by_role("button", name="Regenerate").last.click()
        page.locator("#send:visible").wait_for(timeout=60_000)
    page.locator(".message").last.locator(".token").nth(3).hover()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
