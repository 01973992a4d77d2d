"""`nullworker status, release, extend, wait`: the control port, for people and for scripts.

Prints a table, or with --json the worker's answer on one line. The exit code is 1 when the request was not carried out,
for example because nothing is held. Import nothing here that `nullworker release` does not need.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Final

import click

from nullworker.cli.options import SECONDS, with_control
from nullworker.cli.words import clock_time, duration, folded, job_name
from nullworker.clock import from_iso, stopwatch
from nullworker.control_client import ANSWER_SECONDS, ControlClient, Refused
from nullworker.errors import NullworkerError, WorkerUnreachable
from nullworker.settings import settings_line

#: Seconds of one long poll; the worker allows 60.
POLL_SECONDS: Final = 30.0
#: Seconds between two tries while the worker does not answer.
RETRY_SECONDS: Final = 1.0

as_json = click.option("--json", "as_json", is_flag=True, help="Print the answer as one line of JSON.")
reservation_id = click.option(
    "--reservation-id",
    "--id",
    metavar="ID",
    envvar="NULLWORKER_RESERVATION_ID",
    show_envvar=True,
    help="Act on this reservation only, and not on another one that may be held by now.",
)


class NotDone(NullworkerError):
    """The worker has answered that the request was not carried out."""


@click.command()
@with_control
@as_json
def status(control: ControlClient, *, as_json: bool) -> None:
    """Show the state of the worker: reservation, queue, consumer, autoscaler and log."""
    answer = control.ask("GET", "/status")
    if as_json:
        click.echo(json.dumps(answer))
        return
    consumer, autoscaler, log, queue = answer["consumer"], answer["autoscaler"], answer["log"], answer["queue"]
    sink = answer["sink"]
    waits = "" if queue["oldest_seconds"] is None else f", the first for {duration(queue['oldest_seconds'])}"
    reports = ", ".join(autoscaler["reports_to"] or ()) or "nobody (standalone)"
    facts = {
        "worker": f"{answer['state']}, version {answer['version']}",
        "instance": None if answer["instance"] is None else str(answer["instance"]),
        "address": answer["url"],
        **_held(answer["held"]),
        "queue": f"{queue['length']} of {queue['limit']}{waits}",
        "consumer": _consumer(consumer),
        "reports to": f"{reports}; {autoscaler['trouble'] or 'all well'}, {autoscaler['backlog']} outcomes owed",
        "sink": sink and f"{sink['url']}; {sink['trouble'] or 'all well'}, {sink['backlog']} events owed",
        "log": f"{log['why'] or 'writable'}, {log['bytes']} bytes, the last event is {log['last_seq']}",
        "file": log["path"],
        "settings": settings_line(answer["settings"]),
    }
    show({name: fact for name, fact in facts.items() if fact is not None})


@click.command()
@click.argument("reservation", metavar="[ID]", required=False)
@reservation_id
@click.option("--result", metavar="JSON", help="JSON for the caller of /reserve, up to 64 KiB.")
@with_control
@as_json
def release(
    control: ControlClient, *, reservation: str | None, reservation_id: str | None, result: str | None, as_json: bool
) -> None:
    """End the held reservation: its work is done.

    Give the ID, so that a late consumer cannot end the next reservation instead.

    \b
    Example:
      nullworker release "$NULLWORKER_RESERVATION_ID" --result '{"pages": 3}'
    """
    body: dict[str, Any] = {}
    if reservation or reservation_id:
        body["reservation_id"] = reservation or reservation_id
    if result is not None:
        try:
            body["result"] = json.loads(result)
        except ValueError as error:
            raise click.BadParameter(f"it is not JSON: {error}", param_hint="--result") from None
    answer = _ask(control, "/release", body, as_json)
    if not answer["released"]:
        raise NotDone(f"nothing was released: {answer.get('reason', 'the worker does not say why')}")
    if not as_json:
        click.echo(f"released {answer['reservation_id']}" if "reservation_id" in answer else "released")


@click.command()
@click.argument("seconds", metavar="SECONDS", required=False, type=SECONDS)
@click.option("--seconds", "named", metavar="SECONDS", type=SECONDS, help="The same as the argument SECONDS.")
@reservation_id
@with_control
@as_json
def extend(
    control: ControlClient, *, seconds: float | None, named: float | None, reservation_id: str | None, as_json: bool
) -> None:
    """Move the deadline of the held reservation to SECONDS from now, at most MAX_RESERVATION_SECONDS.

    \b
    Example:
      nullworker extend 30m
    """
    if seconds is not None and named is not None:
        raise click.UsageError("give the time once: nullworker extend SECONDS, or --seconds SECONDS")
    seconds = named if seconds is None else seconds
    if seconds is None:
        raise click.UsageError("SECONDS is missing: nullworker extend SECONDS")
    body = {"seconds": seconds, **({"reservation_id": reservation_id} if reservation_id else {})}
    answer = _ask(control, "/extend", body, as_json)
    if not as_json:
        click.echo(f"{answer['reservation_id']} ends at {answer['ends_at']}")


@click.command()
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=SECONDS,
    help="Longest wait, after which the exit code is 1.  [default: no limit]",
)
@with_control
@as_json
def wait(control: ControlClient, *, timeout: float | None, as_json: bool) -> None:
    """Wait until a reservation is held, and show it. A restart of the worker does not end the wait.

    \b
    Example:
      nullworker wait --timeout 10m --json
    """
    until = None if timeout is None else stopwatch() + timeout
    held = control.ask("GET", "/reservation")  # a wrong address fails at once
    while held is None:
        left = POLL_SECONDS if until is None else min(until - stopwatch(), POLL_SECONDS)
        if left <= 0:
            raise NotDone(f"no reservation came within {timeout:g} s")
        try:
            held = control.ask("GET", f"/reservation?wait={left:g}", seconds=left + ANSWER_SECONDS)
        except WorkerUnreachable:
            time.sleep(RETRY_SECONDS)
    if as_json:
        click.echo(json.dumps(held))
    else:
        show({name: value for name, value in held.items() if value is not None})


def show(facts: dict[str, Any]) -> None:
    """Print each item on a line, or on as many as the terminal needs."""
    names = max(map(len, facts))
    for name, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        first, *rest = folded(text, names + 2)
        click.echo(f"{click.style(name.ljust(names), bold=True)}  {first}")
        for line in rest:
            click.echo(f"{'':<{names}}  {line}")


def _ask(control: ControlClient, path: str, body: dict[str, Any], as_json: bool) -> Any:
    """POST and return the answer; with --json, print it, also when it is a refusal."""
    try:
        answer = control.ask("POST", path, body)
    except Refused as error:
        if as_json:
            click.echo(json.dumps(error.answer))
            sys.stdout.flush()
        raise
    if as_json:
        click.echo(json.dumps(answer))
    return answer


def _held(held: dict[str, Any] | None) -> dict[str, str]:
    if held is None:
        return {"held": "nothing"}
    name = job_name(held["metadata"])
    left = duration(from_iso(held["ends_at"]) - from_iso(held["held_at"]) - held["held_seconds"])
    return {
        "held": f"{name or held['id']}, a {held['kind']}, for {duration(held['held_seconds'])}",
        "ends": f"in {left}, at {clock_time(held['ends_at'])}",
        **({"id": held["id"]} if name else {}),
    }


def _consumer(consumer: dict[str, Any]) -> str:
    if consumer["healthy"] is None:
        health = "not asked: BACKEND_HEALTH_URL is unset"
    elif not consumer["healthy"]:
        health = f"unhealthy: {consumer['why']}"
    else:
        lately = "" if consumer["last"] in (None, "healthy") else f", but at the last look: {consumer['last']}"
        health = f"healthy, {consumer['url']}{lately}"
    if consumer["attached_at"] is None:
        return health
    return health + (
        f"; attached since {clock_time(consumer['attached_at'])}" if consumer["attached"] else "; not attached any more"
    )
