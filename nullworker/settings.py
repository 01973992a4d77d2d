"""Settings: the environment and the options of `nullworker serve`, read into one frozen dataclass.

Each field has the name of its environment variable in lower case. Its metadata contain the parser, the allowed values
and the help text, from which `--help` and all error messages are made. No other module of the worker reads the
environment; the other commands read their variables, those in OTHER_NAMES, through their options.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from nullworker.errors import BadSettings

#: A year, in seconds: the limit of times, so that every deadline is a valid date.
YEAR_SECONDS = 31_536_000
#: Seconds of the longest hold, unless a reservation may be longer: a consumer that hangs should not cost a week.
DAY = 86_400.0

#: Maximum cost of a grant, and so of the load that one request may report.
MAX_COST = 1_000_000

#: The SDK skips this entry of REPORT_ADDR: the old API takes no reports (vastai 1.9.1, server/lib/metrics.py).
OLD_API = "https://cloud.vast.ai/api/v0"

#: Variables that begin with NULL_ and belong to other commands than `serve`: names, and beginnings of names. A test
#: compares them with the commands' options.
OTHER_NAMES = frozenset(("NULL_QUEUE",))
OTHER_BEGINNINGS = ("NULL_DISPATCH_", "NULL_COLLECT_")

_TRUE = frozenset(("true", "t", "yes", "y", "on", "1"))
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_FALSE = frozenset(("false", "f", "no", "n", "off", "0"))


@dataclass(frozen=True)
class Kind:
    """How a setting's text is parsed, and what is allowed, for error messages and for --help.

    Attributes:
        read: raises ValueError for what is not allowed.
        allowed: in words.
        metavar: the value in `--help`.
        bounds: what `metavar` does not say of the allowed values.
        words: all of them, if there are few.
    """

    read: Callable[[str], Any]
    allowed: str
    metavar: str
    bounds: str = ""
    words: tuple[str, ...] = ()


def _number(low: float, high: float, *, unit: str = "", whole: bool = False, above: bool = False) -> Kind:
    def read(text: str) -> float | int:
        value: float | int = int(text) if whole else read_seconds(text) if unit == "seconds" else float(text)
        if not math.isfinite(value) or value > high or value < low or (above and value == low):
            raise ValueError(text)
        return value

    what = "a whole number" if whole else "a number"
    most = str(high) if isinstance(high, int) else f"{high:.10g}"
    bounds = f"above {low:g} and at most {most}" if above else f"from {low:g} to {most}"
    also = ", as 90, 15m, 6h or 30d" if unit == "seconds" else ""
    return Kind(read, f"{what}{' of ' + unit if unit else ''} {bounds}{also}", unit.upper() or "NUMBER", bounds)


def _choice(*words: str) -> Kind:
    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(text)
        return text.lower()

    return Kind(read, " or ".join((", ".join(words[:-1]), words[-1])), f"[{'|'.join(words)}]", words=words)


def _read_bool(text: str) -> bool:
    if text.lower() not in _TRUE | _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def is_absolute_http_url(text: str) -> bool:
    """Whether text is a valid http or https URL with a host."""
    try:
        parts = urlsplit(text)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and (parts.port is None or parts.port > 0)
            and text.isprintable()
            and " " not in text
        )
    except ValueError:
        return False


def without_secrets(url: str) -> str:
    """A url with `***` in place of userinfo and query, which may hold passwords and tokens."""
    if not is_absolute_http_url(url):  # its parts are not known
        return re.sub(r"\?.*", "?***", re.sub(r"^(\w+:/+)?.*@", r"\1***@", url, flags=re.DOTALL), flags=re.DOTALL)
    parts = urlsplit(url)
    _, at, address = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme, ("***@" if at else "") + address, parts.path, "***" if parts.query else "", ""))


def _read_url(text: str) -> str:
    if not is_absolute_http_url(text):
        raise ValueError(text)
    return text


def _read_sink(text: str) -> str:
    parts = urlsplit(_read_url(text))
    if parts.scheme == "http" and parts.hostname != "localhost":
        address = ipaddress.ip_address(
            parts.hostname or ""
        )  # raises ValueError for a name, which is not a private address
        if not (address.is_private or address.is_loopback):
            raise ValueError(text)
    return text


def read_token(text: str) -> str:
    """A token, which goes into a header. ValueError: it cannot."""
    if not text.isprintable():
        raise ValueError(text)
    return text


def _read_urls(text: str) -> tuple[str, ...]:
    urls = tuple(_read_url(part.strip()).rstrip("/") for part in text.split(",") if part.strip())
    urls = tuple(url for url in urls if url != OLD_API)
    if not urls:
        raise ValueError(text)
    return urls


def read_seconds(text: str) -> float:
    """Seconds as 90, 15m, 6h or 30d.

    Raises:
        ValueError: it is none of these, less than 0, or longer than a century.
    """
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    seconds = float(number) * _UNITS[unit]
    if not 0 <= seconds <= 100 * YEAR_SECONDS:  # nan is neither
        raise ValueError(text)
    return seconds


_TEXT = Kind(str, "any text", "TEXT")
_TOKEN = Kind(read_token, "printable text in one line", "TEXT")
_BOOL = Kind(_read_bool, "true or false", "[true|false]", words=("true", "false"))
_URL = Kind(_read_url, "an absolute http or https URL", "URL")
_SINK = Kind(
    _read_sink,
    "an https URL, or an http one of a loopback or private address",
    "URL",
    "https, or http to a loopback or private address",
)
_URLS = Kind(_read_urls, "a comma list of absolute http or https URLs", "URL,...")
_PATH = Kind(Path, "a file's path", "PATH")
_AGE = _number(0, 100 * YEAR_SECONDS, unit="seconds", above=True)
_PORT = replace(_number(0, 65535, whole=True), metavar="PORT", bounds="")


def _setting(default: Any, kind: Kind, help_text: str) -> Any:
    return field(default=default, metadata={"kind": kind, "help": help_text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a worker; each attribute is the environment variable of that name, in lower case."""

    max_reservation_seconds: float = _setting(
        3600.0,
        _number(0, YEAR_SECONDS, unit="seconds", above=True),
        "cap on the duration of a reservation: how far from now its deadline may be",
    )
    null_max_hold_seconds: float | None = _setting(
        None,
        _number(0, YEAR_SECONDS, unit="seconds"),
        "cap on one whole hold, all extensions included; 0: none; unset: 24 h, or MAX_RESERVATION_SECONDS if larger",
    )
    backend_health_url: str | None = _setting(
        None, _URL, "the consumer's health endpoint; unset: the stub /health of the control port"
    )
    null_control_port: int = _setting(18999, _PORT, "control port, always on 127.0.0.1; 0: any free one")
    null_max_queue_seconds: float = _setting(
        30.0, _number(0, YEAR_SECONDS, unit="seconds"), "longest wait in the queue; 0: refuse at once when busy"
    )
    null_max_queued: int = _setting(
        1000, _number(0, 1_000_000, whole=True), "maximum number of reservations in the queue"
    )
    null_event_log: Path | None = _setting(
        None,
        _PATH,
        "the SQLite event log; unset: nullworker-<CONTAINER_ID>.db in WORKSPACE_DIR, else nullworker.db here",
    )
    null_log_sync: str = _setting(
        "full", _choice("full", "normal"), "full: the log survives a power cut; normal: it survives a killed process"
    )
    null_sink: str | None = _setting(
        None, _SINK, "URL to which every event is POSTed, such as that of `nullworker collect`; unset: none"
    )
    null_sink_token: str | None = _setting(None, _TOKEN, "bearer token sent to the sink")
    null_sink_format: str = _setting(
        "cloudevents",
        _choice("cloudevents", "ndjson"),
        "body of a POST to the sink: a JSON array of CloudEvents, or one per line",
    )
    null_sink_results: bool = _setting(False, _BOOL, "send the results of reservations to the sink too")
    null_sink_metadata: bool = _setting(True, _BOOL, "send the metadata of reservations to the sink")
    null_log_keep: float | None = _setting(
        None, _AGE, "how long ended reservations stay in the log; pruned daily; unset: forever"
    )
    null_max_perf: float = _setting(
        100.0, _number(0, 1e9, above=True), "max_perf reported to the autoscaler; also the workload of one reservation"
    )
    null_report_perf: str = _setting(
        "served",
        _choice("served", "held"),
        "cur_perf reported to the autoscaler; served: the load served, as the SDK counts it; held: max_perf times the "
        "seconds held since the last report, with a report each second",
    )
    null_health_interval: float = _setting(
        10.0, _number(0, 86400, unit="seconds", above=True), "time between two polls of BACKEND_HEALTH_URL"
    )
    null_health_timeout: float = _setting(
        10.0, _number(0, 3600, unit="seconds", above=True), "longest wait for an answer from BACKEND_HEALTH_URL"
    )
    null_health_failures: int = _setting(
        1,
        _number(1, 1000, whole=True),
        "failures in a row, after the first success, that mark the worker errored",
    )
    null_unhealthy_action: str = _setting(
        "report", _choice("report", "cancel"), "cancel: an unhealthy consumer also ends the held reservation"
    )
    null_consumer_grace_seconds: float = _setting(
        5.0,
        _number(0, 60, unit="seconds"),
        "how long a consumer's liveness connection may be broken before its reservation ends",
    )
    null_attach_timeout: float | None = _setting(
        None,
        _number(0, YEAR_SECONDS, unit="seconds", above=True),
        "a hold to which no consumer attaches within this time ends; unset: it lasts until its deadline",
    )
    null_drain_seconds: float = _setting(
        5.0, _number(0, 86400, unit="seconds"), "on SIGTERM: how long a held reservation may still finish"
    )
    null_grant_url: str = _setting(
        "warn",
        _choice("warn", "enforce", "off"),
        "a grant signed for another worker's url; warn: accepted with a warning; enforce: refused; off: accepted",
    )
    null_metrics_host: str | None = _setting(
        None, _TEXT, "address of a further port that serves only /metrics; needs NULL_METRICS_PORT"
    )
    null_metrics_port: int | None = _setting(None, _PORT, "number of that port; 0: any free one")
    null_metrics_token: str | None = _setting(None, _TOKEN, "bearer token required on that port; unset: none")
    null_log_format: str = _setting("console", _choice("console", "json"), "format of the log lines on stderr")
    null_log_level: str = _setting(
        "info", _choice("debug", "info", "warning", "error"), "lowest level of the log lines shown"
    )
    container_id: int | None = _setting(
        None, _number(0, 2**63, whole=True), "this instance's id at Vast; unset: standalone, which needs UNSECURED=true"
    )
    master_token: str = _setting("", _TEXT, "the secret sent with every report")
    workspace_dir: Path | None = _setting(None, _PATH, "the instance's working directory")
    report_addr: tuple[str, ...] = _setting(
        ("https://run.vast.ai",), _URLS, "the autoscaler: the first address that answers is used"
    )
    worker_port: int = _setting(3000, _PORT, "external port; 0: any free one")
    worker_http_port: int | None = _setting(
        None, _PORT, "plain http port on 127.0.0.1 for /session/end; 0: any free one; unset: WORKER_PORT + 1"
    )
    public_ipaddr: str = _setting("127.0.0.1", _TEXT, "this machine's public address, as the autoscaler knows it")
    vast_tcp_port: int | None = _setting(
        None, _PORT, "public port that leads to WORKER_PORT (VAST_TCP_PORT_<WORKER_PORT>); unset: WORKER_PORT"
    )
    use_ssl: bool = _setting(False, _BOOL, "TLS on the external port, with /etc/instance.crt and /etc/instance.key")
    unsecured: bool = _setting(False, _BOOL, "accept unsigned requests; only for local use")

    def __repr__(self) -> str:
        """As of a dataclass, with secrets hidden."""
        return f"Settings({', '.join(f'{f.name}={_shown(f, getattr(self, f.name))}' for f in fields(self))})"

    def in_force(self) -> dict[str, str | float | bool]:
        """The settings that are not the default, by variable. Secrets are replaced by `***`."""
        in_force: dict[str, str | float | bool] = {}
        for setting in fields(self):
            value = getattr(self, setting.name)
            if value == setting.default:
                continue
            if setting.name.endswith("_token"):
                value = "***"
            elif isinstance(value, tuple):
                value = ",".join(map(without_secrets, value))
            elif setting.metadata["kind"] in (_URL, _SINK):
                value = without_secrets(value)
            name = variable(setting.name).replace("<WORKER_PORT>", str(self.worker_port))
            if isinstance(value, float) and value.is_integer():
                value = int(value)
            in_force[name] = value if isinstance(value, (str, int, float)) else str(value)
        return in_force

    @property
    def standalone(self) -> bool:
        """Whether the worker reports to no autoscaler."""
        return self.container_id is None

    @property
    def event_log(self) -> Path:
        """The path of the event log. Instances may share a volume, hence the id in its name."""
        if self.null_event_log is not None:
            return self.null_event_log
        if self.workspace_dir is not None and self.container_id is not None:
            return self.workspace_dir / f"nullworker-{self.container_id}.db"
        return Path("nullworker.db")

    @property
    def max_hold_seconds(self) -> float | None:
        """The cap on one whole hold in seconds; None: there is none."""
        if self.null_max_hold_seconds is None:
            return max(DAY, self.max_reservation_seconds)
        return self.null_max_hold_seconds or None

    @property
    def own_url(self) -> str:
        """The external port as the autoscaler knows it (vastai 1.9.1, server/lib/metrics.py, get_url)."""
        port = self.worker_port if self.vast_tcp_port is None else self.vast_tcp_port
        address = self.public_ipaddr
        host = f"[{address}]" if ":" in address and not address.startswith("[") else address  # RFC 3986, 3.2.2
        return f"http{'s' if self.use_ssl else ''}://{host}:{port}"


def _shown(setting: Field[Any], value: Any) -> str:
    """A setting's value, or the text given for it, without secrets."""
    if setting.name.endswith("_token") and value:
        return "***"
    if setting.metadata["kind"] in (_URL, _URLS, _SINK) and value:
        return repr(without_secrets(value) if isinstance(value, str) else tuple(map(without_secrets, value)))
    return repr(value)


def variable(name: str) -> str:
    """The environment variable of a field."""
    return "VAST_TCP_PORT_<WORKER_PORT>" if name == "vast_tcp_port" else name.upper()


def settings_line(in_force: Mapping[str, str | float | bool]) -> str:
    """`Settings.in_force()` as a person would write it: `UNSECURED=true NULL_MAX_QUEUED=5`."""
    texts = {name: str(value).lower() if isinstance(value, bool) else value for name, value in in_force.items()}
    return " ".join(f"{name}={text}" for name, text in texts.items()) or "the defaults"


def unknown_names(values: Mapping[str, str], own: Collection[str] = ()) -> dict[str, str | None]:
    """Variables that begin with NULL_ and that no command knows, each with the nearest known name, if there is one.

    `own`: the variables of the command that asks, which knows all that begin as they do.
    """
    others = tuple(each for each in OTHER_BEGINNINGS if not any(name.startswith(each) for name in own))
    known = {variable(setting.name) for setting in fields(Settings)} | OTHER_NAMES | set(own)
    known = {name for name in known if name.startswith("NULL_")}
    unknown = sorted(
        name for name in values if name.startswith("NULL_") and name not in known and not name.startswith(others)
    )
    return {name: _nearest(name, known) for name in unknown}


def _nearest(name: str, known: Set[str]) -> str | None:
    """A name that is cut short means one that begins with it: NULL_DRAIN is not NULL_SINK, though that is closer."""
    longer = {each for each in known if each.startswith(name)}
    return next(iter(difflib.get_close_matches(name, longer or known, n=1, cutoff=0 if longer else 0.6)), None)


def unknown_setting(name: str, nearest: str | None) -> str:
    """The warning for a variable that looks like a setting and is none."""
    return f"there is no setting {name}" + (f": is {nearest} meant?" if nearest else "; it changes nothing")


def read_settings(values: Mapping[str, str]) -> Settings:
    """The settings in a mapping of variables to texts, such as os.environ; an empty text counts as unset.

    Raises:
        BadSettings: naming the variable, the value and what is allowed.
    """
    read: dict[str, Any] = {}
    for setting in fields(Settings):
        name = variable(setting.name).replace("<WORKER_PORT>", str(read.get("worker_port", 3000)))
        text = values.get(name, "").strip()
        if not text:
            continue
        kind: Kind = setting.metadata["kind"]
        try:
            text.encode()
            read[setting.name] = kind.read(text)
        except UnicodeEncodeError:  # the environment has bytes that are not UTF-8, PEP 383
            raise BadSettings(f"{name}={_shown(setting, text)} is not allowed: it must be text in UTF-8") from None
        except (ValueError, OverflowError):
            raise BadSettings(f"{name}={_shown(setting, text)} is not allowed: it must be {kind.allowed}") from None
    settings = Settings(**read)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if settings.standalone and not settings.unsecured:
        raise BadSettings(
            "CONTAINER_ID is unset, so there is no autoscaler to take the signing key from: set CONTAINER_ID as "
            "Vast's template does, or UNSECURED=true to accept unsigned requests from whoever reaches WORKER_PORT"
        )
    if (settings.null_metrics_host is None) != (settings.null_metrics_port is None):
        unset = "NULL_METRICS_HOST" if settings.null_metrics_host is None else "NULL_METRICS_PORT"
        raise BadSettings(f"{unset} is unset, and the metrics port needs both: set it, or unset the other")
    if settings.null_sink_token and "@" in urlsplit(settings.null_sink or "").netloc:
        raise BadSettings("NULL_SINK has a user and NULL_SINK_TOKEN is set, and a request has room for one: unset one")
    ports = {
        "WORKER_PORT": settings.worker_port,
        "NULL_CONTROL_PORT": settings.null_control_port,
        "WORKER_HTTP_PORT": settings.worker_http_port,
    }
    for (name, port), (other, same) in itertools.combinations(ports.items(), 2):
        if port and port == same:
            raise BadSettings(f"{name}={port} and {other}={same} must differ: each is a port of its own")
