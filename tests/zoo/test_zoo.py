"""`convert` and `restore` on models that others wrote: everything that worked before the conversion works after it."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten
from zoo_models import DETECTORS, ZOO, Model, call, positional_and_keyword

import torch_pnn
from torch_pnn.convert import convert
from torch_pnn.modules import PerturbConv2d

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own, of which there are many

STEPS = 3


@pytest.fixture(autouse=True)
def one_thread():
    """For models as small as these, more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def package_is_here(request):
    model = request.node.callspec.params.get("model") if hasattr(request.node, "callspec") else None
    pytest.importorskip(model.package if model else "torchvision")
    torch.manual_seed(0)


def tensors(output):
    """The floating-point tensors of an output of any structure."""
    return [t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]


def is_layer(module):
    return isinstance(module, (nn.Conv2d, PerturbConv2d, nn.ConvTranspose2d))


def layer_sizes(net, arguments):
    """What each convolution, or the layer in its place, puts out; without the batch: in a detector, proposals."""
    seen = {}
    handles = []
    for name, module in net.named_modules():
        if is_layer(module):
            hook = lambda m, i, o, name=name: seen.setdefault(name, []).append(tuple(o.shape[-3:]))  # noqa: E731
            handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        output = call(net, arguments)
    for handle in handles:
        handle.remove()
    return seen, output


def check_sizes(model: Model, net, pnn, size=None):
    arguments = model.arguments(model.images(2, size))
    net_sizes, net_output = layer_sizes(net, arguments)
    pnn_sizes, pnn_output = layer_sizes(pnn, arguments)
    assert pnn_sizes == net_sizes
    if model not in DETECTORS:
        assert [t.shape for t in tensors(pnn_output)] == [t.shape for t in tensors(net_output)]
        assert all(t.isfinite().all() for t in tensors(pnn_output))


def targets_of(images):
    """One box, label and mask for each image."""
    targets = []
    for image in images:
        height, width = image.shape[-2:]
        mask = torch.zeros(1, height, width, dtype=torch.uint8)
        mask[:, height // 4 : height // 2, width // 4 : width // 2] = 1
        box = torch.tensor([[width / 4, height / 4, width / 2, height / 2]])
        targets.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask})
    return targets


def loss_of(model: Model, pnn, images, seed):
    torch.manual_seed(seed)  # for dropout, stochastic depth and the sampling of proposals
    if model in DETECTORS:
        return sum(pnn(images, targets_of(images)).values())
    output = tensors(call(pnn, model.arguments(images)))[0]
    wanted = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    return (output - wanted).square().mean()


def check_training(model: Model, pnn):
    """A few steps down the gradient lower the loss: each aims at a loss that is lower by a fifth (Polyak's step)."""
    pnn.train()
    images = model.images(4)
    if model in DETECTORS:
        images = [torch.rand(3, 64, 80), torch.rand(3, 56, 64)]
    losses = []
    for _ in range(STEPS):
        pnn.zero_grad()
        loss = loss_of(model, pnn, images, 0)
        losses.append(loss.item())
        loss.backward()
        for name, parameter in pnn.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), name
        for module in pnn.modules():
            assert not isinstance(module, PerturbConv2d) or module.weight.grad is not None
        gradients = [parameter.grad for parameter in pnn.parameters() if parameter.grad is not None]
        step = 0.2 * losses[-1] / sum(gradient.square().sum() for gradient in gradients)
        with torch.no_grad():
            for parameter in pnn.parameters():
                if parameter.grad is not None:
                    parameter -= step * parameter.grad
    losses.append(loss_of(model, pnn, images, 0).item())
    assert losses[-1] < losses[0], losses
    pnn.zero_grad()
    pnn.eval()


def check_transformations(model: Model, pnn):
    arguments = model.arguments(model.images(2))
    args, kwargs = positional_and_keyword(arguments)
    with torch.no_grad():
        expected = tensors(call(pnn, arguments))
        runs = []
        if model.script and model not in DETECTORS:
            runs.append(call(torch.jit.script(pnn), arguments))
        elif model.script:
            runs.append(torch.jit.script(pnn)(*args)[1])  # a scripted detector returns losses and detections
        if model.trace:
            example = {"example_kwarg_inputs": kwargs} if kwargs else {"example_inputs": args}
            runs.append(call(torch.jit.trace(pnn, **example, check_trace=False, strict=False), arguments))
        if model.export:
            runs.append(torch.export.export(pnn, args, kwargs).module()(*args, **kwargs))
        for output in runs:
            for one, other in zip(tensors(output), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def check_repetition(pnn):
    again = convert(pnn, seed=9)
    assert again.conversion == pnn.conversion
    assert [type(module) for module in again.modules()] == [type(module) for module in pnn.modules()]
    for one, other in zip(again.state_dict().values(), pnn.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def check_restoration(net, pnn):
    converted = [row.name for row in pnn.conversion.converted]
    back = torch_pnn.restore(pnn, inplace=True)
    assert not hasattr(back, "conversion")
    assert [type(module) for module in back.modules()] == [type(module) for module in net.modules()]
    for name in converted:  # what was left has been trained meanwhile
        assert torch.equal(back.get_submodule(name).weight, net.get_submodule(name).weight), name
    back.load_state_dict(net.state_dict())


@pytest.mark.parametrize("model", ZOO, ids=lambda model: model.id)
def test_whatever_worked_still_works(model):
    net = model.small().eval()
    example = model.arguments(model.images(2))
    pnn = convert(net, seed=1, example_input=example, keep_original=True)
    assert convert(net, seed=1, example_input=example, dry_run=True).rows == pnn.conversion.rows
    for row in pnn.conversion.rows:
        assert row.converted == isinstance(pnn.get_submodule(row.name), PerturbConv2d)
        assert row.reason
    for size in (None, *model.other_sizes):
        check_sizes(model, net, pnn, size)
    check_transformations(model, pnn)
    check_repetition(pnn)
    check_training(model, pnn)
    check_restoration(net, pnn)


@pytest.mark.parametrize("model", ZOO, ids=lambda model: model.id)
def test_whatever_can_be_converted_keeps_its_sizes(model):
    """The stem, 1x1, depthwise, grouped: all that a predicate may ask for."""
    net = model.small().eval()
    pnn = convert(net, seed=1, predicate=lambda name, module: True)
    assert pnn.conversion.converted or model.name == "nf_resnet26"
    for row in pnn.conversion.left:
        assert row.reason.startswith(("transposed", "subclass"))
    for size in (None, *model.other_sizes):
        check_sizes(model, net, pnn, size)


@pytest.mark.parametrize("model", [model for model in ZOO if not model.script], ids=lambda model: model.id)
def test_what_is_not_scripted_could_not_be_before(model):
    with pytest.raises((RuntimeError, OSError)):
        torch.jit.script(model.small().eval())


@pytest.mark.parametrize("model", DETECTORS, ids=lambda model: model.id)
def test_detectors_see_images_of_changing_size(model):
    """In training and in evaluation; masks come from the seed, so that no size is refused."""
    pnn = convert(model.small().eval(), seed=1, example_input=model.arguments(model.images(2)))
    sizes = [((64, 80), (72, 64)), ((96, 64), (64, 64)), ((70, 91), (64, 130))]
    pnn.train()
    for pair in sizes:
        images = [torch.rand(3, *size) for size in pair]
        losses = pnn(images, targets_of(images))
        sum(losses.values()).backward()
        assert all(loss.isfinite() for loss in losses.values())
    pnn.eval()
    for pair in sizes:
        images = [torch.rand(3, *size) for size in pair]
        found = pnn(images)
        assert len(found) == 2
        for image, boxes in zip(images, (one["boxes"] for one in found), strict=True):
            assert boxes.isfinite().all() and (boxes <= max(image.shape) + 0.1).all()


def test_trained_masks_are_refused_where_a_layer_sees_several_sizes():
    model = next(model for model in DETECTORS if model.name.startswith("retinanet"))
    with pytest.raises(ValueError, match=r"head\..*reads several \(.*x.*\); leave it by the predicate"):
        convert(model.small(), train_masks=True, example_input=model.arguments(model.images(2)))
