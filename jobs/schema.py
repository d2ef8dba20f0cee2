"""What each key of config.py may hold: type, allowed values, range, and the default with which it is shipped.

A person edits config.py alone; edits, presets and the command line are checked against this file. To add a key, write
one line with its comment into the dict in config.py and one line here, with the same default (a test compares them):

    num_epochs: Count = 40                          # a type of those below
    flip: Share = 0.5
    find_duplicates: bool = False
    cache: Literal["none", "disk"] = "none"         # one of several words
    maiou: float | None = Field(None, ge=0.5, le=1)  # may be None; a range of its own
    values: Many[float] = [0.0, 1.0]                # a list

A new section is a class with a line in `Config`; a rule between keys goes into `check_together`. ``READ_BY`` lists the
keys at the top level of the dict that each script reads.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 2**53  # beyond it a float, which some whole numbers become, no longer holds every whole number
Element = TypeVar("Element")

Text = Annotated[str, Field(min_length=1)]
Name = Annotated[Text, BeforeValidator(lambda name: str(name) if type(name) is int else name)]  # 3 is "3"
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Side = Annotated[int, Field(ge=1, le=4096)]  # pixels
Share = Annotated[float, Field(ge=0, le=1)]
Many = Annotated[list[Element], Field(strict=False)]  # a tuple will do


def _ordered(pair: list[float]) -> list[float]:
    if len(pair) != 2 or pair[0] > pair[1]:
        raise ValueError("must be two numbers, the lower one first")
    return pair


THREE = Field(strict=False, min_length=3, max_length=3)  # red, green, blue
Colour, Deviation = Annotated[list[float], THREE], Annotated[list[Annotated[float, Field(ge=1e-6)]], THREE]


class Section(BaseModel):
    """Strict: "False" is no bool, "0.5" no number; but an int is a float, and a tuple a list."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Sweep(Section):
    parameter: Text = "THR"
    values: Many[Any] = [-1.0, 0.0, 0.2, 0.5, 0.8, 1.0]
    seeds: Count = 1
    resume: bool = False
    count: Count = 100
    id: Text | None = None
    project: Text = "localized-crops"


class Reproduce(Section):
    table: Text = "toybirds_crops"
    seeds: Count = 5


class Visualize(Section):
    what: Literal["crops", "boxes", "curves", "accuracy"] = "crops"
    out: Text | None = None
    ids: Many[Name] = []
    split: Literal["train", "val", "test"] = "test"
    images: int = Field(6, ge=1, le=64)
    crops: int = Field(2, ge=1, le=8)
    runs: Many[Text] = []


class Dataset(Section):
    name: Literal[
        *("toybirds", "folder", "csv", "cub", "FGVCAircraft", "StanfordCars", "OxfordIIITPet", "Flowers102", "Food101")
    ] = "toybirds"
    root: Text | None = None
    table: Text | None = None
    download: bool = False
    check: bool = False
    split: Literal["official", "70/30"] = "official"
    val_fraction: float = Field(0.3333, ge=0, le=0.9)
    test_fraction: float = Field(0.2, ge=0, le=0.9)
    split_seed: Natural = 0


class Boxes(Section):
    several: Literal["largest", "union", "random"] = "largest"
    allow_missing: Share = 0.0


class Crop(Section):
    mode: Literal["exact", "reference"] = "exact"
    scale: Annotated[Many[Annotated[float, Field(ge=1e-6, le=1)]], AfterValidator(_ordered)] = [0.08, 1.0]
    ratio: Annotated[Many[Annotated[float, Field(ge=1e-3, le=1e3)]], AfterValidator(_ordered)] = [0.75, 4 / 3]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    temperature: float = Field(0.1, ge=1e-4, le=1e6)


class Dino(Section):
    model: Text | None = None
    weights: Text | None = None
    image_size: Side | None = None
    autocontrast: bool = False
    batch_size: Count = 32
    heads: Name = "mean"
    steps: Many[Text] = ["heads", "min_max"]
    filter_size: Side | None = None
    method: Literal["component", "published", "object_head"] = "component"
    threshold: Share = 0.3
    otsu: bool = False
    upsample: int = Field(4, ge=1, le=64)
    choose: Literal["heaviest", "strongest"] = "heaviest"
    size_factor: float = Field(1.0, ge=0.01, le=100)
    object_model: Text = "tf_efficientnet_lite0"
    object_weights: Text = "hub"
    object_image_size: Side = 384
    object_rounds: int = Field(4, ge=0, le=100)
    object_images: Count = 1000
    again: bool = False


class Mask(Section):
    engine: Literal["segments", "sam", "official"] = "segments"
    prompt: Literal["automatic", "dino"] = "automatic"
    folder: Text | None = None
    store: Literal["bool", "packed", "none"] = "bool"
    image_batch: Count = 4


class Sam(Section):
    model: Literal["vit_b", "vit_l", "vit_h"] = "vit_h"
    checkpoint: Text | None = None
    compile_encoder: bool = False
    points_per_side: int = Field(32, ge=1, le=1024)
    points_per_batch: Count = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: Share = 0.95
    stability_score_offset: float = Field(1.0, ge=0, le=1e3)
    box_nms_thresh: Share = 0.7
    crop_n_layers: int = Field(0, ge=0, le=8)
    crop_nms_thresh: Share = 0.7
    crop_overlap_ratio: Share = 512 / 1500
    crop_n_points_downscale_factor: int = Field(1, ge=1, le=64)
    min_mask_region_area: Natural = 0
    prompt_box: bool = True
    prompt_points: int = Field(3, ge=0, le=1000)
    prompt_background: int = Field(3, ge=0, le=1000)


class Bbox(Section):
    classifier: Text | None = None
    score: Literal["logit", "ncm", "label_free"] = "logit"
    folders: Literal["first", "all"] = "first"
    padding: float = Field(0.1, ge=0, le=10)
    image_size: Side | None = None
    batch_size: Count = 64
    again: bool = False


class Evaluate(Section):
    split: Literal["train", "val", "test"] = "test"
    out: Text | None = None


class Predict(Section):
    top_k: Count = 5
    sheet: Text | None = None
    sheet_images: int = Field(24, ge=1, le=240)


class SelfDistillation(Section):
    every: Natural = 0
    start: Natural = 5


class Eval(Section):
    views: Annotated[Many[Text], Field(min_length=1)] = ["full", "center"]
    size: Side | None = None
    crop_pct: float | None = Field(0.875, ge=0.05, le=1)
    interpolation: Literal["bilinear", "bicubic"] | None = "bilinear"
    box_margin: float = Field(0.1, ge=0, le=10)
    batch_size: Count = 64


class Model(Section):
    type: Text = "toyresnet"
    n_classes: int | None = Field(None, ge=2, le=10_000_000)  # of more the head alone would fill the memory
    weights: Text | None = None
    resumed_model: Text | None = None
    resumed_ema: bool | None = None
    mean: Colour | None = None
    std: Deviation | None = None
    drop_path: float = Field(0.0, ge=0, le=0.9)
    head_start: Literal["random", "probe"] = "random"
    freeze_backbone: bool = False
    freeze_layers: Natural = 0
    train_cls: bool = False
    freeze_bn_from: Natural | None = None
    ema_step: Count = 1
    sync_bn: bool = False


class Opt(Section):
    type: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(4e-3, gt=0, le=1e3)
    target_lr: float = Field(1e-5, gt=0, le=1e3)
    head_lr: float = Field(1.0, gt=0, le=1e6)
    layer_decay: float = Field(1.0, gt=0, le=1)
    momentum: Share = 0.9
    weight_decay: float = Field(0.05, ge=0, le=1e3)
    accumulate: Count = 1
    clip: float | None = Field(None, ge=1e-6)
    scheduler: Literal["cosine", "step"] = "cosine"
    warmup_epochs: Natural = 2
    step_size: Count = 10
    gamma: Share | None = None


class Other(Section):
    label_smoothing: float = Field(0.1, ge=0, le=0.99)
    ema_decay: Share = 0.97


class Config(Section):
    """The whole dict of config.py."""

    preset: Text | None = None
    init_from: Text | None = None
    run_dir: Text | None = None
    resume: bool = False
    save: bool = True
    log_interval: Count = 5
    wandb: bool = False
    A_machine: Text | None = None
    sweeprun: bool = False
    sweep: Sweep = Sweep()
    reproduce: Reproduce = Reproduce()
    visualize: Visualize = Visualize()
    dataset: Dataset = Dataset()
    find_duplicates: bool = False
    cache: Literal["none", "disk"] = "none"
    cache_side: Count | None = None
    cache_folder: Text | None = None
    source: Text = "gt"
    boxes: Boxes = Boxes()
    use_box: bool = True
    use_dino_maps: bool = False
    dino_maps: Text | None = None
    THR: float = Field(1.0, le=1)
    maiou: float | None = Field(None, ge=0.5, le=1)
    crop: Crop = Crop()
    out: Text | None = None
    dino: Dino = Dino()
    mask: Mask = Mask()
    sam: Sam = Sam()
    masks: Text | None = None
    bbox: Bbox = Bbox()
    self_distillation: SelfDistillation = SelfDistillation()
    augment: bool = False
    augment_p: Share = 1.0
    augment_strength: Share = 1.0
    use_augment_mix: bool = False
    flip: Share = 0.5
    eval: Eval = Eval()
    eval_box: Text | None = None
    model: Model = Model()
    patch_size: Side = 14
    num_epochs: Count = 40
    patience: Count | None = None
    batch_size: Count = 16
    image_size: Side = 64
    opt: Opt = Opt()
    other: Other = Other()
    checkpoint: Many[Text] = []
    evaluate: Evaluate = Evaluate()
    export: Text | None = None
    images: Text | None = None
    predict: Predict = Predict()
    seed: int | None = Field(0, ge=0, lt=2**32)
    deterministic: bool = True
    device: Text | None = None
    amp: Literal["none", "bf16", "fp16"] = "bf16"
    compile: bool = False
    num_workers: int | None = Field(None, ge=0, le=1024)
    num_threads: int | None = Field(1, ge=1, le=1024)


def check_together(c: dict) -> str | None:
    """Return what one key demands of another and does not get, in one line; None if all is well."""
    opt, sweep, mask = c["opt"], c["sweep"], c["mask"]
    faults = [
        (
            c["use_box"] and c["use_dino_maps"],
            "use_box and use_dino_maps are both true: a crop follows one of them; set use_box=false",
        ),
        (
            mask["prompt"] == "dino" and (mask["engine"] != "sam" or c["dino_maps"] is None),
            "mask.prompt=dino needs mask.engine=sam and dino_maps=FILE of generate_dino_boxes.py",
        ),
        (
            c["self_distillation"]["every"] and not (c["use_dino_maps"] and c["dino_maps"] is None),
            "self_distillation.every makes the maps itself: set use_dino_maps=true and dino_maps=none",
        ),
        (
            opt["accumulate"] > c["batch_size"],
            f"opt.accumulate={opt['accumulate']}: a batch has batch_size={c['batch_size']} images",
        ),
        (opt["target_lr"] > opt["lr"], f"opt.target_lr={opt['target_lr']} is above opt.lr={opt['lr']}: lower it"),
        (sweep["resume"] and sweep["id"] is None, "sweep.resume=true needs sweep.id=ID, the sweep to go on with"),
        (
            c["sweeprun"] and not sweep["values"],
            "sweep.values is empty: give the grid, such as sweep.values=0,0.5,1",
        ),
    ]
    return next((message for is_fault, message in faults if is_fault), None)


# None is replaced in these when a run begins; in a run that goes on None therefore means what it meant then.
DERIVED = ["seed", "dataset.root", "model.n_classes", "model.mean", "model.std", "eval.interpolation", "eval.crop_pct"]

# The keys at the top level of the dict that each script reads; all scripts read preset and dataset.
_MACHINE = "A_machine num_workers num_threads device amp"
READ_BY = {
    "train": f"{_MACHINE} init_from run_dir resume save log_interval wandb sweeprun sweep cache cache_side "
    "cache_folder source boxes use_box use_dino_maps dino_maps THR maiou crop dino self_distillation augment "
    "augment_p augment_strength use_augment_mix flip eval eval_box "
    "model patch_size num_epochs patience batch_size image_size opt other seed deterministic compile",
    "check_dataset": "find_duplicates",
    "boxes": "source boxes",
    "generate_dino_boxes": f"{_MACHINE} out dino",
    "generate_mask": f"{_MACHINE} out mask sam dino dino_maps",
    "generate_bbox": f"{_MACHINE} out masks bbox",
    "visualize": "visualize source boxes dino_maps masks THR maiou crop image_size augment augment_p "
    "augment_strength use_augment_mix eval seed",
    "evaluate": f"{_MACHINE} checkpoint evaluate export eval eval_box boxes",
    "predict": f"{_MACHINE} checkpoint images out predict eval eval_box dino",
    "make_localizer": "out seed deterministic num_threads",
}
