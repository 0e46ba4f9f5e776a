"""The frozen network that a model learns from: it stands beside the model and gives maps with every batch.

It is in no checkpoint, no optimiser and no saved model. What tells it from another (its record: name, fit,
arguments and a hash of its weights) is part of the run, which resumes with no other.
"""

from __future__ import annotations

import hashlib
import json
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rsmodels import files
from rsmodels.data import SegmentationDataset
from rsmodels.registry import TEACHER_OF, Preprocessing, create_teacher
from rsmodels.training.config import TrainConfig
from rsmodels.training.sampler import Purpose, derive_seed, seed_everything

BANDS = 3
LOOKED_AT = 16  # tiles


class FrozenTeacher:
    """A registered teacher on its device, asked once per batch; every rank holds a whole one.

    Args:
        network: see rsmodels.registry.create_teacher.
        record: what tells this teacher from another, as JSON has it; it gets the hash of the weights.
        dtype: bfloat16 computes under autocast.
        cache: folder to keep maps in.
    """

    def __init__(
        self, network: Any, record: dict[str, Any], *, dtype: torch.dtype, cache: Path | None = None
    ) -> None:
        self.network, self.dtype = network, dtype
        self.record = {**record, "sha256": network.sha256()}
        self.cache = None if cache is None else MapCache(cache, json.dumps([self.record, str(dtype)]))

    def __call__(self, images: Tensor, raw: Tensor, preprocessing: Preprocessing) -> list[Tensor]:
        """The teacher's maps (B, D, h, w) on the device of `images`.

        Args:
            images: (B, 3, H, W), normalised by `preprocessing`.
            raw: the same before that, on the CPU: what the cache goes by, so that no GPU is waited for.
        """
        cache = self.cache
        if cache is None:
            return self._maps(images)
        found = []
        for index, pixels in enumerate(raw):
            path = cache.path(pixels, preprocessing)
            maps = cache.read(path)
            if maps is None:
                # One image at a time: what is kept must not depend on the batch that it came in.
                maps = [level[0].contiguous().cpu() for level in self._maps(images[index : index + 1])]
                try:
                    cache.write(path, maps)
                except OSError as error:  # a full disk: the cache saves time, the run is worth more
                    if self.cache is not None:
                        warnings.warn(f"--teacher-cache: {error}; going on without it", stacklevel=2)
                    self.cache = None
            found.append(maps)
        return [torch.stack(level).to(images.device) for level in zip(*found, strict=True)]

    def _maps(self, images: Tensor) -> list[Tensor]:
        enabled = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype if enabled else None, enabled=enabled):
            return self.network(images)


class MapCache:
    """Maps of images on disk, a safetensors file for each, named after all that decides over its content.

    Files appear whole or not at all. One that is damaged all the same counts as absent: it is computed anew.
    Runs, and ranks, may share a folder.

    Args:
        folder: made where it does not exist.
        teacher: what identifies the teacher, and how it computes.
    """

    def __init__(self, folder: Path, teacher: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.teacher = folder, teacher

    def path(self, pixels: Tensor, preprocessing: Preprocessing) -> Path:
        """Where the maps of one raw image (C, H, W) belong. Its normalised pixels follow from what is
        hashed."""
        seen = (self.teacher, preprocessing.mean, preprocessing.std, str(pixels.dtype), tuple(pixels.shape))
        digest = hashlib.sha256(repr(seen).encode())
        digest.update(pixels.contiguous().numpy().data)
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, path: Path) -> list[Tensor] | None:
        """The maps in `path`; None where there is no file that is whole."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                maps = [file.get_tensor(name) for name in sorted(file.keys())]
                checksum = (file.metadata() or {}).get("crc32")
        except (SafetensorError, OSError):
            return None
        return maps if maps and checksum == _checksum(maps) else None

    def write(self, path: Path, maps: Sequence[Tensor]) -> None:
        """Keep the maps (D, h, w) of one image."""
        tensors = {str(level): tensor for level, tensor in enumerate(maps)}
        with files.atomic_path(path) as temporary:
            temporary.write_bytes(save(tensors, metadata={"crc32": _checksum(maps)}))


def build_teacher(
    config: TrainConfig, model: Any, dataset: SegmentationDataset, device: torch.device, dtype: torch.dtype
) -> FrozenTeacher | None:
    """The teacher of a resolved configuration, the same on every rank; None where `model` learns from
    none."""
    if config.teacher is None or not model.transfers:
        return None
    bands = len(model.preprocessing.mean)
    if bands != BANDS:
        raise ValueError(
            f"--teacher {config.teacher}: takes {BANDS} bands, and {config.model} is made for {bands}; "
            f"choose {BANDS} with --bands"
        )
    seed_everything(derive_seed(config.seed, Purpose.TEACHER))
    network = create_teacher(
        config.teacher, image_size=model.image_size, fit=config.teacher_fit, **config.teacher_args
    )
    _check_fit(config, model, network)
    if config.teacher_weights is not None:
        try:
            network.load_pretrained(config.teacher_weights)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--teacher-weights {error}") from None
    cache = None if config.teacher_cache is None else Path(config.teacher_cache)
    if cache is not None:
        _check_cache(cache, dataset, model.image_size)
    record = {"name": config.teacher, "arguments": config.teacher_args, "fit": config.teacher_fit}
    return FrozenTeacher(network.to(device), json.loads(json.dumps(record)), dtype=dtype, cache=cache)


def describe_teacher(config: TrainConfig, teacher: FrozenTeacher | None) -> list[str]:
    """What the reader should know of the teacher at the start of a run."""
    if config.teacher is None:
        return []
    if teacher is None:
        return [f"{config.model} with these arguments learns from no teacher; {config.teacher} is not used"]
    millions = sum(parameter.numel() for parameter in teacher.network.parameters()) / 1e6
    said = f"learning from {config.teacher} ({millions:.1f} M parameters, in no file of this run), weights "
    said += teacher.record["sha256"][:12]
    if config.teacher_weights is None:
        said += ", which are random: give its checkpoint with --teacher-weights"
    return [said]


def _check_fit(config: TrainConfig, model: Any, network: Any) -> None:
    if network.embed_dim != model.teacher_dim:
        raise ValueError(
            f"--teacher {config.teacher}: its maps have {network.embed_dim} channels, {config.model} learns "
            f"from {model.teacher_dim}; choose a teacher of that width, as {TEACHER_OF[str(config.model)]}, "
            f"or --model-args.teacher_dim {network.embed_dim}"
        )
    if network.grid_size != model.grid_size:
        found, expected = ("x".join(map(str, grid)) for grid in (network.grid_size, model.grid_size))
        raise ValueError(
            f"--teacher {config.teacher}: its maps are {found}, {config.model} aligns its own to {expected}; "
            "give both one patch size, with --teacher-args.patch_size and --model-args.patch_size"
        )


def _check_cache(folder: Path, dataset: SegmentationDataset, size: tuple[int, int]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--teacher-cache {folder}: is a file; give a folder")
    # As far as some tiles can say, evenly spread: to read all of them takes too long.
    count = min(len(dataset), LOOKED_AT)
    for index in np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist():
        height, width = dataset[index]["mask"].shape
        if height > size[0] or width > size[1]:
            raise ValueError(
                f"--teacher-cache {folder}: tiles of {height}x{width} pixels are cropped to "
                f"{size[0]}x{size[1]} at random, so that hardly an image comes twice: the cache would only "
                "fill the disk; leave it out"
            )


def _checksum(maps: Sequence[Tensor]) -> str:
    """CRC-32 of the maps' bytes, and of how they are to be read: a file's header may be damaged, too."""
    value = 0
    for tensor in maps:
        value = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().data, value)
    return str(value)
