"""Everything between the disk and the training step: read, pair, degrade, crop, pack and prefetch images.

    python data.py pack DIV2K_HR div2k.npy                # decode a folder once, into one memory-mapped file
    python data.py check configs/denoise.py               # or folders: check GT LQ --scale=2 --filename_tmpl={}x2
    python data.py preview configs/denoise.py sheet.png   # training pairs as the network will see them

Images are numpy arrays (H, W, C), RGB or gray, uint8 or uint16. A source of images is a folder, a packed file or
a generator: it has `names`, `sizes` [(h, w)], `depths` [bytes per value] and `crop(i, top, left, h, w)`.
Whatever is random about training sample n is a pure function of (seed, n): workers, ranks and restarts don't enter.
"""

import ast
import inspect
import io
import itertools
import json
import os
import queue
import re
import runpy
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from tqdm import tqdm

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
IMAGE_FORMATS = (
    "PNG",
    "JPEG",
    "MPO",
    "BMP",
    "TIFF",
    "WEBP",
)  # Pillow decodes 16-bit colour of others to 8 bits


# ---- reading ---------------------------------------------------------------------------------------------------


def list_images(root: str | Path) -> list[Path]:
    """All image files below `root`, sorted by path. Hidden ones are skipped, each linked folder is entered once."""

    def fail(error: OSError):
        raise ValueError(
            f"{error.filename}: {error.strerror}; dataroot_gt and its like name a folder or packed file"
        )

    paths, entered = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        if os.path.realpath(folder) in entered:  # a symbolic link that loops
            subfolders.clear()
            continue
        entered.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        visible = (Path(folder, name) for name in files if not name.startswith("."))
        paths += [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise ValueError(f"{root} holds no images ({' '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(paths)


def open_image(path: str | Path) -> tuple[Image.Image, str]:
    """The image, opened but not decoded, and Pillow's name of the layout of its raw pixels, such as 'RGB;16B'."""
    im = Image.open(path, formats=IMAGE_FORMATS)
    layout = im.tile[0][3] if im.tile else ""  # a tile: codec, extents, offset, layout or (layout, ...)
    layout = layout if isinstance(layout, str) else layout[0]
    bits = max(im.tag_v2.get(258, (8,))) if im.format == "TIFF" else 8
    if im.mode == "F" or bits > 16 or (bits > 8 and not im.mode.startswith("I") and ";16" not in layout):
        raise ValueError(
            "its pixel format is not supported: save it with 8 or 16 bits per channel, interleaved"
        )
    return im, layout


def orientation(im: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. PNG's own getexif would decode the whole image to find a late EXIF chunk."""
    return Image.Image.getexif(im).get(0x0112, 1)


def read_header(path: Path) -> tuple[tuple[int, int, int], int, bool] | str:
    """((H, W, C), bytes per value, has alpha) without decoding, or what is wrong with the file."""
    try:
        im, layout = open_image(path)
        with im:
            gray = (
                im.mode in ("1", "L", "LA", "I") or im.mode.startswith("I;16") or layout.startswith("LA;16")
            )
            w, h = im.size if orientation(im) < 5 else im.size[::-1]
            alpha = im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info
            return (h, w, 1 if gray else 3), 2 if im.mode[0] == "I" or ";16" in layout else 1, alpha
    except Exception as error:  # Pillow raises some ten kinds for a damaged file
        return f"{path} can't be read ({first_line(error)})"


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def decode(path: str | Path) -> np.ndarray:
    """(H, W, 3) RGB or (H, W, 1) gray as in the file, uint8 or uint16. Alpha dropped, EXIF orientation applied."""

    def raw(mode: str, layout: str) -> np.ndarray:
        im, _ = open_image(path)
        im._mode = mode
        im.tile = [
            (*tile[:3], layout if isinstance(tile[3], str) else (layout, *tile[3][1:])) for tile in im.tile
        ]
        return np.asarray(im).astype(np.uint16)

    try:
        im, layout = open_image(path)
        turn = orientation(im)
        if layout == "LA;16B":  # as RGBA these four bytes are: gray high, gray low, alpha high, alpha low
            pixels = raw("RGBA", "RGBA")
            img = pixels[..., 0] << 8 | pixels[..., 1]
        elif im.mode in ("RGB", "RGBA") and ";16" in layout:
            # Pillow keeps the high byte of 16-bit colour. Told the other byte order, it keeps the low byte.
            little = layout.endswith("L") or (layout.endswith("N") and sys.byteorder == "little")
            img = raw(im.mode, layout) << 8 | raw(im.mode, layout[:-1] + ("B" if little else "L"))
        elif im.mode[0] == "I":
            img = np.asarray(im)
            if img.min() < 0 or img.max() > 65535:
                raise ValueError("its values exceed 16 bits")
            img = img.astype(np.uint16)
        elif im.mode in ("1", "L", "LA"):
            img = np.asarray(im.convert("L"))
        else:  # a palette with transparency has to pass through RGBA
            img = np.asarray((im.convert("RGBA") if im.mode in ("P", "PA") else im).convert("RGB"))
    except Exception as error:
        raise ValueError(f"{path} can't be read ({first_line(error)})") from None
    img = img[..., None] if img.ndim == 2 else img[..., :3]
    if turn in (5, 6, 7, 8):
        img = img.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        img = img[:, ::-1]
    if turn in (3, 4, 7, 8):
        img = img[::-1]
    return np.ascontiguousarray(img)


def to_channels(img: np.ndarray, in_chans: int) -> np.ndarray:
    """(H, W, C) -> (H, W, in_chans). Gray is 0.299 R + 0.587 G + 0.114 B, in the integers of Pillow's convert('L')."""
    if img.shape[2] == in_chans:
        return img
    if in_chans == 3:
        return np.repeat(img, 3, axis=2)
    gray = (img.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + 0x8000) >> 16
    return gray.astype(img.dtype)[..., None]


def read_image(path: str | Path, in_chans: int = 3) -> np.ndarray:
    """(H, W, in_chans) uint8, or uint16 where the file has 16 bits. ValueError naming the file if it can't be read."""
    return to_channels(decode(path), in_chans)


# ---- degradations ----------------------------------------------------------------------------------------------


def to_float(img: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> float32 in [0, 1]; float32 as it is."""
    return img.astype(np.float32) / np.float32(np.iinfo(img.dtype).max) if img.dtype.kind == "u" else img


def imresize(img: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's imresize(img, scale): bicubic (a = -0.5), antialiased, borders mirrored. (H, W, C) of any dtype.

    Integers are rounded half up after each dimension, height first, as MATLAB does: bit for bit its LR images.
    """
    step = round(
        1 / scale, 12
    )  # input pixels per output pixel; whole numbers exact, so equal phases weigh equally
    stretch = max(step, 1.0)  # the kernel widens when shrinking
    for axis in (0, 1):
        length = img.shape[axis]
        centre = np.arange(int(np.ceil(round(length / step, 9)))) * step + 0.5 * (step - 1)
        taps = np.floor(centre - 2 * stretch)[:, None] + np.arange(int(np.ceil(4 * stretch)) + 2)
        d = np.abs(centre[:, None] - taps) / stretch
        weights = np.where(d <= 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2) * (d <= 2)
        weights /= weights.sum(axis=1, keepdims=True)
        taps = taps.astype(int) % (2 * length)
        taps = np.minimum(taps, 2 * length - 1 - taps)
        source, out = np.moveaxis(img, axis, 0), 0.0
        for tap, weight in zip(
            taps.T, weights.T, strict=True
        ):  # in order: another one would round ties otherwise
            if weight.any():
                out = out + weight.reshape(-1, *[1] * (img.ndim - 1)) * source[tap]
        if img.dtype.kind == "u":
            out = np.clip(np.floor(out + 0.5), 0, np.iinfo(img.dtype).max)
        img = np.moveaxis(out, 0, axis).astype(img.dtype)
    return img


def draw(value: float | tuple[float, float], rng) -> float:
    """The value itself, or one drawn uniformly from a (low, high) range."""
    return rng.uniform(*value) if isinstance(value, tuple | list) else value


def add_noise(gt: np.ndarray, rng, options) -> np.ndarray:
    """Gaussian noise of deviation sigma / 255, not clipped. Drawn in BGR order, like the reference test noise."""
    noise = rng.normal(0, draw(options.sigma, rng) / 255, gt.shape)
    return (to_float(gt) + noise[..., ::-1]).astype(np.float32)


def compress(gt: np.ndarray, rng, options) -> np.ndarray:
    """JPEG and back, 4:2:0 if in colour: the pixels of OpenCV's imencode, with which SwinIR was trained and tested."""
    img = gt if gt.dtype == np.uint8 else np.rint(gt / 257).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(img.squeeze(2) if img.shape[2] == 1 else img).save(
        buffer, "JPEG", quality=round(draw(options.quality, rng))
    )
    return np.asarray(Image.open(buffer)).reshape(gt.shape)


def downscale(gt: np.ndarray, rng, options) -> np.ndarray:
    return imresize(gt, 1 / options.scale)


# name: (pure function (gt, rng, options) -> lq, margin). gt is (H, W, C) uint8 or uint16, lq (H / scale, W / scale, C)
# of an integer type or float32 in [0, 1]. A crop is degraded with `margin` LQ pixels around it, from a multiple of
# `margin` on, so that it equals the crop of the degraded image: 16 is the JPEG block of 4:2:0, 4 the bicubic reach.
DEGRADATIONS = {
    "noise": (add_noise, 0),
    "jpeg": (compress, 16),
    "bicubic": (downscale, 4),
}


# ---- sources ---------------------------------------------------------------------------------------------------


class ImageFolder:
    """Image files below `root`. Decoded images stay in memory while `cache_gb`, shared by the workers, lasts."""

    def __init__(self, root: str | Path, in_chans: int = 3, cache_gb: float = 2.0):
        self.root, self.in_chans, self.cache_gb = Path(root), in_chans, cache_gb
        self.cache, self.free = {}, None
        paths = list_images(root)
        with ThreadPoolExecutor(16) as pool:  # headers only: what takes time is the disk's latency
            headers = list(pool.map(read_header, paths))
        self.problems = [header for header in headers if isinstance(header, str)]
        good = [
            (path, *header)
            for path, header in zip(paths, headers, strict=True)
            if not isinstance(header, str)
        ]
        self.names = [path.relative_to(root).as_posix() for path, *_ in good]
        self.sizes = [shape[:2] for _, shape, _, _ in good]
        self.channels = [shape[2] for _, shape, _, _ in good]
        self.depths = [depth for *_, depth, _ in good]
        self.alphas = sum(alpha for *_, alpha in good)

    def image(self, i: int) -> np.ndarray:
        if i in self.cache:
            return self.cache[i]
        img = read_image(self.root / self.names[i], self.in_chans)
        if self.free is None:  # a worker's share; every worker decodes for itself
            worker = get_worker_info()
            self.free = self.cache_gb * 1e9 / (worker.num_workers if worker else 1)
        if (
            img.nbytes <= self.free
        ):  # what is in stays in: in a shuffled epoch, replacing would not give more hits
            self.cache[i] = img
            self.free -= img.nbytes
        return img

    def crop(self, i: int, top: int, left: int, h: int, w: int) -> np.ndarray:
        return self.image(i)[top : top + h, left : left + w]


class PackedImages:
    """One file written by `pack`: a flat uint8 .npy array of the pixels of all images, then the index, its length
    and MAGIC. A crop reads its own rows only. ValueError if the file is not whole."""

    MAGIC = b"nanoSwIR"
    problems, alphas = (), 0

    def __init__(self, path: str | Path, in_chans: int = 3):
        self.path, self.in_chans = Path(path), in_chans
        try:
            self.data = np.load(path, mmap_mode="r").view(np.ndarray)  # the subclass memmap slices slowly
            tail = self.data[-16:].tobytes()
            if tail[8:] != self.MAGIC:
                raise ValueError
            length = int.from_bytes(tail[:8], "little")
            index = json.loads(self.data[-16 - length : -16].tobytes())
        except (OSError, ValueError, EOFError):
            raise ValueError(
                f"{path} is not a whole packed file: write it with python data.py pack"
            ) from None
        self.names, self.shapes, self.depths = index["names"], index["shapes"], index["depths"]
        self.sizes = [tuple(shape[:2]) for shape in self.shapes]
        nbytes = [h * w * c * depth for (h, w, c), depth in zip(self.shapes, self.depths, strict=True)]
        self.offsets = [0, *itertools.accumulate(nbytes)]

    def __reduce__(self):  # a spawned worker maps the file itself; pickled, the map would be copied
        return PackedImages, (self.path, self.in_chans)

    def image(self, i: int) -> np.ndarray:
        return self.crop(i, 0, 0, *self.sizes[i])

    def crop(self, i: int, top: int, left: int, h: int, w: int) -> np.ndarray:
        dtype = np.uint8 if self.depths[i] == 1 else np.dtype("<u2")
        img = np.ndarray(self.shapes[i], dtype, self.data, self.offsets[i])
        return to_channels(img[top : top + h, left : left + w], self.in_chans)


def pack(source: str | Path, target: str | Path) -> None:
    """Decode the folder `source` into the file `target`, which appears under its name only when it is whole."""
    folder, target = ImageFolder(source), Path(target)
    if folder.problems:
        raise ValueError(some(folder.problems))
    shapes = [(*size, c) for size, c in zip(folder.sizes, folder.channels, strict=True)]
    index = json.dumps({"names": folder.names, "shapes": shapes, "depths": folder.depths}).encode()
    trailer = index + len(index).to_bytes(8, "little") + PackedImages.MAGIC
    total = sum(h * w * c * depth for (h, w, c), depth in zip(shapes, folder.depths, strict=True)) + len(
        trailer
    )
    free = shutil.disk_usage(target.absolute().parent).free
    print(f"{target}: {len(shapes)} images, {total / 1e9:.2f} GB ({free / 1e9:.0f} GB free)")
    if total > 0.98 * free:
        raise ValueError(
            f"{target} would fill the disk: {total / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )
    partial = target.with_name(target.name + ".partial")
    with (
        partial.open("wb") as file,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(shapes)) as bar,
    ):
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (total,)}
        )
        for start in range(0, len(shapes), 32):  # decoded ahead of the writing, but not the whole folder
            names = folder.names[start : start + 32]
            for i, img in enumerate(pool.map(decode, [folder.root / name for name in names]), start):
                if img.shape != shapes[i] or img.itemsize != folder.depths[i]:
                    raise ValueError(f"{folder.root / folder.names[i]} changed while it was packed")
                file.write(img.astype(img.dtype.newbyteorder("<"), copy=False).tobytes())
                bar.update()
        file.write(trailer)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)


class SyntheticImages:
    """Dead leaves: occluding shapes of power-law size with textures, shading and colours of natural statistics.

    images[number] is (size, size, in_chans) uint8, a pure function of (seed, number); numbers have no end. That such
    images train real denoisers: Achddou et al. 2021, "Synthetic images as a regularity prior for image restoration";
    which ingredients matter: VibrantLeaves, arXiv 2504.10201.
    """

    KEPT = 256  # images in memory: 50 MB at 256x256
    problems, alphas = (), 0

    def __init__(self, seed: int = 0, size: int = 256, in_chans: int = 3):
        self.seed, self.size, self.in_chans, self.cache = seed, size, in_chans, {}

    def __getitem__(self, number: int) -> np.ndarray:
        if number not in self.cache:
            img = dead_leaves(sample_rng(self.seed, number, stream=1), self.size)
            while len(self.cache) >= self.KEPT:
                del self.cache[next(iter(self.cache))]
            self.cache[number] = to_channels(img, self.in_chans)
        return self.cache[number]

    image = __getitem__

    def crop(self, i: int, top: int, left: int, h: int, w: int) -> np.ndarray:
        return self[i][top : top + h, left : left + w]


def dead_leaves(rng: np.random.Generator, size: int) -> np.ndarray:
    """One (size, size, 3) uint8 image."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    # Noise fields with a 1/f^slope amplitude spectrum: cloud-like (2) to grain-like (0.5), periodic, mean 0, deviation 1.
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    f[0, 0] = np.inf
    spectra = np.fft.rfft2(rng.standard_normal((4, size, size))) / f ** rng.uniform(0.5, 2, (4, 1, 1))
    fields = np.fft.irfft2(spectra, (size, size)).astype(np.float32)
    fields /= fields.std(axis=(1, 2), keepdims=True)
    # Colours: luminance, and two opponent axes along which natural colours vary some 4 and 8 times less, heavy-tailed.
    axes = np.array([[1, 1, 1], [1, 0, -1], [0.5, -1, 0.5]])
    mean, spread = rng.uniform(0.25, 0.6), rng.uniform(0.1, 0.3)
    tint, vivid = rng.laplace(0, (0.05, 0.02)), rng.gamma(2, 0.5)

    def colour() -> np.ndarray:
        light = np.clip(mean + spread * rng.standard_normal(), 0.02, 1)
        return light * (np.array([1, *(tint + vivid * rng.laplace(0, (0.12, 0.05)))]) @ axes)

    def texture(rows: slice, cols: slice, r: float) -> np.ndarray:
        """(h, w, 3) pixels: a colour with shading, a noise field and sometimes stripes, all mostly in luminance."""
        yy, xx = y[rows, cols], x[rows, cols]
        angle, field = rng.uniform(0, 2 * np.pi), fields[rng.integers(4)]
        dy, dx = rng.integers(0, size - yy.shape[0] + 1), rng.integers(0, size - yy.shape[1] + 1)
        light = rng.exponential(0.08) * field[dy : dy + yy.shape[0], dx : dx + yy.shape[1]]
        light = (
            light
            + rng.normal(0, 0.25) * (np.cos(angle) * (xx - xx[0, 0]) + np.sin(angle) * (yy - yy[0, 0])) / size
        )
        if rng.random() < 0.25:
            period, turn = 2 + rng.exponential(min(r, 12)), rng.uniform(0, 2 * np.pi)
            wave = np.sin(
                2 * np.pi / period * (np.cos(turn) * xx + np.sin(turn) * yy)
                + rng.normal(0, 1) * field[rows, cols]
            )
            light = light + rng.exponential(0.15) * wave
        return (colour() * (1 + light[..., None])).astype(np.float32)

    img = texture(slice(0, size), slice(0, size), size)
    rmin, rmax, count = np.exp(rng.uniform(np.log(1), np.log(6))), size, 300
    radii = (rmin**-2 - rng.random(count) * (rmin**-2 - rmax**-2)) ** -0.5  # density ~ r^-3
    radii[:20] = np.maximum(radii[:20], rng.uniform(size / 16, size / 2, 20))  # the background: large leaves
    soft = rng.uniform(0.6, 1.4)  # width of an edge in pixels
    for r in radii:
        cy, cx, angle = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0, 2 * np.pi)
        rows = slice(max(int(cy - r - 2), 0), min(int(cy + r + 3), size))
        cols = slice(max(int(cx - r - 2), 0), min(int(cx + r + 3), size))
        v, u = y[rows, cols] - np.float32(cy), x[rows, cols] - np.float32(cx)
        u, v = np.cos(angle) * u + np.sin(angle) * v, np.cos(angle) * v - np.sin(angle) * u
        kind = rng.random()
        if kind < 0.4:  # an ellipse
            q = rng.uniform(0.3, 1)
            outside = (np.sqrt(u * u + (v / q) ** 2) - r) * q
        elif kind < 0.75:  # a polygon: the farthest of its sides
            sides = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
            outside = np.hypot(u, v) - r
            for side in sides:
                outside = np.maximum(outside, np.cos(side) * u + np.sin(side) * v - r * rng.uniform(0.3, 0.8))
        else:  # a bent stroke: hair, twig, blade of grass
            width = max(0.4, r * rng.exponential(0.08))
            outside = np.maximum(
                np.abs(v - rng.normal(0, 0.4) * (u * u / r - r / 3)) - width, np.hypot(u, v) - r
            )
        if r > 8 and rng.random() < 0.5:  # a ragged outline
            outside = outside + rng.uniform(0, 0.15) * r * fields[rng.integers(4)][rows, cols]
        cover = np.clip(0.5 - outside / soft, 0, 1)[..., None]
        img[rows, cols] += cover * (texture(rows, cols, r) - img[rows, cols])
    return (np.clip(img, 0, 1) * 255 + 0.5).astype(np.uint8)


# ---- pairs -----------------------------------------------------------------------------------------------------


def sample_rng(seed: int, number: int, stream: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, number], counter=[0, 0, 0, stream]))


def some(problems: list[str]) -> str:
    more = f"; and {len(problems) - 5} more: python data.py check lists them" if len(problems) > 5 else ""
    return "; ".join(problems[:5]) + more


def as_list(roots) -> list:
    return list(roots) if isinstance(roots, tuple | list) else [] if roots is None else [roots]


def open_source(root: str | Path, in_chans: int, cache_gb: float = 2.0) -> ImageFolder | PackedImages:
    return PackedImages(root, in_chans) if Path(root).is_file() else ImageFolder(root, in_chans, cache_gb)


def open_pairs(
    dataroot_gt, dataroot_lq, scale=1, in_chans=3, filename_tmpl="{}", meta_info_file=None, cache_gb=2.0
) -> tuple[list[list[tuple]], list[str], list[str]]:
    """Opens all roots and pairs their images by name, from the headers alone.

    Returns, for each root, its pairs (gt source, index, lq source or None, index), and all problems and notices.
    """
    gt_roots, lq_roots = as_list(dataroot_gt), as_list(dataroot_lq)
    if in_chans not in (1, 3):
        raise ValueError(f"in_chans={in_chans}: images are read as gray (1) or RGB (3)")
    if lq_roots and len(lq_roots) != len(gt_roots):
        raise ValueError(
            f"dataroot_lq names {len(lq_roots)} folders, dataroot_gt {len(gt_roots)}: one for each"
        )
    if "{}" not in filename_tmpl:
        raise ValueError(
            f"filename_tmpl={filename_tmpl} has no {{}}, which stands for the GT's name, as in {{}}x2"
        )
    wanted = None
    if meta_info_file:  # lines as BasicSR's: name.png (h,w,c)
        lines = Path(meta_info_file).read_text(encoding="utf-8").splitlines()
        wanted = {re.sub(r"\s+\(\d.*$", "", line).strip() for line in lines if line.strip()}
    roots, problems, notices, missing = [], [], [], set(wanted or ())
    for k, gt_root in enumerate(gt_roots):
        gt = open_source(gt_root, in_chans, cache_gb / len(gt_roots) / (2 if lq_roots else 1))
        lq = open_source(lq_roots[k], in_chans, cache_gb / len(gt_roots) / 2) if lq_roots else None
        chosen = [i for i, name in enumerate(gt.names) if wanted is None or name in wanted]
        missing -= set(gt.names)
        problems += [*gt.problems, *(lq.problems if lq else ())]
        for source, root in ((gt, gt_root), *(((lq, lq_roots[k]),) if lq else ())):
            if source.alphas:
                notices.append(f"{root}: {source.alphas} images have an alpha channel, which is dropped")
        if lq is None:
            roots.append([(gt, i, None, i) for i in chosen])
            continue
        by_name = {name: j for j, name in enumerate(lq.names)}
        by_stem = {stem(name): j for name, j in reversed(by_name.items())}  # .jpg may pair with .png
        pairs, unpaired = [], []
        for i in chosen:
            path = Path(gt.names[i])
            partner = path.with_name(filename_tmpl.format(path.stem) + path.suffix).as_posix()
            j = by_name.get(partner, by_stem.get(stem(partner)))
            if j is None:
                unpaired.append(f"{gt_root}/{path.as_posix()} has no partner {lq_roots[k]}/{stem(partner)}.*")
                continue
            (h, w), (lh, lw) = gt.sizes[i], lq.sizes[j]
            if abs(lh * scale - h) >= scale or abs(lw * scale - w) >= scale:
                lq_path = f"{lq_roots[k]}/{lq.names[j]}"
                problems.append(f"{lq_path} is {lh}x{lw}, not 1/{scale} of {gt_root}/{gt.names[i]}, {h}x{w}")
            pairs.append((gt, i, lq, j))
        used = {j for *_, j in pairs}
        if wanted is None:
            extra = [f"{lq_roots[k]}/{name}" for j, name in enumerate(lq.names) if j not in used]
            unpaired += [f"{name} belongs to no image of {gt_root}" for name in extra]
        problems += unpaired
        roots.append(pairs)
    problems += [f"{meta_info_file}: {name} is in no dataroot_gt" for name in sorted(missing)]
    return roots, problems, notices


def stem(name: str) -> str:
    return os.path.splitext(name)[0]


def lq_size(pair: tuple, scale: int) -> tuple[int, int]:
    """The LQ pixels that both images of a pair cover. GT is cropped top left to `scale` times that, as in BasicSR."""
    gt, i, lq, j = pair
    h, w = (length // scale for length in gt.sizes[i])
    return (min(h, lq.sizes[j][0]), min(w, lq.sizes[j][1])) if lq else (h, w)


def check_degradation(name: str) -> None:
    if name not in DEGRADATIONS:
        raise ValueError(f"degradation={name}: choose from {', '.join(DEGRADATIONS)}, or give dataroot_lq")


def reflect(img: np.ndarray, h: int, w: int) -> np.ndarray:
    """Pads to at least (h, w). The edge itself is mirrored too, so that LQ and GT stay aligned at any scale."""
    grow = max(h - img.shape[0], 0), max(w - img.shape[1], 0)
    return np.pad(img, ((0, grow[0]), (0, grow[1]), (0, 0)), "symmetric") if any(grow) else img


class PairedImageDataset(Dataset):
    """Training pairs: dataset[n] -> (lq (C, h, w), gt (C, h * scale, w * scale)), for any n >= 0.

    8-bit pixels are uint8, for the device to divide by 255; all else is float32, 1 is white. Image, crop, flips and
    degradation are a pure function of (seed, n). Epoch n // N visits each of the N images once, or, given
    `dataset_weights`, each sample draws its root with these weights.
    dataroot_gt: folder or packed file, or a tuple of them; None: synthetic images. dataroot_lq: likewise; None: the
    LQ image is made by `degradation`. sigma (of 255), quality (JPEG): a number or a (low, high) range.
    ValueError if anything is wrong with the pairs; remarks are in `notices`.
    """

    # Sample n uses one of the last KEPT synthetic images up to number START + n / EACH: the pool begins small, and each
    # image serves about EACH samples, because drawing one takes as long as many crops.
    START, EACH = 8, 32

    def __init__(
        self,
        dataroot_gt=None,
        dataroot_lq=None,
        degradation: str = "noise",
        sigma: float | tuple[float, float] = 25,
        quality: float | tuple[float, float] = 40,
        scale: int = 1,
        gt_size: int = 128,
        in_chans: int = 3,
        filename_tmpl: str = "{}",
        meta_info_file: str | None = None,
        dataset_weights: tuple[float, ...] | None = None,
        use_hflip: bool = True,
        use_rot: bool = True,
        seed: int = 0,
        cache_gb: float = 2.0,
    ):
        if gt_size % scale:
            raise ValueError(f"gt_size={gt_size} is no multiple of scale={scale}")
        if not dataroot_lq:
            check_degradation(degradation)
            self.degrade, self.margin = DEGRADATIONS[degradation]
        self.options = SimpleNamespace(sigma=sigma, quality=quality, scale=scale)
        self.scale, self.gt_size, self.seed, self.epoch = scale, gt_size, seed, None
        self.use_hflip, self.use_rot = use_hflip, use_rot
        self.synthetic = None
        if dataroot_gt is None:
            self.synthetic = SyntheticImages(seed, max(256, 2 * gt_size), in_chans)
            self.eight_bit, self.notices, self.pairs = True, [], []
            return
        roots, problems, self.notices = open_pairs(
            dataroot_gt, dataroot_lq, scale, in_chans, filename_tmpl, meta_info_file, cache_gb
        )
        if problems:
            raise ValueError(some(problems))
        self.pairs = [pair for root in roots for pair in root]
        self.eight_bit = all(
            gt.depths[i] == 1 and (lq is None or lq.depths[j] == 1) for gt, i, lq, j in self.pairs
        )
        small = sum(min(lq_size(pair, scale)) < gt_size // scale for pair in self.pairs)
        if small:
            self.notices.append(
                f"{small} images are smaller than gt_size={gt_size} and are padded by reflection"
            )
        self.starts = [0, *itertools.accumulate(len(root) for root in roots)]
        self.weights = None
        if dataset_weights is not None:
            if len(dataset_weights) != len(roots) or min(dataset_weights) < 0 or sum(dataset_weights) <= 0:
                raise ValueError(
                    f"dataset_weights={dataset_weights}: one weight >= 0 for each of {len(roots)} roots"
                )
            self.weights = np.cumsum(dataset_weights) / sum(dataset_weights)

    def __len__(self) -> int:
        return len(self.pairs) or SyntheticImages.KEPT

    def pick(self, n: int, u: float, v: float) -> tuple:
        """The pair of sample n; u, v: its random numbers in [0, 1)."""
        if self.synthetic:
            newest = self.START + n // self.EACH
            return self.synthetic, newest - int(u * min(newest + 1, SyntheticImages.KEPT)), None, None
        if self.weights is not None:
            root = int(np.searchsorted(self.weights, u, side="right"))
            return self.pairs[self.starts[root] + int(v * (self.starts[root + 1] - self.starts[root]))]
        epoch, position = divmod(n, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = (
                epoch,
                sample_rng(self.seed, epoch, stream=2).permutation(len(self.pairs)),
            )
        return self.pairs[self.order[position]]

    def __getitem__(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = sample_rng(self.seed, n)
        u = rng.random(7).tolist()
        pair = self.pick(n, *u[:2])
        gt_source, i, lq_source, j = pair
        scale, size = self.scale, self.gt_size // self.scale
        h, w = lq_size(pair, scale) if not self.synthetic else (self.synthetic.size // scale,) * 2
        top, left = (
            int(u[2] * max(h - size + 1, 1)),
            int(u[3] * max(w - size + 1, 1)),
        )  # inclusive, in LQ pixels
        if lq_source:
            gt = gt_source.crop(i, top * scale, left * scale, min(size, h) * scale, min(size, w) * scale)
            gt = reflect(gt, self.gt_size, self.gt_size)
            lq = reflect(lq_source.crop(j, top, left, min(size, h), min(size, w)), size, size)
        else:
            m = max(self.margin, 1)
            t, b = max(top // m * m - self.margin, 0), min(-(-(top + size) // m) * m + self.margin, h)
            l, r = max(left // m * m - self.margin, 0), min(-(-(left + size) // m) * m + self.margin, w)
            gt = gt_source.crop(i, t * scale, l * scale, (b - t) * scale, (r - l) * scale)
            gt = reflect(gt, self.gt_size, self.gt_size)
            lq = self.degrade(gt, rng, self.options)[top - t :, left - l :][:size, :size]
            gt = gt[(top - t) * scale :, (left - l) * scale :][: self.gt_size, : self.gt_size]
        hflip, vflip, transpose = (
            self.use_hflip and u[4] < 0.5,
            self.use_rot and u[5] < 0.5,
            self.use_rot and u[6] < 0.5,
        )
        return self.to_tensor(lq, hflip, vflip, transpose), self.to_tensor(gt, hflip, vflip, transpose)

    def to_tensor(self, img: np.ndarray, hflip: bool, vflip: bool, transpose: bool) -> torch.Tensor:
        """One of the eight symmetries, as in BasicSR, and (H, W, C) -> (C, H, W)."""
        img = img[:: -1 if vflip else 1, :: -1 if hflip else 1]
        img = np.ascontiguousarray(img.transpose(2, 1, 0) if transpose else img.transpose(2, 0, 1))
        return torch.from_numpy(img if self.eight_bit else to_float(img))


class ValidationImages:
    """Whole images: images[i] -> {name, lq: float32 tensor (C, h, w), gt: (h * scale, w * scale, C) uint8 or uint16}.

    Arguments as for PairedImageDataset. Without `val_gt`, `count` synthetic images, the same for every seed.
    Noise is the reference test noise: np.random.seed(0) for each image, normal(0, sigma / 255), BGR, not clipped.
    """

    def __init__(
        self,
        val_gt=None,
        val_lq=None,
        degradation: str = "noise",
        sigma: float = 25,
        quality: float = 40,
        scale: int = 1,
        in_chans: int = 3,
        filename_tmpl: str = "{}",
        count: int = 16,
    ):
        if not val_lq:
            check_degradation(degradation)
            self.degrade = DEGRADATIONS[degradation][0]
        self.options = SimpleNamespace(sigma=sigma, quality=quality, scale=scale)
        if val_gt is None:
            images = SyntheticImages(seed=-1, in_chans=in_chans)
            images.names = [f"synthetic{i:02d}" for i in range(count)]
            images.sizes = [(images.size, images.size)] * count
            self.pairs, self.notices = [(images, i, None, i) for i in range(count)], []
            return
        roots, problems, self.notices = open_pairs(val_gt, val_lq, scale, in_chans, filename_tmpl, cache_gb=0)
        if problems:
            raise ValueError(some(problems))
        self.pairs = [pair for root in roots for pair in root]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> dict:
        gt_source, i, lq_source, j = pair = self.pairs[i]
        h, w = lq_size(pair, self.options.scale)
        gt = np.ascontiguousarray(gt_source.image(i)[: h * self.options.scale, : w * self.options.scale])
        if lq_source:
            lq = lq_source.image(j)[:h, :w]
        else:
            lq = self.degrade(gt, np.random.RandomState(0), self.options)
        lq = torch.from_numpy(np.ascontiguousarray(to_float(lq).transpose(2, 0, 1)))
        return {"name": stem(gt_source.names[i]), "lq": lq, "gt": gt}


# ---- loading ---------------------------------------------------------------------------------------------------


class SampleNumbers(Sampler):
    """Batches of sample numbers, for ever. Iteration `it` uses the samples from it * batch_size on, `batch_size`
    (global) of them, shared out to `accumulate` micro-batches and these to `world` ranks in contiguous slices."""

    def __init__(self, batch_size: int, rank: int = 0, world: int = 1, start: int = 0, accumulate: int = 1):
        if batch_size % (world * accumulate):
            raise ValueError(
                f"batch_size={batch_size} can't be shared by {world} ranks x accumulate={accumulate}"
            )
        self.batch_size, self.rank, self.world = batch_size, rank, world
        self.start, self.accumulate = start, accumulate

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world // self.accumulate
        for it in itertools.count(self.start):
            for micro in range(self.accumulate):
                first = it * self.batch_size + (micro * self.world + self.rank) * share
                yield list(range(first, first + share))


def ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then stops its workers


def train_loader(
    dataset: Dataset, sampler: Sampler, num_workers: int, pin: bool = False, multiprocessing_context=None
) -> DataLoader:
    """Batches of `dataset` in the sampler's order. It ends never, so workers start once; each has one torch thread."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=pin,  # only from pinned memory does a copy to the GPU run beside its computation
        prefetch_factor=4 if num_workers else None,  # absorbs a slow file now and then
        worker_init_fn=ignore_interrupt if num_workers else None,
        multiprocessing_context=multiprocessing_context if num_workers else None,
    )


class Prefetcher:
    """Iterates (lq, gt) float32 on `device`, one batch ahead: a thread loads, copies, and converts there.

    `wait`: seconds that the last next() waited. What fails in a worker is raised by next(); a killed worker too.
    Use it in a with statement, or call close(), to stop the thread and the workers.
    """

    def __init__(self, loader: DataLoader, device: torch.device | str):
        self.device, self.wait = torch.device(device), 0.0
        self.batches, self.stopping = queue.Queue(maxsize=2), threading.Event()
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.loader = iter(loader)  # here, for workers are best forked by the main thread
        self.thread = threading.Thread(target=self.run, name="prefetch", daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            for batch in self.loader:
                with torch.cuda.stream(self.stream):  # without a stream this does nothing
                    batch = [self.to_device(images) for images in batch]
                    event = self.stream.record_event() if self.stream else None
                self.put((batch, event))
                if self.stopping.is_set():
                    return
            self.put(StopIteration())
        except BaseException as error:
            self.put(error)

    def to_device(self, images: torch.Tensor) -> torch.Tensor:
        images = images.to(self.device, non_blocking=True)
        return images.float() / 255 if images.dtype == torch.uint8 else images

    def put(self, item) -> None:
        while not self.stopping.is_set():
            try:
                return self.batches.put(item, timeout=0.1)
            except queue.Full:
                pass

    def __iter__(self) -> "Prefetcher":
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.perf_counter()
        item = self.batches.get()
        self.wait = time.perf_counter() - start
        if isinstance(item, BaseException):
            self.batches.put(item)  # for whoever asks again
            if isinstance(
                item, ValueError
            ):  # from a worker its message is a traceback that ends in our sentence
                raise ValueError(str(item).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
            if "DataLoader worker" in str(item):
                raise RuntimeError(
                    f"{first_line(item)} Short of memory? Try a smaller num_workers."
                ) from None
            raise item
        batch, event = item
        if event:
            torch.cuda.current_stream(self.device).wait_event(event)
            for images in batch:  # made on the side stream: not to be reused before this one is done with it
                images.record_stream(torch.cuda.current_stream(self.device))
        return tuple(batch)

    def close(self) -> None:
        self.stopping.set()
        self.thread.join(timeout=30)
        self.loader = None  # the last reference: the iterator stops its workers

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_) -> None:
        self.close()


# ---- command line ----------------------------------------------------------------------------------------------


def read_options(arguments: list[str]) -> tuple[list[str], dict]:
    """Splits the command line into paths and options; options of a config file come first, --key=value last."""
    paths, options = [], {}
    for argument in arguments:
        if argument.startswith("--"):
            key, _, value = argument[2:].partition("=")
            try:
                options[key] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                options[key] = value
        elif argument.endswith(".py"):
            options = {**runpy.run_path(argument), **options}
        else:
            paths.append(argument)
    return paths, options


def check(options: dict) -> list[str]:
    """Decodes every image of dataroot_gt, dataroot_lq, val_gt, val_lq; returns all problems, prints the notices."""
    problems = []
    for gt, lq in (("dataroot_gt", "dataroot_lq"), ("val_gt", "val_lq")):
        if not options.get(gt):
            continue
        known = {k: options[k] for k in ("scale", "in_chans", "filename_tmpl") if k in options}
        if gt == "dataroot_gt":
            known["meta_info_file"] = options.get("meta_info_file")
        roots, found, notices = open_pairs(options[gt], options.get(lq), **known, cache_gb=0)
        problems += found
        images = dict.fromkeys(
            item for root in roots for gt, i, lq, j in root for item in ((gt, i), (lq, j)) if item[0]
        )

        def broken(image: tuple) -> str | None:
            try:
                image[0].image(image[1])
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            problems += filter(None, tqdm(pool.map(broken, images), total=len(images), leave=False))
        print("\n".join([f"{len(images)} images", *notices]))
    return list(dict.fromkeys(problems))


def preview(options: dict, target: str, count: int = 8) -> None:
    """A sheet of the first training pairs: LQ, enlarged, above GT."""
    known = inspect.signature(PairedImageDataset).parameters
    dataset = PairedImageDataset(**{key: value for key, value in options.items() if key in known})
    columns = []
    for n in range(count):
        lq, gt = (to_float(images.numpy()).transpose(1, 2, 0) for images in dataset[n])
        lq = lq.repeat(dataset.scale, axis=0).repeat(dataset.scale, axis=1)
        columns.append(np.concatenate([lq, gt]))
    sheet = to_channels(np.rint(np.concatenate(columns, axis=1).clip(0, 1) * 255).astype(np.uint8), 3)
    Image.fromarray(sheet).save(target)


def main(arguments: list[str]) -> None:
    paths, options = read_options(arguments[1:])
    command = arguments[0] if arguments else ""
    if command == "pack" and len(paths) == 2:
        pack(*paths)
    elif command == "check" and (options or paths):
        options.update(zip(("dataroot_gt", "dataroot_lq"), paths, strict=False))
        problems = check(options)
        print("\n".join(problems) or "no problems")
        sys.exit(1 if problems else 0)
    elif command == "preview" and len(paths) == 1:
        preview(options, paths[0])
    else:
        sys.exit(__doc__.strip())


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
