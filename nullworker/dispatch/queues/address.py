"""The URL of a queue: our own parameters are taken out of it, and the rest is its library's."""

from __future__ import annotations

from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from nullworker.errors import BadSettings

_SHOWN_PARAMETERS: Final = frozenset(("list", "busy", "stream", "group", "consumer", "queue"))


class Address(NamedTuple):
    """A queue's URL, taken apart."""

    parts: SplitResult
    query: list[tuple[str, str]]
    example: str = ""  # a URL of this kind as it should be

    @classmethod
    def parse(cls, url: str) -> Address:
        """The parts of a URL; ValueError where it is none."""
        parts = urlsplit(url)
        _ = parts.port  # raises ValueError for one that is no number
        return cls(parts, parse_qsl(parts.query, keep_blank_values=True))

    def take(self, *required: str, optional: tuple[str, ...] = ()) -> tuple[str, dict[str, str]]:
        """The URL without these parameters, and their values. Those that are optional may be missing.

        Raises:
            BadSettings: one is missing.
        """
        values = {name: value for name, value in self.query if name in (*required, *optional)}
        missing = [name for name in required if not values.get(name)]
        if missing:
            raise BadSettings(
                f"--queue (NULL_QUEUE) {self.parts.scheme}:// needs the parameter {missing[0]}=, as in {self.example}"
            )
        rest = urlencode([(name, value) for name, value in self.query if name not in values])
        return self.parts._replace(query=rest).geturl(), values

    @property
    def shown(self) -> str:
        """Without the user, the password, and parameters that are not ours."""
        host = self.parts.netloc.rpartition("@")[2]
        query = "&".join(f"{name}={value}" for name, value in self.query if name in _SHOWN_PARAMETERS)
        return f"{self.parts.scheme}://{host}{self.parts.path}{'?' if query else ''}{query}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """All that must not be quoted: the password, as it is written and as it is meant, and foreign parameters."""
        found = [self.parts.password or "", unquote(self.parts.password or "")]
        found += [value for name, value in self.query if name not in _SHOWN_PARAMETERS]
        return tuple(each for each in found if each)
