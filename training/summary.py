"""The end of a run: the test in every view, predictions.json and summary.json."""

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from localized_crops.files import save_json
from readers.data_set import DataSet
from training.distributed import rank
from training.evaluation import loss_and_top1, predict
from training.run import Run
from training.train_data import report_rows, test_views
from utils import autocast, environment


def finish(
    run: Run, config: dict, data: DataSet, loader: DataLoader, device: torch.device, notes: dict
) -> dict[str, Any]:
    """Test the final model and its EMA in every view; write predictions.json and summary.json."""
    names, rows = list(test_views(config)), report_rows(data)
    top1, classes = {}, {}
    networks, statistics = [run.model, run.ema], {"mean": run.mean, "std": run.std}
    found, labels = predict(networks, loader, names, device, autocast(device, config["amp"]), **statistics)
    for which, log_probs in zip(("model", "ema"), found, strict=True):
        for view, values in log_probs.items():
            top1.setdefault(view, {})[which] = loss_and_top1(values, labels)[1]
            classes.setdefault(view, {})[which] = values.argmax(1).tolist()
    predictions = {
        str(image_id): {
            "label": int(data.labels[row]),
            "model": classes[names[0]]["model"][n],
            "ema": classes[names[0]]["ema"][n],
            "views": {view: {which: found[n] for which, found in both.items()} for view, both in classes.items()},
        }
        for n, (row, image_id) in enumerate(zip(rows, data.ids[rows], strict=True))
    }
    notes = notes | {"tested_on": "test" if len(data.rows("test")) else "val"}
    summary = summarize(run, config, len(rows), top1) | notes
    if rank() == 0:
        save_json(run.folder / "predictions.json", predictions)
        save_json(run.folder / "summary.json", summary)
    tested = "test" if len(data.rows("test")) else "validation (there is no test part)"
    for view, both in top1.items():
        oracle = " (oracle: true boxes at test)" if view.startswith("box") and config["eval_box"] == "gt" else ""
        shares = f"model {both['model']:.1%}, EMA {both['ema']:.1%}"
        print(f"{tested} after epoch {run.epoch}, view {view}: {shares}{oracle}")
    return summary


def summarize(run: Run, config: dict, n_test: int, top1: dict) -> dict[str, Any]:
    """Return what a table needs to know of a finished run."""
    thr = config["THR"] if config["use_box"] else -1.0
    seconds = sum(record["seconds"] for record in run.records)
    return {
        "top1": top1,  # view -> model, ema: fractions of the test images
        "n_test": n_test,
        "best_validation_top1": run.best_top1,
        "validation_of_last_100_epochs": last_epochs(run.records, run.epoch),
        "epochs": run.epoch,
        "THR": thr,
        "maiou": float(np.mean([record["maiou"] for record in run.records])),
        "training_seconds_of_logged_epochs": seconds,
        "images_per_second": float(np.median([record["images_per_second"] for record in run.records])),
        "environment": environment(),
    }


def last_epochs(records: list[dict], epoch: int, count: int = 100) -> dict[str, dict[str, float]]:
    """Return the published measure for model and EMA: mean, first and last validated top-1 of the last epochs.

    Args:
        records: of the epochs that were validated (``log_interval``).
        epoch: the last one.
        count: of the last epochs.
    """
    late = [record for record in records if record["epoch"] > epoch - count]
    return {
        which: {"mean": float(np.mean([r[key] for r in late])), "first": late[0][key], "last": late[-1][key]}
        for which, key in (("model", "top1"), ("ema", "ema_top1"))
    }
