"""The settings of CrossEarth's benchmark for domain generalisation, as data.

Gong et al., https://arxiv.org/abs/2410.22629. `rsdg.yaml` beside this file holds them and says where each
figure is from. The paper counts 28 settings; its Table 14 has 29 rows, 25 of them with a gap between two
domains and 4 within one climate.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rsmodels.data.schema import IGNORE

DATA = Path(__file__).with_suffix(".yaml")
# Table 1's kinds, and what the paper calls them.
GAPS = {
    "region": "Unseen Region",
    "band": "Unseen Spectral Band",
    "region+band": "Unseen Region and Spectral Band",
    "region+platform": "Unseen Region and Platform",
    "region+climate": "Unseen Region and Climate",
}


@dataclass(frozen=True)
class BenchmarkDomain:
    """One side of a setting.

    title, dataset: what the paper calls the domain, and the data set that it is a part of
    bands:      what the three channels are, in order
    classes:    the data set's own, in the order of its labels
    side:       of its files in pixels; None where it varies
    train, test: numbers of images; None where the benchmark does not train or test on it
    test_split: the split that has `test` images
    fit:        side of the square that a test image is shrunk into, keeping its ratio; None leaves it alone
    """

    title: str
    dataset: str
    bands: tuple[str, ...]
    classes: tuple[str, ...]
    side: int | None
    train: int | None
    test: int | None
    test_split: str | None
    fit: int | None = None


@dataclass(frozen=True)
class Masking:
    """Eqs. (3) and (4): ratio tau and the side of a patch in pixels, B."""

    ratio: float
    patch: int


@dataclass(frozen=True)
class Setting:
    """One row of Table 14.

    name:    its abbreviation there
    gap:     a key of GAPS; None within one domain
    classes: those that are trained and counted, in the order of their train ids
    merged:  own class of either side -> its class here, None for pixels left out; others keep their names
    size:    side of the training crop in pixels
    style, mask: of the styled images X_S and of the masked images X_M
    loss:    of the reconstruction
    miou:    what the paper reports, in per cent: {"crossearth": ..., "rein": ...}
    notes:   where the data differ from what the paper prints
    """

    name: str
    gap: str | None
    source: BenchmarkDomain
    target: BenchmarkDomain
    classes: tuple[str, ...]
    merged: Mapping[str, str | None]
    size: int
    style: Masking
    mask: Masking
    loss: Literal["l1", "mse"]
    miou: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> int:
        """Training images."""
        assert self.source.train is not None
        return self.source.train

    @property
    def test(self) -> int:
        """Test images."""
        assert self.target.test is not None
        return self.target.test

    @property
    def categories(self) -> int:
        """Table 1's count: a foreground and its background are one."""
        return 1 if len(self.classes) == 2 else len(self.classes)

    def train_ids(self, domain: BenchmarkDomain) -> tuple[int, ...]:
        """The train id of every class of `domain`, in its own order; 255 for one that is left out."""
        names = [self.merged.get(name, name) for name in domain.classes]
        return tuple(IGNORE if name is None else self.classes.index(name) for name in names)


def settings() -> tuple[Setting, ...]:
    """All 29 rows, in the paper's order."""
    return tuple(_read().values())


def setting(name: str) -> Setting:
    """One row by its abbreviation, such as "P(i)2V"; ValueError where there is none.

    Blanks do not matter, and "Sub2Sub" is what Table 14 calls "Sub (Source-Only)".
    """
    known = {_key(row): row for row in settings()}
    known |= {row.name.replace(" ", ""): row for row in settings()}
    wanted = name.replace(" ", "")
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
        raise ValueError(f"setting {name!r}: the benchmark has none of that name; {advice}")
    return known[wanted]


def _key(row: Setting) -> str:
    climate = row.name.partition(" ")[0]
    return row.name if row.gap else f"{climate}2{climate}"


@functools.cache
def _read() -> dict[str, Setting]:
    content = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    domains = {key: BenchmarkDomain(**_tuples(fields)) for key, fields in content["domains"].items()}
    return {
        name: _setting(name, _tuples(fields), domains, content["merged"])
        for name, fields in content["settings"].items()
    }


def _setting(
    name: str, fields: dict[str, Any], domains: Mapping[str, BenchmarkDomain], table_2: Mapping[str, Any]
) -> Setting:
    source, target = domains[fields.pop("source")], domains[fields.pop("target")]
    merged: dict[str, str | None] = {}
    classes = source.classes
    if fields.pop("merged", False):
        classes = tuple(table_2["classes"])
        merged = {**table_2[source.dataset], **table_2[target.dataset]}
    style, mask = Masking(*fields.pop("style")), Masking(*fields.pop("mask"))
    return Setting(
        name, source=source, target=target, classes=classes, merged=merged, style=style, mask=mask, **fields
    )


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
