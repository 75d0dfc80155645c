"""Measures and losses, which compare two images; and the log of a run.

    python metrics.py RESTORED ORIGINALS [--crop_border=4] [--y] [--filename_tmpl={}x4]

"2 dB lower than the paper" is most often a difference of convention. Published figures follow:

    task                       colour  border  figures           official script
    classical, lightweight SR  Y       scale   PSNR SSIM         SwinIR's, BasicSR's test.py
    colour denoising           RGB     0       PSNR              SwinIR's main_test_swinir.py
    gray denoising             gray    0       PSNR              SwinIR's main_test_swinir.py
    JPEG artefact removal      gray    0       PSNR SSIM PSNR-B  SwinIR's main_test_swinir.py

    rounding  The output is clamped to [0, 1], times 255, rounded to uint8, and only then compared.
    Y         BT.601, 16 to 235, of the uint8 RGB; not rounded, as in SwinIR and BasicSR. KAIR and
              MATLAB's rgb2ycbcr round it: 0.001 dB less at 22 dB, 1.6 dB less at 52 dB.
    channels  PSNR: one squared error over all channels. SSIM, PSNR-B: one value for each, averaged.
    exact     The PSNR of equal images is infinite, and so is any mean that includes it. In a
              validation of train.py an image counts as 60 dB at most, about what rounding to 8 bits
              leaves.
"""

import argparse
import contextlib
import difflib
import importlib
import json
import math
import re
import secrets
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

# uint8 or uint16: (H, W, 3) RGB, or (H, W, 1) or (H, W) gray. Or a float tensor (B, C, H, W) in
# [0, 1], such as networks take and return.
Pixels = np.ndarray | Tensor


class UserError(ValueError):  # as in data.py and model.py, so that each works alone
    """A mistake that the user can correct. The message is one sentence that says how."""


# Measures


def averaged_over_batches(measure: Callable[..., float]) -> Callable[..., float]:
    """Lets a measure of two images take float tensors (B, C, H, W), too: the mean over the images,
    which are clamped to [0, 1] and rounded to 8 bits, as in a validation."""

    @wraps(measure)
    def measure_any(pred: Pixels, target: Pixels, crop_border: int = 0, y: bool = False) -> float:
        both = is_batch(pred) and is_batch(target)
        if not both or pred.shape != target.shape or len(pred) == 0:
            return measure(pred, target, crop_border, y)  # which refuses batches
        values = []
        pred, target = rounded_images(pred, "pred"), rounded_images(target, "target")
        for a, b in zip(pred, target, strict=True):
            values.append(measure(a, b, crop_border, y))
        return sum(values) / len(values)

    return measure_any


def is_batch(image: Pixels) -> bool:
    return isinstance(image, Tensor) and image.is_floating_point() and image.ndim == 4


def rounded_images(batch: Tensor, name: str) -> np.ndarray:  # (B, C, H, W) -> (B, H, W, C) uint8
    if not batch.isfinite().all():
        raise UserError(f"{name} has values that aren't finite: the network's weights may be nan")
    images = batch.detach().float().clamp(0, 1).mul(255).round().byte()
    return images.permute(0, 2, 3, 1).numpy(force=True)


@averaged_over_batches
def psnr(pred: Pixels, target: Pixels, crop_border: int = 0, y: bool = False) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal images.

    Args:
        pred, target: Both uint8, or both uint16 (peak 65535). (H, W, 3), (H, W, 1) or (H, W),
            NumPy arrays or tensors. Or both float tensors (B, C, H, W): then the result is the mean
            over the batch, clamped to [0, 1] and rounded to 8 bits, as in a validation.
        crop_border: Pixels left out on each side.
        y: Compare the luma of RGB images. Gray images are compared as they are.

    Raises UserError for other types and for unequal shapes.
    """
    pred, target, peak = comparable(pred, target, crop_border, y)
    return decibels(np.mean((pred - target) ** 2), peak)


@averaged_over_batches
def ssim(pred: Pixels, target: Pixels, crop_border: int = 0, y: bool = False) -> float:
    """Structural similarity (Wang et al. 2004), at most 1, with its authors' constants.

    Arguments as in `psnr`. Raises UserError also for images below 11 pixels inside the border.
    """
    pred, target, peak = comparable(pred, target, crop_border, y)
    height, width = pred.shape[1:]
    if min(height, width) < 11:
        raise UserError(f"SSIM needs 11x11 pixels inside the border, not {width}x{height}")
    c1 = (0.01 * peak) ** 2
    c2 = (0.03 * peak) ** 2
    values = []
    for a, b in zip(pred, target, strict=True):  # one channel at a time, to save memory
        mean_a, mean_b, mean_squares, mean_product = gaussian_means(
            np.stack([a, b, a**2 + b**2, a * b])
        )
        variances = mean_squares - (mean_a**2 + mean_b**2)  # of a and of b, added
        covariance = mean_product - mean_a * mean_b
        luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        structure = (2 * covariance + c2) / (variances + c2)
        values.append(np.mean(luminance * structure))
    return float(np.mean(values))


@averaged_over_batches
def psnrb(pred: Pixels, target: Pixels, crop_border: int = 0, y: bool = False) -> float:
    """PSNR in dB that counts the blockiness of `pred`, but not of `target`, as error (Yim, Bovik
    2011).

    Arguments as in `psnr`. The 8x8 grid starts inside the border, so it meets a JPEG's grid only
    if the border is a multiple of 8. Raises UserError also where fewer than two blocks are left.
    """
    pred, target, peak = comparable(pred, target, crop_border, y)
    height, width = pred.shape[1:]
    # Pairs of neighbouring pixels, across the edges of blocks and elsewhere. SwinIR counts
    # width // 8 - 1 edges in a row, one too few unless the width is a multiple of 8. The sums below
    # include that edge. It is kept so that figures agree.
    edge_pairs = height * (width // 8 - 1) + width * (height // 8 - 1)
    other_pairs = height * (width - 1) + width * (height - 1) - edge_pairs
    if edge_pairs <= 0:
        raise UserError(f"PSNR-B needs two 8x8 blocks inside the border, not {width}x{height}")
    values = []
    for a, b in zip(pred, target, strict=True):
        # How much larger squared steps are across the edges of blocks than elsewhere.
        steps_x = np.sum(np.diff(a, axis=1) ** 2, axis=0)  # (W - 1,)
        steps_y = np.sum(np.diff(a, axis=0) ** 2, axis=1)  # (H - 1,)
        across = steps_x[7::8].sum() + steps_y[7::8].sum()
        within = steps_x.sum() + steps_y.sum() - across
        excess = max(across / edge_pairs - within / other_pairs, 0)
        blockiness = excess * math.log2(8) / math.log2(min(height, width))  # the paper's eta
        values.append(decibels(np.mean((a - b) ** 2) + blockiness, peak))
    return sum(values) / len(values)


# Measures of a validation: name -> function(pred, target, crop_border, y), of arrays (H, W, C). The
# first one of `--measures=psnr,ssim` decides which network is the best: larger is better.
MEASURES = {"psnr": psnr, "ssim": ssim, "psnrb": psnrb}
FORMATS = {"psnr": "{:.2f} dB", "ssim": "SSIM {:.4f}", "psnrb": "PSNR-B {:.2f} dB"}
CAPS = {"psnr": 60.0, "psnrb": 60.0}  # so that one exact image doesn't make the mean infinite


def capped(name: str, value: float) -> float:
    return min(value, CAPS.get(name, math.inf))


def describe_measure(name: str, value: float) -> str:
    return FORMATS.get(name, name + " {:.4f}").format(value)


def comparable(
    pred: Pixels, target: Pixels, crop_border: int, y: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Both as float64 (C, H, W) without the border, and the peak value. Raises UserError."""
    pred, target = as_array(pred), as_array(target)
    if pred.shape != target.shape:
        raise UserError(f"the images' shapes differ: {pred.shape} and {target.shape}")
    if pred.ndim != 3 or pred.shape[2] not in (1, 3):
        raise UserError(f"an image is (H, W[, 1 or 3]), channels last, not {pred.shape}")
    if pred.dtype != target.dtype or pred.dtype not in (np.uint8, np.uint16):
        types = f"not {pred.dtype} and {target.dtype}"
        raise UserError(f"both must be uint8 or uint16, or float tensors (B, C, H, W), {types}")
    height, width, channels = pred.shape
    if not 0 <= 2 * crop_border < min(height, width):
        raise UserError(f"crop_border={crop_border} is not possible with {width}x{height} pixels")
    peak = int(np.iinfo(pred.dtype).max)
    planes = []
    for image in (pred, target):
        inside = image[crop_border : height - crop_border, crop_border : width - crop_border]
        plane = inside.astype(np.float64).transpose(2, 0, 1)
        if y and channels == 3:
            plane = luma(plane, peak)
        planes.append(plane)
    return planes[0], planes[1], peak


def as_array(image: Pixels) -> np.ndarray:
    array = image.numpy(force=True) if isinstance(image, Tensor) else np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def luma(rgb: np.ndarray, peak: int) -> np.ndarray:  # (3, H, W) -> (1, H, W)
    """Y of ITU-R BT.601: black is 16 / 255 of the peak, white 235 / 255."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return np.tensordot(weights, rgb, 1)[None] + peak * 16 / 255


def decibels(squared_error: float, peak: int) -> float:
    if squared_error == 0:
        return math.inf
    return 10 * math.log10(peak**2 / squared_error)


def gaussian_means(maps: np.ndarray) -> np.ndarray:  # (K, H, W) -> (K, H - 10, W - 10)
    """Means under an 11x11 Gaussian window of sigma 1.5, wherever it fits into the image."""
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    for _ in range(2):  # along W, then along H
        # One convolution over all rows laid end to end. What mixes two rows is cut off.
        rows = np.convolve(maps.ravel(), window, "same").reshape(maps.shape)
        maps = rows[..., 5:-5].swapaxes(1, 2)
    return maps


# Losses


def l1(pred: Tensor, target: Tensor) -> Tensor:
    return difference(pred, target).abs().mean()


def mse(pred: Tensor, target: Tensor) -> Tensor:
    return difference(pred, target).square().mean()


def charbonnier(pred: Tensor, target: Tensor) -> Tensor:
    """L1 that is smooth at 0, with KAIR's eps."""
    return (difference(pred, target).square() + 1e-9).sqrt().mean()


def difference(pred: Tensor, target: Tensor) -> Tensor:
    """In float32 at least: half precision would lose small errors and the eps."""
    if pred.shape != target.shape:
        raise UserError(f"{tuple(pred.shape)} and {tuple(target.shape)} differ in shape")
    return pred.to(torch.promote_types(pred.dtype, torch.float32)) - target


# name -> function(pred, target) -> scalar. `--loss=l1+0.1*mse` is a weighted sum of such terms.
LOSSES = {"l1": l1, "mse": mse, "charbonnier": charbonnier}
VGG_TERMS = ("perceptual", "style")  # terms that PerceptualLoss computes
GAN_TERM = "gan"  # computed by a discriminator, which train.py trains


def parse_loss(text: str) -> dict[str, float]:
    """{term: weight} of a text such as "charbonnier+0.1*perceptual". Raises UserError."""
    known = [*LOSSES, *VGG_TERMS, GAN_TERM]
    weights = {}
    for term in re.split(r"(?<![0-9.]e)\+", text.replace(" ", "")):  # 1e+2 is a number
        factor, star, name = term.rpartition("*")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1) or known
            raise UserError(
                f"loss={text!r}: no loss is called {name!r}; there is {', '.join(near)}"
            )
        if name in weights:
            raise UserError(f"loss={text!r}: {name} is given twice")
        try:
            weights[name] = float(factor) if star else 1.0
        except ValueError:
            raise UserError(
                f"loss={text!r}: {factor!r} is not a number: write 0.1*{name}"
            ) from None
    return weights


class WeightedLoss(nn.Module):
    """The losses that `--loss` names, each times its weight, by name. The caller adds them.

    Args:
        generator_loss: A function of pred. The term "gan" needs it.
        vgg_options: Arguments of PerceptualLoss. The terms "perceptual" and "style" need
            layer_weights.
    """

    def __init__(
        self,
        text: str,
        generator_loss: Callable[[Tensor], Tensor] | None = None,
        **vgg_options: Any,
    ) -> None:
        super().__init__()
        self.weights = parse_loss(text)
        if GAN_TERM in self.weights and generator_loss is None:
            raise UserError(f"loss={text!r}: {GAN_TERM} needs a generator_loss")
        self.generator_loss = generator_loss
        self.vgg = None
        if any(name in VGG_TERMS for name in self.weights):
            perceptual = self.weights.get("perceptual", 0.0)
            style = self.weights.get("style", 0.0)
            self.vgg = PerceptualLoss(
                perceptual_weight=perceptual, style_weight=style, **vgg_options
            )

    def forward(self, pred: Tensor, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        for name, weight in self.weights.items():
            if name in LOSSES:
                terms[name] = weight * LOSSES[name](pred, target)
        if GAN_TERM in self.weights:
            terms[GAN_TERM] = self.weights[GAN_TERM] * self.generator_loss(pred)
        if self.vgg is not None:
            perceptual, style = self.vgg(pred, target)
            if "perceptual" in self.weights:
                terms["perceptual"] = perceptual
            if "style" in self.weights:
                terms["style"] = style
        return terms


# Losses of GANs: functions of a discriminator's scores, and whether these should say "real".


def vanilla(scores: Tensor, real: bool) -> Tensor:
    """The cross-entropy of the scores as logits (Goodfellow et al. 2014)."""
    return F.softplus(-scores if real else scores).mean()


def least_squares(scores: Tensor, real: bool) -> Tensor:
    """LSGAN (Mao et al. 2017): 1 is real, 0 is not."""
    return (scores - float(real)).square().mean()


def hinge(scores: Tensor, real: bool) -> Tensor:
    """Scores above 1 are real, those below -1 are not (Lim and Ye 2017)."""
    return F.relu(1 - scores if real else 1 + scores).mean()


def minus_mean(scores: Tensor, real: bool) -> Tensor:
    """What the generator minimises against a hinge."""
    return -scores.mean()


# --gan_type: (loss of the discriminator, loss of the generator)
GAN_LOSSES = {
    "vanilla": (vanilla, vanilla),
    "lsgan": (least_squares, least_squares),
    "hinge": (hinge, minus_mean),
}


def vgg19_layers() -> list[str]:
    """Names of torchvision's vgg19().features in order: conv1_1, relu1_1, conv1_2, ..., pool5."""
    names = []
    for stage, convolutions in enumerate((2, 2, 4, 4, 4), 1):
        for i in range(1, convolutions + 1):
            names += [f"conv{stage}_{i}", f"relu{stage}_{i}"]
        names.append(f"pool{stage}")
    return names


VGG19 = vgg19_layers()
VGG19_FILE = "experiments/pretrained_models/vgg19-dcbb9e9d.pth"  # BasicSR's place for it
VGG19_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"


def frobenius(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(a - b)


CRITERIA = {"l1": F.l1_loss, "l2": F.mse_loss, "fro": frobenius}


class PerceptualLoss(nn.Module):
    """Distance of VGG19 features, and of their Gram matrices (style): BasicSR's, with its results.

    Args:
        layer_weights: Layer -> weight, for example {"conv5_4": 1.0} (before its ReLU), relu2_1,
            pool3. A tuple of texts ("conv4_4:0.5", "conv5_4") is taken as well.
        use_input_norm: Standardise images by ImageNet's mean and standard deviation.
        range_norm: Images are in [-1, 1], not [0, 1].
        criterion: "l1", "l2" or "fro" (norm of the difference).
        vgg_path: torchvision's vgg19-dcbb9e9d.pth. None: VGG19_FILE if it is there, else
            torch.hub's copy or download.

    `forward` takes two (B, 3 or 1, H, W) and returns the perceptual and the style loss, each
    times its weight. Raises UserError for unknown layers or criteria, and missing weights.
    """

    def __init__(
        self,
        layer_weights: dict[str, float] | tuple[str, ...],
        use_input_norm: bool = True,
        range_norm: bool = False,
        perceptual_weight: float = 1.0,
        style_weight: float = 0.0,
        criterion: str = "l1",
        vgg_path: str | Path | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(layer_weights, dict):
            layer_weights = parse_layers(layer_weights)
        unknown = [name for name in layer_weights if name not in VGG19]
        if unknown or not layer_weights or criterion not in CRITERIA:
            known = ", ".join([*CRITERIA, *VGG19])
            raise UserError(
                f"layer_weights={layer_weights}, criterion={criterion!r}: there are {known}"
            )
        self.layer_weights = dict(layer_weights)
        self.use_input_norm = use_input_norm
        self.range_norm = range_norm
        self.perceptual_weight = perceptual_weight
        self.style_weight = style_weight
        self.distance = CRITERIA[criterion]
        deepest = max(VGG19.index(name) for name in layer_weights)
        self.names = VGG19[: deepest + 1]
        self.load_vgg(vgg_path)
        for name, value in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)

    def load_vgg(self, vgg_path: str | Path | None) -> None:
        """Weights become buffers that are not saved: no optimizer or checkpoint sees them."""
        source = vgg_path or (VGG19_FILE if Path(VGG19_FILE).is_file() else VGG19_URL)
        load = torch.hub.load_state_dict_from_url if source == VGG19_URL else torch.load
        try:
            file = load(source, map_location="cpu", weights_only=True)
            for n, name in enumerate(self.names):
                if name.startswith("conv"):
                    for kind in ("weight", "bias"):
                        value = file[f"features.{n}.{kind}"]
                        self.register_buffer(f"{name}_{kind}", value, persistent=False)
        except Exception as error:  # of the network, of the disk, of a damaged file
            advice = f"put {VGG19_URL} at {vgg_path or VGG19_FILE}"
            raise UserError(f"{source}: {error!r:.200}; {advice}") from error

    def features(self, x: Tensor) -> list[Tensor]:
        x = x.expand(-1, 3, -1, -1)  # gray as three equal channels
        if self.range_norm:
            x = (x + 1) / 2
        if self.use_input_norm:
            x = (x - self.mean) / self.std
        found = {}
        for name in self.names:
            if name.startswith("conv"):
                weight, bias = getattr(self, f"{name}_weight"), getattr(self, f"{name}_bias")
                x = F.conv2d(x, weight, bias, padding=1)
            elif name.startswith("relu"):
                x = F.relu(x)
            else:
                x = F.max_pool2d(x, 2)
            if name in self.layer_weights:
                found[name] = x.float()
        return [found[name] for name in self.layer_weights]

    def forward(self, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        features, wanted = self.features(pred), self.features(target.detach())
        perceptual = pred.new_zeros((), dtype=torch.float32)
        style = pred.new_zeros((), dtype=torch.float32)
        # Sums over whole images: not in half precision.
        with torch.autocast(pred.device.type, enabled=False):
            for weight, a, b in zip(self.layer_weights.values(), features, wanted, strict=True):
                perceptual = perceptual + self.perceptual_weight * weight * self.distance(a, b)
                if self.style_weight != 0:
                    distance = self.distance(gram_matrix(a), gram_matrix(b))
                    style = style + self.style_weight * weight * distance
        return perceptual, style


def parse_layers(texts: tuple[str, ...]) -> dict[str, float]:
    """("conv4_4:0.5", "conv5_4") -> {"conv4_4": 0.5, "conv5_4": 1.0}"""
    weights = {}
    for text in texts:
        name, colon, weight = text.partition(":")
        try:
            weights[name] = float(weight) if colon else 1.0
        except ValueError:
            raise UserError(f"vgg_layers: {text!r} must be written as conv5_4:0.5") from None
    return weights


def gram_matrix(x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, C)
    x = x.flatten(2)
    return x @ x.mT / (x.shape[1] * x.shape[2])


# Means


class Meter:
    """Means of the figures that training steps return, since the last log line, over all ranks.

    The sums stay on the device: `add` does not wait for a GPU; reading them does.
    """

    def __init__(self, device: torch.device | str, rank: int = 0, world: int = 1) -> None:
        self.device = torch.device(device)
        self.rank = rank
        self.world = world
        self.names: list[str] = []
        # Of each name, then three counts of steps: made, skipped, skipped in a row.
        self.sums: Tensor | None = None

    def add(self, figures: dict[str, Tensor], finite: Tensor) -> None:
        """Figures of a step, scalars on the device. `finite`: whether the step changed the weights.
        If it did not, it is counted as skipped, and its figures are left out."""
        if self.names != list(figures):  # the first step, or a restart with another loss
            self.names = list(figures)
            self.sums = torch.zeros(len(figures) + 3, device=self.device)
        values = torch.stack([figures[name].float() for name in self.names])
        made = finite.float()
        skipped = 1 - made
        counts = torch.stack([made, skipped, skipped])
        self.sums += torch.cat([values.where(finite, 0), counts])
        self.sums[-1] *= skipped  # the count of steps in a row is 0 after a finite step

    def means(self) -> dict[str, float]:
        """The mean of each figure (nan if no step was finite), and the counts of skipped steps."""
        # The mean over the ranks. The counts are the same on all of them.
        *sums, made, skipped, in_a_row = sum_over_ranks(self.sums / self.world).tolist()
        means = {}
        for name, total in zip(self.names, sums, strict=True):
            means[name] = total / made if made else math.nan
        return means | {"skipped": skipped, "skipped_in_a_row": in_a_row}

    def skipped_in_a_row(self) -> float:
        """Waits for the device."""
        return 0.0 if self.sums is None else self.sums[-1].item()

    def reset(self) -> None:
        self.sums[:-1] = 0  # steps skipped in a row are counted on

    def state_dict(self) -> dict[str, Any]:
        """With the sums of each rank. All ranks must call it."""
        if self.sums is None:
            return {}
        rows = torch.zeros(self.world, len(self.sums))
        rows[self.rank] = self.sums.cpu()
        return {"names": self.names, "sums": sum_over_ranks(rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.names = state["names"]
            rows = state["sums"]
            # On more ranks than before, the rows are used again.
            self.sums = rows[self.rank % len(rows)].to(self.device)


def sum_over_ranks(x: Tensor) -> Tensor:
    """Changes x, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# Log


class Log:
    """Lines for people (terminal, log.txt), events for programs (log.jsonl, TensorBoard, W&B).

    Args:
        folder: Of the run.
        start: A restart removes the events after this iteration.
        tensorboard, wandb: Log there, too; `wandb` is the name of the project.
        config: Options of the run, for TensorBoard and W&B.
        quiet: Writes nothing, as on ranks other than 0.

    Raises UserError for a package or a login that is missing.
    """

    def __init__(
        self,
        folder: Path,
        start: int = 0,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        self.folder = folder
        self.file = folder / "log.jsonl"
        self.quiet = quiet
        self.board = None  # TensorBoard's writer
        self.run = None  # of Weights & Biases
        if quiet:
            return
        self.remove_events_after(start)
        advice = "pip install tensorboard, or check the folder"
        try:
            if tensorboard:
                package = importlib.import_module("torch.utils.tensorboard")
                self.board = package.SummaryWriter(folder / "tensorboard", purge_step=start + 1)
                self.board.add_text("config", json.dumps(config, indent=1))
            if wandb:
                advice = "pip install wandb, and wandb login or WANDB_MODE=offline"
                self.wandb = importlib.import_module("wandb")
                self.run = self.wandb.init(
                    project=wandb,
                    id=self.run_id(),
                    name=folder.name,
                    dir=folder,
                    config=config,
                    resume="allow",
                )
        except Exception as error:
            raise UserError(f"{error} ({advice})") from None

    def run_id(self) -> str:
        """W&B's name of the run. It is kept in the folder: a restart continues the curves, and
        resume=never, which moves the folder away, begins others."""
        file = self.folder / "wandb_id"
        if not file.exists():
            file.write_text(f"{self.folder.name}-{secrets.token_hex(4)}", encoding="utf-8")
        return file.read_text(encoding="utf-8")

    def remove_events_after(self, start: int) -> None:
        """Rewrites log.jsonl without the events after iteration `start`, and without a last line
        that a crash has cut."""
        kept = [json.dumps(event) + "\n" for event in self.events() if event["iter"] <= start]
        partial = self.file.with_name("log.jsonl.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        partial.replace(self.file)

    def events(self) -> list[dict[str, Any]]:
        """Those in log.jsonl, without lines that can't be read."""
        events = []
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict) and "iter" in event:
                        events.append(event)
        return events

    def __call__(self, text: str) -> None:
        """A line for people."""
        if self.quiet:
            return
        with contextlib.suppress(OSError):  # the terminal may have been closed
            tqdm.write(text)
        self.append("log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def append(self, name: str, line: str) -> None:
        """Adds a line to a file. Training continues if the file can't be written."""
        try:
            path = self.folder / name
            with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(line + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                tqdm.write(f"warning: {path} can't be written: {error}")

    def event(
        self, kind: str, text: str, it: int, pictures: dict[str, Any] | None = None, **values: Any
    ) -> None:
        """A line for people, and an event for programs: `kind` is "train" or "val".

        values: Plain values; floats become curves. Those of "val" have a `dataset`, which names the
            curves, and `eval_only`.
        pictures: {name: PIL image}.
        """
        if self.quiet:
            return
        self(text)
        values = finite_or_none(values)
        entry = {"event": kind, "iter": it} | values
        self.append(self.file.name, json.dumps(entry, allow_nan=False))

        # Evaluations stay out of the curves of the training.
        prefix = "eval" if values.get("eval_only") else kind
        if "dataset" in values:
            prefix += f"/{values['dataset']}"
        scalars = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, float)}
        self.send(scalars, pictures or {}, it)
        if kind == "val" and it > 0:  # at 0, an evaluation of pretrain_network, there is no curve
            try:
                self.draw_curves()
            except Exception as error:  # of matplotlib's files and fonts
                self(f"warning: curves.png can't be drawn: {error!r}")

    def send(self, scalars: dict[str, float], pictures: dict[str, Any], it: int) -> None:
        """To TensorBoard and W&B. One that fails is left out from then on."""
        try:
            if self.board:
                for name, value in scalars.items():
                    self.board.add_scalar(name, value, it)
                for name, picture in pictures.items():
                    self.board.add_image(name, np.atleast_3d(picture), it, dataformats="HWC")
                self.board.flush()
        except Exception as error:  # of the disk
            self.board = None
            self(f"warning: no more is logged to TensorBoard: {error!r}")
        try:
            if self.run:
                images = {name: self.wandb.Image(picture) for name, picture in pictures.items()}
                self.run.log(scalars | images, it)
        except Exception as error:  # of the network, of W&B's process
            self.run = None
            self(f"warning: no more is logged to W&B: {error!r}")

    def draw_curves(self) -> None:
        """curves.png, if matplotlib is installed."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        events = self.events()
        figure = Figure((12, 3.5), layout="constrained")
        measure = "psnr"
        for event in events:  # the measure that decides has a "best_" beside it
            best = [key for key in event if key.startswith("best_") and key != "best_iter"]
            measure = best[0].removeprefix("best_") if best else measure
        titles = {"loss": "loss", "lr": "learning rate", measure: measure}
        for axis, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
            curves: dict[str, list[tuple[int, float]]] = {}
            for event in events:
                if event.get(key) is None or event.get("eval_only"):
                    continue
                name = event.get("dataset", "training")
                curves.setdefault(name, []).append((event["iter"], event[key]))
            for name, points in curves.items():
                marker = "o" if len(points) == 1 else "."  # one point would hardly be seen
                axis.plot([x for x, _ in points], [y for _, y in points], marker + "-", label=name)
            last = events[-1]["iter"]
            axis.set(xlabel="iteration", title=title, xlim=(0, 1.05 * last))
            if curves:
                axis.legend()
        figure.savefig(self.folder / "curves.png")


def finite_or_none(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no nan and no infinity: both become None, which is null there."""
    finite = {}
    for key, value in values.items():
        bad = isinstance(value, float) and not math.isfinite(value)
        finite[key] = None if bad else value
    return finite


def strip(
    lq: np.ndarray, out: np.ndarray, gt: np.ndarray, before: float, after: float, size: int = 320
) -> Image.Image:
    """Input, output and ground truth side by side, with the PSNR before and after.

    The images are (H, W, C) of the same size: their middle `size` pixels are shown, or all for 0.
    Small images are enlarged by a whole factor, so that the captions fit.
    """
    height, width = gt.shape[:2]
    size = size or max(height, width)
    top, left = max(height - size, 0) // 2, max(width - size, 0) // 2
    panels = []
    for image in (lq, out, gt):
        middle = image[top : top + size, left : left + size]
        panels.append((middle // (np.iinfo(image.dtype).max // 255)).astype(np.uint8))
    row = np.hstack(panels)
    row = row[..., 0] if row.shape[2] == 1 else row
    enlargement = max(160 // min(row.shape[0], row.shape[1] // 3), 1)
    picture = ImageOps.scale(Image.fromarray(row), enlargement, Image.NEAREST)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(picture.width // 50, 14))  # height in pixels
    captions = (f"input {before:.2f} dB", f"output {after:.2f} dB", "ground truth")
    for i, caption in enumerate(captions):
        place = (4 + i * picture.width // 3, 2)
        draw.text(place, caption, "white", font, stroke_width=2, stroke_fill="black")
    return picture


# Command line


def main() -> None:
    parser = argparse.ArgumentParser(description="PSNR, SSIM and PSNR-B of restored images.")
    parser.add_argument("restored", type=Path, help="image, or folder with images in and below it")
    parser.add_argument(
        "originals", type=Path, help="image, or folder with images of the same names"
    )
    parser.add_argument("--crop_border", type=int, default=0, help="pixels left out on each side")
    parser.add_argument(
        "--y", action="store_true", help="compare the luma of RGB, as papers on SR do"
    )
    parser.add_argument(
        "--filename_tmpl", default="{}", help="name of the restored image; {} is the original's"
    )
    parser.add_argument(
        "--scale",
        type=int,
        default=4,
        help="where sizes differ by fewer pixels, compare the common part (%(default)s)",
    )
    args = parser.parse_args()
    data_module().escape_unprintable()
    if "{}" not in args.filename_tmpl:
        raise UserError(f"filename_tmpl={args.filename_tmpl!r} must hold {{}}, the original's name")
    if args.restored.is_dir() != args.originals.is_dir():
        raise UserError(f"{args.restored}, {args.originals}: give two images or two folders")
    if args.restored.is_dir():
        restored = images_by_name(args.restored)
        originals = images_by_name(args.originals, args.filename_tmpl)
    else:
        restored = {args.restored.stem: args.restored}
        originals = {args.restored.stem: args.originals}

    problems = []
    for name, path in originals.items():
        if name not in restored:
            problems.append(f"{path}: no {name} in {args.restored} (filename_tmpl?)")
    for name, path in restored.items():
        if name not in originals:
            problems.append(f"{path}: no partner in {args.originals}")
    pairs = {name: (restored[name], originals[name]) for name in originals if name in restored}
    problems += print_table(pairs, args.crop_border, args.y, args.scale)
    sys.exit("\n".join(problems) or 0)


def print_table(
    pairs: dict[str, tuple[Path, Path]], crop_border: int, y: bool, scale: int
) -> list[str]:
    """A line for each pair, and the mean. Returns what went wrong."""
    width = max(len(name) for name in [*pairs, "mean of 1000"])
    line = f"{{:{width}}}  PSNR {{:8.4f}} dB  SSIM {{:.6f}}  PSNR-B {{:8.4f}} dB"
    rows, colours, problems = [], set(), []
    for name, (restored, original) in pairs.items():
        try:
            a, b = read_alike(restored, original)
            a, b = crop_alike(a, b, scale, name)
            row = [measure(a, b, crop_border, y) for measure in (psnr, ssim, psnrb)]
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        rows.append(row)
        if a.shape[2] == 1:
            colours.add("gray")
        else:
            colours.add("Y" if y else "RGB")
        print(line.format(name, *row), flush=True)
    if rows:
        mean = line.format(f"mean of {len(rows)}", *np.mean(rows, axis=0))
        print(f"{mean}  ({' and '.join(sorted(colours))}, border {crop_border})", flush=True)
    return problems


def read_alike(restored: Path, original: Path) -> tuple[np.ndarray, np.ndarray]:
    """Both images; gray becomes RGB if the other one is in colour."""
    data = data_module()
    a, b = data.read_image(restored), data.read_image(original)
    channels = max(a.shape[2], b.shape[2])
    return data.to_channels(a, channels), data.to_channels(b, channels)


def crop_alike(
    a: np.ndarray, b: np.ndarray, scale: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Where sizes differ by less than a scale, the common part, top left, as in train.py: the
    sides of the original were no multiples of the scale."""
    height, width = min(len(a), len(b)), min(a.shape[1], b.shape[1])
    largest = np.maximum(a.shape[:2], b.shape[:2])
    off = max(largest - (height, width))
    if 0 < off < scale:
        sizes = " and ".join(f"{image.shape[1]}x{len(image)}" for image in (a, b))
        print(f"{name}: of {sizes} pixels, the upper left {width}x{height} are compared")
        return a[:height, :width], b[:height, :width]
    return a, b


def images_by_name(folder: Path, template: str = "{}") -> dict[str, Path]:
    """Images below `folder` by their path there, the name put into `template`.

    Where names differ in their suffix alone, the suffix stays, as in model.py's outputs.
    """
    data = data_module()
    others = Counter()  # filled by list_images: files that are left out, by suffix
    paths = [path.relative_to(folder) for path in data.list_images(folder, others)]
    if others:
        print(f"{folder}{data.name_others(others)}", file=sys.stderr)
    alike = data.differ_in_suffix_only(paths)
    found = {}
    for path in paths:
        name = template.replace("{}", path.name if path in alike else path.stem)
        found[data.same_letters((path.parent / name).as_posix())] = folder / path
    return found


def data_module() -> Any:
    """data.py, which reads the image files of the command line."""
    try:
        import data
    except ModuleNotFoundError as error:
        if error.name != "data":
            raise
        raise UserError(
            "the command needs data.py beside metrics.py: copy it there, too"
        ) from error
    return data


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped")
