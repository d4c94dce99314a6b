"""Networks of the studies: which convolutions arms replace, our own networks, and somebody's from module:function."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

from torch_pnn import models
from torch_pnn.ablation import networks
from torch_pnn.ablation.errors import UsageError
from torch_pnn.convert import convert
from torch_pnn.modules import PerturbConv2d

SHAPE = (3, 16, 16)
OURS = ("resnet", "lenet", "cifarnet", "noise_resnet18", "noise_resnet50")

MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, channels, width):
        super().__init__()
        self.pointwise = nn.Conv2d(width, width, 1)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.convolution = nn.Conv2d(width, width, 3, 2, 1)
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Linear(width, classes)

    def forward(self, x):
        x = self.pointwise(self.first(x)).relu()
        return self.last(self.norm(self.convolution(x)).mean((2, 3)))

def net(classes, in_channels, image_size, width=4, extra=0):
    assert isinstance(width, int) and len(image_size) == 2
    return Net(classes + extra, in_channels, width)

def narrow(classes):
    return Net(classes, 3, 4)

def plain(classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

def linear(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(768, classes))

def nothing(classes):
    return 3

def wrong(classes):
    raise RuntimeError("no such luck")

def picky(classes):
    return nn.Sequential(nn.Conv2d(5, 4, 3), nn.Conv2d(4, 4, 3))

def empty():
    return linear(1)

number = 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module in the working directory, forgotten afterwards."""
    name = "somebodys_networks"
    (tmp_path / f"{name}.py").write_text(MINE)
    (tmp_path / "broken_networks.py").write_text("import no_such_thing_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    networks._find_places.cache_clear()
    yield name
    sys.modules.pop(name, None)
    networks._find_places.cache_clear()


@pytest.mark.parametrize("name", OURS)
def test_arms_replace_what_convert_would_and_what_the_models_do(name):
    places = networks.find_places(name, 10, SHAPE, 8, {})
    model = networks.make_network(name, 10, SHAPE, 8, {})
    assert not any(isinstance(module, PerturbConv2d) for module in model.modules())
    pnn = convert(model, example_input=torch.zeros(1, *SHAPE))
    assert [place.name for place in places.inner] == [row.name for row in pnn.conversion.converted]
    if name != "resnet":  # which the studies alone have
        own = getattr(models, name)(10, in_channels=3, width=8)
        layers = [n for n, module in own.named_modules() if isinstance(module, PerturbConv2d)]
        assert [place.name for place in places.inner] == layers
    assert places.stem == ("stem.0",)
    # Every inner layer of ours is normalised.
    assert all(isinstance(model.get_submodule(place.norm), nn.BatchNorm2d) for place in places.inner)
    assert all(len(place.sizes) == 1 for place in places.inner)


def test_places_of_the_small_network():
    places = networks.find_places("resnet", 10, (1, 8, 8), 4, {})
    assert [(place.name, place.sizes, place.norm) for place in places.inner] == [
        ("layer1.0.layer1", ((8, 8),), "layer1.0.norm1"),
        ("layer1.0.layer2", ((8, 8),), "layer1.0.norm2"),
        ("layer2.0.layer1", ((8, 8),), "layer2.0.norm1"),
        ("layer2.0.layer2", ((4, 4),), "layer2.0.norm2"),
        ("layer3.0.layer1", ((4, 4),), "layer3.0.norm1"),
        ("layer3.0.layer2", ((2, 2),), "layer3.0.norm2"),
    ]


def test_a_stride_in_the_stem_makes_what_follows_smaller():
    places = networks.find_places("resnet", 10, (1, 8, 8), 4, {"stem_stride": 2})
    assert places.inner[0].sizes == ((4, 4),)
    with pytest.raises(UsageError, match="stem_stride is 0, it should be a positive int"):
        networks.make_network("resnet", 10, SHAPE, 4, {"stem_stride": 0})


def test_the_stem_too():
    places = networks.find_places("lenet", 10, SHAPE, 4, {}, stem_too=True)
    assert [place.name for place in places.inner][:2] == ["stem.0", "features.0"]
    assert places.stem == ("stem.0",)


def test_finding_places_leaves_the_generator_alone():
    networks._find_places.cache_clear()
    state = torch.get_rng_state()
    networks.find_places("lenet", 10, SHAPE, 4, {})
    assert torch.equal(torch.get_rng_state(), state)


def test_somebodys_own_network(mine):
    network = networks.find_network(f"{mine}:net")
    assert network.widths == 1
    model = networks.make_network(f"{mine}:net", 7, SHAPE, 6, {"extra": 1})
    assert model(torch.zeros(2, *SHAPE)).shape == (2, 8)
    assert model.convolution.out_channels == 6
    places = networks.find_places(f"{mine}:net", 7, SHAPE, 6, {})
    # The stem is what reads the image, not what is registered first; 1×1 convolutions stay.
    assert places.stem == ("first",)
    assert [(place.name, place.sizes, place.norm) for place in places.inner] == [("convolution", ((16, 16),), "norm")]
    assert networks.find_network(f"{mine}:narrow").widths == 0
    assert networks.make_network(f"{mine}:narrow", 7, SHAPE, 6, {}).convolution.out_channels == 4
    assert str(networks.Path.cwd()) not in sys.path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vgg", "unknown network 'vgg'; there is: resnet, lenet"),
        (":net", "network ':net' should be module:function"),
        ("no_networks:net", "the module no_networks can't be imported from the working directory"),
        ("broken_networks:net", r"the module broken_networks can't be imported .*no_such_thing_at_all"),
        ("somebodys_networks:other", "the module somebodys_networks has no other"),
        ("somebodys_networks:number", "network 'somebodys_networks:number' is of type int, it should be a function"),
        ("somebodys_networks:empty", "takes no argument, it should take the number of classes"),
        ("somebodys_networks:nothing", r"can't be made \(TypeError: it returned int, it should return an nn.Module\)"),
        ("somebodys_networks:wrong", r"can't be made \(RuntimeError: no such luck\)"),
        ("somebodys_networks:linear", "has no convolution that an arm could replace"),
        ("somebodys_networks:picky", "example_input doesn't run through the model"),
    ],
)
def test_refusals(mine, name, words):
    with pytest.raises(UsageError, match=words) as error:
        networks.find_places(name, 10, SHAPE, 8, {})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet", "lenet"])
def test_unknown_options_are_named(name):
    with pytest.raises(
        UsageError, match=re.escape(f"network {name!r} can't be made (TypeError: option 'depth' doesn't")
    ):
        networks.make_network(name, 10, SHAPE, 8, {"depth": 3})
