"""Print the page of ratios that docs/benchmarks.md holds: loading, an epoch of training, growth with the data set.

python benchmarks/speed.py FOLDER_IN_CUB_FORMAT [CACHE_FOLDER]     # ten minutes on two cores
"""

import sys

import growth
import loader_cost
import training_cost


def main(root: str, cache_folder: str = "runs/speed") -> None:
    """Measure and print one table after the other."""
    print("## Loading\n", flush=True)
    loader_cost.main(root, "224", cache_folder)
    print("\n## An epoch of training\n", flush=True)
    training_cost.main(["dataset.name=cub", f"dataset.root={root}", "image_size=96", f"cache_folder={cache_folder}"])
    print("\n## Growth with the data set\n", flush=True)
    growth.main(root)


if __name__ == "__main__":
    main(*sys.argv[1:])
