"""Reads request bodies and query parameters within bounds of size and time, and decodes them into typed structs.

A body that does not fit is refused as a whole, with every wrong field named.
"""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, Final, TypeVar, get_args, get_type_hints

import msgspec
from aiohttp import StreamReader, web

from nullworker.control_client import MAX_BODY_BYTES
from nullworker.errors import BodyTooLarge, Invalid, SlowBody, UnsupportedMedia

MAX_METADATA_BYTES: Final = 4096
#: Levels of objects and arrays in a value that is kept in the log.
MAX_DEPTH: Final = 100
#: Levels in a body: below what every Python's decoder takes, so that a value that is too deep is told by its name.
MAX_BODY_DEPTH: Final = 512
#: Seconds in which a body must have arrived.
BODY_SECONDS: Final = 10.0

T = TypeVar("T")


#: Of an app: the largest body that it takes, in bytes. MAX_BODY_BYTES where an app says nothing.
BODY_LIMIT: web.AppKey[int] = web.AppKey("body_limit", int)


async def read_body(request: web.Request) -> bytes:
    """The whole body, which is JSON or nothing.

    Unlike `request.read`, the request does not keep it: 1.4 kB less for each waiting caller.

    Raises:
        UnsupportedMedia: it is compressed.
        BodyTooLarge: over the app's BODY_LIMIT; nothing more of it is read.
        SlowBody: it did not arrive within BODY_SECONDS.
        Invalid: it nests deeper than MAX_BODY_DEPTH.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("the body must not be compressed: no Content-Encoding is taken")
    limit = request.app.get(BODY_LIMIT, MAX_BODY_BYTES)
    if request.content_length is not None and request.content_length > limit:
        raise _too_large(limit)
    if request.content.is_eof():  # it came with the head
        body = request.content.read_nowait()
        if len(body) > limit:
            raise _too_large(limit)
    else:
        body = await _in_time(request.content, limit)
    if nests_deeper(body, MAX_BODY_DEPTH):
        raise Invalid(f"the body is not JSON, or nests more than {MAX_BODY_DEPTH} deep")
    return body


def nests_deeper(body: bytes, levels: int) -> bool:
    """Whether JSON has more than `levels` objects and arrays in one another. Of what is no JSON it may say so too.

    In a few passes in C, without recursion: what one Python refuses as too deep another one takes.
    """
    if body.count(b"[") + body.count(b"{") <= levels:
        return False
    outside = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    brackets = b"".join(outside).translate(_ONE_KIND, _NO_BRACKETS)
    for _ in range(levels):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")  # the innermost
    return bool(brackets)


_ONE_KIND: Final = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[]{}"))


def _too_large(limit: int) -> BodyTooLarge:
    return BodyTooLarge(f"the body is larger than {limit} bytes")


async def _in_time(content: StreamReader, limit: int) -> bytes:
    # asyncio.wait_for, before Python 3.12, loses a cancellation (a hang-up) that comes together with the last byte
    late = SlowBody(f"the body did not arrive within {BODY_SECONDS:g} s")
    timer = asyncio.get_running_loop().call_later(BODY_SECONDS, content.set_exception, late)
    body = bytearray()  # a list of parts would be forty times as large where they come byte by byte
    try:
        while part := await content.readany():
            body += part
            if len(body) > limit:
                raise _too_large(limit)
        return bytes(body)
    finally:
        timer.cancel()
        body.clear()  # where the caller is gone, this frame may be in a reference cycle that is kept for a while


def decode(body: bytes, shape: type[T]) -> T:
    """A JSON object, decoded as `shape`.

    Raises:
        Invalid: it does not fit; its fields name what is wrong.
    """
    try:
        return msgspec.json.decode(body, type=shape)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise explain(body, shape) from None


def explain(body: bytes, shape: Any) -> Invalid:
    """The error that names every wrong field of a body (msgspec's own stops at the first)."""
    try:
        value = json.loads(body)  # accepts NaN, so that the field can be named
        wrong = _not_finite(value) or _wrong(value, shape)
    except RecursionError:
        return Invalid("the body nests too deep")
    except ValueError as error:
        return Invalid(f"the body is not JSON: {error}")
    if isinstance(wrong, str):
        return Invalid(f"the body must be a JSON object: {wrong}")
    if not wrong:
        return Invalid("the body is not JSON: it has text that is not Unicode, or nests too deep")
    return Invalid("some fields are missing or wrong: " + ", ".join(_names(wrong)), **wrong)


def check_metadata(metadata: dict[str, Any] | None) -> None:
    """Check the size of metadata: they are for a note or a job's number, not for the job itself.

    Raises:
        Invalid: it is too large.
    """
    if why := unfit(metadata, MAX_METADATA_BYTES):
        raise Invalid(f"metadata {why}", payload={"metadata": why})


def unfit(value: Any, most: int) -> str | None:
    """Why a value cannot be kept in the log (too large, or nested too deep for some readers); None: it can."""
    if is_deeper(value, MAX_DEPTH):
        return f"must nest at most {MAX_DEPTH} deep"
    return f"must be at most {most} bytes of JSON" if len(msgspec.json.encode(value)) > most else None


def is_deeper(value: Any, levels: int) -> bool:
    """Whether a value has more than `levels` objects and arrays in one another."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(is_deeper(each, levels - 1) for each in inner)


def _wrong(value: Any, shape: Any) -> Any:
    """What is wrong with a value: a sentence, a dict of sentences by field, or None.

    The sentence is msgspec's, or the one that a Meta of the shape has as `extra["allowed"]`.
    """
    if isinstance(shape, type) and issubclass(shape, msgspec.Struct) and isinstance(value, dict):
        hints = get_type_hints(shape, include_extras=True)
        found = {}
        for field in msgspec.structs.fields(shape):
            if field.encode_name not in value:
                wrong = "missing parameter" if field.required else None
            else:
                wrong = _wrong(value[field.encode_name], hints[field.name])
            if wrong:
                found[field.encode_name] = wrong
        return found
    inner = next((arg for arg in get_args(shape) if isinstance(arg, type) and issubclass(arg, msgspec.Struct)), None)
    if inner is not None and isinstance(value, dict):
        return _wrong(value, inner)
    try:
        msgspec.convert(value, shape)
    except (msgspec.ValidationError, OverflowError) as error:
        metas = [meta.extra or {} for meta in getattr(shape, "__metadata__", ()) if isinstance(meta, msgspec.Meta)]
        return next((extra["allowed"] for extra in metas if "allowed" in extra), str(error))
    return None


def _not_finite(value: Any, levels: int = MAX_DEPTH) -> Any:
    """Where a value has NaN or an infinity, in the form that `_wrong` returns. Only so many levels are searched."""
    if levels == 0:
        return None
    if isinstance(value, dict):
        # a name may hold half a surrogate pair, which cannot be encoded
        return {_ascii(name): wrong for name, member in value.items() if (wrong := _not_finite(member, levels - 1))}
    if isinstance(value, list):
        return next((wrong for member in value if (wrong := _not_finite(member, levels - 1))), None)
    return "must be a finite number" if isinstance(value, float) and not math.isfinite(value) else None


def _ascii(name: str) -> str:
    return name.encode("ascii", "backslashreplace").decode()


def _names(wrong: dict[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, why in wrong.items():
        names += _names(why, f"{prefix}{name}.") if isinstance(why, dict) else [f"{prefix}{name}"]
    return names


def number(request: web.Request, name: str, default: float, high: float) -> float:
    """A query parameter that is a number from 0; a value above `high` becomes `high`.

    Raises:
        Invalid: it is negative or no number.
    """
    text = request.query.get(name)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise Invalid(f"{name} is wrong", **{name: f"must be a number from 0 to {high:g}, not {text!r}"})
    return min(value, high)
