"""A trained classifier from one checkpoint file, ready to be used.

from inference.classifier import load_classifier

classifier = load_classifier("runs/photos_0/best.pt")
predictions = classifier.predict(["a.jpg", "b.jpg"])  # each: path, classes, probabilities, box, error
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import models
from inference.photos import Photos, reason
from jobs.loader import build_loader
from jobs.machine import choose_device
from jobs.settings import DEFAULTS, check_value, get_key, leaves, nested
from localized_crops.files import UserError, user_errors
from localized_crops.map_boxes import MapBox
from localizer.attention_maps import map_batches, map_to_box, plan_batches
from localizer.networks import Localizer, configured_localizer, state_hash
from localizer.object_head import ObjectHead, build_features, cell_features, find_objects
from readers.data_set import UprightPath
from readers.images import image_sizes
from training.evaluation import AVERAGE, predict
from training.train_data import test_views
from transforms import View, normalize
from utils import autocast, load_tensors

# Sections of the config that evaluation and prediction take from the training, unless the command line says otherwise.
OF_TRAINING = ("dataset", "model", "image_size", "patch_size", "eval", "eval_box", "boxes", "dino")


class Prediction(NamedTuple):
    """The answer of a classifier for one image file."""

    path: Path
    classes: list[str]  # the most probable first; empty if the image could not be read
    probabilities: list[float]
    box_xywh: tuple[float, float, float, float] | None  # that the localizer found, in upright pixels
    error: str | None  # why the image could not be read


@dataclass(frozen=True)
class Classifier:
    """A trained network, the names of its classes, and the views in which it is shown an image."""

    path: str
    model: nn.Module  # in eval mode, on ``device``
    weights: str  # which of the checkpoint's: model | ema
    class_names: list[str]
    views: dict[str, View]
    config: dict[str, Any]
    trained: dict[str, Any]  # the config of its training
    device: torch.device
    mean: tuple[float, ...]  # of the network's input
    std: tuple[float, ...]
    localizer: Localizer | None = None  # finds the box for the views that look at one
    object_head: ObjectHead | None = None  # of dino.method=object_head, on the localizer's cells

    @property
    def answer(self) -> str:
        """The view whose probabilities are the answer: the average of several."""
        return AVERAGE if len(self.views) > 1 else next(iter(self.views))

    def predict(self, images: Sequence[Path | str], **options: Any) -> list[Prediction]:
        """Return the prediction for each image file, in order; options as of `stream`."""
        return list(self.stream(images, **options))

    def stream(
        self,
        images: Sequence[Path | str],
        *,
        top_k: int = 5,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: bool = False,
    ) -> Iterator[Prediction]:
        """Yield the prediction for each image file, in order, while the next ones are decoded.

        If a view needs the object's box, the localizer first finds the boxes of all images.

        Args:
            images: the files; their EXIF orientation is applied.
            top_k: classes for each image.
            batch_size: images that go through the network together.
            num_workers: processes that decode ahead; 0: this one decodes.
            progress: show bars.
        """
        paths, boxes, unreadable = [UprightPath(path) for path in images], None, {}
        if self.localizer is not None:
            boxes, unreadable = self.find_boxes(paths, num_workers=num_workers, progress=progress)
        photos, pin = Photos(paths, list(self.views.values()), boxes, unreadable), self.device.type == "cuda"
        loader = build_loader(photos, batch_size=batch_size, num_workers=num_workers, pin_memory=pin)
        row = 0
        with tqdm(total=len(paths), desc="classes", unit=" images", disable=None if progress else True) as bar:
            for views, errors in loader:
                best = self.log_probs(views)[self.answer].exp().topk(min(top_k, len(self.class_names)))
                answers = zip(best.values.tolist(), best.indices.tolist(), errors, strict=True)
                for probabilities, classes, error in answers:
                    box = None if boxes is None else tuple(boxes[row].tolist())
                    names = [self.class_names[k] for k in classes]
                    failed = Prediction(paths[row], [], [], None, error)
                    yield failed if error else Prediction(paths[row], names, probabilities, box, None)
                    row += 1
                bar.update(len(errors))

    def find_boxes(
        self, paths: Sequence[Path], *, num_workers: int = 0, progress: bool = False
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Return the box that the localizer finds in each image, and errors by row; arguments as of `predict`.

        Returns:
            (N, 4) x y width height in upright pixels: the whole image where the map is blank, zeros where the image
            cannot be read; and row -> why it cannot.
        """
        sizes, _, errors = image_sizes(paths, keep_going=True)
        rows = np.array([row for row in range(len(paths)) if row not in errors], dtype=np.int64)
        boxes, files = np.zeros((len(paths), 4)), [paths[row] for row in rows]
        self.localizer.model.to(self.device)
        if self.object_head is None:
            results = self._boxes_of_maps(files, sizes[rows], num_workers)
        else:
            network = self.localizer, self.object_head
            results = find_objects(*network, files, sizes[rows], self.config["dino"], num_workers)
        bar = tqdm(results, total=len(rows), desc="boxes", unit=" images", disable=None if progress else True)
        for number, box, error in bar:
            row = int(rows[number])
            boxes[row] = box.xywh
            if error is not None:
                errors[row] = reason(error, paths[row])
        return boxes, errors

    def _boxes_of_maps(
        self, files: Sequence[Path], sizes: np.ndarray, num_workers: int
    ) -> Iterator[tuple[int, MapBox, str | None]]:
        """Yield row, box and error of each image, as `find_objects` does, from a Vision Transformer's attention."""
        settings, side = self.config["dino"], self.config["dino"]["image_size"] or self.localizer.image_size
        batches = plan_batches(sizes, side, self.localizer.patch, settings["batch_size"])
        options = {"amp": self.config["amp"], "num_workers": num_workers}
        for part in map_batches(self.localizer, batches, files, settings, **options):
            for row, attention_map, error in zip(part.rows, part.maps, part.errors, strict=True):
                yield row, map_to_box(attention_map, tuple(sizes[row].tolist()), settings), error

    @cached_property
    def weights_sha256(self) -> str:
        """A hash of the network's weights."""
        return state_hash(self.model)

    def features_and_logits(self, images: torch.Tensor, amp: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the inputs (B, D) of the classifier layer and the logits (B, K), float32, on ``device``.

        Args:
            images: (B, 3, H, W) uint8.
            amp: precision on CUDA: none | bf16 | fp16.
        """
        pixels = normalize(images.to(self.device, non_blocking=True), self.mean, self.std)
        with torch.inference_mode(), autocast(self.device, amp):
            features, logits = models.features_of(self.model, pixels)
        return features.float(), logits.float()

    def log_probs(self, views: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the log-probabilities (B, K) by view, on the CPU, of images (B, 3, size, size) uint8 in each view."""
        return self.labelled_log_probs([(views, torch.zeros(len(views[0]), dtype=torch.int64))])[0]

    def labelled_log_probs(self, batches: Iterable[tuple]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return the log-probabilities (N, K) by view, and the labels (N,), of batches of (views, labels).

        Raises:
            UserError: if the network answers with NaN.
        """
        as_trained = partial(normalize, mean=self.mean, std=self.std)
        amp, names = self.config["amp"], list(self.views)
        answers, labels = predict({"model": self.model}, batches, names, self.device, amp, as_trained)
        log_probs = answers["model"]
        for view, values in log_probs.items():
            if values.isnan().any():
                raise UserError(f"{self.path}: its answers in view {view} are no numbers; try amp=none")
        return log_probs, labels


def load_classifier(
    path: Path | str, *, config: dict[str, Any] | None = None, device: str | None = None, localize: bool = True
) -> Classifier:
    """Build the classifier of a checkpoint of train.py.

    Args:
        path: best.pt or last.pt of a run.
        config: the settings to use; None: those of its training.
        device: cpu | cuda | ...; None: CUDA where there is one.
        localize: also load the localizer of the section ``dino`` if a view needs the object's box.

    Raises:
        UserError: if the file is not such a checkpoint, or names no classes.
    """
    content = load_checkpoint(path)
    config, trained, class_names = config or content["config"], content["config"], content["class_names"]
    with user_errors((LookupError, TypeError, AttributeError, UserError), f"{path}: its config: "):
        for key in ("model.type", "model.n_classes", "image_size", "patch_size"):
            check_value(key, get_key(trained, key))
    with user_errors((LookupError, TypeError, AttributeError), f"{path}: its config is of another version: "):
        shape = {key: trained[key] for key in ("image_size", "patch_size")}
        model = models.build_model(trained["model"]["type"], len(class_names), **shape)
        weights = models.load_trained(model, path, trained_classes=trained["model"]["n_classes"])
        views = test_views(config)
        mean, std = (tuple(map(float, trained["model"][key])) for key in ("mean", "std"))
    needs_box = localize and any(view.kind == "box" for view in views.values())
    localizer, object_head = load_localizer(config, content, path) if needs_box else (None, None)
    device = choose_device(device)
    return Classifier(
        path=str(path),
        model=model.eval().to(device, memory_format=torch.channels_last),
        weights=weights,
        class_names=class_names,
        views=views,
        config=config,
        trained=trained,
        device=device,
        mean=mean,
        std=std,
        localizer=localizer,
        object_head=object_head,
    )


def load_localizer(
    config: Mapping[str, Any], content: Mapping[str, Any], path: Path | str
) -> tuple[Localizer, ObjectHead | None]:
    """Return the network that finds the object's box and, for dino.method=object_head, its classifier of cells.

    Raises:
        UserError: if the checkpoint holds no classifier of cells, or the network cannot be built.
    """
    settings = config["dino"]
    if settings["method"] != "object_head":
        return configured_localizer(config), None
    saved = (content.get("localizer") or {}).get("object_head")
    if saved is None:
        raise UserError(
            f"{path}: holds no classifier for dino.method=object_head, because eval_box of its training named no boxes "
            "of that method; give dino.method=component, or eval_box=none to leave the box out"
        )
    network = build_features(settings["object_model"], settings["object_weights"])
    with user_errors((LookupError, TypeError, ValueError), f"{path}: its classifier of cells is damaged: "):
        head = ObjectHead.of_plain(saved)
    features = cell_features(network, torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape[-1]
    if head.weight.shape != (features,):
        raise UserError(
            f"dino.object_model={settings['object_model']}: gives {features} features a cell, the classifier of cells "
            f"in {path} takes {len(head.weight)}; leave it as it was"
        )
    return network, head


def load_checkpoint(path: Path | str) -> dict[str, Any]:
    """Return what a checkpoint of train.py holds.

    Raises:
        UserError: if it is something else, or of a version that wrote no class names.
    """
    content = load_tensors(path)
    if not isinstance(content, dict) or not isinstance(content.get("config"), dict):
        raise UserError(f"{path}: no checkpoint of train.py (it holds no config); give best.pt of a run")
    if not content.get("class_names"):
        raise UserError(f"{path}: names no classes; it is of an older version: train it again")
    return content


def training_defaults(path: Path | str) -> dict[str, Any]:
    """Return the default config with the sections OF_TRAINING as in the checkpoint's training.

    The section ``dino`` is that of the boxes for its test views, if the checkpoint holds it. Keys that are newer than
    the checkpoint keep their defaults.
    """
    content = load_checkpoint(path)
    boxes = {"dino": content["localizer"]["dino"]} if isinstance(content.get("localizer"), dict) else {}
    saved = leaves(content["config"] | boxes).items()
    known = {key: value for key, value in saved if key in DEFAULTS and key.split(".")[0] in OF_TRAINING}
    return nested(DEFAULTS | known)
