"""CLS attention (and keys) of the last block of a timm Vision Transformer, without the full attention matrix.

Fused attention keeps no matrix that could be read, and switching it off costs O(N^2) memory in every block. Only one
row is wanted, so a pre-hook on the last block's attention recomputes just that: the query of the CLS token against
the keys of all tokens, O(N). The pass ends there, as nothing behind it is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import nn

SUPPORTED_ATTENTION = (Attention, AttentionRope, EvaAttention)


class _LastAttentionReachedError(Exception):
    """Ends a forward pass whose remaining output nobody reads."""


@torch.no_grad()
def cls_attention(
    model: nn.Module, images: torch.Tensor, *, return_keys: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Return how much the CLS token of the last block attends to each patch, per head.

    The rows are softmaxed over all tokens and the CLS and register tokens are then dropped, so a map's sum is under 1.
    No gradient is kept. The model stays in the mode it is in: call ``model.eval()`` first.

    Args:
        model: a timm Vision Transformer with a CLS token (DINO, DINOv2, DINOv3, DeiT, EVA, plain ViT).
        images: (B, 3, H, W), normalised as the model wants them; H and W whole numbers of patches.
        return_keys: also return the keys of the patch tokens, from the same pass.

    Returns:
        (B, heads, feat_h, feat_w) float32; with ``return_keys`` also the keys, (B, heads, feat_h, feat_w, head_dim) in
        the model's dtype, after key normalisation and before rotary embedding (which would turn equal patches
        at different places into different keys).

    Raises:
        ValueError: for a model without CLS attention of a known kind, and for images that are not whole patches.
    """
    feat_h, feat_w = feature_size(model, images.shape)
    with _last_attention_hook(model, keep_keys=return_keys, stop=True) as record, suppress(_LastAttentionReachedError):
        model.forward_features(images)
    attn = _patch_cells(model, record["row"][..., None], feat_h, feat_w)[..., 0]
    return (attn, _patch_cells(model, record["keys"], feat_h, feat_w)) if return_keys else attn


@torch.no_grad()
def cls_attention_and_logits(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (attention as `cls_attention`, the model's output) from one pass, as self-distillation needs both."""
    feat_h, feat_w = feature_size(model, images.shape)
    with _last_attention_hook(model, keep_keys=False, stop=False) as record:
        logits = model(images)
    return _patch_cells(model, record["row"][..., None], feat_h, feat_w)[..., 0], logits


def feature_size(model: nn.Module, image_shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (feat_h, feat_w), the patch grid of ``model`` on images of ``image_shape`` (B, 3, H, W).

    Raises:
        ValueError: if the model is not supported, or the images are not a whole number of patches.
    """
    last_attention(model)
    if len(image_shape) != 4:
        raise ValueError(f"images must be (B, 3, H, W), got a shape of {tuple(image_shape)}")
    height, width = image_shape[-2:]
    patch_h, patch_w = model.patch_embed.feat_ratio(as_scalar=False)
    good = nearest_patch_size(height, patch_h), nearest_patch_size(width, patch_w)
    if (height, width) != good:
        raise ValueError(
            f"images of {height} x {width} (H x W) are not whole patches of {patch_h} x {patch_w}: "
            f"the nearest good size is {good[0]} x {good[1]}"
        )
    fixed = getattr(model.patch_embed, "img_size", None)
    if getattr(model.patch_embed, "strict_img_size", False) and fixed is not None and tuple(fixed) != good:
        raise ValueError(
            f"the model takes images of {fixed[0]} x {fixed[1]} only, got {height} x {width} (H x W): "
            "build it with timm.create_model(..., dynamic_img_size=True)"
        )
    return tuple(model.patch_embed.dynamic_feat_size((height, width)))


def nearest_patch_size(side: int, patch: int) -> int:
    """Return the multiple of ``patch`` (pixels) nearest to ``side``, one patch at the least."""
    return max(1, round(side / patch)) * patch


def last_attention(model: nn.Module) -> nn.Module:
    """Return the attention module of the last block; ValueError says why its CLS attention cannot be read here."""
    name = type(model).__name__
    if not all(hasattr(model, part) for part in ("blocks", "patch_embed", "num_prefix_tokens", "forward_features")):
        raise ValueError(f"{name} has no CLS attention: a timm Vision Transformer is needed (blocks, patch_embed)")
    if getattr(model, "cls_token", None) is None:
        raise ValueError(f"{name} was built without a CLS token, so there is no CLS attention to read")
    attn = getattr(model.blocks[-1], "attn", None)
    if type(attn) not in SUPPORTED_ATTENTION:  # a subclass may compute another attention than its parent
        kind = f"{type(attn).__module__}.{type(attn).__name__}"
        known = ", ".join(known.__name__ for known in SUPPORTED_ATTENTION)
        raise ValueError(f"the last block of {name} has attention of type {kind}; known are timm's {known}")
    return attn


@contextmanager
def _last_attention_hook(model: nn.Module, *, keep_keys: bool, stop: bool) -> Iterator[dict[str, torch.Tensor]]:
    """Record the CLS row of the next pass; the hook is gone afterwards, whatever happened in between.

    With ``stop`` the pass ends there, by _LastAttentionReachedError.

    Yields:
        A dict that the pass fills: ``row`` (B, heads, N) float32 softmaxed, with ``keep_keys`` also ``keys`` (B, kv
        heads, N, head_dim).
    """
    record = {}

    def hook(attn: nn.Module, args: tuple, kwargs: dict) -> None:
        query, keys = _cls_query_and_keys(attn, args[0])
        # computed here, not after the pass: kept tokens would raise the peak memory of the block's MLP
        record["row"] = _cls_row(attn, query, keys, kwargs.get("rope"))
        if keep_keys:
            record["keys"] = keys
        if stop:
            raise _LastAttentionReachedError

    handle = last_attention(model).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()


def _cls_query_and_keys(attn: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the normalised query of the CLS token and keys of all tokens, before rotary embedding.

    They are (B, heads, 1, head_dim) and (B, kv heads, N, head_dim), of the input (B, N, C) of ``attn``; token 0 is CLS.
    """
    if attn.qkv is None:  # not fused
        query, keys = attn.q_proj(tokens[:, :1]), attn.k_proj(tokens)
    else:
        weight_q, weight_k, _ = attn.qkv.weight.chunk(3)
        bias_q, bias_k = getattr(attn, "q_bias", None), None  # EVA's, whose keys have no bias
        if attn.qkv.bias is not None:
            bias_q, bias_k, _ = attn.qkv.bias.chunk(3)
        query, keys = F.linear(tokens[:, :1], weight_q, bias_q), F.linear(tokens, weight_k, bias_k)
    head_dim = query.shape[-1] // attn.num_heads
    query, keys = (part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in (query, keys))
    return attn.q_norm(query), attn.k_norm(keys)


def _cls_row(attn: nn.Module, query: torch.Tensor, keys: torch.Tensor, rope: torch.Tensor | None) -> torch.Tensor:
    """Return the softmaxed CLS row, (B, heads, N) float32; shapes as in `_cls_query_and_keys`."""
    if rope is not None:  # prefix tokens, hence the CLS query, are not rotated
        prefix, patches = keys.tensor_split([attn.num_prefix_tokens], dim=2)
        patches = apply_rot_embed_cat(patches, rope, half=getattr(attn, "rotate_half", False))
        keys = torch.cat([prefix, patches.type_as(prefix)], dim=2)
    if keys.shape[1] != query.shape[1]:  # grouped-query attention
        keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = (query * attn.scale) @ keys.transpose(-2, -1)
    return scores.squeeze(2).float().softmax(dim=-1)


def _patch_cells(model: nn.Module, tokens: torch.Tensor, feat_h: int, feat_w: int) -> torch.Tensor:
    """Drop the prefix tokens of (B, heads, N, D) and lay the others out as (B, heads, feat_h, feat_w, D)."""
    patches = tokens[:, :, model.num_prefix_tokens :]
    if patches.shape[2] != feat_h * feat_w:  # patch dropout of a model in training mode
        raise ValueError(f"{patches.shape[2]} patch tokens for a grid of {feat_h} x {feat_w}: call model.eval() first")
    return patches.unflatten(2, (feat_h, feat_w))
