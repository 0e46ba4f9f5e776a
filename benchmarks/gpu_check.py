"""`make gpu-check`, or `python3 benchmarks/gpu_check.py`: what a real GPU has to be asked, within minutes.

build        the C++ extension, in place
correctness  tests/rskernels/triton on the device, every kernel against its reference; a pass of all operators
sanitizer    compute-sanitizer (memory, races) over that pass
aot          registers, shared memory and spills of the shipped configurations, on their first examples
tune         better configurations for this chip; later parts use what was found
benchmark    every operator against its peers
models       the three methods whole: images per second, share of the measured matrix peak

Each part is processes of its own with a time budget. Results go to `--output`: GPU.json (with charts where
matplotlib is installed), GPU-tuned.json, GPU-check.json with the status of every part, logs of what failed.
The exit code is 0 only where correctness passed. Parts can be run one at a time.

--dry-run does the same on the CPU, small: kernels in Triton's interpreter, tiny models, no sanitizer. It
shows that the check is ready for a GPU. It needs torch, Triton, timm, numpy, pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
# Seconds of each part, in the order they run; together less than nine minutes.
PARTS = {
    "build": 80,
    "correctness": 150,
    "sanitizer": 60,
    "aot": 40,
    "tune": 60,
    "benchmark": 75,
    "models": 60,
}
GRACE = 12  # of a part's seconds, for what its last case may take longer
FEW = 2  # tests of a file in a dry run: the interpreter is slow
EXAMPLES = {True: 1, False: 3}  # of an operator that are compiled, in a dry run or not
REFUSED = ("Device not supported", "not supported on this", "Operation not permitted", "Unable to find")


@dataclass(frozen=True)
class Command:
    """One process of a part; those of a part run side by side, `at_once` of them."""

    name: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """`code` is None where the time was over."""

    name: str
    code: int | None
    output: str

    def last_json(self) -> dict[str, Any]:
        for line in reversed(self.output.splitlines()):
            if line.startswith("{"):
                try:
                    found = json.loads(line)
                except ValueError:
                    continue
                return found if isinstance(found, dict) else {}
        return {}

    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1][:300] if lines else ""


def module(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


@dataclass(frozen=True)
class Check:
    """What is to be done, and where; `scratch` is a folder of this run."""

    dry: bool
    output: Path
    scratch: Path
    name: str = "dry-run"
    capability: int = 90
    chip: int = 90  # whose configurations serve it

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def results(self) -> Path:
        return self.output / f"{self.name}.json"

    @property
    def tuned(self) -> Path:
        """Where the tuner writes, and later parts read."""
        return self.scratch / "rskernels" / f"tuning.sm{self.capability}.json"

    def part(self, *arguments: str) -> tuple[str, ...]:
        return module("benchmarks.gpu_parts", *arguments, "--device", self.device)

    def commands(self, part: str, seconds: float) -> list[Command]:
        """The processes of `part`, given `seconds`; none where there is nothing to do."""
        inner = ("--seconds", str(max(1, round(seconds - GRACE))))
        if part == "build":
            if self.dry:
                return [Command("explain", module("rskernels", "explain"))]
            build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
            return [
                Command("build", build, {"RSKERNELS_REQUIRE_EXT": "1", "MAX_JOBS": str(os.cpu_count() or 1)})
            ]
        if part == "correctness":
            files = sorted((ROOT / "tests/rskernels/triton").glob("test_*.py"))
            through_dispatch = [] if self.dry else [Command("pass", self.part("pass"))]
            return [*map(self._tests, files), *through_dispatch]
        if part == "sanitizer":
            if self.dry:  # the pass alone
                return [Command("pass", self.part("pass"))]
            return [self._sanitizer("memcheck"), self._sanitizer("racecheck")]
        if part == "aot":
            return [self._aot(operator) for operator in operators()]
        if part == "tune":
            return [Command("tune", self.part("tune", *inner))]
        switches = {"TORCHDYNAMO_DISABLE": "1"} if self.dry else {}  # compiling takes minutes there
        return [Command(part, self.part(part, *inner, "--results", str(self.results)), switches)]

    def _tests(self, file: Path) -> Command:
        chosen = [str(file.relative_to(ROOT))]
        if self.dry:
            tests = [
                node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)
            ]
            chosen = [f"{chosen[0]}::{name}" for name in tests if name.startswith("test_")][:FEW]
        report = self.scratch / f"{file.stem}.xml"
        # Not pyproject's filters of warnings: one names a class of rasterio's, which is not needed here.
        options = ("-q", "-o", "filterwarnings=", "-p", "no:cacheprovider", f"--junitxml={report}")
        interpreted = {"TRITON_INTERPRET": "1"} if self.dry else {}
        return Command(file.stem, module("pytest", *chosen, *options), interpreted)

    def _sanitizer(self, tool: str) -> Command:
        options = ["--tool", tool, "--error-exitcode", "86"]
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        # Its own allocator would hide what is read beyond a tensor.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Command(tool, ("compute-sanitizer", *options, *self.part("pass")), uncached)

    def _aot(self, operator: str) -> Command:
        which = ("--chips", str(self.chip), "--operators", operator, "--examples", str(EXAMPLES[self.dry]))
        table = ("--output", str(self.scratch / f"{operator}.aot.json"))
        command = module("rskernels.triton.aot", *which, *table)
        return Command(operator, command)

    def verdict(self, part: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Status of a part ("passed", "failed", "skipped", "cut off") and what it found."""
        if not outcomes:
            return {"status": "skipped", "reason": "there is nothing to run"}
        failed = {one.name: one.last_line() for one in outcomes if one.code not in (0, None)}
        late = [one.name for one in outcomes if one.code is None]
        status = "failed" if failed else "cut off" if late else "passed"
        found: dict[str, Any] = {"status": status}
        found |= ({"failed": failed} if failed else {}) | ({"cut_off": late} if late else {})
        if part == "correctness":
            found["tests"] = self._counts(outcomes)
            if status == "passed" and not found["tests"]["passed"]:
                found["status"] = "failed"
        elif part == "sanitizer" and not self.dry:
            return _sanitizers_verdict(found, outcomes)
        elif part == "aot":
            tables = [self.scratch / f"{one.name}.aot.json" for one in outcomes]
            found["kernels"] = [
                row for file in tables if file.exists() for row in json.loads(file.read_text())["rows"]
            ]
        elif part != "build":
            found |= {one.name: one.last_json() for one in outcomes}
            if found.get(part, {}).get("not_reported"):
                found["status"] = "failed"
        return found

    def _counts(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
        for one in outcomes:
            file = self.scratch / f"{one.name}.xml"
            for suite in ElementTree.parse(file).iter("testsuite") if file.exists() else ():
                for name in counts:
                    counts[name] += int(suite.get(name, 0))
        bad = counts["failures"] + counts["errors"]
        return {
            "passed": counts["tests"] - bad - counts["skipped"],
            "failed": bad,
            "skipped": counts["skipped"],
        }


def _sanitizers_verdict(found: dict[str, Any], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """A checker that is missing, or that the machine refuses, is a skip and says so."""
    skipped = {}
    for one in outcomes:
        refusal = next(
            (line for line in one.output.splitlines() if any(text in line for text in REFUSED)), ""
        )
        if one.code not in (0, None) and (refusal or one.code == 127):
            skipped[one.name] = refusal.strip("= ")[:200] or "compute-sanitizer is not installed"
            found.get("failed", {}).pop(one.name, None)
    if not skipped:
        return found
    status = "failed" if found.get("failed") else "cut off" if "cut_off" in found else "skipped"
    if status == "skipped" and len(skipped) < len(outcomes):
        status = "passed"
    return found | {"status": status, "skipped": skipped}


def operators() -> list[str]:
    """Those with Triton kernels, read without importing Triton."""
    tree = ast.parse((ROOT / "rskernels/triton/aot.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "OPERATORS" and node.value:
            return list(ast.literal_eval(node.value))
    raise AssertionError("rskernels/triton/aot.py has no OPERATORS")


def run(
    commands: Sequence[Command], seconds: float, environment: Mapping[str, str], at_once: int
) -> list[Outcome]:
    """Run the processes, `at_once` at a time; what is not done after `seconds` is ended."""
    stop = time.monotonic() + seconds
    waiting = list(commands)
    running: list[tuple[Command, subprocess.Popen[bytes], IO[str]]] = []
    outcomes: list[Outcome] = []
    try:
        while waiting or running:
            while waiting and len(running) < at_once and time.monotonic() < stop:
                command = waiting.pop(0)
                log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed in _ended)
                try:
                    process = subprocess.Popen(
                        command.arguments, cwd=ROOT, env={**environment, **command.environment},
                        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                except FileNotFoundError as error:
                    log.close()
                    outcomes.append(Outcome(command.name, 127, str(error)))
                    continue
                running.append((command, process, log))
            over = time.monotonic() > stop
            ended = [entry for entry in running if over or entry[1].poll() is not None]
            running = [entry for entry in running if entry not in ended]
            outcomes += [_ended(*entry) for entry in ended]
            if over:
                outcomes += [Outcome(command.name, None, "") for command in waiting]
                waiting = []
            time.sleep(0.05)
    finally:  # Ctrl-C
        for entry in running:
            _ended(*entry)
    return outcomes


def _ended(command: Command, process: subprocess.Popen[bytes], log: IO[str]) -> Outcome:
    """What came of a process; one that still runs is killed, with what it started."""
    code = process.poll()
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log.seek(0)
    with log:
        return Outcome(command.name, code, log.read())


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
    return kept | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | own | hidden


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(default: all, in order)"
    )
    parser.add_argument(
        "--output", type=Path, help="folder (default: benchmarks/results; build/gpu-check if dry)"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small")
    parser.add_argument("--scale", type=float, default=1.0, help="of all time budgets (more for fewer parts)")
    options = parser.parse_args(argv)
    usual = ROOT / ("build/gpu-check" if options.dry_run else "benchmarks/results")
    output = (options.output or usual).resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        check = Check(options.dry_run, output, Path(scratch))
        return _check(check, [part for part in PARTS if part in options.parts], options.scale)


def _check(check: Check, parts: Sequence[str], scale: float) -> int:
    started = time.monotonic()
    (asked,) = run([Command("machine", check.part("machine"))], 120, environment(check), 1)
    about = asked.last_json()
    if asked.code != 0 or not about:
        print(asked.output, file=sys.stderr)
        print("gpu-check: no CUDA device answers; --dry-run shows what would be done", file=sys.stderr)
        return 1
    if not check.dry:
        check = replace(check, **{name: about[name] for name in ("name", "capability", "chip")})
    kept = check.output / f"{check.name}-tuned.json"
    if kept.exists():  # of an earlier run, where parts are run one at a time
        check.tuned.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, check.tuned)
    path = check.output / f"{check.name}-check.json"
    summary: dict[str, Any] = {"dry_run": check.dry, "machine": about["machine"], "parts": {}}
    if path.exists():
        before = json.loads(path.read_text())
        summary["parts"] = before["parts"] if before["machine"] == about["machine"] else {}
    for part in parts:
        begun, budget = time.monotonic(), PARTS[part] * scale
        print(f"gpu-check: {part}, at most {budget:.0f} s ...", flush=True)
        commands = check.commands(part, budget)
        # Timings want the device to themselves; tests and compilers do not.
        at_once = 1 if part in ("tune", "benchmark", "models") else min(8, os.cpu_count() or 1)
        outcomes = run(commands, budget, environment(check), at_once)
        seconds = time.monotonic() - begun
        verdict = check.verdict(part, outcomes) | {"seconds": round(seconds, 1), "budget": budget}
        for one in outcomes:
            if one.code != 0:
                _write(check.output / "logs" / f"{check.name}-{part}-{one.name}.txt", one.output)
        summary["parts"][part] = verdict
        if part == "tune" and check.tuned.exists():
            shutil.copyfile(check.tuned, kept)
        _write(path, json.dumps(summary, indent=1) + "\n")
        print(
            f"gpu-check: {part} {verdict['status']} ({seconds:.0f} s) {verdict.get('failed', '')}", flush=True
        )
    print(f"gpu-check: {time.monotonic() - started:.0f} s in all; {path}", flush=True)
    passed = summary["parts"].get("correctness", {}).get("status") == "passed"
    if not passed:
        print("gpu-check: the kernels have not passed the tests", file=sys.stderr)
    return 0 if passed else 1


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
