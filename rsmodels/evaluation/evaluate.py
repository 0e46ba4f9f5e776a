"""Evaluate a model on a data set: one confusion matrix per domain, and the best and worst tiles.

Every image is covered by tiles of the model's own input size, which overlap and are blended; an image of
exactly that size is one tile. Under torch.distributed each rank takes its share of the images and the counts
are added up, so the figures are those of a single process.
"""

from __future__ import annotations

import itertools
import math
import signal
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from rsmodels.data import SegmentationDataset, create_dataset, dataset_options
from rsmodels.data.tiling import Tile, TileGrid, blend_rows, reflect_to
from rsmodels.evaluation.inference import (
    SegmentationModel,
    check_cuda_graph,
    pick_device,
    pick_dtype,
    predict_tiles,
)
from rsmodels.evaluation.metrics import ConfusionMatrix, logits_to_ids
from rsmodels.evaluation.report import Evaluation, ScoredTile, read_log, write_report
from rsmodels.registry import Preprocessing, load_model

STYLE_EXAMPLES = 3  # images of a report that show what a style-injecting model trains on


@dataclass
class EvaluateConfig:
    """One evaluation: which model on which images."""

    model: str
    """Folder of a trained model, for example runs/x/best."""
    data: str = "synthetic"
    """Name of the data set."""
    root: str | None = None
    """Folder of the data set; synthetic data needs none."""
    data_args: dict[str, Any] = field(default_factory=dict)
    """Arguments for the data set, for example --data-args.classes classes.yaml."""
    split: str = "test"
    """Part of the data set: train, val or test."""
    domain: str | None = None
    """Only the images of this domain, for example rural."""
    bands: tuple[int, ...] | None = None
    """Bands to read, counted from 1, in this order (default: the model's)."""
    report: str | None = None
    """Folder for the report (default: report/ beside the model's folder)."""
    tiles: int = 4
    """Best and worst images to show in the report, each."""
    overlap: float = 0.25
    """Share of its side that a tile has in common with its neighbour, where an image takes several."""
    batch_size: int = 8
    """Tiles per call of the model."""
    num_workers: int = 0
    """Processes that read images ahead."""
    device: str | None = None
    """cpu or cuda (default: cuda where there is one)."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Compute type (default: bf16 on cuda, fp32 on cpu)."""
    cuda_graph: bool = False
    """Launch a batch as one recorded CUDA graph; on cuda, in one process."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True, eq=False)
class _Image:
    index: int
    name: str
    domain: str
    mask: Tensor
    grid: TileGrid


def evaluate_model(
    model: SegmentationModel,
    dataset: SegmentationDataset,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 8,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    overlap: float = 0.25,
    tiles: int = 4,
    num_workers: int = 0,
    progress: bool = True,
    cuda_graph: bool = False,
) -> Evaluation:
    """Predict images of `dataset` (all, or those at `indices`) with a model in memory, and count.

    All ranks call it alike and get the same metrics; the best and worst images are complete on rank 0. The
    model is put into eval mode and back. Raises ValueError where model and data set differ in their classes.
    """
    schema = dataset.schema
    if model.num_classes != schema.num_logits:
        raise ValueError(
            f"the model predicts {model.num_classes} classes and data set {dataset.name!r} has "
            f"{schema.num_logits} ({', '.join(schema.classes)}): evaluate on data of the model's classes"
        )
    device = torch.device(device)
    check_cuda_graph(cuda_graph, device)
    rank, world = _rank_and_world()
    new_matrix = partial(ConfusionMatrix, schema.classes, binary=schema.binary, device=device)
    matrices: defaultdict[str, ConfusionMatrix] = defaultdict(new_matrix)
    ranking = _Ranking(tiles)
    with _eval_mode(model):
        share = (range(len(dataset)) if indices is None else indices)[rank::world]
        samples = DataLoader(
            _Samples(dataset),
            batch_size=None,
            sampler=share,
            num_workers=num_workers,
            worker_init_fn=_leave_sigint,
        )
        shown = tqdm(samples, "evaluate", unit="image", disable=None if progress and rank == 0 else True)
        stream = predict_tiles(
            model,
            _tiles(zip(share, shown, strict=True), model.image_size, overlap),
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            lockstep=True,
            cuda_graph=cuda_graph,
        )
        for image, scored in itertools.groupby(stream, key=lambda item: item[0][0]):
            scores = ((tile, score) for (_, tile), score in scored)
            bands = blend_rows(image.grid, scores, channels=model.num_classes, device=device)
            ids = torch.cat([logits_to_ids(band[None])[0] for _, band in bands])
            counts = new_matrix()
            counts.update(ids, image.mask.to(device))
            matrices[image.domain] += counts
            ranking.add(image, counts.compute()["mean_iou"], ids)
    metrics = _summarise(matrices, total=new_matrix())
    return Evaluation(metrics, *ranking.gather())


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Evaluate a saved model, write the report (rank 0, where there are several) and return the figures."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, info = load_model(config.model, device=device)
    dataset = open_dataset(config, model.preprocessing)
    # A model saved without class names is held against their number alone.
    if info.get("classes") and tuple(info["classes"]) != dataset.schema.classes:
        raise ValueError(
            f"{config.model}: trained on the classes {', '.join(info['classes'])}; data set {config.data!r} "
            f"has {', '.join(dataset.schema.classes)}: evaluate on data of the model's classes"
        )
    indices = domain_indices(config, dataset)
    evaluation = evaluate_model(
        model,
        dataset,
        indices=indices,
        batch_size=config.batch_size,
        device=device,
        dtype=dtype,
        overlap=config.overlap,
        tiles=config.tiles,
        num_workers=config.num_workers,
        cuda_graph=config.cuda_graph,
    )
    if _rank_and_world()[0] == 0:
        domain = f", domain {config.domain}" if config.domain else ""
        write_report(
            report_folder(config),
            evaluation,
            dataset,
            title=f"{info['model']} on {config.data}, {config.split} split{domain}",
            log=read_log(Path(config.model).resolve().parent / "log.jsonl"),
            notes=_notes(config, info, dataset),
            examples=_style_examples(config, model, info, dataset, indices),
        )
    return evaluation


def report_folder(config: EvaluateConfig) -> Path:
    """Where the report goes: --report, or report/ in the run's folder, beside the model."""
    return Path(config.report) if config.report else Path(config.model).resolve().parent / "report"


def open_dataset(config: EvaluateConfig, preprocessing: Preprocessing) -> SegmentationDataset:
    """The split that `config` names, with the bands asked for, or else the model's."""
    options = dict(config.data_args)
    bands = config.bands or preprocessing.bands
    if bands is not None and "bands" in dataset_options(config.data):
        options.setdefault("bands", tuple(bands))
    if config.domain is not None and _makes_domains(config.data):
        options["domain"] = config.domain
    return create_dataset(config.data, root=config.root, split=config.split, **options)


def _makes_domains(data: str) -> bool:
    """Whether the data set renders the domain it is asked for; any other is filtered."""
    return "domain" in dataset_options(data)


def domain_indices(config: EvaluateConfig, dataset: SegmentationDataset) -> Sequence[int]:
    """The images of the domain that `config` names, or all; ValueError where there are none."""
    domain = config.domain
    if domain is None or _makes_domains(config.data):
        return range(len(dataset))
    domains = [dataset.domain_of(index) for index in range(len(dataset))]
    if domain not in domains:
        raise ValueError(
            f"domain {domain!r} is not in split {dataset.split!r} of {dataset.name!r}, "
            f"which has {', '.join(sorted(set(domains)))}"
        )
    return [index for index, name in enumerate(domains) if name == domain]


def _notes(config: EvaluateConfig, info: dict[str, Any], dataset: SegmentationDataset) -> list[str]:
    notes = list(dataset.notes)
    trained_on = (info.get("training") or {}).get("data")
    if trained_on == config.data and config.split == "val":
        notes.append(
            "These are validation images: the checkpoint was chosen because it does well on them, "
            "so the figures are higher than on unseen images."
        )
    if trained_on == config.data and config.split == "train":
        notes.append("These are training images: the figures say nothing about unseen ones.")
    return notes


def _style_examples(
    config: EvaluateConfig,
    model: Any,
    info: dict[str, Any],
    dataset: SegmentationDataset,
    indices: Sequence[int],
) -> list[np.ndarray] | None:
    """X, X_S and X_M of the first images, on the data that the model was trained on, where it trains on such.

    A model says so by `style_examples`: normalised images of its size → X, X_S and X_M in [0, 1], or None.
    """
    trained_on = (info.get("training") or {}).get("data")
    if not hasattr(model, "style_examples") or trained_on != config.data:
        return None
    height, width = model.image_size
    parts = [dataset[index]["image"][:, :height, :width] for index in indices[:STYLE_EXAMPLES]]
    images = torch.stack([reflect_to(part, model.image_size) for part in parts])
    device = next(model.parameters()).device
    # The same pictures every time, and no change to the random numbers of whoever calls.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        examples = model.style_examples(model.preprocessing.normalize(images.to(device, torch.float32)))
    return None if examples is None else [part.float().cpu().numpy() for part in examples]


class _Samples(Dataset):
    """A data set whose errors arrive as values: a reader process would bury their one line in a traceback."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> dict[str, Any] | Exception:
        try:
            return self.dataset[index]
        except (OSError, ValueError) as error:
            return error


def _leave_sigint(_worker: int) -> None:
    """Ctrl-C is for the main process, which then ends its readers; they need not print a traceback each."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tiles(
    samples: Iterable[tuple[int, dict[str, Any] | Exception]], size: tuple[int, int], overlap: float
) -> Iterator[tuple[tuple[_Image, Tile], Tensor]]:
    """Every tile of every image, with what it belongs to."""
    for index, sample in samples:
        if isinstance(sample, Exception):
            raise sample
        pixels = sample["image"]
        grid = TileGrid((pixels.shape[1], pixels.shape[2]), size, overlap)
        image = _Image(index, sample["name"], sample["domain"], sample["mask"], grid)
        for tile in grid:
            part = pixels[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
            yield (image, tile), part


class _Ranking:
    """The images with the lowest and the highest score seen so far."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.scored: list[ScoredTile] = []

    def add(self, image: _Image, score: float, ids: Tensor) -> None:
        """An image without any labelled class has no score, and is not ranked."""
        if not math.isnan(score):
            self.scored.append(ScoredTile(image.index, image.name, score, ids.cpu().numpy()))
            self._drop_the_middle()

    def gather(self) -> tuple[list[ScoredTile], list[ScoredTile]]:
        """Worst and best over all ranks (on rank 0; other ranks give their own). No image is in both."""
        rank, world = _rank_and_world()
        if world > 1:
            collected: list[Any] | None = [None] * world if rank == 0 else None
            dist.gather_object(self.scored, collected)
            if collected is not None:
                self.scored = list(itertools.chain.from_iterable(collected))
                self._drop_the_middle()
        worst = self.scored[: self.keep]
        return worst, self.scored[len(worst) :][-self.keep :][::-1] if self.keep else []

    def _drop_the_middle(self) -> None:
        self.scored.sort(key=lambda tile: (tile.score, tile.index))
        del self.scored[self.keep : max(len(self.scored) - self.keep, self.keep)]


def _summarise(matrices: defaultdict[str, ConfusionMatrix], total: ConfusionMatrix) -> dict[str, Any]:
    """Add up ranks, then domains, into `total`. Every rank reduces the same domains in the same order."""
    domains = sorted(matrices)
    _, world = _rank_and_world()
    if world > 1:
        seen: list[Any] = [None] * world
        dist.all_gather_object(seen, domains)
        domains = sorted(set(itertools.chain.from_iterable(seen)))
    for domain in domains:
        matrices[domain].all_reduce()
        total += matrices[domain]
    metrics = total.compute()
    if len(domains) > 1:
        metrics["per_domain"] = {domain: matrices[domain].compute() for domain in domains}
    return metrics


@contextmanager
def _eval_mode(model: SegmentationModel) -> Iterator[None]:
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)


def _rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
