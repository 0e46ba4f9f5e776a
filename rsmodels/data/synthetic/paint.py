"""The vocabulary of the synthetic map: classes, the fixed rows of the paint table, kinds of parcel."""

from __future__ import annotations

CLASSES = ("building", "road", "water", "field", "forest", "bare soil")
BUILDING, ROAD, WATER, FIELD, FOREST, SOIL = range(len(CLASSES))

# Rows of the paint table that every scene has; a row per parcel and two per roof colour follow.
MAIN_ROAD, MARKING, STREET, TRACK, POOL, SEA, BEACH, WOOD_A, WOOD_B, TREE, GARDEN, YARD = range(12)
FIXED_CLASSES = (ROAD, ROAD, ROAD, ROAD, WATER, WATER, SOIL, FOREST, FOREST, FOREST, FIELD, SOIL)

MAIN_HALF, STREET_HALF, TRACK_HALF = 4.0, 2.6, 1.4  # half widths of roads, metres
TREE_HEIGHT = 6.0
ROOF_SHADES = 4  # variants of each roof colour


KIND_TOWN, KIND_WORKS, KIND_CROP, KIND_GRASS, KIND_BARE, KIND_WOOD = range(6)
KIND_CLASS = (FIELD, SOIL, FIELD, FIELD, SOIL, FOREST)
