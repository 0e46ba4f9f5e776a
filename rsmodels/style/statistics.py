"""The distribution of a field archive's styles, measured once: what eq. (2) of CrossEarth samples from.

S: numbers in an embedding.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsmodels.files import read_json, write_json
from rsmodels.style.base import StyleModel

COVARIANCES = ("full", "diagonal")
ENTRIES = ("style", "weights", "count", "source", "mean", "covariance")
SYNTHETIC_FIELD = Path(__file__).with_name("synthetic_field.json")
MAKE = "make it with `rsmodels style-stats`"


@dataclass(frozen=True, eq=False)
class StyleStatistics:
    """Mean and covariance of the style embeddings of many images.

    Args:
        style: name of the style model that made the embeddings.
        mean: (S,) float64. covariance: (S, S) float64.
        weights: that style model's fingerprint; None where it has no weights.
        count: how many embeddings were measured.
        source: what they are of, in words.
    """

    style: str
    mean: Tensor
    covariance: Tensor
    weights: str | None = None
    count: int = 0
    source: str = ""

    @property
    def size(self) -> int:
        """S."""
        return len(self.mean)

    def sample(
        self, count: int, generator: torch.Generator | None = None, covariance: str = "full"
    ) -> Tensor:
        """`count` embeddings (count, S) float32, as sample_embeddings draws them."""
        return sample_embeddings(
            self.mean, self.covariance, count, generator=generator, covariance=covariance
        )

    def check(self, style: StyleModel) -> None:
        """ValueError unless these are statistics of embeddings that `style` makes."""
        if (self.style, self.size) != (style.name, style.size):
            raise ValueError(
                f"style statistics of {self.source or 'a field archive'} are of style {self.style!r} (S = "
                f"{self.size}), the style here is {style.name!r} (S = {style.size}); give statistics that "
                f"`rsmodels style-stats --style {style.name}` made"
            )
        if self.weights != (found := style.fingerprint()):
            raise ValueError(
                f"style statistics of {self.source or 'a field archive'} were made with other weights of "
                f"style {self.style!r} ({_short(self.weights)}) than those here ({_short(found)}); give the "
                "same weights, or statistics that `rsmodels style-stats` made with these"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, all or nothing; every digit is kept."""
        values = {**vars(self), "mean": self.mean.tolist(), "covariance": self.covariance.tolist()}
        write_json(path, {name: values[name] for name in ENTRIES})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StyleStatistics:
        """Read what save wrote; a file that holds anything else is a ValueError that names it."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file of style statistics; {MAKE}")
        content = read_json(path)
        if not isinstance(content, dict) or not set(ENTRIES) <= content.keys():
            raise ValueError(f"{path}: not style statistics (expected {', '.join(ENTRIES)}); {MAKE}")
        mean, covariance = _checked(path, content)
        return cls(
            style=content["style"],
            # On the CPU also where a model is being built without memory (device "meta").
            mean=torch.tensor(mean.tolist(), dtype=torch.float64, device="cpu"),
            covariance=torch.tensor(covariance.tolist(), dtype=torch.float64, device="cpu"),
            weights=content["weights"],
            count=content["count"],
            source=content["source"],
        )


@functools.cache
def synthetic_field() -> StyleStatistics:
    """The statistics that come with the library: ColorStyle's, of the generated field archive.

    Made by `rsmodels style-stats --data synthetic`, of every domain but the synthetic benchmark's targets.
    """
    return StyleStatistics.load(SYNTHETIC_FIELD)


def sample_embeddings(
    mean: Tensor,
    covariance_matrix: Tensor,
    count: int,
    *,
    generator: torch.Generator | None = None,
    covariance: str = "full",
) -> Tensor:
    """Draw `count` embeddings (count, S) float32 on the device of `mean`, from standard normal z (S,).

    Args:
        mean: (S,). covariance_matrix: (S, S) = U·diag(s)·Uᵀ.
        generator: of the CPU; PyTorch's global one without it. It is drawn on the CPU: one seed, one style.
        covariance: "full": mean + U·√s·z, whose covariance is the given one. "diagonal": mean + √s·z, eq. (2)
            to the letter: the singular values, largest first, are variances of the embedding's own entries.
    """
    if covariance not in COVARIANCES:
        raise ValueError(f"covariance={covariance!r}: expected one of {', '.join(COVARIANCES)}")
    z = torch.randn(count, len(mean), generator=generator, dtype=torch.float64, device="cpu").to(mean.device)
    vectors, values, _ = torch.linalg.svd(covariance_matrix.double())
    spread = z * values.sqrt()
    if covariance == "full":
        spread = spread @ vectors.mT
    return (mean.double() + spread).float()


class RunningMoments:
    """Mean and covariance of embeddings that come in batches, in float64 and constant memory (Chan et al.).

    The order in which they come changes nothing but rounding.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.scatter = torch.zeros(
            size, size, dtype=torch.float64
        )  # sum of the outer products about the mean

    def add(self, embeddings: Tensor) -> None:
        """Count in embeddings (N, S)."""
        batch = embeddings.double().cpu()
        if not len(batch):
            return
        mean = batch.mean(0)
        centred, step = batch - mean, mean - self.mean
        total = self.count + len(batch)
        self.scatter += centred.mT @ centred + torch.outer(step, step) * (self.count * len(batch) / total)
        self.mean += step * (len(batch) / total)
        self.count = total

    def covariance(self) -> Tensor:
        """(S, S), divided by the number of embeddings less one; there must be two or more."""
        assert self.count > 1
        return (self.scatter + self.scatter.mT) / 2 / (self.count - 1)


def _checked(path: str | os.PathLike[str], content: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean (S,) and covariance (S, S) of a file, or a ValueError that says what is wrong with them."""
    types = {"style": str, "weights": str | None, "count": int, "source": str}
    for name, expected in types.items():
        if not isinstance(content[name], expected):
            found = json.dumps(content[name])[:40]
            raise ValueError(f"{path}: {name} is {found}, not as written; {MAKE} again")
    try:
        mean = np.array(content["mean"], np.float64)
        covariance = np.array(content["covariance"], np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: mean and covariance are not all numbers; {MAKE} again") from None
    if mean.ndim != 1 or not mean.size or covariance.shape != (mean.size, mean.size):
        raise ValueError(
            f"{path}: mean of shape {mean.shape} and covariance of shape {covariance.shape}; expected (S,) "
            f"and (S, S); {MAKE} again"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{path}: mean or covariance holds NaN or infinity; {MAKE} again")
    tolerance = 1e-6 * max(np.abs(covariance).max(), 1e-12)
    if np.abs(covariance - covariance.T).max() > tolerance or np.linalg.eigvalsh(covariance)[0] < -tolerance:
        raise ValueError(
            f"{path}: its covariance is not symmetric with eigenvalues of 0 or more; {MAKE} again"
        )
    return mean, covariance


def _short(fingerprint: str | None) -> str:
    return "none" if fingerprint is None else f"{fingerprint[:12]}…"
