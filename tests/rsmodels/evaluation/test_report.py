"""The report: what it holds, pictures that show what they should, nothing stale, nothing half-written."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsmodels.evaluation import figures
from rsmodels.evaluation.evaluate import evaluate_model
from rsmodels.evaluation.report import read_log, table, write_report


def pixels_of(figure, tmp_path: Path) -> np.ndarray:  # type: ignore[no-untyped-def]
    figures.save(figure, tmp_path / "figure.png")
    return np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))


def has_colour(picture: np.ndarray, colour: tuple[int, ...]) -> bool:
    return bool((picture == np.array(colour, np.uint8)).all(-1).any())


def test_eight_bits_are_shown_as_they_are_and_more_are_stretched() -> None:
    eight = np.random.default_rng(0).integers(0, 100, (3, 8, 9)).astype(np.float32)
    np.testing.assert_array_equal(figures.to_rgb(eight), eight.transpose(1, 2, 0))
    sixteen = np.random.default_rng(0).uniform(2000, 3000, (8, 50, 50)).astype(np.float32)
    shown = figures.to_rgb(sixteen)
    assert shown.shape == (50, 50, 3) and shown.min() == 0 and shown.max() == 255
    grey = figures.to_rgb(np.random.default_rng(0).uniform(-1, 1, (1, 9, 9)))
    assert (grey[..., 0] == grey[..., 2]).all() and grey.max() == 255
    hole = np.full((3, 4, 4), np.nan, np.float32)
    assert figures.to_rgb(hole).shape == (4, 4, 3)


def test_errors_are_marked_and_unlabelled_pixels_are_not_errors() -> None:
    truth, prediction = np.array([[0, 1, 255]]), np.array([[0, 2, 1]])
    shown = figures.errors(np.full((1, 3, 3), 200, np.uint8), truth, prediction)
    assert tuple(shown[0, 1]) == figures.WRONG
    assert tuple(shown[0, 2]) == figures.UNLABELLED
    assert shown[0, 0, 0] == shown[0, 0, 1] == shown[0, 0, 2]


@pytest.mark.parametrize("size", [(64, 64), (40, 160), (160, 40)])
def test_a_tiles_picture_has_its_colours(scenes, tmp_path: Path, size: tuple[int, int]) -> None:
    dataset = scenes([size, size], wrong=0.3)
    truth = dataset.masks[1].copy()
    truth[:10] = 255
    image = dataset.read_image(1).pixels
    figure = figures.tile_figure(image, truth, dataset.predicted[1], dataset.schema, title="worst 1: x")
    picture = pixels_of(figure, tmp_path)
    for colour in (*dataset.schema.palette, figures.WRONG, figures.UNLABELLED):
        assert has_colour(picture, colour)
    assert picture.shape[1] > 1000


def test_a_confusion_matrix_with_an_absent_class(tmp_path: Path) -> None:
    counts = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
    figure = figures.confusion_figure(counts, ["a", "b", "never"])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["0.80", "0.20", "0.00", "0.00", "1.00", "0.00", "–", "–", "–"]
    pixels_of(figure, tmp_path)


def test_curves_show_losses_metrics_and_the_learning_rate() -> None:
    log = [
        {"kind": "train", "step": 10, "loss": 1.0, "loss_dice": 0.8, "lr": 0.1, "grad_norm": 3.0},
        {"kind": "train", "step": 20, "loss": 0.5, "loss_dice": 0.4, "lr": 0.05, "grad_norm": 2.0},
        {"kind": "validation", "step": 20, "loss": 0.7, "mean_iou": 0.4, "overall_accuracy": math.nan},
    ]
    figure = figures.curves_figure(log)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["loss", "metrics", "learning rate"]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["train loss", "train loss dice", "validation loss"]
    assert [line.get_label() for line in figure.axes[1].lines] == ["validation mean iou"]
    assert figures.curves_figure([]) is None


def test_a_new_report_takes_the_place_of_the_old(pixel_model, scenes, tmp_path: Path) -> None:
    dataset = scenes([(16, 16)] * 4, wrong=0.2)
    found = evaluate_model(pixel_model, dataset, tiles=1)
    write_report(tmp_path, found, dataset, title="first <one>")
    (tmp_path / "mine.txt").write_text("a user's own file")
    other = evaluate_model(pixel_model, dataset, indices=[0, 1], tiles=1)
    page = write_report(tmp_path, other, dataset, title="second", notes=["mind this & that"])
    assert "mind this &amp; that" in page.read_text() and "first" not in page.read_text()
    assert sorted(path.name for path in (tmp_path / "tiles").iterdir()) == [
        "best-1-scene-0.png",
        "worst-1-scene-1.png",
    ]
    assert (tmp_path / "mine.txt").is_file()
    assert not [path for path in tmp_path.iterdir() if "tmp" in path.name]


def test_the_table_names_absent_classes_and_domains(pixel_model, scenes) -> None:
    dataset = scenes([(16, 16)] * 2, domains=("north", "south"))
    for mask in (*dataset.masks, *dataset.predicted):
        mask[mask == 2] = 0
    text = table(evaluate_model(pixel_model, dataset).metrics)
    assert "left out of the means: water" in text
    assert "domain north" in text and "domain south" in text
    assert any(line.startswith("water") and "–" in line for line in text.splitlines())


def test_a_log_cut_short_is_read_to_the_cut(tmp_path: Path) -> None:
    assert read_log(tmp_path / "none.jsonl") == []
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}, {"step": 2}]


def test_styled_and_masked_images_stand_side_by_side(pixel_model, scenes, tmp_path: Path) -> None:
    dataset = scenes([(16, 16)] * 2)
    colours = np.eye(3, dtype=np.float32).reshape(3, 1, 3, 1, 1)
    examples = [np.broadcast_to(one, (2, 3, 20, 30)) for one in colours]
    picture = pixels_of(figures.style_figure(*examples), tmp_path)
    left = [np.argwhere((picture == 255 * colour.reshape(3)).all(-1))[:, 1].min() for colour in colours]
    assert left == sorted(left) and len(set(left)) == 3  # red X, green X_S, blue X_M, from left to right

    found = evaluate_model(pixel_model, dataset, tiles=0)
    page = write_report(tmp_path / "with", found, dataset, title="x", examples=examples)
    assert "styles.png" in page.read_text() and (tmp_path / "with" / "styles.png").is_file()
    page = write_report(tmp_path / "without", found, dataset, title="x")
    assert "styles.png" not in page.read_text() and not (tmp_path / "without" / "styles.png").exists()
