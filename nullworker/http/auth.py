"""Authentication of signed requests: decodes the envelope of a POST and verifies the autoscaler's signature in it.

The signature covers only the worker's url, so a grant for another worker verifies too; NULL_GRANT_URL says what happens
with it. Handlers use nothing of a request before `check` has returned.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from nullworker.autoscaler.keys import KeyRing
from nullworker.errors import Invalid, Unauthorized
from nullworker.http.bodies import MAX_DEPTH, T, decode, explain, is_deeper
from nullworker.logs import get_log
from nullworker.settings import MAX_COST as MAX_COST

log = get_log(__name__)

#: Maximum size of a part of a wrong envelope that is searched for the error; it costs 0.4 us per byte, for an
#: unverified caller.
EXPLAINED_BYTES: Final = 16 * 1024
ALLOWED_COST: Final = f"must be a number from 0 to {MAX_COST}"

Number = Annotated[str, Meta(pattern=r"^\s*[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\s*$")]


class Auth(msgspec.Struct):
    """A grant of the autoscaler (vastai 1.9.1, server/lib/data_types.py, AuthData). Only `url` is signed."""

    cost: Annotated[float | Number, Meta(extra={"allowed": ALLOWED_COST})]
    endpoint: str
    reqnum: int
    request_idx: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]  # SQLite's integers end there
    signature: str
    url: str


class Envelope(msgspec.Struct):
    """The body of every signed POST. `auth_data` is also kept raw, since a session's auth is compared as a whole."""

    auth_data: msgspec.Raw
    payload: msgspec.Raw
    session_id: str | None = None


class _Checked(msgspec.Struct):
    auth_data: Auth
    payload: dict[str, Any]
    session_id: str | None = None


class _Bare(msgspec.Struct):
    session_id: str | None = None


class Grant(msgspec.Struct):
    """An authenticated request. `auth` is None for a bare payload on an unsecured worker.

    `verified`: the signature was checked, so the same auth_data identifies the same caller.
    """

    auth: Auth | None
    auth_data: msgspec.Raw
    payload: msgspec.Raw
    session_id: str | None
    verified: bool = False

    @property
    def request_idx(self) -> int | None:
        """The autoscaler's number for the request; None without an envelope."""
        return None if self.auth is None else self.auth.request_idx

    @property
    def cost(self) -> float | None:
        """The load that was requested from the autoscaler; None without an envelope."""
        return None if self.auth is None else float(self.auth.cost)

    @property
    def auth_sha256(self) -> str:
        """What a claim is known to belong to.

        Raises:
            Invalid: the auth nests too deep to be compared.
        """
        return fingerprint(self.auth_json)

    @property
    def auth_json(self) -> Any:
        """The auth_data as received.

        Raises:
            Invalid: it cannot be read.
        """
        try:
            return json.loads(bytes(self.auth_data))
        except (ValueError, RecursionError):
            raise Invalid("auth_data cannot be compared: it has too long a number, or nests too deep") from None

    def read(self, shape: type[T]) -> T:
        """The payload, decoded as `shape`.

        Raises:
            Invalid: it does not fit; the wrong fields are listed under `payload`.
        """
        try:
            return msgspec.json.decode(self.payload, type=shape)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            error = explain(bytes(self.payload), shape)
            raise Invalid(str(error), payload=error.fields or str(error)) from None


_canonical: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode


def fingerprint(auth: Any) -> str:
    """SHA-256 of an auth_data, independent of spacing and the order of keys.

    100 and 100.0 are the same number: JavaScript, for example, writes the first after reading the second.

    Raises:
        Invalid: it nests too deep to be compared.
    """
    if is_deeper(auth, MAX_DEPTH):
        raise Invalid(f"the auth cannot be compared: it must nest at most {MAX_DEPTH} deep")
    return hashlib.sha256(_canonical(_whole_as_int(auth)).encode()).hexdigest()


def owns(auth: Any, auth_sha256: str) -> bool:
    """Whether this auth_data has that fingerprint.

    Raises:
        Invalid: it nests too deep to be compared.
    """
    return hmac.compare_digest(auth_sha256, fingerprint(auth))


def _whole_as_int(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _whole_as_int(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_whole_as_int(inner) for inner in value]
    # above 2**53 a float stands for several whole numbers, and may have 300 digits
    return int(value) if isinstance(value, float) and abs(value) < 2**53 and value.is_integer() else value


class Authenticator:
    """Decodes the envelope of a request and verifies its signature. `keys` is None with UNSECURED=true."""

    def __init__(self, keys: KeyRing | None, *, own_url: str, url_policy: str) -> None:
        self._keys = keys
        self._own_url = own_url.rstrip("/")
        self._url_policy = url_policy

    async def authenticate(self, body: bytes) -> Grant:
        """The verified grant in a body.

        Raises:
            RequestError: the request is refused, with this error's status.
        """
        if self._keys is None and (bare := _bare(body or b"{}")) is not None:  # curl without -d
            return bare
        try:
            envelope = msgspec.json.decode(body, type=Envelope)
            auth = msgspec.json.decode(envelope.auth_data, type=Auth)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            raise _explain(body) from None
        if not 0 <= float(auth.cost) <= MAX_COST:
            raise Invalid("some fields are missing or wrong: auth_data.cost", auth_data={"cost": ALLOWED_COST})
        await self.check(auth)
        verified = self._keys is not None
        return Grant(auth, envelope.auth_data, envelope.payload, envelope.session_id, verified)

    async def check(self, auth: Auth) -> None:
        """Verify that the autoscaler has signed this grant, for this worker.

        Raises:
            Unauthorized: it has not.
            Unavailable: the key is not loaded.
        """
        if self._keys is None:
            return
        if not await self._keys.has_signed(auth.url, auth.signature):
            raise Unauthorized("the signature is not the autoscaler's", reason="signature")
        if self._url_policy != "off" and auth.url.rstrip("/") != self._own_url:
            if self._url_policy == "enforce":
                raise Unauthorized(f"the grant is for {auth.url}, and this worker is {self._own_url}", reason="url")
            log.warning("grant_for_another_url", url=auth.url, own_url=self._own_url, request_idx=auth.request_idx)


def _explain(body: bytes) -> Invalid:
    """The error for a wrong envelope. Of a large payload, only the kind of JSON is checked."""
    if len(body) <= EXPLAINED_BYTES:
        return explain(body, _Checked)
    too_large = Invalid(
        f"the envelope is wrong; parts larger than {EXPLAINED_BYTES} bytes are not searched for the error"
    )
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return too_large
    short = {name: bytes(fields[name]) for name in _Checked.__struct_fields__ if name in fields}
    if len(short.get("payload", b"")) > EXPLAINED_BYTES:
        short["payload"] = b"{}" if short["payload"].startswith(b"{") else b"[]"
    if any(len(part) > EXPLAINED_BYTES for part in short.values()):
        return too_large
    return explain(msgspec.json.encode({name: msgspec.Raw(part) for name, part in short.items()}), _Checked)


def _bare(body: bytes) -> Grant | None:
    """A payload without an envelope, as from curl, or in one whose auth_data is null; None if there is auth_data."""
    fields = decode(body, dict[str, msgspec.Raw])
    if bytes(fields.get("auth_data", b"null")) != b"null":
        return None
    return Grant(None, msgspec.Raw(b"null"), fields.get("payload", msgspec.Raw(body)), decode(body, _Bare).session_id)
