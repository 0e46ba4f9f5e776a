"""Kernels compiled ahead of time, for chips that are not there: registers, shared memory and spills of each.

    python -m rskernels.triton.aot [--chips 80 90 100] [--operators NAME ...] [--output FILE | --check FILE]

Every module of OPERATORS has `examples()`: calls of its launchers with the shapes of the library's models.
Their launches are noted, with the configurations that each chip ships, and compiled as a first call there
would. What a table (FILE) has of the same source, arguments and Triton is not compiled again; `--check` asks
only whether it has everything, and that all of it fits.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from rskernels.triton.launch import CHIPS, Launch, noting

OPERATORS: tuple[str, ...] = (
    "rel_pos_attention",
    "cross_attention",
    "lora",
    "distillation_loss",
    "dilated_aspp",
    "dilated_aspp_backward",
    "deformable_attention",
)
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may have; the compiler does not check
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
DTYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "u1", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Build:
    """A kernel with all that its machine code depends on, as Triton's own first call would have it."""

    operator: str
    example: str
    chip: int
    kernel: Any
    signature: Mapping[str, Any]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Mapping[str, Any]

    def digest(self) -> str:
        """Of the source, with that of the functions it calls, and of everything else."""
        rest = (self.chip, self.signature, self.constants, self.attributes, self.options)
        return hashlib.sha256(f"{source_of(self.kernel)} {rest}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Compiled:
    """What a build takes: registers a thread, bytes of shared memory a block, bytes spilled."""

    operator: str
    kernel: str
    example: str
    chip: int
    registers: int
    shared: int
    spills: int
    digest: str

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared <= SHARED_LIMIT[self.chip]


class NoDriver:
    """As much of Triton's driver as its compiler takes, for a chip that this process does not call."""

    def __init__(self, chip: int) -> None:
        self.target = GPUTarget("cuda", chip, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


_noted: list[Launch] = []  # cannot be pickled: forked processes find them here


def _warm(numbers: Sequence[int], chip: int, at: Any) -> None:
    driver.set_active(NoDriver(chip))
    for number in numbers:
        one, at.value = _noted[number], number
        with contextlib.suppress(Exception):  # the first call meets it again, where the reason is told
            one.kernel.warmup(*one.arguments, grid=one.grid, **one.constants)


def warm(launches: Sequence[Launch], chip: int, jobs: int) -> set[int]:
    """Compile what `launches` would into Triton's cache, on `jobs` processes: first calls then load it.
    Returns those that ended their process, as they would end the caller's."""
    _noted[:] = launches
    context = multiprocessing.get_context("fork")  # none of them calls CUDA
    shares = [range(first, len(launches), jobs) for first in range(min(jobs, len(launches)))]
    fatal: set[int] = set()
    while shares:
        places = [context.Value("i", share[0], lock=False) for share in shares]
        pairs = zip(shares, places, strict=True)
        processes = [context.Process(target=_warm, args=(share, chip, at)) for share, at in pairs]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        died = [i for i, process in enumerate(processes) if process.exitcode]
        fatal |= {places[i].value for i in died}
        rests = [shares[i][shares[i].index(places[i].value) + 1 :] for i in died]
        shares = [rest for rest in rests if rest]
    return fatal


@functools.cache
def source_of(kernel: Any) -> str:
    """The text of a kernel, of the functions that it calls and of the constants they use: unlike Triton's
    own key the same wherever in a file they stand, whatever the comments."""
    found: dict[str, str] = {}
    waiting, seen = [kernel], {kernel}
    while waiting:
        function = waiting.pop()
        tree = ast.parse(function.src)
        found[f"{function.fn.__module__}.{function.fn.__name__}"] = ast.unparse(tree)
        for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            value = function.fn.__globals__.get(name)
            if isinstance(value, tl.constexpr):
                found[f"{function.fn.__module__}.{name}"] = str(value.value)
            elif isinstance(value, triton.JITFunction) and value not in seen:
                seen.add(value)
                waiting.append(value)
    return json.dumps(found, sort_keys=True)


def builds(operator: str, chip: int, most: int | None = None) -> Iterator[Build]:
    """Every launch of the examples of `operator` once; of the first `most` examples, unless None."""
    module = importlib.import_module(f"rskernels.triton.{operator}")
    examples: Iterable[tuple[str, Callable[[], Any]]] = module.examples()
    seen = set()
    for name, call in itertools.islice(examples, most):
        with noting(chip) as launches:
            call()
        for key, launch in distinct(launches).items():
            if key not in seen:
                seen.add(key)
                yield Build(operator, name, chip, launch.kernel, *_specialise(launch))


def distinct(launches: Iterable[Launch]) -> dict[str, Launch]:
    """The first launch of every machine code, by what tells them apart."""
    found: dict[str, Launch] = {}
    for launch in launches:
        found.setdefault(f"{launch.kernel.fn.__name__} {_specialise(launch)}", launch)
    return found


def _specialise(launch: Launch) -> tuple[dict[str, Any], dict[Any, Any], dict[Any, Any], dict[str, Any]]:
    """Signature, constants, attributes and options, as Triton's own first call has them."""
    names = launch.kernel.arg_names
    options = {name: value for name, value in launch.constants.items() if name in OPTIONS}
    constants: dict[Any, Any] = {n: v for n, v in launch.constants.items() if n not in OPTIONS}
    signature: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}

    def specialise(path: tuple[int, ...], value: Any, free: bool) -> Any:
        if isinstance(value, tuple):  # whose items Triton always specialises
            return tuple(specialise((*path, i), item, False) for i, item in enumerate(value))
        if isinstance(value, float):
            return "fp32"
        if value is None or (type(value) is int and value == 1 and not free):
            constants[names[path[0]] if len(path) == 1 else path] = value
            return "constexpr"
        if not isinstance(value, Tensor) and type(value) is not int:
            raise TypeError(
                f"{launch.kernel.fn.__name__}: argument {names[path[0]]} is {type(value).__name__}"
            )
        if not free and (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(value, Tensor):
            return f"*{DTYPES[value.dtype]}"
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for index, name in enumerate(names):
        if index < len(launch.arguments):
            free = launch.kernel.params[index].do_not_specialize
            signature[name] = specialise((index,), launch.arguments[index], free)
        elif name in constants:
            signature[name] = "constexpr"
        else:
            raise TypeError(f"{launch.kernel.fn.__name__}: launched without {name}")
    return signature, constants, attributes, options


def compile_build(build: Build) -> Compiled:
    """Compile, and read the assembler's report."""
    source = ASTSource(build.kernel, build.signature, build.constants, build.attributes)
    name, log = build.kernel.fn.__name__, io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", build.chip, 32), options=build.options)
    spills = re.findall(r"(\d+) bytes spill stores", log.getvalue())
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    if not spills or not registers:
        raise RuntimeError(f"no resource report from ptxas for {name}: {log.getvalue()[:500]}")
    return Compiled(
        build.operator,
        name,
        build.example,
        build.chip,
        max(map(int, registers)),
        compiled.metadata.shared,
        sum(map(int, spills)),
        build.digest(),
    )


# ------------------------------------------------------------------------------------------------- the table


def read_table(file: Path) -> dict[str, Compiled]:
    """The rows of `file` by digest; none where it does not exist, or another Triton wrote it."""
    if not file.exists():
        return {}
    table = json.loads(file.read_text())
    if table["triton"] != triton.__version__:
        return {}
    rows = (Compiled(*row) for row in table["rows"])
    return {row.digest: row for row in rows}


def write_table(file: Path, rows: Iterable[Compiled]) -> None:
    """One line a row, all or nothing."""
    lines = ",\n".join(json.dumps(list(asdict(row).values()), separators=(",", ":")) for row in rows)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')
    temporary.replace(file)


_todo: list[Build] = []  # builds cannot be pickled: forked processes find them here


def _compile_numbered(number: int) -> Compiled:
    return compile_build(_todo[number])


def compile_all(wanted: list[Build], jobs: int) -> Iterator[Compiled]:
    """Compile on `jobs` processes, in whatever order they end."""
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    if jobs == 1:
        yield from map(compile_build, wanted)
        return
    _todo[:] = wanted
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_compile_numbered, range(len(wanted)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--examples", type=int, metavar="N", help="only the first N of each operator")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, help="JSON file for the table; what it has stays")
    where.add_argument("--check", type=Path, help="compile nothing: does this table have every build?")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: expected 1 or more")
    if triton.knobs.runtime.interpret:
        print("rskernels.triton.aot: TRITON_INTERPRET is set; unset it to compile", file=sys.stderr)
        return 2
    file = options.check or options.output
    known = read_table(file) if file else {}
    wanted = {
        build.digest(): build
        for operator in options.operators
        for chip in options.chips
        for build in builds(operator, chip, options.examples)
    }
    missing = [build for digest, build in wanted.items() if digest not in known]
    if options.check:
        for build in missing:
            print(f"{options.check} has no row of {_name(build)}; write it with --output {options.check}")
    else:
        for row in compile_all(missing, options.jobs):
            known[row.digest] = row
            _print(row)
            if options.output:  # row by row: it takes minutes, and can be stopped
                write_table(options.output, known.values())
    rows = [known[digest] for digest in wanted if digest in known]
    for row in rows:
        if not row.fits:
            print(f"does not fit: {row}")
    if options.output:
        write_table(options.output, rows)
    if options.check:
        return 0 if not missing and all(row.fits for row in rows) else 1
    # Another Triton may spill where the configurations' own does not: slower, and no reason to fail.
    return 0 if all(row.shared <= SHARED_LIMIT[row.chip] for row in rows) else 1


def _name(build: Build) -> str:
    return f"sm_{build.chip} {build.operator}.{build.kernel.fn.__name__}, {build.example}"


def _print(row: Compiled) -> None:
    print(
        f"sm_{row.chip}  {row.operator}.{row.kernel:<28} {row.example:<36} {row.registers:>3} registers "
        f"{row.shared:>7,} bytes shared  {row.spills} spilled",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
