"""Features as pictures: which colour a feature has, the sheet of an image, the plane of several domains.

A layer is shown twice: its first three principal components as red, green and blue, and the mean over its
channels in false colours. D channels of a layer, L layers, N features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image as Pillow
from torch import Tensor

from rsmodels import files
from rsmodels.evaluation.figures import panel, panel_height, save, to_rgb

PICTURE_SIDE = 1024  # smaller maps are enlarged to at most this
FALSE_COLOURS = "turbo"
PANEL = 3.4  # inches that a picture is wide, so that its title fits
SPAN = (1, 99)  # percentiles that become the darkest and the brightest value
DOMAIN_COLOURS = "tab10"
MARKERS = "o*^svDPX"


@dataclass(frozen=True)
class Basis:
    """How the features of a layer become colours.

    mean (D,), components (3, D): of the features it was fitted to; the largest entry of each component is
        positive, so that the same features always have the same colours
    low, high: (4,), what is drawn darkest and brightest of the three components and the channel mean
    shares: of the variance that each component holds
    """

    mean: Tensor
    components: Tensor
    low: np.ndarray
    high: np.ndarray
    shares: tuple[float, ...]

    @classmethod
    def fit(cls, features: np.ndarray) -> Basis:
        """The basis of features (N, D), N ≥ 1."""
        x = torch.from_numpy(features).double()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        components = torch.zeros(3, x.shape[1], dtype=torch.float64)
        found = vectors.T.flip(0)[:3]
        components[: len(found)] = (
            found * torch.take_along_dim(found, found.abs().argmax(1, keepdim=True), 1).sign()
        )
        drawn = torch.cat([(x - mean) @ components.T, x.mean(1, keepdim=True)], dim=1).numpy()
        low, high = np.percentile(drawn, SPAN, axis=0)
        shares = values.flip(0)[:3].clamp(min=0) / values.clamp(min=0).sum().clamp(min=1e-30)
        return cls(mean.float(), components.float(), low, high, tuple(shares.tolist()))

    def project(self, features: Tensor) -> Tensor:
        """A map (D, h, w) -> the three components and the channel mean, (4, h, w)."""
        flat = features.flatten(1)
        centred = flat - self.mean.to(flat.device)[:, None]
        drawn = torch.cat([self.components.to(flat.device) @ centred, flat.mean(0, keepdim=True)])
        return drawn.unflatten(1, features.shape[1:])

    def colours(self, drawn: np.ndarray) -> dict[str, np.ndarray]:
        """(4, h, w) -> {"pca", "mean"}: pictures (h, w, 3) uint8."""
        span = np.maximum(self.high - self.low, 1e-12)
        shown = np.clip((drawn - self.low[:, None, None]) / span[:, None, None], 0, 1)
        false = matplotlib.colormaps[FALSE_COLOURS](shown[3])[..., :3]
        return {
            "pca": (shown[:3].transpose(1, 2, 0) * 255).round().astype(np.uint8),
            "mean": (false * 255).round().astype(np.uint8),
        }


def write_pictures(
    target: Path,
    *,
    image: np.ndarray,
    drawn: np.ndarray,
    seen: np.ndarray,
    bases: Sequence[Basis],
    layers: Sequence[int],
    cell: int,
    size: tuple[int, int],
) -> list[Path]:
    """`target`.png, the sheet of an image, and `target`-layer-I-pca.png and -mean.png for each layer.

    Args:
        image: raw pixels (C, ·, ·) of the whole image, at any size.
        drawn, seen: of blended_maps.
        bases, layers: of each layer, and its index.
        cell: pixels per cell. size: H and W of the image in pixels.
    """
    pictures: dict[str, np.ndarray] = {}
    for index, basis, values in zip(layers, bases, drawn, strict=True):
        for kind, colours in basis.colours(values).items():
            alpha = seen[..., None].astype(np.uint8) * 255
            pictures[f"layer-{index}-{kind}"] = _enlarged(np.concatenate([colours, alpha], 2), cell, size)
    written = []
    for name, picture in pictures.items():
        written.append(target.with_name(f"{target.name}-{name}.png"))
        with files.atomic_path(written[-1]) as temporary:
            Pillow.fromarray(picture).save(temporary)
    sheet = target.with_name(f"{target.name}.png")
    save(_sheet(to_rgb(image), pictures, bases, layers, title=target.name), sheet)
    return [sheet, *written]


def _enlarged(picture: np.ndarray, cell: int, size: tuple[int, int]) -> np.ndarray:
    """The picture (rows, columns, 4) of cells at the image's size, or of PICTURE_SIDE where that is less and
    the cells are fewer; what the last cells have beyond the image is cut off."""
    height, width = size
    scale = min(1.0, max(PICTURE_SIDE, max(picture.shape[:2])) / max(size))
    rows, columns = (max(1, round(length * cell * scale)) for length in picture.shape[:2])
    shown = Pillow.fromarray(picture).resize((columns, rows), Pillow.Resampling.BILINEAR)
    return np.asarray(shown)[: max(1, round(height * scale)), : max(1, round(width * scale))]


def _sheet(
    image: np.ndarray,
    pictures: dict[str, np.ndarray],
    bases: Sequence[Basis],
    layers: Sequence[int],
    *,
    title: str,
) -> Figure:
    """A row per layer: the image, the components and the mean."""
    tall = panel_height(PANEL, image.shape) + 0.5
    figure = Figure(figsize=(3 * PANEL, tall * len(layers) + 0.5), layout="constrained")
    figure.suptitle(title, fontsize=11)
    grid = figure.subplots(len(layers), 3, squeeze=False)
    for axes, index, basis in zip(grid, layers, bases, strict=True):
        panel(axes[0], image, "image", fontsize=9)
        held = f"{sum(basis.shares):.0%} of the variance"
        panel(
            axes[1], pictures[f"layer-{index}-pca"], f"layer {index}: three components ({held})", fontsize=9
        )
        mean = f"layer {index}: mean of {len(basis.mean)} channels"
        panel(axes[2], pictures[f"layer-{index}-mean"], mean, fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------ several domains


def import_umap() -> Any:
    """umap-learn; a ValueError that says how to get it where it is not installed."""
    try:
        import umap
    except ImportError as error:
        reason = "" if isinstance(error, ModuleNotFoundError) and error.name == "umap" else f" ({error})"
        raise ValueError(
            f'--compare needs umap-learn, which cannot be imported{reason}: pip install "rsmodels[viz]"'
        ) from None
    return umap


def plane(features: np.ndarray, *, seed: int) -> np.ndarray:
    """Features (N, D) -> places (N, 2) by UMAP (McInnes et al. 2018, https://arxiv.org/abs/1802.03426)."""
    umap = import_umap()
    neighbours = max(2, min(15, len(features) - 1))  # 15 is its default; fewer features allow fewer
    return np.asarray(umap.UMAP(n_neighbors=neighbours, random_state=seed).fit_transform(features))


def plane_figure(
    places: np.ndarray,
    domain: np.ndarray,
    domains: Sequence[str],
    *,
    label: np.ndarray | None = None,
    classes: Sequence[str] = (),
    palette: Sequence[tuple[int, int, int]] = (),
    title: str,
) -> Figure:
    """Features by domain (Fig. 7 of CrossEarth) and, where they are labelled, by class (Fig. 8).

    Args:
        places: (N, 2). domain: (N,), index into `domains`. label: (N,), index into `classes`.
    """
    figure = Figure(figsize=(6.4 if label is None else 12.4, 6), layout="constrained")
    figure.suptitle(title, fontsize=11)
    panels = figure.subplots(1, 1 if label is None else 2, squeeze=False)[0]
    colours = matplotlib.colormaps[DOMAIN_COLOURS]
    # One after the other a domain would hide the one before: all features in one mixed order.
    order = np.random.default_rng(0).permutation(len(places))
    rgb = np.array([colours(index % colours.N)[:3] for index in range(len(domains))])
    panels[0].scatter(*places[order].T, c=rgb[domain[order]], s=6, linewidths=0)
    for index, name in enumerate(domains):
        panels[0].scatter([], [], color=rgb[index], label=name)
    panels[0].set_title("by domain", fontsize=10)
    if label is not None:
        shown = np.array(palette) / 255
        for index, name in enumerate(domains):
            own = domain == index
            marker = MARKERS[index % len(MARKERS)]
            panels[1].scatter(
                *places[own].T, c=shown[label[own]], s=12, marker=marker, linewidths=0, alpha=0.8
            )
            panels[1].scatter([], [], color="0.5", marker=marker, label=name)
        for index in np.unique(label):
            panels[1].scatter([], [], color=shown[index], marker="s", label=classes[index])
        panels[1].set_title("by class", fontsize=10)
    for axes in panels:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.legend(fontsize=8, loc="best")
    return figure
