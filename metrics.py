"""Everything that compares two images: PSNR, SSIM, PSNR-B, the losses; and the log that keeps the figures.

    python metrics.py RESTORED GROUND_TRUTH [--crop_border=4] [--y] [--filename_tmpl={}x4]

"2 dB lower than the paper" is most often a difference of convention. The published figures follow these:

    task                       colour  border  figures           official script
    classical, lightweight SR  Y       scale   PSNR SSIM         SwinIR main_test_swinir.py, BasicSR test.py
    denoising                  RGB     0       PSNR              SwinIR main_test_swinir.py (gray: as it is)
    JPEG artefact removal      gray    0       PSNR SSIM PSNR-B  SwinIR main_test_swinir.py

    rounding  the network's output is clamped to [0, 1], times 255, rounded to uint8, and only then compared
    Y         BT.601, 16 to 235, of the uint8 RGB; not rounded, as in SwinIR and BasicSR. KAIR and MATLAB's
              rgb2ycbcr round it, which gives 0.001 dB less at 22 dB and 1.6 dB less at 52 dB
    exact     a validation of train.py counts an image as 60 dB at most, which is about what rounding to 8 bits
              leaves: an image that is met exactly, as a black one may be, has no finite PSNR
    channels  PSNR: one squared error over all; SSIM, PSNR-B: one value each, then their mean; a set: the mean
"""

import argparse
import contextlib
import importlib
import json
import math
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F
from tqdm import tqdm

Picture = np.ndarray | torch.Tensor  # uint8 or uint16; (H, W, 3) RGB, or (H, W, 1) or (H, W) gray


def need(fine, sentence: str) -> None:
    if not fine:
        raise ValueError(sentence)


def _planes(pred: Picture, target: Picture, crop_border: int, y: bool) -> tuple[np.ndarray, np.ndarray, int]:
    """Two float64 (C, H, W) without the border, and the peak value; ValueError if they don't compare."""
    pair = [i.numpy(force=True) if isinstance(i, torch.Tensor) else np.asarray(i) for i in (pred, target)]
    a, b = (i[..., None] if i.ndim == 2 else i for i in pair)
    need(a.shape == b.shape, f"the images' shapes differ: {a.shape} and {b.shape}")
    need(a.ndim == 3 and a.shape[2] in (1, 3), f"an image is (H, W[, 1 or 3]), channels last, not {a.shape}")
    need(a.dtype == b.dtype in (np.uint8, np.uint16), f"both must be uint8 or uint16: {a.dtype}, {b.dtype}")
    height, width, channels = a.shape
    need(0 <= 2 * crop_border < min(height, width), f"{crop_border=} is not possible with {width}x{height}")
    peak = int(np.iinfo(a.dtype).max)
    inside = np.s_[crop_border : height - crop_border, crop_border : width - crop_border]
    a, b = (i[inside].astype(np.float64).transpose(2, 0, 1) for i in (a, b))
    if y and channels == 3:
        weights = np.array([65.481, 128.553, 24.966]) / 255  # ITU-R BT.601: black is 16/255, white 235/255
        a, b = (np.tensordot(weights, i, 1)[None] + peak * 16 / 255 for i in (a, b))
    return a, b, peak


def psnr(pred: Picture, target: Picture, crop_border: int = 0, y: bool = False) -> float:
    """Peak signal-to-noise ratio in dB; inf for equal images. ValueError for other types, unequal shapes.
    pred, target: uint8, or both uint16 (peak 65535); (H, W, 3) RGB, (H, W, 1) or (H, W); numpy or torch.
    crop_border: pixels left out on each side. y: compare the luma of RGB; gray is compared as it is."""
    pred, target, peak = _planes(pred, target, crop_border, y)
    return 10 * math.log10(peak**2 / e) if (e := np.mean((pred - target) ** 2)) > 0 else math.inf


def ssim(pred: Picture, target: Picture, crop_border: int = 0, y: bool = False) -> float:
    """Structural similarity (Wang et al. 2004), at most 1; the constants and window of its authors.
    Arguments as in `psnr`. Raises ValueError also for images under 11 pixels inside the border."""
    pred, target, peak = _planes(pred, target, crop_border, y)
    need(min(pred.shape[1:]) >= 11, f"SSIM needs 11x11 pixels inside the border, not {pred.shape[1:]}")
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))  # 11x11, Gaussian, sigma 1.5: along W, then H
    window, c1, c2 = window / window.sum(), (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for a, b in zip(pred, target, strict=True):  # one channel at a time, for the sake of memory
        maps = np.stack([a, b, a * a + b * b, a * b])  # (4, H, W) -> (4, H - 10, W - 10): where it fits
        for _ in range(2):  # the values that mix two lines are among those cut off
            maps = np.convolve(maps.ravel(), window, "same").reshape(maps.shape)[..., 5:-5].swapaxes(1, 2)
        mean_a, mean_b, squares, product = maps
        mean_product, mean_squares = mean_a * mean_b, mean_a**2 + mean_b**2
        covariance, variances = product - mean_product, squares - mean_squares
        similarity = (2 * mean_product + c1) * (2 * covariance + c2)
        values.append(np.mean(similarity / ((mean_squares + c1) * (variances + c2))))
    return float(np.mean(values))


def psnrb(pred: Picture, target: Picture, crop_border: int = 0, y: bool = False) -> float:
    """PSNR in dB that counts the blockiness of `pred`, and of it alone, as error (Yim and Bovik 2011).
    Arguments as in `psnr`. The 8x8 grid starts inside the border, so it meets a JPEG's grid only if that is a
    multiple of 8. Raises ValueError also where fewer than two blocks are left."""
    pred, target, peak = _planes(pred, target, crop_border, y)
    height, width = pred.shape[1:]
    borders = height * (width // 8 - 1) + width * (height // 8 - 1)  # as SwinIR counts
    others = height * (width - 1) + width * (height - 1) - borders
    need(borders > 0, f"PSNR-B needs two 8x8 blocks inside the border, not {width}x{height} pixels")
    # Blockiness: how much larger squared steps are across borders of 8x8 blocks than elsewhere, at least 0.
    steps = [np.sum(np.diff(pred, axis=axis) ** 2, axis=3 - axis) for axis in (1, 2)]  # each (C, positions)
    across = sum(i[:, 7::8].sum(1) for i in steps)
    excess = across / borders - (sum(i.sum(1) for i in steps) - across) / others
    blockiness = np.maximum(excess, 0) * math.log2(8) / math.log2(min(height, width))
    errors = np.mean((pred - target) ** 2, axis=(1, 2)) + blockiness
    return sum(10 * math.log10(peak**2 / e) if e > 0 else math.inf for e in errors) / len(errors)


def _difference(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """pred - target, at least in float32: half precision would lose small errors and the eps."""
    need(pred.shape == target.shape, f"{tuple(pred.shape)} and {tuple(target.shape)} differ in shape")
    return pred.to(torch.promote_types(pred.dtype, torch.float32)) - target


LOSSES = {  # function(pred, target) -> scalar
    "l1": lambda pred, target: _difference(pred, target).abs().mean(),
    "mse": lambda pred, target: _difference(pred, target).square().mean(),
    "charbonnier": lambda pred, target: (_difference(pred, target).square() + 1e-9).sqrt().mean(),  # as KAIR
}
# The layers of torchvision's vgg19().features in order: conv1_1, relu1_1, conv1_2, relu1_2, pool1, ..., pool5
_LAYERS = "1_1 1_2 1 2_1 2_2 2 3_1 3_2 3_3 3_4 3 4_1 4_2 4_3 4_4 4 5_1 5_2 5_3 5_4 5".split()
VGG19 = [kind + n for n in _LAYERS for kind in (("conv", "relu") if "_" in n else ("pool",))]
VGG19_FILE = "experiments/pretrained_models/vgg19-dcbb9e9d.pth"  # BasicSR's place for it
VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
CRITERIA = {"l1": F.l1_loss, "l2": F.mse_loss, "fro": lambda a, b: torch.linalg.vector_norm(a - b)}


class PerceptualLoss(torch.nn.Module):
    """Distance of VGG19 features, and of their Gram matrices (style), with BasicSR's arguments and results.
    layer_weights: layer -> weight, e.g. {"conv5_4": 1.0} (before its ReLU), relu2_1, pool3. criterion: l1, l2
    or fro (norm of the difference). use_input_norm: standardise by ImageNet's mean and deviation. range_norm:
    images are in [-1, 1], not [0, 1]. vgg_path: torchvision's vgg19-dcbb9e9d.pth; None takes VGG19_FILE if it
    is there, else torch.hub's copy or download. Raises ValueError for what cannot be had."""

    def __init__(
        self, layer_weights: dict[str, float], use_input_norm=True, range_norm=False, perceptual_weight=1.0,
        style_weight=0.0, criterion="l1", vgg_path: str | Path | None = None,
    ):  # fmt: skip
        super().__init__()
        if not layer_weights or set(layer_weights) - set(VGG19) or criterion not in CRITERIA:
            raise ValueError(f"{layer_weights=}, {criterion=}: there are {', '.join([*CRITERIA, *VGG19])}")
        self.layer_weights, self.distance = dict(layer_weights), CRITERIA[criterion]
        self.use_input_norm, self.range_norm = use_input_norm, range_norm
        self.perceptual_weight, self.style_weight = perceptual_weight, style_weight
        self.names = VGG19[: max(map(VGG19.index, layer_weights)) + 1]
        source = vgg_path or (VGG19_FILE if Path(VGG19_FILE).is_file() else VGG19_URL)
        load = torch.hub.load_state_dict_from_url if source == VGG19_URL else torch.load
        try:
            file = load(source, map_location="cpu", weights_only=True)
            for n, name in enumerate(self.names):  # unsaved buffers: no optimizer or checkpoint sees them
                for kind in ("weight", "bias") if name.startswith("conv") else ():
                    self.register_buffer(f"{name}_{kind}", file[f"features.{n}.{kind}"], persistent=False)
        except Exception as error:
            raise ValueError(f"{source}: {error!r:.200}; put {VGG19_URL} at {VGG19_FILE}") from error
        for name, value in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):  # ImageNet's
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def _features(self, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.expand(-1, 3, -1, -1)  # gray as three equal channels
        x = (x + 1) / 2 if self.range_norm else x
        x = (x - self.mean) / self.std if self.use_input_norm else x
        found = {}
        for name in self.names:
            if name.startswith("conv"):
                x = F.conv2d(x, getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias"), padding=1)
            else:
                x = F.relu(x) if name.startswith("relu") else F.max_pool2d(x, 2)
            if name in self.layer_weights:
                found[name] = x.float()
        return [found[name] for name in self.layer_weights]

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Two (B, 3 or 1, H, W) -> perceptual and style loss, times their weights; 0 for a weight of 0."""
        features, wanted = self._features(pred), self._features(target.detach())
        perceptual = style = pred.new_zeros((), dtype=torch.float32)
        with torch.autocast(pred.device.type, enabled=False):  # sums over whole images: not in half precision
            for weight, a, b in zip(self.layer_weights.values(), features, wanted, strict=True):
                perceptual = perceptual + self.perceptual_weight * weight * self.distance(a, b)
                if self.style_weight > 0:
                    a, b = (i.flatten(2) @ i.flatten(2).mT / i[0].numel() for i in (a, b))  # (B, C, C)
                    style = style + self.style_weight * weight * self.distance(a, b)
        return perceptual, style


def strip(lq: np.ndarray, out: np.ndarray, gt: np.ndarray, before: float, after: float) -> Image.Image:
    """Input, output, ground truth, (H, W, C) each, and PSNR: their middle 320 pixels; small ones enlarged."""
    inside = tuple(slice(max(n - 320, 0) // 2, (n + min(n, 320)) // 2) for n in gt.shape[:2])
    row = np.hstack([(i[inside] // (np.iinfo(gt.dtype).max // 255)).astype(np.uint8) for i in (lq, out, gt)])
    picture = ImageOps.scale(Image.fromarray(row.squeeze()), max(128 // min(gt.shape[:2]), 1), Image.NEAREST)
    draw = ImageDraw.Draw(picture)
    for i, text in enumerate((f"input {before:.2f} dB", f"output {after:.2f} dB", "ground truth")):
        draw.text((4 + i * picture.width // 3, 2), text, "white", stroke_width=1, stroke_fill="black")
    return picture


def finite(values: dict) -> dict:
    """The same with None, which JSON calls null, for nan and inf, which JSON doesn't know."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


class Log:
    """Lines for people (terminal, log.txt), events for programs: log.jsonl, curves.png (given matplotlib),
    TensorBoard, Weights & Biases. A restart takes back those after `start`. ValueError: no package, login."""

    def __init__(self, folder: Path, start=0, tensorboard=False, wandb=None, config: dict | None = None):
        self.folder, self.file, self.board, self.run, kept = folder, folder / "log.jsonl", None, None, []
        for line in self.file.read_text().splitlines(keepends=True) if self.file.exists() else ():
            with contextlib.suppress(ValueError):  # a crash can cut the last line
                kept += [line] if json.loads(line)["iter"] <= start else []
        (folder / "log.jsonl.partial").write_text("".join(kept))
        (folder / "log.jsonl.partial").replace(self.file)
        try:
            if tensorboard:
                package = importlib.import_module("torch.utils.tensorboard")
                self.board = package.SummaryWriter(folder / "tensorboard", purge_step=start + 1)
                self.board.add_text("config", json.dumps(config, indent=1))
            if wandb:
                self.picture = (package := importlib.import_module("wandb")).Image
                run = {"project": wandb, "id": f"{folder.name}-{folder.stat().st_ino}", "resume": "allow"}
                self.run = package.init(dir=folder, name=folder.name, config=config, **run)
        except Exception as error:
            raise ValueError(f"{error} (pip install it; W&B: wandb login, or WANDB_MODE=offline)") from None

    def __call__(self, text: str, pictures: dict | tuple = (), event: str = "", **values: object) -> None:
        with contextlib.suppress(OSError):  # the terminal may have been closed
            tqdm.write(text)
        with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=file)
        if not event:
            return
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event} | finite(values), allow_nan=False) + "\n")
        tag = "/".join(filter(None, (event, values.get("dataset"))))
        scalars = {f"{tag}/{k}": v for k, v in finite(values).items() if type(v) is float}
        for k, v in scalars.items() if self.board else ():
            self.board.add_scalar(k, v, values["iter"])
        for k, v in dict(pictures).items() if self.board else ():
            self.board.add_image(k, np.atleast_3d(v), values["iter"], dataformats="HWC")
        self.board and self.board.flush()
        if self.run:
            self.run.log(scalars | {k: self.picture(v) for k, v in dict(pictures).items()}, values["iter"])
        if event == "val" and values["iter"]:  # weights of another run have no curve
            self.draw()

    def draw(self) -> None:
        with contextlib.suppress(ImportError):
            figure = importlib.import_module("matplotlib.figure").Figure((12, 3.5), layout="constrained")
            log = [e for i in self.file.read_text().splitlines() if not (e := json.loads(i)).get("eval_only")]
            for axis, key in zip(figure.subplots(1, 3), ("loss", "lr", "psnr"), strict=True):
                points = [
                    (e.get("dataset", "training"), e["iter"], e[key]) for e in log if e.get(key) is not None
                ]
                for name in dict.fromkeys(name for name, *_ in points):
                    axis.plot(*zip(*(xy for n, *xy in points if n == name), strict=True), ".-", label=name)
                    axis.legend()
                axis.set(xlabel="iteration", title={"psnr": "PSNR, dB"}.get(key, key))
            figure.savefig(self.folder / "curves.png")


def read_image(path: str | Path) -> np.ndarray:
    """(H, W) gray or (H, W, 3) RGB; uint8, or uint16 from 16-bit gray; upright, no alpha. ValueError."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "BMP", "WEBP", "TIFF"]) as image:
            deep = image.mode[0] == "I"
            if (";16" in str(image.tile[:1])) > deep or (image.format != "PNG" and image.mode in ("I", "F")):
                raise ValueError("of 16 bits only gray without alpha is read here: save it with 8")
            image = ImageOps.exif_transpose(image)
            mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
            return np.asarray(image).astype(np.uint16) if deep else np.asarray(image.convert(mode))
    except Exception as error:  # Pillow raises many types
        raise ValueError(f"{path}: cannot be read ({error!r})") from error


def _images(folder: Path, template: str = "{}") -> dict[str, Path]:
    """Images below `folder`: path there, name put into template -> file. A suffix stays where needed."""
    kinds, found = ".png .jpg .jpeg .bmp .webp .tif .tiff".split(), {}
    paths = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.suffix.lower() in kinds]
    same = Counter(str(p.with_suffix("")).lower() for p in paths)  # as model.py names its outputs
    for path in (p for p in paths if "/." not in f"/{p.as_posix()}" and (folder / p).is_file()):
        name = template.replace("{}", path.name if same[str(path.with_suffix("")).lower()] > 1 else path.stem)
        found[(path.parent / name).as_posix()] = folder / path
    return found or sys.exit(f"{folder}: no images in it")


def main() -> None:
    parser = argparse.ArgumentParser(description="PSNR, SSIM and PSNR-B of restored images.")
    parser.add_argument("restored", type=Path, help="image, or folder with images in and below it")
    parser.add_argument("ground_truth", type=Path, help="image, or folder with images of the same names")
    parser.add_argument("--crop_border", type=int, default=0, help="pixels left out on each side")
    parser.add_argument("--y", action="store_true", help="compare the luma of RGB images, as papers on SR do")
    parser.add_argument("--filename_tmpl", default="{}", help="restored image's name, {} being the true one")
    args = parser.parse_args()
    if args.restored.is_dir() != args.ground_truth.is_dir():
        sys.exit(f"{args.restored} and {args.ground_truth}: give two images or two folders that exist")
    files, wanted = {args.restored.stem: args.restored}, {args.restored.stem: args.ground_truth}
    if args.restored.is_dir():
        files, wanted = _images(args.restored), _images(args.ground_truth, args.filename_tmpl)
    pairs = [(name, files[name], wanted[name]) for name in wanted if name in files]
    troubles = [f"{wanted[n]}: no {n} in {args.restored} (filename_tmpl?)" for n in wanted if n not in files]
    troubles += [f"{files[name]}: no partner in {args.ground_truth}" for name in files if name not in wanted]
    rows, colours, width = [], set(), max(len(name) for name, *_ in [*pairs, ["mean of 1000"]])
    line = f"{{:{width}}}  PSNR {{:8.4f}} dB  SSIM {{:.6f}}  PSNR-B {{:8.4f}} dB"
    for name, *paths in pairs:
        try:
            pair = [read_image(path) for path in paths]
            pair = [np.dstack([i] * 3) if i.ndim < max(j.ndim for j in pair) else i for i in pair]  # gray
            rows.append([measure(*pair, args.crop_border, args.y) for measure in (psnr, ssim, psnrb)])
            colours.add("gray" if pair[0].ndim == 2 else "Y" if args.y else "RGB")
            print(line.format(name, *rows[-1]), flush=True)
        except ValueError as error:
            troubles.append(f"{name}: {error}")
    if rows:
        mean = line.format(f"mean of {len(rows)}", *np.mean(rows, axis=0))
        print(f"{mean}  ({' and '.join(sorted(colours))}, border {args.crop_border})", flush=True)
    sys.exit("\n".join(troubles) or 0)


if __name__ == "__main__":
    main()
