"""SwinIR (Liang et al. 2021, https://arxiv.org/abs/2108.10257), and everything to use a network.

    python model.py experiments/mine photo.jpg                  # to photo_restored.png; see --help
    python model.py net_g_best.pth photos/ restored/ --format=jpg
    python model.py experiments/mine --export mine.safetensors  # or mine.onnx, to publish it

    net = load("net_g_best.pth")
    output = restore(net, image)               # (B, in_chans, H, W) float in [0, 1], any size

Arguments, defaults, state-dict keys, outputs and gradients are those of the authors' network
(https://github.com/JingyunLiang/SwinIR, models/network_swinir.py), so weights go both ways. Only
the initial weights differ: see `initialize`.

Shapes: B images, C channels of the features, H x W pixels, n windows of N = window * window tokens,
h heads of d = C / h channels. A token is a pixel of the features. Images have in_chans channels.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shlex
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import isqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import spectral_norm
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


class UserError(ValueError):  # as in data.py and metrics.py, so that each works alone
    """A mistake that the user can correct. The message is one sentence that says how."""


# The network


class SwinIR(nn.Module):
    """Shallow features (a convolution), deep features (RSTBs), reconstruction.

    Args:
        img_size: Training size in pixels, a number or (H, W). It sets the shape of the attention
            masks in the state dict, and of the position embedding if `ape`. Windows are shifted
            only if both sides are larger than a window.
        patch_size: Only divides img_size, as in the authors' network. 1 in all published ones.
        embed_dim: Channels of the features, C.
        depths, num_heads: Blocks and attention heads of each RSTB.
        upscale: Output pixels per input pixel, along each side.
        img_range: The network computes on images in [0, img_range]; input and output are in [0, 1].
        upsampler: "" (denoising, JPEG artefacts), "pixelshuffle" (classical super-resolution),
            "pixelshuffledirect" (lightweight), or "nearest+conv" (real-world).
        resi_connection: "1conv" or "3conv", the convolution at the end of each RSTB.
        init_std: Standard deviation of the initial weights of linear layers (not in the
            authors' network, which has 0.02).
        attention: How attention is computed, a name in ATTENTION (not in the authors' network).
            It changes speed and memory, not the weights.

    `forward` takes (B, in_chans, H, W) of any size and returns (B, in_chans, H * factor,
    W * factor): factor is upscale, or 1 without an upsampler. Raises UserError for arguments that
    do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 64,
        patch_size: int = 1,
        in_chans: int = 3,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (6, 6, 6, 6),
        num_heads: tuple[int, ...] = (6, 6, 6, 6),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_layer: Any = nn.LayerNorm,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        upscale: int = 2,
        img_range: float = 1.0,
        upsampler: str = "",
        resi_connection: str = "1conv",
        init_std: float = 0.02,
        attention: str = "math",
    ) -> None:
        upsampler = upsampler or ""  # the authors allow None
        arguments = plain_values(locals())  # first, while there are no other locals
        super().__init__()
        check_arguments(embed_dim, depths, num_heads, upscale, upsampler, resi_connection)
        if attention not in ATTENTION:
            raise UserError(f"attention {attention!r} is unknown; there are {', '.join(ATTENTION)}")
        # The window and the shift depend on img_size, as in the authors' network, not on the image
        # that `forward` gets.
        height, width = training_size(img_size, patch_size)
        self.window = min(window_size, height, width)
        self.shift = self.window // 2 if min(height, width) > window_size else 0
        self.img_range = img_range
        self.upsampler = upsampler
        self.register_buffer("mean", mean_colour(in_chans), persistent=False)

        # What others ask of a network: see NETWORKS.
        self.arguments = arguments
        self.in_chans = in_chans
        self.factor = upscale if upsampler else 1
        self.multiple = self.window
        self.floats_per_pixel = inference_floats(
            in_chans, embed_dim, window_size, self.factor, upsampler
        )
        self.training_floats_per_pixel = training_floats(embed_dim, depths, num_heads, self.window)

        mask = official_attn_mask(height, width, self.window, self.shift)

        # 1. Shallow features
        self.conv_first = conv3x3(in_chans, embed_dim)

        # 2. Deep features
        self.patch_embed = nn.Sequential()  # a norm only, under the authors' key
        if patch_norm:
            self.patch_embed.add_module("norm", norm_layer(embed_dim))
        self.embedding_size = (height, width)
        self.absolute_pos_embed = position_embedding(height * width, embed_dim) if ape else None
        self.pos_drop = nn.Dropout(drop_rate)

        # Stochastic depth: the rate grows linearly from 0 at the first block.
        total = sum(depths)
        rates = [drop_path_rate * i / max(total - 1, 1) for i in range(total)]
        swin_block = partial(
            SwinBlock,
            dim=embed_dim,
            window=self.window,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=norm_layer,
            attention=attention,
        )
        self.layers = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = []
            for i in range(depth):
                rate = rates.pop(0)
                if i % 2 == 0:
                    block = swin_block(heads=heads, shift=0, drop_path=rate, mask=None)
                else:
                    block = swin_block(heads=heads, shift=self.shift, drop_path=rate, mask=mask)
                blocks.append(block)
            self.layers.append(RSTB(blocks, body_conv(embed_dim, resi_connection), use_checkpoint))
        self.norm = norm_layer(embed_dim)
        self.conv_after_body = body_conv(embed_dim, resi_connection)

        # 3. Reconstruction
        self.make_head(in_chans, embed_dim, upscale, upsampler)
        self.initialize(init_std)
        self.register_load_state_dict_pre_hook(keep_own_buffers)

    def make_head(self, in_chans: int, embed_dim: int, upscale: int, upsampler: str) -> None:
        features = 64
        if upsampler == "pixelshuffle":  # classical super-resolution
            self.conv_before_upsample = conv_and_activation(embed_dim, features)
            self.upsample = pixel_shuffle_steps(features, upscale)
            self.conv_last = conv3x3(features, in_chans)
        elif upsampler == "pixelshuffledirect":  # lightweight super-resolution, to save parameters
            conv = conv3x3(embed_dim, upscale**2 * in_chans)
            self.upsample = nn.Sequential(conv, nn.PixelShuffle(upscale))
        elif upsampler == "nearest+conv":  # real-world super-resolution, to avoid artefacts
            self.conv_before_upsample = conv_and_activation(embed_dim, features)
            self.conv_up1 = conv3x3(features, features)
            if upscale == 4:
                self.conv_up2 = conv3x3(features, features)
            self.conv_hr = conv3x3(features, features)
            self.conv_last = conv3x3(features, in_chans)
        else:  # denoising and JPEG artefact removal
            self.conv_last = conv3x3(embed_dim, in_chans)

    def initialize(self, init_std: float) -> None:
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.upsampler == "":
            # Training starts at the identity, which gains tenths of a dB in short runs.
            nn.init.zeros_(self.conv_last.weight)
            nn.init.zeros_(self.conv_last.bias)

    def forward(self, x: Tensor) -> Tensor:  # (B, in_chans, H, W)
        height, width = x.shape[2:]
        mean = self.mean.to(x.dtype)
        x = pad_to_multiple(x, self.multiple)
        x = (x - mean) * self.img_range

        shallow = self.conv_first(x)  # (B, C, H, W)
        deep = self.conv_after_body(self.forward_features(shallow)) + shallow
        if self.upsampler == "":
            y = x + self.conv_last(deep)
        else:
            y = self.reconstruct(deep)

        y = y / self.img_range + mean
        return y[:, :, : height * self.factor, : width * self.factor]

    def forward_features(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        H, W = x.shape[2:]
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C)
        # The residual stream has the weights' type: with autocast, conv_first returns bfloat16.
        x = x.to(self.conv_first.weight.dtype)
        x = self.patch_embed(x)
        if self.absolute_pos_embed is not None:
            x = x + self.embedding_at(H, W)
        x = self.pos_drop(x)
        regions = None
        if self.shift:
            regions = window_regions(H, W, self.shift, x.device)  # (H, W)
        for layer in self.layers:
            x = layer(x, regions)
        return self.norm(x).permute(0, 3, 1, 2)

    def embedding_at(self, H: int, W: int) -> Tensor:  # (1, H, W, C)
        """The learned embedding, resized if the image is not of the training size."""
        embedding = self.absolute_pos_embed.unflatten(1, self.embedding_size).permute(0, 3, 1, 2)
        return F.interpolate(embedding, (H, W), mode="bicubic").permute(0, 2, 3, 1)

    def reconstruct(self, y: Tensor) -> Tensor:  # (B, C, H, W) -> (B, in_chans, H * upscale, ...)
        if self.upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(self.conv_before_upsample(y)))
        if self.upsampler == "pixelshuffledirect":
            return self.upsample(y)
        y = self.conv_before_upsample(y)
        y = F.interpolate(y, scale_factor=2, mode="nearest")
        y = F.leaky_relu(self.conv_up1(y), 0.2)
        if self.factor == 4:
            y = F.interpolate(y, scale_factor=2, mode="nearest")
            y = F.leaky_relu(self.conv_up2(y), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(y), 0.2))


class RSTB(nn.Module):
    """Residual Swin Transformer block: Swin blocks, a convolution, and a skip connection.
    Every second block has shifted windows."""

    def __init__(self, blocks: list["SwinBlock"], conv: nn.Module, use_checkpoint: bool) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv = conv
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor, regions: Tensor | None) -> Tensor:  # (B, H, W, C)
        skip = x
        for block in self.residual_group["blocks"]:
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, regions, use_reentrant=False)
            else:
                x = block(x, regions)
        x = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return skip + x


class SwinBlock(nn.Module):
    """Attention inside windows, then an MLP on each token, both with a norm and a skip connection.

    All of it works on each window alone, so the windows are cut out once. With a shift, the image
    is rolled first, so that these windows straddle the borders of the others.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: int,
        shift: int,
        mlp_ratio: float,
        qkv_bias: bool,
        qk_scale: float | None,
        drop: float,
        attn_drop: float,
        drop_path: float,
        norm_layer: Any,
        attention: str,
        mask: Tensor | None,  # not used: see official_attn_mask
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.register_buffer("attn_mask", mask)
        self.norm1 = norm_layer(dim)
        self.attn = WindowAttention(
            dim, window, heads, qkv_bias, qk_scale, attn_drop, drop, attention
        )
        self.skip = StochasticDepth(drop_path)
        self.norm2 = norm_layer(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, regions: Tensor | None) -> Tensor:  # (B, H, W, C), (H, W)
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        else:
            regions = None
        # Backward needs all activations anyway, so parts would save nothing. The ONNX export is
        # traced with gradients, too: a loop over parts would fix the image size.
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            x = self.transform(x, regions)
        else:
            x = self.transform_in_parts(x, regions)
        if self.shift:
            x = x.roll((self.shift, self.shift), (1, 2))
        return x

    def transform(self, x: Tensor, regions: Tensor | None) -> Tensor:  # (B, H, W, C)
        H, W = x.shape[1:3]
        x = window_partition(x, self.window)  # (B, n, N, C)
        if regions is not None:
            regions = window_partition(regions[None, :, :, None], self.window)[0, :, :, 0]
        x = self.skip(x, self.attn(self.norm1(x), regions))  # x + branch
        x = self.skip(x, self.mlp(self.norm2(x)))
        return window_reverse(x, self.window, H, W)

    def transform_in_parts(self, x: Tensor, regions: Tensor | None) -> Tensor:
        """The same without gradients, one square of the image at a time: this needs a third of the
        memory, and on a CPU it is quicker, because a square fits into its cache."""
        H, W = x.shape[1:3]
        side = 64 if x.device.type == "cpu" else 256
        side = max(side // self.window, 1) * self.window
        out = torch.empty_like(x)
        for top in range(0, H, side):
            for left in range(0, W, side):
                rows, columns = slice(top, top + side), slice(left, left + side)
                inside = None if regions is None else regions[rows, columns]
                out[:, rows, columns] = self.transform(x[:, rows, columns], inside)
        return out


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for each relative position."""

    def __init__(
        self,
        dim: int,
        window: int,
        heads: int,
        qkv_bias: bool,
        qk_scale: float | None,
        attn_drop: float,
        proj_drop: float,
        attention: str,
    ) -> None:
        super().__init__()
        self.attention, self.head_multiple = ATTENTION[attention]
        self.heads = heads
        self.scale = qk_scale or (dim // heads) ** -0.5
        table = torch.empty((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(table)
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(table, std=0.02)

    def forward(self, x: Tensor, regions: Tensor | None) -> Tensor:  # (B, n, N, C)
        B, n, N, C = x.shape
        extra = -(C // self.heads) % self.head_multiple  # channels that each head lacks
        if extra:
            return self.forward_padded(x, regions, extra)
        qkv = self.qkv(x).view(B, n, N, 3, self.heads, -1)
        x = self.attend(qkv, regions)  # (B, n, N, h, d)
        return self.proj_drop(self.proj(x.reshape(B, n, N, C)))

    def forward_padded(self, x: Tensor, regions: Tensor | None, extra: int) -> Tensor:
        """The same, with `extra` zeros behind the channels of each head. The weights are padded,
        because padding the activations would take another pass through memory."""
        B, n, N, C = x.shape
        weight = F.pad(self.qkv.weight.view(3 * self.heads, -1, C), (0, 0, 0, extra))
        bias = self.qkv.bias
        if bias is not None:
            bias = F.pad(bias.view(3 * self.heads, -1), (0, extra)).flatten()
        proj = F.pad(self.proj.weight.view(C, self.heads, -1), (0, extra)).flatten(1)

        qkv = F.linear(x, weight.flatten(0, 1), bias).view(B, n, N, 3, self.heads, -1)
        x = self.attend(qkv, regions)  # (B, n, N, h, d + extra)
        return self.proj_drop(F.linear(x.flatten(3), proj, self.proj.bias))

    def attend(self, qkv: Tensor, regions: Tensor | None) -> Tensor:
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).contiguous()  # each (B, n, h, N, d)
        dropout = self.attn_drop if self.training else 0.0
        x = self.attention(q * self.scale, k, v, self.bias(), regions, dropout)
        return x.transpose(2, 3)  # (B, n, N, h, d)

    def bias(self) -> Tensor:  # (h, N, N)
        # F.embedding has a quicker gradient than indexing.
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table)
        return bias.permute(2, 0, 1).contiguous()


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T + bias) v inside each window.

    Args:
        q, k, v: (B, n, h, N, d); q is scaled already.
        bias: (h, N, N).
        regions: (n, N) uint8 or None. Tokens of a window attend to each other only if they have
            the same label. See `window_regions`.

    Returns: (B, n, h, N, d).
    """
    d = q.shape[-1]
    if d % 4 and q.dtype == torch.float32:
        # Zeros up to a multiple of 4 channels: products of float32 matrices are up to twice as
        # fast on a CPU. SwinIR-M has d = 30, SwinIR-S 10. (bfloat16 gains nothing by it.)
        q, k, v = (F.pad(t, (0, -d % 4)) for t in (q, k, v))
    scores = q @ k.transpose(-2, -1)  # (B, n, h, N, N)
    scores += bias.to(scores.dtype)
    if regions is not None:
        labels = regions.to(scores.dtype)
        difference = (labels[:, :, None] - labels[:, None, :])[:, None]  # (n, 1, N, N)
        # -200 or less where labels differ: masked_fill takes ten times as long on a CPU. The
        # authors add -100, but exp(-100) is a denormal number, with which CPUs are slow.
        scores.addcmul_(difference, difference, value=-200.0)
    weights = scores.softmax(-1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return (weights @ v)[..., :d]


def sdpa_window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, regions: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """window_attention by PyTorch's fused attention. On a GPU it keeps no scores for the backward
    pass, only the mask of shifted blocks, which all images share.

    On a CPU it takes 1.2 to 2 times as long. On a GPU its time was not measured.
    """
    shape = q.shape
    if regions is None:
        mask = bias[None]  # (1, h, N, N)
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))  # (B * n, h, N, d)
    else:
        # Windows count as heads, so that all images share one mask.
        apart = regions[:, None, :, None] != regions[:, None, None, :]  # (n, 1, N, N)
        mask = (bias - 200.0 * apart).flatten(0, 1)[None]  # (1, n * h, N, N)
        q, k, v = (t.flatten(1, 2) for t in (q, k, v))  # (B, n * h, N, d)
    # The bias in the mask needs a gradient, which rules out FlashAttention and cuDNN's kernel.
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels):
        x = F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype), dropout, scale=1.0)
    return x.view(shape)


# name -> (function, head_multiple). Heads whose number of channels d is not a multiple of it are
# padded with zeros.
ATTENTION = {"math": (window_attention, 1), "sdpa": (sdpa_window_attention, 8)}


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.act(self.fc1(x)))
        return self.drop(self.fc2(x))


class StochasticDepth(nn.Module):
    """x + branch, where the branch of a whole sample is dropped with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.never = rate == 0
        # A tensor, not a number: compiled blocks of different rates share their code.
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:  # (B, n, N, C)
        if self.never or not self.training:
            return x + branch
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) < self.keep
        return x.addcmul(branch, (kept / self.keep).to(x.dtype))


# Windows


def window_partition(x: Tensor, window: int) -> Tensor:  # (B, H, W, C) -> (B, n, N, C)
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.transpose(2, 3).reshape(B, -1, window * window, C)


def window_reverse(windows: Tensor, window: int, H: int, W: int) -> Tensor:  # -> (B, H, W, C)
    B, _, _, C = windows.shape
    x = windows.view(B, H // window, W // window, window, window, C)
    return x.transpose(2, 3).reshape(B, H, W, C)


def window_regions(H: int, W: int, shift: int, device: Any = "cpu") -> Tensor:  # (H, W) uint8
    """Labels of a rolled image. Tokens of a window attend to each other if their labels are equal.

    The roll puts the first `shift` rows of the image below its last ones, and the first columns
    right of its last ones. Across that seam, pixels are not neighbours, so labels differ.
    """
    rows = torch.arange(H, device=device) >= H - shift
    columns = torch.arange(W, device=device) >= W - shift
    return 2 * rows[:, None].to(torch.uint8) + columns.to(torch.uint8)


def official_attn_mask(H: int, W: int, window: int, shift: int) -> Tensor | None:  # (n, N, N)
    """What the authors' blocks hold for the training size: `window_regions` in their form. It is
    here only to be part of the state dict."""
    if shift == 0:
        return None
    if H % window or W % window:
        raise UserError(f"img_size {H}x{W} must be a multiple of window_size={window}")
    regions = window_partition(window_regions(H, W, shift)[None, :, :, None], window)[0, :, :, 0]
    apart = regions[:, :, None] != regions[:, None, :]
    return torch.where(apart, -100.0, 0.0)


def relative_position_index(window: int) -> Tensor:  # (N, N)
    """Row of the bias table for each pair of tokens, by the difference of their positions."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    rows = row[:, None] - row + window - 1  # 0 ... 2 * window - 2
    columns = column[:, None] - column + window - 1
    return rows * (2 * window - 1) + columns


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pads right and below by reflection. Small images are reflected more than once."""
    for dim in (2, 3):
        size = x.shape[dim]
        if size % multiple == 0:
            continue
        padded = size + -size % multiple
        # The period of an image that is reflected back and forth; 1 for a single pixel, where
        # 1 // size is 1. (max(..., 1) would become a constant in an exported ONNX graph.)
        period = 2 * size - 2 + 1 // size
        index = torch.arange(padded, device=x.device) % period
        x = x.index_select(dim, torch.minimum(index, period - index))
    return x


# Layers


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def conv_and_activation(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(conv3x3(in_channels, out_channels), nn.LeakyReLU(inplace=True))


def pixel_shuffle_steps(channels: int, upscale: int) -> nn.Sequential:
    """x3 in one step, 2^k in k steps of x2."""
    factors = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
    steps = []
    for factor in factors:
        steps += [conv3x3(channels, channels * factor**2), nn.PixelShuffle(factor)]
    return nn.Sequential(*steps)


def body_conv(dim: int, resi_connection: str) -> nn.Module:
    """The convolution at the end of an RSTB; "3conv" has a bottleneck to save parameters."""
    if resi_connection == "1conv":
        return conv3x3(dim, dim)
    slim = dim // 4
    return nn.Sequential(
        conv3x3(dim, slim),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(slim, slim, 1),
        nn.LeakyReLU(0.2, inplace=True),
        conv3x3(slim, dim),
    )


def position_embedding(tokens: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, dim), std=0.02))


# Arguments and buffers

UPSCALES = {  # by upsampler; None: any
    "": None,
    "pixelshuffle": (1, 2, 3, 4, 8, 16),
    "pixelshuffledirect": None,
    "nearest+conv": (2, 4),
}


def check_arguments(
    embed_dim: int, depths: Any, num_heads: Any, upscale: int, upsampler: str, resi_connection: str
) -> None:
    if len(depths) != len(num_heads):
        raise UserError(f"depths {depths} and num_heads {num_heads} must be of the same length")
    for heads in num_heads:
        if embed_dim % heads:
            raise UserError(f"num_heads {num_heads}: each must divide embed_dim={embed_dim}")
    if upsampler not in UPSCALES:
        raise UserError(
            f"upsampler {upsampler!r} is unknown; there are {', '.join(map(repr, UPSCALES))}"
        )
    possible = UPSCALES[upsampler]
    if possible and upscale not in possible:
        raise UserError(
            f"upscale={upscale} is not possible with upsampler={upsampler!r}: take {possible}"
        )
    if resi_connection not in ("1conv", "3conv"):
        raise UserError(f"resi_connection must be '1conv' or '3conv', not {resi_connection!r}")


def mean_colour(in_chans: int) -> Tensor:  # (1, in_chans, 1, 1)
    """DIV2K's, which is subtracted from the input. Gray images have no mean."""
    mean = [0.4488, 0.4371, 0.4040] if in_chans == 3 else [0.0] * in_chans
    return torch.tensor(mean).view(1, -1, 1, 1)


def plain_values(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are saved: with lists for tuples, as in JSON files. norm_layer can't be
    saved, init_std no longer matters, and attention depends on the machine."""
    plain = {}
    for name, value in arguments.items():
        if name not in ("self", "__class__", "norm_layer", "init_std", "attention"):
            plain[name] = list(value) if isinstance(value, tuple) else value
    return plain


def training_size(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    if isinstance(img_size, int):
        img_size = (img_size, img_size)
    height, width = img_size
    return height // patch_size, width // patch_size


def inference_floats(
    in_chans: int, embed_dim: int, window_size: int, factor: int, upsampler: str
) -> int:
    """How many floats an inference holds per input pixel. The coefficients were fitted to what
    tests/bench.py measured: of the features, the scores, and a constant."""
    head = 2 * in_chans  # channels at the size of the output
    if upsampler in ("pixelshuffle", "nearest+conv"):
        head = 3 * 64
    return 5 * embed_dim + 4 * window_size**2 + 64 + head * factor**2


def training_floats(embed_dim: int, depths: Any, num_heads: Any, window: int) -> float:
    """How many floats a training step holds per input pixel, measured for the published networks
    in bfloat16: activations of the layers, and of the attention among a window's tokens."""
    floats = 0.0
    for depth, heads in zip(depths, num_heads, strict=True):
        floats += depth * (7.2 * embed_dim + 1.6 * heads * window**2)
    return floats


BUFFERS = ("attn_mask", "relative_position_index")


def keep_own_buffers(net: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Buffers follow from the arguments: a file may lack them, or have another img_size's."""
    for key in list(state_dict):
        if key.endswith(BUFFERS):
            del state_dict[key]
    for key, value in net.state_dict().items():
        if key.endswith(BUFFERS):
            state_dict[prefix + key] = value


# Networks by name

# What train.py, `load` and `restore` ask of a network:
#   arguments         dict of plain values: NETWORKS[name](**arguments) rebuilds the network
#   in_chans          channels of its input and output
#   factor            output pixels per input pixel, along each side
#   multiple          tiles of `restore` begin at multiples of this number of input pixels
#   floats_per_pixel  floats that an inference holds per input pixel: `restore` chooses tiles by it
#   training_floats_per_pixel  optional: floats that a training step holds per input pixel, in
#                     bfloat16, by which train.py chooses micro-batches
#   layers            optional: modules that are alike, for torch.compile to compile once for all
#   forward           (B, in_chans, H, W) of any size, in [0, 1], to (B, in_chans, H * factor, ...)
# Names of its parameters don't begin with "module.", which would be taken for DataParallel's.
# train.py passes those of its options that the constructor names, its scale as `upscale`, and the
# side of the input patch as `img_size`.
NETWORKS = {"swinir": SwinIR}


class UNetDiscriminator(nn.Module):
    """For GANs: how real each pixel looks. A U-Net with spectral normalisation, after Real-ESRGAN,
    whose files and KAIR's have the same keys.

    `forward` takes (B, in_chans, H, W), H and W multiples of 8, and returns scores (B, 1, H, W).
    """

    def __init__(self, in_chans: int = 3, features: int = 64) -> None:
        super().__init__()
        self.arguments = {"in_chans": in_chans, "features": features}
        c = features
        self.conv0 = conv3x3(in_chans, c)
        self.conv1 = spectral_norm(nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False))  # H / 2
        self.conv2 = spectral_norm(nn.Conv2d(2 * c, 4 * c, 4, 2, 1, bias=False))  # H / 4
        self.conv3 = spectral_norm(nn.Conv2d(4 * c, 8 * c, 4, 2, 1, bias=False))  # H / 8
        self.conv4 = spectral_norm(nn.Conv2d(8 * c, 4 * c, 3, 1, 1, bias=False))
        self.conv5 = spectral_norm(nn.Conv2d(4 * c, 2 * c, 3, 1, 1, bias=False))
        self.conv6 = spectral_norm(nn.Conv2d(2 * c, c, 3, 1, 1, bias=False))
        self.conv7 = spectral_norm(nn.Conv2d(c, c, 3, 1, 1, bias=False))
        self.conv8 = spectral_norm(nn.Conv2d(c, c, 3, 1, 1, bias=False))
        self.conv9 = conv3x3(c, 1)

    def forward(self, x: Tensor) -> Tensor:
        x0 = F.leaky_relu(self.conv0(x), 0.2)  # (B, C, H, W)
        x1 = F.leaky_relu(self.conv1(x0), 0.2)  # (B, 2 * C, H / 2, W / 2)
        x2 = F.leaky_relu(self.conv2(x1), 0.2)  # (B, 4 * C, H / 4, W / 4)
        x3 = F.leaky_relu(self.conv3(x2), 0.2)  # (B, 8 * C, H / 8, W / 8)
        x = F.leaky_relu(self.conv4(twice_as_large(x3)), 0.2) + x2
        x = F.leaky_relu(self.conv5(twice_as_large(x)), 0.2) + x1
        x = F.leaky_relu(self.conv6(twice_as_large(x)), 0.2) + x0
        x = F.leaky_relu(self.conv7(x), 0.2)
        x = F.leaky_relu(self.conv8(x), 0.2)
        return self.conv9(x)


def twice_as_large(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")


# name -> class(in_chans, features). `forward` takes images, and returns scores of any shape.
DISCRIMINATORS = {"unet": UNetDiscriminator}


# Checkpoints

# What wrappers put into the keys: DataParallel and AveragedModel only around the whole network, as
# in module.conv_first.weight; torch.compile and FSDP also around parts, as in
# layers.0._orig_mod.norm.weight.
WRAPPERS = re.compile(
    r"^((module|_orig_mod)\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
COUNTERS = ("n_averaged",)  # AveragedModel counts its updates among the weights
ANCHOR = "conv_first.weight"  # a key that every SwinIR has: what precedes it is a prefix
# Under which keys programs save the weights, best first
USUAL_KEYS = ("params_ema", "params-ema", "params", "state_dict", "model_state_dict")


def load(path: str | Path, param_key: str = "params_ema", device: Any = "cpu") -> nn.Module:
    """The network in a checkpoint of ours, the authors, BasicSR or KAIR, in eval mode.

    Args:
        path: A file that torch.save wrote, or a safetensors file; or the folder of a run, to load
            its best network.
        param_key: Which weights: a key of the file, or what precedes their keys, as "net_g_ema" in
            net_g_ema.conv_first.weight. The default takes what there is if the file names its
            weights in another way.

    SwinIR's arguments follow from the tensors' shapes as far as these tell. Others are those that
    the file states, or else the usual ones.
    Raises UserError, with the path, if the file holds no network that is known here.
    """
    path = find_network(Path(path).expanduser())
    weights, about = read_weights(path, param_key)
    name, stated = about["network"], about["arguments"]
    if name not in NETWORKS:
        raise UserError(f"{path}: its network is {name!r}; known here: {', '.join(NETWORKS)}")
    try:
        if name == "swinir":
            stated = swinir_arguments(weights, stated)
        net = NETWORKS[name](**stated)
        net.load_state_dict(weights)
    except (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, KeyError):
            reason = f"it has no {reason}"
        raise UserError(
            f"{path}: holds no network known here ({', '.join(NETWORKS)}): {reason}"
        ) from error
    return net.to(device).eval()


def load_weights(
    net: nn.Module, path: str | Path, param_key: str = "params_ema", strict: bool = True
) -> str:
    """Copies the tensors of a file, or of a run's best network, into `net`. Returns a sentence that
    says what was taken.

    Tensors that are missing, or of another shape, are left out: with `strict` this is a UserError,
    as is a file none of whose tensors fits.
    """
    path = find_network(Path(path).expanduser())
    own = {}
    for key, value in net.state_dict().items():
        if not key.endswith(BUFFERS):
            own[key] = value
    weights, about = read_weights(path, param_key, may_have_prefix=ANCHOR in own)
    taken = {}
    for key, value in weights.items():
        if key in own and value.shape == own[key].shape:
            taken[key] = value
    left = [key for key in own | weights if key not in taken and not key.endswith(BUFFERS)]
    names = listed(left)
    differences = ""
    for key, value in about["arguments"].items():
        if value != net.arguments.get(key):
            differences += f"; its {one_line(key)} is {value!r}"

    if not taken:
        raise UserError(f"{path}: none of its tensors fits: {names}{differences}")
    if strict and left:
        advice = f"strict_load=False takes {len(taken)} of {len(own)}"
        raise UserError(f"{path}: these tensors do not fit: {names}; {advice}{differences}")
    net.load_state_dict(taken, strict=False)
    sentence = f"{path}: {len(taken)} of {len(own)} tensors taken"
    if left:
        sentence += f"; not taken: {names}"
    return sentence + differences


def read_weights(
    path: str | Path, param_key: str, may_have_prefix: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict under plain keys, what the file says about it). Runs no code of the file. Raises
    UserError. `may_have_prefix`: whether to remove what precedes SwinIR's keys."""
    about = {"network": "swinir", "arguments": {}, "iter": 0, "metadata": {}}
    try:
        file = read_file(Path(path).expanduser())
        for key, usual in about.items():
            if isinstance(file.get(key), type(usual)):
                about[key] = file[key]
        weights = unwrap(file, param_key)
        if may_have_prefix and about["network"] == "swinir":
            weights = without_prefix(weights)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error.__cause__
    return weights, about


def read_file(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, whatever its suffix. Raises UserError."""
    with path.open("rb") as file:
        start = file.read(1000)
        if is_safetensors(start):
            return read_safetensors(path)
        file.seek(0)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what is refused anyway
                content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling a damaged file raises anything
            raise UserError(why_unreadable(path, start, error)) from error
    if not checksums_agree(path):
        raise UserError(f"it is damaged: {AGAIN}")
    if not isinstance(content, dict):
        raise UserError(f"it holds a {type(content).__name__}, not a dict of tensors")
    return content


def checksums_agree(path: Path) -> bool:
    """torch.load doesn't compare those of its zip files."""
    if not zipfile.is_zipfile(path):  # the format before torch 1.6
        return True
    try:
        return zipfile.ZipFile(path).testzip() is None
    except MemoryError:
        raise
    except Exception:  # a damaged file raises anything
        return False


def is_safetensors(start: bytes) -> bool:
    """Such a file starts with the length of its header, and the header, which is JSON."""
    length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and length <= 100_000_000  # the format's limit


def read_safetensors(path: Path) -> dict[str, Any]:
    """Its tensors, its metadata, and the network and the arguments that `export` writes there."""
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise UserError("it is a safetensors file: pip install safetensors") from error
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = file.keys()
            content: dict[str, Any] = {key: file.get_tensor(key) for key in keys}
            metadata = file.metadata() or {}
        if "network" in metadata and "arguments" in metadata:
            content["network"] = metadata["network"]
            content["arguments"] = json.loads(metadata["arguments"])
    except Exception as error:  # a damaged file raises anything
        reason = one_line(error)
        raise UserError(f"it is damaged: copy or download it again ({reason})") from error
    return content | {"metadata": metadata}


AGAIN = "copy or download it again"
TRUSTED = "only if you trust its source, and save its state dict alone"
# What is taken for a checkpoint by mistake: its first bytes -> what it is, and the remedy
FIRST_BYTES = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file: run git lfs pull",
    b"<": "it is a web page: download the file again",
    b"\x1f\x8b": "it is compressed: unpack it with gunzip",
    b"\x89PNG": "it is an image, not a network",
    b"\xff\xd8\xff": "it is an image, not a network",
}
ARCHIVE = "it is a zip archive without weights: unpack it, if they are inside"
# Words of torch.load's error -> what the file is, and the remedy
LOAD_ERRORS = {
    "TorchScript": f"it is a TorchScript program: load it with torch.jit.load {TRUSTED}",
    "legacy .tar": "it is a tar archive: unpack it, or, if PyTorch 0.1 wrote it, load it with "
    f"torch.load(..., weights_only=False) {TRUSTED}",
    "not in a subdirectory": ARCHIVE,
    "locating file data.pkl": ARCHIVE,
}


def why_unreadable(path: Path, start: bytes, error: Exception) -> str:
    """What is wrong with a file that torch.load refused, and the remedy."""
    if not start:
        return f"it is empty: {AGAIN}"
    if not any(start):
        return f"it is damaged, all zeros: {AGAIN}"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for first, remedy in FIRST_BYTES.items():
        if text.startswith(first):
            return remedy
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"it is cut short: {AGAIN}"
    message = str(error)
    for words, remedy in LOAD_ERRORS.items():
        if words in message:
            return remedy
    names = python_objects(path, message)
    if names:
        load = "load it with torch.load(..., weights_only=False)"
        return f"it holds Python objects ({names}), which can run code: {load} {TRUSTED}"
    # Of several sentences, those about this file
    reason = message.rpartition("WeightsUnpickler error:")[2]
    reason = reason.partition("Check the documentation")[0]
    reason = one_line(reason) or type(error).__name__
    if "must be imported" in reason:
        return reason
    return f"it is no checkpoint, or damaged ({reason})"


def python_objects(path: Path, message: str) -> str:
    """The classes and functions in a file that torch.load refused for them."""
    names = re.findall(r" GLOBAL (\S+)", message)
    if not names:
        return ""
    with contextlib.suppress(Exception):  # the layout before torch 1.6: the message names one
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) or names
    return one_line(", ".join(names))


def one_line(message: Any) -> str:
    """A message for a sentence. A damaged file can put anything into it."""
    words = " ".join(str(message).split())
    return "".join(letter for letter in words if letter.isprintable())[:200]


def unwrap(file: dict[str, Any], param_key: str) -> dict[str, Tensor]:
    """The state dict that `param_key` names.

    It is a dict of that name in the file, or else the tensors whose keys begin with that name. If
    there is neither, "params_ema", which is the default, stands for the first of USUAL_KEYS, for
    the only dict of tensors, or for the file itself; "params" stands for the file itself.
    """
    found = {}
    for key, value in file.items():
        if isinstance(value, dict) and tensors_in(value):
            found[key] = tensors_in(value)
    if param_key in found:
        return found[param_key]

    bare = tensors_in(file)
    usual = [found[key] for key in USUAL_KEYS if key in found]
    fallback = bare
    if usual:
        fallback = usual[0]
    elif len(found) == 1:
        (only,) = found.values()
        fallback = max(only, bare, key=len)  # `bare` may be a counter beside the weights
    below = tensors_in(fallback, param_key + ".")
    if below:
        return below
    implied = param_key == "params_ema" or (param_key == "params" and fallback is bare)
    if fallback and implied:
        return fallback

    names = listed(map(repr, [*found, *prefixes_in(fallback)]))
    if "param_groups" in file:
        raise UserError("it is an optimizer's state: give the network's file beside it")
    if not names and not bare:
        raise UserError("it holds no weights")
    names = names or "weights without a name"
    raise UserError(f"it has no {param_key!r}, but {names} (param_key)")


def tensors_in(content: dict[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors whose keys begin with `prefix`, under the rest, without wrappers' parts."""
    tensors = {}
    for key, value in content.items():
        if not isinstance(value, Tensor) or not isinstance(key, str):
            continue
        if not key.startswith(prefix) or key.rpartition(".")[2] in COUNTERS:
            continue
        plain = WRAPPERS.sub("", key.removeprefix(prefix))
        if plain in tensors:
            raise UserError(f"two of its tensors are {plain!r} without the names of wrappers")
        tensors[plain] = value
    return tensors


def without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """SwinIR's tensors under its own keys. Others, such as the discriminator's beside
    generator.conv_first.weight, are left out."""
    prefixes = prefixes_in(weights)
    if ANCHOR in weights or not prefixes:
        return weights
    if len(prefixes) > 1:
        names = listed(map(repr, prefixes))
        raise UserError(f"it holds several networks: name one of {names} (param_key)")
    return tensors_in(weights, prefixes[0] + ".")


def prefixes_in(weights: dict[str, Tensor]) -> list[str]:
    """["generator"] for generator.conv_first.weight."""
    ending = "." + ANCHOR
    return [key.removesuffix(ending) for key in weights if key.endswith(ending)]


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more there are."""
    names = [one_line(name) for name in names]
    text = ", ".join(names[:9])
    if len(names) > 9:
        text += f" and {len(names) - 9} more"
    return text


def swinir_arguments(weights: dict[str, Tensor], stated: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SwinIR: by the tensors' shapes where these are certain, else as `stated`, else
    guessed."""
    embed_dim, in_chans = weights["conv_first.weight"].shape[:2]
    block = "layers.{}.residual_group.blocks.{}."
    depths, num_heads = [], []
    while block.format(len(depths), 0) + "norm1.weight" in weights:
        layer, depth = len(depths), 1
        while block.format(layer, depth) + "norm1.weight" in weights:
            depth += 1
        depths.append(depth)
        table = weights[block.format(layer, 0) + "attn.relative_position_bias_table"]
        num_heads.append(table.shape[1])
    first = block.format(0, 0)
    entries = weights[first + "attn.relative_position_bias_table"].shape[0]  # (2 * window - 1)^2
    window = (isqrt(entries) + 1) // 2

    # The training size shows in the position embedding or in the masks of shifted blocks.
    ape = "absolute_pos_embed" in weights
    img_size = 64 // window * window  # the constructor's default, in whole windows
    masks = [value for key, value in weights.items() if key.endswith("attn_mask")]
    if ape:
        img_size = isqrt(weights["absolute_pos_embed"].shape[1])
    elif masks:
        img_size = isqrt(masks[0].shape[0]) * window
    elif first + "attn.relative_position_index" in weights and max(depths) > 1:
        img_size = window  # the file has buffers, but no mask: its windows were not shifted

    hidden = len(weights[first + "mlp.fc1.bias"])
    mlp_ratio = hidden / embed_dim
    if int(embed_dim * mlp_ratio) != hidden:  # the float product fell just below
        mlp_ratio = (hidden + 0.5) / embed_dim

    upsampler = upsampler_of(weights)
    # Several values give the same shapes: the window is no larger than img_size, and mlp_ratio is
    # rounded.
    guessed = {
        "img_size": img_size,
        "window_size": window,
        "mlp_ratio": mlp_ratio,
        # Files don't hold it. Those with windows of 7 are the authors' JPEG networks, whose range
        # is 255; spandrel goes by this, too.
        "img_range": 255.0 if window == 7 else 1.0,
    }
    certain = {
        "in_chans": in_chans,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": num_heads,
        "ape": ape,
        "patch_norm": "patch_embed.norm.weight" in weights,
        "qkv_bias": first + "attn.qkv.bias" in weights,
        "upsampler": upsampler,
        "upscale": upscale_of(weights, upsampler, in_chans),
        "resi_connection": "1conv" if "conv_after_body.weight" in weights else "3conv",
    }
    return guessed | stated | certain


def upsampler_of(weights: dict[str, Tensor]) -> str:
    if "conv_up1.weight" in weights:
        return "nearest+conv"
    if "conv_before_upsample.0.weight" in weights:
        return "pixelshuffle"
    if "upsample.0.weight" in weights:
        return "pixelshuffledirect"
    return ""


def upscale_of(weights: dict[str, Tensor], upsampler: str, in_chans: int) -> int:
    if upsampler == "nearest+conv":
        return 4 if "conv_up2.weight" in weights else 2
    if upsampler == "pixelshuffledirect":
        return isqrt(len(weights["upsample.0.weight"]) // in_chans)
    upscale = 1
    for key, value in weights.items():
        if re.fullmatch(r"upsample\.\d+\.weight", key):
            upscale *= isqrt(len(value) // 64)
    return upscale


def portable(
    state_dict: dict[str, Tensor], shared: dict[Any, Tensor] | None = None
) -> dict[str, Tensor]:
    """A copy to save: contiguous CPU tensors under plain keys.

    It loads with strict=True in the official class, BasicSR's and spandrel's, which have all
    networks but nearest+conv for x2. The buffers are the same in all blocks: the file holds each
    once, in types that spandrel's loader accepts. State dicts that are copied with the same dict
    `shared` share them, too.
    """
    copies = {}
    shared = {} if shared is None else shared
    for key, value in state_dict.items():
        copy = value.detach().to("cpu", copy=True).contiguous()
        if key.endswith("attn_mask"):
            copy = copy.to(torch.float16)
        elif key.endswith("relative_position_index"):
            copy = copy.to(torch.int32)
        if key.endswith(BUFFERS):
            copy = shared.setdefault((copy.shape, copy.numpy().tobytes()), copy)
        copies[WRAPPERS.sub("", key)] = copy
    return copies


# Restoring images


@torch.no_grad()
def restore(
    net: nn.Module,
    image: Tensor,
    tile: int | None = None,
    overlap: int = 32,
    ensemble: bool = False,
) -> Tensor:
    """The network's output for an image of any size, in overlapping tiles if it is large.

    Args:
        image: (B, in_chans, H, W), of any float type, in [0, 1], on any device.
        tile: Side of the tiles in input pixels. None, or too large a number: as memory allows.
        overlap: Input pixels that neighbouring tiles share, to blend them: at most half a tile,
            rounded down to whole windows.
        ensemble: Mean of the outputs for the eight symmetries: eight times as slow.

    Returns: (B, in_chans, H * factor, W * factor) on the image's device, not clipped.
    Raises UserError for an image of another type or number of channels.
    """
    if image.ndim != 4 or image.shape[1] != net.in_chans or not image.is_floating_point():
        given = f"{image.dtype} {list(image.shape)}"
        raise UserError(f"give (B, {net.in_chans}, H, W) floats, not {given}")
    longest = max(image.shape[2:])
    limit = largest_tile(net, image)
    size = limit
    if tile is not None and tile > 0:
        size = min(tile, limit)
    size = min(size, longest)
    size = max(-(-size // net.multiple), 1) * net.multiple  # whole windows

    while True:
        try:
            return restore_tiles(net, image, size, overlap, ensemble)
        except RuntimeError as error:
            if size == net.multiple or not is_out_of_memory(error):
                raise
        # Outside of `except`, where the error no longer holds on to the tensors.
        size = max(size // 2 // net.multiple, 1) * net.multiple
        warnings.warn(f"out of memory: going on with tiles of {size} pixels", stacklevel=3)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Each device says it in its own way: CUDA and MPS, a CPU on Linux, on Windows."""
    phrases = ("out of memory", "can't allocate memory", "not enough memory")
    return any(phrase in str(error) for phrase in phrases)


def largest_tile(net: nn.Module, image: Tensor) -> int:
    """The side, in input pixels, of the largest tile whose inference fits into the memory."""
    device = next(net.parameters()).device
    free = 1.2e9  # bytes, on a CPU: 12 megapixels then take less than 2 GB in all
    if device.type == "cuda":  # of which a third is left to other allocations and programs
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = 0.7 * (torch.cuda.mem_get_info(device)[0] + cached)
    batch, _, height, width = image.shape
    bytes_per_pixel = 4 * batch * net.floats_per_pixel
    if height * width * bytes_per_pixel <= free:
        return max(height, width)
    return isqrt(int(free / bytes_per_pixel))


def restore_tiles(net: nn.Module, image: Tensor, size: int, overlap: int, ensemble: bool) -> Tensor:
    """Rows of tiles, then the tiles of each row."""
    overlap = max(min(overlap, size // 2), 0) // net.multiple * net.multiple

    def restore_tile(tile: Tensor) -> Tensor:
        return run_network(net, tile, ensemble)

    def restore_row(row: Tensor) -> Tensor:
        return in_pieces(restore_tile, row, 3, size, overlap, net.factor)

    return in_pieces(restore_row, image, 2, size, overlap, net.factor)


def in_pieces(
    restore_piece: Callable[[Tensor], Tensor],
    x: Tensor,
    dim: int,
    size: int,
    overlap: int,
    factor: int,
) -> Tensor:
    """restore_piece(x), `factor` times as large, computed piece by piece along `dim`."""
    B, C, H, W = x.shape
    out = x.new_empty(B, C, H * factor, W * factor)
    # Each piece fades in over the overlap. The 8th power makes it steep in the middle: there, both
    # pieces are far from their edges, where context is missing.
    shared = overlap * factor
    t = (torch.arange(shared, device=x.device, dtype=x.dtype) + 0.5) / max(shared, 1)
    fade = t**8 / (t**8 + (1 - t) ** 8)
    fade = fade.view(-1, 1) if dim == 2 else fade

    starts = range(0, max(x.shape[dim] - overlap, 1), size - overlap)
    unit = "row" if dim == 2 else "tile"
    hidden = True if len(starts) == 1 else None  # None: shown in a terminal
    for start in tqdm(starts, unit=unit, leave=False, delay=3, disable=hidden):
        length = min(size, x.shape[dim] - start)
        piece = restore_piece(x.narrow(dim, start, length))
        if start > 0:
            before = out.narrow(dim, start * factor, shared)
            piece.narrow(dim, 0, shared).copy_(before.lerp(piece.narrow(dim, 0, shared), fade))
        out.narrow(dim, start * factor, length * factor).copy_(piece)
    return out


def run_network(net: nn.Module, x: Tensor, ensemble: bool) -> Tensor:
    """The network's output, on the device and in the type of `x`."""
    weight = next(net.parameters())
    if not ensemble:
        return net(x.to(weight)).to(x)
    total = torch.zeros((), device=x.device, dtype=x.dtype)
    for flip in (False, True):
        for turns in range(4):
            turned = x.flip(3) if flip else x
            y = net(turned.rot90(turns, (2, 3)).to(weight)).to(x).rot90(-turns, (2, 3))
            total = total + (y.flip(3) if flip else y)
    return total / 8


def restore_pixels(
    net: nn.Module,
    pixels: np.ndarray,
    tile: int | None = None,
    overlap: int = 32,
    ensemble: bool = False,
) -> np.ndarray:
    """`restore` for (H, W, C) uint8 or uint16: C is 1 gray, 2 gray alpha, 3 RGB, 4 RGB alpha.

    A colour network gets gray three times and its outputs are averaged; a gray network restores
    each channel of a colour image. Alpha is only resized.
    """
    peak = int(np.iinfo(pixels.dtype).max)
    colours = 3 if pixels.shape[2] >= 3 else 1
    image = torch.from_numpy(pixels.astype(np.float32)).div_(peak).permute(2, 0, 1)  # (C, H, W)
    image, alpha = image[None, :colours], image[None, colours:]
    options = (tile, overlap, ensemble)
    if net.in_chans == 1:
        output = restore(net, image.transpose(0, 1), *options).transpose(0, 1)
    elif colours == 1:
        output = restore(net, image.expand(-1, 3, -1, -1), *options).mean(1, keepdim=True)
    else:
        output = restore(net, image, *options)
    if alpha.shape[1]:
        alpha = F.interpolate(alpha, output.shape[2:], mode="bicubic")
        output = torch.cat([output, alpha], 1)
    if not output.isfinite().all():
        raise UserError("the network's output isn't finite: its weights may contain NaN")
    output = output.clamp(0, 1).mul(peak).round()
    return output[0].permute(1, 2, 0).numpy().astype(pixels.dtype)


# Publishing: files that other programs load, with a description of the network in each

# What the metadata say about the training, where it is known
TRAINING_FACTS = (
    "iterations",
    "dataset",
    "degradation",  # a name, or "pairs": the degraded images were given
    "degradation_options",  # JSON
    "batch_size",
    "gt_size",
    "pretrain_network",
)
# Where the names of the tensors come from
IMPLEMENTATIONS = {"swinir": "https://github.com/JingyunLiang/SwinIR"}


def run_folder(path: Path) -> Path | None:
    """experiments/mine for experiments/mine/models/net_g_best.pth; None for a file elsewhere."""
    models = path.absolute().parent
    if models.name == "models" and (models.parent / "config.json").exists():
        return models.parent
    return None


def training_facts(path: Path, about: dict[str, Any]) -> dict[str, str]:
    """Those of TRAINING_FACTS that the network's file or its run's config.json tells."""
    metadata = about["metadata"]
    facts = {}
    if "network" in metadata and "arguments" in metadata:  # an exported file
        facts = {key: metadata[key] for key in TRAINING_FACTS if key in metadata}
    if about["iter"]:
        facts["iterations"] = str(about["iter"])
    folder = run_folder(path)
    if folder:
        facts |= facts_of_config(folder / "config.json")
    return facts


def facts_of_config(path: Path) -> dict[str, str]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["degradation"]
        facts = {key: str(config[key]) for key in ("batch_size", "gt_size")}
    except (ValueError, LookupError, TypeError) as error:
        advice = "restore it, or copy the network to another folder"
        raise UserError(f"{path} can't be read ({one_line(error)}): {advice}") from error
    data = data_module()
    # Names only: a published file should not tell where they are on this machine.
    roots = [Path(root).name for root in data.split_roots(config.get("dataroot_gt"))]
    facts["dataset"] = ", ".join(roots) or "synthetic images"
    if config.get("dataroot_lq"):
        facts["degradation"] = "pairs"
    else:
        options = data.options_of_degradation(name, SimpleNamespace(**config))
        facts["degradation"] = name
        facts["degradation_options"] = json.dumps(options)
    if config.get("pretrain_network"):
        facts["pretrain_network"] = Path(config["pretrain_network"]).stem
    return facts


def describe_network(net: nn.Module, facts: dict[str, str]) -> str:
    colours = "gray" if net.in_chans == 1 else "colour"
    parts = [f"Scale {net.factor}, {colours} images"]
    if "iterations" in facts:
        parts.append(f"{int(facts['iterations']):,} iterations")
    if "dataset" in facts:
        parts.append(f"dataset: {facts['dataset']}")
    if "degradation" in facts:
        options = json.loads(facts.get("degradation_options", "{}"))
        values = [f"{key}={value}" for key, value in options.items()]
        parts.append(f"degradation: {', '.join([facts['degradation'], *values])}")
    return "; ".join(parts)


def metadata_of(net: nn.Module, network: str, facts: dict[str, str], title: str) -> dict[str, str]:
    """ModelSpec's keys (https://github.com/Stability-AI/ModelSpec), and those that `load` reads."""
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": network,
        "modelspec.implementation": IMPLEMENTATIONS.get(network, "nanoSwinIR"),
        "modelspec.title": title,
        "modelspec.description": describe_network(net, facts),
        "modelspec.date": datetime.date.today().isoformat(),
        "network": network,
        "arguments": json.dumps(net.arguments),
        "scale": str(net.factor),
        **facts,
    }


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path, whose file is renamed to `path` unless an exception is raised."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    except OSError as error:
        advice = "check the disk and the permissions"
        raise UserError(f"{path} can't be written ({error.strerror or error}): {advice}") from error
    finally:
        with contextlib.suppress(OSError):  # such as a folder that is a file
            part.unlink(missing_ok=True)


def export_safetensors(net: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> str:
    """Writes the weights under plain keys; returns a sentence about them.

    net: On the CPU or a GPU, in float32. Raises UserError, and writes nothing, if `load` returns
    another network. Needs safetensors.
    """
    from safetensors.torch import save

    tensors = {}
    for key, value in portable(net.state_dict()).items():
        tensors[key] = value.clone()  # `portable` shares some: the format can't
    metadata = metadata or {}
    content = save(tensors, metadata)
    header = 8 + int.from_bytes(content[:8], "little")  # bytes before the tensors
    checksum = hashlib.sha256(content[header:]).hexdigest()
    content = save(tensors, metadata | {"modelspec.hash_sha256": f"0x{checksum}"})
    with whole_file(path) as part:
        part.write_bytes(content)
        written = load(part).state_dict()
        for key, value in net.state_dict().items():
            if not torch.equal(written[key], value.cpu()):
                raise UserError(f"{path}: not written, because its {key} differs")
    return f"{len(tensors)} tensors, equal to the network's when loaded again"


def export_onnx(net: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> str:
    """Writes opset 18 with dynamic batch, height and width; returns how it compares with PyTorch.

    net: On the CPU, in float32. Raises UserError, and writes nothing, if the two differ. Needs onnx
    and onnxruntime.
    """
    multiple = net.multiple
    sizes = [  # batch, height, width
        (1, 3 * multiple, 4 * multiple),
        (2, multiple + 3, 2 * multiple - 1),
        (1, 1, multiple + 2),
        (1, multiple + 2, 1),
        (1, 1, 1),
    ]
    try:
        with whole_file(path) as part:
            trace_onnx(net, part, metadata or {})
            worst = onnx_difference(net, part, sizes)
            if not worst < 1e-3:  # NaN isn't
                sentence = f"not written, because ONNX and PyTorch differ by {worst:.1e}"
                raise UserError(f"{path}: {sentence}")
    except Exception as error:
        # For a missing package, older versions of torch raise an error of their own.
        if isinstance(error.__cause__, ImportError):
            raise error.__cause__ from None
        raise
    return f"opset 18, any size, within {worst:.1e} of PyTorch at {len(sizes)} sizes"


def trace_onnx(net: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    import onnx

    sides = {0: "batch", 2: "height", 3: "width"}
    # Sides that are no multiples of the window: otherwise the graph would not pad.
    example = torch.rand(1, net.in_chans, 2 * net.multiple + 1, 2 * net.multiple + 1)
    with warnings.catch_warnings(), torch.enable_grad():  # with gradients: all windows at once
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (example,),
            path,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": sides, "y": sides},
            opset_version=18,
            dynamo=False,
        )
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, metadata)
    onnx.save(graph, path)


def onnx_difference(net: nn.Module, path: Path, sizes: list[tuple[int, int, int]]) -> float:
    from onnxruntime import InferenceSession

    differences = []
    try:
        session = InferenceSession(path)
        for batch, height, width in sizes:
            x = torch.rand(batch, net.in_chans, height, width)
            (y,) = session.run(None, {"x": x.numpy()})
            want = restore(net, x).numpy()
            if y.shape != want.shape:
                return float("inf")
            differences.append(np.max(abs(y - want)))
    except Exception as error:  # onnxruntime's have no common class
        raise UserError(f"ONNX can't run this network: {one_line(error)}") from error
    return float(np.max(differences))  # NaN where one is


def onnx_path(path: Path) -> Path:
    """net.onnx for net.onnx, net.pth and net; net.v1.2.onnx for net.v1.2."""
    if path.suffix.lower() in (".onnx", ".pth", ".pt", ".ckpt", ".safetensors"):
        return path.with_suffix(".onnx")
    return path.with_name(path.name + ".onnx")


# By suffix: function(network, path, metadata), which returns a sentence about the file
EXPORTS = {".safetensors": export_safetensors, ".onnx": export_onnx}

# OpenModelDB's tags for what a network does, by the degradation that it was trained with
OPENMODELDB_TAGS = {
    "noise": ["denoise", "restoration"],
    "jpeg": ["compression-removal", "jpeg", "restoration"],
    "bicubic": ["general-upscaler"],
    "bsrgan": ["compression-removal", "deblur", "denoise", "general-upscaler", "restoration"],
    "realesrgan": ["compression-removal", "deblur", "denoise", "general-upscaler", "restoration"],
}


def openmodeldb_entry(
    net: nn.Module, network: str, facts: dict[str, str], files: list[Path]
) -> dict[str, Any]:
    """What https://openmodeldb.info asks for, as in its data/models/*.json. Author, license and
    addresses are left to fill in."""
    entry = {
        "name": files[0].stem,
        "author": "",
        "license": None,
        "tags": OPENMODELDB_TAGS.get(facts.get("degradation", ""), ["restoration"]),
        "description": describe_network(net, facts),
        "date": datetime.date.today().isoformat(),
        "architecture": network,
        "size": openmodeldb_size(net) if network == "swinir" else None,
        "scale": net.factor,
        "inputChannels": net.in_chans,
        "outputChannels": net.in_chans,
        "resources": [openmodeldb_resource(path) for path in files],
    }
    numbers = {
        "trainingIterations": "iterations",
        "trainingBatchSize": "batch_size",
        "trainingHRSize": "gt_size",
    }
    for key, fact in numbers.items():
        if fact in facts:
            entry[key] = int(facts[fact])
    if "degradation" in facts:
        entry["trainingOTF"] = facts["degradation"] != "pairs"  # on the fly
    if "dataset" in facts:
        entry["dataset"] = facts["dataset"]
    if "pretrain_network" in facts:
        entry["pretrainedModelG"] = facts["pretrain_network"]
    return entry | {"images": []}


def openmodeldb_size(net: nn.Module) -> list[str]:
    """As spandrel names sizes of SwinIR, from which OpenModelDB takes it."""
    arguments = net.arguments
    size = "medium"
    if len(arguments["depths"]) <= 4:
        size = "small"
    elif len(arguments["depths"]) >= 9:
        size = "large"
    side = arguments["img_size"]
    side = side if isinstance(side, int) else side[0]
    tags = [size, f"s{side}w{arguments['window_size']}"]
    if arguments["upsampler"] in ("pixelshuffle", "nearest+conv"):
        tags.append("64nf")  # channels of the upsampler
    return [*tags, f"{arguments['embed_dim']}dim", arguments["resi_connection"]]


def openmodeldb_resource(path: Path) -> dict[str, Any]:
    kind = path.suffix.lower().removeprefix(".")
    content = path.read_bytes()
    return {
        "platform": "onnx" if kind == "onnx" else "pytorch",
        "type": kind,
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "urls": [],
    }


# Command line


def main() -> int | str | None:
    args = parse_arguments()
    data_module().escape_unprintable()
    path = find_network(args.net)
    if path != args.net:
        print(f"network: {path}")
    if args.export:
        export_files(path, args)
        return None

    suffix = output_suffix(args)
    target = args.output or default_output(args.input, suffix)
    jobs = list_jobs(args.input, target, suffix)
    if args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(free_cores(), torch.get_num_threads()))
    check_device(args.device)
    net = load(path, args.param_key, args.device)
    to_do = [(image, output) for image, output in jobs if args.overwrite or not output.exists()]
    restored, failed = restore_files(net, to_do, args)

    already = len(jobs) - len(to_do)
    if args.input.is_dir():
        print(count_images(target, len(restored), already))
    elif already:
        print(f"{jobs[0][1]} is there already (--overwrite restores it again)")
    elif restored:
        print(restored[0])
    if failed and args.input.is_dir():
        return f"error: {len(failed)} of {len(to_do)} images failed: {listed(failed)}"
    if failed:
        return 1  # its error is already printed
    folder = run_folder(path)
    if restored and folder:
        print(f"publish it: {export_command(args, folder.name)}")
    return None


class CommandLine(argparse.ArgumentParser):
    """Reports a mistake in one sentence, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


def parse_arguments() -> argparse.Namespace:
    formats = [suffix.removeprefix(".") for suffix in data_module().WRITTEN]
    cli = CommandLine(
        description="Restores an image, or all images in a folder; or exports a network.",
        epilog="Images that are there already are skipped, so a command that was stopped goes on. "
        "PNG and TIFF keep bits, transparency, colour profile and EXIF.",
    )
    cli.add_argument(
        "net",
        metavar="NET",
        type=Path,
        help="a run's folder, such as experiments/mine, or a file: ours, official, BasicSR's, "
        "KAIR's",
    )
    cli.add_argument("input", metavar="INPUT", nargs="?", type=Path, help="an image or a folder")
    cli.add_argument(
        "output",
        metavar="OUTPUT",
        nargs="?",
        type=Path,
        help="a file, whose suffix is its format, or a folder (default: beside INPUT, with "
        "_restored in the name)",
    )
    cli.add_argument("--format", choices=formats, help="of the images in a folder (default: png)")
    cli.add_argument(
        "--quality", type=int, help="1 to 100: of JPEG (default: 95), of WebP (default: lossless)"
    )
    cli.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    cli.add_argument("--param_key", default="params_ema", help="which weights (%(default)s)")
    cli.add_argument("--tile", type=int, help="input pixels (default: whole, or as memory allows)")
    cli.add_argument("--overlap", type=int, default=32, help="of tiles, in pixels (default: 32)")
    cli.add_argument(
        "--ensemble", action="store_true", help="mean of 8 symmetries: 8 times as slow"
    )
    cli.add_argument(
        "--device", default=default_device(), help="cpu, cuda, cuda:1, mps (%(default)s)"
    )
    cli.add_argument("--bf16", action="store_true", help="bfloat16: faster, a little less exact")
    cli.add_argument(
        "--export",
        metavar="FILE",
        type=Path,
        action="append",
        default=[],
        help="write the network as FILE.safetensors or FILE.onnx instead; may be repeated",
    )
    cli.add_argument("--onnx", metavar="FILE", type=Path, help="the same as --export FILE.onnx")
    cli.add_argument(
        "--openmodeldb",
        metavar="FILE",
        type=Path,
        help="beside --export: write the JSON that openmodeldb.info asks for",
    )
    args = cli.parse_intermixed_args()
    if args.onnx:
        args.export.append(onnx_path(args.onnx))
    check_usage(cli, args)
    return args


def check_usage(cli: CommandLine, args: argparse.Namespace) -> None:
    if args.input is None and not args.export:
        cli.error("give an image or a folder after NET, or --export=FILE")
    if args.input is not None and args.export:
        cli.error("--export writes the network and restores nothing: leave INPUT out")
    if args.openmodeldb and not args.export:
        cli.error("--openmodeldb describes an exported file: give --export=FILE, too")
    if args.quality is not None and not 1 <= args.quality <= 100:
        cli.error(f"--quality={args.quality} must be from 1 to 100")


def find_network(path: Path) -> Path:
    """The file itself; of a run's folder the best network, or else the newest."""
    if not path.is_dir():
        return path
    best = path / "models" / "net_g_best.pth"
    if best.exists():
        return best
    files = {}
    for file in path.glob("models/net_g_*.pth"):
        iteration = file.stem.removeprefix("net_g_")
        if iteration.isdecimal():
            files[int(iteration)] = file
    if files:
        return files[max(files)]
    raise UserError(
        f"{path}: a folder without models/net_g_best.pth or models/net_g_<iter>.pth: give the "
        "folder of a run, or train longer: a network comes with the first validation or checkpoint"
    )


def export_files(path: Path, args: argparse.Namespace) -> None:
    for target in args.export:
        if target.suffix.lower() not in EXPORTS:
            raise UserError(f"--export={target}: give a file that ends in {' or '.join(EXPORTS)}")
        if target.exists() and target.samefile(path):
            raise UserError(f"--export={target}: that is the network itself: give another name")
    net = load(path, args.param_key)
    _, about = read_weights(path, args.param_key)
    facts = training_facts(path, about)
    for target in args.export:
        metadata = metadata_of(net, about["network"], facts, target.stem)
        print(f"{target}: {EXPORTS[target.suffix.lower()](net, target, metadata)}")
    print(f"its metadata: {describe_network(net, facts)}")
    if args.openmodeldb:
        entry = openmodeldb_entry(net, about["network"], facts, args.export)
        with whole_file(args.openmodeldb) as part:
            part.write_text(json.dumps(entry, indent=4, ensure_ascii=False), encoding="utf-8")
        print(f"{args.openmodeldb}: fill in author, license and urls, and check the rest")


def export_command(args: argparse.Namespace, name: str) -> str:
    words = ["python", "model.py", str(args.net), "--export", f"{name}.safetensors"]
    if args.param_key != "params_ema":
        words.append(f"--param_key={args.param_key}")
    return shlex.join(words)


def free_cores() -> int:
    """How many cores are idle, at least 1; all cores where the system doesn't tell.

    OpenMP's threads wait for each other: two of them beside a busy process take up to twenty
    times as long as one.
    """
    if not hasattr(os, "sched_getaffinity") or not Path("/proc/stat").exists():
        return os.cpu_count() or 1
    cores = os.sched_getaffinity(0)
    most = 0.0
    for _ in range(5):  # the best of five: what runs for an instant does not count
        idle_before, total_before = cpu_ticks(cores)
        time.sleep(0.1)
        idle, total = cpu_ticks(cores)
        shares = (idle - idle_before) / np.maximum(total - total_before, 1)
        most = max(most, float(shares.sum()))
        if round(most) >= len(cores):
            break
    return max(round(most), 1)


def cpu_ticks(cores: set[int]) -> tuple[np.ndarray, np.ndarray]:
    """Ticks since the machine started, idle and in all, of each core."""
    idle, total = [], []
    for line in Path("/proc/stat").read_text().splitlines():
        match = re.match(r"cpu(\d+) (.*)", line)
        if match and int(match[1]) in cores:
            ticks = [int(word) for word in match[2].split()[:8]]
            idle.append(ticks[3] + ticks[4])  # idle, waiting for a disk
            total.append(sum(ticks))
    return np.array(idle), np.array(total)


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:  # a device that is unknown, or not there
        reason = str(error).splitlines()[0]
        raise UserError(f"--device={name} can't be used here: {reason}") from None


def output_suffix(args: argparse.Namespace) -> str:
    """The suffix of the images that are written, such as ".png"."""
    data = data_module()
    suffix = f".{args.format or 'png'}"
    # What ends like an image is a file. All else, such as restored_v1.2, is a folder.
    if args.output and args.output.suffix.lower() in data.IMAGE_SUFFIXES:
        suffix = args.output.suffix.lower()
        if args.input.is_dir():
            raise UserError(f"{args.output}: {args.input} is a folder: give a folder for it, too")
        if suffix not in data.WRITTEN:
            raise UserError(f"{args.output}: give it a suffix of {', '.join(data.WRITTEN)}")
        if args.format and data.WRITTEN[f".{args.format}"] != data.WRITTEN[suffix]:
            raise UserError(
                f"{args.output}: --format={args.format} is another format: leave it out"
            )
    if args.quality is not None and data.WRITTEN[suffix] not in ("JPEG", "WEBP"):
        raise UserError(f"--quality is for JPEG and WebP, not for {suffix}: give --format=jpg")
    return suffix


def default_output(source: Path, suffix: str) -> Path:
    """photo_restored.png beside photo.jpg, photos_restored beside photos/."""
    if source.is_dir():
        if source.name in ("", ".."):
            source = source.resolve()
        return source.with_name(f"{source.name}_restored")
    return source.with_name(data_module().fit_name(f"{source.stem}_restored{suffix}"))


def list_jobs(source: Path, target: Path, suffix: str) -> list[tuple[Path, Path]]:
    """(image, output) for each image."""
    if not source.exists():
        raise UserError(f"{source} does not exist")
    if source.is_dir():
        jobs = list_jobs_of_folder(source, target, suffix)
    elif target.suffix.lower() == suffix:
        jobs = [(source, target)]
    else:
        jobs = [(source, target / f"{source.stem}{suffix}")]
    outputs = Counter(output for _, output in jobs)
    for path, output in jobs:
        if outputs[output] > 1:
            raise UserError(f"{path}: another image would be restored to {output}, too: rename one")
    # Otherwise outputs would be taken for inputs the next time, or lie among the user's own files.
    here = source.resolve()
    inside = any(output.resolve().is_relative_to(here) for _, output in jobs)
    if inside or target.resolve() == here.parent:
        raise UserError(f"{target}: the output must be neither {source}, nor its folder, nor in it")
    return jobs


def list_jobs_of_folder(source: Path, target: Path, suffix: str) -> list[tuple[Path, Path]]:
    """Outputs of images that differ in their suffix alone keep it: a.jpg.png, a.tif.png."""
    data = data_module()
    others = Counter()
    names = [path.relative_to(source) for path in data.list_images(source, others)]
    if others:
        print(f"note: {source}{data.name_others(others)}", file=sys.stderr)
    alike = data.differ_in_suffix_only(names)
    jobs = []
    for name in names:
        output = name.with_suffix(suffix)
        if name in alike:
            output = name.with_name(data.fit_name(name.name + suffix))
        jobs.append((source / name, target / output))
    return jobs


def restore_files(
    net: nn.Module, jobs: list[tuple[Path, Path]], args: argparse.Namespace
) -> tuple[list[str], list[str]]:
    """Restores each image. Reports those that fail, and continues.

    Returns a sentence about each image that was restored, and the paths of those that failed.
    """
    restored = []
    failed = []
    hidden = True if len(jobs) == 1 else None  # None: shown in a terminal
    for path, output in tqdm(jobs, "restoring", unit="image", leave=False, disable=hidden):
        try:
            restored.append(restore_file(net, path, output, args))
        except (ValueError, RuntimeError, OSError, MemoryError) as error:
            failed.append(str(path))
            reason = str(error).removeprefix(str(path)).lstrip(": ") or type(error).__name__
            tqdm.write(f"error: {path}: {reason}", file=sys.stderr)
    return restored, failed


def restore_file(net: nn.Module, path: Path, output: Path, args: argparse.Namespace) -> str:
    """Returns a sentence about the output."""
    data = data_module()
    begin = time.perf_counter()
    pixels = data.read_image(path, alpha=True)
    kind = args.device.split(":")[0]
    with torch.autocast(kind, torch.bfloat16, enabled=args.bf16):
        restored = restore_pixels(net, pixels, args.tile, args.overlap, args.ensemble)
    metadata, note = data.read_metadata(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    dropped = data.write_image(output, restored, **metadata, quality=args.quality)
    if dropped:  # also by the format that is written; a note ends in a list of what is dropped
        note = f"{note}, {dropped}" if note else f"{path}: dropped: {dropped}"
    if note:
        tqdm.write(f"note: {note}", file=sys.stderr)
    height, width = restored.shape[:2]
    return f"{output}: {width:,} x {height:,} pixels, {time.perf_counter() - begin:.1f} s"


def count_images(target: Path, restored: int, already: int) -> str:
    images = "image" if restored == 1 else "images"
    sentence = f"{restored:,} {images} restored to {target}/"
    if already == 1:
        sentence += "; 1 was there already (--overwrite restores it, too)"
    elif already:
        sentence += f"; {already:,} were there already (--overwrite restores them, too)"
    return sentence


def data_module() -> Any:
    """data.py, which reads and writes the image files of the command line."""
    try:
        import data
    except ModuleNotFoundError as error:
        if error.name != "data":
            raise
        raise UserError("the command needs data.py beside model.py: copy it there, too") from error
    return data


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}: pip install {error.name.partition('.')[0]}")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped")
