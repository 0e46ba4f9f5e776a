"""Launches of Triton kernels that were noted down, done on a device with numbers in their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rskernels.triton import launch
from rskernels.triton.launch import Launch

GAIN = 0.25  # of the random numbers in the tensors: no exponential of their products overflows
Buffer = tuple[torch.dtype, int, int]  # dtype, elements, and which of those


class Replay:
    """Noted launches with tensors of their own on a device: the same numbers in every replay, views and what
    one launch hands to the next included."""

    def __init__(self, launches: Sequence[Launch], device: torch.device) -> None:
        self.device = device
        self.buffers: dict[int, Tensor] = {}  # by the noted storage
        self.named: dict[Buffer, Tensor] = {}
        self.before: dict[Buffer, Tensor] = {}
        self.dtypes: set[torch.dtype] = set()
        self.noted = launches  # keeps the noted storages alive, and with them what identifies them
        self.launches = [
            Launch(one.kernel, one.grid, tuple(map(self._moved, one.arguments)), one.constants)
            for one in launches
        ]

    def run(self, which: Sequence[int] | None = None) -> None:
        for one in self.launches if which is None else (self.launches[i] for i in which):
            launch.launch(one.kernel, one.grid, *one.arguments, **one.constants)

    def written(self) -> dict[Buffer, Tensor]:
        """Copies of the buffers that the launches changed."""
        return {key: x.clone() for key, x in self.named.items() if not torch.equal(x, self._filled(key))}

    def _moved(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._moved, value))
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        if storage._cdata not in self.buffers:
            size = storage.nbytes() // value.dtype.itemsize
            key = (value.dtype, size, sum(known[:2] == (value.dtype, size) for known in self.named))
            drawn = value.dtype.is_floating_point or value.dtype == torch.bool
            if value.is_meta or (drawn and not launch.is_meaningful(value)):
                buffer = self._filled(key)
            else:  # indices and the like: those that the example has
                buffer = value.new_empty(0).set_(storage, 0, (size,), (1,)).to(self.device)
                self.before[key] = buffer.clone()
            self.named[key] = self.buffers[storage._cdata] = buffer
        if value.dtype.is_floating_point:
            self.dtypes.add(value.dtype)
        flat = self.buffers[storage._cdata].view(value.dtype)
        return flat.as_strided(value.shape, value.stride(), value.storage_offset())

    def _filled(self, key: Buffer) -> Tensor:
        """The numbers that a buffer begins with."""
        if key in self.before:
            return self.before[key]
        dtype, size, number = key
        generator = torch.Generator(self.device).manual_seed(1000 + number)
        options: dict[str, Any] = {"generator": generator, "device": self.device}
        if dtype.is_floating_point:
            return (GAIN * torch.randn(size, **options)).to(dtype)
        if dtype == torch.bool:
            return torch.randint(2, (size,), **options) > 0
        return torch.zeros(size, dtype=dtype, device=self.device)
