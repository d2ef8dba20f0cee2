"""The tables of the README and docs/results.md: the trainings that make them, and the stages these need.

A row is a set of overrides of the table's preset. Published figures are quoted from the original work (ResNet-50 on
CUB-200-2011); they are not results of this code.
"""

from dataclasses import dataclass, field
from typing import Any

from jobs.settings import word_of


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
    preset: str
    rows: dict[str, dict[str, Any]]  # name in the table -> overrides
    controls: tuple[str, ...]  # the others are compared with the one of these rows that validates best
    budgets: dict[str, dict[str, Any]] = field(default_factory=lambda: {"": {}})
    common: dict[str, Any] = field(default_factory=dict)
    oracles: tuple[str, ...] = ()  # views that see true boxes at test
    steps: tuple[Step, ...] = ()  # done in this order
    published: dict[str, str] = field(default_factory=dict)  # row -> its top-1, as quoted
    folder: str | None = None  # under runs/, of trainings that several tables share; None: the table's name
    folders: dict[str, str] = field(default_factory=dict)  # row -> its run folders, without the seed; else by its name
    probe: dict[str, str] = field(default_factory=dict)  # views of a frozen network: row -> source of the boxes


PLAIN = {"use_box": False}
# Plain crops: the controls of every table.
SCALES = {
    f"RandomResizedCrop, scale {least:g}": PLAIN | {"crop.scale": [least, 1.0]} for least in (0.08, 0.2, 0.35, 0.5)
}
REFERENCE = {"crop.mode": "reference"}
CENTER, WHOLE = {"source": "center"}, {"source": "image"}
EMA_10 = {"other.ema_decay": 0.99}  # averages over 100 of ToyBirds' 1,000 steps

# --- ToyBirds -----------------------------------------------------------------------------------------------------

TOY_BOXES = "runs/dino_boxes_toybirds/boxes.json"
MASK_BOXES = "runs/mask_boxes_toybirds/boxes.json"
TOY_MASKS = "runs/toybirds_masks_0"
TOY_CLASSIFIER = "runs/toybirds_classifier"
TOY_LOCALIZER = Step(TOY_BOXES, "generate_dino_boxes.py", (f"out={TOY_BOXES}",))
TOY_CONTROLS = {
    **SCALES,
    "held to centred boxes": CENTER,
    "whole image": WHOLE,
    "held to true boxes": {},
}
BY_LOCALIZER = {"eval.views": ["full"], "eval_box": TOY_BOXES, "log_interval": 10}  # a test view without test labels

TABLES = {
    "toybirds_crops": Table(
        title="Training crops on ToyBirds",
        preset="toybirds",
        rows={
            **SCALES,
            "reference, true boxes, thr 1": REFERENCE,
            "exact, true boxes, maIoU 0.9": {"maiou": 0.9},
            "exact, true boxes, thr 1": {},
            "exact, centred boxes, maIoU 0.9": CENTER | {"maiou": 0.9},
            "exact, centred boxes, thr 1": CENTER,
            "whole image": WHOLE,
            "RandomResizedCrop, scale 0.35, EMA over 10%": SCALES["RandomResizedCrop, scale 0.35"] | EMA_10,
            "exact, true boxes, thr 1, EMA over 10%": EMA_10,
        },
        controls=tuple(SCALES),
        common={"eval.views": ["full", "center", "full@80", "full@96"], "eval_box": "gt", "log_interval": 10},
        oracles=("box", "average"),
    ),
    "toybirds_crops_long": Table(
        title="Training crops on ToyBirds, 120 epochs",
        preset="toybirds",
        rows={
            "RandomResizedCrop, scale 0.08": SCALES["RandomResizedCrop, scale 0.08"],
            "RandomResizedCrop, scale 0.35": SCALES["RandomResizedCrop, scale 0.35"],
            "reference, true boxes, thr 1": REFERENCE,
            "exact, true boxes, thr 1": {},
            "exact, centred boxes, maIoU 0.9": CENTER | {"maiou": 0.9},
            "exact, centred boxes, thr 1": CENTER,
        },
        controls=("RandomResizedCrop, scale 0.08", "RandomResizedCrop, scale 0.35"),
        common={
            "num_epochs": 120,
            "eval.views": ["full", "center", "full@96"],
            "eval_box": "gt",
            "log_interval": 10,
        },
        oracles=("box", "average"),
    ),
    "toybirds_boxes": Table(
        title="Boxes and maps of the built-in localizer on ToyBirds",
        preset="toybirds",
        rows=TOY_CONTROLS
        | {
            "held to the localizer's boxes": {"source": TOY_BOXES},
            "centred by the localizer's maps": PLAIN
            | {"use_dino_maps": True, "dino_maps": TOY_BOXES, "crop.temperature": 0.1},
        },
        controls=tuple(SCALES),
        common=BY_LOCALIZER,
        steps=(TOY_LOCALIZER,),
    ),
    "toybirds_masks": Table(
        title="Boxes of candidate masks on ToyBirds",
        preset="toybirds",
        rows=TOY_CONTROLS | {"held to the boxes of generate_bbox.py": {"source": MASK_BOXES}},
        controls=tuple(SCALES),
        common=BY_LOCALIZER,
        steps=(
            TOY_LOCALIZER,
            Step(f"{TOY_MASKS}/masks_info.json", "generate_mask.py", ("mask.store=none", f"mask.folder={TOY_MASKS}")),
            Step(
                f"{TOY_CLASSIFIER}/summary.json",
                "train.py",
                ("use_box=false", "num_epochs=120", f"run_dir={TOY_CLASSIFIER}"),
            ),
            Step(
                MASK_BOXES,
                "generate_bbox.py",
                (
                    f"masks={TOY_MASKS}",
                    f"bbox.classifier={TOY_CLASSIFIER}/best.pt",
                    "bbox.score=ncm",
                    f"out={MASK_BOXES}",
                ),
            ),
        ),
        folder="toybirds_boxes",  # where its controls are trained already
    ),
}

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
    preset="toybirds",
    rows={
        **SCALES,
        "reference, true boxes, maIoU 0.8": REFERENCE | {"maiou": 0.8},
        "reference, true boxes, maIoU 0.9": REFERENCE | {"maiou": 0.9},
        "reference, true boxes, thr 1": REFERENCE,
        "exact, true boxes, maIoU 0.8": {"maiou": 0.8},
        "exact, true boxes, maIoU 0.9": {"maiou": 0.9},
        "exact, true boxes, thr 1": {},
        "exact, centred boxes, thr 1": CENTER,
        "whole image": WHOLE,
    },
    controls=tuple(SCALES),
    common=PHOTOS,
    oracles=("box", "average"),
)
BEST_SCALE = "RandomResizedCrop, scale 0.2"  # of small_photos, by validation
TABLES["photos_learning_rate"] = Table(
    title="Photographs: the learning rate, chosen on the validation images",
    preset="toybirds",
    rows={BEST_SCALE: SCALES[BEST_SCALE], "exact, true boxes, maIoU 0.9": {"maiou": 0.9}},
    controls=(BEST_SCALE,),
    budgets={f"learning rate {rate:g}": {"opt.lr": rate} for rate in (0.002, 0.004, 0.008)},
    common=PHOTOS,
    oracles=("box", "average"),
)

SALIENCY = "runs/saliency_boxes/boxes.json"  # benchmarks/saliency_boxes.py writes it
BY_MAPS = PLAIN | {"use_dino_maps": True, "dino_maps": SALIENCY}
TABLES["photos_pseudo_boxes"] = Table(
    title="Photographs: boxes and maps of a saliency network",
    preset="toybirds",
    rows={
        **SCALES,
        "exact, true boxes, maIoU 0.9": {"maiou": 0.9},
        "exact, saliency boxes, maIoU 0.9": {"source": SALIENCY, "maiou": 0.9},
        "reference, saliency boxes, maIoU 0.9": REFERENCE | {"source": SALIENCY, "maiou": 0.9},
        "exact, centred boxes, maIoU 0.9": CENTER | {"maiou": 0.9},
        "reference, centred boxes, maIoU 0.9": REFERENCE | CENTER | {"maiou": 0.9},
        "centred by saliency maps, temperature 0.1": BY_MAPS | {"crop.temperature": 0.1},
        "centred by saliency maps, temperature 0.5": BY_MAPS | {"crop.temperature": 0.5},
    },
    controls=tuple(SCALES),
    common=PHOTOS | {"eval_box": SALIENCY},
)

# Real attention and pretrained networks; give dataset.root, dino.weights, dino.object_weights and model.weights.
OBJECT_BOXES, ATTENTION_BOXES = "runs/photo_boxes/object.json", "runs/photo_attention/boxes.json"
PHOTO_BOXES = ("preset=photos_dino", "dataset.name=cub")
OBJECT_STEP = Step(OBJECT_BOXES, "generate_dino_boxes.py", (*PHOTO_BOXES, f"out={OBJECT_BOXES}"))
ATTENTION_STEP = Step(
    ATTENTION_BOXES,
    "generate_dino_boxes.py",
    (*PHOTO_BOXES, "dino.method=component", "dino.threshold=0.2", f"out={ATTENTION_BOXES}"),
)
PRETRAINED = {"dataset.name": "cub", "model.type": "tf_efficientnet_lite0"}
TABLES["photos_probe"] = Table(
    title="Photographs: boxes as views of a frozen, pretrained network",
    preset="finetune",
    rows={},
    controls=(),
    budgets={f"{side} px": {"image_size": side} for side in (224, 384)},
    common=PRETRAINED | {"eval.crop_pct": 0.875},
    steps=(ATTENTION_STEP, OBJECT_STEP),
    probe={
        "centred (control)": "center",
        "attention, component": ATTENTION_BOXES,
        "object head": OBJECT_BOXES,
        "true (oracle)": "gt",
    },
)
PLAIN_35 = "RandomResizedCrop, scale 0.35"
TRAINED = PRETRAINED | {
    "dataset.val_fraction": 0.3333,
    "log_interval": 6,  # the last epoch counts
    "cache": "disk",
    "eval_box": OBJECT_BOXES,
    "deterministic": True,
    "num_threads": 1,
}
BY_OBJECT_BOXES, BY_CENTRED_BOXES = {"source": OBJECT_BOXES, "maiou": 0.9}, CENTER | {"maiou": 0.9}
PRETRAINED_ROWS = {
    PLAIN_35: SCALES[PLAIN_35],
    "exact, object head's boxes, maIoU 0.9": BY_OBJECT_BOXES,
    "exact, centred boxes, maIoU 0.9": BY_CENTRED_BOXES,
}
TABLES["photos_pretrained"] = Table(
    title="Photographs: training crops, a pretrained network",
    preset="finetune",
    rows=PRETRAINED_ROWS,
    controls=(PLAIN_35,),
    common=TRAINED,
    steps=(OBJECT_STEP,),
)
PLAIN_20, PLAIN_50 = "RandomResizedCrop, scale 0.2", "RandomResizedCrop, scale 0.5"
TABLES["photos_pretrained_crops"] = Table(
    title="Photographs: more training crops, a pretrained network",
    preset="finetune",
    rows={PLAIN_20: SCALES[PLAIN_20], PLAIN_50: SCALES[PLAIN_50]}
    | PRETRAINED_ROWS
    | {
        "reference, object head's boxes, maIoU 0.9": REFERENCE | BY_OBJECT_BOXES,
        "exact, object head's boxes, thr 1": {"source": OBJECT_BOXES, "maiou": None},
        "exact, true boxes, maIoU 0.9": {"source": "gt", "maiou": 0.9},
        "centred by attention, temperature 0.1": PLAIN
        | {"use_dino_maps": True, "dino_maps": ATTENTION_BOXES, "maiou": None},
    },
    controls=(PLAIN_20, PLAIN_35, PLAIN_50),
    common=TRAINED,
    steps=(OBJECT_STEP, ATTENTION_STEP),
    folder="photos_pretrained",  # where some are trained already
)
FIRST_ON_PHOTOS = "runs/photos_first_training"
FIRST_SETTINGS = TRAINED | SCALES[PLAIN_35]
TABLES["photos_second_training"] = Table(
    title="Photographs: the published protocol, second trainings from the weights of a first one",
    preset="finetune",
    rows=PRETRAINED_ROWS,
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
    steps=(
        OBJECT_STEP,
        Step(
            f"{FIRST_ON_PHOTOS}/summary.json",
            "train.py",
            (
                "preset=finetune",
                *(word_of(key, value) for key, value in FIRST_SETTINGS.items()),
                f"run_dir={FIRST_ON_PHOTOS}",
            ),
        ),
    ),
)

# --- the published rows, on all of CUB-200-2011 -------------------------------------------------------------------

FIRST = Step(
    "runs/cub_first_training/summary.json",
    "train.py",
    ("preset=cub_first_training", "run_dir=runs/cub_first_training"),
)
CUB_VIEWS = {"eval.views": ["full", "center", "full@256", "full@288", "full@320"], "eval_box": "gt"}
CUB_CONTROLS = {
    **SCALES,
    "fixed centred box, exact": CENTER | {"crop.mode": "exact"},
    "whole image": WHOLE,
}
PLAIN_PUBLISHED = {"RandomResizedCrop, scale 0.08": "85.01 ± 0.076 (9 runs)"}


def second_training(
    title: str, rows: dict[str, dict[str, Any]], *steps: Step, published: dict[str, str] | None = None
) -> Table:
    """Return a table of second trainings: its own rows beside the controls, which all such tables share on disk."""
    return Table(
        title=title,
        preset="cub_second_training",
        rows=CUB_CONTROLS | rows,
        controls=tuple(SCALES),
        common=CUB_VIEWS,
        oracles=("box", "average"),
        steps=(FIRST, *steps),
        published=PLAIN_PUBLISHED | (published or {}),
        folder="cub_second",
    )


DINO_BOXES, CLS_BOXES = "runs/dino_boxes_cub/boxes.json", "runs/cub_cls/boxes.json"
DINO_STEP = Step(DINO_BOXES, "generate_dino_boxes.py", ("preset=cub_dino", f"out={DINO_BOXES}"))
SAM_MASKS, SAM_BOXES = "runs/cub_masks_0", "runs/mask_boxes_cub/boxes.json"

TABLES["cub_first_training"] = Table(
    title="First training on CUB",
    preset="cub_first_training",
    rows={"70/30 split": {}, "official split": {"dataset.split": "official"}},
    controls=("70/30 split",),
    common=CUB_VIEWS,
    oracles=("box", "average"),
    published={"70/30 split": "84.97", "official split": "84.32 (DINOv2's split)"},
    folder="cub_first",  # beside the run that the other tables start from
)
TABLES["cub_thr"] = second_training(
    "Accuracy against the maIoU of the crops, true boxes",
    {f"reference, true boxes, thr {thr:g}": {"THR": thr} for thr in (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)}
    | {f"exact, true boxes, thr {thr:g}": {"THR": thr, "crop.mode": "exact"} for thr in (0.5, 1.0)},
    published={"reference, true boxes, thr 1": "up to +0.6 over RandomResizedCrop"},
)
TABLES["cub_sam_boxes"] = second_training(
    "Boxes of SAM's masks",
    {"reference, true boxes, thr 1": {}, "reference, SAM boxes, thr 1": {"source": SAM_BOXES}},
    Step(f"{SAM_MASKS}/masks_info.json", "generate_mask.py", ("preset=cub_sam_masks_0", f"mask.folder={SAM_MASKS}")),
    Step(
        SAM_BOXES,
        "generate_bbox.py",
        (
            "preset=cub_sam_masks_0",
            f"masks={SAM_MASKS}",
            "bbox.classifier=runs/cub_first_training/best.pt",
            f"out={SAM_BOXES}",
        ),
    ),
)
TABLES["cub_dino_boxes"] = second_training(
    "Boxes of DINOv2's attention, as it is and with a fine-tuned CLS token",
    {
        "reference, true boxes, thr 1": {},
        "reference, DINO boxes, thr 1": {"source": DINO_BOXES},
        "reference, fine-tuned DINO boxes, thr 1": {"source": CLS_BOXES},
    },
    DINO_STEP,
    Step("runs/cub_cls/summary.json", "train.py", ("preset=cub_cls", "run_dir=runs/cub_cls")),
    Step(
        CLS_BOXES,
        "generate_dino_boxes.py",
        ("preset=cub_dino", "dino.weights=runs/cub_cls/best.pt", f"out={CLS_BOXES}"),
    ),
    published={"reference, DINO boxes, thr 1": "85.6", "reference, fine-tuned DINO boxes, thr 1": "85.8"},
)
TABLES["cub_density_maps"] = second_training(
    "Crops centred by DINOv2's attention",
    {"density maps": PLAIN | {"use_dino_maps": True, "dino_maps": DINO_BOXES}},
    DINO_STEP,
)
