"""A trained classifier for use without this program: weights for timm, ONNX, class names, preprocessing."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

import models
from inference.classifier import Classifier
from localized_crops.files import UserError, save_json, whole_file

NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of the largest logit: float32 on two libraries


def export_classifier(classifier: Classifier, folder: Path | str) -> str:
    """Write model.safetensors, config.json and model.onnx into ``folder``; return how they are used.

    Raises:
        UserError: if something lies there already, or the packages for ONNX are missing: then the rest is written.
    """
    folder = Path(folder)
    for name in ("model.safetensors", "config.json", "model.onnx"):
        if (folder / name).exists():
            raise UserError(f"export={folder}: holds {name} already; give another folder")
    description, weights = describe(classifier), folder / "model.safetensors"
    with whole_file(weights) as scratch:
        tensors = {key: value.contiguous().cpu() for key, value in classifier.model.state_dict().items()}
        safetensors.torch.save_file(tensors, scratch, metadata={"format": "pt"})
    save_json(folder / "config.json", description)
    options = {"num_classes": len(classifier.class_names), "checkpoint_path": str(weights)} | description["model_args"]
    arguments = ", ".join(f"{key}={value!r}" for key, value in options.items())
    call = f"timm.create_model({description['architecture']!r}, {arguments})"
    print(f"{folder}: model.safetensors, config.json; to load: {call}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"model.onnx was not written: pip install {' '.join(missing)}, then export to another folder")
    difference = export_onnx(classifier, folder / "model.onnx")
    return f"{folder / 'model.onnx'}: largest difference to torch {difference:.1e} of the largest logit"


def describe(classifier: Classifier) -> dict[str, Any]:
    """Return config.json, in the form of timm's models on the hub, with a description of the views added."""
    config, view = classifier.config, next(iter(classifier.views.values()))
    name, arguments = models.timm_name(config["model"]["type"]), {}
    if name == "toyresnet":
        name, arguments = "resnet18", {"channels": list(models.TOY_CHANNELS)}
    elif models.patch_of(classifier.model) is not None:
        arguments = {"img_size": config["image_size"]}
    return {
        "architecture": name,
        "num_classes": len(classifier.class_names),
        "label_names": classifier.class_names,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, view.size, view.size],
            "mean": list(classifier.mean),
            "std": list(classifier.std),
            "interpolation": view.interpolation,
            "crop_pct": view.crop_pct if view.kind == "center" else 1.0,
            "crop_mode": "squash" if view.kind == "whole" else "center",
        },
        "views": list(classifier.views),
        "answer": classifier.answer,
        "box_margin": config["eval"]["box_margin"],
        "weights": classifier.weights,
    }


def export_onnx(classifier: Classifier, path: Path) -> float:
    """Write the network, normalised images (B, 3, H, W) to logits (B, K), for any batch size; compare it with torch.

    Returns:
        The largest difference of a logit on random images in batches of two sizes, as a share of the largest logit.

    Raises:
        UserError: if that is above TOLERANCE; then no file is left.
    """
    model, size = classifier.model.cpu(), next(iter(classifier.views.values())).size
    images = torch.randn(5, 3, size, size, generator=torch.Generator().manual_seed(0))
    with whole_file(path) as scratch:
        torch.onnx.export(
            model,
            (images[:2],),
            str(scratch),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
        difference = max(onnx_difference(model, scratch, images[:count]) for count in (1, 5))
        if not difference <= TOLERANCE:
            raise UserError(f"{path}: differs from torch by {difference:.1e} of the largest logit; not written")
    return difference


def onnx_difference(model: torch.nn.Module, path: Path, images: torch.Tensor) -> float:
    """Return the largest difference between the logits of ONNX Runtime and torch, as a share of the largest."""
    import onnxruntime  # optional: NEEDED

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = model(images).numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())
