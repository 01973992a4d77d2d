"""Bodies by themselves: how deep they may nest, on every Python."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nullworker.http.bodies import MAX_BODY_DEPTH, is_deeper, nests_deeper

JSON = st.recursive(
    st.none() | st.text('"\\[]{}a') | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('"\\[]{}a'), inner, max_size=4),
    max_leaves=50,
)


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


@given(JSON)
def test_the_depth_of_json_is_found_without_decoding_it(value: Any) -> None:
    body = json.dumps(value).encode()
    for levels in range(8):
        assert nests_deeper(body, levels) == (depth(value) > levels)


@pytest.mark.parametrize(
    ("body", "deeper"),
    [
        (b"[" * MAX_BODY_DEPTH + b"]" * MAX_BODY_DEPTH, False),
        (b"[" * (MAX_BODY_DEPTH + 1) + b"]" * (MAX_BODY_DEPTH + 1), True),
        (b'{"a":' * MAX_BODY_DEPTH + b"1" + b"}" * MAX_BODY_DEPTH, False),
        (b'{"a":[' * MAX_BODY_DEPTH + b"]}" * MAX_BODY_DEPTH, True),
        (b"[" + b"[],{}," * 60_000 + b"[]]", False),
        (b'["' + b"[" * 100_000 + b'"]', False),
        (b'["' + b'\\"[' * 100_000 + b'"]', False),
        (b"[" * 100_000, True),
        (b"]" * 100_000 + b"[" * 1000, True),
    ],
    ids=range(9),
)
def test_bodies_that_nest_deep_or_only_seem_to(body: bytes, deeper: bool) -> None:
    assert nests_deeper(body, MAX_BODY_DEPTH) == deeper


def test_a_value_is_searched_no_deeper_than_it_is_allowed_to_be() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert is_deeper(deep, 100)
    assert not is_deeper([[[]]], 4)
