"""Crops of unlabelled scenes of many domains: which scene, where in it and in which colours.

Rendering a scene costs more than a tiny encoder's step over a crop of it. So a window of scenes slides along
an endless stream: every step lets a few new ones in and cuts its crops from all in the window, each somewhere
else, mirrored and recoloured. What a step sees is a function of the seed and the step alone.

Real archives show one place many times: in another season, by another sensor. So does this one: a scene of
several looks is one layout, rendered in as many climates.

Shapes: B crops, H/W pixels of a crop, S side of a scene, L looks, p patch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
SHIFT = 2  # patches that one view of a place may be off the other, along an axis
# Recolouring: largest changes of a band's mean, of the contrast about it, of brightness (digital numbers).
GAIN, CONTRAST, BRIGHTNESS = 0.08, 0.1, 6.0
# Another sensor: chance of a 3 x 3 blur, largest deviation of noise (digital numbers).
BLURRED, NOISE = 0.5, 6.0

Place = tuple[Domain, tuple[str, ...]]


class Views(NamedTuple):
    """A batch: one or two views of the same places.

    images: per view float32 (B, 3, H, W), raw.
    corners: per view the (row, column), in patches, of its first patch on a grid that the views share.
    """

    images: list[Tensor]
    corners: list[tuple[int, int]]


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


def other_looks(choice: Sequence[Place]) -> list[list[int]]:
    """Of every place of `choice`, those that show its layouts in another climate; itself if there is none."""
    found = []
    for number, (domain, _) in enumerate(choice):
        same = [
            other
            for other, (candidate, _) in enumerate(choice)
            if other != number and (candidate.region, candidate.platform) == (domain.region, domain.platform)
        ]
        found.append(same or [number])
    return found


class SceneStream(Dataset):
    """Scene i of the endless stream: its looks' indices in `choice`, and uint8 (L, 4, S, S): red, green,
    blue, infrared."""

    def __init__(self, seed: int, side: int, choice: Sequence[Place], looks: int) -> None:
        self.seed, self.side, self.choice, self.looks = seed, side, choice, looks
        self.others = other_looks(choice)

    def __getitem__(self, index: int) -> tuple[list[int], Tensor]:
        place, other = (derive_seed(self.seed, Purpose.DOMAIN, index, look) for look in range(2))
        place %= len(self.choice)
        others = self.others[place]
        shown = [place, others[other % len(others)]][: self.looks]
        key = (self.seed, SPLIT, index)
        images = [render_scene(key, self.side, self.choice[look][0]).image for look in shown]
        return shown, torch.stack([torch.from_numpy(image) for image in images])


class Crops:
    """A batch of `Views` for each of the steps from `first_step` on.

    The views of a batch show the same places, two views in two climates: mirroring is shared, bands, colours
    and sensor are drawn apart. The second view is off the first by up to SHIFT patches, all of a batch by the
    same ones, so that a position does not tell a place.
    """

    def __init__(
        self,
        choice: Sequence[Place],
        size: tuple[int, int],
        patch_size: int,
        *,
        batch_size: int,
        views: int,
        seed: int,
        first_step: int,
        steps: int,
        workers: int,
    ) -> None:
        self.choice, self.size, self.patch_size, self.batch_size = choice, size, patch_size, batch_size
        self.views, self.seed = views, seed
        self.first_step, self.steps = first_step, steps
        side = max(size) + min(max(size), LARGEST_MARGIN)
        self.shift = SHIFT if views > 1 else 0
        self.entering = max(1, batch_size // CROPS_PER_SCENE)
        scenes = max(1, min(WINDOW_SCENES, WINDOW_BYTES // (4 * views * side * side)))
        self.length = -(-scenes // self.entering)  # of the window, in steps
        self.ahead = min(self.length, -(-FIRST_SCENES // self.entering)) - 1
        # A ring: what enters at step s takes the place of what entered `length` steps before. Copies, for
        # what comes from a reader process holds a file open.
        self.scenes = torch.empty(self.length * self.entering, views, 4, side, side, dtype=torch.uint8)
        self.looks_of: list[list[int]] = [[]] * len(self.scenes)
        first, last = self._window(first_step)[0], self._window(steps - 1)[1]
        self.arrivals = DataLoader(
            SceneStream(seed, side, choice, views),
            batch_sampler=_Runs(first, last, self.entering),
            collate_fn=list,
            num_workers=workers,
            prefetch_factor=8 if workers else None,
            worker_init_fn=detach_reader if workers else None,
            # Without one of its own it draws from the global generator.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Views]:
        arrivals = iter(self.arrivals)
        arrived = self._window(self.first_step)[0]
        for step in range(self.first_step, self.steps):
            first, last = self._window(step)
            while arrived < last:
                for number, (looks, scene) in enumerate(next(arrivals), arrived * self.entering):
                    slot = number % len(self.scenes)
                    self.scenes[slot], self.looks_of[slot] = scene, looks
                arrived += 1
            yield self._cut(step, first * self.entering, last * self.entering)

    def _window(self, step: int) -> tuple[int, int]:
        """The arrivals [first, last) that step `step` cuts from."""
        last = step + self.ahead + 1
        return max(0, last - self.length), last

    def _cut(self, step: int, first: int, last: int) -> Views:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, Purpose.CROPS, step))
        numbers = torch.randint(first, last, (self.batch_size,), generator=generator).tolist()
        draws = torch.rand(self.batch_size, 5 + self.views, generator=generator).tolist()
        offsets = torch.randint(0, self.shift + 1, (self.views, 2), generator=generator).tolist()
        views: list[list[Tensor]] = [[] for _ in range(self.views)]
        height, width = (length + self.shift * self.patch_size for length in self.size)
        side = self.scenes.shape[-1]
        for number, (y, x, flip_y, flip_x, turn, *bands) in zip(numbers, draws, strict=True):
            slot = number % len(self.scenes)
            top, left = int(y * (side - height + 1)), int(x * (side - width + 1))
            area = self.scenes[slot, :, :, top : top + height, left : left + width]
            flipped = [axis for axis, draw in ((2, flip_y), (3, flip_x)) if draw < 0.5]
            area = area.flip(flipped) if flipped else area
            area = area.transpose(2, 3) if turn < 0.5 and height == width else area
            shown = zip(views, area, self.looks_of[slot], offsets, bands, strict=True)
            for view, look, place, (row, column), draw in shown:
                top, left = row * self.patch_size, column * self.patch_size
                crop = look[:, top : top + self.size[0], left : left + self.size[1]]
                kept = self.choice[place][1]
                view.append(crop[list(BANDS[kept[int(draw * len(kept))]])])
        images = [torch.stack(view).float() for view in views]
        # Masked pixels are to be predicted, from an image as it was taken.
        retaken = [sensed(image, generator) for image in images] if self.views > 1 else images
        return Views([recolour(image, generator) for image in retaken], [(y, x) for y, x in offsets])


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


def sensed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image (B, C, H, W) as a duller sensor might take it: blurred or not, with more noise."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < BLURRED
    deviation = NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator) * deviation
    return torch.where(chosen, blurred, images) + noise
