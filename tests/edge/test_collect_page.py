"""The fleet's page, in a real browser, against a real collector."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from browsers import axe_finds_nothing, browser, chromium, complaints, opened
from collectors import CollectorProcess, event, hold
from playwright.async_api import Browser, expect

from nullworker.clock import wall
from nullworker.eventlog import cloudevents

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

__all__ = ["browser", "chromium"]  # fixtures

HOLDING, SILENT, LOST = "nullworker/7/a", "nullworker/8/b", "nullworker/9/c"
MARKUP = "<img src=x onerror=\"document.title='taken'\">"


@pytest_asyncio.fixture(loop_scope="module")
async def collector(tmp_path: Path) -> AsyncIterator[CollectorProcess]:
    async with CollectorProcess(tmp_path, "--price", "0.5", "--silence", "2s") as started:
        yield started


async def fill(collector: CollectorProcess) -> None:
    """One worker that holds, one whose consumer died, one that falls silent while it holds."""
    now = wall()
    await collector.send(hold(SILENT, 1, "r2", now - 1200, ends_at=now + 3000, metadata={"job": MARKUP}), key="b")
    lost = event(LOST, 3, "cancelled", "r3", now - 60, "consumer_lost")
    await collector.send([*hold(LOST, 1, "r3", now - 1860, ends_at=now), lost], key="c")
    started = cloudevents.worker_event(
        HOLDING, "started", now - 700, {"clock": now, "version": "1", "gpus": ["RTX 4090"]}
    )
    await collector.send(
        [started, *hold(HOLDING, 1, "r1", now - 600, ends_at=now + 3000, metadata={"job": "a-7"})], key="a"
    )


@contextlib.asynccontextmanager
async def alive(collector: CollectorProcess) -> AsyncIterator[None]:
    """One of them is heard of all the while."""

    async def tell() -> None:
        while True:
            await collector.send([cloudevents.worker_event(HOLDING, "alive", wall(), {"clock": wall()})], key="a")
            await asyncio.sleep(0.5)

    task = asyncio.ensure_future(tell())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_page_says_who_holds_what_since_when_and_who_is_silent(
    browser: Browser, collector: CollectorProcess
) -> None:
    page = await opened(browser, collector.url)
    await expect(page.locator("#nothing")).to_be_visible()
    await expect(page.locator("#none")).to_contain_text("NULL_SINK")
    await fill(collector)
    async with alive(collector):
        await expect(page.locator('#held li[data-state="silent while holding"]')).to_contain_text("8/b")
        await expect(page.locator('[data-figure="silent"]')).to_have_class("bad")
        await expect(page.locator("#announce")).to_have_text(re.compile(r"silent while holding"))
        held = page.locator('#held li[data-state="holding"]')
        await expect(held).to_contain_text("7/a")
        await expect(held).to_contain_text("RTX 4090")
        await expect(held).to_contain_text("session · job=a-7")
        await expect(held).to_contain_text(re.compile(r"since .*, 10 min"))
        await expect(page.locator("#held li").first).to_have_attribute("data-state", "silent while holding")
        await expect(page.locator('[data-figure="lost"] dd')).to_have_text("1")
        await expect(page.locator('[data-figure="dollars"] dd')).to_have_text(re.compile(r"^0\.\d\d$"))
        await expect(page.locator('#rows li[data-key="9/c"] .bar[data-state="cancelled"]')).to_be_visible()
        await expect(page).to_have_title("2 holding · nullworker fleet")
    assert complaints(page) == [], "what a caller sent is shown as text"


async def test_page_says_when_the_collector_is_gone_and_when_it_is_back(
    browser: Browser, collector: CollectorProcess
) -> None:
    await fill(collector)
    page = await opened(browser, collector.url)
    await collector.kill()
    await expect(page.locator("#link-text")).to_have_text("no answer")
    await expect(page.locator("#banner")).to_contain_text("The collector has not answered since")
    await axe_finds_nothing(page)
    await collector.start()
    await expect(page.locator("#banner")).to_be_hidden()
    await expect(page.locator("#held li")).to_have_count(2)


async def test_axe_finds_nothing_on_the_fleet_page(browser: Browser, collector: CollectorProcess) -> None:
    page = await opened(browser, collector.url)
    await axe_finds_nothing(page)
    await fill(collector)
    await expect(page.locator("#rows li")).to_have_count(3)
    await expect(page.locator('#held li[data-state="silent while holding"]').first).to_be_visible()
    await page.locator("#hours").focus()
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.locator("#rows li").first.locator("dl")).to_contain_text("first_heard_at")
    await axe_finds_nothing(page)
