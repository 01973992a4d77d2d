"""Checks over the network: the certificate, the autoscaler and its key, the clock, the consumer's health.

They send only GET requests without secrets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Final

import aiohttp

from nullworker.autoscaler.messages import KEY_PATH
from nullworker.doctor.finding import Finding, failed, ok, warning
from nullworker.doctor.machine import Host
from nullworker.outgoing import describe_failure, get, http_session, is_elsewhere
from nullworker.settings import Settings, without_secrets

#: Seconds for an answer.
ANSWER_SECONDS: Final = 10.0
#: Bytes of an answer that are read.
MAX_ANSWER_BYTES: Final = 64 * 1024
#: Days before its expiry in which a certificate should be renewed.
RENEW_DAYS: Final = 7
#: Seconds by which the clock may differ; the Date header has a resolution of 1 s, and an answer takes some time.
CLOCK_SECONDS: Final = 5.0


def look_at_certificate(host: Host, settings: Settings) -> Iterator[Finding]:
    """Check the certificate for USE_SSL: both files, that they match, its issuer and its dates."""
    if not settings.use_ssl:
        if not settings.standalone:
            yield warning(
                "certificate",
                "USE_SSL is not true",
                why="grants and reservations are sent unencrypted, and the reported url begins with http",
                fix="set USE_SSL=true in the template's environment",
            )
        return
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    renew = "restart the instance: Vast's start script creates a new pair and has it signed"
    try:
        certificate = x509.load_pem_x509_certificate(host.certificate.read_bytes())
        key = load_pem_private_key(host.private_key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        what = f"{host.certificate} and {host.private_key} cannot be read: {error}"
        yield failed("certificate", what, why="the worker exits with code 1", fix=renew)
        return
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    now = datetime.fromtimestamp(host.now(), tz=timezone.utc)
    if certificate.public_key().public_bytes(*form) != key.public_key().public_bytes(*form):
        what = f"{host.certificate} does not belong to {host.private_key}"
        yield failed("certificate", what, why="the worker exits with code 1", fix=renew)
    elif certificate.issuer == certificate.subject or host.self_signed_mark.exists():
        yield failed(
            "certificate",
            f"{host.certificate} is self-signed",
            why="the official client trusts only Vast's own root, so all of its calls fail",
            fix=f"{renew}; if it does so each time, look at its output in /workspace/debug.log",
        )
    elif not begins <= now < ends:
        what = f"{host.certificate} is valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}, and not today"
        yield failed("certificate", what, why="every client refuses it", fix=renew)
    elif ends - now < timedelta(days=RENEW_DAYS):
        what = f"{host.certificate} ends on {ends:%Y-%m-%d}"
        yield warning("certificate", what, why="from then on every client refuses it", fix=renew)
    else:
        yield ok("certificate", f"{host.certificate} is signed, and valid until {ends:%Y-%m-%d}")


def look_at_network(host: Host, settings: Settings) -> Iterator[Finding]:
    """Check that each REPORT_ADDR has a key, and compare the clock with theirs."""
    if settings.standalone:
        yield ok("autoscaler", "none: CONTAINER_ID is unset, so the worker reports to no autoscaler")
        return
    from nullworker.autoscaler.signature import PublicKey

    dates: list[str] = []
    unanswered: list[str] = []
    for address in settings.report_addr:
        try:
            body, date = _get(address + KEY_PATH)
            PublicKey(body)
        except (_NoAnswer, ValueError) as error:
            unanswered.append(f"{without_secrets(address)}{KEY_PATH}: {error}")
        else:
            yield ok("autoscaler", f"{without_secrets(address)} has a key for signatures")
            dates += [date] if date else []
    for what in unanswered:
        alone = len(unanswered) == len(settings.report_addr)
        yield (failed if alone else warning)(
            "autoscaler",
            what,
            why="without the key no request can be verified, and the autoscaler does not learn that this worker is "
            "ready"
            if alone
            else "the worker uses the others",
            fix=f"curl -v {what.partition(': ')[0]}; REPORT_ADDR must be what Vast's template sets",
        )
    if dates:
        yield _clock(host, dates[0])


def _clock(host: Host, date: str) -> Finding:
    ahead = host.now() - parsedate_to_datetime(date).timestamp()
    if abs(ahead) <= CLOCK_SECONDS:
        return ok("clock", "as the autoscaler's")
    return failed(
        "clock",
        f"it is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the autoscaler's",
        why="the times in the log and in the reports are wrong, and certificates may seem invalid",
        fix="a container cannot set it: rent another machine; on a machine of your own: timedatectl set-ntp true",
    )


def look_at_consumer(settings: Settings) -> Iterator[Finding]:
    """Check BACKEND_HEALTH_URL as the worker does."""
    url = settings.backend_health_url
    if url is None:
        yield warning(
            "consumer",
            "BACKEND_HEALTH_URL is unset",
            why="the worker takes reservations even while the consumer is dead, and each stays held until its deadline",
            fix="nullworker work --health-port 18998 -- CMD, and BACKEND_HEALTH_URL=http://127.0.0.1:18998/health",
        )
        return
    try:
        _get(url, timeout=settings.null_health_timeout)
    except _NoAnswer as error:
        yield failed(
            "consumer",
            f"{without_secrets(url)}: {error}",
            why="the worker becomes ready only after the first 200, and is errored when a later answer is not 200",
            fix=f"start the consumer, and see what it answers with: curl -i {without_secrets(url)}",
        )
    else:
        yield ok("consumer", f"{without_secrets(url)} answers 200")


class _NoAnswer(Exception):
    """There is no answer, or its status is not 200; the message says why."""


def _get(url: str, *, timeout: float = ANSWER_SECONDS) -> tuple[bytes, str | None]:
    """The body and the Date of a 200, requested as the worker does.

    Raises:
        _NoAnswer: there is none.
    """
    return asyncio.run(_fetch(url, timeout))


async def _fetch(url: str, seconds: float) -> tuple[bytes, str | None]:
    try:
        async with http_session(trust_env=is_elsewhere(url)) as http, get(http, url, seconds=seconds) as answer:
            if answer.status != 200:
                raise _NoAnswer(f"it answered {answer.status}")
            return await answer.content.read(MAX_ANSWER_BYTES), answer.headers.get("Date")
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        raise _NoAnswer(describe_failure(error)) from error
