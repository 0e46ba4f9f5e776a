"""The synthetic twin of CrossEarth's benchmark: its five kinds of domain gap, on generated scenes.

One source domain, and one target for each kind of gap in Table 1 of the paper (unseen region; unseen
spectral band; unseen region and spectral band; unseen region and platform; unseen region and climate). Each
property has one unseen value, the same in every target that changes it, so that leaving out the values is
possible too. Whoever learns from unlabelled scenes leaves the targets out: see `left_out`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import fields

from rsmodels.data.synthetic.domains import BANDS, CLIMATES, PLATFORMS, REGIONS, Domain

SOURCE = Domain()
TARGETS: dict[str, Domain] = {
    "region": Domain(region="coast"),
    "bands": Domain(bands="irrg"),
    "region+bands": Domain(region="coast", bands="irrg"),
    "region+platform": Domain(region="coast", platform="satellite"),
    "region+climate": Domain(region="coast", climate="arid"),
}


def all_domains() -> list[Domain]:
    """Every combination of region, bands, platform and climate."""
    return [Domain(*values) for values in itertools.product(REGIONS, BANDS, PLATFORMS, CLIMATES)]


def left_out(patterns: Iterable[str] = ()) -> set[Domain]:
    """The targets, and whatever `patterns` name besides.

    A pattern is a domain in part: "region=coast,bands=irrg" stands for every domain with these two values,
    "climate=arid" for every arid one. A ValueError names one that is not understood.
    """
    chosen = set(TARGETS.values())
    for pattern in patterns:
        values = Domain.parse(pattern)
        named = {part.partition("=")[0].strip() for part in pattern.split(",")}
        keys = [field.name for field in fields(Domain) if field.name in named]
        chosen.update(
            domain
            for domain in all_domains()
            if all(getattr(domain, key) == getattr(values, key) for key in keys)
        )
    return chosen
