"""Crops centred by attention, for users: what the library has of them, under the names that they are known by."""

from localized_crops.attention import cls_attention as cls_attention
from localized_crops.transforms import AttentionMap as AttentionMap
from localized_crops.transforms import DinoRandomResizedCrop as DinoRandomResizedCrop
