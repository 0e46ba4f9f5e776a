"""`python -m rskernels explain | tune`."""

import argparse
import importlib
import sys

from rskernels import dispatch
from rskernels.explain import explain
from rskernels.tune import tune


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rskernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("explain", help="what serves each operator on this machine, and why")
    tuner = commands.add_parser(
        "tune",
        help="measure which matrix product linear should use, and, on a GPU, the Triton kernels' tiles",
    )
    tuner.add_argument("--operators", nargs="+", metavar="NAME", help="of the Triton kernels (default: all)")
    tuner.add_argument("--seconds", type=float, help="begin no Triton kernel after that long")
    tuner.add_argument("--again", action="store_true", help="also Triton kernels that were measured before")
    tuner.add_argument(
        "--write-package",
        action="store_true",
        help="for developers: into the package's own configurations too",
    )
    options = parser.parse_args()
    try:
        if options.command == "explain":
            explain()
            dispatch.check_requested()
        else:
            _tune(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _tune(options: argparse.Namespace) -> None:
    on_gpu = "triton" not in dispatch.UNAVAILABLE
    for name in ("operators", "seconds", "again", "write_package"):
        if getattr(options, name) and not on_gpu:
            raise ValueError(f"tune --{name.replace('_', '-')}: {dispatch.UNAVAILABLE['triton']}")
    if options.seconds is not None and not options.seconds > 0:
        raise ValueError(f"tune --seconds {options.seconds:g}: expected a number above 0")
    if not on_gpu:
        tune()
        return
    triton = importlib.import_module("rskernels.triton.tune")  # an import of Triton, which a CPU may lack
    operators = triton.modules_of(options.operators)
    if "cpp" not in dispatch.UNAVAILABLE:
        tune()
    triton.main(operators, options.seconds or float("inf"), options.again, options.write_package)


if __name__ == "__main__":
    sys.exit(main())
