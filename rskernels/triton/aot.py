"""Kernels compiled ahead of time, for chips that are not there: registers, shared memory and spills of each.

    python -m rskernels.triton.aot [--chips 80 90 100] [--operators NAME ...] [--output FILE]

Every module of OPERATORS has `examples()`: calls of its launchers with the shapes of the library's models.
Their launches are noted, with the configurations that each chip ships, and compiled as a first call there
would.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rskernels.triton.launch import CHIPS, Launch, noting

OPERATORS: tuple[str, ...] = ("lora", "dilated_aspp", "dilated_aspp_backward")
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block may have; the compiler does not check
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
DTYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on a chip: registers a thread, bytes of shared memory a block, bytes spilled."""

    operator: str
    example: str
    kernel: str
    chip: int
    constants: dict[str, Any]
    registers: int
    shared: int
    spills: int

    @property
    def fits(self) -> bool:
        return self.spills == 0 and self.shared <= SHARED_LIMIT[self.chip]


def compile_operator(operator: str, chip: int) -> Iterator[Compiled]:
    """Compile every launch of the examples of `operator` once."""
    module = importlib.import_module(f"rskernels.triton.{operator}")
    examples: Iterable[tuple[str, Callable[[], Any]]] = module.examples()
    seen = set()
    for name, call in examples:
        with noting(chip) as launches:
            call()
        for launch in launches:
            signature, constants, attributes, options = _specialise(launch)
            key = (launch.kernel.fn.__name__, *map(repr, (signature, constants, attributes, options)))
            if key in seen:
                continue
            seen.add(key)
            registers, shared, spills = _compile(
                launch.kernel, signature, constants, attributes, options, chip
            )
            yield Compiled(
                operator,
                name,
                launch.kernel.fn.__name__,
                chip,
                dict(launch.constants),
                registers,
                shared,
                spills,
            )


def _specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any], dict[str, Any]]:
    """Signature, constants and attributes as Triton's own first call would have them."""
    names = launch.kernel.arg_names
    options = {name: value for name, value in launch.constants.items() if name in OPTIONS}
    constants: dict[str, Any] = {n: v for n, v in launch.constants.items() if n not in OPTIONS}
    signature = dict.fromkeys(constants, "constexpr")
    attributes: dict[Any, Any] = {}
    for name, value in zip(names, launch.arguments, strict=False):
        if value is None or (type(value) is int and value == 1):
            constants[name], signature[name] = value, "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = f"*{DTYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                attributes[(names.index(name),)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif type(value) is int:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(names.index(name),)] = [["tt.divisibility", 16]]
        else:
            raise TypeError(f"{launch.kernel.fn.__name__}: argument {name} is {type(value).__name__}")
    missing = set(names) - set(signature)
    if missing:
        raise TypeError(f"{launch.kernel.fn.__name__}: launched without {', '.join(sorted(missing))}")
    return {name: signature[name] for name in names}, constants, attributes, options


def _compile(
    kernel: Any, signature: Any, constants: Any, attributes: Any, options: Any, chip: int
) -> tuple[int, int, int]:
    source = ASTSource(kernel, signature, constants, attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    spills = re.findall(r"(\d+) bytes spill stores", log.getvalue())
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    if not spills or not registers:
        raise RuntimeError(f"no resource report from ptxas for {kernel.fn.__name__}: {log.getvalue()[:500]}")
    return max(map(int, registers)), compiled.metadata.shared, sum(map(int, spills))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        print("rskernels.triton.aot: TRITON_INTERPRET is set; unset it to compile", file=sys.stderr)
        return 2
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    rows = []
    for operator in options.operators:
        for chip in options.chips:
            for row in compile_operator(operator, chip):
                rows.append(row)
                verdict = "" if row.fits else "  TOO LARGE"
                print(
                    f"sm_{chip}  {operator}.{row.kernel:<28} {row.example:<36} {row.registers:>3} registers "
                    f"{row.shared:>7,} bytes shared  {row.spills} spilled{verdict}",
                    flush=True,
                )
    if options.output:
        temporary = options.output.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        temporary.replace(options.output)
    return 0 if all(row.fits for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
