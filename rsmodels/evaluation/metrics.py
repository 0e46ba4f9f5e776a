"""Segmentation metrics from one confusion matrix over the whole data set.

Counts are int64 and add up over batches, domains and ranks; every figure is computed from the total in
float64, so it depends neither on the order of the images nor on how they were shared out. A class that
occurs neither in the truth nor in the prediction has no figures: NaN (null in JSON), left out of the means,
and named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rsmodels.data.schema import IGNORE


def logits_to_ids(probabilities: Tensor) -> Tensor:
    """Class ids (B, H, W) uint8 from probabilities (B, K, H, W).

    With one channel, the foreground's, 0.5 is the threshold. With several the largest wins, so that logits
    do as well as probabilities.
    """
    if probabilities.shape[1] == 1:
        return (probabilities[:, 0] >= 0.5).to(torch.uint8)
    return probabilities.argmax(dim=1).to(torch.uint8)


class ConfusionMatrix:
    """Counts (K, K) int64 of pixels, truth by row and prediction by column.

    Args:
        classes: names of the K classes; for a binary task ("background", the foreground's name).
        binary: report the foreground class alone, as RS-SAM does for roads and buildings.
        device: where the counts are kept; the device of what `update` is given.
    """

    def __init__(
        self, classes: Sequence[str], *, binary: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        if binary and len(classes) != 2:
            raise ValueError(f"a binary task has two classes, background and foreground, not {len(classes)}")
        self.classes = tuple(classes)
        self.binary = binary
        self.counts = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=device)

    def update(self, ids: Tensor, target: Tensor) -> None:
        """Count predicted `ids` against `target`, integers of one shape; 255 in either is left out."""
        if ids.shape != target.shape:
            raise ValueError(f"prediction {tuple(ids.shape)} and truth {tuple(target.shape)} differ in shape")
        classes = len(self.classes)
        seen = (target != IGNORE) & (ids != IGNORE)
        truth, prediction = target[seen].long(), ids[seen].long()
        for what, values in (("truth", truth), ("prediction", prediction)):
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < classes:
                low, high = int(values.min()), int(values.max())
                raise ValueError(f"{what} has ids {low} to {high}, expected 0 to {classes - 1} or {IGNORE}")
        pairs = torch.bincount(truth * classes + prediction, minlength=classes**2)
        self.counts += pairs.reshape(classes, classes).to(self.counts.device)

    def __iadd__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        if other.classes != self.classes:
            raise ValueError(f"cannot add counts of classes {other.classes} to those of {self.classes}")
        self.counts += other.counts
        return self

    def all_reduce(self) -> None:
        """Add the counts of all ranks, where there are several."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.counts)

    def compute(self) -> dict[str, Any]:
        """Every figure, in the shape of `report/metrics.json`.

        `mean_iou`, `mean_dice`, `mean_precision`, `mean_recall`: means over the classes that occur;
        `overall_accuracy`: share of pixels that are right; `mean_binary_accuracy`: mean over classes of the
        share of pixels that are right about that class alone, RS-SAM's "Acc"; `per_class`;
        `absent_classes`; `pixels`; `confusion`: the counts, rows truth, columns prediction. A figure that
        does not exist is NaN.
        """
        counts = self.counts.double().cpu()
        total = counts.sum()
        hit, truth, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        occurs = truth + predicted > 0
        # A class that occurs has defined IoU and Dice. Never predicted, its precision is 0, and recall alike.
        figures = {
            "iou": hit / (truth + predicted - hit),
            "dice": 2 * hit / (truth + predicted),
            "precision": hit / predicted.clamp(min=1),
            "recall": hit / truth.clamp(min=1),
        }
        binary_accuracy = (total - truth - predicted + 2 * hit) / total

        reported = [1] if self.binary else list(range(len(self.classes)))
        occurring = [index for index in reported if occurs[index]]
        per_class = {
            self.classes[index]: {
                name: float(values[index]) if occurs[index] else math.nan for name, values in figures.items()
            }
            for index in reported
        }
        means = {f"mean_{name}": _mean(values[occurring]) for name, values in figures.items()}
        return {
            **means,
            "overall_accuracy": float(hit.sum() / total),
            "mean_binary_accuracy": _mean(binary_accuracy[occurring]),
            "per_class": per_class,
            "absent_classes": [self.classes[index] for index in reported if not occurs[index]],
            "pixels": int(total),
            "confusion": self.counts.tolist(),
        }


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan
