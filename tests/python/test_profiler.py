"""What torch.profiler shows of the layer: names that a person recognises, with sizes, forward and backward."""

from __future__ import annotations

import json

import pytest
import torch
from operators_support import needs_derivatives
from torch import nn
from torch.profiler import ProfilerActivity, profile

from torch_pnn import PerturbConv2d

pytestmark = needs_derivatives


def names(events):
    return {event.key for event in events}


def profiled(function, **options):
    with profile(activities=[ProfilerActivity.CPU], **options) as found:
        function()
    return found


@pytest.mark.parametrize("norm, operator", [(False, "perturb_conv2d"), (True, "perturb_norm_conv2d")])
def test_forward_and_backward_show_under_their_names(norm, operator):
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=norm)
    x = torch.randn(2, 3, 6, 7, requires_grad=True)
    found = profiled(lambda: layer(x).sum().backward(), record_shapes=True)
    events = found.key_averages(group_by_input_shape=True)
    assert {f"torch_pnn::{operator}", f"torch_pnn::_{operator}_backward"} <= names(events)
    (forward,) = [event for event in events if event.key == f"torch_pnn::{operator}"]
    assert forward.count == 1 and forward.input_shapes[:2] == [[2, 3, 6, 7], [4, 3, 1, 1]]
    node = "PerturbNormConv2d" if norm else "PerturbConv2d"
    assert any(name.startswith("torch::autograd::CppNode<torch_pnn::") and node in name for name in names(events))


def test_the_node_of_the_graph_has_a_name():
    node = PerturbConv2d(3, 4, 3)(torch.randn(2, 3, 6, 7)).grad_fn
    assert "torch_pnn" in node.name() and "PerturbConv2d" in node.name()


def test_written_out_masks_show_too():
    layer = PerturbConv2d(3, 4, 3)
    assert "torch_pnn::perturbation_mask" in names(profiled(lambda: layer.perturbation(5, 5)).key_averages())


def test_a_trace_file_holds_the_names(tmp_path):
    layer = PerturbConv2d(3, 4, 3)
    found = profiled(lambda: layer(torch.randn(1, 3, 5, 5)))
    found.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert any(event.get("name") == "torch_pnn::perturb_conv2d" for event in events)


def test_the_stack_leads_to_the_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = PerturbConv2d(3, 4, 3)

        def forward(self, x):
            return self.first(x)

    model = Net()
    found = profiled(lambda: model(torch.randn(1, 3, 5, 5)), with_stack=True)
    assert any(name == "nn.Module: PerturbConv2d_0" for name in {event.name for event in found.events()})


@pytest.mark.slow
def test_a_compiled_model_shows_the_operators():
    model = torch.compile(nn.Sequential(PerturbConv2d(3, 4, 3), nn.ReLU()), fullgraph=True)
    x = torch.randn(2, 3, 6, 7)
    model(x).sum().backward()
    found = profiled(lambda: model(x).sum().backward())
    assert {"torch_pnn::perturb_conv2d", "torch_pnn::_perturb_conv2d_backward"} <= names(found.key_averages())
