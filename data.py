"""Everything between the disk and the training step: read, pair, degrade, crop, pack and prefetch.

    python data.py check photos                           # or: check GT LQ --scale=2
    python data.py check train.py configs/jpeg.py --dataroot_gt=photos    # all that a run will read
    python data.py preview configs/denoise.py sheet.png   # training pairs, as the network sees them
    python data.py pack DIV2K_HR div2k.npy                # decode once, into a memory-mapped file

An image is an array (H, W, C), RGB or gray, uint8 or uint16. GT is the ground truth, LQ its
low-quality partner, `scale` times smaller. Sample n is a pure function of (seed, n).
"""

import codecs
import contextlib
import errno
import inspect
import io
import json
import math
import os
import shutil
import signal
import sys
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import PIL
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm


class UserError(ValueError):
    """A mistake that the user can correct. The message is one sentence that says how."""


class UnreadableImage(UserError):
    """An image file that is damaged, or whose layout can't be read exactly."""


# Image files

ORIENTATION = 0x0112  # EXIF's tag
OLD_PILLOW = ""
if int(PIL.__version__.split(".")[0]) < 11:
    OLD_PILLOW = f"Pillow {PIL.__version__} is too old: pip install --upgrade pillow (11 or later)"
# No limits of size: these are the user's own files.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**31 - 1

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")  # Pillow's names
# Suffixes of pictures that are not read. Files of other kinds are only counted.
CONVERTIBLE = (
    *(".avif", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jpe", ".jfif", ".jxl", ".tga"),
    *(".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".raw", ".rw2"),
    *(".exr", ".hdr", ".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".svg"),
)

# The layouts that are read, exactly. All others are refused by name.
# (bits per value, Pillow's mode): how it is decoded
LAYOUTS = {
    (8, "1"): "gray",
    (8, "L"): "gray",
    (8, "LA"): "gray",
    (8, "P"): "colour",
    (8, "PA"): "colour",
    (8, "RGB"): "colour",
    (8, "RGBA"): "colour",
    (8, "CMYK"): "colour",  # by Pillow's formula, without its profile
    (16, "I"): "16-bit gray",
    (16, "I;16"): "16-bit gray",
    (16, "I;16B"): "16-bit gray",
    (16, "RGB"): "16-bit colour",
    (16, "RGBA"): "16-bit colour",
}
# Modes in the file that Pillow decodes to RGB or RGBA of 8 bits: 16-bit gray with alpha in PNG,
# 5 bits per channel in BMP.
INEXACT_RAW_MODES = ("LA;16B", "BGR;15", "BGR;16")
TIFF_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}  # by PhotometricInterpretation, without alpha


# EXIF's main tags that don't describe how the pixels were stored
EXIF_TAGS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.XResolution,
    ExifTags.Base.YResolution,
    ExifTags.Base.ResolutionUnit,
    ExifTags.Base.Copyright,
)
# Entries of Pillow's image.info that restored files lack
DROPPED_INFO = {"gamma": "its gamma", "xmp": "its XMP data", "comment": "its comment"}


class Header(NamedTuple):
    shape: tuple[int, int, int]  # (H, W, C) as read, without alpha
    depth: int  # bytes per value: 1 or 2
    alpha: bool
    frames: int  # or pages, of which the first is read


def read_image(path: str | Path, in_chans: int | None = None, alpha: bool = False) -> np.ndarray:
    """An image file as (H, W, C) uint8, or uint16 if it has 16 bits; upright, as its EXIF says.

    Args:
        in_chans: 1 or 3 converts to gray or RGB. None: as the file is.
        alpha: Keep an alpha channel as the last one. By default it is dropped.

    Raises UnreadableImage, with the path. 16-bit colour needs opencv-python-headless.
    """
    with opened(path) as image:
        layout = layout_of(image)
        if layout == "16-bit gray":
            pixels = np.asarray(ImageOps.exif_transpose(image)).astype(np.uint16)
        elif layout == "16-bit colour":
            pixels = decode_16_bit_colour(image, path)
        else:
            pixels = decode_8_bit(image, layout, alpha)
    pixels = np.atleast_3d(pixels)
    if not alpha and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
    return to_channels(np.ascontiguousarray(pixels), in_chans)


def read_header(path: str | Path) -> Header:
    """What `read_image` would return, without decoding. Raises UnreadableImage."""
    with opened(path) as image:
        layout = layout_of(image)
        width, height = image.size
        # Pillow has turned the size of a TIFF already. The getexif of its PNG class would decode.
        orientation = Image.Image.getexif(image).get(ORIENTATION)
        if image.format != "TIFF" and orientation in (5, 6, 7, 8):
            width, height = height, width
        shape = (height, width, 1 if "gray" in layout else 3)
        depth = 2 if "16-bit" in layout else 1
        return Header(shape, depth, image.has_transparency_data, count_frames(image))


def count_frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # of damaged pages, which aren't read
        return 1


def read_metadata(path: str | Path) -> tuple[dict[str, bytes], str]:
    """({"icc_profile", "exif"}, a sentence about what is dropped) of an image file.

    For the pixels that `read_image` returns: upright, and gray or RGB. Raises UnreadableImage.
    """
    metadata = {}
    dropped = []
    with opened(path) as image:
        gray = "gray" in layout_of(image)
        frames = count_frames(image)
        if frames > 1:
            dropped.append(f"all but the first of {frames} pages or frames")
        profile = image.info.get("icc_profile")
        if profile:
            space = profile[16:20]  # of an ICC profile's header
            if space == (b"GRAY" if gray else b"RGB "):
                metadata["icc_profile"] = profile
            else:
                dropped.append("its colour profile, which is not for gray or RGB pixels")
        for key, what in DROPPED_INFO.items():
            if key in image.info:
                dropped.append(what)
        if getattr(image, "text", None):
            dropped.append("its texts")
        try:
            exif = upright_exif(image)
            if len(exif):
                metadata["exif"] = exif.tobytes()
        except Exception:  # Pillow raises some ten kinds for damaged EXIF
            dropped.append("its EXIF data, which are damaged")
    return metadata, f"{path}: dropped: {', '.join(dropped)}" if dropped else ""


def upright_exif(image: Image.Image) -> Image.Exif:
    """A copy that has what still holds for the upright and perhaps enlarged pixels."""
    exif = image.getexif()
    copy = Image.Exif()
    for tag in EXIF_TAGS:
        if tag in exif:
            copy[tag] = exif[tag]
    for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if part in exif:
            details = dict(exif.get_ifd(part))
            details.pop(ExifTags.Base.ExifImageWidth, None)
            details.pop(ExifTags.Base.ExifImageHeight, None)
            copy[part] = details
    return copy


@contextlib.contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file. What goes wrong with it becomes an UnreadableImage, with the path."""
    if OLD_PILLOW:
        raise UserError(OLD_PILLOW)
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except MemoryError:
        raise UnreadableImage(f"{path} can't be read: it is too large for the memory") from None
    except Exception as error:  # Pillow raises some ten kinds for a damaged file
        raise UnreadableImage(f"{path} can't be read ({describe_error(error)})") from None


def layout_of(image: Image.Image) -> str:
    """A value of LAYOUTS for an open image. Raises UserError for what would not be exact."""
    raw = image.tile[0].args if image.tile else ""
    raw = raw if isinstance(raw, str) else raw[0]  # such as RGB;16B
    bits = 8
    if image.mode.startswith("I") or raw.endswith((";16", ";16B", ";16L", ";16N")):
        bits = 16
    if image.format == "TIFF":
        bits = check_tiff(image)
    transparent = image.info.get("transparency") is not None
    known = (bits, image.mode) in LAYOUTS and raw not in INEXACT_RAW_MODES
    if known and not (transparent and LAYOUTS[bits, image.mode] == "16-bit gray"):
        return LAYOUTS[bits, image.mode]
    advice = "save it with 8 or 16 bits per channel, as gray without alpha or as RGB"
    raise UserError(f"{bits} bits, mode {image.mode} {raw}: {advice}")


def check_tiff(image: Image.Image) -> int:
    """Bits per value: 8 also stands for less. Raises UserError for what isn't known."""
    tags = image.tag_v2
    bits = max(tags.get(258, (1,)))
    compression = tags.get(259)
    colours = tags.get(262)  # 0: gray, white is 0; 1: gray; 2: RGB; 3: palette; 5: CMYK; 6: YCbCr
    channels = TIFF_CHANNELS.get(colours, 0)
    planes = tags.get(284, 1)  # 2: one for each channel
    count = tags.get(277, 1)
    # 2: alpha that isn't multiplied. OpenCV writes alpha without saying so.
    extra = tags.get(338, (2,) if count == channels + 1 else ())
    kinds = set(tags.get(339, (1,)))  # 1: unsigned integers
    unknown = {
        "colours other than gray, RGB, a palette or CMYK": channels == 0,
        "YCbCr without JPEG compression": colours == 6 and compression != 7,
        "signed or floating-point values": kinds != {1},
        "premultiplied alpha, or channels of unknown meaning": extra not in ((), (2,)),
        "another number of channels than its colours have": count != channels + len(extra),
        "16 bits with white as 0": bits == 16 and colours == 0,
        "channels in separate planes": planes != 1 and (bits == 16 or channels == 1),
    }
    for what, is_so in unknown.items():
        if is_so:
            raise UserError(f"{what}: save it as a plain PNG or TIFF")
    return 8 if bits < 8 else bits


def decode_8_bit(image: Image.Image, layout: str, alpha: bool) -> np.ndarray:
    mode = "L" if layout == "gray" else "RGB"
    transparent = image.has_transparency_data
    image = ImageOps.exif_transpose(image)
    if transparent and (alpha or image.mode in ("P", "PA")):  # palettes convert through RGBA
        mode += "A"
    return np.asarray(image.convert(mode))


def decode_16_bit_colour(image: Image.Image, path: str | Path) -> np.ndarray:
    """By OpenCV, as Pillow keeps the high bytes only: with these the result is compared."""
    cv2 = import_opencv()
    orientation = 1
    if image.format != "TIFF":  # both libraries turn TIFF files themselves
        orientation = image.getexif().get(ORIENTATION, 1)
    high = np.asarray(ImageOps.exif_transpose(image))
    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is not None and pixels.ndim == 3:
        order = [2, 1, 0, 3][: pixels.shape[2]]  # BGR(A) to RGB(A)
        pixels = turn_upright(pixels[..., order], orientation)
    if pixels is None or pixels.shape != high.shape or not np.array_equal(pixels >> 8, high):
        raise UserError("OpenCV and Pillow disagree on its pixels: save it as a plain PNG")
    return pixels


def import_opencv() -> Any:
    # OpenCV reads no more than a gigapixel unless it is told so before the import.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**40))
    try:
        import cv2
    except ImportError:
        advice = "pip install opencv-python-headless, or save it with 8 bits"
        raise UserError(f"16-bit colour needs OpenCV: {advice}") from None
    return cv2


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Applies EXIF's orientation, 1 to 8."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels


def describe_error(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, PIL.UnidentifiedImageError):
        return "damaged, or of an unknown format or layout: save it as a plain PNG"
    if isinstance(error, OSError) and error.errno:  # of the file system
        return f"{error.strerror}: check the file, the drive or the network"
    return f"{error!r}: repair or remove it"


# Suffixes of files that are written, and Pillow's names of their formats
WRITTEN = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
LONGEST_SIDE = {"JPEG": 65_500, "WEBP": 16_383}  # pixels
LONGEST_JPEG_EXIF = 65_533  # bytes


def write_image(
    path: str | Path,
    pixels: np.ndarray,
    icc_profile: bytes = b"",
    exif: bytes = b"",
    quality: int | None = None,
) -> str:
    """Writes (H, W, C) uint8 or uint16: C is 1 gray, 2 gray alpha, 3 RGB, 4 RGB alpha.

    The suffix of `path` is the format, see WRITTEN. PNG and TIFF keep everything. JPEG and WebP
    have 8 bits, and JPEG has no alpha. The file is there once it is whole.

    Args:
        quality: Of JPEG (default: 95) and WebP (default: lossless), 1 to 100.

    Returns what the format can't hold, such as "its transparency", or "". Raises UserError. 16-bit
    colour in a PNG needs opencv-python-headless; 16-bit gray with alpha is not written.
    """
    path = Path(path)
    file_format = WRITTEN.get(path.suffix.lower())
    if file_format is None:
        raise UserError(f"{path} can't be written: give it a suffix of {', '.join(WRITTEN)}")
    if pixels.dtype == np.uint16 and pixels.shape[2] == 2:
        raise UserError("16-bit gray with alpha can't be written: save the image without alpha")
    dropped = []
    if file_format == "PNG":
        content = with_metadata(encode_png(pixels), icc_profile, exif)
    elif file_format == "TIFF":
        content = encode_tiff(pixels, icc_profile, exif)
    else:
        pixels, dropped = fit_to_format(pixels, file_format)
        metadata, too_much = fit_metadata(icc_profile, exif, file_format, pixels.shape[2])
        dropped += too_much
        content = encode_8_bit(pixels, file_format, quality, metadata)
    write_whole(path, content)
    return ", ".join(dropped)


def encode_png(pixels: np.ndarray) -> bytes:
    channels = pixels.shape[2]
    if pixels.dtype == np.uint16 and channels > 1:
        cv2 = import_opencv()
        order = [2, 1, 0, 3][:channels]  # RGB(A) to BGR(A)
        _, content = cv2.imencode(".png", np.ascontiguousarray(pixels[..., order]))
        return content.tobytes()
    buffer = io.BytesIO()
    to_pillow(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def to_pillow(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def with_metadata(png: bytes, icc_profile: bytes, exif: bytes) -> bytes:
    """A PNG file with these chunks before its pixels."""
    chunks = b""
    if icc_profile:
        chunks += png_chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc_profile))
    if exif:
        chunks += png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    start = 33  # after the signature and IHDR
    return png[:start] + chunks + png[start:]


def png_chunk(name: bytes, content: bytes) -> bytes:
    length = len(content).to_bytes(4, "big")
    return length + name + content + zlib.crc32(name + content).to_bytes(4, "big")


def encode_tiff(pixels: np.ndarray, icc_profile: bytes, exif: bytes) -> bytes:
    """One strip, compressed by Deflate. Pillow writes the tags only: it can't write 16-bit RGB."""
    height, width, channels = pixels.shape
    pixels = pixels.astype(pixels.dtype.newbyteorder("<"))
    differences = pixels.copy()  # of neighbours: these compress better
    differences[:, 1:] -= pixels[:, :-1]
    strip = zlib.compress(differences.tobytes())
    if len(strip) >= 2**32:
        raise UserError("a TIFF file holds at most 4 GB: write PNG")

    layout: dict[str, Any] = {
        "ImageWidth": width,
        "ImageLength": height,
        "BitsPerSample": (8 * pixels.itemsize,) * channels,
        "Compression": 8,  # Deflate
        "Predictor": 2,  # differences along each row
        "PhotometricInterpretation": 2 if channels >= 3 else 1,  # RGB, gray
        "SamplesPerPixel": channels,
        "RowsPerStrip": height,
        "StripOffsets": 0,  # from the end of the tags: Pillow adds their length
        "StripByteCounts": len(strip),
    }
    if channels in (2, 4):
        layout["ExtraSamples"] = 2  # alpha that isn't multiplied
    if icc_profile:
        layout["InterColorProfile"] = icc_profile

    tags = ImageFileDirectory_v2()
    details = Image.Exif()
    details.load(exif)
    for tag, value in details.items():
        tags[tag] = value
    for part in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        if part in details:
            tags[part] = details.get_ifd(part)
    for name, value in layout.items():
        tags[ExifTags.Base[name].value] = value
    buffer = io.BytesIO()
    tags.save(buffer)
    return buffer.getvalue() + strip


def fit_to_format(pixels: np.ndarray, file_format: str) -> tuple[np.ndarray, list[str]]:
    """(pixels, what is dropped) for JPEG and WebP."""
    dropped = []
    longest = LONGEST_SIDE[file_format]
    if max(pixels.shape[:2]) > longest:
        sentence = f"{file_format} holds at most {longest:,} pixels along each side"
        raise UserError(f"{sentence}: write PNG or TIFF")
    if pixels.dtype == np.uint16:
        pixels = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounded
        dropped.append("8 of its 16 bits")
    if file_format == "JPEG" and pixels.shape[2] in (2, 4):
        pixels = pixels[..., :-1]
        dropped.append("its transparency")
    return np.ascontiguousarray(pixels), dropped


def fit_metadata(
    icc_profile: bytes, exif: bytes, file_format: str, channels: int
) -> tuple[dict[str, bytes], list[str]]:
    """(metadata, what is dropped) for JPEG and WebP."""
    metadata = {}
    dropped = []
    if icc_profile:
        if file_format == "WEBP" and channels < 3:
            dropped.append("its colour profile, as WebP has no gray")
        else:
            metadata["icc_profile"] = icc_profile
    if exif:
        if file_format == "JPEG" and len(exif) > LONGEST_JPEG_EXIF:
            dropped.append("its EXIF data, which are too long for JPEG")
        else:
            metadata["exif"] = exif
    return metadata, dropped


def encode_8_bit(
    pixels: np.ndarray, file_format: str, quality: int | None, metadata: dict[str, bytes]
) -> bytes:
    """JPEG or WebP."""
    options: dict[str, Any] = {"quality": quality or 95, "subsampling": "4:4:4"}
    if file_format == "WEBP":
        # exact: keep colours where alpha is 0
        options = {"quality": quality or 80, "lossless": quality is None, "exact": True}
    buffer = io.BytesIO()
    to_pillow(pixels).save(buffer, file_format, **options, **metadata)
    return buffer.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Writes under a temporary name first, so that the file appears only when complete."""
    # Short, because the name itself may have the greatest length that is allowed.
    partial_path = path.with_name(f".{zlib.crc32(os.fsencode(path.name)):08x}.partial")
    try:
        partial_path.write_bytes(content)
        partial_path.replace(path)
    except OSError as error:
        raise UserError(
            f"{path} can't be written ({error.strerror}): {disk_advice(error)}"
        ) from None
    finally:  # after Ctrl-C, too
        with contextlib.suppress(OSError):
            partial_path.unlink(missing_ok=True)


def disk_advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "make room"
    return "check the permissions, the drive or the network"


def fit_name(name: str) -> str:
    """A file name of at most 255 bytes: a longer one is cut before its suffix, and gets a number
    that tells it from others."""
    content = os.fsencode(name)
    if len(content) <= 255:
        return name
    suffix = os.fsencode(Path(name).suffix)
    end = f"~{zlib.crc32(content):08x}".encode() + suffix
    return content[: 255 - len(end)].decode("utf-8", "ignore") + end.decode()


def to_channels(image: np.ndarray, in_chans: int | None) -> np.ndarray:
    """(H, W, C) -> (H, W, in_chans). Gray is BT.601's luma, rounded like Pillow's convert("L")."""
    if in_chans == 1 and image.shape[2] == 3:
        weights = np.array([19595, 38470, 7471], np.uint32)  # of 65536
        luma = (image @ weights + 0x8000) >> 16
        return luma.astype(image.dtype)[..., None]
    if in_chans == 3 and image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    return image


def to_float(image: np.ndarray) -> np.ndarray:
    """uint8 or uint16 -> float32 in [0, 1]; floats stay in their range."""
    peak = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    return np.divide(image, peak, dtype=np.float32)


def list_images(root: str | Path, others: Counter | None = None) -> list[Path]:
    """Image files below `root`, sorted, without hidden ones. Links are followed once.

    `others` counts the files that are left out, by their suffix.
    """
    root = os.path.expanduser(root)
    others = Counter() if others is None else others
    paths = []
    entered = {os.path.realpath(root)}
    for folder, subfolders, files in os.walk(root, followlinks=True):
        first_seen = {}
        for name in sorted(subfolders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in entered:
                first_seen.setdefault(real, name)
        entered.update(first_seen)
        subfolders[:] = sorted(first_seen.values())
        for name in files:
            suffix = Path(name).suffix.lower()
            if name.startswith("."):
                continue
            if suffix in IMAGE_SUFFIXES:
                paths.append(Path(folder, name))
            else:
                others[suffix or "without suffix"] += 1
    if not paths:
        found = "is a file, not a folder" if os.path.isfile(root) else "is not there"
        if os.path.isdir(root):
            found = f"holds no images ({', '.join(IMAGE_SUFFIXES)}){name_others(others)}"
        raise UserError(f"{str(root)!r} {found}")
    return sorted(paths)


def name_others(others: Counter) -> str:
    """Such as "; left out: 3 .heic (convert to JPEG or PNG), 1 .txt"; "" if there are none."""
    parts = []
    for suffix, count in others.most_common(8):
        advice = " (convert to JPEG or PNG)" if suffix in CONVERTIBLE else ""
        parts.append(f"{count} {suffix}{advice}")
    return f"; left out: {', '.join(parts)}" if parts else ""


def differ_in_suffix_only(paths: list[Path]) -> set[Path]:
    """Paths that share their stem with another one, as a.jpg and a.png do. The names of their
    outputs have to keep the suffix."""
    stems = Counter(str(path.with_suffix("")).lower() for path in paths)
    return {path for path in paths if stems[str(path.with_suffix("")).lower()] > 1}


# Resizing


def imresize(image: np.ndarray, scale: float) -> np.ndarray:
    """MATLAB's bicubic imresize, bit for bit on uint8.

    (H, W, C) -> (ceil(H * scale), ceil(W * scale), C) of the same type. Antialiased, a = -0.5,
    borders mirrored. Works on the height, then on the width; integers are rounded half up and
    clipped after each.
    """
    for axis in (0, 1):
        rows = np.moveaxis(image, axis, 0)
        out = resize_rows(rows, scale)
        if image.dtype.kind == "u":
            out = np.clip(np.floor(out + 0.5), 0, np.iinfo(image.dtype).max)
        image = np.moveaxis(out.astype(image.dtype), 0, axis)
    return image


def resize_rows(rows: np.ndarray, scale: float) -> np.ndarray:  # (n, ...) -> (m, ...) float64
    n = len(rows)
    # Input pixels per output pixel; rounded, so that equal phases have equal weights.
    step = round(1 / scale, 12)
    stretch = max(step, 1.0)  # of the kernel: to shrink an image, it widens
    centre = np.arange(math.ceil(round(n * scale, 9))) * step + 0.5 * (step - 1)  # (m,)
    count = math.ceil(4 * stretch) + 2
    taps = np.floor(centre - 2 * stretch)[:, None] + np.arange(count)  # (m, count) input positions
    weights = cubic(np.abs(centre[:, None] - taps) / stretch)
    weights /= weights.sum(axis=1, keepdims=True)
    taps = np.abs((taps + n + 0.5) % (2 * n) - n).astype(int)  # mirrored: -1 is 0, n is n - 1
    out = 0.0
    # Summed in MATLAB's order: another one would round some halves differently.
    for tap, weight in zip(taps.T, weights.T, strict=True):
        if weight.any():
            out = out + weight[:, None, None] * rows[tap]
    return out


def cubic(d: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' kernel at the distances `d`."""
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d <= 1, near, far) * (d <= 2)


# Degradations: functions (gt, rng, scale, *, own options) -> lq. They can be called with plain
# values, and one can call another. gt is (H, W, C), uint8 or uint16; lq is (H / scale, W / scale,
# C), uint8, uint16, or float32 in [0, 1].


def add_noise(
    gt: np.ndarray, rng: Any, scale: int = 1, *, sigma: float | tuple = 25.0
) -> np.ndarray:
    """Gaussian noise of deviation sigma / 255, not clipped. sigma: a number, or (low, high).

    Drawn in BGR order, as the reference test noise is.
    """
    sigma = draw(rng, sigma)
    noise = rng.normal(0, sigma / 255, gt.shape)[..., ::-1]
    return (to_float(gt) + noise).astype(np.float32)


def compress_jpeg(
    gt: np.ndarray, rng: Any, scale: int = 1, *, quality: float | tuple = 40
) -> np.ndarray:
    """JPEG, 4:2:0 if in colour. quality: 1 to 100, or (low, high).

    The pixels are the same as OpenCV's, with which SwinIR was trained and tested.
    """
    quality = round(draw(rng, quality))
    file = io.BytesIO()
    to_pillow(to_uint8(gt)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(gt.shape)


def downscale(gt: np.ndarray, rng: Any, scale: int = 1) -> np.ndarray:
    """MATLAB's bicubic."""
    return imresize(gt, 1 / scale)


def draw(rng: Any, value: float | tuple[float, float]) -> float:
    """A number as it is, or a uniform one of a range (low, high)."""
    return rng.uniform(*value) if isinstance(value, tuple | list) else value


def draw_integer(rng: Any, value: int | tuple[int, int]) -> int:
    """A number as it is, or a whole one of a range (low, high), both of which are included."""
    if not isinstance(value, tuple | list):
        return value
    low, high = value
    return low + int(rng.random() * (high - low + 1))


def to_uint8(image: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8, uint16, or float in [0, 1] -> uint8, rounded."""
    if image.dtype == np.uint8:
        return image
    return np.rint(to_float(image).clip(0, 1) * 255).astype(np.uint8)


# Blind degradations, for real-world super-resolution: chains of random steps, which work on
# float32 in [0, 1]. Their probabilities and ranges are the authors', and stand in these tables.
# Resuming a run does not detect edits to them.

# KAIR's degradation_bsrgan (utils/utils_blindsr.py), with which SwinIR's authors trained. (Their
# options name shuffle_prob and use_sharp as well, which only its bsrgan_plus reads.) `rest` is the
# scale by which the image still has to shrink.
BSRGAN = {
    "halved": 0.25,  # probability that x4 begins with x1/2
    "anisotropic": 0.5,  # probability, else the blur is isotropic
    "blur_reach": (3, 12),  # the kernel has 2 * reach + 1 pixels, 7 to 25
    "variance": lambda rest: (0, 4 + rest),  # of the anisotropic blur, along both axes, pixels^2
    "sigma": lambda rest: (0, 2 + 0.2 * rest),  # of the isotropic blur, pixels
    # shrink: the probability to resize, by a factor "shrinkage". Else it blurs by a Gaussian, with
    # "shrinking_sigma", and takes every rest-th pixel.
    "resized": 0.75,
    "shrinkage": lambda rest: (1, 2 * rest),
    "shrinking_sigma": lambda rest: (0.1, 0.6 * rest),
    "noise": (2, 25),  # deviation of 255, an integer
    "noise_kinds": (0.4, 0.4, 0.2),  # probabilities: gray, colour, correlated channels
    "jpeg": 0.9,  # probability of JPEG before the last one, which is always there
}


class Order(NamedTuple):
    """One of Real-ESRGAN's two orders of degradation."""

    blur: float  # probability
    sigma: tuple[float, float]  # of the blur, pixels
    resize: tuple[float, float, float]  # probabilities: enlarge, shrink, keep
    factors: tuple[float, float]  # the least and the greatest, relative to GT or LQ
    noise: tuple[float, float]  # Gaussian: deviation of 255
    poisson: tuple[float, float]  # multiple of the Poisson noise


# Real-ESRGAN's options/train_realesrgan_x4plus.yml, and realesrgan/data/realesrgan_dataset.py.
FIRST = Order(
    blur=1.0,
    sigma=(0.2, 3.0),
    resize=(0.2, 0.7, 0.1),
    factors=(0.15, 1.5),
    noise=(1, 30),
    poisson=(0.05, 3.0),
)
SECOND = Order(
    blur=0.8,
    sigma=(0.2, 1.5),
    resize=(0.3, 0.4, 0.3),
    factors=(0.3, 1.2),
    noise=(1, 25),
    poisson=(0.05, 2.5),
)
REAL_ESRGAN = {
    "blur_reach": (3, 10),  # kernels of 7 to 21 pixels
    "sinc": 0.1,  # probability of a sinc kernel, in both orders
    "final_sinc": 0.8,
    # (shape, isotropic): probability of the other kernels
    "kernels": {
        ("gaussian", True): 0.45,
        ("gaussian", False): 0.25,
        ("generalised", True): 0.12,
        ("generalised", False): 0.03,
        ("plateau", True): 0.12,
        ("plateau", False): 0.03,
    },
    "beta": {"generalised": (0.5, 4.0), "plateau": (1.0, 2.0)},  # half of them up to 1
    "gaussian_noise": 0.5,  # probability, else Poisson noise
    "gray_noise": 0.4,
}


def bsrgan(
    gt: np.ndarray, rng: Any, scale: int = 1, *, jpeg_range: int | tuple = (30, 95)
) -> np.ndarray:
    """BSRGAN: two blurs, two resizings, noise and JPEG in random order, and JPEG at the end.

    jpeg_range: quality of each JPEG: 1 to 100, or (low, high).
    """
    height, width = gt.shape[0] // scale, gt.shape[1] // scale
    image = to_float(gt)
    rest = scale
    if scale == 4 and rng.random() < BSRGAN["halved"]:
        image = halve(image, rng)
        rest = 2
    for step in bsrgan_steps(rng):
        if step == "blur":
            image = blur_by_gaussian(image, rng, rest)
        elif step == "shrink":
            image = shrink(image, rng, rest)
        elif step == "fit":
            image = resize_by_random_kind(image, rng, height, width)
        elif step == "noise":
            image = add_channel_noise(image, rng)
        elif step == "jpeg" and rng.random() < BSRGAN["jpeg"]:
            image = to_float(compress_jpeg(image, rng, quality=draw_integer(rng, jpeg_range)))
    return compress_jpeg(image, rng, quality=draw_integer(rng, jpeg_range))


def bsrgan_steps(rng: Any) -> list[str]:
    """The six steps in random order, with "shrink" before "fit". (KAIR's seventh step, a camera
    model, is not part of SwinIR's recipe.)"""
    steps = ["blur", "blur", "shrink", "fit", "noise", "jpeg"]
    steps = [steps[i] for i in rng.permutation(len(steps))]
    first, second = sorted((steps.index("shrink"), steps.index("fit")))
    steps[first], steps[second] = "shrink", "fit"
    return steps


def halve(image: np.ndarray, rng: Any) -> np.ndarray:
    if rng.random() < 0.5:
        return resize_by_random_kind(image, rng, image.shape[0] // 2, image.shape[1] // 2)
    return imresize(image, 0.5).clip(0, 1)


def resize_by_random_kind(image: np.ndarray, rng: Any, height: int, width: int) -> np.ndarray:
    kind = rng.choice(["bilinear", "bicubic", "box"])
    return resize(image, height, width, kind).clip(0, 1)


def blur_by_gaussian(image: np.ndarray, rng: Any, rest: int) -> np.ndarray:
    size = 2 * draw_integer(rng, BSRGAN["blur_reach"]) + 1
    if rng.random() < BSRGAN["anisotropic"]:
        sigmas = np.sqrt(rng.uniform(*BSRGAN["variance"](rest), 2))
        kernel = bell_kernel(size, *sigmas, rng.uniform(0, math.pi))
    else:
        sigma = draw(rng, BSRGAN["sigma"](rest))
        kernel = bell_kernel(size, sigma, sigma)
    return convolve(image, kernel)


def shrink(image: np.ndarray, rng: Any, rest: int) -> np.ndarray:
    if rng.random() < BSRGAN["resized"]:
        factor = draw(rng, BSRGAN["shrinkage"](rest))
        height, width = (int(n / factor) for n in image.shape[:2])
        return resize_by_random_kind(image, rng, height, width)
    kernel = shifted_kernel(25, draw(rng, BSRGAN["shrinking_sigma"](rest)), (rest - 1) / 2)
    return convolve(image, kernel)[::rest, ::rest].clip(0, 1)


def add_channel_noise(image: np.ndarray, rng: Any) -> np.ndarray:
    height, width, channels = image.shape
    kind = rng.choice(["gray", "colour", "correlated"], p=BSRGAN["noise_kinds"])
    sigma = draw_integer(rng, BSRGAN["noise"]) / 255
    if kind == "correlated":
        greatest = BSRGAN["noise"][1] / 255
        basis = np.linalg.svd(rng.random((3, 3)))[0]
        covariance = basis.T @ np.diag(rng.random(3)) @ basis
        covariance = np.abs(greatest**2 * covariance)
        # Not always positive semi-definite, which KAIR ignores, too.
        noise = rng.multivariate_normal(
            [0, 0, 0], covariance, (height, width), check_valid="ignore"
        )
        noise = noise[..., :channels]
    else:
        noise = rng.normal(0, sigma, (height, width, 1 if kind == "gray" else channels))
    return (image + noise).clip(0, 1).astype(np.float32)


def realesrgan(
    gt: np.ndarray, rng: Any, scale: int = 1, *, jpeg_range: int | tuple = (30, 95)
) -> np.ndarray:
    """Real-ESRGAN: blur, resizing, noise and JPEG, twice, with a sinc filter at the end.

    JPEG is a real codec's. Real-ESRGAN imitates it on the GPU, with coarser colour edges.

    jpeg_range: quality of each JPEG: 1 to 100, or (low, high).
    """
    height, width = gt.shape[0] // scale, gt.shape[1] // scale
    image = degrade_once(to_float(gt), rng, FIRST, *gt.shape[:2])
    image = to_float(compress_jpeg(image, rng, quality=jpeg_range))
    image = degrade_once(image, rng, SECOND, height, width)
    if rng.random() < 0.5:
        image = fit_and_filter(image, rng, height, width)
        return compress_jpeg(image, rng, quality=jpeg_range)
    image = to_float(compress_jpeg(image, rng, quality=jpeg_range))
    return to_uint8(fit_and_filter(image, rng, height, width))


def degrade_once(image: np.ndarray, rng: Any, order: Order, height: int, width: int) -> np.ndarray:
    """Blur, a size relative to (height, width), and noise."""
    if rng.random() < order.blur:
        image = convolve(image, draw_kernel(rng, order.sigma))
    least, greatest = order.factors
    factor = 1.0
    change = rng.choice(["enlarge", "shrink", "keep"], p=order.resize)
    if change == "enlarge":
        factor = rng.uniform(1, greatest)
    elif change == "shrink":
        factor = rng.uniform(least, 1)
    kind = rng.choice(["bilinear", "bicubic", "area"])
    image = resize(image, int(height * factor), int(width * factor), kind)

    gray = rng.random() < REAL_ESRGAN["gray_noise"]
    if rng.random() < REAL_ESRGAN["gaussian_noise"]:
        shape = (*image.shape[:2], 1 if gray else image.shape[2])
        noise = rng.normal(0, draw(rng, order.noise) / 255, shape)
    else:
        noise = draw(rng, order.poisson) * poisson_noise(image, rng, gray)
    return (image + noise).clip(0, 1).astype(np.float32)


def poisson_noise(image: np.ndarray, rng: Any, gray: bool) -> np.ndarray:
    """Its strength depends on the number of different values in the image, as in BasicSR."""
    levels = to_uint8(image)
    if gray:
        levels = to_channels(levels, 1)
    count = np.count_nonzero(np.bincount(levels.ravel()))
    peak = 2 ** math.ceil(math.log2(count))
    clean = to_float(levels)
    return rng.poisson(clean * peak) / peak - clean


def fit_and_filter(image: np.ndarray, rng: Any, height: int, width: int) -> np.ndarray:
    kind = rng.choice(["bilinear", "bicubic", "area"])
    image = resize(image, height, width, kind)
    if rng.random() < REAL_ESRGAN["final_sinc"]:
        size = 2 * draw_integer(rng, REAL_ESRGAN["blur_reach"]) + 1
        image = convolve(image, sinc_kernel(size, rng.uniform(math.pi / 3, math.pi)))
    return image


def sharpen(image: np.ndarray) -> np.ndarray:
    """Unsharp masking of (H, W, C) uint8 or uint16, where it changes more than 10 of 255.

    Real-ESRGAN's USMSharp and KAIR's add_sharpening: weight 0.5, a Gaussian of 51 pixels.
    """
    kernel = bell_kernel(51, 8.0, 8.0)  # the sigma that OpenCV takes for 51 pixels
    pixels = to_float(image)
    detail = pixels - convolve(pixels, kernel)
    mask = convolve((np.abs(detail) * 255 > 10).astype(np.float32), kernel)
    sharp = (pixels + 0.5 * detail).clip(0, 1)
    mixed = mask * sharp + (1 - mask) * pixels
    peak = np.iinfo(image.dtype).max
    return np.rint(mixed.clip(0, 1) * peak).astype(image.dtype)


def draw_kernel(rng: Any, sigma_range: tuple[float, float]) -> np.ndarray:
    """One of Real-ESRGAN's blur kernels."""
    size = 2 * draw_integer(rng, REAL_ESRGAN["blur_reach"]) + 1
    if rng.random() < REAL_ESRGAN["sinc"]:
        lowest = math.pi / 3 if size < 13 else math.pi / 5
        return sinc_kernel(size, rng.uniform(lowest, math.pi))
    kinds = REAL_ESRGAN["kernels"]
    shape, isotropic = list(kinds)[rng.choice(len(kinds), p=list(kinds.values()))]
    sigma_x = sigma_y = draw(rng, sigma_range)
    angle = 0.0
    if not isotropic:
        sigma_y = draw(rng, sigma_range)
        angle = rng.uniform(-math.pi, math.pi)
    beta = 1.0
    if shape in REAL_ESRGAN["beta"]:
        least, greatest = REAL_ESRGAN["beta"][shape]
        beta = rng.uniform(least, 1) if rng.random() < 0.5 else rng.uniform(1, greatest)
    return bell_kernel(size, sigma_x, sigma_y, angle, beta, shape == "plateau")


def bell_kernel(
    size: int,
    sigma_x: float,
    sigma_y: float,
    angle: float = 0.0,
    beta: float = 1.0,
    plateau: bool = False,
) -> np.ndarray:  # (size, size)
    """exp(-r^(2 beta) / 2), a Gaussian if beta = 1, or 1 / (1 + r^(2 beta)), with sum 1.

    r: the distance from the middle in units of sigma_x along `angle`, and of sigma_y across it.
    """
    sigma_x, sigma_y = max(sigma_x, 1e-3), max(sigma_y, 1e-3)  # so that 0 means no blur
    y, x = np.mgrid[:size, :size] - size // 2
    along = (math.cos(angle) * x + math.sin(angle) * y) / sigma_x
    across = (math.cos(angle) * y - math.sin(angle) * x) / sigma_y
    power = (along**2 + across**2) ** beta
    kernel = 1 / (1 + power) if plateau else np.exp(-power / 2)
    return kernel / kernel.sum()


def shifted_kernel(size: int, sigma: float, shift: float) -> np.ndarray:
    """A Gaussian whose middle is `shift` pixels further up and left, by linear interpolation.

    After blurring with it, every rest-th pixel from the first one on samples the middle of a block
    of rest x rest.
    """
    positions = np.arange(size)
    row = bell_kernel(size, sigma, sigma)[size // 2]
    row = np.interp(positions + shift, positions, row)
    row /= row.sum()
    return np.outer(row, row)


def sinc_kernel(size: int, cutoff: float) -> np.ndarray:  # (size, size)
    """The ideal low-pass filter up to `cutoff` radians per pixel, cut off at `size`, with sum 1."""
    y, x = np.mgrid[:size, :size] - size // 2
    radius = np.hypot(x, y)
    radius[size // 2, size // 2] = 1  # the limit at 0 follows
    kernel = cutoff * bessel_j1(cutoff * radius) / (2 * math.pi * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return kernel / kernel.sum()


def bessel_j1(x: np.ndarray) -> np.ndarray:
    """J1 for |x| below 100: its integral over [0, pi], exact to 1e-15 by 96 midpoints."""
    t = (np.arange(96) + 0.5) * (math.pi / 96)
    return np.cos(t - x[..., None] * np.sin(t)).mean(axis=-1)


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """(H, W, C) float32 by (k, k), k odd; borders are mirrored, without the edge itself.

    By FFT, whose time does not depend on k.
    """
    height, width, _ = image.shape
    reach = len(kernel) // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), "reflect")
    size = [-(-n // 16) * 16 for n in padded.shape[:2]]  # whose FFT is fast
    filtered = np.fft.rfft2(padded, size, axes=(0, 1))
    filtered *= np.fft.rfft2(kernel, size)[..., None]
    out = np.fft.irfft2(filtered, size, axes=(0, 1))
    out = out[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
    return out.astype(np.float32)


def resize(image: np.ndarray, height: int, width: int, kind: str) -> np.ndarray:
    """(H, W, C) float32 -> (height, width, C), without antialiasing, in contrast to `imresize`.

    kind: bilinear or bicubic (a = -0.75), equal to OpenCV's and torch's; box, OpenCV's INTER_AREA;
    or area, torch's, whose boxes grow to whole pixels. Torch's own functions are not used because
    their last bits depend on the number of threads.
    """
    for axis, size in enumerate((height, width)):
        size = max(size, 1)
        if size == image.shape[axis]:
            continue
        taps, weights = taps_of(kind, image.shape[axis], size)
        shape = (1, size, 1) if axis == 1 else (size, 1, 1)
        out = np.float32(0)
        for tap, weight in zip(taps.T, weights.T, strict=True):
            out = out + weight.reshape(shape) * image.take(tap, axis)
        image = out
    return image


def taps_of(kind: str, n: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(size, count) input positions of n, and their weights, float32; borders are repeated."""
    step = n / size  # input pixels per output pixel
    if kind in ("box", "area"):
        start = np.arange(size)[:, None] * step
        taps = np.floor(start) + np.arange(math.ceil(step) + 1)
        covered = np.minimum(taps + 1, start + step) - np.maximum(taps, start)
        weights = covered.clip(0) if kind == "box" else covered > 1e-9
    else:
        centre = (np.arange(size)[:, None] + 0.5) * step - 0.5
        taps = np.floor(centre) + (np.arange(2) if kind == "bilinear" else np.arange(-1, 3))
        distance = np.abs(centre - taps)
        weights = 1 - distance if kind == "bilinear" else cubic(distance, a=-0.75)  # OpenCV's a
    weights = weights / weights.sum(axis=1, keepdims=True)
    return taps.clip(0, n - 1).astype(int), weights.astype(np.float32)


class Degradation(NamedTuple):
    """A function, and how training applies it to a crop of an image.

    margin: LQ pixels around the crop that are degraded with it and cut off afterwards. The crop
        first grows to multiples of `margin`, then by one margin on each side. So a crop of the
        degraded image is what training sees, if the function works on blocks of `margin` pixels,
        as JPEG does (16 for 4:2:0), or reaches no further (the cubic kernel reaches 2). A chain of
        random steps only gets some context. 0: the crop is degraded alone.
    sharpen: Sharpen GT first. In training the sharpened GT is the target, too; validation leaves
        it as it is.
    """

    function: Callable[..., np.ndarray]
    margin: int = 0
    sharpen: bool = False


# By name: `--degradation=noise`. The options of a function are read off its signature. They are
# set by options of train.py of the same name, fixed for a run, and named in validation lines.
DEGRADATIONS = {
    "noise": Degradation(add_noise),  # each pixel on its own: no margin
    "jpeg": Degradation(compress_jpeg, margin=16),
    "bicubic": Degradation(downscale, margin=4),
    "bsrgan": Degradation(bsrgan),  # KAIR degrades the crop alone
    # Real-ESRGAN degrades 100 LQ pixels for a crop of 64.
    "realesrgan": Degradation(realesrgan, margin=8, sharpen=True),
}
LIMITS = {"sigma": (0, math.inf), "quality": (1, 100), "jpeg_range": (1, 100)}  # of the options
VALIDATED = {"sigma": max, "quality": min}  # a range is validated at its hard end


def options_of_degradation(name: str, cfg: Any = None) -> dict[str, Any]:
    """The options of a degradation, read off its signature; none for an unknown one.

    Their values are those of `cfg`, or the defaults where it has no such option.
    """
    if name not in DEGRADATIONS:
        return {}
    options = {}
    for parameter in inspect.signature(DEGRADATIONS[name].function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options[parameter.name] = getattr(cfg, parameter.name, parameter.default)
    return options


def validation_options(options: dict[str, Any]) -> dict[str, Any]:
    """A single value for each range that VALIDATED knows. Other ranges are drawn from."""
    single = {}
    for name, value in options.items():
        if isinstance(value, tuple | list) and name in VALIDATED:
            value = VALIDATED[name](value)
        single[name] = value
    return single


def bind_degradation(name: str, scale: int, in_chans: int, options: dict[str, Any]) -> Degradation:
    """DEGRADATIONS[name] with its options set, tried on a plain image. Raises UserError.

    Options of other degradations are left out: a noise level does nothing to JPEG.
    """
    if name not in DEGRADATIONS:
        known = ", ".join(DEGRADATIONS)
        raise UserError(f"degradation={name!r} is none of {known}; give dataroot_lq or val_lq")
    known = {option for other in DEGRADATIONS for option in options_of_degradation(other)}
    for option, value in options.items():
        if option not in known:
            raise UserError(f"{option!r} is an option of no degradation")
        check_range(option, value)
    own = {key: options[key] for key in options_of_degradation(name) if key in options}
    degradation = DEGRADATIONS[name]
    bound = partial(degradation.function, scale=scale, **own)

    # Results of another kind would spoil the training without a word. All pixels are 128: the mean
    # of floats in [0, 1] is near 0.5, that of floats in [0, 255] near 128.
    lq = bound(np.full((64 * scale, 64 * scale, in_chans), 128, np.uint8), sample_rng(0, 0))
    plausible = lq.dtype == np.uint8 or abs(np.mean(lq)) < 9  # False for nan
    if lq.shape != (64, 64, in_chans) or not plausible:
        sentence = "must return (H / scale, W / scale, C), uint8 or floats in [0, 1]"
        raise UserError(f"{name} {sentence}, and does not for {scale=}")
    return degradation._replace(function=bound)


def check_range(name: str, value: Any) -> None:
    low, high = LIMITS.get(name, (-math.inf, math.inf))
    if isinstance(value, tuple | list):
        if len(value) == 2 and low <= value[0] <= value[1] <= high:
            return
    elif not isinstance(value, int | float) or low <= value <= high:
        return
    wanted = "a number or a range (low, high)"
    raise UserError(f"{name}={value} must be {wanted}, at least {low}, at most {high}")


class Source(Protocol):
    """Where images come from: source[i] is image i, (H, W, C) uint8 or uint16."""

    root: str | Path
    names: list[str]  # paths below root
    shapes: list[tuple[int, int, int]]
    depths: list[int]  # bytes per value
    problems: list[tuple[str, str]]  # (name, sentence) for each file that can't be opened
    damaged: Tensor  # (images,) uint8, 1 for each that turned out to be damaged
    notices: list[str]

    def __getitem__(self, i: int) -> np.ndarray: ...


class ImageFolder:
    """The image files below `root`.

    At first only headers are read; with `whole`, all files are decoded once, so that `problems`
    names every damaged one. Decoded images are kept until `cache_gb` is used up, of which each
    worker has its share.
    """

    def __init__(self, root: str | Path, cache_gb: float = 2.0, whole: bool = False) -> None:
        self.root = Path(root).expanduser()
        self.cache_gb = cache_gb
        self.cache: dict[int, np.ndarray] = {}
        self.cached_bytes = 0
        self.names: list[str] = []
        self.shapes: list[tuple[int, int, int]] = []
        self.depths: list[int] = []
        self.problems: list[tuple[str, str]] = []
        alphas = 0
        several = []
        others: Counter = Counter()
        paths = list_images(root, others)
        hidden = None if whole else True  # None: shown in a terminal
        with ThreadPoolExecutor(16) as pool:  # opening files is mostly waiting
            found = pool.map(partial(look, whole=whole), paths)
            found = tqdm(found, str(root), len(paths), disable=hidden)
            for path, (header, problem) in zip(paths, found, strict=True):
                name = path.relative_to(self.root).as_posix()
                if problem:
                    self.problems.append((name, problem))
                    continue
                self.names.append(name)
                self.shapes.append(header.shape)
                self.depths.append(header.depth)
                alphas += header.alpha
                if header.frames > 1:
                    several.append(name)
        # Found while training, by any worker: they share this memory.
        self.damaged = torch.zeros(len(self.names), dtype=torch.uint8).share_memory_()
        self.notices = []
        if others:
            self.notices.append(f"{root}{name_others(others)}")
        outputs = [name for name in self.names if Path(name).stem.endswith("_restored")]
        if outputs:
            names = f"{len(outputs)} image(s), as {outputs[0]}"
            self.notices.append(f"{root}: {names}, may be outputs of model.py: move them away")
        if alphas:
            self.notices.append(f"{root}: alpha is dropped from {alphas} image(s)")
        if several:
            some = f"{len(several)} image(s), as {', '.join(several[:3])}"
            self.notices.append(f"{root}: only the first page or frame is read of {some}")

    def __getitem__(self, i: int) -> np.ndarray:
        if i in self.cache:
            return self.cache[i]
        path = self.root / self.names[i]
        try:
            image = read_image(path)
            if image.shape != self.shapes[i]:
                raise UnreadableImage(f"{path} has changed meanwhile, or has a wrong header")
        except UnreadableImage:
            self.damaged[i] = 1
            raise
        worker = get_worker_info()
        share = self.cache_gb * 1e9 / (worker.num_workers if worker else 1)
        if self.cached_bytes + image.nbytes <= share:
            # Never evicted: each epoch has another order, so any image is as likely as any other.
            self.cache[i] = image
            self.cached_bytes += image.nbytes
        return image


def look(path: Path, whole: bool) -> tuple[Header | None, str | None]:
    """(header, None) or (None, problem). `whole`: decodes the image, too."""
    try:
        header = read_header(path)
        if whole and read_image(path).shape != header.shape:
            raise UnreadableImage(f"{path} has another size than its header says: save it anew")
        return header, None
    except UnreadableImage as error:
        return None, str(error)


class PackedImages:
    """A file made by `pack`. An image is a view of the file: a crop reads its own rows only.

    It is a flat .npy of uint8: the pixels of all images, an index in JSON, its length, MAGIC.
    """

    MAGIC = b"nanoSwIR"

    def __init__(self, root: str | Path) -> None:
        self.root = root
        self.problems: list[tuple[str, str]] = []
        self.damaged = torch.zeros(0, dtype=torch.uint8)
        self.notices: list[str] = []
        try:
            # A plain array, because slices of np.memmap are slower.
            self.data = np.load(root, mmap_mode="r").view(np.ndarray)
            if self.data[-8:].tobytes() != self.MAGIC:
                raise ValueError("cut off")
            length = int.from_bytes(self.data[-16:-8].tobytes(), "little")
            index = json.loads(self.data[-16 - length : -16].tobytes())
            self.names, self.shapes, self.depths, self.starts = index
        except Exception:  # NumPy takes zip files for archives of arrays
            raise UserError(
                f"{root} is neither a folder nor a whole file of python data.py pack"
            ) from None

    def __reduce__(self) -> tuple:
        # A spawned worker maps the file again, where pickle would copy it.
        return PackedImages, (self.root,)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.ndarray(self.shapes[i], f"<u{self.depths[i]}", self.data, self.starts[i])


def pack(source: str | Path, target: str | Path) -> None:
    """Decodes the folder `source` into the file `target`, which appears only when complete.

    Raises UserError if an image is damaged, the disk too small, or the file there already.
    """
    target = Path(target)
    if target.exists():
        raise UserError(f"{target} is there already: delete it, or give another name")
    folder = ImageFolder(source, cache_gb=0, whole=True)
    if folder.problems:
        sentences = [sentence for _, sentence in folder.problems[:5]]
        raise UserError("; ".join([*sentences, "python data.py check names all"]))

    sizes = [math.prod(s) * d for s, d in zip(folder.shapes, folder.depths, strict=True)]
    *starts, end = np.cumsum([0, *sizes]).tolist()
    index = json.dumps([folder.names, folder.shapes, folder.depths, starts]).encode()
    total = end + len(index) + 16
    free = shutil.disk_usage(target.absolute().parent).free
    print(*folder.notices, f"{len(sizes)} images, {total / 1e9:.3g} GB, for {target}", sep="\n")
    if total > 0.98 * free:
        raise UserError(f"{target} would fill the disk: make room, or pack to another one")

    partial_path = Path(f"{target}.partial")
    try:
        with partial_path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": (total,)}
            np.lib.format.write_array_header_1_0(file, header)
            for first in tqdm(range(0, len(sizes), 16), "16 images each"):  # as many in memory
                numbers = range(first, min(first + 16, len(sizes)))
                for i, image in zip(numbers, pool.map(folder.__getitem__, numbers), strict=True):
                    if image.nbytes != sizes[i]:
                        raise UserError(f"{source}/{folder.names[i]} has changed: pack again")
                    file.write(image.astype(f"<u{image.itemsize}"))
            file.write(index + len(index).to_bytes(8, "little") + PackedImages.MAGIC)
        partial_path.replace(target)
    finally:  # after an error or Ctrl-C
        partial_path.unlink(missing_ok=True)


class SyntheticImages:
    """Dead leaves: images[number] is (size, size, in_chans) uint8, a function of (seed, number).

    After Achddou et al., "Synthetic images as a regularity prior", and VibrantLeaves
    (arXiv 2504.10201). `keep`: how many of those drawn last stay in memory: with 256 pixels, 63 MB
    in each worker. It is more than the pool, because workers run ahead of each other.
    """

    POOL = 256  # images that samples are drawn from at a time

    def __init__(
        self, seed: int = 0, size: int = 256, in_chans: int = 3, keep: int = POOL + 64
    ) -> None:
        self.seed = seed
        self.size = size
        self.in_chans = in_chans
        self.drawn: np.ndarray | None = None  # a ring: image n is at n % keep
        self.numbers = [-1] * keep

    def __getitem__(self, number: int) -> np.ndarray:
        if self.drawn is None:
            # Ones, because the system gives memory for zeros only when they are written: so the
            # process doesn't grow while training.
            self.drawn = np.full((len(self.numbers), self.size, self.size, 3), 1, np.uint8)
        slot = number % len(self.numbers)
        if self.numbers[slot] != number:
            self.drawn[slot] = dead_leaves(self.seed, number, self.size)
            self.numbers[slot] = number
        return to_channels(self.drawn[slot], self.in_chans)


def dead_leaves(seed: int, number: int, size: int, count: int = 300) -> np.ndarray:
    """(size, size, 3) uint8: a ground and `count` leaves, painted from back to front."""
    rng = sample_rng(seed, number, stream=1)
    noise = coloured_noise(rng, size)
    mean, spread, log_smallest, softness = rng.uniform(
        (0.25, 0.1, 0, 0.6), (0.6, 0.3, math.log(6), 1.4)
    )
    colours = leaf_colours(rng, count + 1, mean, spread)
    # Radii have the density r^-3 of natural images, from the smallest one to the image's size:
    # the inverse of the distribution function at uniform numbers.
    least = math.exp(-2 * log_smallest)  # smallest^-2
    radii = (least - rng.random(count + 1) * (least - size**-2)) ** -0.5
    radii[0] = 2 * size  # the ground
    radii[1:16] = rng.uniform(size / 16, size / 3, 15)  # these cover most of it
    shapes = rng.random((count + 1, 10))

    image = np.zeros((size, size, 3), np.float32)
    for radius, colour, shape in zip(radii.tolist(), colours, shapes.tolist(), strict=True):
        paint_leaf(image, radius, colour, shape, noise, softness, rng)
    return (image.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def coloured_noise(rng: np.random.Generator, size: int) -> np.ndarray:  # (3, size, size)
    """Three textures of amplitude 1 / frequency^p, from grain (p = 0.5) to clouds (2)."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)).clip(1 / size)
    spectrum = np.fft.rfft2(rng.standard_normal((3, size, size), np.float32))
    spectrum = spectrum / frequency ** rng.uniform(0.5, 2, (3, 1, 1))
    noise = np.fft.irfft2(spectrum, (size, size)).astype(np.float32)
    return noise / noise.std(axis=(1, 2), keepdims=True)


def leaf_colours(rng: np.random.Generator, count: int, mean: float, spread: float) -> np.ndarray:
    """(count, 3) RGB: they differ in luminance, and far less along two opponent axes."""
    tint = rng.laplace(0, (0.05, 0.02))  # of the whole image
    saturation = rng.gamma(2, 0.5)
    chroma = tint + saturation * rng.laplace(0, (0.12, 0.05), (count, 2))
    opponent_axes = [[1, 1, 1], [1, 0, -1], [0.5, -1, 0.5]]
    colours = np.insert(chroma, 0, 1, axis=1) @ opponent_axes
    luminance = rng.normal(mean, spread, (count, 1)).clip(0.02, 1)
    return (colours * luminance).astype(np.float32)


def paint_leaf(
    image: np.ndarray,
    radius: float,
    colour: np.ndarray,
    shape: list[float],
    noise: np.ndarray,
    softness: float,
    rng: np.random.Generator,
) -> None:
    """A polygon, an ellipse or a hair, by ten random numbers `shape`, over `image` in place."""
    size = len(image)
    y, x, turn, kind, bend, flat, which, ragged, contrast, slope = shape
    y, x = y * size, x * size
    rows = slice(max(int(y - radius - 2), 0), int(y + radius + 3))
    columns = slice(max(int(x - radius - 2), 0), int(x + radius + 3))
    dy = np.arange(size, dtype=np.float32)[rows, None] - y
    dx = np.arange(size, dtype=np.float32)[None, columns] - x
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    along = cos * dx + sin * dy
    across = cos * dy - sin * dx

    is_hair = kind >= 0.7
    if is_hair:
        across -= (bend - 0.5) * (along * along / radius - radius / 3)
    flatness = 0.3 + 0.7 * flat
    if is_hair:
        flatness = max(0.4 / radius, -0.08 * math.log(1 - flat))  # exponential, of mean 0.08
    # Distance from the outline in pixels, below 0 inside.
    outside = (np.hypot(along, across / flatness) - radius) * flatness
    if kind < 0.35:  # cut straight sides: a polygon
        for angle in rng.uniform(0, 2 * math.pi, 3 + int(4 * bend)).tolist():
            reach = radius * (0.3 + 0.5 * math.cos(angle) ** 2)
            side = math.cos(angle) * along + math.sin(angle) * across - reach
            outside = np.maximum(outside, side)
    texture = noise[int(3 * which)]
    if ragged < 0.5:  # half of the outlines are, by as much as the number says
        outside += 0.3 * radius * ragged * texture[rows, columns]
    # Transposed, the texture of the surface is independent of that of the outline.
    strength = -0.08 * math.log(1 - contrast)  # exponential, of mean 0.08
    light = 1 + (slope - 0.5) / size * along + strength * texture.T[rows, columns]
    cover = 1.0
    if radius < 2 * size:  # the ground covers all
        cover = (0.5 - outside / softness).clip(0, 1)[..., None]
    image[rows, columns] += cover * (light[..., None] * colour - image[rows, columns])


def sample_rng(
    seed: int, number: int, stream: int = 0, reuse: np.random.Generator | None = None
) -> np.random.Generator:
    """A generator that depends on the numbers alone. Setting the state of one that is there
    (`reuse`) takes a tenth of the time of making one."""
    rng = reuse or np.random.Generator(np.random.Philox(key=0))
    rng.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": [0, 0, 0, stream], "key": [seed % 2**64, number]},
        "buffer": [0] * 4,
        "buffer_pos": 4,
        "has_uint32": 0,
        "uinteger": 0,
    }
    return rng


# Pairs by name


class Pair(NamedTuple):
    gt: "Source | SyntheticImages"
    gt_index: int
    lq: Source | None  # None: made by the degradation
    lq_index: int
    height: int  # LQ pixels that are used, aligned top left as in BasicSR
    width: int


class Pairs(NamedTuple):
    groups: list[list[Pair]]  # a list for each root of dataroot_gt
    sources: list[Source]
    damaged: list[str]  # a sentence for each file that can't be read, which is in no pair
    problems: list[str]  # all others
    notices: list[str]


def open_pairs(
    gt_roots: Any,
    lq_roots: Any = None,
    scale: int = 1,
    filename_tmpl: str = "{}",
    meta_info_file: str | Path | None = None,
    cache_gb: float = 0.0,
    whole: bool = False,
) -> Pairs:
    """Opens folders and packed files and pairs their images by name.

    Args:
        gt_roots, lq_roots: A path, several separated by commas, or a sequence of them.
        filename_tmpl: Name of the partner of {}.
        meta_info_file: A list of the files to use, as BasicSR's. None: all.
        cache_gb, whole: See ImageFolder.
    """
    gt_roots, lq_roots = split_roots(gt_roots), split_roots(lq_roots)
    if lq_roots and len(lq_roots) != len(gt_roots):
        raise UserError("give one dataroot_lq for each dataroot_gt")
    if "{}" not in filename_tmpl or scale < 1:
        raise UserError(f"{filename_tmpl=} must hold {{}}, and {scale=} must be at least 1")
    listed = read_list(meta_info_file) if meta_info_file else None
    share = cache_gb / max(len(gt_roots) + len(lq_roots), 1)
    gts = [open_source(root, share, whole) for root in gt_roots]
    lqs = [open_source(root, share, whole) for root in lq_roots]

    damaged = damaged_files(gts, lqs, listed)
    problems = missing_files(gts, listed, meta_info_file)
    groups = []
    for k, gt in enumerate(gts):
        if lqs:
            group = match(gt, lqs[k], scale, filename_tmpl, listed, problems)
        else:
            group = []
            for i, (height, width, _) in enumerate(gt.shapes):
                if not is_listed(gt.names[i], listed):
                    continue
                if min(height, width) < scale:
                    problems.append(f"{gt.root}/{gt.names[i]}: smaller than {scale=}: remove it")
                    continue
                group.append(Pair(gt, i, None, i, height // scale, width // scale))
        groups.append(group)
    notices = [notice for source in gts + lqs for notice in source.notices]
    return Pairs(groups, gts + lqs, damaged, problems, notices)


def damaged_files(gts: list[Source], lqs: list[Source], listed: set[str] | None) -> list[str]:
    """Without those GT files that aren't listed. (The list doesn't name LQ files.)"""
    sentences = []
    for source in gts + lqs:
        for name, sentence in source.problems:
            if source in lqs or is_listed(name, listed):
                sentences.append(sentence)
    return sentences


def missing_files(
    gts: list[Source], listed: set[str] | None, meta_info_file: str | Path | None
) -> list[str]:
    if listed is None:
        return []
    found = set()
    for gt in gts:
        found.update(same_letters(name) for name in gt.names)
        found.update(same_letters(name) for name, _ in gt.problems)
    return [f"{meta_info_file}: {name} is missing" for name in sorted(listed - found)]


def is_listed(name: str, listed: set[str] | None) -> bool:
    return listed is None or same_letters(name) in listed


def split_roots(roots: Any) -> list[str]:
    if not roots:
        return []
    if isinstance(roots, str | Path):
        roots = split_at_commas(str(roots))
    return [os.path.expanduser(str(root).strip()) for root in roots]


def validation_roots(val_gt: Any, val_lq: Any) -> list[tuple[str, str | None]]:
    """(val_gt, val_lq) of each validation set. Raises UserError for unequal numbers of them."""
    gt_roots, lq_roots = split_roots(val_gt), split_roots(val_lq)
    if not lq_roots:
        return [(root, None) for root in gt_roots]
    if len(lq_roots) != len(gt_roots):
        raise UserError("give one val_lq for each val_gt")
    return list(zip(gt_roots, lq_roots, strict=True))


def split_at_commas(text: str) -> list[str]:
    """Its parts. Those that together are the name of a file or folder stay together."""
    words = text.split(",")
    parts = []
    while words:
        count = len(words)
        while count > 1 and not os.path.exists(os.path.expanduser(",".join(words[:count]).strip())):
            count -= 1
        parts.append(",".join(words[:count]).strip())
        words = words[count:]
    return parts


def open_source(root: str, cache_gb: float, whole: bool) -> Source:
    return PackedImages(root) if Path(root).is_file() else ImageFolder(root, cache_gb, whole)


def read_list(path: str | Path) -> set[str]:
    """Names in BasicSR's meta_info_file: "name.png (h,w,c)" or "name.png" on each line."""
    names = set()
    for line in read_text(path).splitlines():
        line = line.strip()
        if line.endswith(")"):
            line = line.rsplit(" (", 1)[0].strip()
        if line:
            names.add(same_letters(line))
    if not names:
        raise UserError(f"{path} lists no image")
    return names


def read_text(path: str | Path) -> str:
    """A text file in UTF-8 or, with its mark, in UTF-16, as Windows editors save it."""
    content = Path(path).read_bytes()
    utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not in UTF-8 ({error.reason}): save it as UTF-8") from None


def match(
    gt: Source,
    lq: Source,
    scale: int,
    filename_tmpl: str,
    listed: set[str] | None,
    problems: list[str],
) -> list[Pair]:
    """Pairs of one root. Appends a sentence to `problems` for what has no partner or another size.

    The partner of a.jpg is, with filename_tmpl="{}x4", the first that exists of a file called
    ax4.jpg, one called ax4, and one called ax4 with any suffix. Each LQ image is used once. A
    damaged file and its partner are in no pair, and no problem here.
    """
    # Damaged files come last: their numbers have no shapes.
    gt_names = [*gt.names, *(name for name, _ in gt.problems)]
    names = [*lq.names, *(name for name, _ in lq.problems)]
    by_name = {same_letters(name): j for j, name in enumerate(names)}
    by_stem = {os.path.splitext(name)[0]: j for name, j in by_name.items()}
    free = set(range(len(names)))
    folders = set()  # of LQ images, that hold partners
    group = []
    for i, name in enumerate(gt_names):
        if not is_listed(name, listed):
            continue
        path = Path(name)
        partner = path.parent / filename_tmpl.replace("{}", path.stem)
        folders.add(partner.parent)
        partner = same_letters(partner.as_posix())
        j = by_name.get(partner + path.suffix, by_name.get(partner, by_stem.get(partner)))
        if j not in free:
            if i < len(gt.names):
                place = f"no partner {partner}.* left in {lq.root}: {filename_tmpl=}"
                problems.append(f"{gt.root}/{name}: {place}")
            continue
        free.remove(j)
        if i >= len(gt.names) or j >= len(lq.names):  # damaged
            continue
        height, width, _ = gt.shapes[i]
        lq_height, lq_width = lq.shapes[j][:2]
        surplus = max(abs(lq_height * scale - height), abs(lq_width * scale - width))
        if surplus >= scale or min(height, width) < scale:
            wanted = f"{width // scale}x{height // scale}"
            sizes = f"{lq_width}x{lq_height} pixels, not {wanted}, for {scale=}"
            problems.append(f"{lq.root}/{lq.names[j]} and {gt.root}/{name} do not match: {sizes}")
        height, width = min(height // scale, lq_height), min(width // scale, lq_width)
        group.append(Pair(gt, i, lq, j, height, width))
    if listed is None:
        for j in sorted(free):
            # With filename_tmpl=X2/{}x2, the images of X3 are none of this training's.
            elsewhere = "/" in filename_tmpl and Path(names[j]).parent not in folders
            if j < len(lq.names) and not elsewhere:
                problems.append(f"{lq.root}/{names[j]} is no image's partner in {gt.root}")
    return group


def same_letters(name: str) -> str:
    """ü is one character or two: macOS writes names in another way than Linux."""
    return unicodedata.normalize("NFC", name)


def raise_problems(problems: list[str], roots: list[Any], options: dict[str, Any]) -> None:
    """UserError with the first problems, and the command that names all of them."""
    if not problems:
        return
    words = []
    for root in roots:
        if root:
            words.append('"' + ",".join(split_roots(root)) + '"')
    words += [f"--{key}={value}" for key, value in options.items() if value is not None]
    command = " ".join(["python data.py check", *words])
    raise UserError("; ".join([*problems[:5], f"{command} names all"]))


def name_small(groups: list[list[Pair]], scale: int, gt_size: int) -> list[str]:
    """A notice about images that are smaller than the patch."""
    small = []
    for pair in all_pairs(groups):
        if min(pair.height, pair.width) * scale < gt_size:
            small.append(f"{pair.gt.root}/{name_of(pair)}")
    if not small:
        return []
    names = ", ".join(small[:3])
    advice = "a smaller --gt_size takes them as they are"
    return [
        f"{len(small)} image(s) are below {gt_size=}, padded by reflection, as {names}; {advice}"
    ]


FEW_MEGAPIXELS = 10  # BSD400 has 62, DIV2K 2,300


def name_few(groups: list[list[Pair]]) -> list[str]:
    """A notice about a training set that is small."""
    amount = megapixels(groups)
    if not groups or amount >= FEW_MEGAPIXELS:
        return []
    advice = "add images, or fine-tune trained weights with --pretrain_network"
    return [f"{amount:.2g} megapixels are few, and the network may memorise them: {advice}"]


def megapixels(groups: list[list[Pair]]) -> float:
    """Of the ground truth."""
    pixels = 0
    for pair in all_pairs(groups):
        height, width, _ = pair.gt.shapes[pair.gt_index]
        pixels += height * width
    return pixels / 1e6


def describe_held_out(names: list[str]) -> str:
    if not names:
        return "none (fewer than 4 images, or all below gt_size): give --val_gt=FOLDER"
    return f"{len(names)} held out: {', '.join(names)}"


def split_held_out(
    groups: list[list[Pair]], scale: int, gt_size: int
) -> tuple[list[list[Pair]], list[Pair]]:
    """(groups to train on, pairs to validate on): a tenth of each root, at most 8 pairs.

    They are chosen by a hash of their names, so that a folder that grows keeps most of them. A root
    of less than 4 pairs keeps all, and pairs that are smaller than a patch are not chosen.
    """
    training, held_out = [], []
    for group in groups:
        large = [pair for pair in group if min(pair.height, pair.width) * scale >= gt_size]
        count = min(max(len(group) // 10, 1), 8) if len(group) >= 4 else 0
        chosen = sorted(large, key=lambda pair: zlib.crc32(os.fsencode(name_of(pair))))[:count]
        held_out += chosen
        training.append([pair for pair in group if pair not in chosen])
    return training, held_out


def too_small(names: list[str], pairs: list[Pair], scale: int, crop_border: int) -> str | None:
    """A sentence about images that can't be validated: SSIM needs 11 pixels, PSNR-B 16."""
    small = []
    for name, pair in zip(names, pairs, strict=True):
        if min(pair.height, pair.width) * scale < 16 + 2 * crop_border:
            small.append(name)
    if not small:
        return None
    return f"images below 16 pixels inside {crop_border=}: {', '.join(small[:5])}: remove them"


def name_of(pair: Pair) -> str:
    return same_letters(pair.gt.names[pair.gt_index])


def all_pairs(groups: list[list[Pair]]) -> list[Pair]:
    return [pair for group in groups for pair in group]


# Datasets


class PairedImageDataset(Dataset):
    """Training pairs: dataset[n] is (lq (C, h, w), gt (C, h * scale, w * scale)), for any n >= 0.

    dataset[n, gt_size] has another patch size. A damaged image is replaced by the next sample, as
    long as no more than 1 % of them are. If all files have 8 bits, gt is uint8 (the device
    divides by 255), and lq is, too, unless the degradation returns floats, as noise does. Else both
    are float32 in [0, 1].

    Args:
        dataroot_gt: A folder or packed file, or several. None: synthetic images.
        dataroot_lq: Their partners, likewise. None: made by `degradation`.
        degradation: A name in DEGRADATIONS.
        scale: GT pixels per LQ pixel, along each side.
        gt_size: Side of the GT patch in pixels, a multiple of scale.
        in_chans: 3 for RGB, 1 for gray.
        filename_tmpl, meta_info_file, cache_gb: See `open_pairs`.
        dataset_weights: How often to draw from each root. None: by the number of its images.
        use_hflip, use_rot: Horizontal flips; vertical flips and transpositions.
        hold_out: Keep a few pairs of each root out, for validation, in `held_out`. See
            `split_held_out`.
        degradation_options: `sigma` of 255 or (low, high), `quality` of JPEG or (low, high), ...

    Raises UserError, with files and remedy, for what can't be paired or read, and
    UnreadableImage while training.
    """

    def __init__(
        self,
        dataroot_gt: Any = None,
        dataroot_lq: Any = None,
        degradation: str = "noise",
        scale: int = 1,
        gt_size: int = 128,
        in_chans: int = 3,
        filename_tmpl: str = "{}",
        meta_info_file: str | Path | None = None,
        dataset_weights: tuple[float, ...] | None = None,
        use_hflip: bool = True,
        use_rot: bool = True,
        seed: int = 0,
        cache_gb: float = 2.0,
        hold_out: bool = False,
        **degradation_options: Any,
    ) -> None:
        if in_chans not in (1, 3) or scale < 1 or gt_size % scale:
            raise UserError(f"{in_chans=} must be 1 or 3, and {gt_size=} a multiple of {scale=}")
        self.scale = scale
        self.gt_size = gt_size
        self.in_chans = in_chans
        self.use_hflip = use_hflip
        self.use_rot = use_rot
        self.seed = seed
        self.degradation = None
        if not dataroot_lq:
            self.degradation = bind_degradation(degradation, scale, in_chans, degradation_options)

        names = {"filename_tmpl": filename_tmpl, "meta_info_file": meta_info_file}
        pairs = open_pairs(dataroot_gt, dataroot_lq, scale, **names, cache_gb=cache_gb)
        self.sources = pairs.sources
        self.damaged_at_start = len(pairs.damaged)
        accepted = self.damaged_at_start <= self.allowed_damage()
        problems = pairs.problems if accepted else pairs.damaged + pairs.problems
        raise_problems(problems, [dataroot_gt, dataroot_lq], {"scale": scale} | names)
        for root, group in zip(split_roots(dataroot_gt), pairs.groups, strict=True):
            if not group:
                reason = f"listed in {meta_info_file}" if meta_info_file else "that can be read"
                raise UserError(f"{root} has no image {reason}: leave it out of dataroot_gt")
        self.groups = pairs.groups
        self.held_out: list[Pair] = []
        if hold_out:
            self.groups, self.held_out = split_held_out(pairs.groups, scale, gt_size)
        self.pairs = all_pairs(self.groups)
        self.notices = pairs.notices + name_small(pairs.groups, scale, gt_size)
        self.notices += [f"left out: {sentence}" for sentence in pairs.damaged]
        self.eight_bit = all(depth == 1 for source in pairs.sources for depth in source.depths)
        self.dataset_weights = dataset_weights
        if dataset_weights and (
            len(dataset_weights) != len(self.groups) or min(dataset_weights) <= 0
        ):
            raise UserError(f"{dataset_weights=}: give a positive one for each root")
        self.synthetic = None
        if not pairs.sources:
            self.synthetic = SyntheticImages(seed, max(256, 2 * gt_size), in_chans)
        self.rng = sample_rng(0, 0)  # set anew for each sample
        self.epoch = -1
        self.order: np.ndarray | None = None  # of the pairs in this epoch

    def __len__(self) -> int:
        return len(self.pairs) or SyntheticImages.POOL

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        number, gt_size = index if isinstance(index, tuple) else (index, self.gt_size)
        while True:
            try:
                return self.sample(number, gt_size)
            except UnreadableImage:
                if self.count_damaged() > self.allowed_damage():
                    raise
            number += 1

    def allowed_damage(self) -> float:
        """How many damaged images the training accepts: 1 % of all."""
        return 0.01 * (self.damaged_at_start + sum(len(source.names) for source in self.sources))

    def count_damaged(self) -> int:
        return self.damaged_at_start + sum(int(source.damaged.sum()) for source in self.sources)

    def sample(self, number: int, gt_size: int) -> tuple[Tensor, Tensor]:
        size = gt_size // self.scale
        rng = sample_rng(self.seed, number, reuse=self.rng)
        u, v, down, across, *flips = rng.random(7).tolist()
        pair = self.choose(number, u, v)
        # The corner of the crop in LQ pixels; every position is equally likely.
        top = int(down * max(pair.height - size + 1, 1))
        left = int(across * max(pair.width - size + 1, 1))
        symmetry = [flip < 0.5 for flip in flips]
        if self.degradation:
            lq, gt = self.degraded_crop(pair, top, left, size, rng)
        else:
            lq, gt = self.paired_crop(pair, top, left, size)
        lq = pad_by_mirroring(lq, size)
        gt = pad_by_mirroring(gt, gt_size)
        return self.augment(lq, *symmetry), self.augment(gt, *symmetry)

    def name_of_sample(self, number: int) -> str:
        u, v, *_ = sample_rng(self.seed, number).random(7).tolist()
        pair = self.choose(number, u, v)
        return f"synthetic {pair.gt_index}" if self.synthetic else name_of(pair)

    def choose(self, number: int, u: float, v: float) -> Pair:
        """The pair of a sample, whose random numbers in [0, 1) are u and v."""
        if self.synthetic:
            # A pool that a new image joins every 64 samples. It starts with 9 images, because the
            # first batch has to wait for them to be drawn.
            newest = 8 + number // 64
            i = newest - int(u * min(newest + 1, SyntheticImages.POOL))
            side = self.synthetic.size // self.scale
            return Pair(self.synthetic, i, None, i, side, side)
        if self.dataset_weights:
            bounds = np.cumsum(self.dataset_weights)
            group = self.groups[np.searchsorted(bounds, u * bounds[-1], side="right")]
            return group[int(v * len(group))]
        epoch, position = divmod(number, len(self.pairs))
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = sample_rng(self.seed, epoch, stream=2).permutation(len(self.pairs))
        return self.pairs[self.order[position]]

    def paired_crop(
        self, pair: Pair, top: int, left: int, size: int
    ) -> tuple[np.ndarray, np.ndarray]:
        s = self.scale
        lq = pair.lq[pair.lq_index][: pair.height, : pair.width]
        gt = pair.gt[pair.gt_index][: pair.height * s, : pair.width * s]
        lq = lq[top : top + size, left : left + size]
        gt = gt[top * s : (top + size) * s, left * s : (left + size) * s]
        return to_channels(lq, self.in_chans), to_channels(gt, self.in_chans)

    def degraded_crop(
        self, pair: Pair, top: int, left: int, size: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Degrades no more than the crop and the margin around it that the degradation sees."""
        s = self.scale
        degrade, margin, sharpened = self.degradation
        y, bottom = with_margin(top, size, pair.height, margin)
        x, right = with_margin(left, size, pair.width, margin)
        gt = pair.gt[pair.gt_index][y * s : bottom * s, x * s : right * s]
        gt = to_channels(gt, self.in_chans)
        if margin == 0:  # small images are padded before, so that the noise isn't mirrored
            gt = pad_by_mirroring(gt, size * s)
        if sharpened:
            gt = sharpen(gt)
        lq = degrade(gt, rng)
        top, left = top - y, left - x
        lq = lq[top : top + size, left : left + size]
        gt = gt[top * s : (top + size) * s, left * s : (left + size) * s]
        return lq, gt

    def augment(self, image: np.ndarray, hflip: bool, vflip: bool, transpose: bool) -> Tensor:
        """(H, W, C) -> (C, H, W), in one of BasicSR's eight symmetries, as far as options allow."""
        if self.use_hflip and hflip:
            image = image[:, ::-1]
        if self.use_rot and vflip:
            image = image[::-1]
        if self.use_rot and transpose:
            image = image.transpose(1, 0, 2)
        image = image.transpose(2, 0, 1)
        if not self.eight_bit:
            image = to_float(image)
        return torch.from_numpy(np.require(image, requirements=["C_CONTIGUOUS", "WRITEABLE"]))


def with_margin(start: int, size: int, limit: int, margin: int) -> tuple[int, int]:
    """Start and end of a crop with its margin: at multiples of it, inside the image."""
    block = max(margin, 1)
    first = start // block * block - margin
    last = -(-(start + size) // block) * block + margin
    return max(first, 0), min(last, limit)


def pad_by_mirroring(image: np.ndarray, size: int) -> np.ndarray:
    """To at least (size, size). The edge is mirrored too: otherwise LQ and GT would be shifted."""
    below = max(size - image.shape[0], 0)
    right = max(size - image.shape[1], 0)
    if below == right == 0:
        return image
    return np.pad(image, ((0, below), (0, right), (0, 0)), "symmetric")


class ValidationImages(Dataset):
    """images[i] is {"name", "lq": float32 (C, h, w), "gt": array (h * scale, w * scale, C)}, whole.

    Noise is the reference test noise, np.random.seed(0) before each image; other degradations
    draw from a generator that is fixed by the image's number. All files are decoded once, so that
    damaged ones are named before the training. With `held_out`, which are pairs of a
    PairedImageDataset, it takes their middle 512 pixels; with neither, `n` synthetic images.
    """

    def __init__(
        self,
        val_gt: str | Path | None = None,
        val_lq: str | Path | None = None,
        n: int = 16,
        degradation: str = "noise",
        scale: int = 1,
        in_chans: int = 3,
        filename_tmpl: str = "{}",
        crop_border: int = 0,
        held_out: list[Pair] | None = None,
        **degradation_options: Any,
    ) -> None:
        if val_lq and not val_gt:
            raise UserError("val_lq needs val_gt, the ground truth")
        self.source = f"{val_gt}, {val_lq}"  # figures of equal sources can be compared
        self.crop_side = None  # LQ pixels of the middle that is taken; None: the whole image
        self.scale = scale
        self.in_chans = in_chans
        self.degradation = None
        self.reference_noise = degradation == "noise"
        if not val_lq and not (held_out and held_out[0].lq):
            options = validation_options(degradation_options)
            self.degradation = bind_degradation(degradation, scale, in_chans, options)
        if held_out:
            self.crop_side = 512 // scale
            self.notices = []
            self.pairs = self.readable(held_out)
            if not self.pairs:
                raise UserError(f"{self.notices[0]}: none is left; repair it, or give --val_gt")
            self.names = [name_of(pair) for pair in self.pairs]
            self.source = f"held out: {', '.join(self.names)}"
        elif val_gt is None:
            images = SyntheticImages(seed=-1, in_chans=in_chans, keep=n)
            side = images.size // scale
            self.notices = []
            self.pairs = [Pair(images, i, None, i, side, side) for i in range(n)]
            self.names = [f"synthetic{i:02d}" for i in range(n)]
        else:
            pairs = open_pairs(val_gt, val_lq, scale, filename_tmpl, whole=True)
            options = {"scale": scale, "filename_tmpl": filename_tmpl}
            raise_problems(pairs.damaged + pairs.problems, [val_gt, val_lq], options)
            self.notices = pairs.notices
            self.pairs = all_pairs(pairs.groups)
            self.names = [name_of(pair) for pair in self.pairs]
        self.alike = differ_in_suffix_only([Path(name) for name in self.names])
        small = too_small(self.names, self.pairs, scale, crop_border)
        if small:
            where = val_gt or ("held out" if held_out else "synthetic")
            raise UserError(f"{where}: {small}")

    def __len__(self) -> int:
        return len(self.pairs)

    def readable(self, pairs: list[Pair]) -> list[Pair]:
        """Those without damaged files, which are named in the notices."""
        good = []
        for pair in pairs:
            try:
                pair.gt[pair.gt_index]
                if pair.lq:
                    pair.lq[pair.lq_index]
                good.append(pair)
            except UnreadableImage as error:
                self.notices.append(f"left out of validation: {error}")
        return good

    def __getitem__(self, i: int) -> dict[str, Any]:
        pair = self.pairs[i]
        s = self.scale
        height = min(pair.height, self.crop_side or pair.height)
        width = min(pair.width, self.crop_side or pair.width)
        top, left = (pair.height - height) // 2, (pair.width - width) // 2
        gt = pair.gt[pair.gt_index][top * s : (top + height) * s, left * s : (left + width) * s]
        gt = to_channels(gt, self.in_chans).copy()
        if self.degradation:
            rng = np.random.RandomState(0) if self.reference_noise else sample_rng(0, i)
            lq = self.degradation.function(gt, rng)
        else:
            lq = pair.lq[pair.lq_index][top : top + height, left : left + width]
        lq = to_float(to_channels(lq, self.in_chans)).transpose(2, 0, 1)
        name = Path(self.names[i])
        if name not in self.alike:
            name = name.with_suffix("")
        return {"name": printable(name.as_posix()), "lq": torch.from_numpy(lq.copy()), "gt": gt}


def printable(text: str) -> str:
    """Bytes of a file's name that are no UTF-8 become \\udc80 and the like."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# Loading


def sample_batches(
    plan: Callable[[int], tuple[int, int]], rank: int = 0, world: int = 1, start: int = 0
) -> Iterator[list[tuple[int, int]]]:
    """Batches of the dataset's indices (n, gt_size), without end, from iteration start + 1 on.

    plan(it) is (batch_size, gt_size) of iteration `it`. Samples are numbered consecutively,
    whatever the batch size. Of each batch, every one of `world` ranks takes a contiguous slice.
    """
    first = sum(plan(it)[0] for it in range(1, start + 1))
    it = start
    while True:
        it += 1
        batch_size, gt_size = plan(it)
        if batch_size % world:
            raise UserError(f"{batch_size=} is no multiple of {world} ranks, in iteration {it}")
        size = batch_size // world
        begin = first + rank * size
        yield [(number, gt_size) for number in range(begin, begin + size)]
        first += batch_size


def train_loader(
    dataset: Dataset, batches: Any, num_workers: int, pin: bool = False, **options: Any
) -> DataLoader:
    """Loads `batches` in their order. They have no end, so workers start once. `pin`: for a GPU."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        pin_memory=pin,
        worker_init_fn=leave_signals_to_the_trainer,
        **options,
    )


def leave_signals_to_the_trainer(worker: int) -> None:
    """Signals to the whole process group reach the workers, too, but the trainer needs batches
    until it has saved. It stops them itself."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    # On SIGTERM it goes on for ten minutes. Then SIGALRM ends it, in case the trainer is gone.
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(600))


class Prefetcher:
    """Iterates over (lq, gt), float32 on `device`, loaded and copied ahead by a thread.

    On CUDA the copies run in a side stream. `wait`: seconds that next() has waited so far.
    next() raises UnreadableImage for a damaged image and RuntimeError for a worker that died.
    """

    def __init__(self, loader: DataLoader, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.wait = 0.0
        self.stream = None
        if self.device.type == "cuda":
            # A thread begins on GPU 0: without set_device, every rank would open a context there.
            self.stream = torch.cuda.Stream(self.device)
            device = self.stream.device  # with its number, also for "cuda"
            self.thread = ThreadPoolExecutor(1, "loader", torch.cuda.set_device, (device,))
        else:
            self.thread = ThreadPoolExecutor(1, "loader")
        self.batches = iter(loader)  # here, because the main thread should fork the workers
        self.ready = [self.thread.submit(self.load) for _ in range(2)]  # two batches ahead

    def load(self) -> tuple[list[Tensor], Any]:
        """Runs in the thread. Returns a batch, and an event on CUDA that says it is copied."""
        batch = next(self.batches)
        if self.device.type == "mps":  # takes no operations from a second thread
            return batch, None
        if self.stream is None:
            return self.to_device(batch), None
        with torch.cuda.stream(self.stream):
            batch = self.to_device(batch)
            return batch, self.stream.record_event()

    def to_device(self, batch: list[Tensor]) -> list[Tensor]:
        tensors = []
        for images in batch:
            images = images.to(self.device, non_blocking=True)
            tensors.append(images.float() / 255 if images.dtype == torch.uint8 else images.float())
        return tensors

    def __next__(self) -> list[Tensor]:
        begin = time.perf_counter()
        self.ready.append(self.thread.submit(self.load))
        try:
            batch, copied = self.ready.pop(0).result()
        except UnreadableImage as error:
            # From a worker it is a whole traceback that ends in the sentence.
            sentence = str(error).strip().splitlines()[-1].rpartition("UnreadableImage: ")[2]
            raise UnreadableImage(sentence) from error
        except (OSError, EOFError) as error:  # while a worker sent a batch
            raise RuntimeError(f"a DataLoader worker has died: {error!r}") from None
        except RuntimeError as error:
            if "shared memory" in str(error):
                advice = "--num_workers=0, or in Docker --shm-size=8g"
                sentence = "the workers' shared memory, /dev/shm, is too small"
                raise UserError(f"{sentence}: {advice}") from error
            raise
        self.wait += time.perf_counter() - begin
        if self.device.type == "mps":
            return self.to_device(batch)
        if copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(copied)
            for images in batch:  # the side stream must not reuse their memory while they are used
                images.record_stream(stream)
        return batch

    def __iter__(self) -> "Prefetcher":
        return self

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(self, *_: Any) -> None:
        for future in self.ready:
            future.cancel()
        workers = list(getattr(self.batches, "_workers", []))
        if wait(self.ready, timeout=10).not_done:
            # The thread waits for a batch that never comes, until it sees that workers are gone.
            for worker in workers:
                with contextlib.suppress(RuntimeError):  # PyTorch's, about a worker that was killed
                    worker.kill()
                    worker.join()
        self.thread.shutdown()
        if workers:  # here, because an error's traceback may keep the iterator, and so them, alive
            self.batches._shutdown_workers()
        for worker in workers:
            if worker.is_alive():  # it ignores SIGTERM
                worker.kill()


# Command line


def main(arguments: list[str]) -> None:
    command, *rest = arguments or [""]
    # A training command may be pasted as it is: check python train.py configs/tiny.py ...
    while rest and Path(rest[0]).name in ("python", "python3", "train.py") and len(rest) > 1:
        rest = rest[1:]
    options = [word for word in rest if word.startswith("--") or is_config(word)]
    paths = [word for word in rest if word not in options]
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
    elif command == "pack" and len(paths) == 2 and not options:
        target = Path(paths[1])
        if target.suffix.lower() in IMAGE_SUFFIXES:  # never over an image
            target = target.with_suffix("")
        pack(paths[0], target.with_name(target.name.removesuffix(".npy") + ".npy"))
    elif command == "check" and len(paths) <= 2:
        check(paths, options)
    elif command == "preview" and len(paths) == 1 and Path(paths[0]).suffix:
        preview(Path(paths[0]), options)
    else:
        sys.exit(f"unknown or incomplete:\n\n{__doc__}")


def is_config(word: str) -> bool:
    """A config file, or the folder of a run, which has one."""
    return word.endswith((".py", ".json")) or Path(word, "config.json").is_file()


def check(paths: list[str], options: list[str]) -> None:
    """Decodes all images and prints every problem, and what may be improved."""
    cfg = read_options(options)
    if paths:
        cfg.dataroot_gt = paths[0]
        cfg.dataroot_lq = paths[1] if len(paths) == 2 else None
    if not cfg.dataroot_gt:
        raise UserError("give a folder: python data.py check photos, or --dataroot_gt=photos")
    names = (cfg.filename_tmpl, cfg.meta_info_file)
    pairs = open_pairs(cfg.dataroot_gt, cfg.dataroot_lq, cfg.scale, *names, whole=True)
    problems = report_pairs("training", pairs)
    for notice in name_small(pairs.groups, cfg.scale, cfg.gt_size) + name_few(pairs.groups):
        print(f"note: {notice}")

    roots = validation_roots(cfg.val_gt, cfg.val_lq)
    if not roots and not problems:
        _, held_out = split_held_out(pairs.groups, cfg.scale, cfg.gt_size)
        print(f"validation: {describe_held_out([name_of(pair) for pair in held_out])}")
    for root, lq_root in roots:
        if root != "synthetic":
            pairs = open_pairs(root, lq_root, cfg.scale, cfg.filename_tmpl, whole=True)
            problems += report_pairs(f"validation {root}", pairs)
            every = all_pairs(pairs.groups)
            names = [name_of(pair) for pair in every]
            small = too_small(names, every, cfg.scale, cfg.crop_border)
            if small:
                problems += 1
                print(f"{root}: {small}")
    if problems:
        sys.exit(f"problems: {problems}")
    print("no problems")


def report_pairs(title: str, pairs: Pairs) -> int:
    """Prints what was found. Returns the number of problems."""
    every = all_pairs(pairs.groups)
    kind = "pair(s)" if every and every[0].lq else "image(s)"
    print(f"{title}: {len(every):,} {kind}, {megapixels(pairs.groups):,.3g} megapixels")
    for notice in pairs.notices:
        print(f"note: {notice}")
    problems = pairs.damaged + pairs.problems
    for problem in problems:
        print(problem)
    return len(problems)


COLUMNS, ROWS = 4, 3  # of a preview


def preview(path: Path, options: list[str]) -> None:
    """Writes the first training pairs with their names, LQ above GT, enlarged by a whole factor."""
    if path.exists():
        raise UserError(f"{path} is there already: give a name that isn't")
    cfg = read_options(options)
    dataset = PairedImageDataset(**dataset_options(cfg))
    side = cfg.gt_size * max(256 // cfg.gt_size, 1)
    line, gap = 20, 6  # pixels for a name, and between pairs
    font = ImageFont.load_default(14)
    width, height = side + gap, 2 * side + line + gap
    sheet = Image.new("RGB", (COLUMNS * width - gap, ROWS * height - gap), "white")
    canvas = ImageDraw.Draw(sheet)
    letters = side // 8  # that fit above a patch
    for n in range(COLUMNS * ROWS):
        x, y = n % COLUMNS * width, n // COLUMNS * height
        canvas.text((x + 4, y + 1), dataset.name_of_sample(n)[-letters:], "black", font)
        for i, image in enumerate(dataset[n]):
            sheet.paste(as_picture(image, side), (x, y + line + i * side))
    sheet.save(path)
    print(f"{path}: {COLUMNS * ROWS} training pairs, the inputs above, the ground truth below")


def as_picture(image: Tensor, side: int) -> Image.Image:
    """A patch (C, H, W), uint8 or float in [0, 1], as a square RGB picture."""
    if image.dtype == torch.uint8:
        image = image / 255
    image = image.clip(0, 1).mul(255).round().byte().expand(3, -1, -1)
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return picture.resize((side, side), Image.NEAREST)


def read_options(arguments: list[str]) -> Any:
    """The options of train.py in config files and --key=value."""
    try:
        from train import read_config
    except ModuleNotFoundError as error:
        raise UserError("the command needs train.py beside data.py: copy it there, too") from error
    return read_config(arguments)


def dataset_options(cfg: Any) -> dict[str, Any]:
    """Arguments of PairedImageDataset, from train.py's options."""
    names = inspect.signature(PairedImageDataset).parameters
    options = {name: getattr(cfg, name) for name in names if hasattr(cfg, name)}
    return options | options_of_degradation(cfg.degradation, cfg)


def escape_unprintable() -> None:
    """What the terminal's encoding lacks is printed as an escape, and stops no command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    escape_unprintable()
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:  # train.py's UserError is that of another data module
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped")
