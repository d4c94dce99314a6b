"""`torch_pnn.summary`: the counts by hand, every kind of layer, and a model that is afterwards as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import torch_pnn
from torch_pnn import LBConv2d, PerturbConv2d, models, summary

NUMBERS = ("parameters", "mask_bytes", "multiply_adds", "adds", "activations")


def numbers(row):
    return tuple(getattr(row, name) for name in NUMBERS)


def only(model, size, **options):
    """The one row of a model that is one layer."""
    (row,) = summary(model, size, **options).rows
    return numbers(row)


def test_a_perturbation_layer_by_hand():
    # 5x6 pixels, 4 channels, 3 masks each: 12 maps; 8 outputs.
    layer = PerturbConv2d(4, 8, 3, padding=1, masks=3)
    pixels = 5 * 6
    assert only(layer, (4, 5, 6)) == (8 * 12 + 8, 8, pixels * 8 * 12, pixels * (12 + 8), pixels * 12)


@pytest.mark.parametrize(
    "options, adds, activations, mask_bytes",
    [
        ({"bias": False}, 12, 12, 8),
        ({"noise": None}, 8, 12, 0),
        ({"level": 0}, 8, 12, 0),
        ({"activation": "identity"}, 20, 0, 8),
        ({"activation": "gelu"}, 20, 12, 8),
        ({"shared_masks": True}, 20, 12, 8),
        ({"groups": 2}, 20, 12, 8),
        ({"mask_size": (5, 6)}, 20, 12, 4 * 3 * 30 * 4),
        ({"norm": True}, 20 + 12, 12, 8),
    ],
)
def test_options_by_hand(options, adds, activations, mask_bytes):
    layer = PerturbConv2d(4, 8, 3, padding=1, masks=3, **options)
    found = summary(layer, (4, 5, 6))
    learnt = sum(p.numel() for p in layer.parameters())
    macs = 30 * 8 * 12 // layer.groups
    assert numbers(found) == (learnt, mask_bytes, macs, 30 * adds, 30 * activations)
    assert macs == layer.multiply_adds(5, 6)


@pytest.mark.parametrize("downsample, pixels", [("max", 81), ("avg", 81), ("subsample", 25)])
def test_a_stride_counts_the_computed_pixels(downsample, pixels):
    layer = PerturbConv2d(4, 6, 3, 2, 1, masks=5, downsample=downsample)
    assert only(layer, (4, 9, 9)) == (126, 8, pixels * 6 * 20, pixels * (20 + 6), pixels * 20)


def test_how_masks_are_held():
    held = {
        "seed": PerturbConv2d(2, 3, 1),
        "stored": PerturbConv2d(2, 3, 1, mask=torch.zeros(2, 1, 4, 4)),
        "trained": PerturbConv2d(2, 3, 1, mask_size=4, train_masks=True),
        "": PerturbConv2d(2, 3, 1, noise=None),
        "filters": LBConv2d(2, 3),
    }
    for masks, layer in held.items():
        (row,) = summary(layer, (2, 4, 4)).rows
        assert row.masks == masks and row.mask_bytes == layer.mask_bytes


def test_other_layers_by_hand():
    pixels = 25
    assert only(nn.Conv2d(4, 8, 3, padding=1), (4, 5, 5)) == (296, 0, pixels * 8 * 36, pixels * 8, 0)
    assert only(nn.Conv2d(4, 8, 3, groups=4, bias=False), (4, 5, 5)) == (72, 0, 9 * 8 * 9, 0, 0)
    assert only(nn.ConvTranspose2d(8, 4, 2, 2, groups=2), (8, 5, 5)) == (68, 0, 25 * 8 * 2 * 4, 100 * 4, 0)
    assert only(nn.Conv1d(2, 3, 3), (2, 7)) == (21, 0, 5 * 3 * 6, 15, 0)
    assert only(nn.Linear(10, 4), (10,)) == (44, 0, 40, 4, 0)
    assert only(nn.Linear(10, 4), (6, 10)) == (44, 0, 240, 24, 0)
    assert only(nn.BatchNorm2d(4), (4, 5, 5)) == (8, 0, 0, 100, 0)
    assert only(nn.GroupNorm(2, 4), (4, 5, 5)) == (8, 0, 0, 100, 0)
    assert only(nn.LayerNorm(10), (3, 10)) == (20, 0, 0, 30, 0)
    assert only(nn.ReLU(inplace=True), (4, 5, 5)) == only(nn.GELU(), (4, 5, 5)) == (0, 0, 0, 0, 100)
    layer = LBConv2d(4, 6, anchors=5)
    fixed = 5 * 4 * 9 * 4
    assert only(layer, (4, 7, 7)) == (36, fixed, 49 * (5 * 36 + 5 * 6), 49 * 6, 49 * 5)
    assert only(layer, (4, 7, 7))[2] == layer.multiply_adds(7, 7)
    assert summary(nn.MaxPool2d(2), (4, 5, 5)).rows == ()


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = PerturbConv2d(4, 4, 3, padding=1, bias=False)
        self.table = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        y = nn.functional.relu(self.body(x) + x)
        return torch.einsum("bchw,cd->bdhw", y, self.table)


def test_functions_count_for_the_module_that_calls_them():
    model = nn.Sequential(Shortcut())
    rows = {row.name: row for row in summary(model, (4, 3, 3)).rows}
    assert numbers(rows["0"]) == (16, 0, 36 * 4, 36, 36)
    assert rows["0"].kind == "Shortcut" and rows["0"].output_size == (1, 4, 3, 3)
    assert rows["0.body"].multiply_adds == 36 * 4


def test_attention_is_counted_in_evaluation():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = summary(layer, (5, 8))
    # Projections of query, key, value and output, two linear layers; scores and their product with the values.
    assert found.multiply_adds == 5 * (3 * 64 + 64 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert torch.backends.mha.get_fastpath_enabled()


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.vector = PerturbConv2d(3, 4, 3, padding=1), nn.Linear(6, 4)

    def forward(self, image, vector=None, *, scale=1.0):
        y = self.image(image)
        return {"y": y if vector is None else y + self.vector(vector)[:, :, None, None] * scale}


def test_several_inputs():
    model = Two()
    by_size = summary(model, [(3, 5, 5), (6,)])
    assert by_size == summary(model, inputs=(torch.zeros(1, 3, 5, 5), torch.zeros(1, 6)))
    assert by_size == summary(model, inputs={"image": torch.ones(1, 3, 5, 5), "vector": torch.ones(1, 6), "scale": 2.0})
    assert [row.kind for row in by_size.rows] == ["Two", "PerturbConv2d", "Linear"]
    assert by_size.rows[0].output_size == (1, 4, 5, 5)
    alone = summary(model, (3, 5, 5))
    assert alone.multiply_adds == by_size.multiply_adds - 24 and alone.parameters == by_size.parameters
    batch = summary(model, inputs=torch.zeros(7, 3, 5, 5))
    assert batch.multiply_adds == 7 * alone.multiply_adds and batch.parameters == alone.parameters


def test_integer_inputs_need_inputs():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=r"an example of input_size \(5,\) doesn't run through the model"):
        summary(model, (5,))
    assert summary(model, inputs=torch.arange(5)).multiply_adds == 5 * 24


def test_shared_modules_and_parameters():
    shared = PerturbConv2d(2, 2, 3, padding=1)
    found = summary(nn.Sequential(shared, nn.ReLU(), shared), (2, 4, 4))
    assert found.rows[0].calls == 2 and found.rows[0].multiply_adds == 2 * 16 * 4
    assert found.parameters == 6 and found.mask_bytes == 8
    tied = nn.Sequential(nn.Conv2d(2, 2, 3, bias=False), nn.Conv2d(2, 2, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert summary(tied, (2, 6, 6)).parameters == 36
    tied[0].requires_grad_(False)
    assert summary(tied, (2, 6, 6)).parameters == 0


@pytest.mark.parametrize("layer", ["perturb", "conv", "lbc", "conv1x1"])
def test_a_network_agrees_with_pytorchs_counter_and_the_studies_count(layer):
    model = models.noise_resnet18(width=4, layer=layer)
    found = summary(model, (3, 16, 16))
    with FlopCounterMode(display=False) as mode, torch.no_grad():
        model.eval()(torch.zeros(1, 3, 16, 16))
    assert 2 * found.multiply_adds == mode.get_total_flops()
    counted = models.costs(model, (3, 16, 16))
    assert (counted.parameters, counted.mask_bytes, counted.macs) == numbers(found)[:3]
    assert found.parameters == sum(p.numel() for p in model.parameters())
    for name in NUMBERS:
        assert getattr(found, name) == sum(getattr(row, name) for row in found.rows)


class Restless(nn.Module):
    """Does in its forward all that a careless module may do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(1))

    def forward(self, x):
        self.count.add_(1)
        self.last = torch.ones(1)
        x = x + torch.rand_like(x)
        return nn.functional.batch_norm(x, self.norm.running_mean, self.norm.running_var, training=True)


def test_the_model_and_the_generators_are_as_before():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3), Restless(), PerturbConv2d(3, 4, 3, norm=True), nn.Dropout(), nn.BatchNorm2d(4)
    )
    model[4].eval()
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    objects = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    generator = torch.get_rng_state()
    found = summary(model, (3, 9, 9))
    assert found.multiply_adds > 0
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in model.modules()] == modes
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == objects
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert summary(model, (3, 9, 9)) == found


def test_a_failure_leaves_the_model_as_before():
    model = nn.Sequential(PerturbConv2d(3, 4, 3, norm=True), nn.Linear(2, 2)).train()
    with pytest.raises(ValueError, match=r"input_size \(3, 9, 9\) doesn't run through the model \(RuntimeError: "):
        summary(model, (3, 9, 9))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_inner_normalisation_stays_inside():
    layer = PerturbConv2d(3, 4, 3, norm=True)
    (row, norm) = summary(layer, (3, 9, 9)).rows
    assert row.adds == 49 * (3 + 3 + 4) and (norm.name, norm.parameters, norm.adds) == ("norm", 6, 0)
    # With hooks of a user on it the layer forms its maps, and they are counted as what they are.
    layer.norm.register_forward_hook(lambda *_: None)
    again = summary(layer, (3, 9, 9))
    assert numbers(again)[:3] == numbers(summary(PerturbConv2d(3, 4, 3, norm=True), (3, 9, 9)))[:3]


def test_on_the_meta_device_nothing_is_computed():
    with torch.device("meta"):
        model = models.noise_resnet50(width=64, stem="imagenet", num_classes=1000)
    found = summary(model, (3, 224, 224))
    assert found.multiply_adds > 10**8 and next(model.parameters()).is_meta


def test_fake_tensors_are_counted():
    wanted = summary(models.lenet(width=4, norm=True), (1, 28, 28))
    with FakeTensorMode():
        assert summary(models.lenet(width=4, norm=True), (1, 28, 28)) == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    model = models.lenet(width=4)
    size = (1, 28, 28)
    wanted = summary(model, size)
    found = summary(model.to(dtype), size)
    assert [numbers(row) for row in found.rows] == [numbers(row) for row in wanted.rows]


def test_inside_of_inference_mode_and_compiled():
    model = nn.Sequential(PerturbConv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5))
    wanted = summary(model, (3, 5, 5))
    with torch.inference_mode():
        assert numbers(summary(model, (3, 5, 5))) == numbers(wanted)
    compiled = nn.Sequential(torch.compile(model, fullgraph=True))
    assert numbers(summary(compiled, (3, 5, 5))) == numbers(wanted)


def test_the_table():
    found = summary(nn.Sequential(PerturbConv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()), (3, 32, 32))
    lines = str(found).splitlines()
    assert lines[0].split("  ")[0] == "layer" and len(lines) == 5
    assert lines[-1].split() == ["sum", "384", "8", "196,608", "134,144", "68,608"]
    assert all(line == line.rstrip() for line in lines)
    table = found.to_markdown().splitlines()
    assert table[0] == (
        "| layer | kind | output | masks | parameters | mask bytes | multiply-adds | adds | activations |"
    )
    assert table[1].count("---") == 9 and len(table) == 6
    assert table[2] == "| 0 | PerturbConv2d | 1x64x32x32 | seed | 256 | 8 | 196,608 | 68,608 | 3,072 |"
    again = json.loads(json.dumps(found.to_dict()))
    assert again["multiply_adds"] == 196608 and again["rows"][0]["output_size"] == [1, 64, 32, 32]
    assert str(summary(nn.Identity(), (3,))).splitlines()[-1].split() == ["sum", "0", "0", "0", "0", "0"]
    assert "(model)" in str(summary(nn.ReLU(), (3,)))


@pytest.mark.parametrize("size", [8, "388", (3, 8.0, 8), (3, -1, 8), (True, 8, 8), [(3, 8, 8), 4], {3, 8}])
def test_wrong_sizes_are_refused(size):
    with pytest.raises(ValueError, match=r"input_size is .*, it should be a size without the batch"):
        summary(nn.Conv2d(3, 3, 3), size)


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match=r"model is of type str, should be an nn.Module"):
        summary("model", (3, 8, 8))
    with pytest.raises(ValueError, match=r"input_size and inputs are both None, it should be one of them"):
        summary(nn.ReLU())
    with pytest.raises(ValueError, match=r"input_size and inputs are both given, it should be one of them"):
        summary(nn.ReLU(), (3,), inputs=torch.zeros(3))
    with pytest.raises(TypeError, match=r"inputs is int, it should be a tensor, a tuple of arguments or a dict"):
        summary(nn.ReLU(), inputs=3)
    with pytest.raises(ValueError, match=r"the parameter 'weight' has no size yet: run the model once before"):
        summary(nn.LazyConv2d(3, 3), (3, 8, 8))
    assert isinstance(torch_pnn.summary(nn.ReLU(), (3,)).rows, tuple)
