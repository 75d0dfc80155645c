"""Training pairs per second on one core: data.py, and BasicSR's own PairedImageDataset.

    python tests/bench_data.py                           # nanoSwinIR alone
    python tests/bench_data.py --basicsr ../BasicSR      # beside BasicSR (needs cv2, lmdb)

x2 pairs, GT 128x128, LQ 64x64, flips and rotations; images of 480x480 and 2040x1356, made on the spot.
All variants take turns within one run, on the same images. Prints a Markdown table.
"""

import argparse
import os
import random
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402


def make_images(root: Path, size: tuple[int, int], count: int, scale: int = 2) -> None:
    """PNGs that compress like photos: dead leaves with a little noise, and their LR by imresize."""
    for k in range(count):
        rng = np.random.default_rng(k)
        gt = data.dead_leaves(0, k, max(size))[: size[0], : size[1]]
        gt = (gt + rng.normal(0, 2, gt.shape)).clip(0, 255).astype(np.uint8)
        for name, img in (("gt", gt), ("lq", data.imresize(gt, 1 / scale))):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(img).save(root / name / f"{k:04d}.png")
    for name in ("gt", "lq"):
        data.pack(root / name, root / f"{name}.npy")


def import_basicsr(path: Path):
    """BasicSR's class without the __init__ of its package, which imports every architecture."""
    for name in ("basicsr", "basicsr.data", "basicsr.utils"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path.joinpath(*name.split(".")))]
    try:
        import torchvision  # noqa: F401
    except ImportError:  # BasicSR imports these two functions there and does not call them here
        stubs = {
            "": "_",
            ".transforms": "_",
            ".transforms.functional": "normalize",
            ".utils": "make_grid",
        }
        for name, function in stubs.items():
            sys.modules["torchvision" + name] = types.ModuleType("torchvision" + name)
            setattr(sys.modules["torchvision" + name], function, None)
    from basicsr.utils.color_util import bgr2ycbcr
    from basicsr.utils.file_client import FileClient
    from basicsr.utils.img_util import imfrombytes, img2tensor
    from basicsr.utils.misc import scandir

    names = {
        "bgr2ycbcr": bgr2ycbcr,
        "FileClient": FileClient,
        "imfrombytes": imfrombytes,
        "img2tensor": img2tensor,
    }
    vars(sys.modules["basicsr.utils"]).update(names, scandir=scandir)
    from basicsr.data.paired_image_dataset import PairedImageDataset

    return PairedImageDataset


def make_lmdb(folder: Path) -> Path:
    """As BasicSR's make_lmdb_from_imgs: the PNG files, keyed by stem, and meta_info.txt."""
    import lmdb

    target = folder.with_suffix(".lmdb")
    paths = data.list_images(folder)
    env = lmdb.open(str(target), map_size=2 * sum(path.stat().st_size for path in paths) + 10**7)
    with env.begin(write=True) as transaction:
        for path in paths:
            transaction.put(path.stem.encode(), path.read_bytes())
    env.close()
    shapes = [", ".join(map(str, data.read_header(path).shape)) for path in paths]
    lines = [f"{path.name} ({shape}) 1" for path, shape in zip(paths, shapes, strict=True)]
    (target / "meta_info.txt").write_text("\n".join(lines))
    return target


def rate(fetch, count: int, seconds: float) -> tuple[int, float]:
    """(pairs, seconds) of random fetches, for at least `seconds`."""
    start, pairs = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
        for _ in range(4):
            fetch(random.randrange(count))
        pairs += 4
    return pairs, spent


def variants(root: Path, basicsr) -> dict:
    options = {"scale": 2, "gt_size": 128}
    packed = data.PairedImageDataset(root / "gt.npy", root / "lq.npy", **options)
    clean = data.PairedImageDataset(root / "gt.npy", degradation="noise", gt_size=128)
    loader = iter(
        data.train_loader(packed, data.sample_batches(lambda it: (32, 128)), num_workers=0)
    )
    result = {
        "PNG files": data.PairedImageDataset(
            root / "gt", root / "lq", cache_gb=0, **options
        ).__getitem__,
        "PNG files, in the cache": data.PairedImageDataset(
            root / "gt", root / "lq", **options
        ).__getitem__,
        "packed": packed.__getitem__,
        "packed, collated into batches of 32": lambda n: next(loader),
        "packed, noise drawn instead of LQ read": clean.__getitem__,
    }
    if basicsr:
        opt = {"phase": "train", "scale": 2, "gt_size": 128, "use_hflip": True, "use_rot": True}
        for kind, suffix in (("disk", ""), ("lmdb", ".lmdb")):
            roots = [make_lmdb(root / name) if suffix else root / name for name in ("gt", "lq")]
            roots = dict(zip(("dataroot_gt", "dataroot_lq"), map(str, roots), strict=True))
            result[f"BasicSR, {kind}"] = basicsr(
                {**opt, **roots, "io_backend": {"type": kind}}
            ).__getitem__
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--basicsr", type=Path, help="a checkout of BasicSR")
    parser.add_argument("--seconds", type=float, default=4, help="for each variant and size")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    basicsr = import_basicsr(arguments.basicsr) if arguments.basicsr else None
    if basicsr:
        import cv2

        cv2.setNumThreads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    table, sizes = {}, {"480x480": ((480, 480), 24), "2040x1356": ((1356, 2040), 6)}
    with tempfile.TemporaryDirectory() as folder:
        for title, (size, count) in sizes.items():
            root = Path(folder, title)
            make_images(root, size, count)
            fetches = variants(root, basicsr)
            for name, fetch in fetches.items():  # warm: caches filled, files opened
                for n in range(count if "cache" in name else 2):
                    fetch(n)
            totals = {name: np.zeros(2) for name in fetches}
            for _ in range(4):
                for name, fetch in fetches.items():
                    totals[name] += rate(fetch, count, arguments.seconds / 4)
            for name, (pairs, seconds) in totals.items():
                table.setdefault(name, []).append(
                    pairs / seconds * (32 if "batches" in name else 1)
                )
    print(
        "\n| pairs per second, one core |",
        " | ".join(sizes),
        "|\n| --- |",
        " | ".join("---:" for _ in sizes),
        "|",
    )
    for name, rates in table.items():
        print(f"| {name} |", " | ".join(f"{rate:,.0f}" for rate in rates), "|")


if __name__ == "__main__":
    main()
