"""metrics.py: golden tables, closed forms, losses against BasicSR's, and the command line.

BASICSR=/path/to/BasicSR compares with that checkout's own code (opencv-python is needed there).
"""

import importlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import metrics
from metrics import LOSSES, PerceptualLoss, psnr, psnrb, ssim

ROOT = Path(metrics.__file__).parent
GOLDEN = ROOT / "tests" / "golden"
ROWS = [
    (folder.parent, row)
    for folder in sorted(GOLDEN.glob("metrics*/table.json"))
    for row in json.loads(folder.read_text())
]


def noise(*shape: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


# ---- measures ----


@pytest.mark.parametrize("tensor", [False, True])
def test_golden_tables(tensor: bool) -> None:
    assert len(ROWS) == 60
    for folder, row in ROWS:
        pair = [np.asarray(Image.open(folder / row[key])) for key in ("pred", "gt")]
        pair = [torch.from_numpy(i.copy()) for i in pair] if tensor else pair
        decibel, similarity = (1e-3, 1e-5) if row["y"] else (1e-6, 1e-6)
        arguments = (*pair, row["crop_border"], row["y"])
        assert psnr(*arguments) == pytest.approx(row["psnr"], abs=decibel, rel=0), row
        assert psnrb(*arguments) == pytest.approx(row["psnrb"], abs=decibel, rel=0), row
        assert ssim(*arguments) == pytest.approx(row["ssim"], abs=similarity, rel=0), row
        assert all(type(measure(*arguments)) is float for measure in (psnr, psnrb, ssim))


@pytest.mark.parametrize("d", [1, 7, 100])
@pytest.mark.parametrize("shape", [(40, 33, 3), (40, 33, 1), (40, 33)])
def test_constant_offset(d: int, shape: tuple[int, ...]) -> None:
    image = noise(*shape) // 2
    assert psnr(image + np.uint8(d), image) == pytest.approx(20 * math.log10(255 / d), abs=1e-12)
    assert psnr(image, image) == psnrb(np.full_like(image, 9), np.full_like(image, 9)) == math.inf
    assert ssim(image, image) == 1.0


def test_ssim_of_two_flat_images_is_the_luminance_term() -> None:
    a, b, c1 = 100, 140, (0.01 * 255) ** 2
    images = [np.full((16, 20), v, np.uint8) for v in (a, b)]
    assert ssim(*images) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), abs=1e-9)


def test_ssim_at_11_pixels_is_one_window() -> None:
    a, b = (noise(11, 11, seed=s).astype(np.float64) for s in (1, 2))
    line = np.exp(-(np.arange(-5, 6) ** 2) / 4.5)
    w = np.outer(line, line) / line.sum() ** 2
    mu, nu = (w * a).sum(), (w * b).sum()
    cov, var = (
        (w * (a - mu) * (b - nu)).sum(),
        (w * (a - mu) ** 2).sum() + (w * (b - nu) ** 2).sum(),
    )
    c1, c2 = 6.5025, 58.5225
    wanted = (2 * mu * nu + c1) * (2 * cov + c2) / ((mu**2 + nu**2 + c1) * (var + c2))
    assert ssim(a.astype(np.uint8), b.astype(np.uint8)) == pytest.approx(wanted, abs=1e-12)


def test_y_is_studio_range_luma_of_rgb_and_not_rounded() -> None:
    black = np.zeros((16, 16, 3), np.uint8)
    for colour, luma in {
        (255, 255, 255): 219,
        (255, 0, 0): 65.481,
        (0, 255, 0): 128.553,
        (0, 0, 255): 24.966,
    }.items():
        image = black + np.array(colour, np.uint8)
        assert psnr(image, black, y=True) == pytest.approx(20 * math.log10(255 / luma), abs=1e-12)
    white = metrics.comparable(black + np.uint8(255), black, 0, True)
    assert white[0] == pytest.approx(235.0, abs=1e-12) and white[1] == pytest.approx(
        16.0, abs=1e-12
    )
    gray = noise(32, 32), noise(32, 32, seed=1)
    assert psnr(*gray, y=True) == psnr(*gray)


def test_border_is_cut_on_every_side() -> None:
    image = noise(30, 40, 3)
    spoilt = image.copy()
    spoilt[:4], spoilt[-4:], spoilt[:, :4], spoilt[:, -4:] = 0, 0, 0, 0
    assert psnr(spoilt, image, 4) == math.inf and ssim(spoilt, image, 4) == 1.0
    assert psnr(spoilt, image, 3) < 40


def test_psnrb_counts_blocks_of_pred_alone() -> None:
    smooth = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    blocky = (
        smooth.reshape(8, 8, 8, 8).mean((1, 3)).round().astype(np.uint8).repeat(8, 0).repeat(8, 1)
    )
    assert psnrb(blocky, smooth) < psnr(blocky, smooth) - 1
    assert psnrb(smooth, blocky) == psnr(smooth, blocky)
    assert psnrb(blocky, blocky) < 40  # as in SwinIR: blocks count although the images are equal

    # Columns 8, 24, ... on: every step of 51 lies on a border of blocks, none elsewhere.
    steps = np.zeros((32, 32), np.uint8)
    steps[:, 8:16], steps[:, 24:] = 51, 51
    error = 3 * 32 * 0.2**2 / (32 * 3 * 2) * 3 / 5  # steps / borders * log2(8) / log2(32)
    assert psnrb(steps, steps) == pytest.approx(-10 * math.log10(error), abs=1e-9)


def test_16_bits_have_their_own_peak() -> None:
    a, b = noise(24, 24, 3), noise(24, 24, 3, seed=1)
    wide = [i.astype(np.uint16) * 257 for i in (a, b)]  # the same grey levels
    for measure in (psnr, ssim, psnrb):
        for y in (False, True):
            assert measure(*wide, 2, y) == pytest.approx(measure(a, b, 2, y), abs=1e-9)
    assert psnr(wide[0], torch.from_numpy(wide[1])) == pytest.approx(psnr(a, b), abs=1e-9)


@pytest.mark.parametrize(
    ("pred", "target", "border", "words"),
    [
        (noise(16, 16, 3), noise(16, 15, 3), 0, "shapes differ"),
        (noise(16, 16), noise(16, 16, 3), 0, "shapes differ"),
        (noise(16, 16, 3) / 255, noise(16, 16, 3), 0, "must be uint8"),
        (noise(16, 16), noise(16, 16).astype(np.uint16), 0, "must be uint8"),
        (noise(3, 16, 16), noise(3, 16, 16), 0, "channels last"),
        (noise(16), noise(16), 0, "channels last"),
        (noise(16, 16), noise(16, 16), 8, "crop_border=8"),
        (noise(16, 16), noise(16, 16), -1, "crop_border=-1"),
    ],
)
def test_what_cannot_be_compared(
    pred: np.ndarray, target: np.ndarray, border: int, words: str
) -> None:
    for measure in (psnr, ssim, psnrb):
        with pytest.raises(ValueError, match=words):
            measure(pred, target, border)


def test_too_small() -> None:
    assert psnr(noise(1, 1), noise(1, 1, seed=1)) > 0
    with pytest.raises(ValueError, match="11x11"):
        ssim(noise(18, 30), noise(18, 30), 4)
    with pytest.raises(ValueError, match="8x8"):
        psnrb(noise(15, 15), noise(15, 15))
    assert psnrb(noise(8, 16), noise(8, 16, seed=1)) > 0


# ---- losses ----


def test_losses_by_hand() -> None:
    pred, target = torch.tensor([0.5, 1.0, -1.0]), torch.tensor([0.0, 1.0, 1.0])
    assert LOSSES["l1"](pred, target).item() == pytest.approx(2.5 / 3)
    assert LOSSES["mse"](pred, target).item() == pytest.approx(4.25 / 3)
    assert LOSSES["charbonnier"](pred, target).item() == pytest.approx(
        (2.5 + math.sqrt(1e-9)) / 3, abs=1e-6
    )
    for loss in LOSSES.values():
        with pytest.raises(ValueError, match="differ in shape"):
            loss(pred, target[None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_losses_under_autocast(loss, dtype: torch.dtype) -> None:
    pred = (torch.rand(2, 3, 8, 8, dtype=torch.float64) / 8).to(dtype).requires_grad_()
    target = (pred.detach().double() + 1e-4).float()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(pred, target)
    value.backward()
    d = pred.detach().double() - target
    wanted = {"l1": d.abs(), "mse": d**2, "charbonnier": (d**2 + 1e-9).sqrt()}
    name = next(name for name in LOSSES if LOSSES[name] is loss)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    assert value.item() == pytest.approx(wanted[name].mean().item(), rel=1e-4)
    assert pred.grad.isfinite().all() and pred.grad.abs().sum() > 0


def test_charbonnier_gradient_at_zero_is_zero() -> None:
    pred = torch.zeros(4, requires_grad=True)
    LOSSES["charbonnier"](pred, torch.zeros(4)).backward()
    assert pred.grad.abs().max() == 0


def random_vgg(path: Path, divisor: int = 16) -> dict[str, torch.Tensor]:
    """Writes torchvision's vgg19 keys of random weights, He's deviation, widths divided by `divisor`."""
    random, channels, weights = np.random.RandomState(0), 3, {}
    for n, name in enumerate(metrics.VGG19):
        if name.startswith("conv"):
            width = min(64 << int(name[4]) - 1, 512) // divisor
            values = random.randn(width, channels, 3, 3) * math.sqrt(2 / (9 * channels))
            weights[f"features.{n}.weight"] = torch.from_numpy(values).float()
            weights[f"features.{n}.bias"] = torch.from_numpy(random.randn(width) / 10).float()
            channels = width
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return weights


def image_pair() -> tuple[torch.Tensor, torch.Tensor]:
    images = np.random.RandomState(1).rand(2, 2, 3, 48, 40)
    return torch.from_numpy(images[0]).float().requires_grad_(), torch.from_numpy(images[1]).float()


LAYERS = {"conv1_2": 0.1, "relu2_1": 0.2, "pool3": 1.0, "conv4_4": 0.5, "conv5_4": 1.0}
PERCEPTUAL_CASES = [
    {"layer_weights": {"conv5_4": 1.0}},
    {"layer_weights": LAYERS, "style_weight": 3.0, "criterion": "l1"},
    {
        "layer_weights": LAYERS,
        "style_weight": 3.0,
        "perceptual_weight": 0.5,
        "criterion": "l2",
        "use_input_norm": False,
    },
    {"layer_weights": LAYERS, "style_weight": 3.0, "criterion": "fro", "range_norm": True},
    {"layer_weights": {"relu3_2": 2.0}, "style_weight": 1.0, "perceptual_weight": 0.0},
]


def perceptual_values(loss) -> list[float]:
    """[perceptual, style, norm of the gradient of their sum] for `image_pair`; 0 for a loss that is None."""
    pred, target = image_pair()
    values = [value if value is not None else pred.new_zeros(()) for value in loss(pred, target)]
    sum(values).backward()
    return [value.item() for value in (*values, pred.grad.norm())]


# From BasicSR's class on the same weights and images (the test beside BasicSR itself prints them).
PERCEPTUAL_VALUES = [
    [0.08186640590429306, 0.0, 0.16882075369358063],
    [0.6501575112342834, 0.04969647526741028, 0.3043212890625],
    [0.026658013463020325, 0.0003279404481872916, 0.0074933781288564205],
    [35.68223571777344, 1.3791040182113647, 7.033420562744141],
    [0.0, 0.015762871131300926, 0.021788563579320908],
]


@pytest.mark.parametrize("case", range(len(PERCEPTUAL_CASES)))
def test_perceptual_loss_equals_basicsr(case: int, tmp_path: Path) -> None:
    random_vgg(tmp_path / "vgg.pth")
    loss = PerceptualLoss(**PERCEPTUAL_CASES[case], vgg_path=tmp_path / "vgg.pth")
    assert perceptual_values(loss) == pytest.approx(PERCEPTUAL_VALUES[case], rel=1e-4)
    assert not loss.state_dict() and not list(loss.parameters())


def basicsr(
    monkeypatch: pytest.MonkeyPatch, weights: dict[str, torch.Tensor]
) -> types.SimpleNamespace:
    """Modules of the checkout at BASICSR, without its __init__ files, with a VGG19 as wide as `weights`."""
    root = Path(os.environ["BASICSR"]) / "basicsr"
    for name in [name for name in sys.modules if name.startswith("basicsr.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("basicsr", "basicsr.utils", "basicsr.metrics", "basicsr.losses", "basicsr.archs"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        monkeypatch.setitem(sys.modules, name, package)
    for name in ("torchvision", "torchvision.models", "torchvision.models.vgg"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def vgg19(pretrained: bool) -> torch.nn.Module:
        net, channels = torch.nn.Module(), 3
        net.features = torch.nn.Sequential()
        for n, name in enumerate(metrics.VGG19):
            if name.startswith("conv"):
                width = len(weights[f"features.{n}.bias"])
                net.features.append(torch.nn.Conv2d(channels, width, 3, padding=1))
                channels = width
            else:
                relu = name.startswith("relu")
                net.features.append(torch.nn.ReLU(inplace=True) if relu else torch.nn.MaxPool2d(2))
        return net

    sys.modules["torchvision.models"].vgg = sys.modules["torchvision.models.vgg"]
    sys.modules["torchvision.models.vgg"].vgg19 = vgg19
    colours = importlib.import_module("basicsr.utils.color_util")
    sys.modules["basicsr.utils"].bgr2ycbcr = colours.bgr2ycbcr
    return types.SimpleNamespace(
        losses=importlib.import_module("basicsr.losses.basic_loss"),
        metrics=importlib.import_module("basicsr.metrics.psnr_ssim"),
    )


@pytest.mark.skipif(not os.environ.get("BASICSR"), reason="BASICSR=/path/to/BasicSR is not given")
@pytest.mark.parametrize("divisor", [1, 16])
def test_perceptual_loss_beside_basicsr_itself(divisor: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    theirs = basicsr(monkeypatch, random_vgg(Path(metrics.VGG19_FILE), divisor)).losses
    for case in PERCEPTUAL_CASES:
        wanted = perceptual_values(theirs.PerceptualLoss(**case))
        print(json.dumps(wanted))
        assert perceptual_values(PerceptualLoss(**case)) == pytest.approx(wanted, rel=1e-5)
    pred, target = image_pair()
    for name, other in (("l1", "L1Loss"), ("mse", "MSELoss"), ("charbonnier", "CharbonnierLoss")):
        options = {"eps": 1e-9} if name == "charbonnier" else {}
        assert torch.equal(
            LOSSES[name](pred, target), getattr(theirs, other)(**options)(pred, target)
        )


@pytest.mark.skipif(not os.environ.get("BASICSR"), reason="BASICSR=/path/to/BasicSR is not given")
def test_measures_beside_basicsr_itself(monkeypatch) -> None:
    theirs = basicsr(monkeypatch, {}).metrics
    for seed in range(6):
        height, width = np.random.RandomState(seed).randint(27, 90, 2)
        channels = (1, 3)[seed % 2]
        truth = noise(height, width, channels, seed=seed)
        pred = np.clip(
            truth.astype(int) + noise(height, width, channels, seed=seed + 9) % 41 - 20, 0, 255
        )
        for border in (0, 3, 8):
            for y in (False, True):
                pair = pred.astype(np.uint8), truth
                bgr = [i[..., ::-1] for i in pair]
                assert psnr(*pair, border, y) == pytest.approx(
                    theirs.calculate_psnr(*bgr, border, test_y_channel=y), abs=1e-4 if y else 1e-9
                )
                assert ssim(*pair, border, y) == pytest.approx(
                    theirs.calculate_ssim(*bgr, border, test_y_channel=y), abs=1e-6 if y else 1e-9
                )


def test_perceptual_loss_gray_autocast_and_no_random_numbers(tmp_path: Path) -> None:
    random_vgg(tmp_path / "vgg.pth")
    state = torch.get_rng_state()
    loss = PerceptualLoss({"conv3_1": 1.0}, style_weight=1.0, vgg_path=str(tmp_path / "vgg.pth"))
    assert torch.equal(state, torch.get_rng_state())
    pred, target = (i.detach() for i in image_pair())
    gray = [i[:, :1] for i in (pred, target)]
    assert loss(*gray) == loss(*(i.expand(-1, 3, -1, -1) for i in gray))
    exact = loss(pred, target)
    with torch.autocast("cpu", torch.bfloat16):
        half = loss(pred.bfloat16(), target)
    assert all(value.dtype == torch.float32 for value in half)
    assert [i.item() for i in half] == pytest.approx([i.item() for i in exact], rel=0.05)


def test_perceptual_loss_says_what_is_missing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(
        ValueError, match=r"vgg19-dcbb9e9d.pth: OSError\('no network'\); put https://.* at exper"
    ):
        PerceptualLoss({"conv5_4": 1.0})
    with pytest.raises(ValueError, match=r"none.pth: FileNotFoundError"):
        PerceptualLoss({"conv5_4": 1.0}, vgg_path="none.pth")
    Path("zero.pth").touch()
    with pytest.raises(ValueError, match=r"zero.pth: "):
        PerceptualLoss({"conv5_4": 1.0}, vgg_path="zero.pth")
    torch.save({"features.0.weight": torch.zeros(1)}, "other.pth")
    with pytest.raises(ValueError, match=r"other.pth: KeyError"):
        PerceptualLoss({"conv1_1": 1.0}, vgg_path="other.pth")
    random_vgg(Path(metrics.VGG19_FILE))
    assert PerceptualLoss({"conv1_1": 1.0}).names == ["conv1_1"]
    with pytest.raises(ValueError, match="conv6_1"):
        PerceptualLoss({"conv6_1": 1.0})
    with pytest.raises(ValueError, match="huber"):
        PerceptualLoss({"conv1_1": 1.0}, criterion="huber")


# ---- command line ----


def cli(*arguments: object, script: Path = ROOT / "metrics.py") -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command in a process of its own."""
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parent, timeout=60)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def call(monkeypatch, capsys):
    """The same as `cli`, within this process: starting one takes seconds."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["metrics.py", *map(str, arguments)])
        with pytest.raises((SystemExit, ValueError)) as end:
            metrics.main()
        out, err = capsys.readouterr()
        code = end.value.code if isinstance(end.value, SystemExit) else f"error: {end.value}"
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code or 0, out, err)

    return call


def save(path: Path, image: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return image


def numbers(line: str) -> list[float]:
    return [
        float(word)
        for word in line.replace("dB", "").split()
        if word.replace(".", "").isdigit() and "." in word
    ]


def test_cli_folders_by_template_with_data_py_alone(tmp_path: Path) -> None:
    script = tmp_path / "empty" / "metrics.py"
    script.parent.mkdir()
    shutil.copy(ROOT / "metrics.py", script)
    code, _, err = cli(tmp_path, tmp_path, script=script)
    assert code == 1 and "error: the command needs data.py beside metrics.py" in err
    shutil.copy(ROOT / "data.py", script.parent)
    wanted = []
    for n, name in enumerate(("b", "sub/a.v2", "sub/long_name_of_an_image")):
        truth = save(tmp_path / "gt" / f"{name}.bmp", noise(40, 44, 3, seed=n))
        pred = save(tmp_path / "out" / f"{name}x4.png", truth // 2)
        wanted.append([measure(pred, truth, 4, True) for measure in (psnr, ssim, psnrb)])
    (tmp_path / "gt" / "._b.png").touch()
    save(tmp_path / "gt" / ".cache" / "c.png", noise(40, 44, 3))
    folders = tmp_path / "out", tmp_path / "gt"
    code, out, err = cli(*folders, "--crop_border=4", "--y", "--filename_tmpl={}x4", script=script)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "bx4",
        "sub/a.v2x4",
        "sub/long_name_of_an_imagex4",
        "mean",
    ]
    assert len({line.index("PSNR-B") for line in lines}) == 1 and lines[-1].endswith(
        "(Y, border 4)"
    )
    for line, row in zip(lines, [*wanted, np.mean(wanted, axis=0)], strict=True):
        assert numbers(line.split("(")[0])[-3:] == pytest.approx(row, abs=6e-5)


def test_cli_two_images_of_other_modes(tmp_path: Path, call) -> None:
    truth = save(tmp_path / "gt.png", noise(32, 48))
    Image.fromarray(truth ^ 1).convert("RGBA").save(tmp_path / "out.png")
    code, out, err = call(tmp_path / "out.png", tmp_path / "gt.png")
    assert (
        (code, err) == (0, "") and "PSNR  48.1308 dB" in out and out.endswith("(RGB, border 0)\n")
    )
    Image.fromarray(truth ^ 1).convert("P").save(tmp_path / "out.png")
    assert "PSNR  48.1308 dB" in call(tmp_path / "out.png", tmp_path / "gt.png")[1]
    assert call(tmp_path / "gt.png", tmp_path / "gt.png")[1].endswith("(gray, border 0)\n")


def test_cli_names_every_trouble(tmp_path: Path) -> None:
    for name in ("fine", "size", "broken", "unmade"):
        save(tmp_path / "gt" / f"{name}.png", noise(24, 24, 3))
    for name, side in (("fine", 24), ("size", 20), ("extra", 24)):
        save(tmp_path / "out" / f"{name}.png", noise(side, 24, 3, seed=5))
    whole = (tmp_path / "gt" / "broken.png").read_bytes()
    (tmp_path / "out" / "broken.png").write_bytes(whole[: len(whole) // 2])
    code, out, err = cli(tmp_path / "out", tmp_path / "gt")
    assert code == 1 and "mean of 1" in out
    assert f"{tmp_path}/gt/unmade.png: no unmade in {tmp_path}/out" in err
    assert f"{tmp_path}/out/extra.png: no partner in {tmp_path}/gt" in err
    assert "size: the images' shapes differ: (20, 24, 3) and (24, 24, 3)" in err
    assert f"broken: {tmp_path}/out/broken.png can't be read" in err and len(err.splitlines()) == 4


def test_cli_wrong_arguments(tmp_path: Path, call) -> None:
    image = tmp_path / "gt" / "a.png"
    save(image, noise(24, 24))
    (tmp_path / "none").mkdir()
    for arguments, words in {
        (image, tmp_path / "gt"): "two images or two folders",
        (tmp_path / "absent", tmp_path / "gt"): "absent",
        (tmp_path / "absent.png", image): "absent.png can't be read (No such file",
        (tmp_path / "none", tmp_path / "gt"): "none' holds no images",
        (image, image, "--crop_border=12"): "a: crop_border=12",
        (image, image, "--crop_border=x"): "invalid int value",
        (image, image, "--border=4"): "--border=4",
    }.items():
        code, out, err = call(*arguments)
        assert code != 0 and words in err and not out, arguments


def test_a_template_without_the_name_is_refused(call, tmp_path) -> None:
    for name in ("gt/a.png", "gt/b.png", "out/ax4.png"):
        save(tmp_path / name, noise(24, 24, 3))
    code, _, text = call(tmp_path / "out", tmp_path / "gt", "--filename_tmpl=ax4")
    assert code == 1 and "filename_tmpl='ax4' must hold {}" in text


def test_names_that_differ_in_their_suffix_only_are_paired_as_model_writes_them(call, tmp_path):
    for folder, names in (
        ("gt", ("A.bmp", "a.png", "b.bmp")),
        ("out", ("A.bmp.png", "a.png.png", "b.png")),
    ):
        for i, name in enumerate(names):
            save(
                tmp_path / folder / name, np.full((24, 24, 3), 50 * i + (folder == "out"), np.uint8)
            )
    code, out, _ = call(tmp_path / "out", tmp_path / "gt")
    assert (code, out.count("PSNR  48.1308")) == (0, 4), (
        out
    )  # a difference of 1 each, so a mean of the same


def test_measures_take_float_batches_rounded_as_in_a_validation() -> None:
    gt = torch.rand(2, 3, 24, 30)
    pred = gt + 0.1 * torch.randn_like(gt)
    for measure in (metrics.psnr, metrics.ssim, metrics.psnrb):
        values = []
        for a, b in zip(pred, gt, strict=True):
            images = [x.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0) for x in (a, b)]
            values.append(measure(*images, 2, True))
        assert measure(pred, gt, 2, True) == pytest.approx(sum(values) / 2, rel=1e-12)
    for wrong in (pred[0], pred[:1], pred * math.nan, pred.numpy()):
        with pytest.raises(metrics.UserError):
            metrics.psnr(wrong, gt)


def test_the_strip_shows_the_middle_of_three_images() -> None:
    gt, lq = noise(340, 130, 3), noise(340, 130, 3, seed=1)
    picture = np.asarray(metrics.strip(lq, gt, gt, 20.0, math.inf))
    assert picture.shape == (320, 390, 3)
    text = 24  # rows that the captions cover
    for i, image in enumerate((lq, gt, gt)):
        assert np.array_equal(picture[text:, 130 * i : 130 * (i + 1)], image[10 + text : 330])
    small = [noise(16, 16, 1, dtype=np.uint16, seed=i) for i in range(3)]
    gray = metrics.strip(*small, 20.0, 30.0)  # ten times as large, so that the words fit
    assert (gray.size, gray.mode) == ((3 * 160, 160), "L")
    wanted = np.hstack(small)[..., 0].repeat(10, 0).repeat(10, 1) // 257
    assert np.array_equal(np.asarray(gray)[text:], wanted[text:])


def test_the_log_takes_back_what_a_restart_makes_again(tmp_path: Path) -> None:
    log = metrics.Log(tmp_path)
    for it in (1, 2, 3):
        log.event("train", f"line {it}", it, loss=float(it))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "tra')  # a crash
    metrics.Log(tmp_path, start=2).event("train", "line", 3, loss=3.5)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["iter"], e["loss"]) for e in events] == [(1, 1.0), (2, 2.0), (3, 3.5)]
    assert (tmp_path / "log.txt").read_text().count("\n") == 4
    text = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text[:-1])  # a crash that has cut the end of a line only
    metrics.Log(tmp_path, start=2**62).event("val", "line", 0)
    metrics.Log(tmp_path, quiet=True).event("val", "line", 9)  # as on other ranks
    assert (tmp_path / "log.jsonl").read_text().count("\n") == 4  # an evaluation takes nothing back


def test_the_name_of_a_run_stays_until_its_folder_goes(tmp_path: Path) -> None:
    name = metrics.Log(tmp_path).run_id()
    assert metrics.Log(tmp_path, start=2).run_id() == name
    (tmp_path / "wandb_id").unlink()
    assert metrics.Log(tmp_path).run_id() != name


def test_tensorboard_holds_the_log_over_a_restart(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start, numbers in ((0, (1, 2, 3)), (2, (3, 4))):  # 3 comes again
        log = metrics.Log(tmp_path, start, tensorboard=True, config={"lr": 1e-3})
        for it in numbers:
            log.event("train", "line", it, loss=start + it / 10)
        strips = {"set/a": Image.new("L", (30, 10))}
        log.event("val", "line", it, strips, dataset="set", psnr=20.0 + it)
        log.board.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    for tag, key in (("train/loss", "loss"), ("val/set/psnr", "psnr")):
        wanted = [(e["iter"], pytest.approx(e[key])) for e in lines if key in e]
        assert [(e.step, e.value) for e in events.Scalars(tag)] == wanted
    assert len(events.Images("set/a")) == 1 and "config/text_summary" in events.Tags()["tensors"]


def wandb_records(path: Path) -> Iterator[bytes]:
    """W&B's file: 7 bytes, then LevelDB's log format, of 32 KiB blocks: crc, length, kind of each piece."""
    data, place, record = path.read_bytes(), 7, b""
    while place < len(data):
        place += -place % 32768 if -place % 32768 < 7 else 0  # no room for a header: zeros
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : (place := place + 7 + length)]
        if kind in (1, 4):  # whole, last
            yield record
            record = b""


def test_weights_and_biases_holds_the_log_over_a_restart(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = {}
    for start, numbers in ((0, (1, 2)), (2, (3, 4))):
        log = metrics.Log(tmp_path, start, wandb="project", config={"lr": 1e-3})
        for it in numbers:
            log.event("train", "line", it, loss=it / 10)
        log.run.finish()
    runs = set()
    for path in tmp_path.rglob("*.wandb"):
        for record in map(Record.FromString, wandb_records(path)):
            runs |= {record.run.run_id} - {""}
            items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "train/loss" in items:
                found[int(items["_step"])] = float(items["train/loss"])
    assert found == {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4} and len(runs) == 1


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    log = metrics.Log(tmp_path)
    log.event("train", "line", 1, loss=0.1, lr=1e-3)
    for name in ("a", "training"):
        log.event("val", "line", 1, dataset=name, psnr=20.0)
    curves = (tmp_path / "curves.png").read_bytes()
    assert Image.open(tmp_path / "curves.png").width > 500
    log.event(
        "val", "line", 1, dataset="a", psnr=10.0, eval_only=True
    )  # of another protocol, maybe
    assert (tmp_path / "curves.png").read_bytes() == curves


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch) -> None:
    for module, package, options in (
        ("torch.utils.tensorboard", "tensorboard", {"tensorboard": True}),
        ("wandb", "wandb", {"wandb": "project"}),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=rf"{module}.*\(pip install {package}"):
            metrics.Log(tmp_path, **options)


# ---- sums of losses, means, and other ranks ----


def test_a_loss_is_a_weighted_sum_of_named_terms(tmp_path: Path) -> None:
    pred, target = image_pair()
    loss = metrics.WeightedLoss("charbonnier + 0.1*mse")
    terms = loss(pred, target)
    assert list(terms) == ["charbonnier", "mse"]
    assert torch.equal(terms["charbonnier"], LOSSES["charbonnier"](pred, target))
    assert torch.equal(terms["mse"], 0.1 * LOSSES["mse"](pred, target))

    random_vgg(tmp_path / "vgg.pth")
    options = {"layer_weights": ("conv1_2:0.1", "conv5_4"), "vgg_path": tmp_path / "vgg.pth"}
    terms = metrics.WeightedLoss("l1+0.5*perceptual+3*style", **options)(pred, target)
    layers = {"conv1_2": 0.1, "conv5_4": 1.0}
    both = PerceptualLoss(
        layers, perceptual_weight=0.5, style_weight=3.0, vgg_path=tmp_path / "vgg.pth"
    )
    assert [terms["perceptual"], terms["style"]] == list(both(pred, target))
    assert not metrics.WeightedLoss("l1", **options).vgg  # no weights are read


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("l3", "'l3'; there is l1, mse, charbonnier, perceptual, style"),
        ("", "no loss is called ''"),
        ("l1+l1", "l1 is given twice"),
        ("x*l1", "'x' is not a number: write 0.1*l1"),
        ("l1+", "no loss is called ''"),
    ],
)
def test_a_wrong_sum_of_losses_is_named(text: str, words: str) -> None:
    with pytest.raises(metrics.UserError) as error:
        metrics.parse_loss(text)
    assert words in str(error.value)


def test_the_meter_leaves_out_what_is_not_finite_and_goes_on_after_a_restart() -> None:
    meter = metrics.Meter("cpu")
    assert meter.state_dict() == {} and meter.skipped_in_a_row() == 0
    for value in (1.0, math.nan, math.inf, 3.0):
        value = torch.tensor(value)
        meter.add({"loss": value, "grad_norm": 2 * value}, value.isfinite())
    wanted = {"loss": 2.0, "grad_norm": 4.0, "skipped": 2, "skipped_in_a_row": 0}
    assert meter.means() == wanted
    again = metrics.Meter("cpu")
    again.load_state_dict(meter.state_dict())
    assert again.means() == wanted
    meter.reset()
    meter.add({"loss": torch.tensor(math.nan), "grad_norm": torch.tensor(1.0)}, torch.tensor(False))
    assert math.isnan(meter.means()["loss"]) and meter.skipped_in_a_row() == 1


def test_gan_losses_by_hand() -> None:
    scores = torch.tensor([-2.0, 0.5])
    log2 = torch.tensor([2.0, -0.5]).exp().add(1).log().mean()  # -log(sigmoid(scores))
    want = {
        "vanilla": (log2, (torch.tensor([-2.0, 0.5]).exp() + 1).log().mean(), log2),
        "lsgan": ((9 + 0.25) / 2, (4 + 0.25) / 2, (9 + 0.25) / 2),
        "hinge": ((3 + 0.5) / 2, (0 + 1.5) / 2, 0.75),
    }
    for name, (discriminator, generator) in metrics.GAN_LOSSES.items():
        real, fake, generated = want[name]
        assert discriminator(scores, real=True) == pytest.approx(float(real), rel=1e-6)
        assert discriminator(scores, real=False) == pytest.approx(float(fake), rel=1e-6)
        assert generator(scores, real=True) == pytest.approx(float(generated), rel=1e-6)


def test_a_log_that_was_spoilt_or_fails_stops_no_training(tmp_path: Path, monkeypatch) -> None:
    log = metrics.Log(tmp_path)
    log.event("train", "line", 1, loss=1.0)
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'12\n\xff\xfe\x80\n{"event": "train"}\n')
    log = metrics.Log(tmp_path, start=9)
    assert [event["iter"] for event in log.events()] == [1]

    class Failing:
        def log(self, *_):
            raise BrokenPipeError("W&B has gone")

    log.run, log.wandb = Failing(), None
    log.event("train", "line", 2, loss=1.0)
    monkeypatch.setattr(log, "draw_curves", lambda: 1 / 0)
    log.event("val", "line", 3, psnr=1.0)
    text = (tmp_path / "log.txt").read_text()
    assert text.count("no more is logged to W&B: BrokenPipeError") == 1
    assert "curves.png can't be drawn: ZeroDivisionError" in text
    assert [event["iter"] for event in log.events()] == [1, 2, 3]


def test_sizes_that_differ_by_less_than_a_scale_are_cropped_and_said(tmp_path: Path, call) -> None:
    original = save(tmp_path / "gt.png", noise(100, 121, 3))
    save(tmp_path / "out.png", original[:99, :120])
    code, out, _ = call(tmp_path / "out.png", tmp_path / "gt.png")
    assert code == 0 and "of 120x99 and 121x100 pixels, the upper left 120x99 are compared" in out
    assert "PSNR      inf dB" in out
    code, out, err = call(tmp_path / "out.png", tmp_path / "gt.png", "--scale=1")
    assert code == 1 and "shapes differ" in err


def test_a_weight_may_have_an_exponent() -> None:
    assert metrics.parse_loss("1e+2*l1+1e-3*mse") == {"l1": 100.0, "mse": 0.001}


def test_bad_batches_are_refused_by_name() -> None:
    good = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match="target has values that aren't finite"):
        psnr(good, good * math.nan)
    with pytest.raises(ValueError, match="an image is"):
        psnr(torch.zeros(0, 3, 8, 8), torch.zeros(0, 3, 8, 8))
    with pytest.raises(ValueError, match="gan needs a generator_loss"):
        metrics.WeightedLoss("l1+gan")
