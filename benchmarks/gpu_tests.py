"""Every Nth test of some folders, in a process: `benchmarks/gpu_check.py` deals a suite to all cores.

    python benchmarks/gpu_tests.py FOLDER --share 2/16 --told FILE

Each test's begin and end are told at once, a traceback is printed as it comes. Tests of which FILE has a
begin are left out: the process is started again after a fault of the GPU. Exit code 0 says that it came to
its end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gpu_processes import FAULT, answers, tell, told, useful_line

sys.path.pop(0)  # this folder, whose modules have names like others'

import pytest


class Share:
    """A plugin of pytest's: which tests are run, and what is told of them."""

    def __init__(self, number: int, of: int, few: int, file: Path) -> None:
        self.number, self.of, self.few, self.file = number, of, few, file

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        functions: dict[Path, list[str]] = {}
        for item in items:
            names = functions.setdefault(item.path, [])
            if item.originalname not in names:
                names.append(item.originalname)
        few = slice(self.few or None)
        chosen = [item for item in items if item.originalname in functions[item.path][few]]
        # Neighbours are one test in several forms: they go to several processes.
        mine = chosen[self.number - 1 :: self.of]
        tell(self.file, collected=len(mine))
        before = {line.get("begun") for line in told(self.file)}
        items[:] = [item for item in mine if item.nodeid not in before]

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._tell_failure(report)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        tell(self.file, begun=nodeid)
        self.failed = self.skipped = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.skipped |= report.skipped
        if report.failed:
            self.failed = True
            self._tell_failure(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if not self.failed:
            tell(self.file, ended=nodeid, outcome="skipped" if self.skipped else "passed")
        elif not answers():
            pytest.exit("the device answers no more", returncode=FAULT)

    def _tell_failure(self, report: Any) -> None:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message.strip().splitlines() if crash else []
        problem = message[0] if message else useful_line(report.longreprtext)
        tell(self.file, ended=str(report.nodeid), outcome="failed", problem=problem[:300])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--share", required=True, help="K/N: the Kth of N")
    parser.add_argument("--few", type=int, default=0, help="only the first so many functions of each file")
    parser.add_argument("--ignore", action="append", default=[], help="a file that is left out")
    parser.add_argument("--told", type=Path, required=True)
    options = parser.parse_args()
    number, of = map(int, options.share.split("/"))
    # Not pyproject's filters of warnings: one names a class of rasterio's, which is not needed here.
    arguments = ["-q", "--tb=short", "--no-summary", "-o", "filterwarnings=", "-p", "no:cacheprovider"]
    arguments += [f"--ignore={file}" for file in options.ignore] + options.folders
    code = pytest.main(arguments, plugins=[Share(number, of, options.few, options.told)])
    fine = (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED)
    return 0 if code in fine else int(code)


if __name__ == "__main__":
    sys.exit(main())
