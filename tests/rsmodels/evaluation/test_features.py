"""Features as pictures: tiles join without a seam, colours are found once, bad input is one line."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rasterio.windows import Window
from torch import Tensor

from rsmodels.data import IGNORE
from rsmodels.evaluation import feature_maps
from rsmodels.evaluation.feature_maps import (
    Held,
    blended_maps,
    cell_side,
    overview,
    sample_features,
    spread,
    tile_maps,
)
from rsmodels.evaluation.feature_pictures import Basis, plane_figure
from rsmodels.evaluation.layers import Layers
from rsmodels.registry import Preprocessing


def pooling(*strides: int, side: int = 64, channels: int = 2) -> Layers:
    """Layers whose features are the means of their cells, where a seam or a shift would show."""

    def run(images: Tensor) -> list[Tensor]:
        missing = -images.shape[-1] % max(strides)  # as a patch of 14 pads 64 pixels to 70
        padded = F.pad(images, (0, missing, 0, missing))
        return [F.avg_pool2d(padded, stride) for stride in strides]

    return Layers(
        name="pooling",
        indices=tuple(range(len(strides))),
        strides=strides,
        image_size=(side, side),
        preprocessing=Preprocessing((0.0,) * channels, (1.0,) * channels),
        device=torch.device("cpu"),
        dtype=torch.float32,
        run=run,
    )


def held(height: int, width: int, *, channels: int = 2, empty: bool = False) -> Held:
    generator = torch.Generator().manual_seed(height)
    image = torch.rand(channels, height, width, generator=generator) + 1
    mask = torch.randint(0, 3, (height, width), generator=generator)
    if empty:
        image[:, :, : width // 2] = 0
        mask[:, : width // 2] = IGNORE
    return Held({"image": image, "mask": mask})


def twice(one: Tensor) -> Tensor:
    return one.repeat(2, 1, 1)


def blended(layers: Layers, image: Held, overlap: float = 0.25) -> tuple[np.ndarray, np.ndarray]:
    project = [twice] * len(layers.indices)
    return blended_maps(layers, image, project, overlap=overlap, batch_size=3)


# -------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    ("size", "stride", "overlap"),
    [((64, 64), 16, 0.25), ((200, 150), 16, 0.25), ((150, 97), 14, 0.5), ((300, 40), 16, 0.0)],
)
def test_tiles_join_to_the_map_of_the_whole(size: tuple[int, int], stride: int, overlap: float) -> None:
    layers, image = pooling(stride), held(*size)
    drawn, seen = blended(layers, image, overlap)
    expected = F.avg_pool2d(torch.from_numpy(image.pixels), stride).numpy()
    rows, columns = expected.shape[1:]
    assert drawn.shape == (1, 4, -(-size[0] // stride), -(-size[1] // stride)) and seen.all()
    np.testing.assert_allclose(drawn[0, :2, :rows, :columns], expected, rtol=1e-5)
    np.testing.assert_array_equal(drawn[0, :2], drawn[0, 2:])


def test_layers_of_several_strides_share_one_grid() -> None:
    layers, image = pooling(8, 32), held(128, 192)
    drawn, _ = blended(layers, image)
    assert drawn.shape == (2, 4, 16, 24)
    fine, coarse = (F.avg_pool2d(torch.from_numpy(image.pixels), stride)[None] for stride in (8, 32))
    np.testing.assert_allclose(drawn[0, :2], fine[0].numpy(), rtol=1e-5)
    # The coarse layer is interpolated tile by tile: the same as over the whole but at the tiles' borders.
    smooth = F.interpolate(coarse, scale_factor=4, mode="bilinear")[0].numpy()
    np.testing.assert_allclose(drawn[1, :2, :4, :4], smooth[:, :4, :4], atol=0.02)


def test_a_large_scene_is_drawn_in_larger_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "MAX_CELLS", 5)
    layers, image = pooling(8), held(160, 96)
    assert cell_side(layers, image.size) == 32
    drawn, _ = blended(layers, image)
    expected = F.avg_pool2d(torch.from_numpy(image.pixels), 32).numpy()
    np.testing.assert_allclose(drawn[0, :2], expected, rtol=1e-5)


def test_empty_pixels_are_not_drawn() -> None:
    image = held(64, 256, empty=True)
    drawn, seen = blended(pooling(16), image)
    assert not seen[:, :8].any() and seen[:, 8:].all()
    expected = F.avg_pool2d(torch.from_numpy(image.pixels), 16).numpy()
    np.testing.assert_allclose(drawn[0, :2, :, 8:], expected[:, :, 8:], rtol=1e-5)


def test_empty_tiles_take_no_memory_until_the_batch_is_full() -> None:
    class Strip:
        """A scene whose first and last tiles alone have pixels."""

        size = (64, 64 * 3000)

        def read(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
            filled = window.col_off in (0, 64 * 2999)
            return np.ones((2, 64, 64), np.float32), np.full((64, 64), filled)

    corners = ((left, 0, left) for left in range(0, 64 * 3000, 64))
    tracemalloc.start()
    try:
        tiles = [(left, bool(maps)) for left, _, maps in tile_maps(pooling(16), Strip(), corners, 2)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tiles == [(left, left in (0, 64 * 2999)) for left in range(0, 64 * 3000, 64)]
    assert peak < 3000 * 64 * 64 / 4, f"{peak} bytes; their masks are four times that bound"


@pytest.mark.parametrize(("size", "longest"), [((90, 70), 128), ((130, 70), 128), ((700, 300), 64)])
def test_the_overview_is_every_kth_pixel(size: tuple[int, int], longest: int) -> None:
    image = held(*size)
    step = -(-max(size) // longest)
    np.testing.assert_array_equal(overview(image, longest), image.pixels[:, ::step, ::step])


def test_drawn_features_are_those_of_their_cells() -> None:
    image = held(128, 128)
    rng = np.random.default_rng(0)
    ((features, labels),) = sample_features(pooling(16), image, tiles=9, count=40, batch_size=2, rng=rng)
    assert features.shape == (40, 2) and labels.shape == (40,)
    cells = F.avg_pool2d(torch.from_numpy(image.pixels), 16).flatten(1).T.numpy()
    centres = image.labels[8::16, 8::16].reshape(-1)
    places = [np.flatnonzero(np.isclose(cells, one, rtol=1e-5).all(1)) for one in features]
    assert all(len(place) == 1 for place in places), "each is one cell's"
    where = np.concatenate(places)
    assert len(set(where)) == 40 and (centres[where] == labels).all()


def test_neither_empty_nor_unlabelled_cells_are_drawn() -> None:
    image = held(64, 128, empty=True)
    image.labels[:32] = IGNORE
    ((features, labels),) = sample_features(
        pooling(16), image, tiles=4, count=100, batch_size=4, rng=np.random.default_rng(0)
    )
    assert len(features) == 8 and IGNORE not in labels
    nothing = held(64, 64)
    nothing.valid[:] = False
    ((features, labels),) = sample_features(
        pooling(16), nothing, tiles=4, count=9, batch_size=4, rng=np.random.default_rng(0)
    )
    assert len(features) == len(labels) == 0


def test_spread_takes_some_from_everywhere() -> None:
    assert spread([1, 2, 3], 5) == [1, 2, 3]
    assert spread(range(100), 4) == [12, 37, 62, 87]


# ------------------------------------------------------------------------------------------------ colours


def test_the_basis_is_that_of_a_singular_value_decomposition() -> None:
    rng = np.random.default_rng(1)
    features = (rng.normal(size=(500, 6)) * [9, 5, 3, 0.5, 0.2, 0.1] + 4).astype(np.float32)
    basis = Basis.fit(features)
    _, values, vectors = np.linalg.svd(features - features.mean(0), full_matrices=False)
    overlap = np.abs(basis.components.numpy() @ vectors[:3].T)
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-4)
    np.testing.assert_allclose(basis.shares, values[:3] ** 2 / (values**2).sum(), rtol=1e-4)
    assert (basis.components.gather(1, basis.components.abs().argmax(1, keepdim=True)) > 0).all()

    one = torch.from_numpy(features[:20].T.reshape(6, 4, 5).copy())
    drawn = basis.project(one).numpy()
    centred = features[:20] - features.mean(0)
    np.testing.assert_allclose(drawn[:3].reshape(3, -1).T, centred @ basis.components.numpy().T, atol=1e-3)
    np.testing.assert_allclose(drawn[3].reshape(-1), features[:20].mean(1), rtol=1e-5)


def test_colours_span_the_features_and_survive_flat_ones() -> None:
    features = np.random.default_rng(2).normal(size=(1000, 4)).astype(np.float32)
    basis = Basis.fit(features)
    everything = basis.project(torch.from_numpy(features.T.reshape(4, 40, 25).copy())).numpy()
    pictures = basis.colours(everything)
    assert pictures["pca"].shape == pictures["mean"].shape == (40, 25, 3)
    for picture in pictures.values():
        assert picture.min() < 20 and picture.max() > 235
    flat = Basis.fit(np.ones((5, 2), np.float32))  # fewer channels than colours, and no variance
    assert flat.components.shape == (3, 2) and sum(flat.shares) == 0
    assert flat.colours(flat.project(torch.ones(2, 3, 3)).numpy())["pca"].shape == (3, 3, 3)


def test_the_plane_shows_domains_and_classes() -> None:
    places = np.random.default_rng(0).normal(size=(30, 2))
    domain = np.arange(30) % 2
    plain = plane_figure(places, domain, ["here", "there"], title="two")
    assert len(plain.axes) == 1
    label = np.arange(30) % 3
    both = plane_figure(
        places,
        domain,
        ["here", "there"],
        label=label,
        classes=["a", "b", "c", "absent"],
        palette=[(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)],
        title="two",
    )
    names = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in both.axes]
    assert names == [["here", "there"], ["here", "there", "a", "b", "c"]]
    drawn = both.axes[1].collections[0].get_offsets()
    np.testing.assert_allclose(np.asarray(drawn), places[domain == 0])
