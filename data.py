"""Everything between the disk and the training step: read, pair, degrade, crop, pack and prefetch images.

    python data.py pack DIV2K_HR div2k.npy                # decode a folder once, into one memory-mapped file
    python data.py check configs/denoise.py               # or: check GT [LQ] --scale=2 --filename_tmpl={}x2
    python data.py preview configs/denoise.py sheet.png   # training pairs, as the network will see them

Images are numpy arrays (H, W, C), RGB or gray, uint8 or uint16; source[i] is one, of a folder, a packed file
or a generator. All that is random about training sample n is a pure function of (seed, n).
"""

import io
import itertools
import json
import math
import os
import queue
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

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


# ---- reading ----
def list_images(root: str | Path) -> list[Path]:
    """Image files below `root`, sorted. Hidden ones are skipped; folders met again through a link, too."""
    paths, entered = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        again = os.path.realpath(folder) in entered
        entered.add(os.path.realpath(folder))
        subfolders[:] = [] if again else sorted(name for name in subfolders if name[0] != ".")
        visible = [] if again else [Path(folder, name) for name in files if name[0] != "."]
        paths += [path for path in visible if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise ValueError(f"{root} is neither a folder with images nor a packed file")
    return sorted(paths)


def open_image(path: str | Path) -> tuple[Image.Image, str, int]:
    """The image, not decoded; Pillow's name of its raw pixels, such as 'RGB;16B'; its EXIF orientation."""
    im = Image.open(path, formats=("BMP", "JPEG", "PNG", "TIFF", "WEBP"))  # others may lose 16 bits in Pillow
    layout = im.tile[0][3] if im.tile else ""  # a tile: codec, extents, offset, layout or (layout, ...)
    layout = layout if isinstance(layout, str) else layout[0]
    bits = max(im.tag_v2.get(258, (8,))) if im.format == "TIFF" else 8
    if im.mode == "F" or bits > 16 or (bits > 8 and im.mode[0] != "I" and ";16" not in layout):
        raise ValueError("save it with 8 or 16 bits per channel, interleaved")
    return im, layout, Image.Image.getexif(im).get(0x0112, 1)  # for PNG im.getexif() would decode the image


def decode(path: str | Path) -> np.ndarray:
    """(H, W, 3) RGB or (H, W, 1) gray as in the file, uint8 or uint16; alpha dropped, orientation applied."""
    im, layout, turn = open_image(path)
    if im.mode[0] == "I":
        img = np.asarray(im).astype(np.uint16)
    elif ";16" in layout:
        # Pillow keeps the high byte of 16-bit colour; told the other byte order, it keeps the low byte.
        little = layout[-1] == "L" or (layout[-1] == "N" and sys.byteorder == "little")
        swapped, low = layout[:-1] + ("B" if little else "L"), open_image(path)[0]
        swap = [swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:]) for tile in low.tile]
        low.tile = [tile._replace(args=args) for tile, args in zip(low.tile, swap, strict=True)]
        img = np.asarray(im).astype(np.uint16) << 8 | np.asarray(low)
    else:  # a palette may have transparency, which only RGBA can take
        im = im.convert("RGBA") if im.mode in ("P", "PA") else im
        mode = "L" if im.mode in ("1", "L", "LA") else "RGB"
        img = np.asarray(im if im.mode == mode else im.convert(mode))
    img = img[..., :3] if img.ndim == 3 else img[..., None]
    img = img.swapaxes(0, 1) if turn > 4 else img
    flip_h, flip_w = (-1 if turn in turns else 1 for turns in ((3, 4, 7, 8), (2, 3, 6, 7)))
    return np.ascontiguousarray(img[::flip_h, ::flip_w])


def read_image(path: str | Path, in_chans: int | None = None) -> np.ndarray:
    """(H, W, in_chans) uint8, or uint16 from 16-bit files; in_chans=None: as in the file."""
    try:
        return to_channels(decode(path), in_chans)
    except Exception as error:  # Pillow raises some ten kinds for a damaged file
        raise ValueError(f"{path} can't be read ({error!r})") from None


def read_header(path: Path, whole: bool = False) -> tuple[tuple[int, int, int], int, bool] | str:
    """((H, W, C), bytes per value, has alpha), or what is wrong. Decodes nothing unless `whole`."""
    try:
        im, layout, turn = open_image(path)
        with im:
            wide = im.mode[0] == "I" or ";16" in layout
            alpha = "A" in im.getbands() or "transparency" in im.info
            shape = (*(im.size if turn > 4 else im.size[::-1]), 1 if im.mode[0] in "1LI" else 3)
        return (shape, 1 + wide, alpha) if not whole or decode(path) is not None else ""
    except Exception as error:
        return f"{path} can't be read ({error!r})"


def to_channels(img: np.ndarray, in_chans: int | None) -> np.ndarray:
    """(H, W, C) -> (H, W, in_chans). Gray is the BT.601 luma, rounded like Pillow's convert('L')."""
    if in_chans in (None, img.shape[2]):
        return img
    if in_chans == 3:
        return np.repeat(img, 3, axis=2)
    luma = (img.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32) + 0x8000) >> 16
    return luma.astype(img.dtype)[..., None]


def to_float(img: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> float32 in [0, 1]; float32 as it is."""
    return img.astype(np.float32) / np.float32(np.iinfo(img.dtype).max) if img.dtype.kind == "u" else img


# ---- degradations ----
def imresize(img: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's bicubic imresize: (H, W, C) -> (ceil(H * scale), ceil(W * scale), C), bit for bit on uint8.

    Antialiased, a = -0.5, borders mirrored; integers are rounded half up after each dimension, height first.
    """
    step = round(1 / scale, 12)  # pixels per output pixel; exact if whole, so that equal phases weigh equally
    width = max(step, 1.0)  # of the kernel: it widens to shrink
    for axis in (0, 1):
        length = img.shape[axis]
        centre = np.arange(math.ceil(round(length / step, 9))) * step + 0.5 * (step - 1)
        taps = np.floor(centre - 2 * width)[:, None] + np.arange(math.ceil(4 * width) + 2)
        d = np.abs(centre[:, None] - taps) / width
        weights = np.where(d <= 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2) * (d <= 2)
        weights /= weights.sum(axis=1, keepdims=True)
        taps = taps.astype(int) % (2 * length)
        taps = np.minimum(taps, 2 * length - 1 - taps)
        rows, out = np.moveaxis(img, axis, 0), 0.0
        for tap, weight in zip(
            taps.T, weights.T, strict=True
        ):  # one by one: their order decides how ties round
            out = out + weight[:, None, None] * rows[tap] if weight.any() else out
        if img.dtype.kind == "u":
            out = np.clip(np.floor(out + 0.5), 0, np.iinfo(img.dtype).max)
        img = np.moveaxis(out, 0, axis).astype(img.dtype)
    return img


def draw(value: float | tuple[float, float], rng) -> float:
    """The number itself, or one drawn uniformly from a (low, high) range."""
    return rng.uniform(*value) if isinstance(value, tuple | list) else value


def add_noise(gt: np.ndarray, rng, options) -> np.ndarray:
    """Gaussian, of deviation sigma / 255, not clipped; drawn in BGR order, like the reference test noise."""
    noise = rng.normal(0, draw(options.sigma, rng) / 255, gt.shape)
    return (to_float(gt) + noise[..., ::-1]).astype(np.float32)


def compress(gt: np.ndarray, rng, options) -> np.ndarray:
    """JPEG, 4:2:0 if in colour: the same pixels as from OpenCV, with which SwinIR was trained and tested."""
    img = gt if gt.dtype == np.uint8 else np.rint(gt / 257).astype(np.uint8)
    file, quality = io.BytesIO(), round(draw(options.quality, rng))
    Image.fromarray(img[..., 0] if img.shape[2] == 1 else img).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(gt.shape)


def downscale(gt: np.ndarray, rng, options) -> np.ndarray:
    return imresize(gt, 1 / options.scale)


# name: (pure function (gt, rng, options) -> lq, margin). gt: (H, W, C) uint8 or uint16; lq: (H, W) / scale,
# likewise or float32 in [0, 1]. A crop is degraded with `margin` LQ pixels around it, from a multiple of it,
# and so equals the crop of the degraded image: 16 is a block of 4:2:0 JPEG, 4 the reach of the cubic kernel.
DEGRADATIONS = {
    "noise": (add_noise, 0),
    "jpeg": (compress, 16),
    "bicubic": (downscale, 4),
}


# ---- sources ----
class ImageFolder:
    """The image files below `root`. Decoded ones stay in memory while `cache_gb`, divided by workers, lasts.

    At first headers alone are read, or `whole` files; `problems` has a sentence for each that can't be.
    """

    def __init__(self, root: str | Path, cache_gb: float = 2.0, whole: bool = False):
        self.root, self.cache_gb, self.cache, self.free = Path(root), cache_gb, {}, None
        paths = list_images(root)
        with ThreadPoolExecutor(16) as pool:  # many at a time, for to open a file is mostly to wait for it
            headers = pool.map(read_header, paths, itertools.repeat(whole))
            headers = list(tqdm(headers, str(root), len(paths), leave=False, disable=not whole))
        good = [k for k, header in enumerate(headers) if not isinstance(header, str)]
        self.names = [paths[k].relative_to(root).as_posix() for k in good]
        self.shapes, self.depths, alphas = ([headers[k][field] for k in good] for field in range(3))
        self.problems = [header for header in headers if isinstance(header, str)]
        self.notices = [f"{root}: alpha is dropped from {sum(alphas)} images"] if any(alphas) else []

    def __getitem__(self, i: int) -> np.ndarray:
        if i in self.cache:
            return self.cache[i]
        img = read_image(self.root / self.names[i])
        if self.free is None:  # every worker decodes for itself, and has its share
            self.free = self.cache_gb * 1e9 / getattr(get_worker_info(), "num_workers", 1)
        if img.nbytes <= self.free:  # what is in stays in: with shuffled epochs, replacing gains nothing
            self.cache[i], self.free = img, self.free - img.nbytes
        return img


class PackedImages:
    """A file made by pack(): a flat .npy of uint8: the pixels of all images, an index, its length, and MAGIC.

    An image is a view of the file: a crop reads its own rows only. ValueError if the file is not whole.
    """

    MAGIC, problems, notices = b"nanoSwIR", (), ()

    def __init__(self, path: str | Path):
        self.path = path
        try:
            self.data = np.load(path, mmap_mode="r").view(np.ndarray)  # slices of np.memmap take longer
            if self.data[-8:].tobytes() != self.MAGIC:
                raise ValueError
            length = int.from_bytes(self.data[-16:-8].tobytes(), "little")
            index = json.loads(self.data[-16 - length : -16].tobytes())
            self.names, self.shapes, self.depths, self.starts = index
        except (OSError, ValueError, EOFError):
            raise ValueError(f"{path} is not a whole packed file: make it by python data.py pack") from None

    def __reduce__(self) -> tuple:  # a spawned worker maps the file anew, where pickle would copy it
        return PackedImages, (self.path,)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.ndarray(self.shapes[i], f"<u{self.depths[i]}", self.data, self.starts[i])


def pack(source: str | Path, target: str | Path) -> None:
    """Decodes the folder `source` into the file `target`, which bears its name only once it is whole."""
    folder, target = ImageFolder(source), Path(target)
    if folder.problems:
        raise ValueError("; ".join(folder.problems))
    sizes = [math.prod(shape) * depth for shape, depth in zip(folder.shapes, folder.depths, strict=True)]
    *starts, pixels = itertools.accumulate(sizes, initial=0)
    index = json.dumps([folder.names, folder.shapes, folder.depths, starts]).encode()
    total, free = pixels + len(index) + 16, shutil.disk_usage(target.absolute().parent).free
    print(f"{target}: {len(sizes)} images, {total / 1e9:.2f} of {free / 1e9:.2f} GB free", *folder.notices)
    if total > 0.98 * free:
        raise ValueError(f"{target} would fill the disk: make room, or pack to another one")
    partial = target.with_name(target.name + ".partial")
    paths = [folder.root / name for name in folder.names]
    with partial.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in tqdm(range(0, len(paths), 16), "16 images each"):  # that many in memory
            images = pool.map(read_image, paths[start : start + 16])
            for path, size, img in zip(paths[start:], sizes[start:], images, strict=False):
                if img.nbytes != size:
                    raise ValueError(f"{path} has changed meanwhile: pack again")
                file.write(img.astype(f"<u{img.itemsize}").tobytes())
        file.write(index + len(index).to_bytes(8, "little") + PackedImages.MAGIC)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)


class SyntheticImages:
    """Dead leaves: images[number] is (size, size, in_chans) uint8, a pure function of (seed, number).

    Occluding shapes of power-law size, textures, shading, natural colours: enough to train real denoisers
    (Achddou et al., "Synthetic images as a regularity prior"; VibrantLeaves, arXiv 2504.10201).
    """

    KEPT = 256  # images in memory, 50 MB in each worker

    def __init__(self, seed: int = 0, size: int = 256, in_chans: int = 3):
        self.seed, self.size, self.in_chans, self.cache = seed, size, in_chans, {}

    def __getitem__(self, number: int) -> np.ndarray:
        if number not in self.cache:
            if len(self.cache) == self.KEPT:
                del self.cache[next(iter(self.cache))]
            img = dead_leaves(sample_rng(self.seed, number, 1), self.size)
            self.cache[number] = to_channels(img, self.in_chans)
        return self.cache[number]


def dead_leaves(rng: np.random.Generator, size: int, count: int = 300) -> np.ndarray:
    """(size, size, 3) uint8: a ground and `count` leaves, painted from back to front."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    # Noise with the amplitude spectrum 1 / frequency^p, from grain (p = 0.5) to clouds (2); deviation 1.
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    f[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((3, size, size), np.float32))
    noise = np.fft.irfft2(noise / f ** rng.uniform(0.5, 2, (3, 1, 1)), (size, size)).astype(np.float32)
    noise /= noise.std(axis=(1, 2), keepdims=True)
    # Colours differ in luminance, and far less along two opponent axes, from the tint of the image.
    mean, spread, smallest, soft = rng.uniform((0.25, 0.1, 0, 0.6), (0.6, 0.3, math.log(6), 1.4))
    tint, vivid = rng.laplace(0, (0.05, 0.02)), rng.gamma(2, 0.5)
    chroma = tint + vivid * rng.laplace(0, (0.12, 0.05), (count + 1, 2))
    colours = np.insert(chroma, 0, 1, axis=1) @ [[1, 1, 1], [1, 0, -1], [0.5, -1, 0.5]]
    colours = (colours * rng.normal(mean, spread, (count + 1, 1)).clip(0.02, 1)).astype(np.float32)
    r0 = math.exp(-2 * smallest)
    radii = (r0 - rng.random(count + 1) * (r0 - size**-2)) ** -0.5  # density ~ r^-3
    radii[:16] = [2 * size, *rng.uniform(size / 16, size / 3, 15)]  # the ground, and what covers most of it
    img = np.zeros((size, size, 3), np.float32)
    leaves = zip(radii.tolist(), colours, rng.random((count + 1, 12)).tolist(), strict=True)
    for r, colour, (cy, cx, turn, kind, *u) in leaves:
        cy, cx, cos, sin = cy * size, cx * size, math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
        box = slice(max(int(cy - r - 2), 0), int(cy + r + 3)), slice(max(int(cx - r - 2), 0), int(cx + r + 3))
        h, w = y[box] - cy, x[box] - cx
        a, b = cos * w + sin * h, cos * h - sin * w
        out = np.hypot(a, b) - r  # distance from the outline in pixels, < 0 inside
        if kind < 0.4:  # an ellipse
            out = (np.hypot(a, b / (0.3 + 0.7 * u[0])) - r) * (0.3 + 0.7 * u[0])
        elif kind < 0.75:  # a polygon with round corners
            for side in rng.uniform(0, 2 * math.pi, 3 + int(4 * u[0])).tolist():
                far = math.cos(side) * a + math.sin(side) * b - r * (0.3 + 0.5 * math.cos(side) ** 2)
                np.maximum(out, far, out=out)
        else:  # a bent stroke: a hair, a twig
            bend = (u[0] - 0.5) * (a * a / r - r / 3)
            np.maximum(out, np.abs(b - bend) - max(0.4, -0.08 * r * math.log(1 - u[1])), out=out)
        grain, light = noise[int(3 * u[2])], np.float32(1)
        if r > 4:  # shading, and noise or stripes; the amplitudes are exponential
            if u[3] < 0.5:  # ragged
                out += 0.3 * u[3] * r * grain[box]
            light = 1 - 0.08 * math.log(1 - u[4]) * grain[:: 1 if u[5] < 0.5 else -1].T[box]
            light += (u[6] - 0.5) / size * a
            if u[7] < 0.25:
                wave = 2 * math.pi / (2 - min(r, 12) * math.log(1 - 4 * u[7]))
                light -= 0.15 * math.log(1 - 0.99 * u[4]) * np.sin(wave * a + wave * b * u[6] + grain[box])
            light = light[..., None]
        cover = (0.5 - out / soft).clip(0, 1)[..., None] if r < 2 * size else 1
        img[box] += cover * (light * colour - img[box])
    return (img.clip(0, 1) * 255 + 0.5).astype(np.uint8)


# ---- pairs ----
def sample_rng(seed: int, number: int, stream: int = 0, reuse=None) -> np.random.Generator:
    """A pure function of the numbers. To set the state of a generator takes a tenth of making one."""
    rng = reuse or np.random.Generator(np.random.Philox(key=0))
    state = {"counter": np.array([0, 0, 0, stream], "u8"), "key": np.array([seed % 2**64, number], "u8")}
    unused = {"buffer": np.zeros(4, "u8"), "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
    rng.bit_generator.state = {"bit_generator": "Philox", "state": state, **unused}
    return rng


def open_pairs(gt_roots, lq_roots=(), scale=1, filename_tmpl="{}", meta_info_file=None, **folder_options):
    """Opens all roots, folders or packed files, and pairs their images by name, from the headers alone.

    Returns, for each root, its pairs (gt source, index, lq source or None, index); all problems; all notices.
    """
    if "{}" not in filename_tmpl or (lq_roots and len(lq_roots) != len(gt_roots)):
        raise ValueError("give one dataroot_lq for each dataroot_gt, and a filename_tmpl like {}x2")
    lines = Path(meta_info_file).read_text("utf-8").splitlines() if meta_info_file else []
    listed = {line.rsplit(" (", 1)[0].strip() for line in lines} - {""}  # a line: name.png (h,w,c)
    groups, problems, notices, missing = [], [], [], set(listed)
    for gt_root, lq_root in itertools.zip_longest(gt_roots, lq_roots):
        roots = [root for root in (gt_root, lq_root) if root]
        sources = [PackedImages(r) if Path(r).is_file() else ImageFolder(r, **folder_options) for r in roots]
        for source in sources:
            problems += source.problems
            notices += source.notices
        gt, lq = (*sources, None)[:2]
        missing -= set(gt.names)
        pairs = [(gt, i, lq, i) for i, name in enumerate(gt.names) if not meta_info_file or name in listed]
        groups.append(pairs)
        if not lq:
            continue
        by_name = {os.path.splitext(name)[0]: j for j, name in enumerate(lq.names)}
        by_name.update(
            {name: j for j, name in enumerate(lq.names)}
        )  # .png may pair with .jpg, but rather .png
        for k, (_, i, _, _) in enumerate(pairs):
            path = Path(gt.names[i])
            partner = path.with_name(filename_tmpl.format(path.stem)).as_posix()
            j = by_name.get(partner + path.suffix, by_name.get(partner))
            pairs[k] = (gt, i, lq, j)
            if j is None:
                problems.append(f"{gt_root}/{path} has no partner {partner}.* in {lq_root}")
                continue
            (h, w, _), (lh, lw, _) = gt.shapes[i], lq.shapes[j]
            if max(abs(lh * scale - h), abs(lw * scale - w)) >= scale:
                sizes = f"{lh}x{lw}, not 1/{scale} of {h}x{w}"
                problems.append(f"{lq_root}/{lq.names[j]} and {gt_root}/{path} do not match: {sizes}")
        extra = set(range(len(lq.names))) - {j for *_, j in pairs} if not meta_info_file else ()
        problems += [f"{lq_root}/{lq.names[j]} has no partner in {gt_root}" for j in sorted(extra)]
    return groups, problems + [f"{meta_info_file}: {name} is missing" for name in sorted(missing)], notices


def as_tuple(roots) -> tuple:
    roots = roots.split(",") if isinstance(roots, str) else [roots] if isinstance(roots, Path) else roots
    return tuple(roots or ())


class PairedImageDataset(Dataset):
    """Training pairs: dataset[n] -> (lq (C, h, w), gt (C, h * scale, w * scale)), for any n >= 0.

    8-bit pixels stay uint8, for the device to divide by 255; all else is float32, where 1 is white.
    dataroot_gt: a folder, a packed file, or several; None: synthetic images. dataroot_lq: likewise; None:
    made by `degradation`; its `sigma` (of 255) and `quality` (of JPEG) are numbers or (low, high) ranges.
    An epoch visits each image once; with `dataset_weights` each sample draws one of the roots.
    ValueError if anything is wrong with the pairs; `notices` has what the user should know.
    """

    def __init__(
        self, dataroot_gt=None, dataroot_lq=None, degradation="noise", sigma=25, quality=40, scale=1,
        gt_size=128, in_chans=3, filename_tmpl="{}", meta_info_file=None, dataset_weights=None,
        use_hflip=True, use_rot=True, seed=0, cache_gb=2.0,
    ):  # fmt: skip
        gt_roots, lq_roots = as_tuple(dataroot_gt), as_tuple(dataroot_lq)
        if gt_size % scale:
            raise ValueError(f"gt_size={gt_size} is no multiple of scale={scale}")
        if not lq_roots and degradation not in DEGRADATIONS:
            raise ValueError(f"degradation={degradation}: not one of {', '.join(DEGRADATIONS)}")
        self.degrade, self.margin = (None, 0) if lq_roots else DEGRADATIONS[degradation]
        self.options = SimpleNamespace(sigma=sigma, quality=quality, scale=scale)
        self.scale, self.gt_size, self.in_chans, self.seed, self.epoch = scale, gt_size, in_chans, seed, None
        self.use_hflip, self.use_rot, self.rng = use_hflip, use_rot, sample_rng(0, 0)
        share = {"cache_gb": cache_gb / max(len(gt_roots + lq_roots), 1)}
        groups, problems, self.notices = open_pairs(
            gt_roots, lq_roots, scale, filename_tmpl, meta_info_file, **share
        )
        if problems:
            more = f"; {len(problems) - 5} more: see python data.py check" if len(problems) > 5 else ""
            raise ValueError("; ".join(problems[:5]) + more)
        self.pairs = [pair for pairs in groups for pair in pairs]
        self.synthetic = None if gt_roots else SyntheticImages(seed, max(256, 2 * gt_size), in_chans)
        depths = {gt.depths[i] for gt, i, _, _ in self.pairs} | {
            lq.depths[j] for _, _, lq, j in self.pairs if lq
        }
        self.eight_bit = 2 not in depths
        small = sum(min(gt.shapes[i][:2]) < gt_size for gt, i, _, _ in self.pairs)
        if small:
            self.notices.append(f"{small} images are smaller than gt_size={gt_size}: padded by reflection")
        self.weights, self.starts = dataset_weights, list(itertools.accumulate(map(len, groups), initial=0))
        if dataset_weights and len(dataset_weights) != len(groups):
            raise ValueError(f"dataset_weights={dataset_weights}: give one for each of {len(groups)} roots")

    def __len__(self) -> int:
        return len(self.pairs) or SyntheticImages.KEPT

    def pick(self, n: int, u: float, v: float) -> tuple:
        """The pair of sample n, whose random numbers in [0, 1) are u and v."""
        if self.synthetic:  # a pool, small at first, which an image joins every 64 samples
            newest = 8 + n // 64
            return self.synthetic, newest - int(u * min(newest + 1, SyntheticImages.KEPT)), None, None
        if self.weights:
            root = np.searchsorted(np.cumsum(self.weights), u * sum(self.weights), side="right")
            return self.pairs[self.starts[root] + int(v * (self.starts[root + 1] - self.starts[root]))]
        epoch, position = divmod(n, len(self.pairs))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, sample_rng(self.seed, epoch, 2).permutation(len(self.pairs))
        return self.pairs[self.order[position]]

    def open(self, pair: tuple) -> tuple[np.ndarray, np.ndarray | None, int, int]:
        """GT, LQ or None, and the size in LQ pixels of what both show, aligned top left as in BasicSR."""
        gt, i, lq, j = pair
        gt, lq = gt[i], lq[j] if lq else None
        h, w = gt.shape[0] // self.scale, gt.shape[1] // self.scale
        return (gt, lq, h, w) if lq is None else (gt, lq, min(h, lq.shape[0]), min(w, lq.shape[1]))

    def __getitem__(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = sample_rng(self.seed, n, reuse=self.rng)
        u = rng.random(7).tolist()
        gt, lq, h, w = self.open(self.pick(n, *u[:2]))
        scale, size, margin, block = self.scale, self.gt_size // self.scale, self.margin, max(self.margin, 1)
        top, left = int(u[2] * max(h - size + 1, 1)), int(u[3] * max(w - size + 1, 1))  # LQ pixels, inclusive
        y, x = max(top // block * block - margin, 0), max(left // block * block - margin, 0)
        bottom = min(-(-(top + size) // block) * block + margin, h)
        right = min(-(-(left + size) // block) * block + margin, w)
        gt = to_channels(gt[y * scale : bottom * scale, x * scale : right * scale], self.in_chans)
        gt = gt if self.margin else reflect(gt, self.gt_size)  # first, for noise should not be mirrored
        lq = self.degrade(gt, rng, self.options) if lq is None else lq[y:bottom, x:right]
        lq = reflect(to_channels(lq[top - y :, left - x :][:size, :size], self.in_chans), size)
        gt = gt[(top - y) * scale :, (left - x) * scale :][: self.gt_size, : self.gt_size]
        gt = reflect(gt, self.gt_size)
        return self.augment(lq, *u[4:]), self.augment(gt, *u[4:])

    def augment(self, img: np.ndarray, u: float, v: float, t: float) -> torch.Tensor:
        """(H, W, C) -> (C, H, W), in one of BasicSR's eight symmetries."""
        img = img[:: -1 if self.use_rot and v < 0.5 else 1, :: -1 if self.use_hflip and u < 0.5 else 1]
        img = img.transpose((2, 1, 0) if self.use_rot and t < 0.5 else (2, 0, 1))
        return torch.from_numpy(np.ascontiguousarray(img if self.eight_bit else to_float(img)))


def reflect(img: np.ndarray, size: int) -> np.ndarray:
    """Pads to at least (size, size). The edge is mirrored too, lest LQ and GT be shifted."""
    h, w = max(size - img.shape[0], 0), max(size - img.shape[1], 0)
    return np.pad(img, ((0, h), (0, w), (0, 0)), "symmetric") if h or w else img


class ValidationImages(PairedImageDataset):
    """Whole images: images[i] -> {name, lq: float32 (C, h, w), gt: array (h * scale, w * scale, C) as read}.

    If `val_gt` is None there are `count` synthetic images, the same for every seed. Noise is the reference
    test noise, np.random.seed(0) before each image. GT is cut to multiples of `scale`.
    """

    def __init__(self, val_gt=None, val_lq=None, count: int = 16, **options):
        super().__init__(val_gt, val_lq, gt_size=options.get("scale", 1), seed=-1, cache_gb=0, **options)
        self.pairs = self.pairs or [(self.synthetic, i, None, i) for i in range(count)]

    def __getitem__(self, i: int) -> dict:
        (gt, lq, h, w), (source, k, _, _) = self.open(self.pairs[i]), self.pairs[i]
        gt = to_channels(gt[: h * self.scale, : w * self.scale], self.in_chans).copy()
        lq = self.degrade(gt, np.random.RandomState(0), self.options) if lq is None else lq[:h, :w]
        lq = to_float(to_channels(lq, self.in_chans))
        name = f"synthetic{i:02d}" if self.synthetic else os.path.splitext(source.names[k])[0]
        return {"name": name, "lq": torch.from_numpy(lq.transpose(2, 0, 1).copy()), "gt": gt}


# ---- loading ----
class SampleNumbers(Sampler):
    """Batches of sample numbers, without end: iteration `it` has [it * batch_size, (it + 1) * batch_size).

    In it each of `accumulate` micro-batches, and in these each of `world` ranks, takes a contiguous slice.
    """

    def __init__(self, batch_size: int, rank: int = 0, world: int = 1, start: int = 0, accumulate: int = 1):
        if batch_size % (world * accumulate):
            raise ValueError(f"batch_size={batch_size} is no multiple of ranks x accumulate")
        self.size, self.step = batch_size // (world * accumulate), world
        self.first = start * accumulate * world + rank

    def __iter__(self) -> Iterator[list[int]]:
        for k in itertools.count(self.first, self.step):
            yield list(range(k * self.size, (k + 1) * self.size))


def ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which then ends its workers


def train_loader(dataset, sampler, num_workers: int, pin=False, multiprocessing_context=None) -> DataLoader:
    """Batches in the sampler's order. They never end: workers start once. PyTorch gives each one thread."""
    workers = {"worker_init_fn": ignore_interrupt, "multiprocessing_context": multiprocessing_context}
    workers["prefetch_factor"] = 4  # batches ahead per worker: a slow file now and then does no harm
    # Only from pinned memory does a copy to the GPU run beside its computation.
    kwargs = {"num_workers": num_workers, "pin_memory": pin, **(workers if num_workers else {})}
    return DataLoader(dataset, batch_sampler=sampler, **kwargs)


class Prefetcher:
    """Iterates (lq, gt), float32 on `device`, loaded and copied ahead by a thread, on CUDA in a side stream.

    `wait`: the seconds that the last next() waited. It raises what fails in thread or worker: ValueError
    with the dataset's sentence, RuntimeError for a killed one. close(), or the end of `with`, stops them all.
    """

    def __init__(self, loader: DataLoader, device: torch.device | str):
        self.device, self.wait, self.closed = torch.device(device), 0.0, False
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.ready, self.room = queue.SimpleQueue(), threading.Semaphore(2)  # two batches on the device
        self.batches = iter(loader)  # here, because processes are best forked by the main thread
        self.thread = threading.Thread(target=self.load, daemon=True)
        self.thread.start()

    def load(self) -> None:
        try:
            for batch in self.batches:
                self.room.acquire()
                if self.closed:
                    return
                with torch.cuda.stream(self.stream):  # None changes nothing
                    batch = [images.to(self.device, non_blocking=True) for images in batch]
                    batch = [x.float() / 255 if x.dtype == torch.uint8 else x for x in batch]
                    self.ready.put((batch, self.stream and self.stream.record_event()))
            self.ready.put(StopIteration())
        except Exception as error:
            self.ready.put(error)

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.perf_counter()
        item = self.ready.get()
        self.wait = time.perf_counter() - start
        self.room.release()
        if isinstance(item, Exception):
            self.ready.put(item)  # for whoever asks again
        if isinstance(item, ValueError):  # a worker's is a whole traceback that ends in the sentence
            raise ValueError(str(item).strip().splitlines()[-1].removeprefix("ValueError: ")) from None
        if isinstance(item, Exception):
            raise item
        batch, copied = item
        if copied:
            torch.cuda.current_stream(self.device).wait_event(copied)
            for images in batch:  # lest the side stream reuse their memory while they are in use
                images.record_stream(torch.cuda.current_stream(self.device))
        return tuple(batch)

    def close(self, *_) -> None:
        self.closed = True
        self.room.release()
        self.thread.join(timeout=30)
        self.batches = None  # the last reference to the loader's iterator, with which its workers end

    def __enter__(self) -> "Prefetcher":
        return self

    __iter__, __exit__ = __enter__, close


# ---- command line ----
def check(options: dict) -> list[str]:
    """Decodes all images of dataroot_gt, dataroot_lq, val_gt, val_lq. Prints notices, returns problems."""
    problems, known = [], {k: options[k] for k in ("scale", "filename_tmpl") if k in options}
    for gt, lq, meta in (("dataroot_gt", "dataroot_lq", "meta_info_file"), ("val_gt", "val_lq", "")):
        roots = as_tuple(options.get(gt)), as_tuple(options.get(lq))
        groups, found, notices = open_pairs(*roots, **known, meta_info_file=options.get(meta), whole=True)
        problems += found
        print(f"{gt}: {sum(map(len, groups))} images or pairs", *notices, sep="\n")
    return problems


def preview(options: dict, target: str, count: int = 8) -> None:
    """A sheet of the first training pairs: LQ, enlarged, above GT."""
    known = PairedImageDataset.__init__.__code__.co_varnames
    dataset, columns = PairedImageDataset(**{k: v for k, v in options.items() if k in known}), []
    for n in range(count):
        lq, gt = (to_float(images.numpy()) for images in dataset[n])
        columns.append(np.concatenate([lq.repeat(dataset.scale, 1).repeat(dataset.scale, 2), gt], axis=1))
    sheet = np.rint(np.concatenate(columns, axis=2).clip(0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(to_channels(sheet, 3)).save(target)


def main(command: str = "", *arguments: str) -> None:
    paths = [argument for argument in arguments if not argument.startswith("--")]
    options = runpy.run_path(paths.pop(0)) if paths and paths[0].endswith(".py") else {}
    for flag in (argument[2:] for argument in arguments if argument.startswith("--")):
        key, _, value = flag.partition("=")
        options[key] = int(value) if value.isdigit() else value
    if command == "pack" and len(paths) == 2:
        pack(*paths)
    elif command == "check" and (paths or options):
        problems = check({**options, **dict(zip(("dataroot_gt", "dataroot_lq"), paths, strict=False))})
        sys.exit("\n".join([*problems, f"{len(problems)} problems"]) if problems else print("no problems"))
    elif command == "preview" and len(paths) == 1:
        preview(options, paths[0])
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
