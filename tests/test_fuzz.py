"""Damaged and hostile files are read, or refused in a sentence that names them; none crashes, none runs."""

import io
import os
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import data
import metrics
import model
import train

pytestmark = pytest.mark.filterwarnings("ignore")  # of Pillow and torch, about odd content


def mutate(rng, content, times=6):
    """Bytes changed, inserted, removed and doubled, or the end cut off; half of it near the start."""
    content = bytearray(content)
    for kind in rng.choice(5, rng.integers(1, times + 1), p=[0.7, 0.1, 0.1, 0.05, 0.05]):
        reach = min(len(content), 120) if rng.random() < 0.5 else len(content)
        at, n, byte = (int(rng.integers(top)) for top in (reach + 1, 9, 256))
        new = (bytes([byte]), rng.bytes(n), b"", content[at : at + 8 * n], b"")[kind]
        content[at : at + (1, 0, n, 0, len(content))[kind]] = new
    return bytes(content)


def valid_images(folder):
    """Small files of both depths, gray, colour, with alpha and palettes, turned by EXIF, compressed."""
    rng, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    folder.mkdir(exist_ok=True)
    for c in (1, 2, 3, 4, 11, 12, 13, 14):
        pixels = rng.integers(0, 65536, (9, 13, c % 10), np.uint16)
        if c < 10 or c == 11:
            data.write_image(folder / f"{c}.png", pixels if c > 10 else pixels.astype(np.uint8))
    gray, rgb, deep = (Image.open(folder / name) for name in ("1.png", "3.png", "11.png"))
    palette, cmyk, turned = rgb.quantize(16), rgb.convert("CMYK"), {"exif": exif}
    for im, name, options in (
        (rgb, "c.jpg", turned), (gray, "g.jpg", {}), (cmyk, "k.jpg", {}), (rgb, "c.webp", turned),
        (rgb, "l.webp", {"lossless": True}), (rgb, "c.bmp", {}), (palette, "p.bmp", {}),
        (rgb, "c.tif", turned), (rgb, "z.tif", {"compression": "tiff_deflate"}), (deep, "d.tif", {}),
        (gray, "w.tif", {"compression": "tiff_lzw"}), (palette, "p.png", {"transparency": 3}),
    ):  # fmt: skip
        im.save(folder / name, **options)
    return sorted(folder.iterdir())


def small_net(path):
    net = model.SwinIR(
        16, embed_dim=4, depths=(2,), num_heads=(2,), window_size=8, mlp_ratio=2, upscale=1
    )
    torch.save({"params": model.portable(net.state_dict()), "arguments": net.arguments}, path)
    return net


def test_1000_damaged_images_are_read_or_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 10_000
    )  # damage can enlarge an image: this saves time
    monkeypatch.setattr(
        PngImagePlugin.ChunkStream, "crc", lambda self, *_: self.fp.read(4)
    )  # unchecked
    rng, good, refused = np.random.default_rng(0), valid_images(tmp_path / "good"), []
    (tmp_path / "bad").mkdir()
    for k in range(1000):
        path = tmp_path / "bad" / f"{k:04d}{good[k % len(good)].suffix}"
        path.write_bytes(mutate(rng, good[k % len(good)].read_bytes()))
        try:
            img = data.read_image(path)
            assert img.shape == data.read_header(path).shape
            assert data.read_image(path, alpha=True).shape[2] in (1, 2, 3, 4)
        except data.UnreadableImage as error:
            refused.append(str(path))
            assert str(error).startswith(f"{path} can't be read")
        else:
            assert img.dtype in (np.uint8, np.uint16) and img.size and img.shape[2] in (1, 3), path
    small_net(tmp_path / "net.pth")
    monkeypatch.setattr(
        "sys.argv", ["", *(str(tmp_path / name) for name in ("net.pth", "bad", "out"))]
    )
    told = model.main()
    lines = [line.split(": ", 2) for line in capsys.readouterr().err.splitlines()]
    lines = [line for line in lines if line[0] == "error"]
    assert refused == [name for _, name, why in lines if why] and 100 < len(refused) < 900
    assert told.startswith(f"error: {len(refused)} of 1000 images failed: {refused[0]}, ")
    assert len(list((tmp_path / "out").iterdir())) == 1000 - len(refused)


def loads(path):
    try:
        return isinstance(model.load(path), model.SwinIR)
    except ValueError as error:
        assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_1000_damaged_checkpoints_load_or_are_named(tmp_path):
    rng, (new, old, bad), count = (
        np.random.default_rng(0),
        (tmp_path / f"{k}.pth" for k in "012"),
        Counter(),
    )
    small_net(new)
    torch.save(
        torch.load(new), old, _use_new_zipfile_serialization=False
    )  # the layout before torch 1.6
    with zipfile.ZipFile(new) as z:
        members = {name: z.read(name) for name in z.namelist()}
    for k in range(1000):
        name, other = rng.choice(list(members), 2) if k % 4 == 3 else ("0/data.pkl", "0/version")
        wrong = mutate(rng, members[name], 3) if k % 3 else members[other]
        with zipfile.ZipFile(bad, "w") as z:  # whole, with a wrong member
            for item in (members | {name: wrong}).items():
                z.writestr(*item)
        if k % 4 < 2:
            bad.write_bytes(mutate(rng, (new, old)[k % 4].read_bytes(), 3))
        count[k % 4, loads(bad)] += 1
    assert len(count) == 8, count  # of each kind some load: what hits a weight shows nowhere


def test_what_would_run_code_is_refused_and_did_not_run(tmp_path):
    net, marker, path = (
        small_net(tmp_path / "net"),
        tmp_path / "ran",
        tmp_path / "training_states/0.state",
    )
    weights, code = torch.load(tmp_path / "net"), f"open({str(marker)!r}, 'w').close()"
    uses = [data.PackedImages, lambda path: model.load_weights(net, path)]
    uses += [lambda path: metrics.PerceptualLoss({"relu1_1": 1.0}, vgg_path=path)]
    path.parent.mkdir()
    for call in (
        (os.system, f"echo > {marker}"),
        (eval, code),
        (exec, code),
        (open, str(marker), "w"),
    ):
        trap = type("Trap", (), {"__reduce__": lambda self, call=call: (call[0], call[1:])})()
        for held in (
            trap,
            {"params": trap},
            weights | {"arguments": trap},
            weights | {"iter": [trap]},
        ):
            files = [io.BytesIO() for _ in range(3)]
            np.save(files[0], np.array([held], dtype=object))
            for zipped in (True, False):
                torch.save(held, files[1 + zipped], _use_new_zipfile_serialization=zipped)
            for file in files:
                path.write_bytes(file.getvalue())
                assert not loads(path) and train.last_checkpoint(tmp_path, 0, 1)[1] == {}
                for use in uses:
                    with pytest.raises(ValueError, match=r"0\.state"):
                        use(path)
                assert not marker.exists()
