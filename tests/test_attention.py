"""attention.py against timm's own AttentionExtract with fused attention off, one model of each family."""

import copy
import inspect

import pytest
import timm
import torch
from timm.utils import AttentionExtract

from localized_crops.attention import cls_attention, cls_attention_and_logits, feature_size

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 5}
FAMILIES = {  # name: (timm architecture, overrides)
    "dinov2": ("vit_small_patch14_dinov2", {}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {}),
    "dinov2_giant": ("vit_giant_patch14_reg4_dinov2", {}),  # SwiGLU
    "dino_16": ("vit_small_patch16_224", {}),
    "dino_8": ("vit_small_patch8_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),  # rotary embedding, no qkv bias
    "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", {}),  # q_bias and v_bias beside a fused qkv
    "eva02_unfused": ("eva02_base_patch14_224", {}),  # q_proj, k_proj, v_proj
    "eva": ("eva_giant_patch14_224", {}),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {}),  # one rotary embedding per block and head
    "grouped_query": ("vit_small_patch16_rope_224", {"num_kv_heads": 1, "qkv_fused": False}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
    "query_key_norm": ("vit_small_patch16_224", {"qk_norm": True}),
}


def build_vit(family="dinov2", **overrides):
    """A tiny ViT of a family, every parameter random: layer scale and zero biases would hide mistakes."""
    name, own = FAMILIES[family]
    if "num_kv_heads" in own and "num_kv_heads" not in inspect.signature(timm.models.eva.Eva).parameters:
        pytest.skip("this timm has no grouped queries yet")
    model = timm.create_model(name, **{**TINY, "dynamic_img_size": True, **own, **overrides}).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def build_images(model, batch=2, feat_h=3, feat_w=5):
    patch_h, patch_w = model.patch_embed.patch_size
    return torch.randn(batch, 3, feat_h * patch_h, feat_w * patch_w, generator=torch.Generator().manual_seed(1))


def reference_attention(model, images, feat_h=3, feat_w=5):
    """The CLS row of the last block's full attention matrix, as timm extracts it."""
    model = copy.deepcopy(model)  # AttentionExtract leaves its hooks behind
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    last = f"blocks.{len(model.blocks) - 1}.attn.attn_drop"
    with torch.no_grad():
        matrix = AttentionExtract(model, names=[last], method="hook")(images)[last]  # (B, heads, N, N)
    return matrix[:, :, 0, model.num_prefix_tokens :].unflatten(-1, (feat_h, feat_w))


@pytest.mark.parametrize("family", FAMILIES)
def test_matches_attention_extract(family):
    model = build_vit(family)
    images = build_images(model)
    attn = cls_attention(model, images)
    expected = reference_attention(model, images)
    assert attn.shape == (2, 3, 3, 5) and attn.dtype == torch.float32
    assert torch.allclose(attn, expected, atol=1e-5, rtol=0)
    assert expected.flatten(2).std(-1).min() > 1e-3  # not trivially uniform
    assert (attn.sum((-2, -1)) < 1).all()  # CLS and registers hold the rest


@pytest.mark.parametrize("family", ["dinov2", "dinov3"])
def test_a_swapped_grid_would_fail(family):
    model = build_vit(family)
    images = build_images(model)
    swapped = cls_attention(model, images.transpose(-2, -1).contiguous())
    assert swapped.shape == (2, 3, 5, 3)
    assert not torch.allclose(swapped.transpose(-2, -1), cls_attention(model, images), atol=1e-3)


def test_fused_attention_stays_on_and_the_hook_goes():
    model = build_vit()
    images = build_images(model)
    before = model(images)
    cls_attention(model, images)
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not model.blocks[-1].attn._forward_pre_hooks
    assert torch.equal(model(images), before)


def test_the_hook_goes_when_the_pass_fails():
    model = build_vit()
    with pytest.raises(RuntimeError):
        cls_attention(model, build_images(model)[:, :2])  # two channels
    assert not model.blocks[-1].attn._forward_pre_hooks


def test_keys_of_the_same_pass():
    model = build_vit("dinov2_registers")
    images = build_images(model)
    seen = {}
    handle = model.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, output: seen.update(qkv=output))
    model(images)
    handle.remove()
    attn, keys = cls_attention(model, images, return_keys=True)
    expected = seen["qkv"].reshape(2, -1, 3, 3, 16)[:, 5:, 1].reshape(2, 3, 5, 3, 16).permute(0, 3, 1, 2, 4)
    assert torch.allclose(keys, expected, atol=1e-5)
    assert torch.equal(attn, cls_attention(model, images))


def test_logits_of_the_same_pass():
    model = build_vit()
    images = build_images(model)
    attn, logits = cls_attention_and_logits(model, images)
    assert torch.equal(attn, cls_attention(model, images))
    assert torch.equal(logits, model(images))


def test_half_precision_gives_float32_maps():
    model = build_vit()
    images = build_images(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attn = cls_attention(model, images)
    assert attn.dtype == torch.float32 and attn.isfinite().all()


def test_no_gradient_is_kept():
    model = build_vit()
    assert not cls_attention(model, build_images(model).requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("height", "width", "good"),
    [(43, 70, "42 x 70"), (42, 64, "42 x 70"), (5, 70, "14 x 70"), (1, 1, "14 x 14")],
)
def test_images_that_are_not_whole_patches(height, width, good):
    with pytest.raises(ValueError, match=f"nearest good size is {good}"):
        cls_attention(build_vit(), torch.zeros(1, 3, height, width))


def test_images_come_in_batches():
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\), got a shape of \(3, 42, 70\)"):
        cls_attention(build_vit(), torch.zeros(3, 42, 70))


def test_patches_that_training_drops_have_no_place_on_the_grid():
    model = build_vit("dino_16", patch_drop_rate=0.5)
    images = build_images(model)
    assert cls_attention(model, images).shape == (2, 3, 3, 5)
    with pytest.raises(ValueError, match=r"patch tokens for a grid of 3 x 5: call model\.eval\(\) first"):
        cls_attention(model.train(), images, return_keys=True)


def test_a_model_of_one_size_says_so():
    model = build_vit("dino_16", dynamic_img_size=False)
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        cls_attention(model, torch.zeros(1, 3, 48, 80))
    assert feature_size(model, (1, 3, 224, 224)) == (14, 14)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("resnet18", {}, "timm Vision Transformer is needed"),
        ("vit_base_patch16_siglip_224", {"embed_dim": 48, "depth": 1, "num_heads": 3}, "without a CLS token"),
        ("beit_base_patch16_224", {"embed_dim": 48, "depth": 1, "num_heads": 3}, "attention of type timm.models.beit"),
    ],
)
def test_unsupported_models(name, overrides, message):
    model = timm.create_model(name, **overrides)
    with pytest.raises(ValueError, match=message) as caught:
        cls_attention(model, torch.zeros(1, 3, 224, 224))
    assert "\n" not in str(caught.value)
