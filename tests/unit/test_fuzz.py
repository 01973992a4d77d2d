"""Random requests and settings: each parser returns a value or raises its documented error."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from typing import Any

from fuzz_values import TEXT, VALUES, nested
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nullworker.autoscaler.keys import KeyRing
from nullworker.autoscaler.signature import PublicKey
from nullworker.errors import BadSettings, Invalid, RequestError
from nullworker.http.auth import Authenticator, Envelope, Grant
from nullworker.http.bodies import decode, explain
from nullworker.http.control import ExtendBody, ReleaseBody
from nullworker.http.external import ReservePayload
from nullworker.http.responses import json_response
from nullworker.http.sessions import CreatePayload, Named
from nullworker.readiness import Readiness
from nullworker.settings import Settings, read_settings, variable
from nullworker.testing.keys import load_or_make, public_pem, sign

URL = "http://10.0.0.1:3000"
KEY = load_or_make()
PEM = public_pem(KEY).encode()
SIGNATURE = sign(KEY, URL)
AUTH: dict[str, Any] = {
    "cost": 100.0, "endpoint": "e", "reqnum": 1, "request_idx": 5, "signature": SIGNATURE, "url": URL
}  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn, good: bytes) -> bytes:
    """Bytes that were right, with pieces put over others, taken out and put in."""
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 4))):
        at, length = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        data[at : at + length] = draw(st.binary(max_size=8))
    return bytes(data)


# -- what is sent ------------------------------------------------------------------------------------------------------


class OneKey:
    """An autoscaler that has this key."""

    trouble = None

    async def fetch_key(self) -> PublicKey:
        return PublicKey(PEM)


def authenticator(*, unsecured: bool = False) -> Authenticator:
    keys = KeyRing(OneKey(), Readiness(), lambda call, result: None)  # type: ignore[arg-type]
    asyncio.run(keys.load())
    return Authenticator(None if unsecured else keys, own_url=URL, url_policy="enforce")


GATE, OPEN_GATE = authenticator(), authenticator(unsecured=True)


def opened(at: Authenticator, body: bytes) -> Grant | None:
    """The grant; None if it was refused as it should be: a status of its own, and an answer that is JSON."""
    try:
        grant = asyncio.run(at.authenticate(body))
    except RequestError as error:
        answer = json_response(error.body, error.status)
    else:
        for shape in (ReservePayload, CreatePayload):
            with contextlib.suppress(Invalid):
                assert isinstance(grant.read(shape), shape)
        return grant
    assert answer.status in (401, 422)
    assert "error" in json.loads(bytes(answer.body))  # type: ignore[arg-type]
    return None


@st.composite
def envelopes(draw: st.DrawFn) -> bytes:
    """An envelope, with some fields that are not what they should be."""
    auth: Any = {**AUTH, **draw(st.dictionaries(st.sampled_from([*AUTH, "more"]), VALUES, max_size=2))}
    envelope = {"auth_data": auth, "payload": {"duration": 5}, "session_id": None}
    envelope.update(draw(st.dictionaries(st.sampled_from([*envelope, "more"]), VALUES, max_size=1)))
    return json.dumps(envelope).encode()


GOOD = json.dumps({"auth_data": AUTH, "payload": {"duration": 5}, "session_id": None}).encode()
BODIES = st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()) | envelopes() | mutated(GOOD)


@settings(deadline=None)
@given(BODIES)
@example(nested(600))
@example(nested(100_000))
@example(GOOD.replace(b"null", nested(600)))
@example(GOOD.replace(b'{"duration": 5}', nested(100_000)))
@example(b'{"auth_data": "\\ud800"}')
@example(b'{"\\ud800": NaN}')
@example(b"\xef\xbb\xbf{}")
@example(b'{"auth_data": ' + b"9" * 5000 + b"}")
def test_only_grants_signed_by_the_autoscaler_are_accepted(body: bytes) -> None:
    grant = opened(GATE, body)
    if grant is not None:
        assert grant.auth is not None
        assert grant.auth.url.rstrip("/") == URL
        assert base64.b64decode(grant.auth.signature) == base64.b64decode(SIGNATURE)


def test_a_signed_grant_is_accepted() -> None:
    assert opened(GATE, GOOD) is not None


@settings(deadline=None)
@given(BODIES)
@example(b'{"session_id": 5}')
@example(b'{"session_id": "\\ud800"}')
@example(b'{"payload": ' + nested(600) + b"}")
def test_an_unsecured_worker_accepts_objects_and_refuses_other_json(body: bytes) -> None:
    opened(OPEN_GATE, body)


@settings(deadline=None)
@given(BODIES, st.sampled_from([ReservePayload, CreatePayload, Named, ReleaseBody, ExtendBody, Envelope]))
@example(b'{"seconds": 1e999}', ExtendBody)
@example(b'{"seconds": ' + b"9" * 400 + b"}", ExtendBody)
def test_a_body_is_of_its_shape_or_each_wrong_field_is_named(body: bytes, shape: type[Any]) -> None:
    try:
        assert isinstance(decode(body, shape), shape)
    except Invalid as error:
        json_response(error.body)
    json_response(explain(body, shape).body)


@settings(deadline=None)
@given(
    st.just(URL) | TEXT,
    TEXT | st.binary(max_size=300).map(lambda data: base64.b64encode(data).decode()) | st.just(SIGNATURE),
)
@example(URL, SIGNATURE)
@example(URL + "/", SIGNATURE)
@example("\ud800", SIGNATURE)
@example(URL, "\ud800")
@example(URL, "é")
@example(URL, "A")
def test_a_signature_is_of_that_url_or_it_is_none(url: str, signature: str) -> None:
    assert PublicKey(PEM).verify(url, signature) is ((url, signature) == (URL, SIGNATURE))


@settings(deadline=None)
@given(mutated(PEM) | st.binary(max_size=100))
def test_a_key_is_an_rsa_key_or_a_value_error(pem: bytes) -> None:
    with contextlib.suppress(ValueError):
        PublicKey(pem).verify(URL, SIGNATURE)


# -- what is set -------------------------------------------------------------------------------------------------------

NAMES = [variable(name).replace("<WORKER_PORT>", "3000") for name in Settings.__dataclass_fields__]
SETTINGS = (
    st.text(max_size=20)
    | st.floats().map(str)
    | st.integers().map(str)
    | st.sampled_from(["true", "full", "30d", "http://[::1", "http://a:0", "http://a:99999", "9" * 5000, "1e999", "²"])
)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from([*NAMES, "VAST_TCP_PORT_0"]), SETTINGS, max_size=6), st.sampled_from("yn"))
@example({"REPORT_ADDR": "http://[::1,http://a"}, "y")
@example({"NULL_MAX_QUEUED": "9" * 5000}, "y")
@example({"NULL_LOG_KEEP": "9" * 400 + "d"}, "y")
@example({"BACKEND_HEALTH_URL": "http://a\ud800"}, "y")
@example({"WORKER_PORT": "0", "VAST_TCP_PORT_0": ":"}, "y")
def test_settings_are_read_or_the_wrong_one_is_named(values: dict[str, str], unsecured: str) -> None:
    try:
        found = read_settings({"UNSECURED": unsecured, **values})
    except BadSettings as error:
        told = str(error)
    else:
        told = f"{found!r} {found.own_url} {found.event_log}".upper()
    assert any(name in told for name in (*NAMES, "VAST_TCP_PORT_0"))
