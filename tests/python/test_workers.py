"""Many callers at once: Python threads, DataLoader workers, forked and spawned processes."""

from __future__ import annotations

import concurrent.futures
import copy
import multiprocessing
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from operators_support import bits, needs_derivatives
from torch import Tensor, vmap
from torch.func import functional_call, grad

from torch_pnn import LBConv2d, PerturbConv2d, functional

THREADS, ROUNDS = 8, 12


@pytest.fixture
def two_threads() -> Iterator[None]:
    """PyTorch's own threads at work in every call."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def layer() -> PerturbConv2d:
    return PerturbConv2d(8, 8, 3, padding=1, masks=2, seed=3, activation="gelu")


def step(model: torch.nn.Module, x: Tensor) -> list[bytes]:
    """Forward and backward, with nothing shared but the model's values."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    output = functional_call(model, parameters, (x,))
    return bits(output, *torch.autograd.grad(output.square().sum(), list(parameters.values())))


def per_sample(model: torch.nn.Module, x: Tensor) -> list[bytes]:
    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image,)).square().sum()

    found = vmap(grad(loss), (None, 0))({n: p.detach() for n, p in model.named_parameters()}, x)
    return bits(*found.values())


@needs_derivatives
@pytest.mark.parametrize("task", [step, per_sample], ids=["training steps", "per-sample gradients"])
def test_many_threads_at_once(task: Any, two_threads: None) -> None:
    model = layer()
    images = [torch.randn(2, 8, 20, 20) for _ in range(THREADS)]
    expected = [task(model, x) for x in images]
    models = [copy.deepcopy(model) for _ in range(THREADS)]  # functional_call changes the module while it runs
    start = threading.Barrier(THREADS)

    def work(index: int) -> bool:
        start.wait()
        return all(task(models[index], images[index]) == expected[index] for _ in range(ROUNDS))

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(work, range(THREADS)))


def test_modules_made_in_many_threads() -> None:
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        made = list(pool.map(lambda seed: PerturbConv2d(3, 4, 3, seed=seed), range(40)))
    for seed, module in enumerate(made):
        assert torch.equal(module.perturbation(4, 5), functional.perturbation_mask(seed, 3, 1, 4, 5))


class Perturbed(torch.utils.data.Dataset[Tensor]):
    """A data set that runs layers while it loads, as an augmentation would."""

    def __init__(self) -> None:
        self.layers = torch.nn.Sequential(PerturbConv2d(3, 4, 3, padding=1, seed=5), LBConv2d(4, 2, seed=6))
        self.layers.requires_grad_(False)

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return self.layers(torch.full((3, 16, 16), float(index)))


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers(start: str, two_threads: None) -> None:
    torch.manual_seed(0)
    data = Perturbed()
    expected = [data[index] for index in range(len(data))]  # the pool of threads exists before the fork
    workers, epochs = (2, 2) if start == "fork" else (1, 1)  # a spawned worker imports PyTorch anew
    loader = torch.utils.data.DataLoader(data, 2, num_workers=workers, multiprocessing_context=start, timeout=120)
    for _ in range(epochs):
        assert torch.equal(torch.cat(list(loader)), torch.stack(expected))


def in_child(queue: Any, model: PerturbConv2d, x: Tensor) -> None:
    queue.put(step(model, x))


@needs_derivatives
@pytest.mark.slow
@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_layer_is_sent_to_another_process(start: str) -> None:
    model, x = layer(), torch.randn(2, 8, 6, 6)
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    child = context.Process(target=in_child, args=(queue, model, x))
    child.start()
    assert queue.get(timeout=120) == step(model, x)
    child.join(60)
    assert child.exitcode == 0
