"""Metrics, rules and dashboards, checked with promtool and with a Prometheus that scrapes two workers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from collectors import CollectorProcess
from harness import PATIENCE, ROOT, WorkerProcess, post, secured
from programs import free_port
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families

from nullworker.testing import FakeAutoscaler

pytestmark = pytest.mark.slow

MONITORING = ROOT / "monitoring"
RULES = [
    MONITORING / "recording.yaml",
    MONITORING / "alerts.yaml",
    MONITORING / "alerts_dispatch.yaml",
    MONITORING / "alerts_collect.yaml",
]
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
OPENMETRICS = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
TOKEN = "a-token-of-the-metrics-site"
#: Series that no worker has: test_dispatch_docs.py and test_fleet_docs.py look for them.
NO_WORKERS = ("nullworker_dispatch_", "nullworker_collect_", 'up{job="nullworker-collect"}')
#: A series in an expression: a metric or a recorded rule, and its matchers.
SERIES = re.compile(r"(?:\w+:)?\b(?:nullworker_\w+(?::\w+)?|process_\w+|up\b)(?:\{[^}]*\})?")


def rules(kind: str) -> list[dict[str, Any]]:
    """The rules of a kind: `alert` or `record`."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


def panels(dashboard: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(dashboard.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


async def run(*command: str | Path, feed: str | None = None) -> tuple[int, str]:
    """Exit code and output of a program."""
    pipe, merged = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(*map(str, command), stdin=pipe, stdout=pipe, stderr=merged)
    output, _ = await process.communicate(None if feed is None else feed.encode())
    return process.returncode or 0, output.decode()


async def scrape(url: str, **headers: str) -> str:
    async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as answer:
        assert answer.status == 200
        return await answer.text()


def samples(parse: Any, text: str) -> list[Any]:
    return [sample for family in parse(text) for sample in family.samples]


# -- what a worker says ------------------------------------------------------------------------------------------------


async def test_promtool_finds_nothing_in_the_metrics_of_a_live_worker(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        await post(worker.url + "/reserve", {"duration": 0})
        text = await scrape(worker.control + "/metrics")
    assert await run("promtool", "check", "metrics", feed=text) == (0, "")


async def test_openmetrics_is_valid_and_says_the_same_with_exemplars(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        answer = await post(worker.url + "/reserve", {"duration": 0})
        text = await scrape(worker.control + "/metrics", Accept="text/plain")
        strict = await scrape(worker.control + "/metrics", **OPENMETRICS)
        one = await scrape(worker.control + "/metrics?name[]=nullworker_reservations_total", **OPENMETRICS)
    strict_samples = samples(openmetrics_families, strict)  # it raises for a family that comes twice
    assert {sample.name for sample in strict_samples} == {sample.name for sample in samples(text_families, text)}
    exemplars = [sample.exemplar.labels for sample in strict_samples if sample.exemplar]
    assert exemplars == [{"reservation_id": answer.headers["Nullworker-Reservation"]}]
    assert {sample.name for sample in samples(openmetrics_families, one)} == {"nullworker_reservations_total"}


async def test_labels_of_closed_sets_are_there_at_0_and_no_others(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        text = await scrape(worker.control + "/metrics")
    found = samples(text_families, text)
    for name in ("reservations", "releases", "extensions", "auth_failures", "autoscaler_reports", "session_callbacks"):
        values = [sample.value for sample in found if sample.name == f"nullworker_{name}_total"]
        assert len(values) > 2, name
        assert set(values) == {0.0}, name
    assert not [sample for sample in found if sample.name.startswith("nullworker_http_")]


async def test_every_metric_is_documented(tmp_path: Path) -> None:
    async with WorkerProcess(tmp_path) as worker:
        text = await scrape(worker.control + "/metrics")
    exported = re.findall(r"^# TYPE (nullworker_\S+) (\S+)$", text, re.MULTILINE)
    table = re.findall(r"^\| `(nullworker_\w+)` \| (\w+) \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert sorted(table) == sorted(exported)


# -- rules and dashboards, as files --------------------------------------------------------------------------------


async def test_rules_and_their_unit_tests_pass() -> None:
    code, output = await run("promtool", "check", "rules", "--lint-fatal", *RULES)
    assert code == 0, output
    code, output = await run("promtool", "test", "rules", *sorted((MONITORING / "tests").glob("*.yaml")))
    assert code == 0, output


@pytest.mark.parametrize("config", sorted((MONITORING / "scrape").glob("*.yaml")), ids=lambda path: path.stem)
async def test_scrape_configuration_is_valid(config: Path) -> None:
    code, output = await run("promtool", "check", "config", config)
    assert code == 0, output


def test_each_rule_has_a_test_and_each_alert_a_runbook() -> None:
    tests = "".join(path.read_text() for path in (MONITORING / "tests").glob("*.yaml"))
    assert rules("record")
    for rule in rules("record"):
        assert f"labels: '{rule['record']}{{" in tests, rule["record"]
    alerts = {rule["alert"]: rule for rule in rules("alert")}
    for name, rule in alerts.items():
        assert re.search(rf"alertname: {name}\n +exp_alerts:\n", tests), f"no test hears {name}"
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["runbook_url"] == f"monitoring/runbooks/{name}.md"
    pages = {page.stem: page.read_text() for page in (MONITORING / "runbooks").glob("*.md")}
    assert sorted(pages) == sorted(alerts)
    for name, page in pages.items():
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
        assert headings == [name, "Meaning", "Impact", "Diagnosis", "Mitigation"]


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_is_portable_and_explains_itself(dashboard: Path) -> None:
    board = json.loads(dashboard.read_text())
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not taken & cells, f"{panel['title']} lies over another"
        taken |= cells
    for panel in panels(dashboard):
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*variables, "__rate_interval"}


# -- a real Prometheus ---------------------------------------------------------------------------------------------


class Prometheus:
    """A running server, asked over its API."""

    def __init__(self, address: str, http: aiohttp.ClientSession) -> None:
        self._address = address
        self._http = http

    async def get(self, path: str, **parameters: str) -> Any:
        async with self._http.get(f"{self._address}/api/v1/{path}", params=parameters) as answer:
            body = await answer.json()
        assert body["status"] == "success", (parameters, body)
        return body["data"]

    async def values(self, expression: str) -> list[float]:
        """The values of an expression now; NaN is one where it says that nobody asks the consumer."""
        found = await self.get("query", query=expression)
        values = [float(each["value"][1]) for each in found["result"]]
        return values if "consumer_healthy" in expression else [value for value in values if math.isfinite(value)]

    async def until(self, expression: str) -> list[float]:
        """Its values, once there are some: scrapes and rules come every second, and tell nobody."""
        for _ in range(int(2 * PATIENCE / 0.2)):
            if found := await self.values(expression):
                return found
            await asyncio.sleep(0.2)
        raise AssertionError(f"no data for {expression}")


@contextlib.asynccontextmanager
async def prometheus(folder: Path, targets: list[str], *, collector: str | None = None) -> AsyncIterator[Prometheus]:
    """Debian's Prometheus with the configuration for a fleet, only faster; beside a collector also with its alerts.

    These fire without a pause.
    """
    config = (MONITORING / "scrape" / "fleet.yaml").read_text()
    config = config.replace(": 15s", ": 1s").replace("../", f"{MONITORING}/")
    if collector is not None:
        made = yaml.safe_load(config)
        made["scrape_configs"].append({"job_name": "nullworker-collect", "static_configs": [{"targets": [collector]}]})
        made["rule_files"] = [f"{folder}/quick_*.yaml"]
        for path in RULES:
            (folder / f"quick_{path.name}").write_text(re.sub(r"\bfor: \w+", "for: 1s", path.read_text()))
        config = yaml.safe_dump(made)
    (folder / "targets").mkdir()
    (folder / "prometheus.yaml").write_text(config)
    (folder / "metrics-token").write_text(TOKEN)
    fleet = [{"targets": targets, "labels": {"endpoint": "my-endpoint"}}]
    (folder / "targets" / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yaml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None

    async def ready(lines: asyncio.StreamReader) -> None:
        async for line in lines:
            if b"ready to receive web requests" in line:
                return
        raise AssertionError("Prometheus has ended before it was ready")

    try:
        await asyncio.wait_for(ready(process.stderr), PATIENCE)
        async with aiohttp.ClientSession() as http:
            yield Prometheus(f"http://127.0.0.1:{port}", http)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def a_busy_day(worker: WorkerProcess) -> asyncio.Task[Any]:
    """Something of everything; at the end a reservation is held, by the task that is returned."""
    url = worker.url + "/reserve"
    await post(url, {"duration": 0})
    first = asyncio.ensure_future(post(url, {}))
    held = (await worker.line("reservation_held", nth=2))["reservation_id"]
    second = asyncio.ensure_future(post(url, {}))
    await worker.line("reservation_queued", nth=3)
    await post(worker.control + "/extend", {"reservation_id": held, "seconds": 1800})
    await worker.release(reservation_id=held)
    await first
    await worker.line("reservation_held", nth=3)
    second.cancel()
    await worker.line("reservation_cancelled")
    last = asyncio.ensure_future(post(url, {"duration": 3000}))
    await worker.line("reservation_held", nth=4)
    return last


async def hang_up(caller: asyncio.Task[Any]) -> None:
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)


def expressions(instance: str) -> Iterator[tuple[str, str]]:
    """Where, and what, of all that must have data."""
    for rule in rules("record"):
        yield rule["record"], rule["record"]
        yield rule["record"], rule["expr"]
    for rule in rules("alert"):  # they should be silent: each series of theirs is looked for
        for series in SERIES.findall(rule["expr"]):
            if not series.startswith(NO_WORKERS):
                yield rule["alert"], series
    values = {"$job": "nullworker", "$endpoint": ".*", "$instance": instance, "$__rate_interval": "1m"}
    for dashboard in DASHBOARDS:
        for panel in panels(dashboard):
            for target in panel["targets"]:
                expression = target["expr"]
                for name, value in values.items():
                    expression = expression.replace(name, value)
                yield f"{dashboard.stem}: {panel['title']}", expression


async def test_prometheus_has_data_for_every_rule_and_panel_and_hears_of_a_kill(
    tmp_path: Path, vast: FakeAutoscaler
) -> None:
    ports = [free_port(), free_port()]
    async with contextlib.AsyncExitStack() as stack:
        workers = []
        for port in ports:
            folder = tmp_path / f"worker-{port}"
            folder.mkdir()
            site = {"NULL_METRICS_HOST": "127.0.0.1", "NULL_METRICS_PORT": str(port), "NULL_METRICS_TOKEN": TOKEN}
            workers.append(await stack.enter_async_context(secured(folder, vast, UNSECURED="true", **site)))
        targets = [f"127.0.0.1:{port}" for port in ports]
        server = await stack.enter_async_context(prometheus(tmp_path, targets))
        await server.until('count(up{job="nullworker"} == 1) == 2')

        for worker in workers:
            stack.push_async_callback(hang_up, await a_busy_day(worker))
        for where, expression in expressions(targets[0]):
            assert await server.until(expression), where
        for rule in rules("alert"):
            await server.values(rule["expr"])  # it raises for an expression that Prometheus does not take
        assert await server.until("sum(endpoint:nullworker_workers_held:sum) == 2")
        assert await server.values('sum(nullworker_reservations_total{state="released"})') == [2.0]
        names = await server.get("label/instance/values", **{"match[]": 'nullworker_build_info{job=~"nullworker"}'})
        assert names == sorted(targets)
        exemplars = await server.get("query_exemplars", query="nullworker_hold_seconds_bucket", start="0", end="9e9")
        ids = {row[0] for worker in workers for row in worker.sql("SELECT id FROM reservations")}
        seen = {each["labels"]["reservation_id"] for series in exemplars for each in series["exemplars"]}
        assert set() < seen <= ids

        await workers[0].kill()
        assert await server.until('ALERTS{alertname="NullworkerDown", alertstate="pending"}')
        await workers[0].start()
        assert await server.until('ALERTS{alertname="NullworkerReservationsLostToRestart", alertstate="firing"}')


async def test_scale_down_pages_nobody_and_a_death_while_holding_does(tmp_path: Path, vast: FakeAutoscaler) -> None:
    ports = [free_port(), free_port()]
    async with contextlib.AsyncExitStack() as stack:
        collector = await stack.enter_async_context(CollectorProcess(tmp_path, "--silence", "2s"))
        workers = []
        for number, port in enumerate(ports):
            folder = tmp_path / f"worker-{number}"
            folder.mkdir()
            site = {"NULL_METRICS_HOST": "127.0.0.1", "NULL_METRICS_PORT": str(port), "NULL_METRICS_TOKEN": TOKEN}
            env = {"UNSECURED": "true", "NULL_SINK": collector.sink, **site}
            workers.append(await stack.enter_async_context(secured(folder, vast, **env)))
        idle, holding = workers
        targets = [f"127.0.0.1:{port}" for port in ports]
        server = await stack.enter_async_context(prometheus(tmp_path, targets, collector=f"127.0.0.1:{collector.port}"))
        for worker in workers:
            await post(worker.url + "/reserve", {"duration": 0})
        await server.until('count(nullworker_reservations{state="held"} == 0) == 2')

        assert await idle.terminate() == 0
        assert await server.until(f'up{{job="nullworker", instance="{targets[0]}"}} == 0')
        assert await server.until('nullworker_collect_workers{state="stopped"} == 1')
        # looked at for longer than the silence, and the pause of an alert
        assert await server.until(f'count_over_time((up{{instance="{targets[0]}"}} == 0)[1m:1s]) >= 4')
        assert await server.values('ALERTS{alertname=~"NullworkerDown|NullworkerSilentWhileHolding"}') == []

        stack.push_async_callback(hang_up, asyncio.ensure_future(post(holding.url + "/reserve", {"duration": 3000})))
        await holding.line("reservation_held", nth=2)
        await server.until("nullworker_collect_holding == 1")
        await server.until('sum(nullworker_reservations{state="held"}) == 1')
        await holding.kill()
        assert await server.until('ALERTS{alertname="NullworkerSilentWhileHolding", alertstate="firing"}')
        firing = 'ALERTS{alertname="NullworkerDown", alertstate="firing"}'
        assert await server.until(firing)
        found = await server.get("query", query=firing)
        assert [each["metric"]["instance"] for each in found["result"]] == [targets[1]]
