"""How a hold ended: the outcome that `hold`, `hold_at` and `hold_session` return."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nullworker.client.session import ENDS, FinalStatus
from nullworker.client.vastai_sdk import Say
from nullworker.client.worker_http import Answer, HoldError
from nullworker.clock import SystemClock, elapsed, from_shown, iso, tidy


class HoldCancelled(HoldError):
    """The worker cancelled the reservation while it was held. `answer` is its outcome, as `hold` returns it."""


class Outcome:
    """Collects the facts of one hold, from the claim to its end, and puts them beside the worker's answer.

    Attributes:
        asked_at: epoch seconds of the claim.
        worker: the worker's url.
        instance: its CONTAINER_ID.
        duration_cap: seconds.
        held_at: ISO 8601 UTC.
    """

    def __init__(self, metadata: Mapping[str, Any] | None, asked_at: float | None = None) -> None:
        self.asked_at = SystemClock().now() if asked_at is None else asked_at
        self.worker: str | None = None
        self.instance: str | None = None
        self.reservation_id: str | None = None
        self.duration_cap: float | None = None
        self.held_at: str | None = None
        self._end: dict[str, Any] = {}
        self._metadata = metadata

    def add(self, event: Mapping[str, Any]) -> None:
        """Take over what an event of the reservation's log says."""
        self.reservation_id = event["reservation_id"]
        if event["kind"] == "queued":
            self.duration_cap = event["data"]["duration_cap"]
        elif event["kind"] == "held":
            self.held_at = event["at"]
        elif event["kind"] in ENDS:
            self._end = {
                "state": event["kind"],
                "reason": event["reason"],
                "ended_at": event["at"],
                "result": event["data"].get("result"),
            }

    def settle(self, answer: Answer, say: Say, final: FinalStatus | None = None) -> Answer:
        """The outcome of a hold that has ended: `beside`, and one line to `say`.

        Raises:
            HoldCancelled: it was cancelled.
        """
        outcome = self.beside(answer, final)
        if "released" not in answer:
            raise HoldCancelled(f"{self.worker} ended it: {answer.get('error', answer)}", outcome)
        seconds = outcome["held_seconds"]
        say(f"ended: {answer['released']}" + ("" if seconds is None else f" after {seconds:g} s"))
        return outcome

    def beside(self, answer: Mapping[str, Any], final: FinalStatus | None = None) -> Answer:
        """The worker's answer, and beside it `worker, instance, reservation_id, metadata, asked_at, held_at, ended_at,
        held_seconds, duration_cap, state, reason, result`. Times are ISO 8601 UTC; None is not known.
        """
        end: dict[str, Any] = {**self._end, **(dict(final) if final else {})}
        held_at, ended_at = end.get("held_at") or self.held_at, end.get("ended_at")
        seconds = answer.get("held_seconds", answer.get("duration", end.get("held_seconds")))
        if seconds is None and held_at and ended_at:
            seconds = elapsed(from_shown(held_at), from_shown(ended_at))
        state = end.get("state") or {"duration_elapsed": "expired"}.get(answer.get("released", ""), "released")
        return {
            **answer,
            "worker": self.worker,
            "instance": self.instance,
            "reservation_id": answer.get("reservation_id") or self.reservation_id,
            "metadata": self._metadata,
            "asked_at": iso(self.asked_at),
            "held_at": held_at,
            "ended_at": ended_at,
            "held_seconds": seconds,
            "duration_cap": answer.get("duration_cap", None if self.duration_cap is None else tidy(self.duration_cap)),
            "state": answer.get("state", state if "released" in answer or end else None),
            "reason": answer.get("reason") or end.get("reason") or answer.get("released"),
            "result": answer.get("result", end.get("result")),
        }


def as_answer(final: Mapping[str, Any]) -> Answer:
    """A final status, written as the body that the caller of /reserve would have got."""
    if final["state"] == "cancelled":
        return {"error": f"it was cancelled ({final['reason']})", "state": "cancelled", "reason": final["reason"]}
    times = {name: final[name] for name in ("held_at", "ended_at") if final.get(name)}
    if final["state"] == "expired":
        return {"released": final["reason"], "duration": final["held_seconds"], **times}
    result = {} if final.get("result") is None else {"result": final["result"]}
    return {"released": final["reason"], "held_seconds": final["held_seconds"], **result, **times}


def is_result_failed(result: Any) -> bool:
    """Whether a consumer's result says that the job failed: an exit_code that is not 0, or an `error`."""
    return isinstance(result, dict) and (result.get("exit_code", 0) not in (0, None) or bool(result.get("error")))
