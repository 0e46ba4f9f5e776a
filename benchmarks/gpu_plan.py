"""The parts of `benchmarks/gpu_check.py`: what each of them runs, how long, and what it makes of it.

A verdict's status is "passed", "failed", "cut off" (nothing failed, and not all was asked) or "skipped".
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from gpu_processes import ROOT, Command, Outcome, cores, useful_line

TESTS = "tests/rskernels/triton"
NOT_HERE = f"{TESTS}/test_aot.py"  # of a table of other chips: what it asks, the part "aot" asks of this one
MOST = 32  # processes that test at once: each has a context of CUDA's, of some hundred MiB
FEW = 2  # functions of a file of tests in a dry run: the interpreter is slow
EXAMPLES = {True: 1, False: 3}  # of an operator that are compiled, in a dry run or not
SUFFIXES = (".py", ".json", ".cpp", ".h", ".cu")  # of sources
MEMORY_ERROR = 86  # exit code of compute-sanitizer where it found something
# What compute-sanitizer itself says, behind its "=========", where it cannot do its work.
REFUSED = re.compile(
    r"Internal Sanitizer Error: |"
    r"Error: .*(not supported|not permitted|permission|injection library|initializ)"
)
SUMMARY = re.compile(r"=+ (ERROR|RACECHECK) SUMMARY: ")


def module(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def digest(folders: Iterable[str]) -> str:
    """Of the sources in `folders`, wherever these lie."""
    found = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in SUFFIXES and file.is_file():
                found.update(f"{file.relative_to(ROOT)}\n".encode() + file.read_bytes())
    return found.hexdigest()[:16]


@dataclass(frozen=True)
class Check:
    """What is checked, and where; `scratch` is a folder of this run."""

    dry: bool
    output: Path
    scratch: Path
    name: str = "dry-run"
    capability: int = 90
    chip: int = 90  # whose configurations serve it
    until: float = 0.0  # of time.monotonic(): when the part that runs is over

    @property
    def results(self) -> Path:
        return self.output / f"{self.name}.json"

    @property
    def tuned(self) -> Path:
        """Where the tuner writes, and later parts read."""
        return self.scratch / "rskernels" / f"tuning.sm{self.capability}.json"

    def told(self, name: str) -> Path:
        """The file in which a process tells what it does."""
        return self.scratch / f"{name}.told"

    def measuring(self, part: str, told: Path, *arguments: str) -> tuple[str, ...]:
        """A process of benchmarks.gpu_parts."""
        where = ("--device", "cpu" if self.dry else "cuda", "--until", str(self.until))
        return module("benchmarks.gpu_parts", part, *where, "--told", str(told), *arguments)


@dataclass(frozen=True)
class Part(ABC):
    """`seconds` is its budget, start-ups and ends of its processes included."""

    name: str
    seconds: float
    sources: ClassVar[tuple[str, ...]] = ("rskernels",)  # its verdict is worth nothing for others
    alone: ClassVar[bool] = False  # timings want the device to themselves

    @abstractmethod
    def commands(self, check: Check) -> list[Command]:
        """The processes to run, in this order."""

    def at_once(self) -> int:
        return 1 if self.alone else cores()

    def verdict(self, check: Check, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """What failed, by name, with the line that says why; what was cut off; what was never begun."""
        failed: dict[str, str] = {}
        cut_off: dict[str, str] = {}
        never = [one.name for one in outcomes if not one.started]
        for one in outcomes:
            problems = {line["ended"]: line["problem"] for line in one.told if line.get("problem")}
            problems |= {name: f"its process died: {useful_line(one.output)}" for name in one.died_in()}
            if one.code and not one.died_in():  # between two things that it tells of
                problems[one.name] = useful_line(one.output) or f"exit code {one.code}"
            failed |= problems
            if one.code is None and one.started:
                cut_off[one.name] = f"in {one.cut_in()}" if one.cut_in() else "before it began anything"
        status = "failed" if failed else "cut off" if cut_off or never else "passed"
        found: dict[str, Any] = {"status": status}
        named = {"failed": failed, "cut_off": cut_off, "never_begun": never}
        return found | {name: value for name, value in named.items() if value}


class Build(Part):
    """The C++ extension, in place."""

    sources = ("csrc",)

    def commands(self, check: Check) -> list[Command]:
        if check.dry:
            return [Command("explain", module("rskernels", "explain"))]
        build = (sys.executable, "setup.py", "-q", "build_ext", "--inplace")
        return [Command("build", build, {"RSKERNELS_REQUIRE_EXT": "1", "MAX_JOBS": str(cores())})]


class Correctness(Part):
    """The tests of the kernels, dealt to all cores, and every operator through its public function."""

    sources = ("rskernels", "tests/rskernels")

    def at_once(self) -> int:
        return min(cores(), MOST)

    def commands(self, check: Check) -> list[Command]:
        one_thread = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        one_thread |= {"TRITON_INTERPRET": "1"} if check.dry else {}
        through_dispatch = [] if check.dry else [one_pass(check, again=True)]  # no kernel serves a CPU
        shares = max(1, self.at_once() - len(through_dispatch))
        commands = []
        for number in range(1, shares + 1):
            name = f"tests-{number}"
            script = (sys.executable, str(ROOT / "benchmarks/gpu_tests.py"), TESTS, "--ignore", NOT_HERE)
            share = ("--share", f"{number}/{shares}", "--told", str(check.told(name)))
            few = ("--few", str(FEW)) if check.dry else ()
            commands.append(Command(name, (*script, *share, *few), one_thread, check.told(name), again=True))
        return [*through_dispatch, *commands]

    def verdict(self, check: Check, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        found = super().verdict(check, outcomes)
        shares = [one for one in outcomes if one.name.startswith("tests")]
        ended = {line["ended"]: line["outcome"] for one in shares for line in one.told if "outcome" in line}
        counts = {kind: list(ended.values()).count(kind) for kind in ("passed", "failed", "skipped")}
        counts["failed"] += sum(len(one.died_in()) for one in shares)
        counts["not_run"] = sum(one.last("collected") or 0 for one in shares) - sum(counts.values())
        if found["status"] == "passed" and (counts["not_run"] or not counts["passed"]):
            found |= {"status": "failed", "failed": {"tests": "none passed, or some were never begun"}}
        return found | {"tests": counts}


class Sanitizer(Part):
    """compute-sanitizer over every operator once; a checker that is missing, or that the machine refuses, is
    a skip and says so."""

    def commands(self, check: Check) -> list[Command]:
        if check.dry:
            return [one_pass(check)]
        return [self._over(check, "memcheck"), self._over(check, "racecheck")]

    def _over(self, check: Check, tool: str) -> Command:
        program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        options = ["--tool", tool, "--error-exitcode", str(MEMORY_ERROR)]
        options += ["--target-processes", "application-only"]  # not the assembler that Triton calls
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        # Its own allocator would hide what is read beyond a tensor.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        told = check.told(tool)
        return Command(tool, (program, *options, *check.measuring("pass", told)), uncached, told)

    def verdict(self, check: Check, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        if check.dry:
            return super().verdict(check, outcomes)
        skipped = {one.name: reason for one in outcomes if (reason := self.refusal(one))}
        found = super().verdict(check, [one for one in outcomes if one.name not in skipped])
        for one in outcomes:
            if one.code == MEMORY_ERROR:
                errors = [line.strip("= ") for line in one.output.splitlines() if SUMMARY.match(line)]
                found["status"] = "failed"
                found["failed"] = {**found.get("failed", {}), one.name: (errors or ["found something"])[-1]}
        if len(skipped) == len(outcomes):
            found["status"] = "skipped"
        return found | ({"skipped": skipped} if skipped else {})

    def refusal(self, one: Outcome) -> str:
        """Why the checker did not check, in its own words; "" where it did, or was cut off."""
        if one.code == 127:
            return "compute-sanitizer is not installed"
        if one.code in (None, MEMORY_ERROR):
            return ""
        own = [line.strip("= ") for line in one.output.splitlines() if line.startswith("=========")]
        refused = [line for line in own if REFUSED.match(line)]
        if refused:
            return refused[0][:200]
        checked = any(SUMMARY.match(line) for line in one.output.splitlines())
        return "" if one.code or checked else "it ended without a summary"


class Ahead(Part):
    """Registers, shared memory and spills of the shipped configurations, on their first examples."""

    def commands(self, check: Check) -> list[Command]:
        return [self._of(check, operator) for operator in operators()]

    def _of(self, check: Check, operator: str) -> Command:
        jobs = -(-cores() // len(operators()))
        which = ("--chips", str(check.chip), "--operators", operator, "--examples", str(EXAMPLES[check.dry]))
        where = ("--jobs", str(jobs), "--output", str(check.scratch / f"{operator}.aot.json"))
        return Command(operator, module("rskernels.triton.aot", *which, *where))

    def verdict(self, check: Check, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        tables = [check.scratch / f"{one.name}.aot.json" for one in outcomes]
        rows = [row for file in tables if file.exists() for row in json.loads(file.read_text())["rows"]]
        return super().verdict(check, outcomes) | {"kernels": rows}


class Measured(Part):
    """One process of benchmarks.gpu_parts after the other, the device for itself: after a case that makes
    CUDA answer no more, or that hangs, the next one goes on with the case behind it."""

    sources = ("rskernels", "rsmodels")
    alone = True

    def commands(self, check: Check) -> list[Command]:
        told = check.told(self.name)
        switches = {"TORCHDYNAMO_DISABLE": "1"} if check.dry else {}  # compiling takes minutes there
        results = ("--results", str(check.results), "--sources", digest(self.sources))
        limits = ("--limits", str(check.scratch / "limits.json"))
        arguments = check.measuring(self.name, told, *results, *limits)
        return [Command(self.name, arguments, switches, told, again=True)]

    def verdict(self, check: Check, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        found = super().verdict(check, outcomes)
        (one,) = outcomes
        said = {line["ended"]: line["said"] for line in one.told if line.get("said")}
        if found["status"] == "passed" and not said:
            found |= {"status": "cut off", "cut_off": {one.name: "no case was measured"}}
        also = {name: value for name in ("left", "limits", "note") if (value := one.last(name)) is not None}
        return found | {"measured": said} | also


class Tune(Part):
    """Better configurations for this chip; the parts behind it use what was found."""

    alone = True

    def commands(self, check: Check) -> list[Command]:
        return [Command("tune", check.measuring("tune", check.told("tune")), told=check.told("tune"))]

    def verdict(self, check: Check, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        (one,) = outcomes
        return super().verdict(check, outcomes) | {"tune": one.last("found")}


# In the order they run; with the question about the machine, and the charts, less than nine minutes.
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Build("build", 50),
        Correctness("correctness", 190),
        Sanitizer("sanitizer", 50),
        Ahead("aot", 25),
        Tune("tune", 40),
        Measured("benchmark", 65),
        Measured("models", 40),
    )
}
QUESTION, CHARTS = 60.0, 12.0  # a first import of PyTorch reads gigabytes


def one_pass(check: Check, again: bool = False) -> Command:
    told = check.told("pass")
    return Command("pass", check.measuring("pass", told), told=told, again=again)


def operators() -> list[str]:
    """Those with Triton kernels, read without importing Triton."""
    tree = ast.parse((ROOT / "rskernels/triton/aot.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "OPERATORS" and node.value:
            return list(ast.literal_eval(node.value))
    raise AssertionError("rskernels/triton/aot.py has no OPERATORS")
