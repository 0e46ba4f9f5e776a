"""The report of an evaluation: metrics.json, and index.html with tables, curves and tiles side by side.

report/metrics.json    the figures; null where a figure does not exist
report/index.html      everything below on one page
report/confusion.png, curves.png (where the run has a log), styles.png (where the model styles images)
report/tiles/          the worst and the best images, each beside its truth, prediction and errors
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rsmodels import files
from rsmodels.data import LabelSchema, SegmentationDataset
from rsmodels.evaluation import figures

PER_CLASS = {"iou": "IoU", "dice": "Dice (F1)", "precision": "precision", "recall": "recall"}
OVERALL = {
    "mean_iou": "mean IoU",
    "mean_dice": "mean Dice",
    "overall_accuracy": "overall accuracy",
    "mean_binary_accuracy": "mean binary accuracy",
}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em .9em;border-bottom:1px solid #ddd}"
    "td+td,th+th{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}"
    ".note{background:#fff3cd;padding:.6em 1em;border-radius:4px}"
    ".key{display:inline-block;width:.9em;height:.9em;border:1px solid #999;margin-right:.5em}"
)


@dataclass(frozen=True)
class ScoredTile:
    """One image's prediction: ids (H, W) uint8, and its mean IoU over the classes that occur in it."""

    index: int
    name: str
    score: float
    ids: np.ndarray = field(repr=False, compare=False)


@dataclass(frozen=True)
class Evaluation:
    """`metrics` as in metrics.json (NaN for null); the `worst` and the `best` images, extremes first."""

    metrics: dict[str, Any]
    worst: list[ScoredTile]
    best: list[ScoredTile]


def write_report(
    folder: str | Path,
    evaluation: Evaluation,
    dataset: SegmentationDataset,
    *,
    title: str,
    log: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    examples: Sequence[np.ndarray] | None = None,
) -> Path:
    """Write the report and return its page. Each file appears whole or not at all.

    Args:
        folder: made where missing; other files in it stay.
        dataset: what was evaluated; the images to show are read from it again.
        title: headline of the page, for example the model and the data.
        log: the lines of the run's log.jsonl.
        notes: what a reader must know before believing a figure, shown on top.
        examples: X, X_S and X_M, each (N, 3, H, W) in [0, 1], where the model trains on styled and masked
            images.
    """
    folder = Path(folder)
    schema = dataset.schema
    metrics = evaluation.metrics
    files.write_json(folder / "metrics.json", without_nan(metrics))
    confusion = figures.confusion_figure(np.array(metrics["confusion"]), schema.classes)
    figures.save(confusion, folder / "confusion.png")
    curves = figures.curves_figure(log)
    if curves is not None:
        figures.save(curves, folder / "curves.png")
    if examples is not None:
        figures.save(figures.style_figure(*examples), folder / "styles.png")
    pictures: list[tuple[str, str]] = []
    with files.atomic_directory(folder / "tiles") as tiles:
        for kind, ranked in (("worst", evaluation.worst), ("best", evaluation.best)):
            for place, tile in enumerate(ranked, 1):
                caption = f"{kind} {place}: {tile.name}, mean IoU {tile.score:.3f}"
                safe_name = re.sub(r"[^\w.-]+", "_", tile.name)
                name = f"{kind}-{place}-{safe_name}.png"
                sample = dataset[tile.index]
                image, truth = np.asarray(sample["image"]), np.asarray(sample["mask"])
                figures.save(figures.tile_figure(image, truth, tile.ids, schema, title=caption), tiles / name)
                pictures.append((f"tiles/{name}", caption))
    page = _page(title, metrics, schema, notes, curves is not None, examples is not None, pictures)
    files.write_text(folder / "index.html", page)
    return folder / "index.html"


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log.jsonl, none where there is no log; one cut short by a kill is left out."""
    if not Path(path).is_file():
        return []
    lines = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def without_nan(value: Any) -> Any:
    """`value` with None, JSON's null, in the place of every NaN."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def table(metrics: Mapping[str, Any]) -> str:
    """The figures as plain text, for a terminal."""
    width = max(len(name) for name in (*metrics["per_class"], "class"))
    lines = ["  ".join([f"{'class':<{width}}", *(f"{name:>9}" for name in PER_CLASS.values())])]
    for name, row in metrics["per_class"].items():
        lines.append("  ".join([f"{name:<{width}}", *(f"{_number(row[key]):>9}" for key in PER_CLASS)]))
    lines.append("  ".join(f"{label} {_number(metrics[key])}" for key, label in OVERALL.items()))
    for domain, part in metrics.get("per_domain", {}).items():
        lines.append(f"domain {domain}: mean IoU {_number(part['mean_iou'])}")
    if metrics["absent_classes"]:
        lines.append(_absent(metrics))
    return "\n".join(lines)


def _page(
    title: str,
    metrics: Mapping[str, Any],
    schema: LabelSchema,
    notes: Sequence[str],
    curves: bool,
    examples: bool,
    pictures: Sequence[tuple[str, str]],
) -> str:
    colours = dict(zip(schema.classes, schema.palette, strict=True))
    keys = {name: f'<span class="key" style="background:rgb{colours[name]}"></span>' for name in colours}
    rows = [
        [keys[name] + escape(name), *(_number(row[key]) for key in PER_CLASS)]
        for name, row in metrics["per_class"].items()
    ]
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    parts.append(_html_table(OVERALL.values(), [[_number(metrics[key]) for key in OVERALL]]))
    parts.append(f"<p>{metrics['pixels']:,} labelled pixels, counted in one confusion matrix.</p>")
    parts.append("<h2>Per class</h2>" + _html_table(["class", *PER_CLASS.values()], rows))
    if metrics["absent_classes"]:
        parts.append(f"<p>{escape(_absent(metrics))}</p>")
    if "per_domain" in metrics:
        rows = [
            [escape(domain), *(_number(part[key]) for key in OVERALL)]
            for domain, part in metrics["per_domain"].items()
        ]
        parts.append("<h2>Per domain</h2>" + _html_table(["domain", *OVERALL.values()], rows))
    parts.append('<h2>Confusion</h2><img src="confusion.png" alt="confusion matrix">')
    if curves:
        parts.append('<h2>Training</h2><img src="curves.png" alt="training curves">')
    if examples:
        parts.append("<h2>Styled and masked images, as in training</h2>")
        parts.append('<img src="styles.png" alt="images, styled and masked">')
    if pictures:
        parts.append("<h2>Worst and best images</h2>")
        parts += [f'<p><img src="{escape(path)}" alt="{escape(alt)}"></p>' for path, alt in pictures]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
    return f"{head}<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"


def _html_table(header: Any, rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are HTML already."""
    lines = ["<tr>" + "".join(f"<th>{name}</th>" for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows]
    return "<table>" + "\n".join(lines) + "</table>"


def _absent(metrics: Mapping[str, Any]) -> str:
    return (
        f"in neither truth nor prediction, and left out of the means: {', '.join(metrics['absent_classes'])}"
    )


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"
