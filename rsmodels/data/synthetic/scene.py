"""From a layout to pixels: colours, texture, sunlight and shadow, haze, thin cloud, the sensor.

Four bands are defined (red, green, blue, infrared); those that the domain names are rendered. The streams of
random numbers are apart, so that `bands` changes nothing but the choice of bands: the same seed and index
show the same place in rgb and in irrg.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rsmodels.data.synthetic.domains import BANDS, CLIMATES, PLATFORMS, REGIONS, Climate, Domain, Region
from rsmodels.data.synthetic.layout import Layout, build_layout
from rsmodels.data.synthetic.noise import smooth_noise
from rsmodels.data.synthetic.paint import (
    BEACH,
    FIXED_CLASSES,
    GARDEN,
    KIND_BARE,
    KIND_CROP,
    KIND_TOWN,
    KIND_WORKS,
    MAIN_ROAD,
    MARKING,
    POOL,
    ROOF_SHADES,
    SEA,
    STREET,
    TRACK,
    TREE,
    WOOD_A,
    WOOD_B,
    YARD,
)

CLOUD_LABEL_ALPHA = 0.28  # a pixel is cloud where cloud makes up more than this share of its light
CLOUD_WHITE = 238.0
HAZE_WHITE = 200.0
SHADOW = np.array((0.44, 0.48, 0.56, 0.38), np.float32)  # light left in shadow: blue sky, little infrared
# Columns of the paint table after the four bands: amplitudes of patches, grain, crop rows, tree crowns.
PATCHES, GRAIN, ROWS, CROWNS = range(4, 8)


@dataclass(frozen=True)
class Scene:
    """image: (C, H, W) uint8, 1-255 (0 is left for nodata); classes: (H, W) uint8 index into the synthetic
    classes; cloud: (H, W) bool, covered by thin cloud."""

    image: np.ndarray
    classes: np.ndarray
    cloud: np.ndarray


def render_scene(key: tuple[int, ...], size: int, domain: Domain) -> Scene:
    """The scene that `key` (seed, split, index) stands for: a pure function of the three arguments."""
    region, climate = REGIONS[domain.region], CLIMATES[domain.climate]
    platform, bands = PLATFORMS[domain.platform], BANDS[domain.bands]
    layout_rng, light_rng, sensor_rng = (np.random.default_rng([*key, stream]) for stream in range(3))
    gsd = platform.gsd

    layout = build_layout(layout_rng, size, gsd, region, climate)
    table = _paint_table(light_rng, layout, region, climate)
    classes = layout.classes[layout.paint]
    sun = light_rng.uniform(0, 2 * np.pi)
    texture = _texture(light_rng, layout, table, size, gsd, sun)
    shadow = _shadows(layout.height, gsd, climate.sun, sun)
    gain = light_rng.uniform(0.92, 1.08) * light_rng.uniform(0.98, 1.02, 4)
    alpha = _clouds(light_rng, size, gsd, climate.clouds)
    seeds = sensor_rng.integers(0, 2**31, 4)

    image = np.empty((len(bands), size, size), np.uint8)
    for out, band in zip(image, bands, strict=True):
        plane = np.take(table[:, band] * np.float32(gain[band]), layout.paint)
        plane *= texture
        plane *= np.where(shadow, SHADOW[band], np.float32(1))
        for _ in range(platform.blur):
            plane = _blur(plane)
        plane += (np.float32(HAZE_WHITE) - plane) * np.float32(platform.haze)
        if alpha is not None:
            plane += (np.float32(CLOUD_WHITE) - plane) * alpha
        plane += _sensor_noise(int(seeds[band]), size, platform.noise)
        np.clip(plane, 1, 255, out=plane)
        out[:] = plane
    cloud = np.zeros((size, size), bool) if alpha is None else alpha > CLOUD_LABEL_ALPHA
    return Scene(image, classes, cloud)


def _paint_table(rng: np.random.Generator, layout: Layout, region: Region, climate: Climate) -> np.ndarray:
    """(paints, 8): four bands, then the amplitudes of four textures."""
    table = np.zeros((len(layout.classes), 8), np.float32)
    grass = climate.crops[0]
    tree = np.mean(climate.forest, axis=0)
    # paint: colour, amplitudes of patches and of grain
    fixed = {
        MAIN_ROAD: (region.road, 0.03, 0.04),
        MARKING: (np.add(region.road, 60), 0.0, 0.04),
        STREET: (np.multiply(region.road, 0.92), 0.05, 0.05),
        TRACK: (region.track, 0.06, 0.06),
        POOL: (region.water, 0.05, 0.03),
        SEA: (region.water, 0.10, 0.04),
        BEACH: (np.multiply(climate.soil[1], 1.15), 0.05, 0.05),
        WOOD_A: (climate.forest[0], 0.06, 0.10),
        WOOD_B: (climate.forest[1], 0.06, 0.10),
        TREE: (tree, 0.05, 0.10),
        GARDEN: (grass, 0.10, 0.07),
        YARD: (climate.soil[0], 0.08, 0.07),
    }
    for row, (color, patches, grain) in fixed.items():
        table[row, :4], table[row, PATCHES], table[row, GRAIN] = color, patches, grain
    table[[WOOD_A, WOOD_B, TREE], CROWNS] = 0.5, 0.5, 0.4
    table[: len(FIXED_CLASSES), :4] *= rng.uniform(0.93, 1.07, (len(FIXED_CLASSES), 1))

    parcels = table[len(FIXED_CLASSES) : len(FIXED_CLASSES) + layout.parcels]
    crops = np.array(climate.crops, np.float32)[rng.integers(0, len(climate.crops), layout.parcels)]
    low, high = np.array(climate.soil, np.float32)
    soil = low + (high - low) * rng.random((layout.parcels, 1), dtype=np.float32)
    bare = np.isin(layout.kind, (KIND_BARE, KIND_WORKS))[:, None]
    parcels[:, :4] = np.where(bare, soil, crops) * rng.uniform(0.9, 1.1, (layout.parcels, 1))
    crop = layout.kind == KIND_CROP
    parcels[:, PATCHES] = np.where(crop, 0.05, 0.09)
    parcels[:, GRAIN] = np.where(bare[:, 0], 0.07, 0.05)
    parcels[:, ROWS] = np.where(crop, rng.uniform(0.05, 0.13, layout.parcels), 0)
    parcels[layout.kind == KIND_TOWN, :4] = grass

    roofs = table[len(FIXED_CLASSES) + layout.parcels :]
    shades = np.repeat(np.array(region.roofs, float), ROOF_SHADES, axis=0)
    shades *= rng.uniform(0.85, 1.15, (len(shades), 1))
    sides = np.array((1.08, 0.86), np.float32)  # the slope in the sun and the one that is not
    roofs[:, :4] = (shades[:, None] * sides[:, None]).reshape(-1, 4)
    roofs[:, GRAIN] = 0.03
    return table


def _texture(
    rng: np.random.Generator, layout: Layout, table: np.ndarray, size: int, gsd: float, sun: float
) -> np.ndarray:
    """Factor on brightness, around 1."""
    paint = layout.paint
    texture = 1 + smooth_noise(rng, size, 14 / gsd) * table[:, PATCHES][paint]
    texture += smooth_noise(rng, size, 2.5) * table[:, GRAIN][paint]

    first, last = len(FIXED_CLASSES), len(FIXED_CLASSES) + layout.parcels
    period = rng.uniform(3.5, 8.0, layout.parcels)
    visible = np.clip(period / gsd / 2.5 - 0.8, 0, 1)  # rows finer than the sampling average out
    lengthwise = rng.random(layout.parcels) < 0.5
    at = np.flatnonzero((paint >= first) & (paint < last))
    parcel = paint.ravel()[at] - first
    along = np.where(lengthwise[parcel], layout.u.ravel()[at], layout.v.ravel()[at])
    frequency = (2 * np.pi / period).astype(np.float32)
    amplitude = (table[first:last, ROWS] * visible).astype(np.float32)
    flat = texture.reshape(-1)
    flat[at] += np.sin(along * frequency[parcel]) * amplitude[parcel]

    crowns = table[:, CROWNS][paint].ravel()
    at = np.flatnonzero(crowns)
    flat[at] += _crowns(rng, at, size, gsd, sun) * crowns[at]
    return texture


def _crowns(rng: np.random.Generator, at: np.ndarray, size: int, gsd: float, sun: float) -> np.ndarray:
    """Tree crowns at the flat pixel indices `at`: balls on two turned, jittered lattices, lit by the sun."""
    cell = max(6.0 / gsd, 3.0)  # pixels
    count = int(1.5 * size / cell) + 4
    row, column = np.divmod(at, size)
    towards = np.float32(np.cos(sun)), np.float32(np.sin(sun))
    shade = np.full(len(at), -0.5, np.float32)
    for angle in rng.uniform(0, np.pi / 2, 2):
        jitter = rng.uniform(0.36, 0.64, (2, count * count)).astype(np.float32)
        bright = rng.uniform(0.2, 0.65, count * count).astype(np.float32)
        cos, sin = np.float32(np.cos(angle) / cell), np.float32(np.sin(angle) / cell)
        a = column * cos + row * sin
        b = row * cos - column * sin + np.float32(size * sin + 1)
        ia, ib = a.astype(np.int32), b.astype(np.int32)
        tree = ib * count + ia
        da, db = a - ia - jitter[0][tree], b - ib - jitter[1][tree]
        # The direction to the sun in the lattice's own frame.
        sun_a = (towards[0] * cos + towards[1] * sin) * np.float32(0.9 * cell)
        sun_b = (towards[1] * cos - towards[0] * sin) * np.float32(0.9 * cell)
        ball = bright[tree] - 2.6 * (da * da + db * db) + da * sun_a + db * sun_b
        np.maximum(shade, ball, out=shade)
    return shade


def _shadows(height: np.ndarray, gsd: float, sun_tangent: float, sun: float) -> np.ndarray:
    """Ground that something higher keeps from the sun. `sun` is the direction in which it stands."""
    reach = int(np.ceil(height.max() / sun_tangent / gsd))
    shadow = np.zeros(height.shape, bool)
    size = len(height)
    for distance in range(1, min(reach, size - 1) + 1):
        dy, dx = round(distance * np.sin(sun)), round(distance * np.cos(sun))
        # The pixel at (r, c) is shaded by what stands at (r + dy, c + dx), towards the sun.
        here = np.s_[max(0, -dy) : size - max(0, dy), max(0, -dx) : size - max(0, dx)]
        there = np.s_[max(0, dy) : size - max(0, -dy), max(0, dx) : size - max(0, -dx)]
        shadow[here] |= height[there] - height[here] > distance * gsd * sun_tangent
    return shadow


def _clouds(rng: np.random.Generator, size: int, gsd: float, probability: float) -> np.ndarray | None:
    """Share of light that comes from thin cloud, 0 to 0.6, or None for a clear scene."""
    cloudy, threshold = rng.random() < probability, rng.uniform(0.2, 1.2)
    if not cloudy:
        return None
    density = smooth_noise(rng, size, 90 / gsd) + 0.35 * smooth_noise(rng, size, 22 / gsd)
    return np.clip((density - np.float32(threshold)) * np.float32(0.45), 0, 0.6)


def _blur(plane: np.ndarray) -> np.ndarray:
    """The 1-2-1 filter, both ways: the optics' point spread."""
    padded = np.pad(plane, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) * np.float32(1 / 16)


def _sensor_noise(seed: int, size: int, deviation: float) -> np.ndarray:
    """Independent noise per pixel, the sum of two uniform draws: near enough to normal, and fast."""
    raw = np.frombuffer(np.random.default_rng(seed).bytes(2 * size * size), np.uint8).reshape(2, size, size)
    scale = np.float32(deviation / (255 / np.sqrt(6)))  # deviation of the sum of two uniforms on 0-255
    return (raw[0].astype(np.float32) + raw[1] - 255) * scale
