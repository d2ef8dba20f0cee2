"""Masks that SAM draws where DINO's attention points: one encoder pass and one decoder call an image."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide

from localized_crops.map_boxes import component_box, is_blank, min_max
from masks.mask_files import tight_box
from masks.sam_models import sam_device
from utils import autocast


class Prompt(NamedTuple):
    """What SAM is asked, in pixels of the original image."""

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
    middles = cell_middles(cells.shape, image_size)
    inside = ((middles >= xyxy[:2]) & (middles <= xyxy[2:])).all(1)
    order = np.argsort(-cells.ravel(), kind="stable")
    chosen = order[inside[order]][:points]
    rejected = order[::-1][~inside[order[::-1]]][:background]
    labels = np.concatenate([np.ones(len(chosen), int), np.zeros(len(rejected), int)])
    return Prompt(xyxy if box else None, middles[np.concatenate([chosen, rejected])], labels)


def cell_middles(feat: tuple[int, int], image_size: tuple[int, int]) -> np.ndarray:
    """Return the middles, (feat_h * feat_w, 2) x y in pixels, of the cells of a grid stretched over an image."""
    rows, columns = np.divmod(np.arange(feat[0] * feat[1]), feat[1])
    return np.stack([(columns + 0.5) * image_size[0] / feat[1], (rows + 0.5) * image_size[1] / feat[0]], axis=1)


def agreement(masks: torch.Tensor, attention_map: np.ndarray) -> torch.Tensor:
    """Return how well masks (n, H, W) bool agree with a map (feat_h, feat_w), (n,) in [0, 1]: their soft IoU."""
    cells = torch.from_numpy(min_max(np.asarray(attention_map, dtype=np.float32)))[None, None]
    soft = F.interpolate(cells, masks.shape[1:], mode="bilinear", align_corners=False)[0]  # (1, H, W)
    hard = masks.float()
    return torch.minimum(soft, hard).sum((1, 2)) / torch.maximum(soft, hard).sum((1, 2)).clamp(min=1e-9)


class PromptedMasks:
    """One mask an image, chosen among SAM's three by predicted IoU plus agreement with the attention."""

    def __init__(self, sam: Sam, precision: str = "float32", **prompt: Any) -> None:
        """Keep the network and the arguments of `prompt_from_map`; ``precision`` is of CUDA."""
        self.sam, self.prompt, self.precision = sam, prompt, precision
        self.transform = ResizeLongestSide(sam.image_encoder.img_size)

    def generate(self, images: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> list[list[dict[str, Any]]]:
        """Return for each (H, W, 3) uint8 image a list of one record, empty where the map points nowhere.

        Args:
            images: RGB.
            maps: (feat_h, feat_w) of each image.

        Returns:
            records as those of `MaskGenerator`, except that ``stability_score`` is the agreement with the attention and
            that ``bbox`` x y width height holds all of the mask. An image whose chosen mask is empty has no record.
        """
        sizes = [image.shape[1::-1] for image in images]
        prompts = [prompt_from_map(*pair, **self.prompt) for pair in zip(maps, sizes, strict=True)]
        asked = [number for number, prompt in enumerate(prompts) if prompt is not None]
        records: list[list[dict[str, Any]]] = [[] for _ in images]
        if asked:
            with torch.no_grad(), autocast(sam_device(self.sam), self.precision):
                answers = self.sam([self._question(images[n], prompts[n]) for n in asked], multimask_output=True)
            for number, answer in zip(asked, answers, strict=True):
                records[number] = self._record(answer, maps[number], prompts[number])
        return records

    def _question(self, image: np.ndarray, prompt: Prompt) -> dict[str, Any]:
        size, device = image.shape[:2], sam_device(self.sam)
        pixels = torch.from_numpy(self.transform.apply_image(image)).permute(2, 0, 1).to(device)
        question = {"image": pixels, "original_size": size}
        if len(prompt.points):
            points = self.transform.apply_coords(prompt.points, size)
            question["point_coords"] = torch.as_tensor(points, dtype=torch.float32, device=device)[None]
            question["point_labels"] = torch.as_tensor(prompt.labels, device=device)[None]
        if prompt.box_xyxy is not None:
            box = self.transform.apply_boxes(prompt.box_xyxy[None], size)
            question["boxes"] = torch.as_tensor(box, dtype=torch.float32, device=device)
        return question

    def _record(self, answer: dict[str, torch.Tensor], attention_map: np.ndarray, prompt: Prompt) -> list[dict]:
        masks, predicted = answer["masks"][0].cpu(), answer["iou_predictions"][0].float().cpu()  # (3, H, W), (3,)
        agreed = agreement(masks, attention_map)
        best = int((predicted + agreed).argmax())
        mask = masks[best].numpy()
        if not mask.any():
            return []
        return [
            {
                "segmentation": mask,
                "area": int(mask.sum()),
                "bbox": list(tight_box(mask)),
                "predicted_iou": float(predicted[best]),
                "point_coords": prompt.points[prompt.labels == 1].tolist(),
                "stability_score": float(agreed[best]),
                "crop_box": [0, 0, mask.shape[1], mask.shape[0]],
            }
        ]
