"""Any folder of `images/` and `masks/` whose classes are written down in a `classes.yaml`.

Three layouts under root:

- `train/`, `val/`, `test/`, each with `images/` and `masks/`: the split is the folder;
- `images/` and `masks/` alone: a seeded draw, 70/15/15 unless `ratios` says otherwise;
- named groups, each with `images/` and `masks/`, handed to the splits by name: train=["tile1", "tile2"].

docs/data.md shows how to write `classes.yaml`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rsmodels.data.base import (
    RATIOS,
    SPLITS,
    FileDataset,
    Pair,
    existing_folder,
    image_files,
    match_pairs,
    register_dataset,
    seeded_split,
)
from rsmodels.data.io import read_mask
from rsmodels.data.schema import IGNORE, Color, LabelSchema, parse_color

CLASSES_FILE = "classes.yaml"
ENCODINGS = ("values", "colors")
PROBED_MASKS = 32


@register_dataset("folder")
class FolderDataset(FileDataset):
    """classes: path of the classes file (default: root/classes.yaml)
    train, val, test: names of groups, as a list or comma-separated; without `val`, `val_fraction` of the
                      train groups' tiles are held out, by seed
    ratios, seed:     of the draw where the folder is flat
    """

    def __init__(
        self,
        root: str | Path | None,
        split: str = "train",
        *,
        classes: str | Path | None = None,
        train: str | Sequence[str] | None = None,
        val: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        val_fraction: float = 0.15,
        ratios: Sequence[float] = RATIOS,
        seed: int = 0,
        bands: Sequence[int] | None = None,
        strict: bool = True,
    ) -> None:
        folder = existing_folder(root, self.name)
        schema, suffix = read_classes(Path(classes) if classes is not None else folder / CLASSES_FILE)
        groups = {key: _names(value) for key, value in zip(SPLITS, (train, val, test), strict=True)}
        if any(groups.values()):
            _check_groups(groups)
            pairs, problems = _grouped(folder, groups, split, suffix, val_fraction, seed)
        elif (folder / split / "images").is_dir():
            pairs, problems = _group(folder / split, folder.name, suffix)
        elif (folder / "images").is_dir():
            pairs, problems = _group(folder, folder.name, suffix)
            chosen = set(seeded_split((pair.name for pair in pairs), split, seed=seed, ratios=ratios))
            pairs = [pair for pair in pairs if pair.name in chosen]
        else:
            raise _no_layout(folder, split)
        super().__init__(
            root, split, pairs=pairs, problems=problems, schema=schema, bands=bands, strict=strict
        )
        if strict:
            self._refuse_foreground_as_ignore()

    def _refuse_foreground_as_ignore(self) -> None:
        """0/255 masks under a schema of 0, 1 and 255 = ignore would train on nothing: IoU 0 and no error.

        One tile without foreground is ordinary, many in a row with nothing but 0 and 255 are not.
        """
        schema = self.schema
        if schema.num_classes != 2 or schema.raw_to_train.get(255) != IGNORE:
            return
        ignored = 0
        for pair in self.pairs[:PROBED_MASKS]:
            ids = schema.encode(read_mask(pair.mask, colors=False), source=str(pair.mask))
            if (ids == 1).any():
                return
            ignored += int((ids == IGNORE).sum())
        if ignored:
            raise ValueError(
                f"{self.pairs[0].mask}: this and the next masks hold no {schema.classes[1]!r}, only 0 and "
                "255, and 255 is declared as ignored; if it is the foreground, declare it as that class "
                "(values: [255])"
            )


# ------------------------------------------------------------------------------------------------- layout


def _group(folder: Path, domain: str, suffix: str, prefix: str = "") -> tuple[list[Pair], list[str]]:
    images = image_files(existing_folder(folder, "folder", "images"))
    masks = image_files(existing_folder(folder, "folder", "masks"))
    if suffix:
        masks = {key.removesuffix(suffix): path for key, path in masks.items() if key.endswith(suffix)}
    return match_pairs(images, masks, domain=domain, prefix=prefix)


def _grouped(
    folder: Path,
    groups: dict[str, list[str]],
    split: str,
    suffix: str,
    val_fraction: float,
    seed: int,
) -> tuple[list[Pair], list[str]]:
    held_out = not groups["val"] and split in ("train", "val")
    pairs: list[Pair] = []
    problems: list[str] = []
    for name in groups["train"] if held_out else groups[split]:
        more, wrong = _group(existing_folder(folder, "folder", name), name, suffix, prefix=f"{name}/")
        pairs += more
        problems += wrong
    if held_out:
        ratios = (1 - val_fraction, val_fraction, 0.0)
        chosen = set(seeded_split((pair.name for pair in pairs), split, seed=seed, ratios=ratios))
        pairs = [pair for pair in pairs if pair.name in chosen]
    return pairs, problems


def _check_groups(groups: dict[str, list[str]]) -> None:
    for other in ("val", "test"):
        shared = sorted(set(groups["train"]) & set(groups[other]))
        if shared:
            raise ValueError(
                f"group {shared[0]!r} is in train and in {other}; a score on it would mean nothing"
            )


def _names(value: str | Sequence[str] | None) -> list[str]:
    if value is None:
        return []
    # The command line reads groups named 2017,2018 as numbers.
    names = value if isinstance(value, (list, tuple)) else str(value).split(",")
    return [str(name).strip().strip("/") for name in names if str(name).strip()]


def _no_layout(folder: Path, split: str) -> Exception:
    inner = sorted(path.name for path in folder.iterdir() if (path / "images").is_dir())
    if set(inner) & set(SPLITS):
        return FileNotFoundError(f"{folder / split}: no such split; the folder has {', '.join(inner)}")
    if inner:
        return ValueError(
            f"{folder}: holds the groups {', '.join(inner)}; say which belong to which split "
            f"(train: [{inner[0]}], test: [{inner[-1]}])"
        )
    return FileNotFoundError(
        f"{folder}: found neither images/ and masks/, nor {split}/images, nor groups that hold images/"
    )


# ----------------------------------------------------------------------------------------------- the file


def read_classes(path: Path) -> tuple[LabelSchema, str]:
    """Read a classes file; returns the schema and the suffix that mask names carry.

    Raises FileNotFoundError where there is none, ValueError naming the file and the entry otherwise.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no classes file; write one (docs/data.md) or give its path as `classes`"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, not the keys `encoding` and `classes`")
    try:
        return _schema_from(content), str(content.get("mask_suffix") or "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _schema_from(content: dict[str, Any]) -> LabelSchema:
    _known_keys(content, ("encoding", "binary", "threshold", "mask_suffix", "classes", "ignore"), "file")
    classes = content.get("classes")
    if not isinstance(classes, list) or not classes:
        raise ValueError("`classes` is not a list of {name, color, values}")
    encoding = content.get("encoding")
    if encoding not in ENCODINGS:
        raise ValueError(f"`encoding` is {encoding!r}; write `values` (class ids) or `colors`")
    names: list[str] = []
    palette: list[Color] = []
    table: dict[Any, int] = {}
    for train, entry in enumerate(classes):
        if not isinstance(entry, dict) or "name" not in entry or "color" not in entry:
            raise ValueError(f"class {train} needs a name and a color, found {entry!r}")
        _known_keys(entry, ("name", "color", "values"), f"class {entry['name']!r}")
        names.append(str(entry["name"]))
        palette.append(parse_color(entry["color"]))
        coded = [palette[-1]] if encoding == "colors" else _integers(entry.get("values", [train]))
        _assign(table, coded, train, names)
    ignore = content.get("ignore") or {}
    if not isinstance(ignore, dict):
        raise ValueError(f"`ignore` is {ignore!r}; write the keys `values` or `colors` under it")
    _known_keys(ignore, ("colors", "values"), "ignore")
    ignored = ignore.get(encoding) or []
    coded = [parse_color(raw) for raw in _listed(ignored)] if encoding == "colors" else _integers(ignored)
    _assign(table, coded, IGNORE, names)
    threshold = content.get("threshold")
    return LabelSchema(
        classes=tuple(names),
        palette=tuple(palette),
        raw_to_train=table if encoding == "values" and threshold is None else {},
        binary=bool(content.get("binary", False)),
        colors=table if encoding == "colors" else None,
        threshold=None if threshold is None else int(threshold),
    )


def _assign(table: dict[Any, int], raws: Sequence[Any], train: int, names: Sequence[str]) -> None:
    for raw in raws:
        if raw in table:
            taken = "ignored" if table[raw] == IGNORE else names[table[raw]]
            raise ValueError(
                f"label {raw} of {'ignore' if train == IGNORE else names[train]!r} is taken by {taken!r}"
            )
        table[raw] = train


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _integers(value: Any) -> list[int]:
    entries = _listed(value)
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in entries):
        raise ValueError(f"values {value!r} are not whole numbers")
    return entries


def _known_keys(entry: dict[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise ValueError(f"{where}: key {unknown[0]!r} is unknown; known: {', '.join(known)}")
