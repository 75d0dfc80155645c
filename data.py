"""Everything between the disk and the training step: read, pair, degrade, crop, pack and prefetch images.

    python data.py pack DIV2K_HR div2k.npy                # decode a folder once, into one memory-mapped file
    python data.py check GT [LQ] --scale=2                # or: check configs/jpeg.py --dataroot_gt=GT
    python data.py preview configs/denoise.py sheet.png   # training pairs, as the network will see them

Images are arrays (H, W, C), RGB or gray, uint8 or uint16. Sample n is a pure function of (seed, n).
"""

import ast
import inspect
import io
import json
import math
import os
import runpy
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm


def need(fine, sentence: str) -> None:
    if not fine:
        raise ValueError(sentence)


def list_images(root: str | Path) -> list[Path]:
    """Image files below `root`, sorted. Hidden ones are skipped; folders met again through a link, too."""
    paths, entered, kinds = [], {os.path.realpath(root)}, ".bmp .jpeg .jpg .png .tif .tiff .webp".split()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        inner = {os.path.realpath(Path(folder, s)): s for s in sorted(subfolders)[::-1] if s[0] != "."}
        subfolders[:] = sorted(inner[real] for real in inner.keys() - entered)
        entered |= inner.keys()
        paths += [Path(folder, f) for f in files if f[0] != "." and Path(f).suffix.lower() in kinds]
    need(paths, f"{str(root)!r} " + ("has no " + ", ".join(kinds) if os.path.isdir(root) else "is not there"))
    return sorted(paths)


def read_image(path: str | Path, in_chans: int | None = None, header: bool = False, rows: int | None = None):
    """(H, W, in_chans) uint8, or uint16 from 16-bit files; alpha dropped, orientation applied. Of a PNG only
    the first `rows` are decoded. With `header`: ((H, W, C), bytes per value, has alpha), and nothing is."""
    try:
        with Image.open(path, formats=("BMP", "JPEG", "PNG", "TIFF", "WEBP")) as im:  # others lose 16 bits
            layout, kind = im.tile[0].args if im.tile else "", im.mode.split(";")[0].removesuffix("A")
            layout = layout if isinstance(layout, str) else layout[0]  # of the raw pixels, such as RGB;16B
            wide = kind == "I" or ";16" in layout
            bits = 32 if im.mode == "F" or "LA;" in layout else max(getattr(im, "tag_v2", {}).get(258, [8]))
            need(bits <= (16 if wide else 8), "save it with 8 or 16 bits per channel, interleaved, no alpha")
            if header:  # for PNG im.getexif() would decode the image; the size of TIFF is already turned
                turned = im.format != "TIFF" and Image.Image.getexif(im).get(0x0112) in range(5, 9)
                shape = (*im.size[:: 1 if turned else -1], 1 if kind in ("1", "L", "I") else 3)
                return shape, 1 + wide, im.has_transparency_data
            if rows and im.format == "PNG" and not im.info.get("interlace"):
                im.tile = [im.tile[0]._replace(extents=(0, 0, im.width, min(rows, im.height)))]
                if im.getexif():  # it may be turned
                    return read_image(path, in_chans)
            ImageOps.exif_transpose(im, in_place=True)
            if kind == "I":
                img = np.asarray(im).astype(np.uint16)
            elif wide:
                # Pillow keeps the high byte of 16-bit colour: told the other byte order, the low byte.
                low, other = Image.open(path), layout[:-1] + ("L" if layout[-1] == "B" else "B")
                low.tile = [t._replace(args=(other, *t.args[1:] * (t.args != layout))) for t in low.tile]
                img = np.asarray(im).astype(np.uint16) << 8 | np.asarray(ImageOps.exif_transpose(low))
            else:  # a palette may have transparency, which only RGBA can take
                img = np.asarray(im.convert("L" if kind in ("1", "L") else "RGBA" if kind == "P" else "RGB"))
    except Exception as error:  # Pillow raises some ten kinds for a damaged file
        raise ValueError(f"{path} can't be read ({error!r})") from None
    return to_channels(np.ascontiguousarray(np.atleast_3d(img)[..., :3]), in_chans)


def to_channels(img: np.ndarray, in_chans: int | None) -> np.ndarray:
    """(H, W, C) -> (H, W, in_chans). Gray is the BT.601 luma, rounded like Pillow's convert('L')."""
    if in_chans == 1 != img.shape[2]:
        return (img @ np.array([19595, 38470, 7471], "u4") + 0x8000 >> 16).astype(img.dtype)[..., None]
    return np.repeat(img, 3, axis=2) if in_chans == 3 != img.shape[2] else img


def to_float(img: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> float32 in [0, 1]; floats in it -> float32."""
    return np.divide(img, np.iinfo(img.dtype).max if img.dtype.kind == "u" else 1, dtype=np.float32)


def imresize(img: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's bicubic imresize: (H, W, C) -> (ceil(H * scale), ceil(W * scale), C), bit for bit on uint8.
    Antialiased, a = -0.5, borders mirrored; integers rounded half up after each dimension, height first."""
    step = round(1 / scale, 12)  # pixels per output pixel; exact if whole, so that equal phases weigh equally
    width = max(step, 1.0)  # of the kernel: it widens to shrink
    for axis in (0, 1):
        rows, out = np.moveaxis(img, axis, 0), 0.0
        centre = np.arange(math.ceil(round(len(rows) * scale, 9))) * step + 0.5 * (step - 1)
        taps = np.floor(centre - 2 * width)[:, None] + np.arange(math.ceil(4 * width) + 2)
        d = np.abs(centre[:, None] - taps) / width
        weights = np.where(d <= 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2) * (d <= 2)
        weights /= weights.sum(axis=1, keepdims=True)
        taps = abs((taps + len(rows) + 0.5) % (2 * len(rows)) - len(rows)).astype(int)  # mirrored to and fro
        for tap, weight in zip(taps.T, weights.T, strict=True):  # in order, which decides how ties round
            out = out + weight[:, None, None] * rows[tap] if weight.any() else out
        out = np.clip(np.floor(out + 0.5), 0, np.iinfo(img.dtype).max) if img.dtype.kind == "u" else out
        img = np.moveaxis(out, 0, axis).astype(img.dtype)
    return img


def add_noise(gt: np.ndarray, rng, options) -> np.ndarray:
    """Gaussian, of deviation sigma / 255, not clipped; drawn in BGR order, like the reference test noise."""
    sigma = rng.uniform(*options.sigma) if np.ndim(options.sigma) else options.sigma
    return (to_float(gt) + rng.normal(0, sigma / 255, gt.shape)[..., ::-1]).astype(np.float32)


def compress(gt: np.ndarray, rng, options) -> np.ndarray:
    """JPEG, 4:2:0 if in colour: the same pixels as from OpenCV, with which SwinIR was trained and tested."""
    img = gt if gt.dtype == np.uint8 else np.rint(gt / 257).astype(np.uint8)
    quality = rng.uniform(*options.quality) if np.ndim(options.quality) else options.quality
    file = io.BytesIO()
    Image.fromarray(img[..., 0] if img.shape[2] == 1 else img).save(file, "JPEG", quality=round(quality))
    return np.asarray(Image.open(file)).reshape(gt.shape)


def downscale(gt: np.ndarray, rng, options) -> np.ndarray:
    return imresize(gt, 1 / options.scale)


# name: (pure function (gt, rng, options) -> lq, margin). gt: (H, W, C) uint8 or uint16; lq: / scale, likewise
# or float32 in [0, 1]. A crop is degraded with `margin` LQ pixels around it, from a multiple of it, and so
# equals the crop of the degraded image: 16 is a block of 4:2:0 JPEG, 4 the reach of the cubic kernel.
DEGRADATIONS = {"noise": (add_noise, 0), "jpeg": (compress, 16), "bicubic": (downscale, 4)}


class ImageFolder:
    """The image files below `root`. `problems`: (name, sentence) of each that can't be read: at first headers
    alone are read, or `whole` files. Decoded ones are kept while `cache_gb`, shared by workers, lasts."""

    def __init__(self, root: str | Path, cache_gb: float = 2.0, whole: bool = False):
        def look(path: Path) -> tuple:  # (header, None) or (None, problem)
            try:
                header = read_image(path, header=not whole or read_image(path) is not None)
                return (path.relative_to(root).as_posix(), *header), None
            except ValueError as error:
                return None, (path.relative_to(root).as_posix(), str(error))

        self.root, self.cache_gb, self.cache, self.cached = Path(root), cache_gb, {}, 0
        with ThreadPoolExecutor(16) as pool:  # many at a time, for to open a file is mostly to wait for it
            found = list(tqdm(pool.map(look, list_images(root)), str(root), disable=None if whole else True))
        good, self.problems = ([*filter(None, column)] for column in zip(*found, strict=True))
        self.names, self.shapes, self.depths, alphas = ([header[k] for header in good] for k in range(4))
        self.notices = [f"{root}: alpha is dropped from {sum(alphas)} image(s)"] if any(alphas) else []

    def __getitem__(self, i: int, rows: int | None = None) -> np.ndarray:
        """Image i. Where only the first `rows` are needed, the others may be black: they aren't decoded."""
        size, path = math.prod(self.shapes[i]) * self.depths[i], f"{self.root}/{self.names[i]}"
        limit = self.cache_gb * 1e9 / getattr(get_worker_info(), "num_workers", 1)
        if i not in self.cache and self.cached + size <= limit:
            self.cache[i], self.cached = read_image(path), self.cached + size  # for good: epochs are shuffled
        return self.cache[i] if i in self.cache else read_image(path, rows=rows)


class PackedImages:
    """A file made by pack(): a flat .npy of uint8: the pixels of all images, an index, its length, and MAGIC.
    An image is a view of the file: a crop reads its own rows only."""

    MAGIC, problems, notices = b"nanoSwIR", [], []

    def __init__(self, root: str | Path):
        self.root = root
        try:
            self.data = data = np.load(root, mmap_mode="r").view(np.ndarray)  # slices of np.memmap are slower
            need(data[-8:].tobytes() == self.MAGIC, "cut off")
            index = data[-16 - int.from_bytes(data[-16:-8].tobytes(), "little") : -16].tobytes()
            self.names, self.shapes, self.depths, self.starts = json.loads(index)
        except Exception:  # NumPy takes zip files for archives of arrays
            raise ValueError(f"{root} is neither a folder nor a whole file of python data.py pack") from None

    def __reduce__(self) -> tuple:  # a spawned worker maps the file anew, where pickle would copy it
        return PackedImages, (self.root,)

    def __getitem__(self, i: int, rows: int | None = None) -> np.ndarray:
        return np.ndarray(self.shapes[i], f"<u{self.depths[i]}", self.data, self.starts[i])


def pack(source: str | Path, target: str | Path) -> None:
    """Decodes the folder `source`, first to name all damage, then into `target`, there once it is whole."""
    need(not Path(target).exists(), f"{target} is there already: delete it, or give another name")
    folder, partial = ImageFolder(source, cache_gb=0, whole=True), Path(f"{target}.partial")
    need(not folder.problems, "; ".join([t for _, t in folder.problems[:5]] + ["data.py check tells all"]))
    sizes = [math.prod(shape) * depth for shape, depth in zip(folder.shapes, folder.depths, strict=True)]
    *starts, pixels = np.cumsum([0, *sizes]).tolist()
    index = json.dumps([folder.names, folder.shapes, folder.depths, starts]).encode()
    total, free = pixels + len(index) + 16, shutil.disk_usage(partial.absolute().parent).free
    print(*folder.notices, f"{len(sizes)} images, {total / 1e9:.3g} GB, for {target}", sep="\n")
    need(total < 0.98 * free, f"{target} would fill the disk: make room, or pack to another one")
    with partial.open("wb") as f, ThreadPoolExecutor(os.cpu_count()) as pool:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (total,)})
        for k in tqdm(range(0, len(sizes), 16), "16 images each"):  # that many in memory
            for i, img in enumerate(pool.map(folder.__getitem__, range(len(sizes))[k : k + 16]), k):
                need(img.nbytes == sizes[i], f"{source}/{folder.names[i]} has changed meanwhile: pack again")
                f.write(img.astype(f"<u{img.itemsize}"))
        f.write(index + len(index).to_bytes(8, "little") + PackedImages.MAGIC)
    os.replace(partial, target)


class SyntheticImages:
    """Dead leaves: images[number] is (size, size, in_chans) uint8, a pure function of (seed, number).
    After Achddou et al., "Synthetic images as a regularity prior", and VibrantLeaves, arXiv 2504.10201."""

    POOL = 256  # images in use at a time: 50 MB in each worker

    def __init__(self, seed: int = 0, size: int = 256, in_chans: int = 3):
        self.seed, self.size, self.in_chans = seed, size, in_chans

    def __getitem__(self, number: int, rows: int | None = None) -> np.ndarray:
        return to_channels(dead_leaves(self.seed, number, self.size), self.in_chans)


@lru_cache(maxsize=SyntheticImages.POOL + 64)  # room for those that have just left the pool
def dead_leaves(seed: int, number: int, size: int, count: int = 300) -> np.ndarray:
    """(size, size, 3) uint8: a ground and `count` leaves, painted from back to front."""
    rng, (y, x) = sample_rng(seed, number, 1), np.mgrid[:size, :size].astype(np.float32)
    # Noise with the amplitude spectrum 1 / frequency^p, from grain (p = 0.5) to clouds (2); deviation 1.
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)).clip(1 / size)
    noise = np.fft.rfft2(rng.standard_normal((3, size, size), np.float32))
    noise = np.fft.irfft2(noise / f ** rng.uniform(0.5, 2, (3, 1, 1)), (size, size)).astype(np.float32)
    noise /= noise.std(axis=(1, 2), keepdims=True)
    # Colours differ in luminance, and far less along two opponent axes, from the tint of the image.
    mean, spread, smallest, soft = rng.uniform((0.25, 0.1, 0, 0.6), (0.6, 0.3, math.log(6), 1.4))
    chroma = rng.laplace(0, (0.05, 0.02)) + rng.gamma(2, 0.5) * rng.laplace(0, (0.12, 0.05), (count + 1, 2))
    colours = np.insert(chroma, 0, 1, axis=1) @ [[1, 1, 1], [1, 0, -1], [0.5, -1, 0.5]]
    colours = (colours * rng.normal(mean, spread, (count + 1, 1)).clip(0.02, 1)).astype(np.float32)
    r0 = math.exp(-2 * smallest)
    radii = (r0 - rng.random(count + 1) * (r0 - size**-2)) ** -0.5  # density ~ r^-3
    radii[:16] = [2 * size, *rng.uniform(size / 16, size / 3, 15)]  # the ground, and what covers most of it
    img = np.zeros((size, size, 3), np.float32)
    leaves = zip(radii.tolist(), colours, rng.random((count + 1, 10)).tolist(), strict=True)
    for r, colour, (cy, cx, turn, kind, *u) in leaves:
        cy, cx, cos, sin = cy * size, cx * size, math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        box = tuple(slice(max(int(c - r - 2), 0), int(c + r + 3)) for c in (cy, cx))
        a, b = cos * (x[box] - cx) + sin * (y[box] - cy), cos * (y[box] - cy) - sin * (x[box] - cx)
        b -= (kind > 0.7) * (u[0] - 0.5) * (a * a / r - r / 3)  # some are bent
        flat = 0.3 + 0.7 * u[1] if kind < 0.7 else max(0.4 / r, -0.08 * math.log(1 - u[1]))  # a leaf, a hair
        out = (np.hypot(a, b / flat) - r) * flat  # distance from the outline in pixels, < 0 inside
        for t in rng.uniform(0, 2 * math.pi, 3 + int(4 * u[0])).tolist() if kind < 0.35 else ():  # a polygon
            out = np.maximum(out, math.cos(t) * a + math.sin(t) * b - r * (0.3 + 0.5 * math.cos(t) ** 2))
        grain = noise[int(3 * u[2])]  # for a ragged outline and, with a slope, for the light
        out += 0.3 * r * u[3] * (u[3] < 0.5) * grain[box]
        light = 1 + (u[5] - 0.5) / size * a - 0.08 * math.log(1 - u[4]) * grain.T[box]
        cover = (0.5 - out / soft).clip(0, 1)[..., None] if r < 2 * size else 1
        img[box] += cover * (light[..., None] * colour - img[box])
    return (img.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def sample_rng(seed: int, number: int, stream: int = 0, reuse=None) -> np.random.Generator:
    """A pure function of the numbers. To set the state of a generator takes a tenth of making one."""
    rng = reuse or np.random.Generator(np.random.Philox(key=0))
    fresh = {"bit_generator": "Philox", "buffer": [0] * 4, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    rng.bit_generator.state = fresh | {"state": {"counter": [0, 0, 0, stream], "key": [seed % 2**64, number]}}
    return rng


def open_pairs(gts, lqs, scale=1, filename_tmpl="{}", meta_info_file=None, cache_gb=0, whole=0, gt_size=0):
    """Opens folders and packed files (one, a list, or names separated by commas), pairs images by name, and
    returns a list of pairs for each GT root, sources, problems, notices. A pair (gt, i, lq, j, h, w) is gt[i]
    and, unless lq is None, lq[j]; of both h x w LQ pixels are used, aligned top left as in BasicSR."""
    gts, lqs = (str(r).split(",") if isinstance(r, str | Path) else list(r or ()) for r in (gts, lqs))
    need(len(lqs) in (0, len(gts)), "give one dataroot_lq for each dataroot_gt")
    need("{}" in filename_tmpl and scale > 0, f"unfit: {filename_tmpl=}, which must hold {{}}, or {scale=}")
    lines = Path(meta_info_file).read_text("utf-8").splitlines() if meta_info_file else []
    listed = {line.rsplit(" (", line.endswith(")"))[0].strip() for line in lines} - {""}  # name.png (h,w,c)
    roots, n, groups = [*map(os.path.expanduser, gts + lqs)], len(gts), [[] for _ in gts]
    sources = [PackedImages(r) if Path(r).is_file() else ImageFolder(r, cache_gb / n, whole) for r in roots]
    problems = [t for s in sources for k, t in s.problems if k in listed or not listed or s in sources[n:]]
    missing = sorted(listed.difference(*(gt.names for gt in sources[:n])))
    problems += [f"{meta_info_file}: {name} is missing" for name in missing]
    for group, gt, lq in zip(groups, sources[:n], sources[-n:], strict=True):  # the same if there are no lqs
        stems = (os.path.splitext(name)[0] for name in lq.names)  # less than whole names; own: not yet paired
        by_name, own = {k: j for j, k in [*enumerate(stems), *enumerate(lq.names)]}, {*range(len(lq.names))}
        for i, (name, (h, w, _)) in enumerate(zip(gt.names, gt.shapes, strict=True)):
            if meta_info_file and name not in listed:
                continue
            partner = Path(name).with_name(filename_tmpl.replace("{}", Path(name).stem)).as_posix()
            if (j := by_name.get(partner + Path(name).suffix, by_name.get(partner)) if lqs else i) not in own:
                problems += [f"{gt.root}/{name}: no partner {partner}.* left in {lq.root}: {filename_tmpl=}"]
                continue
            own.remove(j)
            lh, lw = lq.shapes[j][:2] if lqs else (h // scale, w // scale)
            if max(abs(lh * scale - h), abs(lw * scale - w)) >= scale:
                sizes = f"{lw}x{lh} pixels, not {w // scale}x{h // scale}, for {scale=}"
                problems.append(f"{lq.root}/{lq.names[j]} and {gt.root}/{name} do not match: {sizes}")
            group.append((gt, i, lq if lqs else None, j, min(h // scale, lh), min(w // scale, lw)))
        unused = () if meta_info_file else sorted(own)
        problems += [f"{lq.root}/{lq.names[j]} is no image's partner in {gt.root}" for j in unused]
    small = [f"{s.root}/{s.names[i]}" for p in groups for s, i, *_, h, w in p if min(h, w) * scale < gt_size]
    told = f"{len(small)} image(s) are below {gt_size=}, padded by reflection, as {', '.join(small[:3])}"
    return groups, sources, problems, [x for s in sources for x in s.notices] + [told][: len(small)]


class PairedImageDataset(Dataset):
    """Training pairs: dataset[n] -> (lq (C, h, w), gt (C, h * scale, w * scale)), for any n >= 0; uint8 from
    8-bit files, for the device to divide by 255, else float32 in [0, 1]. dataroot_gt: a folder, a packed
    file, several; None: synthetic images. dataroot_lq: likewise; None: made by `degradation`, whose `sigma`
    (of 255) and `quality` (of JPEG) are numbers or (low, high). With `dataset_weights` roots are drawn."""

    def __init__(
        self, dataroot_gt=None, dataroot_lq=None, degradation="noise", sigma=25, quality=40, scale=1,
        gt_size=128, in_chans=3, filename_tmpl="{}", meta_info_file=None, dataset_weights=None,
        use_hflip=True, use_rot=True, seed=0, cache_gb=2.0, whole=False,
    ):  # fmt: skip
        vars(self).update({k: v for k, v in locals().items() if k != "self"})
        need(in_chans in (1, 3) and scale > 0 == gt_size % scale, f"unfit: {in_chans=}, {gt_size=}, {scale=}")
        for name, v, least in ("sigma", sigma, 0), ("quality", quality, 1):
            fine = np.size(v) == 1 + np.ndim(v) and least <= np.min(v) == np.ravel(v)[0]
            need(fine, f"{name}={v} must be a number or a range (low, high), at least {least}")
        self.degrade, self.margin = (None, 0) if dataroot_lq else DEGRADATIONS.get(degradation, (None, None))
        need(self.margin is not None, f"{degradation=} is none of {[*DEGRADATIONS]}; give dataroot_lq/val_lq")
        found = dataroot_gt, dataroot_lq, scale, filename_tmpl, meta_info_file, cache_gb, whole, gt_size
        self.groups, sources, problems, self.notices = open_pairs(*found)
        how = [f'"{",".join(map(str, np.ravel(root)))}"' for root in (dataroot_gt, dataroot_lq) if root]
        how += [f"--{scale=}", f"--{filename_tmpl=!s}", f"--{meta_info_file=!s}"][: 2 + bool(meta_info_file)]
        need(not problems, "; ".join([*problems[:5], f"python data.py check {' '.join(how)} tells all"]))
        need(all(self.groups), f"{meta_info_file} lists no image of one of the roots")
        fine = len(dataset_weights or self.groups) == len(self.groups) and min(dataset_weights or [1]) > 0
        need(fine, f"dataset_weights={dataset_weights}: give a positive one for each root")
        self.pairs = [pair for pairs in self.groups for pair in pairs]
        self.synthetic = None if sources else SyntheticImages(seed, max(256, 2 * gt_size), in_chans)
        self.epoch, self.rng, self.eight_bit = None, sample_rng(0, 0), not any(2 in s.depths for s in sources)
        if self.degrade:  # on trial: results of another kind would spoil the training in silence
            lq = self.degrade(np.full((64 * scale, 64 * scale, in_chans), 128, np.uint8), self.rng, self)
            fine = lq.shape == (64, 64, in_chans) and (lq.dtype == np.uint8 or np.mean(lq) < 9)
            need(fine, f"{degradation} must return (H / scale, W / scale, C), uint8 or floats in [0, 1]")

    def __len__(self) -> int:
        return len(self.pairs) or SyntheticImages.POOL

    def pick(self, n: int, u: float, v: float) -> tuple:
        """The pair of sample n, whose random numbers in [0, 1) are u and v."""
        if self.synthetic:  # a pool, small at first, which an image joins every 64 samples
            newest, size = 8 + n // 64, self.synthetic.size // self.scale
            number = newest - int(u * min(newest + 1, SyntheticImages.POOL))
            return self.synthetic, number, None, number, size, size
        if self.dataset_weights:
            bounds = np.cumsum(self.dataset_weights)
            group = self.groups[np.searchsorted(bounds, u * bounds[-1], side="right")]
            return group[int(v * len(group))]
        epoch, position = divmod(n, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, sample_rng(self.seed, epoch, 2).permutation(len(self.pairs))
        return self.pairs[self.order[position]]

    def __getitem__(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = sample_rng(self.seed, n, reuse=self.rng)
        u = rng.random(7).tolist()
        gt, i, lq, j, h, w = self.pick(n, *u[:2])
        scale, size, margin, block = self.scale, self.gt_size // self.scale, self.margin, max(self.margin, 1)
        top, left = int(u[2] * max(h - size + 1, 1)), int(u[3] * max(w - size + 1, 1))  # LQ pixels, inclusive
        y, x = max(top // block * block - margin, 0), max(left // block * block - margin, 0)
        bottom, right = (min(-(-(a + size) // block) * block + margin, n) for a, n in ((top, h), (left, w)))
        gt = gt.__getitem__(i, bottom * scale)[y * scale : bottom * scale, x * scale : right * scale]
        gt = to_channels(gt, self.in_chans)
        gt = gt if margin else self.pad(gt, self.gt_size)  # first, for noise should not be mirrored
        lq = lq.__getitem__(j, bottom)[y:bottom, x:right] if lq else self.degrade(gt, rng, self)
        lq = self.pad(to_channels(lq[top - y :, left - x :][:size, :size], self.in_chans), size)
        gt = gt[(top - y) * scale :, (left - x) * scale :][: self.gt_size, : self.gt_size]
        return self.augment(lq, *u[4:]), self.augment(self.pad(gt, self.gt_size), *u[4:])

    def augment(self, img: np.ndarray, u: float, v: float, t: float) -> torch.Tensor:
        """(H, W, C) -> (C, H, W), in one of BasicSR's eight symmetries."""
        img = img[:: -1 if self.use_rot and v < 0.5 else 1, :: -1 if self.use_hflip and u < 0.5 else 1]
        img = img.transpose((2, 1, 0) if self.use_rot and t < 0.5 else (2, 0, 1))
        return torch.from_numpy(np.require(img if self.eight_bit else to_float(img), None, "CW"))

    def pad(self, img: np.ndarray, size: int) -> np.ndarray:
        """To at least (size, size), by reflection. The edge is mirrored too, lest LQ and GT be shifted."""
        h, w = (max(size - n, 0) for n in img.shape[:2])
        return np.pad(img, ((0, h), (0, w), (0, 0)), "symmetric") if h or w else img


class ValidationImages(PairedImageDataset):
    """images[i] -> {name, lq: float32 (C, h, w), gt: array (h * scale, w * scale, C)}, whole. Noise is the
    reference test noise, np.random.seed(0) before each image. Without `val_gt`: n synthetic images."""

    def __init__(self, val_gt=None, val_lq=None, n: int = 16, scale: int = 1, crop_border=0, **other):
        super().__init__(val_gt, val_lq, scale=scale, gt_size=scale, seed=-1, cache_gb=0, whole=True, **other)
        self.pairs = self.pairs or [(self.synthetic, i, None, i, *2 * [256 // self.scale]) for i in range(n)]
        self.names = [f"synthetic{k:02d}" if self.synthetic else gt.names[k] for gt, k, *_ in self.pairs]
        tiny = [self.names[i] for i, p in enumerate(self.pairs) if min(p[-2:]) * scale < 16 + 2 * crop_border]
        need(not tiny, f"{val_gt or 'synthetic'}: images below 16 pixels inside {crop_border=}: {tiny[:5]}")

    def __getitem__(self, i: int) -> dict:
        gt, k, lq, j, h, w = self.pairs[i]
        gt = to_channels(gt[k][: h * self.scale, : w * self.scale], self.in_chans).copy()
        rng = np.random.RandomState(0) if self.degrade is add_noise else sample_rng(0, i)
        lq = lq[j][:h, :w] if lq else self.degrade(gt, rng, self)
        lq = torch.from_numpy(to_float(to_channels(lq, self.in_chans)).transpose(2, 0, 1).copy())
        return {"name": self.names[i].removesuffix(".png"), "lq": lq, "gt": gt}


def SampleNumbers(batch_size: int, rank: int = 0, world: int = 1, start: int = 0, accumulate: int = 1):
    """Batches of sample numbers, without end: iteration `it` has [it * batch_size, (it + 1) * batch_size).
    In it each of `accumulate` micro-batches, and in these each of `world` ranks, takes a contiguous slice."""
    size, rest = divmod(batch_size, world * accumulate)
    need(rest == 0, f"{batch_size=} is no multiple of ranks x accumulate, {world} x {accumulate}")
    return ([*range(n, n + size)] for n in range(start * batch_size + rank * size, 2**62, world * size))


def ignore_signals(worker: int) -> None:
    for name in {"SIGINT", "SIGHUP", "SIGUSR1"} & set(
        dir(signal)
    ):  # though sent to all, they are for the trainer
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))  # by then the trainer has saved


def train_loader(dataset, sampler, num_workers: int, pin: bool = False, **options) -> DataLoader:
    """Batches in the sampler's order, without end: workers start once. `pin` if they are for a GPU."""
    options |= {"batch_sampler": sampler, "pin_memory": pin, "worker_init_fn": ignore_signals}
    return DataLoader(dataset, num_workers=num_workers, **options)


class Prefetcher:
    """Iterates (lq, gt), float32 on `device`, loaded and copied ahead by a thread, on CUDA in a side stream.
    next() raises OSError for an unreadable image, otherwise RuntimeError. `wait`: seconds so far."""

    def __init__(self, loader: DataLoader, device: torch.device | str):
        self.device, self.wait = torch.device(device), 0.0
        cuda = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if cuda else None
        # A thread begins with GPU 0 as its device: without this, each rank would open a context there
        use = {"initializer": torch.cuda.set_device, "initargs": (self.device,)} if cuda else {}
        self.thread = ThreadPoolExecutor(1, **use)
        self.batches = iter(loader)  # here, because processes are best forked by the main thread
        self.ready = [self.thread.submit(self.load) for _ in range(2)]  # two batches on the device

    def load(self) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        batch = next(self.batches)
        if self.device.type == "mps":  # it takes no operations from two threads at a time
            return batch, None
        with torch.cuda.stream(self.stream):  # None changes nothing
            return self.to_device(batch), self.stream and self.stream.record_event()

    def to_device(self, batch: list[torch.Tensor]) -> list[torch.Tensor]:
        batch = [images.to(self.device, non_blocking=True) for images in batch]
        return [x.float() / 255 if x.dtype == torch.uint8 else x.float() for x in batch]

    def __next__(self) -> list[torch.Tensor]:
        start = time.perf_counter()
        self.ready.append(self.thread.submit(self.load))
        try:
            batch, copied = self.ready.pop(0).result()
        except ValueError as error:  # from a worker it is a whole traceback that ends in the sentence
            told = str(error).strip().rpartition("\n")[2].removeprefix("ValueError: ")
            raise (OSError if "can't be read" in told else RuntimeError)(told) from error
        except (OSError, EOFError) as error:  # while a worker sent a batch
            raise RuntimeError(f"a DataLoader worker has died: {error!r}") from None
        self.wait += time.perf_counter() - start
        if self.device.type == "mps":
            return self.to_device(batch)
        if copied:
            torch.cuda.current_stream(self.device).wait_event(copied)
            for images in batch:  # lest the side stream reuse their memory while they are in use
                images.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def __exit__(self, *_) -> None:
        self.thread.shutdown(cancel_futures=True)
        getattr(self.batches, "_shutdown_workers", int)()  # after an error its traceback holds the iterator

    __enter__ = __iter__ = lambda self: self


def main(command: str = "", *arguments: str) -> None:
    names = {k: v.default for k, v in inspect.signature(PairedImageDataset).parameters.items()}
    paths = [a for a in arguments if a[:2] != "--"]
    options = names | (runpy.run_path(paths.pop(0)) if paths and paths[0].endswith(".py") else {})
    for key, _, text in (a[2:].partition("=") for a in arguments if a[:2] == "--"):
        key in [*names] * (command != "pack") + ["help"] or print(f"--{key} isn't used by data.py {command}")
        number = key == "dataset_weights" or isinstance(names.get(key), int | float)
        need(not number or text[:1].isdigit() or text in ("True", "False"), f"--{key}=NUMBER, not {text!r}")
        options[key] = ast.literal_eval(f"{text}," if key == "dataset_weights" else text) if number else text
    options |= zip(("dataroot_gt", "dataroot_lq"), paths, strict=False) if command == "check" else {}
    view = type("", (), {"__getattr__": lambda v, k: x(v) if callable(x := options[k]) else x})
    known = {k: getattr(view(), k) for k in names}
    if command == "pack" and len(paths) == 2:
        pack(paths[0], Path(paths[1]).with_suffix(".npy"))  # never over an image
    elif command == "check" and known["dataroot_gt"]:  # decode all
        how = [known[k] for k in "dataroot_gt dataroot_lq scale filename_tmpl meta_info_file".split()]
        groups, _, problems, notices = open_pairs(*how, whole=True, gt_size=known["gt_size"])
        print(f"{sum(map(len, groups))} image(s) or pair(s) found", *notices, *problems, sep="\n")
        sys.exit(f"problems: {len(problems)}" if problems else print("no problems"))
    elif command == "preview" and len(paths) == 1 and Path(paths[0]).suffix:
        need(not Path(paths[0]).exists(), f"{paths[0]} is there already: give a name that isn't")
        lq, gt = next(Prefetcher(train_loader(PairedImageDataset(**known), SampleNumbers(8), 0), "cpu"))
        sheet = torch.cat([torch.nn.functional.interpolate(lq, gt.shape[2:]), gt], 2).clip(0, 1) * 255
        sheet = sheet.expand(-1, 3, -1, -1).round().byte().permute(2, 0, 3, 1).flatten(1, 2)
        ImageOps.scale(Image.fromarray(sheet.numpy()), 1 + 100 // gt.shape[3], Image.NEAREST).save(paths[0])
        print(f"{paths[0]}: 8 training pairs, the inputs above, the ground truth below")
    else:
        sys.exit(print(__doc__) if {"-h", "--help"} & {*sys.argv} else f"unknown or incomplete:\n\n{__doc__}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError, SyntaxError, KeyboardInterrupt) as e:
        sys.exit(f"error: {str(e) or 'stopped'}")
