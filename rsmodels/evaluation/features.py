"""What a network sees: maps of its layers as pictures, and where the features of domains lie in one plane.

The pictures are those of CrossEarth's Fig. 9, the planes those of Figs. 7 and 8 (Gong et al.,
https://arxiv.org/abs/2410.22629). In memory are the pictures, in cells of at least a patch, and one batch of
tiles, never a scene's pixels or features.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from rsmodels.data import SegmentationDataset
from rsmodels.data.base import image_files
from rsmodels.data.raster import Scene, gdal
from rsmodels.evaluation.evaluate import EvaluateConfig, domain_indices, open_dataset
from rsmodels.evaluation.feature_maps import (
    Held,
    Readable,
    blended_maps,
    cell_side,
    overview,
    sample_features,
    spread,
)
from rsmodels.evaluation.feature_pictures import (
    PICTURE_SIDE,
    Basis,
    import_umap,
    plane,
    plane_figure,
    write_pictures,
)
from rsmodels.evaluation.figures import save
from rsmodels.evaluation.layers import Layers, open_layers

BASIS_IMAGES, BASIS_FEATURES = 16, 4096  # what components and colours are found from
# Tiles that features are drawn from: of all images together, but of each image at least so many.
SAMPLED_TILES, TILES_OF_IMAGE = 16, 4


@dataclass
class FeaturesConfig:
    """One look at what a network sees: which images, which layers, where to."""

    images: list[str] = field(
        metadata={"positional": "images, or folders of images; with --data, domains of that data set"}
    )
    model: str
    """Folder of a trained model, for example runs/x/best, or the name of an encoder, such as dinov2_vit_b."""
    output: str
    """Folder for the pictures."""
    pretrained: str | None = None
    """Checkpoint of the encoder that --model names, for example dinov2_vitb14_pretrain.pth."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Arguments for the encoder that --model names, for example --model-args.registers 4."""
    layers: tuple[int, ...] | None = None
    """Layers to look at, counted from 0, or from the end as -1 (default: the last one)."""
    compare: bool = False
    """Draw where the features of the images, folders or domains lie in one plane (UMAP), one colour each, and
    for labelled data one colour per class; needs umap-learn."""
    points: int = 2000
    """Features of each image, folder or domain to draw with --compare."""

    data: str | None = None
    """Name of a data set to take labelled images from (default: none, images are files)."""
    root: str | None = None
    """Folder of the data set; synthetic data needs none."""
    data_args: dict[str, Any] = field(default_factory=dict)
    """Arguments for the data set, for example --data-args.classes classes.yaml."""
    split: str = "test"
    """Part of the data set: train, val or test."""
    most: int = 16
    """Images to take of a folder or domain, evenly spread over it."""

    tile: int | None = None
    """Side of a tile in pixels (default: what the model was trained on)."""
    overlap: float = 0.25
    """Share of its side that a tile has in common with its neighbour."""
    bands: tuple[int, ...] | None = None
    """Bands to use, counted from 1, in the model's order (default: the model's own)."""
    scale: float | Literal["auto"] | None = None
    """Multiply pixel values of files by this, or stretch them, as in rsmodels predict."""
    batch_size: int = 4
    """Tiles per call of the model."""
    seed: int = 0
    """Seed of the features that are drawn at random, and of UMAP."""
    device: str | None = None
    """cpu or cuda (default: cuda where there is one)."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Compute type (default: bf16 on cuda, fp32 on cpu)."""
    debug: bool = False
    """Show the traceback of an error."""


def draw_features(config: FeaturesConfig) -> list[Path]:
    """Draw what `config` asks for; the pictures' paths. Raises ValueError, FileNotFoundError or OSError."""
    for name in ("points", "most", "batch_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(config, name)}")
    if Path(config.output).exists() and not Path(config.output).is_dir():
        raise ValueError(f"--output {config.output}: is a file; give a folder for the pictures")
    if config.compare:
        import_umap()  # before the work, not after it
    layers = open_layers(
        config.model,
        layers=config.layers,
        pretrained=config.pretrained,
        model_args=config.model_args,
        tile=config.tile,
        device=config.device,
        dtype=config.dtype,
    )
    images = find_images(config, layers)
    with gdal():
        return _compare(config, layers, images) if config.compare else _draw(config, layers, images)


@dataclass(frozen=True)
class Image:
    """An image to look at: its domain, what its pictures are called, and how it is opened."""

    domain: str
    name: str
    open: Callable[[], AbstractContextManager[Readable]]


@dataclass(frozen=True)
class Images:
    """All images, and the classes of their labels with a colour each, where they have labels."""

    images: list[Image]
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()


def find_images(config: FeaturesConfig, layers: Layers) -> Images:
    """The images that `config` names: files, the files of folders, or tiles of a data set's domains."""
    if len(set(config.images)) < len(config.images):
        raise ValueError(f"{' '.join(config.images)}: one of them is named twice")
    if config.compare and len(config.images) < 2:
        raise ValueError(
            f"--compare takes two or more images, folders or domains, not {config.images[0]} alone"
        )
    found = _from_files(config, layers) if config.data is None else _from_dataset(config, layers)
    (name, count), *_ = Counter(image.name for image in found.images).most_common(1)
    if count > 1 and not config.compare:
        raise ValueError(
            f"{Path(config.output) / name}: two of the images would be drawn there; draw them one by one"
        )
    return found


def _from_files(config: FeaturesConfig, layers: Layers) -> Images:
    given = [name for name in ("root", "data_args") if getattr(config, name)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} belongs to a data set; name it with --data")
    found = []
    for name in config.images:
        folder = Path(name)
        if not folder.is_dir():
            found.append(Image(name, folder.stem, partial(_scene, folder, config, layers)))
            continue
        paths = spread(list(image_files(folder).values()), config.most)
        if not paths:
            raise ValueError(f"{name}: this folder holds no images")
        found += [
            Image(name, f"{folder.resolve().name}/{path.stem}", partial(_scene, path, config, layers))
            for path in paths
        ]
    return Images(found)


def _scene(path: Path, config: FeaturesConfig, layers: Layers) -> Scene:
    known = layers.preprocessing
    return Scene(path, mean=known.mean, std=known.std, bands=config.bands or known.bands, scale=config.scale)


def _from_dataset(config: FeaturesConfig, layers: Layers) -> Images:
    assert config.data is not None
    found: list[Image] = []
    for domain in config.images:
        one = EvaluateConfig(
            model=config.model,
            data=config.data,
            root=config.root,
            data_args=config.data_args,
            split=config.split,
            domain=domain,
            bands=config.bands,
        )
        dataset = open_dataset(one, layers.preprocessing)
        found += [
            Image(
                domain,
                f"{_file_name(domain)}/{_file_name(dataset.names[index])}",
                partial(_held, dataset, index),
            )
            for index in spread(domain_indices(one, dataset), config.most)
        ]
    return Images(found, dataset.schema.classes, dataset.schema.palette)


def _held(dataset: SegmentationDataset, index: int) -> AbstractContextManager[Held]:
    return nullcontext(Held(dataset[index]))


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text)


# ----------------------------------------------------------------------------------------------- pictures


def _draw(config: FeaturesConfig, layers: Layers, found: Images) -> list[Path]:
    """One basis per layer for all images, so that a colour means the same in each; then image by image."""
    rng = np.random.default_rng(config.seed)
    looked_at = spread(found.images, BASIS_IMAGES)
    samples = [
        _sample(config, layers, image, features=BASIS_FEATURES, images=len(looked_at), rng=rng)
        for image in looked_at
    ]
    bases = [
        Basis.fit(_together([features for features, _ in layer])) for layer in zip(*samples, strict=True)
    ]

    written: list[Path] = []
    for image in found.images:
        with image.open() as opened:
            drawn, seen = blended_maps(
                layers,
                opened,
                [basis.project for basis in bases],
                overlap=config.overlap,
                batch_size=config.batch_size,
                progress=partial(tqdm, desc=image.name, unit="tile", disable=None),
            )
            written += write_pictures(
                Path(config.output) / image.name,
                image=overview(opened, PICTURE_SIDE),
                drawn=drawn,
                seen=seen,
                bases=bases,
                layers=layers.indices,
                cell=cell_side(layers, opened.size),
                size=opened.size,
            )
    return written


def _sample(
    config: FeaturesConfig,
    layers: Layers,
    image: Image,
    *,
    features: int,
    images: int,
    rng: np.random.Generator,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """sample_features of one of `images` images that are to give `features` together."""
    with image.open() as opened:
        return sample_features(
            layers,
            opened,
            tiles=max(TILES_OF_IMAGE, SAMPLED_TILES // images),
            count=-(-features // images),
            batch_size=config.batch_size,
            rng=rng,
        )


def _together(parts: list[np.ndarray]) -> np.ndarray:
    """All features (N, D); images without a valid pixel have none."""
    filled = [part for part in parts if len(part)]
    if not filled:
        raise ValueError("every pixel of the images is nodata, or unlabelled: there is nothing to look at")
    return np.concatenate(filled)


# ---------------------------------------------------------------------------------------------- comparing


def _compare(config: FeaturesConfig, layers: Layers, found: Images) -> list[Path]:
    rng = np.random.default_rng(config.seed)
    images = Counter(image.domain for image in found.images)
    domains = list(images)
    parts: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in layers.indices]
    for image in tqdm(found.images, "compare", unit="image", disable=None):
        of_domain = images[image.domain]
        samples = _sample(config, layers, image, features=config.points, images=of_domain, rng=rng)
        for part, (features, labels) in zip(parts, samples, strict=True):
            if len(features):
                part.append((features, labels, np.full(len(features), domains.index(image.domain))))
    written = []
    for index, part in zip(layers.indices, parts, strict=True):
        features = _together([features for features, _, _ in part])
        labels, domain = (np.concatenate([row[which] for row in part]) for which in (1, 2))
        figure = plane_figure(
            plane(features, seed=config.seed),
            domain,
            domains,
            label=labels if found.classes else None,
            classes=found.classes,
            palette=found.palette,
            title=f"{layers.name}, layer {index}: {len(features)} features by UMAP",
        )
        written.append(Path(config.output) / f"umap-layer-{index}.png")
        save(figure, written[-1])
    return written
