"""The status page, in a real browser, against a real worker."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from browsers import axe_finds_nothing, browser, chromium, complaints, opened
from harness import WorkerProcess
from playwright.async_api import Browser, Page, expect
from programs import free_port

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

__all__ = ["browser", "chromium"]  # fixtures


@pytest_asyncio.fixture(loop_scope="module")
async def worker(tmp_path: Path) -> AsyncIterator[WorkerProcess]:
    """A worker whose control port is the same after a restart."""
    async with WorkerProcess(tmp_path, NULL_CONTROL_PORT=str(free_port()), NULL_MAX_QUEUE_SECONDS="300") as started:
        yield started


@contextlib.asynccontextmanager
async def reserved(worker: WorkerProcess, **payload: Any) -> AsyncIterator[str]:
    """A reservation, held or queued, for as long as the block lasts; its id."""
    before = len([line for line in worker.lines if line["event"] == "reservation_queued"])

    async def call() -> None:
        async with (
            aiohttp.ClientSession() as http,
            http.post(f"{worker.url}/reserve", json={"payload": payload}) as got,
        ):
            await got.read()

    caller = asyncio.ensure_future(call())
    try:
        line = await worker.line("reservation_queued", nth=before + 1)
        yield str(line["reservation_id"])
    finally:
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)


def row(page: Page, reservation_id: str) -> Any:
    return page.locator(f'#rows li[data-key="{reservation_id}"]')


async def test_page_follows_a_reservation_from_its_claim_to_its_release(
    browser: Browser, worker: WorkerProcess
) -> None:
    page = await opened(browser, worker.control)
    await expect(page.locator("#state")).to_have_text("idle")
    await expect(page.locator("#rows li")).to_have_count(0)

    async with reserved(worker, duration=3000, metadata={"job": "a-7"}) as first:
        await expect(page.locator("#state")).to_have_text("held")
        await expect(page.locator("#countdown")).to_have_text(re.compile(r"^(50:00|49:\d\d) left$"))
        await expect(page.locator("#headline")).to_have_text("job=a-7")
        await expect(row(page, first).locator("summary .job")).to_have_text("job=a-7")
        await expect(row(page, first)).to_have_attribute("data-state", "held")
        await expect(page.locator("#events li").first).to_contain_text("heldjob=a-7")
        await expect(page).to_have_title(re.compile(r"^\d+:\d\d left · nullworker$"))

        await page.select_option("#extend-by", label="15 min")
        await page.click(f'button:has-text("Extend {first}")')
        await expect(page.locator("#outcome")).to_contain_text(f"{first} now ends")
        await expect(page.locator("#countdown")).to_have_text(re.compile(r"^(15:00|14:\d\d) left$"))

        async with reserved(worker) as second:
            await expect(row(page, second)).to_have_attribute("data-state", "queued")
            await expect(page.locator("#checks")).to_contain_text("1 waiting")
            await page.click(f'button:has-text("Release {first}")')
            await page.click("#confirm-yes")
            await expect(page.locator("#outcome")).to_have_text(f"Released {first}.")
            await expect(row(page, first)).to_have_attribute("data-state", "released")
            await expect(row(page, second)).to_have_attribute("data-state", "held")
            await expect(page.locator("#announce")).to_contain_text(f"Reservation {second} is held until")
            await expect(page.locator("#rows li")).to_have_count(2)

    await expect(page.locator("#state")).to_have_text("idle")
    kinds = [kind for kind, _ in worker.story()]
    assert kinds == ["queued", "held", "extended", "queued", "released", "held", "cancelled"]
    assert complaints(page) == []


async def test_button_never_releases_another_reservation_than_it_names(browser: Browser, worker: WorkerProcess) -> None:
    page = await opened(browser, worker.control)
    async with reserved(worker) as first, reserved(worker) as second:
        await page.click(f'button:has-text("Release {first}")')
        await expect(page.locator("#confirm-id")).to_have_text(first)
        await worker.release(reservation_id=first)  # the consumer is quicker than the hand on the mouse
        await expect(page.locator("#release")).to_have_text(f"Release {second}")
        await page.click("#confirm-yes")
        await expect(page.locator("#outcome")).to_contain_text(f"{first}: the reservation has ended: released")
        assert (await worker.get("/reservation"))["id"] == second


async def test_page_recovers_when_the_worker_was_killed_and_comes_back(browser: Browser, worker: WorkerProcess) -> None:
    page = await opened(browser, worker.control)
    async with reserved(worker) as before:
        await expect(page.locator("#state")).to_have_text("held")
        await worker.kill()
        await expect(page.locator("#state")).to_have_text("not answering")
        await expect(page.locator("#banner")).to_contain_text("The worker has not answered since")
        await expect(page.locator("#release")).to_be_disabled()
        await expect(page).to_have_title("no answer · nullworker")
        await axe_finds_nothing(page)

    await worker.start()
    await expect(page.locator("#state")).to_have_text("idle")
    await expect(page.locator("#banner")).to_be_hidden()
    await expect(row(page, before)).to_contain_text("the worker was restarted")
    async with reserved(worker) as after:
        await expect(page.locator("#release")).to_have_text(f"Release {after}")
        await expect(page.locator("#events li").first).to_contain_text(after)
        await expect(page.locator("#rows li")).to_have_count(2)


async def test_axe_finds_no_accessibility_problem(browser: Browser, worker: WorkerProcess) -> None:
    page = await opened(browser, worker.control)
    await axe_finds_nothing(page)  # idle, and empty
    ends: list[dict[str, Any]] = [{"duration": 0}, {"duration": 3000}, {}]
    for payload in ends:
        async with reserved(worker, **payload) as reservation_id:
            if payload == {"duration": 3000}:
                await worker.release(reservation_id=reservation_id)
    async with reserved(worker, metadata={"job": "a-7"}) as held, reserved(worker) as queued:
        await expect(row(page, queued)).to_be_visible()
        await row(page, held).locator("summary").click()
        await expect(row(page, held).locator("dl")).to_contain_text("duration_cap")
        await axe_finds_nothing(page)
        await page.click("#release")
        await axe_finds_nothing(page)


async def test_page_is_worked_by_the_keyboard_alone(browser: Browser, worker: WorkerProcess) -> None:
    page = await opened(browser, worker.control)
    async with reserved(worker) as held:
        await expect(page.locator("#release")).to_be_visible()
        await page.keyboard.press("Tab")
        await expect(page.locator("#release")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page.locator("#confirm-no")).to_be_focused()
        await page.keyboard.press("Escape")
        await expect(page.locator("#confirm")).to_be_hidden()
        await expect(page.locator("#release")).to_be_focused()
        await page.keyboard.press("Enter")
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await expect(page.locator("#outcome")).to_have_text(f"Released {held}.")
        await expect(page.locator("#state")).to_be_focused()


async def test_what_a_caller_sent_is_shown_as_text(browser: Browser, worker: WorkerProcess) -> None:
    page = await opened(browser, worker.control)
    markup = "<img src=x onerror=\"document.title='taken'\">"
    async with reserved(worker, metadata={"job": markup}) as held:
        await row(page, held).locator("summary").click()
        await expect(page.locator("#headline")).to_contain_text("<img src=x onerror=")
        await expect(row(page, held).locator("dl")).to_contain_text("<img src=x onerror=")
        assert await page.locator("img").count() == 0
    assert complaints(page) == []


async def test_page_says_why_the_worker_is_not_ready(browser: Browser, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/health"
    async with WorkerProcess(tmp_path, BACKEND_HEALTH_URL=url, NULL_HEALTH_INTERVAL="0.2") as worker:
        page = await opened(browser, worker.control)
        await expect(page.locator("#state")).to_have_text("starting")
        await expect(page.locator("#headline")).to_contain_text(f"{url} cannot be reached")
        await expect(page.locator('#checks li:has-text("Consumer")')).to_have_attribute("data-level", "wait")


async def test_page_works_over_a_forwarded_port_and_loads_nothing_else(browser: Browser, worker: WorkerProcess) -> None:
    async with forwarded(worker.control_port) as port:  # as `ssh -L` does
        page = await browser.new_page()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"http://localhost:{port}/")
        async with reserved(worker) as held:
            await page.click(f'button:has-text("Release {held}")')
            await page.click("#confirm-yes")
            await expect(page.locator("#outcome")).to_have_text(f"Released {held}.")
        await page.close()
    others = [url for url in asked if not url.startswith((f"http://localhost:{port}/", "data:"))]
    assert asked
    assert others == []


async def test_page_and_assets_forbid_what_they_do_not_need(worker: WorkerProcess) -> None:
    async with aiohttp.ClientSession() as http:
        for path, kind in (
            ("/", "html"),
            ("/assets/page.css", "css"),
            ("/assets/page.js", "javascript"),
            ("/assets/lib.js", "javascript"),
        ):
            async with http.get(worker.control + path) as answer:
                assert answer.status == 200
                assert answer.content_type == f"text/{kind}"
                policy = answer.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
                assert "unsafe" not in policy
                if kind == "html":
                    assert not re.search(r"<style|style=| on\w+=|<script(?![^>]*src=)|https?:", await answer.text())
            async with http.get(worker.control + path, headers={"Host": "evil.example"}) as answer:
                assert answer.status == 403


@contextlib.asynccontextmanager
async def forwarded(port: int) -> AsyncIterator[int]:
    """Another local port that leads to this one."""

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, back), copy(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield int(server.sockets[0].getsockname()[1])
    finally:
        server.close()
