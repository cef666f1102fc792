r"""Video networks without 5D tensors: a 3D convolution as two 2D convolutions on views of one tensor.

Paper: Hajimolahoseini and others, "Is 3D Convolution with 5D Tensors Really Necessary for Video Analysis?", NeurIPS
ENLSP workshop 2024, PMLR 262, arXiv 2407.16514.

A batch of B clips of T frames is held as :math:`(BT, C, X, Y)`. In the channels-last layout the very same memory is
:math:`(B, C, T, XY)`: a picture whose height is time and whose width runs over the pixels. A 2D convolution on the
first view sees space, one with a :math:`d \times 1` kernel on the second sees time:

.. math::

    y = K^{s} * x_{\text{frames}} + K^{t} * x_{\text{pixels}}, \qquad
    (K^t * x)[t, n] = \sum_{\tau} K^t_\tau\, x[s t + \tau,\, s^2 n] .

With stride s > 1 the spatial branch still has all frames, and a 1x1 convolution with stride s in time follows. The
temporal branch strides :math:`s^2` pixels along XY, as the paper has it; that does *not* visit the pixels
:math:`(si, sj)` that the spatial branch looks at. `sampling="aligned"` does. The two branches are added, or
concatenated (then a block has twice the channels).

>>> block = Conv4D(16, 32, stride=2)
>>> clips = torch.zeros(2 * 8, 16, 12, 12).to(memory_format=torch.channels_last)
>>> tuple(block(clips, frames=8).shape)
(8, 32, 6, 6)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torchvision.models import inception_v3

__all__ = [
    "ClipNet",
    "Combine",
    "Conv4D",
    "EcoLite",
    "FrameNet",
    "Kind",
    "Rank1",
    "SpaceThenTime",
    "SpaceWithTime",
    "VideoNet",
    "channels_last",
    "to_clips",
    "to_frames",
    "to_pixels",
]

Combine = Literal["add", "cat"]
Sampling = Literal["flat", "aligned"]
#: Ways to convolve a clip: the 3D convolution, the older factorised blocks, and the two of the paper.
Kind = Literal["conv3d", "r2plus1d", "p3d-a", "p3d-b", "p3d-c", "rank-1", "add", "cat"]


def to_pixels(x: Tensor, frames: int) -> Tensor:
    """Frames as pictures of pixels over time; no copy if the memory is channels-last.

    Args:
        x: (BT, C, X, Y).
        frames: T.

    Returns:
        (B, C, T, XY).

    Raises:
        ValueError: If the batch is not a multiple of the frames.
    """
    if frames < 1 or x.shape[0] % frames:
        raise ValueError(f"frames={frames}: expected a divisor of the first size, {x.shape[0]}")
    batch, (channels, height, width) = x.shape[0] // frames, x.shape[1:]
    return x.permute(0, 2, 3, 1).reshape(batch, frames, height * width, channels).permute(0, 3, 1, 2)


def to_frames(x: Tensor, height: int) -> Tensor:
    """Pictures of pixels over time as frames again; no copy if the memory is channels-last.

    Args:
        x: (B, C, T, XY).
        height: X.

    Returns:
        (BT, C, X, Y).

    Raises:
        ValueError: If the height does not divide the pixels.
    """
    batch, channels, frames, pixels = x.shape
    if height < 1 or pixels % height:
        raise ValueError(f"height={height}: expected a divisor of the last size, {pixels}")
    return x.permute(0, 2, 3, 1).reshape(batch * frames, height, pixels // height, channels).permute(0, 3, 1, 2)


def to_clips(x: Tensor, frames: int) -> Tensor:
    """Frames (BT, C, X, Y) as clips (B, C, T, X, Y).

    Args:
        x: Frames.
        frames: T, a divisor of the first size.
    """
    return x.unflatten(0, (-1, frames)).transpose(1, 2)


class Conv4D(nn.Module):
    """The paper's block: space and time as two 2D convolutions.

    Args:
        in_channels: C.
        out_channels: S of each branch; `cat` gives twice as many channels.
        stride: In time and space alike, 1 or more.
        kernel: Odd size d of the kernels.
        combine: Whether the branches are added or concatenated.
        sampling: Which pixels the temporal branch visits if the stride s is above 1: each s * s-th (`flat`, as in the
            paper), or those of the spatial branch (`aligned`).

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        kernel: int = 3,
        combine: Combine = "add",
        sampling: Sampling = "flat",
    ) -> None:
        super().__init__()
        if stride < 1 or kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"stride={stride}, kernel={kernel}: expected a stride of at least 1 and an odd kernel")
        if combine not in get_args(Combine) or sampling not in get_args(Sampling):
            raise ValueError(f"combine={combine!r}, sampling={sampling!r}: expected add or cat, flat or aligned")
        self.stride, self.combine, self.sampling = stride, combine, sampling
        self.space = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.thin = nn.Conv2d(out_channels, out_channels, 1, (stride, 1), bias=False) if stride > 1 else nn.Identity()
        across = stride**2 if sampling == "flat" else 1
        self.time = nn.Conv2d(in_channels, out_channels, (kernel, 1), (stride, across), (kernel // 2, 0), bias=False)

    @property
    def channels(self) -> int:
        """Channels of the output."""
        return self.space.out_channels * (2 if self.combine == "cat" else 1)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Convolve clips.

        Args:
            x: (BT, C, X, Y), best in channels-last memory.
            frames: T.

        Returns:
            (BT/s, S, X/s, Y/s), or with 2S channels.

        Raises:
            ValueError: If the stride does not divide T, X and Y, or T does not divide the batch.
        """
        height, width = x.shape[2:]
        if frames % self.stride or height % self.stride or width % self.stride:
            raise ValueError(
                f"{frames} frames of {height} x {width} pixels: expected multiples of the stride, {self.stride}"
            )
        space = self.thin(to_pixels(self.space(x), frames))
        if self.sampling == "aligned" and self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        time = self.time(to_pixels(x, frames))
        both = space + time if self.combine == "add" else torch.cat([space, time], dim=1)
        return to_frames(both, height // self.stride)


class _Shortcut4D(nn.Module):
    """The projection of a residual block in 4D: a 1x1 convolution in space, and one with a stride in time."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.space = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.thin = nn.Conv2d(out_channels, out_channels, 1, (stride, 1), bias=False) if stride > 1 else None

    def forward(self, x: Tensor, frames: int) -> Tensor:
        y = self.space(x)
        if self.thin is None:
            return y
        return to_frames(self.thin(to_pixels(y, frames)), x.shape[2] // self.stride)


class _Conv3d(nn.Conv3d):
    """A 3D convolution that is called like the blocks of this module, and gives channels-last clips for such clips."""

    def forward(self, x: Tensor, frames: int = 0) -> Tensor:
        y = super().forward(x)
        # With one thread and a small batch, PyTorch takes another routine where the kernel has one pixel; it answers in
        # the default layout, and all that follows would be converted back and forth.
        if x.is_contiguous(memory_format=torch.channels_last_3d):
            return y.contiguous(memory_format=torch.channels_last_3d)
        return y


def _conv(inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> _Conv3d:
    padding = tuple(k // 2 for k in kernel)
    return _Conv3d(inputs, outputs, kernel, stride, cast(tuple[int, int, int], padding), bias=False)


def _along(axis: int, value: int) -> tuple[int, int, int]:
    return (value if axis == 0 else 1, value if axis == 1 else 1, value if axis == 2 else 1)


class SpaceThenTime(nn.Module):
    """A convolution over space, then one over time: R(2+1)D with a normalised middle, or P3D-A.

    Args:
        in_channels: C.
        out_channels: S.
        stride: In time and space alike.
        middle: Channels between the two. None takes S and no normalisation (P3D-A); R(2+1)D takes as many as give it
            the weights of a 3D convolution, see `VideoNet`.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, middle: int | None = None) -> None:
        super().__init__()
        width = out_channels if middle is None else middle
        self.space = _conv(in_channels, width, (1, 3, 3), (1, stride, stride))
        self.between = nn.Identity() if middle is None else nn.Sequential(nn.BatchNorm3d(width), nn.ReLU(inplace=True))
        self.time = _conv(width, out_channels, (3, 1, 1), (stride, 1, 1))

    def forward(self, x: Tensor, frames: int = 0) -> Tensor:
        """Clips (B, C, T, X, Y) to (B, S, T/s, X/s, Y/s)."""
        return self.time(self.between(self.space(x)))


class SpaceWithTime(nn.Module):
    """The sum of a convolution over space and one over time: P3D-B, or P3D-C.

    Args:
        in_channels: C.
        out_channels: S.
        stride: In time and space alike.
        after: Whether the convolution over time takes the other's output (P3D-C) or the block's input (P3D-B).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, after: bool) -> None:
        super().__init__()
        self.after = after
        whole = (stride, stride, stride)
        width, along = (out_channels, (1, 1, 1)) if after else (in_channels, whole)
        self.space = _conv(in_channels, out_channels, (1, 3, 3), whole)
        self.time = _conv(width, out_channels, (3, 1, 1), along)

    def forward(self, x: Tensor, frames: int = 0) -> Tensor:
        """Clips (B, C, T, X, Y) to (B, S, T/s, X/s, Y/s)."""
        space = self.space(x)
        return space + self.time(space if self.after else x)


class Rank1(nn.Sequential):
    """Three convolutions in a row, along time, height and width.

    Args:
        in_channels: C.
        out_channels: S.
        stride: In time and space alike; each convolution has it along its own axis.
        size: Size of each kernel; 1 makes the projection of a residual block, and its first convolution has the whole
            stride.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, size: int = 3) -> None:
        along = [_along(own, size) for own in range(3)]
        strides = [_along(own, stride) for own in range(3)] if size > 1 else [(stride,) * 3, (1, 1, 1), (1, 1, 1)]
        widths = (in_channels, out_channels, out_channels, out_channels)
        super().__init__(*(_conv(widths[i], widths[i + 1], along[i], strides[i]) for i in range(3)))

    def forward(self, x: Tensor, frames: int = 0) -> Tensor:
        """Clips (B, C, T, X, Y) to (B, S, T/s, X/s, Y/s)."""
        return super().forward(x)


def _block(kind: Kind, inputs: int, outputs: int, stride: int, sampling: Sampling) -> nn.Module:
    if kind in ("add", "cat"):
        return Conv4D(inputs, outputs, stride, combine=cast(Combine, kind), sampling=sampling)
    if kind == "r2plus1d":
        return SpaceThenTime(inputs, outputs, stride, middle=27 * inputs * outputs // (9 * inputs + 3 * outputs))
    if kind == "p3d-a":
        return SpaceThenTime(inputs, outputs, stride)
    if kind in ("p3d-b", "p3d-c"):
        return SpaceWithTime(inputs, outputs, stride, after=kind == "p3d-c")
    if kind == "rank-1":
        return Rank1(inputs, outputs, stride)
    return _Conv3d(inputs, outputs, 3, stride, 1, bias=False)


def _projection(kind: Kind, inputs: int, outputs: int, stride: int) -> nn.Module:
    if kind in ("add", "cat"):
        return _Shortcut4D(inputs, outputs, stride)
    if kind == "rank-1":
        return Rank1(inputs, outputs, stride, size=1)
    return _Conv3d(inputs, outputs, 1, stride, bias=False)


class _Residual(nn.Module):
    """Two convolutions of one kind with normalisation and ReLU, and a shortcut."""

    def __init__(self, kind: Kind, inputs: int, outputs: int, stride: int, sampling: Sampling) -> None:
        super().__init__()
        wide = outputs * (2 if kind == "cat" else 1)
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d if kind in ("add", "cat") else nn.BatchNorm3d
        self.stride = stride
        self.conv1, self.bn1 = _block(kind, inputs, outputs, stride, sampling), norm(wide)
        self.conv2, self.bn2 = _block(kind, wide, outputs, 1, sampling), norm(wide)
        self.shortcut = _projection(kind, inputs, wide, stride) if stride > 1 or inputs != wide else None
        self.bn3 = norm(wide) if self.shortcut is not None else None

    def forward(self, x: Tensor, frames: int) -> Tensor:
        y = self.bn1(self.conv1(x, frames)).relu()
        y = self.bn2(self.conv2(y, frames // self.stride))
        if self.shortcut is not None and self.bn3 is not None:
            x = self.bn3(self.shortcut(x, frames))
        return (x + y).relu()


class VideoNet(nn.Module):
    """Stages of residual blocks of one kind, and a classifier.

    Args:
        kind: How clips are convolved.
        in_channels: Channels of a frame.
        num_classes: Logits.
        widths: Width of each stage; every stage but the first halves time, height and width.
        blocks: Blocks in a stage.
        sampling: See `Conv4D`.

    Raises:
        ValueError: If there is no such kind, or no stage or block.
    """

    def __init__(
        self,
        kind: Kind,
        *,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...] = (128, 256, 512),
        blocks: int = 2,
        sampling: Sampling = "flat",
    ) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(get_args(Kind))}")
        if not widths or min(widths) < 1 or blocks < 1:
            raise ValueError(f"widths={widths}, blocks={blocks}: expected at least one stage and block, widths above 0")
        self.kind = kind
        self.stages, wide = nn.ModuleList(), in_channels
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage and not block else 1
                self.stages.append(_Residual(kind, wide, width, stride, sampling))
                wide = width * (2 if kind == "cat" else 1)
        self.head = nn.Linear(wide, num_classes)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Logits (B, num_classes) of frames (BT, C, X, Y), T to a clip."""
        if self.kind not in ("add", "cat"):
            x = to_clips(x, frames)
        for stage in self.stages:
            x = stage(x, frames)
            frames //= cast(_Residual, stage).stride
        features = x.mean(dim=(2, 3, 4)) if x.ndim == 5 else x.mean(dim=(2, 3)).unflatten(0, (-1, frames)).mean(dim=1)
        return self.head(features)


class FrameNet(nn.Sequential):
    """The 2D part of ECO-Lite: Inception-v3 up to 96 channels, on single frames.

    (N, 3, 243, 243) to (N, 96, 28, 28). Of its third Inception block only the branch of two 3x3 convolutions is left:
    with it the channels and the paper's parameter counts come out.
    """

    def __init__(self) -> None:
        whole = inception_v3(weights=None, aux_logits=False, init_weights=False)
        last = whole.Mixed_5d
        super().__init__(
            whole.Conv2d_1a_3x3, whole.Conv2d_2a_3x3, whole.Conv2d_2b_3x3, whole.maxpool1,
            whole.Conv2d_3b_1x1, whole.Conv2d_4a_3x3, whole.maxpool2,
            whole.Mixed_5b, whole.Mixed_5c, last.branch3x3dbl_1, last.branch3x3dbl_2, last.branch3x3dbl_3,
        )  # fmt: skip


class EcoLite(nn.Module):
    """The network that the paper measures, `FrameNet` on each frame and then a `VideoNet`, or a small one like it.

    Args:
        kind: How clips are convolved.
        num_classes: Logits; 101 for UCF-101.
        sampling: See `Conv4D`.
        frame_net: What is applied to every frame, (N, C, H, W) to (N, channels, X, Y); by default `FrameNet`.
        channels: Channels that it gives.
        widths: See `VideoNet`.
        blocks: See `VideoNet`.

    Raises:
        ValueError: As `VideoNet`.
    """

    def __init__(
        self,
        kind: Kind,
        *,
        num_classes: int = 101,
        sampling: Sampling = "flat",
        frame_net: nn.Module | None = None,
        channels: int = 96,
        widths: tuple[int, ...] = (128, 256, 512),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.frame_net = FrameNet() if frame_net is None else frame_net
        self.video_net = VideoNet(
            kind, in_channels=channels, num_classes=num_classes, widths=widths, blocks=blocks, sampling=sampling
        )

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """Logits (B, num_classes) of frames (BT, C, H, W), T to a clip; for `FrameNet` they are (BT, 3, 243, 243)."""
        return self.video_net(self.frame_net(x), frames)


class ClipNet(nn.Module):
    """A network of this module that is given clips, as a data set has them.

    Args:
        net: Called with frames and their number in a clip, such as an `EcoLite` or a `VideoNet`.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = channels_last(net)

    def forward(self, clips: Tensor) -> Tensor:
        """Logits (B, num_classes) of clips (B, T, C, H, W): all frames as one batch of channels-last images."""
        # `to`, not `contiguous`, which leaves the strides of images with one channel as they are.
        return self.net(clips.flatten(0, 1).to(memory_format=torch.channels_last), clips.shape[1])


def channels_last(net: nn.Module) -> nn.Module:
    """Put the channels of all kernels, in 2D and in 3D, side by side in memory: for both the faster layout.

    Frames that are channels-last give clips that are, through `to_clips`: a 3D network needs no more than this.

    Args:
        net: Any module; changed in place.

    Returns:
        The same module.
    """
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim in formats:
                parameter.data = parameter.data.to(memory_format=formats[parameter.ndim])
    return net
