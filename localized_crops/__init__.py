"""The library: random crops held to boxes or centred by attention, attention maps, boxes and their files.

Crops and boxes need NumPy, torch and torchvision; `cls_attention` needs timm, which is imported when it is asked for.
"""

from typing import Any

from localized_crops.box_file import BoxFile, load_boxes, save_boxes
from localized_crops.boxes import coverage, iou, maiou_curve, maiou_to_thr
from localized_crops.crops import sample_crops
from localized_crops.transforms import AttentionMap, DinoRandomResizedCrop, LocalizedRandomResizedCrop

__all__ = [
    "AttentionMap",
    "BoxFile",
    "DinoRandomResizedCrop",
    "LocalizedRandomResizedCrop",
    "cls_attention",
    "coverage",
    "iou",
    "load_boxes",
    "maiou_curve",
    "maiou_to_thr",
    "sample_crops",
    "save_boxes",
]


def __getattr__(name: str) -> Any:
    """Import `cls_attention` when it is first asked for: timm takes a second, and crops do without it."""
    if name == "cls_attention":
        from localized_crops.attention import cls_attention

        return cls_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
