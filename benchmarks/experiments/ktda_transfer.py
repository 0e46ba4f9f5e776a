"""`python -m benchmarks.experiments.ktda_transfer --teacher-weights FILE`: does KTDA's transfer help?

The same student with and without the transfer term (tiny models, generated scenes): trained on the source
domain of rsmodels.data.synthetic.gaps, measured on unseen scenes of the source and of each target domain, for
several seeds. What differs between two runs of a seed is the term alone: first weights, tiles and their order
are the same. `rsmodels pretrain` makes FILE, the teacher.

Writes results/ktda_transfer.json and prints it as a table. Runs that are finished are not repeated, one that
was stopped goes on.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import machine
from rsmodels.data.synthetic.gaps import SOURCE, TARGETS
from rsmodels.evaluation.evaluate import EvaluateConfig, evaluate
from rsmodels.files import read_json, write_json
from rsmodels.training.config import LoaderConfig, OptimConfig, TrainConfig
from rsmodels.training.trainer import train
from rsmodels.weights import sha256_of

RESULTS = Path(__file__).parents[1] / "results"
# What changes between the rows of the table.
VARIANTS = {"without the transfer term": {"transfer": False}, "KTDA": {}}
DOMAINS = {"source": SOURCE, **TARGETS}
SIDE = 128


def run(variant: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train once and measure: {domain: mean IoU}."""
    folder = Path(options.runs) / f"{variant.replace(' ', '-')}-{seed}"
    arguments = VARIANTS[variant]
    teacher = {"teacher_weights": options.teacher_weights} if arguments.get("transfer", True) else {}
    train(
        TrainConfig(
            method="ktda",
            model_args=arguments,
            data="synthetic",
            data_args={"domain": str(SOURCE), "size": SIDE},
            image_size=SIDE,
            loader=LoaderConfig(flip=True, photometric=True),
            num_workers=1,
            run_dir=str(folder),
            steps=options.steps,
            batch_size=8,
            optim=OptimConfig(lr=options.lr, weight_decay=0.01),
            seed=seed,
            resume="auto",
            report=False,
            **teacher,
        )
    )
    found = {}
    for name, domain in DOMAINS.items():
        with tempfile.TemporaryDirectory() as report:
            evaluation = evaluate(
                EvaluateConfig(
                    model=str(folder / "best"),
                    data_args={"domain": str(domain), "size": SIDE},
                    report=report,
                )
            )
        found[name] = evaluation.metrics["mean_iou"]
    return found


def table(runs: list[dict]) -> str:
    """Mean and standard deviation over seeds, in per cent, as Markdown."""
    means = [{**row["mean_iou"], "unseen domains": _unseen(row["mean_iou"])} for row in runs]
    columns = [*DOMAINS, "unseen domains"]
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for variant in VARIANTS:
        cells = []
        for column in columns:
            values = [
                100 * mean[column] for row, mean in zip(runs, means, strict=True) if row["variant"] == variant
            ]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _unseen(mean_iou: dict[str, float]) -> float:
    return statistics.mean(mean_iou[name] for name in TARGETS)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher-weights", required=True, help="the file that `rsmodels pretrain` wrote")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of each run")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--runs", default="runs/ktda-transfer", help="folder of the runs")
    parser.add_argument("--output", default=str(RESULTS / "ktda_transfer.json"))
    options = parser.parse_args(argv)

    output = Path(options.output)
    setting = {
        "teacher_sha256": sha256_of(Path(options.teacher_weights)),
        "steps": options.steps,
        "lr": options.lr,
        "image_size": SIDE,
    }
    runs: list[dict] = []
    if output.exists():
        before = read_json(output)
        if before["setting"] == setting:
            runs = before["runs"]
    for seed in options.seeds:
        for variant in VARIANTS:
            if any(row["variant"] == variant and row["seed"] == seed for row in runs):
                continue
            runs.append({"variant": variant, "seed": seed, "mean_iou": run(variant, seed, options)})
            today = datetime.date.today().isoformat()
            write_json(output, {"date": today, "machine": machine(), "setting": setting, "runs": runs})
    print(table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
