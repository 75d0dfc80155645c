"""What data.py promises: exact pixels, exact streams, and one sentence for what is wrong."""

import contextlib
import errno
import functools
import io
import itertools
import os
import shutil
import struct
import subprocess
import sys
import time
import types
import unicodedata
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from data import (  # noqa: E402
    ImageFolder,
    PackedImages,
    PairedImageDataset,
    Prefetcher,
    SyntheticImages,
    ValidationImages,
    imresize,
    list_images,
    read_header,
    read_image,
    sample_batches,
    train_loader,
)

SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not (SHARED / "Set5").is_dir(), reason=f"{SHARED} holds no Set5")


ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]


def photo(h, w, c=3, seed=0, dtype=np.uint8):
    """Smooth values with some noise, so that JPEG and bicubic have something to do."""
    rng = np.random.default_rng(seed)
    y, x, k = np.mgrid[:h, :w, :c]
    img = np.sin(y / 9 + k) + np.cos(x / 7 - k) + rng.normal(0, 0.1, (h, w, c))
    img = (img - img.min()) / (img.max() - img.min())
    return (img * np.iinfo(dtype).max).astype(dtype)


def save(path, img, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(img[..., 0] if img.ndim == 3 and img.shape[2] == 1 else img).save(
        path, **options
    )
    return path


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def save_png16(path, img):
    """Pillow can't write 16-bit colour: kinds 0, 4, 2, 6 have 1, 2, 3, 4 channels."""
    (h, w, c), rows = img.shape, (b"\0" + row.astype(">u2").tobytes() for row in img)
    header = struct.pack(">IIBBBBB", w, h, 16, {1: 0, 2: 4, 3: 2, 4: 6}[c], 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"".join(rows))) + chunk(b"IEND", b"")
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def save_tiff16(path, img, order="<", deflate=False):
    (h, w, c), pixels = img.shape, img.astype(order + "u2").tobytes()
    pixels = zlib.compress(pixels) if deflate else pixels
    tags = [
        (256, w),
        (257, h),
        (258, 0),
        (259, 8 if deflate else 1),
        (262, 2),
        (273, 0),
        (277, c),
        (278, h),
    ]
    tags += [(279, len(pixels))] + ([(338, 2)] if c == 4 else [])
    extra, entries = 8 + 2 + 12 * len(tags) + 4, b""
    for tag, value in tags:
        if tag == 258:
            entries += struct.pack(order + "HHII", tag, 3, c, extra)
        else:
            entries += struct.pack(
                order + "HHII", tag, 4, 1, extra + 2 * c if tag == 273 else value
            )
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(tags))
    path.write_bytes(start + entries + bytes(4) + struct.pack(order + "H" * c, *[16] * c) + pixels)
    return path


@pytest.fixture
def folder(tmp_path):
    for k in range(5):
        save(tmp_path / "gt" / f"{k}.png", photo(50 + 3 * k, 61, seed=k))
    return tmp_path / "gt"


def batches_of(batch_size, *arguments, **options):
    """sample_batches of one batch and patch size."""
    return sample_batches(lambda it: (batch_size, 32), *arguments, **options)


def same(a, b):
    return all(
        torch.equal(x, y) for pair in zip(a, b, strict=True) for x, y in zip(*pair, strict=True)
    )


def run_cli(*arguments):
    """(exit code, what it printed) of the command, in this process: starting one takes seconds."""
    printed, code = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            data.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = 1
            print(stop.code)
        except (ValueError, OSError) as error:
            code = 1
            print(f"error: {error}")
    return code, printed.getvalue()


def test_the_command_is_a_command(folder):
    command = [sys.executable, ROOT / "data.py", "check"]
    for path, code, words in (
        (folder, 0, "no problems"),
        ("none", 1, "error: 'none' is not there"),
    ):
        done = subprocess.run([*command, path], capture_output=True, text=True)
        assert done.returncode == code and words in done.stdout + done.stderr, done.stderr


# ---- reading ----
def test_list_images_is_sorted_recursive_and_survives_links(tmp_path):
    for name in (
        "b.PNG",
        "a.jpg",
        "sub/c.Tiff",
        ".hidden.png",
        ".cache/d.png",
        "text.txt",
        "ü ñ.webp",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == [
        "a.jpg", "b.PNG", "sub/c.Tiff", "ü ñ.webp",
    ]  # fmt: skip


@pytest.mark.parametrize("make", [False, True])
def test_missing_and_empty_folder_are_named(tmp_path, make):
    root = tmp_path / "nothing"
    if make:
        root.mkdir()
    with pytest.raises(ValueError, match="nothing"):
        PairedImageDataset(root)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "PA"])
def test_modes(tmp_path, mode):
    rgb = Image.fromarray(photo(9, 7))
    im = rgb.convert("P").convert("PA") if mode == "PA" else rgb.convert(mode)
    path = tmp_path / ("x.tif" if mode in ("CMYK", "PA") else "x.png")
    im.save(path)
    want = (
        im.convert("L")
        if mode in ("1", "L", "LA")
        else im.convert("RGBA").convert("RGB")
        if "A" in mode
        else im
    )
    want = np.asarray(want.convert("RGB"))
    assert np.array_equal(read_image(path, 3), want)
    assert read_image(path, 1).shape == (9, 7, 1)
    header = read_header(path)
    assert header == (read_image(path).shape, 1, mode in ("LA", "RGBA", "PA"), 1)


def test_gray_of_colour_is_pillows(tmp_path):
    img = photo(40, 30)
    want = np.asarray(Image.fromarray(img).convert("L"))
    assert np.array_equal(read_image(save(tmp_path / "x.png", img), 1)[..., 0], want)


@pytest.mark.parametrize("c", [1, 3, 4])
def test_16_bit_png(tmp_path, c):
    img = photo(9, 7, c, dtype=np.uint16)
    if c > 1:
        pytest.importorskip("cv2")
    path = save_png16(tmp_path / "x.png", img)
    assert read_image(path).dtype == np.uint16
    assert np.array_equal(read_image(path), img[..., :3])
    assert read_header(path) == ((9, 7, min(c, 3)), 2, c == 4, 1)


@pytest.mark.parametrize("c", [3, 4])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflate", [False, True])
def test_16_bit_tiff(tmp_path, c, order, deflate):
    pytest.importorskip("cv2")
    img = photo(9, 7, c, dtype=np.uint16)
    assert np.array_equal(
        read_image(save_tiff16(tmp_path / "x.tif", img, order, deflate)), img[..., :3]
    )


def test_formats_that_would_lose_precision_are_refused_by_name(tmp_path):
    save_png16(tmp_path / "la.png", photo(9, 7, 2, dtype=np.uint16))
    Image.fromarray(np.ones((5, 5), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((5, 5), 70000, np.int32)).save(tmp_path / "int.tif")
    for name in ("la.png", "float.tif", "int.tif"):
        with pytest.raises(
            ValueError,
            match=f"{name}.*(save it with 8 or 16 bits per channel|save it as a plain PNG)",
        ):
            read_image(tmp_path / name)


def test_the_orientation_of_16_bit_colour_is_pillows(tmp_path):
    pytest.importorskip("cv2")
    img = photo(9, 7, dtype=np.uint16)
    content = save_png16(tmp_path / "x.png", img).read_bytes()
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        header, rest = content[:33], content[33:]
        (tmp_path / "x.png").write_bytes(header + chunk(b"eXIf", exif.tobytes()[6:]) + rest)
        high = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "x.png")))
        got = read_image(tmp_path / "x.png")
        assert got.dtype == np.uint16 and np.array_equal(got >> 8, high), turn
        assert sorted(got.ravel()) == sorted(img.ravel())


def test_16_bit_colour_without_opencv_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    save_png16(tmp_path / "x.png", photo(9, 7, dtype=np.uint16))
    for read in (read_image, lambda path: ImageFolder(path.parent, whole=True).problems[0][1]):
        with contextlib.suppress(data.UnreadableImage):
            raise data.UnreadableImage(read(tmp_path / "x.png"))
    with pytest.raises(
        data.UnreadableImage, match=r"x\.png can't be read .*opencv-python-headless"
    ):
        read_image(tmp_path / "x.png")
    with pytest.raises(data.UserError, match="opencv-python-headless"):
        data.write_image(tmp_path / "y.png", photo(9, 7, dtype=np.uint16))
    assert not (tmp_path / "y.png").exists()


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
@pytest.mark.parametrize("c", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_is_written_is_read(tmp_path, c, dtype, suffix):
    img = photo(9, 7, c, dtype=dtype)
    path = tmp_path / f"x{suffix}"
    if dtype is np.uint16 and c == 2:
        with pytest.raises(data.UserError, match="16-bit gray with alpha"):
            data.write_image(path, img)
        return
    if dtype is np.uint16 and c > 2:
        pytest.importorskip("cv2")
    assert data.write_image(path, img) == ""
    got = read_image(path, alpha=True)
    assert got.dtype == dtype and np.array_equal(got, img)
    assert list(tmp_path.iterdir()) == [path]


def test_other_programs_read_our_tiff(tmp_path):
    cv2 = pytest.importorskip("cv2")
    for dtype in (np.uint8, np.uint16):
        for c in (1, 3):
            img = photo(40, 33, c, dtype=dtype)
            data.write_image(tmp_path / "x.tif", img)
            got = np.atleast_3d(cv2.imread(str(tmp_path / "x.tif"), cv2.IMREAD_UNCHANGED))
            assert got.dtype == dtype and np.array_equal(got[..., ::-1], img), (dtype, c)


@pytest.mark.parametrize("c", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_what_jpeg_and_webp_can_not_hold_is_named(tmp_path, c, dtype):
    if dtype is np.uint16 and c == 2:
        return
    img = photo(64, 48, c, dtype=dtype)
    depth = ["8 of its 16 bits"] if dtype is np.uint16 else []
    alpha = ["its transparency"] if c in (2, 4) else []
    eight = img
    if dtype is np.uint16:
        eight = np.round(img / 257).astype(np.uint8)

    assert data.write_image(tmp_path / "x.webp", img) == ", ".join(depth)
    got = read_image(tmp_path / "x.webp", alpha=True)
    if c <= 2:  # WebP has no gray
        gray = np.repeat(eight[..., :1], 3, axis=2)
        eight_webp = np.concatenate([gray, eight[..., 1:]], axis=2)
    else:
        eight_webp = eight
    assert np.array_equal(got, eight_webp)

    assert data.write_image(tmp_path / "x.jpg", img) == ", ".join(depth + alpha)
    got = read_image(tmp_path / "x.jpg", alpha=True)
    colours = 3 if c >= 3 else 1
    assert got.shape == (64, 48, colours)
    assert abs(got - eight[..., :colours].astype(float)).mean() < 4  # quality 95
    with Image.open(tmp_path / "x.jpg") as image:
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # 4:4:4
    size = (tmp_path / "x.jpg").stat().st_size
    data.write_image(tmp_path / "x.JPEG", img, quality=30)
    assert (tmp_path / "x.JPEG").stat().st_size < size / 2
    lossless = (tmp_path / "x.webp").stat().st_size
    data.write_image(tmp_path / "x.webp", img, quality=30)
    assert (tmp_path / "x.webp").stat().st_size < lossless * 2 / 3  # alpha stays lossless


def test_what_no_format_holds_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(data.UserError, match=r"x\.gif can't be written: give it a suffix of \.png"):
        data.write_image(tmp_path / "x.gif", photo(8, 8))
    with pytest.raises(data.UserError, match=r"WEBP holds at most 16,383 pixels.*write PNG"):
        data.write_image(tmp_path / "x.webp", np.zeros((1, 16_384, 1), np.uint8))
    with pytest.raises(data.UserError, match=r"JPEG holds at most 65,500 pixels"):
        data.write_image(tmp_path / "x.jpg", np.zeros((65_501, 1, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_samples_are_the_same_with_and_without_the_cache(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", photo(60, 50, seed=i))
    options = {"gt_size": 16, "degradation": "bicubic", "scale": 2}
    cached, not_cached = (PairedImageDataset(tmp_path, cache_gb=gb, **options) for gb in (1, 0))
    assert all(same(cached[n], not_cached[n]) for n in range(40))


@pytest.mark.parametrize("turn", range(1, 10))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation(tmp_path, turn, suffix):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = save(tmp_path / f"x.{suffix}", photo(16, 24), exif=exif)
    want = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(read_image(path), want)
    assert read_header(path).shape == want.shape


def test_a_header_that_does_not_fit_the_pixels_is_named(tmp_path):
    path = save(tmp_path / "gt/x.png", photo(64, 96))
    exif = Image.Exif()
    exif[0x0112] = 6
    late = chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))  # after the pixels
    path.write_bytes(path.read_bytes()[:-12] + late + chunk(b"IEND", b""))
    assert read_image(path).shape == (96, 64, 3)
    with pytest.raises(ValueError, match=r"x\.png has another size than its header says"):
        ValidationImages(path.parent)
    with pytest.raises(ValueError, match=r"x\.png .* has a wrong header"):
        PairedImageDataset(path.parent, gt_size=32)[0]
    with pytest.raises(ValueError, match=r"x\.png has another size than its header says"):
        data.pack(path.parent, tmp_path / "x.npy")


def test_an_image_smaller_than_the_scale_is_named(tmp_path):
    save(tmp_path / "gt/x.png", photo(3, 40))
    with pytest.raises(ValueError, match=r"x\.png: smaller than scale=4"):
        PairedImageDataset(tmp_path / "gt", degradation="bicubic", scale=4, gt_size=32)


# ---- degradations ----
def test_imresize_by_hand():
    """x1/2 has the weights of the cubic at distances 1/4, 3/4, 5/4, 7/4, mirrored at the border."""
    kernel = np.array(
        [-0.0234375, -0.0703125, 0.2265625, 0.8671875]
    )  # W(7/4), W(5/4), W(3/4), W(1/4)
    kernel = np.concatenate([kernel, kernel[::-1]]) / 2
    row = np.random.default_rng(0).random(16)
    mirrored = np.concatenate([row[2::-1], row, row[:-4:-1]])
    want = [kernel @ mirrored[2 * k : 2 * k + 8] for k in range(8)]
    out = imresize(np.tile(row[None, :, None], (16, 1, 1)), 0.5)
    assert np.allclose(out[..., 0], np.tile(want, (8, 1)), atol=1e-12)


def test_imresize_sizes_types_and_constants():
    for dtype in (np.uint8, np.uint16, np.float32):
        for scale in (1 / 2, 1 / 3, 1 / 4, 2, 3, 0.37):
            out = imresize(np.full((170, 10, 3), 77, dtype), scale)
            assert out.dtype == dtype and out.shape == (
                np.ceil(170 * scale),
                np.ceil(10 * scale),
                3,
            )
            assert np.allclose(out, 77, atol=1e-4)


@needs_shared
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_imresize_is_matlabs(scale):
    for path in list_images(SHARED / "Set5" / "HR"):
        hr = read_image(path)
        h, w = hr.shape[0] // scale, hr.shape[1] // scale
        lr = read_image(SHARED / "Set5" / f"LR_bicubic_X{scale}" / f"{path.stem}x{scale}.png")
        assert np.array_equal(imresize(hr[: h * scale, : w * scale], 1 / scale), lr)


@needs_shared
@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("gt_size", [48, 240])
def test_bicubic_on_the_fly_equals_matlabs_pairs(scale, gt_size):
    root = SHARED / "Set5"
    made = PairedImageDataset(root / "HR", degradation="bicubic", scale=scale, gt_size=gt_size)
    options = {"scale": scale, "gt_size": gt_size, "filename_tmpl": f"{{}}x{scale}"}
    paired = PairedImageDataset(root / "HR", root / f"LR_bicubic_X{scale}", **options)
    assert all(same([made[n]], [paired[n]]) for n in range(60))
    options.pop("gt_size")
    for a, b in zip(
        ValidationImages(root / "HR", degradation="bicubic", scale=scale),
        ValidationImages(root / "HR", root / f"LR_bicubic_X{scale}", **options),
        strict=True,
    ):
        assert torch.equal(a["lq"], b["lq"]) and np.array_equal(a["gt"], b["gt"])


@pytest.mark.parametrize("name, scale", [("jpeg", 1), ("bicubic", 2), ("bicubic", 3)])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_degraded_crop_is_the_crop_of_the_degraded_image(tmp_path, name, scale, in_chans):
    save(tmp_path / "x.png", photo(131, 170))
    dataset = PairedImageDataset(
        tmp_path,
        degradation=name,
        quality=10,
        scale=scale,
        gt_size=48,
        in_chans=in_chans,
        use_hflip=False,
        use_rot=False,
    )
    whole = ValidationImages(
        tmp_path, degradation=name, quality=10, scale=scale, in_chans=in_chans
    )[0]
    corners = torch.from_numpy(whole["gt"]).permute(2, 0, 1).unfold(1, 4, scale).unfold(2, 4, scale)
    size, positions = 48 // scale, set()
    for n in range(40):
        lq, gt = dataset[n]
        corner = gt[:, None, None, :4, :4]
        (y, x), *others = (corners == corner).all(-1).all(-1).all(0).nonzero().tolist()
        want = torch.round(whole["lq"][:, y : y + size, x : x + size] * 255).byte()
        assert not others and torch.equal(lq, want)
        positions.add((y % 8, x % 8))
    assert len(positions) > 20  # crops fall on every phase of the 8x8 blocks


def test_noise_statistics_and_blind_range(tmp_path):
    save(tmp_path / "x.png", np.full((256, 256, 3), 250, np.uint8))
    lq, gt = PairedImageDataset(tmp_path, sigma=25, gt_size=256)[3]
    assert lq.dtype == torch.float32 and gt.dtype == torch.uint8 and lq.max() > 1.1  # not clipped
    noise = (lq - gt.float() / 255) * 255
    assert abs(noise.mean()) < 0.3 and abs(noise.std() - 25) < 0.3
    blind = PairedImageDataset(tmp_path, sigma=(0, 50), gt_size=64)
    sigmas = [
        float((lq - gt.float() / 255).std()) * 255 for lq, gt in (blind[n] for n in range(300))
    ]
    assert abs(np.mean(sigmas) - 25) < 3 and min(sigmas) < 2 and max(sigmas) > 48


@pytest.mark.parametrize("in_chans", [1, 3])
def test_reference_noise(folder, in_chans):
    for item in ValidationImages(folder, sigma=50, in_chans=in_chans):
        bgr = item["gt"][..., ::-1].astype(np.float32) / 255
        np.random.seed(0)
        want = bgr + np.random.normal(0, 50 / 255, bgr.shape)
        want = torch.from_numpy(want[..., ::-1].transpose(2, 0, 1).copy()).float()
        assert torch.equal(item["lq"], want)


def test_own_degradation_is_one_function_and_one_line(folder, monkeypatch):
    def add(name, function, margin=0):
        monkeypatch.setitem(data.DEGRADATIONS, name, data.Degradation(function, margin))

    add("invert", lambda gt, rng, scale: 255 - gt)
    lq, gt = PairedImageDataset(folder, degradation="invert", gt_size=32)[0]
    assert torch.equal(lq, 255 - gt)
    add("dark", lambda gt, rng, scale: gt // np.uint8(rng.integers(2, 9)))
    assert PairedImageDataset(folder, degradation="dark", gt_size=32)[0][0].max() < 128
    assert (
        ValidationImages(folder, degradation="dark")[0]["lq"].max() <= 0.5
    )  # the same kind of rng
    add("double", lambda gt, rng, scale: gt / 255.0)
    dataset = PairedImageDataset(folder, degradation="double", gt_size=32)
    with Prefetcher(train_loader(dataset, batches_of(2), 0), "cpu") as batches:
        lq, gt = next(batches)
    assert lq.dtype == torch.float32 and torch.allclose(lq, gt)
    assert ValidationImages(folder, degradation="double")[0]["lq"].dtype == torch.float32
    for wrong in (
        lambda gt, rng, scale: gt.astype(int) - 1,
        lambda gt, rng, scale: gt.astype(np.float32),
        lambda gt, rng, scale: gt[::2, ::2],
        lambda gt, rng, scale: gt[..., 0],
    ):
        add("wrong", wrong)
        with pytest.raises(ValueError, match="wrong must return"):
            PairedImageDataset(folder, degradation="wrong")


def test_options_of_a_degradation_are_read_off_its_signature(folder, monkeypatch):
    def level(gt, rng, scale=1, *, peak=(10.0, 20.0)):
        return np.full_like(gt, int(data.draw(rng, peak)))

    monkeypatch.setitem(data.DEGRADATIONS, "level", data.Degradation(level))
    assert data.options_of_degradation("level") == {"peak": (10.0, 20.0)}
    assert data.options_of_degradation("noise", types.SimpleNamespace(sigma=5)) == {"sigma": 5}
    assert data.options_of_degradation("bicubic") == data.options_of_degradation("none") == {}
    found = {
        int(PairedImageDataset(folder, degradation="level", gt_size=8)[n][0][0, 0, 0])
        for n in range(99)
    }
    assert found == set(range(10, 20))
    lq, _ = PairedImageDataset(folder, degradation="level", gt_size=8, peak=7)[0]
    assert (lq == 7).all()
    images = ValidationImages(folder, degradation="level", peak=(10, 200))
    values = [int(images[i]["lq"][0, 0, 0] * 255 + 0.5) for i in range(5)]
    assert len(set(values)) > 2  # drawn from the range, for each image by its number
    assert values == [int(images[i]["lq"][0, 0, 0] * 255 + 0.5) for i in range(5)]
    with pytest.raises(data.UserError, match="'peek' is an option of no degradation"):
        PairedImageDataset(folder, degradation="level", peek=7)


def test_degradations_take_plain_values_and_chain():
    gt, rng = photo(32, 48), data.sample_rng(0, 0)
    lq = data.compress_jpeg(
        data.add_noise(data.downscale(gt, rng, 2), rng, sigma=10), rng, quality=50
    )
    assert lq.shape == (16, 24, 3) and lq.dtype == np.uint8
    assert np.mean((lq.astype(int) - data.imresize(gt, 0.5)) ** 2) < 300


# ---- blind degradations ----
def test_kernels_are_the_authors():
    """Rows of KAIR's anisotropic_Gaussian, fspecial_gaussian and shift_pixel, and of BasicSR's
    bivariate_generalized_Gaussian, bivariate_plateau and circular_lowpass_kernel."""
    wanted = [
        (
            data.bell_kernel(7, 2**0.5, 0.5**0.5, 0.7)[:, 4],
            [0.000020148, 0.001320653, 0.021833083, 0.091035665, 0.095736629, 0.025393043],
        ),
        (
            data.bell_kernel(7, 1.3, 1.3)[3],
            [0.006646155, 0.029175472, 0.070873906, 0.095274321, 0.070873906, 0.029175472],
        ),
        (
            data.shifted_kernel(25, 1.2, 1.5)[10, 8:14],
            [0.013830493, 0.045081648, 0.08047958, 0.08047958, 0.045081648, 0.013830493],
        ),
        (
            data.bell_kernel(7, 1.5, 0.8, -0.4, 0.6)[2],
            [0.011321287, 0.01914554, 0.030153557, 0.041491181, 0.043654973, 0.033894388],
        ),
        (
            data.bell_kernel(7, 1.5, 0.8, -0.4, 1.7, plateau=True)[2],
            [0.003572972, 0.008613189, 0.023951786, 0.05897936, 0.068520168, 0.032820627],
        ),
        (
            data.sinc_kernel(7, 2.0)[3],
            [-0.036198643, -0.012960707, 0.226359309, 0.392491022, 0.226359309, -0.012960707],
        ),
        (
            data.sinc_kernel(21, 2.0)[0, :4],
            [0.002239979, 0.002947638, -0.001080166, -0.004032309],
        ),
    ]
    for kernel, row in wanted:
        assert np.allclose(kernel[: len(row)], row, rtol=0, atol=1e-9)


def test_bessel_function():
    """Abramowitz and Stegun, tables 9.1 and 9.2; J1(44) by SciPy."""
    values = data.bessel_j1(np.array([0, 1, 10, 44.0]))
    assert np.allclose(values, [0, 0.4400505857, 0.0434727462, -0.0828033594], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "shrunk", "enlarged"),
    [
        ("bilinear", [0.6333333, 0.7, 0.6666667], [0.1, 0.54, 0.75, 0.33, 0.56]),
        ("bicubic", [0.7148147, 0.7, 0.7407407], [0.034975, 0.6062063, 0.834375, 0.3114754]),
        ("box", [0.4714286, 0.4428571, 0.5428572], [0.1, 0.5571429, 0.8142858, 0.3, 0.5857143]),
        ("area", [0.4333333, 0.4, 0.4666667], [0.1, 0.5, 0.6, 0.3, 0.5]),
    ],
)
def test_resizing_is_opencvs_and_torchs(kind, shrunk, enlarged):
    """cv2.resize by INTER_LINEAR, INTER_CUBIC, INTER_AREA; torch's interpolate by area."""
    row = np.array([0.1, 0.9, 0.3, 0.7, 0.2, 0.8, 0.4], np.float32)
    image = np.tile(row[:, None, None], (1, 7, 3))
    for turned in (image, image.swapaxes(0, 1)):
        for size, want in ((3, shrunk), (10, enlarged)):
            out = data.resize(turned, size, size, kind)
            line = out[:, 0, 0] if turned is image else out[0, :, 2]
            assert out.shape == (size, size, 3) and out.dtype == np.float32
            assert np.allclose(line[: len(want)], want, rtol=0, atol=2e-6)
    assert data.resize(image, 7, 7, kind) is image


def test_convolution_mirrors_the_border():
    rng = np.random.default_rng(0)
    image = rng.random((9, 14, 3)).astype(np.float32)
    kernel = rng.random((5, 5))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), "reflect")
    want = sum(
        kernel[4 - y, 4 - x] * padded[y : y + 9, x : x + 14] for y in range(5) for x in range(5)
    )
    assert np.allclose(data.convolve(image, kernel), want, atol=1e-5)


def test_sharpening():
    flat = np.full((60, 70, 3), 90, np.uint8)
    assert np.array_equal(data.sharpen(flat), flat)
    image = flat.copy()
    image[20:40, 20:45] = 100  # below the threshold of 10
    assert np.array_equal(data.sharpen(image), image)
    image[20:40, 20:45] = 190
    for dtype, unit in ((np.uint8, 1), (np.uint16, 257)):
        sharp = data.sharpen(image.astype(dtype) * dtype(unit))
        assert sharp.dtype == dtype and sharp.shape == image.shape
        assert sharp[21, 22, 0] > 195 * unit and sharp[18, 22, 0] < 85 * unit


BLIND = ("bsrgan", "realesrgan")


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_blind_degradations_take_any_image(name, scale, in_chans):
    degrade = data.DEGRADATIONS[name].function
    for n, (height, width) in enumerate(((1, 2), (2, 7), (40, 24), (40, 40))):
        for dtype in (np.uint8, np.uint16):
            gt = photo(height * scale, width * scale, in_chans, dtype=dtype)
            before = gt.copy()
            lq = degrade(gt, data.sample_rng(0, n), scale)
            assert lq.shape == (height, width, in_chans) and lq.dtype == np.uint8
            assert np.array_equal(lq, degrade(gt, data.sample_rng(0, n), scale))
            assert np.array_equal(gt, before)
    assert degrade(gt, np.random.RandomState(0), scale).shape == lq.shape


@pytest.mark.parametrize("name", BLIND)
@pytest.mark.parametrize(("scale", "in_chans"), [(4, 3), (2, 1)])
def test_blind_pairs_depend_neither_on_workers_nor_on_threads(folder, name, scale, in_chans):
    dataset = PairedImageDataset(folder, degradation=name, scale=scale, in_chans=in_chans)
    want = stream(dataset, batches=3)
    lq, gt = want[0]
    assert lq.shape == (4, in_chans, 32 // scale, 32 // scale)
    assert gt.shape == (4, in_chans, 32, 32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 + threads % 2)
    again = stream(dataset, batches=3)
    torch.set_num_threads(threads)
    assert same(want, again)
    assert same(want, stream(dataset, batches=3, num_workers=2))


@pytest.mark.parametrize("name", BLIND)
def test_sharpened_in_training_but_not_in_validation(tmp_path, name):
    img = photo(200, 200)
    save(tmp_path / "x.png", img)
    options = {"degradation": name, "scale": 4}
    dataset = PairedImageDataset(tmp_path, gt_size=200, use_hflip=False, use_rot=False, **options)
    gt = dataset[3][1].permute(1, 2, 0).numpy()
    sharpened = name == "realesrgan"
    assert np.array_equal(gt, data.sharpen(img) if sharpened else img)
    assert sharpened == (not np.array_equal(gt, img))

    images = ValidationImages(tmp_path, **options)
    assert np.array_equal(images[0]["gt"], img)
    want = data.DEGRADATIONS[name].function(img, data.sample_rng(0, 0), 4)
    assert np.array_equal(images[0]["lq"].permute(1, 2, 0) * 255, want.astype(np.float32))


@pytest.mark.parametrize("name", BLIND)
def test_blind_validation_is_fixed_by_number(tmp_path, name):
    for i in range(3):
        save(tmp_path / f"{i}.png", photo(64, 80))
    images = [ValidationImages(tmp_path, degradation=name, scale=4) for _ in range(2)]
    assert all(torch.equal(images[0][i]["lq"], images[1][i]["lq"]) for i in (2, 0, 1))
    assert not torch.equal(images[0][0]["lq"], images[0][1]["lq"])


@pytest.mark.parametrize("name", BLIND)
def test_16_bit_files_give_blind_pairs_of_floats(tmp_path, name):
    save(tmp_path / "x.png", photo(90, 90, 1, dtype=np.uint16))
    options = {"degradation": name, "scale": 2, "gt_size": 64, "in_chans": 1}
    lq, gt = PairedImageDataset(tmp_path, **options)[1]
    assert lq.dtype == gt.dtype == torch.float32
    assert lq.min() >= 0 and lq.max() <= 1 and gt.max() > 0.5


def test_ranges_of_blind_degradations(monkeypatch):
    """Every quality of JPEG lies in its range; so does what else is drawn."""
    gt = photo(64, 64)
    qualities = []
    compress = data.compress_jpeg

    def remember(gt, rng, scale=1, *, quality):
        quality = round(data.draw(rng, quality))
        qualities.append(quality)
        return compress(gt, rng, quality=quality)

    monkeypatch.setattr(data, "compress_jpeg", remember)
    for name in BLIND:
        degrade = data.DEGRADATIONS[name].function
        for jpeg_range in ((30, 95), (60, 61), 50):
            qualities.clear()
            for n in range(100):
                degrade(gt, data.sample_rng(0, n), 4, jpeg_range=jpeg_range)
            low, high = np.broadcast_to(jpeg_range, 2)
            assert low <= min(qualities) <= low + 2 and high - 2 <= max(qualities) <= high
            assert 180 <= len(qualities) <= 200
    rng = data.sample_rng(0, 0)
    assert {data.draw_integer(rng, (3, 6)) for _ in range(99)} == {3, 4, 5, 6}
    for order in (data.FIRST, data.SECOND):
        kernels = [data.draw_kernel(rng, order.sigma) for _ in range(300)]
        assert {len(kernel) for kernel in kernels} == set(range(7, 22, 2))
        assert all(abs(kernel.sum() - 1) < 1e-9 for kernel in kernels)
        assert 10 < sum(kernel.min() < 0 for kernel in kernels) < 60  # sinc: a tenth


def test_steps_of_bsrgan_come_in_any_order():
    rng = data.sample_rng(0, 0)
    chains = [data.bsrgan_steps(rng) for _ in range(2000)]
    counts = Counter(map(tuple, chains))
    assert len(counts) == 6 * 5 * 4 * 3 // 2  # permutations of 6, with 2 + 2 alike
    assert min(counts.values()) > 2
    assert all(chain.index("shrink") < chain.index("fit") for chain in chains)


@pytest.mark.parametrize(("name", "mean"), [("bsrgan", 22.2), ("realesrgan", 23.7)])
def test_strength_of_blind_degradations(name, mean):
    """PSNR against bicubic downscaling, of a fixed set of draws."""
    figures = []
    for n in range(60):
        gt = data.dead_leaves(0, n % 6, 256)
        lq = data.DEGRADATIONS[name].function(gt, data.sample_rng(0, n), 4)
        error = lq.astype(float) - imresize(gt, 0.25)
        figures.append(10 * np.log10(255**2 / np.mean(error**2)))
    assert abs(np.mean(figures) - mean) < 1 and np.std(figures) > 1.5


@pytest.mark.parametrize("jpeg_range", [0, (0, 50), (60, 50), (50,)])
def test_a_wrong_range_is_named(folder, jpeg_range):
    with pytest.raises(data.UserError, match="jpeg_range"):
        PairedImageDataset(folder, degradation="bsrgan", gt_size=32, jpeg_range=jpeg_range)


# ---- pairs ----
def test_eight_symmetries_equally_often(tmp_path):
    img = photo(16, 16)
    save(tmp_path / "x.png", img)
    wanted = [np.rot90(a, k) for a in (img, img[:, ::-1]) for k in range(4)]
    counts = np.zeros(8, int)
    for use_hflip, use_rot, kinds in (
        (True, True, 8),
        (True, False, 2),
        (False, True, 4),
        (False, False, 1),
    ):
        dataset = PairedImageDataset(tmp_path, gt_size=16, use_hflip=use_hflip, use_rot=use_rot)
        found = [
            [np.array_equal(dataset[n][1].permute(1, 2, 0), a) for a in wanted].index(True)
            for n in range(400)
        ]
        counts = np.bincount(found, minlength=8)
        assert (counts > 0).sum() == kinds and counts.max() < 1.6 * 400 / kinds


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_crops_are_aligned_and_reach_every_border(tmp_path, scale):
    lq = photo(13, 15)
    save(tmp_path / "lq" / "x.png", lq)
    save(tmp_path / "gt" / "x.png", lq.repeat(scale, 0).repeat(scale, 1))
    dataset = PairedImageDataset(tmp_path / "gt", tmp_path / "lq", scale=scale, gt_size=8 * scale)
    seen = set()
    for n in range(300):
        small, large = dataset[n]
        assert torch.equal(small.repeat_interleave(scale, 1).repeat_interleave(scale, 2), large)
        seen.add(small.numpy().tobytes())
    assert len(seen) > 200  # of 6 x 8 positions x 8 symmetries


def test_suffixed_names_pair_and_every_fault_is_named(tmp_path):
    for name in ("a", "sub/b", "c d"):
        save(tmp_path / "gt" / f"{name}.png", photo(33, 41))
        save(tmp_path / "lq" / f"{name}x2.jpg", photo(16, 20))
    dataset = PairedImageDataset(
        tmp_path / "gt", tmp_path / "lq", scale=2, gt_size=16, filename_tmpl="{}x2"
    )
    assert len(dataset) == 3 and dataset[0][0].shape == (3, 8, 8)
    item = ValidationImages(tmp_path / "gt", tmp_path / "lq", scale=2, filename_tmpl="{}x2")[0]
    assert item["lq"].shape == (3, 16, 20) and item["gt"].shape == (32, 40, 3)
    (tmp_path / "gt" / "a.png").unlink()
    save(tmp_path / "gt" / "new.png", photo(32, 32))
    save(tmp_path / "lq" / "c dx2.jpg", photo(16, 30))
    with pytest.raises(ValueError) as error:
        PairedImageDataset(
            tmp_path / "gt", tmp_path / "lq", scale=2, gt_size=16, filename_tmpl="{}x2"
        )
    assert all(name in str(error.value) for name in ("new.png", "ax2.jpg", "c dx2.jpg", "c d.png"))
    assert "\n" not in str(error.value)


def test_home_is_found(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.setenv("USERPROFILE", str(folder.parent))
    assert len(PairedImageDataset(f"~/{folder.name}")) == len(PairedImageDataset(folder))


def test_validation_images_that_differ_in_their_suffix_have_names_of_their_own(tmp_path):
    for name in ("a.png", "a.bmp", "b.jpg"):
        Image.new("RGB", (20, 20)).save(tmp_path / name)
    assert [pair["name"] for pair in map(ValidationImages(tmp_path).__getitem__, range(3))] == [
        "a.bmp",
        "a.png",
        "b",
    ]


def test_an_image_is_the_partner_of_one(tmp_path):
    for name in ("gt/a.jpg", "gt/a.png", "gt/b.jpg", "lq/a.png", "lq/b.png"):
        save(tmp_path / name, photo(32, 32))
    code, text = run_cli("check", tmp_path / "gt", tmp_path / "lq", "--gt_size=16")
    assert code == 1 and "problems: 1" in text and "gt/a.png: no partner a.* left in" in text, text
    save(tmp_path / "lq/a.jpg", photo(32, 32))
    assert run_cli("check", tmp_path / "gt", tmp_path / "lq", "--gt_size=16")[0] == 0
    for name in ("gt/a.jpg.png", "lq/a.jpg.png"):  # whose stem is the name of another
        save(tmp_path / name, photo(32, 32))
    for lq in (tmp_path / "lq", None):
        (pairs,), _, _, problems, _ = data.open_pairs(tmp_path / "gt", lq)
        assert not problems
        assert [(pair.gt_index, pair.lq_index) for pair in pairs] == [(k, k) for k in range(4)]


def test_what_meta_info_file_leaves_out_may_be_damaged(folder, tmp_path):
    (folder / "zero.png").write_bytes(b"")
    (tmp_path / "meta.txt").write_text("1.png\n")
    assert len(PairedImageDataset(folder, gt_size=16, meta_info_file=tmp_path / "meta.txt")) == 1
    (tmp_path / "meta.txt").write_text("1.png\nzero.png\n")
    with pytest.raises(ValueError, match=r"zero\.png can't be read"):
        PairedImageDataset(folder, gt_size=16, meta_info_file=tmp_path / "meta.txt")


def test_meta_info_file_chooses(folder, tmp_path):
    (tmp_path / "meta.txt").write_text("1.png (53,61,3)\n3.png (59,61,3)\n\n")
    assert len(PairedImageDataset(folder, meta_info_file=tmp_path / "meta.txt")) == 2
    (folder / "1.png").rename(folder / "1 (1).png")
    (tmp_path / "meta.txt").write_text("1 (1).png\n")
    assert len(PairedImageDataset(folder, meta_info_file=tmp_path / "meta.txt")) == 1
    (tmp_path / "meta.txt").write_text("3.png (59,61,3)\nabsent.png (5,6,3)\n")
    with pytest.raises(ValueError, match=r"absent\.png"):
        PairedImageDataset(folder, meta_info_file=tmp_path / "meta.txt")


@pytest.mark.parametrize("h, w", [(1, 1), (5, 40), (40, 3), (12, 12)])
def test_small_images_are_padded_by_reflection(tmp_path, h, w):
    img = photo(h * 2, w * 2)
    save(tmp_path / "gt" / "x.png", img)
    save(tmp_path / "lq" / "x.png", imresize(img, 0.5))
    for lq_root in (None, tmp_path / "lq"):
        dataset = PairedImageDataset(
            tmp_path / "gt", lq_root, degradation="bicubic", scale=2, gt_size=32
        )
        assert len(dataset.notices) == 1 and "1 image(s) are" in dataset.notices[0]
        lq, gt = dataset[0]
        assert lq.shape == (3, 16, 16) and gt.shape == (3, 32, 32)
        tiled = np.pad(img, ((0, 64), (0, 64), (0, 0)), "symmetric")[:32, :32]
        assert gt.sum() == tiled.sum() or max(h, w) > 16


def test_16_bit_pairs_are_float(tmp_path):
    pytest.importorskip("cv2")
    img = photo(20, 20, dtype=np.uint16)
    save_png16(tmp_path / "x.png", img)
    save(tmp_path / "y.png", photo(20, 20))
    dataset = PairedImageDataset(
        tmp_path, degradation="jpeg", gt_size=20, use_hflip=False, use_rot=False
    )
    gts = [dataset[n][1] for n in range(2)]
    assert all(gt.dtype == torch.float32 and gt.min() >= 0 and gt.max() <= 1 for gt in gts)
    assert any(
        torch.equal(gt, torch.from_numpy(img.transpose(2, 0, 1) / np.float32(65535))) for gt in gts
    )


def test_epochs_are_permutations_and_weights_are_kept(tmp_path):
    for root, n in (("a", 2), ("b", 6)):
        for k in range(n):
            save(
                tmp_path / root / f"{k}.png",
                np.full((8, 8, 3), 10 * k + (100 if root == "b" else 0), np.uint8),
            )
    roots = (tmp_path / "a", tmp_path / "b")
    values = [int(PairedImageDataset(roots, gt_size=8)[n][1][0, 0, 0]) for n in range(24)]
    epochs = [values[k : k + 8] for k in (0, 8, 16)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and len(set(epochs[0])) == 8
    assert epochs[0] != epochs[1]
    weighted = PairedImageDataset(roots, gt_size=8, dataset_weights=(3, 1))
    share = np.mean([weighted[n][1][0, 0, 0] < 100 for n in range(400)])
    assert 0.65 < share < 0.85
    with pytest.raises(ValueError, match="dataset_weights"):
        PairedImageDataset(roots, gt_size=8, dataset_weights=(1,))


# ---- sources ----
def test_synthetic_images_are_functions_of_seed_and_number():
    a, b = SyntheticImages(seed=1, size=64), SyntheticImages(seed=1, size=64)
    assert np.array_equal(a[5], b[5]) and not np.array_equal(a[5], a[6])
    assert not np.array_equal(a[5], SyntheticImages(seed=2, size=64)[5])
    assert a[5].shape == (64, 64, 3) and a[5].dtype == np.uint8
    assert SyntheticImages(size=64, in_chans=1)[0].shape == (64, 64, 1)
    assert 40 < np.mean([a[k].mean() for k in range(20)]) < 200


def test_synthetic_pool_is_renewed_and_bounded(monkeypatch):
    dataset = PairedImageDataset(gt_size=16)
    drawn = functools.lru_cache(SyntheticImages.POOL + 64)(
        lambda seed, number, size: np.zeros((size, size, 3), np.uint8)
    )
    monkeypatch.setattr(data, "dead_leaves", drawn)
    early, late = (
        {dataset.choose(n, u, 0).gt_index for u in np.linspace(0, 0.999, 999)} for n in (0, 10**6)
    )
    assert early == set(range(9)) and len(late) == SyntheticImages.POOL and not early & late
    for n in range(0, 20000, 7):
        dataset[n]
    assert drawn.cache_info().misses < 9 + 20000 // 64 + 9  # none is drawn twice


def test_validation_without_data_is_the_same_for_every_seed():
    images = ValidationImages(n=3)
    assert len(images) == 3 and images[2]["lq"].shape == (3, 256, 256)
    assert np.array_equal(images[1]["gt"], ValidationImages(n=2)[1]["gt"])


def test_packed_equals_unpacked(tmp_path):
    root = tmp_path / "gt"
    save(root / "rgb.png", photo(50, 40))
    save(root / "sub/gray.png", photo(45, 60, 1))
    save_png16(root / "deep.png", photo(41, 43, 1, dtype=np.uint16))
    save(root / "u ü.jpg", photo(41, 37))
    data.pack(root, tmp_path / "gt.npy")
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    a, b = ImageFolder(root), PackedImages(tmp_path / "gt.npy")
    assert a.names == b.names and all(
        np.array_equal(a[i], b[i]) and a[i].dtype == b[i].dtype for i in range(4)
    )
    for in_chans in (1, 3):
        a, b = (
            PairedImageDataset(r, gt_size=32, in_chans=in_chans)
            for r in (root, tmp_path / "gt.npy")
        )
        assert all(same([a[n]], [b[n]]) for n in range(40))


def test_packed_pairs_and_roots(tmp_path):
    for k in range(3):
        save(tmp_path / "gt" / f"{k}.png", photo(32, 40, seed=k))
        save(tmp_path / "lq" / f"{k}x2.png", photo(16, 20, seed=k))
    data.pack(tmp_path / "gt", tmp_path / "gt.npy")
    data.pack(tmp_path / "lq", tmp_path / "lq.npy")
    options = {"scale": 2, "gt_size": 16, "filename_tmpl": "{}x2"}
    a = PairedImageDataset(tmp_path / "gt", tmp_path / "lq", **options)
    b = PairedImageDataset(tmp_path / "gt.npy", tmp_path / "lq.npy", **options)
    assert all(same([a[n]], [b[n]]) for n in range(40))


def test_packing_never_overwrites_a_file(folder):
    before = (folder / "1.png").read_bytes()
    assert run_cli("pack", folder, folder / "1.png")[0] == 0
    assert (folder / "1.png").read_bytes() == before and (folder / "1.npy").exists()
    assert run_cli("pack", folder, folder / "DIV2K_v1.2")[0] == 0
    assert (folder / "DIV2K_v1.2.npy").exists()
    np.save(folder / "mine.npy", np.arange(3))
    code, text = run_cli("pack", folder, folder / "mine.npy")
    assert code == 1 and "mine.npy is there already: delete it, or give another name" in text, text
    assert np.load(folder / "mine.npy").tolist() == [0, 1, 2]


def test_packing_names_every_damaged_image_and_writes_nothing(folder, tmp_path):
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"1\.png can't be read.*2\.png can't be read"):
        data.pack(folder, tmp_path / "x.npy")
    assert not list(tmp_path.glob("x.npy*"))


def test_half_a_packed_file_is_refused(folder, tmp_path):
    data.pack(folder, tmp_path / "x.npy")
    whole = (tmp_path / "x.npy").read_bytes()
    for content in (
        b"",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        whole[:-16] + bytes(16),
        b"no" * 999,
    ):
        (tmp_path / "half.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"half\.npy is neither a folder nor a whole"):
            PairedImageDataset(tmp_path / "half.npy")


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_packing_leaves_nothing_that_passes_for_whole(tmp_path):
    for k in range(60):
        save(tmp_path / "gt" / f"{k:02d}.png", photo(300, 300, seed=k))
    target = tmp_path / "x.npy"
    for delay in (0.0, 0.05, 0.2):
        process = subprocess.Popen(
            [sys.executable, ROOT / "data.py", "pack", tmp_path / "gt", target]
        )
        while not (tmp_path / "x.npy.partial").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(delay)
        process.kill()
        process.wait()
        if target.exists():  # it had finished
            assert len(PackedImages(target).names) == 60
            target.unlink()
        elif (tmp_path / "x.npy.partial").exists():
            with pytest.raises(ValueError, match="nor a whole"):
                PackedImages(tmp_path / "x.npy.partial")
    assert (
        run_cli("pack", tmp_path / "gt", target)[0] == 0 and len(PackedImages(target).names) == 60
    )


def test_packing_refuses_to_fill_the_disk(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="fill the disk"):
        data.pack(folder, tmp_path / "x.npy")
    assert not (tmp_path / "x.npy").exists()


# ---- loading ----
def stream(dataset, batches=6, num_workers=0, rank=0, world=1, **options):
    sampler = batches_of(4, rank, world, **options)
    start_method = "fork" if num_workers == 4 else "spawn" if num_workers else None
    with Prefetcher(
        train_loader(dataset, sampler, num_workers, multiprocessing_context=start_method), "cpu"
    ) as it:
        return [next(it) for _ in range(batches)]


def test_stream_is_the_same_for_any_number_of_workers(folder, tmp_path):
    data.pack(folder, tmp_path / "x.npy")
    for dataset in (
        PairedImageDataset(folder, sigma=(5, 50), gt_size=32),
        PairedImageDataset(tmp_path / "x.npy", gt_size=32),
    ):
        want = stream(dataset)
        assert want[0][1].dtype == torch.float32 and want[0][1].max() <= 1
        assert same(want, stream(dataset, num_workers=1)) and same(
            want, stream(dataset, num_workers=4)
        )
        assert not same(want[:3], want[3:])


def test_two_ranks_see_together_what_one_process_sees(folder):
    dataset = PairedImageDataset(folder, gt_size=32)
    want = stream(dataset)
    ranks = [stream(dataset, rank=r, world=2) for r in (0, 1)]
    assert same(
        want,
        [[torch.cat(pair) for pair in zip(a, b, strict=True)] for a, b in zip(*ranks, strict=True)],
    )
    assert same(want[3:], stream(dataset, batches=3, start=3))


def take(n, batches):
    return [batch for batch, _ in zip(batches, range(n), strict=False)]


def test_sample_batches_are_numbered_through():
    def numbers(n, *arguments):
        return [[number for number, _ in batch] for batch in take(n, batches_of(*arguments))]

    assert numbers(2, 4, 0, 1, 5) == [[20, 21, 22, 23], [24, 25, 26, 27]]
    assert numbers(2, 8, 1, 2, 1) == [[12, 13, 14, 15], [20, 21, 22, 23]]
    with pytest.raises(ValueError, match="batch_size=6 is no multiple of 4 ranks"):
        next(batches_of(6, 0, 4))


def test_patch_and_batch_size_may_change_during_training(folder):
    def plan(it):
        return (2, 16) if it <= 2 else (4, 32)

    batches = take(4, sample_batches(plan))
    assert batches[1] == [(2, 16), (3, 16)] and batches[2] == [(n, 32) for n in (4, 5, 6, 7)]
    assert take(2, sample_batches(plan, start=2)) == batches[2:]
    dataset = PairedImageDataset(folder, gt_size=32)
    with Prefetcher(train_loader(dataset, sample_batches(plan), 0), "cpu") as loaded:
        shapes = [tuple(next(loaded)[1].shape) for _ in range(3)]
    assert shapes == [(2, 3, 16, 16), (2, 3, 16, 16), (4, 3, 32, 32)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_truncated_image_stops_training_with_its_name(folder, num_workers):
    path = folder / "2.png"
    path.write_bytes(path.read_bytes()[:2000])
    dataset = PairedImageDataset(folder, gt_size=32)
    with (
        pytest.raises(data.UnreadableImage, match=r"^\S*2\.png can't be read \(.*\)$") as error,
        Prefetcher(train_loader(dataset, batches_of(5), num_workers), "cpu") as batches,
    ):
        for _ in range(3):
            next(batches)
    assert "\n" not in str(error.value)


SLOW = """
import os, signal, time, torch
from data import Prefetcher, sample_batches, train_loader

class Slow(torch.utils.data.Dataset):
    def __getitem__(self, index):
        n, _ = index
        if n == 3:
            time.sleep(60)
        return torch.zeros(1), torch.full((1,), n, dtype=torch.uint8)

try:
    loader = train_loader(Slow(), sample_batches(lambda it: (1, 0)), 1, multiprocessing_context="fork")
    with Prefetcher(loader, "cpu") as batches:
        next(batches)
        os.kill(batches.batches._workers[0].pid, signal.SIGKILL)
        for _ in range(10):
            next(batches)
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_worker_is_an_error_within_seconds():
    """In a process of its own: PyTorch's handler of SIGCHLD may raise anywhere in the main thread."""
    command = [sys.executable, "-c", SLOW]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert "worker" in done.stdout, done.stdout + done.stderr


def test_leaving_the_prefetcher_stops_thread_and_workers(folder):
    loader = train_loader(PairedImageDataset(folder, gt_size=32), batches_of(2), 2)
    with Prefetcher(loader, "cpu") as prefetcher:
        next(prefetcher)
        assert prefetcher.wait > 0
        workers = prefetcher.batches._workers
    assert prefetcher.thread._shutdown and not any(worker.is_alive() for worker in workers)


# ---- command line ----
def test_check_names_every_bad_file_and_no_good_one(tmp_path):
    rng = np.random.default_rng(0)
    good, bad = [], []
    for k in range(200):
        kind, name = k % 10, f"{'sub dir/' * (k % 3 == 0)}{'ü ' * (k % 5 == 0)}img_{k:03d}"
        suffix = ".PNG" if k % 4 == 0 else ".png"
        img, lq_img = (
            rng.integers(0, 256, (24, 32, 3), dtype=np.uint8),
            rng.integers(0, 256, (12, 16, 3), dtype=np.uint8),
        )
        path = save(tmp_path / "gt" / f"{name}.png", img)
        lq = save(tmp_path / "lq" / f"{name}x2.png", lq_img)
        if kind == 0:
            path.write_bytes(path.read_bytes()[: 200 + k])  # truncated
        elif kind == 1:
            lq.unlink()
        elif kind == 2:
            save(lq, lq_img[:9])
        elif kind == 3:
            Image.fromarray(img).convert(("L", "P", "1", "RGBA", "LA")[k // 10 % 5]).save(path)
        elif kind == 4:
            path.write_bytes(b"not an image")
        (bad if kind in (0, 1, 2, 4) else good).append(f"img_{k:03d}")
        if suffix == ".PNG":
            path.rename(path.with_suffix(".PNG"))
    (tmp_path / "gt" / ".hidden.png").write_bytes(b"junk")
    (tmp_path / "gt" / "loop").symlink_to(tmp_path / "gt")
    (tmp_path / "gt" / "img_dangling.png").symlink_to(tmp_path / "nowhere")
    options = "--scale=2", "--filename_tmpl={}x2", "--gt_size=16"
    code, text = run_cli("check", tmp_path / "gt", tmp_path / "lq", *options)
    assert code == 1
    assert [name for name in [*bad, "img_dangling"] if name not in text] == []
    assert [name for name in [*good, ".hidden"] if name in text] == []
    command = r'python data\.py check "\S+gt" "\S+lq" --scale=2 --filename_tmpl={}x2 names all'
    with pytest.raises(ValueError, match=command):
        PairedImageDataset(
            tmp_path / "gt", tmp_path / "lq", scale=2, gt_size=16, filename_tmpl="{}x2"
        )


def test_command_line(folder, tmp_path):
    config = tmp_path / "config.py"
    config.write_text(f"dataroot_gt = {str(folder)!r}\ngt_size = 32\nlr = 1e-3\n")
    assert run_cli("check", config)[0] == 0
    assert run_cli("preview", config, tmp_path / "sheet.png", "--degradation=jpeg")[0] == 0
    # Four by three pairs, enlarged eightfold, with gaps of 6 and lines of 20 pixels for the names
    assert Image.open(tmp_path / "sheet.png").size == (4 * 262 - 6, 3 * (2 * 256 + 26) - 6)
    code, text = run_cli("check", tmp_path / "absent")
    assert code == 1 and "absent' is not there" in text and text.count("\n") == 1
    assert run_cli()[0] == 1
    code, text = run_cli("check", "--help")
    assert code == 0 and "data.py pack" in text


def test_check_and_preview_take_the_trainers_options(folder, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("scale = 2\ndegradation = 'bicubic'\ngt_size = lambda cfg: 256 * cfg.scale\n")
    code, text = run_cli("check", config, f"--dataroot_gt={folder}", "--name=mine")
    small = len(list_images(folder))
    assert code == 0 and "no problems" in text, text
    assert f"training: {small} image(s), " in text
    first = f"{folder}/{ImageFolder(folder).names[0]}"
    assert f"{small} image(s) are below gt_size=512, padded by reflection, as {first}, " in text
    for options, words in (
        (["check", config], "--dataroot_gt=photos"),
        (
            ["check", config, f"--datarot_gt={folder}"],
            "unknown option datarot_gt; did you mean dataroot_gt",
        ),
        (
            ["pack", folder, tmp_path / "packed.npy", "--meta_info_file=some.txt"],
            "unknown or incomplete",
        ),
    ):
        code, text = run_cli(*options)
        assert code == 1 and words in text and "Traceback" not in text, text
    options = f"--dataroot_gt={folder}", "--gt_size=32", "--sigma=0,50.5", "--use_rot=False"
    code, text = run_cli("preview", tmp_path / "sheet.png", *options)
    assert code == 0 and "sheet.png" in text, text
    config.write_text(
        "scale = lambda cfg: 1\ngt_size = lambda cfg: 2 * cfg.window_size * cfg.scale\n"
    )
    code, text = run_cli("preview", config, tmp_path / "sheet.png", f"--dataroot_gt={folder}")
    assert code == 1 and "sheet.png is there already" in text, text
    (tmp_path / "sheet.png").unlink()
    assert run_cli("preview", config, tmp_path / "sheet.png", f"--dataroot_gt={folder}")[0] == 0
    assert Image.open(tmp_path / "sheet.png").size == (4 * 262 - 6, 3 * (2 * 256 + 26) - 6)
    for wrong in (
        "--scale=2x",
        "--gt_size=abc",
        "--scale=0",
        "--dataset_weights=a,b",
        "--dataset_weights=1,2",
    ):
        code, text = run_cli("preview", tmp_path / "other.png", f"--dataroot_gt={folder}", wrong)
        assert code == 1 and text.startswith("error: ") and "Traceback" not in text, text
        assert wrong[2:].split("=")[0] in text, text
    assert run_cli("check", folder, folder, "--scale=0")[1].startswith("error: ")


def test_check_takes_a_training_command_and_looks_at_validation_sets(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    val = tmp_path / "val"
    save(val / "good.png", np.zeros((32, 32, 3), np.uint8))
    command = ["python", "train.py", "configs/tiny.py", "--name=x", f"--dataroot_gt={folder}"]
    code, text = run_cli("check", *command, f"--val_gt={val},synthetic")
    assert code == 0 and f"validation {val}: 1 image(s)" in text, text
    assert "megapixels are few" in text and "held out" not in text
    code, text = run_cli("check", *command)
    assert code == 0 and "held out: " in text, text
    (val / "bad.png").write_bytes(b"no image")
    code, text = run_cli("check", *command, f"--val_gt={val}")
    assert code == 1 and "bad.png" in text and "problems: 1" in text


def test_images_are_held_out_by_their_names(tmp_path):
    for i in range(40):
        save(tmp_path / "gt" / f"{i}.png", np.zeros((24, 24, 3), np.uint8))
    options = {"gt_size": 16, "hold_out": True}
    dataset = PairedImageDataset(tmp_path / "gt", **options)
    chosen = {data.name_of(pair) for pair in dataset.held_out}
    assert len(chosen) == 4 and len(dataset) == 36
    assert chosen.isdisjoint(data.name_of(pair) for pair in dataset.pairs)
    for i in range(40, 44):  # a folder that grows keeps most of them
        save(tmp_path / "gt" / f"{i}.png", np.zeros((24, 24, 3), np.uint8))
    grown = PairedImageDataset(tmp_path / "gt", **options)
    assert len(chosen & {data.name_of(pair) for pair in grown.held_out}) >= 3
    assert not PairedImageDataset(tmp_path / "gt", gt_size=16).held_out
    large = PairedImageDataset(tmp_path / "gt", gt_size=32, hold_out=True)
    assert not large.held_out  # none has a whole patch
    images = ValidationImages(held_out=dataset.held_out)
    assert len(images) == 4 and images[0]["gt"].shape == (24, 24, 3)


def test_the_commands_that_take_options_need_train_py(tmp_path):
    (tmp_path / "data.py").write_text(
        (ROOT / "data.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    command = [sys.executable, "data.py", "check", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith(
        "error: the command needs train.py beside"
    )


def test_data_py_works_alone(tmp_path):
    (tmp_path / "data.py").write_text(
        (ROOT / "data.py").read_text(encoding="utf-8"), encoding="utf-8"
    )
    code = "import data; lq, gt = data.PairedImageDataset(gt_size=32)[0]"
    done = subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {code}"],
                          cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_wrong_arguments_are_named(folder):
    for options, name in (
        ({"in_chans": 2}, "in_chans=2"),
        ({"gt_size": 31, "scale": 2}, "gt_size=31"),
        ({"degradation": "blurr"}, "degradation=.blurr.*noise.*dataroot_lq"),
        ({"sigma": (50, 5)}, "sigma"),
        ({"sigma": (25,)}, "sigma"),
        ({"quality": 0}, "quality"),
        ({"quality": (-1, 5)}, "quality"),
        ({"dataset_weights": (-1,)}, "dataset_weights"),
        ({"meta_info_file": folder / "absent.txt"}, r"absent\.txt"),
        ({"filename_tmpl": "x2"}, "filename_tmpl"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            PairedImageDataset(folder, **options)


def test_layouts_of_16_bit_gray_that_are_read_wrong_by_pillow_are_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    img = np.arange(35, dtype=np.int16).reshape(5, 7) - 2
    tifffile.imwrite(tmp_path / "signed.tif", img)
    tifffile.imwrite(tmp_path / "inverted.tif", img.astype(np.uint16), photometric="miniswhite")
    for name in ("signed", "inverted"):
        with pytest.raises(
            data.UnreadableImage, match=f"{name}.tif can't be read .*(signed or|white as 0)"
        ):
            read_image(tmp_path / f"{name}.tif")
    tifffile.imwrite(tmp_path / "fine.tif", img.astype(np.uint16), byteorder=">")
    assert np.array_equal(read_image(tmp_path / "fine.tif")[..., 0], img.astype(np.uint16))


def test_an_empty_list_is_refused_and_spaces_in_it_are_not(folder, tmp_path):
    path = tmp_path / "meta.txt"
    path.write_text("\n \n")
    with pytest.raises(data.UserError, match=r"meta\.txt lists no image"):
        PairedImageDataset(folder, meta_info_file=path)
    path.write_text(" 1.png (53,61,3) \n")
    assert len(PairedImageDataset(folder, meta_info_file=path)) == 1


def test_a_batch_that_can_not_be_shared_later_on_is_refused():
    batches = sample_batches(lambda it: (4 if it < 3 else 3, 32), world=2)
    assert len(next(batches)) == len(next(batches)) == 2
    with pytest.raises(data.UserError, match="batch_size=3 is no multiple"):
        next(batches)


# ---- whatever people feed it: exact, or refused by name ----


def tiff_layouts():
    """(name, pixels as they should be read, or None, options of tifffile.TiffWriter.write)."""
    rng = np.random.default_rng(0)
    channels = {"minisblack": 1, "miniswhite": 1, "palette": 1, "rgb": 3, "cielab": 3, "ycbcr": 3}
    for photometric, dtype, planes, tile, extra, compression in itertools.product(
        channels,
        ("u1", "u2", "u4", "i1", "i2", "f2", "f4", "bool"),
        ("contig", "separate"),
        (None, (16, 16)),
        (None, "unspecified", "assocalpha", "unassalpha"),
        (None, "zlib"),
    ):
        count = channels[photometric] + (extra is not None)
        if (planes == "separate" and count == 1) or (photometric == "palette" and dtype != "u1"):
            continue
        if dtype == "bool":
            pixels = rng.random((21, 35, count)) < 0.5
            want = pixels.astype(np.uint8) * 255
        elif dtype in ("f2", "f4"):
            want = pixels = rng.random((21, 35, count)).astype(dtype)
        else:
            limits = np.iinfo(dtype)
            want = pixels = rng.integers(limits.min, limits.max, (21, 35, count), dtype=dtype)
        options = {"photometric": photometric, "tile": tile, "compression": compression}
        if photometric == "miniswhite" and dtype in ("u1", "u2", "bool"):
            want = np.iinfo(want.dtype).max - want
        if photometric == "palette":
            options["colormap"] = rng.integers(0, 65536, (3, 256), dtype=np.uint16)
            want = (options["colormap"][:, pixels[..., 0]] >> 8).astype(np.uint8).transpose(1, 2, 0)
        if photometric in ("cielab", "ycbcr") or dtype not in ("u1", "u2", "bool"):
            want = None  # has to be refused
        if photometric == "ycbcr":
            options["subsampling"] = (1, 1)
        if extra:
            options["extrasamples"] = [extra]
        if count > 1:
            options["planarconfig"] = planes
        pixels = pixels[..., 0] if count == 1 else pixels
        if planes == "separate":
            pixels = np.moveaxis(pixels, 2, 0)
        name = f"{photometric} {dtype} {planes} {tile} {extra} {compression}"
        yield name, want, channels[photometric], pixels, options


def test_every_layout_of_tiff_is_exact_or_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    exact = set()
    path = tmp_path / "x.tif"
    for name, want, colours, pixels, options in tiff_layouts():
        for order in "<>":
            try:
                with warnings.catch_warnings(), tifffile.TiffWriter(path, byteorder=order) as tiff:
                    warnings.simplefilter("ignore")
                    tiff.write(pixels, **options)
            except Exception:  # what tifffile doesn't write
                continue
            try:
                got = read_image(path, alpha=True)
            except data.UnreadableImage as error:
                assert "save it" in str(error) or "OpenCV" in str(error), (name, error)
                continue
            assert want is not None, name
            assert np.array_equal(got[..., :3], want[..., :3]) or np.array_equal(got, want), name
            assert read_header(path)[0] == read_image(path).shape, name
            assert np.array_equal(read_image(path)[..., :colours], want[..., :colours]), name
            exact.add(name)
    for name in ("minisblack u1", "miniswhite u1", "palette u1", "rgb u1", "minisblack u2"):
        assert f"{name} contig None None None" in exact
    assert "rgb u1 separate (16, 16) unassalpha None" in exact


def test_pages_and_frames_are_named(tmp_path):
    images = [Image.fromarray(photo(16, 16, seed=k)) for k in range(2)]
    for name in ("pages.tif", "frames.webp", "frames.png"):
        options = {"lossless": True} if name.endswith("webp") else {}
        (tmp_path / "gt").mkdir(exist_ok=True)
        images[0].save(tmp_path / "gt" / name, save_all=True, append_images=images[1:], **options)
        assert np.array_equal(read_image(tmp_path / "gt" / name), np.asarray(images[0]))
    notices = ImageFolder(tmp_path / "gt").notices
    assert "only the first page or frame is read of 3 image(s), as frames.png" in notices[0]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", ["L", "P", "transparent"])
def test_png_of_few_bits(tmp_path, mode, bits):
    values = np.random.default_rng(0).integers(0, 2**bits, (9, 13), dtype=np.uint8)
    image = Image.fromarray(values, "L")
    if mode != "L":
        image = Image.fromarray(values, "P")
        image.putpalette(np.random.default_rng(1).integers(0, 256, 3 * 2**bits).tolist())
    want = np.asarray(image.convert("RGB"))
    options = {"transparency": 0} if mode == "transparent" else {}
    if mode == "L":
        save_gray_png(tmp_path / "x.png", values, bits)
        want = np.repeat(values[..., None] * (255 // (2**bits - 1)), 3, 2)
    else:
        image.save(tmp_path / "x.png", bits=bits, **options)
    assert np.array_equal(read_image(tmp_path / "x.png", 3), want)


def save_gray_png(path, values, bits):
    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    expanded = np.unpackbits(values[..., None], axis=2)[..., 8 - bits :].reshape(height, -1)
    rows = np.packbits(expanded, axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


@pytest.mark.parametrize(
    ("suffix", "mode", "options"),
    [
        ("bmp", "RGB", {}),
        ("bmp", "L", {}),
        ("bmp", "RGBA", {}),
        ("webp", "RGB", {"lossless": True}),
        ("webp", "RGBA", {"lossless": True, "exact": True}),
        ("png", "RGBA", {}),
        ("png", "LA", {}),
        ("tif", "RGB", {"compression": "tiff_lzw"}),
        ("tif", "RGBA", {"compression": "tiff_adobe_deflate"}),
        ("tif", "L", {"compression": "packbits"}),
        ("tif", "1", {"compression": "group4"}),
    ],
)
def test_lossless_files_are_exact(tmp_path, suffix, mode, options):
    image = Image.fromarray(photo(23, 31, 4)).convert(mode)
    image.save(tmp_path / f"x.{suffix}", **options)
    want = np.atleast_3d(np.asarray(image.convert("L") if mode == "1" else image))
    got = read_image(tmp_path / f"x.{suffix}", alpha=mode != "RGBA" or suffix != "bmp")
    assert np.array_equal(got, want[..., : got.shape[2]])


def test_what_users_files_hold_has_no_limit(tmp_path):
    path = tmp_path / "x.png"
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a" * 3_000_000, zip=True)
    Image.fromarray(photo(8, 8)).save(path, pnginfo=text, icc_profile=os.urandom(1_500_000))
    assert read_image(path).shape == (8, 8, 3)
    Image.new("1", (16000, 12000)).save(path)  # 192 megapixels
    assert read_header(path).shape == (12000, 16000, 1)
    assert read_image(path).shape == (12000, 16000, 1)


def profile(space):
    return b"\0" * 16 + space + b"\0" * 108


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_metadata_survive(tmp_path, channels, depth, suffix):
    if depth == np.uint16 and channels == 3:
        pytest.importorskip("cv2")
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "Maker"
    exif[0x8769] = {0x829A: 0.5, 0xA002: 24}  # exposure time, width
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.5)}  # latitude
    icc = profile(b"GRAY" if channels == 1 else b"RGB ")
    Image.fromarray(photo(16, 24)).convert("L" if channels == 1 else "RGB").save(
        tmp_path / "x.jpg", exif=exif, icc_profile=icc
    )
    metadata, dropped = data.read_metadata(tmp_path / "x.jpg")
    assert dropped == ""
    pixels = photo(24, 16, channels, dtype=depth)
    path = tmp_path / f"y{suffix}"
    dropped = data.write_image(path, pixels, **metadata)
    no_gray = suffix == ".webp" and channels == 1
    assert ("its colour profile, as WebP has no gray" in dropped) == no_gray
    if suffix in (".png", ".tif"):
        assert np.array_equal(read_image(path), pixels)
    with Image.open(path) as image:
        assert image.info.get("icc_profile") == (None if no_gray else icc)
        written = image.getexif()
        assert written[0x010F] == "Maker" and written.get(0x0112, 1) == 1
        assert dict(written.get_ifd(0x8769)) == {0x829A: 0.5}
        assert dict(written.get_ifd(0x8825)) == {1: "N", 2: (1.0, 2.0, 3.5)}


def test_exif_that_is_too_long_for_jpeg_is_dropped_and_said(tmp_path):
    exif = Image.Exif()
    exif[0x8769] = {0x927C: bytes(70_000)}  # the maker's note
    metadata = {"exif": exif.tobytes()}
    said = data.write_image(tmp_path / "x.jpg", photo(8, 8), **metadata)
    assert said == "its EXIF data, which are too long for JPEG"
    assert data.write_image(tmp_path / "x.png", photo(8, 8), **metadata) == ""


def test_a_profile_of_other_colours_is_dropped_and_said(tmp_path):
    path = save(tmp_path / "x.png", photo(8, 8), icc_profile=profile(b"CMYK"))
    metadata, dropped = data.read_metadata(path)
    assert metadata == {} and "x.png: dropped: its colour profile" in dropped


def test_what_is_left_out_is_counted(folder):
    for name in ("a.heic", "b.HEIC", "c.txt", ".hidden.heic", "README"):
        (folder / name).write_bytes(b"x")
    (notice,) = ImageFolder(folder).notices
    want = "left out: 2 .heic (convert to JPEG or PNG), 1 .txt, 1 without suffix"
    assert sorted(notice.partition("; ")[2].removeprefix("left out: ").split(", ")) == sorted(
        want.removeprefix("left out: ").split(", ")
    )
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "a.cr2").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds no images .*left out: 1 \.cr2 \(convert"):
        ImageFolder(folder)


def test_a_folder_may_have_commas(tmp_path):
    for root in ("a, b", "c", "d"):
        save(tmp_path / root / "1.png", photo(32, 32))
    assert data.split_at_commas(f"{tmp_path}/a, b,{tmp_path}/c, {tmp_path}/d") == [
        f"{tmp_path}/a, b",
        f"{tmp_path}/c",
        f"{tmp_path}/d",
    ]
    assert len(PairedImageDataset(f"{tmp_path}/a, b,{tmp_path}/c", gt_size=16)) == 2


def test_a_template_may_name_a_folder(tmp_path):
    """DIV2K's: HR/0001.png, LR/X2/0001x2.png, LR/X4/0001x4.png."""
    for n in ("0001", "0002"):
        save(tmp_path / f"HR/{n}.png", photo(32, 32))
        save(tmp_path / f"LR/X2/{n}x2.png", photo(16, 16))
        save(tmp_path / f"LR/X4/{n}x4.png", photo(8, 8))
    roots = (tmp_path / "HR", tmp_path / "LR")
    options = {"scale": 2, "gt_size": 16, "filename_tmpl": "X2/{}x2"}
    assert len(PairedImageDataset(*roots, **options)) == 2
    save(tmp_path / "LR/X2/0003x2.png", photo(16, 16))
    with pytest.raises(ValueError, match=r"X2/0003x2\.png is no image's partner"):
        PairedImageDataset(*roots, **options)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_windows_editors(tmp_path, encoding):
    for name in ("ä.png", "b.png", "c.png"):
        save(tmp_path / "gt" / name, photo(32, 32))
    (tmp_path / "list.txt").write_bytes("ä.png (32,32,3)\r\nb.png\r\n".encode(encoding))
    dataset = PairedImageDataset(tmp_path / "gt", meta_info_file=tmp_path / "list.txt", gt_size=16)
    assert len(dataset) == 2


def test_a_list_in_another_encoding_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes("ä.png".encode("cp1252"))
    with pytest.raises(ValueError, match=r"list\.txt is not in UTF-8"):
        data.read_list(tmp_path / "list.txt")


def test_names_of_the_greatest_length_and_of_any_bytes(tmp_path):
    name = "ä" * 125 + "x.png"  # 255 bytes
    data.write_image(tmp_path / name, photo(8, 8))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    long = data.fit_name(name.replace(".png", "_100.png"))
    assert len(os.fsencode(long)) <= 255 and long.endswith(".png") and long != data.fit_name(name)
    assert data.fit_name(name) == name
    strange = os.fsdecode(b"\xff.png")
    assert data.printable(strange) == "\\udcff.png"


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C"}])
def test_any_name_on_any_terminal(tmp_path, environment):
    for name in ("日本.png", os.fsdecode(b"\xff\xfe.png"), "ok.png"):
        save(tmp_path / "gt" / name, photo(32, 32))
    (tmp_path / "gt/日本.png").write_bytes(b"broken")
    done = subprocess.run(
        [sys.executable, str(ROOT / "data.py"), "check", str(tmp_path / "gt"), "--gt_size=40"],
        capture_output=True,
        env=os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"} | environment,
    )
    assert done.returncode == 1 and b"problems: 1" in done.stderr, done
    assert b"UnicodeEncodeError" not in done.stderr + done.stdout


def test_full_shared_memory_is_named_with_the_remedy(folder):
    def batches():
        yield [torch.zeros(1), torch.zeros(1)]
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    with Prefetcher(batches(), "cpu") as prefetcher:
        next(prefetcher)
        with pytest.raises(ValueError, match=r"/dev/shm, is too small: --num_workers=0.*shm-size"):
            next(prefetcher)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_image_is_replaced_by_the_next_sample(tmp_path, num_workers):
    for i in range(200):
        save(tmp_path / "gt" / f"{i:03d}.png", photo(24, 24, seed=i))
    whole = PairedImageDataset(tmp_path / "gt", gt_size=16)
    bad = tmp_path / "gt" / "007.png"
    content = bad.read_bytes()
    (n,) = (n for n in range(200) if whole.choose(n, 0, 0).gt_index == 7)
    before = [whole[n] for n in range(n, n + 2)]
    bad.write_bytes(content[:-300])
    dataset = PairedImageDataset(tmp_path / "gt", gt_size=16)
    loader = train_loader(dataset, iter([[(n, 16)], [(n + 1, 16)]]), num_workers)
    got = list(loader)
    assert torch.equal(got[0][1][0], before[1][1]) and torch.equal(got[1][1][0], before[1][1])
    assert dataset.count_damaged() == 1  # seen here, although a worker has found it
    assert dataset.sources[0].damaged.nonzero().tolist() == [[7]]

    # Damaged to the eye: left out at the start. More than 1 %: named.
    (tmp_path / "gt" / "008.png").write_bytes(b"broken")
    dataset = PairedImageDataset(tmp_path / "gt", gt_size=16)
    assert len(dataset) == 199 and "left out: " in dataset.notices[0]
    (tmp_path / "gt" / "009.png").write_bytes(content[:-300])
    dataset = PairedImageDataset(tmp_path / "gt", gt_size=16)
    with pytest.raises(data.UnreadableImage, match=r"00[79]\.png can't be read"):
        [dataset[n] for n in range(200)]
    for i in range(10, 13):
        (tmp_path / "gt" / f"{i:03d}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"008\.png can't be read.*010\.png can't be read"):
        PairedImageDataset(tmp_path / "gt", gt_size=16)


def test_a_damaged_image_and_its_partner_are_left_out_together(tmp_path):
    for i in range(200):
        save(tmp_path / "gt" / f"{i:03d}.png", photo(16, 16, seed=i))
        save(tmp_path / "lq" / f"{i:03d}.png", photo(16, 16, seed=i))
    (tmp_path / "gt" / "003.png").write_bytes(b"broken")
    (tmp_path / "lq" / "005.png").write_bytes(b"broken")
    dataset = PairedImageDataset(tmp_path / "gt", tmp_path / "lq", gt_size=16)
    assert len(dataset) == 198
    names = {p.gt.names[p.gt_index] for p in dataset.pairs}
    assert not names & {"003.png", "005.png"}
    assert all(p.gt.names[p.gt_index] == p.lq.names[p.lq_index] for p in dataset.pairs)


def test_further_frames_are_said_to_be_dropped(tmp_path):
    images = [Image.fromarray(photo(16, 16, seed=k)) for k in range(3)]
    images[0].save(tmp_path / "x.tif", save_all=True, append_images=images[1:])
    _, dropped = data.read_metadata(tmp_path / "x.tif")
    assert dropped.endswith("x.tif: dropped: all but the first of 3 pages or frames")


def test_16_bit_gray_with_transparency_is_refused(tmp_path):
    save_png16(tmp_path / "x.png", photo(9, 7, 1, dtype=np.uint16))
    content = (tmp_path / "x.png").read_bytes()
    place = content.index(b"IDAT") - 4
    changed = content[:place] + chunk(b"tRNS", b"\0\x05") + content[place:]
    (tmp_path / "x.png").write_bytes(changed)
    with pytest.raises(ValueError, match=r"x\.png can't be read .16 bits, mode I;16"):
        read_image(tmp_path / "x.png")


def test_exif_of_a_tiff_says_nothing_of_its_strips(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    Image.fromarray(photo(16, 24)).save(tmp_path / "x.tif", exif=exif, compression="tiff_lzw")
    metadata, _ = data.read_metadata(tmp_path / "x.tif")
    data.write_image(tmp_path / "y.png", photo(32, 48), **metadata)
    with Image.open(tmp_path / "y.png") as image:
        written = dict(image.getexif())
    assert written[0x010F] == "Maker" and not set(written) & {256, 257, 258, 259, 262, 273, 278}


def test_what_a_restored_png_lacks_is_said(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a photo")
    text.add(b"gAMA", struct.pack(">I", 100000))
    Image.fromarray(photo(8, 8)).save(tmp_path / "x.png", pnginfo=text)
    _, dropped = data.read_metadata(tmp_path / "x.png")
    assert dropped.endswith("x.png: dropped: its gamma, its texts")


def test_names_of_two_systems_are_the_same(tmp_path):
    for form, root in (("NFC", "gt"), ("NFD", "lq")):
        save(tmp_path / root / (unicodedata.normalize(form, "Müller") + ".png"), photo(16, 16))
    assert len(PairedImageDataset(tmp_path / "gt", tmp_path / "lq", gt_size=16)) == 1


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"x\.png can't be written \(No space .*: make room"):
        data.write_image(tmp_path / "x.png", photo(8, 8))
    assert not list(tmp_path.iterdir())


def test_ctrl_c_leaves_no_partial_file(tmp_path, monkeypatch):
    def stop(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        data.write_image(tmp_path / "x.jpg", photo(8, 8))
    assert not list(tmp_path.iterdir())


def test_leaving_a_prefetcher_whose_worker_hangs_takes_seconds(folder):
    class Hanging(torch.utils.data.Dataset):
        def __getitem__(self, i):
            time.sleep(1000)

    begin = time.perf_counter()
    loader = train_loader(Hanging(), iter([[0], [1], [2]]), num_workers=1)
    with Prefetcher(loader, "cpu"):
        pass
    assert time.perf_counter() - begin < 40


def test_an_old_pillow_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "OLD_PILLOW", "Pillow 10.4.0 is too old: pip install ...")
    path = save(tmp_path / "x.png", photo(8, 8))
    for read in (read_image, read_header):
        with pytest.raises(ValueError, match=r"Pillow 10\.4\.0 is too old"):
            read(path)


def test_names_that_are_not_utf8_can_be_held_out(tmp_path):
    names = [*(f"{i}.png" for i in range(4)), os.fsdecode(b"caf\xe9.png")]
    for i, name in enumerate(names):
        save(tmp_path / "gt" / name, photo(24, 24, seed=i))
    dataset = PairedImageDataset(tmp_path / "gt", gt_size=16, hold_out=True)
    assert len(dataset.held_out) == 1 and len(dataset.pairs) == 4


def test_a_list_names_files_in_either_form_of_unicode(tmp_path):
    for i, name in enumerate(["Mu\u0308ller.png", "other.png"]):
        save(tmp_path / "gt" / name, photo(24, 24, seed=i))
    (tmp_path / "list.txt").write_text("M\u00fcller.png\n", encoding="utf-8")
    dataset = PairedImageDataset(tmp_path / "gt", gt_size=16, meta_info_file=tmp_path / "list.txt")
    assert len(dataset) == 1


def test_a_root_without_a_readable_image_is_named(tmp_path):
    for i in range(120):
        save(tmp_path / "a" / f"{i}.png", photo(16, 16, seed=i))
    (tmp_path / "b").mkdir()
    (tmp_path / "b/0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="b has no image that can be read: leave it out"):
        PairedImageDataset([tmp_path / "a", tmp_path / "b"], gt_size=16)


def test_check_refuses_what_validation_would(tmp_path):
    for i in range(4):
        save(tmp_path / "gt" / f"{i}.png", photo(32, 32, seed=i))
    save(tmp_path / "val" / "0.png", photo(20, 20))
    command = [sys.executable, str(ROOT / "data.py"), "check", str(tmp_path / "gt")]
    command += ["--gt_size=16", "--window_size=8", f"--val_gt={tmp_path / 'val'}"]
    done = subprocess.run([*command, "--crop_border=4"], capture_output=True, text=True)
    assert done.returncode == 1 and "below 16 pixels inside crop_border=4: 0.png" in done.stdout
    done = subprocess.run([*command, "--val_lq=a,b"], capture_output=True, text=True)
    assert done.returncode == 1 and "give one val_lq for each val_gt" in done.stderr


def test_pack_removes_its_partial_file_after_an_error(tmp_path, monkeypatch):
    save(tmp_path / "gt" / "0.png", photo(16, 16))
    monkeypatch.setattr(ImageFolder, "__getitem__", lambda self, i: photo(8, 8))
    with pytest.raises(ValueError, match="has changed"):
        data.pack(tmp_path / "gt", tmp_path / "gt.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gt"]
