"""SAM's encoder and decoder with the official weights and results, in another order of multiplications.

Relative positions go into fused attention; what all points of an image share is computed once; in
``u · (W k) = (Wᵀ u) · k`` it is the few prompt tokens that go through the weight, not the 4096 image tokens to a point;
a mask is upscaled only when it is asked for, and only on the cells that lie on the image.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder
from segment_anything.modeling.image_encoder import get_rel_pos, window_partition, window_unpartition
from torch import nn

UPSCALING = 4  # pixels of a low-resolution mask along one side of an image token


def encode(encoder: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return embeddings (B, C, grid, grid) of images (B, 3, side, side); other encoders than SAM's ViT are called."""
    if type(encoder) is not ImageEncoderViT:
        return encoder(images)
    tokens = encoder.patch_embed(images)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    for block in encoder.blocks:
        tokens = _encoder_block(block, tokens)
    return encoder.neck(tokens.permute(0, 3, 1, 2))


def _encoder_block(block: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the block's output for tokens (B, h, w, C), as its own forward does."""
    height, width = tokens.shape[1:3]
    attended = block.norm1(tokens)
    if block.window_size > 0:
        windows, padded = window_partition(attended, block.window_size)
        windows = _encoder_attention(block.attn, windows)
        attended = window_unpartition(windows, block.window_size, padded, (height, width))
    else:
        attended = _encoder_attention(block.attn, attended)
    tokens = tokens + attended
    return tokens + block.mlp(block.norm2(tokens))


def _encoder_attention(attn: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return self-attention over (B, h, w, C) by the fused kernel, no matrix of N x N.

    The relative position adds row[q, y] + col[q, x] to the score of query q and the key at (y, x): a scalar product
    too, of (row[q], col[q]) and the one-hot places of the key, and so both are appended to queries and keys.
    """
    batch, height, width, _ = tokens.shape
    qkv = attn.qkv(tokens).reshape(batch, height * width, 3, attn.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, head_dim)
    head_dim, scaled = query.shape[-1], query * attn.scale
    if attn.use_rel_pos:
        places = query.unflatten(2, (height, width))
        rows = torch.einsum("bnhwc,hkc->bnhwk", places, get_rel_pos(height, height, attn.rel_pos_h))
        cols = torch.einsum("bnhwc,wkc->bnhwk", places, get_rel_pos(width, width, attn.rel_pos_w))
        scaled = torch.cat([scaled, rows.flatten(2, 3), cols.flatten(2, 3)], dim=-1)
        at_row, at_col = (torch.eye(count, dtype=key.dtype, device=key.device) for count in (height, width))
        one_hot = torch.cat([at_row.repeat_interleave(width, dim=0), at_col.repeat(height, 1)], dim=-1)
        key = torch.cat([key, one_hot.expand(*key.shape[:3], -1)], dim=-1)
        value = F.pad(value, (0, height + width))  # the fused kernels need one head size
    attended = F.scaled_dot_product_attention(scaled, key, value, scale=1.0)[..., :head_dim]
    return attn.proj(attended.transpose(1, 2).reshape(batch, height, width, -1))


@dataclass
class ImageTokens:
    """B images of N tokens as the decoder sees them, and every projection of them that all their prompts share."""

    tokens: torch.Tensor  # (B, N, C), dense prompt included
    shared: dict[nn.Linear, torch.Tensor]  # by layer of the transformer: (B or 1, heads, N, head_dim)

    @classmethod
    def build(cls, decoder: MaskDecoder, embeddings: torch.Tensor, position: torch.Tensor) -> "ImageTokens":
        """Project (B, C, h, w) embeddings for the first layer; later ones share the positions (1, C, h, w) only."""
        transformer = decoder.transformer
        image, position = (part.flatten(2).mT.contiguous() for part in (embeddings, position))
        placed, (first, *later) = image + position, transformer.layers
        inputs = {
            first.cross_attn_token_to_image.k_proj: placed,
            first.cross_attn_token_to_image.v_proj: image,
            first.cross_attn_image_to_token.q_proj: placed,
            transformer.final_attn_token_to_image.k_proj: position,
        }
        for layer in later:
            inputs[layer.cross_attn_token_to_image.k_proj] = position
            inputs[layer.cross_attn_image_to_token.q_proj] = position
        heads = transformer.num_heads
        return cls(image, {project: _split_heads(project(tokens), heads) for project, tokens in inputs.items()})


def decode_prompts(
    decoder: MaskDecoder, image: ImageTokens, prompts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run SAM's two-way transformer for P prompts on each of B images.

    Args:
        decoder: the mask decoder; K masks belong to its multi-mask output.
        prompts: (B, P, S, C) sparse prompt tokens.

    Returns:
        mask tokens (B, P, K, C), image tokens (B, P, N, C), predicted IoU (B, P, K) float32.
    """
    transformer = decoder.transformer
    output = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([output.expand(*prompts.shape[:2], -1, -1), prompts], dim=2)
    queries, keys = tokens, None
    for layer in transformer.layers:
        queries = layer.norm1(_attend_to_prompt(layer, queries, tokens))
        seen = _attend_to_image(layer.cross_attn_token_to_image, queries + tokens, image, keys)
        queries = layer.norm2(queries + seen)
        queries = layer.norm3(queries + layer.mlp(queries))
        keys = _update_image(layer.cross_attn_image_to_token, queries + tokens, queries, image, keys)
        keys = layer.norm4(keys).type_as(keys)  # autocast makes it float32, which every product would convert
    kept = [0, *range(2, decoder.num_mask_tokens + 1)]  # token 1 is the mask of the single-mask output
    queries, tokens = queries[:, :, kept], tokens[:, :, kept]
    seen = _attend_to_image(transformer.final_attn_token_to_image, queries + tokens, image, keys)
    queries = transformer.norm_final_attn(queries + seen)
    return queries[:, :, 1:], keys, decoder.iou_prediction_head(queries[:, :, 0])[..., 1:].float()


def _attend_to_prompt(layer: nn.Module, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return self-attention of the tokens of each prompt, (B, P, T, C)."""
    flat, pe = queries.flatten(0, 1), tokens.flatten(0, 1)
    if layer.skip_first_layer_pe:
        return layer.self_attn(flat, flat, flat).view_as(queries)
    return (flat + layer.self_attn(flat + pe, flat + pe, flat)).view_as(queries)


def _attend_to_image(
    attn: nn.Module, queries: torch.Tensor, image: ImageTokens, keys: torch.Tensor | None
) -> torch.Tensor:
    """Return the cross-attention output for tokens (B, P, T, C) that attend to the image tokens.

    Args:
        keys: (B, P, N, C), the image tokens of each prompt; None before the first update, when all have ``image``'s.
    """
    vectors = _split_heads(attn.q_proj(queries), attn.num_heads)
    weights = _image_scores(vectors, attn.k_proj, image, keys).softmax(dim=-1)  # (B, P, heads, T, N)
    if keys is None:
        values = weights @ image.shared[attn.v_proj][:, None]
    else:
        gathered = (weights.flatten(2, 3) @ keys).unflatten(2, (attn.num_heads, -1))  # (B, P, heads, T, C)
        values = gathered @ _by_head(attn.v_proj.weight, attn).mT + _by_head(attn.v_proj.bias, attn)[:, None]
    return attn.out_proj(values.transpose(2, 3).flatten(3))


def _update_image(
    attn: nn.Module, queries: torch.Tensor, values: torch.Tensor, image: ImageTokens, keys: torch.Tensor | None
) -> torch.Tensor:
    """Return the image tokens (B, P, N, C) plus their cross-attention to the tokens of their prompt.

    Args:
        queries, values: (B, P, T, C), the tokens with and without their positional encoding.
        keys: as in `_attend_to_image`.
    """
    vectors = _split_heads(attn.k_proj(queries), attn.num_heads)
    weights = _image_scores(vectors, attn.q_proj, image, keys).softmax(dim=-2).flatten(2, 3)  # (B, P, heads * T, N)
    # W (sum of weight * value) = sum of weight * (W value); a head's weights sum to 1: each brings its part of the bias
    parts = _split_heads(attn.v_proj(values), attn.num_heads) @ _by_head(attn.out_proj.weight.T, attn)
    parts = parts.flatten(2, 3) + attn.out_proj.bias / attn.num_heads  # (B, P, heads * T, C)
    before = image.tokens[:, None].expand(-1, queries.shape[1], -1, -1) if keys is None else keys
    updated = torch.baddbmm(before.flatten(0, 1), weights.flatten(0, 1).mT, parts.flatten(0, 1))
    return updated.unflatten(0, queries.shape[:2])


def _image_scores(
    vectors: torch.Tensor, project: nn.Linear, image: ImageTokens, keys: torch.Tensor | None
) -> torch.Tensor:
    """Return the attention scores (B, P, heads, T, N) between projected tokens and image tokens.

    Image tokens are a sum: a part that all prompts share, and (after the first update) a part of each prompt.

    Args:
        vectors: (B, P, heads, T, head_dim).
        project: the layer for image tokens; its output for the shared part is in ``image``.
        keys: (B, P, N, C), the other part: it is not projected, the vectors are projected back; or None.
    """
    batch, prompts, heads, count, head_dim = vectors.shape
    vectors = vectors / math.sqrt(head_dim)
    scores = vectors.transpose(1, 2).flatten(2, 3) @ image.shared[project].mT  # (B, heads, P * T, N)
    scores = scores.unflatten(2, (prompts, count)).transpose(1, 2)
    if keys is None:
        return scores
    back = (vectors @ project.weight.unflatten(0, (heads, head_dim))).flatten(2, 3)  # (B, P, heads * T, C)
    scores = torch.baddbmm(scores.flatten(2, 3).flatten(0, 1), back.flatten(0, 1), keys.flatten(0, 1).mT)
    return scores.view(batch, prompts, heads, count, -1)


def _split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """Return (..., heads, T, head_dim) of (..., T, heads * head_dim)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _by_head(parameter: torch.Tensor, attn: nn.Module) -> torch.Tensor:
    """Return (heads, head_dim, ...) of a parameter (heads * head_dim, ...)."""
    return parameter.unflatten(0, (attn.num_heads, -1))


def upscale_masks(
    decoder: MaskDecoder, tokens: torch.Tensor, keys: torch.Tensor, grid: tuple[int, int], cells: tuple[int, int]
) -> torch.Tensor:
    """Return the low-resolution logits (M, K, 4 * cells[0], 4 * cells[1]) of the K masks of M prompts.

    A transposed convolution whose kernel is its stride is a linear layer on each image token, here with the channels
    last: no transposed copies, and only the cells that lie on the image.

    Args:
        tokens: (M, K, C), mask tokens.
        keys: (M, N, C), image tokens of a ``grid``.
        cells: the part of the grid, from the top left, that is upscaled.
    """
    first, norm, activation, second, last_activation = decoder.output_upscaling
    heads = decoder.output_hypernetworks_mlps[-tokens.shape[1] :]
    weights = torch.stack([head(tokens[:, row]) for row, head in enumerate(heads)], dim=1)  # (M, K, C / 8)
    pixels = _enlarge(first, keys.unflatten(1, grid)[:, : cells[0], : cells[1]])
    pixels = F.layer_norm(pixels, pixels.shape[-1:], norm.weight, norm.bias, norm.eps).type_as(pixels)
    pixels = last_activation(_enlarge(second, activation(pixels)))  # (M, rows, cols, 2, 2, 2, 2, C / 8)
    logits = weights @ pixels.flatten(1, -2).mT
    logits = logits.unflatten(2, (*cells, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return logits.reshape(*tokens.shape[:2], UPSCALING * cells[0], UPSCALING * cells[1])


def _enlarge(convolution: nn.ConvTranspose2d, pixels: torch.Tensor) -> torch.Tensor:
    """Return (..., 2, 2, C_out): the four pixels that a 2 x 2 transposed convolution of stride 2 makes of each."""
    weight = convolution.weight.permute(2, 3, 1, 0)  # (2, 2, C_out, C_in)
    enlarged = F.linear(pixels, weight.flatten(0, 2), convolution.bias.repeat(4))
    return enlarged.unflatten(-1, weight.shape[:3])
