"""The residual modules of ResNets with perturbation layers in the place of their 3x3 convolutions.

Those of the authors' published network (github.com/juefeix/pnn.pytorch, models/naiveresnet.py) after He et al., "Deep
Residual Learning for Image Recognition", CVPR 2016. The other kinds of layer can stand in the same place, so that
networks differ in that one thing.
"""

from typing import Any

from torch import Tensor, nn

from .layers import make_layer

__all__ = ["PerturbBasicBlock", "PerturbBottleneck"]


def _shortcut(in_channels: int, out_channels: int, stride: int | tuple[int, int]) -> nn.Module:
    """Identity where sizes stay, else a strided 1x1 convolution and its normalisation."""
    if in_channels == out_channels and stride in (1, (1, 1)):
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class PerturbBasicBlock(nn.Module):
    """The basic residual module: layer, BatchNorm, ReLU, layer, BatchNorm; plus the shortcut; ReLU.

    The first layer has the stride.

    Args:
        in_channels: channels of the input.
        channels: channels of both layers and of the output.
        stride: of the module.
        layer: the kind of both layers: "perturb", "conv", "lbc" or "conv1x1".
        **options: the layers' options, see `torch_pnn.layers.make_layer`.

    Shape:
        Input [B, in_channels, H, W], output [B, channels, ceil(H/stride), ceil(W/stride)].

    Attributes:
        expansion: output channels / `channels`, 1.

    Example:
        >>> import torch
        >>> block = PerturbBasicBlock(16, 32, stride=2, norm=True)
        >>> block(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 32, 4, 4])
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int | tuple[int, int] = 1,
        *,
        layer: str = "perturb",
        **options: Any,
    ) -> None:
        super().__init__()
        self.layer1 = make_layer(layer, in_channels, channels, 3, stride, 1, bias=False, **options)
        self.norm1 = nn.BatchNorm2d(channels)
        self.layer2 = make_layer(layer, channels, channels, 3, 1, 1, bias=False, **options)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = _shortcut(in_channels, channels, stride)
        self.activation = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        """The module's output."""
        x = self.activation(self.norm1(self.layer1(input)))
        x = self.norm2(self.layer2(x))
        return self.activation(x + self.shortcut(input))


class PerturbBottleneck(nn.Module):
    """The bottleneck module: 1x1 convolution, layer, 1x1 convolution to four times the channels, each with BatchNorm.

    ReLU follows the first two normalisations and the sum with the shortcut; the middle layer has the stride.

    Args:
        in_channels: channels of the input.
        channels: channels of the middle layer.
        stride: of the module.
        layer: the kind of the middle layer: "perturb", "conv", "lbc" or "conv1x1".
        **options: the layer's options, see `torch_pnn.layers.make_layer`.

    Shape:
        Input [B, in_channels, H, W], output [B, 4 * channels, ceil(H/stride), ceil(W/stride)].

    Attributes:
        expansion: output channels / `channels`, 4.

    Example:
        >>> import torch
        >>> PerturbBottleneck(16, 8, layer="conv1x1")(torch.zeros(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int | tuple[int, int] = 1,
        *,
        layer: str = "perturb",
        **options: Any,
    ) -> None:
        super().__init__()
        outputs = channels * self.expansion
        self.reduce = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.layer = make_layer(layer, channels, channels, 3, stride, 1, bias=False, **options)
        self.norm2 = nn.BatchNorm2d(channels)
        self.expand = nn.Conv2d(channels, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(in_channels, outputs, stride)
        self.activation = nn.ReLU()

    def forward(self, input: Tensor) -> Tensor:
        """The module's output."""
        x = self.activation(self.norm1(self.reduce(input)))
        x = self.activation(self.norm2(self.layer(x)))
        x = self.norm3(self.expand(x))
        return self.activation(x + self.shortcut(input))
