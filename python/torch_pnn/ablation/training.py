"""Trains one arm with one seed, and measures it on the whole test set.

Everything random hangs on the seed alone: the initial weights and masks through PyTorch's default generator, the order
of the data through a generator of its own, which every arm draws from alike. So two arms with the same seed see the
same batches, and the same run done twice gives the same weights to the last bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .arms import build
from .data import Dataset
from .study import Study
from .tasks import find_task

Row = dict[str, Any]

#: Images per batch of an evaluation; the result does not depend on it.
EVALUATION_BATCH = 256


@contextlib.contextmanager
def _isolated(threads: int) -> Iterator[None]:
    """Keeps a run's generator state and number of threads from the caller's."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


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


def _optimizer(model: nn.Module, study: Study) -> torch.optim.Optimizer:
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": study.schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=study.schedule.learning_rate,
        momentum=study.schedule.momentum,
        nesterov=study.schedule.momentum > 0,
    )


def learning_rate(study: Study, step: int, steps_per_epoch: int) -> float:
    """The learning rate of a step: a linear rise, then half a cosine down to zero (Loshchilov, Hutter, ICLR 2017).

    Example:
        >>> from torch_pnn.ablation.ready import STUDIES
        >>> study = STUDIES["digits"]
        >>> learning_rate(study, 0, 10) < learning_rate(study, 19, 10) == study.schedule.learning_rate
        True
    """
    warmup = max(1, round(study.schedule.warmup_epochs * steps_per_epoch))
    total = study.schedule.epochs * steps_per_epoch
    if step < warmup:
        return study.schedule.learning_rate * (step + 1) / warmup
    progress = (step + 1 - warmup) / max(1, total - warmup)
    return study.schedule.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(study: Study, arm: str, seed: int, data: Dataset, on_epoch: Callable[[Row], None]) -> Row:
    """Trains one arm with one seed.

    Args:
        study: the settings.
        arm: a key of ``arms.CATALOGUE``.
        seed: fixes initial weights, masks and data order.
        data: the data set.
        on_epoch: receives a row for epochs.jsonl after every epoch.

    Returns:
        The row for results.jsonl. Its ``status`` is "finished", or "diverged" where the loss became NaN or infinite;
        then the run stops there and ``accuracy`` is None. The accuracy is that of the last epoch: none is picked by its
        test result.
    """
    started = time.perf_counter()
    with _isolated(study.threads):
        streams = study.streams(seed)
        built = build(study, arm, streams, data)
        model = built.model
        initial = state_sha256(model)
        task = find_task(data)
        optimizer = _optimizer(model, study)
        count = data.train_count
        steps_per_epoch = -(-count // study.schedule.batch_size)
        step, seconds, problem = 0, [], None
        epoch = 0
        for epoch in range(1, study.schedule.epochs + 1):
            model.train()
            begun = time.perf_counter()
            loss_sum, right = 0.0, 0
            batches = data.train_batches(
                study.schedule.batch_size, epoch=epoch, order=streams["order"], augmentation=streams["augmentation"]
            )
            for inputs, targets in batches:
                rate = learning_rate(study, step, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss, correct = task.training_step(model, inputs, targets)
                value = loss.item()
                if not math.isfinite(value):
                    problem = f"the loss became {value} in epoch {epoch}"
                    break
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss_sum += value * len(targets)
                right += 0 if correct is None else int(correct)
                step += 1
            if problem is not None:
                epoch -= 1
                break
            seconds.append(time.perf_counter() - begun)
            score = task.evaluate(model, data.test_batches("test", EVALUATION_BATCH))
            if score.loss is not None and not math.isfinite(score.loss):
                problem = f"the test loss became {score.loss} after epoch {epoch}"
            on_epoch(
                {
                    "arm": arm,
                    "seed": seed,
                    "epoch": epoch,
                    "train_loss": loss_sum / count,
                    # Counted while the weights were changing: a running figure, for the curves alone.
                    "train_accuracy_running": right / count,
                    "test_loss": None if problem else score.loss,
                    "test_correct": score.correct,
                    "test_accuracy": score.value,
                    "seconds": seconds[-1],
                }
            )
            if problem is not None:
                break
        diverged = problem is not None
        return {
            "study": study.name,
            "arm": arm,
            "seed": seed,
            "status": "diverged" if diverged else "finished",
            "problem": problem,
            "accuracy": None if diverged else score.value,
            "correct": None if diverged else score.correct,
            "total": data.test_count,
            "test_loss": None if diverged else score.loss,
            "parameters": built.parameters,
            "mask_bytes": built.mask_bytes,
            "macs": built.macs,
            "width": built.width,
            "epochs": epoch,
            "seconds_per_epoch": statistics.median(seconds) if seconds else None,
            "seconds": time.perf_counter() - started,
            "initial_sha256": initial,
            "final_sha256": state_sha256(model),
        }
