"""The small Vision Transformer that finds ToyBirds."""

from functools import partial

import timm
from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed
from torch import nn


def build_toy_vit(*, image_size: int, stride: int, width: int, depth: int, heads: int) -> nn.Module:
    """Build the small ViT for drawn birds: a convolutional stem, so that it learns within a minute, and no classifier.

    Args:
        image_size: side of the training images in pixels; others work too.
        stride: pixels a cell, a power of two: as many convolutions of stride two.
        width, depth, heads: of the transformer.
    """
    count = stride.bit_length() - 1
    channels = tuple(max(32, width >> left) for left in reversed(range(count)))
    stem = ConvStem(depth=count, channels=channels, stride=(2,) * count, kernel_size=3, act_layer=nn.GELU)
    return timm.models.VisionTransformer(
        img_size=image_size,
        patch_size=1,  # of the stem's output
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        dynamic_img_size=True,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
    )
