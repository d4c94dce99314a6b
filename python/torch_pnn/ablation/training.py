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
from torch import Tensor, nn
from torch.nn import functional as F

from .arms import build
from .data import Dataset
from .study import Study

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


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, float]:
    """Counts the correct answers over a whole set, in evaluation mode.

    Args:
        model: left in the mode that it was in.
        images: [N, C, H, W].
        labels: int64 [N].

    Returns:
        (correct, mean cross-entropy). Accuracy is correct / N: a count, never an average over batches.

    Example:
        >>> images = torch.eye(3).reshape(3, 3, 1, 1)
        >>> evaluate(nn.Flatten(), images, torch.tensor([0, 1, 0]))[0]
        2
    """
    training = model.training
    model.eval()
    correct, loss = 0, 0.0
    try:
        with torch.inference_mode():
            for start in range(0, len(labels), EVALUATION_BATCH):
                part = slice(start, start + EVALUATION_BATCH)
                logits = model(images[part])
                correct += int((logits.argmax(dim=1) == labels[part]).sum())
                loss += float(F.cross_entropy(logits.double(), labels[part], reduction="sum"))
    finally:
        model.train(training)
    return correct, loss / len(labels)


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
        order = torch.Generator().manual_seed(streams["order"])
        optimizer = _optimizer(model, study)
        count = len(data.train_labels)
        steps_per_epoch = -(-count // study.schedule.batch_size)
        step, seconds, problem = 0, [], None
        correct, test_loss = 0, math.nan
        epoch = 0
        for epoch in range(1, study.schedule.epochs + 1):
            model.train()
            begun = time.perf_counter()
            permutation = torch.randperm(count, generator=order)
            loss_sum, right = 0.0, 0
            for batch in permutation.split(study.schedule.batch_size):
                rate = learning_rate(study, step, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                labels = data.train_labels[batch]
                logits = model(data.train_images[batch])
                loss = F.cross_entropy(logits, labels)
                value = loss.item()
                if not math.isfinite(value):
                    problem = f"the loss became {value} in epoch {epoch}"
                    break
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss_sum += value * len(batch)
                right += int((logits.detach().argmax(dim=1) == labels).sum())
                step += 1
            if problem is not None:
                epoch -= 1
                break
            seconds.append(time.perf_counter() - begun)
            correct, test_loss = evaluate(model, data.test_images, data.test_labels)
            if not math.isfinite(test_loss):
                problem = f"the test loss became {test_loss} after epoch {epoch}"
            on_epoch(
                {
                    "arm": arm,
                    "seed": seed,
                    "epoch": epoch,
                    "train_loss": loss_sum / count,
                    # Counted while the weights were changing: a running figure, for the curves alone.
                    "train_accuracy_running": right / count,
                    "test_loss": None if problem else test_loss,
                    "test_correct": correct,
                    "test_accuracy": correct / len(data.test_labels),
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
            "accuracy": None if diverged else correct / len(data.test_labels),
            "correct": None if diverged else correct,
            "total": len(data.test_labels),
            "test_loss": None if diverged else test_loss,
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
