"""Workloads: the layers that an accelerator computes, with their shapes.

Nothing here is typed by hand. `layers_of` runs a model once, on the meta device where no memory and no arithmetic is
spent, and writes down every convolution and linear layer in the order of execution. `network` does so for the
torchvision models at ImageNet size. The small networks that the emulator chapters train stand at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

__all__ = [
    "PRODUCTS",
    "NETWORKS",
    "TORCHVISION_NETWORKS",
    "TRANSFORMERS",
    "Layer",
    "Product",
    "build_network",
    "build_torchvision",
    "build_transformer",
    "dense_net",
    "fire_net",
    "layer_of",
    "layers_of",
    "network",
    "plain_cnn",
    "prune_weights",
]

#: The three products of a layer in training: output, gradient of the input, gradient of the weights.
Product = Literal["forward", "dgrad", "wgrad"]
PRODUCTS: tuple[Product, ...] = get_args(Product)

#: The ImageNet networks whose layer tables the emulator chapters use.
TORCHVISION_NETWORKS = (
    "alexnet",
    "vgg16",
    "resnet18",
    "resnet50",
    "squeezenet1_0",
    "squeezenet1_1",
    "densenet121",
    "googlenet",
    "mobilenet_v2",
)

#: The transformers whose layer tables the emulator chapters use, with their names in timm.
TRANSFORMERS = {"vit-small": "vit_small_patch16_224"}

#: All networks that `build_network` knows, with whether they use batch normalisation.
NETWORKS = {
    "plain": False,
    "plain-bn": True,
    "plain-pruned": False,
    "fire": False,
    "dense": True,
    "alexnet": False,
    "vgg16": False,
    "squeezenet1_0": False,
    "squeezenet1_1": False,
    "resnet18": True,
    "resnet50": True,
    "densenet121": True,
    "googlenet": True,
    "mobilenet_v2": True,
    "vit-small": False,
}

_KINDS = ("conv", "linear")


@dataclass(frozen=True)
class Layer:
    """The geometry of one convolution or linear layer, for one image.

    A linear layer is a convolution with a 1x1 kernel on a 1x1 image; `batch_as_image` turns a batch of its samples
    into one image whose positions are the samples. A linear layer that is applied to every token of a sequence is a
    1x1 convolution over an image of N x 1 positions.

    Attributes:
        name: The module's name in its network.
        kind: "conv" or "linear".
        in_channels: C.
        out_channels: K.
        kernel: Kernel height and width.
        stride: Vertical and horizontal stride.
        padding: Rows and columns of zeros added at the top and at the left.
        dilation: Vertical and horizontal distance between kernel taps.
        groups: Number of channel groups; C and K are multiples of it.
        in_size: Input height and width.
        out_size: Output height and width.
        needs_dgrad: Whether training needs the gradient of the layer's input; false for the first layer.
    """

    name: str
    kind: Literal["conv", "linear"]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    in_size: tuple[int, int] = (1, 1)
    out_size: tuple[int, int] = (1, 1)
    needs_dgrad: bool = True

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"layer {self.name!r}: kind is {self.kind!r}; expected one of {', '.join(_KINDS)}")
        for field in ("in_channels", "out_channels", "groups"):
            if getattr(self, field) < 1:
                raise ValueError(f"layer {self.name!r}: {field} is {getattr(self, field)}; it must be at least 1")
        for field, least in (
            ("kernel", 1),
            ("stride", 1),
            ("dilation", 1),
            ("in_size", 1),
            ("out_size", 1),
            ("padding", 0),
        ):
            value = getattr(self, field)
            if len(value) != 2 or min(value) < least:
                raise ValueError(f"layer {self.name!r}: {field} is {value}; expected two numbers of at least {least}")
        if self.in_channels % self.groups or self.out_channels % self.groups:
            raise ValueError(
                f"layer {self.name!r}: {self.groups} groups do not divide {self.in_channels} input and "
                f"{self.out_channels} output channels"
            )

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """Shape of the weights, (K, C / groups, kernel height, kernel width)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the forward product of one image; multiplications with padding count."""
        return math.prod(self.weight_shape) * math.prod(self.out_size)

    @property
    def products(self) -> tuple[Product, ...]:
        """The products that training computes for this layer."""
        return PRODUCTS if self.needs_dgrad else ("forward", "wgrad")

    def batch_as_image(self, batch: int) -> Layer:
        """A linear layer over `batch` samples, written as a convolution over one image of `batch` x 1 positions."""
        if self.kind != "linear":
            raise ValueError(
                f"layer {self.name!r} is a {self.kind} layer; only a linear layer has its batch as an image"
            )
        return Layer(
            self.name,
            "conv",
            self.in_channels,
            self.out_channels,
            in_size=(batch, 1),
            out_size=(batch, 1),
            needs_dgrad=self.needs_dgrad,
        )


def layer_of(name: str, module: nn.Module, x: Tensor, output: Tensor) -> Layer:
    """The geometry of one call of a convolution or linear layer.

    Args:
        name: The name to give the layer.
        module: An `nn.Conv2d` or `nn.Linear`.
        x: The tensor that went in: (N, C, H, W) for a convolution, (N, C) or (N, T, C) for a linear layer.
        output: The tensor that came out.

    Raises:
        ValueError: If the module is neither, or if a convolution pads with something other than zeros.
    """
    if isinstance(module, nn.Linear):
        channels, needs_dgrad = (module.in_features, module.out_features), x.requires_grad
        if x.ndim <= 2:
            return Layer(name, "linear", *channels, needs_dgrad=needs_dgrad)
        if x.ndim > 3:
            raise ValueError(
                f"layer {name!r} is linear over an input of shape {tuple(x.shape)}; expected (N, C) or (N, T, C)"
            )
        tokens = (x.shape[1], 1)
        return Layer(name, "conv", *channels, in_size=tokens, out_size=tokens, needs_dgrad=needs_dgrad)
    if not isinstance(module, nn.Conv2d):
        raise ValueError(f"layer {name!r} is a {type(module).__name__}; expected Conv2d or Linear")
    if module.padding_mode != "zeros":
        raise ValueError(f"layer {name!r} pads with {module.padding_mode!r}; only zero padding is lowered")
    dilation = (module.dilation[0], module.dilation[1])
    kernel = (module.kernel_size[0], module.kernel_size[1])
    if isinstance(module.padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = (reach[0] // 2, reach[1] // 2) if module.padding == "same" else (0, 0)
    else:
        padding = (module.padding[0], module.padding[1])
    return Layer(
        name,
        "conv",
        module.in_channels,
        module.out_channels,
        kernel=kernel,
        stride=(module.stride[0], module.stride[1]),
        padding=padding,
        dilation=dilation,
        groups=module.groups,
        in_size=(x.shape[-2], x.shape[-1]),
        out_size=(output.shape[-2], output.shape[-1]),
        needs_dgrad=x.requires_grad,
    )


def layers_of(model: nn.Module, input_shape: Sequence[int]) -> list[Layer]:
    """The convolutions and linear layers of a model, in the order in which one forward pass runs them.

    The pass runs on the device of the model's parameters; build the model under `torch.device("meta")` and it costs
    nothing. A layer whose input needs no gradient, as the first, is marked `needs_dgrad=False`.

    Args:
        model: Any model whose forward takes one image tensor.
        input_shape: Shape of the input without the batch dimension, such as (3, 224, 224).
    """
    found: list[Layer] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):

            def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                found.append(layer_of(name, module, args[0], output))

            handles.append(module.register_forward_hook(note))
    device = next(model.parameters()).device
    try:
        model(torch.zeros((2, *input_shape), device=device))
    finally:
        for handle in handles:
            handle.remove()
    return found


def build_torchvision(name: str, *, num_classes: int = 1000) -> nn.Module:
    """One of the torchvision networks of `TORCHVISION_NETWORKS`, randomly initialised by torchvision's own rules."""
    if name not in TORCHVISION_NETWORKS:
        raise ValueError(f"network {name!r} is unknown; expected one of {', '.join(TORCHVISION_NETWORKS)}")
    from torchvision.models import get_model

    # GoogLeNet's auxiliary classifiers are left out, and its initialisation is torchvision's own fast one.
    options = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    return get_model(name, weights=None, num_classes=num_classes, **options)


def build_transformer(name: str, *, num_classes: int = 1000) -> nn.Module:
    """One of the vision transformers of `TRANSFORMERS`, randomly initialised by timm's own rules."""
    if name not in TRANSFORMERS:
        raise ValueError(f"network {name!r} is unknown; expected one of {', '.join(TRANSFORMERS)}")
    import timm

    return timm.create_model(TRANSFORMERS[name], pretrained=False, num_classes=num_classes)


def network(name: str) -> list[Layer]:
    """The layer table of a torchvision network or a transformer for one 224 x 224 image.

    The attention products of a transformer, which multiply two activations, are no layers and not in the table.
    """
    with torch.device("meta"):
        model = build_transformer(name) if name in TRANSFORMERS else build_torchvision(name)
    return layers_of(model, (3, 224, 224))


class _Concatenate(nn.Module):
    """The outputs of several branches on the same input, side by side along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, sum of the branches' channels, H, W)."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def _he_initialised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def plain_cnn(
    *,
    in_channels: int = 3,
    image_size: int = 32,
    num_classes: int = 10,
    widths: Sequence[Sequence[int]] = ((32, 32), (64, 64), (128, 128)),
    hidden: int = 256,
    batch_norm: bool = False,
) -> nn.Sequential:
    """A plain stack of 3x3 convolutions in stages, 2x2 max-pooling after each stage, and two linear layers.

    Args:
        in_channels: Channels of the image.
        image_size: Height and width of the image; halved once a stage.
        num_classes: Outputs.
        widths: Output channels of the convolutions of each stage.
        hidden: Units of the hidden linear layer.
        batch_norm: Whether each convolution is followed by batch normalisation.
    """
    if image_size >> len(widths) < 1:
        raise ValueError(f"image_size {image_size} cannot be halved {len(widths)} times; use fewer stages")
    layers: list[nn.Module] = []
    channels = in_channels
    for stage in widths:
        for width in stage:
            layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            channels = width
        layers.append(nn.MaxPool2d(2))
    size = image_size >> len(widths)
    layers += [nn.Flatten(), nn.Linear(channels * size * size, hidden), nn.ReLU(), nn.Linear(hidden, num_classes)]
    model = nn.Sequential(*layers)
    _he_initialised(model)
    return model


def _fire(channels: int, squeeze: int, expand: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, squeeze, 1),
        nn.ReLU(),
        _Concatenate(nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)),
        nn.ReLU(),
    )


def fire_net(*, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """A small network of SqueezeNet's fire modules, without batch normalisation, for images of 8 to 64 pixels.

    Args:
        in_channels: Channels of the image.
        num_classes: Outputs.
        width: Channels of the first squeeze layer; the later ones are multiples of it.
    """
    model = nn.Sequential(
        nn.Conv2d(in_channels, 4 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        _fire(4 * width, width, 4 * width),
        _fire(8 * width, width, 4 * width),
        nn.MaxPool2d(2),
        _fire(8 * width, 2 * width, 6 * width),
        nn.Conv2d(12 * width, num_classes, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    _he_initialised(model)
    return model


class _DenseLayer(nn.Module):
    """DenseNet's layer: batch normalisation, ReLU, 3x3 convolution, its output appended to its input."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C + growth, H, W)."""
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], dim=1)


def dense_net(*, in_channels: int = 3, num_classes: int = 10, growth: int = 16, depth: int = 3) -> nn.Sequential:
    """A small DenseNet: three blocks of `depth` layers, transitions of a 1x1 convolution and average pooling.

    Args:
        in_channels: Channels of the image.
        num_classes: Outputs.
        growth: Channels that each layer adds.
        depth: Layers of a block.
    """
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)]
    for block in range(3):
        for _ in range(depth):
            layers.append(_DenseLayer(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if block < 2:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
    model = nn.Sequential(*layers)
    _he_initialised(model)
    return model


def prune_weights(model: nn.Module, fraction: float) -> nn.Module:
    """Fix a random share of the weights of every layer but the first at zero, for the whole of training, in place.

    The weights that stay are scaled so that each layer's output keeps its variance. The masks are torch's own
    pruning parametrisation, so the optimiser never moves a pruned weight.

    Args:
        model: The model; its convolutions and linear layers are pruned.
        fraction: Share of zeros, at least 0 and below 1.
    """
    from torch.nn.utils import prune

    if not 0 <= fraction < 1:
        raise ValueError(f"fraction is {fraction}; expected at least 0 and below 1")
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for module in layers[1:]:
        with torch.no_grad():
            module.weight.mul_((1 - fraction) ** -0.5)
        prune.random_unstructured(module, "weight", fraction)
    return model


def build_network(name: str, *, in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """A network by its name, randomly initialised.

    Args:
        name: One of `NETWORKS`. "plain" and "plain-bn" are `plain_cnn`, "plain-pruned" the same with 90 % of its
            weights fixed at zero, "fire" is `fire_net`, "dense" is `dense_net`; the others are torchvision's
            and timm's.
        in_channels: Channels of the image; 3 for a network of torchvision or timm.
        image_size: Height and width of the image; below 32 the small networks have fewer and narrower layers.
        num_classes: Outputs.

    Raises:
        ValueError: If the name is unknown, or a torchvision network is asked for other than three channels.
    """
    if name not in NETWORKS:
        raise ValueError(f"network {name!r} is unknown; expected one of {', '.join(NETWORKS)}")
    if name in TORCHVISION_NETWORKS or name in TRANSFORMERS:
        if in_channels != 3:
            raise ValueError(f"network {name!r} takes images of 3 channels, not {in_channels}")
        build = build_transformer if name in TRANSFORMERS else build_torchvision
        return build(name, num_classes=num_classes)
    tiny = image_size < 32
    if name == "fire":
        return fire_net(in_channels=in_channels, num_classes=num_classes, width=8 if tiny else 16)
    if name == "dense":
        return dense_net(in_channels=in_channels, num_classes=num_classes, growth=8 if tiny else 12)
    model = plain_cnn(
        in_channels=in_channels,
        image_size=image_size,
        num_classes=num_classes,
        widths=((16, 16), (32, 32)) if tiny else ((32, 32), (64, 64), (128, 128)),
        hidden=64 if tiny else 256,
        batch_norm=name == "plain-bn",
    )
    return prune_weights(model, 0.9) if name == "plain-pruned" else model
