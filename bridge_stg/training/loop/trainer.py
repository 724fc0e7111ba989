"""The training loop of a stage: steps, learning rate, saved states, validation, and what goes wrong on the way.

Knows neither the model nor its data: a task is a module that returns the loss of a micro-batch, and `batches` returns
the micro-batch of a place. Place s·clips + i is the i-th of step s; the processes share the places of a step.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from bridge_stg.runtime.errors import BridgeError, CheckpointError
from bridge_stg.training.data.micro_batch import MicroBatch, Skipped
from bridge_stg.training.folder import SKIPPED
from bridge_stg.training.loop.distribution import Processes, full_tensor, unsharded
from bridge_stg.training.loop.log import StageLogger, duration, merged_means, summed
from bridge_stg.training.loop.state import StageProgress, load_state, save_state
from bridge_stg.training.parts import parameter_groups, part_of
from bridge_stg.training.recipe import NEW_PARTS, Stage, Validation

LOG_EVERY = 50  # steps
RECENT, ENOUGH = 50, 20
"""Number of good losses whose median is the usual loss, and the least number to judge by."""
PATIENCE, MOST_ROLLBACKS = 5, 3
"""Skipped steps in a row that end in a rollback, and the number of rollbacks that end the training."""
LEAST_CLIPS = 100  # before the share of broken clips can end the training
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class TrainingStopped(Exception):
    """A signal ended the training, whose state was saved. `signal` is its number."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


class _Interrupted(BaseException):
    """Ends the current step at once; nothing in it needs to be kept."""


@dataclass(frozen=True)
class Run:
    """What all stages of a training share.

    Attributes:
        folder: folder of states and logs, see `training.folder`.
        processes: the processes.
        seed: seed of dropout.
        workers: number of processes that make batches; 0: this process.
        resume: whether to continue from saved states.
        save_every_s: seconds between saved states.
        max_broken: largest share of clips that cannot be read.
        log_every: steps between lines of the log.
    """

    folder: Path
    processes: Processes
    seed: int = 0
    workers: int = 1
    resume: bool = True
    save_every_s: float = 300.0
    max_broken: float = 0.05
    log_every: int = LOG_EVERY


def learning_rate(stage: Stage, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to `final_rate`, or constant."""
    rate = stage.learning_rate * min(1.0, (step + 1) / max(1, stage.warmup))
    if stage.schedule == "constant":
        return rate
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / stage.steps, 1.0)))
    return rate * ((1 - stage.final_rate) * cosine + stage.final_rate)


def make_optimizer(groups: Sequence[dict[str, Any]], stage: Stage) -> torch.optim.Optimizer:
    """Return AdamW, fused, or with moments of 8 bits. Raises BridgeError if bitsandbytes is missing."""
    groups = [{name: value for name, value in group.items() if name != "scale"} for group in groups]
    if stage.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=stage.learning_rate, betas=stage.betas, fused=True)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        message = f"stage {stage.name}: optimizer adamw8bit needs bitsandbytes ({error}); install it, or choose adamw"
        raise BridgeError("training.no_bitsandbytes", message) from error
    return AdamW8bit(groups, lr=stage.learning_rate, betas=stage.betas)  # type: ignore[no-any-return]


def clips_per_process(stage: Stage, processes: int) -> int:
    """Return the clips of each process per step. Raises BridgeError if they cannot be shared equally."""
    if stage.clips % processes:
        message = f"stage {stage.name}: 'clips' is {stage.clips}; expected a multiple of the {processes} processes"
        raise BridgeError("training.bad_recipe", message)
    return stage.clips // processes


class StageTrainer:
    """Trains the weights of one stage in place.

    Args:
        stage: the stage.
        task: module whose `forward(batch)` returns the loss and values to log.
        trained: its trained parameters by name.
        batches: returns the `MicroBatch` of a place, or an error to raise; pickled for worker processes.
        run: what all stages share.
        units: modules whose weights are gathered together if weights are sharded, see `Processes.distribute`.
        validation: how often to validate, and by which metric.
        validate: returns metrics of the weights as they are, called by all processes with (step); on sharded weights
            this process has all of them.
    """

    def __init__(
        self, stage: Stage, task: nn.Module, trained: Mapping[str, nn.Parameter], batches: Callable[[int], Any],
        run: Run, *, units: Iterable[nn.Module] = (), validation: Validation | None = None,
        validate: Callable[[int], Mapping[str, float]] | None = None,
    ) -> None:  # fmt: skip
        self.stage, self.run, self.batches = stage, run, batches
        self.validation, self.validate = validation, validate
        self.micro_batches = clips_per_process(stage, run.processes.count)
        self.module = run.processes.distribute(task, units)
        named = {name.removeprefix("module."): value for name, value in self.module.named_parameters()}
        self.trained = {name: named[name] for name in trained}
        groups = parameter_groups(self.trained, stage)
        self.scales = [group["scale"] for group in groups]
        self.optimizer = make_optimizer(groups, stage)
        new = {name: value for name, value in self.trained.items() if part_of(name) in NEW_PARTS}
        self.averages = {name: value.detach().clone() for name, value in new.items()} if stage.ema else {}
        self.log = StageLogger(stage.name, run.folder, run.processes)
        self.progress = StageProgress()
        self.figures: list[dict[str, float]] = []
        self.stopped: int | None = None  # signal that arrived at this process
        self.stopping = False  # whether all processes end after this step
        self.skipped_in_a_row = 0  # steps; the state is not saved among them, since its weights may be the reason
        self.interruptible = False

    @property
    def path(self) -> Path:
        """The file of the state."""
        return self.run.folder / f"{self.stage.name}.safetensors"

    @property
    def best_path(self) -> Path:
        """The file of the state with the best metric."""
        return self.run.folder / f"{self.stage.name}.best.safetensors"

    def train(self) -> StageProgress:
        """Train until the last step, or until validation ends the stage early; return the counts.

        The weights are then those of the best validation, or of the last step without validation; new parts have their
        moving averages.

        Raises:
            TrainingStopped: a signal arrived; the state is saved.
            BridgeError: the loss diverged, too many clips are broken, or a state cannot be loaded or saved.
        """
        begun = all(self.run.processes.gather(self.path.exists()))  # before the first process writes it
        if self.run.resume and begun:
            self.load(self.path)
            self.progress.rollbacks = 0
            if not all(self.run.processes.gather(self.best_path.exists())):
                self.progress.best = None
        else:
            self.save()
        started = self.saved = time.monotonic()
        self.before = self.progress.seconds
        with self.signals():
            try:
                if self.progress.step:
                    self.progress.finished = self.progress.finished or self.end_step()
                    self.check_stopped()
                for step, made in self.steps():
                    self.interruptible = self.run.processes.count == 1
                    self.update(step, made)
                    self.interruptible = False
                    self.progress.step = step + 1
                    self.progress.seconds = self.before + time.monotonic() - started
                    self.log_figures()
                    ended = self.end_step()
                    self.check_stopped()
                    if ended:
                        break
            except _Interrupted:
                self.optimizer.zero_grad(set_to_none=True)
                self.check_stopped()
        if self.best_path.exists() and self.progress.best is not None:
            best, counts = self.best_path, self.progress
            self.load(best)
            self.progress = counts
        with torch.no_grad():
            for name, average in self.averages.items():
                self.trained[name].copy_(average)
        return self.progress

    def end_step(self) -> bool:
        """Validate and save after a step, if it is time, and return whether the stage ends here.

        A resumed run calls this first, since the validation of its last step may have been interrupted.
        """
        ended = self.progress.step == self.stage.steps
        ended = self.validate_if_due(self.progress.step, last=ended) or ended
        due = time.monotonic() - self.saved > self.run.save_every_s and not self.skipped_in_a_row
        if ended or due:
            self.progress.finished = ended
            self.save()
            self.saved = time.monotonic()
        return ended

    def steps(self) -> Iterator[tuple[int, list[MicroBatch]]]:
        """Yield the steps that are left, each with this process's micro-batches."""
        processes, stage, run = self.run.processes, self.stage, self.run
        first = self.progress.step
        if self.progress.finished:
            return
        places = range(first * stage.clips + processes.rank, stage.steps * stage.clips, processes.count)
        options: dict[str, Any] = {"prefetch_factor": 2, "worker_init_fn": _quiet} if run.workers else {}
        options |= {"batch_size": None, "collate_fn": self.batches, "num_workers": run.workers}
        loader: Iterable[Any] = DataLoader(cast(Any, places), **options)
        bar = tqdm(
            range(first, stage.steps), stage.name, total=stage.steps, initial=first, unit="step", mininterval=2,
            disable=not (processes.is_main and sys.stderr.isatty()),
        )  # fmt: skip
        self.bar, batches = bar, iter(loader)
        for step in bar:
            self.interruptible = processes.count == 1
            made = []
            for _ in range(self.micro_batches):
                one = next(batches)
                if isinstance(one, Exception):
                    raise one
                made.append(one)
            self.interruptible = False
            yield step, made

    def update(self, step: int, made: Sequence[MicroBatch]) -> None:
        """Run one step: gradients of all micro-batches, then an update, unless the loss is not as usual."""
        processes, stage, progress = self.run.processes, self.stage, self.progress
        torch.manual_seed(hash((self.run.seed, step, processes.rank)) % 2**63)  # of dropout
        for group, scale in zip(self.optimizer.param_groups, self.scales):
            group["lr"] = scale * learning_rate(stage, step)
        total = torch.zeros((), device=processes.device)
        for index, one in enumerate(made, 1):
            with processes.accumulate(self.module, last=index == len(made)):
                loss, figures = self.module(one.batch)
                (loss / len(made)).backward()
            total += loss.detach().float() / len(made)
            self.figures.append(figures)
        norm = nn.utils.clip_grad_norm_(list(self.trained.values()), stage.max_gradient_norm)
        norm = full_tensor(norm).to(processes.device)
        skipped = [item for one in made for item in one.skipped]
        self.list_skipped(skipped)
        counts = torch.tensor([float(bool(self.stopped)), float(len(skipped))], device=processes.device)
        loss_value, norm_value, stopped, found = processes.mean(torch.cat([total[None], norm[None], counts])).tolist()
        progress.broken_clips += round(found * processes.count)
        if stopped:  # the same in all processes, unlike a signal
            self.stopped, self.stopping = self.stopped or signal.SIGTERM, True
        self.interruptible = False
        usual = statistics.median(progress.losses) if len(progress.losses) >= ENOUGH else math.inf
        if math.isfinite(loss_value) and math.isfinite(norm_value) and loss_value <= stage.spike * usual:
            self.optimizer.step()
            self.update_averages()
            progress.losses = (*progress.losses, loss_value)[-RECENT:]
            self.skipped_in_a_row = 0
            self.figures[-1] = self.figures[-1] | {"loss": loss_value, "gradient_norm": norm_value}
        else:
            self.figures = [] if not math.isfinite(loss_value) else self.figures
            self.skip_step(step, loss_value, norm_value)
        self.optimizer.zero_grad(set_to_none=True)
        self.check_broken(step + 1)

    def skip_step(self, step: int, loss: float, norm: float) -> None:
        """Count a step without an update; after several in a row, return to the saved weights."""
        progress = self.progress
        progress.skipped_steps += 1
        self.skipped_in_a_row += 1
        self.log.write(step=step, event="step skipped", loss=loss, gradient_norm=norm)
        self.log.print(f"step {step}: skipped, the loss is {loss:.4g} and the norm of the gradient {norm:.4g}")
        if self.skipped_in_a_row < PATIENCE:
            return
        if progress.rollbacks >= MOST_ROLLBACKS:
            message = f"stage {self.stage.name}: at step {step} the loss is {loss:.4g} after {MOST_ROLLBACKS} rollbacks"
            hint = f"{self.path} is the last good state; try a lower learning_rate, or remove the clips near this step"
            raise CheckpointError("training.diverged", f"{message}; {hint}")
        counts = progress
        self.load(self.path)
        self.log.write(step=step, event="rolled back", to_step=self.progress.step)
        self.log.print(f"step {step}: back to the weights of step {self.progress.step}, continuing with the next clips")
        self.progress = counts
        progress.rollbacks += 1
        self.skipped_in_a_row = 0

    def update_averages(self) -> None:
        """Move the averages of the new parts towards their weights."""
        if self.averages:
            decay = min(self.stage.ema, (self.progress.step + 1) / (self.progress.step + 10))
            with torch.no_grad():
                for name, average in self.averages.items():
                    average.lerp_(self.trained[name].detach(), 1 - decay)

    def list_skipped(self, skipped: Sequence[Skipped]) -> None:
        """Append the clips that this process could not read to the list of skipped media."""
        if skipped:
            with open(self.run.folder / SKIPPED, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(dataclasses.asdict(one)) + "\n" for one in skipped)

    def check_broken(self, steps: int) -> None:
        """Raise BridgeError if too many clips could not be read."""
        clips = max(LEAST_CLIPS, steps * self.stage.clips)
        if self.progress.broken_clips > self.run.max_broken * clips:
            self.save()
            found = f"{self.progress.broken_clips} of {steps * self.stage.clips} clips could not be read"
            where = f"{self.run.folder / SKIPPED} lists them"
            message = f"{found}, more than data.max_broken ({self.run.max_broken:g}); {where}"
            raise BridgeError("training.too_many_broken", message)

    def validate_if_due(self, step: int, *, last: bool) -> bool:
        """Validate if it is time, keep the best state, and return whether the stage ends here."""
        chosen, progress = self.validation, self.progress
        due = last or (chosen is not None and step % chosen.every == 0)
        if self.validate is None or not due or progress.validated_step == step:
            return False
        weights = {name: self.trained[name].detach().clone() for name in self.averages}
        with torch.no_grad():
            for name, average in self.averages.items():
                self.trained[name].copy_(average)
        self.interruptible = self.run.processes.count == 1
        try:
            with unsharded(self.module):
                metrics = dict(self.validate(step))
        finally:
            self.interruptible = False
            with torch.no_grad():
                for name, weight in weights.items():
                    self.trained[name].copy_(weight)
            self.module.train()
        self.log.write(step=step, validation=metrics)
        progress.validated_step = step
        self.log.print(f"validation at step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        if chosen is None:
            return False
        if chosen.metric not in metrics:
            known = ", ".join(metrics) or "none"
            message = f"validation.metric is {chosen.metric!r}, but the samples have: {known}"
            raise BridgeError("training.bad_recipe", message)
        value = metrics[chosen.metric]
        if progress.best is None or value > progress.best:
            progress.best, progress.best_step, progress.validations_since_best = value, step, 0
            self.save(self.best_path)
        else:
            progress.validations_since_best += 1
        return chosen.patience is not None and progress.validations_since_best >= chosen.patience

    def log_figures(self) -> None:
        """Show the loss, and log the means of all figures every `log_every` steps."""
        progress, stage = self.progress, self.stage
        if progress.losses:
            self.bar.set_postfix(loss=f"{progress.losses[-1]:.3f}", refresh=False)
        if progress.step % self.run.log_every and progress.step < stage.steps:
            return
        means = merged_means(self.run.processes.gather(summed(self.figures)))
        self.figures = []
        values: dict[str, Any] = {"step": progress.step, "seconds": round(progress.seconds, 1)}
        values |= means | {"learning_rate": learning_rate(stage, progress.step - 1)}
        for name in ("skipped_steps", "rollbacks", "broken_clips"):
            values |= {name: count} if (count := getattr(progress, name)) else {}
        self.log.write(**values)
        left = (stage.steps - progress.step) * progress.seconds / max(1, progress.step)
        loss = f"loss {means['loss']:.4f}, " if "loss" in means else ""
        pace = f"{progress.seconds / max(1, progress.step):.2f} s per step"
        self.log.print(f"step {progress.step} of {stage.steps}: {loss}{pace}, {duration(left)} left", in_bar=True)

    def save(self, path: Path | None = None) -> None:
        """Write the state. All processes must call this."""
        save_state(path or self.path, self.trained, self.optimizer, self.averages, self.progress, self.run.processes)
        self.run.processes.wait()

    def load(self, path: Path) -> None:
        """Read a state, with its counts."""
        self.progress = load_state(path, self.trained, self.optimizer, self.averages)

    def check_stopped(self) -> None:
        """Save and raise TrainingStopped if a signal arrived; several processes end after the same step."""
        if not self.stopped or not (self.stopping or self.run.processes.count == 1):
            return
        self.save()
        at = f"stage {self.stage.name}, step {self.progress.step} of {self.stage.steps}"
        raise TrainingStopped(self.stopped, f"Stopped at {at}; the state is saved. The same command continues.")

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Note signals that ask to stop, and end what can be repeated at once."""

        def note(number: int, _: FrameType | None) -> None:
            self.stopped = number
            if self.interruptible:
                self.interruptible = False
                raise _Interrupted

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, note) for number in heeded()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def heeded() -> list[signal.Signals]:
    """Return the signals of `STOPPING` that this process does not ignore: `nohup` ignores SIGHUP."""
    return [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]


def _quiet(_: int) -> None:
    """Leave Ctrl-C to the main process, and end without a failure at other signals, which it may have received too."""
    with suppress(ValueError):
        for number in heeded():
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else lambda *_: os._exit(0))
