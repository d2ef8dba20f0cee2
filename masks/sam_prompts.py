"""Masks that SAM draws where DINO's attention points: one encoder pass and one decoder call an image."""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from localized_crops.map_boxes import component_box, is_blank, min_max
from masks.mask_files import mask_record
from utils import autocast


class Prompt(NamedTuple):
    """A prompt for SAM, in pixels of the original image."""

    box_xyxy: np.ndarray | None  # (4,)
    points: np.ndarray  # (n, 2) x y
    labels: np.ndarray  # (n,) 1: of the object, 0: of the background


def prompt_from_map(
    attention_map: np.ndarray,
    image_size: tuple[int, int],
    *,
    box: bool,
    points: int,
    background: int,
    threshold: float | str,
    **component: Any,
) -> Prompt | None:
    """Turn a cleaned map into a prompt; None for a blank map, which points nowhere.

    Args:
        attention_map: (feat_h, feat_w), stretched over the whole image.
        image_size: (width, height) in pixels.
        box: ask with the box of the map's component.
        points: ask with the middles of so many cells, the strongest ones inside that box.
        background: and of so many that are background, the weakest ones outside it.
        threshold, component: how the component is found, see ``map_boxes.component_box``.
    """
    if is_blank(attention_map):
        return None
    cells = min_max(np.asarray(attention_map, dtype=np.float64))
    xywh = np.array(component_box(cells, image_size, threshold=threshold, **component).xywh)
    xyxy = np.concatenate([xywh[:2], xywh[:2] + xywh[2:]])
    rows, columns = np.divmod(np.arange(cells.size), cells.shape[1])
    middles = (np.stack([columns, rows], axis=1) + 0.5) * image_size / cells.shape[::-1]  # x y in pixels
    inside = ((middles >= xyxy[:2]) & (middles <= xyxy[2:])).all(1)
    order = np.argsort(-cells.ravel(), kind="stable")
    chosen = order[inside[order]][:points]
    rejected = order[::-1][~inside[order[::-1]]][:background]
    labels = np.concatenate([np.ones(len(chosen), int), np.zeros(len(rejected), int)])
    return Prompt(xyxy if box else None, middles[np.concatenate([chosen, rejected])], labels)


def agreement(masks: torch.Tensor, attention_map: np.ndarray) -> torch.Tensor:
    """Return how well masks (n, H, W) bool agree with a map (feat_h, feat_w), (n,) in [0, 1]: their soft IoU."""
    cells = torch.from_numpy(min_max(np.asarray(attention_map, dtype=np.float32)))[None, None]
    soft = F.interpolate(cells, masks.shape[1:], mode="bilinear", align_corners=False)[0]  # (1, H, W)
    hard = masks.float()
    return torch.minimum(soft, hard).sum((1, 2)) / torch.maximum(soft, hard).sum((1, 2)).clamp(min=1e-9)


class PromptedMasks:
    """One mask an image, chosen among SAM's three by predicted IoU plus agreement with the attention."""

    def __init__(self, sam: Sam, precision: str = "float32", **prompt: Any) -> None:
        """Keep the network and the arguments of `prompt_from_map`; ``precision`` is the encoder's on CUDA."""
        self.predictor, self.prompt, self.precision = SamPredictor(sam), prompt, precision

    @torch.no_grad()
    def generate(self, image: np.ndarray, attention_map: np.ndarray) -> list[dict[str, Any]]:
        """Return a list of one record for an image (H, W, 3) uint8 RGB, with its map (feat_h, feat_w).

        It is empty where the map points nowhere or the chosen mask is empty. Records are as those of `MaskGenerator`,
        except that ``stability_score`` is the agreement with the attention and that ``bbox`` x y width height holds
        all of the mask.
        """
        prompt = prompt_from_map(attention_map, image.shape[1::-1], **self.prompt)
        if prompt is None:
            return []
        with autocast(self.predictor.device, self.precision):
            self.predictor.set_image(image)
        self.predictor.features = self.predictor.features.float()  # the decoder takes little time: in float32
        points, labels = (prompt.points, prompt.labels) if len(prompt.points) else (None, None)
        masks, predicted, _ = self.predictor.predict(points, labels, prompt.box_xyxy)  # (3, H, W), (3,)
        agreed = agreement(torch.from_numpy(masks), attention_map).numpy()
        best = int((predicted + agreed).argmax())
        if not masks[best].any():
            return []
        scores = {"predicted_iou": float(predicted[best]), "stability_score": float(agreed[best])}
        return [mask_record(masks[best], **scores, point_coords=prompt.points[prompt.labels == 1].tolist())]
