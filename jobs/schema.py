"""What each key of config.py may hold: type, allowed values, range, and the default with which it is shipped.

A person edits config.py alone; edits, presets and the command line are checked against this file. To add a key, write
one line with its comment into the dict in config.py and one line here, with the same default (a test compares them). A
rule between keys goes into `check_together`. ``READ_BY`` lists the keys at the top level of the dict that each script
reads.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

LARGEST = 2**53  # beyond it a float, which some whole numbers become, no longer holds every whole number
TorchvisionSet = Literal["FGVCAircraft", "StanfordCars", "OxfordIIITPet", "Flowers102", "Food101"]
Element = TypeVar("Element")


def between(kind: type, least: float | None = None, most: float | None = None, *, above: float | None = None) -> Any:
    """Return the type of a number from ``least``, or above ``above``, to ``most``, which is included."""
    return Annotated[kind, Field(ge=least, gt=above, le=most)]


def _check_order(pair: list[float]) -> list[float]:
    if len(pair) != 2 or pair[0] > pair[1]:
        raise ValueError("must be two numbers, the lower one first")
    return pair


Text = Annotated[str, Field(min_length=1)]
Name = Annotated[Text, BeforeValidator(lambda name: str(name) if type(name) is int else name)]  # 3 is "3"
Natural = between(int, 0, LARGEST)
Count = between(int, 1, LARGEST)
Side = between(int, 1, 4096)  # pixels
Share = between(float, 0, 1)
Many = Annotated[list[Element], Field(strict=False)]  # a tuple will do
Ordered = AfterValidator(_check_order)
Three = Field(min_length=3, max_length=3)  # red, green, blue

# Dotted key -> its type and its default. Types are strict: "False" is no bool, "0.5" no number; but an int is a float.
SCHEMA: dict[str, tuple[Any, Any]] = {
    "preset": (Text | None, None),
    "init_from": (Text | None, None),
    "run_dir": (Text | None, None),
    "resume": (bool, False),
    "save": (bool, True),
    "log_interval": (Count, 5),
    "wandb": (bool, False),
    "A_machine": (Text | None, None),
    "sweeprun": (bool, False),
    "sweep.parameter": (Text, "THR"),
    "sweep.values": (Many[Any], [-1.0, 0.0, 0.2, 0.5, 0.8, 1.0]),
    "sweep.seeds": (Count, 1),
    "sweep.resume": (bool, False),
    "sweep.count": (Count, 100),
    "sweep.id": (Text | None, None),
    "sweep.project": (Text, "localized-crops"),
    "reproduce.table": (Text, "toybirds_crops"),
    "reproduce.seeds": (Count, 5),
    "visualize.what": (Literal["crops", "boxes", "curves", "accuracy"], "crops"),
    "visualize.out": (Text | None, None),
    "visualize.ids": (Many[Name], []),
    "visualize.split": (Literal["train", "val", "test"], "test"),
    "visualize.images": (between(int, 1, 64), 6),
    "visualize.crops": (between(int, 1, 8), 2),
    "visualize.runs": (Many[Text], []),
    "dataset.name": (Literal["toybirds", "folder", "csv", "cub", TorchvisionSet], "toybirds"),
    "dataset.root": (Text | None, None),
    "dataset.table": (Text | None, None),
    "dataset.download": (bool, False),
    "dataset.check": (bool, False),
    "dataset.split": (Literal["official", "70/30"], "official"),
    "dataset.val_fraction": (between(float, 0, 0.9), 0.3333),
    "dataset.test_fraction": (between(float, 0, 0.9), 0.2),
    "dataset.split_seed": (Natural, 0),
    "find_duplicates": (bool, False),
    "cache": (Literal["none", "disk"], "none"),
    "cache_side": (Count | None, None),
    "cache_folder": (Text | None, None),
    "source": (Text, "gt"),
    "boxes.several": (Literal["largest", "union", "random"], "largest"),
    "boxes.allow_missing": (Share, 0.0),
    "use_box": (bool, True),
    "use_dino_maps": (bool, False),
    "dino_maps": (Text | None, None),
    "THR": (between(float, None, 1), 1.0),
    "maiou": (between(float, 0.5, 1) | None, None),
    "crop.mode": (Literal["exact", "reference"], "exact"),
    "crop.scale": (Annotated[Many[between(float, 1e-6, 1)], Ordered], [0.08, 1.0]),
    "crop.ratio": (Annotated[Many[between(float, 1e-3, 1e3)], Ordered], [0.75, 4 / 3]),
    "crop.interpolation": (Literal["bilinear", "bicubic"], "bilinear"),
    "crop.temperature": (between(float, 1e-4, 1e6), 0.1),
    "out": (Text | None, None),
    "dino.model": (Text | None, None),
    "dino.weights": (Text | None, None),
    "dino.image_size": (Side | None, None),
    "dino.autocontrast": (bool, False),
    "dino.batch_size": (Count, 32),
    "dino.heads": (Name, "mean"),
    "dino.steps": (Many[Text], ["heads", "min_max"]),
    "dino.filter_size": (Side | None, None),
    "dino.method": (Literal["component", "published", "object_head"], "component"),
    "dino.threshold": (Share, 0.3),
    "dino.otsu": (bool, False),
    "dino.upsample": (between(int, 1, 64), 4),
    "dino.choose": (Literal["heaviest", "strongest"], "heaviest"),
    "dino.size_factor": (between(float, 0.01, 100), 1.0),
    "dino.object_model": (Text, "tf_efficientnet_lite0"),
    "dino.object_weights": (Text, "hub"),
    "dino.object_image_size": (Side, 384),
    "dino.object_rounds": (between(int, 0, 100), 4),
    "dino.object_images": (Count, 1000),
    "dino.again": (bool, False),
    "mask.engine": (Literal["segments", "sam", "official"], "segments"),
    "mask.prompt": (Literal["automatic", "dino"], "automatic"),
    "mask.folder": (Text | None, None),
    "mask.store": (Literal["bool", "packed", "none"], "bool"),
    "mask.image_batch": (Count, 4),
    "sam.model": (Literal["vit_b", "vit_l", "vit_h"], "vit_h"),
    "sam.checkpoint": (Text | None, None),
    "sam.compile_encoder": (bool, False),
    "sam.points_per_side": (between(int, 1, 1024), 32),
    "sam.points_per_batch": (Count, 64),
    "sam.pred_iou_thresh": (float, 0.88),
    "sam.stability_score_thresh": (Share, 0.95),
    "sam.stability_score_offset": (between(float, 0, 1e3), 1.0),
    "sam.box_nms_thresh": (Share, 0.7),
    "sam.crop_n_layers": (between(int, 0, 8), 0),
    "sam.crop_nms_thresh": (Share, 0.7),
    "sam.crop_overlap_ratio": (Share, 512 / 1500),
    "sam.crop_n_points_downscale_factor": (between(int, 1, 64), 1),
    "sam.min_mask_region_area": (Natural, 0),
    "sam.prompt_box": (bool, True),
    "sam.prompt_points": (between(int, 0, 1000), 3),
    "sam.prompt_background": (between(int, 0, 1000), 3),
    "masks": (Text | None, None),
    "bbox.classifier": (Text | None, None),
    "bbox.score": (Literal["logit", "ncm", "label_free"], "logit"),
    "bbox.folders": (Literal["first", "all"], "first"),
    "bbox.padding": (between(float, 0, 10), 0.1),
    "bbox.image_size": (Side | None, None),
    "bbox.batch_size": (Count, 64),
    "bbox.again": (bool, False),
    "self_distillation.every": (Natural, 0),
    "self_distillation.start": (Natural, 5),
    "augment": (bool, False),
    "augment_p": (Share, 1.0),
    "augment_strength": (Share, 1.0),
    "use_augment_mix": (bool, False),
    "flip": (Share, 0.5),
    "eval.views": (Annotated[Many[Text], Field(min_length=1)], ["full", "center"]),
    "eval.size": (Side | None, None),
    "eval.crop_pct": (between(float, 0.05, 1) | None, 0.875),
    "eval.interpolation": (Literal["bilinear", "bicubic"] | None, "bilinear"),
    "eval.box_margin": (between(float, 0, 10), 0.1),
    "eval.batch_size": (Count, 64),
    "eval_box": (Text | None, None),
    "model.type": (Text, "toyresnet"),
    "model.n_classes": (between(int, 2, 10_000_000) | None, None),  # of more the head alone would fill the memory
    "model.weights": (Text | None, None),
    "model.resumed_model": (Text | None, None),
    "model.resumed_ema": (bool | None, None),
    "model.mean": (Annotated[Many[float], Three] | None, None),
    "model.std": (Annotated[Many[between(float, 1e-6)], Three] | None, None),
    "model.drop_path": (between(float, 0, 0.9), 0.0),
    "model.head_start": (Literal["random", "probe"], "random"),
    "model.freeze_backbone": (bool, False),
    "model.freeze_layers": (Natural, 0),
    "model.train_cls": (bool, False),
    "model.freeze_bn_from": (Natural | None, None),
    "model.ema_step": (Count, 1),
    "model.sync_bn": (bool, False),
    "patch_size": (Side, 14),
    "num_epochs": (Count, 40),
    "patience": (Count | None, None),
    "batch_size": (Count, 16),
    "image_size": (Side, 64),
    "opt.type": (Literal["sgd", "adam", "adamw"], "adamw"),
    "opt.lr": (between(float, above=0, most=1e3), 4e-3),
    "opt.target_lr": (between(float, above=0, most=1e3), 1e-5),
    "opt.head_lr": (between(float, above=0, most=1e6), 1.0),
    "opt.layer_decay": (between(float, above=0, most=1), 1.0),
    "opt.momentum": (Share, 0.9),
    "opt.weight_decay": (between(float, 0, 1e3), 0.05),
    "opt.accumulate": (Count, 1),
    "opt.clip": (between(float, 1e-6) | None, None),
    "opt.scheduler": (Literal["cosine", "step"], "cosine"),
    "opt.warmup_epochs": (Natural, 2),
    "opt.step_size": (Count, 10),
    "opt.gamma": (Share | None, None),
    "other.label_smoothing": (between(float, 0, 0.99), 0.1),
    "other.ema_decay": (Share, 0.97),
    "checkpoint": (Many[Text], []),
    "evaluate.split": (Literal["train", "val", "test"], "test"),
    "evaluate.averages": (Many[Text], []),
    "evaluate.out": (Text | None, None),
    "export": (Text | None, None),
    "images": (Text | None, None),
    "predict.top_k": (Count, 5),
    "predict.sheet": (Text | None, None),
    "predict.sheet_images": (between(int, 1, 240), 24),
    "seed": (between(int, 0, 2**32 - 1) | None, 0),
    "deterministic": (bool, True),
    "device": (Text | None, None),
    "amp": (Literal["none", "bf16", "fp16"], "bf16"),
    "compile": (bool, False),
    "num_workers": (between(int, 0, 1024) | None, None),
    "num_threads": (between(int, 1, 1024) | None, 1),
}


DEFAULTS = {key: default for key, (_, default) in SCHEMA.items()}


def check_together(c: dict) -> str | None:
    """Return what one key demands of another and does not get, in one line; None if all is well."""
    opt, sweep, mask = c["opt"], c["sweep"], c["mask"]
    if c["use_box"] and c["use_dino_maps"]:
        return "use_box and use_dino_maps are both true: a crop follows one of them; set use_box=false"
    if mask["prompt"] == "dino" and (mask["engine"] != "sam" or c["dino_maps"] is None):
        return "mask.prompt=dino needs mask.engine=sam and dino_maps=FILE of generate_dino_boxes.py"
    if c["self_distillation"]["every"] and not (c["use_dino_maps"] and c["dino_maps"] is None):
        return "self_distillation.every makes the maps itself: set use_dino_maps=true and dino_maps=none"
    if opt["accumulate"] > c["batch_size"]:
        return f"opt.accumulate={opt['accumulate']}: a batch has batch_size={c['batch_size']} images"
    if opt["target_lr"] > opt["lr"]:
        return f"opt.target_lr={opt['target_lr']} is above opt.lr={opt['lr']}: lower it"
    if sweep["resume"] and sweep["id"] is None:
        return "sweep.resume=true needs sweep.id=ID, the sweep to go on with"
    if c["sweeprun"] and not sweep["values"]:
        return "sweep.values is empty: give the grid, such as sweep.values=0,0.5,1"
    return None


# None is replaced in these when a run begins; in a run that goes on None therefore means what it meant then.
DERIVED = ["seed", "dataset.root", "model.n_classes", "model.mean", "model.std", "eval.interpolation", "eval.crop_pct"]

# What a sweep cannot go over: it changes no result, or has a key of its own.
NOT_SWEPT = {"preset", "run_dir", "resume", "save", "log_interval", "wandb", "A_machine", "sweeprun", "sweep", "seed"}
NOT_SWEPT |= {"num_workers", "device"}

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
