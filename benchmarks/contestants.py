"""What is timed beside what: the operator, plain PyTorch, bare convolutions, networks, the machine's own rates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timing import Contestant
from torch import Tensor, nn

import torch_pnn
from torch_pnn import functional, models

LEVEL = 0.1
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
MM = 1024
"""Side of the square product whose rate is the machine's ceiling."""


@dataclass(frozen=True)
class Case:
    """Sizes of one layer: batch, input channels, height = width, output channels, masks per channel."""

    batch: int
    channels: int
    side: int
    outputs: int
    masks: int

    @property
    def maps(self) -> int:
        """K = C*M."""
        return self.channels * self.masks

    @property
    def pixels(self) -> int:
        """Pixels of all images."""
        return self.batch * self.side * self.side

    @property
    def flops(self) -> int:
        """Of the product of one forward pass; backward has twice as many."""
        return 2 * self.pixels * self.maps * self.outputs

    @property
    def moved(self) -> int:
        """Bytes of x and y in float32."""
        return 4 * self.pixels * (self.channels + self.outputs)

    def __str__(self) -> str:
        return f"({self.batch},{self.channels},{self.side},{self.outputs},{self.masks})"


def parse_case(text: str) -> Case:
    """Reads B,C,H,T,M.

    Raises:
        ValueError: not five positive integers.

    Example:
        >>> parse_case("32,64,56,64,1").flops
        822083584
    """
    try:
        numbers = [int(part) for part in text.strip("() ").split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 5 or min(numbers) < 1:
        raise ValueError(f"case is {text!r}, it should be five positive integers: B,C,H,T,M")
    return Case(*numbers)


def plain_layer(x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor) -> Tensor:
    """The layer as one writes it in PyTorch. x [B, C, H, W], mask [C, M, H, W], weight [T, C*M, 1, 1], bias [T]."""
    if mask.shape[1] == 1:
        return F.conv2d(torch.relu(x + LEVEL * mask[:, 0]), weight, bias)
    a = torch.relu(x.unsqueeze(2) + LEVEL * mask)
    return F.conv2d(a.flatten(1, 2), weight, bias)


class Layer:
    """The tensors of one case and everything that can be timed on them.

    Attributes:
        case: the sizes.
        x: the input in each layout; requires gradients, as weight and bias do.
        mask: [C, M, H, W], the masks that `seed` stands for, stored.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(0)
        size = (case.batch, case.channels, case.side, case.side)
        base = torch.randn(size, generator=generator)
        grad = torch.randn((case.batch, case.outputs, case.side, case.side), generator=generator)
        self.x = {name: _leaf(base.contiguous(memory_format=layout)) for name, layout in LAYOUTS.items()}
        self.grad = {name: grad.contiguous(memory_format=layout) for name, layout in LAYOUTS.items()}
        self.weight = _leaf(torch.randn((case.outputs, case.maps, 1, 1), generator=generator) / math.sqrt(case.maps))
        self.bias = _leaf(torch.randn(case.outputs, generator=generator))
        self.seed = torch.tensor([1])
        self.mask = functional.perturbation_mask(1, case.channels, case.masks, case.side, case.side)
        self.ready: dict[str, Tensor] = {}

    def _pair(
        self, name: str, function: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor, passes: Sequence[str]
    ) -> dict[str, Contestant]:
        found = {}
        if "forward" in passes:
            found[f"forward, {name}"] = Contestant(function)
        if "training" in passes:
            found[f"training, {name}"] = Contestant(lambda: torch.autograd.grad(function(), leaves, grad), grad=True)
        return found

    def ours(self, passes: Sequence[str], noise: str | None = None) -> dict[str, Contestant]:
        """The operator: stored masks, or those of a seed of kind `noise`; forward, or forward and backward."""
        found: dict[str, Contestant] = {}
        for layout, x in self.x.items():
            source: dict[str, Any] = {"mask": self.mask}
            if noise is not None:
                source = {"seed": self.seed, "masks": self.case.masks, "noise": noise}
            function = _bind(functional.perturb_conv2d, x, self.weight, self.bias, level=LEVEL, **source)
            name = f"ours{'' if noise is None else f' {noise}'}, {layout}"
            found |= self._pair(name, function, (x, self.weight, self.bias), self.grad[layout], passes)
        return found

    def ours_bfloat16(self, passes: Sequence[str]) -> dict[str, Contestant]:
        """The operator with input, weight and bias in bfloat16."""
        found: dict[str, Contestant] = {}
        weight, bias = _leaf(self.weight.bfloat16()), _leaf(self.bias.bfloat16())
        for layout, base in self.x.items():
            x = _leaf(base.bfloat16())
            function = _bind(functional.perturb_conv2d, x, weight, bias, mask=self.mask, level=LEVEL)
            grad = self.grad[layout].bfloat16()
            found |= self._pair(f"ours bfloat16, {layout}", function, (x, weight, bias), grad, passes)
        return found

    def ours_normalised(self) -> dict[str, Contestant]:
        """The operator with batch normalisation inside, forward and backward in training."""
        found: dict[str, Contestant] = {}
        gamma, beta = _leaf(torch.ones(self.case.maps)), _leaf(torch.zeros(self.case.maps))
        mean, variance = torch.zeros(self.case.maps), torch.ones(self.case.maps)
        for layout, x in self.x.items():
            function = _bind(
                functional.perturb_norm_conv2d,
                *(x, self.weight, self.bias, gamma, beta, mean, variance),
                training=True,
                mask=self.mask,
                level=LEVEL,
            )
            leaves = (x, self.weight, self.bias, gamma, beta)
            found |= self._pair(f"ours normalised, {layout}", function, leaves, self.grad[layout], ("training",))
        return found

    def plain(self, compiled: bool = False) -> dict[str, Contestant]:
        """Plain PyTorch, forward and backward; `compiled`: under torch.compile with static shapes."""
        found: dict[str, Contestant] = {}
        for layout, x in self.x.items():
            layer = plain_layer
            if compiled:
                torch._dynamo.reset()  # each layout is compiled for itself
                layer = torch.compile(plain_layer, dynamic=False, fullgraph=True)
            function = _bind(layer, x, self.weight, self.bias, self.mask)
            leaves = (x, self.weight, self.bias)
            name = f"{'compiled' if compiled else 'plain'}, {layout}"
            pair = self._pair(name, function, leaves, self.grad[layout], ("training",))
            for contestant in pair.values():  # compiles now, before the next layout resets the compiler
                contestant.repeat(1)
            found |= pair
        return found

    def bare(self, passes: Sequence[str]) -> dict[str, Contestant]:
        """The 1x1 convolution alone, on an input of C*M channels that is perturbed and activated already."""
        found: dict[str, Contestant] = {}
        case = self.case
        if not self.ready:
            base = torch.relu(torch.randn(case.batch, case.maps, case.side, case.side))
            self.ready = {name: _leaf(base.contiguous(memory_format=layout)) for name, layout in LAYOUTS.items()}
        for layout, ready in self.ready.items():
            function = _bind(F.conv2d, ready, self.weight, self.bias)
            leaves = (ready, self.weight, self.bias)
            found |= self._pair(f"1x1, {layout}", function, leaves, self.grad[layout], passes)
        return found

    def conv3x3(self) -> dict[str, Contestant]:
        """The 3x3 convolution that the layer replaces, forward and backward."""
        found: dict[str, Contestant] = {}
        for layout, x in self.x.items():
            conv = nn.Conv2d(self.case.channels, self.case.outputs, 3, padding=1).to(memory_format=LAYOUTS[layout])
            leaves = (x, conv.weight, conv.bias)
            found |= self._pair(f"3x3, {layout}", _bind(conv, x), leaves, self.grad[layout], ("training",))
        return found

    def ceilings(self) -> dict[str, Contestant]:
        """The machine itself: a float32 product of 1024^3, and a copy that moves as many bytes as x and y hold."""
        a, b, product = torch.randn(MM, MM), torch.randn(MM, MM), torch.empty(MM, MM)
        source = torch.randn(max(1, self.case.moved // 8))
        target = torch.empty_like(source)
        return {
            "mm": Contestant(lambda: torch.mm(a, b, out=product)),
            "copy": Contestant(lambda: target.copy_(source)),
        }

    def overhead(self) -> dict[str, Contestant]:
        """One call on a small input: the operator itself, through the module, and what PyTorch's own costs."""
        case = self.case
        found: dict[str, Contestant] = {}
        module = torch_pnn.PerturbConv2d(case.channels, case.outputs, 1, masks=case.masks, level=LEVEL, seed=1)
        operator = torch.ops.torch_pnn.perturb_conv2d.default
        leaves = (self.weight, self.bias)
        for layout, x in self.x.items():
            grad = self.grad[layout]
            options = (case.masks, False, "uniform", LEVEL, "relu", [1, 1], 1)
            stored = _bind(operator, x, self.weight, self.bias, self.mask, None, *options)
            by_seed = _bind(operator, x, self.weight, self.bias, None, self.seed, *options)
            conv = _bind(F.conv2d, x, self.weight, self.bias)
            both = ("forward", "training")
            found |= self._pair(f"operator, stored masks, {layout}", stored, (x, *leaves), grad, both)
            found |= self._pair(f"operator, masks by seed, {layout}", by_seed, (x, *leaves), grad, both)
            found |= self._pair(f"F.conv2d, {layout}", conv, (x, *leaves), grad, both)
            parameters = (x, module.weight, module.bias)
            found |= self._pair(f"module, {layout}", _bind(module, x), parameters, grad, both)
            empty = empty_operator()
            if empty is not None:
                call = _bind(empty, x, self.weight, self.bias, self.mask, None, *options)
                found |= self._pair(f"empty operator, {layout}", call, (), grad, ("forward",))
        return found


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _bind(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> Callable[[], Any]:
    return lambda: function(*arguments, **keywords)


def empty_operator() -> Any:
    """The operator of benchmarks/empty_operator.cpp: the same schema, the same way in, nothing computed.

    Returns:
        The operator, or None where the build has none (it stands beside the other libraries, in benchmarks/).
    """
    from torch_pnn import _library

    path = _library.library_directory().parent / "benchmarks" / "libtorch_pnn_empty.so"
    if not path.exists():
        return None
    torch.ops.load_library(str(path))
    return torch.ops.torch_pnn_benchmark.perturb_conv2d.default


# ---- networks ----


class PlainPerturbConv2d(nn.Module):
    """A `PerturbConv2d` with a fixed image size, written in plain PyTorch on copies of its parameters.

    Args:
        layer: the layer; M masks by seed or stored, normalised or not, pooling under a stride.
        size: (H, W) of its input.
    """

    def __init__(self, layer: torch_pnn.PerturbConv2d, size: tuple[int, int]) -> None:
        super().__init__()
        left, right, top, bottom = layer._pads
        if (left, right, top, bottom) != (0, 0, 0, 0) or layer.downsample != "max" or layer.activation != "relu":
            raise ValueError(f"the layer is {layer}, it should pad nothing, pool by maxima and activate by relu")
        mask = layer.perturbation(*size)
        self.masks = layer.masks
        self.groups = layer.groups
        self.stride = layer.stride
        self.register_buffer("offset", None if mask is None else layer.level * mask.detach())
        self.weight = copy.deepcopy(layer.weight)
        self.bias = copy.deepcopy(layer.bias)
        self.norm = copy.deepcopy(layer.norm)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output."""
        a = input
        if self.masks > 1:
            a = a.unsqueeze(2)
        if self.offset is not None:
            a = a + (self.offset if self.masks > 1 else self.offset[:, 0])
        a = torch.relu(a)
        if self.masks > 1:
            a = a.flatten(1, 2)
        if self.norm is not None:
            a = self.norm(a)
        y = F.conv2d(a, self.weight, self.bias, groups=self.groups)
        return y if self.stride == (1, 1) else F.max_pool2d(y, self.stride, self.stride, ceil_mode=True)


def plain_network(network: nn.Module, image: Tensor) -> nn.Module:
    """A copy of a network whose perturbation layers are plain PyTorch.

    Args:
        network: with `PerturbConv2d` layers; not changed.
        image: an input, from which the layers' image sizes are found.
    """
    result = copy.deepcopy(network)
    sizes: dict[str, tuple[int, int]] = {}
    layers = {name: module for name, module in result.named_modules() if isinstance(module, torch_pnn.PerturbConv2d)}

    def note(name: str) -> Callable[..., None]:
        return lambda module, arguments: sizes.update({name: (arguments[0].shape[-2], arguments[0].shape[-1])})

    handles = [module.register_forward_pre_hook(note(name)) for name, module in layers.items()]
    training = result.training
    with torch.no_grad():
        result.eval()(image)
    result.train(training)
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        setattr(result.get_submodule(parent), last, PlainPerturbConv2d(layer, sizes[name]))
    return result


def training_step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of stochastic gradient descent with momentum on a batch."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def networks(batch: int, width: int = 64) -> dict[str, Contestant]:
    """A training step of noise_resnet18 (preset juefeix2018) at CIFAR's size, in plain PyTorch, and with 3x3."""
    found: dict[str, Contestant] = {}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    ours = models.noise_resnet18(width=width, preset="juefeix2018", seed=1)
    kinds = {
        "ours": ours,
        "plain": plain_network(ours, images[:1]),
        "3x3": models.noise_resnet18(width=width, layer="conv"),
    }
    for kind, network in kinds.items():
        for layout, memory_format in LAYOUTS.items():
            member = copy.deepcopy(network).to(memory_format=memory_format)
            step = training_step(member, images.contiguous(memory_format=memory_format), labels)
            found[f"step, {kind}, {layout}"] = Contestant(step, grad=True)
    return found


def compiled_networks(batch: int, width: int = 32) -> dict[str, Contestant]:
    """Inference and a training step of noise_resnet18 (preset juefeix2018), as it is and under torch.compile."""
    found: dict[str, Contestant] = {}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    network = models.noise_resnet18(width=width, preset="juefeix2018", seed=1)
    torch._dynamo.reset()
    for kind in ("eager", "compiled"):
        evaluated, trained = copy.deepcopy(network).eval(), copy.deepcopy(network)
        run, train = evaluated, trained
        if kind == "compiled":
            run, train = (torch.compile(member, dynamic=False, fullgraph=True) for member in (evaluated, trained))
        found[f"inference, {kind}"] = Contestant(_bind(run, images))
        found[f"step, {kind}"] = Contestant(training_step(train, images, labels), grad=True)
    return found


# ---- memory ----


def kept_bytes(call: Callable[[], Any]) -> int:
    """Bytes of the distinct tensors that autograd saves for backward during the call, by saved-tensor hooks."""
    found: dict[tuple[int, int], int] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
        size = sum(found.values())
        del result
    return size


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most that PyTorch's CPU allocator held at once during the call, beyond what it held before.

    What the call returns counts. Memory that does not come from PyTorch's allocator (a library's own) does not.
    """
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del result
    return most
