"""A CUDA graph of a model's forward pass over batches of one shape.

Launching the kernels of a small model one by one can take the host longer than the device takes to run them;
a recorded graph of all of them is launched at once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 2  # eager calls before the recording: libraries choose and prepare their kernels in them


class GraphedForward:
    """`forward`, replayed from a CUDA graph for images of `shape` from the third such call on.

    Images of another shape run eagerly, and so does everything where `forward` cannot be recorded: it copies
    from or to the host, or looks at values. What it decides by other means is decided once.
    The recorded graph keeps the memory of one forward pass; it is given back before another shape runs.

    Args:
        forward: images (B, C, H, W) on a CUDA device → a tensor; without gradients.
        shape: of the images that are worth a graph.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        self.forward, self.shape = forward, tuple(shape)
        self.calls_to_come = WARM_UP  # before the recording
        self.failed = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.images: Tensor | None = None
        self.result: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """A tensor of its own, whether replayed or not."""
        if tuple(images.shape) != self.shape:
            self.release()
            return self.forward(images)
        if self.graph is None and not self.failed:
            if self.calls_to_come == 0:
                self._record(images)
            self.calls_to_come = max(self.calls_to_come - 1, 0)
        if self.graph is None or self.images is None or self.result is None:
            return self.forward(images)
        self.images.copy_(images)
        self.graph.replay()
        return self.result.clone()  # the next replay overwrites the result

    def release(self) -> None:
        """Give the graph's memory back."""
        self.graph = self.images = self.result = None

    def _record(self, images: Tensor) -> None:
        graph = torch.cuda.CUDAGraph()
        self.images = images.clone()
        try:
            # thread_local: other threads, as a reader's, may go on calling CUDA meanwhile.
            with torch.cuda.device(images.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.result = self.forward(self.images)
        except RuntimeError as error:
            self.release()
            self.failed = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(
                f"the model cannot be recorded as a CUDA graph ({reason}); it runs without one", stacklevel=2
            )
            return
        self.graph = graph
