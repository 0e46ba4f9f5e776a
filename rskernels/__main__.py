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
    tuner.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no Triton kernel after that long"
    )
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
    if options.write_package and not on_gpu:
        raise ValueError(f"tune --write-package: {dispatch.UNAVAILABLE['triton']}")
    if not on_gpu or "cpp" not in dispatch.UNAVAILABLE:
        tune()
    if on_gpu:
        triton = importlib.import_module("rskernels.triton.tune")  # an import of Triton, which a CPU may lack
        triton.main(options.operators, options.seconds, options.write_package)


if __name__ == "__main__":
    sys.exit(main())
