"""From a data set to batches on this rank: read, crop, augment, cache, ahead of time.

A batch is what `rsmodels.data.transforms` describes, stacked: {"image": float32 (B, C, H, W) raw values,
"mask": int64 (B, H, W), "name": [...], "domain": [...]}. What happens to a sample depends on the seed and
on its position in the training stream alone, never on the process that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rsmodels.data import IGNORE, SegmentationDataset
from rsmodels.data.transforms import (
    Batch,
    check_same_bands,
    collate,
    fit_to_size,
    photometric,
    random_crop,
    random_flip,
    random_scale,
)
from rsmodels.training.config import LoaderConfig
from rsmodels.training.parallel import detach_reader
from rsmodels.training.sampler import Purpose, Sample, derive_seed


class Tiles(Dataset):
    """`dataset` cut to `size`: at random for training (`seed` given), from the centre for validation."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        size: tuple[int, int],
        options: LoaderConfig,
        seed: int | None = None,
    ) -> None:
        self.dataset, self.size, self.options, self.seed = dataset, size, options, seed
        self.cache: dict[int, dict[str, Any]] = {}

    def __getitems__(self, samples: Sequence[Sample]) -> Batch | Exception:
        """A whole batch. What goes wrong is returned, not raised: a reader process would wrap a clear line
        into its traceback; `batches` raises it in the trainer."""
        try:
            raw = [self._read(sample.tile) for sample in samples]
            check_same_bands(raw)
            parts = [self._prepare(*pair) for pair in zip(samples, raw, strict=True)]
            return {key: _join([part[key] for part in parts]) for key in parts[0]}
        except (OSError, ValueError) as error:
            return error

    def _prepare(self, sample: Sample, raw: dict[str, Any]) -> Batch:
        """One sample as a batch of one."""
        batch = collate([raw])
        if self.seed is None:
            batch = fit_to_size(batch, self.size)
            return batch if sample.counts else {**batch, "mask": torch.full_like(batch["mask"], IGNORE)}
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Purpose.AUGMENT, sample.position))
        if self.options.scale is not None:
            batch = random_scale(batch, self.size, self.options.scale, generator)
        batch = random_crop(batch, self.size, generator, max_class_share=self.options.max_class_share)
        if self.options.flip:
            batch = random_flip(batch, generator)
        if self.options.photometric:
            batch = photometric(batch, generator)
        return batch

    def _read(self, index: int) -> dict[str, Any]:
        if not self.options.cache:
            return self.dataset[index]
        if index not in self.cache:
            sample = self.dataset[index]
            self.cache[index] = {**sample, "image": _packed(sample["image"]), "mask": _packed(sample["mask"])}
        sample = self.cache[index]
        return {**sample, "image": sample["image"].float(), "mask": sample["mask"].long()}


def make_loader(tiles: Tiles, sampler: Sampler, *, workers: int, device: torch.device) -> DataLoader:
    """Read the sampler's batches, in its order, `workers` processes ahead (0: in this process)."""
    return DataLoader(
        tiles,
        batch_sampler=sampler,
        collate_fn=_as_it_is,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=detach_reader if workers else None,
        pin_memory=device.type == "cuda",
        # Without one of its own it draws from the global generator when it starts: in another step, and so
        # with other numbers for the model, in a run that resumes.
        generator=torch.Generator(),
    )


def batches(loader: DataLoader) -> Iterator[Batch]:
    """The batches of `loader`; raises what its readers returned as an error."""
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _join(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else [one for value in values for one in value]


def _packed(tensor: Tensor) -> Tensor:
    """The tensor as bytes where that loses nothing (8-bit images, masks): a quarter or less of the memory."""
    packed = tensor.byte()
    return packed if torch.equal(packed.to(tensor.dtype), tensor) else tensor


def _as_it_is(batch: Any) -> Any:
    return batch
