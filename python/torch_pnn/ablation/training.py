"""Trains one arm with one seed, and measures it on the whole test set.

Everything random hangs on the study's streams for that seed: initial weights and masks, the order of the data and its
augmentation, which every arm draws alike. So two arms with the same seed see the same batches, and the same run done
twice, or interrupted and continued from its checkpoint, gives the same weights to the last bit on the processor.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import distributed
from .arms import build
from .checkpoint import Checkpoint
from .data import Dataset
from .errors import UsageError, describe_os_error
from .memory import Peak
from .study import Schedule, Study
from .tasks import Score, find_task

Row = dict[str, Any]

#: Images per batch of an evaluation; scores do not depend on it.
EVALUATION_BATCH = 256

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}

#: On a graphics card the loss is looked at after so many steps: each look waits for the card.
LOOK_EVERY = 50


@contextlib.contextmanager
def _isolated(threads: int, device: torch.device) -> Iterator[None]:
    """Keeps a run's generator states, threads and switches from the caller's."""
    before = torch.get_num_threads()
    deterministic = torch.backends.cudnn.deterministic
    cards = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.set_num_threads(threads)
        torch.backends.cudnn.deterministic = True
        try:
            yield
        finally:
            torch.set_num_threads(before)
            torch.backends.cudnn.deterministic = deterministic


def state_sha256(model: nn.Module) -> str:
    """A digest of every parameter and buffer: equal digests mean equal bits.

    Example:
        >>> state_sha256(nn.ReLU())[:8]
        'e3b0c442'
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def make_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """The schedule's optimizer over a model's learnable parameters.

    Those of one dimension are not decayed, nor are trained masks: decay would turn their noise down.

    Raises:
        UsageError: the schedule names another optimizer than "sgd", "adam" or "adamw".
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            of_weights = parameter.ndim > 1 and name.split(".")[-1] != "mask"
            (decayed if of_weights else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if schedule.optimizer == "sgd":
        momentum = schedule.momentum
        return torch.optim.SGD(groups, lr=schedule.learning_rate, momentum=momentum, nesterov=momentum > 0)
    if schedule.optimizer == "adam":
        return torch.optim.Adam(groups, lr=schedule.learning_rate)
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.learning_rate)
    raise UsageError(f"unknown optimizer {schedule.optimizer!r}; there is: sgd, adam, adamw")


def learning_rate(schedule: Schedule, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step: a linear rise, then what ``schedule.decay`` says.

    "cosine" is half a cosine down to zero (Loshchilov, Hutter, ICLR 2017).

    Raises:
        UsageError: the decay is another than "cosine", "steps" or "constant".

    Example:
        >>> schedule = Schedule(epochs=12, warmup_epochs=2.0)
        >>> learning_rate(schedule, 0, 10) < learning_rate(schedule, 19, 10) == schedule.learning_rate
        True
        >>> schedule = Schedule(decay="steps", milestones=(1, 3), factor=0.5, warmup_epochs=0.0, learning_rate=1.0)
        >>> [learning_rate(schedule, 10 * epoch, 10) for epoch in range(5)]
        [1.0, 0.5, 0.5, 0.25, 0.25]
    """
    warmup = max(1, round(schedule.warmup_epochs * steps_per_epoch))
    total = schedule.epochs * steps_per_epoch
    if step < warmup:
        return schedule.learning_rate * (step + 1) / warmup
    if schedule.decay == "cosine":
        progress = (step + 1 - warmup) / max(1, total - warmup)
        return schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule.decay == "steps":
        passed = sum(step >= milestone * steps_per_epoch for milestone in schedule.milestones)
        return schedule.learning_rate * schedule.factor**passed
    if schedule.decay == "constant":
        return schedule.learning_rate
    raise UsageError(f"unknown decay {schedule.decay!r}; there is: cosine, steps, constant")


@dataclass
class _Progress:
    """What of a run is kept in its checkpoint beside the weights and the optimizer's state."""

    epoch: int = 0
    seconds: list[float] = field(default_factory=list)
    passed: float = 0.0
    peak: int = 0
    rows: list[Row] = field(default_factory=list)
    continued: list[int] = field(default_factory=list)

    @property
    def best(self) -> Row | None:
        """The first epoch with the highest score on the validation images; None where there are none."""
        judged = [row for row in self.rows if row["validation_score"] is not None]
        return max(judged, key=lambda row: row["validation_score"], default=None)


class Trainer:
    """One run's model, optimizer and precision."""

    def __init__(self, study: Study, arm: str, seed: int, data: Dataset) -> None:
        if study.precision not in PRECISIONS:
            raise UsageError(f"unknown precision {study.precision!r}; there is: {', '.join(PRECISIONS)}")
        self.study, self.arm, self.seed, self.data = study, arm, seed, data
        self.device = distributed.device(study.device)
        self.streams = study.streams(seed)
        self.task = find_task(data)
        self.built = build(study, arm, self.streams, data)
        self.initial = state_sha256(self.built.model)
        self.model: nn.Module = self.built.model.to(self.device)
        self.trained = self.model
        if distributed.is_active():
            self.model = distributed.synchronised(self.model)
            self.trained = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.optimizer = make_optimizer(self.model, study.schedule)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=study.precision == "float16")
        self.steps_per_epoch = -(-self.data.train_count // study.schedule.batch_size)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The study's precision, while a network computes."""
        dtype = PRECISIONS[self.study.precision]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def train_epoch(self, epoch: int, on_step: Callable[[float], None] | None) -> tuple[float, float | None]:
        """One pass over the training images.

        Args:
            epoch: from 1.
            on_step: is told the share of the epoch that has passed.

        Returns:
            The mean loss, NaN or infinite where a step's loss was, and the share of right answers (None where the task
            knows none), both counted while the weights were changing.
        """
        schedule = self.study.schedule
        self.trained.train()
        step = (epoch - 1) * self.steps_per_epoch
        total, count = torch.zeros(2, dtype=torch.float64, device=self.device), 0  # loss, right answers
        counted = True
        world = distributed.world()
        look = 1 if self.device.type == "cpu" else LOOK_EVERY
        batches = self.data.train_batches(
            schedule.batch_size,
            epoch=epoch,
            order=self.streams["order"],
            augmentation=self.streams["augmentation"],
            device=str(self.device),
            share=(distributed.rank(), world),
        )
        for number, (inputs, targets) in enumerate(batches, start=1):
            rate = learning_rate(schedule, step, self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.built.before_step(step)
            images, weight, copies = len(inputs), 1.0, 1
            if world > 1:
                images = min(schedule.batch_size, self.data.train_count - (number - 1) * schedule.batch_size)
                copies = world if images < world else 1  # a batch too small to be shared is everybody's
                # DistributedDataParallel divides the gradients by the number of processes: this makes of the mean
                # over this process's images the mean over all of them.
                weight = len(inputs) * world / (images * copies)
            with self.autocast():
                loss, right = self.task.training_step(self.trained, inputs, targets)
            self.optimizer.zero_grad(set_to_none=True)
            self.scaler.scale(loss if weight == 1.0 else loss * weight).backward()
            total[0] += loss.detach() * (weight * images / world)
            counted = counted and right is not None
            if right is not None:
                total[1] += right / copies
            count += images
            if number % look == 0 and world == 1 and not math.isfinite(total[0]):
                return float(total[0]), None
            self.scaler.step(self.optimizer)
            self.scaler.update()
            step += 1
            if on_step is not None:
                on_step(min(1.0, number / self.steps_per_epoch))
        loss_sum, right_sum = distributed.sum_over_processes(total).tolist()
        return loss_sum / max(1, count), right_sum / max(1, count) if counted else None

    def evaluate(self, which: str) -> Score:
        """The score on one of the data's test sets."""
        return self.score(self.data.test_batches(which, EVALUATION_BATCH, device=str(self.device)))

    def score(self, batches: Iterable[tuple[Any, Any]]) -> Score:
        """The score on batches of images, in evaluation mode."""
        with self.autocast(), self.built.for_test():
            return self.task.evaluate(self.model, batches)

    def synchronise(self) -> None:
        """Waits for what a graphics card has been given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "initial": self.initial,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generator": torch.get_rng_state(),
            "card generator": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what ``state`` gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["generator"])
        if state["card generator"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["card generator"], self.device)


@contextlib.contextmanager
def measuring(study: Study, arm: str, seed: int, data: Dataset) -> Iterator[tuple[Trainer, Peak]]:
    """A run to be tried and thrown away, and the memory that it has needed so far."""
    device = distributed.device(study.device)
    with _isolated(study.threads, device):
        peak = Peak(device)
        yield Trainer(study, arm, seed, data), peak


def train(
    study: Study,
    arm: str,
    seed: int,
    data: Dataset,
    on_epoch: Callable[[Row], None],
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[float], None] | None = None,
    on_trouble: Callable[[str], None] | None = None,
) -> Row:
    """Trains one arm with one seed.

    Args:
        study: the settings.
        arm: one of the study's.
        seed: fixes everything random, through ``study.streams``.
        data: the data set.
        on_epoch: receives a row for epochs.jsonl after every epoch; where the run is continued, first those of the
            epochs that had passed before.
        checkpoint: a file in which the run's state is kept after every epoch, and from which it goes on if it was
            interrupted. Whoever calls removes it.
        on_step: receives the number of epochs that have passed, with a fraction, after every step.
        on_trouble: is told in a sentence that the checkpoint could not be written; the run goes on without.

    Returns:
        The row for results.jsonl. Its ``status`` is "finished", or "diverged" where the loss became NaN or infinite;
        then the run stops there and ``accuracy`` is None. The accuracy is that of the last epoch: none is picked by its
        test result; ``best_accuracy`` is that of the epoch that the validation images chose.

    Raises:
        UsageError: a setting of the study is unknown.
    """
    started = time.perf_counter()
    device = distributed.device(study.device)
    with _isolated(study.threads, device):
        peak = Peak(device)
        run = Trainer(study, arm, seed, data)
        identity = {"study": study.fingerprint(), "data": data.sha256, "arm": arm, "seed": seed}
        kept = None if checkpoint is None else Checkpoint(checkpoint, identity)
        done = _Progress()
        state = distributed.broadcast(kept.load() if kept is not None else None, study.device)
        if state is not None and state["run"]["initial"] == run.initial:
            run.restore(state["run"])
            done = _Progress(**state["progress"])
            done.continued.append(done.epoch)
            for row in done.rows:
                on_epoch(row)
        before = done.passed
        problem: str | None = None
        score: Score | None = None
        schedule = study.schedule
        for epoch in range(done.epoch + 1, schedule.epochs + 1):
            begun = time.perf_counter()
            told = None if on_step is None else _after(on_step, epoch - 1)
            train_loss, train_accuracy = run.train_epoch(epoch, told)
            if not math.isfinite(train_loss):
                problem = f"the loss became {train_loss} in epoch {epoch}"
                break
            seconds = time.perf_counter() - begun
            validation = run.evaluate("validation") if run.data.validation_count else None
            best = done.best
            better = validation is not None and (best is None or validation.value > best["validation_score"])
            last = epoch == schedule.epochs
            score = run.evaluate("test") if last or better or epoch % schedule.test_every == 0 else None
            if score is not None and score.loss is not None and not math.isfinite(score.loss):
                problem = f"the test loss became {score.loss} after epoch {epoch}"
            row = {
                "study": study.name,
                "arm": arm,
                "seed": seed,
                "epoch": epoch,
                # Taken while the weights were changing: running figures, for the curves alone.
                "train_loss": train_loss,
                "train_accuracy_running": train_accuracy,
                "test_loss": score.loss if score is not None and problem is None else None,
                "test_score": score.value if score is not None else None,
                "test_correct": score.correct if score is not None else None,
                "test_accuracy": score.value if score is not None else None,
                "validation_score": validation.value if validation is not None else None,
                "seconds": seconds,
            }
            done.epoch, done.passed = epoch, before + time.perf_counter() - started
            done.seconds.append(seconds)
            done.peak = max(done.peak, peak.bytes() or 0)
            done.rows.append(row)
            on_epoch(row)
            if problem is not None:
                break
            if kept is not None and distributed.rank() == 0:
                try:
                    kept.save({"run": run.state(), "progress": vars(done)})
                except OSError as error:
                    if on_trouble is not None:
                        on_trouble(
                            f"can't write the checkpoint of {arm}, seed {seed}: {describe_os_error(error)}; it goes on "
                            f"without, and would begin anew if it were interrupted"
                        )
        if problem is None and score is None:  # it was interrupted after its last epoch
            score = run.evaluate("test")
        end = score if problem is None else None
        best = done.best if end else None
        shifts = [which for which in run.data.test_sets if which.startswith("shift ")] if end else []
        shifted = {which.removeprefix("shift "): run.evaluate(which).value for which in shifts}
        return {
            "study": study.name,
            "arm": arm,
            "seed": seed,
            "status": "finished" if end else "diverged",
            "problem": problem,
            "metric": run.task.metric,
            "accuracy": end.value if end else None,
            "correct": end.correct if end else None,
            "total": end.total if end else run.data.test_count,
            "test_loss": end.loss if end else None,
            "best_epoch": best["epoch"] if best else None,
            "best_accuracy": best["test_score"] if best else None,
            "per_class": list(end.per_class) if end else [],
            "shifted": shifted,
            "parameters": run.built.parameters,
            "mask_bytes": run.built.mask_bytes,
            "macs": run.built.macs,
            "width": run.built.width,
            "epochs": done.epoch,
            "seconds_per_epoch": statistics.median(done.seconds) if done.seconds else None,
            "seconds": before + time.perf_counter() - started,
            "peak_memory_bytes": max(done.peak, peak.bytes() or 0) or None,
            "initial_sha256": run.initial,
            "final_sha256": state_sha256(run.model),
            "streams": run.streams,
            "continued_after": done.continued,
            "unreadable": list(run.data.unreadable),
        }


def _after(on_step: Callable[[float], None], epochs: int) -> Callable[[float], None]:
    return lambda share: on_step(epochs + share)
