"""What each command does: one function per command, from its configuration to an exit code."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import Any

import torch

from rsmodels.data import check_dataset
from rsmodels.evaluation import evaluate as evaluation
from rsmodels.evaluation.features import FeaturesConfig, draw_features
from rsmodels.evaluation.inference import pick_device
from rsmodels.evaluation.report import table
from rsmodels.predict import PredictConfig, predict_scenes
from rsmodels.pretraining import pretrain as pretraining
from rsmodels.pretraining.config import PretrainConfig
from rsmodels.pretraining.probe import probe_table
from rsmodels.registry import create_model, list_models, parameter_counts
from rsmodels.style_stats import StyleStatsConfig, measure_styles
from rsmodels.training import trainer
from rsmodels.training.config import TrainConfig
from rsmodels.training.parallel import processes


@dataclass
class CheckDataConfig:
    """One check: which data set, where."""

    data: str = field(metadata={"positional": "name of the data set"})
    root: str | None = None
    """Folder of the data set."""
    data_args: dict[str, Any] = field(default_factory=dict)
    """Arguments for the data set, for example --data-args.classes classes.yaml."""
    bands: tuple[int, ...] | None = None
    """Bands to read, counted from 1, in this order (default: all)."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass
class ModelsConfig:
    """Which models to list."""

    pattern: str = field(
        default="*", metadata={"positional": "shell pattern, for example 'rs_sam*' (default: all)"}
    )
    debug: bool = False
    """Show the traceback of an error."""


def train(config: TrainConfig) -> int:
    run = trainer.train(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"{run}: the best model is in {run / 'best'}")
        if config.report:
            print(f"report: {run / 'report' / 'index.html'}")
    return 0


def evaluate(config: evaluation.EvaluateConfig) -> int:
    pick_device(config.device)  # what is wrong with it, said before the ranks meet
    with processes(config.device) as ranks:
        result = evaluation.evaluate(config)
        if ranks.main:
            print(table(result.metrics))
            print(f"report: {evaluation.report_folder(config) / 'index.html'}")
    return 0


def predict(config: PredictConfig) -> int:
    """3 where some of several scenes failed; 2 where all did."""
    failed = predict_scenes(config, _say)
    if failed == 0:
        return 0
    return 2 if failed == len(config.scenes) else 3


def features(config: FeaturesConfig) -> int:
    for picture in draw_features(config):
        print(picture)
    return 0


def pretrain(config: PretrainConfig) -> int:
    made = pretraining.pretrain(config)
    if made.probe:
        print(probe_table(made.probe))
    print(made.output)
    return 0


def style_stats(config: StyleStatsConfig) -> int:
    """3 where some of the images could not be used; 2 where none could."""
    measured = measure_styles(config, _say)
    left_out = f"; {measured.failed} could not be used" if measured.failed else ""
    print(f"{config.output}: {measured.statistics.count} styles of {measured.images} images{left_out}")
    return 3 if measured.failed else 0


def check_data(config: CheckDataConfig) -> int:
    options = dict(config.data_args)
    if config.bands is not None:
        options["bands"] = config.bands
    report = check_dataset(config.data, config.root, **options)
    print(report.format())
    return 0 if report.ok else 1


def models(config: ModelsConfig) -> int:
    names = list_models(config.pattern)
    if not names:
        raise ValueError(f"no model matches {config.pattern!r}; there are {', '.join(list_models())}")
    print(f"{'model':<24}{'input':>11}{'parameters':>14}{'trainable':>14}")
    for name in names:
        with torch.device("meta"):  # sizes are known without any memory for the weights
            model = create_model(name, num_classes=2)
        everything, trainable = parameter_counts(model)["total"]
        height, width = model.image_size
        print(f"{name:<24}{f'{height} x {width}':>11}{everything:>14,}{trainable:>14,}")
    return 0


def _say(error: Exception) -> None:
    """What is wrong with one of many, on a line; the others go on."""
    print(f"rsmodels: error: {' '.join(str(error).split())}", file=sys.stderr)
