"""SwinIR (Liang et al. 2021, https://arxiv.org/abs/2108.10257): the network, and everything to use one.

    python model.py net_g_best.pth photos/ restored/   # a file or a folder; see --help

    net = load("net_g_best.pth")                       # ours, official, BasicSR, KAIR: the file is enough
    output = restore(net, image)                       # (B, C, H, W) float in [0, 1], any size

Constructor arguments, state-dict keys, outputs and gradients are those of the authors' network
(https://github.com/JingyunLiang/SwinIR, models/network_swinir.py), so weights go both ways.

Shapes: B batch, H W image, C channels, L = H*W tokens, h heads, d = C/h, n = L/N windows of w x w = N tokens.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from functools import lru_cache
from math import isqrt, prod
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ---- geometry: where a token stands ----


@lru_cache(maxsize=8)
def relative_position_index(w: int) -> Tensor:
    """(N, N) row of the bias table for each pair of tokens: (dy + w-1) * (2w-1) + (dx + w-1)."""
    token = torch.arange(w * w, device="cpu")
    y, x = token // w, token % w
    return (y[:, None] - y + w - 1) * (2 * w - 1) + (x[:, None] - x + w - 1)


@lru_cache(maxsize=8)
def window_order(H: int, W: int, w: int, shift: int, device: Any = "cpu") -> tuple[Tensor, Tensor]:
    """Two (L,) permutations: `to` gathers raster tokens into shifted windows, `back` gathers them back."""
    with torch.inference_mode(False):  # cached, so it must also be fit for training
        raster = torch.arange(H * W, device=device)
        to = raster.view(H, W).roll((-shift, -shift), (0, 1))
        to = to.view(H // w, w, W // w, w).transpose(1, 2).reshape(-1)
        back = raster.view(H // w, W // w, w, w).transpose(1, 2).reshape(H, W)
        return to, back.roll((shift, shift), (0, 1)).reshape(-1)


@lru_cache(maxsize=4)
def shift_mask(H: int, W: int, w: int, shift: int, device: Any = "cpu") -> Tensor:
    """(n, N, N): 0, or -100 (published so, not -inf) between tokens that only the shift made neighbours."""
    with torch.inference_mode(False):
        y, x = torch.arange(H, device=device)[:, None], torch.arange(W, device=device)
        region = 3 * ((y >= H - w).long() + (y >= H - shift)) + (x >= W - w).long() + (x >= W - shift)
        region = region.view(H // w, w, W // w, w).transpose(1, 2).reshape(-1, w * w)
        return (region[:, None, :] != region[:, :, None]) * -100.0


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


# ---- the blocks ----


class DropPath(nn.Module):
    """Stochastic depth: drops a sample's branch. As a tensor, the rate lets compiled blocks share code."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of N tokens, with a learned bias per relative position and head."""

    def __init__(self, dim, window, heads, qkv_bias, qk_scale, attn_drop, drop) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, qk_scale or (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, L, C = x.shape
        N, h = self.window**2, self.heads
        q, k, v = self.qkv(x).view(-1, N, 3, h, C // h).permute(2, 0, 3, 1, 4)  # each (B*n, h, N, d)
        bias = F.embedding(self.index, self.relative_position_bias_table).permute(2, 0, 1)  # (h, N, N)
        attn = (q * self.scale) @ k.transpose(-2, -1) + bias
        if mask is not None:
            attn = (attn.view(B, -1, h, N, N) + mask[:, None]).view(-1, h, N, N)
        x = self.attn_drop(attn.softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, L, C)))

    # Official files also hold the index, and the mask of the training size. Both are known without them.

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "relative_position_index"] = relative_position_index(self.window)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(prefix + "relative_position_index", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Tokens stay in window order: only attention cares."""

    def __init__(self, norm1, attn, drop_path, norm2, mlp, shift: int, img_size: tuple[int, int]) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path, self.norm2, self.mlp = norm1, attn, drop_path, norm2, mlp
        self.shift, self.img_size = shift, img_size

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        if self.shift:  # one tensor for all blocks, so one copy on disk
            destination[prefix + "attn_mask"] = shift_mask(*self.img_size, self.attn.window, self.shift)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        state_dict.pop(prefix + "attn_mask", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BasicLayer(nn.Module):
    """Blocks with shifts 0, w/2, 0, w/2...: one gather of the tokens between two blocks, none inside them."""

    def __init__(self, blocks: list[SwinBlock], use_checkpoint: bool) -> None:
        super().__init__()
        self.blocks, self.use_checkpoint = nn.ModuleList(blocks), use_checkpoint

    def forward(self, x: Tensor, geometry: dict) -> Tensor:
        order = "raster"
        for block in self.blocks:
            x = Reorder.apply(x, *geometry[order, block.shift])
            order, mask = block.shift, geometry["mask"] if block.shift else None
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return Reorder.apply(x, *geometry[order, "raster"])


class RSTB(nn.Module):
    """Residual Swin Transformer block: Swin blocks, a convolution, a skip."""

    def __init__(self, dim: int, blocks: list[SwinBlock], use_checkpoint: bool, resi_connection: str) -> None:
        super().__init__()
        self.residual_group = BasicLayer(blocks, use_checkpoint)
        self.conv = body_conv(dim, resi_connection)

    def forward(self, x: Tensor, geometry: dict) -> Tensor:
        return x + tokens(self.conv(grid(self.residual_group(x, geometry), geometry["size"])))


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, 1, 1)


def body_conv(dim: int, resi_connection: str) -> nn.Module:
    if resi_connection == "1conv":
        return conv3(dim, dim)
    slim = dim // 4
    act1, act2 = nn.LeakyReLU(0.2, inplace=True), nn.LeakyReLU(0.2, inplace=True)
    return nn.Sequential(conv3(dim, slim), act1, nn.Conv2d(slim, slim, 1), act2, conv3(slim, dim))


# ---- the network ----


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
        if len(depths) != len(num_heads):
            raise ValueError(f"depths {depths} and num_heads {num_heads} must have one entry for each layer")
        if any(embed_dim % h for h in num_heads):
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of each of num_heads {num_heads}")
        if resi_connection not in ("1conv", "3conv"):
            raise ValueError(f"resi_connection {resi_connection!r} is unknown: use '1conv' or '3conv'")
        self.upscale, self.img_range, self.upsampler = upscale, img_range, upsampler or ""
        mean = (0.4488, 0.4371, 0.4040) if in_chans == 3 else (0.0,)  # DIV2K's mean colour
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        size = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
        size = (size[0] // patch_size, size[1] // patch_size)
        self.window_size, self.window = window_size, min(window_size, *size)
        self.shift = self.window // 2 if min(size) > window_size else 0

        # 1. shallow features
        self.conv_first = conv3(in_chans, embed_dim)

        # 2. deep features
        self.ape_size = size if ape else None
        if ape:
            self.absolute_pos_embed = nn.Parameter(torch.zeros(1, size[0] * size[1], embed_dim))
            nn.init.trunc_normal_(self.absolute_pos_embed, std=0.02)
        self.patch_embed = nn.Sequential()
        if patch_norm:
            self.patch_embed.add_module("norm", norm_layer(embed_dim))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.layers = nn.ModuleList()
        for depth, heads in zip(depths, num_heads, strict=True):
            blocks = []
            for i in range(depth):
                attn = WindowAttention(
                    embed_dim, self.window, heads, qkv_bias, qk_scale, attn_drop_rate, drop_rate
                )
                drop_path = DropPath(next(rates)) if drop_path_rate else nn.Identity()
                mlp = Mlp(embed_dim, int(embed_dim * mlp_ratio), drop_rate)
                norm1, norm2, shift = norm_layer(embed_dim), norm_layer(embed_dim), self.shift if i % 2 else 0
                blocks.append(SwinBlock(norm1, attn, drop_path, norm2, mlp, shift, size))
            self.layers.append(RSTB(embed_dim, blocks, use_checkpoint, resi_connection))
        self.norm = norm_layer(embed_dim)
        self.conv_after_body = body_conv(embed_dim, resi_connection)

        # 3. reconstruction
        if self.upsampler in ("pixelshuffle", "nearest+conv"):
            self.conv_before_upsample = nn.Sequential(conv3(embed_dim, 64), nn.LeakyReLU(inplace=True))
        if self.upsampler == "pixelshuffle":
            if upscale != 3 and upscale & (upscale - 1):
                raise ValueError(f"upscale {upscale} doesn't go with 'pixelshuffle': use 3 or a power of 2")
            steps = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
            shuffles = [m for s in steps for m in (conv3(64, 64 * s * s), nn.PixelShuffle(s))]
            self.upsample = nn.Sequential(*shuffles)
            self.conv_last = conv3(64, in_chans)
        elif self.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(conv3(embed_dim, upscale**2 * in_chans), nn.PixelShuffle(upscale))
        elif self.upsampler == "nearest+conv":
            if upscale not in (2, 4):
                raise ValueError(f"upscale {upscale} doesn't go with 'nearest+conv': use 2 or 4")
            self.conv_up1 = conv3(64, 64)
            if upscale == 4:
                self.conv_up2 = conv3(64, 64)
            self.conv_hr = conv3(64, 64)
            self.conv_last = conv3(64, in_chans)
        elif self.upsampler == "":
            self.conv_last = conv3(embed_dim, in_chans)
        else:
            known = "'', 'pixelshuffle', 'pixelshuffledirect' or 'nearest+conv'"
            raise ValueError(f"upsampler {upsampler!r} is unknown: use {known}")

        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def geometry(self, H: int, W: int, device: Any) -> dict:
        """What blocks must know of a padded size: gathers (index, inverse) between token orders, the mask."""
        orders: dict = {s: window_order(H, W, self.window, s, device) for s in (0, self.shift)}
        g: dict = {"size": (H, W)}
        if self.shift:
            g["mask"] = shift_mask(H, W, self.window, self.shift, device)
        for a, (to_a, back_a) in orders.items():
            g["raster", a], g[a, "raster"] = (to_a, back_a), (back_a, to_a)
            for b, (to_b, back_b) in orders.items():
                g[a, b] = (back_a[to_b], back_b[to_a])
        return g

    def body(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape; H and W are multiples of the window."""
        H, W = x.shape[2:]
        geometry = self.geometry(H, W, x.device)
        x = self.patch_embed(tokens(x))
        if self.ape_size:
            ape = grid(self.absolute_pos_embed, self.ape_size)
            x = x + tokens(ape if (H, W) == self.ape_size else F.interpolate(ape, (H, W), mode="bicubic"))
        x = self.pos_drop(x)
        for layer in self.layers:
            x = layer(x, geometry)
        return grid(self.norm(x), (H, W))

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        mean = self.mean.to(x.dtype)
        x = (pad_to_multiple(x, self.window_size) - mean) * self.img_range
        first = self.conv_first(x)
        y = self.conv_after_body(self.body(first)) + first
        if self.upsampler == "pixelshuffle":
            y = self.conv_last(self.upsample(self.conv_before_upsample(y)))
        elif self.upsampler == "pixelshuffledirect":
            y = self.upsample(y)
        elif self.upsampler == "nearest+conv":
            y = self.conv_before_upsample(y)
            y = F.leaky_relu(self.conv_up1(F.interpolate(y, scale_factor=2)), 0.2)
            if self.upscale == 4:
                y = F.leaky_relu(self.conv_up2(F.interpolate(y, scale_factor=2)), 0.2)
            y = self.conv_last(F.leaky_relu(self.conv_hr(y), 0.2))
        else:
            y = x + self.conv_last(y)
        return (y / self.img_range + mean)[:, :, : H * self.upscale, : W * self.upscale]


# ---- weights: files in and out ----


@lru_cache(maxsize=8)
def small(buffer: Tensor) -> Tensor:
    """The index as int16, the mask (0 or -100) as int8; cached, so that one file holds them once."""
    return buffer.to(torch.int8 if buffer.is_floating_point() else torch.int16)


def portable(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict's copy for a file: contiguous, on the CPU, plain keys; the buffers are small and shared.

    The official class, BasicSR's and spandrel's load it with strict=True (they copy into their own buffers).
    """
    out = {}
    for k, v in state_dict.items():
        buffer = k.endswith(("attn_mask", "relative_position_index"))
        v = small(v) if buffer else v.detach().cpu().clone(memory_format=torch.contiguous_format)
        out[plain(k)] = v
    return out


def plain(key: str) -> str:
    """The key without the prefixes of DataParallel and torch.compile."""
    return re.sub(r"^((module|_orig_mod)\.)+", "", key)


def read_weights(path: str | Path, param_key: str) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint's (state dict, network arguments or {}), out of any wrapping. Runs no code of the file."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from e
    except Exception as e:
        why = "damaged, or holds more than tensors and plain values, which could run code when read"
        raise ValueError(
            f"{path}: not a checkpoint ({why}): get it again, or save its state_dict alone"
        ) from e
    file = file if isinstance(file, dict) else {}
    keys = (param_key, "params_ema", "params-ema", "params", "state_dict", "model_state_dict")
    weights = next((file[k] for k in keys if isinstance(file.get(k), dict)), file)
    weights = {plain(k): v for k, v in weights.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if "conv_first.weight" not in weights:
        raise ValueError(f"{path}: holds no SwinIR weights (conv_first.weight is missing)")
    return weights, file["arguments"] if isinstance(file.get("arguments"), dict) else {}


def arguments_of(weights: dict[str, Tensor]) -> tuple[dict, dict]:
    """SwinIR's arguments off the tensors' shapes: those that are certain, those that are only likely."""
    block = "layers.{}.residual_group.blocks.{}."
    table = block.format("{}", 0) + "attn.relative_position_bias_table"
    dim, chans = weights["conv_first.weight"].shape[:2]
    depths = Counter(
        int(k.split(".")[1])
        for k in weights
        if re.fullmatch(block.format(r"\d+", r"\d+") + "norm1.weight", k)
    )
    window = (isqrt(len(weights[table.format(0)])) + 1) // 2
    hidden = len(weights[block.format(0, 0) + "mlp.fc1.bias"])
    shuffled = 64 if "conv_last.weight" in weights else chans
    shuffles = [len(v) // shuffled for k, v in weights.items() if re.fullmatch(r"upsample\.\d+\.weight", k)]
    ups = sum(k in weights for k in ("conv_up1.weight", "conv_up2.weight"))
    upsampler = (
        "nearest+conv" if ups else "pixelshuffle" if "conv_before_upsample.0.weight" in weights else ""
    )
    certain = {
        "in_chans": chans,
        "embed_dim": dim,
        "depths": [depths[i] for i in range(len(depths))],
        "num_heads": [weights[table.format(i)].shape[1] for i in range(len(depths))],
        "qkv_bias": block.format(0, 0) + "attn.qkv.bias" in weights,
        "ape": "absolute_pos_embed" in weights,
        "patch_norm": "patch_embed.norm.weight" in weights,
        "upscale": 2**ups * prod(isqrt(s) for s in shuffles),
        "upsampler": upsampler or ("pixelshuffledirect" if shuffles else ""),
        "resi_connection": "1conv" if "conv_after_body.weight" in weights else "3conv",
    }
    size = 64 // window * window
    if certain["ape"]:
        size = isqrt(weights["absolute_pos_embed"].shape[1])
    elif (mask := weights.get(block.format(0, 1) + "attn_mask")) is not None:
        size = isqrt(len(mask)) * window
    likely = {
        "img_size": size,
        "window_size": window,
        "mlp_ratio": hidden / dim if int(hidden / dim * dim) == hidden else (hidden + 0.5) / dim,
        "img_range": 255.0
        if window == 7
        else 1.0,  # only the JPEG networks have windows of 7; as spandrel does
    }
    return certain, likely


def load(path: str | Path, param_key: str = "params_ema", device: Any = "cpu") -> SwinIR:
    """The network in a file, in eval mode: ours, official, BasicSR, KAIR. ValueError names what is wrong."""
    weights, stated = read_weights(path, param_key)
    try:
        certain, likely = arguments_of(weights)
        net = SwinIR(**likely | stated | certain)
        net.load_state_dict(weights)
    except (RuntimeError, KeyError, TypeError, ValueError, ArithmeticError) as e:
        why = " ".join(str(e).split())[:300]
        raise ValueError(f"{path}: not a SwinIR that this program knows: {why}") from e
    return net.to(device).eval()


def load_weights(net: SwinIR, path: str | Path, param_key: str = "params_ema", strict: bool = True) -> str:
    """Copies a file's tensors into `net` for fine-tuning and says what was taken.

    strict=False leaves tensors that are missing or have another shape. None taken, or any left with
    strict=True, is a ValueError.
    """
    weights, _ = read_weights(path, param_key)
    own = dict(net.named_parameters())
    taken = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    others = [k for k in weights if k not in own and not k.endswith(("attn_mask", "relative_position_index"))]
    left = [k for k in own if k not in taken] + others
    names = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
    if not taken:
        raise ValueError(f"{path}: none of its tensors fits this network")
    if strict and left:
        raise ValueError(f"{path}: {names} don't fit this network; strict_load=False takes the others")
    net.load_state_dict(taken, strict=False)
    return f"{len(taken)} of {len(own)} tensors taken" + (f"; left: {names}" if left else "")


# ---- restoring images ----


def spans(n: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """(start, end) of tiles along n pixels: the last is shorter, at most two overlap."""
    return [(s, min(s + tile, n)) for s in range(0, max(n - overlap, 1), tile - overlap)]


def blend(out: Tensor, part: Tensor, start: int, overlap: int, dim: int) -> None:
    """Writes `part` into `out` from `start` on, fading over what the part before has written."""
    if start and overlap:
        t = (torch.arange(overlap, device=out.device, dtype=out.dtype) + 0.5) / overlap
        fade = (t**8 / (t**8 + (1 - t) ** 8)).view(-1, *[1] * (out.ndim - 1 - dim))
        out.narrow(dim, start, overlap).lerp_(part.narrow(dim, 0, overlap), fade)
        start, part = start + overlap, part.narrow(dim, overlap, part.shape[dim] - overlap)
    out.narrow(dim, start, part.shape[dim]).copy_(part)


def symmetric(net: nn.Module, x: Tensor) -> Tensor:
    """The mean of the network's outputs for the eight rotations and mirrorings of (B, C, H, W)."""
    mean: Any = 0
    for k in range(8):
        y = net(x.rot90(k, (2, 3)).flip(3) if k > 3 else x.rot90(k, (2, 3)))
        y = (y.flip(3) if k > 3 else y).rot90(-k, (2, 3))
        mean = mean + (y - mean) / (k + 1)  # returns eight equal outputs exactly
    return mean


def affordable_pixels(net: SwinIR, device: torch.device) -> int:
    """How many input pixels fit in memory at a time: 1 GB on the CPU, most of what is free on a GPU."""
    a = net.arguments
    features = 8 * a["embed_dim"] + 64 * 4 * (net.upsampler != "") * a["upscale"] ** 2
    attention = 3 * max(a["num_heads"]) * net.window**2
    budget = 1e9
    if device.type == "cuda":
        budget = 0.7 * torch.cuda.mem_get_info(device)[0]
    return int(budget / 4 / (features + attention))


@torch.inference_mode()
def restore(
    net: SwinIR, image: Tensor, tile: int | None = None, overlap: int = 32, ensemble: bool = False
) -> Tensor:
    """The network's output for an image of any size, in tiles where the whole doesn't fit in memory.

    image: (B, C, H, W) in [0, 1], on any device; the output comes back there. tile, overlap: in pixels of
    the input; a tile never gets larger than memory allows. ensemble: the mean over the eight symmetries.
    """
    device, w = next(net.parameters()).device, net.window_size
    scale = net.upscale if net.upsampler else 1
    B, C, H, W = image.shape
    afford = affordable_pixels(net, device)
    limit = max(H, W) if B * H * W <= afford else isqrt(afford // B)
    size = max(-(-min(tile or limit, limit) // w), 1) * w
    while True:
        fade = max(min(overlap, size // 2) // w * w, 0)
        try:
            out = image.new_empty(B, C, H * scale, W * scale)
            for y0, y1 in spans(H, size, fade):
                strip = image.new_empty(B, C, (y1 - y0) * scale, W * scale)
                for x0, x1 in spans(W, size, fade):
                    part = image[..., y0:y1, x0:x1].to(device)
                    part = symmetric(net, part) if ensemble else net(part)
                    blend(strip, part.to(image), x0 * scale, fade * scale, 3)
                blend(out, strip, y0 * scale, fade * scale, 2)
            return out
        except torch.OutOfMemoryError:
            if size == w:
                raise
        size = max(size // 2 // w, 1) * w
        warnings.warn(f"out of memory: going on with tiles of {size} pixels", RuntimeWarning, stacklevel=2)
