"""CrossEarth's run from end to end: frozen weights, a resume to the bit, its report, its schedule."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rsmodels.style import synthetic_field
from rsmodels.training.build import schedule
from rsmodels.training.config import OptimConfig, TrainConfig, resolve
from rsmodels.training.parallel import Ranks
from rsmodels.training.trainer import Trainer, train

ALONE = Ranks(0, 1, torch.device("cpu"))
MakeConfig = Callable[..., TrainConfig]
# Styles in about half of the steps.
CROSSEARTH: dict[str, Any] = {"method": "crossearth", "model_args": {"points": 64, "style_probability": 0.5}}


def losses(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k.startswith("loss")} for line in lines]


def test_a_resumed_run_draws_what_an_unbroken_one_draws(
    make_config: MakeConfig, tmp_path: Path, weights_of: Any, same_weights: Any
) -> None:
    """To the bit, and the file that its styles came from is not looked for again."""
    statistics = tmp_path / "field.json"
    synthetic_field().save(statistics)
    model_args = {**CROSSEARTH["model_args"], "style_statistics": str(statistics)}
    options = {"method": "crossearth", "model_args": model_args, "steps": 6, "checkpoint_every": 3}
    whole = train(make_config(**options, validate_every=6))
    statistics.unlink()
    step_3 = str(whole / "checkpoints" / "step-3")
    resumed = train(make_config(**options, validate_every=6, folder="other", resume=step_3))
    assert losses(resumed) == losses(whole)[3:]
    drawn = [terms["loss_delta"] > 0 for terms in losses(whole)[:6]]
    assert any(drawn[3:]) and not all(drawn)
    assert same_weights(weights_of(resumed), weights_of(whole))


def test_a_run_from_its_encoder_to_its_report(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(**CROSSEARTH, steps=2, report=True), ALONE)
    frozen = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.run()
    trainer.log.close()
    trainer.evaluate()
    assert frozen and all(torch.equal(trainer.model.get_parameter(n), p) for n, p in frozen.items())
    state = trainer.folder / "checkpoints" / "frozen"
    names = torch.distributed.checkpoint.FileSystemReader(state).read_metadata().state_dict_metadata
    assert names.keys() == frozen.keys(), "frozen weights are written once, beside the checkpoints"
    metrics = json.loads((trainer.folder / "report" / "metrics.json").read_text())
    assert 0 <= metrics["mean_iou"] <= 1


def test_the_horizon_of_the_decay_is_its_own() -> None:
    """30,000 steps of a decay to zero at 40,000, as the papers train."""

    def rates(**options: Any) -> Callable[[int], float]:
        config = resolve(TrainConfig(method="crossearth", optim=OptimConfig(warmup=0, **options)))
        return schedule(config, 30_000)

    assert rates(horizon=40_000)(20_000) == pytest.approx(1e-4 * 0.5**0.9)
    assert rates(horizon=40_000)(29_999) == pytest.approx(1e-4 * 0.25**0.9, rel=1e-3)
    assert rates()(15_000) == pytest.approx(1e-4 * 0.5**0.9)
    with pytest.raises(ValueError, match="20000 must not be shorter than the run"):
        rates(horizon=20_000)
