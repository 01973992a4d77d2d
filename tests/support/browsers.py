"""A real browser for tests of the pages: Debian's Chromium, driven by playwright, and axe-core for accessibility."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

import pytest_asyncio
from harness import PATIENCE
from playwright.async_api import Browser, Page, async_playwright, expect

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
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 320, "height": 700}

expect.set_options(timeout=PATIENCE * 1000)


@pytest_asyncio.fixture
async def browser() -> AsyncIterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "these tests need a browser: apt-get install chromium"
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield launched
        await launched.close()


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
    await page.evaluate(AXE.read_text(encoding="utf-8"))
    found = (await page.evaluate("axe.run()"))["violations"]
    assert not found, [(each["id"], each["help"], [node["html"] for node in each["nodes"]]) for each in found]
