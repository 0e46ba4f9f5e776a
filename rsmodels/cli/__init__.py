"""The command `rsmodels`: from arguments to an exit code.

    0 done    1 a check found errors    2 bad input or usage    3 some inputs failed, the rest are done
    130 interrupted

What a user can put right is one line on stderr; --debug shows the traceback as well. The commands themselves,
and with them rasterio, matplotlib and SciPy, are imported when one is chosen.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import rsmodels
from rsmodels.cli.options import UsageError, parse

COMMANDS = {
    "train": "train a model, on one process or under torchrun",
    "evaluate": "measure a trained model on a data set and write a report",
    "predict": "segment georeferenced rasters",
    "features": "draw what the layers of a network see, or where two domains lie",
    "pretrain": "make a small foundation model from unlabelled scenes",
    "style-stats": "measure the styles of an image archive, for models that inject them",
    "check-data": "look at every file of a data set for what would spoil a training",
    "models": "list the models and their sizes",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _own_warnings():
        try:
            return _run(arguments)
        except SystemExit as stop:  # --help, or a rank of a training that another rank has stopped
            return stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            _say("interrupted")
            return 130
        except BrokenPipeError:
            # The reader of our output has left (`| head`). Python would complain while flushing at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except UsageError as error:
            _say(f"error: {error}")
        except Exception as error:
            line = _one_line(error)
            if line is None or "--debug" in arguments:
                traceback.print_exc()
            if line is not None:
                # A training sees to it that one rank alone comes this far; it need not be the first.
                print(f"rsmodels: error: {line}", file=sys.stderr)
        return 2


def _run(arguments: list[str]) -> int:
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(_overview())
        return 0 if arguments else 2
    if command == "--version":
        print(f"rsmodels {rsmodels.__version__}")
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        raise UsageError(f"command {command!r} is not known; {advice}")
    # By name, when it is wanted: what reads rasters and draws takes about as long to import as torch,
    # and `rsmodels --help` needs none of it.
    commands = importlib.import_module("rsmodels.cli.commands")
    run = getattr(commands, command.replace("-", "_"))
    return run(parse(command, COMMANDS[command], run, arguments[1:]))


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{help}" for name, help in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rsmodels COMMAND [options]",
            "",
            "Segment remote-sensing imagery with foundation models.",
            "",
            *lines,
            "",
            "`rsmodels COMMAND --help` lists a command's options; `rsmodels --version` the version.",
        ]
    )


def _one_line(error: Exception) -> str | None:
    """What to tell the user, or None where only the traceback of a defect will do."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{error.filename or 'output'}: no space left on the disk; free some, or write to another"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "out of memory; try a smaller --batch-size or tile"
    if isinstance(error, ValueError | OSError):
        return " ".join(str(error).split())
    return None


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Show the library's own warnings as one line each, and everybody else's as ever."""
    package = str(Path(__file__).parents[1])
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_line(message, category, filename, lineno, file=None, line=None):
            if filename.startswith(package):
                _say(f"warning: {message}")
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_line
        yield


def _say(text: str) -> None:
    """One line on stderr. Under torchrun the first rank speaks for all: they were all started alike."""
    if os.environ.get("RANK", "0") == "0":
        print(f"rsmodels: {text}", file=sys.stderr)
