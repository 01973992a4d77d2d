"""Settings: environment and options, one-line errors for bad values, and --help."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from nullworker.cli import commands as cli
from nullworker.errors import BadSettings
from nullworker.settings import Settings, read_seconds, read_settings, unknown_names, variable, without_secrets

STANDALONE = {"UNSECURED": "true"}

#: For every setting that can be wrong: what is. The others take any text.
BAD: dict[str, tuple[str, ...]] = {
    "MAX_RESERVATION_SECONDS": ("0", "-1", "nan", "inf", "1w", "1e12"),
    "BACKEND_HEALTH_URL": ("/health", "localhost:8000/health", "ftp://example.com", "http://", "http://a b/"),
    "NULL_CONTROL_PORT": ("-1", "65536", "18999.5", "control"),
    "NULL_MAX_QUEUE_SECONDS": ("-0.1", "nan", "inf", "soon"),
    "NULL_MAX_QUEUED": ("-1", "1.5", "many"),
    "NULL_LOG_SYNC": ("off", "fast"),
    "NULL_LOG_KEEP": ("0", "d", "-1d", "1w", "1e9d", "nan"),
    "NULL_MAX_PERF": ("0", "-1", "nan", "inf", "fast"),
    "NULL_REPORT_PERF": ("both", "true"),
    "NULL_HEALTH_INTERVAL": ("0", "-1", "nan", "often"),
    "NULL_HEALTH_TIMEOUT": ("0", "-1", "inf", "long"),
    "NULL_HEALTH_FAILURES": ("0", "-1", "1.5", "few"),
    "NULL_UNHEALTHY_ACTION": ("restart", "1"),
    "NULL_MAX_HOLD_SECONDS": ("-1", "nan", "inf", "long"),
    "NULL_CONSUMER_GRACE_SECONDS": ("-1", "61", "nan", "short"),
    "NULL_ATTACH_TIMEOUT": ("0", "-1", "nan", "inf", "soon"),
    "NULL_DRAIN_SECONDS": ("-1", "nan", "inf", "5w"),
    "NULL_GRANT_URL": ("true", "strict"),
    "NULL_SINK": (
        "events",
        "ftp://127.0.0.1/",
        "http://fleet.example.com/",
        "http://8.8.8.8/",
        "http://[2606:4700::1]/",
    ),
    "NULL_SINK_FORMAT": ("json", "true"),
    "NULL_SINK_RESULTS": ("perhaps", "2"),
    "NULL_SINK_METADATA": ("perhaps", "-1"),
    "NULL_METRICS_PORT": ("-1", "65536", "web"),
    "NULL_LOG_FORMAT": ("xml", "text"),
    "NULL_LOG_LEVEL": ("loud", "10"),
    "CONTAINER_ID": ("-1", "C.123", "1.5"),
    "REPORT_ADDR": ("run.vast.ai", "https://run.vast.ai,nowhere", ","),
    "WORKER_PORT": ("-1", "65536", "http"),
    "WORKER_HTTP_PORT": ("-1", "70000", "http"),
    "VAST_TCP_PORT_3000": ("-1", "70000", "http"),
    "USE_SSL": ("maybe", "2"),
    "UNSECURED": ("maybe", "2"),
}
ANY_TEXT = {
    "NULL_EVENT_LOG",
    "NULL_METRICS_HOST",
    "NULL_METRICS_TOKEN",
    "NULL_SINK_TOKEN",
    "MASTER_TOKEN",
    "WORKSPACE_DIR",
    "PUBLIC_IPADDR",
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`nullworker serve` in this process, with an environment of its own: exit code, stdout, stderr."""

    def run(*arguments: str, **env: str) -> tuple[int, str, str]:
        monkeypatch.setattr("os.environ", dict(env))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", *arguments])
        code = ended.value.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return run


def test_every_setting_is_in_the_table_or_takes_any_text() -> None:
    names = {variable(field.name).replace("<WORKER_PORT>", "3000") for field in dataclasses.fields(Settings)}
    assert names == set(BAD) | ANY_TEXT


@pytest.mark.parametrize("name", BAD)
def test_a_bad_value_is_one_line_with_the_variable_the_value_and_what_is_allowed(run: Run, name: str) -> None:
    for value in BAD[name]:
        code, out, err = run(**{**STANDALONE, name: value})
        assert (code, out) == (2, "")
        assert err.startswith(f"nullworker: {name}={value!r} is not allowed: it must be ")
        assert err.count("\n") == 1


def test_a_bad_option_is_the_same_line(run: Run) -> None:
    code, _, err = run("--max-perf", "fast", **STANDALONE)
    assert code == 2
    assert (
        err == "nullworker: NULL_MAX_PERF='fast' is not allowed: it must be a number above 0 and at most 1000000000\n"
    )


def test_an_option_wins_over_the_variable(run: Run) -> None:
    assert run("--drain-seconds", "x", NULL_DRAIN_SECONDS="y", **STANDALONE)[2].startswith(
        "nullworker: NULL_DRAIN_SECONDS='x' "
    )


def test_an_option_that_there_is_not_is_wrong_use(run: Run) -> None:
    code, _, err = run("--drain", "5", **STANDALONE)
    assert code == 2
    assert err.count("\n") == 1
    assert "--drain" in err
    assert "--help" in err


def test_without_a_container_id_both_ways_out_are_named(run: Run) -> None:
    code, out, err = run()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "CONTAINER_ID" in err
    assert "UNSECURED=true" in err


def test_help_lists_every_setting_with_its_variable(run: Run) -> None:
    code, out, err = run("--help")
    words = " ".join(out.split())
    assert (code, err) == (0, "")
    for field in dataclasses.fields(Settings):
        assert f"env: {variable(field.name)}; default: " in words, field.name
        assert field.metadata["help"] in words, field.name


def test_a_metrics_host_without_a_port_is_refused(run: Run) -> None:
    assert "NULL_METRICS_PORT is unset" in run(NULL_METRICS_HOST="0.0.0.0", **STANDALONE)[2]
    assert "NULL_METRICS_HOST is unset" in run(NULL_METRICS_PORT="9100", **STANDALONE)[2]


@pytest.mark.parametrize("name", ["WORKER_PORT", "WORKER_HTTP_PORT"])
def test_two_settings_with_the_same_port_are_refused(run: Run, name: str) -> None:
    code, _, err = run(**{name: "18999"}, **STANDALONE)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{name}=18999" in err
    assert "None" not in err


def test_a_secret_is_in_no_text_about_settings() -> None:
    settings = read_settings({**STANDALONE, "MASTER_TOKEN": "hush", "NULL_METRICS_TOKEN": "hush"})
    assert "hush" not in repr(settings)


def test_the_defaults_are_those_of_the_documentation() -> None:
    settings = read_settings({"CONTAINER_ID": "7", "WORKSPACE_DIR": "/workspace"})
    assert settings.event_log == Path("/workspace/nullworker-7.db")
    assert (settings.max_reservation_seconds, settings.backend_health_url) == (3600, None)
    assert (settings.null_control_port, settings.worker_port, settings.worker_http_port) == (18999, 3000, None)
    assert (settings.null_max_queue_seconds, settings.null_max_queued, settings.null_max_perf) == (30, 1000, 100)
    assert (settings.null_health_interval, settings.null_health_timeout, settings.null_health_failures) == (10, 10, 1)
    assert (settings.null_unhealthy_action, settings.null_grant_url, settings.null_log_sync) == (
        "report",
        "warn",
        "full",
    )
    assert (settings.null_drain_seconds, settings.null_log_format, settings.null_log_level) == (5, "console", "info")
    assert (settings.report_addr, settings.use_ssl, settings.unsecured) == (("https://run.vast.ai",), False, False)
    assert read_settings(STANDALONE).event_log == Path("nullworker.db")


def test_an_empty_variable_is_one_that_is_not_set() -> None:
    names = [variable(field.name) for field in dataclasses.fields(Settings)]
    assert read_settings({**dict.fromkeys(names, " "), **STANDALONE}) == read_settings(STANDALONE)


@pytest.mark.parametrize(
    ("env", "url"),
    [
        ({}, "http://127.0.0.1:3000"),
        ({"PUBLIC_IPADDR": "1.2.3.4", "VAST_TCP_PORT_3000": "40123"}, "http://1.2.3.4:40123"),
        ({"WORKER_PORT": "3100", "VAST_TCP_PORT_3000": "1", "VAST_TCP_PORT_3100": "2"}, "http://127.0.0.1:2"),
        ({"USE_SSL": "true"}, "https://127.0.0.1:3000"),
        ({"PUBLIC_IPADDR": "2001:db8::7", "USE_SSL": "true"}, "https://[2001:db8::7]:3000"),
        ({"PUBLIC_IPADDR": "[2001:db8::7]"}, "http://[2001:db8::7]:3000"),
    ],
)
def test_its_url_is_made_of_what_vasts_template_sets(env: dict[str, str], url: str) -> None:
    assert read_settings({**STANDALONE, **env}).own_url == url


def test_report_addr_is_a_list_without_the_old_api() -> None:
    text = "https://cloud.vast.ai/api/v0, https://a.example/,https://b.example"
    assert read_settings({**STANDALONE, "REPORT_ADDR": text}).report_addr == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://127.0.0.1:8000/health", "http://127.0.0.1:8000/health"),
        ("https://user:SECRET@host.example:1/a", "https://***@host.example:1/a"),
        ("https://SECRET@host.example/a?b=SECRET#SECRET", "https://***@host.example/a?***"),
        ("http://[2001:db8::1]:8000/?SECRET", "http://[2001:db8::1]:8000/?***"),
        ("http://user:SEC/RET@host.example/", "http://***@host.example/"),
        ("user:SECRET@host.example/", "***@host.example/"),
        ("ftp://user:SECRET@host.example/?SECRET", "ftp://***@host.example/?***"),
        ("http://user:SEC?RET@host.example/", "http://***@host.example/"),
    ],
)
def test_a_url_is_shown_without_what_may_be_a_password(run: Run, url: str, shown: str) -> None:
    assert without_secrets(url) == shown
    for name in ("BACKEND_HEALTH_URL", "REPORT_ADDR"):
        code, _, err = run(**STANDALONE, **{name: f"{url} x"})
        assert (code, "SECRET" in err, "RET@" in err) == (2, False, False), err
    if url.startswith("http") and "SEC/" not in url and "SEC?" not in url:
        settings = read_settings({**STANDALONE, "REPORT_ADDR": f"http://a,{url}", "BACKEND_HEALTH_URL": url})
        assert "SECRET" not in repr(settings)
        assert settings.backend_health_url == url


@pytest.mark.parametrize("name", [*sorted(ANY_TEXT), "REPORT_ADDR", "NULL_CONTROL_PORT"])
def test_a_value_that_is_not_utf_8_is_refused(run: Run, name: str) -> None:
    code, out, err = run(**STANDALONE, **{name: os.fsdecode(b"/a\xffb")})
    assert (code, out) == (2, "")
    assert err.startswith(f"nullworker: {name}=")
    assert "UTF-8" in err


# -- what is in force --------------------------------------------------------------------------------------------------


def test_the_settings_in_force_are_those_that_are_not_the_default_without_secrets() -> None:
    environ = {
        **STANDALONE,
        "NULL_DRAIN_SECONDS": "5",
        "NULL_HEALTH_INTERVAL": "2.50",
        "NULL_METRICS_HOST": "0.0.0.0",
        "NULL_METRICS_PORT": "9100",
        "NULL_METRICS_TOKEN": "SECRET",
        "MASTER_TOKEN": "SECRET",
        "BACKEND_HEALTH_URL": "http://user:SECRET@localhost:8000/health?key=SECRET",
        "REPORT_ADDR": "http://SECRET@a.example,https://b.example",
        "WORKER_PORT": "3100",
        "VAST_TCP_PORT_3100": "41234",
        "NULL_EVENT_LOG": "log.db",
    }
    in_force = read_settings(environ).in_force()
    assert "SECRET" not in str(in_force)
    assert in_force == {
        "NULL_HEALTH_INTERVAL": 2.5,
        "NULL_METRICS_HOST": "0.0.0.0",
        "NULL_METRICS_PORT": 9100,
        "NULL_METRICS_TOKEN": "***",
        "MASTER_TOKEN": "***",
        "BACKEND_HEALTH_URL": "http://***@localhost:8000/health?***",
        "REPORT_ADDR": "http://***@a.example,https://b.example",
        "WORKER_PORT": 3100,
        "VAST_TCP_PORT_3100": 41234,
        "NULL_EVENT_LOG": "log.db",
        "UNSECURED": True,
    }
    assert read_settings({"UNSECURED": "true"}).in_force() == {"UNSECURED": True}


def test_a_variable_that_looks_like_a_setting_and_is_none_is_found_with_the_nearest_that_is() -> None:
    environ = {"NULL_DRAIN_SECOND": "3", "NULL_QUE": "redis://", "NULL_AND_VOID": "", "NULLWORKER_X": "1", "HOME": "/"}
    environ |= {"NULL_DRAIN": "3", "NULL_METRICS": "9100"}
    assert unknown_names(environ) == {
        "NULL_AND_VOID": None,
        "NULL_DRAIN": "NULL_DRAIN_SECONDS",
        "NULL_DRAIN_SECOND": "NULL_DRAIN_SECONDS",
        "NULL_METRICS": "NULL_METRICS_PORT",
        "NULL_QUE": "NULL_QUEUE",
    }


def test_a_command_knows_every_variable_that_begins_as_its_own() -> None:
    environ = {"NULL_DISPATCH_MXA": "1", "NULL_DISPATCH_MAX": "1", "NULL_COLLECT_X": "1", "NULL_SINC": "1"}
    assert unknown_names(environ) == {"NULL_SINC": "NULL_SINK"}
    own = {"NULL_DISPATCH_MAX", "NULL_DISPATCH_MIN"}
    assert unknown_names(environ, own) == {"NULL_DISPATCH_MXA": "NULL_DISPATCH_MAX", "NULL_SINC": "NULL_SINK"}


def test_no_variable_of_any_command_is_taken_for_a_mistake() -> None:
    context = click.Context(cli.cli)
    commands = [command for name in cli.COMMANDS if (command := cli.cli.get_command(context, name))]
    options = [option.envvar for command in commands for option in command.params if option.envvar]
    names = {name for each in options for name in ([each] if isinstance(each, str) else each)}
    used = names | {variable(field.name) for field in dataclasses.fields(Settings)}
    assert len(commands) == len(cli.COMMANDS)
    assert "NULL_CONTROL_PORT" in names
    assert unknown_names(dict.fromkeys(used, "1")) == {}


@pytest.mark.parametrize(
    "url",
    [
        "https://fleet.example.com/events",
        "http://127.0.0.1:18997/e",
        "http://localhost/",
        "http://10.1.2.3/",
        "http://[::1]/",
    ],
)
def test_a_sink_is_https_or_near(url: str) -> None:
    assert read_settings({**STANDALONE, "NULL_SINK": url}).null_sink == url


@pytest.mark.parametrize("name", ["NULL_SINK_TOKEN", "NULL_METRICS_TOKEN"])
def test_a_token_is_one_line_and_is_not_shown(name: str) -> None:
    with pytest.raises(
        BadSettings, match=f"{name}=.* is not allowed: it must be printable text in one line"
    ) as refusal:
        read_settings({**STANDALONE, name: "passw0rd\nof two lines"})
    assert "passw0rd" not in str(refusal.value)


def test_a_sink_takes_one_kind_of_credentials() -> None:
    with pytest.raises(BadSettings, match="unset one") as refusal:
        read_settings({**STANDALONE, "NULL_SINK": "https://user:passw0rd@example.com", "NULL_SINK_TOKEN": "t0ken"})
    assert "passw0rd" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("0", 0), ("1.5", 1.5), ("15m", 900), ("6h", 21_600), ("2s", 2), ("30d", 2_592_000)],
)
def test_seconds_are_a_number_or_have_a_unit(text: str, seconds: float) -> None:
    assert read_seconds(text) == seconds
    if 0 < seconds <= 86_400:
        read = read_settings({"UNSECURED": "true", "MAX_RESERVATION_SECONDS": text, "NULL_DRAIN_SECONDS": text})
        assert (read.max_reservation_seconds, read.null_drain_seconds) == (seconds, seconds)


@pytest.mark.parametrize("text", ["", "m", "-1", "nan", "inf", "1w", "1e9d", "6 hours", "½h"])
def test_what_is_no_seconds(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # float's own words
        read_seconds(text)
