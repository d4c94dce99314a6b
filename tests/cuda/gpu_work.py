"""The phases of gpu_check.py that run inside PyTorch, each in a process of its own: probe, reference, device, kernels,
compile, timings.

    python tests/cuda/gpu_work.py reference --out part.json --seconds 60

Each writes what it has found to the file, again and again, so that a process that is ended or crashes leaves what it
had. `--rehearse` puts the CPU in the GPU's place, with stand-ins for streams, events and graphs, and tiny sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import predictions
import torch
import torch.nn.functional as F

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
# Unit roundoff of the type itself, and of the sums that its products are added up in (16-bit types: the tensor cores',
# which cut off below the 24th bit).
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUMS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-23, torch.float16: 2.0**-23}
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 0.0, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
LEVEL = 0.25
FLUSHED_BYTES = 2**28  # written between timings: several times any L2 cache
WARM_SECONDS = 0.03  # of work before a timing


# ---- the device, or what stands in for it ----


class StandIn:
    """The names of torch.cuda that are used here, for a machine without a GPU."""

    class Stream:
        def wait_stream(self, other: Any) -> None: ...

        def synchronize(self) -> None: ...

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.time = 0.0

        def record(self) -> None:
            self.time = time.perf_counter()

        def synchronize(self) -> None: ...

        def elapsed_time(self, end: StandIn.Event) -> float:
            return (end.time - self.time) * 1000

    class CUDAGraph:
        def replay(self) -> None: ...

    @staticmethod
    @contextlib.contextmanager
    def graph(graph: Any) -> Iterator[None]:
        yield

    @staticmethod
    @contextlib.contextmanager
    def stream(stream: Any) -> Iterator[None]:
        yield

    @staticmethod
    def current_stream() -> StandIn.Stream:
        return StandIn.Stream()

    @staticmethod
    def synchronize() -> None: ...

    @staticmethod
    def empty_cache() -> None: ...

    @staticmethod
    def reset_peak_memory_stats() -> None: ...

    @staticmethod
    def memory_allocated() -> int:
        return 0

    @staticmethod
    def max_memory_allocated() -> int:
        return 0

    @staticmethod
    def set_sync_debug_mode(mode: str) -> None: ...

    @staticmethod
    def mem_get_info() -> tuple[int, int]:
        return 2**36, 2**36

    @staticmethod
    def get_device_name() -> str:
        return "no GPU, a rehearsal"

    @staticmethod
    def get_device_capability() -> tuple[int, int]:
        return 9, 0


class Work:
    """A phase's device, its time, and what it has found."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rehearse: bool = options.rehearse
        self.device = "cpu" if self.rehearse else "cuda"
        self.cuda: Any = StandIn if self.rehearse else torch.cuda
        self.device_name: str = self.cuda.get_device_name()
        self.end = time.monotonic() + options.seconds
        self.out: Path | None = options.out
        self.part: tuple[int, int] = options.part
        self.found: dict[str, Any] = {}

    def time_left(self) -> bool:
        return time.monotonic() < self.end

    def write(self) -> None:
        """Writes what has been found so far, whole or not at all."""
        if self.out is not None:
            half = self.out.with_name(self.out.name + ".part")
            half.write_text(json.dumps(self.found), encoding="utf-8")
            half.replace(self.out)

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)


# ---- probe ----


def probe(work: Work) -> None:
    """What PyTorch sees."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 11):
        work.found["reason"] = f"PyTorch is {torch.__version__}, it should be 2.11 or newer"
    elif not work.rehearse and torch.version.cuda is None:
        work.found["reason"] = f"PyTorch {torch.__version__} is not a CUDA build"
    elif not work.rehearse and not torch.cuda.is_available():
        work.found["reason"] = f"no GPU: PyTorch {torch.__version__} (CUDA {torch.version.cuda}) sees none"
    else:
        major, minor = work.cuda.get_device_capability()
        device: dict[str, Any] = {"name": work.cuda.get_device_name(), "architecture": f"{major}{minor}"}
        if not work.rehearse:
            properties = torch.cuda.get_device_properties()
            device |= {"multiprocessors": properties.multi_processor_count, "memory": properties.total_memory}
            device["l2_cache"] = getattr(properties, "L2_cache_size", None)
        work.found["device"] = device
        cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        work.found["versions"] = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {cudnn}"
    work.found["passed"] = "reason" not in work.found
    work.write()


# ---- reference ----


def perturbed(x: torch.Tensor, source: dict[str, Any], masks: int, options: dict[str, Any]) -> torch.Tensor:
    """The response maps a, in float64: the reference's layer with an identity for its weight."""
    from torch_pnn import reference

    maps = x.shape[1] * masks
    identity = torch.eye(maps, dtype=torch.float64).reshape(maps, maps, 1, 1)
    plain = {key: value for key, value in options.items() if key != "groups"}
    return reference.perturb_conv2d(x, identity, **source, **plain)


def compare_one(
    work: Work,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    sizes: tuple[int, int, int, int, int, int],
    layout: str,
    noise: str,
    options: dict[str, Any],
) -> dict[str, float]:
    """Forward and backward of one layer against float64; for each result, its worst error over its bound.

    With unit roundoffs s (of the sums) and o (of the result): |error| <= (u + (n + 8) s + e) * sum |terms| +
    o |result|, where n is the number of terms, e the activations' own error, and u that of the operands: of 16-bit
    types the unit roundoff in the output and in the weight's gradient, since the response maps are rounded once; of
    TF32 twice its own in every pass; else 0.
    """
    import torch_pnn
    from torch_pnn import reference

    batch, channels, height, width, outputs, masks = sizes
    generator = torch.Generator().manual_seed(channels * 1000 + outputs)
    groups, stride = options.get("groups", 1), options.get("stride", 1)
    x = torch.randn(batch, channels, height, width, generator=generator).to(dtype)
    weight = (torch.randn(outputs, channels // groups * masks, 1, 1, generator=generator) / 8).to(weight_dtype)
    shape = batch, outputs, (height - 1) // stride + 1, (width - 1) // stride + 1
    g = torch.randn(shape, generator=generator).to(weight_dtype)
    shared = bool(options.get("shared_masks", False))
    if noise == "tensor":
        mask = torch.rand(1 if shared else channels, masks, height, width, generator=generator) * 2 - 1
        source: dict[str, Any] = {"mask": mask}
        options = {key: value for key, value in options.items() if key != "shared_masks"}
    else:
        source = {"seed": torch.tensor([77]), "masks": masks, "noise": noise}
    train = noise == "tensor"

    def run(function: Any, device: str, wide: bool, absolute: bool = False) -> dict[str, torch.Tensor]:
        types = (torch.float64,) * 3 if wide else (dtype, weight_dtype, weight_dtype)
        made = [
            t.to(device, kind).to(memory_format=LAYOUTS[layout]) for t, kind in zip((x, weight, g), types, strict=True)
        ]
        if absolute:
            made[1:] = [t.abs() for t in made[1:]]
        leaves = {"input": made[0], "weight": made[1]}
        arguments = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in source.items()
        }
        if train:
            kind = torch.float64 if wide or dtype == torch.float64 else torch.float32
            arguments["mask"] = leaves["mask"] = arguments["mask"].to(kind)
        for leaf in leaves.values():
            leaf.requires_grad_()
        y = function(leaves["input"], leaves["weight"], **arguments, **options)
        gradients = torch.autograd.grad(y, list(leaves.values()), made[2])
        named = {f"grad_{name}": value for name, value in zip(leaves, gradients, strict=True)}
        return {name: value.detach().cpu().double() for name, value in {"output": y, **named}.items()}

    got = run(torch_pnn.functional.perturb_conv2d, work.device, False)
    want = run(reference.perturb_conv2d, "cpu", True)
    # The sums of the terms' sizes: absolute weights and gradients against absolute response maps.
    size = {name: value.abs() for name, value in run(reference.perturb_conv2d, "cpu", True, True).items()}
    with torch.enable_grad():
        a = perturbed(x.double(), {k: v.double() if k == "mask" else v for k, v in source.items()}, masks, options)
        v = weight.double().abs().requires_grad_()
        y = F.conv2d(a.detach().abs(), v, groups=groups)
        size["output"] = y.detach()
        size["grad_weight"] = torch.autograd.grad(y, v, g.double().abs())[0]

    operand = UNIT[weight_dtype] if weight_dtype in (torch.bfloat16, torch.float16) else 0.0
    # Both operands of each product, to 11 bits; the tensor cores' sums are those of 16-bit types.
    tf32 = weight_dtype == torch.float32 and torch_pnn.backends.cuda.allow_tf32
    sums = SUMS[torch.bfloat16 if tf32 else weight_dtype]
    plain = options.get("activation", "relu") in ("relu", "identity", "leaky_relu", "hardtanh")
    curved = 0.0 if plain else 32 * max(UNIT[torch.float32] if dtype != torch.float64 else 0.0, UNIT[torch.float64])
    terms = {
        "output": channels // groups * masks,
        "grad_input": outputs // groups * masks,
        "grad_weight": shape[0] * shape[2] * shape[3],
        "grad_mask": outputs // groups * shape[0] * (channels if shared else 1),
    }
    kinds = {"output": weight_dtype, "grad_input": dtype, "grad_weight": weight_dtype}
    worst = {}
    for name, value in got.items():
        kind = kinds.get(name, torch.float64 if dtype == torch.float64 else torch.float32)
        if value.shape != want[name].shape:
            raise AssertionError(f"{name} is {list(value.shape)}, it should be {list(want[name].shape)}")
        once = 2.02 * UNIT[torch.float16] if tf32 else 1.01 * operand if name in ("output", "grad_weight") else 0.0
        bound = (once + (terms[name] + 8) * sums + curved) * size[name]
        bound = bound + UNIT[kind] * want[name].abs() * 1.01 + (terms[name] + 4) * SMALLEST[kind]
        # Not a number never passes; what curves may have terms that cancel in `size`.
        slack = 0.0 if plain else curved * float(size[name].max())
        ratio = ((value - want[name]).abs() / (bound + slack).clamp_min(1e-300)).nan_to_num(nan=math.inf)
        worst[name] = float(ratio.max()) if ratio.numel() else 0.0
    return worst


def normalised_one(
    work: Work, dtype: torch.dtype, layout: str, training: bool, channels: int, outputs: int
) -> dict[str, float]:
    """The layer with batch normalisation inside against float64: relative errors in the Euclidean norm over a bound."""
    import torch_pnn
    from torch_pnn import reference

    generator = torch.Generator().manual_seed(5)
    masks = 2
    tensors = {
        "input": torch.randn(4, channels, 9, 16, generator=generator),
        "weight": torch.randn(outputs, channels * masks, 1, 1, generator=generator) / 4,
        "bias": torch.randn(outputs, generator=generator),
        "norm_weight": torch.rand(channels * masks, generator=generator) + 0.5,
        "norm_bias": torch.randn(channels * masks, generator=generator),
    }
    tensors = {
        name: t.to(dtype if name in ("input", "weight", "bias") else torch.float32) for name, t in tensors.items()
    }
    g = torch.randn(4, outputs, 9, 16, generator=generator).to(dtype)

    def run(function: Any, device: str, wide: bool) -> dict[str, torch.Tensor]:
        real = torch.float64 if wide or dtype == torch.float64 else torch.float32
        made = {}
        for name, t in tensors.items():
            kind = torch.float64 if wide else real if name.startswith("norm") else dtype
            made[name] = t.to(device, kind)
        made["input"] = made["input"].to(memory_format=LAYOUTS[layout])
        for t in made.values():
            t.requires_grad_()
        mean = torch.full((channels * masks,), 0.25, dtype=real, device=device)
        variance = torch.full((channels * masks,), 0.75, dtype=real, device=device)
        y = function(
            *made.values(), mean, variance, training=training, seed=torch.tensor([9], device=device), masks=masks,
            level=LEVEL,
        )  # fmt: skip
        gradients = torch.autograd.grad(y, list(made.values()), g.to(device, torch.float64 if wide else dtype))
        named = {f"grad_{name}": value for name, value in zip(made, gradients, strict=True)}
        found = {"output": y, "running_mean": mean, "running_var": variance, **named}
        return {name: value.detach().cpu().double() for name, value in found.items()}

    got, want = (
        run(torch_pnn.functional.perturb_norm_conv2d, work.device, False),
        run(reference.perturb_norm_conv2d, "cpu", True),
    )
    limit = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    if dtype == torch.float32 and torch_pnn.backends.cuda.allow_tf32:
        limit = 5e-3
    return {
        name: float(((got[name] - want[name]).norm() / want[name].norm() / limit).nan_to_num(nan=math.inf))
        for name in got
    }


def reference_phase(work: Work) -> None:
    """Every type, layout and kind of mask; then strides, groups, activations, shared masks, large tiles."""
    failures: list[str] = []
    worst: dict[str, float] = {}
    cases = skipped = 0
    pairs = [(t, t) for t in UNIT] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
    relu: dict[str, Any] = {"level": LEVEL, "activation": "relu"}
    todo: list[tuple[Any, ...]] = []
    for types in pairs:
        for layout in LAYOUTS:
            for noise in ("tensor", "uniform", "normal", "waves"):
                for sizes in ((3, 16, 8, 8, 32, 1), (3, 24, 7, 7, 40, 3), (2, 130, 5, 9, 70, 1)):
                    todo.append((*types, sizes, layout, noise, relu))
            todo.append((*types, (2, 24, 7, 9, 40, 2), layout, "uniform", relu | {"groups": 2, "stride": 2}))
            todo.append((*types, (2, 12, 6, 8, 18, 4), layout, "tensor", relu | {"groups": 3, "shared_masks": True}))
            todo.append((*types, (2, 12, 6, 8, 18, 4), layout, "waves", relu | {"shared_masks": True}))
            # 128 large tiles, in each pass: of any layer, and of a plain one.
            todo.append((*types, (4, 72, 64, 64, 136, 1), layout, "uniform", relu))
            todo.append((*types, (4, 80, 64, 64, 136, 1), layout, "uniform", relu))
        for activation in ("identity", "leaky_relu", "elu", "selu", "gelu", "silu", "tanh", "sigmoid", "hardtanh"):
            todo.append(
                (*types, (2, 16, 8, 8, 24, 2), "contiguous", "normal", {"level": LEVEL, "activation": activation})
            )
    for dtype in (torch.bfloat16, torch.float16):
        for layout in LAYOUTS:
            for masks in (1, 2, 4, 8, 16, 64):
                sizes = (3, 80 if masks < 8 else 24, 8, 8, (40, 72, 136)[masks % 3], masks)
                for kind in ("float32", MMA_SYNC):
                    todo.append((dtype, dtype, sizes, layout, "uniform", relu | {"kind": kind}))
            # 128 blocks of the two wider tiles.
            todo.append((dtype, dtype, (4, 80, 80, 80, 72, 1), layout, "uniform", relu))
            # Pixels in pairs and one by one, in whole sixteens of maps.
            todo.append((dtype, dtype, (3, 32, 14, 14, 136, 2), layout, "uniform", relu))
            todo.append((dtype, dtype, (5, 64, 7, 7, 72, 1), layout, "uniform", relu))
            todo.append((dtype, dtype, (4, 80, 64, 64, 136, 1), layout, "uniform", relu | {"kind": MMA_SYNC}))
    for layout in LAYOUTS:
        for masks in (1, 2, 4, 8, 16, 64):
            sizes = (3, 80 if masks < 8 else 24, 8, 8, (40, 72, 136)[masks % 3], masks)
            for kind in ("tf32", TF32_MMA_SYNC):
                todo.append((torch.float32, torch.float32, sizes, layout, "uniform", relu | {"kind": kind}))
        for sizes in ((4, 80, 80, 80, 72, 1), (4, 80, 64, 64, 136, 1), (3, 32, 14, 14, 136, 2), (5, 64, 7, 7, 72, 1)):
            todo.append((torch.float32, torch.float32, sizes, layout, "uniform", relu | {"kind": "tf32"}))
    if work.rehearse:
        todo = todo[:: len(todo) // 40]
    for one in todo:
        if not work.time_left():
            skipped += 1
            continue
        dtype, weight_dtype, sizes, layout, noise, options = one
        name = f"{str(dtype)[6:]}/{str(weight_dtype)[6:]}"
        if options.get("kind", "").startswith("tf32"):
            name = "tf32"
        where = f"{name} {layout} {noise} {sizes} {options}"
        try:
            with arithmetic(options.get("kind", "float32")):
                ratios = compare_one(work, *one[:5], {key: value for key, value in options.items() if key != "kind"})
        except (RuntimeError, AssertionError) as error:
            failures.append(f"{where}: {str(error)[:300]}")
            if "CUDA error" in str(error):
                break  # nothing works in this process any more
            continue
        cases += 1
        for what, ratio in ratios.items():
            key = f"{name} {what}"
            worst[key] = max(worst.get(key, 0.0), ratio)
            if not ratio <= 1:
                failures.append(f"{where}: {what} errs {ratio:.3g} times its bound")
        if cases % 20 == 0:
            work.found.update(cases=cases, worst=worst, failures=failures[:40])
            work.write()
    for name, layout in itertools.product([*(str(dtype)[6:] for dtype in UNIT), "tf32"], LAYOUTS):
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        # Any layer, and plain ones: by mma.sync, by asynchronous products.
        for training, sizes in itertools.product((True, False), ((12, 20), (40, 24), (40, 136))):
            where = f"{name} {layout} normalised, {'training' if training else 'evaluation'}"
            try:
                with arithmetic("tf32" if name == "tf32" else "float32"):
                    ratios = normalised_one(work, dtype, layout, training, *sizes)
            except RuntimeError as error:
                failures.append(f"{where} {sizes}: {str(error)[:300]}")
                continue
            cases += 1
            worst[where] = max(worst.get(where, 0.0), *ratios.values())
            failures += [
                f"{where} {sizes}: {what} errs {r:.3g} times its bound" for what, r in ratios.items() if not r <= 1
            ]
    work.found.update(cases=cases, skipped=skipped, worst=worst, failures=failures[:40])
    work.found["passed"] = cases > 0 and skipped == 0 and not failures
    work.write()


# ---- device ----


def lattice_layer(work: Work, dtype: torch.dtype, batch: int, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers whose sums are exact in every type: results must be the CPU's, bit by bit."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-8, 9, (batch, 40, side, side), generator=generator) / 8.0
    weight = torch.randint(-3, 4, (24, 80, 1, 1), generator=generator).float()
    return x.to(work.device, dtype), weight.to(work.device, dtype)


class Skipped(Exception):
    """A check does not apply to this GPU."""


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))


def device_phase(work: Work) -> None:
    """One check after another, each by itself."""
    import torch_pnn
    from torch_pnn import _library, functional

    cuda, device = work.cuda, work.device
    seed = torch.tensor([7], device=device)

    def layer(x: torch.Tensor, weight: torch.Tensor, masks: int = 2, noise: str = "uniform") -> torch.Tensor:
        return functional.perturb_conv2d(x, weight, seed=seed.to(x.device), masks=masks, noise=noise, level=1.0)

    def both(x: torch.Tensor, weight: torch.Tensor, noise: str = "uniform") -> list[torch.Tensor]:
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = layer(x, weight, noise=noise)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), torch.ones_like(y))]

    def loaded() -> None:
        state = _library.status().cuda
        assert work.rehearse or state == "loaded", state

    def exact() -> None:
        for dtype in UNIT:
            for layout in LAYOUTS.values():
                x, weight = lattice_layer(work, dtype, 3)
                x = x.to(memory_format=layout)
                y = layer(x, weight)
                want = layer(x.cpu(), weight.cpu())
                assert torch.equal(y.cpu(), want), f"{dtype} {layout}: other bits than the CPU's"

    def float32_is_the_cpus() -> None:
        generator = torch.Generator().manual_seed(4)
        x, weight = torch.randn(3, 40, 9, 9, generator=generator), torch.randn(72, 80, 1, 1, generator=generator)
        for dtype in (torch.float32, torch.float64):
            ours = both(x.to(device, dtype), weight.to(device, dtype))[:2]
            assert same(ours, both(x.to(dtype), weight.to(dtype))[:2]), f"{dtype}: other bits than the CPU's"

    def masks() -> None:
        for noise in ("uniform", "normal", "waves"):
            made = functional.perturbation_mask(seed, 5, 3, 17, 19, noise=noise, device=device)
            assert torch.equal(made.cpu(), functional.perturbation_mask(seed.cpu(), 5, 3, 17, 19, noise=noise)), noise

    def random_layer(dtype: torch.dtype, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(6)
        side = 8 if work.rehearse else 64
        x = torch.randn(batch, 40, side, side, generator=generator).to(device, dtype)
        return x, torch.randn(72, 80, 1, 1, generator=generator).to(device, dtype)

    def repeated() -> None:
        for dtype in UNIT:
            x, weight = random_layer(dtype, 16)
            first = both(x, weight)
            for _ in range(2 if work.rehearse else 100):
                again = both(x, weight)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{dtype}: other bits"

    def batch_splits() -> None:
        for dtype in UNIT:
            x, weight = random_layer(dtype, 9)
            whole = layer(x, weight)
            assert torch.equal(whole, torch.cat([layer(part, weight) for part in x.split([1, 3, 5])])), dtype

    def streams() -> None:
        x, weight = random_layer(torch.float32, 16)
        want = both(x, weight)
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            later = x * 1  # the layer must wait for it, on this stream alone
            got = both(later, weight)
        side.synchronize()
        assert same(got, want), "other bits on a side stream"

    def graphs() -> None:
        for dtype in (torch.float32, torch.bfloat16):
            x, weight = random_layer(dtype, 16)
            want = both(x, weight)
            replay, results = capture(work, lambda x=x, weight=weight: both(x, weight))  # type: ignore[misc]
            for result in results:
                result.fill_(-1) if not work.rehearse else None
            replay()
            cuda.synchronize()
            assert same(results, want), f"{dtype}: other bits from a CUDA graph"

    def no_waiting() -> None:
        x, weight = random_layer(torch.float32, 4)
        both(x, weight)
        cuda.set_sync_debug_mode("error")
        try:
            both(x, weight)
        finally:
            cuda.set_sync_debug_mode("default")

    def compiled() -> None:
        x, weight = random_layer(torch.float32, 4)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x, weight), layer(x, weight))

    def autocast() -> None:
        x, weight = random_layer(torch.float32, 4)
        with torch.autocast(device, torch.bfloat16):
            y = layer(x, weight)
        assert y.dtype == torch.bfloat16, y.dtype
        assert torch.equal(y, layer(x, weight.bfloat16()))

    def normalised() -> None:
        module = torch_pnn.PerturbConv2d(8, 12, 3, padding=1, masks=4, norm=True, seed=3).to(device)
        other = torch_pnn.PerturbConv2d(8, 12, 3, padding=1, masks=4, norm=True, seed=3)
        other.load_state_dict({key: value.cpu() for key, value in module.state_dict().items()})
        x = torch.randn(4, 8, 10, 10, generator=torch.Generator().manual_seed(1))
        y, want = module(x.to(device)), other(x)
        y.sum().backward()
        assert torch.allclose(y.cpu(), want, atol=1e-4), float((y.cpu() - want).abs().max())

    def many_elements() -> None:
        # x has 2.1e9 elements; an image's result does not depend on the others, so the last one by itself tells.
        batch, side = (3, 8) if work.rehearse else (33, 1024)
        free, _ = cuda.mem_get_info()
        if free < 24 * 2**30:
            raise Skipped(f"{free / 2**30:.0f} GiB of memory are free, it needs 24")
        x = torch.empty(batch, 64, side, side, dtype=torch.bfloat16, device=device).normal_()
        weight = torch.randn(64, 64, 1, 1, device=device).bfloat16()
        y = layer(x, weight, 1)
        assert torch.equal(y[-1:], layer(x[-1:].contiguous(), weight, 1)), "the last image differs"
        del y
        cuda.empty_cache()
        x.requires_grad_()
        y = layer(x, weight, 1)
        (gradient,) = torch.autograd.grad(y, x, y.detach())
        last = x.detach()[-1:].contiguous().requires_grad_()
        part = layer(last, weight, 1)
        (want,) = torch.autograd.grad(part, last, part.detach())
        assert torch.equal(gradient[-1:], want), "the last image's gradient differs"

    def memory() -> None:
        peaks = {}
        for count in (1, 4, 16):
            side = 8 if work.rehearse else 128
            x = torch.randn(16, 32, side, side, device=device, requires_grad=True)
            weight = torch.randn(32, 32 * count, 1, 1, device=device, requires_grad=True)
            peaks[count] = peak_bytes(work, lambda x=x, w=weight, m=count: layer(x, w, m), (x, weight))  # type: ignore[misc]
        work.found["peak_bytes_by_masks"] = peaks
        most, images = max(peaks.values()), 4 * 16 * 32 * 128 * 128
        assert most <= peaks[1] + images // 8, f"peak memory grows with M: {peaks}"

    checks = [loaded, masks, exact, float32_is_the_cpus, repeated, batch_splits, streams, graphs, no_waiting, autocast]
    checks += [normalised, memory, many_elements, compiled]
    outcome: dict[str, str] = {}
    for check in checks:
        name = check.__name__
        if not work.time_left():
            outcome[name] = "no time was left for it"
            continue
        try:
            check()
            cuda.synchronize()
            outcome[name] = "passed"
        except Skipped as error:
            outcome[name] = f"skipped: {error}"
        except Exception as error:  # the next one goes on
            outcome[name] = f"{type(error).__name__}: {str(error)[:500]}"
        work.say(f"{name}: {outcome[name]}")
        cuda.empty_cache()
        work.found["checks"] = outcome
        work.write()
    work.found["passed"] = all(text.startswith(("passed", "skipped")) for text in outcome.values())
    work.write()


# ---- timings ----


def capture(work: Work, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of a call: what replays it, and the tensors that a replay fills."""
    cuda = work.cuda
    side = cuda.Stream()
    side.wait_stream(cuda.current_stream())
    with cuda.stream(side):  # allocations, cuDNN's choices and compilation happen here
        for _ in range(3):
            function()
    cuda.current_stream().wait_stream(side)
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        result = function()
    return graph.replay, result


def raise_clock(work: Work, call: Callable[[], Any]) -> None:
    """Keeps the GPU busy with a call until its clock has risen from what it has at rest, which takes milliseconds."""
    started = time.monotonic()
    while not work.rehearse and time.monotonic() - started < WARM_SECONDS:
        for _ in range(5):
            call()
        work.cuda.synchronize()


def clock(work: Work) -> int | None:
    """The multiprocessors' clock now, in MHz; None where PyTorch cannot tell (it asks nvidia-ml-py)."""
    try:
        return int(work.cuda.clock_rate())
    except (AttributeError, ImportError, RuntimeError):
        return None


def milliseconds(work: Work, function: Callable[[], Any], flush: torch.Tensor) -> float:
    """The median over replays of a CUDA graph of the call, the L2 cache flushed before each.

    Flushing takes longer than enqueuing, so that the graph's launch is not waited for. What is left of it, an empty
    graph's time, is reported once.
    """
    replay, result = capture(work, function)

    def flushed(replay: Callable[[], None] = replay) -> None:
        flush.zero_()
        replay()

    raise_clock(work, flushed)
    del flushed
    times = []
    started = time.monotonic()
    while len(times) < 5 or (len(times) < 30 and time.monotonic() - started < 0.3):
        flush.zero_()
        start, end = (work.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
        if work.rehearse:
            break
    del replay, result
    return sorted(times)[len(times) // 2]


def peak_bytes(work: Work, function: Callable[[], torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> int:
    """The most memory that forward and backward take beside what is there before."""
    work.cuda.synchronize()
    work.cuda.empty_cache()
    work.cuda.reset_peak_memory_stats()
    before = work.cuda.memory_allocated()
    output = function()
    torch.autograd.grad(output, leaves, torch.ones_like(output))
    return int(work.cuda.max_memory_allocated() - before)


class Layer:
    """The tensors of one case in one type, and what is timed on them."""

    def __init__(self, work: Work, case: tuple[int, ...], kind: str, layout: str) -> None:
        batch, channels, side, outputs, masks = case
        self.case, self.kind, self.layout = case, kind, layout
        self.dtype = torch.float32 if kind == "tf32" else getattr(torch, kind.split()[0])
        device, shape = work.device, LAYOUTS[layout]
        generator = torch.Generator(device).manual_seed(1)

        def random(*size: int, scale: float = 1.0) -> torch.Tensor:
            made = torch.randn(size, generator=generator, device=device) * scale
            made = made.to(self.dtype)
            return made.contiguous(memory_format=shape) if len(size) == 4 else made

        self.x = random(batch, channels, side, side).requires_grad_()
        maps = channels * masks
        self.weight = random(outputs, maps, 1, 1, scale=maps**-0.5).contiguous().requires_grad_()
        self.g = random(batch, outputs, side, side)
        self.seed = torch.tensor([5], device=device)
        self.mask = torch.rand(channels, masks, side, side, generator=generator, device=device)
        self.random = random

    def ours(self) -> torch.Tensor:
        from torch_pnn import functional

        return functional.perturb_conv2d(self.x, self.weight, seed=self.seed, masks=self.case[4], level=0.1)

    def plain(self) -> torch.Tensor:
        return plain_layer(self.x, self.weight, self.mask)

    def forward(self, function: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        def call() -> torch.Tensor:
            with torch.no_grad():
                return function()

        return call

    def training(self, function: Callable[[], torch.Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(function(), (self.x, self.weight), self.g)


def plain_layer(x: torch.Tensor, weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The layer in PyTorch, the masks stored. x [B, C, H, W], mask [C, M, H, W], weight [T, C*M, 1, 1]."""
    if mask.shape[1] == 1:
        return F.conv2d(torch.relu(x + (0.1 * mask[:, 0]).to(x.dtype)), weight)
    return F.conv2d(torch.relu(x.unsqueeze(2) + (0.1 * mask).to(x.dtype)).flatten(1, 2), weight)


def compiled_layer() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """plain_layer, compiled for the sizes that it will be called with alone."""
    torch._dynamo.reset()  # after eight sizes of one function it would run uncompiled, in silence
    return torch.compile(plain_layer, dynamic=False, fullgraph=True)


@contextlib.contextmanager
def arithmetic(kind: str) -> Iterator[None]:
    """What products may be: PyTorch's libraries and our layer follow the row's type."""
    import torch_pnn

    allowed = kind.startswith("tf32")
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch_pnn.backends.cuda.allow_tf32 = allowed
    torch_pnn.backends.cuda.allow_wgmma = not kind.endswith(" mma.sync")
    try:
        yield
    finally:
        torch_pnn.backends.cuda.allow_tf32, torch_pnn.backends.cuda.allow_wgmma = False, True


KINDS = ("bfloat16", "float32", "tf32")
"""The rows' types, the most telling first."""
MMA_SYNC, TF32_MMA_SYNC = "bfloat16 mma.sync", "tf32 mma.sync"
"""The same without Hopper's asynchronous products."""


def cases(work: Work) -> list[tuple[int, int, int, int, int]]:
    """The sizes, the GPU-sized ones first."""
    if work.rehearse:
        return [(2, 8, 6, 8, 4)]
    return [*predictions.LARGE_CASES, *predictions.BENCHMARK_CASES]


def compile_phase(work: Work) -> None:
    """Compiles a share of the plain compositions, which fills torch.compile's cache for the process that times."""
    todo = [(case, kind) for kind in KINDS for case in cases(work)]
    first, step = work.part
    for case, kind in todo[first::step]:
        if not work.time_left():
            return
        layer = Layer(work, case, kind, "contiguous")
        with arithmetic(kind):
            function = compiled_layer()
            layer.forward(lambda f=function, i=layer: f(i.x, i.weight, i.mask))()  # type: ignore[misc]
            layer.training(lambda f=function, i=layer: f(i.x, i.weight, i.mask))()  # type: ignore[misc]
        del layer
        work.cuda.empty_cache()


def kernel_name(whole: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters.

    >>> kernel_name("void pnn_cuda::(anonymous namespace)::forward_kernel<pnn_cuda::Small, (pnn_cuda::Way)1>(Layer)")
    'forward_kernel<Small, 1>'
    """
    name = re.sub(
        r"^void |pnn_cuda::|\(anonymous namespace\)::|<unnamed>::|\((?:pnn_cuda::)?(?:Way|Fastest|Reading)\)", "", whole
    )
    return name.partition("(")[0]


def kernels_phase(work: Work) -> None:
    """Each kernel's own time in forward + backward, by PyTorch's profiler; beside the layer, the normalised one."""
    from torch_pnn import functional

    flush = torch.empty(2**16 if work.rehearse else FLUSHED_BYTES, dtype=torch.uint8, device=work.device)
    activity = torch.profiler.ProfilerActivity.CPU if work.rehearse else torch.profiler.ProfilerActivity.CUDA
    rows: list[dict[str, Any]] = []
    work.found.update(rows=rows, unfinished=[], errors=[])

    def normalised(layer: Layer) -> torch.Tensor:
        maps = layer.case[1] * layer.case[4]
        ones = torch.ones(maps, device=work.device)
        return functional.perturb_norm_conv2d(
            layer.x, layer.weight, None, ones, ones * 0, ones * 0, ones.clone(), training=True, seed=layer.seed,
            masks=layer.case[4], level=0.1,
        )  # fmt: skip

    for case in cases(work):
        for kind in (*KINDS, MMA_SYNC):
            for layout in LAYOUTS:
                for norm in (False, True) if kind != MMA_SYNC else (False,):
                    key = {"case": list(case), "type": kind, "layout": layout, "norm": norm}
                    if not work.time_left():
                        work.found["unfinished"].append(str(key))
                        continue
                    layer = Layer(work, case, kind, layout)
                    function = (lambda i=layer: normalised(i)) if norm else layer.ours  # type: ignore[misc]
                    step = layer.training(function)
                    try:
                        with arithmetic(kind):
                            raise_clock(work, step)
                            step()
                            with torch.profiler.profile(activities=[activity]) as profile:
                                for _ in range(5):
                                    flush.zero_()
                                    step()
                                work.cuda.synchronize()
                    except RuntimeError as error:
                        work.found["errors"].append(f"{key}: {str(error)[:300]}")
                        continue
                    times: dict[str, list[float]] = {}
                    for event in profile.events() or ():
                        if "pnn_cuda" in event.name:
                            times.setdefault(kernel_name(event.name), []).append(float(event.device_time))
                    median = {name: sorted(each)[len(each) // 2] for name, each in times.items()}
                    rows.append({**key, "kernels_us": median})
                    del layer, step, function
                    work.cuda.empty_cache()
        work.write()
    work.found["passed"] = not work.found["unfinished"] and not work.found["errors"]
    work.write()


def timings_phase(work: Work) -> None:
    """Case by case, ours first in every type, then what it is compared with."""
    flush = torch.empty(2**16 if work.rehearse else FLUSHED_BYTES, dtype=torch.uint8, device=work.device)
    one = torch.zeros(1, device=work.device)
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    work.found.update(rows=rows, errors=errors, unfinished=[])
    work.found["empty_graph_us"] = 1000 * milliseconds(work, lambda: one.add_(1), flush)

    def timed(row: dict[str, Any], name: str, layer: Layer, function: Callable[[], Any], kind: str = "") -> None:
        if not work.time_left():
            work.found["unfinished"].append(f"{row['case']} {row['type']} {row['layout']}: {name}")
            return
        try:
            with arithmetic(kind or layer.kind):
                row[name] = round(1000 * milliseconds(work, function, flush), 3)
        except RuntimeError as error:
            errors.append(f"{row['case']} {row['type']} {row['layout']}: {name}: {str(error)[:300]}")
            row[name] = None
            work.cuda.empty_cache()

    # Everywhere ours first, then what the targets are measured against, then the rest.
    for measure in (time_ours, time_compared, time_others):
        for case in cases(work):
            for kind in KINDS:
                for layout in LAYOUTS:
                    key = {"case": list(case), "type": kind, "layout": layout}
                    row = next((r for r in rows if all(r[k] == v for k, v in key.items())), None)
                    if row is None:
                        row = dict(key)
                        rows.append(row)
                    if measure is time_compared and layout != "contiguous":
                        continue
                    layer = Layer(work, case, kind, layout)
                    try:
                        measure(work, row, layer, timed)
                    except RuntimeError as error:
                        errors.append(f"{key}: {str(error)[:300]}")
                    del layer
                    work.cuda.empty_cache()
            work.write()
    work.found["passed"] = not errors and not work.found["unfinished"] and bool(rows)
    work.write()


def time_ours(work: Work, row: dict[str, Any], layer: Layer, timed: Callable[..., None]) -> None:
    """The layer, and what is predicted of it."""
    for direction in ("forward", "forward+backward"):
        prediction = predictions.predict(layer.case, layer.kind, direction, layer.layout, device=work.device_name)
        row[f"{direction} predicted"] = round(prediction.time_us, 3)
        row[f"{direction} bound"] = prediction.bound
    timed(row, "forward ours", layer, layer.forward(layer.ours))
    timed(row, "forward+backward ours", layer, layer.training(layer.ours))
    if layer.kind == "bfloat16":
        timed(row, "forward mma.sync", layer, layer.forward(layer.ours), MMA_SYNC)
        timed(row, "forward+backward mma.sync", layer, layer.training(layer.ours), MMA_SYNC)
    row["clock_mhz"] = clock(work)
    row["peak_bytes ours"] = peak_bytes(work, layer.ours, (layer.x, layer.weight))


def time_compared(work: Work, row: dict[str, Any], layer: Layer, timed: Callable[..., None]) -> None:
    """A copy of x, cuBLAS's product of the layer's size and torch.compile's composition, contiguous."""
    batch, channels, side, _, masks = layer.case
    y = torch.empty_like(layer.x.detach())
    timed(row, "copy", layer, lambda: y.copy_(layer.x.detach()))
    a, b = layer.weight.detach().flatten(1), layer.random(channels * masks, batch * side * side)
    timed(row, "cublas", layer, lambda a=a, b=b: a @ b)  # type: ignore[misc]
    del b
    if work.time_left():
        with arithmetic(layer.kind):
            compiled = compiled_layer()
            function = lambda: compiled(layer.x, layer.weight, layer.mask)  # noqa: E731
            timed(row, "forward compiled", layer, layer.forward(function))
            timed(row, "forward+backward compiled", layer, layer.training(function))


def time_others(work: Work, row: dict[str, Any], layer: Layer, timed: Callable[..., None]) -> None:
    """The plain composition and cuDNN's convolutions, on the same tensors; cuDNN takes its own choice of algorithms."""
    batch, channels, side, outputs, masks = layer.case
    timed(row, "forward plain", layer, layer.forward(layer.plain))
    timed(row, "forward+backward plain", layer, layer.training(layer.plain))
    if work.time_left():
        row["peak_bytes plain"] = peak_bytes(work, layer.plain, (layer.x, layer.weight))
    three = layer.random(outputs, channels, 3, 3, scale=(9 * channels) ** -0.5).requires_grad_()

    def convolution_3x3() -> torch.Tensor:
        return F.conv2d(layer.x, three, padding=1)

    timed(row, "forward cudnn 3x3", layer, layer.forward(convolution_3x3))
    timed(
        row, "forward+backward cudnn 3x3", layer,
        lambda: torch.autograd.grad(convolution_3x3(), (layer.x, three), layer.g),
    )  # fmt: skip
    ready = layer.random(batch, channels * masks, side, side).requires_grad_()
    timed(row, "forward cudnn 1x1", layer, layer.forward(lambda: F.conv2d(ready, layer.weight)))
    timed(
        row, "forward+backward cudnn 1x1", layer,
        lambda: torch.autograd.grad(F.conv2d(ready, layer.weight), (ready, layer.weight), layer.g),
    )  # fmt: skip


PHASES: dict[str, Callable[[Work], None]] = {
    "probe": probe,
    "reference": reference_phase,
    "device": device_phase,
    "kernels": kernels_phase,
    "compile": compile_phase,
    "timings": timings_phase,
}


def main() -> int:
    """Runs one phase; what it has found is in the file, and the exit status is 0 unless it broke."""
    parser = argparse.ArgumentParser(description="One phase of gpu_check.py.")
    parser.add_argument("phase", choices=sorted(PHASES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--part", type=lambda text: tuple(map(int, text.split("/"))), default=(0, 1))
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    PHASES[options.phase](Work(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
