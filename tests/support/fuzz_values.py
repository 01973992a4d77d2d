"""The values that the fuzz tests put into each field."""

from __future__ import annotations

from hypothesis import strategies as st

#: Text with everything that JSON can say, half surrogate pairs included.
TEXT = st.text(st.characters(codec=None), max_size=20)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels
