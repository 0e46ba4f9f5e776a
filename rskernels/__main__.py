"""`python -m rskernels explain | tune`."""

import argparse
import sys

from rskernels.dispatch import check_requested
from rskernels.explain import explain
from rskernels.tune import tune


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m rskernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("explain", help="what serves each operator on this machine, and why")
    commands.add_parser("tune", help="measure which matrix product linear should use, and store it")
    command = parser.parse_args().command
    try:
        if command == "explain":
            explain()
            check_requested()
        else:
            tune()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
