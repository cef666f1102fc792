r"""FastMIM: masked image modelling on small images, with gradient histograms as the target.

Paper: Guo, Han, Wu, Tang, Wang and Xu, "FastMIM: Expediting Masked Image Modeling Pre-training for Vision", 2022,
arXiv 2212.06593. What the abstract leaves open follows the authors' code, as far as we know it.

Masked image modelling hides most of an image and trains a network to predict what is hidden. In SimMIM all tokens,
hidden ones included, go through the encoder, at the resolution of the later task. FastMIM changes two things: the
images are small, and the target is not pixels but histograms of oriented gradients (HOG). With an image x, a mask M of
blocks (1 is hidden), a learnt colour t, the network f and the histograms h of the clean image,

.. math::

    \tilde x = (1 - M) \odot x + M \odot t, \qquad
    L = \frac{1}{|\mathcal M| d} \sum_{i \in \mathcal M} \lVert f(\tilde x)_i - h_i \rVert_2^2 .

`hog`, `random_mask` and `hide` are the pieces, `FastMIM` joins them around any ViT or Swin transformer of timm,
`Pretraining` trains it, and `transfer` makes a classifier of the encoder at the full resolution. With the target
`pixel`, no decoder and large images `FastMIM` is like SimMIM; `MaskedAutoencoder` is MAE, which saves in another way.

>>> model = FastMIM(vit_encoder(image_size=32, patch_size=8, dim=32, depth=1, heads=2), cell=4, decoder_width=16)
>>> images = torch.rand(2, 3, 32, 32)
>>> tuple(model.targets(images).shape)  # 16 tokens of 2 x 2 cells, 3 colours and 9 orientations
(2, 16, 108)
>>> model(images).backward()
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from timm.layers import DropPath, build_sincos2d_pos_embed  # type: ignore[attr-defined]
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import Block, VisionTransformer
from timm.optim import param_groups_layer_decay  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from leantrain.training import ImageClassifier
from leantrain.training.scheduled import ScheduledModule

__all__ = [
    "FastMIM",
    "FineTuning",
    "MaskedAutoencoder",
    "Pretraining",
    "full_size",
    "group_cells",
    "hide",
    "hog",
    "layer_decayed",
    "masked_mean",
    "patches",
    "random_mask",
    "resize",
    "swin_encoder",
    "transfer",
    "ungroup_cells",
    "vit_encoder",
]

#: What is predicted: histograms, pixels brought to mean 0 and variance 1 in each patch, or pixels as they are.
Target = Literal["hog", "pixel", "raw pixel"]
Encoder = VisionTransformer | SwinTransformer

# ---------------------------------------------------------------- targets


def hog(
    x: Tensor,
    *,
    cell: int = 8,
    bins: int = 9,
    gradient: Literal["sobel", "central"] = "sobel",
    normalise: bool = True,
) -> Tensor:
    r"""Histograms of oriented gradients of each colour channel.

    With the gradients :math:`g_x, g_y` (left minus right, top minus bottom), each pixel puts its magnitude
    :math:`\sqrt{g_x^2 + g_y^2}` into the bin :math:`\lfloor K \phi / \pi \rfloor \bmod K`, where
    :math:`\phi = \operatorname{atan2}(g_x, g_y)`: unsigned orientation, no interpolation. The pixels of a cell are
    added up. Neighbouring cells are not normalised together.

    Args:
        x: Images ``(B, C, H, W)``, at least 2 pixels high and wide; half precision is computed in single.
        cell: Height and width of a cell in pixels; divides H and W.
        bins: K, at least 1.
        gradient: `sobel` smooths across the difference, as the authors' code does; `central` does not. The image is
            reflected at its border, so that there is no gradient across it.
        normalise: Whether each histogram is divided by its L2 norm. One that is zero stays zero.

    Returns:
        ``(B, C, K, H/cell, W/cell)``, without gradient.

    Raises:
        ValueError: If the shape does not fit the cells, or an option is unknown.
    """
    if x.ndim != 4 or min(x.shape[2:]) < 2:
        raise ValueError(f"images of shape {tuple(x.shape)}: expected (B, C, H, W) with H and W at least 2")
    if bins < 1 or cell < 1 or x.shape[2] % cell or x.shape[3] % cell:
        raise ValueError(
            f"cell {cell} and bins {bins} for images of {x.shape[2]} x {x.shape[3]} pixels: expected at least one bin, "
            "and cells that divide the image"
        )
    if gradient not in ("sobel", "central"):
        raise ValueError(f"gradient {gradient!r}: expected 'sobel' or 'central'")
    with torch.no_grad():
        # Nothing below is among the operations that autocast would compute in half precision.
        gx, gy = _gradients(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, gradient)
        place = torch.floor(bins * torch.atan2(gx, gy) / math.pi).remainder(bins).long()
        spread = gx.new_zeros(*x.shape[:2], bins, *x.shape[2:])
        spread.scatter_(2, place.unsqueeze(2), torch.sqrt(gx.square() + gy.square()).unsqueeze(2))
        cells = F.avg_pool2d(spread.flatten(1, 2), cell, divisor_override=1).unflatten(1, (x.shape[1], bins))
        return F.normalize(cells, dim=2, eps=1e-12) if normalise else cells


def _gradients(x: Tensor, gradient: str) -> tuple[Tensor, Tensor]:
    """Left minus right and top minus bottom; differences of sums, so that a flat image gives exact zeros."""
    p = F.pad(x, (1, 1, 1, 1), mode="reflect")
    if gradient == "sobel":
        rows = p[..., :-2, :] + 2 * p[..., 1:-1, :] + p[..., 2:, :]
        columns = p[..., :-2] + 2 * p[..., 1:-1] + p[..., 2:]
    else:
        rows, columns = p[..., 1:-1, :], p[..., 1:-1]
    return rows[..., :-2] - rows[..., 2:], columns[..., :-2, :] - columns[..., 2:, :]


def group_cells(cells: Tensor, side: int) -> Tensor:
    """The cells of one token, side by side.

    Args:
        cells: ``(B, C, K, G * side, G * side)``.
        side: Cells along a token.

    Returns:
        ``(B, G * G, side * side * C * K)``: the cells of a token row by row; in each the colours, then the bins.
    """
    tokens = cells.unflatten(4, (-1, side)).unflatten(3, (-1, side))  # (B, C, K, G, side, G, side)
    return tokens.permute(0, 3, 5, 4, 6, 1, 2).flatten(3).flatten(1, 2)


def ungroup_cells(tokens: Tensor, side: int, channels: int) -> Tensor:
    """The inverse of :func:`group_cells`, for square grids.

    Args:
        tokens: ``(B, G * G, side * side * C * K)``.
        side: Cells along a token.
        channels: C.

    Returns:
        ``(B, C, K, G * side, G * side)``.
    """
    grid = math.isqrt(tokens.shape[1])
    split = tokens.unflatten(2, (side, side, channels, -1)).unflatten(1, (grid, grid))
    return split.permute(0, 5, 6, 1, 3, 2, 4).flatten(5, 6).flatten(3, 4)


def patches(x: Tensor, size: int, normalise: bool = True) -> Tensor:
    """The pixels of each patch.

    Args:
        x: Images ``(B, C, H, W)``; H and W multiples of `size`.
        size: Pixels along a patch.
        normalise: Whether each patch is brought to mean 0 and variance 1 over all its numbers, as MAE does; the
            variance is the unbiased one, plus 1e-6.

    Returns:
        ``(B, N, size * size * C)``.
    """
    found = group_cells(x.unsqueeze(2), size)
    if not normalise:
        return found
    mean, variance = found.mean(2, keepdim=True), found.var(2, keepdim=True)
    return (found - mean) / (variance + 1e-6).sqrt()


# ---------------------------------------------------------------- masking


def random_mask(
    batch: int,
    grid: int,
    ratio: float,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Which blocks of each image are hidden: the same number in all, at random places.

    Args:
        batch: Images.
        grid: Blocks along an image.
        ratio: Share to hide, at least 0 and below 1; the number that stays is rounded down.
        device: Where to.
        generator: By default the global one.

    Returns:
        Bool ``(batch, grid, grid)``, True where hidden.

    Raises:
        ValueError: If the ratio is out of range, or leaves no block.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"mask ratio {ratio}: expected at least 0 and below 1")
    keep = math.floor(grid * grid * (1 - ratio) + 1e-9)  # 100 * (1 - 0.9) is a little below 10
    if keep < 1:
        raise ValueError(f"mask ratio {ratio} leaves none of {grid} x {grid} blocks: expected a smaller one")
    order = torch.rand(batch, grid * grid, device=device, generator=generator).argsort(1)
    mask = torch.ones(batch, grid * grid, dtype=torch.bool, device=device)
    return mask.scatter_(1, order[:, :keep], False).unflatten(1, (grid, grid))


def hide(x: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """Paint hidden blocks over with one colour.

    Args:
        x: Images ``(B, C, R, R)``.
        mask: Bool ``(B, G, G)``, G a divisor of R.
        colour: ``(1, C, 1, 1)``.

    Returns:
        Images of the same shape; where nothing is hidden, bit for bit what they were.
    """
    block = x.shape[-1] // mask.shape[-1]
    hidden = mask.repeat_interleave(block, 1).repeat_interleave(block, 2).unsqueeze(1)
    return torch.where(hidden, colour.to(x.dtype), x)


def masked_mean(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over hidden tokens.

    Args:
        predicted: ``(B, N, d)``.
        target: The same shape.
        mask: Bool with N values an image, True where hidden.

    Returns:
        A scalar; 0 if nothing is hidden.
    """
    hidden = mask.flatten(1).to(target.dtype)
    error = (predicted.to(target.dtype) - target).square().mean(2)
    return (error * hidden).sum() / hidden.sum().clamp_min(1)


def resize(x: Tensor, size: int) -> Tensor:
    """Images ``(B, C, H, W)`` at another size in pixels, bicubic with antialiasing; unchanged if they have it."""
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bicubic", align_corners=False, antialias=True)


# ---------------------------------------------------------------- encoders


def vit_encoder(
    *,
    image_size: int,
    patch_size: int,
    dim: int,
    depth: int,
    heads: int,
    in_chans: int = 3,
    mlp_ratio: float = 4.0,
) -> VisionTransformer:
    """Build timm's vision transformer without a head, with fixed two-dimensional sine and cosine position embeddings.

    Args:
        image_size: Pixels along the square images; a multiple of `patch_size`.
        patch_size: Pixels along a patch.
        dim: Width of a token; a multiple of `heads` and of 4.
        depth: Blocks.
        heads: Attention heads.
        in_chans: Colour channels.
        mlp_ratio: Width of a block's hidden layer over `dim`.

    Raises:
        ValueError: If the sizes do not divide as stated.
    """
    if image_size % patch_size or dim % heads or dim % 4:
        raise ValueError(
            f"image_size {image_size}, patch_size {patch_size}, dim {dim}, heads {heads}: expected an image that is a "
            "multiple of the patch, and a width that is one of the heads and of 4"
        )
    encoder = VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=0,
        pos_embed="none",  # random embeddings would shift the draws of all weights with the resolution
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
    )
    places = _sincos(image_size // patch_size, dim, encoder.patch_embed.proj.weight.device)
    encoder.pos_embed = nn.Parameter(places, requires_grad=False)
    return encoder


def _sincos(grid: int, dim: int, device: torch.device) -> Tensor:
    """Position embeddings ``(1, 1 + grid * grid, dim)``, with zeros for the class token."""
    places = build_sincos2d_pos_embed([grid, grid], dim, device=device)
    return torch.cat([places.new_zeros(1, dim), places]).unsqueeze(0)


def swin_encoder(
    *,
    image_size: int,
    window: int,
    dim: int = 128,
    depths: Sequence[int] = (2, 2, 18, 2),
    heads: Sequence[int] = (4, 8, 16, 32),
    patch_size: int = 4,
    in_chans: int = 3,
) -> SwinTransformer:
    """Build timm's Swin transformer without a head and without stochastic depth; by default Swin-B.

    Args:
        image_size: Pixels along the square images.
        window: Tokens along a window; divides the grid of tokens in every stage, since timm would pad it silently.
        dim: Width of the first stage; it doubles from stage to stage.
        depths: Blocks in each stage.
        heads: Attention heads in each stage.
        patch_size: Pixels along a patch.
        in_chans: Colour channels.

    Raises:
        ValueError: If a stage's grid is no multiple of the window.
    """
    stride = patch_size * 2 ** (len(depths) - 1)
    if image_size % stride or (image_size // stride) % window:
        raise ValueError(
            f"window {window} for images of {image_size} pixels: the last stage has a token for every {stride} pixels; "
            "expected a whole number of tokens that the window divides"
        )
    return SwinTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=0,
        embed_dim=dim,
        depths=tuple(depths),
        num_heads=tuple(heads),
        window_size=window,
        drop_path_rate=0.0,
    )


def _stride(encoder: Encoder) -> int:
    """Pixels along what one token of the output stands for."""
    return int(encoder.feature_info[-1]["reduction"])  # type: ignore[arg-type]


# ---------------------------------------------------------------- models


class FastMIM(nn.Module):
    """An encoder that predicts what is hidden, with its decoder, its mask token and its target.

    The blocks that are hidden are as large as what one token of the encoder's output stands for: 16 pixels for ViT-B,
    32 for Swin-B.

    Args:
        encoder: A ViT or Swin transformer of timm, without a head.
        target: `hog`; `pixel`, normalised in each patch; or `raw pixel`.
        cell: Pixels along a cell of the histograms; divides the block.
        mask_ratio: Share of the blocks that is hidden, at least 0 and below 1.
        decoder_width: Width of the decoder's tokens.
        decoder_depth: Blocks of the decoder; with 0 it is one linear layer, as SimMIM's.
        decoder_heads: Attention heads of these blocks.

    Attributes:
        block: Pixels along a block.
        image_size: Pixels along the images that the encoder takes now.
        mask_token: The learnt colour, ``(1, C, 1, 1)``.

    Raises:
        ValueError: If a number is out of range or does not divide as stated.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        target: Target = "hog",
        cell: int = 8,
        mask_ratio: float = 0.75,
        decoder_width: int = 256,
        decoder_depth: int = 1,
        decoder_heads: int = 8,
    ) -> None:
        super().__init__()
        self.block = _stride(encoder)
        if target not in ("hog", "pixel", "raw pixel"):
            raise ValueError(f"target {target!r}: expected 'hog', 'pixel' or 'raw pixel'")
        if cell < 1 or self.block % cell:
            raise ValueError(f"cell {cell}: expected a divisor of the block, which has {self.block} pixels")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask ratio {mask_ratio}: expected at least 0 and below 1")
        if decoder_depth < 0 or decoder_width < 1 or decoder_heads < 1 or decoder_width % decoder_heads:
            raise ValueError(
                f"decoder of {decoder_depth} blocks, width {decoder_width}, {decoder_heads} heads: expected positive "
                "numbers (0 blocks for a linear layer) and heads that divide the width"
            )
        channels = encoder.patch_embed.proj.in_channels  # type: ignore[union-attr]
        self.encoder = encoder
        self.target, self.cell, self.mask_ratio = target, cell, mask_ratio
        self.mask_token = nn.Parameter(torch.empty(1, channels, 1, 1).normal_(std=0.02))  # type: ignore[arg-type]
        side = self.block // cell
        outputs = side * side * channels * 9 if target == "hog" else self.block**2 * channels  # type: ignore[operator]
        width = encoder.num_features if decoder_depth == 0 else decoder_width
        layers: list[nn.Module] = []
        if decoder_depth:
            layers = [nn.Linear(encoder.num_features, width), *_blocks(width, decoder_depth, decoder_heads)]
            layers.append(nn.LayerNorm(width, eps=1e-6))
        self.decoder = nn.Sequential(*layers, nn.Linear(width, outputs))  # type: ignore[arg-type]

    @property
    def image_size(self) -> int:
        """Pixels along the images that the encoder takes."""
        return int(self.encoder.patch_embed.img_size[0])  # type: ignore[index]

    def set_resolution(self, size: int) -> None:
        """Take images of another size from now on; the position embeddings are interpolated.

        Args:
            size: Pixels, a multiple of the block.

        Raises:
            ValueError: If it is none, or the encoder is a Swin transformer, whose windows would change with it.
        """
        if size % self.block:
            raise ValueError(f"images of {size} pixels: expected a multiple of the block, {self.block}")
        if size == self.image_size:
            return
        if not isinstance(self.encoder, VisionTransformer):
            raise ValueError("the resolution of a Swin transformer is fixed while it is trained: build it anew")
        self.encoder.set_input_size(img_size=(size, size))

    def targets(self, x: Tensor) -> Tensor:
        """What is to be predicted for clean images ``(B, C, R, R)``: ``(B, N, d)``, without gradient."""
        with torch.no_grad():
            if self.target == "hog":
                return group_cells(hog(x, cell=self.cell), self.block // self.cell)
            return patches(x, self.block, self.target == "pixel")

    def predict(self, x: Tensor, mask: Tensor) -> Tensor:
        """Predictions for all tokens, hidden and visible.

        Args:
            x: Clean images ``(B, C, R, R)``.
            mask: Bool ``(B, R/block, R/block)``.

        Returns:
            ``(B, N, d)``.
        """
        tokens = self.encoder.forward_features(hide(x, mask, self.mask_token))
        tokens = self.decoder(tokens.flatten(1, 2) if tokens.ndim == 4 else tokens)
        return tokens[:, getattr(self.encoder, "num_prefix_tokens", 0) :]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            x: Clean images ``(B, C, R, R)``.
            mask: Bool ``(B, R/block, R/block)``; drawn if None.

        Returns:
            Mean squared error over the hidden tokens, a scalar.

        Raises:
            ValueError: If the images are not of the size that the encoder takes.
        """
        size = self.image_size
        if x.ndim != 4 or x.shape[-2:] != (size, size):
            raise ValueError(f"images of shape {tuple(x.shape)}: expected (B, C, {size}, {size}), use resize")
        if mask is None:
            mask = random_mask(len(x), size // self.block, self.mask_ratio, device=x.device)
        return masked_mean(self.predict(x, mask), self.targets(x), mask)


def _blocks(width: int, depth: int, heads: int) -> list[nn.Module]:
    return [Block(width, heads, mlp_ratio=4.0, qkv_bias=True) for _ in range(depth)]


class MaskedAutoencoder(nn.Module):
    """MAE, to compare costs with: only visible tokens go through the encoder, all of them through a deeper decoder.

    Args:
        encoder: A ViT of :func:`vit_encoder`.
        mask_ratio: Share of the patches that is hidden, at least 0 and below 1.
        decoder_width: Width of the decoder's tokens.
        decoder_depth: Blocks of the decoder.
        decoder_heads: Attention heads of these blocks.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        self.encoder, self.mask_ratio, self.block = encoder, mask_ratio, _stride(encoder)
        self.grid = encoder.patch_embed.grid_size[0]
        self.embed = nn.Linear(encoder.num_features, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_width).normal_(std=0.02))
        places = _sincos(self.grid, decoder_width, self.mask_token.device)
        self.places = nn.Parameter(places, requires_grad=False)
        outputs = self.block**2 * encoder.patch_embed.proj.in_channels
        self.decoder = nn.Sequential(
            *_blocks(decoder_width, decoder_depth, decoder_heads),
            nn.LayerNorm(decoder_width, eps=1e-6),
            nn.Linear(decoder_width, outputs),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of a batch of images ``(B, C, R, R)``: mean squared error of normalised pixels, hidden patches."""
        if mask is None:
            mask = random_mask(len(x), self.grid, self.mask_ratio, device=x.device)
        keep = math.floor(self.grid**2 * (1 - self.mask_ratio) + 1e-9)
        order = mask.flatten(1).long().argsort(dim=1, stable=True)  # visible ones first
        tokens = self.encoder.patch_embed(x) + self.encoder.pos_embed[:, 1:]  # type: ignore[index]
        visible = tokens.gather(1, order[:, :keep, None].expand(-1, -1, tokens.shape[2]))
        start = (self.encoder.cls_token + self.encoder.pos_embed[:, :1]).expand(len(x), -1, -1)  # type: ignore[index, operator]
        seen = self.embed(self.encoder.norm(self.encoder.blocks(torch.cat([start, visible], 1))))
        hidden = self.mask_token.expand(len(x), tokens.shape[1] - keep, -1)
        back = order.argsort(1)[:, :, None].expand(-1, -1, seen.shape[2])
        everything = torch.cat([seen[:, :1], torch.cat([seen[:, 1:], hidden], 1).gather(1, back)], 1)
        return masked_mean(self.decoder(everything + self.places)[:, 1:], patches(x, self.block), mask)


def full_size(method: str, backbone: str, image_size: int) -> FastMIM | MaskedAutoencoder:
    """A network of the paper's comparison at its full size, with its decoder.

    Args:
        method: `fastmim` (histograms; one decoder block for ViT-B, four for Swin-B), `simmim` (pixels, a linear layer)
            or `mae`.
        backbone: `vit-b` or `swin-b`; MAE has the first only. Swin's windows are as large as its last map.
        image_size: Pixels, a multiple of 16, of 32 for Swin-B.

    Raises:
        ValueError: If the method or the backbone is unknown, or they do not go together.
    """
    if (method, backbone) not in [(m, b) for m in ("fastmim", "simmim") for b in ("vit-b", "swin-b")] + [
        ("mae", "vit-b")
    ]:
        raise ValueError(
            f"method {method!r} with {backbone!r}: expected fastmim or simmim with vit-b or swin-b, or mae with vit-b"
        )
    encoder: Encoder
    if backbone == "swin-b":
        encoder = swin_encoder(image_size=image_size, window=image_size // 32)
    else:
        encoder = vit_encoder(image_size=image_size, patch_size=16, dim=768, depth=12, heads=12)
    if method == "mae":
        return MaskedAutoencoder(cast(VisionTransformer, encoder))
    if method == "simmim":
        return FastMIM(encoder, target="raw pixel", decoder_depth=0)
    return FastMIM(encoder, decoder_depth=1 if backbone == "vit-b" else 4)


# ---------------------------------------------------------------- training


def transfer(
    encoder: Encoder,
    *,
    num_classes: int,
    image_size: int,
    window: int | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """A classifier that starts from an encoder; the encoder itself stays as it is.

    Position embeddings (of a ViT, now trained) are interpolated bicubically, tables of relative positions (of a Swin)
    geometrically. The classifier takes the mean of the patch tokens, a norm and a linear layer with small random
    weights. The norm at the end of a ViT encoder is left behind.

    Args:
        encoder: Pre-trained, or with random weights for a baseline.
        num_classes: Classes.
        image_size: Pixels along the images of the classifier.
        window: Window of a Swin classifier; None takes the size of its last map.
        drop_path: Largest rate of stochastic depth; it grows linearly with the depth.

    Returns:
        A model from images ``(B, C, image_size, image_size)`` to logits ``(B, num_classes)``.

    Raises:
        ValueError: If the image is no multiple of what a token stands for, or a number is out of range.
    """
    stride = _stride(encoder)
    if image_size % stride or num_classes < 1 or not 0 <= drop_path < 1:
        raise ValueError(
            f"image_size {image_size}, num_classes {num_classes}, drop_path {drop_path}: expected a multiple of "
            f"{stride}, at least one class and a rate of at least 0 and below 1"
        )
    model = copy.deepcopy(encoder)
    if isinstance(model, VisionTransformer):
        model.set_input_size(img_size=(image_size, image_size))
        model.pos_embed.requires_grad_(True)  # type: ignore[union-attr]
        model.norm, model.fc_norm = nn.Identity(), nn.LayerNorm(model.num_features, eps=1e-6)
        blocks = list(model.blocks)
    else:
        side = window or image_size // stride
        if (image_size // stride) % side:
            raise ValueError(f"window {side}: expected a divisor of the last map, {image_size // stride} tokens")
        model.set_input_size(img_size=(image_size, image_size), window_size=side)
        blocks = [block for stage in model.layers for block in stage.blocks]  # type: ignore[union-attr]
    model.reset_classifier(num_classes, global_pool="avg")
    head = model.get_classifier()
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    for place, block in enumerate(blocks):
        rate = drop_path * place / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = (DropPath(rate) if rate else nn.Identity() for _ in range(2))
    return model


def layer_decayed(
    model: nn.Module, optimizer: Callable[..., Optimizer], *, lr: float, weight_decay: float, decay: float
) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """An optimiser whose rate falls from the head to the first layer, by one factor a layer.

    Args:
        model: A classifier of timm.
        optimizer: Called with parameter groups and `lr`.
        lr: The head's peak rate.
        weight_decay: Of tensors of two dimensions and more.
        decay: The factor, above 0 to 1.

    Returns:
        What `ImageClassifier` takes as its optimiser; the groups it is given are replaced by its own.

    Raises:
        ValueError: If the factor is out of range.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"layer decay {decay}: expected above 0 to 1")

    def build(groups: list[dict[str, Any]]) -> Optimizer:
        made = param_groups_layer_decay(model, weight_decay=weight_decay, layer_decay=decay)
        return optimizer(
            [{"params": g["params"], "weight_decay": g["weight_decay"], "lr": lr * g["lr_scale"]} for g in made], lr=lr
        )

    return build


class Pretraining(ScheduledModule):
    """Train a masked model on small images; the classes of the batches are not looked at.

    Logs ``train_loss``, and ``val_loss`` with masks that are the same in every epoch and every run.

    Args:
        model: Its encoder must take the first resolution.
        optimizer: Builds the optimiser from parameter groups.
        resolutions: Pixels along the images: one size, or several that take equal shares of the epochs one after the
            other, as in the variant FastMIM-P (how the paper shares them out is not known to us).
        warmup_fraction: Share of the steps that warm up.

    Raises:
        ValueError: If there is no resolution, or the encoder takes another.
    """

    def __init__(
        self,
        model: FastMIM,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        resolutions: Sequence[int],
        warmup_fraction: float = 0.1,
    ) -> None:
        super().__init__(model, optimizer, warmup_fraction=warmup_fraction, clip=None)
        if not resolutions or resolutions[0] != model.image_size:
            raise ValueError(
                f"resolutions {list(resolutions)}: expected at least one, the first being what the encoder takes, "
                f"{model.image_size}"
            )
        self.resolutions = tuple(resolutions)

    @property
    def mim(self) -> FastMIM:
        """The model."""
        return cast(FastMIM, self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimiser with its schedule, after a check that the stages fit the run.

        Raises:
            ValueError: If there are more resolutions than epochs.
        """
        epochs = self.trainer.max_epochs or 0
        if 0 < epochs < len(self.resolutions):
            raise ValueError(f"{len(self.resolutions)} resolutions in {epochs} epochs: expected an epoch for each")
        return super().configure_optimizers()

    def on_train_epoch_start(self) -> None:
        """Take the resolution of the epoch."""
        epochs = self.trainer.max_epochs or 1
        stage = min(self.current_epoch * len(self.resolutions) // epochs, len(self.resolutions) - 1)
        self.mim.set_resolution(self.resolutions[stage])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch ``(images, classes)``; random masks."""
        x = resize(batch[0], self.mim.image_size)
        return self.checked(self.mim(x), len(x))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the loss of one batch; masks by the number of the batch."""
        x = resize(batch[0], self.mim.image_size)
        grid = self.mim.image_size // self.mim.block
        fixed = torch.Generator().manual_seed(batch_idx)
        mask = random_mask(len(x), grid, self.mim.mask_ratio, generator=fixed).to(x.device)
        self.log("val_loss", self.mim(x, mask), on_epoch=True, batch_size=len(x))


class FineTuning(ImageClassifier):
    """Train a classifier on images of one size, with the mixtures of the paper's recipe if they are asked for.

    Args:
        model: Of :func:`transfer`.
        optimizer: Builds the optimiser from parameter groups.
        image_size: Pixels; images of another size are resized.
        mixup: Parameter of the beta distribution that two images are mixed with, 0 for none.
        cutmix: The same for pasting a part of one into the other; if both are given, a coin decides for each batch.
        erase: Probability with which a rectangle of an image becomes noise, 0 to 1.
        options: Of `ImageClassifier`.

    Raises:
        ValueError: If a number is out of range; in training, if images are mixed and the batch is odd.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        *,
        image_size: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        erase: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(model, optimizer, **options)
        if mixup < 0 or cutmix < 0 or not 0 <= erase <= 1:
            raise ValueError(f"mixup {mixup}, cutmix {cutmix}, erase {erase}: expected at least 0, the last at most 1")
        self.image_size, self.erase = image_size, erase
        self.mix = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=self.num_classes) if mixup or cutmix else None

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Resize; in training also erase and mix, which turns classes into probabilities ``(B, num_classes)``."""
        x, y = resize(batch[0], self.image_size), batch[1]
        if self.trainer.training:
            if self.erase:
                x = RandomErasing(self.erase, mode="pixel", device=x.device)(x.clone())
            if self.mix is not None:
                if len(x) % 2:
                    raise ValueError(f"a batch of {len(x)} images cannot be mixed in pairs: expected an even number")
                x, y = self.mix(x.clone(), y)
        return x, y
