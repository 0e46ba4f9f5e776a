"""Evaluation of a model in memory: whole images, tiled images, domains, ranking, and several ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rsmodels
from rsmodels.evaluation.evaluate import EvaluateConfig, evaluate, evaluate_model
from rsmodels.evaluation.metrics import ConfusionMatrix
from rsmodels.methods.rs_sam import RSSAM

SIZES = [(16, 16), (40, 23), (5, 9), (16, 16), (17, 16), (64, 64)]
ROOT = Path(__file__).resolve().parents[3]


def expected_counts(dataset) -> list[list[int]]:  # type: ignore[no-untyped-def]
    matrix = ConfusionMatrix(dataset.schema.classes)
    for truth, predicted in zip(dataset.masks, dataset.predicted, strict=True):
        matrix.update(torch.from_numpy(predicted), torch.from_numpy(truth))
    return matrix.counts.tolist()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_pixel_of_every_image_counts_once(pixel_model, scenes, batch_size: int) -> None:
    dataset = scenes(SIZES, wrong=0.1)
    found = evaluate_model(pixel_model, dataset, batch_size=batch_size)
    assert found.metrics["confusion"] == expected_counts(dataset)
    assert found.metrics["pixels"] == sum(height * width for height, width in SIZES)
    assert max(shape[0] for shape in pixel_model.calls) <= batch_size


def test_images_of_the_models_size_are_one_tile(pixel_model, scenes) -> None:
    evaluate_model(pixel_model, scenes([(16, 16)] * 5), batch_size=2)
    assert [shape[0] for shape in pixel_model.calls] == [2, 2, 1]


def test_the_domain_travels_with_the_sample(pixel_model, scenes) -> None:
    dataset = scenes(SIZES, wrong=0.15, domains=("urban", "rural"))
    metrics = evaluate_model(pixel_model, dataset).metrics
    assert list(metrics["per_domain"]) == ["rural", "urban"]
    for domain, first in (("urban", 0), ("rural", 1)):
        chosen = range(first, len(SIZES), 2)
        alone = evaluate_model(pixel_model, dataset, indices=list(chosen)).metrics
        assert metrics["per_domain"][domain]["confusion"] == alone["confusion"]
        assert "per_domain" not in alone


def test_worst_and_best_are_ranked_and_apart(pixel_model, scenes) -> None:
    dataset = scenes([(16, 16)] * 7, wrong=0.1)
    found = evaluate_model(pixel_model, dataset, tiles=2)
    assert [tile.name for tile in found.worst] == ["scene-6", "scene-5"]
    assert [tile.name for tile in found.best] == ["scene-0", "scene-1"]
    np.testing.assert_array_equal(found.worst[0].ids, dataset.predicted[6])
    few = evaluate_model(pixel_model, scenes([(16, 16)] * 3, wrong=0.1), tiles=2)
    assert [tile.index for tile in few.worst + few.best] == [2, 1, 0]
    none = evaluate_model(pixel_model, dataset, tiles=0)
    assert none.worst == none.best == []


def test_binary_data(make_model, scenes, roads) -> None:
    dataset = scenes([(16, 16), (20, 30)], schema=roads, wrong=0.3)
    metrics = evaluate_model(make_model(classes=1), dataset).metrics
    assert metrics["confusion"] == expected_counts(dataset)
    assert list(metrics["per_class"]) == ["road"]


def test_the_model_returns_to_its_mode(pixel_model, scenes) -> None:
    pixel_model.train()
    evaluate_model(pixel_model, scenes([(16, 16)]))
    assert pixel_model.training


def test_a_model_of_other_classes_is_refused(pixel_model, scenes, roads) -> None:
    with pytest.raises(
        ValueError, match=r"predicts 3 classes and data set 'scenes' has 1 \(background, road\)"
    ):
        evaluate_model(pixel_model, scenes([(16, 16)], schema=roads))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_file_is_one_line(pixel_model, scenes, workers: int) -> None:
    dataset = scenes([(16, 16)] * 3)
    dataset.masks[1] = dataset.masks[1][:5]
    with pytest.raises(ValueError, match="scene-1: the image is 16x16 pixels, its mask is 5x16") as caught:
        evaluate_model(pixel_model, dataset, num_workers=workers)
    assert "\n" not in str(caught.value)


# A sharded model talks to the other ranks in every call: the stand-in adds up a one over all ranks, which
# hangs, or gives a sum that is not the number of ranks, unless all ranks call it equally often.
RANK = """
import sys, json, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from conftest import PixelModel, Scenes
from rsmodels.evaluation.evaluate import evaluate_model

class Sharded(PixelModel):
    def forward(self, images):
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert ones.item() == dist.get_world_size()
        return super().forward(images)

dist.init_process_group("gloo")
dataset = Scenes(json.loads(sys.argv[2]), wrong=0.1, domains=("north", "south", "south"))
found = evaluate_model(Sharded(), dataset, batch_size=2, tiles=2)
if dist.get_rank() == 0:
    print(json.dumps([found.metrics, [t.name for t in found.worst], [t.name for t in found.best]]))
dist.destroy_process_group()
"""


def test_two_ranks_find_what_one_finds(pixel_model, scenes, tmp_path: Path) -> None:
    sizes = [(16, 16), (16, 16), (64, 64), (5, 9), (40, 23)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(Path(__file__).parent), json.dumps(sizes)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=60) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    metrics, worst, best = json.loads(outputs[0][0])
    alone = evaluate_model(
        pixel_model, scenes(sizes, wrong=0.1, domains=("north", "south", "south")), tiles=2
    )
    assert metrics == alone.metrics
    assert worst == [tile.name for tile in alone.worst]
    assert best == [tile.name for tile in alone.best]


def test_a_saved_model_is_evaluated_and_reported(run_folder: Path) -> None:
    config = EvaluateConfig(
        model=str(run_folder / "best"),
        split="val",
        data_args={"length": 3, "size": 96},
        tiles=1,
        device="cpu",
    )
    found = evaluate(config)
    report = run_folder / "report"
    written = json.loads((report / "metrics.json").read_text())
    assert written["mean_iou"] == pytest.approx(found.metrics["mean_iou"])
    assert {"mean_iou", "mean_dice", "overall_accuracy", "per_class"} <= written.keys()
    assert written["pixels"] == 3 * 96 * 96
    assert all(set(row) == {"iou", "dice", "precision", "recall"} for row in written["per_class"].values())
    assert {path.name for path in report.iterdir()} == {
        "metrics.json",
        "index.html",
        "confusion.png",
        "curves.png",
        "tiles",
    }
    page = (report / "index.html").read_text()
    assert "validation images: the checkpoint was chosen" in page
    pictures = sorted(path.name for path in (report / "tiles").iterdir())
    assert len(pictures) == 2 and all(f"tiles/{name}" in page for name in pictures)


def test_a_model_of_other_class_names_is_refused(run_folder: Path, tmp_path: Path) -> None:
    info = json.loads((run_folder / "best" / "model.json").read_text())
    other = tmp_path / "best"
    model, _ = rsmodels.load_model(run_folder / "best")
    rsmodels.save_model(model, other, {"classes": info["classes"][::-1], "palette": info["palette"]})
    with pytest.raises(ValueError, match="trained on the classes"):
        evaluate(EvaluateConfig(model=str(other), data_args={"length": 2, "size": 64}))


def test_the_domain_picks_images_or_makes_them(run_folder: Path, tmp_path: Path) -> None:
    """A data set of files is filtered; the synthetic one renders the domain it is asked for."""
    made = EvaluateConfig(
        model=str(run_folder / "best"),
        data_args={"length": 2, "size": 64},
        domain="region=coast",
        report=str(tmp_path / "report"),
        tiles=0,
    )
    assert evaluate(made).metrics["pixels"] == 2 * 64 * 64
    assert (tmp_path / "report" / "index.html").is_file()
    with pytest.raises(ValueError, match="moon"):
        evaluate(replace(made, domain="region=moon"))
    schema = rsmodels.data.create_dataset("synthetic", length=1).schema
    listed = [
        {"name": name, "color": list(color), "values": [index]}
        for index, (name, color) in enumerate(zip(schema.classes, schema.palette, strict=True))
    ]
    (tmp_path / "classes.yaml").write_text(json.dumps({"encoding": "values", "classes": listed}))
    for group, count in (("north", 1), ("south", 2)):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (tmp_path / group / kind).mkdir(parents=True)
            for index in range(count):
                Image.new(mode, (64, 64)).save(tmp_path / group / kind / f"{index}.png")
    from_files = replace(
        made, data="folder", root=str(tmp_path), data_args={"test": "north,south"}, domain="south"
    )
    assert evaluate(from_files).metrics["pixels"] == 2 * 64 * 64
    with pytest.raises(
        ValueError, match="domain 'east' is not in split 'test' of 'folder', which has north, south"
    ):
        evaluate(replace(from_files, domain="east"))


def test_a_model_that_styles_images_shows_them(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def style_examples(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen.append(images)
        return images.clamp(0, 1), torch.rand_like(images), images * 0

    monkeypatch.setattr(RSSAM, "style_examples", style_examples, raising=False)
    options = {"model": str(run_folder / "best"), "data_args": {"length": 5, "size": 96}, "tiles": 0}
    for name in ("first", "second"):
        evaluate(EvaluateConfig(**options, report=str(tmp_path / name), device="cpu"))
    assert [image.shape for image in seen] == [(3, 3, 64, 64)] * 2
    pictures = [(tmp_path / name / "styles.png").read_bytes() for name in ("first", "second")]
    assert pictures[0] == pictures[1]

    # On other data than the model's own they would show what it was never trained on.
    info = {"training": {"data": "whdld"}}
    model, _ = rsmodels.load_model(run_folder / "best")
    rsmodels.save_model(model, tmp_path / "other" / "best", info)
    options["model"] = str(tmp_path / "other" / "best")
    evaluate(EvaluateConfig(**options, report=str(tmp_path / "third"), device="cpu"))
    assert len(seen) == 2 and not (tmp_path / "third" / "styles.png").exists()
