"""A real browser for tests of the pages: Debian's Chromium, driven by playwright, and axe-core for accessibility."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any, Final, Literal

import pytest_asyncio
from harness import PATIENCE
from playwright.async_api import Browser, Page, ViewportSize, async_playwright, expect

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
AXE = files("axe_playwright_python") / "axe.min.js"
COLOR_SCHEMES: Final[tuple[Literal["light", "dark"], ...]] = ("light", "dark")
WIDE, NARROW = ViewportSize(width=1280, height=900), ViewportSize(width=320, height=700)

expect.set_options(timeout=PATIENCE * 1000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    """One for all tests of a file, which have to share its event loop: `pytest.mark.asyncio(loop_scope="module")`."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "these tests need a browser: apt-get install chromium"
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield launched
        await launched.close()


@pytest_asyncio.fixture(loop_scope="module")
async def browser(chromium: Browser) -> AsyncIterator[Browser]:
    """The browser, without a page."""
    yield chromium
    for context in chromium.contexts:
        await context.close()


async def opened(browser: Browser, url: str, **context: Any) -> Page:
    """The page at a url, once it is live. What it complains of in the browser's console stands in `page.complaints`."""
    page = await browser.new_page(**{"viewport": WIDE, "locale": "en-GB", **context})
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.complaints = complaints  # type: ignore[attr-defined]
    await page.goto(f"{url}/")
    await expect(page.locator("#link-text")).to_have_text("live")
    return page


def complaints(page: Page) -> list[str]:
    found: list[str] = page.complaints  # type: ignore[attr-defined]
    return found


async def axe_finds_nothing(page: Page) -> None:
    """Nothing that is hard to see or to use, in each size and colour; nor does it scroll sideways."""
    await page.evaluate(AXE.read_text(encoding="utf-8"))
    for size, scheme in itertools.product((NARROW, WIDE), COLOR_SCHEMES):
        await page.set_viewport_size(size)
        await page.emulate_media(color_scheme=scheme)
        found = (await page.evaluate("axe.run()"))["violations"]
        assert not found, [(each["id"], each["help"], [node["html"] for node in each["nodes"]]) for each in found]
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
