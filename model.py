"""SwinIR (Liang et al. 2021, https://arxiv.org/abs/2108.10257): the network, and everything to use one.

    python model.py net_g_best.pth photos/ restored/   # a file or a folder; see --help

    net = load("net_g_best.pth")                       # ours, official, BasicSR, KAIR: the file is enough
    output = restore(net, image)                       # (B, C, H, W) float in [0, 1], any size

Constructor arguments, state-dict keys, outputs and gradients are those of the authors' network
(https://github.com/JingyunLiang/SwinIR, models/network_swinir.py), so weights go both ways.

Shapes: B batch, H W image, C channels, L = H*W tokens, h heads, d = C/h, n = L/N windows of w x w = N tokens.
"""

from __future__ import annotations

import argparse
import os
import re
import struct
import sys
import warnings
import zlib
from collections import Counter, OrderedDict
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import repeat
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# ---- geometry: where a token stands ----


@lru_cache(maxsize=4)
def geometry(H: int, W: int, w: int, shift: int, device: Any = "cpu") -> dict:
    """What the blocks must know of a padded size.

    [a, b]: two (L,) permutations that gather tokens from order a into order b, and back. Orders are "raster",
    0 and `shift`: windows of an image rolled by so much. "mask", if shifted: (n, N, N), 0, or -100 (published
    so, not -inf) between tokens that only the roll made neighbours.
    """

    def windows(x: Tensor) -> Tensor:
        return x.view(H // w, w, W // w, w).transpose(1, 2).reshape(-1)

    with torch.inference_mode(False):  # cached, so it must also be fit for training
        raster = torch.arange(H * W, device=device).view(H, W)
        order: dict = {s: windows(raster.roll((-s, -s), (0, 1))) for s in (0, shift)}
        order["raster"] = raster.flatten()
        place = {a: index.argsort() for a, index in order.items()}
        pairs = ("raster", 0), (0, shift), (shift, "raster")
        g: dict = {(a, b): (place[a][order[b]], place[b][order[a]]) for a, b in pairs}
        g |= {(b, a): (back, to) for (a, b), (to, back) in g.items()}
        if shift:
            y, x = torch.arange(H, device=device)[:, None], torch.arange(W, device=device)
            region = 3 * ((y >= H - w).long() + (y >= H - shift)) + (x >= W - w).long() + (x >= W - shift)
            region = windows(region).view(-1, w * w)
            g["mask"] = (region[:, None, :] != region[:, :, None]) * -100.0
        return g | {"size": (H, W)}


class Reorder(torch.autograd.Function):
    """x[:, index] for a permutation: its gradient is a gather by the inverse, much faster than index_add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, ctx.saved_tensors[0]), None, None


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, L, C): no copy, where the convolution kept channels last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def grid(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, L, C) to (B, C, H, W), channels last in memory: no copy."""
    return x.unflatten(1, size).permute(0, 3, 1, 2)


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Reflects (B, C, H, W) at the right and bottom up to multiples, smaller images more than once."""
    for dim in (2, 3):
        n = x.shape[dim]
        if n % multiple:
            i = torch.arange(n + -n % multiple, device=x.device) % max(2 * n - 2, 1)
            x = x.index_select(dim, torch.minimum(i, (2 * n - 2 - i).abs()))
    return x


# ---- the network ----

conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)
BUFFERS = ("attn_mask", "relative_position_index")


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of N tokens, with a learned bias per relative position and head."""

    def __init__(self, dim, window, heads, qkv_bias, qk_scale, attn_drop, drop) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, qk_scale or (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
        row = (y[:, None] - y + window - 1) * (2 * window - 1) + (x[:, None] - x + window - 1)
        self.register_buffer("relative_position_index", row)  # (N, N), of the bias table
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, L, C = x.shape
        N, h = self.window**2, self.heads
        q, k, v = self.qkv(x).view(-1, N, 3, h, C // h).permute(2, 0, 3, 1, 4)  # each (B*n, h, N, d)
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table)  # (N, N, h)
        attn = (q * self.scale) @ k.transpose(-2, -1) + bias.permute(2, 0, 1)
        if mask is not None:
            attn = (attn.view(B, -1, h, N, N) + mask[:, None]).view(-1, h, N, N)
        x = self.attn_drop(attn.softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, L, C)))


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Tokens stay in window order: only attention cares."""

    def __init__(self, norm_layer, dim, hidden, attn, shift, mask, drop, drop_path) -> None:
        super().__init__()
        self.shift = shift
        self.register_buffer("attn_mask", mask)  # of the training size, for the official class; unused here
        self.register_buffer("keep", torch.tensor(1.0 - drop_path), persistent=False)
        self.norm1, self.attn, self.norm2 = norm_layer(dim), attn, norm_layer(dim)
        mlp = {"fc1": nn.Linear(dim, hidden), "act": nn.GELU(), "drop1": nn.Dropout(drop)}
        self.mlp = nn.Sequential(OrderedDict(mlp, fc2=nn.Linear(hidden, dim), drop2=nn.Dropout(drop)))

    def drop_path(self, x: Tensor) -> Tensor:
        """Stochastic depth: drops a sample's branch. As a tensor, `keep` lets compiled blocks share code."""
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class RSTB(nn.Module):
    """Residual Swin Transformer block: Swin blocks with shifts 0, w/2, 0, w/2..., a convolution, a skip.

    One gather of the tokens between two blocks, none inside them.
    """

    def __init__(self, blocks: list[SwinBlock], conv: nn.Module, use_checkpoint: bool) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv, self.use_checkpoint = conv, use_checkpoint

    def forward(self, x: Tensor, geometry: dict) -> Tensor:
        skip, order = x, "raster"
        for block in self.residual_group["blocks"]:
            if order != block.shift:
                x = Reorder.apply(x, *geometry[order, block.shift])
            order, mask = block.shift, geometry["mask"] if block.shift else None
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            elif torch.is_grad_enabled() or torch.compiler.is_compiling():
                x = block(x, mask)
            else:  # some windows at a time: a third of the memory, and quicker as the CPU's cache holds them
                N = block.attn.window**2
                some = (4096 if x.device.type == "cpu" else 65536) // N
                masks = repeat(None) if mask is None else mask.split(some)
                for part, m in zip(x.split(some * N, 1), masks, strict=False):
                    part.copy_(block(part, m))
        x = Reorder.apply(x, *geometry[order, "raster"])
        return skip + tokens(self.conv(grid(x, geometry["size"])))


def body_conv(dim: int, resi_connection: str) -> nn.Module:
    if resi_connection == "1conv":
        return conv3(dim, dim)
    if resi_connection != "3conv":
        raise ValueError(f"resi_connection {resi_connection!r} is unknown: use '1conv' or '3conv'")
    act1, act2 = nn.LeakyReLU(0.2, inplace=True), nn.LeakyReLU(0.2, inplace=True)
    return nn.Sequential(
        conv3(dim, dim // 4), act1, nn.Conv2d(dim // 4, dim // 4, 1), act2, conv3(dim // 4, dim)
    )


def keep_buffers(net: SwinIR, state_dict: dict, prefix: str, *_: Any) -> None:
    """On loading: buffers follow from the arguments, so files may lack them or have another img_size's."""
    for k in [k for k in state_dict if k.endswith(BUFFERS)]:
        del state_dict[k]
    state_dict.update({prefix + k: v for k, v in net.state_dict().items() if k.endswith(BUFFERS)})


class SwinIR(nn.Module):
    """The authors' network, with their argument names and defaults.

    `upsampler`: '' (denoising, JPEG), 'pixelshuffle' (classical SR, upscale 3 or a power of 2),
    'pixelshuffledirect' (lightweight SR), 'nearest+conv' (real-world SR, upscale 2 or 4).
    `img_size`, the training size (int or (H, W)), fixes only the attn_mask in the state dict, the size of the
    absolute position embedding (`ape`), and that windows not smaller than it are not shifted.

    forward: (B, in_chans, H, W) in [0, 1], any H and W from 1 on, to (B, in_chans, H*upscale, W*upscale).
    """

    def __init__(
        self, img_size=64, patch_size=1, in_chans=3, embed_dim=96, depths=(6, 6, 6, 6),
        num_heads=(6, 6, 6, 6), window_size=7, mlp_ratio=4.0, qkv_bias=True, qk_scale=None,
        drop_rate=0.0, attn_drop_rate=0.0, drop_path_rate=0.1, norm_layer=nn.LayerNorm, ape=False,
        patch_norm=True, use_checkpoint=False, upscale=2, img_range=1.0, upsampler="",
        resi_connection="1conv",
    ) -> None:  # fmt: skip
        arguments = {k: v for k, v in locals().items() if k not in ("self", "norm_layer", "__class__")}
        self.arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in arguments.items()}
        super().__init__()
        if len(depths) != len(num_heads) or any(embed_dim % h for h in num_heads):
            raise ValueError(f"num_heads {num_heads}: one for each of depths {depths}, dividing {embed_dim=}")
        self.upscale, self.img_range, self.upsampler = upscale, img_range, upsampler or ""
        power, known = upscale & (upscale - 1) == 0, {"": True, "pixelshuffledirect": True}
        known |= {"pixelshuffle": upscale == 3 or power, "nearest+conv": upscale in (2, 4)}
        if not known.get(self.upsampler):
            raise ValueError(f"upsampler {upsampler!r} with {upscale=} is unknown: see SwinIR's docstring")
        mean = (0.4488, 0.4371, 0.4040) if in_chans == 3 else (0.0,)  # DIV2K's mean colour
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        H, W = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
        H, W = H // patch_size, W // patch_size
        self.window_size, self.window = window_size, min(window_size, H, W)
        self.shift = self.window // 2 if min(H, W) > window_size else 0
        if self.shift and (H % window_size or W % window_size):
            raise ValueError(f"img_size {img_size} must be a multiple of window_size {window_size}")
        self.register_load_state_dict_pre_hook(keep_buffers)

        # 1. shallow features
        self.conv_first = conv3(in_chans, embed_dim)

        # 2. deep features
        self.ape_size = (H, W) if ape else None
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, H * W, embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.patch_embed = nn.Sequential(OrderedDict({"norm": norm_layer(embed_dim)} if patch_norm else {}))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        mask = geometry(H, W, self.window, self.shift)["mask"] if self.shift else None
        self.layers = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = []
            for i in range(depth):
                attn = (embed_dim, self.window, heads, qkv_bias, qk_scale, attn_drop_rate, drop_rate)
                swin = (norm_layer, embed_dim, int(embed_dim * mlp_ratio), WindowAttention(*attn))
                shift = (self.shift, mask) if i % 2 else (0, None)
                blocks.append(SwinBlock(*swin, *shift, drop_rate, next(rates)))
            self.layers.append(RSTB(blocks, body_conv(embed_dim, resi_connection), use_checkpoint))
        self.norm = norm_layer(embed_dim)
        self.conv_after_body = body_conv(embed_dim, resi_connection)

        # 3. reconstruction
        features = embed_dim
        if self.upsampler in ("pixelshuffle", "nearest+conv"):
            features = 64
            self.conv_before_upsample = nn.Sequential(conv3(embed_dim, 64), nn.LeakyReLU(inplace=True))
        if self.upsampler == "pixelshuffle":
            steps = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
            shuffles = [m for s in steps for m in (conv3(64, 64 * s * s), nn.PixelShuffle(s))]
            self.upsample = nn.Sequential(*shuffles)
        elif self.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(conv3(embed_dim, upscale**2 * in_chans), nn.PixelShuffle(upscale))
        elif self.upsampler == "nearest+conv":
            for name in (*("conv_up1", "conv_up2")[: upscale // 2], "conv_hr"):
                self.add_module(name, conv3(64, 64))
        if self.upsampler != "pixelshuffledirect":
            self.conv_last = conv3(features, in_chans)

        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def body(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; H and W are multiples of the window."""
        H, W = x.shape[2:]
        g = geometry(H, W, self.window, self.shift, x.device)
        x = self.patch_embed(tokens(x))
        if self.ape_size:
            ape = grid(self.absolute_pos_embed, self.ape_size)
            x = x + tokens(ape if (H, W) == self.ape_size else F.interpolate(ape, (H, W), mode="bicubic"))
        x = self.pos_drop(x)
        for layer in self.layers:
            x = layer(x, g)
        return grid(self.norm(x), (H, W))

    def forward(self, x: Tensor) -> Tensor:
        (H, W), mean = x.shape[2:], self.mean.to(x.dtype)
        x = (pad_to_multiple(x, self.window_size) - mean) * self.img_range
        first = self.conv_first(x)
        y = self.conv_after_body(self.body(first)) + first
        if self.upsampler == "pixelshuffle":
            y = self.conv_last(self.upsample(self.conv_before_upsample(y)))
        elif self.upsampler == "pixelshuffledirect":
            y = self.upsample(y)
        elif self.upsampler == "nearest+conv":
            y = self.conv_before_upsample(y)
            for name in ("conv_up1", "conv_up2")[: self.upscale // 2]:
                y = F.leaky_relu(getattr(self, name)(F.interpolate(y, scale_factor=2)), 0.2)
            y = self.conv_last(F.leaky_relu(self.conv_hr(y), 0.2))
        else:
            y = x + self.conv_last(y)
        return (y / self.img_range + mean)[:, :, : H * self.upscale, : W * self.upscale]


# ---- weights ----

shared: dict = {}  # small buffers by content, so that a file holds one copy for all blocks


def portable(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy to save: contiguous CPU tensors under plain keys, the buffers in int8 and int16, and shared.

    Strict loading works in the official class, BasicSR's and spandrel's: they copy into their own buffers.
    """
    out = {re.sub(PREFIX, "", k): v.detach().cpu() for k, v in state_dict.items()}
    for k, v in out.items():
        if k.endswith(BUFFERS):
            v = v.to(torch.int8 if k.endswith("mask") else torch.int16)
            out[k] = shared.setdefault((v.shape, v.numpy().tobytes()), v)
        else:
            out[k] = v.clone(memory_format=torch.contiguous_format)
    return out


PREFIX = r"^((module|_orig_mod)\.)+"  # of DataParallel and torch.compile


def read_weights(path: str | Path, param_key: str) -> tuple[dict[str, Tensor], dict]:
    """(state dict, arguments or {}) of any checkpoint, unwrapped. Runs no code of the file; ValueError."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
        keys = (param_key, "params_ema", "params-ema", "params", "state_dict", "model_state_dict")
        weights = next((file[k] for k in keys if isinstance(file.get(k), dict)), file)
        weights = {re.sub(PREFIX, "", k): v for k, v in weights.items() if isinstance(v, Tensor)}
        arguments = file.get("arguments", {})
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from e
    except Exception as e:  # unpickling a damaged file raises anything
        why = "it is damaged, or holds more than tensors and plain values and could run code; get it again"
        raise ValueError(f"{path}: refused as a checkpoint: {why}, or save its state_dict alone") from e
    if "conv_first.weight" not in weights:
        raise ValueError(f"{path}: holds no SwinIR weights: conv_first.weight is missing")
    return weights, arguments if isinstance(arguments, dict) else {}


def load(path: str | Path, param_key: str = "params_ema", device: Any = "cpu") -> SwinIR:
    """The network in a file (ours, official, BasicSR, KAIR), in eval mode; ValueError says what is wrong.

    Most arguments are read off the tensors' shapes, the others taken from the file or from custom.
    """
    weights, stated = read_weights(path, param_key)
    try:
        block = "layers.{}.residual_group.blocks.{}."
        layers = Counter(re.findall(r"^layers\.(\d+)\..*\.norm1\.weight$", "\n".join(weights), re.M))
        tables = [weights[block.format(i, 0) + "attn.relative_position_bias_table"].shape for i in layers]
        dim, chans = weights["conv_first.weight"].shape[:2]
        shuffled = 64 if "conv_last.weight" in weights else chans
        shuffles = [isqrt(len(v) // shuffled) for k, v in weights.items() if re.match(r"upsample.*weight", k)]
        ups = len({"conv_up1.weight", "conv_up2.weight"} & weights.keys())
        wide = "conv_before_upsample.0.weight" in weights
        heads = ("", "pixelshuffledirect", "pixelshuffle", "nearest+conv")
        certain = {
            "in_chans": chans, "embed_dim": dim, "depths": list(layers.values()),
            "num_heads": [t[1] for t in tables], "qkv_bias": block.format(0, 0) + "attn.qkv.bias" in weights,
            "ape": "absolute_pos_embed" in weights, "patch_norm": "patch_embed.norm.weight" in weights,
            "upscale": 2**ups * prod(shuffles), "upsampler": heads[3 if ups else bool(shuffles) + wide],
            "resi_connection": "1conv" if "conv_after_body.weight" in weights else "3conv",
        }  # fmt: skip
        window, hidden = (isqrt(tables[0][0]) + 1) // 2, len(weights[block.format(0, 0) + "mlp.fc1.bias"])
        n = len(weights.get(block.format(0, 1) + "attn_mask", range((64 // window) ** 2)))
        size = isqrt(weights["absolute_pos_embed"].shape[1]) if certain["ape"] else isqrt(n) * window
        ratio = hidden / dim if int(hidden / dim * dim) == hidden else (hidden + 0.5) / dim
        likely = {"img_size": size, "window_size": window, "mlp_ratio": ratio}
        likely["img_range"] = 255.0 if window == 7 else 1.0  # only the JPEG networks; spandrel's convention
        net = SwinIR(**likely | stated | certain)
        net.load_state_dict(weights)
    except (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{path}: not a SwinIR known here: {' '.join(str(e).split())[:300]}") from e
    return net.to(device).eval()


def load_weights(net: SwinIR, path: str | Path, param_key: str = "params_ema", strict: bool = True) -> str:
    """Copies a file's tensors into `net`; says how many were taken, and which were left (strict=False only).

    Those are left that are missing or of another shape. ValueError: none taken, or strict and some left.
    """
    weights, own = read_weights(path, param_key)[0], dict(net.named_parameters())
    taken = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    left = [k for k in own | weights if k not in taken and not k.endswith(BUFFERS)]
    names = ", ".join(left[:5]) + f" and {len(left) - 5} more" * (len(left) > 5)
    if not taken or (strict and left):
        raise ValueError(f"{path}: {len(taken)} of {len(own)} tensors fit, but not {names}")
    net.load_state_dict(taken, strict=False)
    return f"{len(taken)} of {len(own)} tensors taken" + (f"; left: {names}" if left else "")


# ---- images ----


def blend(out: Tensor, part: Tensor, start: int, lap: int, dim: int) -> None:
    """Writes a tile into `out` from `start` on; fades, steeply but never to 0, over the last one's `lap`."""
    if start and lap:
        t = (torch.arange(lap, device=out.device, dtype=out.dtype) + 0.5) / lap
        fade = (t**8 / (t**8 + (1 - t) ** 8)).view(-1, *[1] * (3 - dim))
        out.narrow(dim, start, lap).lerp_(part.narrow(dim, 0, lap), fade)
        start, part = start + lap, part.narrow(dim, lap, part.shape[dim] - lap)
    out.narrow(dim, start, part.shape[dim]).copy_(part)


@torch.no_grad()
def restore(net: SwinIR, image: Tensor, tile: int | None = None, overlap=32, ensemble=False) -> Tensor:
    """The network's output for a float image (B, C, H, W) in [0, 1] of any size, on the image's device.

    tile, overlap: input pixels. Tiles stand on the window grid, at most two overlapping; without `tile`, and
    where it is too large for the memory, they are as large as fits. ensemble: mean of the 8 symmetries.
    """
    if (tile is not None and tile < 1) or overlap < 0:
        raise ValueError(f"tile {tile} must be positive, and overlap {overlap} not negative")
    device, w, s = net.mean.device, net.window_size, net.upscale if net.upsampler else 1
    (B, C, H, W), dim = image.shape, net.arguments["embed_dim"]
    free = 0.7 * torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1.2e9  # bytes
    head = 3 * 64 if hasattr(net, "conv_before_upsample") else 2 * C  # channels at the output's size
    pixels = int(free / 4 / B / (4 * dim + 4 * w * w + 64 + head * s * s))  # floats per pixel, as measured
    limit = max(H, W) if H * W <= pixels else isqrt(pixels)
    size = max(min(tile or limit, limit) + w - 1, w) // w * w
    while True:
        lap = min(overlap, size // 2) // w * w
        try:
            out = image.new_empty(B, C, H * s, W * s)
            for y in range(0, max(H - lap, 1), size - lap):
                strip = image.new_empty(B, C, min(size, H - y) * s, W * s)
                for x in range(0, max(W - lap, 1), size - lap):
                    part, mean = image[..., y : y + size, x : x + size].to(device), 0
                    for k in range(8 if ensemble else 1):
                        turned = net((part.flip(3) if k > 3 else part).rot90(k, (2, 3))).rot90(-k, (2, 3))
                        mean = mean + ((turned.flip(3) if k > 3 else turned) - mean) / (k + 1)
                    blend(strip, mean.to(image), x * s, lap * s, 3)
                blend(out, strip, y * s, lap * s, 2)
            return out
        except RuntimeError as e:
            if size == w or not (isinstance(e, torch.OutOfMemoryError) or "out of memory" in str(e)):
                raise
        size = size // 2 // w * w
        warnings.warn(f"out of memory: going on with tiles of {size} pixels", stacklevel=3)


def read(path: Path) -> np.ndarray:
    """An image file as (H, W, C) uint8 or uint16, upright: C is 1 gray, 2 gray alpha, 3 RGB, 4 RGB alpha."""
    with Image.open(path) as im, Image.open(path) as low:
        raw = im.tile[0].args if im.tile else ""
        raw = raw if isinstance(raw, str) else str(raw[0])
        if im.mode in ("RGB", "RGBA") and ";16" in raw:
            # Pillow keeps the high bytes only: decode again as if the bytes came in the other order
            other = "RGBA" if raw == "LA;16B" else raw[:-1] + ("L" if raw[-1] == "B" else "B")
            args = other if isinstance(im.tile[0].args, str) else (other, *im.tile[0].args[1:])
            low.tile = [t._replace(args=args) for t in low.tile]
            high, low = (np.asarray(ImageOps.exif_transpose(i)).astype(np.uint16) for i in (im, low))
            return low[..., ::2] << 8 | low[..., 1::2] if other == "RGBA" else high << 8 | low
        deep = im.mode[0] == "I"
        if im.mode == "F" or (";16" in raw and not deep) or (deep and max(map(abs, im.getextrema())) >> 16):
            raise ValueError(f"can't be read exactly (mode {im.mode}, {raw}): convert it to 16-bit RGB first")
        mode = ("L" if im.mode in ("1", "L", "LA") else "RGB") + "A" * im.has_transparency_data
        im = ImageOps.exif_transpose(im)
        pixels = np.asarray(im).astype(np.uint16) if deep else np.asarray(im.convert(mode))
        return pixels[..., None] if pixels.ndim == 2 else pixels


def write_png(path: Path, pixels: np.ndarray) -> None:
    """(H, W, C) uint8 or uint16 as from `read`; Pillow writes no 16-bit colour."""
    H, W, C = pixels.shape
    rows = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(H, -1)
    up = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # PNG's filter 2: minus the row above
    header = struct.pack(">2I5B", W, H, 8 * pixels.itemsize, {1: 0, 2: 4, 3: 2, 4: 6}[C], 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in (b"IHDR", header), (b"IDAT", zlib.compress(np.insert(up, 0, 2, 1), 4)), (b"IEND", b""):
        data += struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def restore_pixels(net: SwinIR, pixels: np.ndarray, *options: Any) -> np.ndarray:
    """`restore` for the arrays of `read`: gray and colour through any network; alpha is only resized."""
    c, top = (1, 1, 3, 3)[pixels.shape[2] - 1], int(np.iinfo(pixels.dtype).max)
    x = torch.from_numpy(pixels.astype(np.float32)).div_(top).permute(2, 0, 1)[None]
    gray = net.conv_first.in_channels == 1
    y = restore(net, x[:, :c].transpose(0, 1) if gray else x[:, :c].expand(-1, 3, -1, -1), *options)
    y = y.transpose(0, 1) if gray else y.mean(1, keepdim=True) if c == 1 else y
    if pixels.shape[2] > c:
        y = torch.cat([y, F.interpolate(x[:, c:], y.shape[2:], mode="bicubic")], 1)
    return y.clamp_(0, 1).mul_(top).round_()[0].permute(1, 2, 0).numpy().astype(pixels.dtype)


# ---- the command ----


def export_onnx(net: SwinIR, path: Path) -> str:
    """Writes opset 18 with dynamic batch, height and width; says how it compares with PyTorch."""
    if find_spec("onnx") is None:
        raise ValueError("--onnx needs a package that is missing: pip install onnx onnxruntime")
    w, C = net.window_size, net.conv_first.in_channels
    names = {"input_names": ["input"], "output_names": ["output"], "opset_version": 18, "dynamo": False}
    axes = {n: {0: "batch", 2: f"{n}_height", 3: f"{n}_width"} for n in ("input", "output")}
    with warnings.catch_warnings(action="ignore"), torch.enable_grad():  # sizes stay dynamic all the same
        torch.onnx.export(net, (torch.rand(1, C, w + 1, 2 * w + 3),), path, dynamic_axes=axes, **names)
    if find_spec("onnxruntime") is None:
        return "opset 18, any size; not compared with PyTorch, as onnxruntime is not installed"
    from onnxruntime import InferenceSession

    xs, session = (
        [torch.rand(1, C, 3 * w, 4 * w), torch.rand(2, C, 5 * w + 3, 2 * w - 1)],
        InferenceSession(path),
    )
    worst = max(abs(session.run(None, {"input": x.numpy()})[0] - restore(net, x).numpy()).max() for x in xs)
    if not worst < 1e-3:
        raise ValueError(f"{path}: not fit for use: ONNX and PyTorch differ by {worst:.1e}")
    return f"opset 18, any size, within {worst:.1e} of PyTorch at two sizes"


def jobs(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """(input, output) files; of inputs that differ by suffix only, the outputs keep it before the .png."""
    if not source.is_dir():
        target = target if target.suffix.lower() == ".png" else target / f"{source.stem}.png"
        if target.resolve() == source.resolve():
            raise ValueError(f"{target}: the output would overwrite the input")
        return [(source, target)]
    if source.resolve() in (target.resolve(), *target.resolve().parents):
        raise ValueError(f"{target}: the output must not lie in the input folder")
    found = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in KINDS]
    found = [q for q in (p.relative_to(source) for p in found) if not re.search(r"(^|[\\/])\.", str(q))]
    if not found:
        raise ValueError(f"{source}: holds no images")
    same = Counter(str(p.with_suffix("")).lower() for p in found)
    tails = [p.suffix * (same[str(p.with_suffix("")).lower()] > 1) + ".png" for p in found]
    return [(source / p, target / p.with_suffix(tail)) for p, tail in zip(found, tails, strict=True)]


KINDS = (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def main() -> int:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    cli = argparse.ArgumentParser(description="Restores an image, or all in a folder, to PNG.")
    cli.add_argument("net", help="a SwinIR checkpoint: ours, official, BasicSR, KAIR")
    cli.add_argument("input", nargs="?", type=Path, help="an image or a folder")
    cli.add_argument("output", nargs="?", type=Path, help="a .png file or a folder")
    cli.add_argument(
        "--tile", type=int, help="input pixels (default: the whole image, or what memory allows)"
    )
    cli.add_argument("--overlap", type=int, default=32, help="of tiles, in input pixels (default: 32)")
    cli.add_argument("--ensemble", action="store_true", help="mean of the eight symmetries: 8 times as slow")
    cli.add_argument("--device", default=best, help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    cli.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster, a little less exact")
    cli.add_argument("--onnx", type=Path, metavar="FILE", help="write the network as ONNX instead")
    args, failed = cli.parse_args(), 0
    try:
        if args.onnx:
            print(f"{args.onnx}: {export_onnx(load(args.net), args.onnx)}")
        elif not args.output:
            cli.error("say what to restore and where to: NET INPUT OUTPUT")
        else:
            net = load(args.net, device=args.device)
            for source, target in tqdm(jobs(args.input, args.output), unit="image"):
                try:
                    with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16):
                        y = restore_pixels(net, read(source), args.tile, args.overlap, args.ensemble)
                    write_png(target, y)
                except Exception as e:  # Pillow raises anything for a broken file
                    failed = 1
                    tqdm.write(f"{source}: {e or type(e).__name__}", file=sys.stderr)
    except (ValueError, RuntimeError, AssertionError) as e:
        sys.exit(f"model.py: {e}")
    except KeyboardInterrupt:
        sys.exit("model.py: stopped")
    return failed


if __name__ == "__main__":
    sys.exit(main())
