"""Name the class of every image, by a trained classifier.

Reads a checkpoint of train.py and image files: a file, a folder, a pattern in quotes, or ``-``, paths on stdin. Writes

    out.csv or out.jsonl   a row for each image: path, then class and probability of the predict.top_k best classes
    out.errors.txt         the files that could not be read, where there are any: they have no row, exit status 2

The views are those of the training; where one looks at the object's box, the localizer of the config's section dino
finds it first (eval_box=none leaves the box out). With several views the answer is their average.

    python predict.py checkpoint=runs/photos_0/best.pt images=new_photos/ out=new_photos.csv
    python predict.py checkpoint=runs/photos_0/best.pt images='trip/**/*.jpg' predict.sheet=sheet.png
    find . -name '*.jpg' | python predict.py checkpoint=runs/photos_0/best.pt images=- out=found.jsonl
"""

import jobs.early  # noqa: F401 - Ctrl-C during the other imports

import time
from collections.abc import Sequence
from pathlib import Path

from config import load_config
from inference.classifier import Classifier, Prediction, load_classifier, training_defaults
from inference.photos import find_images
from inference.predictions import check_out, save_predictions, save_sheet
from jobs.guard import run_script
from jobs.loader import workers_for
from jobs.machine import set_up_cpu
from localized_crops.files import UserError, save_text, user_errors


def main(config: dict) -> None:
    """Classify the images of ``config``."""
    set_up_cpu(config["num_threads"])
    with user_errors(ValueError):
        classifier = load_classifier(config["checkpoint"][0], config=config, device=config["device"])
    images, settings = config["images"], config["predict"]
    name = "stdin" if images == "-" else Path(images).stem.strip("*") or "images"
    out = Path(config["out"] or Path(config["checkpoint"][0]).with_name(f"predictions_{name}.csv"))
    check_out(out, settings["sheet"])
    paths = find_images(images)
    print(describe(classifier, len(paths)), flush=True)
    predictions = classify(classifier, paths, config)
    save_predictions(out, predictions, min(settings["top_k"], len(classifier.class_names)))
    if settings["sheet"] and any(prediction.error is None for prediction in predictions):
        save_sheet(settings["sheet"], predictions, settings["sheet_images"])
    raise_if_any_failed(predictions, out)


def load_prediction_config(arguments: list[str]) -> dict | None:
    """Return the settings of the training, overridden by config.py and the command line."""
    config = load_config(arguments)
    if config is None:
        return None
    if len(config["checkpoint"]) != 1 or config["images"] is None:
        raise UserError("predict.py needs checkpoint=FILE (best.pt of a run) and images=FOLDER|FILE|PATTERN|-")
    return load_config(arguments, base=training_defaults(config["checkpoint"][0]))


def describe(classifier: Classifier, count: int) -> str:
    """Return the line that is printed before the work starts."""
    views = f"views {', '.join(classifier.views)}"
    box = f", box by {classifier.localizer.name} ({classifier.localizer.weights})" if classifier.localizer else ""
    network = f"{classifier.path} ({classifier.weights}), {len(classifier.class_names)} classes"
    return f"{count} images; {network}; {views}{box}, on {classifier.device}"


def classify(classifier: Classifier, paths: Sequence[Path], config: dict) -> list[Prediction]:
    """Return the prediction for each path; say how fast it went."""
    start = time.perf_counter()
    sizes = {"top_k": config["predict"]["top_k"], "batch_size": config["eval"]["batch_size"]}
    predictions = classifier.predict(paths, **sizes, num_workers=workers_for(len(paths), config), progress=True)
    seconds = time.perf_counter() - start
    print(f"{seconds:.1f} s, {len(paths) / seconds:.0f} images/s")
    return predictions


def raise_if_any_failed(predictions: Sequence[Prediction], out: Path) -> None:
    """Say where the predictions are; list the files that could not be read and end with status 2 for them."""
    errors = [prediction.error for prediction in predictions if prediction.error]
    listed = out.with_suffix(".errors.txt")
    print(f"{out}: {len(predictions) - len(errors)} images")
    if not errors:
        listed.unlink(missing_ok=True)  # of an earlier run
        return
    save_text(listed, "\n".join([f"{len(errors)} files cannot be read", *errors]) + "\n")
    raise UserError(f"{len(errors)} of {len(predictions)} files cannot be read, see {listed}; the others are in {out}")


if __name__ == "__main__":
    run_script(main, load_prediction_config)
