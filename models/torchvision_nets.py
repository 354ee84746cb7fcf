"""resnet18 (1512.03385) and mobilenet-v3-small (1905.02244), safe for per-sample gradients.

Differences from torchvision: GroupNorm (1803.08494) for BatchNorm; any number of input channels; no
dropout, so that the forward pass is deterministic; nothing is computed in place, which torch
refuses under Opacus' backward hooks; MobileNet's hard sigmoid has a second derivative.
"""

from collections.abc import Sequence

from torch import nn

from ._build import register_model
from ._norm import group_norm
from ._options import image_shape

# torchvision is imported in the builders: else it doubles the start-up time of every other model.


@register_model("resnet18")
def resnet18(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return a ResNet-18 for images (B, C, H, W) of any size; output (B, num_classes).

    Raises ModelError where the records are no images.
    """
    from torchvision.models.resnet import ResNet

    from ._residual import ResidualBlock

    channels, _, _ = image_shape("resnet18", input_shape)
    model = ResNet(ResidualBlock, [2, 2, 2, 2], num_classes=num_classes, norm_layer=group_norm)
    model.conv1 = _first_convolution(model.conv1, channels)
    return _out_of_place(model)


@register_model("mobilenet-v3-small")
def mobilenet_v3_small(input_shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return a MobileNetV3-small for images (B, C, H, W) of any size; output (B, num_classes).

    Raises ModelError where the records are no images.
    """
    from torchvision import models, ops

    from ._residual import HardSigmoid, InvertedBlock

    channels, _, _ = image_shape("mobilenet-v3-small", input_shape)
    model = models.mobilenet_v3_small(num_classes=num_classes, norm_layer=group_norm, dropout=0.0)
    model.features[0][0] = _first_convolution(model.features[0][0], channels)
    for name, layer in model.features.named_children():
        if isinstance(layer, models.mobilenetv3.InvertedResidual):
            setattr(model.features, name, InvertedBlock(layer))
    for layer in model.modules():
        if isinstance(layer, ops.SqueezeExcitation):
            layer.scale_activation = HardSigmoid()
    return _out_of_place(model)


def _first_convolution(like: nn.Conv2d, channels: int) -> nn.Conv2d:
    # The same layer for another number of channels, with the initialisation of both papers' nets.
    first = nn.Conv2d(
        channels,
        like.out_channels,
        kernel_size=like.kernel_size[0],  # square in both nets
        stride=like.stride[0],
        padding=like.kernel_size[0] // 2,
        bias=False,
    )
    nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
    return first


def _out_of_place(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]  # a flag, not a tensor
    return model
