"""The benchmark's settings: complete, consistent with each other, and the figures that the paper prints."""

from __future__ import annotations

from collections import Counter

import pytest

from rsmodels.data.schema import IGNORE
from rsmodels.evaluation.rsdg import GAPS, Masking, Setting, setting, settings

ROWS = settings()
CASID = ("Sub", "Tem", "Tms", "Trf")


def test_table_14_has_25_rows_across_domains_and_4_within_one() -> None:
    assert len(ROWS) == len({row.name for row in ROWS}) == 29
    assert Counter(row.gap for row in ROWS) == {
        "region": 6,
        "band": 2,
        "region+band": 3,
        "region+platform": 2,
        "region+climate": 12,
        None: 4,
    }
    climates = {f"{a}2{b}" for a in CASID for b in CASID if a != b}
    assert {row.name for row in ROWS if row.gap == "region+climate"} == climates
    assert {row.name for row in ROWS if row.gap is None} == {f"{a} (Source-Only)" for a in CASID}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_is_complete_and_agrees_with_itself(row: Setting) -> None:
    assert row.gap in (*GAPS, None) and (row.gap is None) == (row.source == row.target)
    assert row.train > 0 and row.test > 0 and row.target.test_split in ("val", "test")
    assert row.size in (512, 1024)
    assert row.loss == ("l1" if row.source.dataset == "CASID" else "mse")  # section 5.1
    assert set(row.miou) == {"crossearth", "rein"} and all(20 < value < 80 for value in row.miou.values())
    for masking in (row.style, row.mask):
        assert masking.ratio in (0.1, 0.3, 0.5, 0.7, 0.9) and masking.patch in (16, 32, 64, 128, 256)
    # A band gap is one of bands, and no other gap hides one.
    assert ("band" in (row.gap or "")) == (row.source.bands != row.target.bands)
    for side in (row.source, row.target):
        assert len(side.bands) == 3 and set(side.bands) <= {"red", "green", "blue", "infrared"}
        assert side.side is not None or side.fit is not None
        ids = row.train_ids(side)
        assert len(ids) == len(side.classes)
        assert set(ids) - {IGNORE} == set(range(len(row.classes))), "every class occurs on both sides"


def test_table_1s_counts_sizes_and_categories() -> None:
    printed = {
        "P(i)2V": (3456, 398, 512, 6),
        "V2P(i)": (344, 2016, 512, 6),
        "U2R": (1156, 992, 1024, 7),
        "R2U": (1366, 677, 1024, 7),  # printed 667
        "D2M": (6226, 49, 1024, 1),
        "P(r)2P(i)": (3456, 2016, 512, 6),
        "P(i)2P(r)": (3456, 2016, 512, 6),
        "P(r)2V": (3456, 398, 512, 6),
        "V2P(r)": (344, 2016, 512, 6),
        "P(i)2Res": (3456, 449, 512, 5),
        "A2S": (4736, 3726, 512, 1),
        "S2A": (13662, 1036, 512, 1),
    }
    train = dict(zip(CASID, (4900, 5025, 3400, 3700), strict=True))
    test = dict(zip(CASID, (2200, 2075, 1650, 1550), strict=True))
    printed |= {f"{a}2{b}": (train[a], test[b], 1024, 5) for a in CASID for b in CASID if a != b}
    assert len(printed) == 24  # the row that our text of Table 1 lacks is the 25th
    for name, expected in printed.items():
        row = setting(name)
        assert (row.train, row.test, row.size, row.categories) == expected, name
    missing = {row.name for row in ROWS if row.gap} - set(printed)
    assert missing == {"P(r)2Res"} and "not in the text of Table 1" in setting("P(r)2Res").notes[0]


@pytest.mark.parametrize(
    ("name", "style", "mask", "rein", "crossearth"),
    [
        ("P(r)2V", (0.3, 16), (0.7, 64), 56.1, 61.9),
        ("V2P(i)", (0.5, 32), (0.7, 64), 57.6, 58.2),
        ("D2M", (0.3, 16), (0.5, 16), 49.7, 50.5),
        ("S2A", (0.5, 16), (0.7, 16), 66.8, 64.5),
        ("P(i)2Res", (0.5, 32), (0.7, 64), 45.4, 45.5),
        ("U2R", (0.1, 64), (0.7, 64), 45.6, 46.6),
        ("Tem2Trf", (0.1, 64), (0.7, 128), 55.9, 57.8),
        ("Trf2Tms", (0.5, 64), (0.7, 64), 64.9, 64.4),
        ("Sub (Source-Only)", (0.1, 64), (0.7, 64), 67.2, 69.4),
    ],
)
def test_what_the_paper_prints(
    name: str, style: tuple[float, int], mask: tuple[float, int], rein: float, crossearth: float
) -> None:
    row = setting(name)
    assert (row.style, row.mask) == (Masking(*style), Masking(*mask))
    assert row.miou == {"rein": rein, "crossearth": crossearth}


def test_table_2_merges_potsdam_and_rescuenet() -> None:
    row = setting("P(r)2Res")
    assert row.classes == ("impervious surface", "building", "tree", "car", "clutter")
    #                                      surface, building, low vegetation, tree, car, clutter
    assert row.train_ids(row.source) == (0, 1, IGNORE, 2, 3, 4)
    #       background, water, four kinds of building, vehicle, two kinds of road, tree, pool
    assert row.train_ids(row.target) == (4, 4, 1, 1, 1, 1, 3, 0, 0, 2, 4)
    assert (row.target.fit, row.target.test_split) == (512, "val")
    assert setting("P(i)2V").train_ids(row.source) == (0, 1, 2, 3, 4, 5)


def test_rows_are_found_by_name() -> None:
    assert setting("P(i) 2 V") is setting("P(i)2V")
    assert setting("Sub2Sub").name == "Sub (Source-Only)"
    with pytest.raises(ValueError, match=r"setting 'P\(x\)2V'.*did you mean .*P\(i\)2V"):
        setting("P(x)2V")
