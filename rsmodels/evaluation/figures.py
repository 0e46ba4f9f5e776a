"""The pictures of a report: tiles side by side, the confusion matrix, the curves of the training run.

Matplotlib's `Figure` is used without pyplot: no global state, no display, safe in any thread.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rsmodels import files
from rsmodels.data.schema import IGNORE, LabelSchema

WRONG = (255, 0, 170)  # magenta: no palette of land cover has it
UNLABELLED = (0, 0, 0)
PANEL = 3.2  # inches that a picture is wide
MAX_CURVES = 8  # one panel stays readable up to about so many


def save(figure: Figure, path: Path) -> None:
    """Write `figure` as PNG, all or nothing."""
    with files.atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100)


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Raw pixels (C, H, W) of any range -> a picture (H, W, 3) uint8.

    Three bands or more show the first three; fewer show the first as grey. 8-bit values stay as they are;
    any other range (16-bit, reflectance) is stretched from the 2nd to the 98th percentile of each band.
    """
    bands = image[:3] if image.shape[0] >= 3 else image[:1]
    bands = np.repeat(bands, 3 // len(bands), axis=0).astype(np.float32)
    finite = np.isfinite(bands)
    bands = np.where(finite, bands, 0)
    if bands.min() >= 0 and 1 < bands.max() <= 255:
        return bands.transpose(1, 2, 0).astype(np.uint8)
    for band, valid in zip(bands, finite, strict=True):
        low, high = np.percentile(band[valid], (2, 98)) if valid.any() else (0, 1)
        band[:] = np.clip((band - low) / max(high - low, 1e-12), 0, 1) * 255
    return bands.transpose(1, 2, 0).astype(np.uint8)


def panel(
    axes: Axes, picture: np.ndarray, title: str = "", *, fontsize: int = 10, interpolation: str | None = None
) -> None:
    """One picture (H, W, 3 or 4), with a title and without ticks."""
    axes.imshow(picture, interpolation=interpolation)
    axes.set_title(title, fontsize=fontsize)
    axes.set_xticks([])
    axes.set_yticks([])


def panel_height(side: float, shape: Sequence[int]) -> float:
    """Inches that a picture of `shape` (H, W, …) takes if it is `side` inches wide; elongated ones are given
    margins."""
    return side * min(max(shape[0] / shape[1], 0.3), 2)


def errors(image: np.ndarray, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3) in pale grey, wrong pixels in magenta, unlabelled ones in black."""
    grey = image.mean(axis=2, keepdims=True) * 0.5 + 127
    shown = np.repeat(grey, 3, axis=2).astype(np.uint8)
    labelled = truth != IGNORE
    shown[labelled & (truth != prediction)] = WRONG
    shown[~labelled] = UNLABELLED
    return shown


def tile_figure(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, schema: LabelSchema, *, title: str
) -> Figure:
    """Image, truth, prediction and errors of one tile side by side, with a legend of the classes in it."""
    picture = to_rgb(image)
    wrong = (truth != prediction) & (truth != IGNORE)
    share = wrong.sum() / max((truth != IGNORE).sum(), 1)
    panels = {
        "image": picture,
        "truth": schema.colorize(truth),
        "prediction": schema.colorize(prediction),
        f"errors ({share:.1%} of pixels)": errors(picture, truth, prediction),
    }
    figsize = (4 * PANEL + 0.4, panel_height(PANEL, truth.shape) + 1.1)
    figure = Figure(figsize=figsize, layout="constrained")
    figure.suptitle(title, fontsize=11)
    for axes, (name, pixels) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        panel(axes, pixels, name, interpolation="nearest" if name in ("truth", "prediction") else None)
    present = set(np.unique(truth)) | set(np.unique(prediction))
    patches = [
        _patch(schema.palette[index], name) for index, name in enumerate(schema.classes) if index in present
    ]
    if IGNORE in present:
        patches.append(_patch(UNLABELLED, "not labelled"))
    patches.append(_patch(WRONG, "wrong (last panel)"))
    figure.legend(
        handles=patches, loc="outside lower center", ncols=min(len(patches), 8), fontsize=9, frameon=False
    )
    return figure


def style_figure(images: np.ndarray, styled: np.ndarray, masked: np.ndarray) -> Figure:
    """A row per image of what a style-injecting model trains on: X, X_S, X_M, each (N, 3, H, W) in [0, 1]."""
    columns = {"image X": images, "styled image X_S": styled, "masked image X_M": masked}
    count = len(images)
    figsize = (3 * PANEL, count * panel_height(PANEL, images.shape[2:]) + 0.5)
    figure = Figure(figsize=figsize, layout="constrained")
    grid = figure.subplots(count, 3, squeeze=False)
    for column, (name, pictures) in enumerate(columns.items()):
        for row, (axes, pixels) in enumerate(zip(grid[:, column], pictures, strict=True)):
            panel(axes, np.clip(pixels.transpose(1, 2, 0), 0, 1), "" if row else name)
    return figure


def confusion_figure(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """The confusion matrix (K, K), each row (true class) as shares of its pixels."""
    truth = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, truth, out=np.full(counts.shape, np.nan), where=truth > 0)
    size = 2.6 + 0.62 * len(classes)
    figure = Figure(figsize=(size + 1.2, size), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("Where the pixels of each class went", fontsize=11)
    if len(classes) <= 20:
        for row, column in np.ndindex(shares.shape):
            value = shares[row, column]
            text = "–" if math.isnan(value) else f"{value:.2f}"
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(shown, format=PercentFormatter(1), shrink=0.8, label="share of the true class")
    return figure


def curves_figure(log: Sequence[Mapping[str, Any]]) -> Figure | None:
    """What a run logged, against the step: losses, metrics and the learning rate; None for an empty log."""
    panels: dict[str, dict[str, dict[int, float]]] = {"loss": {}, "metrics": {}, "learning rate": {}}
    for line in log:
        for name, value in line.items():
            panel = _panel(name)
            if panel and isinstance(value, int | float) and math.isfinite(value):
                label = f"{line.get('kind', '')} {name}".replace("_", " ").strip()
                panels[panel].setdefault(label, {})[line["step"]] = value
    shown = {panel: curves for panel, curves in panels.items() if curves}
    if not shown:
        return None
    figure = Figure(figsize=(5.2 * len(shown), 3.8), layout="constrained")
    for axes, (panel, curves) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        for label, points in list(curves.items())[:MAX_CURVES]:
            steps = sorted(points)
            marker = "o" if len(steps) <= 30 else None
            axes.plot(steps, [points[step] for step in steps], label=label, marker=marker, markersize=3)
        axes.set_title(panel, fontsize=11)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_ylim(bottom=0, top=1 if panel == "metrics" else None)
        axes.grid(alpha=0.3)
        if panel != "learning rate":
            axes.legend(fontsize=8)
    return figure


def _panel(name: str) -> str | None:
    """Which panel shows a logged number: by name, because each method logs loss terms of its own."""
    if name.startswith("loss"):
        return "loss"
    if "iou" in name or "accuracy" in name:
        return "metrics"
    return "learning rate" if name == "lr" else None


def _patch(colour: tuple[int, int, int], label: str) -> Patch:
    red, green, blue = colour
    return Patch(facecolor=(red / 255, green / 255, blue / 255), edgecolor="0.6", label=label)
