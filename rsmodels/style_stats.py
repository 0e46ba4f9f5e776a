"""`rsmodels style-stats`: mean and covariance of a field archive's styles, measured once (CrossEarth, eq. 2).

Images are looked at one after the other, in the order of their names, and memory holds one: an archive
of any size is one pass. The result is a small JSON file for EarthStyle.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rasterio.windows import Window
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from rsmodels.data.base import IMAGE_SUFFIXES
from rsmodels.data.io import ImageData, read_image, read_size
from rsmodels.data.raster import gdal
from rsmodels.data.synthetic.domains import BANDS
from rsmodels.data.synthetic.gaps import left_out
from rsmodels.evaluation.inference import pick_device
from rsmodels.files import check_output
from rsmodels.pretraining.scenes import Place, SceneStream, places
from rsmodels.style import VALUE_RANGE, RunningMoments, StyleModel, StyleStatistics, create_style
from rsmodels.training.build import reader_processes
from rsmodels.training.parallel import detach_reader

WINDOWS = 16  # of one image, at most: a large scene shall not drown the small ones
WHOLE = 2**24  # pixels of an image that is read at once and then cut, which for most formats is quicker
SYNTHETIC_SCENES = 1000
# More raster formats than data sets come in; GDAL knows others whose suffixes mostly mean something else.
SUFFIXES = IMAGE_SUFFIXES | {".gif", ".webp", ".j2k", ".ppm", ".pgm", ".ntf", ".mrf", ".pix", ".bil"}


@dataclass
class StyleStatsConfig:
    """One measurement of a field archive."""

    output: str
    """File to write, NAME.json: what the models' style_statistics reads."""
    folder: str | None = field(
        default=None, metadata={"positional": "folder of images, searched with all its subfolders"}
    )
    data: Literal["synthetic"] | None = None
    """synthetic: in place of a folder, generated scenes of many domains, the benchmark's targets left out."""
    style: Literal["color", "ghiasi"] = "color"
    """Style model: color has no weights, ghiasi needs --style-weights."""
    style_weights: str | None = None
    """Folder of ghiasi's published checkpoints."""
    bands: tuple[int, ...] | None = None
    """Three bands to read, counted from 1, in this order (default: all but alpha, which must be three)."""
    value_range: float | None = None
    """Raw value that is white, for example 10000 (default: 255 for 8-bit images; others need to be told)."""
    image_size: int = 256
    """Side in pixels of the windows that images are cut into, and of generated scenes; smaller images are
    taken whole."""
    limit: int | None = None
    """Images to look at, spread over the folder (default: all); generated scenes (default: 1000)."""
    leave_out: str = ""
    """Domains that generated scenes leave out besides the benchmark's targets, as for rsmodels pretrain."""
    seed: int = 0
    """Seed of the generated scenes."""
    num_workers: int | None = None
    """Processes that render generated scenes (default: the cores less one, at most 4)."""
    device: str | None = None
    """cpu or cuda (default: cuda where there is one)."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Measured:
    """What was written; from how many images; how many others could not be used."""

    statistics: StyleStatistics
    images: int
    failed: int


def measure_styles(config: StyleStatsConfig, on_error: Callable[[Exception], None]) -> Measured:
    """Measure as `config` says and write its output file.

    What is wrong with one image goes to `on_error`, and the next is looked at. What is wrong with the
    request, or with all images, is a ValueError or FileNotFoundError of one line.
    """
    _check(config)
    device = pick_device(config.device)
    style = create_style(config.style, config.style_weights)
    if isinstance(style, nn.Module):
        style.to(device)
    measure = _measure_scenes if config.data == "synthetic" else _measure_folder
    moments, images, failed, source = measure(config, style, device, on_error)
    if moments.count <= style.size:
        warnings.warn(
            f"{source}: {moments.count} styles of {style.size} numbers each do not fill their covariance; "
            "sampled styles will be mixtures of these; measure more images",
            stacklevel=2,
        )
    statistics = StyleStatistics(
        style.name, moments.mean, moments.covariance(), style.fingerprint(), moments.count, source
    )
    statistics.save(config.output)
    return Measured(statistics, images, failed)


def _measure_folder(
    config: StyleStatsConfig, style: StyleModel, device: torch.device, on_error: Callable[[Exception], None]
) -> tuple[RunningMoments, int, int, str]:
    """Moments, images that are in them, images that could not be used, and what they are of."""
    assert config.folder is not None
    files = find_images(config.folder)
    if config.limit is not None and config.limit < len(files):
        files = [files[index * len(files) // config.limit] for index in range(config.limit)]
    moments, failed = RunningMoments(style.size), 0
    with gdal():
        for path in tqdm(files, "style-stats", unit="image", disable=None):
            try:
                images = read_windows(path, config)
                try:
                    embeddings = style.embed(images.to(device))
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
            except (ValueError, OSError) as error:
                on_error(error)
                failed += 1
            else:
                moments.add(embeddings)
    used = len(files) - failed
    if moments.count < 2:
        raise ValueError(
            f"{config.folder}: {used} of its {len(files)} images could be used; a covariance "
            "needs two styles or more"
        )
    side = config.image_size
    source = f"{used} images of {config.folder}, {moments.count} windows of {side} x {side} pixels at most"
    return moments, used, failed, source


def _measure_scenes(
    config: StyleStatsConfig, style: StyleModel, device: torch.device, _on_error: Callable[[Exception], None]
) -> tuple[RunningMoments, int, int, str]:
    """As _measure_folder: every scene counts once in each of its band sets."""
    choice = places(left_out(config.leave_out.split()))
    count = SYNTHETIC_SCENES if config.limit is None else config.limit
    moments = RunningMoments(style.size)
    scenes = _scenes(config, choice, count)
    for (place,), (scene,) in tqdm(scenes, "style-stats", count, unit="scene", disable=None):
        views = torch.stack([scene[list(BANDS[bands])] for bands in choice[place][1]])
        moments.add(style.embed(views.to(device) / VALUE_RANGE))
    also = f" and {config.leave_out}" if config.leave_out else ""
    source = (
        f"{count} generated scenes of {len(choice)} places and seasons, {config.image_size} pixels, seed "
        f"{config.seed}, without the benchmark's targets{also}"
    )
    return moments, count, 0, source


def _scenes(config: StyleStatsConfig, choice: list[Place], count: int) -> Iterator[tuple[list[int], Tensor]]:
    workers = reader_processes() if config.num_workers is None else config.num_workers
    return iter(
        DataLoader(
            SceneStream(config.seed, config.image_size, choice, looks=1),
            batch_size=None,
            sampler=range(count),
            num_workers=workers,
            worker_init_fn=detach_reader if workers else None,
            generator=torch.Generator(),  # without one of its own it draws from the global generator
        )
    )


# ------------------------------------------------------------------------------------------------- images


def find_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Every raster under `folder`, by suffix, sorted; hidden files and folders are not data.

    Links to folders are followed, and each folder is looked into once, by the first of its names.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one that holds images")
    found, seen = [], {root.resolve()}
    for parent, folders, names in os.walk(root, followlinks=True):
        real = {name: Path(parent, name).resolve() for name in sorted(folders) if name[0] != "."}
        folders.clear()
        for name, place in real.items():
            if place not in seen:  # a link may lead to where the walk has been, or is
                seen.add(place)
                folders.append(name)
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
    if not found:
        raise ValueError(
            f"{folder}: holds no images, nor do its subfolders (looked for {', '.join(sorted(SUFFIXES))})"
        )
    return sorted(found)


def read_windows(path: Path, config: StyleStatsConfig) -> Tensor:
    """Windows (N, 3, h, w) of an image, in [0, 1]; those with pixels that hold no data are left out.

    Raises ValueError, naming the file, where it gives none: unreadable, not of three bands, of an unknown
    range of values, or with holes everywhere.
    """
    height, width = read_size(path)
    side = config.image_size
    whole = read_image(path, config.bands) if height * width <= WHOLE else None
    views = []
    for window in spread_windows(height, width, side):
        if whole is None:
            part = read_image(path, config.bands, window=window)
        else:
            rows, columns = window.toslices()
            valid = None if whole.valid is None else whole.valid[rows, columns]
            part = ImageData(whole.pixels[:, rows, columns], valid)
        if len(part.pixels) != 3:
            raise ValueError(
                f"{path}: has {len(part.pixels)} bands, a style is of three; choose them with --bands 1,2,3"
            )
        if part.valid is None or part.valid.all():
            views.append(_to_unit(path, part.pixels, config.value_range))
    if not views:
        raise ValueError(f"{path}: pixels without data in every window of {side} x {side}")
    return torch.from_numpy(np.stack(views))


def spread_windows(height: int, width: int, side: int) -> list[Window]:
    """At most WINDOWS windows of `side` pixels or less that lie evenly over an image and do not overlap."""
    rows, columns = max(1, height // side), max(1, width // side)
    rows = min(rows, max(round(WINDOWS**0.5), WINDOWS // columns))
    columns = min(columns, WINDOWS // rows)
    h, w = min(side, height), min(side, width)

    def starts(length: int, count: int, size: int) -> list[int]:
        return [((2 * index + 1) * length // count - size) // 2 for index in range(count)]

    return [Window(left, top, w, h) for top in starts(height, rows, h) for left in starts(width, columns, w)]


def _to_unit(path: Path, pixels: np.ndarray, value_range: float | None) -> np.ndarray:
    if value_range is None and pixels.dtype != np.uint8:
        raise ValueError(
            f"{path}: pixels are {pixels.dtype}, up to {pixels.max():g}; say with --value-range which "
            "value is white, for example 10000"
        )
    return np.clip(pixels.astype(np.float32) / np.float32(value_range or VALUE_RANGE), 0, 1)


# ------------------------------------------------------------------------------------------------ request


def _check(config: StyleStatsConfig) -> None:
    """Everything that can be wrong before the first image is read."""
    if (config.folder is None) == (config.data is None):
        given = "none" if config.folder is None else f"{config.folder} and --data {config.data}"
        raise ValueError(f"give a folder of images, or --data synthetic for generated scenes; found {given}")
    foreign: dict[str, object]
    if config.folder is None:
        kind, foreign = "generated scenes", {"--bands": config.bands, "--value-range": config.value_range}
    else:
        kind, foreign = "a folder of images", {"--leave-out": config.leave_out}
    for option, value in foreign.items():
        if value:
            raise ValueError(f"{option}: has no meaning for {kind}; leave it out")
    if config.bands is not None and len(config.bands) != 3:
        raise ValueError(f"--bands {','.join(map(str, config.bands))}: a style is of three bands; give three")
    if config.style == "ghiasi" and config.style_weights is None:
        raise ValueError("--style ghiasi needs --style-weights, the folder of its published checkpoints")
    for option, number, least in (
        ("--limit", config.limit, 2),
        ("--image-size", config.image_size, 2),
        ("--num-workers", config.num_workers, 0),
        ("--seed", config.seed, 0),
    ):
        if number is not None and number < least:
            raise ValueError(f"{option} {number}: expected {least} or more")
    if config.value_range is not None and not 0 < config.value_range < float("inf"):
        raise ValueError(
            f"--value-range {config.value_range:g}: expected the raw value that is white, above 0"
        )
    check_output(config.output, ".json")
    if Path(config.output).exists():
        raise ValueError(f"--output {config.output}: already exists; give another name, or remove it")
