"""`make gpu-check`, or `python3 benchmarks/gpu_check.py`: what a real GPU has to be asked, within minutes.

build        the C++ extension, in place
correctness  tests/rskernels/triton on the device, every kernel against its reference; a pass of all operators
sanitizer    compute-sanitizer (memory, races) over that pass
aot          registers, shared memory and spills of the shipped configurations, on their first examples
tune         better configurations for this chip; later parts use what was found
benchmark    every operator against its peers
models       the three methods whole: images per second, share of the measured matrix peak

Each part is processes of its own with a time budget; what a part leaves over is the next one's. Results go
to `--output`: GPU.json (with charts where matplotlib is installed), GPU-tuned.json, GPU-check.json with the
status of every part, logs of what failed. The exit code is 0 only where correctness passed with these
sources. Parts can be run one at a time, and again: benchmarks go on where they stopped. Ctrl-C and SIGTERM
keep what was found.

--dry-run does the same on the CPU, small: kernels in Triton's interpreter, tiny models, no sanitizer. It
shows that the check is ready for a GPU. It needs torch, Triton, timm, numpy, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

# Beside this file, and not of the package, which imports PyTorch: this process is to say what is missing.
sys.path.append(str(Path(__file__).parent))
from gpu_plan import CHARTS, PARTS, QUESTION, Check, digest
from gpu_processes import ROOT, Command, Interrupt, Outcome, run, useful_line

KERNELS = ("rskernels",)  # the sources that tuned configurations belong to


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"gpu-check: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all, in order)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder (default: benchmarks/results; build/gpu-check if dry)"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small: is the check ready?")
    parser.add_argument("--scale", type=float, default=1.0, help="of the time budgets (default: 1)")
    options = parser.parse_args(argv)
    if not (math.isfinite(options.scale) and options.scale > 0):
        parser.error(f"--scale {options.scale}: expected a number above 0")
    usual = ROOT / ("build/gpu-check" if options.dry_run else "benchmarks/results")
    output = (options.output or usual).resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        parser.error(f"--output {output}: {error.strerror}")
    parts = [part for part in PARTS if part in options.parts]
    with tempfile.TemporaryDirectory() as scratch, Interrupt() as interrupt:
        checking = Checking(Check(options.dry_run, output, Path(scratch)), options.scale, interrupt)
        code = checking.everything(parts)
    if interrupt:
        name = signal.Signals(interrupt.number).name
        print(f"gpu-check: ended by {name}; what was found until then is in {output}", file=sys.stderr)
        return 128 + interrupt.number
    return code


@dataclass
class Checking:
    """One run of the check."""

    check: Check
    scale: float
    interrupt: Interrupt
    started: float = field(default_factory=time.monotonic)
    about: dict[str, Any] = field(default_factory=dict)

    def everything(self, parts: Sequence[str]) -> int:
        self.check = replace(self.check, until=self.started)
        if not self._asks_the_machine():
            return 1
        path = self.check.output / f"{self.check.name}-check.json"
        summary = self._summary(path)
        self._takes_over_what_was_tuned()
        for part in parts:
            if self.interrupt:
                break
            self._grant(PARTS[part].seconds)
            left = self.check.until - time.monotonic()
            print(f"gpu-check: {part}, at most {left:.0f} s ...", flush=True)
            summary["parts"][part] = verdict = self._part(part)
            _write(path, json.dumps(summary, indent=1) + "\n")
            if verdict.get("note"):
                print(f"gpu-check: {verdict['note']}", flush=True)
            found = {**verdict.get("failed", {}), **verdict.get("cut_off", {})}
            said = "; ".join(f"{name}: {line}" for name, line in list(found.items())[:3])
            print(f"gpu-check: {part} {verdict['status']} ({verdict['seconds']:.0f} s) {said}", flush=True)
        if {"benchmark", "models"} & set(parts) and not self.interrupt:
            results = ("--results", str(self.check.results))
            self._grant(CHARTS)
            charts = self.check.measuring("charts", self.check.told("charts"), *results)
            self._run([Command("charts", charts)])
        print(f"gpu-check: {time.monotonic() - self.started:.0f} s in all; {path}", flush=True)
        passed = summary["parts"].get("correctness", {}).get("status") == "passed"
        if not passed and not self.interrupt:
            print("gpu-check: the kernels have not passed the tests", file=sys.stderr)
        return 0 if passed else 1

    def _grant(self, seconds: float) -> None:
        """So many seconds more; what was left over until here stays."""
        self.check = replace(self.check, until=self.check.until + seconds * self.scale)

    def _run(self, commands: Sequence[Command], at_once: int = 1) -> list[Outcome]:
        return run(commands, self.check.until, environment(self.check), at_once, lambda: self.interrupt)

    def _asks_the_machine(self) -> bool:
        told = self.check.told("machine")
        self._grant(QUESTION)
        command = Command("machine", self.check.measuring("machine", told), told=told)
        (asked,) = self._run([command])
        self.about = asked.last("machine") or {}
        if asked.code != 0 or not self.about:
            if not self.interrupt:
                reason = useful_line(asked.output).removeprefix("error: ") or "no answer in time"
                print(f"gpu-check: {reason}; --dry-run shows what would be done", file=sys.stderr)
            return False
        if not self.check.dry:
            known = {name: self.about[name] for name in ("name", "capability", "chip")}
            self.check = replace(self.check, **known)
        return True

    def _part(self, name: str) -> dict[str, Any]:
        part, begun = PARTS[name], time.monotonic()
        sources = digest(part.sources)
        for log in self.check.output.glob(f"logs/{self.check.name}-{name}-*.txt"):
            log.unlink()  # of another time
        outcomes = self._run(part.commands(self.check), part.at_once())
        verdict = part.verdict(self.check, outcomes)
        for one in outcomes:
            if one.started and (one.code != 0 or any(line.get("problem") for line in one.told)):
                _write(self.check.output / "logs" / f"{self.check.name}-{name}-{one.name}.txt", one.output)
        if name == "tune":
            self._keeps_what_was_tuned()
        seconds = {"seconds": round(time.monotonic() - begun, 1), "budget": part.seconds * self.scale}
        return verdict | seconds | {"sources": sources}

    def _summary(self, path: Path) -> dict[str, Any]:
        """The file with what it has of this chip, these versions and these sources."""
        identity = self.about["identity"]
        summary: dict[str, Any] = {"dry_run": self.check.dry, "machine": self.about["machine"]}
        summary |= {"identity": identity, "parts": {}}
        before = _readable(path)
        if before is None:
            return summary
        parts = before.get("parts")
        if not isinstance(parts, dict) or not all(isinstance(verdict, dict) for verdict in parts.values()):
            _set_aside(path, "not a summary of this check")
        elif before.get("identity") != identity:
            _drop(path, parts, f"another chip or other versions: {before.get('identity')}")
        else:
            kept = {
                name: verdict
                for name, verdict in parts.items()
                if name in PARTS and verdict.get("sources") == digest(PARTS[name].sources)
            }
            _drop(path, sorted(set(parts) - set(kept)), "other sources")
            summary["parts"] = kept
        return summary

    @property
    def _tuned(self) -> Path:
        return self.check.output / f"{self.check.name}-tuned.json"

    def _belongs_to(self) -> dict[str, str]:
        return {"triton": self.about["identity"]["triton"], "sources": digest(KERNELS)}

    def _takes_over_what_was_tuned(self) -> None:
        """Of an earlier run, where parts are run one at a time."""
        kept = _readable(self._tuned)
        if kept is None:
            return
        measured_with = kept.get("measured_with")
        if not isinstance(measured_with, dict) or not self._belongs_to().items() <= measured_with.items():
            _set_aside(self._tuned, "of another Triton or other sources")
            return
        self.check.tuned.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._tuned, self.check.tuned)

    def _keeps_what_was_tuned(self) -> None:
        found = _readable(self.check.tuned)
        if found is not None:
            found["measured_with"] = {**found.get("measured_with", {}), **self._belongs_to()}
            _write(self._tuned, json.dumps(found, indent=1) + "\n")


def environment(check: Check) -> dict[str, str]:
    """Ours without switches that would change what is measured, and with a cache of this run's."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("RSKERNELS_", "TRITON_INT"))
    }
    path = os.pathsep.join([str(ROOT), *([kept["PYTHONPATH"]] if kept.get("PYTHONPATH") else [])])
    fonts = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "matplotlib"
    own = {"XDG_CACHE_HOME": str(check.scratch), "MPLCONFIGDIR": os.environ.get("MPLCONFIGDIR", str(fonts))}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if check.dry else {}
    # Without it cuBLAS refuses deterministic products, in which the tests run.
    own["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    seen = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return kept | seen | own | hidden


def _readable(path: Path) -> dict[str, Any] | None:
    """A JSON file's content; None where there is none, and a damaged one is set aside."""
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        _set_aside(path, str(error))
        return None
    if not isinstance(found, dict):
        _set_aside(path, "not an object")
        return None
    return found


def _set_aside(path: Path, reason: str) -> None:
    aside = path.with_name(f"{path.name}.old")
    path.replace(aside)
    print(f"gpu-check: {path} is set aside as {aside.name}: {reason}", flush=True)


def _drop(path: Path, parts: Iterable[str], reason: str) -> None:
    if names := ", ".join(parts):
        print(f"gpu-check: {path.name}: dropped what it has of {names}, of {reason}", flush=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
