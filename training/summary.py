"""The end of a run: the test in every view, predictions.json and summary.json."""

from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from localized_crops.files import save_json
from readers.data_set import DataSet
from training.distributed import rank
from training.evaluation import loss_and_top1
from training.run import Run
from training.train_data import REPORTED, test_views
from utils import environment


def finish(run: Run, data: DataSet, loader: DataLoader, notes: dict) -> dict[str, Any]:
    """Test the final model and its EMA in every view; write predictions.json and summary.json."""
    names, rows = list(test_views(run.config)), data.rows(*REPORTED)
    log_probs, labels = run.predict(loader, names)
    views = list(log_probs["model"])  # with several their average too
    top1 = {view: {which: loss_and_top1(log_probs[which][view], labels)[1] for which in log_probs} for view in views}
    classes = {view: {which: log_probs[which][view].argmax(1).tolist() for which in log_probs} for view in views}
    predictions = {}
    for n, (row, image_id) in enumerate(zip(rows, data.ids[rows], strict=True)):
        answers = {view: {which: found[n] for which, found in classes[view].items()} for view in views}
        predictions[str(image_id)] = {"label": int(data.labels[row]), **answers[names[0]], "views": answers}
    has_test = len(data.rows("test")) > 0
    summary = summarize(run, len(rows), top1) | notes | {"tested_on": "test" if has_test else "val"}
    if rank() == 0:
        save_json(run.folder / "predictions.json", predictions)
        save_json(run.folder / "summary.json", summary)
    split = "test" if has_test else "validation (there is no test part)"
    for view, both in top1.items():
        is_oracle = view.startswith("box") and run.config["eval_box"] == "gt"
        shares = f"model {both['model']:.1%}, EMA {both['ema']:.1%}{' (oracle: true boxes at test)' * is_oracle}"
        print(f"{split} after epoch {run.epoch}, view {view}: {shares}")
    return summary


def summarize(run: Run, n_test: int, top1: dict) -> dict[str, Any]:
    """Return what a table needs to know of a finished run."""
    return {
        "top1": top1,  # view -> model, ema: fractions of the test images
        "n_test": n_test,
        "best_validation_top1": run.best_top1,
        "validation_of_last_100_epochs": last_epochs(run.records, run.epoch),
        "epochs": run.epoch,
        "THR": run.config["THR"] if run.config["use_box"] else -1.0,
        "maiou": float(np.mean([record["maiou"] for record in run.records])),
        "training_seconds_of_logged_epochs": sum(record["seconds"] for record in run.records),
        "images_per_second": float(np.median([record["images_per_second"] for record in run.records])),
        "environment": environment(),
    }


def last_epochs(records: list[dict], epoch: int) -> dict[str, dict[str, float]]:
    """Return the published measure for model and EMA: mean, first and last validated top-1 of the last 100 epochs."""
    late = [record for record in records if record["epoch"] > epoch - 100]
    return {
        which: {"mean": float(np.mean([r[key] for r in late])), "first": late[0][key], "last": late[-1][key]}
        for which, key in (("model", "top1"), ("ema", "ema_top1"))
    }
