"""Collects the figures of all rounds, and prints them as markdown tables."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

#: By name: what one measurement of one peer gives.
Figures = dict[str, float]

#: In the order of the first round; each later one begins with the next.
PEERS = ("nullworker", "normal", "SDK", "bound", "floor")
#: Columns of ratios: ours, theirs, and the head.
RATIOS = (
    ("nullworker", "SDK", "x SDK"),
    ("nullworker", "bound", "x bound"),
    ("normal", "SDK", "at sync normal, x SDK"),
)
_HEADS = {"normal": "at sync normal"}


class Table:
    """Values by figure and peer, one for each round."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))

    def add(self, peer: str, figures: Figures) -> None:
        """What one round has measured."""
        for figure, value in figures.items():
            self.values[figure][peer].append(value)

    def lines(self) -> Iterator[str]:
        """The ratios first, then medians with the least and the most; columns that would be empty are left out."""
        peers = [peer for peer in PEERS if any(_known(values.get(peer)) for values in self.values.values())]
        ratios = [(ours, theirs, head) for ours, theirs, head in RATIOS if ours in peers and theirs in peers]
        yield from _rows(["figure", *(head for _, _, head in ratios), *(_HEADS.get(peer, peer) for peer in peers)])
        for figure, values in self.values.items():
            middle = {peer: statistics.median(seen) for peer, seen in values.items()}
            cells = [_ratio(middle, ours, theirs) for ours, theirs, _ in ratios]
            yield row([figure, *cells, *(_cell(values.get(peer)) for peer in peers)])


def row(cells: Sequence[str]) -> str:
    """One line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def _rows(heads: Sequence[str]) -> Iterator[str]:
    yield row(heads)
    yield "|---" * len(heads) + "|"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A whole markdown table."""
    yield from _rows(heads)
    for cells in rows:
        yield row(cells)


def _known(seen: Sequence[float] | None) -> bool:
    return seen is not None and len(seen) > 0 and min(seen) > 0


def _ratio(middle: Mapping[str, float], ours: str, theirs: str) -> str:
    known = all(middle.get(peer, 0) > 0 for peer in (ours, theirs))
    return f"{middle[ours] / middle[theirs]:.2f}" if known else ""


def _cell(seen: Sequence[float] | None) -> str:
    if seen is None or not _known(seen):
        return ""
    return f"{short(statistics.median(seen))} ({short(min(seen))} - {short(max(seen))})"


def short(value: float) -> str:
    """Three figures, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def p50_p99(seen: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    return statistics.median(seen), statistics.quantiles(seen, n=100, method="inclusive")[98]
