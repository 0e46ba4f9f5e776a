"""Procedural aerial scenes: a data set, its domains, and GeoTIFFs for `predict`."""

from rsmodels.data.synthetic.dataset import ALL_CLASSES, SyntheticEarth, synthetic_schema
from rsmodels.data.synthetic.domains import BANDS, CLIMATES, PLATFORMS, REGIONS, Domain
from rsmodels.data.synthetic.geotiff import write_scene

__all__ = [
    "ALL_CLASSES",
    "BANDS",
    "CLIMATES",
    "PLATFORMS",
    "REGIONS",
    "Domain",
    "SyntheticEarth",
    "synthetic_schema",
    "write_scene",
]
