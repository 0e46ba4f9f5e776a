"""Processes that end in time and lose nothing: how `benchmarks/gpu_check.py` runs what may hang, crash or be
cut off.

A process `tell`s what it begins and what came of it, line by line, in a file of its own. So whatever ends it,
what it had found is there, and what it was at is known; and one that dies of a GPU's fault, after which CUDA
answers nothing more, is started again and goes on behind it. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
END = 3.0  # seconds between SIGTERM and SIGKILL
FAULT = 70  # exit code of a process whose device answers no more
# Lines that say what went wrong, in what Python, pytest, compilers and faulthandler print.
TELLING = re.compile(r"(E +)?[\w.]*(Error|Exception)\b|Fatal Python error|Timeout \(|(\S+: )?error: ")
# What PyTorch adds to every error of CUDA's.
NOISE = ("CUDA kernel errors might", "For debugging consider", "Compile with `TORCH_USE", "Search for `")


@dataclass(frozen=True)
class Command:
    """One process, as a part of the check wants it."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    told: Path | None = None  # the file in which it tells what it does
    again: bool = False  # started anew where it dies, as long as it gets further each time


@dataclass
class Outcome:
    """`code` is None where the time was over; a process that there was no time for was never `started`."""

    name: str
    code: int | None
    output: str = ""
    told: list[dict[str, Any]] = field(default_factory=list)
    started: bool = True

    def died_in(self) -> list[str]:
        """What it began and did not end, and is not cut off in: its process died of that."""
        return self._open()[:-1] if self.code is None else self._open()

    def cut_in(self) -> str:
        """What it was at when the time was over."""
        return "".join(self._open()[-1:]) if self.code is None else ""

    def _open(self) -> list[str]:
        ended = {line["ended"] for line in self.told if "ended" in line}
        return [line["begun"] for line in self.told if "begun" in line and line["begun"] not in ended]

    def last(self, key: str) -> Any:
        """What it told last of `key`; None where nothing."""
        return next((line[key] for line in reversed(self.told) if key in line), None)


def tell(file: Path | None, **what: Any) -> None:
    """One line, complete at once; nowhere without a file."""
    if file is not None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(what) + "\n")


def told(file: Path | None) -> list[dict[str, Any]]:
    """The lines so far, but for one that a kill cut in two."""
    found = []
    for line in file.read_text("utf-8", "replace").splitlines() if file and file.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def useful_line(output: str) -> str:
    """The line that says what went wrong: the last error's, else the last one at all."""
    lines = [line.strip() for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith(NOISE)]
    errors = [line for line in lines if TELLING.match(line)]
    return (errors or lines or [""])[-1].removeprefix("E ").strip()[:300]


def answers() -> bool:
    """Whether CUDA still does: after a kernel's fault every call of the process raises. Of a process that has
    imported PyTorch anyway."""
    import torch

    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Interrupt:
    """SIGINT, SIGTERM and SIGHUP, noted instead of obeyed: `run` ends its processes, then its caller ends."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> Interrupt:
        heard = [number for number in self.SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup
        self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.number != 0

    def _note(self, number: int, _: object) -> None:
        self.number = self.number or number


class _Running:
    """A process, with all that it started as one group, and its output so far."""

    def __init__(self, command: Command, environment: Mapping[str, str]) -> None:
        self.command, self.environment = command, {**environment, **command.environment}
        self.log: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (see outcome)
        self.start()

    def start(self) -> None:
        self.known = len(told(self.command.told))
        self.error = ""
        try:
            self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                self.command.arguments, cwd=ROOT, env=self.environment,
                stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.process, self.error = None, str(error)

    def code(self) -> int | None:
        """None while it runs; 127, a shell's, where there is no such program."""
        return 127 if self.process is None else self.process.poll()

    def signal(self, number: int) -> None:
        """To the whole group, which may outlive its leader."""
        if self.process is not None:
            try:
                os.killpg(self.process.pid, number)
            except (ProcessLookupError, PermissionError):
                return

    def gets_further(self) -> bool:
        return any("begun" in line for line in told(self.command.told)[self.known :])

    def outcome(self, code: int | None) -> Outcome:
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        self.log.seek(0)
        with self.log:
            return Outcome(self.command.name, code, self.log.read() + self.error, told(self.command.told))


def run(
    commands: Sequence[Command],
    until: float,
    environment: Mapping[str, str],
    at_once: int = 1,
    interrupted: Callable[[], object] = bool,
) -> list[Outcome]:
    """Run the processes, `at_once` at a time. At `until` (of time.monotonic(), which all processes of a
    system share), or once `interrupted()`, all have ended: END seconds before they get SIGTERM."""
    waiting, running, outcomes = list(commands), list[_Running](), list[Outcome]()
    try:
        while (waiting or running) and time.monotonic() < until - END and not interrupted():
            while waiting and len(running) < at_once:
                running.append(_Running(waiting.pop(0), environment))
            time.sleep(0.02)
            for one in [one for one in running if one.code() is not None]:
                if one.code() != 0 and one.command.again and one.gets_further():
                    one.signal(signal.SIGKILL)  # what it left behind
                    one.start()
                    continue
                running.remove(one)
                outcomes.append(one.outcome(one.code()))
    finally:
        for one in running:
            one.signal(signal.SIGTERM)
        patience = time.monotonic() + END
        while time.monotonic() < patience and any(one.code() is None for one in running):
            time.sleep(0.02)
        outcomes += [one.outcome(None) for one in running]
    return outcomes + [Outcome(command.name, None, started=False) for command in waiting]
