"""Print the size of map caches and the memory that a reader of all their maps takes, at several numbers of images.

python benchmarks/map_cache_memory.py
"""

import multiprocessing
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from localized_crops.map_file import MapCache, maps_path, save_map_cache

SIDE, COUNTS = 37, (1_000, 11_788, 47_152)  # cells; CUB once and four times


def main() -> None:
    """Print a line per number of images."""
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            path, cells = Path(folder) / f"{count}.json", np.random.default_rng(0).random((SIDE, SIDE))
            save_map_cache(path, ((i, cells) for i in range(count)), {"dataset": "", "model": "", "weights_sha256": ""})
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                opened, read = pool.apply(growth, (path,))
            size = maps_path(path).stat().st_size / 1e6
            print(f"{count} maps of {SIDE} x {SIDE}: {size:.1f} MB on disk; a worker grows by {opened:.1f} MB when it "
                  f"opens the cache and by {read:.1f} MB when it reads all maps")  # fmt: skip


def growth(path: Path) -> tuple[float, float]:
    """Return the resident memory, MB, that opening the cache and then reading all of it adds to this process."""
    start = resident()
    cache = MapCache.open(path)
    opened = resident()
    for image_id in cache:
        cache[image_id].sum()
    return opened - start, resident() - opened


def resident() -> float:
    """Return this process's resident memory in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


if __name__ == "__main__":
    main()
