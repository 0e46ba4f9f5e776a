"""Which library's matrix product serves `linear`, as stored data.

PyTorch ships two: its own operators ("aten": MKL for float32, oneDNN for bfloat16) and oneDNN's product
("onednn"). Which is faster depends on the machine and on the shape class, and the two differ in the last
bits: so the choice is a table, read once when rskernels is imported, part of a training run's record
(`record`, `restore`), and never a timing taken inside a run.

Without a measurement a rule holds (`default_table`). `python -m rskernels tune` measures the
shape classes on this machine and stores its table under ~/.cache/rskernels; RSKERNELS_TUNING=FILE reads and
writes another file, RSKERNELS_TUNING=off ignores all of them. Beside it lie the configurations of the Triton
kernels that the same command measured on a GPU (`triton_path`, rskernels.triton.launch).
"""

import contextlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rskernels import dispatch

VERSION = 1
PRODUCTS = ("aten", "onednn")
DTYPES = ("float32", "bfloat16")
PASSES = ("forward", "grad_input", "grad_weight")
# Multiply-adds below 2^22, below 2^27, above; few: less than 32 rows; thin: less than 32 inputs or outputs.
# The order is that of shape_class in csrc/cpu/linear.h.
SHAPES = tuple(f"{form}/{size}" for form in ("wide", "few", "thin") for size in ("small", "medium", "large"))
KEYS = tuple(f"{dtype}/{which}/{shape}" for dtype in DTYPES for which in PASSES for shape in SHAPES)
# Multiply-adds below which a product is small; kSmallWork in csrc/cpu/linear.h.
SMALL_WORK = 1 << 22

_table: dict[str, str] = {}
_small: dict[str, str] = {}
_source = ""
_cause = ""  # why the default rule holds, for describe(): a record must not tell where files lie
_triton: dict[str, Any] | None = None  # what `restore` gave, by capability; None: what the files have
triton_configs: dict[int, Any] = {}  # rskernels.triton.launch's, as checked; by capability


def default_table() -> dict[str, str]:
    """The rule that holds without a measurement: oneDNN for float32, unless a weight gradient sums over few
    rows, and for bfloat16's forward pass, which PyTorch would send there too, but without the activation.
    Small products are always PyTorch's own: there the overhead of a call decides (`serves_small`)."""

    def rule(key: str) -> str:
        if "/small" in key or "/grad_weight/few" in key:
            return "aten"
        return "onednn" if key.startswith("float32") or "/forward/" in key else "aten"

    return {key: rule(key) for key in KEYS}


def serves_small(dtype: str) -> str:
    """The product of all small products of a dtype, "" where the table has several."""
    return _small.get(dtype, "")


def record() -> dict[str, Any]:
    """The table in use and where it came from, and the Triton configurations measured on this machine; a
    training run stores it beside its configuration."""
    # Only the file's name: the record travels in published models, where a path would tell whose home it is.
    table = {"version": VERSION, "source": Path(_source).name, "products": dict(_table)}
    return table | {"triton": _stored_triton() if _triton is None else _triton}


def restore(saved: Mapping[str, Any]) -> None:
    """Use what `record` gave, so that a resumed run computes with the same products and tiles."""
    global _triton
    _use(_checked(saved, "restore"), str(saved.get("source", "restored")), "restored from a record")
    _triton = dict(saved.get("triton", {}))
    triton_configs.clear()


def use(saved: Mapping[str, Any], source: str) -> None:
    """Use a table from now on; `source` says where it came from."""
    _use(_checked(saved, source), source)


def path() -> Path | None:
    """The file that holds this machine's table, None when RSKERNELS_TUNING=off."""
    chosen = os.environ.get("RSKERNELS_TUNING", "")
    if chosen == "off":
        return None
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "rskernels" / "tuning.json"


def triton_path(capability: int) -> Path | None:
    """The file beside it with the Triton configurations tuned on GPUs of `capability` (90 for 9.0)."""
    file = path()
    return None if file is None else file.with_name(f"{file.stem}.sm{capability}.json")


def triton_table(capability: int) -> Any:
    """What was tuned for GPUs of `capability`, unchecked: the restored record's where there is one, else the
    file's; None where nothing is. OSError, RuntimeError or ValueError where that cannot be read."""
    if _triton is not None:
        return _triton.get(str(capability))
    file = triton_path(capability)
    return json.loads(file.read_text()) if file is not None and file.exists() else None


def triton_place(capability: int) -> str:
    """Where `triton_table` reads, for messages."""
    return "the record that was restored" if _triton is not None else str(triton_path(capability))


def forget_triton() -> None:
    """Read the files anew at the next launch of a Triton kernel; a restored record serves no longer."""
    global _triton
    _triton = None
    triton_configs.clear()


def _stored_triton() -> dict[str, Any]:
    """Every chip's readable table by capability; a bad one is reported where it is used."""
    found = {}
    with contextlib.suppress(OSError, RuntimeError):  # containers: a home of another user's, or none
        file = path()
        for stored in [] if file is None else sorted(file.parent.glob(f"{file.stem}.sm*.json")):
            with contextlib.suppress(ValueError, OSError):
                found[stored.stem.rpartition(".sm")[2]] = json.loads(stored.read_text())
    return found


def load() -> None:
    """Read the stored table (once, at import); a file that cannot be used, or that RSKERNELS_TUNING names and
    that does not exist, is ignored with a warning."""
    try:
        file = path()
        exists = file is not None and file.exists()
    except (OSError, RuntimeError) as error:  # containers: a home of another user's, or none
        _use(default_table(), "default rule", f"no place for a table: {error}")
        return
    if file is None:
        _use(default_table(), "default rule", "RSKERNELS_TUNING is 'off'")
        return
    if not exists:
        if os.environ.get("RSKERNELS_TUNING"):
            warnings.warn(
                f"rskernels: RSKERNELS_TUNING names {file}, which does not exist; the default rule serves "
                "(`python -m rskernels tune` measures and writes it)",
                RuntimeWarning,
                stacklevel=2,
            )
        _use(default_table(), "default rule", f"{file} does not exist")
        return
    try:
        try:
            saved = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not JSON ({error}); run `python -m rskernels tune`") from None
        use(saved, str(file))
    except (OSError, ValueError) as error:
        warnings.warn(f"rskernels: ignoring the tuning table: {error}", RuntimeWarning, stacklevel=2)
        _use(default_table(), "default rule", f"{file} cannot be used")


def describe() -> list[str]:
    """What explain() prints about the table."""
    taken = sorted({key.rsplit("/", 2)[0] for key, product in _table.items() if product == "onednn"})
    source = f"{_source} ({_cause})" if _cause else _source
    direct = [dtype for dtype in DTYPES if serves_small(dtype) == "aten"]
    if not dispatch.falls_back():
        direct = []  # what was chosen by name serves every call
    return [
        f"linear's products: {source}; through oneDNN for {', '.join(taken) if taken else 'nothing'}",
        f"linear's small calls, below {SMALL_WORK:,} multiply-adds and not compiled: "
        + (f"PyTorch directly for {', '.join(direct)}" if direct else "as all others"),
    ]


def _checked(saved: Any, source: str) -> dict[str, str]:
    advice = "delete it or run `python -m rskernels tune`"
    if not isinstance(saved, Mapping) or saved.get("version") != VERSION:
        raise ValueError(f"{source}: not a tuning table of version {VERSION}; {advice}")
    products = saved.get("products")
    if not isinstance(products, Mapping) or set(products) != set(KEYS):
        raise ValueError(f"{source}: 'products' does not have the {len(KEYS)} expected keys; {advice}")
    for key, product in products.items():
        if product not in PRODUCTS:
            raise ValueError(f"{source}: {key} is {product!r}, expected one of {PRODUCTS}; {advice}")
    return {key: products[key] for key in KEYS}


def _use(table: dict[str, str], source: str, cause: str = "") -> None:
    global _table, _small, _source, _cause
    _table, _source, _cause = table, source, cause
    _small = {}
    for dtype in DTYPES:
        products = {table[key] for key in KEYS if key.startswith(dtype) and key.endswith("/small")}
        _small[dtype] = products.pop() if len(products) == 1 else ""
    if "cpp" not in dispatch.UNAVAILABLE:
        from rskernels import _C  # optional: absent from a pure-Python install

        _C.set_product_table([PRODUCTS.index(table[key]) for key in KEYS])


load()
