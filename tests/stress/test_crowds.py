"""A short form of `python -m stress.crowds`, over TLS as in Vast's template."""

from __future__ import annotations

from pathlib import Path

from stress import crowds


async def test_who_never_ends_his_handshake_takes_little_memory_and_keeps_nobody_out(tmp_path: Path) -> None:
    found = await crowds.run(tmp_path, tls=True, seconds=2.0, share=0.1, only="silent", rest=0.0)
    seen = found["silent"]
    assert None not in seen.honest
    assert seen.peak - seen.before < 50, "430 strangers took 110 MB when each had a buffer of 256 KiB"
