"""Models that others wrote, one of each family: how each is built small, for the tests, and whole, for docs/zoo.md.

Nothing is downloaded: all have fresh weights. Small ones keep the family's blocks and lose depth, width and classes.
The packages are those of requirements/zoo.txt; each is imported only when one of its models is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Model:
    """One model of the zoo.

    Attributes:
        package: The package that has it.
        name: Its name there.
        small: Makes a small one of its family.
        whole: Makes the published one, as a rule on the meta device.
        size: An image size for the small one.
        whole_size: The published one's image size.
        channels: Channels of the image.
        arguments: The model's arguments from an image batch [B, C, H, W], as `convert(example_input=)` takes them.
        other_sizes: Further sizes (H, W) at which the small one runs; () where it has one size only.
        script: Whether TorchScript compiles the unconverted small model.
        trace: Whether torch.jit.trace takes it.
        export: Whether torch.export takes it.
        on_meta: Whether the whole one runs on the meta device; else it runs on the processor.
    """

    package: str
    name: str
    small: Callable[[], nn.Module]
    whole: Callable[[], nn.Module]
    size: int = 32
    whole_size: int = 224
    channels: int = 3
    arguments: Callable[[Tensor], Any] = lambda images: images
    other_sizes: tuple[tuple[int, int], ...] = ((40, 48),)
    script: bool = True
    trace: bool = True
    export: bool = True
    on_meta: bool = True

    @property
    def id(self) -> str:
        """What pytest and the table call it."""
        return f"{self.package}-{self.name}"

    def images(self, batch: int = 1, size: tuple[int, int] | None = None, device: str = "cpu") -> Tensor:
        """A batch of random images of the small one's size, or of another."""
        height, width = size or (self.size, self.size)
        return torch.randn(batch, self.channels, height, width, device=device)


def positional_and_keyword(arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What `Model.arguments` returns as positional arguments and keywords."""
    if isinstance(arguments, Mapping):
        return (), dict(arguments)
    return (arguments if isinstance(arguments, tuple) else (arguments,)), {}


def call(model: nn.Module, arguments: Any) -> Any:
    """Calls a model with what `Model.arguments` returns."""
    args, kwargs = positional_and_keyword(arguments)
    return model(*args, **kwargs)


# torchvision


def vision(name: str, **options: Any) -> Callable[[], nn.Module]:
    """A model of torchvision without weights."""

    def build() -> nn.Module:
        from torchvision import models

        return models.get_model(name, weights=None, **options)

    return build


def small_resnet(block: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import resnet

        return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=4, **options)

    return build


def small_vgg() -> nn.Module:
    from torchvision.models import vgg

    model = vgg.VGG(vgg.make_layers([8, "M", 16, "M", 32, 32, "M", 512, "M"]), num_classes=4, init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 4)
    return model


def small_alexnet() -> nn.Module:
    from torchvision.models import alexnet

    model = alexnet(num_classes=4, dropout=0.0)
    model.classifier = nn.Linear(256 * 6 * 6, 4)
    return model


def small_densenet() -> nn.Module:
    from torchvision.models import DenseNet

    return DenseNet(8, (2, 2, 2, 2), 16, num_classes=4)


def small_efficientnet(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision.models import efficientnet

        inverted, fused = efficientnet.MBConvConfig, efficientnet.FusedMBConvConfig
        settings: list[Any] = [inverted(4, 3, 2, 16, 24, 2), inverted(4, 5, 2, 24, 32, 1)]
        if kind == "v2":
            settings = [fused(1, 3, 1, 16, 16, 1), fused(4, 3, 2, 16, 16, 2), *settings]
        return efficientnet.EfficientNet(settings, dropout=0.2, num_classes=4, last_channel=64)

    return build


def small_convnext() -> nn.Module:
    from torchvision.models import convnext

    settings = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)]
    return convnext.ConvNeXt(settings, layer_scale=1.0, num_classes=4)


def small_maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit((32, 32), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=4)


def small_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 16, [1, 1], [2, 2], [2, 2], stochastic_depth_prob=0.0, num_classes=4)


def small_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=4)


def small_shufflenet() -> nn.Module:
    from torchvision.models import ShuffleNetV2

    return ShuffleNetV2([2, 2, 2], [16, 24, 32, 48, 64], num_classes=4)


CLASSIFIERS = (
    Model("torchvision", "alexnet", small_alexnet, vision("alexnet"), 64, other_sizes=((72, 95),)),
    Model("torchvision", "vgg11", small_vgg, vision("vgg11")),
    Model("torchvision", "resnet18", small_resnet("BasicBlock"), vision("resnet18")),
    Model("torchvision", "resnet50", small_resnet("Bottleneck"), vision("resnet50")),
    Model("torchvision", "wide_resnet50_2", small_resnet("Bottleneck", width_per_group=128), vision("wide_resnet50_2")),
    Model(
        "torchvision",
        "resnext50_32x4d",
        small_resnet("Bottleneck", groups=32, width_per_group=4),
        vision("resnext50_32x4d"),
    ),
    Model("torchvision", "densenet121", small_densenet, vision("densenet121")),
    Model(
        "torchvision",
        "googlenet",
        vision("googlenet", num_classes=4, init_weights=False, aux_logits=False),
        vision("googlenet", init_weights=False, aux_logits=False),
        64,
    ),
    Model(
        "torchvision",
        "inception_v3",
        vision("inception_v3", num_classes=4, init_weights=False, aux_logits=False),
        vision("inception_v3", init_weights=False, aux_logits=False),
        75,
        299,
        other_sizes=((80, 97),),
    ),
    Model("torchvision", "squeezenet1_1", vision("squeezenet1_1", num_classes=4), vision("squeezenet1_1")),
    Model("torchvision", "mobilenet_v2", vision("mobilenet_v2", num_classes=4, width_mult=0.2), vision("mobilenet_v2")),
    Model(
        "torchvision", "mobilenet_v3_small", vision("mobilenet_v3_small", num_classes=4), vision("mobilenet_v3_small")
    ),
    Model("torchvision", "shufflenet_v2_x0_5", small_shufflenet, vision("shufflenet_v2_x0_5")),
    Model("torchvision", "mnasnet0_5", vision("mnasnet0_5", num_classes=4), vision("mnasnet0_5")),
    Model("torchvision", "efficientnet_b0", small_efficientnet("v1"), vision("efficientnet_b0")),
    Model("torchvision", "efficientnet_v2_s", small_efficientnet("v2"), vision("efficientnet_v2_s"), whole_size=384),
    Model("torchvision", "regnet_y_400mf", vision("regnet_y_400mf", num_classes=4), vision("regnet_y_400mf")),
    Model("torchvision", "convnext_tiny", small_convnext, vision("convnext_tiny")),
    Model("torchvision", "maxvit_t", small_maxvit, vision("maxvit_t"), other_sizes=()),
    Model("torchvision", "swin_t", small_swin, vision("swin_t")),
    Model("torchvision", "vit_b_16", small_vit, vision("vit_b_16"), other_sizes=()),
)


def segmenter(name: str) -> Callable[[], nn.Module]:
    return vision(name, num_classes=4, weights_backbone=None)


def whole_segmenter(name: str) -> Callable[[], nn.Module]:
    return vision(name, weights_backbone=None)


def small_segmenter(head: str) -> Callable[[], nn.Module]:
    """A one-block-per-stage ResNet with dilation under torchvision's own heads."""

    def build() -> nn.Module:
        from torchvision.models import resnet, segmentation
        from torchvision.models._utils import IntermediateLayerGetter

        body = resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
        backbone = IntermediateLayerGetter(body, {"layer4": "out"})
        if head == "fcn":
            return segmentation.FCN(backbone, segmentation.fcn.FCNHead(2048, 4))
        return segmentation.DeepLabV3(backbone, segmentation.deeplabv3.DeepLabHead(2048, 4, (2, 4)))

    return build


SEGMENTERS = (
    Model("torchvision", "fcn_resnet50", small_segmenter("fcn"), whole_segmenter("fcn_resnet50"), whole_size=520),
    Model(
        "torchvision",
        "deeplabv3_resnet50",
        small_segmenter("deeplab"),
        whole_segmenter("deeplabv3_resnet50"),
        whole_size=520,
    ),
    Model(
        "torchvision",
        "lraspp_mobilenet_v3_large",
        segmenter("lraspp_mobilenet_v3_large"),
        whole_segmenter("lraspp_mobilenet_v3_large"),
        whole_size=520,
    ),
)


def as_list(images: Tensor) -> tuple[list[Tensor]]:
    """Detectors take a list of images."""
    return (list(images),)


def small_pyramid() -> nn.Module:
    from torchvision.models.detection import backbone_utils

    return backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )


FEW_PROPOSALS = {
    "rpn_pre_nms_top_n_train": 100,
    "rpn_pre_nms_top_n_test": 50,
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 10,
    "box_detections_per_img": 5,
}


def small_faster_rcnn() -> nn.Module:
    from torchvision.models import detection

    return detection.FasterRCNN(small_pyramid(), num_classes=3, min_size=64, max_size=96, **FEW_PROPOSALS)


def small_mask_rcnn() -> nn.Module:
    from torchvision.models import detection

    return detection.MaskRCNN(small_pyramid(), num_classes=3, min_size=64, max_size=96, **FEW_PROPOSALS)


def small_retinanet() -> nn.Module:
    from torchvision.models import detection

    return detection.RetinaNet(small_pyramid(), num_classes=3, min_size=64, max_size=96)


def small_ssd() -> nn.Module:
    from torchvision.models import detection, vgg
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator

    backbone = nn.Sequential(vgg.make_layers([8, "M", 16, "M", 32, "M"], batch_norm=True))
    backbone.out_channels = 32

    class Features(nn.Module):
        """What SSD wants of a backbone: an ordered dict of feature maps."""

        def __init__(self) -> None:
            super().__init__()
            self.body = backbone
            self.extra = nn.Conv2d(32, 48, 3, 2, 1)
            self.out_channels = [32, 48]

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            first = self.body(x)
            return {"0": first, "1": self.extra(torch.relu(first))}

    return detection.ssd.SSD(Features(), DefaultBoxGenerator([[2], [2]]), (64, 64), 3)


def detector(name: str, small: Callable[[], nn.Module], whole_size: int = 320, **options: int) -> Model:
    """Their sizes depend on the images' values, so that torch.export and the meta device take none of them.

    The whole ones see images of 320 pixels, not of 800, for the sake of whoever makes the table.
    """
    whole = vision(name, weights_backbone=None, **options)
    return Model(
        "torchvision", name, small, whole, 64, whole_size, arguments=as_list, trace=False, export=False, on_meta=False
    )


DETECTORS = (
    detector("fasterrcnn_resnet50_fpn", small_faster_rcnn, min_size=320, max_size=320),
    detector("maskrcnn_resnet50_fpn", small_mask_rcnn, min_size=320, max_size=320),
    detector("retinanet_resnet50_fpn", small_retinanet, min_size=320, max_size=320),
    detector("ssd300_vgg16", small_ssd, 300),
)

# timm


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, **options)

    return build


def timm_family(name: str, small: str | None = None, **options: Any) -> Model:
    return Model("timm", name, timm_model(small or name, num_classes=4), timm_model(name), **options)


TIMM = (
    timm_family("resnet26d", "resnet10t"),
    timm_family("tf_efficientnet_b0"),
    timm_family("nf_resnet26"),
    timm_family("cspresnet50", whole_size=256),
    timm_family("repvgg_a0"),
    timm_family("hrnet_w18_small", script=False, other_sizes=((64, 32),)),  # it adds maps that are halved five times
    timm_family("convnextv2_atto"),
)

# transformers


def hugging(kind: str, **options: Any) -> Callable[[], nn.Module]:
    """A classifier of transformers, built from a configuration."""

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, kind + "Config")(**options)
        return getattr(transformers, kind + "ForImageClassification")(config)

    return build


def pixels(images: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": images}


def hugging_family(kind: str, **options: Any) -> Model:
    """TorchScript can't read their configuration objects."""
    whole = hugging(kind)
    small = hugging(kind, num_labels=4, **options)
    return Model("transformers", kind, small, whole, arguments=pixels, script=False)


TRANSFORMERS = (
    hugging_family("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic"),
    hugging_family("ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, layer_scale_init_value=1.0),
    hugging_family("MobileNetV2", depth_multiplier=0.35),
)

# monai and diffusers


def monai_unet(channels: tuple[int, ...], residual_units: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from monai.networks.nets import UNet

        return UNet(2, 1, 4, channels, (2,) * (len(channels) - 1), num_res_units=residual_units)

    return build


def diffusers_unet(*channels: int, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from diffusers import UNet2DModel

        down = ("DownBlock2D",) * (len(channels) - 1) + ("AttnDownBlock2D",)
        up = ("AttnUpBlock2D",) + ("UpBlock2D",) * (len(channels) - 1)
        return UNet2DModel(block_out_channels=channels, down_block_types=down, up_block_types=up, **options)

    return build


def with_time(images: Tensor) -> tuple[Tensor, int]:
    return images, 10


OTHERS = (
    Model("monai", "UNet", monai_unet((8, 16, 32), 2), monai_unet((16, 32, 64, 128, 256), 2), channels=1),
    Model(
        "diffusers",
        "UNet2DModel",
        diffusers_unet(8, 16, layers_per_block=1, norm_num_groups=4, attention_head_dim=4),
        diffusers_unet(128, 128, 256, 256, 512, 512),
        whole_size=256,
        arguments=with_time,
        script=False,
        trace=False,
    ),
)

ZOO = (*CLASSIFIERS, *SEGMENTERS, *DETECTORS, *TIMM, *TRANSFORMERS, *OTHERS)
