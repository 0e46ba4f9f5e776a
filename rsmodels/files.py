"""Small file helpers: nothing is ever half-written.

Whatever the library leaves on disk appears under its final name only when it is complete: it is written to
a temporary name in the same folder and renamed. A full disk, a kill or Ctrl-C leaves the previous file.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file path beside `path`; rename it to `path` on success, remove it on failure.

    The temporary name keeps the suffix, so that libraries that choose a format by suffix still work.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(
        prefix=f".{target.stem}.", suffix=f".tmp{target.suffix}", dir=target.parent
    )
    os.close(handle)
    temporary = Path(name)
    try:
        try:
            yield temporary
        except OSError as error:
            # A full disk reports no file: name the one that could not be written.
            if error.errno is not None and error.filename is None:
                error.filename = str(target)
            raise
        # mkstemp makes files private to the user; results should follow the umask like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path` that takes its place on success and is removed on failure.

    No file system swaps two folders in one step: a kill between the two renames leaves the previous folder
    as `.NAME.old`, and the next call puts it back first.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    previous = target.with_name(f".{target.name}.old")
    if previous.exists() and not target.exists():
        previous.replace(target)
    temporary = target.with_name(f".{target.name}.tmp")
    for leftover in (previous, temporary):  # of a run that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if target.exists():
            target.replace(previous)
        temporary.replace(target)
        shutil.rmtree(previous, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hold_folder(folder: str | os.PathLike[str]) -> IO[str]:
    """Make `folder` this process's to write into, until the returned file is closed or the process ends.

    A folder that another process holds is a ValueError that names it. A lock of the system's, so that none is
    left behind by a kill; of POSIX's kind, so that processes forked for reading do not keep it. Where the
    file system knows no locks, nobody is kept out.
    """
    return _hold(Path(folder) / ".lock", folder, "folder")


def hold_file(file: str | os.PathLike[str]) -> IO[str]:
    """The same for a file, by `.NAME.lock` beside it, and for what else is written on the way to it."""
    return _hold(Path(file).with_name(f".{Path(file).name}.lock"), file, "name")


def _hold(path: Path, held: str | os.PathLike[str], kind: str) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("a+", encoding="utf-8")
    if fcntl is None:
        return lock
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ValueError(
            f"{held}: {holder} is writing there; let it finish, stop it, or choose another {kind}"
        ) from None
    except OSError:
        return lock
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}\n")
    lock.flush()
    return lock


def check_output(output: str | os.PathLike[str], suffix: str) -> None:
    """Asked before long work: whether its end can be to write the file `output`, whose folder is made.

    A name that does not end in `suffix`, or is a folder's, is a ValueError, a folder that nobody can write
    into a PermissionError; both name the option --output.
    """
    path = Path(output)
    if path.suffix != suffix:
        raise ValueError(f"--output {path}: expected a file name that ends in {suffix}")
    if path.is_dir():
        raise ValueError(f"--output {path}: is a folder; give a file name")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--output {path}: the folder {path.parent} is not writable")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path`, all or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path`, all or nothing."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read JSON from `path`; a file that is not JSON is a ValueError that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable JSON file ({error})") from None
