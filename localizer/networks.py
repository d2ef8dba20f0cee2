"""The network whose attention gives the maps: by name, from the hub, a local file, or a checkpoint of train.py."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from localized_crops.attention import last_attention
from localized_crops.files import UserError, first_line
from models import hub_error, known_name, load_backbone, timm_name
from toybirds.network import build_toy_vit
from transforms import normalize
from utils import UNREADABLE, load_tensors, torch_seed

TOY_WEIGHTS = Path(__file__).parent.parent / "toybirds" / "toy_localizer.pt"  # made by toybirds/make_localizer.py
PHOTOGRAPHS = "dinov2_vits14"  # the default for all data sets but ToyBirds
MAX_SIDE = 4096  # upper bound of every size (pixels, cells, layers) that a file may ask for


@dataclass(frozen=True)
class Localizer:
    """A network without its classifier, and the input that it expects."""

    model: nn.Module  # in eval mode
    name: str  # of the architecture
    weights: str  # where they came from
    weights_sha256: str
    image_size: int  # pixels, the side it was trained at
    patch: tuple[int, int]  # height, width in pixels
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.model.parameters()).device

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B, 3, H, W) uint8 images as normalised float32, on their device."""
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
    content = load_tensors(weights) if weights not in ("hub", "random") else None
    config, header = (content.get(key) if isinstance(content, dict) else None for key in ("config", "about"))
    if isinstance(config, dict):
        return _from_checkpoint(weights, config, model_type)
    if isinstance(header, dict) and model_type is None:
        return _from_toy(weights, content, header)
    if model_type is None:
        raise UserError(f"dino.weights={weights}: name the network too, such as dino.model=dinov2_vits14")
    model = create_network(model_type, weights, "dino.model", "dino.weights", dynamic_img_size=True)
    return as_localizer(model, timm_name(model_type), weights, **input_of(model))


def configured_localizer(config: dict[str, Any]) -> Localizer:
    """Build the localizer that a config's section ``dino`` names; the toy one serves the drawn birds alone."""
    settings = config["dino"]
    default = None if config["dataset"]["name"] == "toybirds" or settings["weights"] else PHOTOGRAPHS
    return build_localizer(settings["model"] or default, settings["weights"])


def as_localizer(model: nn.Module, name: str, weights: str, **input_of: Any) -> Localizer:
    """Return a ViT as a localizer: in eval mode, with the hash of its weights.

    Args:
        model: a timm Vision Transformer with CLS attention.
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


def create_network(model_type: str, weights: str, model_key: str, weights_key: str, **options: Any) -> nn.Module:
    """Build a timm network without a classifier.

    Args:
        weights: "hub", "random" or the path of a state dict.
        model_key, weights_key: the keys of the config that these two come from.
        **options: of ``timm.create_model``.

    Raises:
        UserError: if there is no such network, or the weights do not fit or cannot be fetched.
    """
    name = known_name(model_type, model_key)
    is_fetched = weights == "hub"
    if is_fetched:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each of its retries is a warning
    try:
        with torch_seed(0):
            model = timm.create_model(name, num_classes=0, pretrained=is_fetched, **options)
    except TypeError:
        raise UserError(f"{model_key}={name}: is no Vision Transformer of any input size; give a DINOv2") from None
    except Exception as error:  # the hub's clients raise errors of many unrelated kinds
        if not is_fetched:
            raise
        raise hub_error(error, model_type, weights_key, model_key) from None
    if weights not in ("hub", "random"):
        load_backbone(model, weights, model_key)
    return model


def input_of(model: nn.Module) -> dict[str, Any]:
    """Return the image_size, mean and std that a timm network was trained with."""
    cfg = model.pretrained_cfg
    return {"image_size": cfg["input_size"][-1], "mean": tuple(cfg["mean"]), "std": tuple(cfg["std"])}


# --- files that say what they are ---------------------------------------------------------------------------------


def _from_checkpoint(path: str, config: dict[str, Any], model_type: str | None) -> Localizer:
    """Build the network of a checkpoint of train.py, at its input size, with the weights that validated better."""
    try:
        trained, image_size = timm_name(config["model"]["type"]), int(config["image_size"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        raise UserError(f"{path}: its config names no model.type and image_size; train it again") from None
    if model_type is not None and timm_name(model_type) != trained:
        raise UserError(f"{path}: of {trained}, but dino.model={model_type}; leave dino.model out")
    if not timm.is_model(trained):
        raise UserError(f"{path}: of {trained}, which has no attention; a Vision Transformer is needed")
    if not 1 <= image_size <= MAX_SIDE:
        raise UserError(f"{path}: its image_size={image_size} must lie between 1 and {MAX_SIDE}; train it again")
    options = {"dynamic_img_size": True, "img_size": image_size}
    model = create_network(trained, path, f"model.type of {path}", "dino.weights", **options)
    statistics = {key: tuple(config["model"][key]) for key in ("mean", "std") if config["model"].get(key)}
    return as_localizer(model, trained, path, image_size=image_size, **statistics)


def _from_toy(path: str, content: dict[str, Any], header: dict[str, Any]) -> Localizer:
    try:
        if not all(1 <= value <= MAX_SIDE for value in header["architecture"].values()):
            raise ValueError(f"its architecture has a number outside of 1 to {MAX_SIDE}")
        model = build_toy_vit(**header["architecture"])
        model.load_state_dict({key: value.float() for key, value in content["model"].items()})
        image_size = int(header["architecture"]["image_size"])
    except UNREADABLE as error:
        reason = first_line(error)
        raise UserError(f"{path}: not a file of toybirds/make_localizer.py ({reason}); run it again") from None
    return as_localizer(model, "toy_localizer", path, image_size=image_size)
