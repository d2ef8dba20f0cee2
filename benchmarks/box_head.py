"""A small network that reads an object's box off its map, learned from the true boxes of training images.

Unlike the methods of map_boxes.py it needs true boxes of some images: it learns where faint cells are a tail and where
they are a branch, and how far the boxes of a data set reach. So it is not a label-free method. It sees maps only, no
images; they are blurred and bent at random while it learns, as it would otherwise learn one source's contrast: on maps
of another network it then still beats a threshold chosen for them, without being fitted again.

The map is cut out in a square window around a first box, the network marks the cells of the object, and the rows and
columns that hold a marked cell are compared with those of the true box: the projection loss of BoxInst (Tian et al.,
CVPR 2021, section 3.1), with which boxes are enough to learn a mask from.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from localized_crops.map_boxes import MapBox, component_box

GRID = 64  # cells a side to which every map is stretched, so that maps of all sizes share one array
WINDOW = 48  # cells a side of the window that the network sees
VIEW_SCALES = (1.5, 1.9)  # sides of the window at inference, in units of the first box's longer side
TRAIN_SCALES = (1.2, 2.2)
TRAIN_SHIFT = 0.2  # the window's centre moves by up to this share of the first box's longer side


class BoxHead(nn.Module):
    """A U-Net from windows (B, 2, WINDOW, WINDOW), map and inside-the-image, to object logits (B, WINDOW, WINDOW)."""

    def __init__(self, widths: Sequence[int] = (16, 32, 48, 64)) -> None:
        super().__init__()
        inputs = (2, *widths[:-1])
        self.down = nn.ModuleList(_convs(before, after) for before, after in zip(inputs, widths, strict=True))
        pairs = reversed(list(pairwise(widths)))
        self.up = nn.ModuleList(_convs(fine + coarse, fine, count=1) for fine, coarse in pairs)
        self.drop = nn.Dropout2d(0.2)
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Return the logits of "this cell is object"."""
        features, skips = windows, []
        for level, convs in enumerate(self.down):
            features = convs(F.max_pool2d(features, 2) if level else features)
            skips.append(features)
        features = self.drop(skips.pop())
        for convs in self.up:
            skip = skips.pop()
            features = F.interpolate(features, size=skip.shape[-2:], mode="bilinear")
            features = convs(torch.cat([features, skip], dim=1))
        return self.out(features)[:, 0]


def _convs(inputs: int, outputs: int, count: int = 2) -> nn.Sequential:
    """Return ``count`` times convolution, batch norm, ReLU."""
    layers: list[nn.Module] = []
    for number in range(count):
        conv = nn.Conv2d(outputs if number else inputs, outputs, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def fit_box_head(
    maps: Sequence[np.ndarray],
    image_sizes: np.ndarray,
    true_boxes: np.ndarray,
    *,
    threshold: float,
    epochs: int = 60,
    batch_size: int = 32,
    lr: float = 4e-3,
    seed: int = 0,
) -> BoxHead:
    """Learn a head from training images.

    Args:
        maps: N arrays (feat_h, feat_w), finite, in [0, 1].
        image_sizes: (N, 2), width height in pixels.
        true_boxes: (N, 4), x y width height in pixels.
        threshold: of the component whose box places the window.
        epochs: passes over the images; 60 over 720 images take two minutes on one core.
        batch_size: windows per step.
        lr: the highest of the one-cycle schedule.
        seed: of the weights, the windows and the order.
    """
    rng = np.random.default_rng(seed)
    stacked, frames = stack_maps(maps), first_frames(maps, image_sizes, threshold)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = BoxHead().train()
        optimizer = torch.optim.AdamW(head.parameters(), lr, weight_decay=0.05)
        num_batches = max(1, len(frames) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * num_batches)
        for _ in range(epochs):
            for rows in np.array_split(rng.permutation(len(frames)), num_batches):
                windows = jitter_frames(frames[rows], rng)
                flip = rng.random(len(rows)) < 0.5
                logits = head(cut_windows(vary_maps(stacked[rows], rng), windows, image_sizes[rows], flip))
                loss = projection_loss(logits, *inside_box(windows, true_boxes[rows], flip))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return head.eval()


def head_box(head: BoxHead, attention_map: np.ndarray, image_size: tuple[int, int], threshold: float) -> MapBox:
    """Return the box that ``head`` reads off one map: the mean over two window sizes and their mirror images.

    Args:
        head: from `fit_box_head`, in eval mode.
        attention_map: (feat_h, feat_w) in [0, 1].
        image_size: (width, height) in pixels.
        threshold: of the component whose box places the window, as when fitting.
    """
    first = component_box(attention_map, image_size, threshold=threshold)
    if not first.found:
        return first
    frame = box_to_frame(np.array(first.xywh))
    windows = np.array([frame * (1, 1, scale) for scale in VIEW_SCALES for _ in (False, True)])
    flip = np.array([False, True] * len(VIEW_SCALES))
    size = np.asarray(image_size, dtype=np.float64)
    with torch.inference_mode():
        stacked = stack_maps([attention_map]).expand(len(windows), -1, -1, -1)
        logits = head(cut_windows(stacked, windows, np.tile(size, (len(windows), 1)), flip))
    logits = torch.where(torch.from_numpy(flip)[:, None, None], logits.flip(-1), logits).double().numpy()
    edges = np.mean([_window_edges(cells, window) for cells, window in zip(logits, windows, strict=True)], axis=0)
    near, far = np.clip(edges[:2], 0, size), np.clip(edges[2:], 0, size)
    if not (far > near).all():
        return first
    return MapBox(*near.tolist(), *(far - near).tolist())


def stack_maps(maps: Sequence[np.ndarray]) -> torch.Tensor:
    """Return (N, 2, GRID, GRID) float32: each map stretched to one size, beside ones that mark the image."""
    tensors = [torch.as_tensor(np.asarray(cells), dtype=torch.float32)[None, None] for cells in maps]
    stretched = torch.cat([F.interpolate(cells, size=(GRID, GRID), mode="bilinear") for cells in tensors])
    return torch.cat([stretched, torch.ones_like(stretched)], dim=1)


def first_frames(maps: Sequence[np.ndarray], image_sizes: np.ndarray, threshold: float) -> np.ndarray:
    """Return (N, 3): centre x, centre y and longer side, in pixels, of each map's component box."""
    boxes = [
        component_box(cells, tuple(size), threshold=threshold).xywh
        for cells, size in zip(maps, image_sizes.tolist(), strict=True)
    ]
    return box_to_frame(np.array(boxes))


def box_to_frame(boxes_xywh: np.ndarray) -> np.ndarray:
    """Turn boxes (..., 4) into (..., 3): centre x, centre y and longer side."""
    sides = boxes_xywh[..., 2:]
    return np.concatenate([boxes_xywh[..., :2] + sides / 2, sides.max(axis=-1, keepdims=True)], axis=-1)


def jitter_frames(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return windows (N, 3), centre x, centre y and side in pixels: frames moved and enlarged at random."""
    shift = rng.uniform(-TRAIN_SHIFT, TRAIN_SHIFT, (len(frames), 2)) * frames[:, 2:]
    side = frames[:, 2:] * np.exp(rng.uniform(*np.log(TRAIN_SCALES), (len(frames), 1)))
    return np.concatenate([frames[:, :2] + shift, side], axis=1)


def vary_maps(stacked: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Blur and bend the maps at random, so that the head reads shapes rather than one source's contrast.

    Args:
        stacked: (N, 2, GRID, GRID) of `stack_maps`.
        rng: draws an exponent per map, and how often the whole batch is blurred.
    """
    cells, inside = stacked[:, :1], stacked[:, 1:]
    for _ in range(rng.integers(3)):
        cells = F.avg_pool2d(cells, 5, stride=1, padding=2, count_include_pad=False)
    cells = cells / cells.amax(dim=(2, 3), keepdim=True).clamp(min=1e-6)
    exponents = torch.as_tensor(2 ** rng.uniform(-1, 1, (len(cells), 1, 1, 1)), dtype=torch.float32)
    return torch.cat([cells**exponents, inside], dim=1)


def cut_windows(stacked: torch.Tensor, windows: np.ndarray, image_sizes: np.ndarray, flip: np.ndarray) -> torch.Tensor:
    """Return (N, 2, WINDOW, WINDOW): the windows (N, 3) of the stacked maps, mirrored where ``flip`` (N,) says so."""
    across = _cell_positions(windows[:, 0], windows[:, 2], flip) / image_sizes[:, :1] * 2 - 1
    along = _cell_positions(windows[:, 1], windows[:, 2], np.zeros_like(flip)) / image_sizes[:, 1:] * 2 - 1
    grid = np.stack(np.broadcast_arrays(across[:, None, :], along[:, :, None]), axis=-1)
    grid = torch.from_numpy(np.ascontiguousarray(grid, dtype=np.float32))
    return F.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _cell_positions(centres: np.ndarray, sides: np.ndarray, flip: np.ndarray) -> np.ndarray:
    """Return (N, WINDOW), the pixel positions of the cells' middles along one axis."""
    steps = (np.arange(WINDOW) + 0.5) / WINDOW - 0.5
    return centres[:, None] + sides[:, None] * steps * np.where(flip, -1, 1)[:, None]


def inside_box(windows: np.ndarray, boxes_xywh: np.ndarray, flip: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which columns and which rows of each window lie in its box, two (N, WINDOW) of 0 and 1."""
    marks = []
    for axis, mirrored in ((0, flip), (1, np.zeros_like(flip))):
        positions = _cell_positions(windows[:, axis], windows[:, 2], mirrored)
        near = boxes_xywh[:, axis, None]
        marks.append((positions >= near) & (positions < near + boxes_xywh[:, axis + 2, None]))
    return torch.from_numpy(marks[0]).float(), torch.from_numpy(marks[1]).float()


def projection_loss(logits: torch.Tensor, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Compare the largest logit of each column and row with whether the column or row lies in the box."""
    loss = F.binary_cross_entropy_with_logits
    return loss(logits.amax(dim=1), columns) + loss(logits.amax(dim=2), rows)


def _window_edges(logits: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Return (x0, y0, x1, y1) in pixels: where the largest logit of the columns and rows crosses zero."""
    (x0, x1), (y0, y1) = (_crossings(logits.max(axis=axis)) for axis in (0, 1))
    cells = np.array([x0, y0, x1, y1])
    return np.tile(window[:2], 2) + (cells / WINDOW - 0.5) * window[2]


def _crossings(profile: np.ndarray) -> tuple[float, float]:
    """Return the first and last zero crossing of a profile, in cells, between cells by interpolation."""
    above = np.flatnonzero(profile > 0)
    if not len(above):
        return 0.0, float(len(profile))
    first, last = above[0], above[-1]
    start = first + 0.5 - (_fraction(profile[first], profile[first - 1]) if first > 0 else 0.5)
    end = last + 0.5 + (_fraction(profile[last], profile[last + 1]) if last + 1 < len(profile) else 0.5)
    return float(start), float(end)


def _fraction(inside: float, outside: float) -> float:
    """Return how far, in cells, zero lies from a positive value on the way to a neighbour that is not."""
    return inside / (inside - outside)
