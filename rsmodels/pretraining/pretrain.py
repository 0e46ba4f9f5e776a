"""Pretrain an encoder on unlabelled scenes: the loop, its state on disk, and the probe at the end.

Every step is a function of the seed, the step and the weights before it, so that a run that was stopped and
resumed ends with the same bits as one that was not, on the same number of threads.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from rsmodels.arguments import ImageSizeError
from rsmodels.data.synthetic.gaps import left_out
from rsmodels.evaluation.inference import pick_device, pick_dtype
from rsmodels.files import hold_file
from rsmodels.pretraining.config import PREPROCESSING, PretrainConfig, Purpose, check_unused, resolve
from rsmodels.pretraining.objectives import OBJECTIVES, draw_masks, patch_size
from rsmodels.pretraining.probe import linear_probe
from rsmodels.pretraining.scenes import Crops, Views, places
from rsmodels.registry import ENCODERS, LIBRARY_VERSION
from rsmodels.training.build import make_optimizer, reader_processes
from rsmodels.training.config import OptimConfig
from rsmodels.training.parallel import MOMENTS, Interrupt, clip_gradients, start_moments
from rsmodels.training.sampler import derive_seed, seed_everything
from rsmodels.training.schedule import learning_rate
from rsmodels.weights import read_state, save_state

# DINOv2's layer scale starts at 1e-5, for runs of days: its blocks would learn next to nothing in minutes.
FIRST_LAYER_SCALE = 1.0
# What an encoder writes to its residual stream: the stem; of each branch the scale, or else the last layer.
STEM = ("patch_embed.", "pos_embed", "cls_token", "register_tokens")
LAYER_SCALE = ".gamma"
LAST_LAYERS = ("attn.proj.weight", "attn.proj.bias", "mlp.lin2.weight", "mlp.lin2.bias")
WEIGHT_DECAY, BETAS, CLIP = 0.05, (0.9, 0.95), 1.0
UNTIMED_STEPS = 3  # the first ones allocate, and wait for the first scenes
TIMING_SHARE, TIMING_SECONDS = 0.03, 15.0  # of --minutes, that measuring the length takes


@dataclass
class Pretrained:
    """What a pretraining made.

    probe: mean IoU by domain, "random" for the untrained encoder and "pretrained"; empty without --probe.
    """

    output: Path
    steps: int
    probe: dict[str, dict[str, float]] = field(default_factory=dict)


def pretrain(config: PretrainConfig) -> Pretrained:
    """Pretrain as `config` says and write its output file.

    Bad input, and a loss that is not finite, is a ValueError of one line, and so is an output that another
    process is making; KeyboardInterrupt follows the state of a run that was asked to stop.
    """
    config = resolve(config)
    with hold_file(config.output):
        check_unused(config)
        return _pretrain(config)


def _pretrain(config: PretrainConfig) -> Pretrained:
    output = Path(config.output)
    if config.resume == "auto" and output.exists():
        _check_finished(config)
        _say(f"{output}: is there already, nothing is left to do")
        return Pretrained(output, steps=0)
    resuming = config.resume == "auto" and config.state_path.exists()
    first_step, steps = _read_progress(config) if resuming else (0, config.steps or fitting_steps(config))
    run = Run(config, steps, first_step)
    if resuming:
        run.load_state()
        _say(f"resumed from {config.state_path}, after step {first_step} of {steps}")
    run.train()
    encoder = run.objective.learned().eval()
    to_unit_scale(encoder, run.images)
    record = {**config.identity(), "steps": steps, "library_version": LIBRARY_VERSION}
    save_state(encoder.state_dict(), output, {"pretraining": json.dumps(record)})
    config.state_path.unlink(missing_ok=True)
    probe = {}
    if config.probe:
        untrained = build_encoder(config).to(run.device).eval()
        probe = {"random": linear_probe(untrained), "pretrained": linear_probe(encoder)}
    return Pretrained(output, steps, probe)


def build_encoder(config: PretrainConfig) -> Any:
    """The encoder that a pretraining starts from."""
    size = {} if config.image_size is None else {"image_size": config.image_size}
    seed_everything(derive_seed(config.seed, Purpose.WEIGHTS))
    try:
        encoder: Any = ENCODERS[config.model](**size)
    except ImageSizeError as error:
        raise error.under("--image-size") from None
    encoder.neck = None  # SAM's: it follows the tokens that are learned from
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(".gamma"):
                parameter.fill_(FIRST_LAYER_SCALE)
    return encoder


@torch.no_grad()
def to_unit_scale(encoder: Any, images: Tensor) -> None:
    """Bring the tokens of `images` (B, 3, H, W), normalised, to a root mean square of 1 over all blocks.

    Objectives normalise tokens and leave their scale to chance; who takes them raw, as a student's mean
    squared error, does not. Blocks normalise what they read, so that scaling all that is written to the
    residual stream scales every block's tokens and changes nothing else.
    """
    maps = encoder.forward_intermediates(images, range(len(encoder.blocks)))
    factor = torch.stack([tokens.float().square().mean() for tokens in maps]).mean().rsqrt()
    parameters = dict(encoder.named_parameters())
    last = LAYER_SCALE if any(name.endswith(LAYER_SCALE) for name in parameters) else LAST_LAYERS
    for name, parameter in parameters.items():
        if name.startswith(STEM) or (name.startswith("blocks.") and name.endswith(last)):
            parameter.mul_(factor)


def fitting_steps(config: PretrainConfig) -> int:
    """The steps that fit into `minutes` here, by a first try that is thrown away: the run itself is that of
    --steps N, and repeats as such."""
    assert config.minutes is not None
    budget = config.minutes * 60
    began = time.perf_counter()
    run = Run(config, steps=10**6)
    batches, done, since = iter(run.crops), 0, began
    while done <= UNTIMED_STEPS or time.perf_counter() - since < min(TIMING_SECONDS, TIMING_SHARE * budget):
        if done == UNTIMED_STEPS:
            since = time.perf_counter()
        run.step(done, next(batches))
        done += 1
    seconds = (time.perf_counter() - since) / (done - UNTIMED_STEPS)
    left = budget - (time.perf_counter() - began)
    steps = max(1, int(left / seconds))
    _say(
        f"{seconds:.3f} s a step: {steps} steps fit into {config.minutes:g} minutes; --steps {steps} in "
        "place of --minutes repeats this run"
    )
    return steps


class Run:
    """One pretraining: what it consists of, its loop, its state."""

    def __init__(self, config: PretrainConfig, steps: int, first_step: int = 0) -> None:
        self.config, self.steps, self.first_step = config, steps, first_step
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.dtype, self.device)
        choice = places(left_out(config.leave_out.split()))
        encoder = build_encoder(config)
        self.grid_size = encoder.grid_size
        self.objective = OBJECTIVES[config.objective](encoder).to(self.device).train()
        options = OptimConfig(lr=config.lr, weight_decay=WEIGHT_DECAY, betas=BETAS)
        self.optimizer = make_optimizer(self.objective, options)
        self.images: Tensor  # of the last step, one view
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]
        self.crops = Crops(
            choice,
            encoder.image_size,
            patch_size(encoder),
            batch_size=config.batch_size,
            views=self.objective.views,
            seed=config.seed,
            first_step=first_step,
            steps=steps,
            workers=reader_processes() if config.num_workers is None else config.num_workers,
        )

    def train(self) -> None:
        """All steps that are left."""
        config = self.config
        bar = tqdm(
            total=self.steps,
            initial=self.first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        losses: list[Tensor] = []
        since = time.perf_counter()
        with bar, Interrupt() as interrupt:
            for done, views in enumerate(self.crops, self.first_step + 1):
                losses.append(self.step(done - 1, views))
                bar.update()
                last = done == self.steps
                stop = interrupt.requested and not last
                keep = stop or (done % config.checkpoint_every == 0 and not last)
                if done % config.log_every == 0 or last or keep:
                    seconds = time.perf_counter() - since
                    self._log(done, torch.stack(losses).mean().item(), len(losses) / seconds, bar)
                    losses, since = [], time.perf_counter()
                if keep:
                    self.save_state(done)
                if stop:
                    _say(
                        f"stopped after step {done} of {self.steps}, {config.state_path} is written; "
                        "--resume auto goes on from there"
                    )
                    raise KeyboardInterrupt

    def step(self, step: int, views: Views) -> Tensor:
        """One update from one batch; the loss, on the device."""
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, Purpose.MASKS, step))
        mask = draw_masks(self.config.batch_size, self.grid_size, generator).to(self.device)
        images = [PREPROCESSING.normalize(view.to(self.device, non_blocking=True)) for view in views.images]
        self.images = images[0]
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if enabled else None, enabled=enabled):
            loss = self.objective(Views(images, views.corners), mask)
        loss.backward()
        clip_gradients(self.parameters, CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.after_step(step / self.steps)
        return loss.detach()

    def _learning_rate(self, step: int) -> float:
        warmup = min(250, self.steps // 10)
        return learning_rate(step, base=self.config.lr, steps=self.steps, warmup=warmup, power=0.9)

    def _log(self, done: int, loss: float, rate: float, bar: tqdm) -> None:
        if not math.isfinite(loss):
            state = self.config.state_path
            back = f"the last good state is {state}" if state.exists() else "no state was written yet"
            raise ValueError(f"step {done}: the loss is {loss}; {back}; a lower --lr may help")
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if bar.disable:
            images = rate * self.config.batch_size
            _say(
                f"{done}/{self.steps}: loss {loss:.4f}  lr {self._learning_rate(done - 1):.2e}  "
                f"{images:.0f} images/s"
            )

    # ------------------------------------------------------------------------------------------------- state

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.objective.state_dict().items()}
        for name, parameter in self.objective.named_parameters():
            if parameter.requires_grad:
                for moment in MOMENTS:
                    tensors[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        return tensors

    def save_state(self, done: int) -> None:
        """Write what a later run needs to go on after `done` steps, whole or not at all."""
        progress = {"done": done, "steps": self.steps, "config": self.config.identity()}
        save_state(self._tensors(), self.config.state_path, {"progress": json.dumps(progress)})

    @torch.no_grad()
    def load_state(self) -> None:
        """Take over what save_state wrote."""
        start_moments(self.optimizer, self.first_step)
        own, found = self._tensors(), read_state(self.config.state_path)
        if own.keys() != found.keys() or any(own[key].shape != found[key].shape for key in own):
            raise _foreign(self.config.state_path, "its tensors are not this run's")
        for key, value in own.items():
            value.copy_(found[key])


def _check_finished(config: PretrainConfig) -> None:
    """ValueError where the output is there, and another run made it."""
    output = Path(config.output)
    text = _metadata(output, "pretraining")
    if text is None:
        raise ValueError(
            f"--output {output}: no pretraining wrote this file; give another name, or remove it"
        )
    record = json.loads(text)
    _check_same_run(config, record, record["steps"], output)


def _read_progress(config: PretrainConfig) -> tuple[int, int]:
    """How far the stopped run came, and how far it was to go; ValueError where it was another run."""
    text = _metadata(config.state_path, "progress")
    if text is None:
        raise _foreign(config.state_path, "it is not the state of a pretraining")
    progress = json.loads(text)
    _check_same_run(config, progress["config"], progress["steps"], config.state_path)
    return progress["done"], progress["steps"]


def _metadata(path: Path, key: str) -> str | None:
    read_state(path)  # says what is wrong with a damaged file
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get(key)


def _check_same_run(config: PretrainConfig, before: dict[str, Any], steps: int, path: Path) -> None:
    """ValueError where the run that wrote `path`, over `steps` steps, is not this one."""
    now = json.loads(json.dumps(config.identity()))
    if config.steps is not None:
        before, now = {**before, "steps": steps}, {**now, "steps": config.steps}
    for name in now:
        if before.get(name) != now[name]:
            raise _foreign(path, f"it was written with {name} {before.get(name)}, this run has {now[name]}")


def _foreign(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path}: {reason}; resume with the options the run was started with, or remove the file to start "
        "anew"
    )


def _say(text: str) -> None:
    """One line for the reader, on stderr."""
    tqdm.write(f"pretrain: {text}", file=sys.stderr)
