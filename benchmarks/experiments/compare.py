"""Variants of a method, trained on one domain and measured on domains never seen: what experiments share.

Every variant is trained on the source of rsmodels.data.synthetic.gaps with every seed, and its best
checkpoint is evaluated on unseen scenes of the source and of each target. Runs of one seed differ in the
variant alone: tiles, their order and augmentation are the same. Figures go to a JSON file after every run: a
finished run is not repeated, one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from rsmodels.data.synthetic.gaps import SOURCE, TARGETS
from rsmodels.evaluation.evaluate import EvaluateConfig, evaluate
from rsmodels.files import read_json, write_json
from rsmodels.training.config import LoaderConfig, OptimConfig, TrainConfig
from rsmodels.training.trainer import train

RESULTS = Path(__file__).parents[1] / "results"
DOMAINS = {"source": SOURCE, **TARGETS}
SIDE = 128  # pixels of a tile


def arguments(name: str, description: str, *, steps: int, lr: float) -> argparse.ArgumentParser:
    """The options that every experiment has; `name` is that of its result and of its folder of runs."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps of each run")
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--runs", default=f"runs/{name.replace('_', '-')}", help="folder of the runs")
    parser.add_argument("--output", default=str(RESULTS / f"{name}.json"))
    return parser


def recipe(options: argparse.Namespace, **changes: Any) -> TrainConfig:
    """What all variants train by; `changes` are one variant's."""
    common: dict[str, Any] = {
        "data": "synthetic",
        "data_args": {"domain": str(SOURCE), "size": SIDE},
        "image_size": SIDE,
        "loader": LoaderConfig(flip=True, photometric=True),
        "num_workers": 1,
        "steps": options.steps,
        "batch_size": 8,
        "optim": OptimConfig(lr=options.lr),
        "resume": "auto",
        "report": False,
    }
    return TrainConfig(**common | changes)


def compare(
    variants: Mapping[str, TrainConfig], options: argparse.Namespace, setting: Mapping[str, Any]
) -> str:
    """Train and measure what is missing in options.output; all of it as a table.

    `setting` is what the figures depend on besides seed and variant: those of another setting are dropped.
    """
    output = Path(options.output)
    setting = {**setting, "steps": options.steps, "lr": options.lr, "image_size": SIDE}
    runs: list[dict[str, Any]] = []
    if output.exists():
        before = read_json(output)
        if before["setting"] == setting:
            runs = before["runs"]
    for seed in options.seeds:
        for variant, config in variants.items():
            if any(row["variant"] == variant and row["seed"] == seed for row in runs):
                continue
            folder = Path(options.runs) / f"{variant.replace(' ', '-')}-{seed}"
            train(dataclasses.replace(config, run_dir=str(folder), seed=seed))
            runs.append({"variant": variant, "seed": seed, "mean_iou": measure(folder / "best")})
            today = datetime.date.today().isoformat()
            write_json(output, {"date": today, "machine": machine(), "setting": setting, "runs": runs})
    return table(list(variants), runs)


def measure(model: Path) -> dict[str, float]:
    """{domain: mean IoU on its test split}."""
    found = {}
    for name, domain in DOMAINS.items():
        with tempfile.TemporaryDirectory() as report:
            evaluation = evaluate(
                EvaluateConfig(
                    model=str(model), data_args={"domain": str(domain), "size": SIDE}, report=report
                )
            )
        found[name] = evaluation.metrics["mean_iou"]
    return found


def table(variants: list[str], runs: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, in per cent, as Markdown."""
    columns = [*DOMAINS, "unseen domains"]
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for variant in variants:
        rows = [row["mean_iou"] for row in runs if row["variant"] == variant]
        rows = [{**row, "unseen domains": statistics.mean(row[name] for name in TARGETS)} for row in rows]
        lines.append(f"| {variant} | {' | '.join(_cell([row[name] for row in rows]) for name in columns)} |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"
