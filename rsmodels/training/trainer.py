"""The trainer: from a configuration to a run folder, on one process or under torchrun. Reads top to bottom.

Every step is a function of (seed, step, rank, number of ranks) and the weights before it: the samples come
from `sampler`, and the random numbers are seeded anew in every step. So a run that was killed and resumed
ends with the same bits as one that was not, on the same number of processes and threads.

What is averaged. A batch of `batch_size` tiles is split evenly over ranks and `accumulate` passes. The
model's losses look at the labelled pixels of one pass; the gradient, and the logged loss, is the plain mean
over passes and ranks. Batches are always full: the stream of tiles runs on over the end of an epoch. The
validation loss is the mean over batches of consecutive tiles, weighted by their labelled pixels.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from rskernels import tuning
from rsmodels.data import IGNORE
from rsmodels.data.transforms import Batch
from rsmodels.evaluation.evaluate import EvaluateConfig, evaluate
from rsmodels.evaluation.inference import pick_dtype
from rsmodels.evaluation.metrics import ConfusionMatrix, logits_to_ids
from rsmodels.files import hold_folder
from rsmodels.registry import Preprocessing, save_model
from rsmodels.training import build
from rsmodels.training.checkpoint import Checkpoints, DamagedCheckpointError, candidates
from rsmodels.training.config import (
    TrainConfig,
    changed_options,
    resolve,
    to_dict,
    unused_length,
    write_config,
)
from rsmodels.training.loader import Tiles, batches, make_loader
from rsmodels.training.log import RunLog, peak_memory_gib
from rsmodels.training.parallel import (
    Interrupt,
    Ranks,
    check_mode,
    clip_gradients,
    full_state_dict,
    gradient_sync,
    parallelize,
    processes,
    running_statistics,
)
from rsmodels.training.sampler import Purpose, ShardSampler, StepSampler, derive_seed, seed_everything
from rsmodels.training.teacher import build_teacher, describe_teacher


class NonFiniteLossError(FloatingPointError, ValueError):
    """A loss or gradient became NaN or infinite; the message names the step, the tiles and the way back."""


def train(config: TrainConfig) -> Path:
    """Train as `config` says; returns the run folder.

    Started by torchrun, every process calls it alike. Bad input is a ValueError or FileNotFoundError of one
    line; NonFiniteLossError ends a run that diverged; KeyboardInterrupt follows the checkpoint of a run that
    was asked to stop.
    """
    with processes(config.device) as ranks:
        trainer = Trainer(config, ranks)
        try:
            trainer.run()
        finally:
            trainer.log.close()
        if trainer.config.report:
            trainer.evaluate()
        return trainer.folder


class Trainer:
    """One run: what it consists of (`__init__`), its loop (`run`), and the parts of the loop below it."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.ranks = ranks
        with ranks.together():
            notes = unused_length(config)
            self.config = config = resolve(config)
            mode = config.parallel or ("fsdp" if ranks.world > 1 else "none")
            check_mode(mode, ranks.world, config.shard_size)
            self.dtype = pick_dtype(config.dtype, ranks.device)
            self.folder = build.run_folder(config)
        resume_from = ranks.from_main(lambda: candidates(config.resume, self.folder) if config.resume else [])
        # Every rank has read the table of its own node: use one.
        tuning.restore(ranks.from_main(tuning.record))
        with ranks.together():
            self.train_set = build.open_split(config, "train")
            self.val_set = build.open_split(config, "val")
            self.report_split, no_test = build.report_split(config) if config.report else ("test", "")
            self.share = build.share_of_batch(config, ranks.world)
            self.steps = build.number_of_steps(config, len(self.train_set))
            self.learning_rate = build.schedule(config, self.steps)
            self.validate_every = config.validate_every or max(1, len(self.train_set) // config.batch_size)
            self.model = build.build_model(config, self.train_set, resuming=bool(resume_from))
            build.check_share(self.model, config, self.share)
            build.check_labelled(self.val_set, self.model.image_size)
            self.teacher = build_teacher(config, self.model, self.train_set, ranks.device, self.dtype)
            notes += describe_teacher(config, self.teacher)
            self.identity = build.identity(self.model, self.train_set, self.teacher)
        if config.loader.normalize == "dataset" and not resume_from:
            mean, std = build.measure_statistics(self.train_set, ranks)
            self.model.preprocessing = Preprocessing(mean, std, self.train_set.bands)
        if config.deterministic and ranks.device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)

        self.net = parallelize(self.model, ranks, mode=mode, shard_size=config.shard_size)
        self.optimizer = build.make_optimizer(self.model, config.optim)
        self.statistics = running_statistics(self.model)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.checkpoints = Checkpoints(self.folder, ranks, keep=config.keep_checkpoints)
        self.first_step = 0
        self.best = build.NO_BEST
        notes += self._resume(resume_from) if resume_from else []
        notes += build.describe_frozen(self.model)
        if no_test:
            notes.append(f"the report will look at the validation images: {no_test}")

        with ranks.together():
            if ranks.main:  # ranks that outlived a killed torchrun still hold theirs
                self.lock = hold_folder(self.folder)
                write_config(config, self.folder / "config.yaml")
            self.log = RunLog(self.folder, first_step=self.first_step, steps=self.steps, main=ranks.main)
            for note in notes:
                self.log.say(note)
            self._start_loading()
        # What the steps since the last look computed (see _look): loss and gradient norm, tiles, loss terms.
        self.unseen: list[tuple[int, list[str], Tensor]] = []
        self.terms: dict[str, Tensor] = {}
        self.since = 0.0

    def _start_loading(self) -> None:
        config, ranks = self.config, self.ranks
        workers = build.reader_processes() if config.num_workers is None else config.num_workers
        train_tiles = Tiles(self.train_set, self.model.image_size, config.loader, seed=config.seed)
        train_sampler = StepSampler(
            len(self.train_set),
            seed=config.seed,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            rank=ranks.rank,
            world=ranks.world,
            first_step=self.first_step,
            steps=self.steps,
        )
        self.batches = batches(make_loader(train_tiles, train_sampler, workers=workers, device=ranks.device))
        val_tiles = Tiles(self.val_set, self.model.image_size, config.loader)
        val_sampler = ShardSampler(
            len(self.val_set), batch_size=self.share, rank=ranks.rank, world=ranks.world
        )
        self.val_loader = make_loader(val_tiles, val_sampler, workers=workers, device=ranks.device)

    def _resume(self, paths: list[Path]) -> list[str]:
        """Go on from the first readable checkpoint of `paths`; returns what the reader should know."""
        notes: list[str] = []
        for path in paths:
            try:
                state = self.checkpoints.read_state(path)
                with self.ranks.together():
                    build.check_same_model(path, state, self.identity, self.config)
                self.checkpoints.load(path, self.model, self.optimizer, state["step"])
            except DamagedCheckpointError as error:
                notes.append(f"{error}; taking the checkpoint before it")
                continue
            self.first_step = state["step"]
            best_so_far = partial(build.best_so_far, path, state, self.folder, self.steps)
            self.best = self.ranks.from_main(best_so_far)
            self.model.base_weights = state["base_weights"]
            changes = build.changed_kernels(state["kernels"], build.kernel_record(self.ranks.world))
            tuning.restore(state["kernels"]["tuning"])
            self.model.preprocessing = Preprocessing(**state["preprocessing"])
            notes.append(f"resumed from {path}, after step {self.first_step}")
            for name, (old, new) in changed_options(state["config"], to_dict(self.config)).items():
                notes.append(f"changed since: --{name} {old} -> {new}")
            return notes + changes
        with self.ranks.together():
            raise ValueError(f"--resume {self.config.resume}: no readable checkpoint ({notes[-1]})")

    def _state(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors."""
        return {
            "identity": self.identity,
            "best": self.best,
            "base_weights": self.model.base_weights,
            "preprocessing": vars(self.model.preprocessing),
            "config": to_dict(self.config),
            "kernels": build.kernel_record(self.ranks.world),
        }

    # ------------------------------------------------------------------------------------------- the loop

    def run(self) -> None:
        """All steps that are left, with validation, checkpoints and logging in between."""
        config = self.config
        self.log.say(self._summary())
        with Interrupt() as interrupt:
            for step in range(self.first_step, self.steps):
                self._train_step(step)
                done = step + 1
                last = done == self.steps
                stop = self.ranks.any(interrupt.requested)
                if done % config.log_every == 0 or last or stop:
                    self._look(done)
                if done % self.validate_every == 0 or last:
                    self._look(done)
                    self._validate(done)
                if done % config.checkpoint_every == 0 or last or stop:
                    self._look(done)
                    path = self.checkpoints.save(done, self.model, self.optimizer, self._state())
                self.log.advance()
                if stop and not last:
                    self.log.say(
                        f"stopped after step {done}, {path} is written; --resume auto goes on from there"
                    )
                    raise KeyboardInterrupt

    def _train_step(self, step: int) -> None:
        """Forward, backward and one update; nothing in it waits for a GPU."""
        config = self.config
        if not self.unseen:
            # From here on images_per_second counts: validation and checkpoints come after a look.
            self.since = time.perf_counter()
        seed_everything(derive_seed(config.seed, Purpose.STEP, step, self.ranks.rank))
        losses: list[Tensor] = []
        names: list[str] = []
        for part in range(config.accumulate):
            batch = self._next(self.batches)
            names += batch["name"]
            with gradient_sync(self.net, part == config.accumulate - 1):
                with self._autocast():
                    terms = self.net(batch)
                loss = torch.stack(list(terms.values())).sum() / config.accumulate
                loss.backward()
            losses.append(loss.detach())
            for name, value in terms.items():
                self.terms[name] = self.terms.get(name, 0) + value.detach() / config.accumulate
        norm = clip_gradients(self.parameters, config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        # In every step, so that they do not depend on when a checkpoint or a validation comes.
        self.ranks.average(self.statistics)
        self.unseen.append((step, names, torch.stack([torch.stack(losses).sum(), norm])))

    def _look(self, done: int) -> None:
        """Read back what the steps since the last look computed: stop where it is not finite, log it."""
        if not self.unseen:
            return
        values = torch.stack([value for _, _, value in self.unseen]).float().cpu()
        # Summed over ranks: all of them stop at the same step.
        finite = self.ranks.sum(values.clone()).isfinite().all(dim=1)
        if not finite.all():
            self._stop_at(int(finite.int().argmin()), values)
        count = len(self.unseen)
        means = self.ranks.sum(torch.stack(list(self.terms.values())) / (count * self.ranks.world)).tolist()
        seconds = time.perf_counter() - self.since
        self.log.write(
            "train",
            done,
            {
                "loss": sum(means),
                **dict(zip((f"loss_{name}" for name in self.terms), means, strict=True)),
                "lr": self.learning_rate(done - 1),
                "grad_norm": values[-1, 1].item(),
                "images_per_second": count * self.config.batch_size / seconds,
                "memory_gib": peak_memory_gib(self.ranks.device),
            },
        )
        self.unseen, self.terms = [], {}

    def _stop_at(self, index: int, values: Tensor) -> NoReturn:
        """Say which tiles made the loss of the `index`-th unseen step not finite."""
        step, names, _ = self.unseen[index]
        loss, norm = values[index].tolist()
        everybodys = self.ranks.gather((loss, names))
        blamed = [entry for entry in everybodys if not math.isfinite(entry[0])] or everybodys
        tiles = ", ".join(name for _, names in blamed for name in names)
        with self.ranks.together():
            raise NonFiniteLossError(
                f"step {step + 1}: the loss is {blamed[0][0]}, the gradient norm {norm}; its tiles: {tiles}; "
                f"{self._way_back()}"
            )

    @torch.no_grad()
    def _validate(self, done: int) -> None:
        """Loss and metrics on the validation split; the lowest loss so far becomes best/."""
        seed_everything(derive_seed(self.config.seed, Purpose.VALIDATION))
        self.net.eval()
        schema = self.val_set.schema
        confusion = ConfusionMatrix(schema.classes, binary=schema.binary, device=self.ranks.device)
        sums = torch.zeros(2, dtype=torch.float64, device=self.ranks.device)
        stream = batches(self.val_loader)
        for _ in range(len(self.val_loader)):
            batch = self._next(stream)
            with self._autocast():
                terms, logits = self.net(batch, with_logits=True)
            labelled = (batch["mask"] != IGNORE).sum()
            sums += torch.stack([torch.stack(list(terms.values())).sum() * labelled, labelled])
            confusion.update(logits_to_ids(self.model.probabilities(logits.float())), batch["mask"])
        self.net.train()
        self.ranks.sum(sums)
        confusion.all_reduce()
        metrics = confusion.compute()
        loss = (sums[0] / sums[1]).item()
        self.log.write(
            "validation",
            done,
            {"loss": loss, "mean_iou": metrics["mean_iou"], "overall_accuracy": metrics["overall_accuracy"]},
        )
        if not math.isfinite(loss):
            with self.ranks.together():
                raise NonFiniteLossError(f"validation loss is {loss} after step {done}; {self._way_back()}")
        if loss < self.best["loss"]:
            self.best = {"loss": loss, "step": done}
            self._save_best(metrics["mean_iou"])

    def _save_best(self, mean_iou: float) -> None:
        weights = full_state_dict(self.model, keep=self.ranks.main)
        schema = self.train_set.schema.to_dict()
        info = {
            "classes": schema["classes"],
            "palette": schema["palette"],
            "binary": schema["binary"],
            "ignore_index": IGNORE,
            "training": {
                "data": self.config.data,
                "method": self.config.method,
                "step": self.best["step"],
                "validation_loss": self.best["loss"],
                "validation_mean_iou": None if math.isnan(mean_iou) else mean_iou,
                "seed": self.config.seed,
                "teacher": self.teacher and self.teacher.record,
                "kernels": build.kernel_record(self.ranks.world),
            },
        }
        with self.ranks.together():
            if self.ranks.main:
                save_model(self.model, self.folder / "best", info, state_dict=weights)

    def evaluate(self) -> None:
        """Evaluate best/ on the test split (the validation split where there is none) and write report/."""
        config = self.config
        evaluate(
            EvaluateConfig(
                model=str(self.folder / "best"),
                data=config.data,
                root=config.root,
                data_args=config.data_args,
                split=self.report_split,
                bands=config.bands,
                batch_size=self.share,
                device=config.device,
                dtype=config.dtype,
            )
        )

    # -------------------------------------------------------------------------------------- small helpers

    def _next(self, stream: Iterator[Batch]) -> Batch:
        """The next batch on this rank's device: images normalised for the model, and their teacher's maps."""
        device, preprocessing = self.ranks.device, self.model.preprocessing
        with self.ranks.together():
            batch = next(stream)
            images = preprocessing.normalize(batch["image"].to(device, non_blocking=True))
            ready = {**batch, "image": images, "mask": batch["mask"].to(device, non_blocking=True)}
            if self.teacher is not None:
                ready["teacher"] = self.teacher(images, batch["image"], preprocessing)
            return ready

    def _autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.ranks.device.type, self.dtype if enabled else None, enabled=enabled)

    def _way_back(self) -> str:
        last = next(iter(candidates("auto", self.folder)), None)
        good = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet"
        return f"{good}; a lower --optim.lr, a longer --optim.warmup or --dtype fp32 may help"

    def _summary(self) -> str:
        config = self.config
        trained = sum(p.numel() for p in self.parameters)
        total = sum(p.numel() for p in self.model.parameters())
        return (
            f"{config.model} on {config.data}: {len(self.train_set)} tiles for training, {len(self.val_set)} "
            f"for validation, {self.steps} steps of {config.batch_size} tiles on {self.ranks.world} rank(s); "
            f"{trained / 1e6:.2f} M of {total / 1e6:.2f} M parameters are trained; run folder {self.folder}"
        )
