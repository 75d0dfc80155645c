"""Train SwinIR: one file, one loop. Results go to experiments/<name>/.

    python train.py configs/tiny.py                           # a denoiser in minutes, without data
    python train.py configs/denoise.py --dataroot_gt=DIV2K_HR --val_gt=CBSD68 --lr=1e-4
    torchrun --nproc_per_node=8 train.py configs/denoise.py   # batch_size is global

The same command again continues where it stopped. In a config file, `lr = lambda cfg: ...` is a
rule that follows other options.
"""

import ast
import atexit
import contextlib
import copy
import ctypes
import difflib
import errno
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import data
import metrics
import model
from data import (
    PairedImageDataset,
    Prefetcher,
    UnreadableImage,
    UserError,
    ValidationImages,
    dataset_options,
    describe_held_out,
    disk_advice,
    escape_unprintable,
    fit_name,
    imresize,
    options_of_degradation,
    printable,
    read_text,
    sample_batches,
    split_at_commas,
    train_loader,
    validation_options,
    validation_roots,
)
from metrics import (
    GAN_LOSSES,
    GAN_TERM,
    MEASURES,
    Log,
    Meter,
    WeightedLoss,
    capped,
    describe_measure,
    parse_loss,
    psnr,
    strip,
    sum_over_ranks,
)
from model import (
    ATTENTION,
    DISCRIMINATORS,
    NETWORKS,
    checksums_agree,
    free_cores,
    is_out_of_memory,
    load_weights,
    portable,
    restore,
)


@dataclass
class Config:
    name: str = "denoise_color25"  # results go to experiments/<name>
    seed: int = 0  # of everything random: initial weights, samples, DropPath
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # never: the old folder moves to <name>_archived_<time>
    resume: Literal["auto", "never"] = "auto"
    eval_only: bool = False  # validate the last checkpoint, or else pretrain_network, and stop
    max_hours: float | None = None  # save and stop after this time; None: no limit
    # auto: bf16 where hardware has it
    amp: Literal["auto", "bf16", "fp16", "tf32", "none"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA on Linux

    # data: folders, or files made by data.py pack; several are separated by commas
    dataroot_gt: str | tuple[str, ...] | None = None  # clean images; None: synthetic ones
    dataroot_lq: str | tuple[str, ...] | None = None  # their partners; None: made by `degradation`
    # how often to draw from each root; None: by size
    dataset_weights: tuple[float, ...] | None = None
    filename_tmpl: str = "{}"  # name of the partner of {}: {}x4 pairs baby.png with babyx4.png
    # lists the files to use, as a/1.png below dataroot_gt; None: all
    meta_info_file: str | None = None
    # noise, jpeg, bicubic, bsrgan, realesrgan: see DEGRADATIONS in data.py
    degradation: str = "noise"
    sigma: float | tuple[float, ...] = 25.0  # noise: deviation, 0 to 255, or a range as 0,50
    quality: int | tuple[int, ...] = 40  # jpeg: 1 to 100, or a range as 10,40
    jpeg_range: int | tuple[int, ...] = (30, 95)  # bsrgan, realesrgan: quality of each JPEG
    gt_size: int = 128  # side of the GT patch in pixels: a multiple of scale x window_size
    use_hflip: bool = True  # horizontal flips
    use_rot: bool = True  # vertical flips and transpositions: with use_hflip, all eight symmetries
    num_workers: int = 4  # loader processes per rank, at most one per core

    # network: SwinIR-M
    network: str = "swinir"  # see NETWORKS in model.py
    scale: int = 1  # upscaling factor
    in_chans: Literal[3, 1] = 3  # 3: RGB, 1: gray
    embed_dim: int = 180
    depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    num_heads: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    window_size: int = 8
    mlp_ratio: float = 2.0
    upsampler: Literal["", "pixelshuffle", "pixelshuffledirect", "nearest+conv"] = ""  # "": scale 1
    resi_connection: Literal["1conv", "3conv"] = "1conv"
    img_range: float = 1.0
    drop_path_rate: float = 0.1  # stochastic depth
    init_std: float = 0.02  # deviation of the initial weights of linear layers
    use_checkpoint: bool = False  # recompute activations: less memory, more time
    attention: str = "math"  # math, sdpa: see ATTENTION in model.py; on a GPU neither was timed
    # weights to start from: a run's folder, or a file: ours, official, BasicSR's, KAIR's
    pretrain_network: str | None = None
    param_key: str = "params_ema"  # which weights of that file
    strict_load: bool = True  # False: take what fits

    # optimisation
    batch_size: int = 8  # global: samples per step over all ranks and micro-batches
    # micro-batches per step and rank; None: as few as fit into the memory
    accumulate: int | None = None
    total_iters: int = 1_600_000
    optimizer: str = "adam"  # adam, adamw, muon: see OPTIMIZERS
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    # l1, mse, charbonnier, perceptual, style, or a sum: l1+0.1*perceptual
    loss: str = "charbonnier"
    vgg_layers: tuple[str, ...] = ("conv5_4",)  # perceptual, style: layers of VGG19, as conv4_4:0.5
    vgg_criterion: Literal["l1", "l2", "fro"] = "l1"  # distance of their features
    vgg_input_norm: bool = True  # standardise images as ImageNet's
    # torchvision's vgg19-dcbb9e9d.pth; None: BasicSR's place, or download
    vgg_path: str | None = None
    # With a term gan in the loss, as l1+perceptual+0.1*gan:
    discriminator: str = "unet"  # see DISCRIMINATORS in model.py
    discriminator_features: int = 64  # channels of its first layer
    pretrain_discriminator: str | None = None  # weights to start from, as Real-ESRGAN's or KAIR's
    gan_type: Literal["vanilla", "lsgan", "hinge"] = "vanilla"
    lr_d: float | None = None  # lr of the discriminator, on the same schedule; None: lr
    scheduler: str = "multistep"  # multistep, cosine: see SCHEDULES
    milestones: tuple[int, ...] = (800_000, 1_200_000, 1_400_000, 1_500_000)  # of multistep
    gamma: float = 0.5  # multistep: by which the lr is multiplied after each milestone
    warmup_iters: int = 0  # the lr grows linearly until this iteration; milestones don't shift
    grad_clip: float | None = None  # largest norm of the gradient; None: no clipping
    ema_decay: float = 0.999  # average of the weights, which is validated; 0: no average

    # validation and files
    # "synthetic": images that data.py draws; None: held-out images of dataroot_gt, else synthetic
    val_gt: str | tuple[str, ...] | None = None
    val_lq: str | tuple[str, ...] | None = None  # their partners; None: made by `degradation`
    val_freq: int = 5000  # iterations between validations; 0: never
    # see MEASURES in metrics.py; None: psnr, ssim, jpeg: psnrb
    measures: tuple[str, ...] | None = None
    crop_border: int = 0  # pixels cut off on each side before PSNR and SSIM
    test_y_channel: bool = False  # PSNR and SSIM on the Y channel of YCbCr
    pad_window: bool = False  # pad a window more than needed, as the script behind SwinIR's figures
    strips: int = 3  # images of each set that a validation shows: input, output, ground truth
    save_img: bool = False  # strips of all images
    strip_size: int = 320  # side of the middle that they show, in pixels; 0: the whole image
    use_tb_logger: bool = False  # log to TensorBoard too, in experiments/<name>/tensorboard
    wandb: str | None = None  # log to this project of Weights & Biases too
    print_freq: int = 100
    save_checkpoint_freq: int = 5000
    keep_last: int = 3  # checkpoints kept besides the best weights; 0: all


# Options that make a run what it is, besides those of its network and of its degradation. They
# can't change once it has started.
FIXED_ON_RESUME = (
    "seed",
    "batch_size",
    "optimizer",
    "degradation",
    "pretrain_network",
    "discriminator",
    "discriminator_features",
    "pretrain_discriminator",
)
# Options of a network that can change: they are about time and memory.
HOW_TO_COMPUTE = ("use_checkpoint", "attention")
# Options of one start, which config.json doesn't hold.
OF_ONE_START = ("resume", "eval_only", "max_hours")
# Bounds of numbers, inclusive; of tuples, of each entry. Other numbers only have to be finite.
BOUNDS = {
    "seed": (0, None),
    "max_hours": (0, None),
    "dataset_weights": (0, None),
    "sigma": (0, None),
    "quality": (1, 100),
    "jpeg_range": (1, 100),
    "gt_size": (1, None),
    "num_workers": (0, None),
    "scale": (1, None),
    "embed_dim": (1, None),
    "depths": (1, None),
    "num_heads": (1, None),
    "window_size": (1, None),
    "mlp_ratio": (0, None),
    "img_range": (0, None),
    "drop_path_rate": (0, 0.999),
    "init_std": (0, None),
    "batch_size": (1, None),
    "accumulate": (1, None),
    "total_iters": (1, None),
    "lr": (0, None),
    "betas": (0, 0.9999999),
    "weight_decay": (0, None),
    "discriminator_features": (1, None),
    "lr_d": (0, None),
    "milestones": (0, None),
    "gamma": (0, None),
    "warmup_iters": (0, None),
    "grad_clip": (0, None),
    "ema_decay": (0, 0.9999999),
    "val_freq": (0, None),
    "crop_border": (0, None),
    "strips": (0, None),
    "strip_size": (0, None),
    "print_freq": (1, None),
    "save_checkpoint_freq": (1, None),
    "keep_last": (0, None),
}


# What a run is made of


def multistep(it: int, cfg: Config) -> float:
    """A milestone m acts from iteration m + 1 on, as in BasicSR."""
    passed = [m for m in cfg.milestones if it > m]
    return cfg.lr * cfg.gamma ** len(passed)


def cosine(it: int, cfg: Config) -> float:
    """Half a cosine from lr to 0, which it would reach one iteration after total_iters."""
    done = (it - 1 - cfg.warmup_iters) / max(cfg.total_iters - cfg.warmup_iters, 1)
    done = min(max(done, 0), 1)
    return cfg.lr * (1 + math.cos(math.pi * done)) / 2


SCHEDULES = {"multistep": multistep, "cosine": cosine}


def lr_at(it: int, cfg: Config) -> float:
    """Learning rate of iteration `it` >= 1."""
    if it < cfg.warmup_iters:
        return cfg.lr * it / cfg.warmup_iters
    return SCHEDULES[cfg.scheduler](it, cfg)


def plan_of(it: int, cfg: Config) -> tuple[int, int]:
    """(batch_size, gt_size) of iteration `it` >= 1. Edit this for patches that grow."""
    return cfg.batch_size, cfg.gt_size


def adam(network: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    options = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    return torch.optim.Adam(network.parameters(), **options, fused=True)


def adamw(network: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    options = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
    return torch.optim.AdamW(network.parameters(), **options, fused=True)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for the matrices and
    convolutions of `network.layers` and `network.conv_after_body`, Adam for all else.

    The update of a matrix is its momentum with all singular values set to about 1. It has Adam's
    size (Liu et al. 2025, https://arxiv.org/abs/2502.16982), so both take the same lr. On a GPU
    each step waits for the device: see step_if_finite.
    """

    MOMENTUM = 0.95

    def __init__(self, network: nn.Module, cfg: Config) -> None:
        matrices, others = [], []
        for name, p in network.named_parameters():
            inside = name.startswith(("layers.", "conv_after_body."))
            if inside and p.ndim >= 2 and not name.endswith("bias_table"):
                matrices.append(p)
            else:
                others.append(p)
        groups = [{"params": matrices, "kind": "muon"}, {"params": others, "kind": "adam"}]
        options = {"lr": cfg.lr, "betas": cfg.betas, "weight_decay": cfg.weight_decay}
        super().__init__([group for group in groups if group["params"]], options)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            if group["kind"] == "muon":
                self.muon_step(group)
            else:
                self.adam_step(group)

    def muon_step(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}  # those of a shape are computed together
        for p in group["params"]:
            by_shape.setdefault(p.shape, []).append(p)
        for parameters in by_shape.values():
            directions = []
            for p in parameters:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - self.MOMENTUM)
                direction = p.grad.lerp(momentum, self.MOMENTUM)  # Nesterov's
                directions.append(direction.flatten(1))  # of a convolution: (out, in * kernel)
            updates = orthogonalize(torch.stack(directions))
            size = 0.2 * max(updates.shape[1:]) ** 0.5  # root mean square of Adam's updates: 0.2
            for p, update in zip(parameters, updates, strict=True):
                p.sub_(update.view_as(p), alpha=group["lr"] * size)

    def adam_step(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for p in group["params"]:
            state = self.state[p]
            mean = state.setdefault("mean", torch.zeros_like(p))
            square = state.setdefault("square", torch.zeros_like(p))
            state["step"] = state.get("step", 0) + 1
            mean.lerp_(p.grad, 1 - beta1)
            square.lerp_(p.grad.square(), 1 - beta2)
            root = (square / (1 - beta2 ** state["step"])).sqrt() + 1e-8
            p.addcdiv_(mean / (1 - beta1 ** state["step"]), root, value=-group["lr"])


def orthogonalize(matrices: Tensor) -> Tensor:  # (n, rows, columns)
    """U V^T of each matrix U S V^T, about: five Newton-Schulz iterations, with the coefficients of
    Muon's authors, bring the singular values to between 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


# name -> function(network, cfg). A parameter group may have an "lr_scale", by which the lr is
# multiplied. step() is not called when gradients aren't finite, except for torch's fused Adam and
# AdamW, which then change nothing (see step_if_finite).
OPTIMIZERS = {"adam": adam, "adamw": adamw, "muon": Muon}


def build_network(cfg: Config) -> nn.Module:
    """NETWORKS[cfg.network] with those options that its constructor names."""
    options = vars(cfg) | {"upscale": cfg.scale, "img_size": cfg.gt_size // cfg.scale}
    constructor = NETWORKS[cfg.network]
    taken = inspect.signature(constructor).parameters
    return constructor(**{name: value for name, value in options.items() if name in taken})


def network_shape(cfg: Config) -> list[str]:
    """The names of the options that say which weights the network has, and what they compute."""
    taken = inspect.signature(NETWORKS[cfg.network]).parameters
    own = [name for name in vars(cfg) if name in taken and name not in HOW_TO_COMPUTE]
    return ["network", "scale", *own]


def build_average(network: nn.Module) -> nn.Module:
    """A copy whose parameters average the network's. It shares the buffers: statistics of a
    BatchNorm follow."""
    # What `memo` holds, deepcopy takes instead of copying it.
    shared = {id(buffer): buffer for buffer in network.buffers()}
    return copy.deepcopy(network, memo=shared).requires_grad_(False)


def start_weights(
    network: nn.Module, cfg: Config, device: torch.device, start: int, weights: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    """Moves the network to the device, with the weights of the checkpoint, or of pretrain_network.

    Returns its average, and what to say about it.
    """
    notices = []
    if cfg.pretrain_network and not start:
        taken = load_weights(network, cfg.pretrain_network, cfg.param_key, cfg.strict_load)
        notices.append(taken)
    network.to(device, memory_format=torch.channels_last)
    average = build_average(network) if cfg.ema_decay else network
    if start:
        average.load_state_dict(weights["params_ema"])
        network.load_state_dict(weights["params"])  # second: `average` may be the network itself
    return average, notices


def build_loss(
    cfg: Config, device: torch.device, adversary: "Adversary | None" = None
) -> WeightedLoss:
    loss = WeightedLoss(
        cfg.loss,
        adversary.generator_loss if adversary else None,
        layer_weights=cfg.vgg_layers,
        criterion=cfg.vgg_criterion,
        use_input_norm=cfg.vgg_input_norm,
        vgg_path=cfg.vgg_path,
    )
    return loss.to(device)


def open_training_set(cfg: Config) -> PairedImageDataset:
    """The images of dataroot_gt. Without val_gt, some are held out for validation. To validate
    val_gt alone, none are needed."""
    hold_out = not cfg.val_gt and (cfg.val_freq > 0 or cfg.eval_only)
    if cfg.eval_only and not hold_out:
        return PairedImageDataset()  # synthetic images, of which none is drawn
    return PairedImageDataset(**dataset_options(cfg), hold_out=hold_out)


def open_validation_sets(cfg: Config, held_out: list[Any]) -> dict[str, ValidationImages]:
    """The sets, under the names of their folders, or "held_out", or "synthetic"."""
    roots = validation_roots(cfg.val_gt, cfg.val_lq)
    if cfg.val_freq == 0 and not cfg.eval_only:
        return {}
    options = {"scale": cfg.scale, "in_chans": cfg.in_chans, "filename_tmpl": cfg.filename_tmpl}
    options |= {"degradation": cfg.degradation, "crop_border": cfg.crop_border}
    options |= options_of_degradation(cfg.degradation, cfg)
    if held_out:
        return {"held_out": ValidationImages(held_out=held_out, **options)}
    if not roots and cfg.dataroot_lq:
        return {}  # too few pairs to hold one out, and synthetic images would say nothing
    sets = {}
    for i, (root, lq_root) in enumerate(roots or [("synthetic", None)]):
        name = printable(Path(os.path.abspath(root)).stem)
        if name in sets:  # folders of the same name
            name += f"_{i + 1}"
        sets[name] = ValidationImages(None if root == "synthetic" else root, lq_root, **options)
    return sets


# The step


def train_step(
    cfg: Config,
    precision: str,
    ddp_model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    micro_batches: list[list[Tensor]],
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step on all micro-batches.

    Returns the figures to log, means over the micro-batches, and whether the step was finite; if
    it was not, no weight has changed. All are scalars on the device: nothing waits for it.
    """
    statistics = copy_statistics(ddp_model)
    optimizer.zero_grad()
    figures = backward(ddp_model, criterion, scaler, micro_batches, precision)
    norm, finite = apply_gradients(optimizer, scaler, cfg.grad_clip)
    restore_statistics(statistics, finite)
    return figures | {"grad_norm": norm}, finite


def backward(
    ddp_model: nn.Module,
    criterion: nn.Module,
    scaler: torch.amp.GradScaler,
    micro_batches: list[list[Tensor]],
    precision: str,
) -> dict[str, Tensor]:
    """Adds the gradients of all micro-batches, and returns the loss and its terms, if several."""
    figures: dict[str, Tensor] = {}
    count = len(micro_batches)
    for i, (lq, gt) in enumerate(micro_batches):
        # The last micro-batch sums the gradients over the ranks.
        ddp_model.require_backward_grad_sync = i == count - 1
        with autocast(lq.device, precision):
            terms = criterion(ddp_model(lq), gt)
        loss = sum(terms.values()) / count
        scaler.scale(poison_if_not_finite(loss)).backward()

        figures["loss"] = figures.get("loss", 0) + loss.detach()
        if len(terms) > 1:
            for name, term in terms.items():
                figures[name] = figures.get(name, 0) + term.detach() / count
    return figures


def apply_gradients(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Clips the gradients and makes a step, unless they aren't finite: then nothing changes.

    Returns their norm before, and whether it was finite. Each optimizer has a scaler of its own.
    """
    scaler.unscale_(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    finite = norm.isfinite()
    step_if_finite(optimizer, scaler, finite)
    scaler.update()
    return norm, finite


def copy_statistics(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The buffers of BatchNorm and of spectral normalisation, which the forward pass changes, with
    copies of them. SwinIR has none."""
    names = ("running_mean", "running_var", "weight_u", "weight_v")
    buffers = [buffer for name, buffer in network.named_buffers() if name.endswith(names)]
    return [(buffer, buffer.clone()) for buffer in buffers]


def restore_statistics(statistics: list[tuple[Tensor, Tensor]], finite: Tensor) -> None:
    """Restores the copies, if the step wasn't finite."""
    for buffer, before in statistics:
        buffer.copy_(buffer.where(finite, before))


def step_that_fits(
    step: Callable[[list[list[Tensor]]], tuple[dict[str, Tensor], Tensor]],
    batch: list[Tensor],
    accumulate: int,
    seed: int,
    world: int,
    log: Log,
) -> tuple[dict[str, Tensor], Tensor, int]:
    """The step on a batch that is split into micro-batches: into more where memory is too small.

    Returns what `step` returns, and the number of micro-batches. With several ranks, `try_memory`
    finds that number before the training, because one rank alone can't repeat a step.
    """
    while True:
        torch.manual_seed(seed)  # of DropPath, for each try
        try:
            return *step(split_batch(batch, accumulate)), accumulate
        except RuntimeError as error:
            if world > 1 or not is_out_of_memory(error):
                raise
        accumulate = more_micro_batches(accumulate, len(batch[0]))
        log(f"note: out of memory: a step has {accumulate} micro-batches from here on")


def split_batch(batch: list[Tensor], count: int) -> list[list[Tensor]]:
    """[lq, gt] as `count` micro-batches [lq, gt]."""
    return [list(pair) for pair in zip(*(images.chunk(count) for images in batch), strict=True)]


def more_micro_batches(accumulate: int, samples: int) -> int:
    """The next number of equal micro-batches. Raises UserError if they can't be smaller."""
    for count in range(accumulate + 1, samples + 1):
        if samples % count == 0:
            return count
    advice = "--use_checkpoint=True, or a smaller gt_size or network"
    raise UserError(f"out of memory with one sample at a time: {advice}")


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """The loss, with gradients of nan if it is nan or infinite.

    L1 has the gradient 0 where the output is nan, so the gradients could be finite although the
    loss isn't. Summed over the ranks, gradients of nan make all of them skip the step.
    """
    return loss * (1 + 0 * loss.detach())


def step_if_finite(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, finite: Tensor
) -> None:
    fused = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and optimizer.defaults["fused"]
    if fused and finite.device.type != "mps":
        # Fused optimizers read found_inf on the device, and change nothing if it is 1. A disabled
        # scaler just calls optimizer.step(); an enabled one (fp16) sets found_inf itself. On mps,
        # the fused kernels don't read it.
        optimizer.found_inf = 1 - finite.float()
        scaler.step(optimizer)
    elif finite:  # waits for the device
        scaler.step(optimizer)


class Adversary:
    """The discriminator of a GAN, with its own optimizer.

    In each iteration, `generator_loss` scores the network's outputs and keeps them. `step` then
    trains the discriminator to tell them from real images.
    """

    def __init__(self, cfg: Config, hardware: "Hardware", start: int = 0) -> None:
        self.cfg = replace(cfg, lr=cfg.lr if cfg.lr_d is None else cfg.lr_d)
        self.precision = hardware.precision
        device = hardware.device
        network = DISCRIMINATORS[cfg.discriminator](cfg.in_chans, cfg.discriminator_features)
        self.notices = []
        if cfg.pretrain_discriminator and not start:
            self.notices.append(load_weights(network, cfg.pretrain_discriminator, "params"))
        self.network = network.to(device, memory_format=torch.channels_last)
        with torch.no_grad():  # the spectral normalisation starts from random vectors
            for _ in range(10):
                network(torch.zeros(1, cfg.in_chans, 8, 8, device=device))
        self.optimizer = OPTIMIZERS[cfg.optimizer](network, cfg)
        self.scaler = torch.amp.GradScaler(device.type, enabled=hardware.precision == "fp16")
        example = torch.zeros(1, cfg.in_chans, cfg.gt_size, cfg.gt_size, device=device)
        self.ddp_model = distribute(network, hardware.world, example)
        self.discriminator_loss, self.loss_for_generator = GAN_LOSSES[cfg.gan_type]
        self.fakes: list[Tensor] = []  # the network's outputs for each micro-batch

    def parts(self) -> dict[str, Any]:
        """What checkpoints hold."""
        return {
            "discriminator": self.network,
            "optimizer_d": self.optimizer,
            "scaler_d": self.scaler,
        }

    def generator_loss(self, fake: Tensor) -> Tensor:
        self.fakes.append(fake.detach())
        self.network.requires_grad_(False)
        self.network.eval()  # no iteration of the spectral normalisation
        return self.loss_for_generator(self.network(fake).float(), real=True)

    def step(self, reals: Sequence[Tensor], it: int) -> dict[str, Tensor]:
        """The optimizer step of iteration `it`. Returns its figures: the loss, and the mean scores
        of real and fake images."""
        self.network.requires_grad_(True)
        self.network.train()
        statistics = copy_statistics(self.network)
        self.optimizer.zero_grad()
        set_lr(self.optimizer, lr_at(it, self.cfg))
        count = len(reals)
        sums = torch.zeros(3, device=reals[0].device)
        fakes = self.fakes[-count:]  # earlier ones are of tries that ran out of memory
        for i, (real, fake) in enumerate(zip(reals, fakes, strict=True)):
            self.ddp_model.require_backward_grad_sync = i == count - 1
            with autocast(real.device, self.precision):
                scores = self.ddp_model(torch.cat([real, fake]))
            scores_of_real, scores_of_fake = scores.float().chunk(2)
            loss = self.discriminator_loss(scores_of_real, real=True)
            loss = loss + self.discriminator_loss(scores_of_fake, real=False)
            self.scaler.scale(poison_if_not_finite(loss / count)).backward()
            figures = torch.stack([loss, scores_of_real.mean(), scores_of_fake.mean()])
            sums += figures.detach() / count
        self.fakes.clear()
        _, finite = apply_gradients(self.optimizer, self.scaler, self.cfg.grad_clip)
        restore_statistics(statistics, finite)
        names = ("d_loss", "d_real", "d_fake")
        return dict(zip(names, sums, strict=True)) | {"d_skipped": 1 - finite.float()}


def build_adversary(cfg: Config, hardware: "Hardware", start: int) -> Adversary | None:
    is_gan = GAN_TERM in parse_loss(cfg.loss)
    return Adversary(cfg, hardware, start) if is_gan and not cfg.eval_only else None


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, it: int, decay: float) -> None:
    """The decay grows from 2/11 to `decay`: with 0.999 from the start, short runs would keep the
    initial weights."""
    decay = min(decay, (1 + it) / (10 + it))
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision in ("bf16", "fp16"))


# Validation


def evaluate(
    network: nn.Module, images: ValidationImages, cfg: Config, rank: int = 0, world: int = 1
) -> tuple[dict[str, float], dict[str, Any]]:
    """Means of the measures over all images, and strips of the first ones, those of this rank.

    Besides the measures: "input_psnr", and "exact", the number of images reproduced exactly. Each
    rank takes every world-th image. Means run over all in order, whatever the number of ranks.
    Without autocast: in float32, or TF32 on GPUs unless amp=none.
    """
    share_buffers(network)
    columns = [*measures_of(cfg), "input_psnr", "exact"]
    scores = torch.zeros(len(images), len(columns), dtype=torch.float64)
    strips = {}

    def note(i: int, name: str, job: Future) -> None:
        values, picture = job.result()
        scores[i] = torch.tensor([values[column] for column in columns], dtype=scores.dtype)
        if picture:
            strips[name] = picture

    # A thread scores an image while the network restores the next one.
    with ThreadPoolExecutor(1, "scorer") as scorer:
        pending = None
        for i in range(rank, len(images), world):
            image = images[i]
            output = restored_pixels(network, image["lq"], image["gt"], cfg)
            if pending:
                note(*pending)
            with_strip = cfg.save_img or i < cfg.strips
            job = scorer.submit(score, output, image["lq"], image["gt"], cfg, with_strip)
            pending = (i, image["name"], job)
        if pending:
            note(*pending)
    scores = sum_over_ranks(scores)  # sums with zeros, which are exact
    means = dict(zip(columns, scores.mean(0).tolist(), strict=True))
    means["exact"] = int(scores[:, -1].sum())
    return means, strips


def score(
    output: np.ndarray, lq: Tensor, gt: np.ndarray, cfg: Config, with_strip: bool
) -> tuple[dict[str, float], Image.Image | None]:
    """The measures, "input_psnr", and "exact" (0 or 1), of an image; and a strip, or None."""
    peak = np.iinfo(gt.dtype).max
    baseline = (lq.clamp(0, 1) * peak).round().permute(1, 2, 0).numpy().astype(gt.dtype)
    if cfg.scale > 1:
        baseline = imresize(baseline, cfg.scale)
    how = (gt, cfg.crop_border, cfg.test_y_channel)
    values = {name: capped(name, MEASURES[name](output, *how)) for name in measures_of(cfg)}
    values["input_psnr"] = before = capped("psnr", psnr(baseline, *how))
    values["exact"] = float(np.array_equal(output, gt))
    picture = None
    if with_strip:
        after = values.get("psnr") or capped("psnr", psnr(output, *how))
        picture = strip(baseline, output, gt, before, after, cfg.strip_size)
    return values, picture


def restored_pixels(network: nn.Module, lq: Tensor, gt: np.ndarray, cfg: Config) -> np.ndarray:
    """The network's output for `lq` (C, h, w) in the type and size of `gt`, rounded.

    An option that changes it belongs in `protocol_of`, too: figures are compared by that.
    """
    height, width = gt.shape[:2]
    x = lq[None]
    if cfg.pad_window:
        x = padded_as_published(x, cfg.window_size)
    output = restore(network, x)[0, :, :height, :width]
    peak = np.iinfo(gt.dtype).max
    output = (output.clamp(0, 1) * peak).round()
    return output.permute(1, 2, 0).numpy().astype(gt.dtype)


def padded_as_published(x: Tensor, window: int) -> Tensor:
    """SwinIR's main_test_swinir.py mirrors each side to a multiple of the window, and by a whole
    window where it is one already."""
    for dim in (2, 3):
        size = (x.shape[dim] // window + 1) * window
        x = torch.cat([x, x.flip(dim)], dim).narrow(dim, 0, size)
    return x


def share_buffers(network: nn.Module) -> None:
    """Statistics such as BatchNorm's are those of rank 0, on all ranks."""
    if dist.is_initialized():
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def measures_of(cfg: Config) -> tuple[str, ...]:
    if cfg.measures:
        return cfg.measures
    return ("psnr", "ssim", "psnrb") if cfg.degradation == "jpeg" else ("psnr", "ssim")


def protocol_of(cfg: Config) -> str:
    """How the figures of a validation are made, such as "RGB, border 0, sigma 25, seed 0"."""
    colour = "gray" if cfg.in_chans == 1 else "Y" if cfg.test_y_channel else "RGB"
    parts = [colour, f"border {cfg.crop_border}"]
    if cfg.val_lq or (cfg.dataroot_lq and not cfg.val_gt):  # else they are held out
        parts.append("pairs")
    else:
        options = options_of_degradation(cfg.degradation, cfg)
        if cfg.degradation not in ("noise", "jpeg"):
            parts.append(cfg.degradation)
        for name, value in validation_options(options).items():
            values = value if isinstance(value, tuple) else (value,)
            parts.append(f"{name} {'-'.join(format_value(v) for v in values)}")
        if cfg.degradation == "noise":
            parts.append("seed 0")
    if cfg.pad_window:
        parts.append("padded by a window")
    return ", ".join(parts)


def format_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def validate(
    network: nn.Module,
    val_sets: dict[str, ValidationImages],
    cfg: Config,
    hardware: "Hardware",
    it: int,
    best: dict[str, list[float]],
    folder: Path,
    log: Log,
) -> bool:
    """Evaluates and logs all sets, and updates `best`: {best_key: [value, iteration]}.

    Returns whether the network is the best one so far, by the first measure on the first set.
    """
    network.eval()
    protocol = protocol_of(cfg)
    measure = measures_of(cfg)[0]
    pictures_folder = folder / "visualization"
    first_pictures = not pictures_folder.exists()
    decisive = best_key(next(iter(val_sets.values())), cfg)
    if not cfg.eval_only and forget_other_bests(best, decisive, folder, it, hardware.rank):
        log("note: validation has changed, so the best network is chosen again")
    for dataset, images in val_sets.items():
        # With ema_decay=0 this is the compiled network: it would be compiled again for each image
        # size. cuDNN would time its algorithms for each of them, too.
        with torch.compiler.set_stance("force_eager"), for_images_of_any_size():
            means, strips = evaluate(network, images, cfg, hardware.rank, hardware.world)
        pictures = {}
        for name, picture in strips.items():
            path = pictures_folder / dataset / f"{name}_{it}.png"
            path = path.with_name(fit_name(path.name))
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            pictures[f"{dataset}/{name}"] = picture

        key = best_key(images, cfg)
        value = means[measure]
        if key not in best or value > best[key][0]:
            best[key] = [value, it]
        top, when = best[key]
        figures = [describe_measure(name, means[name]) for name in measures_of(cfg)]
        text = f"validation {dataset}: {', '.join(figures)}; input {means['input_psnr']:.2f} dB"
        if means["exact"]:
            text += f", {means['exact']} image(s) exact"
        if it > 0 and not cfg.eval_only:
            text += f", best {describe_measure(measure, top)} at {when:,}"
        text += f" ({protocol})"
        values = means | {f"best_{measure}": top, "best_iter": when, "protocol": protocol}
        log.event("val", text, it, pictures, dataset=dataset, eval_only=cfg.eval_only, **values)
    if first_pictures and pictures_folder.exists():
        log(f"pictures: input, output, ground truth in {pictures_folder}")
    return best[decisive][1] == it


@contextlib.contextmanager
def for_images_of_any_size() -> Iterator[None]:
    """cuDNN doesn't time its algorithms, and the memory that large images take is returned."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def best_key(images: ValidationImages, cfg: Config) -> str:
    """What figures must have in common to be compared."""
    return f"{images.source}: {measures_of(cfg)[0]}, {protocol_of(cfg)}"


def forget_other_bests(
    best: dict[str, list[float]], decisive: str, folder: Path, it: int, rank: int
) -> bool:
    """If validation has changed, clears `best` and keeps net_g_best.pth under another name: its
    figure can't be compared with others. Returns whether validation has changed."""
    # The key by which net_g_best.pth was chosen: dicts keep their order, also in a checkpoint.
    first = next(iter(best), None)
    if first in (None, decisive):
        return False
    best.clear()
    old = folder / "models" / "net_g_best.pth"
    if rank == 0 and old.exists():
        old.rename(old.with_stem(f"net_g_best_before_{it}"))
    return True


# The run

FINITE_ADVICE = "restart with a lower --lr, --grad_clip=1 or --amp=none"
# A run stops at the log line after so many steps in a row without finite gradients.
MOST_SKIPPED = 50
# So many skipped steps in a row mean that the weights themselves give no finite gradients, as after
# a step that was too long: they are not saved. A few are normal while fp16 finds its scale.
SPOILT_AFTER = 9


def main(cfg: Config) -> int:  # noqa: C901  the loop is meant to be read in one piece
    """Trains. Returns the exit code: 0, 1 for a damaged image, 128 + the signal that stopped it.

    Raises UserError for options and files that can't work.
    """
    begin = time.perf_counter()
    hardware = set_up_hardware(cfg)
    device, rank, world = hardware.device, hardware.rank, hardware.world
    folder = Path("experiments") / cfg.name

    # Data
    dataset = open_training_set(cfg)
    val_sets = open_validation_sets(cfg, dataset.held_out)

    # Network, and the checkpoint to continue from
    torch.manual_seed(cfg.seed)
    network = build_network(cfg)
    start_ranks(hardware)
    # `lock` is a file, locked until it is closed: before the checkpoint is read, as another run may
    # be saving, and to the end of this function.
    lock = lock_existing(folder, rank)
    use_old = cfg.resume == "auto" or cfg.eval_only
    # See write_state and write_network for what they hold.
    state, weights = last_checkpoint(folder, rank, world) if use_old else (FRESH_STATE, {})
    start, best = state["iter"], dict(state["best"])
    set_threads(device, state.get("threads"))
    changes = check_resume(cfg, state, folder, val_sets)
    check_plan(cfg, world * (cfg.accumulate or 1))
    sampler = sample_batches(lambda it: plan_of(it, cfg), rank, world, start)
    average, taken = start_weights(network, cfg, device, start, weights)
    adversary = build_adversary(cfg, hardware, start)
    criterion = None if cfg.eval_only else build_loss(cfg, device, adversary)
    notices = dataset.notices + taken + (adversary.notices if adversary else [])
    for images in val_sets.values():
        notices += images.notices

    # Folder and log: from here on, files are written
    wait_for_all(world)
    lock = open_folder(folder, cfg, rank, lock)
    log_start = 2**62 if cfg.eval_only else start  # events after it are removed from the log
    log = Log(folder, log_start, cfg.use_tb_logger, cfg.wandb, vars(cfg), quiet=rank > 0)
    describe_run(log, cfg, folder, start, changes, dataset, val_sets, notices)
    if cfg.eval_only:
        validate(average, val_sets, cfg, hardware, start, best, folder, log)
        describe_next_steps(log, folder, start)
        return 0
    if start >= cfg.total_iters:
        log(f"nothing to do: {start:,} iterations are done, and total_iters={cfg.total_iters}")
        describe_next_steps(log, folder, start)
        return 0

    # What else is trained. All of `parts` is saved with each checkpoint and restored from it. DDP
    # wraps the network, then layers are compiled in place, then the memory is tried.
    optimizer = OPTIMIZERS[cfg.optimizer](network, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=hardware.precision == "fp16")
    meter = Meter(device, rank, world)
    parts = {"optimizer": optimizer, "scaler": scaler, "meter": meter}
    if adversary:
        parts |= adversary.parts()
    if start:
        restore_parts(parts, state, log)
    side = cfg.gt_size // cfg.scale
    ddp_model = distribute(network, world, torch.zeros(1, cfg.in_chans, side, side, device=device))
    not_compiled = compile_layers(network, cfg, device)
    accumulate = choose_accumulate(network, criterion, cfg, hardware, state.get("accumulate"))
    describe_network(log, network, hardware, accumulate, not_compiled)
    describe_memory(log, network, cfg, hardware, accumulate)
    step = partial(train_step, cfg, hardware.precision, ddp_model, criterion, optimizer, scaler)

    def save_network(name: str | int, it: int) -> None:
        path = folder / "models" / f"net_g_{name}.pth"
        write_network(path, network, average, cfg, hardware, it)

    def save(it: int) -> bool:
        if meter.skipped_in_a_row() >= SPOILT_AFTER:
            reason = f"its last {SPOILT_AFTER} steps had no finite gradients"
            log(f"iteration {it:,} isn't saved: {reason}")
            return False
        save_network(it, it)
        write_state(folder, it, best, cfg, parts, hardware, accumulate)
        remove_old_checkpoints(folder, it, cfg.keep_last, rank)
        return True

    if rank == 0:
        options = {key: value for key, value in vars(cfg).items() if key not in OF_ONE_START}
        write_file(folder / "config.json", json.dumps(options, indent=1))
    workers = min(cfg.num_workers, os.cpu_count() or 1)
    loader = train_loader(dataset, sampler, workers, pin=device.type == "cuda")
    bar = progress_bar(cfg.total_iters, start, rank)
    requests = StopRequests(cfg.max_hours, begin)
    saved = start > 0  # whether there is a checkpoint of the last step
    with bar, Prefetcher(loader, device) as batches, requests:
        clock = Clock(start)
        damaged: set[str] = set()  # images that have been named
        for it in range(start + 1, cfg.total_iters + 1):
            try:
                batch = next(batches)
            except UnreadableImage as error:
                requests.stop_with(error)  # sets the exit code, so that all ranks return below
            save_now, time_is_up, code = requests.agree(world)
            # So each start under --max_hours makes at least one step.
            made_a_step = it > start + 1
            if made_a_step and (save_now or time_is_up or code):
                with clock.paused(device):
                    saved = save(it - 1)
            if code or (time_is_up and made_a_step):
                command = f"python train.py {shlex.quote(str(folder))}"
                how = f"saved: to go on, {command}" if saved else "not saved"
                log(f"stopped after iteration {it - 1:,}, {how}")
                return code

            # The step. `batch` is [lq, gt] on the device, floats in [0, 1]. DropPath draws from
            # (seed, iteration, rank).
            seed = ((cfg.seed * 1_000_003 + it) * 4099 + rank) % 2**63
            lr = set_lr(optimizer, lr_at(it, cfg))
            figures, finite, accumulate = step_that_fits(step, batch, accumulate, seed, world, log)
            if adversary:
                figures |= adversary.step(batch[1].chunk(accumulate), it)
            if cfg.ema_decay:
                update_average(average, network, it, cfg.ema_decay)
            meter.add(figures, finite)
            clock.images += plan_of(it, cfg)[0]
            bar.update(1)

            # Log, validate, save. Only reading values waits for a GPU.
            last = it == cfg.total_iters
            clock.estimate(it, cfg.total_iters, device, log)
            if it % cfg.print_freq == 0 or last:
                means = meter.means() | log_damaged(log, dataset, damaged)
                log_step(log, cfg, it, means, lr, clock, batches)
                meter.reset()
                clock.restart(it)
                batches.wait = 0.0
            if val_sets and (it % cfg.val_freq == 0 or last):
                bar.set_postfix_str("validating")
                with clock.paused(device):
                    if validate(average, val_sets, cfg, hardware, it, best, folder, log):
                        save_network("best", it)
                    network.train()  # with ema_decay=0, it is `average`
                bar.set_postfix_str("")
            if it % cfg.save_checkpoint_freq == 0 or last:
                with clock.paused(device):
                    saved = save(it)
            if device.type == "cpu" or it % cfg.print_freq == 0:
                loss = figures["loss"].item()
                bar.set_postfix_str(f"loss {loss:.2e}, {clock.left(it, cfg.total_iters)} left")
    if not saved:
        raise UserError(f"finished, but not saved: {FINITE_ADVICE}")
    log(f"finished: the weights are in {folder / 'models'}; to go on, raise --total_iters")
    describe_next_steps(log, folder, cfg.total_iters)
    del lock
    return 0


def describe_run(
    log: Log,
    cfg: Config,
    folder: Path,
    start: int,
    changes: list[str],
    dataset: PairedImageDataset,
    val_sets: dict[str, ValidationImages],
    notices: list[str],
) -> None:
    if cfg.eval_only:
        log(f"{folder}: evaluating" + (f" iteration {start:,}" if start else ""))
    elif start:
        log(f"{folder}: continuing after iteration {start:,}")
    else:
        log(f"{folder}: starting")
    sets = ", ".join(f"{name} ({len(images)})" for name, images in val_sets.items()) or "none"
    training = "synthetic images (no dataroot_gt)"
    if dataset.pairs:
        kind = "pair" if cfg.dataroot_lq else "image"
        training = f"{len(dataset):,} {kind}(s)"
    if dataset.held_out:
        sets = describe_held_out(val_sets["held_out"].names)
    if cfg.eval_only:
        log(f"data: validation: {sets}")
    else:
        unchanged = "as before" if start else "the defaults"
        log(f"options: {', '.join(changes) or unchanged}")
        log(f"data: {training}; validation: {sets}")
    for notice in notices:
        log(f"note: {notice}")


def describe_next_steps(log: Log, folder: Path, it: int) -> None:
    """The last lines: a picture to look at, and what to do with the network."""
    pictures = sorted(folder.glob(f"visualization/*/*_{it}.png"))
    if pictures:
        log(f"look at:  {pictures[0]}")
    if (folder / "models").exists():
        log(f"use it:   python model.py {shlex.quote(str(folder))} YOUR_PHOTO.jpg")


def describe_network(
    log: Log,
    network: nn.Module,
    hardware: "Hardware",
    accumulate: int,
    not_compiled: str | None,
) -> None:
    device = hardware.device
    count = sum(p.numel() for p in network.parameters())
    ranks = f"{hardware.world} rank(s) x {accumulate} micro-batch(es)"
    precision = "float32" if hardware.precision == "none" else hardware.precision
    text = f"network: {count:,} parameters; torch {torch.__version__}, {device}"
    text += f", {precision}, {ranks}"
    if device.type == "cpu":
        text += f", {torch.get_num_threads()} thread(s)"
    elif not_compiled:
        text += f"; not compiled: {not_compiled}"
    log(text)
    if device.type == "cpu" and count > 5e6:
        log("note: on a CPU, a network of this size takes months: configs/tiny.py is for CPUs")


def log_step(
    log: Log,
    cfg: Config,
    it: int,
    means: dict[str, float],
    lr: float,
    clock: "Clock",
    batches: Prefetcher,
) -> None:
    """The line and the event of training. `means` have been read, so the device has finished.

    Raises UserError if no step was finite for too long.
    """
    seconds, steps = clock.read(it)
    waiting = batches.wait / seconds
    speed = clock.images / seconds
    left = clock.left(it, cfg.total_iters)
    text = f"iter {it:,}/{cfg.total_iters:,}: loss {means['loss']:.4e}, lr {lr:.2e}"
    # Those that have their own place in the line, or none.
    placed = ("loss", "grad_norm", "skipped", "skipped_in_a_row", "damaged", "d_skipped")
    for name, value in means.items():  # the terms of the loss, and what else a step returns
        if name not in placed:
            text += f", {name} {value:.4e}"
    text += f", {speed:.1f} img/s, {left} left, {waiting:.0%} waiting for data"
    if "damaged" in means:
        text += f", {means['damaged']:.0f} damaged image(s)"
    if means["skipped"]:
        text += f", {means['skipped']:.0f} skipped"
    if means.get("d_skipped"):
        text += f", {means['d_skipped']:.0%} of the discriminator's steps skipped"
    if waiting > 0.25 and clock.intervals > 1:
        text += " (try data.py pack or --num_workers)"
    values = {name: value for name, value in means.items() if name != "skipped_in_a_row"}
    values |= {"lr": lr, "time": seconds / steps, "data_time": batches.wait / steps}
    values |= {"img_per_s": speed, "max_mem_gb": torch.cuda.max_memory_allocated() / 1e9 or None}
    log.event("train", text, it, **values)
    if means["skipped_in_a_row"] >= MOST_SKIPPED:
        raise UserError(f"stopped: no finite gradients in {MOST_SKIPPED} steps; {FINITE_ADVICE}")


def progress_bar(total: int, start: int, rank: int) -> tqdm:
    """In a terminal, on rank 0. The time left is set with the loss, as the log has it."""
    layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
    hidden = None if rank == 0 else True  # None: hidden where there is no terminal
    return tqdm(total=total, initial=start, disable=hidden, leave=False, bar_format=layout)


def log_damaged(log: Log, dataset: PairedImageDataset, known: set[str]) -> dict[str, float]:
    """Names the images that were found damaged on any rank, except for those `known`.

    Returns {"damaged": their number} if there are any.
    """
    for source in dataset.sources:
        sum_over_ranks(source.damaged).clamp_(max=1)  # in place: what any rank has found
        for i in source.damaged.nonzero().flatten().tolist():
            path = f"{source.root}/{source.names[i]}"
            if path not in known:
                log(f"note: {path} is damaged, and replaced: python data.py check names all")
                known.add(path)
    count = dataset.count_damaged()
    return {"damaged": float(count)} if count else {}


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> float:
    """All parameter groups have it, times their "lr_scale" if they have one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


# Plumbing: no experiment needs to change what follows.

# Options, from config files and the command line


def load_config(argv: list[str]) -> Config:
    """The Config of a command line. SystemExit, with a sentence, if anything is wrong with it."""
    try:
        cfg = read_config(argv)
        check(cfg)
    except USER_ERRORS as error:
        raise SystemExit(f"error: {error}") from None
    return cfg


def read_config(argv: list[str]) -> Config:
    """Files first, in order, then options; types and bounds are checked. Raises UserError.

    A value in a file may be a rule, which is a function of the other options.
    """
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nAll options:\n\n{inspect.getsource(Config)}", flush=True)
        raise SystemExit(0)
    values = vars(Config())
    sources = dict.fromkeys(values, "a default")
    hints = get_type_hints(Config)
    files = [arg for arg in argv if not arg.startswith("-")]
    options = [arg for arg in argv if arg.startswith("-")]
    for arg in options:
        if "=" not in arg:
            check_known(option_name(arg), arg)
            raise UserError(f"{arg}: options are written with their value, as {arg}=VALUE")
    for path in files:
        for name, value in read_file(path).items():
            check_known(name, path)
            values[name], sources[name] = value, path
    for arg in options:
        name, text = option_name(arg), arg.partition("=")[2]
        check_known(name, arg)
        values[name], sources[name] = from_text(text, hints[name]), arg

    rules = Rules(values)
    for name in values:
        value = conform(getattr(rules, name), hints[name], name, sources[name])
        values[name] = value
    # scale first, so that the error names it, not a value that a rule computed from it.
    for name in ("scale", *values):
        check_bounds(name, values[name])
    return Config(**values)


def read_file(path: str) -> dict[str, Any]:
    """The options in a config file, or in the config.json of a run's folder."""
    if Path(path).is_dir():
        return read_run(Path(path))
    if not Path(path).is_file():
        files = [str(file) for file in Path("configs").glob("*.py")]
        files += [str(file.parent) for file in Path("experiments").glob("*/config.json")]
        near = difflib.get_close_matches(path, files, 2)
        advice = f"did you mean {' or '.join(near)}?" if near else "options are --key=value"
        raise UserError(f"{path}: there is no such config file; {advice}")
    if path.endswith(".json"):
        return read_json(path)
    if path.endswith((".yml", ".yaml")):
        raise UserError(f"{path}: options are --key=value: README.md says how BasicSR's are called")
    if path.endswith((".pth", ".state")):
        raise UserError(f"{path} is no config file: name the run's folder, as experiments/mine")
    return read_python(path)


def read_run(folder: Path) -> dict[str, Any]:
    """The options of the run in experiments/<name>, to go on with it."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run's folder: it has no config.json")
    values = read_json(str(folder / "config.json"))
    for name in OF_ONE_START:  # in files of older versions
        values.pop(name, None)
    here = Path("experiments") / str(values.get("name"))
    if here.resolve() != folder.resolve():
        advice = f"take {folder / 'config.json'} and a --name, for a run like it"
        raise UserError(f"{folder} is not {here}, where its run would go on: {advice}")
    return values


def read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no config file: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is no config file: it holds no options")
    return values


def read_python(path: str) -> dict[str, Any]:
    """Its public names. Modules that it imports are no options."""
    names: dict[str, Any] = {"__file__": path, "__name__": "config"}
    try:
        exec(compile(read_text(path), path, "exec"), names)
    except USER_ERRORS:
        raise
    except BaseException as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        place = f" in line {lines[-1]}" if lines else ""
        raise UserError(f"{path} is no config file{place}: {error!r}") from error
    public = {}
    for name, value in names.items():
        if not name.startswith("_") and not inspect.ismodule(value):
            public[name] = value
    return public


def option_name(arg: str) -> str:
    """batch_size of --batch-size=8."""
    return arg.lstrip("-").partition("=")[0].replace("-", "_")


def check_known(name: str, source: str) -> None:
    known = list(vars(Config()))
    if name in known:
        return
    last = name.rpartition(".")[2]
    if "val" in name and last in ("dataroot_gt", "dataroot_lq"):  # datasets.val.dataroot_gt
        last = last.replace("dataroot", "val")
    near = difflib.get_close_matches(last.lower(), known, 2)
    if last in BASICSR_NAMES:
        advice = BASICSR_NAMES[last]
    elif last in known:
        advice = f"did you mean {last}?"
    elif near:
        advice = f"did you mean {' or '.join(near)}?"
    else:
        advice = "train.py --help lists them all"
    if not source.startswith("-"):
        advice += " (names of helpers in a config begin with _)"
    raise UserError(f"{source}: unknown option {name}; {advice}")


# Options of BasicSR that have another name here, where the closest match would mislead
BASICSR_NAMES = {
    "manual_seed": "did you mean seed?",
    "total_iter": "did you mean total_iters?",
    "warmup_iter": "did you mean warmup_iters?",
    "val_dataroot_gt": "did you mean val_gt?",
    "val_dataroot_lq": "did you mean val_lq?",
    "metrics": "did you mean measures?",
    "pixel_opt": "did you mean loss?",
    "upscale": "did you mean scale?",
    "opt": "give a config file: README.md says how BasicSR's options are called",
    "launcher": "start several GPUs with torchrun --nproc_per_node=8 train.py",
    "num_gpu": "start several GPUs with torchrun --nproc_per_node=8 train.py",
    "auto_resume": "a run always goes on; resume=never starts afresh",
    "resume_state": "a run goes on by itself; to go back, delete its later training_states",
}


class Rules:
    """What a rule such as `lr = lambda cfg: ...` sees: all options, with rules evaluated."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name not in self._values:
            raise AttributeError(f"there is no option {name}")
        value = self._values[name]
        if not inspect.isfunction(value):
            return value
        try:
            return value(self)
        except RecursionError:
            raise UserError(f"{name}: this rule depends on itself") from None
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{name}: its rule fails: {error!r}") from error


def from_text(text: str, hint: Any) -> Any:
    """A value of the command line as Python has it. What isn't one stays text, and `conform`
    refuses it."""
    kinds = alternatives(hint)
    if text == "None" and NoneType in kinds:
        return None
    if takes_text(kinds):
        lists = any(get_origin(kind) is tuple for kind in kinds)
        words = split_at_commas(text)
        return tuple(words) if lists and len(words) > 1 else text
    text = {"true": "True", "false": "False"}.get(text, text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def takes_text(kinds: list[Any]) -> bool:
    for kind in kinds:
        if kind is str or kind == tuple[str, ...]:
            return True
        if get_origin(kind) is Literal and isinstance(get_args(kind)[0], str):
            return True
    return False


def alternatives(hint: Any) -> list[Any]:
    """[int, NoneType] of int | None."""
    return list(get_args(hint)) if get_origin(hint) in (Union, UnionType) else [hint]


def conform(value: Any, hint: Any, name: str, source: str) -> Any:
    """The value as its type hint says. Raises UserError for one of another type."""
    for kind in alternatives(hint):
        with contextlib.suppress(TypeError, OverflowError):
            return conform_to_kind(value, kind)
    wanted = " or ".join(describe_kind(kind) for kind in alternatives(hint))
    raise UserError(f"{source}: {name} must be {wanted}, not {value!r:.60} (see train.py --help)")


KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "text",
    NoneType: "None",
    tuple[int, ...]: "whole numbers as 10,40",
    tuple[float, ...]: "numbers as 0,50",
    tuple[float, float]: "two numbers as 0.9,0.99",
    tuple[str, ...]: "names as a,b",
}


def describe_kind(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in get_args(kind))
    return KINDS.get(kind) or inspect.formatannotation(kind)


def conform_to_kind(value: Any, kind: Any) -> Any:
    """Raises TypeError, or OverflowError for a number that is too large."""
    if get_origin(kind) is Literal:
        for choice in get_args(kind):
            if type(value) is type(choice) and value == choice:
                return choice
    elif get_origin(kind) is tuple:
        return conform_to_tuple(value, get_args(kind))
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif kind is int and type(value) is float and value.is_integer():
        return int(value)  # 1e4
    elif kind is str and isinstance(value, Path):
        return str(value)
    elif type(value) is kind:
        return value
    raise TypeError


def conform_to_tuple(value: Any, kinds: tuple[Any, ...]) -> tuple:
    """`kinds`: (int, ...) for any number of entries, or one for each."""
    if isinstance(value, list | tuple):
        entries = value
    elif value is None:
        raise TypeError
    else:
        entries = (value,)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(entries)
    if len(kinds) != len(entries):
        raise TypeError
    return tuple(conform_to_kind(entry, kind) for entry, kind in zip(entries, kinds, strict=True))


def check_bounds(name: str, value: Any) -> None:
    low, high = BOUNDS.get(name, (None, None))
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        too_low = low is not None and number < low
        too_high = high is not None and number > high
        if too_low or too_high or not abs(number) < 2**63:
            limits = f"at least {low}" if low is not None else "finite"
            if high is not None:
                limits += f", at most {high}"
            raise UserError(f"{name}={value!r:.60} can't work: it must be {limits}")


def check(cfg: Config) -> None:
    """Raises UserError for options that can't work together."""

    def need(fine: bool, name: str, wanted: str) -> None:
        if not fine:
            raise UserError(f"{name}={getattr(cfg, name)!r:.60} can't work: it must be {wanted}")

    plain = cfg.name.isprintable() and cfg.name.rstrip(".") == cfg.name != ""
    plain = plain and len(os.fsencode(cfg.name)) <= 200  # "_archived_..." comes behind it
    need(plain and Path(cfg.name).name == cfg.name, "name", "a plain name")
    if cfg.network == "swinir":
        recipe = "'' for scale=1, else as in configs/*_sr.py"
        need((cfg.upsampler == "") == (cfg.scale == 1), "upsampler", recipe)
    if not cfg.dataroot_lq:
        same_size = cfg.degradation in ("noise", "jpeg")
        smaller = cfg.degradation == "bicubic"
        unfit = (same_size and cfg.scale > 1) or (smaller and cfg.scale == 1)
        need(not unfit, "degradation", "one that shrinks, as bicubic, for scale > 1 only")
    if cfg.network == "swinir" and not cfg.eval_only:
        img_range = 255 if cfg.window_size == 7 else 1
        why = "ComfyUI and chaiNNer (spandrel) assume it, as weights don't tell"
        wanted = f"{img_range} with window_size={cfg.window_size}: {why}"
        need(cfg.img_range == img_range, "img_range", wanted)
    check_plan(cfg)
    tables = {"network": NETWORKS, "optimizer": OPTIMIZERS, "scheduler": SCHEDULES}
    tables |= {"discriminator": DISCRIMINATORS, "attention": ATTENTION}
    for name, table in tables.items():
        need(getattr(cfg, name) in table, name, " or ".join(table))
    for measure in cfg.measures or ():
        need(measure in MEASURES, "measures", f"names of {', '.join(MEASURES)}")
    terms = parse_loss(cfg.loss)
    for weight in terms.values():
        need(math.isfinite(weight), "loss", "a sum of terms with finite weights")
    if GAN_TERM in terms and cfg.discriminator == "unet":
        need(cfg.gt_size % 8 == 0, "gt_size", "a multiple of 8 for the discriminator")


def check_plan(cfg: Config, shares: int = 1) -> None:
    """Raises UserError for a batch or patch size, of any iteration, that can't work.

    `shares`: ranks x micro-batches.
    """
    unit = cfg.scale
    words = "scale"
    if cfg.network == "swinir":
        unit *= cfg.window_size
        words = "scale x window_size"
    step = cfg.total_iters // 1_000_000 + 1  # to look at a million iterations takes half a second
    for batch_size, gt_size in {plan_of(it, cfg) for it in range(1, cfg.total_iters + 1, step)}:
        if gt_size % unit:
            raise UserError(f"gt_size={gt_size} can't work: it must be N x {unit} ({words})")
        if batch_size % shares:
            raise UserError(f"{batch_size=} is no multiple of ranks x accumulate, {shares}")


def check_resume(
    cfg: Config, state: dict[str, Any], folder: Path, val_sets: dict[str, Any]
) -> list[str]:
    """What differs from the checkpoint, or from the defaults, for the log. Raises UserError for
    what can't change in a run that has started."""
    start, old = state["iter"], state["config"]
    if cfg.eval_only:
        if not start and not cfg.pretrain_network:
            raise UserError(f"eval_only: no checkpoint in {folder}; give --pretrain_network")
        if not val_sets:
            raise UserError("eval_only: give val_gt and val_lq")
    changed = {k: (old[k], v) for k, v in vars(cfg).items() if old.get(k, v) != v}
    if not start:
        return [f"{name}={value}" for name, (_, value) in changed.items()]

    fixed = [*network_shape(cfg), *FIXED_ON_RESUME, *options_of_degradation(cfg.degradation)]
    if not cfg.dataroot_gt:
        fixed.append("dataroot_gt")  # forgotten, it would mean synthetic images
    if cfg.eval_only:
        fixed = network_shape(cfg)
        if cfg.pretrain_network:
            fixed.append("pretrain_network")
    texts = {name: f"{name}: {before} -> {now}" for name, (before, now) in changed.items()}
    refused = [text for name, text in texts.items() if name in fixed]
    if refused:
        advice = "give the old value, or another --name"
        if not cfg.eval_only:
            advice += ", or --resume=never"
        raise UserError(f"{', '.join(refused)} can't change in a run that has started: {advice}")
    return list(texts.values())


# The machine


class Hardware(NamedTuple):
    rank: int
    world: int  # number of ranks
    device: torch.device
    precision: str  # bf16, fp16, tf32, none


def set_up_hardware(cfg: Config) -> Hardware:
    """Makes PyTorch's settings, and finds what "auto" and None stand for on this machine."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = find_device(cfg)
    precision = cfg.amp
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = cfg.amp != "none"
        torch.set_float32_matmul_precision("highest" if cfg.amp == "none" else "high")
        if precision == "auto":
            has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
            precision = "bf16" if has_bf16 else "none"
    elif precision == "tf32":
        precision = "none"  # only NVIDIA's GPUs have it
    elif precision == "auto":
        has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        precision = "bf16" if device.type == "cpu" and has_bf16() else "none"
    if device.type == "cpu" and sys.platform == "linux":
        keep_freed_memory()
    return Hardware(rank, world, device, precision)


def find_device(cfg: Config) -> torch.device:
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    kind = cfg.device
    if kind == "auto":
        kind = next(name for name, there in found.items() if there)
    if not found[kind]:
        raise UserError(
            f"device={kind}: PyTorch finds none here; --device=auto takes what there is"
        )
    if kind == "cuda":
        # Slurm may show each task one GPU only.
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    return torch.device(kind)


def keep_freed_memory() -> None:
    """glibc keeps what is freed: to get new pages from the system can cost half of a step."""
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def choose_accumulate(
    network: nn.Module, criterion: nn.Module, cfg: Config, hardware: Hardware, before: int | None
) -> int:
    """Micro-batches per step and rank. `before`: those of the run that is continued."""
    if cfg.accumulate:
        return cfg.accumulate
    accumulate = fit_memory(network, cfg, hardware, before)
    if hardware.world > 1:
        accumulate = try_memory(network, criterion, cfg, hardware, accumulate)
    return accumulate


def fit_memory(network: nn.Module, cfg: Config, hardware: Hardware, before: int | None) -> int:
    """The least number of micro-batches per step and rank that should fit into the memory.

    `before`: that of the run which is continued. It stays, because it changes how sums are rounded.
    Where one sample is too large, this makes the network recompute its activations, if it can.
    """
    samples = cfg.batch_size // hardware.world
    free = free_memory(hardware)
    too_large = expected_bytes(network, cfg, hardware, 1) > free
    if too_large:
        recompute_activations(network)
    if before and samples % before == 0:
        return before
    if too_large:
        return samples
    for count in range(1, samples + 1):
        fits = expected_bytes(network, cfg, hardware, samples // count) <= free
        if samples % count == 0 and fits:
            return count
    return samples


def recompute_activations(network: nn.Module) -> None:
    for module in network.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = True


def expected_bytes(network: nn.Module, cfg: Config, hardware: Hardware, samples: int) -> float:
    """An estimate for a training step on `samples` at a time: of the weights alone, if the network
    has no training_floats_per_pixel."""
    weights = 20 * sum(p.numel() for p in network.parameters())  # gradients, Adam, average
    gt_size = max(plan_of(it, cfg)[1] for it in (1, cfg.total_iters))
    pixels = samples * (gt_size // cfg.scale) ** 2
    half = hardware.precision in ("bf16", "fp16")
    floats = getattr(network, "training_floats_per_pixel", 0)
    # training_floats_per_pixel was fitted so that in bf16 each counts 4 bytes. Half of these bytes
    # are float32 in any case. So in float32, where the other half doubles, it is 6.
    return weights + pixels * floats * (4 if half else 6)


def free_memory(hardware: Hardware) -> float:
    """Bytes that a step may use. The factors leave some to other programs and to fragmentation."""
    if hardware.device.type == "cuda":
        return 0.85 * torch.cuda.mem_get_info(hardware.device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # no Linux
        return 4e9
    kilobytes = int(re.search(r"MemAvailable: +([0-9]+)", text)[1])
    return 0.5 * 1024 * kilobytes / hardware.world


def try_memory(
    network: nn.Module,
    criterion: nn.Module,
    cfg: Config,
    hardware: Hardware,
    accumulate: int,
) -> int:
    """Tries forward and backward, without a step. Returns the number of micro-batches that fits
    on all ranks."""
    batch_size, gt_size = plan_of(1, cfg)
    samples = batch_size // hardware.world
    statistics = copy_statistics(network)
    while True:
        gt = torch.zeros(samples // accumulate, cfg.in_chans, gt_size, gt_size)
        gt = gt.to(hardware.device)
        lq = gt[..., :: cfg.scale, :: cfg.scale]
        try:
            # The bare network, not ddp_model: each rank tries alone, without communication.
            scaler = torch.amp.GradScaler("cpu", enabled=False)
            backward(network, criterion, scaler, [[lq, gt]], hardware.precision)
            break
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        accumulate = more_micro_batches(accumulate, samples)
    network.zero_grad()
    restore_statistics(statistics, torch.tensor(False, device=hardware.device))
    most = torch.tensor(accumulate)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)


def describe_memory(
    log: Log, network: nn.Module, cfg: Config, hardware: Hardware, accumulate: int
) -> None:
    samples = cfg.batch_size // hardware.world // accumulate
    if hasattr(network, "training_floats_per_pixel"):
        expected = expected_bytes(network, cfg, hardware, samples)
        log(f"memory: about {expected / 1e9:.2g} GB for a step, {samples} sample(s) at a time")


def set_threads(device: torch.device, before: int | None) -> None:
    """Threads on a CPU: OMP_NUM_THREADS, or as many as before a restart, or as cores are free."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(before or free_cores(), torch.get_num_threads()))


def compile_layers(network: nn.Module, cfg: Config, device: torch.device) -> str | None:
    """Compiles each layer in place, so that state dicts have no prefix. Layers that are alike
    share a compilation. Returns what is missing where "auto" goes on without."""
    if cfg.compile == "off":
        return None
    missing = why_not_compiled(device) if cfg.compile == "auto" else None
    if not missing:
        for layer in getattr(network, "layers", [network]):
            layer.compile()
    return missing


def why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile lacks here. On a CPU it takes long and gains little."""
    if device.type != "cuda" or sys.platform != "linux":
        return "only for CUDA on Linux, unless compile=on"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"the GPU has capability {major}.{minor}, Triton needs 7.0"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    compilers = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    if not any(shutil.which(name) for name in compilers if name):
        return "no C compiler is found (install gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing (install python3-dev)"
    return None


# Ranks


def start_ranks(hardware: Hardware) -> None:
    if hardware.world > 1 and not dist.is_initialized():
        # Each backend for the tensors on its device.
        dist.init_process_group("cpu:gloo,cuda:nccl" if hardware.device.type == "cuda" else "gloo")


def wait_for_all(world: int) -> None:
    """Rank 0 may move the folder away: first, all have to have read their files."""
    if world > 1:
        dist.barrier()


def distribute(network: nn.Module, world: int, example: Tensor) -> nn.Module:
    """For several ranks, the network in DDP. `example`: an input of it."""
    if world == 1:
        return network
    ddp_model = nn.parallel.DistributedDataParallel(network)
    # Buffers are equal here, as DDP has just sent them (with broadcast_buffers=False as an argument
    # it would not). Later, share_buffers() sends them before a validation, not every forward pass.
    ddp_model.broadcast_buffers = False
    # The first backward makes DDP rearrange its buckets, which changes how sums round. It is made
    # here, so that a restart sums as the run did that it continues.
    network.eval()
    ddp_model(example).sum().backward()
    network.zero_grad()
    network.train()
    return ddp_model


# Checkpoints

STATE_NAME = re.compile(r"[0-9]+\.state")
NETWORK_NAME = re.compile(r"net_g_([0-9]+|best|best_before_[0-9]+)\.pth")

# Before the first step. Options that differ from the defaults are listed as changes.
FRESH_STATE: dict[str, Any] = {"iter": 0, "best": {}, "config": vars(Config())}


def write_network(
    path: Path,
    network: nn.Module,
    average: nn.Module,
    cfg: Config,
    hardware: Hardware,
    it: int,
) -> None:
    if hardware.rank > 0:
        return
    shared: dict[Any, Tensor] = {}
    content = {
        "params": portable(network.state_dict(), shared),
        "params_ema": portable(average.state_dict(), shared),
        "arguments": network.arguments,
        "network": cfg.network,
        "iter": it,
    }
    write_file(path, content)


def write_state(
    folder: Path,
    it: int,
    best: dict[str, list[float]],
    cfg: Config,
    parts: dict[str, Any],
    hardware: Hardware,
    accumulate: int,
) -> None:
    """What a restart needs besides the weights."""
    # On all ranks, because Meter sums over them.
    content = {name: part.state_dict() for name, part in parts.items()}
    if hardware.rank > 0:
        return
    content |= {"iter": it, "best": best, "config": vars(cfg)}
    # Both change how sums are rounded.
    content |= {"threads": torch.get_num_threads(), "accumulate": accumulate}
    write_file(folder / "training_states" / f"{it}.state", content)


def remove_old_checkpoints(folder: Path, it: int, keep_last: int, rank: int) -> None:
    """Deletes all but the last `keep_last` up to `it`. Later ones, which a restart has passed over,
    stay."""
    if rank > 0 or keep_last == 0:
        return
    earlier = [old for old in saved_iterations(folder) if old <= it]
    for old in earlier[:-keep_last]:
        (folder / "models" / f"net_g_{old}.pth").unlink(missing_ok=True)
        (folder / "training_states" / f"{old}.state").unlink()


def saved_iterations(folder: Path) -> list[int]:
    """Those of the .state files. Others, such as copies that people have made, are ignored."""
    names = [path.name for path in folder.glob("training_states/*.state")]
    return sorted(int(name.removesuffix(".state")) for name in names if STATE_NAME.fullmatch(name))


def last_checkpoint(folder: Path, rank: int, world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(state, weights) of the newest checkpoint that is whole: the one that rank 0 finds."""
    state, weights = FRESH_STATE, {}
    if rank == 0:
        state, weights = newest_whole_checkpoint(folder)
    it = int(sum_over_ranks(torch.tensor([state["iter"]])).item())  # other ranks add 0
    if rank > 0 and it > 0:
        state, weights = load_checkpoint(folder, it)
    return state, weights


def newest_whole_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest one that can be read. Prints a note about others, and about unknown files."""
    files = [*folder.glob("training_states/*"), *folder.glob("models/*")]
    foreign = []
    for file in files:
        known = STATE_NAME.fullmatch(file.name) or NETWORK_NAME.fullmatch(file.name)
        if not known and not file.name.startswith(".") and file.suffix != ".partial":
            foreign.append(file.name)
    if foreign:
        print(f"note: ignored in {folder}, as not written by train.py: {', '.join(foreign[:5])}")
    for it in reversed(saved_iterations(folder)):
        try:
            return load_checkpoint(folder, it)
        except UserError as error:
            print(f"warning: {error}: the one before is used, if any", file=sys.stderr)
    if saved_iterations(folder):
        print(f"warning: {folder} has no checkpoint that is whole: starting over", file=sys.stderr)
    return FRESH_STATE, {}


def load_checkpoint(folder: Path, it: int) -> tuple[dict[str, Any], dict[str, Any]]:
    state = load_checked(folder / "training_states" / f"{it}.state")
    return state, load_checked(folder / "models" / f"net_g_{it}.pth")


def load_checked(path: Path) -> dict[str, Any]:
    try:
        if not checksums_agree(path):
            raise ValueError("wrong checksum")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # unpickling a damaged file raises anything
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is damaged or missing ({reason})") from None


def restore_parts(parts: dict[str, Any], state: dict[str, Any], log: Log) -> None:
    if "discriminator" in state and "discriminator" not in parts:
        log("note: the checkpoint's discriminator isn't used, nor saved again: the loss has no gan")
    for name, part in parts.items():
        if name not in state:
            log(f"note: the checkpoint has no {name}: it starts from the beginning")
            continue
        content = state[name]
        if isinstance(part, torch.optim.Optimizer):
            groups = part.state_dict()["param_groups"]
            sizes = [len(group["params"]) for group in groups]
            if sizes != [len(group["params"]) for group in content["param_groups"]]:
                advice = "undo the change, or give another --name"
                raise UserError(
                    f"{name}: its parameter groups differ from the checkpoint's: {advice}"
                )
            content = content | {"param_groups": groups}  # lr, betas... may have been edited
        if content:  # a disabled GradScaler has none
            part.load_state_dict(content)


def write_file(path: Path, content: Any) -> None:
    """Writes text, or an object by torch.save. The file is always whole: old or new."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, str):
            partial.write_text(content, encoding="utf-8")
        else:
            torch.save(content, partial)
        with open(partial, "rb+") as file, contextlib.suppress(OSError):
            os.fsync(file.fileno())  # some network drives can't
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        if "DataLoader worker" in str(error):  # one has died; raised in whatever is running
            raise
        advice = disk_advice(error) if isinstance(error, OSError) else "make room"
        sentence = f"{path} can't be written: {error}; {advice}"
        raise UserError(f"{sentence}, and run the same command to continue") from None


def lock_existing(folder: Path, rank: int) -> Any:
    """Locks the folder of a run, if there is one."""
    return lock_folder(folder) if rank == 0 and folder.is_dir() else None


def open_folder(folder: Path, cfg: Config, rank: int, lock: Any) -> Any:
    """Makes experiments/<name>, or moves it away first. Returns the lock, a file, which holds as
    long as it is open."""
    if rank > 0:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock or lock_folder(folder)
    has_networks = any(NETWORK_NAME.fullmatch(path.name) for path in folder.glob("models/*"))
    stateless = has_networks and not saved_iterations(folder)
    unwanted = cfg.resume == "never" and (folder / "config.json").exists()
    if cfg.eval_only or not (stateless or unwanted):
        return lock
    archive = folder
    while archive.exists():  # a second archive within one second has to wait
        archive = folder.with_name(f"{cfg.name}_archived_{time.strftime('%Y%m%d_%H%M%S')}")
        time.sleep(0.1)
    folder.rename(archive)
    reason = "has no training states, so it was" if stateless else "was"
    print(f"{folder} {reason} moved to {archive}")
    folder.mkdir()
    return lock_folder(folder)


def lock_folder(folder: Path) -> Any:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks, and renames no folder with an open file
        return None
    file = open(folder / ".lock", "w")  # noqa: SIM115  it stays open
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            advice = "wait, or give this one a --name"
            raise UserError(f"{folder} is in use by another run: {advice}") from None
        print(f"note: {folder} can't be locked ({error}): start no second run in it")
    return file


# Signals and time


class StopRequests:
    """Handles signals while it is active. SIGUSR1: save. Ctrl-C, SIGTERM, SIGHUP: save and stop.

    `exit_code`: 0 to go on, else what the run returns when it has saved.
    """

    def __init__(self, max_hours: float | None, begin: float) -> None:
        self.exit_code = 0
        self.save = False
        self.end = math.inf
        if max_hours is not None:
            self.end = begin + 3600 * max_hours  # of time.perf_counter()
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread receives signals
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name, None)
            if number is None:
                continue
            if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        if number == getattr(signal, "SIGUSR1", None):
            self.save = True
            return
        self.exit_code = 128 + number
        # A second Ctrl-C stops at once. Slurm may send SIGTERM several times.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # the terminal may have been closed
            os.write(2, b"\nstopping after this iteration or validation; Ctrl-C again: at once\n")

    def stop_with(self, error: UnreadableImage) -> None:
        """Stops the run with exit code 1, also if only this rank has met the error."""
        self.exit_code = self.exit_code or 1
        tqdm.write(f"error: {error}; then run the same command to continue")

    def agree(self, world: int) -> tuple[bool, bool, int]:
        """(save, time is up, exit code), the same on all ranks."""
        late = time.perf_counter() > self.end
        save, self.save = self.save, False
        requests = torch.tensor([save, late, self.exit_code])
        if world > 1:  # three numbers between CPUs, while the GPU works on the last step
            dist.all_reduce(requests, dist.ReduceOp.MAX)
        save, late, code = requests.tolist()
        return bool(save), bool(late), code


class Clock:
    """Time and images of the steps since the last log line, without validations and saves."""

    def __init__(self, it: int) -> None:
        self.intervals = 0
        self.start = it
        self.mark: tuple[int, float] | None = None
        self.pace: float | None = None  # seconds per step before the last log line
        self.begin, self.it = time.perf_counter(), it
        self.restart(it)

    def restart(self, it: int) -> None:
        seconds, steps = self.read(it)
        self.pace = seconds / steps if steps else None
        self.begin = time.perf_counter()
        self.it = it
        self.images = 0
        self.intervals += 1  # the first one compiles, and waits for workers to start

    def read(self, it: int) -> tuple[float, int]:
        """(seconds, steps)."""
        return time.perf_counter() - self.begin, it - self.it

    def left(self, it: int, total: int) -> str:
        """Time to the end, as 01:23:45."""
        seconds, steps = self.read(it)
        pace = self.pace if self.pace and steps < 20 else seconds / steps
        return tqdm.format_interval(pace * (total - it))

    def estimate(self, it: int, total: int, device: torch.device, log: Log) -> None:
        """After 20 steps, logs the time to the end, by the last ten: the first ones compile."""
        if it - self.start not in (10, 20):
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()
        if self.mark is None:
            self.mark = (it, now)
            return
        first, begin = self.mark
        left = (now - begin) / (it - first) * (total - it)
        log(f"about {tqdm.format_interval(left)} to the end")

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # steps that are queued are no pause
        begin = time.perf_counter()
        yield
        self.begin += time.perf_counter() - begin


# Entry


# Each of the three files has its own UserError, so that it works alone.
USER_ERRORS = (data.UserError, metrics.UserError, model.UserError)


def run(argv: list[str]) -> int:
    """main() with a sentence for what a user can correct. Anything else keeps its traceback."""
    try:
        return main(load_config(argv))
    except (*USER_ERRORS, OSError) as error:
        sentence = error
        if "temporary directory" in str(error):
            sentence = f"{error} (set TMPDIR to a folder that can be written)"
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        sentence = error
        if "shared memory" in str(error):
            sentence = f"{error} (--num_workers=0, or in Docker --shm-size=8g)"
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 1


def leave(code: int) -> None:
    """Ends the process. DDP keeps threads of gloo, which can abort a Python that is ending."""
    if dist.is_initialized():
        if code != 1:  # after an error, other ranks may be waiting for this one
            dist.destroy_process_group()
        atexit._run_exitfuncs()  # W&B's
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    escape_unprintable()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    leave(run(sys.argv[1:]))
