"""Look at every file of a data set before hours of training do: all problems are found, not one."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rsmodels.data.base import SegmentationDataset, check_same_size, create_dataset, dataset_class
from rsmodels.data.io import ImageData
from rsmodels.data.schema import IGNORE, LabelSchema

MAX_SHOWN = 20  # errors, and warnings, that `CheckReport.format` prints
MOSTLY_IGNORED = 0.5


@dataclass
class CheckReport:
    """What was found. `ok` is False where there is an error; a warning is worth a look and no more.

    tiles:     split -> number of tiles
    histogram: split -> class -> labelled pixels; ignored: split -> pixels without a label
    bands, dtypes, sizes: how many images have each
    """

    name: str
    root: str
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tiles: dict[str, int] = field(default_factory=dict)
    histogram: dict[str, dict[str, int]] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    bands: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        return not self.errors

    def format(self) -> str:
        """The report as text, for a terminal."""
        lines = [f"{self.name}  {self.root}".rstrip()]
        lines.append("tiles    " + ", ".join(f"{split} {count}" for split, count in self.tiles.items()))
        lines.append("bands    " + _counted(self.bands))
        lines.append("dtypes   " + _counted(self.dtypes))
        lines.append("sizes    " + _counted(Counter({f"{h}x{w}": n for (h, w), n in self.sizes.items()})))
        lines += self._format_histogram()
        for kind, messages in (("error", self.errors), ("warning", self.warnings)):
            lines += [f"{kind}: {message}" for message in messages[:MAX_SHOWN]]
            if len(messages) > MAX_SHOWN:
                lines.append(f"{kind}: ... and {len(messages) - MAX_SHOWN} more")
        lines.append(f"{len(self.errors)} errors, {len(self.warnings)} warnings")
        return "\n".join(lines)

    def _format_histogram(self) -> list[str]:
        if not self.histogram:
            return []
        splits = list(self.histogram)
        rows = {name: [self.histogram[split][name] for split in splits] for name in self.histogram[splits[0]]}
        rows["(ignored)"] = [self.ignored[split] for split in splits]
        totals = [max(1, sum(column)) for column in zip(*rows.values(), strict=True)]
        width = max(len(name) for name in rows)
        lines = ["share of pixels".ljust(width + 2) + "".join(split.rjust(9) for split in splits)]
        for name, counts in rows.items():
            shares = "".join(f"{100 * n / total:8.2f}%" for n, total in zip(counts, totals, strict=True))
            lines.append(f"  {name.ljust(width)}{' ' * max(0, 13 - width)}{shares}")
        return lines


def check_dataset(name: str, root: str | Path | None = None, **options: Any) -> CheckReport:
    """Read every tile of every split and report all that is wrong or odd.

    Errors: halves of pairs missing, sizes that differ, unknown labels, unreadable files, NaN pixels,
    differing band counts, train tiles that occur in another split, a train split that is empty or absent,
    0/255 masks whose foreground counts as ignored.
    Warnings: other duplicates, empty val or test splits, classes that never occur, mostly ignored labels,
    several dtypes.
    Raises ValueError or FileNotFoundError only for a data set, option or folder that does not exist.
    """
    report = CheckReport(name, "" if root is None else str(root))
    cls = dataset_class(name)
    if root is not None and not Path(root).is_dir():
        raise FileNotFoundError(f"--root {root}: no such folder; give the data set's")
    seen: dict[bytes, tuple[str, str]] = {}
    schema: LabelSchema | None = None
    reported: set[str] = set()  # several splits of one folder list the same missing halves
    for split in cls.splits:
        try:
            dataset = create_dataset(name, root=root, split=split, strict=False, **options)
        except (OSError, ValueError) as error:
            if "has no option" in str(error):
                raise
            message = str(error)
            if message not in reported:
                reported.add(message)
                (report.errors if split == "train" else report.warnings).append(message)
            report.tiles[split] = 0
            continue
        schema = dataset.schema
        for problem in dataset.problems:
            if problem not in reported:
                reported.add(problem)
                report.errors.append(problem)
        report.warnings += dataset.notes
        if split in cls.same_split:  # read already; its files are no duplicates
            report.tiles[split] = len(dataset)
            continue
        _check_split(report, dataset, split, seen)
        if not len(dataset):
            (report.errors if split == "train" else report.warnings).append(f"split {split!r} is empty")
    if len(report.bands) > 1:
        report.errors.append(
            f"images differ in their number of bands: {_counted(report.bands)}; choose `bands`"
        )
    if len(report.dtypes) > 1:
        report.warnings.append(f"images differ in their dtype: {_counted(report.dtypes)}")
    if schema is not None:
        _check_labels(report, schema)
    return report


def _check_split(
    report: CheckReport, dataset: SegmentationDataset, split: str, seen: dict[bytes, tuple[str, str]]
) -> None:
    report.tiles[split] = len(dataset)
    counts = np.zeros(256, np.int64)
    # disable=None: no bar where standard error is not a terminal.
    for index in tqdm(range(len(dataset)), desc=f"check {split}", leave=False, disable=None):
        image = _attempt(report, dataset.read_image, index)
        ids = _attempt(report, dataset.read_mask, index)
        if image is not None:
            report.bands[len(image.pixels)] += 1
            report.dtypes[str(image.pixels.dtype)] += 1
            report.sizes[image.pixels.shape[1], image.pixels.shape[2]] += 1
            _check_duplicate(report, image, dataset.source_of(index), split, seen)
        if ids is None:
            continue
        if image is not None:
            try:
                check_same_size(image.pixels, ids, dataset.source_of(index))
            except ValueError as error:
                report.errors.append(str(error))
            else:
                ids = ids if image.valid is None else np.where(image.valid, ids, np.uint8(IGNORE))
        counts += np.bincount(ids.ravel(), minlength=256)
    report.histogram[split] = {name: int(n) for name, n in zip(dataset.schema.classes, counts, strict=False)}
    report.ignored[split] = int(counts[IGNORE])


def _attempt(report: CheckReport, read: Any, index: int) -> Any:
    try:
        return read(index)
    except (OSError, ValueError) as error:
        report.errors.append(str(error))
        return None


def _check_duplicate(
    report: CheckReport, image: ImageData, source: str, split: str, seen: dict[bytes, tuple[str, str]]
) -> None:
    digest = hashlib.sha256(repr(image.pixels.shape).encode() + image.pixels.tobytes()).digest()
    if digest not in seen:
        seen[digest] = source, split
        return
    other, other_split = seen[digest]
    message = f"{source} ({split}): the same pixels as {other} ({other_split})"
    # A published validation set that is the test set is kept, and said; training on it is an error.
    leak = split != other_split and "train" in (split, other_split)
    (report.errors if leak else report.warnings).append(message)


def _check_labels(report: CheckReport, schema: LabelSchema) -> None:
    totals = {name: sum(counts[name] for counts in report.histogram.values()) for name in schema.classes}
    ignored = sum(report.ignored.values())
    labelled = sum(totals.values())
    foreground_ignored = (
        schema.num_classes == 2 and schema.raw_to_train.get(255) == IGNORE and not totals[schema.classes[1]]
    )
    if foreground_ignored and ignored:
        report.errors.append(
            f"the masks hold 255, declared as ignored, and no {schema.classes[1]!r} at all; if 255 is the "
            "foreground, declare it as that class (values: [255])"
        )
    elif ignored > MOSTLY_IGNORED * (labelled + ignored):
        report.warnings.append(f"{100 * ignored / (labelled + ignored):.0f} % of the pixels are ignored")
    report.warnings += [
        f"class {name!r} never occurs" for name, count in totals.items() if labelled and not count
    ]


def _counted(counter: Counter) -> str:
    return ", ".join(f"{value} ({count})" for value, count in counter.most_common(6)) or "none"
