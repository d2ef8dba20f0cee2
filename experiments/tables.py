"""The tables of the README and docs/results.md: the trainings that make them, and the stages these need.

A row is a set of overrides of the table's preset. Published figures are quoted from the original work (ResNet-50 on
CUB-200-2011); they are not results of this code.
"""

from dataclasses import dataclass, field
from typing import Any

from jobs.settings import word_of

PLAIN = {"use_box": False}
# Plain crops: the controls of most tables.
SCALES = {
    f"RandomResizedCrop, scale {least:g}": PLAIN | {"crop.scale": [least, 1.0]} for least in (0.08, 0.2, 0.35, 0.5)
}
PLAIN_08, PLAIN_20, PLAIN_35, PLAIN_50 = SCALES
REFERENCE = {"crop.mode": "reference"}
CENTER, WHOLE = {"source": "center"}, {"source": "image"}


@dataclass(frozen=True)
class Step:
    """A stage that the trainings of a table need."""

    makes: str  # the file that is there when it is done
    script: str
    words: tuple[str, ...]  # of its command line


@dataclass(frozen=True)
class Table:
    """A table: a row per method, a block of rows per budget, every cell over several seeds."""

    title: str
    rows: dict[str, dict[str, Any]]  # name in the table -> overrides
    preset: str = "toybirds"
    controls: tuple[str, ...] = tuple(SCALES)  # the others are compared with the one of these that validates best
    budgets: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    common: dict[str, Any] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()  # done in this order
    published: dict[str, str] = field(default_factory=dict)  # row -> its top-1, as quoted
    folder: str | None = None  # under runs/, of trainings that several tables share; None: the table's name
    folders: dict[str, str] = field(default_factory=dict)  # row -> its run folders, without the seed; else by its name

    @property
    def oracles(self) -> tuple[str, ...]:
        """The views that see true boxes at test."""
        return ("box", "average") if self.common.get("eval_box") == "gt" else ()


def boxes_step(out: str, *words: str) -> Step:
    """Return the step that makes boxes and maps by attention."""
    return Step(out, "generate_dino_boxes.py", (*words, f"out={out}"))


def masks_step(folder: str, *words: str) -> Step:
    """Return the step that makes candidate masks."""
    return Step(f"{folder}/masks_info.json", "generate_mask.py", (*words, f"mask.folder={folder}"))


def mask_boxes_step(out: str, masks: str, classifier: str, *words: str) -> Step:
    """Return the step that chooses among the candidate masks in a folder by the classifier of a run folder."""
    words = (*words, f"masks={masks}", f"bbox.classifier={classifier}/best.pt", f"out={out}")
    return Step(out, "generate_bbox.py", words)


def training_step(folder: str, *words: str) -> Step:
    """Return the step that trains a network into a run folder."""
    return Step(f"{folder}/summary.json", "train.py", (*words, f"run_dir={folder}"))


def by_maps(maps: str, temperature: float) -> dict[str, Any]:
    """Return the overrides of crops that are centred by attention maps."""
    return PLAIN | {"use_dino_maps": True, "dino_maps": maps, "crop.temperature": temperature}


TABLES: dict[str, Table] = {}

# --- ToyBirds -----------------------------------------------------------------------------------------------------

EMA_10 = {"other.ema_decay": 0.99}  # averages over 100 of ToyBirds' 1,000 steps
TOY_BOXES, MASK_BOXES = "runs/dino_boxes_toybirds/boxes.json", "runs/mask_boxes_toybirds/boxes.json"
TOY_MASKS, TOY_CLASSIFIER = "runs/toybirds_masks_0", "runs/toybirds_classifier"
TOY_CONTROLS = SCALES | {"held to centred boxes": CENTER, "whole image": WHOLE, "held to true boxes": {}}
BY_LOCALIZER = {"eval.views": ["full"], "eval_box": TOY_BOXES, "log_interval": 10}  # a test view without test labels

TABLES["toybirds_crops"] = Table(
    title="Training crops on ToyBirds",
    rows=SCALES
    | {
        "reference, true boxes, thr 1": REFERENCE,
        "exact, true boxes, maIoU 0.9": {"maiou": 0.9},
        "exact, true boxes, thr 1": {},
        "exact, centred boxes, maIoU 0.9": CENTER | {"maiou": 0.9},
        "exact, centred boxes, thr 1": CENTER,
        "whole image": WHOLE,
        "RandomResizedCrop, scale 0.35, EMA over 10%": SCALES[PLAIN_35] | EMA_10,
        "exact, true boxes, thr 1, EMA over 10%": EMA_10,
    },
    common={"eval.views": ["full", "center", "full@80", "full@96"], "eval_box": "gt", "log_interval": 10},
)
TABLES["toybirds_crops_long"] = Table(
    title="Training crops on ToyBirds, 120 epochs",
    rows={
        PLAIN_08: SCALES[PLAIN_08],
        PLAIN_35: SCALES[PLAIN_35],
        "reference, true boxes, thr 1": REFERENCE,
        "exact, true boxes, thr 1": {},
        "exact, centred boxes, maIoU 0.9": CENTER | {"maiou": 0.9},
        "exact, centred boxes, thr 1": CENTER,
    },
    controls=(PLAIN_08, PLAIN_35),
    common={"num_epochs": 120, "eval.views": ["full", "center", "full@96"], "eval_box": "gt", "log_interval": 10},
)
TABLES["toybirds_boxes"] = Table(
    title="Boxes and maps of the built-in localizer on ToyBirds",
    rows=TOY_CONTROLS
    | {
        "held to the localizer's boxes": {"source": TOY_BOXES},
        "centred by the localizer's maps": by_maps(TOY_BOXES, 0.1),
    },
    common=BY_LOCALIZER,
    steps=(boxes_step(TOY_BOXES),),
)
TABLES["toybirds_masks"] = Table(
    title="Boxes of candidate masks on ToyBirds",
    rows=TOY_CONTROLS | {"held to the boxes of generate_bbox.py": {"source": MASK_BOXES}},
    common=BY_LOCALIZER,
    steps=(
        boxes_step(TOY_BOXES),
        masks_step(TOY_MASKS, "mask.store=none"),
        training_step(TOY_CLASSIFIER, "use_box=false", "num_epochs=120"),
        mask_boxes_step(MASK_BOXES, TOY_MASKS, TOY_CLASSIFIER, "bbox.score=ncm"),
    ),
    folder="toybirds_boxes",  # where its controls are trained already
)

# --- photographs --------------------------------------------------------------------------------------------------

PHOTOS = {
    "dataset.name": "cub",
    "dataset.val_fraction": 0.2,
    "cache": "disk",
    "image_size": 96,
    "num_epochs": 60,
    "eval.views": ["full", "center", "full@128"],
    "eval_box": "gt",
    "log_interval": 10,
}
TABLES["small_photos"] = Table(
    title="Training crops on photographs, a small network from scratch",
    rows=SCALES
    | {
        "reference, true boxes, maIoU 0.8": REFERENCE | {"maiou": 0.8},
        "reference, true boxes, maIoU 0.9": REFERENCE | {"maiou": 0.9},
        "reference, true boxes, thr 1": REFERENCE,
        "exact, true boxes, maIoU 0.8": {"maiou": 0.8},
        "exact, true boxes, maIoU 0.9": {"maiou": 0.9},
        "exact, true boxes, thr 1": {},
        "exact, centred boxes, thr 1": CENTER,
        "whole image": WHOLE,
    },
    common=PHOTOS,
)
TABLES["photos_learning_rate"] = Table(
    title="Photographs: the learning rate, chosen on the validation images",
    rows={PLAIN_20: SCALES[PLAIN_20], "exact, true boxes, maIoU 0.9": {"maiou": 0.9}},
    controls=(PLAIN_20,),  # the best one of small_photos, by validation
    budgets={f"learning rate {rate:g}": {"opt.lr": rate} for rate in (0.002, 0.004, 0.008)},
    common=PHOTOS,
)
SALIENCY = "runs/saliency_boxes/boxes.json"  # benchmarks/saliency_boxes.py writes it
TABLES["photos_pseudo_boxes"] = Table(
    title="Photographs: boxes and maps of a saliency network",
    rows=SCALES
    | {
        "exact, true boxes, maIoU 0.9": {"maiou": 0.9},
        "exact, saliency boxes, maIoU 0.9": {"source": SALIENCY, "maiou": 0.9},
        "reference, saliency boxes, maIoU 0.9": REFERENCE | {"source": SALIENCY, "maiou": 0.9},
        "exact, centred boxes, maIoU 0.9": CENTER | {"maiou": 0.9},
        "reference, centred boxes, maIoU 0.9": REFERENCE | CENTER | {"maiou": 0.9},
        "centred by saliency maps, temperature 0.1": by_maps(SALIENCY, 0.1),
        "centred by saliency maps, temperature 0.5": by_maps(SALIENCY, 0.5),
    },
    common=PHOTOS | {"eval_box": SALIENCY},
)

# Real attention and pretrained networks; give dataset.root, dino.weights, dino.object_weights and model.weights.
OBJECT_BOXES, ATTENTION_BOXES = "runs/photo_boxes/object.json", "runs/photo_attention/boxes.json"
PHOTO_BOXES = ("preset=photos_dino", "dataset.name=cub")
OBJECT_STEP = boxes_step(OBJECT_BOXES, *PHOTO_BOXES)
ATTENTION_STEP = boxes_step(ATTENTION_BOXES, *PHOTO_BOXES, "dino.method=component", "dino.threshold=0.2")
PRETRAINED = {"dataset.name": "cub", "model.type": "tf_efficientnet_lite0"}
TRAINED = PRETRAINED | {
    "dataset.val_fraction": 0.3333,
    "log_interval": 6,  # the last epoch counts
    "cache": "disk",
    "eval_box": OBJECT_BOXES,
    "deterministic": True,
    "num_threads": 1,
}
# What most tables of a pretrained network share.
FINETUNED = {"preset": "finetune", "controls": (PLAIN_35,), "common": TRAINED, "steps": (OBJECT_STEP,)}
BY_OBJECT_BOXES = {"source": OBJECT_BOXES, "maiou": 0.9}
PRETRAINED_ROWS = {
    PLAIN_35: SCALES[PLAIN_35],
    "exact, object head's boxes, maIoU 0.9": BY_OBJECT_BOXES,
    "exact, centred boxes, maIoU 0.9": CENTER | {"maiou": 0.9},
}
TABLES["photos_pretrained"] = Table(
    title="Photographs: training crops, a pretrained network",
    rows=PRETRAINED_ROWS,
    **FINETUNED,
)
TABLES["photos_pretrained_crops"] = Table(
    title="Photographs: more training crops, a pretrained network",
    rows={PLAIN_20: SCALES[PLAIN_20], PLAIN_50: SCALES[PLAIN_50]}
    | PRETRAINED_ROWS
    | {
        "reference, object head's boxes, maIoU 0.9": REFERENCE | BY_OBJECT_BOXES,
        "exact, object head's boxes, thr 1": {"source": OBJECT_BOXES, "maiou": None},
        "exact, true boxes, maIoU 0.9": {"source": "gt", "maiou": 0.9},
        "centred by attention, temperature 0.1": by_maps(ATTENTION_BOXES, 0.1) | {"maiou": None},
    },
    preset="finetune",
    controls=(PLAIN_20, PLAIN_35, PLAIN_50),
    common=TRAINED,
    steps=(OBJECT_STEP, ATTENTION_STEP),
    folder="photos_pretrained",  # where some are trained already
)
WHOLE_BOX_ROWS = {
    PLAIN_35: SCALES[PLAIN_35],
    "exact, object head's boxes, thr 1": {"source": OBJECT_BOXES, "maiou": None},
    "exact, centred boxes, thr 1": CENTER | {"maiou": None},
}
TABLES["photos_pretrained_tight"] = Table(
    title="Photographs: crops held to the whole box, a pretrained network",
    rows=WHOLE_BOX_ROWS,
    folder="photos_pretrained",  # where some are trained already
    **FINETUNED,
)
TABLES["photos_few"] = Table(
    title="Photographs: few training images a class, a pretrained network",
    rows=WHOLE_BOX_ROWS,
    budgets={
        "5 images a class": {"dataset.val_fraction": 0.8333, "opt.lr": 1e-5},  # chosen on the validation images
        "10 images a class": {"dataset.val_fraction": 0.6667, "opt.lr": 1e-5},
    },
    **FINETUNED,
)
FIRST_ON_PHOTOS = "runs/photos_first_training"
FIRST_WORDS = [word_of(key, value) for key, value in (TRAINED | SCALES[PLAIN_35]).items()]
TABLES["photos_second_training"] = Table(
    title="Photographs: the published protocol, second trainings from the weights of a first one",
    rows=PRETRAINED_ROWS,
    preset="finetune",
    controls=(PLAIN_35,),
    common=TRAINED
    | {
        "model.resumed_model": f"{FIRST_ON_PHOTOS}/best.pt",
        "opt.lr": 2e-4,  # as published a fifth of the first training's, ending at a hundredth of that
        "opt.target_lr": 1e-5,
        "opt.scheduler": "step",
        "opt.step_size": 1,
        "opt.warmup_epochs": 0,
    },
    steps=(OBJECT_STEP, training_step(FIRST_ON_PHOTOS, "preset=finetune", *FIRST_WORDS)),
)

# --- the published rows, on all of CUB-200-2011 -------------------------------------------------------------------

FIRST = "runs/cub_first_training"
FIRST_STEP = training_step(FIRST, "preset=cub_first_training")
CUB_VIEWS = {"eval.views": ["full", "center", "full@256", "full@288", "full@320"], "eval_box": "gt"}
CUB_CONTROLS = SCALES | {"fixed centred box, exact": CENTER | {"crop.mode": "exact"}, "whole image": WHOLE}
# Tables of second trainings: rows beside controls that all of them share on disk.
SECOND = {"preset": "cub_second_training", "common": CUB_VIEWS, "folder": "cub_second"}
PUBLISHED = {PLAIN_08: "85.01 ± 0.076 (9 runs)"}
DINO_BOXES, CLS, CLS_BOXES = "runs/dino_boxes_cub/boxes.json", "runs/cub_cls", "runs/cub_cls/boxes.json"
DINO_STEP = boxes_step(DINO_BOXES, "preset=cub_dino")
SAM_MASKS, SAM_BOXES = "runs/cub_masks_0", "runs/mask_boxes_cub/boxes.json"

TABLES["cub_first_training"] = Table(
    title="First training on CUB",
    rows={"70/30 split": {}, "official split": {"dataset.split": "official"}},
    preset="cub_first_training",
    controls=("70/30 split",),
    common=CUB_VIEWS,
    published={"70/30 split": "84.97", "official split": "84.32 (DINOv2's split)"},
    folder="cub_first",  # beside the run that the other tables start from
)
TABLES["cub_thr"] = Table(
    title="Accuracy against the maIoU of the crops, true boxes",
    rows=CUB_CONTROLS
    | {f"reference, true boxes, thr {thr:g}": {"THR": thr} for thr in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)}
    | {f"exact, true boxes, thr {thr:g}": {"THR": thr, "crop.mode": "exact"} for thr in (0.5, 1.0)},
    steps=(FIRST_STEP,),
    published=PUBLISHED | {"reference, true boxes, thr 1": "up to +0.6 over RandomResizedCrop"},
    **SECOND,
)
TABLES["cub_sam_boxes"] = Table(
    title="Boxes of SAM's masks",
    rows=CUB_CONTROLS | {"reference, true boxes, thr 1": {}, "reference, SAM boxes, thr 1": {"source": SAM_BOXES}},
    steps=(
        FIRST_STEP,
        masks_step(SAM_MASKS, "preset=cub_sam_masks_0"),
        mask_boxes_step(SAM_BOXES, SAM_MASKS, FIRST, "preset=cub_sam_masks_0"),
    ),
    published=PUBLISHED,
    **SECOND,
)
TABLES["cub_dino_boxes"] = Table(
    title="Boxes of DINOv2's attention, as it is and with a fine-tuned CLS token",
    rows=CUB_CONTROLS
    | {
        "reference, true boxes, thr 1": {},
        "reference, DINO boxes, thr 1": {"source": DINO_BOXES},
        "reference, fine-tuned DINO boxes, thr 1": {"source": CLS_BOXES},
    },
    steps=(
        FIRST_STEP,
        DINO_STEP,
        training_step(CLS, "preset=cub_cls"),
        boxes_step(CLS_BOXES, "preset=cub_dino", f"dino.weights={CLS}/best.pt"),
    ),
    published=PUBLISHED | {"reference, DINO boxes, thr 1": "85.6", "reference, fine-tuned DINO boxes, thr 1": "85.8"},
    **SECOND,
)
TABLES["cub_density_maps"] = Table(
    title="Crops centred by DINOv2's attention",
    rows=CUB_CONTROLS | {"density maps": PLAIN | {"use_dino_maps": True, "dino_maps": DINO_BOXES}},
    steps=(FIRST_STEP, DINO_STEP),
    published=PUBLISHED,
    **SECOND,
)
