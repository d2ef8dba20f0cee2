"""Networks by name, which of their parameters are trained, their EMA, and reading checkpoints into them."""

import contextlib
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.optim
import torch
import torchvision
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import group_parameters
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from localized_crops.files import UserError, first_line
from utils import UNREADABLE, load_tensors

TOY_CHANNELS = (16, 32, 64, 128)  # of toyresnet's stages: resnet18 of timm, a quarter as wide
DINOV2 = {"s": "small", "b": "base", "l": "large", "g": "giant", "huge": "giant"}
DINOV2 |= {size: size for size in DINOV2.values()}
PLAIN_VITS = ("timm.models.vision_transformer", "timm.models.eva")  # modules of timm
TORCHVISION_RESNET = {"stem": r"^conv1|^bn1", "blocks": r"^layer(\d+)", "head": r"^fc"}  # as timm groups its own


def timm_name(model_type: str) -> str:
    """Return timm's name of a model type.

    Names of DINOv2 are translated: dinov2_vit{s,b,l,g}14, dinov2_vit{small,base,large,huge,giant}14, and small to
    giant alone.
    """
    size = re.fullmatch(r"dinov2_vit(.+)14|(small|base|large|huge|giant)", model_type)
    size = size and DINOV2.get(size[1] or size[2])
    return f"vit_{size}_patch14_dinov2.lvd142m" if size else model_type


def known_name(model_type: str, key: str = "model.type") -> str:
    """Return timm's name of a model type, the setting ``key``; raise UserError if timm has no such model."""
    name = timm_name(model_type)
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3] or ["resnet50", "dinov2_vits14"]
        raise UserError(f"{key}={name}: there is no such model; give a timm name such as {', '.join(near)}")
    return name


def hub_error(
    error: Exception, model_type: str, weights_key: str = "model.weights", model_key: str = "model.type"
) -> UserError:
    """Return the error to raise if pretrained weights cannot be fetched: it names the file to fetch by hand."""
    if model_type == "resnet50":
        address = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.url
    else:
        published = timm.get_pretrained_cfg(timm_name(model_type))
        address = published.url if published else "them"
        if published and published.hf_hub_id:
            address = f"huggingface.co/{published.hf_hub_id}/model.safetensors"
    return UserError(
        f"{weights_key}=hub: the weights of {model_type} cannot be fetched ({first_line(error)}); fetch {address} on a "
        f"machine with a network and give {weights_key}=FILE {model_key}={model_type}"
    )


def build_model(
    model_type: str,
    n_classes: int,
    *,
    image_size: int,
    patch_size: int,
    weights: str | None = None,
    drop_path: float = 0.0,
) -> nn.Module:
    """Build a classifier with a new linear head.

    Args:
        model_type: "toyresnet", "resnet50" (torchvision's), a name of DINOv2 (see `timm_name`), or any timm name.
        image_size: side of the input in pixels; a ViT's position embedding is resampled to it.
        patch_size: of a ViT, pixels.
        drop_path: rate of stochastic depth, for timm's networks.
        weights: start of the backbone: None (from scratch), "hub", or a state dict's path (its head is left out).

    Raises:
        UserError: on an unknown name, weights that do not fit or cannot be fetched, or an unfit image size.
    """
    options = {"drop_path_rate": drop_path} if drop_path else {}
    if options and model_type == "resnet50":
        raise UserError("model.drop_path: torchvision's resnet50 has none; set model.type=resnet50.a1_in1k, timm's")
    try:
        model = _create(model_type, n_classes, image_size, patch_size, pretrained=weights == "hub", **options)
    except TypeError as error:
        raise UserError(f"model.type={model_type}, model.drop_path={drop_path}: {error}") from error
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        if weights != "hub":
            raise
        raise hub_error(error, model_type) from None
    if weights not in (None, "hub"):
        load_backbone(model, weights)
    return model


def _create(
    model_type: str, n_classes: int, image_size: int, patch_size: int, *, pretrained: bool, **options: Any
) -> nn.Module:
    if model_type == "resnet50":
        model = torchvision.models.resnet50()
        if pretrained:  # with weights_only: resnet50(weights=...) would run code in a pickle of the hub's cache
            published = torchvision.models.ResNet50_Weights.IMAGENET1K_V2
            model.load_state_dict(published.get_state_dict(check_hash=True, weights_only=True))
        model.fc = nn.Linear(model.fc.in_features, n_classes)
        return model
    if model_type == "toyresnet":
        return timm.create_model("resnet18", channels=TOY_CHANNELS, num_classes=n_classes, **options)
    name, options = known_name(model_type), options | {"num_classes": n_classes}
    if timm.models.model_entrypoint(name.split(".")[0]).__module__ not in PLAIN_VITS:
        model = _create_told_size(name, image_size, pretrained=pretrained, **options)
        if not _takes(model, image_size):
            sizes = ", ".join(map(str, _sizes_that_work(name, image_size)))
            raise UserError(f"image_size={image_size}: {name} cannot take it; it takes for instance {sizes}")
        return model.train()
    patch = timm.create_model(name, num_classes=n_classes, depth=1).patch_embed.patch_size[0]  # depth 1: quick
    if patch_size != patch:
        raise UserError(f"patch_size={patch_size}: {name} has patches of {patch} pixels; set patch_size={patch}")
    check_patches("image_size", image_size, patch)
    return timm.create_model(name, pretrained=pretrained, img_size=image_size, dynamic_img_size=True, **options)


def _create_told_size(name: str, image_size: int, **options: Any) -> nn.Module:
    """Create a timm model, with its input size as an argument if it takes one."""
    for size in ({"img_size": image_size, "dynamic_img_size": True}, {"img_size": image_size}):
        try:
            return timm.create_model(name, **size, **options)
        except TypeError:  # it has no such argument
            continue
        except (AssertionError, ValueError, RuntimeError, ZeroDivisionError):  # it has, and refuses this size
            break
    return timm.create_model(name, **options)


def _takes(model: nn.Module, image_size: int) -> bool:
    """Try an image size on a blank image."""
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, image_size, image_size))
    except Exception:  # each network has its own way of failing
        return False
    return True


def _sizes_that_work(name: str, image_size: int) -> list[int]:
    """Return the three nearest image sides that a timm model takes, tried on its shapes alone, in increasing order."""
    published = (timm.get_pretrained_cfg_value(name, "input_size") or (3, 224, 224))[-1]
    sizes: list[int] = []
    for size in sorted({*range(32, 513, 32), published}, key=lambda size: abs(size - image_size)):
        if len(sizes) == 3:
            break
        # some cannot even be built for a size
        with torch.device("meta"), contextlib.suppress(Exception):
            if _takes(_create_told_size(name, size, num_classes=2), size):
                sizes.append(size)
    return sorted(sizes or [published])


def input_config(model_type: str) -> dict[str, Any]:
    """Return timm's preprocessing of a network: ``mean``, ``std`` (in [0, 1]), ``interpolation`` and ``crop_pct``.

    Built-in networks and those without published weights get ImageNet's statistics.
    """
    published = None if model_type in ("toyresnet", "resnet50") else timm.get_pretrained_cfg(timm_name(model_type))
    settings = published.to_dict() if published else {}
    return {
        "mean": list(settings.get("mean") or IMAGENET_DEFAULT_MEAN),
        "std": list(settings.get("std") or IMAGENET_DEFAULT_STD),
        "interpolation": "bicubic" if settings.get("interpolation") == "bicubic" else "bilinear",
        "crop_pct": settings.get("crop_pct") or 0.875,
    }


def check_patches(key: str, image_size: int, patch: int | None) -> None:
    """Raise UserError unless an image side, the setting ``key``, is a multiple of the patch (None: any side is)."""
    if patch and image_size % patch:
        nearest = max(patch, round(image_size / patch) * patch)
        raise UserError(f"{key}={image_size}: no multiple of the model's patch, {patch} pixels; set {nearest}")


def patch_of(model: nn.Module) -> int | None:
    """Return the side of a ViT's patches in pixels; None for networks without patches."""
    patch_embed = getattr(model, "patch_embed", None)
    return patch_embed.patch_size[0] if patch_embed is not None else None


def head_of(model: nn.Module) -> nn.Module:
    """Return the classifier layer."""
    return model.fc if isinstance(model, torchvision.models.ResNet) else model.get_classifier()


def features_of(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the inputs (B, D) of the classifier layer and the logits (B, K) for images (B, 3, H, W)."""
    features = []
    with head_of(model).register_forward_pre_hook(lambda _head, inputs: features.append(inputs[0])):
        logits = model(images)
    return features[0], logits


# --- which parameters are trained ---------------------------------------------------------------------------------


def set_trainable(model: nn.Module, *, freeze_backbone: bool, train_cls: bool, freeze_layers: int = 0) -> None:
    """Freeze parameters of the model; raise UserError if it has no CLS token for ``train_cls``, or too few layers.

    Args:
        freeze_backbone: train the head alone.
        train_cls: train the CLS token and the head alone.
        freeze_layers: number of layers at the input to freeze: stages or blocks as timm groups parameters; the stem
            is the first.
    """
    if freeze_layers:
        matcher = TORCHVISION_RESNET
        if not isinstance(model, torchvision.models.ResNet):
            matcher = model.group_matcher(coarse=True)
        layer_of = group_parameters(model, matcher, reverse=True)
        layers = max(layer_of.values())  # the last layer is the head, or the backbone's last together with it
        if freeze_layers > layers:
            raise UserError(f"model.freeze_layers={freeze_layers}: this model has {layers} layers before its head")
        for name, parameter in model.named_parameters():
            if layer_of[name] < freeze_layers:
                parameter.requires_grad_(False)
    if freeze_backbone or train_cls:
        model.requires_grad_(False)
        head_of(model).requires_grad_(True)
    if train_cls:
        if getattr(model, "cls_token", None) is None:
            raise UserError("model.train_cls=true: this model has no CLS token; it is for ViTs, such as dinov2_vits14")
        model.cls_token.requires_grad_(True)


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """Return the compiled model, which shares its weights with ``model``; raise UserError where torch.compile fails."""
    try:
        torch.compile(nn.Linear(2, 2).to(device))(torch.zeros(2, 2, device=device))
    except Exception as error:  # torch raises a dozen kinds: no compiler, no Triton, an old GPU
        reason = first_line(error)
        raise UserError(f"compile=true: torch.compile does not work here ({reason}); set compile=false") from error
    return torch.compile(model)


def train_mode(model: nn.Module, *, freeze_bn: bool) -> None:
    """Put the model in training mode, except for BatchNorm layers with frozen weights, or all with ``freeze_bn``."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            frozen = module.affine and not module.weight.requires_grad
            module.train(not (freeze_bn or frozen))


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, head_lr: float = 1.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups of equal ``lr`` and ``weight_decay``, by timm's rules.

    Norms, biases, tokens and position embeddings get no weight decay.

    Args:
        lr: of the last layers of the backbone.
        head_lr: the head's learning rate, in units of ``lr``.
        layer_decay: factor of the learning rate from each layer to the one before it (BEiT).
    """
    without = {"no_weight_decay_list": getattr(model, "no_weight_decay", set)()}
    if layer_decay < 1:
        groups = timm.optim.param_groups_layer_decay(model, weight_decay, layer_decay=layer_decay, **without)
    else:
        groups = timm.optim.param_groups_weight_decay(model, weight_decay, **without)
    head, split = set(head_of(model).parameters()), []
    for group in groups:
        for factor, is_head in ((1.0, False), (head_lr, True)):
            params = [parameter for parameter in group["params"] if (parameter in head) == is_head]
            rate = lr * group.get("lr_scale", 1.0) * factor
            split.append({"params": params, "weight_decay": group["weight_decay"], "lr": rate})
    return [group for group in split if group["params"]]


def fit_linear(features: np.ndarray, labels: np.ndarray, n_classes: int, l2: float) -> tuple[np.ndarray, np.ndarray]:
    """Fit a linear classifier (multinomial logistic regression) and return its weights (K, D) and biases (K,).

    Args:
        features: (N, D); standardised for the fit, the returned weights are for unstandardised ones.
        labels: (N,) int64.
        l2: the penalty is l2 / 2 times the squared weights on standardised features.
    """
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    inputs, targets = torch.from_numpy(((features - mean) / std).astype(np.float32)), torch.from_numpy(labels)
    head = nn.Linear(features.shape[1], n_classes)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = nn.functional.cross_entropy(head(inputs), targets) + l2 / 2 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weights = head.weight.detach().numpy() / std
    return weights, head.bias.detach().numpy() - weights @ mean


def build_ema(model: nn.Module, ema_decay: float) -> AveragedModel:
    """Return the exponential moving average of the model's weights and buffers.

    The first update is a copy; later ones have the decay `warmed_up_decay`, so that the average of a short training
    does not keep the first weights.
    """

    def average(averaged: list[torch.Tensor], current: list[torch.Tensor], _updates: Any) -> None:
        get_ema_multi_avg_fn(warmed_up_decay(ema_decay, int(ema.n_averaged)))(averaged, current, None)

    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    ema.n_averaged = ema.n_averaged.cpu()  # each update reads it: on a GPU that would wait for the device
    return ema


def warmed_up_decay(ema_decay: float, updates: int) -> float:
    """Return the decay of an EMA after n updates, (1 + n) / (10 + n), at most ``ema_decay``.

    The rule of TensorFlow's ExponentialMovingAverage (num_updates).
    """
    return min(ema_decay, (1 + updates) / (10 + updates))


# --- reading checkpoints ------------------------------------------------------------------------------------------


def load_backbone(model: nn.Module, path: Path | str, key: str = "model.type") -> None:
    """Load a state dict's weights but for the classifier's into the model of setting ``key``; UserError if none fit."""
    head, (state, _) = _head_prefix(model), _load_state_dict(path)
    state = {key: value for key, value in state.items() if not key.startswith(head)}
    _load_strictly(model, state, path, key, kept=head)


def load_trained(
    model: nn.Module, path: Path | str, *, ema: bool | None = None, trained_classes: int | None = None
) -> str:
    """Load a trained model, head included: from a checkpoint of train.py or a plain state dict.

    Args:
        ema: of a checkpoint of train.py take the EMA or the model; None: whichever validated better.
        trained_classes: the file's number of outputs; if ``model`` has fewer, it gets the first ones.

    Returns:
        Which of a checkpoint's weights these are, model or ema; of a plain state dict: model.

    Raises:
        UserError: if it is of another architecture or has another number of classes.
    """
    state, which = _load_state_dict(path, ema)
    for key, value in model.state_dict().items():  # of every kind of head, which may have several layers of outputs
        if key in state and len(value.shape) and state[key].shape == (trained_classes, *value.shape[1:]):
            state[key] = state[key][: len(value)]
    name = f"{_head_prefix(model)}weight"
    expected, saved = model.state_dict().get(name), state.get(name)
    if expected is not None and saved is not None and saved.ndim == expected.ndim and len(saved) != len(expected):
        raise UserError(f"{path}: trained on {len(saved)} classes, the data set has {len(expected)}")
    _load_strictly(model, state, path, "model.type")
    return which


def _head_prefix(model: nn.Module) -> str:
    head = head_of(model)
    return next(name for name, module in model.named_modules() if module is head) + "."


def _load_state_dict(path: Path | str, ema: bool | None = None) -> tuple[dict[str, torch.Tensor], str]:
    """Return the state dict in a checkpoint of ours, torchvision's or timm's, and which weights it is: model or ema."""
    content, which = load_tensors(path), "model"
    if isinstance(content, dict):
        if ema is None:
            ema = content.get("chosen") != "model"  # older checkpoints were chosen by the EMA
        for key in ("ema" if ema else "model", "state_dict", "model"):
            if isinstance(content.get(key), dict):
                content, which = content[key], "ema" if key == "ema" else "model"
                break
    is_named = isinstance(content, dict) and all(isinstance(key, str) for key in content)
    if not is_named or not content or not all(torch.is_tensor(value) for value in content.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors); give a checkpoint of train.py or of timm")
    for prefix in 2 * ("module.", "_orig_mod.", "backbone."):  # of wrappers; twice: in either order
        if all(key.startswith(prefix) for key in content):
            content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content, which


def _load_strictly(
    model: nn.Module, state: dict[str, torch.Tensor], path: Path | str, model_key: str, kept: str | tuple[()] = ()
) -> None:
    """Load a state dict that may lack only the names with prefix ``kept`` and BatchNorm's counters, as old ones do."""
    optional = {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(kept) or key.endswith(".num_batches_tracked")
    }
    try:
        if isinstance(model, timm.models.VisionTransformer):  # official names, other image sizes
            state = timm.models.vision_transformer.checkpoint_filter_fn(dict(state), model)
        model.load_state_dict(optional | state)
        if not all(bool(value.isfinite().all()) for value in state.values()):
            raise ValueError("some of its weights are not finite numbers; train it again")
    except UNREADABLE as error:  # timm's filter raises errors of many kinds on tensors of another network
        lines = str(error).splitlines() or [type(error).__name__]
        reason = "; ".join(line.strip()[:100] for line in (lines[1:] or lines)[:2])
        raise UserError(f"{path}: of another architecture than {model_key} ({reason})") from None
