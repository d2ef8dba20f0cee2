"""The one config dict: edit it here, or override a run with ``python train.py [preset=NAME] [key=value ...]``.

Edits, presets and the command line are checked alike, by the types and ranges in jobs/schema.py.
"""

import sys
from pathlib import Path

from jobs import settings

config = {
    "preset": None,  # a name of `presets` below: its values go over the defaults, what is edited here over both
    # --- where a run writes, and what it tells
    "init_from": None,  # start a new run with the settings and the best weights of this run folder
    "run_dir": None,  # folder of the run; None: a new one under runs/
    "resume": False,  # go on with the run in run_dir (None: the last one that did not end), from its last.pt
    "save": True,  # write last.pt and best.pt (without them a run cannot be resumed)
    "log_interval": 5,  # validate and log every so many epochs, and after the last one
    "wandb": False,  # log to Weights & Biases too (WANDB_MODE=offline needs no network)
    "A_machine": None,  # the host's name, recorded, and looked up in MACHINE_WORKERS; None: the system is asked
    # --- sweep over one key, judged on the validation images: by a wandb agent, or with wandb=false run after run here
    "sweeprun": False,  # run the sweep instead of one training
    "sweep": {
        "parameter": "THR",  # any key that a training depends on, such as maiou or opt.lr
        # the grid (THR=-1 is RandomResizedCrop); of a key that holds a list: [[0.1, 1], [0.2, 1]]
        "values": [-1.0, 0.0, 0.2, 0.5, 0.8, 1.0],
        "seeds": 1,  # trainings per value, with seed, seed + 1, ...
        "resume": False,  # join the wandb sweep `id` instead of making a new one
        "count": 100,  # at most so many trainings by this process
        "id": None,  # of the wandb sweep to resume
        "project": "localized-crops",  # wandb's project
    },
    "reproduce": {
        "table": "toybirds_crops",  # which table reproduce.py makes; it names them all when asked for another
        "seeds": 5,  # trainings per row, with seed, seed + 1, ...
    },
    "visualize": {
        "what": "crops",  # crops (images, their boxes, maps, masks and crops) | boxes (histograms of IoU and of what
        # boxes and crops keep) | curves (of runs, over epochs) | accuracy (of runs, against maIoU)
        "out": None,  # the PNG to write; None: runs/{what}.png
        "ids": [],  # crops: image ids; none: drawn by seed
        "split": "test",  # crops: train | val | test, where they are drawn from
        "images": 6,  # crops: how many are drawn
        "crops": 2,  # crops: drawn for each method and image
        "runs": [],  # curves, accuracy: run folders, or folders of these
    },
    # --- data
    "dataset": {
        "name": "toybirds",  # toybirds (drawn by code on first use) | folder (root/train/CLASS/*, val and test
        # likewise, or root/CLASS/*) | csv (a table) | cub (any folder in CUB-200-2011's file format) | torchvision's
        # FGVCAircraft, StanfordCars, OxfordIIITPet, Flowers102, Food101
        "root": None,  # folder of the data set; None: data/toybirds, data/CUB_200_2011, data (torchvision's)
        "table": None,  # csv: columns path (below root), label, may be split, x, y, width, height; None: root's .csv
        "download": False,  # fetch CUB-200-2011 (1.1 GB) or torchvision's data set when it is missing
        "check": False,  # decode every image before the run starts
        "split": "official",  # official | 70/30 (train filled up with the first test images until it holds 70%, which
        # leaves images of 121 of CUB's 200 classes in test)
        "val_fraction": 0.3333,  # share of each class's training images held out to choose settings on; 0: none, and
        # validation then looks at the test images, as the published protocol does. A val part of its own is kept
        "test_fraction": 0.2,  # folder, csv: share of each class's images to test on, where there is no test part
        "split_seed": 0,  # of both draws; CUB's format holds out the last images in file order
    },
    "find_duplicates": False,  # check_dataset.py: compare what all files hold, to find equal images under two names
    "cache": "none",  # none | disk: all images decoded once, into one file that the loaders crop from
    "cache_side": None,  # its images' short side is at most so many pixels; None: as they are
    "cache_folder": None,  # where it lies, such as /dev/shm/NAME for memory; None: the data set's folder
    # --- boxes and crops
    "source": "gt",  # boxes of training: gt | center (0.65 of each side) | image | dino (of generate_dino_boxes.py for
    # this data set with out=None) | the path of a box JSON, a COCO JSON, a CSV (path, x, y, width, height in
    # pixels), a folder of YOLO .txt or Pascal VOC .xml; matched by file name
    "boxes": {  # of other tools' files
        "several": "largest",  # an image with several: largest | union | random (one drawn per crop)
        "allow_missing": 0.0,  # share of the images that may be without a box (the whole image serves as theirs)
    },
    "use_box": True,  # hold the training crops to the boxes; false: RandomResizedCrop
    "use_dino_maps": False,  # draw the crops' centres from attention maps (needs use_box=false)
    "dino_maps": None,  # the maps: the box JSON that generate_dino_boxes.py wrote them beside
    "THR": 1.0,  # share of the box that a crop keeps, 0 to 1; negative: RandomResizedCrop
    "maiou": None,  # target mean asymmetric IoU, .5 to 1: sets THR from the training boxes; None: THR as it stands
    "crop": {
        "mode": "exact",  # exact (the share is kept by every crop) | reference (the published crop)
        "scale": [0.08, 1.0],  # area of the crop, share of the image
        "ratio": [0.75, 1.3333333333333333],  # width / height of the crop
        "interpolation": "bilinear",  # bilinear | bicubic
        "temperature": 0.1,  # of the softmax that makes a density of an attention map: lower is more pointed. Chosen on
        # maps in [0, 1], on which the published 2, which belongs to unscaled q·k, is nearly uniform
    },
    # --- attention maps and boxes of generate_dino_boxes.py
    "out": None,  # the box JSON to write; None: runs/dino_boxes_{dataset.name, or its folder}/boxes.json
    # predict.py: the .csv or .jsonl to write; None: predictions_{images}.csv beside the checkpoint
    "dino": {
        "model": None,  # timm name or dinov2_vit{s,b,l,g}14; None: the network that the weights file says it is of
        "weights": None,  # hub | random (to test a pipeline) | a state dict (official DINO, DINOv2; timm) | a
        # checkpoint of train.py; None: hub, or for ToyBirds toybirds/toy_localizer.pt
        "image_size": None,  # short side of the input in pixels, rounded to whole patches; None: that of its training
        "autocontrast": False,  # stretch each image's contrast first
        "batch_size": 32,  # images of one shape
        "heads": "mean",  # mean | sparsity (weighted mean) | the number of one head
        "steps": ["heads", "min_max"],  # cleaning, in this order, from: heads, outlier, filter, min_max
        "filter_size": None,  # cells, of the step filter; None: a tenth of the map's short side, at least 3
        "method": "component",  # component (one connected component of the enlarged map) | published | object_head (the
        # components of training images teach a classifier of the cells of another network, for photographs)
        "threshold": 0.3,  # of the map scaled to [0, 1]; chosen on training images
        "otsu": False,  # find the threshold by Otsu's method instead, image by image
        "upsample": 4,  # component: the map is enlarged so many times before it is cut
        "choose": "heaviest",  # component: heaviest (largest sum) | strongest (holds the maximum)
        "size_factor": 1.0,  # component: both sides of the box are multiplied by it
        "object_model": "tf_efficientnet_lite0",  # object_head: a convolutional network of timm, trained on ImageNet
        "object_weights": "hub",  # object_head: hub | random (to test a pipeline) | the path of a state dict
        "object_image_size": 384,  # object_head: short side of its input in pixels
        "object_rounds": 4,  # object_head: so often the classifier learns from the masks that it finds itself
        "object_images": 1000,  # object_head: training images that teach, at most; each takes about 0.7 MB of memory
        "again": False,  # remove what lies at `out`, finished or not, and start anew
    },
    # --- candidate masks of generate_mask.py
    "mask": {
        "engine": "segments",  # segments (classical, no checkpoint) | sam | official (SAM by Meta's own loop)
        "prompt": "automatic",  # automatic (a grid of points) | dino (one mask an image, where dino_maps point; sam)
        "folder": None,  # masks_{i} to write or to go on with; None: the next free one in the data set's folder
        "store": "bool",  # bool (a byte per pixel) | packed (a bit per pixel) | none (masks_info.json alone)
        "image_batch": 4,  # images that go through the network together
    },
    "sam": {
        "model": "vit_h",  # vit_b | vit_l | vit_h
        "checkpoint": None,  # the file of Meta's weights; random: to test a pipeline
        "compile_encoder": False,  # torch.compile for the image encoder
        # of the automatic generator, under the official names
        "points_per_side": 32,
        "points_per_batch": 64,
        "pred_iou_thresh": 0.88,
        "stability_score_thresh": 0.95,
        "stability_score_offset": 1.0,
        "box_nms_thresh": 0.7,
        "crop_n_layers": 0,
        "crop_nms_thresh": 0.7,
        "crop_overlap_ratio": 0.3413333333333333,  # 512 / 1500
        "crop_n_points_downscale_factor": 1,
        "min_mask_region_area": 0,  # pixels
        # of prompts from maps
        "prompt_box": True,  # ask with the box that the section dino finds in the map
        "prompt_points": 3,  # and with so many strongest cells in it
        "prompt_background": 3,  # and so many weakest cells outside it
    },
    # --- choice among candidate masks of generate_bbox.py
    "masks": None,  # the folder masks_{i} that generate_mask.py wrote; several: A,B
    "bbox": {
        "classifier": None,  # a checkpoint of train.py: best.pt of a run
        "score": "logit",  # logit (of the image's own class) | ncm (cosine to the class's mean training feature) |
        # label_free (largest softmax of any class; the other two know the label of test images, as published)
        "folders": "first",  # of several folders: first (of an image the first folder that has candidates) | all
        "padding": 0.1,  # added on each side of a candidate's box before it is cut out, share of the box's side
        "image_size": None,  # side of the cut-outs in pixels; None: that of the classifier's training
        "batch_size": 64,  # cut-outs that are classified together
        "again": False,  # remove what lies at `out`, finished or not, and start anew
    },
    # --- self-distillation: a ViT in training makes the maps of its own crops, as the section dino says
    "self_distillation": {
        "every": 0,  # epochs between two refreshes of the maps by the EMA (needs use_dino_maps=true); 0: off
        "start": 5,  # epochs of plain crops before the first maps
    },
    # --- augmentation
    "augment": False,  # colour-only augmentation, one drawn per image
    "augment_p": 1.0,  # probability that an image is augmented
    "augment_strength": 1.0,  # s, 0 to 1: of the colour jitter, (0.5 s, 0.5 s, 0.5 s, 0.1 s)
    "use_augment_mix": False,  # AugMix instead
    "flip": 0.5,  # probability of a horizontal flip
    # --- evaluation
    "eval": {
        "views": ["full", "center"],  # full | center | whole | box, each also as VIEW@SIZE; validation uses the first
        "size": None,  # side of the network's input in pixels; None: image_size
        "crop_pct": 0.875,  # view center: share of the short side that the centre crop shows; None: the network's own
        "interpolation": "bilinear",  # of the views' resizing: bilinear | bicubic; None: the network's own
        "box_margin": 0.1,  # view box: margin on each side, as a share of the box's side
        "batch_size": 64,  # images
    },
    "eval_box": None,  # adds the view box, from: gt (an oracle!) | any other source as above; None: no such view.
    # predict.py finds the boxes of its images as those of this file were found, else as the section dino says
    # --- model
    "model": {
        "type": "toyresnet",  # toyresnet (0.7 M parameters) | resnet50 (torchvision) | dinov2_vit{s,b,l,g}14 or
        # dinov2_vit{small,base,large,huge}14 | any timm model name
        "n_classes": None,  # None: as many as the data set has
        "weights": None,  # start of the backbone: hub | the path of a state dict; None: from scratch
        "resumed_model": None,  # start from this trained model, head included: best.pt of a run, or a state dict
        "resumed_ema": None,  # of a checkpoint of ours take the EMA; false: the model itself; None: whichever of the
        # two validated better
        "mean": None,  # of the input's red, green and blue in [0, 1], for normalising; None: the network's own
        "std": None,  # and their deviation
        "drop_path": 0.0,  # share of residual branches that a training step leaves out (timm's networks)
        "head_start": "random",  # random | probe (a linear classifier fitted to the backbone's features of the training
        # crops: fine-tuning then starts from what the features know; LP-FT, Kumar et al. 2022); a
        # resumed_model keeps its own
        "freeze_backbone": False,  # train the head alone
        "freeze_layers": 0,  # so many layers at the input do not learn (stages, of a ViT blocks; the stem is the first)
        "train_cls": False,  # train the CLS token and the head alone (ViT)
        "freeze_bn_from": None,  # BatchNorm's statistics stand still from this epoch on; None: never
        "ema_step": 1,  # update the EMA every so many optimizer steps
        "sync_bn": False,  # BatchNorm over the images of all processes (torchrun, on GPUs)
    },
    "patch_size": 14,  # of the ViT, pixels; a ViT's image_size must be a multiple
    # --- recipe
    "num_epochs": 40,  # may be raised when a run is resumed
    # stop when so many validations in a row, one every log_interval epochs, were not better (a tie is not); None: never
    "patience": None,
    "batch_size": 16,  # images of one optimizer step, over all processes of torchrun and all parts of opt.accumulate
    "image_size": 64,  # side of the training crops after resizing, pixels
    "opt": {
        "type": "adamw",  # sgd | adam | adamw
        "lr": 4e-3,
        "target_lr": 1e-5,  # of the last epoch
        "head_lr": 1.0,  # learning rate of the classifier layer, in units of lr
        "layer_decay": 1.0,  # factor of the rate from each layer to the one before it; 1: one rate for all
        "momentum": 0.9,  # sgd
        "weight_decay": 0.05,  # not on norms and biases
        "accumulate": 1,  # a batch goes through the network in so many parts, for less memory
        "clip": None,  # largest norm of the gradient; longer ones are shortened to it
        "scheduler": "cosine",  # cosine | step
        "warmup_epochs": 2,  # linear rise at the start
        "step_size": 10,  # step: epochs between two falls
        "gamma": None,  # step: factor of one fall; None: such that the last fall ends at target_lr
    },
    "other": {
        "label_smoothing": 0.1,
        "ema_decay": 0.97,  # per update, after a warm-up; averages over ema_step / (1 - ema_decay) steps: 33
    },
    # --- trained classifiers in use: data set, views and boxes are those of their training unless given here
    "checkpoint": [],  # best.pt of a run; for evaluate.py several, separated by commas, are compared
    "evaluate": {
        "split": "test",  # train | val | test
        "averages": [],  # of views, besides that of all, such as full+box
        "out": None,  # the folder to write; None: the first free evaluation_{split}_{i} beside the first checkpoint
    },
    "export": None,  # evaluate.py: write weights for timm, ONNX, class names and preprocessing into this folder instead
    "images": None,  # predict.py: a file, a folder, a pattern in quotes, or - for paths on stdin
    "predict": {
        "top_k": 5,  # classes for each image
        "sheet": None,  # the PNG of a contact sheet to draw
        "sheet_images": 24,  # on it, from all over the list
    },
    # --- machine
    "seed": 0,  # None: one is drawn, printed and recorded
    "deterministic": True,  # the same numbers on every run on the same machine
    "device": None,  # cpu | cuda | cuda:1 ...; None: cuda where there is one
    "amp": "bf16",  # none | bf16 | fp16; on CUDA only (bf16 is ten times slower than float32 on CPUs)
    "compile": False,  # torch.compile the network: a minute or more at the start
    "num_workers": None,  # processes that load images, for each process of torchrun; None: by A_machine, else one less
    # than its cores, at most 8
    "num_threads": 1,  # torch's threads on the CPU (results depend on it in the last bits); None: torch's choice
}

# Named sets of values: `python train.py preset=NAME`, or "preset" above. The empty one is the default.
_DINOV2 = {"dino.model": "dinov2_vits14", "dino.steps": ["heads", "outlier", "filter", "min_max"]}
_PHOTOS_DINO = {**_DINOV2, "dino.image_size": 224, "dino.method": "object_head"}
_CUB = {
    **_DINOV2,
    "dataset.name": "cub",
    "dataset.val_fraction": 0.0,  # published protocol: validated on the test images
    "dataset.split": "70/30",
    "model.type": "resnet50",
    "model.ema_step": 32,
    "model.freeze_bn_from": 1,  # parity: the original never leaves eval mode after its first validation
    "other.ema_decay": 0.999,
    "image_size": 224,
    "batch_size": 32,
    "augment": True,
    "opt.type": "sgd",
    "opt.lr": 1e-3,
    "opt.weight_decay": 1e-4,
    "opt.warmup_epochs": 0,
    "crop.mode": "reference",
    "dino.image_size": 518,
    "dino.threshold": 0.1,  # chosen on training images of CUB with a DINOv2 fine-tuned by others (docs/boxes.md)
    "deterministic": False,
    "num_threads": None,
}
_CUB_SECOND = {
    **_CUB,
    "model.resumed_model": "runs/cub_first_training/best.pt",
    "num_epochs": 200,
    "opt.lr": 2e-4,
    "opt.target_lr": 1e-5,
    "opt.scheduler": "step",
    "opt.step_size": 10,
    "opt.gamma": 0.8609,  # as published, (target_lr / lr) ** (step_size / num_epochs): the last epochs have 1.16e-5
}
_CUB_MAPS = {**_CUB_SECOND, "use_box": False, "use_dino_maps": True}
presets = {
    "toybirds": {},
    "finetune": {  # photographs, 5 to 100 a class; the weights come from the hub, or from a file (model.weights=FILE).
        # Measured with this network on 20 images a class (docs/results.md); for another one try opt.lr=3e-4 too.
        # With 10 images a class or fewer take opt.lr=1e-5: it validates 1.5 to 8 points better
        "dataset.name": "folder",
        "dataset.val_fraction": 0.2,
        "source": "dino",  # generate_dino_boxes.py preset=finetune comes first
        "THR": 1.0,  # crops keep the whole found box
        "eval_box": "dino",
        "eval.views": ["full"],  # and the box: their average is the answer
        "eval.crop_pct": None,  # the network's own
        "eval.interpolation": None,
        "model.type": "tf_efficientnet_lite0",
        "model.weights": "hub",
        "model.head_start": "probe",
        "model.freeze_layers": 3,  # the stem and two stages
        "model.freeze_bn_from": 0,
        "image_size": 224,
        "batch_size": 32,
        "num_epochs": 6,
        "log_interval": 1,
        "opt.lr": 1e-3,
        "opt.target_lr": 1e-6,
        "opt.warmup_epochs": 1,
        "deterministic": False,
        "num_threads": None,
        **_PHOTOS_DINO,
        "dino.weights": "hub",
        "dino.heads": "sparsity",  # for a ViT whose heads nobody has looked at (docs/boxes.md)
        "dino.threshold": 0.1,
    },
    "photos_dino": {  # generate_dino_boxes.py on photographs; chosen on images of CUB (docs/boxes.md)
        **_PHOTOS_DINO,
        "dino.heads": "5",  # of the ViT-S/14 that a third party fine-tuned for salient regions; others: sparsity
        "dino.threshold": 0.15,
    },
    "cub_first_training": {
        **_CUB,
        "model.weights": "hub",  # IMAGENET1K_V2
        "use_box": False,
        "num_epochs": 90,  # not published: choose by the validation curve
    },
    "cub_second_training": _CUB_SECOND,  # held to the true boxes
    "cub_second_plain": {**_CUB_SECOND, "use_box": False},
    "cub_thr_sweep": {
        **_CUB_SECOND,
        "sweeprun": True,
        "sweep.values": [-1.0, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0],
        "sweep.seeds": 3,
    },
    "cub_sam_masks_0": {  # generate_mask.py and generate_bbox.py on CUB, as published
        **_CUB,
        "mask.engine": "sam",
        "sam.points_per_side": 10,
        "sam.stability_score_thresh": 0.5,
    },
    "cub_sam_masks_1": {  # the coarser grid for images without a good mask
        **_CUB,
        "mask.engine": "sam",
        "sam.points_per_side": 3,
        "sam.stability_score_thresh": 0.3,
    },
    # with boxes of SAM or DINO the THR is not published: 1, as with true boxes
    "cub_sam_boxes": {**_CUB_SECOND, "source": "runs/mask_boxes_cub/boxes.json"},
    "cub_dino": _CUB,  # generate_dino_boxes.py on CUB by our rule (dino.method=component)
    "cub_dino_published": {  # and by the published rule and steps; its other threshold: dino.otsu=true
        **_CUB,
        "out": "runs/dino_boxes_cub_published/boxes.json",
        "dino.image_size": 500,  # rounded to whole patches: 504
        "dino.autocontrast": True,
        "dino.filter_size": None,  # a tenth of the map's short side, at least 3
        "dino.method": "published",
        "dino.threshold": 0.5,
    },
    "cub_dino_boxes": {**_CUB_SECOND, "source": "runs/dino_boxes_cub/boxes.json"},
    "cub_cls": {  # fine-tunes DINOv2's CLS token, whose attention then makes boxes
        **_CUB,
        "model.type": "dinov2_vits14",
        "model.weights": "hub",
        "model.train_cls": True,
        "model.freeze_bn_from": None,
        "use_box": False,
        "num_epochs": 30,  # not published: choose by the validation curve
    },
    "cub_cls_boxes": {**_CUB_SECOND, "source": "runs/cub_cls/boxes.json"},
    "cub_density_maps": {**_CUB_MAPS, "dino_maps": "runs/dino_boxes_cub/boxes.json"},
    "cub_density_maps_published": {
        **_CUB_MAPS,
        "dino_maps": "runs/dino_boxes_cub_published/boxes.json",
        "crop.temperature": 2.0,  # as published, although it belongs to unscaled q·k: on maps in [0, 1] the centre is
        # drawn nearly uniformly
    },
}

# num_workers where it is None, by A_machine: for hosts where one less than the cores, at most 8, is not right.
MACHINE_WORKERS: dict[str, int] = {}


def load_config(arguments: list[str], base: dict | None = None) -> dict | None:
    """Return the checked settings of one run: the dict above, a preset, the command line, each over the last.

    ``base``, the config of the run that is gone on with, takes the place of the dict above. None is returned after
    printing the help that ``--help`` or ``--help all`` asked for. Arguments and errors are those of `settings.load`.
    """
    script = Path(sys.argv[0]).stem
    if {"-h", "--help"} & set(arguments):
        print(settings.help_text(Path(__file__), presets, script, everything="all" in arguments))
        return None
    resolved = settings.load(arguments, config, presets, base=base, machine_workers=MACHINE_WORKERS)
    if base is None:
        settings.print_warnings(arguments, resolved, script)
    return resolved
