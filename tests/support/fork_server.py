"""Runs Python programs in forks of itself, for forks.py: see there for why.

It reads requests from the socket on its stdin until that is closed. A request is a JSON object, {"command": [...],
"cwd": path, "env": {...}, "ignored": [signal, ...]}, with three descriptors: the program's stdout, its stderr, and a
pipe that gets two lines: its pid, and when it has ended its exit code (-9: by SIGKILL).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any, Final

from nullworker.cli.commands import COMMANDS

ROOT: Final = Path(__file__).parents[2]
#: What is imported before the first program.
COMMON: Final = ("nullworker.worker", "nullworker.cli.work")
LIBRARIES: Final = {"redis": "redis.asyncio", "nats": "nats", "rabbitmq": "aio_pika", "sqs": "boto3"}
#: What is imported before the first program with that word in its command, beside the module of that command.
BY_WORD: Final = {
    "dispatch": ("nullworker.dispatch.server", "vastai"),
    "--endpoint": ("vastai",),
    str(Path(sys.executable).with_name("vastai")): ("vastai.cli.main",),
    "workers.null.client": ("nullworker.cli.reserve", "vastai"),
    **{str(ROOT / "examples" / name / "consumer.py"): (library,) for name, library in LIBRARIES.items()},
}


def main() -> None:
    """Until the socket is closed; or, in a fork, until its program has ended."""
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: who reads the requests decides
    _import(*COMMON)
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            return
        request = json.loads(message)
        for word in request["command"]:
            _import(*([COMMANDS[word][1].partition(":")[0]] if word in COMMANDS else []), *BY_WORD.get(word, ()))
        if os.fork() == 0:
            requests.close()
            _watch(request, *descriptors)
            return
        for descriptor in descriptors:
            os.close(descriptor)
        with contextlib.suppress(ChildProcessError):  # those that have waited for a program
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _import(*names: str) -> None:
    if all(name in sys.modules for name in names):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            importlib.import_module(name)
    gc.freeze()  # so that collections in the forks touch none of it, and its memory stays shared


def _watch(request: Any, out: int, err: int, told: int) -> None:
    """Start the program, and say how it ends; returns in the program when it has ended."""
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _run(request, out, err)
        return
    os.close(out)
    os.close(err)
    os.write(told, b"%d\n" % pid)
    _, status = os.waitpid(pid, 0)
    os.write(told, b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _run(request: Any, out: int, err: int) -> None:
    """Be the program."""
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in signal.valid_signals():  # nohup may have started this process, and not be what a test is about
        if number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        elif signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    _, *words = request["command"]
    sys.warnoptions[:] = [words[1]] if words[0] == "-W" else os.environ.get("PYTHONWARNINGS", "").split(",")
    for action in filter(None, sys.warnoptions):
        warnings.simplefilter(action)
    words = words[2:] if words[0] == "-W" else words
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(words[1], vars(sys.modules["__main__"]))
    else:
        sys.argv = words
        sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main()
