"""LabelSchema: every coding, every refusal, and a round trip through JSON."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsmodels.data.schema import IGNORE, LabelSchema, parse_color

WATER, ROAD, NOTHING = (0xE2, 0xA9, 0x29), (0x6E, 0xC1, 0xE4), (0, 0, 0)

IDS = LabelSchema(
    ("land", "water", "road"), ((9, 9, 9), (0, 0, 255), (255, 255, 0)), {1: 0, 2: 1, 7: 2, 0: IGNORE}
)
COLORS = LabelSchema(("water", "road"), (WATER, ROAD), colors={WATER: 0, ROAD: 1, NOTHING: IGNORE})
ROADS = LabelSchema(("background", "road"), ((0, 0, 0), (255, 255, 255)), binary=True, threshold=128)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64, np.float32])
def test_values_become_train_ids_whatever_their_dtype(dtype):
    raw = np.array([[1, 2], [7, 0]], dtype)
    ids = IDS.encode(raw, source="a.png")
    assert ids.dtype == np.uint8
    assert ids.tolist() == [[0, 1], [2, IGNORE]]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
@pytest.mark.parametrize("value", [3, 100])
def test_an_unknown_value_names_file_value_and_what_is_allowed(dtype, value):
    with pytest.raises(
        ValueError, match=rf"a\.png: unknown label {value} \(2 pixels\).*2 water.*0 \(ignored\)"
    ) as error:
        IDS.encode(np.array([[1, value], [value, 0]], dtype), source="a.png")
    assert "\n" not in str(error.value)


def test_negative_labels_are_values_like_any_other():
    schema = LabelSchema(("land", "water"), ((0, 9, 0), (0, 0, 255)), {-1: IGNORE, 0: 0, 1: 1})
    assert schema.encode(np.array([[-1, 0, 1]], np.int16), source="s").tolist() == [[IGNORE, 0, 1]]
    with pytest.raises(ValueError, match="unknown label -2"):
        schema.encode(np.array([[-2, 0, 1]], np.int16), source="s")
    with pytest.raises(ValueError, match="unknown label 255"):
        schema.encode(np.array([[255, 0, 1]], np.uint8), source="s")


@given(
    st.dictionaries(st.integers(-300, 600), st.integers(0, 2), min_size=1, max_size=20),
    st.sampled_from(["uint8", "int16", "int64"]),
    st.data(),
)
@settings(max_examples=100)
def test_any_table_encodes_as_a_dictionary_would(table, dtype, data):
    schema = LabelSchema(("a", "b", "c"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)), table)
    info = np.iinfo(dtype)
    inside = st.integers(max(info.min, -400), min(info.max, 700))
    raw = np.array([data.draw(st.lists(inside, min_size=1, max_size=8))], dtype)
    if all(value in table for value in raw[0].tolist()):
        assert schema.encode(raw, source="s")[0].tolist() == [table[value] for value in raw[0].tolist()]
    else:
        with pytest.raises(ValueError, match=r"unknown label|0/255"):
            schema.encode(raw, source="s")


def test_masks_of_0_and_255_read_as_class_ids_are_refused_with_the_way_out():
    raw = np.array([[0, 255], [255, 0]], np.uint8)
    for schema in (IDS, LabelSchema(("no", "yes"), ((0, 0, 0), (1, 1, 1)), {0: 0, 1: 1}, binary=True)):
        with pytest.raises(ValueError, match=r"roads\.png: the mask holds 0/255.*values: \[255\]"):
            schema.encode(raw, source="roads.png")


def test_a_wrong_shift_of_the_labels_is_not_taken_for_a_two_class_mask():
    with pytest.raises(ValueError, match="unknown label 0"):
        LabelSchema(("a",), ((1, 1, 1),), {1: 0}).encode(np.zeros((2, 2), np.uint8), source="s")


def test_colours_become_train_ids():
    raw = np.array([[WATER, ROAD], [NOTHING, WATER]], np.uint8)
    assert COLORS.encode(raw, source="c.png").tolist() == [[0, 1], [IGNORE, 0]]


def test_an_unmatched_colour_is_an_error_and_never_class_0():
    raw = np.array([[WATER, (0xE2, 0xAA, 0x29)]], np.uint8)
    with pytest.raises(ValueError, match=r"c\.png: unknown label colour e2aa29 \(1 pixels, nearest e2a929\)"):
        COLORS.encode(raw, source="c.png")


def test_a_lossy_colour_mask_is_called_one():
    raw = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    with pytest.raises(ValueError, match="lossy or resampled"):
        COLORS.encode(raw, source="c.png")


def test_a_colour_mask_for_a_schema_of_values_says_so():
    with pytest.raises(ValueError, match=r"holds colours.*encoding: colors"):
        IDS.encode(np.array([[WATER]], np.uint8), source="c.png")


def test_three_equal_channels_are_one():
    raw = np.repeat(np.array([[0, 127, 128, 255]], np.uint8)[..., None], 3, axis=2)
    assert ROADS.encode(raw, source="m.png").tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_labels_that_are_no_whole_numbers_are_refused(value):
    with pytest.raises(ValueError, match=r"f\.tif: the mask holds"):
        IDS.encode(np.array([[1.0, value]], np.float32), source="f.tif")


def test_number_of_logits():
    assert (IDS.num_logits, ROADS.num_logits, ROADS.num_classes) == (3, 1, 2)


def test_pictures():
    picture = IDS.colorize(np.array([[0, 1, 2, IGNORE]]))
    assert picture.tolist() == [[[9, 9, 9], [0, 0, 255], [255, 255, 0], [0, 0, 0]]]
    with pytest.raises(ValueError, match="train id 3 has no colour"):
        IDS.colorize(np.array([[3]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": ("a", "a"), "palette": ((1, 1, 1),) * 2, "raw_to_train": {0: 0}}, "twice"),
        ({"classes": ("a", "b"), "palette": ((1, 1, 1),), "raw_to_train": {0: 0}}, "2 palette colours"),
        ({"classes": ("a",), "palette": ((1, 1, 300),), "raw_to_train": {0: 0}}, "0 to 255"),
        ({"classes": ("a",), "palette": ((1, 1, 1),), "raw_to_train": {0: 1}}, "train id 1"),
        ({"classes": ("a",), "palette": ((1, 1, 1),)}, "exactly one of"),
        ({"classes": ("a",), "palette": ((1, 1, 1),), "raw_to_train": {0: 0}, "binary": True}, "2 classes"),
        ({"classes": ("a", "b"), "palette": ((1, 1, 1),) * 2, "threshold": 3}, "binary=True"),
        ({"classes": (), "palette": (), "raw_to_train": {}}, "not 0"),
    ],
)
def test_impossible_schemas_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LabelSchema(**arguments)


colors = st.tuples(*[st.integers(0, 255)] * 3)


@st.composite
def schemas(draw) -> LabelSchema:
    names = tuple(draw(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=6, unique=True)))
    palette = tuple(draw(st.lists(colors, min_size=len(names), max_size=len(names))))
    ids = st.sampled_from([*range(len(names)), IGNORE])
    coding = draw(st.sampled_from(["values", "colors", "threshold"]))
    if coding == "values":
        table = draw(st.dictionaries(st.integers(-1000, 70000), ids, min_size=1, max_size=9))
        return LabelSchema(names, palette, table, binary=len(names) == 2)
    if coding == "colors":
        return LabelSchema(names, palette, colors=draw(st.dictionaries(colors, ids, max_size=9)))
    return LabelSchema(names[:2], palette[:2], binary=True, threshold=draw(st.integers(1, 255)))


@given(schemas())
@settings(max_examples=100)
def test_a_schema_survives_json_and_pickling(schema):
    assert LabelSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    assert pickle.loads(pickle.dumps(schema)) == schema


@pytest.mark.parametrize("text", ["3c1098", "#3C1098", [60, 16, 152]])
def test_colours_in_words(text):
    assert parse_color(text) == (60, 16, 152)


@pytest.mark.parametrize("text", ["3c109", "red", 0, None, [1, 2], "3c10zz"])
def test_what_is_no_colour(text):
    with pytest.raises(ValueError, match="not understood"):
        parse_color(text)
