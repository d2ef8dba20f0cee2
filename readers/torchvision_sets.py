"""torchvision's own fine-grained data sets, read through torchvision's classes."""

import os
from pathlib import Path

import torchvision.datasets

from localized_crops.files import UserError
from readers.data_set import Listing, list_names

SETS = {  # name of the class -> torchvision's split -> ours
    "FGVCAircraft": {"train": "train", "val": "val", "test": "test"},
    "StanfordCars": {"train": "train", "test": "test"},
    "OxfordIIITPet": {"trainval": "train", "test": "test"},
    "Flowers102": {"train": "train", "val": "val", "test": "test"},
    "Food101": {"train": "train", "test": "test"},
}


def read_torchvision(name: str, root: Path, download: bool) -> Listing:
    """Read one of SETS; ids are the paths below ``root``, the classes' own folder names included; there are no boxes.

    With ``download`` torchvision fetches and unpacks what is missing. Raises UserError if it is not there or cannot be
    fetched.
    """
    names, labels, splits = [], [], []
    for theirs, ours in SETS[name].items():
        try:
            part = getattr(torchvision.datasets, name)(root, split=theirs, download=download)
        except (RuntimeError, ValueError, OSError, KeyError) as error:
            raise UserError(f"{root}: {name}: {error}; dataset.root must hold it, or dataset.download=true") from None
        # the public interface of these classes gives decoded images alone
        if hasattr(part, "_samples"):
            files, part_labels = zip(*part._samples, strict=True)
        else:
            files, part_labels = part._image_files if hasattr(part, "_image_files") else part._images, part._labels
        names += [os.path.relpath(file, root) for file in files]
        labels += part_labels
        splits += [ours] * len(files)
    return list_names(root, names, labels, list(part.classes), splits)
