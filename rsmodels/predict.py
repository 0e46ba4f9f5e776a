"""Segment a georeferenced raster: GeoTIFF in, GeoTIFF out, in memory bounded by one row of tiles.

Windows are read as they are needed, predicted in batches, blended where they overlap, and written as soon as
a band of rows is final. The output has the input's grid (CRS, transform, GCPs, RPCs) and its holes: a pixel
that is nodata, masked, transparent or not finite in the input is nodata (255) in the output.

    rsmodels.predict("scene.tif", model="runs/x/best", output="classes.tif")
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.windows import Window
from torch import Tensor
from tqdm import tqdm

from rsmodels.arguments import ImageSizeError
from rsmodels.data.raster import BLOCK, Scale, Scene, create_on_grid, gdal
from rsmodels.data.schema import IGNORE
from rsmodels.data.tiling import Tile, TileGrid, blend_rows
from rsmodels.evaluation.inference import (
    SegmentationModel,
    check_cuda_graph,
    pick_device,
    pick_dtype,
    predict_tiles,
)
from rsmodels.evaluation.metrics import logits_to_ids
from rsmodels.registry import load_model


@dataclass
class PredictConfig:
    """One prediction: which scenes, which model, where to."""

    scenes: list[str] = field(metadata={"positional": "rasters to segment"})
    model: str
    """Folder of a trained model, for example runs/x/best."""
    output: str
    """GeoTIFF of class ids to write; for several scenes, a folder."""
    probabilities: str | None = None
    """GeoTIFF of probabilities to write as well (float32, a band per class); for several scenes, a folder."""
    tile: int | None = None
    """Side of a tile in pixels (default: what the model was trained on)."""
    overlap: float = 0.25
    """Share of its side that a tile has in common with its neighbour."""
    bands: tuple[int, ...] | None = None
    """Bands of the scene to use, counted from 1, in the model's order (default: the model's own)."""
    scale: float | Literal["auto"] | None = None
    """Multiply pixel values by this, where their range is not that of the training images; auto stretches
    each band to the model's mean and standard deviation."""
    batch_size: int = 4
    """Tiles per call of the model."""
    device: str | None = None
    """cpu or cuda (default: cuda where there is one)."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Compute type (default: bf16 on cuda, fp32 on cpu)."""
    cuda_graph: bool = False
    """Launch a batch as one recorded CUDA graph; on cuda."""
    debug: bool = False
    """Show the traceback of an error."""


def predict(
    scene: str | Path,
    *,
    model: str | Path,
    output: str | Path,
    tile: int | None = None,
    overlap: float = 0.25,
    probabilities: str | Path | None = None,
    bands: Sequence[int] | None = None,
    scale: Scale = None,
    batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    cuda_graph: bool = False,
) -> Path:
    """Segment one raster and return the path of the map.

    Args:
        scene: any raster that GDAL reads.
        model: folder with model.safetensors and model.json.
        output: GeoTIFF uint8 of class ids, nodata 255, with a colour table and the class names as tags.
        tile: side of a tile in pixels; None takes the model's input size.
        overlap: share of its side that a tile shares with its neighbour, in [0, 1).
        probabilities: GeoTIFF float32 with a band per logit (one for a binary model), nodata NaN.
        bands: 1-based bands of the scene in the model's order; None takes the model's own.
        scale: factor for pixel values, or "auto": see `PredictConfig`.
        batch_size, device, dtype: tiles per call; "cpu" or "cuda"; "fp32" or "bf16".
        cuda_graph: launch a batch as one recorded CUDA graph; on cuda.

    Raises FileNotFoundError, ValueError or OSError, naming the file; an unfinished output leaves nothing.
    """
    mapper = _Mapper.load(
        model, tile=tile, batch_size=batch_size, device=device, dtype=dtype, cuda_graph=cuda_graph
    )
    mapper.run(scene, output, probabilities, overlap=overlap, bands=bands, scale=scale)
    return Path(output)


def predict_scenes(config: PredictConfig, on_error: Callable[[Exception], None]) -> int:
    """Segment every scene of `config`; hand what goes wrong with one to `on_error` and go on with the next.

    Returns how many scenes failed. What is wrong with the whole request is raised at once.
    """
    outputs = _outputs(config.scenes, config.output)
    probabilities = (
        _outputs(config.scenes, config.probabilities) if config.probabilities else [None] * len(outputs)
    )
    mapper = _Mapper.load(
        config.model,
        tile=config.tile,
        batch_size=config.batch_size,
        device=config.device,
        dtype=config.dtype,
        cuda_graph=config.cuda_graph,
    )
    failed = 0
    for scene, output, probability in zip(config.scenes, outputs, probabilities, strict=True):
        try:
            mapper.run(
                scene, output, probability, overlap=config.overlap, bands=config.bands, scale=config.scale
            )
        except (ValueError, OSError) as error:
            on_error(error)
            failed += 1
    return failed


def _outputs(scenes: Sequence[str], output: str) -> list[Path]:
    """Where each scene's map goes: `output` itself for one scene, unless it is a folder."""
    target = Path(output)
    if len(scenes) == 1 and not target.is_dir():
        return [target]
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target}: is a file; {len(scenes)} scenes need a folder to go to")
    names = [Path(scene).stem + ".tif" for scene in scenes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{target / name}: two of the scenes would be written there; predict them one by one"
            )
    return [target / name for name in names]


@dataclass(frozen=True)
class _Mapper:
    """A loaded model and what its maps are labelled with."""

    model: SegmentationModel
    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    cuda_graph: bool

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        tile: int | None,
        batch_size: int,
        device: str | None,
        dtype: str | None,
        cuda_graph: bool,
    ) -> _Mapper:
        if batch_size < 1:
            raise ValueError(f"batch size {batch_size} is not at least 1")
        chosen = pick_device(device)
        check_cuda_graph(cuda_graph, chosen)
        overrides: dict[str, Any] = {} if tile is None else {"image_size": tile}
        try:
            loaded, info = load_model(model, device=chosen, **overrides)
        except ImageSizeError as error:
            raise error.under("tile") from None
        ids = range(max(loaded.num_classes, 2))
        return cls(
            model=loaded,
            name=info["model"],
            classes=tuple(info.get("classes") or map(str, ids)),
            palette=tuple(tuple(color) for color in info.get("palette") or ()),
            batch_size=batch_size,
            device=chosen,
            dtype=pick_dtype(dtype, chosen),
            cuda_graph=cuda_graph,
        )

    def run(
        self,
        scene: str | Path,
        output: str | Path,
        probabilities: str | Path | None,
        *,
        overlap: float,
        bands: Sequence[int] | None,
        scale: Scale,
    ) -> None:
        """Read, predict, blend and write one scene."""
        _refuse_overwriting(scene, output, probabilities)
        channels, wanted = self.model.num_classes, self.model.preprocessing
        with ExitStack() as stack:
            stack.enter_context(gdal())
            source = stack.enter_context(
                Scene(scene, mean=wanted.mean, std=wanted.std, bands=bands or wanted.bands, scale=scale)
            )
            class_map = stack.enter_context(self._class_map(output, source.raster))
            probability_map = (
                stack.enter_context(self._probability_map(probabilities, source.raster))
                if probabilities
                else None
            )
            grid = TileGrid(source.size, self.model.image_size, overlap)
            tiles = (_read(source, tile) for tile in tqdm(grid, Path(scene).name, unit="tile", disable=None))
            predicted = predict_tiles(
                self.model,
                tiles,
                batch_size=self.batch_size,
                device=self.device,
                dtype=self.dtype,
                cuda_graph=self.cuda_graph,
            )
            # Validity is blended along as one more channel: all tiles agree on it, so it stays 0 or 1.
            scores = (
                (tile, None if score is None else torch.cat([score, valid.to(score)[None]]))
                for (tile, valid), score in predicted
            )
            seen = False
            for top, band in blend_rows(grid, scores, channels=channels + 1, align=BLOCK, device=self.device):
                probability, empty = band[:channels], band[channels] < 0.5
                seen = seen or not empty.all()
                ids = logits_to_ids(probability[None]).masked_fill(empty, IGNORE)
                _write(class_map, ids, top)
                if probability_map is not None:
                    _write(probability_map, probability.masked_fill(empty, torch.nan), top)
        if not seen:
            warnings.warn(f"{scene}: every pixel is nodata, and so is all of {output}", stacklevel=2)

    @contextmanager
    def _class_map(self, path: str | Path, source: DatasetReader) -> Iterator[DatasetWriter]:
        with create_on_grid(path, source, count=1, dtype="uint8", nodata=IGNORE) as target:
            target.set_band_description(1, "class")
            target.update_tags(1, **{f"class_{index}": name for index, name in enumerate(self.classes)})
            target.update_tags(TIFFTAG_SOFTWARE="rsmodels", model=self.name)
            if self.palette:
                colours = {index: (*colour, 255) for index, colour in enumerate(self.palette)}
                target.write_colormap(1, {**colours, IGNORE: (0, 0, 0, 0)})
            yield target

    @contextmanager
    def _probability_map(self, path: str | Path, source: DatasetReader) -> Iterator[DatasetWriter]:
        count = self.model.num_classes
        options = {"predictor": 3, "interleave": "band"}
        with create_on_grid(path, source, count=count, dtype="float32", nodata=np.nan, **options) as target:
            for band, name in enumerate(self.classes[-count:], 1):
                target.set_band_description(band, name)
            yield target


def _read(source: Scene, tile: Tile) -> tuple[tuple[Tile, Tensor], Tensor | None]:
    """((tile, valid (h', w') bool), pixels (C, h', w')); None where no pixel is valid."""
    pixels, valid = source.read(Window(tile.left, tile.top, tile.width, tile.height))
    return (tile, torch.from_numpy(valid)), torch.from_numpy(pixels) if valid.any() else None


def _write(target: DatasetWriter, rows: Tensor, top: int) -> None:
    target.write(rows.cpu().numpy(), window=Window(0, top, rows.shape[2], rows.shape[1]))


def _refuse_overwriting(scene: str | Path, output: str | Path, probabilities: str | Path | None) -> None:
    targets = [Path(path).resolve() for path in (output, probabilities) if path]
    if Path(scene).resolve() in targets:
        raise ValueError(f"{scene}: is the scene itself; write the result to another file")
    if len(set(targets)) < len(targets):
        raise ValueError(f"{output}: the classes and the probabilities need a file each")


class _CallableModule(types.ModuleType):
    """`rsmodels.predict` names this module and, as promised, the function: calling the module predicts."""

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        return predict(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
