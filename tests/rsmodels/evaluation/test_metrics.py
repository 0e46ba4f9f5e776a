"""Every figure against a formula of its own: sets of pixels, counted in numpy, class by class."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rsmodels.evaluation.metrics import ConfusionMatrix, logits_to_ids
from rsmodels.evaluation.report import without_nan

CLASSES = ("building", "road", "water", "forest")
ids = st.sampled_from([0, 1, 2, 3, 255])
pairs = st.lists(st.tuples(ids, st.sampled_from([0, 1, 2, 3])), min_size=1, max_size=60)


def brute_force(truth: np.ndarray, prediction: np.ndarray, reported: list[int]) -> dict:
    """Sets of pixels per class, as the definitions say it."""
    kept = [(t, p) for t, p in zip(truth.tolist(), prediction.tolist(), strict=True) if t != 255]
    figures: dict = {name: {} for name in ("iou", "dice", "precision", "recall", "accuracy")}
    for c in reported:
        is_truth = {i for i, (t, _) in enumerate(kept) if t == c}
        is_predicted = {i for i, (_, p) in enumerate(kept) if p == c}
        both, either = is_truth & is_predicted, is_truth | is_predicted
        if not either:
            continue
        precision = len(both) / len(is_predicted) if is_predicted else 0.0
        recall = len(both) / len(is_truth) if is_truth else 0.0
        figures["iou"][c] = len(both) / len(either)
        figures["precision"][c], figures["recall"][c] = precision, recall
        # Dice as the harmonic mean of precision and recall: F1.
        figures["dice"][c] = 2 * precision * recall / (precision + recall) if both else 0.0
        figures["accuracy"][c] = sum((t == c) == (p == c) for t, p in kept) / len(kept)
    figures["overall"] = sum(t == p for t, p in kept) / len(kept) if kept else math.nan
    return figures


def mean(values: dict) -> float:
    return sum(values.values()) / len(values) if values else math.nan


def same(ours: float, theirs: float) -> bool:
    return (math.isnan(ours) and math.isnan(theirs)) or math.isclose(
        ours, theirs, rel_tol=1e-12, abs_tol=1e-15
    )


@given(pairs, st.integers(1, 5))
def test_figures_match_their_definitions(pixels: list[tuple[int, int]], batches: int) -> None:
    truth, prediction = np.array(pixels).T
    matrix = ConfusionMatrix(CLASSES)
    for part in np.array_split(np.arange(len(truth)), batches):
        matrix.update(torch.from_numpy(prediction[part]), torch.from_numpy(truth[part]))
    found = matrix.compute()
    expected = brute_force(truth, prediction, [0, 1, 2, 3])
    for name in ("iou", "dice", "precision", "recall"):
        assert same(found[f"mean_{name}"], mean(expected[name]))
        for index, label in enumerate(CLASSES):
            assert same(found["per_class"][label][name], expected[name].get(index, math.nan))
    assert same(found["overall_accuracy"], expected["overall"])
    assert same(found["mean_binary_accuracy"], mean(expected["accuracy"]))
    assert found["absent_classes"] == [c for i, c in enumerate(CLASSES) if i not in expected["iou"]]
    assert found["pixels"] == (truth != 255).sum()


@given(st.lists(st.tuples(st.sampled_from([0, 1, 255]), st.sampled_from([0, 1])), min_size=1, max_size=40))
def test_a_binary_task_reports_the_foreground(pixels: list[tuple[int, int]]) -> None:
    truth, prediction = np.array(pixels).T
    matrix = ConfusionMatrix(("background", "road"), binary=True)
    matrix.update(torch.from_numpy(prediction), torch.from_numpy(truth))
    found = matrix.compute()
    expected = brute_force(truth, prediction, [1])
    assert list(found["per_class"]) == ["road"]
    for name in ("iou", "dice", "precision", "recall"):
        assert same(found[f"mean_{name}"], mean(expected[name]))
    assert same(found["overall_accuracy"], expected["overall"])
    assert len(found["confusion"]) == 2


def test_one_matrix_for_the_data_set_is_not_the_mean_over_images() -> None:
    matrix = ConfusionMatrix(("a", "b"))
    matrix.update(torch.tensor([0] * 9 + [1]), torch.tensor([0] * 10))
    matrix.update(torch.tensor([1]), torch.tensor([1]))
    # a: 9 of 10 found and never wrong; b: 1 hit, 1 false alarm.
    assert matrix.compute()["mean_iou"] == pytest.approx((9 / 10 + 1 / 2) / 2)


def test_counts_of_two_matrices_add_up() -> None:
    first, second = ConfusionMatrix(CLASSES), ConfusionMatrix(CLASSES)
    first.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    second.update(torch.tensor([2]), torch.tensor([2]))
    first += second
    assert first.compute()["pixels"] == 3
    with pytest.raises(ValueError, match="cannot add counts"):
        first += ConfusionMatrix(("x", "y"))


def test_an_absent_class_is_null_in_json() -> None:
    matrix = ConfusionMatrix(CLASSES)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, 1]))
    metrics = json.loads(json.dumps(without_nan(matrix.compute()), allow_nan=False))
    assert metrics["per_class"]["water"] == {"iou": None, "dice": None, "precision": None, "recall": None}
    assert metrics["absent_classes"] == ["water", "forest"]
    assert metrics["mean_iou"] == 1.0


def test_nothing_labelled_gives_no_figures() -> None:
    matrix = ConfusionMatrix(CLASSES)
    matrix.update(torch.tensor([0, 1]), torch.tensor([255, 255]))
    found = matrix.compute()
    assert math.isnan(found["overall_accuracy"]) and math.isnan(found["mean_iou"]) and found["pixels"] == 0


def test_ids_outside_the_classes_and_shapes_that_differ_are_refused() -> None:
    matrix = ConfusionMatrix(CLASSES)
    with pytest.raises(ValueError, match="truth has ids 0 to 7, expected 0 to 3 or 255"):
        matrix.update(torch.tensor([0, 0]), torch.tensor([0, 7]))
    with pytest.raises(ValueError, match="prediction has ids 4 to 4"):
        matrix.update(torch.tensor([4]), torch.tensor([0]))
    with pytest.raises(ValueError, match="differ in shape"):
        matrix.update(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="two classes"):
        ConfusionMatrix(CLASSES, binary=True)


def test_ids_from_probabilities() -> None:
    several = torch.tensor([[0.1, 0.7], [0.6, 0.2], [0.3, 0.1]]).reshape(1, 3, 1, 2)
    assert logits_to_ids(several).tolist() == [[[1, 0]]]
    single = torch.tensor([0.49, 0.5]).reshape(1, 1, 1, 2)
    assert logits_to_ids(single).tolist() == [[[0, 1]]]
    assert logits_to_ids(single).dtype == torch.uint8
