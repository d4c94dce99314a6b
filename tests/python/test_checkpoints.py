"""Loading what the published code saved: both kinds of modules, whole networks, lost masks, and bad files."""

import pytest
import torch
from torch import nn

from torch_pnn import models
from torch_pnn.checkpoints import MissingMasksError, adopt, load_noise_resnet, noise_layers, read
from torch_pnn.modules import PerturbConv2d


class NoiseLayer(nn.Module):
    """Behaves as the authors' module does: the same children, a mask drawn at the first forward and not registered."""

    def __init__(self, channels, planes, level):
        super().__init__()
        self.__dict__["noise"] = torch.empty(0)
        self.level = level
        self.layers = nn.Sequential(nn.ReLU(True), nn.BatchNorm2d(channels), nn.Conv2d(channels, planes, 1))

    def forward(self, x):
        if self.noise.numel() == 0:
            self.__dict__["noise"] = self.level * torch.empty(x.shape[1:]).uniform_(-1, 1)
        return self.layers(x + self.noise)


class PerturbLayer(nn.Module):
    """Behaves as the reimplementation's module does: registered masks without the level, a grouped 1x1, mixing."""

    def __init__(
        self, channels, planes, nmasks, size, level, act, *, unique=True, mix=False, use_act=True, train=False
    ):
        super().__init__()
        shape = (1, channels if unique else 1, nmasks, size, size)
        self.noise = nn.Parameter(torch.empty(shape).uniform_(-1, 1), requires_grad=train)
        self.level, self.act, self.use_act, self.mix_maps, self.train_masks = level, act, use_act, mix, train
        self.layers = nn.Sequential(
            nn.Conv2d(channels * nmasks, planes, 1, groups=channels if nmasks > 1 else 1), nn.BatchNorm2d(planes), act
        )
        if mix:
            self.mix_layers = nn.Sequential(nn.Conv2d(planes, planes, 1), nn.BatchNorm2d(planes), act)

    def forward(self, x):
        y = x.unsqueeze(2) + self.noise * self.level
        y = self.layers((self.act(y) if self.use_act else y).flatten(1, 2))
        return self.mix_layers(y) if self.mix_maps else y


class NoiseBasicBlock(nn.Module):
    def __init__(self, channels, planes, stride, shortcut):
        super().__init__()
        self.layers = nn.Sequential(
            NoiseLayer(channels, planes, 0.1),
            nn.MaxPool2d(stride, stride),
            nn.BatchNorm2d(planes),
            nn.ReLU(True),
            NoiseLayer(planes, planes, 0.1),
            nn.BatchNorm2d(planes),
        )
        self.shortcut = shortcut

    def forward(self, x):
        return torch.relu(self.layers(x) + (x if self.shortcut is None else self.shortcut(x)))


class NoiseBottleneck(nn.Module):
    def __init__(self, channels, planes, stride, shortcut):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(True),
            NoiseLayer(planes, planes, 0.1),
            nn.MaxPool2d(stride, stride),
            nn.BatchNorm2d(planes),
            nn.ReLU(True),
            nn.Conv2d(planes, 4 * planes, 1, bias=False),
            nn.BatchNorm2d(4 * planes),
        )
        self.shortcut = shortcut

    forward = NoiseBasicBlock.forward


class NoiseResNet(nn.Module):
    """A network with the names and the arithmetic of the authors' residual networks."""

    def __init__(self, depths, width, classes, kernel=7, bottleneck=False):
        super().__init__()
        stem = [
            nn.Conv2d(3, width, kernel, 2 if kernel == 7 else 1, kernel // 2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        ]
        if kernel == 7:
            stem.append(nn.MaxPool2d(3, 2, 1))
        self.pre_layers = nn.Sequential(*stem)
        channels, grow = width, 4 if bottleneck else 1
        for stage, depth in enumerate(depths):
            planes, blocks = width * 2**stage, []
            for index in range(depth):
                stride = 2 if stage and index == 0 else 1
                shortcut = None
                if stride != 1 or channels != planes * grow:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, planes * grow, 1, stride, bias=False), nn.BatchNorm2d(planes * grow)
                    )
                block = NoiseBottleneck if bottleneck else NoiseBasicBlock
                blocks.append(block(channels, planes, stride, shortcut))
                channels = planes * grow
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.pre_layers(x)))))
        return self.linear(x.mean((2, 3)))


def trained(model, *size):
    """Statistics, biases and masks that aren't the initial ones."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, *size))
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def masks_of(model):
    return {name: module.noise for name, module in model.named_modules() if isinstance(module, NoiseLayer)}


# Modules


def test_noise_layer():
    model = trained(nn.Sequential(NoiseLayer(4, 6, 0.2)), 4, 5, 7)
    adopted = adopt(model)
    assert type(adopted[0]) is PerturbConv2d and type(model[0]) is NoiseLayer
    input = torch.randn(3, 4, 5, 7)
    torch.testing.assert_close(adopted(input), model(input))
    torch.testing.assert_close(adopted.train()(input), model.train()(input))


def test_noise_layer_saves_its_mask_now():
    model = trained(nn.Sequential(NoiseLayer(4, 6, 0.2)), 4, 5, 7)
    assert not any("noise" in name for name in model.state_dict())
    adopted = adopt(model)
    fresh = adopt(trained(nn.Sequential(NoiseLayer(4, 6, 0.2)), 4, 5, 7))
    fresh.load_state_dict(adopted.state_dict())
    input = torch.randn(2, 4, 5, 7)
    assert torch.equal(adopted(input), fresh(input))


@pytest.mark.parametrize("nmasks", [1, 3])
@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize("act, use_act", [(nn.ReLU(), True), (nn.Tanh(), True), (nn.ELU(), True), (nn.ReLU(), False)])
def test_perturb_layer(nmasks, unique, mix, act, use_act):
    layer = PerturbLayer(2, 4, nmasks, 6, 0.5, act, unique=unique, mix=mix, use_act=use_act)
    model = trained(nn.Sequential(layer), 2, 6, 6)
    adopted = adopt(model)
    assert type(adopted[0][0]) is PerturbConv2d
    input = torch.randn(3, 2, 6, 6)
    torch.testing.assert_close(adopted(input), model(input))


def test_trained_masks_stay_trained():
    model = nn.Sequential(PerturbLayer(2, 4, 3, 6, 0.5, nn.ReLU(), train=True))
    adopted = adopt(model)
    assert isinstance(adopted[0][0].mask, nn.Parameter)
    input = torch.randn(3, 2, 6, 6)
    adopted(input).square().sum().backward()
    model(input).square().sum().backward()
    torch.testing.assert_close(adopted[0][0].mask.grad, model[0].noise.grad[0], rtol=1e-4, atol=1e-4)


def test_adopt_in_place_and_at_the_root():
    model = trained(nn.Sequential(NoiseLayer(4, 6, 0.2)), 4, 5, 5)
    assert adopt(model, inplace=True) is model and type(model[0]) is PerturbConv2d
    assert type(adopt(trained(NoiseLayer(4, 6, 0.2), 4, 5, 5))) is PerturbConv2d


def test_lost_masks_are_refused_by_name():
    model = nn.Sequential(NoiseLayer(4, 6, 0.2), NoiseLayer(6, 6, 0.2))
    with pytest.raises(MissingMasksError, match=r"masks of 2 layers \(0, 1\).*noise=.*new_masks_seed"):
        adopt(model)
    assert type(model[0]) is NoiseLayer


def test_masks_given_and_drawn():
    model = nn.Sequential(NoiseLayer(4, 6, 0.2)).eval()
    noise = 0.2 * torch.rand(4, 5, 5)
    adopted = adopt(model, noise={"0": noise})
    model[0].__dict__["noise"] = noise
    input = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(adopted(input), model(input))
    model[0].__dict__["noise"] = torch.empty(0)
    drawn = adopt(model, new_masks_seed=5)
    assert drawn[0].level == 0.2 and drawn[0].mask is None and drawn(torch.randn(1, 4, 9, 3)).shape == (1, 6, 9, 3)


@pytest.mark.parametrize(
    "build, options, error, words",
    [
        (lambda: "model", {}, TypeError, "model is of type str"),
        (lambda: nn.Sequential(nn.ReLU()), {}, ValueError, "nothing to adopt"),
        (
            lambda: nn.Sequential(NoiseLayer(4, 6, 1.0)),
            {"noise": {"0": torch.zeros(3, 5, 5)}},
            ValueError,
            r"0: its noise has shape \(3, 5, 5\), should be \[4, H, W\]",
        ),
        (lambda: nn.Sequential(NoiseLayer(4, 6, 1.0)), {"new_masks_seed": "x"}, TypeError, "seed is 'x'"),
        (lambda: nn.Sequential(PerturbLayer(2, 4, 1, 5, 0.1, nn.PReLU())), {}, ValueError, "0: its activation PReLU"),
    ],
)
def test_adopt_refusals(build, options, error, words):
    with pytest.raises(error, match=words):
        adopt(build(), **options)


def test_unknown_forms_are_refused():
    model = nn.Sequential(NoiseLayer(4, 6, 0.1))
    model[0].layers[1] = nn.Identity()
    with pytest.raises(ValueError, match="0: a NoiseLayer of .*Identity.*should be of"):
        adopt(model, new_masks_seed=0)
    model = nn.Sequential(PerturbLayer(2, 4, 1, 5, 0.1, nn.ReLU()))
    model[0].layers = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), model[0].layers[0])
    with pytest.raises(ValueError, match="0: a PerturbLayer whose 1x1 isn't the first"):
        adopt(model)


# Networks


@pytest.mark.parametrize(
    "depths, bottleneck, kernel, size",
    [
        ((2, 2, 2, 2), False, 7, 64),
        ((2, 2, 2, 2), False, 3, 16),
        ((3, 4, 6, 3), False, 7, 32),
        ((3, 4, 6, 3), True, 7, 32),
    ],
)
def test_networks(depths, bottleneck, kernel, size):
    published = trained(NoiseResNet(depths, 2, 5, kernel, bottleneck), 3, size, size)
    assert set(noise_layers(published.state_dict())) == set(masks_of(published))
    ours = load_noise_resnet(published.state_dict(), noise=masks_of(published)).eval()
    assert isinstance(ours, models.ResNet)
    assert len(ours.layer3) == depths[2]
    input = torch.randn(2, 3, size, size)
    torch.testing.assert_close(ours(input), published(input), rtol=1e-4, atol=1e-4)


def test_network_from_a_file(tmp_path):
    published = trained(NoiseResNet((2, 2, 2, 2), 2, 5, 3), 3, 8, 8)
    state = {f"module.{name}": tensor for name, tensor in published.state_dict().items()}
    state.update({f"module.{name}.noise": mask for name, mask in masks_of(published).items()})
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model_epoch_3.pth")
    ours = load_noise_resnet(tmp_path / "model_epoch_3.pth").eval()
    input = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(ours(input), published(input), rtol=1e-4, atol=1e-4)


def test_network_without_masks():
    published = trained(NoiseResNet((2, 2, 2, 2), 2, 5, 3), 3, 8, 8)
    with pytest.raises(
        MissingMasksError, match="masks of 16 layers .*layer1.0.layers.0, .*draws them at the first forward"
    ):
        load_noise_resnet(published.state_dict())
    ours = load_noise_resnet(published.state_dict(), new_masks_seed=1)
    layers = [module for module in ours.modules() if isinstance(module, PerturbConv2d)]
    assert len(layers) == 16 and len({int(layer.mask_seed) for layer in layers}) == 16
    assert torch.equal(layers[0].weight, published.layer1[0].layers[0].layers[2].weight)
    ours(torch.randn(2, 3, 8, 8)).sum().backward()


def test_other_state_dicts_are_refused():
    with pytest.raises(ValueError, match="isn't one of the published residual networks.*pre_layers.0.weight"):
        load_noise_resnet({"conv.weight": torch.zeros(1)})
    state = NoiseResNet((1, 1, 1, 1), 2, 5, 3).state_dict()
    with pytest.raises(ValueError, match=r"stages of \(1, 1, 1, 1\) blocks"):
        load_noise_resnet(state, new_masks_seed=0)
    state = NoiseResNet((2, 2, 2, 2), 2, 5, 3).state_dict()
    del state["layer2.0.layers.2.running_mean"]
    with pytest.raises(ValueError, match="layer2.0.layers.2.running_mean is missing"):
        load_noise_resnet(state, new_masks_seed=0)
    state = NoiseResNet((2, 2, 2, 2), 2, 5, 3).state_dict()
    state["linear.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="no place for linear.extra"):
        load_noise_resnet(state, new_masks_seed=0)


# Files


def test_read_refuses_what_is_no_state_dict(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "missing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no tensors by name"):
        read(tmp_path / "list.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"whole pickled model.*save its state_dict\(\)"):
        read(tmp_path / "whole.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(ValueError, match="can't be read as a file of tensors"):
        read(tmp_path / "text.pth")
