"""How good are an encoder's features? A linear classifier on them, learned on one domain, asked on others.

Shapes: T tiles, h/w the token grid, H/W labelled pixels, F features, K classes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rsmodels.data import IGNORE
from rsmodels.data.synthetic.dataset import SyntheticEarth
from rsmodels.data.synthetic.domains import Domain
from rsmodels.data.synthetic.gaps import SOURCE, TARGETS
from rsmodels.evaluation.metrics import ConfusionMatrix
from rsmodels.pretraining.config import PREPROCESSING

LARGEST_LABEL = 128  # pixels of a tile's side that are labelled; more of them say the same
WEIGHT_PENALTY = 1e-4
ITERATIONS = 60
BATCH = 8


def linear_probe(encoder: Any, *, tiles: int = 64, seed: int = 0) -> dict[str, float]:
    """Mean IoU on the source domain and on every target: {"source": 0.6, "region": 0.5, ...}.

    A multinomial logistic regression on the patch features of four evenly spaced blocks, standardised, its
    logits resized to the pixels; learned on `tiles` tiles of the source domain, measured on as many others of
    each domain.
    """
    data = SyntheticEarth(split="train", seed=seed, size=_side(encoder), length=tiles, domain=SOURCE)
    features, labels = extract(encoder, data)
    mean, std = features.mean((0, 1, 2)), features.std((0, 1, 2)) + 1e-6
    weight = fit((features - mean) / std, labels, len(data.schema.classes))

    def measured(domain: Domain) -> float:
        data = SyntheticEarth(split="test", seed=seed, size=_side(encoder), length=tiles, domain=domain)
        confusion = ConfusionMatrix(data.schema.classes)
        features, labels = extract(encoder, data)
        ids = logits_of((features - mean) / std, weight, labels.shape[1:]).argmax(1)
        confusion.update(ids.cpu(), labels.cpu())
        return confusion.compute()["mean_iou"]

    return {name: measured(domain) for name, domain in {"source": SOURCE, **TARGETS}.items()}


def probe_table(probes: dict[str, dict[str, float]]) -> str:
    """Lines of mean IoU in per cent: a column per encoder, a row per domain, the targets' mean last."""
    lines = [f"{'linear probe, mean IoU %':<28}" + "".join(f"{name:>12}" for name in probes)]
    rows = {name: [probe[name] for probe in probes.values()] for name in ("source", *TARGETS)}
    rows["mean of the targets"] = [mean_of_targets(probe) for probe in probes.values()]
    lines += [f"{name:<28}" + "".join(f"{100 * value:>12.1f}" for value in row) for name, row in rows.items()]
    return "\n".join(lines)


def mean_of_targets(probe: dict[str, float]) -> float:
    """The mean over the target domains of what linear_probe returned."""
    return sum(probe[name] for name in TARGETS) / len(TARGETS)


def _side(encoder: Any) -> int:
    height, width = encoder.image_size
    if height != width:
        raise ValueError(f"image size {height} x {width}: the probe's tiles are square")
    return height


@torch.no_grad()
def extract(encoder: Any, data: SyntheticEarth) -> tuple[Tensor, Tensor]:
    """Features (T, h, w, F) and labels (T, H, W) of a data set's tiles, on the encoder's device."""
    device = next(encoder.parameters()).device
    depth = len(encoder.blocks)
    taps = sorted({max(0, depth * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})
    features, labels = [], []
    for start in range(0, len(data), BATCH):
        samples = [data[index] for index in range(start, min(start + BATCH, len(data)))]
        images = PREPROCESSING.normalize(torch.stack([sample["image"] for sample in samples]).to(device))
        maps = encoder.forward_intermediates(images, taps)
        features.append(torch.cat(maps, dim=1).permute(0, 2, 3, 1).float())
        mask = torch.stack([sample["mask"] for sample in samples])
        side = min(mask.shape[-1], LARGEST_LABEL)
        mask = F.interpolate(mask[:, None].float(), size=(side, side), mode="nearest-exact")[:, 0]
        labels.append(mask.long().to(device))
    return torch.cat(features), torch.cat(labels)


def logits_of(features: Tensor, weight: Tensor, size: Any) -> Tensor:
    """(T, h, w, F) · (F + 1, K) → (T, K, H, W); the last row is the bias. Resizing commutes with it."""
    logits = features @ weight[:-1] + weight[-1]
    return F.interpolate(logits.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=False)


@torch.enable_grad()
def fit(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """(F + 1, K): the logistic regression with the smallest penalised cross-entropy, by L-BFGS."""
    weight = torch.zeros(features.shape[-1] + 1, classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = logits_of(features, weight, labels.shape[1:])
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
        loss = loss + WEIGHT_PENALTY * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()
