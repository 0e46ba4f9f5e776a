"""The domains of the synthetic scenes: four things that differ between real data sets, one table for each.

region:   layout statistics and the palette of what people build
bands:    which of the four rendered bands (red, green, blue, infrared) the tile holds
platform: ground sampling distance, sharpness, noise, haze
climate:  season: colours of vegetation and soil, what grows, height of the sun, clouds, density of towns

Colours are (R, G, B, IR) digital numbers on a scale of 255; lengths are metres. The figures are chosen to
look like their namesakes, not measured from them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

Spectrum = tuple[float, float, float, float]


@dataclass(frozen=True)
class Region:
    """Layout and palette.

    main_spacing, block, lot: size of the cells between through roads, of blocks and fields, of house lots
    warp:    amplitude of the bends that grid lines follow
    town:    share of parcels; forest, lake: shares of the area; river, sea: probabilities
    garden:  share of house lots that are green, the rest is bare
    """

    main_spacing: tuple[float, float]
    block: tuple[float, float]
    lot: float
    warp: float
    town: float
    forest: float
    lake: float
    river: float
    sea: float
    garden: float
    tracks: float
    hedges: float
    heights: tuple[float, float]
    road: Spectrum
    track: Spectrum
    water: Spectrum
    roofs: tuple[Spectrum, ...]


@dataclass(frozen=True)
class Climate:
    """Season and density.

    crops: palette of crops and grass; bare: share of fields that are bare; sun: tangent of its elevation;
    clouds: probability that a scene has thin cloud; density: factor on the share of lots that are built on
    """

    crops: tuple[Spectrum, ...]
    forest: tuple[Spectrum, Spectrum]
    soil: tuple[Spectrum, Spectrum]
    bare: float
    sun: float
    clouds: float
    density: float
    lushness: float


@dataclass(frozen=True)
class Platform:
    """gsd: metres per pixel; blur: passes of a 1-2-1 filter; noise: deviation; haze: share of white."""

    gsd: float
    blur: int
    noise: float
    haze: float


BANDS: dict[str, tuple[int, ...]] = {"rgb": (0, 1, 2), "irrg": (3, 0, 1), "rgbir": (0, 1, 2, 3)}

REGIONS: dict[str, Region] = {
    "plains": Region(
        main_spacing=(130, 230), block=(42, 74), lot=17, warp=5, town=0.40, forest=0.20, lake=0.06,
        river=0.55, sea=0.0, garden=0.75, tracks=0.35, hedges=0.25, heights=(4, 9),
        road=(128, 128, 130, 96), track=(176, 160, 134, 150), water=(52, 74, 82, 20),
        roofs=((176, 94, 74, 120), (150, 72, 60, 104), (112, 104, 104, 100), (196, 190, 182, 176),
               (92, 84, 86, 84)),
    ),
    "coast": Region(
        main_spacing=(110, 200), block=(34, 60), lot=14, warp=10, town=0.55, forest=0.12, lake=0.02,
        river=0.25, sea=0.6, garden=0.45, tracks=0.30, hedges=0.10, heights=(3, 14),
        road=(150, 146, 140, 116), track=(204, 190, 160, 180), water=(36, 92, 112, 16),
        roofs=((232, 226, 214, 210), (206, 118, 76, 146), (222, 196, 164, 190), (168, 168, 172, 160)),
    ),
    "hills": Region(
        main_spacing=(150, 260), block=(40, 66), lot=18, warp=22, town=0.26, forest=0.42, lake=0.05,
        river=0.45, sea=0.0, garden=0.85, tracks=0.40, hedges=0.35, heights=(4, 8),
        road=(112, 112, 116, 84), track=(162, 146, 122, 138), water=(44, 62, 60, 18),
        roofs=((96, 92, 98, 88), (124, 110, 104, 104), (140, 74, 58, 96), (78, 76, 84, 74)),
    ),
    "delta": Region(
        main_spacing=(140, 220), block=(28, 50), lot=12, warp=8, town=0.34, forest=0.10, lake=0.14,
        river=0.85, sea=0.0, garden=0.55, tracks=0.45, hedges=0.15, heights=(3, 7),
        road=(164, 160, 150, 130), track=(170, 150, 120, 146), water=(92, 98, 78, 40),
        roofs=((84, 124, 176, 120), (196, 200, 206, 190), (150, 96, 84, 120), (110, 150, 190, 140)),
    ),
}  # fmt: skip

CLIMATES: dict[str, Climate] = {
    "temperate": Climate(
        crops=((104, 136, 66, 196), (134, 152, 82, 188), (84, 118, 58, 206), (168, 166, 98, 172),
               (120, 146, 88, 184)),
        forest=((52, 80, 44, 150), (68, 94, 50, 164)), soil=((156, 128, 100, 138), (178, 152, 122, 158)),
        bare=0.24, sun=0.95, clouds=0.20, density=0.86, lushness=1.0,
    ),
    "arid": Climate(
        crops=((170, 160, 104, 168), (128, 140, 80, 178), (190, 172, 118, 172), (150, 150, 92, 170)),
        forest=((86, 98, 62, 132), (100, 108, 70, 140)), soil=((180, 148, 112, 164), (194, 164, 126, 174)),
        bare=0.48, sun=1.8, clouds=0.06, density=0.70, lushness=0.45,
    ),
    "tropical": Climate(
        crops=((92, 142, 62, 214), (116, 156, 70, 206), (72, 124, 54, 218), (142, 164, 88, 196)),
        forest=((38, 82, 38, 176), (50, 98, 44, 188)), soil=((172, 112, 78, 142), (190, 132, 96, 158)),
        bare=0.16, sun=2.2, clouds=0.40, density=0.94, lushness=1.35,
    ),
    "boreal": Climate(
        crops=((140, 138, 92, 150), (116, 124, 84, 148), (158, 148, 104, 146), (128, 120, 84, 136)),
        forest=((46, 62, 46, 112), (92, 88, 56, 124)), soil=((124, 108, 94, 116), (142, 126, 110, 130)),
        bare=0.28, sun=0.5, clouds=0.25, density=0.66, lushness=0.8,
    ),
}  # fmt: skip

PLATFORMS: dict[str, Platform] = {
    "aerial": Platform(gsd=1.0, blur=1, noise=3.0, haze=0.02),
    "drone": Platform(gsd=0.5, blur=0, noise=4.5, haze=0.0),
    "satellite": Platform(gsd=2.0, blur=1, noise=6.0, haze=0.14),
}


@dataclass(frozen=True)
class Domain:
    """Where, with what and when a scene was taken. `str(domain)` and `Domain.parse` are inverses."""

    region: str = "plains"
    bands: str = "rgb"
    platform: str = "aerial"
    climate: str = "temperate"

    def __post_init__(self) -> None:
        for key, table in _TABLES.items():
            if getattr(self, key) not in table:
                raise ValueError(f"domain {key}={getattr(self, key)!r} is unknown; known: {', '.join(table)}")

    def __str__(self) -> str:
        return ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))

    @classmethod
    def parse(cls, text: str) -> Domain:
        """`region=coast,bands=irrg` -> Domain; what is not named keeps its default."""
        chosen: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals or key not in _TABLES or key in chosen:
                raise ValueError(
                    f"domain {text!r}: {part!r} is not understood; write {'=..., '.join(_TABLES)}=..., "
                    "each at most once"
                )
            chosen[key] = value
        return cls(**chosen)


_TABLES: dict[str, dict] = {"region": REGIONS, "bands": BANDS, "platform": PLATFORMS, "climate": CLIMATES}
