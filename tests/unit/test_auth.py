"""The authenticator: signatures, refetching of the key, grants for other workers, session auth."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

import nullworker.autoscaler.keys as key_ring
from nullworker.autoscaler.keys import KeyRing
from nullworker.autoscaler.signature import PublicKey
from nullworker.errors import Invalid, Unauthorized, Unavailable
from nullworker.http.auth import EXPLAINED_BYTES, Auth, Authenticator, Grant, fingerprint, owns
from nullworker.readiness import Readiness
from nullworker.testing.keys import load_or_make, public_pem, sign

OLD, NEW = load_or_make(), load_or_make()
URL = "https://203.0.113.7:40123"


def auth(url: str = URL, key: Any = OLD, **fields: Any) -> Auth:
    return Auth(
        **{"cost": 1, "endpoint": "e", "reqnum": 1, "request_idx": 7, "signature": sign(key, url), **fields}, url=url
    )


class Autoscaler:
    """Has these keys, one at each fetch and the last one from then on; None is a failure."""

    trouble = "it is down"

    def __init__(self, *keys: Any) -> None:
        self.keys, self.fetches = list(keys), 0
        self.answers = asyncio.Event()
        self.answers.set()

    async def fetch_key(self) -> PublicKey | None:
        self.fetches += 1
        key = self.keys.pop(0) if len(self.keys) > 1 else self.keys[0]
        await self.answers.wait()
        return key and PublicKey(public_pem(key).encode())


class Desk:
    """An authenticator, and a clock for how long ago the key was fetched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *keys: Any, policy: str = "enforce", own: str = URL) -> None:
        self.readiness = Readiness(key="it is being fetched")
        self.autoscaler, self.counted = Autoscaler(*keys), list[tuple[str, str]]()
        self.seconds = 1000.0
        monkeypatch.setattr(key_ring, "stopwatch", lambda: self.seconds)
        self.keys = KeyRing(
            self.autoscaler,  # type: ignore[arg-type]
            self.readiness,
            lambda call, result: self.counted.append((call, result)),
        )
        self.authenticator = Authenticator(self.keys, own_url=own, url_policy=policy)

    async def cannot_tell(self, auth: Auth) -> str:
        with pytest.raises(Unavailable) as refused:
            await self.authenticator.check(auth)
        answer = refused.value
        assert (answer.status, answer.body["reason"], answer.headers) == (503, "not_ready", {"Retry-After": "1"})
        return str(answer)

    async def refuses(self, auth: Auth) -> str:
        with pytest.raises(Unauthorized) as refused:
            await self.authenticator.check(auth)
        return str(refused.value)


async def test_without_a_key_requests_get_503_until_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]]
) -> None:
    desk = Desk(monkeypatch, None, None, OLD)
    pauses: list[float] = []
    causes: list[str | None] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        causes.append(desk.readiness.key)
        with pytest.raises(Unavailable, match="the autoscaler's key is not loaded: it is down"):
            await desk.authenticator.check(auth())

    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert "it is being fetched" in await desk.cannot_tell(auth())
    await desk.keys.load()
    await desk.authenticator.check(auth())
    assert pauses == [1.0, 2.0]
    assert causes == ["the autoscaler's key is not loaded: it is down"] * 2
    assert desk.readiness.key is None
    assert desk.counted == [("pubkey", "failed"), ("pubkey", "failed"), ("pubkey", "ok")]
    assert logged() == ["key_not_loaded"] * 2


async def test_a_bad_signature_fetches_the_key_again_once_in_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, OLD, OLD, NEW)
    await desk.keys.load()
    for seconds, fetches in ((0.0, 1), (9.9, 1), (0.1, 2), (9.9, 2)):
        desk.seconds += seconds
        assert await desk.refuses(auth(key=NEW)) == "the signature is not the autoscaler's"
        assert desk.autoscaler.fetches == fetches
    desk.seconds += 0.1
    await desk.authenticator.check(auth(key=NEW))
    await desk.refuses(auth(key=OLD))
    assert desk.autoscaler.fetches == 3


async def test_while_the_key_is_fetched_again_nobody_is_told_that_his_signature_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, OLD, NEW)
    await desk.keys.load()
    desk.seconds += 10
    desk.autoscaler.answers.clear()
    first = asyncio.create_task(desk.authenticator.check(auth(key=NEW)))
    await asyncio.sleep(0)
    for _ in range(3):
        assert await desk.cannot_tell(auth(key=NEW)) == "the autoscaler's key is being fetched again"
    await desk.authenticator.check(auth())
    desk.autoscaler.answers.set()
    await first
    await desk.authenticator.check(auth(key=NEW))
    assert desk.autoscaler.fetches == 2


async def test_a_fetch_goes_on_when_he_who_began_it_is_gone_or_has_waited_long_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(key_ring, "REFETCH_WAIT_SECONDS", 0.01)
    for leaves in (True, False):
        desk = Desk(monkeypatch, OLD, NEW)
        await desk.keys.load()
        desk.seconds += 10
        desk.autoscaler.answers.clear()
        first = asyncio.create_task(desk.authenticator.check(auth(key=NEW)))
        await asyncio.sleep(0)
        if leaves:
            first.cancel()
        await asyncio.wait([first])
        assert first.cancelled() if leaves else isinstance(first.exception(), Unavailable)
        await desk.cannot_tell(auth(key=NEW))
        desk.autoscaler.answers.set()
        await asyncio.sleep(0.01)
        await desk.authenticator.check(auth(key=NEW))
        assert desk.autoscaler.fetches == 2


async def test_a_fetch_that_fails_leaves_the_key_that_was(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, OLD, None, None, NEW)
    await desk.keys.load()
    for seconds, fetches in ((10.0, 2), (9.9, 2), (0.1, 3)):
        desk.seconds += seconds
        await desk.cannot_tell(auth(key=NEW))
        assert desk.autoscaler.fetches == fetches
        await desk.authenticator.check(auth())
    assert desk.counted == [("pubkey", "ok"), ("pubkey", "failed"), ("pubkey", "failed")]
    desk.seconds += 10
    await desk.authenticator.check(auth(key=NEW))


async def test_a_bug_in_a_fetch_is_not_the_end_of_all_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, OLD, NEW)
    await desk.keys.load()
    fetch_key = desk.autoscaler.fetch_key

    async def fails() -> None:
        raise KeyError("a bug")

    desk.autoscaler.fetch_key = fails  # type: ignore[method-assign]  # a bug
    desk.seconds += 10
    with pytest.raises(KeyError):
        await desk.authenticator.check(auth(key=NEW))
    desk.autoscaler.fetch_key = fetch_key  # type: ignore[method-assign]  # as it was
    desk.seconds += 10
    await desk.authenticator.check(auth(key=NEW))


@pytest.mark.parametrize(("own", "theirs"), [(URL, URL + "/"), (URL + "/", URL), (URL, "https://203.0.113.7:1")])
async def test_a_grant_for_another_url_is_refused_or_logged_or_accepted(
    monkeypatch: pytest.MonkeyPatch, logged: Callable[[], list[str]], own: str, theirs: str
) -> None:
    another = theirs.endswith(":1")
    for policy, warned in (("off", 0), ("warn", 1), ("enforce", 1)):
        desk = Desk(monkeypatch, OLD, policy=policy, own=own)
        await desk.keys.load()
        if another and policy == "enforce":
            said = await desk.refuses(auth(theirs))
            assert said == f"the grant is for {theirs}, and this worker is {own}"
        else:
            await desk.authenticator.check(auth(theirs))
        assert logged() == ["grant_for_another_url"] * (warned if another else 0), "so far"


def test_the_same_auth_is_the_same_however_it_is_written() -> None:
    def grant(raw: bytes) -> Grant:
        return Grant(None, msgspec.Raw(raw), msgspec.Raw(b"{}"), None)

    first = grant(b'{"b": [1, 2], "a": "\xc3\xa4"}').auth_sha256
    assert first == grant(b' {"a":"\\u00e4",\n"b":[1,2]}').auth_sha256 == fingerprint({"a": "ä", "b": [1, 2]})
    assert first != grant(b'{"a": "\xc3\xa4", "b": [2, 1]}').auth_sha256
    assert len(first) == 64
    for raw in (b"[" * 100_000 + b"]" * 100_000, b"1" * 10_000):
        with pytest.raises(Invalid, match="cannot be compared"):
            _ = grant(raw).auth_sha256
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Invalid, match="nest at most 100 deep"):
        fingerprint(deep)


@pytest.mark.parametrize("limit", [None, 20_000])
def test_how_deep_an_auth_may_nest_does_not_depend_on_the_interpreter(limit: int | None) -> None:
    """Python 3.13 takes a depth that 3.11 does not: a higher limit of recursion stands for it."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(limit or before)
    try:
        for levels in (99, 100, 101, 500, 3000):
            raw = msgspec.Raw(b'{"more": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}")
            if levels < 101:
                assert len(Grant(None, raw, raw, None).auth_sha256) == 64
                continue
            with pytest.raises(Invalid, match="cannot be compared"):
                _ = Grant(None, raw, raw, None).auth_sha256
    finally:
        sys.setrecursionlimit(before)


def test_half_a_surrogate_pair_can_be_compared() -> None:
    raw = msgspec.Raw(b'{"more": "\\ud800"}')
    assert Grant(None, raw, raw, None).auth_sha256 == fingerprint({"more": "\ud800"})


def test_a_number_is_the_same_however_it_is_written() -> None:
    assert fingerprint({"cost": 100, "n": [1]}) == fingerprint({"cost": 100.0, "n": [1e0]})
    assert fingerprint({"cost": 100.5}) not in (fingerprint({"cost": 100}), fingerprint({"cost": 101}))
    assert fingerprint({"cost": float("inf")}) != fingerprint({"cost": 0})
    last = 2**53 - 1  # beyond it a float stands for several whole numbers
    assert fingerprint([float(last)]) == fingerprint([last])
    assert fingerprint([float(last + 1)]) != fingerprint([last + 1])
    for auth in ({"cost": 100}, {"cost": 100.0}):
        assert owns(auth, fingerprint({"cost": 100.0}))
    assert not owns({"cost": 100.5}, fingerprint({"cost": 100}))


def test_a_number_of_many_digits_stays_as_short_as_it_came() -> None:
    assert fingerprint([1e308]) == "89595af77bcae4a79484c44c6ca9c38cc7f7683acdef9538865b84d8bb607fe2"  # of "[1e+308]"


def test_a_fingerprint_stays_the_same_from_version_to_version() -> None:
    """Else the owner of a session could not end it any more after an update."""
    assert fingerprint({"b": [1, 2], "a": "ä"}) == "309c7942c66e9a3ada8068b72db4cbc0cc8518b31220d6b3373e0524df9c048d"


def test_a_grant_knows_its_number_and_a_bare_one_has_none() -> None:
    raw = msgspec.Raw(b"{}")
    assert Grant(auth(), raw, raw, None).request_idx == 7
    assert Grant(None, raw, raw, None).request_idx is None


@pytest.mark.parametrize(
    ("cost", "is_one"),
    [
        (1, True),
        (1.5, True),
        ("1", True),
        (" -1.5e3 ", True),
        (".5", True),
        ("a lot", False),
        ("", False),
        ("1x", False),
    ],
)
def test_a_cost_is_a_number_or_says_one(cost: Any, *, is_one: bool) -> None:
    fields = {**json.loads(msgspec.json.encode(auth())), "cost": cost}
    if is_one:
        assert msgspec.convert(fields, Auth).cost == cost
    else:
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(fields, Auth)


@pytest.mark.parametrize(
    ("cost", "is_one"),
    [
        (0, True),
        (1_000_000, True),
        ("1e6", True),
        ("0", True),
        (-0.001, False),
        (1_000_000.1, False),
        ("1e999", False),
        ("-1", False),
        ("1000001", False),
        (10**400, False),
        ("a lot", False),
        (None, False),
    ],
)
async def test_a_cost_is_finite_and_from_0_to_a_million(cost: Any, *, is_one: bool) -> None:
    authenticator = Authenticator(None, own_url=URL, url_policy="off")
    body = envelope(auth_data={**json.loads(msgspec.json.encode(auth())), "cost": cost})
    if is_one:
        assert (await authenticator.authenticate(body)).request_idx == 7
    else:
        with pytest.raises(Invalid) as refused:
            await authenticator.authenticate(body)
        assert refused.value.fields == {"auth_data": {"cost": "must be a number from 0 to 1000000"}}


LARGE = "x" * EXPLAINED_BYTES


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ({"auth_data": {}, "payload": {"x": LARGE}}, {"auth_data"}),
        ({"auth_data": {}, "payload": [LARGE]}, {"auth_data", "payload"}),
        ({"auth_data": {}, "payload": LARGE}, {"auth_data", "payload"}),
        ({"payload": {"x": LARGE}, "session_id": 5}, {"auth_data", "session_id"}),
        ({"auth_data": {}, "more": LARGE}, {"auth_data", "payload"}),
        ({"auth_data": {"x": LARGE}, "payload": {}}, set()),
        ({"auth_data": {}, "payload": {}, "session_id": LARGE}, set()),
        ([LARGE], set()),
    ],
    ids=range(8),
)
async def test_of_a_large_envelope_the_small_parts_are_explained(body: Any, wrong: set[str]) -> None:
    authenticator = Authenticator(KeyRing(None, Readiness(), lambda *_: None), own_url=URL, url_policy="off")  # type: ignore[arg-type]  # it is not asked
    with pytest.raises(Invalid) as refused:
        await authenticator.authenticate(json.dumps(body).encode())
    assert set(refused.value.fields) == wrong
    assert len(str(refused.value)) < 200


class Payload(msgspec.Struct):
    seconds: float
    name: str = ""
    more: Any = None


def envelope(**fields: Any) -> bytes:
    auth_data = json.loads(msgspec.json.encode(auth()))
    return json.dumps({"auth_data": auth_data, "payload": {"seconds": 5}, "session_id": "s", **fields}).encode()


async def test_what_is_asked_for_is_read_once_it_is_granted(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(monkeypatch, OLD)
    await desk.keys.load()
    grant = await desk.authenticator.authenticate(envelope())
    assert (grant.request_idx, grant.session_id, grant.read(Payload)) == (7, "s", Payload(5.0))
    assert json.loads(bytes(grant.auth_data))["url"] == URL
    forged = json.loads(msgspec.json.encode(auth(key=NEW)))
    with pytest.raises(Unauthorized):
        await desk.authenticator.authenticate(envelope(auth_data=forged))


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        (b"no json", {}),
        (envelope(auth_data=None), {"auth_data"}),
        (envelope(auth_data={}), {"auth_data"}),
        (envelope(session_id=5), {"session_id"}),
        (b'{"payload": {}}', {"auth_data"}),
        (b'{"auth_data": ' + b"[" * 100_000, {}),
        (envelope().replace(b'"e"', b'"\xff"'), {}),
    ],
)
async def test_a_malformed_envelope_names_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, body: bytes, wrong: set[str]
) -> None:
    desk = Desk(monkeypatch, OLD)
    await desk.keys.load()
    with pytest.raises(Invalid) as refused:
        await desk.authenticator.authenticate(body)
    assert set(refused.value.fields) == set(wrong)


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b'{"seconds": "soon"}', "seconds"),
        (b"{}", "seconds"),
        (b'{"seconds": 1' + b"0" * 400 + b"}", ""),
        (b'{"seconds": 1, "name": "\xff"}', ""),
        (b'{"seconds": 1, "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
        (b"\xff", ""),
    ],
)
def test_a_payload_that_is_wrong_is_told_under_its_name(payload: bytes, field: str) -> None:
    grant = Grant(None, msgspec.Raw(b"null"), msgspec.Raw(payload), None)
    with pytest.raises(Invalid) as refused:
        grant.read(Payload)
    assert list(refused.value.fields) == ["payload"]
    assert refused.value.fields["payload"]
    assert not field or list(refused.value.fields["payload"]) == [field]


async def test_a_grant_is_verified_where_its_signature_was_checked_and_nowhere_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk(monkeypatch, OLD)
    await desk.keys.load()
    unsecured = Authenticator(None, own_url=URL, url_policy="off")
    assert (await desk.authenticator.authenticate(envelope())).verified
    for body in (envelope(), b"{}"):
        assert not (await unsecured.authenticate(body)).verified
    assert [(await unsecured.authenticate(body)).cost for body in (envelope(), b"{}", b"")] == [1.0, None, None]


async def test_a_worker_that_checks_nothing_takes_a_bare_payload_and_an_envelope() -> None:
    authenticator = Authenticator(None, own_url=URL, url_policy="enforce")
    empty = b'{"auth_data": null, "payload": {"seconds": 5}, "session_id": null}'
    for body in (b'{"seconds": 5}', b'{"payload": {"seconds": 5}}', empty, envelope(session_id=None)):
        assert (await authenticator.authenticate(body)).read(Payload) == Payload(5.0)
    assert (await authenticator.authenticate(b'{"session_id": "s"}')).session_id == "s"
    grants_of = [await authenticator.authenticate(body) for body in (envelope(), b"{}")]
    assert [grant.request_idx for grant in grants_of] == [7, None]
    assert bytes(grants_of[1].auth_data) == b"null"
