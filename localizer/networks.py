"""The network whose attention gives the maps: by name, from the hub, a local file, or a checkpoint of train.py."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from localized_crops.attention import last_attention
from localized_crops.files import UserError
from models import load_backbone, timm_name, weights_address
from toybirds.network import build_toy_vit
from transforms import normalize
from utils import UNREADABLE, load_tensors, torch_seed

TOY_WEIGHTS = Path(__file__).parent.parent / "toybirds" / "toy_localizer.pt"  # made by toybirds/make_localizer.py
PHOTOGRAPHS = "dinov2_vits14"  # the network for all but the drawn birds, whose localizer knows nothing else
MAX_SIDE = 4096  # pixels, cells, layers: the largest number of an architecture that a file may ask for


@dataclass(frozen=True)
class Localizer:
    """A network without its classifier, and what its input must be."""

    model: nn.Module  # in eval mode
    name: str  # of the architecture
    weights: str  # where they came from
    weights_sha256: str
    image_size: int  # pixels, the side it was trained at
    patch: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B, 3, H, W) uint8 images as the float32 that the network wants, on their device."""
        return normalize(images, self.mean, self.std)


def build_localizer(model_type: str | None, weights: str | None) -> Localizer:
    """Build the network and load its weights.

    Args:
        model_type: a timm name or dinov2_vit{s,b,l,g}14; None: what the weights file says of itself.
        weights: "hub"; "random" (to test a pipeline); a state dict's path (official DINO or DINOv2, timm); a checkpoint
            of train.py; None: the ToyBirds localizer, or with a ``model_type`` the hub.

    Raises:
        UserError: one line, on a name, file or architecture that does not serve.
    """
    weights = weights or ("hub" if model_type else str(TOY_WEIGHTS))
    if weights in ("hub", "random"):
        if model_type is None:
            raise UserError(f"dino.weights={weights}: name the network too, such as dino.model=dinov2_vits14")
        name, model = timm_name(model_type), _from_hub(model_type) if weights == "hub" else _from_scratch(model_type)
        return as_localizer(model, name, weights, **input_of(model))
    content = load_tensors(weights)
    about = content.get("config") if isinstance(content, dict) else None
    if isinstance(about, dict):
        return _from_checkpoint(weights, about, model_type)
    about = content.get("about") if isinstance(content, dict) else None
    if isinstance(about, dict) and model_type is None:
        return _from_toy(weights, content, about)
    if model_type is None:
        raise UserError(f"{weights}: does not say which network it is of; add dino.model=NAME, such as dinov2_vits14")
    model = _create(timm_name(model_type))
    _load(model, weights, "dino.model")
    return as_localizer(model, timm_name(model_type), weights, **input_of(model))


def configured_localizer(config: dict[str, Any]) -> Localizer:
    """Build the localizer that a config's section ``dino`` names; the toy one serves the drawn birds alone."""
    wanted = config["dino"]
    toys = config["dataset"]["name"] == "toybirds" or wanted["weights"]
    return build_localizer(wanted["model"] or (None if toys else PHOTOGRAPHS), wanted["weights"])


def as_localizer(model: nn.Module, name: str, weights: str, **input_of: Any) -> Localizer:
    """Return a ViT as a localizer: in eval mode, with the hash of its weights.

    Args:
        model: a timm Vision Transformer with CLS attention.
        name: of the architecture.
        weights: where they came from, for people.
        **input_of: image_size and, if not ImageNet's, mean and std.

    Raises:
        UserError: if its attention cannot be read.
    """
    try:
        last_attention(model)
    except ValueError as error:
        raise UserError(f"dino.model: {name} gives no maps: {error}") from None
    patch = tuple(model.patch_embed.feat_ratio(as_scalar=False))
    return Localizer(model.eval(), name, weights, state_hash(model), patch=patch, **input_of)


def state_hash(model: nn.Module) -> str:
    """Return a hash of all weights and buffers: equal weights from different files are the same."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- from the hub, from a plain state dict ------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0]}*")[:3]
        raise UserError(f"dino.model={name}: there is no such model; timm has {', '.join(near) or 'no similar one'}")


def _create(name: str, **options: Any) -> nn.Module:
    _check_name(name)
    try:
        return timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    except TypeError:
        raise UserError(
            f"dino.model={name}: is no Vision Transformer of any input size; give one, such as DINOv2"
        ) from None


def input_of(model: nn.Module) -> dict[str, Any]:
    """Return the image_size, mean and std that a timm network was trained with."""
    about = model.pretrained_cfg
    return {"image_size": about["input_size"][-1], "mean": tuple(about["mean"]), "std": tuple(about["std"])}


def _from_hub(model_type: str) -> nn.Module:
    _check_name(timm_name(model_type))
    return fetched("dino.weights", "dino.model", model_type, lambda: _create(timm_name(model_type), pretrained=True))


def fetched(key: str, model_key: str, model_type: str, create: Callable[[], nn.Module]) -> nn.Module:
    """Return the network that ``create`` builds with weights from the hub.

    Args:
        key: of the config, that asks for them.
        model_key: of the config, that names the network.
        model_type: its value.
        create: fetches and builds.

    Raises:
        UserError: if they cannot be had, naming the file to fetch by hand.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # each of its retries is a warning
    try:
        return create()
    except UserError:
        raise
    except Exception as error:  # the hub's clients raise errors of many unrelated kinds
        raise UserError(
            f"{key}=hub: the weights of {timm_name(model_type)} cannot be fetched ({type(error).__name__}); fetch "
            f"{weights_address(model_type)} on a machine with a network and give {key}=FILE {model_key}={model_type}"
        ) from None
    finally:
        logger.setLevel(level)


def _from_scratch(model_type: str) -> nn.Module:
    with torch_seed(0):
        return _create(timm_name(model_type))


def _load(model: nn.Module, path: str, key: str) -> None:
    try:
        load_backbone(model, path)
    except UserError as error:
        raise UserError(str(error).replace("model.type", key)) from None


# --- files that say what they are ---------------------------------------------------------------------------------


def _from_checkpoint(path: str, config: dict[str, Any], model_type: str | None) -> Localizer:
    """Build the network of a checkpoint of train.py, at the input size that it was trained at, with the
    weights that validated better."""
    try:
        trained, image_size = timm_name(config["model"]["type"]), int(config["image_size"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path}: its config names no model.type and image_size; train it again") from None
    if model_type is not None and timm_name(model_type) != trained:
        raise UserError(
            f"{path}: of {trained}, but dino.model={model_type}; leave dino.model=None or give another file"
        )
    if not timm.is_model(trained):
        raise UserError(f"{path}: of {trained}, which has no attention; a Vision Transformer is needed")
    if not 1 <= image_size <= MAX_SIDE:
        raise UserError(f"{path}: its image_size={image_size} must lie between 1 and {MAX_SIDE}; train it again")
    model = _create(trained, img_size=image_size)
    _load(model, path, "its own model.type")
    statistics = {key: tuple(config["model"][key]) for key in ("mean", "std") if config["model"].get(key)}
    return as_localizer(model, trained, path, image_size=image_size, **statistics)


def _from_toy(path: str, content: dict[str, Any], about: dict[str, Any]) -> Localizer:
    try:
        if not all(1 <= value <= MAX_SIDE for value in about["architecture"].values()):
            raise ValueError(f"its architecture has a number outside of 1 to {MAX_SIDE}")
        model = build_toy_vit(**about["architecture"])
        model.load_state_dict({key: value.float() for key, value in content["model"].items()})
        image_size = int(about["architecture"]["image_size"])
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:80]
        raise UserError(f"{path}: not a file of toybirds/make_localizer.py ({reason}); run it again") from None
    return as_localizer(model, "toy_localizer", path, image_size=image_size)
