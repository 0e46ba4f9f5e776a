"""Crops of unlabelled scenes of many domains: which scene, where in it and in which colours.

Rendering a scene costs more than a tiny encoder's step over a crop of it. So a window of scenes slides along
an endless stream: every step lets a few new ones in and cuts its crops from all in the window, each somewhere
else, mirrored and recoloured. What a step sees is a function of the seed and the step alone.

Shapes: B crops, H/W pixels of a crop, S side of a scene.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rsmodels.data.base import SPLITS
from rsmodels.data.synthetic.domains import BANDS, Domain
from rsmodels.data.synthetic.gaps import all_domains
from rsmodels.data.synthetic.scene import render_scene
from rsmodels.pretraining.config import Purpose
from rsmodels.training.parallel import detach_reader
from rsmodels.training.sampler import derive_seed

SPLIT = len(SPLITS)  # a split of its own: no data set ever shows these places
SEEN_BANDS = ("rgb", "irrg")
CROPS_PER_SCENE = 16
LARGEST_MARGIN = 224  # pixels that a scene is larger than its crops
WINDOW_SCENES = 512
WINDOW_BYTES = 256 * 2**20
FIRST_SCENES = 64  # rendered before the first step; the window grows from there
# Recolouring: largest changes of a band's mean, of the contrast about it, of brightness (digital numbers).
GAIN, CONTRAST, BRIGHTNESS = 0.2, 0.3, 16.0

Place = tuple[Domain, tuple[str, ...]]


def places(left_out: set[Domain]) -> list[Place]:
    """What may be drawn: domains that render all four bands, each with the band sets to be seen of it."""
    found = []
    for domain in all_domains():
        if domain.bands == "rgbir":
            kept = tuple(bands for bands in SEEN_BANDS if _with_bands(domain, bands) not in left_out)
            if kept:
                found.append((domain, kept))
    if not found:
        raise ValueError("--leave-out leaves no domain to learn from; leave out less")
    return found


def _with_bands(domain: Domain, bands: str) -> Domain:
    return Domain(domain.region, bands, domain.platform, domain.climate)


class SceneStream(Dataset):
    """Scene i of the endless stream: (its place's index, uint8 (4, S, S): red, green, blue, infrared)."""

    def __init__(self, seed: int, side: int, choice: Sequence[Place]) -> None:
        self.seed, self.side, self.choice = seed, side, choice

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        place = derive_seed(self.seed, Purpose.DOMAIN, index) % len(self.choice)
        scene = render_scene((self.seed, SPLIT, index), self.side, self.choice[place][0])
        return place, torch.from_numpy(scene.image)


class Crops:
    """Batches of crops for the steps from `first_step` on: each a list of `views` float32 (B, 3, H, W), raw.

    The views of a batch show the same places: their bands and colours are drawn apart, mirroring is not.
    """

    def __init__(
        self,
        choice: Sequence[Place],
        size: tuple[int, int],
        *,
        batch_size: int,
        views: int,
        seed: int,
        first_step: int,
        steps: int,
        workers: int,
    ) -> None:
        self.choice, self.size, self.batch_size = choice, size, batch_size
        self.views, self.seed = views, seed
        self.first_step, self.steps = first_step, steps
        side = max(size) + min(max(size), LARGEST_MARGIN)
        self.entering = max(1, batch_size // CROPS_PER_SCENE)
        scenes = max(1, min(WINDOW_SCENES, WINDOW_BYTES // (4 * side * side)))
        self.length = -(-scenes // self.entering)  # of the window, in steps
        self.ahead = min(self.length, -(-FIRST_SCENES // self.entering)) - 1
        # A ring: what enters at step s takes the place of what entered `length` steps before. Copies, for
        # what comes from a reader process holds a file open.
        self.scenes = torch.empty(self.length * self.entering, 4, side, side, dtype=torch.uint8)
        self.place_of = [0] * len(self.scenes)
        first, last = self._window(first_step)[0], self._window(steps - 1)[1]
        self.arrivals = DataLoader(
            SceneStream(seed, side, choice),
            batch_sampler=_Runs(first, last, self.entering),
            collate_fn=list,
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            worker_init_fn=detach_reader if workers else None,
            # Without one of its own it draws from the global generator.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[list[Tensor]]:
        arrivals = iter(self.arrivals)
        arrived = self._window(self.first_step)[0]
        for step in range(self.first_step, self.steps):
            first, last = self._window(step)
            while arrived < last:
                for number, (place, scene) in enumerate(next(arrivals), arrived * self.entering):
                    slot = number % len(self.scenes)
                    self.scenes[slot], self.place_of[slot] = scene, place
                arrived += 1
            yield self._cut(step, first * self.entering, last * self.entering)

    def _window(self, step: int) -> tuple[int, int]:
        """The arrivals [first, last) that step `step` cuts from."""
        last = step + self.ahead + 1
        return max(0, last - self.length), last

    def _cut(self, step: int, first: int, last: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Purpose.CROPS, step))
        numbers = torch.randint(first, last, (self.batch_size,), generator=generator).tolist()
        draws = torch.rand(self.batch_size, 5 + self.views, generator=generator).tolist()
        views: list[list[Tensor]] = [[] for _ in range(self.views)]
        height, width = self.size
        side = self.scenes.shape[-1]
        for number, (y, x, flip_y, flip_x, turn, *bands) in zip(numbers, draws, strict=True):
            slot = number % len(self.scenes)
            top, left = int(y * (side - height + 1)), int(x * (side - width + 1))
            crop = self.scenes[slot, :, top : top + height, left : left + width]
            flipped = [axis for axis, draw in ((1, flip_y), (2, flip_x)) if draw < 0.5]
            crop = crop.flip(flipped) if flipped else crop
            crop = crop.transpose(1, 2) if turn < 0.5 and height == width else crop
            kept = self.choice[self.place_of[slot]][1]
            for view, draw in zip(views, bands, strict=True):
                view.append(crop[list(BANDS[kept[int(draw * len(kept))]])])
        return [recolour(torch.stack(view).float(), generator) for view in views]


class _Runs:
    """[first·n, (first+1)·n), …, up to last·n: what enters at each step, as indices."""

    def __init__(self, first: int, last: int, n: int) -> None:
        self.first, self.last, self.n = first, last, n

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.last):
            yield list(range(step * self.n, (step + 1) * self.n))

    def __len__(self) -> int:
        return self.last - self.first


def recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) as another sensor or season might show it: band gains, contrast, brightness."""

    def draw(*shape: int) -> Any:
        return torch.rand(len(images), *shape, 1, 1, generator=generator) * 2 - 1

    mean = images.mean((2, 3), keepdim=True)
    gain = 1 + GAIN * draw(images.shape[1])
    contrast = 1 + CONTRAST * draw(1)
    return (images - mean) * contrast + (mean * gain + BRIGHTNESS * draw(1))
