"""A vision transformer of any size, for runs that a laptop can finish."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer

__all__ = ["small_vit"]


def small_vit(
    *,
    image_size: int,
    patch_size: int,
    in_chans: int = 3,
    num_classes: int,
    dim: int,
    depth: int,
    heads: int,
    mlp_ratio: float = 4.0,
) -> VisionTransformer:
    """Build timm's vision transformer with a class token, biased projections and timm's own initialisation.

    Args:
        image_size: Height and width of the square images, in pixels; a multiple of `patch_size`.
        patch_size: Height and width of a patch, in pixels.
        in_chans: Colour channels of the images.
        num_classes: Number of logits.
        dim: Width of a token; a multiple of `heads`.
        depth: Number of transformer blocks.
        heads: Number of attention heads.
        mlp_ratio: Width of the hidden layer of a block's MLP, relative to `dim`.

    Returns:
        The model. It maps images ``(B, in_chans, image_size, image_size)`` to logits ``(B, num_classes)``.

    Raises:
        ValueError: If a size is not positive or does not divide as stated.

    Example:
        >>> model = small_vit(image_size=8, patch_size=2, in_chans=1, num_classes=10, dim=48, depth=4, heads=6)
        >>> sum(p.numel() for p in model.parameters())
        114778
    """
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": num_classes,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "mlp_ratio": mlp_ratio,
    }
    for name, size in sizes.items():
        if size <= 0:
            raise ValueError(f"{name} must be positive, got {size}")
    if image_size % patch_size:
        raise ValueError(
            f"image_size {image_size} is not a multiple of patch_size {patch_size}: choose a patch size that "
            "divides the image"
        )
    if dim % heads:
        raise ValueError(f"dim {dim} is not a multiple of heads {heads}: every head takes an equal share of a token")
    return VisionTransformer(
        img_size=image_size,
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
    )
