"""ONNX: standard operators alone, checked in onnxruntime beside eager mode, at every batch and image size."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from graphs_support import Branches, every_layer, image_sizes, layers
from operators_support import ACTIVATIONS
from torch import nn
from torch.export import Dim

import torch_pnn
from torch_pnn import PerturbConv2d, export, functional, models

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.reference")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
QUIET = {"verbose": False}
WAYS = ("translated", "decomposed")


def exported(way, model, x, path, *, max_size=None, dynamic_shapes=None, **options):
    """Writes an ONNX file by the translation table or by the decomposition."""
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic_shapes)
    if way == "decomposed":
        program, max_size = export.decompose(program, max_size=64 if max_size is None else max_size), None
    return export.onnx(program, path=path, max_size=max_size, **options, **QUIET)


class Session:
    """A file checked and opened."""

    def __init__(self, path):
        self.model = onnx.load(path)
        onnx.checker.check_model(self.model, full_check=True)
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])

    @property
    def operators(self):
        """The kinds of nodes; there should be none of another domain."""
        assert {node.domain for node in self.model.graph.node} <= {"", "ai.onnx"} and not self.model.functions
        return [node.op_type for node in self.model.graph.node]

    @property
    def initializers(self):
        return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}

    def __call__(self, x):
        results = self.session.run(None, {self.session.get_inputs()[0].name: x.numpy()})
        return [torch.from_numpy(result) for result in results]


@pytest.mark.parametrize("way", WAYS)
def test_every_kind_of_layer_at_every_size(way, tmp_path):
    model = Branches(every_layer(ACTIVATIONS))
    exported(
        *(way, model, torch.randn(2, 4, 16, 16), tmp_path / "model.onnx"),
        max_size=(40, 24),
        dynamic_shapes=image_sizes(),
    )
    session = Session(tmp_path / "model.onnx")
    assert set(session.operators) >= {"Add", "Relu", "Conv", "MaxPool", "Pad", "Erf", "LeakyRelu", "Elu", "Selu"}
    for size in ((2, 4, 16, 16), (1, 4, 11, 21), (3, 4, 40, 24)):
        x = torch.randn(size)
        for (name, y), z in zip(model(x).items(), session(x), strict=True):
            torch.testing.assert_close(z, y, atol=2e-5, rtol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_a_layer_is_add_relu_conv(tmp_path):
    layer = PerturbConv2d(3, 4, 3, padding=1, seed=1).eval()
    exported("translated", layer, torch.randn(2, 3, 8, 8), tmp_path / "model.onnx", dynamic_shapes=({0: Dim("batch")},))
    session = Session(tmp_path / "model.onnx")
    assert session.operators == ["Add", "Relu", "Conv"]
    (stored,) = (value for name, value in session.initializers.items() if "_masks_8x8" in name)
    assert np.array_equal(stored, (0.1 * functional.perturbation_mask(1, 3, 1, 8, 8)).transpose(0, 1).numpy())


def test_masks_are_initializers_for_the_largest_image(tmp_path):
    model = layers().eval()
    exported(
        *("translated", model, torch.randn(2, 3, 16, 16), tmp_path / "model.onnx"),
        max_size=(40, 24),
        dynamic_shapes=image_sizes(8),
    )
    stored = Session(tmp_path / "model.onnx").initializers
    first = functional.perturbation_mask(1, 3, 1, 40, 24)
    second = functional.perturbation_mask(2, 8, 2, 20, 12, noise="waves")  # behind a stride
    assert np.array_equal(stored["0_masks_40x24"], (0.1 * first).transpose(0, 1).numpy())
    assert np.array_equal(stored["1_masks_20x12"], (0.1 * second).numpy())


@pytest.mark.parametrize("way", WAYS)
def test_a_larger_image_fails_with_the_limit_named(way, tmp_path):
    layer = PerturbConv2d(3, 4, 3, padding=1, seed=1).eval()
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    exported(*(way, layer, torch.randn(2, 3, 8, 8), tmp_path / "model.onnx"), max_size=(40, 24), dynamic_shapes=shapes)
    session = Session(tmp_path / "model.onnx")
    x = torch.randn(1, 3, 40, 24)
    torch.testing.assert_close(session(x)[0], layer(x), atol=2e-5, rtol=2e-5)
    for rows, columns in ((41, 8), (8, 25), (64, 64), (41, 24), (40, 25)):
        with pytest.raises(Exception, match=r"perturb_mask_limit_40x24_exceeded_in_\w+_(rows|columns)"):
            session(torch.zeros(1, 3, rows, columns))


def test_the_table_works_with_the_exporter_itself(tmp_path):
    model = layers(norm=True).eval()
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    table = export.onnx_translations(max_size=(32, 48))
    for optimize in (True, False):
        torch.onnx.export(
            *(model, (torch.randn(2, 3, 16, 16),), tmp_path / "model.onnx"),
            dynamic_shapes=shapes,
            custom_translation_table=table,
            optimize=optimize,
            **QUIET,
        )
        session = Session(tmp_path / "model.onnx")
        assert "BatchNormalization" not in session.operators
        x = torch.randn(3, 3, 31, 48)
        torch.testing.assert_close(session(x)[0], model(x), atol=2e-5, rtol=2e-5)
        with pytest.raises(Exception, match="perturb_mask_limit_32x48_exceeded_in_0_rows"):
            session(torch.zeros(1, 3, 33, 48))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("train_masks", [False, True])
def test_stored_masks(way, train_masks, tmp_path):
    model = nn.Sequential(
        PerturbConv2d(3, 4, 3, 2, 1, mask_size=(8, 9), train_masks=train_masks, downsample="subsample"),
        PerturbConv2d(4, 4, 1, mask=torch.randn(1, 2, 4, 5), masks=2, groups=2),
    ).eval()
    exported(way, model, torch.randn(2, 3, 8, 9), tmp_path / "model.onnx", dynamic_shapes=({0: Dim("batch")},))
    session = Session(tmp_path / "model.onnx")
    for batch in (1, 5):
        x = torch.randn(batch, 3, 8, 9)
        torch.testing.assert_close(session(x)[0], model(x), atol=2e-5, rtol=2e-5)


def test_an_unbatched_image_in_half_precision(tmp_path):
    model = layers(norm=True).eval().half()
    x = torch.randn(3, 16, 12).half()
    exported("translated", model, x, tmp_path / "model.onnx")
    torch.testing.assert_close(Session(tmp_path / "model.onnx")(x)[0], model(x), atol=5e-3, rtol=5e-3)


def test_double_precision_in_the_interpreter_of_the_standard(tmp_path):
    # onnxruntime has no convolution of float64 on the CPU.
    model = nn.Sequential(PerturbConv2d(3, 4, 3, padding=1, masks=2, norm=True, seed=1)).eval().double()
    x = torch.randn(2, 3, 6, 5).double()
    exported("translated", model, x, tmp_path / "model.onnx")
    interpreter = onnx.reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    (y,) = interpreter.run(None, {interpreter.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), atol=1e-12, rtol=1e-12)


def test_training_mode_normalises_with_the_batch(tmp_path):
    layer = PerturbConv2d(3, 4, 3, padding=1, norm=True, seed=1)
    x = torch.randn(4, 3, 9, 8) + 2
    exported("translated", copy.deepcopy(layer), x, tmp_path / "model.onnx", dynamic_shapes=({0: Dim("batch")},))
    torch.testing.assert_close(Session(tmp_path / "model.onnx")(x)[0], layer(x), atol=5e-5, rtol=5e-5)


def test_a_layer_called_at_two_sizes_has_masks_for_both(tmp_path):
    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = PerturbConv2d(3, 3, 3, padding=1, seed=3)

        def forward(self, x):
            return self.head(x), self.head(nn.functional.max_pool2d(self.head(x), 2))

    model = Pyramid().eval()
    x = torch.randn(2, 3, 16, 16)
    exported("translated", model, x, tmp_path / "model.onnx", max_size=32, dynamic_shapes=image_sizes())
    session = Session(tmp_path / "model.onnx")
    assert {"head_masks_32x32", "head_masks_16x16"} <= session.initializers.keys()
    x = torch.randn(1, 3, 9, 32)
    for y, z in zip(model(x), session(x), strict=True):
        torch.testing.assert_close(z, y, atol=2e-5, rtol=2e-5)


def test_a_residual_network(tmp_path):
    model = models.noise_resnet18(10, width=4, seed=1).eval()
    x = torch.randn(2, 3, 32, 32)
    program = export.onnx(
        *(model, (x,), tmp_path / "model.onnx"),
        max_size=48,
        dynamic_shapes=image_sizes(16),
        input_names=["image"],
        output_names=["scores"],
        **QUIET,
    )
    assert [value.name for value in program.model.graph.inputs] == ["image"]
    session = Session(tmp_path / "model.onnx")
    for size in ((1, 3, 48, 33), (3, 3, 32, 32)):
        x = torch.randn(size)
        torch.testing.assert_close(session(x)[0], model(x), atol=1e-4, rtol=1e-4)


def test_what_cannot_be_stored_is_refused_at_export():
    model = layers().eval()
    x = torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"no upper bound .* give max_size=\(rows, columns\) of the largest image"):
        export.onnx(model, (x,), dynamic_shapes=image_sizes(8), **QUIET)
    with pytest.raises(TypeError, match=r"max_size is 'big', it should be a pair"):
        export.onnx(model, (x,), max_size="big", **QUIET)
    with pytest.raises(TypeError, match=r"model is Tensor, it should be a module or a torch.export.ExportedProgram"):
        export.onnx(x, (x,), **QUIET)
    with pytest.raises(TypeError, match=r"then args, kwargs and dynamic_shapes should be left out"):
        export.onnx(torch.export.export(model, (x,)), (x,), **QUIET)

    class Seeded(nn.Module):
        def forward(self, x, seed):
            return functional.perturb_conv2d(x, torch.ones(1, 3, 1, 1), seed=seed)

    with pytest.raises(ValueError, match=r"the seed of .* is an input of the program \(seed\)"):
        export.onnx(Seeded(), (x, torch.tensor([1])), **QUIET)


def test_without_onnxscript_the_message_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.delitem(sys.modules, "torch_pnn._onnx", raising=False)
    monkeypatch.delattr(torch_pnn, "_onnx", raising=False)
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(ImportError, match=r"pip install onnxscript"):
        export.onnx_translations(max_size=8)
