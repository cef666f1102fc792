"""Gradient output sparsity: skip the gradients that a ReLU will zero (Sarma et al., 2021).

The gradient of a convolution's input is multiplied, right afterwards, by the derivative of the ReLU that made this
input. Where the ReLU was off the product is zero whatever the gradient is, so it need not be computed, and the forward
pass already knows where (*output sparsity*). The gradient of the convolution's output, the operand that is read, has
zeros too unless batch normalisation has filled them (*input sparsity*).

The module goes from exact to assumed:

* `derivative_mask` decides from autograd's graph whether a layer's input gradients may be skipped, and where;
* `MaskedConv2d` is a convolution whose backward pass skips them, in any PyTorch model;
* `mac_counts` counts the multiply-accumulates that each kind of skipping leaves, from traced masks, exactly;
* `simulate` runs the masks on an array of processing units whose loads differ, with work redistribution or without.

The counts follow from the arithmetic alone. The array is our own: a plain design with the paper's ingredients, not
the paper's hardware, whose description we could not check.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import lightning as L
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from leantrain.hardware.energy import AccessEnergy
from leantrain.hardware.lowering import Operand, phases
from leantrain.hardware.reports import read_products
from leantrain.hardware.trace import LayerTrace, Packed, Trace, TracedClassifier, capture
from leantrain.hardware.workloads import PRODUCTS, Layer, Product, build_network
from leantrain.kernels import compiled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FULL_SIZE",
    "SCHEMES",
    "SMALL",
    "MaskedConv2d",
    "PEArray",
    "Redistribution",
    "ReluOverlap",
    "Scheme",
    "SparsityClassifier",
    "build",
    "cycle_report",
    "dense_cycles",
    "derivative_mask",
    "draw_products",
    "draw_redistribution",
    "mac_counts",
    "mask_convolutions",
    "output_loads",
    "random_trace",
    "read_layers",
    "read_report",
    "redistribute",
    "residual_net",
    "separable_net",
    "simulate",
    "summarise",
    "trace_full_size",
    "trace_step",
    "value_check",
    "watch_relus",
]

#: What an array skips: nothing, zero operands, outputs that a ReLU will zero, or both.
Scheme = Literal["dense", "IN", "OUT", "IN+OUT"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

#: The ImageNet networks of the chapter, with whether they use batch normalisation.
FULL_SIZE = {
    "vgg16": False,
    "resnet18": True,
    "googlenet": True,
    "densenet121": True,
    "mobilenetv1": True,
    "alexnet": False,
    "vgg16_bn": True,
}

#: The small networks that the chapter trains, with whether they use batch normalisation.
SMALL = {"plain": False, "plain-bn": True, "residual": True, "dense": True, "separable": True}

#: Name under which `capture` keeps the mask of `derivative_mask`.
_NEEDED = "needed"
#: Autograd nodes through which a zero passes unchanged, and with it the right to skip.
_TRANSPARENT = (
    "MaxPool2DWithIndicesBackward0",
    "AdaptiveMaxPool2DBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "CloneBackward0",
)


# --------------------------------------------------------------------------------------------------------------------
# Which gradients are multiplied by zero


def _ceiling(node: Any) -> float | None:
    """The value from which on the ReLUs before a tensor clip, infinite for plain ones; None if it is not their output.

    Args:
        node: The `grad_fn` of the tensor.
    """
    name = node.name() if node is not None else ""
    if name == "ReluBackward0":
        return float("inf")
    if name == "HardtanhBackward0" and float(node._saved_min_val) == 0.0:  # ReLU6
        return float(node._saved_max_val)
    if name in _TRANSPARENT:
        return _ceiling(node.next_functions[0][0])
    if name == "CatBackward0":
        found = [_ceiling(source) for source, _ in node.next_functions]
        return max((c for c in found if c is not None), default=None) if None not in found else None
    return None


def derivative_mask(x: Tensor) -> Tensor | None:
    """Where the gradient of a tensor is used: everywhere but at the zeros (and the clipped values) of its ReLU.

    The graph that autograd recorded decides. A tensor qualifies if it is the output of a ReLU, or of a ReLU6, or was
    made from such outputs by max-pooling, concatenation or a change of view alone: a pooled zero means that all its
    candidates are zero. A normalisation or a linear map in between ends that. So does whatever can round a positive
    value to zero: a cast, a product, and also an average or a sum of ReLU outputs, which are rarely zero anyway.
    Dropout is not recognised either, which is safe.

    Args:
        x: A layer's input, in a forward pass with gradients, of any shape.

    Returns:
        Booleans of the shape of `x`, False where the derivative of the ReLU is zero; None if `x` does not qualify.

    Raises:
        ValueError: If the graph says ReLU but a value is negative, so that something has overwritten the tensor.
    """
    ceiling = _ceiling(x.grad_fn)
    if ceiling is None:
        return None
    values = x.detach()
    if bool((values < 0).any()):
        raise ValueError(
            "a negative value stands in the output of a ReLU; it was overwritten, so nothing can be skipped"
        )
    return (values > 0) & (values < ceiling) if ceiling < float("inf") else values > 0


class _MaskedConvolution(torch.autograd.Function):
    """A convolution whose backward pass does not compute the masked gradients of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, needed: Tensor, conv: MaskedConv2d) -> Tensor:
        ctx.save_for_backward(x, weight, needed)
        ctx.conv, ctx.bias_shape = conv, None if bias is None else [bias.numel()]
        inner = conv.conv
        return F.conv2d(x, weight, bias, inner.stride, inner.padding, inner.dilation, inner.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, needed = ctx.saved_tensors
        conv: MaskedConv2d = ctx.conv
        by_torch = conv.method == "overwrite"
        wanted = [ctx.needs_input_grad[0] and by_torch, ctx.needs_input_grad[1], ctx.needs_input_grad[2]]
        inner = conv.conv
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            gradients[0],
            x,
            weight,
            ctx.bias_shape,
            inner.stride,
            inner.padding,
            inner.dilation,
            False,
            [0, 0],
            inner.groups,
            wanted,
        )
        if ctx.needs_input_grad[0]:
            if by_torch:
                of_x = torch.where(needed, of_x, torch.full_like(of_x, conv.fill))
            else:
                of_x, conv.made = _skipped_input_gradient(inner, weight, gradients[0], needed, conv.skip)
        return of_x, of_weight, of_bias, None, None


class MaskedConv2d(nn.Module):
    """A convolution that leaves out the input gradients which the ReLU before it will zero.

    What comes out of the ReLU's backward pass is the same; the gradient of the input itself, between the two, is not.

    Args:
        conv: The convolution to wrap; its parameters are shared, not copied. Zero padding only.
        method: "skip" computes the needed gradients alone, one after the other in compiled code, and multiplies by
            non-zero operands alone. "overwrite" computes all of them as PyTorch does and then writes `fill` over those
            that are not needed: no time is saved, but the others keep PyTorch's value to the last bit, which shows that
            the skipped ones have no influence.
        skip: For the method "skip": False runs the same code without leaving anything out, its own baseline.
        fill: For the method "overwrite": any finite number.

    Attributes:
        made: Multiply-accumulates of the last backward pass for the input, with the method "skip".
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        method: Literal["skip", "overwrite"] = "skip",
        *,
        skip: bool = True,
        fill: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(conv, nn.Conv2d):
            raise ValueError(f"conv is a {type(conv).__name__}; expected Conv2d")
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"padding is {conv.padding!r}, {conv.padding_mode}; expected numbers and zeros")
        if method not in ("skip", "overwrite"):
            raise ValueError(f"method is {method!r}; expected 'skip' or 'overwrite'")
        if not np.isfinite(fill):
            raise ValueError(f"fill is {fill}; expected a finite number")
        self.conv, self.method, self.skip, self.fill = conv, method, skip, fill
        self.made = 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, K, OH, OW).

        Raises:
            ValueError: If `x` needs a gradient but is not the output of a ReLU; see `derivative_mask`.
        """
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.conv(x)
        needed = derivative_mask(x)
        if needed is None:
            raise ValueError(
                f"the input comes from {x.grad_fn.name() if x.grad_fn is not None else 'a leaf'}, not from a ReLU: "
                "its gradients are all needed, use a plain convolution here"
            )
        return _MaskedConvolution.apply(x, self.conv.weight, self.conv.bias, needed, self)

    def extra_repr(self) -> str:
        """The settings."""
        return f"method={self.method!r}, skip={self.skip}, fill={self.fill}"


def mask_convolutions(
    model: nn.Module,
    sample: Tensor,
    method: Literal["skip", "overwrite"] = "skip",
    *,
    skip: bool = True,
    fill: float = 0.0,
) -> list[str]:
    """Wrap every convolution of a model whose input gradients may be skipped in a `MaskedConv2d`, in place.

    Args:
        model: The model.
        sample: An input to run it on, so that autograd's graph can be read; the model's state does not change.
        method: See `MaskedConv2d`.
        skip: See `MaskedConv2d`.
        fill: See `MaskedConv2d`.

    Returns:
        The names of the wrapped convolutions, in the order of execution.
    """
    found: list[str] = []
    handles, modes = [], {module: module.training for module in model.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def look(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                if derivative_mask(args[0]) is not None:
                    found.append(name)

            handles.append(module.register_forward_pre_hook(look))
    try:
        model.eval()  # batch statistics stay as they are
        with torch.enable_grad():
            model(sample)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for name in found:
        parent, _, child = name.rpartition(".")
        holder = model.get_submodule(parent)
        wrapped = MaskedConv2d(model.get_submodule(name), method, skip=skip, fill=fill)  # type: ignore[arg-type]
        setattr(holder, child, wrapped)
    return found


# --------------------------------------------------------------------------------------------------------------------
# How many multiply-accumulates are left


class _Tap(NamedTuple):
    """A kernel tap along one axis: the output positions that use it, and the input positions that they read."""

    out: slice
    source: slice


def _axis(layer: Layer, axis: int) -> list[_Tap]:
    """The taps of one axis without what falls into the padding."""
    taps = []
    for tap in range(layer.kernel[axis]):
        offset, stride = tap * layer.dilation[axis] - layer.padding[axis], layer.stride[axis]
        first = max(0, -(offset // stride))
        last = min(layer.out_size[axis], (layer.in_size[axis] - 1 - offset) // stride + 1)
        start = first * stride + offset
        count = max(0, last - first)
        stop = start + (count - 1) * stride + 1 if count else start
        taps.append(_Tap(slice(first, first + count), slice(start, stop, stride)))
    return taps


def _gather(values: NDArray, layer: Layer) -> NDArray:
    """Sum a map over the window of every output position: (..., H, W) to (..., OH, OW)."""
    front = values.shape[:-2]
    rows = np.zeros((*front, layer.out_size[0], layer.in_size[1]), dtype=values.dtype)
    for tap in _axis(layer, 0):
        rows[..., tap.out, :] += values[..., tap.source, :]
    result = np.zeros((*front, *layer.out_size), dtype=values.dtype)
    for tap in _axis(layer, 1):
        result[..., tap.out] += rows[..., tap.source]
    return result


def _scatter(values: NDArray, layer: Layer) -> NDArray:
    """Sum a map over the output positions that read each input position: (..., OH, OW) to (..., H, W)."""
    front = values.shape[:-2]
    rows = np.zeros((*front, layer.in_size[0], layer.out_size[1]), dtype=values.dtype)
    for tap in _axis(layer, 0):
        rows[..., tap.source, :] += values[..., tap.out, :]
    result = np.zeros((*front, *layer.in_size), dtype=values.dtype)
    for tap in _axis(layer, 1):
        result[..., tap.source] += rows[..., tap.out]
    return result


class _Masks(NamedTuple):
    """The masks of a layer as images: input and needed (N, C, H, W), gradient (N, K, OH, OW)."""

    input: NDArray[np.bool_]
    gradient: NDArray[np.bool_]
    needed: NDArray[np.bool_] | None


def _image_masks(entry: LayerTrace) -> _Masks:
    """A linear layer's samples become images of one position."""
    layer = entry.layer
    x, g = entry.masks["input"].mask(), entry.masks["grad_output"].mask()
    needed = entry.extra[_NEEDED].mask() if _NEEDED in entry.extra else None
    if layer.kind == "linear":
        x, g = x[:, :, None, None], g[:, :, None, None]
        needed = None if needed is None else needed[:, :, None, None]
    for name, mask, shape in (
        ("input", x, (layer.in_channels, *layer.in_size)),
        ("grad_output", g, (layer.out_channels, *layer.out_size)),
        ("needed", x if needed is None else needed, (layer.in_channels, *layer.in_size)),
    ):
        if mask.shape != (len(x), *shape):
            raise ValueError(f"layer {layer.name!r}: {name} has shape {mask.shape}; expected {(len(x), *shape)}")
    return _Masks(x, g, needed)


def _per_channel(mask: NDArray[np.bool_], weight: NDArray[np.int64]) -> int:
    """Sum of a (N, C, H, W) mask weighted by position (H, W)."""
    return int((np.count_nonzero(mask, axis=(0, 1)) * weight).sum())


def mac_counts(trace: Trace | LayerTrace) -> pd.DataFrame:
    """Count the multiply-accumulates that each kind of skipping leaves, exactly.

    With 1[x] the mask of the input, 1[g] that of the output gradient and 1[d] that of the ReLU's derivative, over all
    (output, operand) pairs that do not fall into the padding: forward IN is the sum of 1[x]; dgrad IN the sum of
    1[g], OUT that of 1[d], IN+OUT that of 1[d] 1[g]; wgrad IN the smaller of the sums of 1[x] and 1[g]. OUT changes
    nothing where nothing may be skipped: in the other products, and in a layer whose input is not the output of a ReLU.
    The sums come from convolutions of the masks with kernels of ones.

    Args:
        trace: The masks of a network, or of one layer, as `trace_step` takes them.

    Returns:
        One row a layer and product: layer, kind, product, eligible (whether outputs may be skipped), the counts
        dense, IN, OUT and IN+OUT, and pairs (both operands of the product are not zero; for dgrad, whose other operand
        is dense, the same as IN).
    """
    rows = []
    for entry in (trace,) if isinstance(trace, LayerTrace) else trace.layers:
        layer, (x, g, needed) = entry.layer, _image_masks(entry)
        at_input = _scatter(np.ones(layer.out_size, np.int64), layer)
        at_output = _gather(np.ones(layer.in_size, np.int64), layer)
        ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        dense = len(x) * layer.in_channels * outs * int(at_input.sum())
        of_x, of_g = outs * _per_channel(x, at_input), ins * _per_channel(g, at_output)

        def both(mask: NDArray[np.bool_], g: NDArray[np.bool_] = g, layer: Layer = layer) -> int:
            images = len(mask)
            a = mask.reshape(images, layer.groups, -1, *layer.in_size).sum(axis=2, dtype=np.int64)
            b = g.reshape(images, layer.groups, -1, *layer.out_size).sum(axis=2, dtype=np.int64)
            return int((_gather(a, layer) * b).sum())

        for product in layer.products:
            counts: tuple[int, ...]
            if product == "forward":
                counts = (dense, of_x, dense, of_x, of_x)
            elif product == "wgrad":
                side = min(of_x, of_g)
                counts = (dense, side, dense, side, both(x))
            elif needed is None:
                counts = (dense, of_g, dense, of_g, of_g)
            else:
                counts = (dense, of_g, outs * _per_channel(needed, at_input), both(needed), of_g)
            names = (*SCHEMES, "pairs")
            row = {"layer": layer.name, "kind": layer.kind, "product": product}
            rows.append(row | {"eligible": needed is not None} | dict(zip(names, counts, strict=True)))
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------------------------------------------------
# An array of processing units


@dataclass(frozen=True)
class PEArray:
    """The configuration of the array.

    A unit computes one output at a time. Lane j holds the reduction indices j, j + lanes, ...: channels for forward
    and dgrad, output positions for wgrad. A dense unit takes one kernel tap and one block of `lanes` channels a cycle.
    A unit that skips zero operands gives each lane its own compressed list; the lanes meet at the end of the output.
    The outputs of a product lie in one row, channel after channel, and each unit starts with an equal stretch of it.

    Attributes:
        units: Processing units.
        lanes: Multipliers of a unit.
        scheme: What is skipped, one of `SCHEMES`.
        redistribution: "none"; "stealing": a unit that runs dry takes half of the outputs that the most loaded unit
            has left, if it would be done with them before that unit would have been; "even": every unit has the mean
            load, the bound of any such scheme.
        packing: How a unit compacts the operands of one output, "lane" (each lane its own list, the longest counts) or
            "packed" (any lane may take any value).
        transfer_start: Cycles until a transfer of outputs begins to arrive.
        transfer_rate: Outputs that a transfer moves in a cycle.
    """

    units: int = 256
    lanes: int = 16
    scheme: Scheme = "IN+OUT"
    redistribution: Literal["none", "stealing", "even"] = "none"
    packing: Literal["lane", "packed"] = "lane"
    transfer_start: int = 16
    transfer_rate: int = 16

    def __post_init__(self) -> None:
        for name, least, most in (
            ("units", 1, 65536),
            ("lanes", 1, 1024),
            ("transfer_start", 0, 1_000_000),
            ("transfer_rate", 1, 1_000_000),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}; expected a whole number from {least} to {most}")
        for name, known in (
            ("scheme", SCHEMES),
            ("redistribution", ("none", "stealing", "even")),
            ("packing", ("lane", "packed")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}")

    @property
    def skips_inputs(self) -> bool:
        """Whether zero operands are skipped."""
        return self.scheme in ("IN", "IN+OUT")

    @property
    def skips_outputs(self) -> bool:
        """Whether outputs that a ReLU will zero are skipped."""
        return self.scheme in ("OUT", "IN+OUT")

    @property
    def macs_per_cycle(self) -> int:
        """Multipliers of the array."""
        return self.units * self.lanes


@dataclass(frozen=True)
class _Loads:
    """The outputs of one product of one image.

    Attributes:
        cycles: Cycles of an output, (A, P). The outputs in the order of the work are (A, repeats, P): all repeats of a
            row take the same time, as the channels do that read the same windows.
        repeats: Outputs that share a row.
        needed: Whether each output is computed, (A * repeats * P,); None if all are.
        made: Multiply-accumulates of all outputs together.
    """

    cycles: NDArray[np.int64]
    repeats: int
    needed: NDArray[np.bool_] | None
    made: int

    def flat(self) -> NDArray[np.int64]:
        """Cycles of each output, zero for a skipped one."""
        rows, places = self.cycles.shape
        every = np.broadcast_to(self.cycles[:, None], (rows, self.repeats, places)).reshape(-1)
        return every if self.needed is None else every * self.needed


@compiled
def _lane_lists(mask: NDArray[np.bool_], lanes: int) -> NDArray[np.int32]:
    """Non-zero values in each lane: (A, D, P) to (A, lanes, P); index d of the reduction is in lane d % lanes."""
    rows, length, places = mask.shape
    lists = np.zeros((rows, lanes, places), np.int32)
    for a in range(rows):
        lane = 0
        for d in range(length):
            for p in range(places):
                lists[a, lane, p] += mask[a, d, p]
            lane = lane + 1 if lane + 1 < lanes else 0
    return lists


def _unit_cycles(lists: NDArray[np.int32], config: PEArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Cycles and multiply-accumulates of outputs from the lengths of their lanes' lists, (A, lanes, P)."""
    made = lists.sum(axis=1, dtype=np.int64)
    if config.packing == "packed":
        return -(-made // config.lanes), made
    return lists.max(axis=1).astype(np.int64), made


def _window_loads(layer: Layer, product: Product, masks: _Masks, image: int, config: PEArray) -> _Loads:
    """Loads of the outputs of forward, (K, OH, OW), or dgrad, (C, H, W)."""
    forward = product == "forward"
    spread = _gather if forward else _scatter
    mask = masks.input[image] if forward else masks.gradient[image]
    channels, outputs = (layer.in_channels, layer.out_channels)[:: 1 if forward else -1]
    per_group, repeats = channels // layer.groups, outputs // layer.groups
    if config.skips_inputs:
        lanes = min(config.lanes, per_group)  # the others never have anything to do
        lists = _lane_lists(mask.reshape(layer.groups, per_group, -1), lanes)
        lists = spread(lists.reshape(layer.groups, lanes, *mask.shape[1:]), layer)
        cycles, made = _unit_cycles(lists.reshape(layer.groups, lanes, -1), config)
    else:
        taps = spread(np.ones(mask.shape[1:], np.int64), layer).reshape(-1)
        cycles = np.tile(taps * -(-per_group // config.lanes), (layer.groups, 1))
        made = np.tile(taps * per_group, (layer.groups, 1))
    if forward or masks.needed is None or not config.skips_outputs:
        return _Loads(cycles, repeats, None, repeats * int(made.sum()))
    needed = masks.needed[image].reshape(-1)
    at_position = needed.reshape(layer.groups, repeats, -1).sum(axis=1, dtype=np.int64)
    return _Loads(cycles, repeats, needed, int((at_position * made).sum()))


def _weight_loads(layer: Layer, masks: _Masks, image: int, side: Operand, config: PEArray) -> _Loads:
    """Loads of the weight gradients, (K, C / groups, kernel height, kernel width)."""
    mask = masks.gradient[image] if side == "grad_output" else masks.input[image]
    shape = (len(mask), *layer.kernel)
    cycles, made = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for r, rows in enumerate(_axis(layer, 0)):
        for s, columns in enumerate(_axis(layer, 1)):
            read = (rows.out, columns.out) if side == "grad_output" else (rows.source, columns.source)
            valid = mask[:, *read]
            positions = valid.shape[1] * valid.shape[2]
            if positions and config.skips_inputs:
                lists = _lane_lists(valid.reshape(len(mask), positions, 1), config.lanes)
                found = _unit_cycles(lists, config)
                cycles[:, r, s], made[:, r, s] = found[0][:, 0], found[1][:, 0]
            else:
                cycles[:, r, s], made[:, r, s] = -(-positions // config.lanes), positions
    ins, outs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    # A row of output channel k is shared by its input channels; the rows of a group's inputs by its output channels.
    rows_of, repeats = (len(mask), ins) if side == "grad_output" else (layer.groups, outs)
    return _Loads(cycles.reshape(rows_of, -1), repeats, None, repeats * int(made.sum()))


def _scheduled(layer: Layer, product: Product, masks: _Masks) -> Operand:
    """The operand whose zeros are skipped: the only sparse one, or for wgrad the one that leaves less work."""
    if product != "wgrad":
        return "input" if product == "forward" else "grad_output"
    of_x = layer.out_channels * _per_channel(masks.input, _scatter(np.ones(layer.out_size, np.int64), layer))
    of_g = layer.in_channels * _per_channel(masks.gradient, _gather(np.ones(layer.in_size, np.int64), layer))
    return "input" if of_x < of_g else "grad_output"


def output_loads(
    entry: LayerTrace, product: Product, config: PEArray | None = None, *, image: int = 0
) -> NDArray[np.int64]:
    """Cycles that one unit spends on each output of a product, zero for a skipped one.

    Args:
        entry: The traced layer.
        product: The product.
        config: The array; the default one if left out.
        image: The image.

    Returns:
        (outputs,), in the order of the work: (K, OH, OW) for forward, (C, H, W) for dgrad, that of the weights for
        wgrad.
    """
    masks = _image_masks(entry)
    side = _scheduled(entry.layer, product, masks)
    return _loads(entry.layer, product, masks, image, side, config or PEArray()).flat()


def _loads(layer: Layer, product: Product, masks: _Masks, image: int, side: Operand, config: PEArray) -> _Loads:
    if product not in PRODUCTS:
        raise ValueError(f"product is {product!r}; expected one of {', '.join(PRODUCTS)}")
    if product == "wgrad":
        return _weight_loads(layer, masks, image, side, config)
    return _window_loads(layer, product, masks, image, config)


@compiled
def _queue(
    cycles: NDArray[np.int64],
    repeats: int,
    needed: NDArray[np.bool_],
    bounds: NDArray[np.int64],
    prefix: NDArray[np.int64],
) -> int:
    """Lay the computed outputs in a row; returns how many they are.

    `cycles` (A, P) and `repeats` are those of `_Loads`; `needed` is empty if all outputs are computed. `prefix`
    (outputs + 1,) receives the cycles of all computed outputs before each, `bounds` (units + 1,) is turned from
    numbers of outputs into numbers of computed outputs.
    """
    place = 0
    kept = 0
    total = 0
    unit = 0
    prefix[0] = 0
    for a in range(cycles.shape[0]):
        for _ in range(repeats):
            for p in range(cycles.shape[1]):
                while bounds[unit] == place:
                    bounds[unit] = kept
                    unit += 1
                if needed.size == 0 or needed[place]:
                    total += cycles[a, p]
                    kept += 1
                    prefix[kept] = total
                place += 1
    bounds[unit:] = kept
    return kept


@compiled
def _steal(
    prefix: NDArray[np.int64],
    bounds: NDArray[np.int64],
    transfer_start: int,
    transfer_rate: int,
    log: NDArray[np.int64],
) -> tuple[int, int, int]:
    """Let units that run dry take outputs from the most loaded one; returns makespan, transfers, cycles of transfers.

    `prefix` (outputs + 1,) holds the cycles of all outputs before each; `bounds` (units + 1,) cuts them into the units'
    first stretches. `log` receives time, thief, victim, first and last output, and cycles of each transfer, as far as
    it has rows.
    """
    units = bounds.size - 1
    first, last = bounds[:-1].copy(), bounds[1:].copy()
    begin = np.zeros(units, np.int64)
    finish = prefix[last] - prefix[first]
    idle = np.zeros(units, np.bool_)
    transfers = 0
    moving = 0
    while True:
        thief = -1
        victim = -1
        for unit in range(units):
            if not idle[unit] and (thief < 0 or finish[unit] < finish[thief]):
                thief = unit
            if victim < 0 or finish[unit] > finish[victim]:
                victim = unit
        if thief < 0:
            break
        now = finish[thief]
        # The output that the victim is computing stays with it.
        done = prefix[first[victim]] + max(0, now - begin[victim])
        low, high = first[victim], last[victim]
        while low < high:
            middle = (low + high) // 2
            if prefix[middle] >= done:
                high = middle
            else:
                low = middle + 1
        moved = (last[victim] - low) // 2
        split = last[victim] - moved
        work = prefix[last[victim]] - prefix[split]
        cost = transfer_start + (moved + transfer_rate - 1) // transfer_rate
        if victim == thief or moved == 0 or now + cost + work >= finish[victim]:
            idle[thief] = True
            continue
        if transfers < log.shape[0]:
            log[transfers, 0] = now
            log[transfers, 1] = thief
            log[transfers, 2] = victim
            log[transfers, 3] = split
            log[transfers, 4] = last[victim]
            log[transfers, 5] = cost
        transfers += 1
        moving += cost
        first[thief], last[thief] = split, last[victim]
        begin[thief] = now + cost
        finish[thief] = now + cost + work
        last[victim] = split
        finish[victim] -= work
    return finish.max(), transfers, moving


@dataclass(frozen=True)
class Redistribution:
    """How the outputs of one product were worked off.

    Attributes:
        cycles: Until the last unit is done; a fraction for "even".
        alone: The same without redistribution.
        transfers: Transfers between units.
        transfer_cycles: Cycles that units spend waiting for transfers, all units together.
        unit_cycles: First load of each unit, (units,).
        log: The transfers, see `events`; empty unless it was asked for.
        bounds: First stretch of each unit, (units + 1,), counted in the same way.
        prefix: Cycles of all computed outputs before each, (outputs + 1,).
    """

    cycles: float
    alone: int
    transfers: int
    transfer_cycles: int
    unit_cycles: NDArray[np.int64]
    log: NDArray[np.int64]
    bounds: NDArray[np.int64]
    prefix: NDArray[np.int64]

    @property
    def events(self) -> pd.DataFrame:
        """One row a transfer: cycle, thief, victim, first and last output moved, and cost in cycles.

        Outputs are counted among those that are computed, and the last one is excluded.
        """
        return pd.DataFrame(self.log, columns=["cycle", "thief", "victim", "first", "last", "cost"])

    def segments(self) -> pd.DataFrame:
        """What every unit does when, replayed from the events.

        Returns:
            One row a stretch: unit, start, finish, kind ("work" or "transfer"), first and last output (last excluded),
            source (the unit that started with the outputs, or from which they come).
        """
        units = len(self.bounds) - 1
        now = [[0, int(self.bounds[u]), int(self.bounds[u + 1]), u] for u in range(units)]
        rows: list[tuple[int, int, int, str, int, int, int]] = []

        def close(unit: int) -> None:
            start, first, last, source = now[unit]
            if last > first:
                finish = start + int(self.prefix[last] - self.prefix[first])
                rows.append((unit, start, finish, "work", first, last, source))

        for event in self.events.itertuples(index=False):
            close(event.thief)
            now[event.victim][2] = event.first
            arrives = event.cycle + event.cost
            rows.append((event.thief, event.cycle, arrives, "transfer", event.first, event.last, event.victim))
            now[event.thief] = [arrives, event.first, event.last, event.victim]
        for unit in range(units):
            close(unit)
        names = ["unit", "start", "finish", "kind", "first", "last", "source"]
        return pd.DataFrame(rows, columns=names).sort_values(["unit", "start"], ignore_index=True)


def redistribute(
    cycles: NDArray[np.int64],
    config: PEArray | None = None,
    *,
    needed: NDArray[np.bool_] | None = None,
    log: bool = False,
) -> Redistribution:
    """Cut a row of outputs into equal stretches, one a unit, and work them off with or without redistribution.

    Args:
        cycles: Cycles of each output, (outputs,), such as `output_loads` gives.
        config: The array; the default one if left out.
        needed: Which outputs are computed, (outputs,); all by default. The others are no part of a unit's queue.
        log: Keep every transfer.

    Returns:
        Times and, if asked for, events.
    """
    if cycles.ndim != 1 or cycles.size == 0 or not np.issubdtype(cycles.dtype, np.integer) or cycles.min() < 0:
        raise ValueError(f"cycles is {cycles.dtype} of shape {cycles.shape}; expected counts of at least one output")
    if needed is not None and (needed.shape != cycles.shape or needed.dtype != np.bool_):
        raise ValueError(f"needed is {needed.dtype} of shape {needed.shape}; expected bool {cycles.shape}")
    return _worked_off(_Loads(cycles[None].astype(np.int64), 1, needed, 0), config or PEArray(), log)


def _worked_off(loads: _Loads, config: PEArray, log: bool = False) -> Redistribution:
    outputs = loads.cycles.size * loads.repeats
    bounds = np.arange(config.units + 1, dtype=np.int64) * outputs // config.units
    prefix = np.empty(outputs + 1, dtype=np.int64)
    needed = np.zeros(0, np.bool_) if loads.needed is None else loads.needed
    prefix = prefix[: _queue(loads.cycles, loads.repeats, needed, bounds, prefix) + 1]
    of_units = np.diff(prefix[bounds])
    alone = int(of_units.max())
    end: float = alone
    transfers = moving = 0
    events = np.zeros((0, 6), np.int64)
    if config.redistribution == "even":
        end = float(of_units.sum()) / config.units
    elif config.redistribution == "stealing":
        end, transfers, moving = _steal(prefix, bounds, config.transfer_start, config.transfer_rate, events)
        if log:
            events = np.zeros((transfers, 6), np.int64)
            _steal(prefix, bounds, config.transfer_start, config.transfer_rate, events)
    return Redistribution(end, alone, transfers, moving, of_units, events, bounds, prefix)


def draw_redistribution(axes: Axes, result: Redistribution, *, until: float | None = None) -> None:
    """Draw what every unit does when, from the log of the transfers.

    Work on a unit's own outputs, work that it took from others, waiting for a transfer, and idling look different.

    Args:
        axes: Where to draw.
        result: What `redistribute` returned with `log=True`.
        until: End of the time axis in cycles; by default when the last unit is done.
    """
    from matplotlib.patches import Patch

    looks = {
        "own outputs": ("#c9d8ea", "", "#4b6a8f"),
        "outputs taken over": ("#0566aa", "", "#02365b"),
        "transfer": ("#a00119", "", "#a00119"),
        "idle": ("white", "////", "#b5b5b5"),
    }
    units, end = len(result.bounds) - 1, result.cycles if until is None else until
    axes.barh(range(units), end, height=0.8, color="white", hatch="////", edgecolor="#b5b5b5", lw=0)
    for row in result.segments().itertuples(index=False):
        own = "own outputs" if row.source == row.unit else "outputs taken over"
        face, hatch, edge = looks["transfer" if row.kind == "transfer" else own]
        axes.barh(
            row.unit, row.finish - row.start, left=row.start, height=0.8, color=face, hatch=hatch, ec=edge, lw=0.8
        )
    handles = [Patch(facecolor=f, hatch=h, edgecolor=e, label=n) for n, (f, h, e) in looks.items()]
    axes.legend(
        handles=handles,
        ncols=4,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        columnspacing=0.9,
        handlelength=1.2,
        fontsize=9,
    )
    axes.set(xlim=(0, end), ylim=(units - 0.4, -0.6), xlabel="cycle", ylabel="unit")
    axes.grid(visible=False, axis="y")


def draw_products(axes: NDArray, entry: LayerTrace, *, image: int = 0, channels: tuple[int, int] = (0, 0)) -> None:
    """Draw which operand's zeros and which outputs each product of a convolution can leave out, from traced masks.

    Args:
        axes: Three rows (forward, dgrad, wgrad) of three axes (the two operands, the result).
        entry: The traced layer, one whose outputs may be skipped.
        image: The image.
        channels: Input and output channel to show.
    """
    from matplotlib.patches import Patch, Rectangle

    masks = _image_masks(entry)
    if np.shape(axes) != (3, 3) or masks.needed is None:
        raise ValueError(f"axes have shape {np.shape(axes)}; expected (3, 3), and a layer whose outputs may be skipped")
    x, g = masks.input[image, channels[0]], masks.gradient[image, channels[1]]
    needed = masks.needed[image, channels[0]]
    weight = np.ones(entry.layer.kernel, np.bool_)
    full = np.ones_like
    kinds = {
        "used": ("#5b8fc0", "", "#2f5f8f"),
        "zero": ("white", "", "#b5b5b5"),
        "left out": ("white", "////", "#777777"),
    }
    panels = (
        (("$x$", x, "zero"), ("$W$", weight, "zero"), ("$z$", full(g), "zero")),
        (("$g^z$", g, "zero"), ("$W$", weight, "zero"), ("$g^x$", needed, "left out")),
        (("$g^z$", g, "zero"), ("$x$", x, "zero"), ("$g^W$", weight, "zero")),
    )
    for product, row, boxes in zip(PRODUCTS, axes, panels, strict=True):
        for ax, (name, mask, off) in zip(row, boxes, strict=True):
            span = max(x.shape + g.shape)
            for place in np.ndindex(mask.shape):
                face, hatch, edge = kinds["used" if mask[place] else off]
                corner = (place[1] - mask.shape[1] / 2, place[0] - mask.shape[0] / 2)
                ax.add_patch(Rectangle(corner, 0.9, 0.9, facecolor=face, hatch=hatch, edgecolor=edge, lw=0.6))
            ax.set(xlim=(-span / 2, span / 2), ylim=(span / 2, -span / 2), aspect="equal", xticks=[], yticks=[])
            ax.set_title(name, fontsize=12)
            ax.spines[:].set_visible(False)
            ax.grid(visible=False)
        row[0].set_ylabel(product, fontsize=12)
        for ax, sign, size in ((row[0], r"$\star$", 24), (row[1], "=", 16)):
            ax.annotate(sign, (1.12, 0.5), xycoords="axes fraction", fontsize=size, ha="center", va="center")
    handles = [Patch(facecolor=f, hatch=h, edgecolor=e, label=n) for n, (f, h, e) in kinds.items()]
    axes[2][1].legend(handles=handles, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 0))


def dense_cycles(layer: Layer, product: Product, config: PEArray | None = None, *, batch: int = 1) -> int:
    """Cycles of a product on the array without any skipping or redistribution.

    Args:
        layer: The layer.
        product: The product.
        config: The array; the default one if left out.
        batch: Images, or samples of a linear layer.
    """
    config = config or PEArray()
    return batch * _dense_cycles(layer, product, config.units, config.lanes)


@lru_cache(maxsize=4096)
def _dense_cycles(layer: Layer, product: Product, units: int, lanes: int) -> int:
    plain = PEArray(units, lanes, "dense")
    shape_in, shape_out = (layer.in_channels, *layer.in_size), (layer.out_channels, *layer.out_size)
    masks = _Masks(np.ones((1, *shape_in), np.bool_), np.ones((1, *shape_out), np.bool_), None)
    loads = _loads(layer, product, masks, 0, "grad_output", plain)
    return _worked_off(loads, plain).alone


def simulate(
    trace: Trace | LayerTrace,
    config: PEArray | None = None,
    *,
    products: Iterable[Product] = PRODUCTS,
    access: AccessEnergy | None = None,
    bits: int = 32,
    minibatch: int | None = None,
) -> pd.DataFrame:
    """Run the traced products of every layer on the array and count cycles, idle multipliers, accesses and energy.

    All units wait for the slowest at the end of every image, layer and product. Memory keeps up.

    Args:
        trace: The masks of a network, or of one layer, as `trace_step` takes them.
        config: The array; the default one if left out.
        products: The products to run; a layer without an input gradient has no dgrad.
        access: Relative energy of an access.
        bits: Width of a value, 16 or 32; a wider value costs in proportion.
        minibatch: Samples that share one transfer of the weights from and to DRAM; by default those of the trace.

    Returns:
        One row a layer and product: layer, kind, product, side (the operand whose zeros may be skipped), sparsity (of
        that operand), eligible, macs, made (those that are left), dense_cycles, cycles, ideal_cycles (if the work left
        filled all multipliers), speedup, ideal, utilisation; the multiplier slots `slots` = used + lane + unit +
        transfer (idle because the lists of an output's lanes differ in length or do not fill the lanes, because
        the unit had nothing left, or because it waited for outputs); transfers; and energies in units of one 16-bit
        multiply-accumulate: core_dense, memory_dense, core, scratchpad, buffer, dram.

    Raises:
        ValueError: If `bits` is neither 16 nor 32, or `minibatch` is not positive.
    """
    if bits not in (16, 32):
        raise ValueError(f"bits is {bits}; expected 16 or 32")
    if minibatch is not None and minibatch < 1:
        raise ValueError(f"minibatch is {minibatch}; expected at least 1")
    config, access = config or PEArray(), access or AccessEnergy()
    wanted = set(products)
    rows = []
    for entry in (trace,) if isinstance(trace, LayerTrace) else trace.layers:
        masks = _image_masks(entry)
        for product in entry.layer.products:
            if product in wanted:
                counts = _simulate_product(entry.layer, product, masks, config)
                share = entry.batch / (minibatch or entry.batch)
                rows.append(counts | _energies(entry.layer, masks, counts, config, access, bits, share))
    return pd.DataFrame(rows)


def _simulate_product(layer: Layer, product: Product, masks: _Masks, config: PEArray) -> dict[str, Any]:
    side = _scheduled(layer, product, masks)
    eligible = product == "dgrad" and masks.needed is not None
    batch = len(masks.input)
    made = busy = transfers = moving = 0
    cycles = 0.0
    for image in range(batch):
        loads = _loads(layer, product, masks, image, side, config)
        result = _worked_off(loads, config)
        made += loads.made
        busy += int(result.unit_cycles.sum())
        cycles += result.cycles
        transfers += result.transfers
        moving += result.transfer_cycles
    slots = config.macs_per_cycle * cycles
    unit = config.lanes * (config.units * cycles - busy - moving)
    if made > config.lanes * busy or unit < -1e-6 * slots:
        raise RuntimeError(f"layer {layer.name!r}, {product}: more work than multipliers; this is a bug")
    macs = batch * layer.in_channels * (layer.out_channels // layer.groups)
    macs *= int(_scatter(np.ones(layer.out_size, np.int64), layer).sum())
    dense, ideal = dense_cycles(layer, product, config, batch=batch), made / config.macs_per_cycle
    mask = masks.input if side == "input" else masks.gradient
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "product": product,
        "side": side,
        "sparsity": 1 - np.count_nonzero(mask) / mask.size,
        "eligible": eligible,
        "macs": macs,
        "made": made,
        "dense_cycles": dense,
        "cycles": cycles,
        "ideal_cycles": ideal,
        "speedup": dense / cycles if cycles else float("inf"),
        "ideal": dense / ideal if ideal else float("inf"),
        "utilisation": made / slots if slots else 1.0,
        "slots": slots,
        "used": made,
        "lane": config.lanes * busy - made,
        "unit": max(0.0, unit),
        "transfer": config.lanes * moving,
        "transfers": transfers,
    }


def _energies(
    layer: Layer,
    masks: _Masks,
    counts: dict[str, Any],
    config: PEArray,
    access: AccessEnergy,
    bits: int,
    weight_share: float,
) -> dict[str, float]:
    """Energies of a product.

    Our accounting: a multiply-accumulate that is made reads its two operands from the unit's scratchpad; the operand
    that is streamed comes there from the shared buffer for every output, the other one stays; every output that is
    computed is written to the buffer once; DRAM moves both operands in and the output out once, the weights and their
    gradient once a minibatch. What is not made costs nothing. Where zeros are skipped, activations and gradients move
    as one bit for each value, and the non-zero values with offsets of 4 bits.
    """
    unit, made, product = bits / 16, counts["made"], counts["product"]
    weights = layer.in_channels // layer.groups * layer.out_channels * layer.kernel[0] * layer.kernel[1]
    x, g = masks.input.size, masks.gradient.size
    kept_x, kept_g = int(np.count_nonzero(masks.input)), int(np.count_nonzero(masks.gradient))
    computed = outputs = {"forward": g, "dgrad": x, "wgrad": weights * len(masks.input)}[product]
    if product == "forward":
        kept_g = g  # the output, before its ReLU
    elif product == "dgrad":
        kept_x = x  # the output, unless it is known to be masked
        if counts["eligible"] and config.skips_outputs and masks.needed is not None:
            computed = kept_x = int(np.count_nonzero(masks.needed))
    values = words = weights * weight_share + x + g
    offset = 4 / bits if config.skips_inputs else 0.0
    if config.scheme != "dense":
        packed = [min(size, (size + kept * (bits + 4)) / bits) for size, kept in ((x, kept_x), (g, kept_g))]
        words = weights * weight_share + sum(packed)
    memory_dense = access.scratchpad * 2 * counts["macs"] + access.buffer * (counts["macs"] + outputs)
    return {
        "core_dense": unit * access.mac * counts["macs"],
        "memory_dense": unit * (memory_dense + access.dram * values),
        "core": unit * access.mac * made,
        "scratchpad": unit * access.scratchpad * made * (2 + offset),
        "buffer": unit * access.buffer * (made * (1 + offset) + computed),
        "dram": unit * access.dram * words,
    }


_SUMS = [
    "macs",
    "made",
    "dense_cycles",
    "cycles",
    "ideal_cycles",
    "slots",
    "used",
    "lane",
    "unit",
    "transfer",
    "transfers",
    "core_dense",
    "memory_dense",
    "core",
    "scratchpad",
    "buffer",
    "dram",
]


def summarise(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Sum the rows of `simulate`, and form the ratios from the sums: never the mean of the layers' ratios.

    Args:
        frame: What `simulate` returned; columns such as network or epoch may have been added.
        by: Columns to group by; none sums everything into one row.

    Returns:
        One row a group with the sums of the counts and energies, and speedup, ideal, utilisation, core_efficiency and
        total_efficiency (energy of the dense array over that of the sparse one, multipliers alone and with memory).
    """
    groups = frame.groupby(list(by), sort=False, observed=True)[_SUMS].sum() if by else frame[_SUMS].sum().to_frame().T
    memory = groups[["scratchpad", "buffer", "dram"]].sum(axis=1)
    result = groups.assign(
        speedup=groups["dense_cycles"] / groups["cycles"],
        ideal=groups["dense_cycles"] / groups["ideal_cycles"],
        utilisation=groups["used"] / groups["slots"],
        core_efficiency=groups["core_dense"] / groups["core"],
        total_efficiency=(groups["core_dense"] + groups["memory_dense"]) / (groups["core"] + memory),
    )
    return result.reset_index(drop=not by)


def cycle_report(
    trace: Trace,
    configs: Mapping[str, PEArray],
    *,
    minibatch: int | None = None,
    kinds: Collection[str] = ("conv",),
) -> dict[str, float]:
    """What a training run logs of a trace: the sums of `summarise` for each product and configuration.

    Args:
        trace: The trace.
        configs: Name -> array.
        minibatch: See `simulate`.
        kinds: Kinds of layers to count, of "conv" and "linear".

    Returns:
        Numbers by "configuration/product/quantity"; `read_report` makes a table of them again. Besides, for every
        layer, "layer/name/input_zeros" and "layer/name/gradient_zeros", shares from 0 to 1, and "layer/name/factor",
        the multiply-accumulates of dgrad over those left by IN+OUT; `read_layers` makes a table of these.
    """
    chosen = Trace(tuple(entry for entry in trace.layers if entry.layer.kind in kinds), trace.precision, trace.notes)
    report: dict[str, float] = {}
    for entry in chosen.layers:
        report[f"layer/{entry.layer.name}/input_zeros"] = entry.masks["input"].sparsity
        report[f"layer/{entry.layer.name}/gradient_zeros"] = entry.masks["grad_output"].sparsity
    for row in mac_counts(chosen).to_dict("records"):
        if row["product"] == "dgrad":
            report[f"layer/{row['layer']}/factor"] = row["dense"] / max(1, row["IN+OUT"])
    for name, config in configs.items():
        for row in summarise(simulate(chosen, config, minibatch=minibatch), ["product"]).to_dict("records"):
            report |= {f"{name}/{row['product']}/{quantity}": float(row[quantity]) for quantity in _SUMS}
    return report


def read_report(frame: pd.DataFrame, keep: Sequence[str] = ("arm", "seed", "epoch")) -> pd.DataFrame:
    """Turn the columns that `cycle_report` logged into a tidy table.

    Args:
        frame: A table with columns named "configuration/product/quantity" beside others.
        keep: Columns to keep.

    Returns:
        One row a row of `frame`, configuration and product: the kept columns, config, product, and the quantities,
        ready for `summarise`.
    """
    return read_products(frame, keep, _SUMS, "IN+OUT/dgrad/cycles")


def read_layers(frame: pd.DataFrame, keep: Sequence[str] = ("arm", "seed", "epoch")) -> pd.DataFrame:
    """Turn the columns that `cycle_report` logged of each layer into a tidy table.

    Args:
        frame: A table with columns named "layer/name/quantity" beside others.
        keep: Columns to keep.

    Returns:
        One row a row of `frame` and layer of its network, in the order of execution: the kept columns, layer,
        input_zeros, gradient_zeros and factor (missing for a layer without dgrad).
    """
    names = [column for column in frame.columns if column.startswith("layer/")]
    if not names:
        raise ValueError("the table has no columns of a cycle report's layers, such as 'layer/0/factor'")
    long = frame.melt([*keep], names, value_name="value").dropna(subset="value")
    long[["layer", "quantity"]] = long["variable"].str.split("/", expand=True)[[1, 2]]
    order = list(dict.fromkeys(name.split("/")[1] for name in names))
    long["layer"] = pd.Categorical(long["layer"], categories=order, ordered=True)
    wide = long.pivot(index=[*keep, "layer"], columns="quantity", values="value").reset_index()
    return wide.astype({"layer": str}).rename_axis(columns=None)


# --------------------------------------------------------------------------------------------------------------------
# The numbers that the array computes


@compiled
def _run_windows(
    values: NDArray,
    inside: NDArray[np.bool_],
    weights: NDArray,
    source: NDArray[np.int64],
    positions: NDArray[np.int64],
    needed: NDArray[np.bool_],
    skip: bool,
    lanes: int,
    out: NDArray,
    load: NDArray[np.int64],
) -> int:
    """Compute the outputs of a phase of forward or dgrad as a unit does; returns the multiply-accumulates made.

    `values` (N, groups, S, R) is the streamed operand with a margin of zeros, `inside` (S,) where it is no margin,
    `weights` (groups, O, T, R), `source` (P, T) the place that each position reads at each tap, `positions` (P,) the
    outputs' places; `needed`, `out` and `load` are (N, groups, O, places).
    """
    images, groups, _, reduced = values.shape
    sums = np.zeros(lanes, values.dtype)
    count = np.zeros(lanes, np.int64)
    made = 0
    for n in range(images):
        for g in range(groups):
            for o in range(weights.shape[1]):
                for p in range(positions.size):
                    place = positions[p]
                    if not needed[n, g, o, place]:
                        continue
                    sums[:] = 0
                    count[:] = 0
                    for t in range(source.shape[1]):
                        s = source[p, t]
                        if not inside[s]:
                            continue
                        for r in range(reduced):
                            value = values[n, g, s, r]
                            if skip and value == 0:
                                continue
                            sums[r % lanes] += value * weights[g, o, t, r]
                            count[r % lanes] += 1
                    total = sums[0]
                    for lane in range(1, lanes):
                        total += sums[lane]
                    out[n, g, o, place] = total
                    load[n, g, o, place] = count.max()
                    made += count.sum()
    return made


@compiled
def _run_positions(
    gradient: NDArray,
    values: NDArray,
    inside: NDArray[np.bool_],
    source: NDArray[np.int64],
    skip: int,
    lanes: int,
    out: NDArray,
    load: NDArray[np.int64],
) -> int:
    """Compute the weight gradients of each image as a unit does; returns the multiply-accumulates made.

    `gradient` (N, groups, O, P), `values` (N, groups, I, S) with a margin, `source` (P, T); `skip` is 0 for none, 1 for
    zero gradients, 2 for zero inputs; `out` and `load` are (N, groups, O, I, T).
    """
    images, groups, outs, count_positions = gradient.shape
    sums = np.zeros(lanes, gradient.dtype)
    count = np.zeros(lanes, np.int64)
    made = 0
    for n in range(images):
        for g in range(groups):
            for o in range(outs):
                for i in range(values.shape[2]):
                    for t in range(source.shape[1]):
                        sums[:] = 0
                        count[:] = 0
                        lane = 0
                        for p in range(count_positions):
                            s = source[p, t]
                            if not inside[s]:
                                continue
                            a, b = gradient[n, g, o, p], values[n, g, i, s]
                            if not ((skip == 1 and a == 0) or (skip == 2 and b == 0)):
                                sums[lane % lanes] += a * b
                                count[lane % lanes] += 1
                            lane += 1
                        total = sums[0]
                        for j in range(1, lanes):
                            total += sums[j]
                        out[n, g, o, i, t] = total
                        load[n, g, o, i, t] = count.max()
                        made += count.sum()
    return made


def _with_margin(values: NDArray, groups: int) -> tuple[NDArray, NDArray[np.bool_]]:
    """(N, C, H, W) to (N, groups, C / groups, (H + 1) * (W + 1)) with zeros at the end of every row and image."""
    images, channels, height, width = values.shape
    padded = np.zeros((images, channels, height + 1, width + 1), dtype=values.dtype)
    padded[:, :, :-1, :-1] = values
    inside = np.zeros((height + 1, width + 1), dtype=np.bool_)
    inside[:-1, :-1] = True
    return padded.reshape(images, groups, channels // groups, -1), inside.reshape(-1)


def _run_product(
    layer: Layer,
    product: Product,
    tensors: Mapping[Operand, NDArray],
    needed: NDArray[np.bool_] | None,
    skip: Operand | None,
    lanes: int = 16,
) -> tuple[NDArray, NDArray[np.int64], int]:
    """Values, cycles and multiply-accumulates of a product of a convolution, computed as the array's units do.

    Args:
        layer: The layer, a convolution.
        product: The product.
        tensors: Its operands.
        needed: Outputs of dgrad to compute, (N, C, H, W); all by default.
        skip: The operand whose zeros are skipped.
        lanes: Lanes of a unit.

    Returns:
        Outputs (N, K, OH, OW), (N, C, H, W) or (N, K, C / groups, kh, kw), their cycles, and the work made.
    """
    groups, taps = layer.groups, layer.kernel[0] * layer.kernel[1]
    ins, outs = layer.in_channels // groups, layer.out_channels // groups
    if product == "wgrad":
        gradient = tensors["grad_output"]
        images = len(gradient)
        values, inside = _with_margin(tensors["input"], groups)
        out = np.zeros((images, groups, outs, ins, taps), dtype=gradient.dtype)
        load = np.zeros(out.shape, np.int64)
        code = {None: 0, "grad_output": 1, "input": 2, "weight": 0}[skip]
        source = phases(layer, "wgrad")[0].source
        flat = np.ascontiguousarray(gradient).reshape(images, groups, outs, -1)
        made = _run_positions(flat, values, inside, source, code, lanes, out, load)
        weights = (images, *layer.weight_shape)
        return out.reshape(weights), load.reshape(weights), made
    forward = product == "forward"
    streamed, weight = tensors["input" if forward else "grad_output"], tensors["weight"]
    produced, size = (outs, layer.out_size) if forward else (ins, layer.in_size)
    values, inside = _with_margin(streamed, groups)
    values = np.ascontiguousarray(values.swapaxes(2, 3))
    shape = (len(streamed), groups, produced, size[0] * size[1])
    out, load = np.zeros(shape, dtype=streamed.dtype), np.zeros(shape, np.int64)
    mask = np.ones(shape, np.bool_) if needed is None else np.ascontiguousarray(needed).reshape(shape)
    kernels = weight.reshape(groups, outs, ins, *layer.kernel)
    made = 0
    for phase in phases(layer, product):
        kept = kernels[:, :, :, phase.taps[:, 0], phase.taps[:, 1]]  # (groups, outs, ins, T)
        kept = np.ascontiguousarray(kept.transpose((0, 1, 3, 2) if forward else (0, 2, 3, 1)))
        made += _run_windows(
            values, inside, kept, phase.source, phase.positions, mask, skip is not None, lanes, out, load
        )
    full = (len(streamed), groups * produced, *size)
    return out.reshape(full), load.reshape(full), made


def _skipped_input_gradient(
    conv: nn.Conv2d, weight: Tensor, gradient: Tensor, needed: Tensor, skip: bool
) -> tuple[Tensor, int]:
    """The needed gradients of a convolution's input, and the multiply-accumulates that they took."""
    layer = Layer(
        "masked",
        "conv",
        conv.in_channels,
        conv.out_channels,
        kernel=(conv.kernel_size[0], conv.kernel_size[1]),
        stride=(conv.stride[0], conv.stride[1]),
        padding=(int(conv.padding[0]), int(conv.padding[1])),
        dilation=(conv.dilation[0], conv.dilation[1]),
        groups=conv.groups,
        in_size=(needed.shape[-2], needed.shape[-1]),
        out_size=(gradient.shape[-2], gradient.shape[-1]),
    )
    tensors: dict[Operand, NDArray] = {
        "weight": weight.detach().cpu().numpy(),
        "grad_output": gradient.detach().cpu().numpy(),
    }
    mask = needed.cpu().numpy() if skip else None
    values, _, made = _run_product(layer, "dgrad", tensors, mask, "grad_output" if skip else None)
    return torch.from_numpy(values).to(gradient), made


def random_trace(
    layer: Layer,
    *,
    input_zeros: float = 0.5,
    gradient_zeros: float = 0.5,
    batch: int = 1,
    seed: int = 0,
    eligible: bool = True,
) -> LayerTrace:
    """A layer whose input and output gradient are zero at random, each value independently of all others.

    Args:
        layer: The layer.
        input_zeros: Share of zeros of the input, 0 to 1; its ReLU is off at these.
        gradient_zeros: Share of zeros of the output gradient, 0 to 1.
        batch: Images, or samples of a linear layer.
        seed: Seed of the generator.
        eligible: Whether the input is the output of a ReLU.
    """
    for name, share in (("input_zeros", input_zeros), ("gradient_zeros", gradient_zeros)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}; expected 0 to 1")
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    generator = np.random.default_rng(seed)
    linear = layer.kind == "linear"
    x = generator.random((batch, layer.in_channels, *(() if linear else layer.in_size))) >= input_zeros
    g = generator.random((batch, layer.out_channels, *(() if linear else layer.out_size))) >= gradient_zeros
    weight = np.ones(layer.weight_shape[: 2 if linear else 4], np.bool_)
    masks: dict[Operand, Packed] = {"input": Packed.of(x), "weight": Packed.of(weight), "grad_output": Packed.of(g)}
    return LayerTrace(layer, masks, {}, {_NEEDED: Packed.of(x)} if eligible else {})


def value_check(
    layer: Layer, config: PEArray | None = None, *, sparsity: float = 0.6, batch: int = 2, seed: int = 0
) -> pd.DataFrame:
    """Compute the three products as the units do, and compare values, work and cycles with independent ones.

    The operands are small integers held in float64, so that every order of addition gives the same sum, to the bit.
    The input counts as the output of a ReLU, and its gradients are compared where this ReLU was on.

    Args:
        layer: The layer, a convolution.
        config: The array; its scheme says what is skipped. Its units have lanes of their own ("lane").
        sparsity: Share of zeros in the input and the output gradient.
        batch: Images.
        seed: Seed of the operands.

    Returns:
        One row a product: product, outputs, equal (those whose value is PyTorch's), macs, made by the units, counted
        by `mac_counts`, busy (cycles of all outputs together by the units) and predicted (by `output_loads`).
    """
    config = config or PEArray()
    if layer.kind != "conv" or config.packing != "lane":
        raise ValueError(f"layer is {layer.kind!r}, packing {config.packing!r}; expected 'conv' and 'lane'")
    generator = np.random.default_rng(seed)

    def integers(low: int, *shape: int) -> Tensor:
        values = generator.integers(low, 9, shape)
        values[values == 0] = 9
        return torch.tensor(np.where(generator.random(shape) < sparsity, 0, values), dtype=torch.float64)

    x = integers(1, batch, layer.in_channels, *layer.in_size).requires_grad_()
    w = torch.tensor(generator.integers(-9, 9, layer.weight_shape), dtype=torch.float64).requires_grad_()
    out = F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    gy = integers(-8, *out.shape)
    (gx,) = torch.autograd.grad(out, x, gy, retain_graph=True)
    per_image = [torch.autograd.grad(out, w, _only(gy, image), retain_graph=True)[0] for image in range(batch)]
    tensors: dict[Operand, NDArray] = {
        "input": x.detach().numpy(),
        "weight": w.detach().numpy(),
        "grad_output": gy.numpy(),
    }
    on = tensors["input"] > 0
    masks: dict[Operand, Packed] = {name: Packed.of(tensor != 0) for name, tensor in tensors.items()}
    entry = LayerTrace(layer, masks, {}, {_NEEDED: Packed.of(on)})
    counted = mac_counts(entry).set_index("product")
    wanted = {"forward": out.detach().numpy(), "dgrad": gx.numpy(), "wgrad": torch.stack(per_image).numpy()}
    rows = []
    for product in PRODUCTS:
        side = _scheduled(layer, product, _image_masks(entry)) if config.skips_inputs else None
        needed = on if product == "dgrad" and config.skips_outputs else None
        values, load, made = _run_product(layer, product, tensors, needed, side, config.lanes)
        same = values == (wanted[product] if needed is None else np.where(on, wanted[product], 0))
        predicted = sum(int(output_loads(entry, product, config, image=image).sum()) for image in range(batch))
        work = (counted.loc[product, "dense"], made, counted.loc[product, config.scheme])
        row = (product, same.size, int(same.sum()), *work, int(load.sum()), predicted)
        names = ("product", "outputs", "equal", "macs", "made", "counted", "busy", "predicted")
        rows.append(dict(zip(names, row, strict=True)))
    return pd.DataFrame(rows)


def _only(tensor: Tensor, image: int) -> Tensor:
    result = torch.zeros_like(tensor)
    result[image] = tensor[image]
    return result


# --------------------------------------------------------------------------------------------------------------------
# Networks, traces, training


def trace_step(
    model: nn.Module, x: Tensor, y: Tensor, *, samples: int | None = None, layers: Collection[str] | None = None
) -> Trace:
    """Trace one training step of a classifier: the masks of every layer, and where its input gradients are needed.

    Args:
        model: Maps `x` to logits; its gradients are cleared afterwards.
        x: Images, (N, C, H, W).
        y: Their classes, (N,).
        samples: Keep the first so many.
        layers: Names of the layers to watch; all by default.
    """
    with capture(model, layers, samples=samples, also={_NEEDED: derivative_mask}) as recorder:
        F.cross_entropy(model(x), y).backward()
    model.zero_grad(set_to_none=True)
    return recorder.trace()


def trace_full_size(name: str, *, batch: int = 2, seed: int = 0) -> Trace:
    """The convolutions of a network of `FULL_SIZE` in its first training step, on 224 x 224 images of normal noise.

    Args:
        name: The network.
        batch: Images.
        seed: Seed of the weights, the images and their classes.
    """
    torch.manual_seed(seed)
    if name not in FULL_SIZE:
        raise ValueError(f"network {name!r} is not of full size; expected one of {', '.join(FULL_SIZE)}")
    model = build(name, image_size=224, num_classes=1000)
    x, y = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))
    convolutions = [layer for layer, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return trace_step(model, x, y, layers=convolutions)


class _ResidualBlock(nn.Module):
    """ResNet's basic block: two 3x3 convolutions with batch normalisation, and a shortcut, ReLU after the sum."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) to (B, width, H / stride, W / stride)."""
        out = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(out + self.shortcut(x))


def residual_net(*, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """A ResNet of three basic blocks (eight layers), for images of 8 to 64 pixels.

    Args:
        in_channels: Channels of the image.
        num_classes: Outputs.
        width: Channels of the first block; each later one has twice as many.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _ResidualBlock(width, width, 1),
        _ResidualBlock(width, 2 * width, 2),
        _ResidualBlock(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )


def separable_net(*, in_channels: int = 3, num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """A small MobileNet of depthwise separable convolutions with batch normalisation and ReLU6.

    Args:
        in_channels: Channels of the image.
        num_classes: Outputs.
        width: Channels of the first convolution.
    """
    layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
    layers.append(nn.ReLU6())
    channels = width
    for stride in (1, 2, 1, 2):
        wider = 2 * channels if stride == 2 or channels == width else channels
        layers += [
            nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(),
            nn.Conv2d(channels, wider, 1, bias=False),
            nn.BatchNorm2d(wider),
            nn.ReLU6(),
        ]
        channels = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def build(name: str, *, in_channels: int = 3, image_size: int = 32, num_classes: int = 10) -> nn.Module:
    """A network by its name, randomly initialised.

    Args:
        name: One of `FULL_SIZE` (torchvision's networks, and timm's for "mobilenetv1"; GoogLeNet without its auxiliary
            classifiers) or of `SMALL`: "plain", "plain-bn" and "dense" are those of `workloads.build_network`,
            "residual" is `residual_net`, "separable" is `separable_net`.
        in_channels: Channels of the image; 3 for a network of full size.
        image_size: Height and width of the image; below 32 the small networks are narrower.
        num_classes: Outputs.

    Raises:
        ValueError: If the name is unknown, or a network of full size is asked for other than three channels.
    """
    if name in FULL_SIZE:
        if in_channels != 3:
            raise ValueError(f"network {name!r} takes images of 3 channels, not {in_channels}")
        if name == "mobilenetv1":
            import timm

            return timm.create_model("mobilenetv1_100", pretrained=False, num_classes=num_classes)
        from torchvision.models import get_model

        options: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
        return get_model(name, weights=None, num_classes=num_classes, **options)
    if name in ("plain", "plain-bn", "dense"):
        return build_network(name, in_channels=in_channels, image_size=image_size, num_classes=num_classes)
    if name not in SMALL:
        raise ValueError(f"network {name!r} is unknown; expected one of {', '.join((*FULL_SIZE, *SMALL))}")
    make = residual_net if name == "residual" else separable_net
    return make(in_channels=in_channels, num_classes=num_classes, width=8 if image_size < 32 else 16)


@dataclass
class ReluOverlap:
    """How the zeros of a network's ReLUs and of their gradients overlap, in one forward and backward pass.

    Attributes:
        rows: One entry a call of a ReLU: name, values, zero_outputs, zero_gradients (of the ReLU's input), both.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """One row a call of a ReLU, in the order of the backward pass."""
        return pd.DataFrame(self.rows)

    def totals(self) -> dict[str, float]:
        """The sums over all ReLUs, by the names that a training run logs."""
        names = ("values", "zero_outputs", "zero_gradients", "both")
        return {f"relu/{name}": float(sum(row[name] for row in self.rows)) for name in names}


@contextmanager
def watch_relus(model: nn.Module) -> Iterator[ReluOverlap]:
    """Watch one forward and one backward pass, and compare the zeros before and after every ReLU of a model.

    Use it as `with watch_relus(model) as seen: loss(model(x), y).backward()`.

    Args:
        model: Its `nn.ReLU` and `nn.ReLU6` modules are watched; a ReLU called as a function is not seen.

    Yields:
        The overlap; filled when the gradients have passed.

    Raises:
        ValueError: If the model has no ReLU module.
    """
    seen, handles = ReluOverlap(), []
    calls: dict[str, dict[str, Tensor]] = {}  # the call under way of each ReLU; one module may run several times
    for name, module in model.named_modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):

            def before(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                call = calls[name] = {}

                def note(gradient: Tensor) -> None:
                    zero, off = gradient == 0, call.pop("off")
                    counts = {"zero_outputs": off.sum(), "zero_gradients": zero.sum(), "both": (off & zero).sum()}
                    row = {"name": name, "values": zero.numel()}
                    seen.rows.append(row | {key: int(value) for key, value in counts.items()})

                if args[0].requires_grad:
                    args[0].register_hook(note)

            def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                calls[name]["off"] = output.detach() == 0

            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    if not handles:
        raise ValueError("the model has no nn.ReLU or nn.ReLU6 module to watch")
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _OverlapCallback(L.Callback):
    """Log the overlap of the zeros on the last training batch of every epoch."""

    def __init__(self) -> None:
        self._open: tuple[Any, ReluOverlap] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        found = any(isinstance(module, nn.ReLU | nn.ReLU6) for module in pl_module.modules())
        if found and batch_idx + 1 == trainer.num_training_batches:
            watch = watch_relus(pl_module)
            self._open = (watch, watch.__enter__())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._open is not None:
            (watch, seen), self._open = self._open, None
            watch.__exit__(None, None, None)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in seen.totals().items()})

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if self._open is not None:
            self._open[0].__exit__(None, None, None)
            self._open = None


class SparsityClassifier(TracedClassifier):
    """An image classifier that logs, at the end of every epoch, what the arrays make of its last batch.

    Besides the numbers of `cycle_report` an epoch has those of `ReluOverlap.totals`, if the model has ReLU modules.

    Args:
        model: The model.
        optimizer: Builds the optimiser from parameter groups.
        num_classes: Number of classes.
        configs: Name -> array to emulate.
        samples: Samples of the batch to trace.
        minibatch: See `simulate`.
        warmup_fraction: Share of the steps in which the learning rate rises.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        *,
        num_classes: int,
        configs: Mapping[str, PEArray],
        samples: int = 16,
        minibatch: int | None = None,
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            num_classes=num_classes,
            report=partial(cycle_report, configs=configs, minibatch=minibatch),
            samples=samples,
            warmup_fraction=warmup_fraction,
            also={_NEEDED: derivative_mask},
        )

    def configure_callbacks(self) -> list[L.Callback]:
        """Hand the tracing callbacks to the trainer."""
        return [*super().configure_callbacks(), _OverlapCallback()]
