"""Clips without 5D tensors: identities with 3D convolutions, views without copies, the paper's counts, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.video import r3d_18

from leantrain.measure.cost import count_macs, count_parameters
from leantrain.techniques.conv3d_4d import (
    ClipNet,
    Conv4D,
    EcoLite,
    FrameNet,
    Rank1,
    SpaceThenTime,
    SpaceWithTime,
    VideoNet,
    channels_last,
    to_clips,
    to_frames,
    to_pixels,
)


def frames_of(clips):
    """(B, C, T, X, Y) as frames in channels-last memory."""
    return clips.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def test_views_share_one_memory():
    x = torch.randn(2 * 3, 5, 4, 6).to(memory_format=torch.channels_last)
    pixels = to_pixels(x, 3)
    assert pixels.shape == (2, 5, 3, 24)
    assert pixels.data_ptr() == x.data_ptr()
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    again = to_frames(pixels, 4)
    assert again.data_ptr() == x.data_ptr()
    assert torch.equal(again, x)
    assert torch.equal(pixels[1, 2, 1], x[1 * 3 + 1, 2].flatten())
    assert torch.equal(to_clips(x, 3)[1, 2, 1], x[4, 2])


@pytest.mark.parametrize("combine", ["add", "cat"])
def test_without_stride_it_is_a_cross_in_a_3d_kernel(combine):
    torch.manual_seed(0)
    block, clips = Conv4D(4, 6, combine=combine), torch.randn(2, 4, 5, 7, 6)
    kernel = torch.zeros(2, 6, 4, 3, 3, 3)
    kernel[0, :, :, 1] = block.space.weight.detach()
    kernel[1, :, :, :, 1, 1] = block.time.weight.detach()[..., 0]
    kernel = kernel.sum(0) if combine == "add" else kernel.flatten(0, 1)
    expected = F.conv3d(clips, kernel, padding=1)
    assert int((kernel[0, 0] != 0).sum()) == (11 if combine == "add" else 9)
    torch.testing.assert_close(to_clips(block(frames_of(clips), 5), 5), expected, atol=1e-5, rtol=1e-5)


@given(st.sampled_from([1, 2]), st.sampled_from([3, 5]), st.integers(1, 3), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_aligned_is_two_3d_convolutions(stride, kernel, batch, seed):
    torch.manual_seed(seed)
    block = Conv4D(3, 4, stride, kernel=kernel, sampling="aligned")
    clips, pad = torch.randn(batch, 3, 4, 6, 8), kernel // 2
    space = F.conv3d(clips, block.space.weight[:, :, None], stride=(1, stride, stride), padding=(0, pad, pad))
    if stride > 1:
        space = F.conv3d(space, block.thin.weight[..., None], stride=(stride, 1, 1))
    time = F.conv3d(clips, block.time.weight[..., None], stride=stride, padding=(pad, 0, 0))
    torch.testing.assert_close(to_clips(block(frames_of(clips), 4), 4 // stride), space + time, atol=1e-4, rtol=1e-4)


def test_flat_sampling_visits_every_fourth_pixel_of_the_row_of_pixels():
    torch.manual_seed(0)
    block, clips = Conv4D(2, 3, 2), torch.randn(1, 2, 4, 4, 4)
    nn.init.zeros_(block.space.weight)
    out = to_clips(block(frames_of(clips), 4), 2).detach()
    weight = block.time.weight.detach()[..., 0]
    flat = clips[0].flatten(2)
    for t in range(2):
        for n in range(4):
            taps = [2 * t + tau for tau in (-1, 0, 1)]
            expected = sum(weight[:, :, i] @ flat[:, at, 4 * n] for i, at in enumerate(taps) if 0 <= at < 4)
            torch.testing.assert_close(out[0, :, t].flatten(1)[:, n], expected, atol=1e-5, rtol=1e-5)


def test_each_branch_by_itself():
    torch.manual_seed(0)
    clips = torch.randn(2, 4, 5, 6, 6)
    block = Conv4D(4, 6)
    nn.init.zeros_(block.time.weight)
    assert torch.allclose(block(frames_of(clips), 5), block.space(frames_of(clips)), atol=1e-6)
    block = Conv4D(4, 6)
    nn.init.zeros_(block.space.weight)
    other = clips.clone()
    other[..., 2, 3] += 1
    changed = (block(frames_of(clips), 5) != block(frames_of(other), 5)).flatten(0, 1).any(0)
    assert changed.nonzero().tolist() == [[2, 3]], "a pixel's time is its own"


def test_a_still_clip_and_a_shifted_clip():
    torch.manual_seed(0)
    block = Conv4D(3, 4)
    still = torch.randn(1, 3, 1, 5, 5).expand(-1, -1, 6, -1, -1)
    inner = to_clips(block(frames_of(still), 6), 6)[:, :, 1:-1]
    torch.testing.assert_close(inner, inner[:, :, :1].expand_as(inner))
    clips = torch.randn(1, 3, 7, 5, 5)
    one, two = (to_clips(block(frames_of(c), 6), 6) for c in (clips[:, :, :6], clips[:, :, 1:]))
    torch.testing.assert_close(one[:, :, 2:5], two[:, :, 1:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("stride", "combine"), [(1, "add"), (2, "add"), (1, "cat"), (2, "cat")])
def test_parameters_of_a_block(stride, combine):
    block = Conv4D(10, 14, stride, combine=combine)
    assert count_parameters(block) == 12 * 10 * 14 + (14 * 14 if stride > 1 else 0)
    assert block.channels == block(torch.zeros(4, 10, 4, 4), 4).shape[1] == (28 if combine == "cat" else 14)


class Ranks(TorchDispatchMode):
    """Notes how many axes the tensors have that operations give back."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {t.ndim for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("kind", ["add", "cat"])
@pytest.mark.parametrize("sampling", ["flat", "aligned"])
def test_no_tensor_of_five_axes(kind, sampling):
    net = VideoNet(kind, in_channels=3, num_classes=5, widths=(8, 16), sampling=sampling)
    assert not any(isinstance(m, nn.Conv3d | nn.BatchNorm3d) for m in net.modules())
    x = torch.randn(2 * 4, 3, 8, 8).to(memory_format=torch.channels_last)
    with Ranks() as ranks:
        net(x, frames=4).sum().backward()
    # The reshape to (B, T, XY, C) has four axes as well.
    assert max(ranks.seen) == 4
    with Ranks() as ranks:
        VideoNet("conv3d", in_channels=3, num_classes=5, widths=(8,))(x, frames=4)
    assert max(ranks.seen) == 5, "the watch can fail"


# Parameters in millions (101 classes) and multiply-accumulates in billions of the 3D part (16 frames), without the
# normalisations. The paper: 33.7 and 35.6, 33.7 and 36.9, 32.2 and 32.7, 16.3 and 17.1, 13.7 and 14.7.
COUNTS = {
    "conv3d": (33.725, 33.7, 35.6),
    "r2plus1d": (33.735, 33.7, 36.9),
    "cat": (32.155, 32.2, 32.7),
    "add": (16.255, 16.3, 17.1),
    "rank-1": (13.671, 13.7, 14.7),
    "p3d-a": (16.11, None, None),
    "p3d-b": (15.60, None, None),
    "p3d-c": (16.11, None, None),
}


@pytest.mark.parametrize("kind", COUNTS)
def test_the_papers_counts(kind):
    ours, parameters, operations = COUNTS[kind]
    with torch.device("meta"):
        net = EcoLite(kind)
        macs = count_macs(net.video_net, torch.empty(16, 96, 28, 28), 16)
    assert count_parameters(net) / 1e6 == pytest.approx(ours, abs=0.006 if parameters else 0.012)
    if parameters is not None:
        assert count_parameters(net) / 1e6 == pytest.approx(parameters, abs=0.05)
        assert macs / 1e9 == pytest.approx(operations, abs=0.1)


def test_the_frame_net():
    with torch.device("meta"):
        net, frame = FrameNet(), torch.empty(1, 3, 243, 243)
        assert net(frame).shape == (1, 96, 28, 28)
        assert count_parameters(net) / 1e6 == pytest.approx(0.863, abs=5e-4)
        assert count_macs(net, frame) / 1e9 == pytest.approx(1.411, abs=1e-3)


def test_the_baseline_is_torchvisions():
    """R3D-18 without its stem and first stage is the 3D network with as many weights."""
    with torch.device("meta"):
        ours = VideoNet("conv3d", in_channels=64, num_classes=400)
        theirs = r3d_18()
    rest = sum(count_parameters(m) for m in (theirs.layer2, theirs.layer3, theirs.layer4, theirs.fc))
    # The first stage of ours has no stride, which does not change the weights.
    assert count_parameters(ours) == rest


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(
    "build",
    [
        Rank1,
        SpaceThenTime,
        lambda c, s, stride: SpaceThenTime(c, s, stride, middle=5),
        lambda c, s, stride: SpaceWithTime(c, s, stride, after=True),
        lambda c, s, stride: SpaceWithTime(c, s, stride, after=False),
    ],
)
def test_shapes_of_the_other_blocks(build, stride):
    out = build(3, 6, stride)(torch.randn(2, 3, 4, 6, 8))
    assert out.shape == (2, 6, 4 // stride, 6 // stride, 8 // stride)


def test_every_kind_learns_from_its_gradient():
    torch.manual_seed(0)
    x = torch.randn(2 * 4, 3, 8, 8).to(memory_format=torch.channels_last)
    for kind in COUNTS:
        net = VideoNet(kind, in_channels=3, num_classes=4, widths=(8, 16))
        logits = net(x, frames=4)
        assert logits.shape == (2, 4)
        F.cross_entropy(logits, torch.tensor([0, 1])).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters()), kind


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: Conv4D(3, 4, 2)(torch.zeros(4, 3, 7, 8), 4), "7 x 8 pixels"),
        (lambda: Conv4D(3, 4, 2)(torch.zeros(3, 3, 8, 8), 3), "3 frames"),
        (lambda: Conv4D(3, 4)(torch.zeros(5, 3, 8, 8), 4), "frames=4"),
        (lambda: Conv4D(3, 4, kernel=2), "kernel=2"),
        (lambda: Conv4D(3, 4, stride=0), "stride=0"),
        (lambda: Conv4D(3, 4, combine="sum"), "combine='sum'"),
        (lambda: to_frames(torch.zeros(1, 3, 2, 10), 3), "height=3"),
        (lambda: VideoNet("conv4d", in_channels=3, num_classes=2), "kind='conv4d'"),
        (lambda: VideoNet("add", in_channels=3, num_classes=2, widths=()), "widths"),
        (lambda: VideoNet("add", in_channels=3, num_classes=2, widths=(8,))(torch.zeros(5, 3, 8, 8), 4), "frames=4"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_a_small_network_of_the_same_kind_takes_clips():
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 6, 3, 2, 1)
    net = EcoLite("add", num_classes=5, frame_net=stem, channels=6, widths=(8, 16), blocks=1)
    clips = torch.rand(3, 4, 1, 8, 8)
    logits = ClipNet(net)(clips)
    assert logits.shape == (3, 5)
    frames = clips.flatten(0, 1)
    torch.testing.assert_close(logits, net.video_net(stem(frames), 4))
    # A clip's logits do not depend on the other clips, once normalisation is that of the training data.
    net.eval()
    torch.testing.assert_close(ClipNet(net)(clips)[1:2], ClipNet(net)(clips[1:2]))


@pytest.mark.parametrize("kind", ["conv3d", "add"])
def test_clip_nets_stay_channels_last(kind):
    """Also behind images of one channel, whose strides fit both layouts."""
    torch.manual_seed(0)
    stem = nn.Conv2d(1, 6, 3, padding=1)
    net = ClipNet(EcoLite(kind, num_classes=5, frame_net=stem, channels=6, widths=(8, 16), blocks=1))
    formats, seen = {4: torch.channels_last, 5: torch.channels_last_3d}, []

    def look(module, inputs, output):
        if output.ndim in formats:
            seen.append(output.is_contiguous(memory_format=formats[output.ndim]))

    for module in net.modules():
        module.register_forward_hook(look)
    net(torch.rand(3, 4, 1, 8, 8))
    assert len(seen) > 8
    assert all(seen)


def test_channels_last_changes_the_layout_only():
    torch.manual_seed(0)
    net = VideoNet("conv3d", in_channels=3, num_classes=4, widths=(8,))
    before = {name: p.clone() for name, p in net.named_parameters()}
    assert channels_last(net) is net
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name])
        assert p.requires_grad
        assert p.ndim != 5 or p.is_contiguous(memory_format=torch.channels_last_3d)
