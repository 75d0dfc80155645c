"""SwinIR (Liang et al. 2021, https://arxiv.org/abs/2108.10257): the network, and everything to use one.

    python model.py net_g_best.pth photos/ restored/   # a file or a folder; see --help
    output = restore(load("net_g_best.pth"), image)    # (B, C, H, W) float in [0, 1], any size

Arguments, their defaults, state-dict keys, outputs and gradients are the authors', so weights go both ways
(https://github.com/JingyunLiang/SwinIR, models/network_swinir.py). Shapes: B batch, H W image, C channels,
L = H*W tokens, h heads, d = C/h, n = L/N windows of w x w = N tokens.
"""

import argparse
import os
import re
import sys
import time
import warnings
import zlib
from collections import Counter, OrderedDict
from functools import lru_cache, partial
from math import isqrt, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm


@lru_cache(maxsize=4)
def geometry(H: int, W: int, w: int, shift: int, device: Any = "cpu") -> dict:
    """[a, b]: (L,) permutation that gathers tokens of order a into order b. Orders: "raster"; 0 and
    `shift`, by windows of the image rolled so far. "mask", if shifted: (n, N, N), 0, or -200 between tokens
    that only the roll made neighbours (published: -100, but exp(-100) is denormal: slow). "size": (H, W)."""
    with torch.inference_mode(False):  # cached, so it must also be fit for training
        image, grid = torch.arange(H * W, device=device).view(H, W), (H // w, w, W // w, w)
        order = {s: image.roll((-s, -s), (0, 1)).view(grid).transpose(1, 2).flatten() for s in (0, shift)}
        order["raster"] = image.flatten()
        place = {a: index.argsort() for a, index in order.items()}
        g: dict = {"size": (H, W)} | {(a, b): place[a][order[b]] for a in order for b in order if a != b}
        if shift:
            y, x = order[shift].view(-1, w * w) // W, order[shift].view(-1, w * w) % W
            region = 2 * (y < shift).long() + (x < shift)  # which of the two the roll brought round
            g["mask"] = (region[:, None, :] != region[:, :, None]) * -200.0
        return g


class Reorder(torch.autograd.Function):
    """x[:, index] for a permutation: its gradient is a gather by the inverse, much faster than index_add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(1, ctx.saved_tensors[0]), None, None


conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)
normal_ = partial(nn.init.trunc_normal_, std=0.02)
HEADS = ("", "pixelshuffledirect", "pixelshuffle", "nearest+conv")  # what `upsampler` may be
BUFFERS = ("attn_mask", "relative_position_index")
PREFIX = re.compile(r"^((module|_orig_mod)\.)+")  # of DataParallel and torch.compile
AMD = Path("/proc/cpuinfo").exists() and "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
shared: dict = {}  # buffers by content, so that a file holds one copy for all blocks


def slow_mkl(x: Tensor) -> bool:
    """Whether PyTorch multiplies x by MKL on an AMD CPU: eager float32."""
    eager = not (torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling() or torch.jit.is_tracing())
    return AMD and eager and x.dtype == torch.float32 and x.device.type == "cpu"


class Linear(nn.Linear):
    """In place of a slow MKL oneDNN, by a 1x1 convolution: half the time, but none gained without AVX-512."""

    def forward(self, x: Tensor) -> Tensor:  # (B, L, C)
        if not slow_mkl(x) or torch.backends.cpu.get_cpu_capability() != "AVX512":
            return super().forward(x)
        y = F.conv2d(x[:, None].permute(0, 3, 1, 2), self.weight[..., None, None], self.bias)
        return y.permute(0, 2, 3, 1).squeeze(1)


class MatMul(torch.autograd.Function):
    """a @ b for a slow MKL: what is narrow is computed transposed, in down to a third of the time."""

    product = staticmethod(lambda a, b: a @ b if a.shape[-2] <= b.shape[-1] else (b.mT @ a.mT).mT)

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return MatMul.product(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), grad = ctx.saved_tensors, grad.contiguous()
        return MatMul.product(grad, b.mT), MatMul.product(a.mT, grad)


class WindowAttention(nn.Module):
    """Multi-head attention inside windows of N tokens, with a learned bias per relative position and head."""

    def __init__(self, dim, window, heads, qkv_bias, qk_scale, attn_drop, drop) -> None:
        super().__init__()
        self.heads, self.window, self.scale = heads, window, qk_scale or (dim // heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(normal_(torch.empty((2 * window - 1) ** 2, heads)))
        row = (torch.arange(window)[:, None] * (2 * window - 1) + torch.arange(window)).flatten()
        self.register_buffer("relative_position_index", row[:, None] - row + row[-1])  # (N, N), of the table
        self.qkv, self.proj = Linear(dim, dim * 3, bias=qkv_bias), Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(drop)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        (B, L, C), N, h = x.shape, self.window**2, self.heads
        matmul = MatMul.apply if slow_mkl(x) else torch.matmul
        qkv = self.qkv(x).view(B, -1, N, 3, h, C // h).unbind(3)
        q, k, v = (i.transpose(2, 3).contiguous() for i in qkv)  # (B, n, h, N, d)
        bias = F.embedding(self.relative_position_index, self.relative_position_bias_table)  # (N, N, h)
        attn = matmul(q * self.scale, k.transpose(-2, -1))
        attn += bias.permute(2, 0, 1).contiguous().to(attn.dtype)  # strided it would be slow to add
        if mask is not None:
            attn += mask[:, None].to(attn.dtype)
        x = matmul(self.attn_drop(attn.softmax(-1)), v)
        return self.proj_drop(self.proj(x.transpose(2, 3).reshape(B, L, C)))


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). Tokens stay in window order: only attention cares."""

    def __init__(self, norm_layer, dim, hidden, drop, drop_path, attn, shift, mask) -> None:
        super().__init__()
        self.shift, self.whole = shift, drop_path == 0
        self.register_buffer("attn_mask", mask)  # of the training size, for the official class; unused here
        self.register_buffer("keep", torch.tensor(1.0 - drop_path), persistent=False)
        self.norm1, self.attn, self.norm2 = norm_layer(dim), attn, norm_layer(dim)
        mlp = {"fc1": Linear(dim, hidden), "act": nn.GELU(), "drop1": nn.Dropout(drop)}
        self.mlp = nn.Sequential(OrderedDict(mlp, fc2=Linear(hidden, dim), drop2=nn.Dropout(drop)))

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """x + branch, with stochastic depth. As a tensor, `keep` lets compiled blocks share code."""
        if not self.training or self.whole:
            return x + branch
        return x.addcmul(branch, (torch.rand(len(x), 1, 1, device=x.device) < self.keep) / self.keep)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.add(x, self.attn(self.norm1(x), mask))
        return self.add(x, self.mlp(self.norm2(x)))


class RSTB(nn.Module):
    """Residual Swin Transformer block: Swin blocks with shifts 0, w/2, 0, w/2..., a convolution, a skip."""

    def __init__(self, blocks: list[SwinBlock], conv: nn.Module, use_checkpoint: bool) -> None:
        super().__init__()
        self.residual_group = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.conv, self.use_checkpoint = conv, use_checkpoint

    def forward(self, x: Tensor, g: dict) -> Tensor:
        skip, order = x, "raster"
        for block in self.residual_group["blocks"]:
            if order != block.shift:  # the only gather: none inside the blocks
                x = Reorder.apply(x, g[order, block.shift], g[block.shift, order])
            order, mask, N = block.shift, g["mask"] if block.shift else None, block.attn.window**2
            if self.use_checkpoint and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            elif torch.is_grad_enabled() or torch.compiler.is_compiling():
                x = block(x, mask)
            else:  # some windows at a time: a third of the memory, and quicker as the CPU's cache holds them
                parts = x.split((4096 if x.device.type == "cpu" else 65536) // N * N, 1)
                masks = mask.split(parts[0].shape[1] // N) if block.shift else [None] * len(parts)
                for part, m in zip(parts, masks, strict=True):
                    part.copy_(block(part, m))
        x = Reorder.apply(x, g[order, "raster"], g["raster", order]).unflatten(1, g["size"])  # (B, H, W, C)
        return skip + self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)  # views, no copies


def body_conv(dim: int, resi_connection: str) -> nn.Module:
    if resi_connection == "1conv":
        return conv3(dim, dim)
    act, slim = partial(nn.LeakyReLU, 0.2, inplace=True), dim // 4
    return nn.Sequential(conv3(dim, slim), act(), nn.Conv2d(slim, slim, 1), act(), conv3(slim, dim))


class SwinIR(nn.Module):
    """The authors' network. `upsampler`: '' (denoising, JPEG), 'pixelshuffle' (classical SR, upscale 3 or a
    power of 2 up to 16), 'pixelshuffledirect' (lightweight SR), 'nearest+conv' (real-world SR, upscale 2, 4).
    `resi_connection`: '1conv', '3conv'. `img_size`, of training, fixes only the mask in the state dict, the
    size of the position embedding (`ape`), and that windows not smaller aren't shifted. `init_std`: deviation
    of linear weights at first. forward: (B, in_chans, H, W) in [0, 1], any size, to H*upscale, W*upscale."""

    def __init__(
        self, img_size=64, patch_size=1, in_chans=3, embed_dim=96, depths=(6, 6, 6, 6),
        num_heads=(6, 6, 6, 6), window_size=7, mlp_ratio=4.0, qkv_bias=True, qk_scale=None, drop_rate=0.0,
        attn_drop_rate=0.0, drop_path_rate=0.1, norm_layer=nn.LayerNorm, ape=False, patch_norm=True,
        use_checkpoint=False, upscale=2, img_range=1.0, upsampler="", resi_connection="1conv", init_std=0.02,
    ) -> None:  # fmt: skip
        args = {k: v for k, v in locals().items() if k not in ("self", "norm_layer", "init_std", "__class__")}
        self.arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in args.items()}
        super().__init__()
        if len(depths) != len(num_heads) or any(embed_dim % h for h in num_heads):
            raise ValueError(f"num_heads {num_heads}: one for each of depths {depths}, dividing {embed_dim=}")
        self.upscale, self.img_range, self.upsampler = upscale, img_range, upsampler or ""
        known = {"pixelshuffle": (1, 2, 3, 4, 8, 16), "nearest+conv": (2, 4)}.get(self.upsampler, [upscale])
        if self.upsampler not in HEADS or upscale not in known or resi_connection not in ("1conv", "3conv"):
            raise ValueError(f"unfit: {upscale=} (it can be {known}), {upsampler=} or {resi_connection=}")
        mean = (0.4488, 0.4371, 0.4040) if in_chans == 3 else (0.0,)  # DIV2K's mean colour
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        H, W = self.ape_size = [n // patch_size for n in np.broadcast_to(img_size, 2).tolist()]
        self.window_size, self.window = window_size, min(window_size, H, W)
        self.shift = self.window // 2 if min(H, W) > window_size else 0
        self.register_load_state_dict_pre_hook(SwinIR.keep_buffers)
        self.conv_first = conv3(in_chans, embed_dim)
        self.absolute_pos_embed = nn.Parameter(normal_(torch.empty(1, H * W, embed_dim))) if ape else None
        self.patch_embed = nn.Sequential(OrderedDict({"norm": norm_layer(embed_dim)} if patch_norm else {}))
        self.pos_drop = nn.Dropout(drop_rate)
        rates = iter([drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        mask = geometry(H, W, self.window, self.shift)["mask"] / 2 if self.shift else None
        shifts, self.layers = ((0, None), (self.shift, mask)), nn.ModuleList()
        for n, heads in zip(depths, num_heads, strict=True):
            attn = (embed_dim, self.window, heads, qkv_bias, qk_scale, attn_drop_rate, drop_rate)
            swin = (norm_layer, embed_dim, int(embed_dim * mlp_ratio), drop_rate)
            blocks = [SwinBlock(*swin, next(rates), WindowAttention(*attn), *shifts[i % 2]) for i in range(n)]
            self.layers.append(RSTB(blocks, body_conv(embed_dim, resi_connection), use_checkpoint))
        for name, p in self.layers.named_parameters():
            if re.search(r"(qkv|proj|fc\d)\.(weight|bias)$", name):
                normal_(p, std=init_std or 1e-9) if p.ndim > 1 else nn.init.zeros_(p)
        self.norm, self.conv_after_body = norm_layer(embed_dim), body_conv(embed_dim, resi_connection)
        wide, direct = upsampler in ("pixelshuffle", "nearest+conv"), upsampler == "pixelshuffledirect"
        dim, c = (64, 64) if wide else (embed_dim, in_chans)  # reconstruction: what a head lacks is empty
        before = [conv3(embed_dim, dim), nn.LeakyReLU(inplace=True)] if wide else []
        factors = [3] if upscale == 3 else [2] * (upscale.bit_length() - 1)
        steps = [upscale] if direct else factors if upsampler == "pixelshuffle" else []
        shuffles = [m for s in steps for m in (conv3(dim, c * s * s), nn.PixelShuffle(s))]
        self.conv_before_upsample, self.upsample = nn.Sequential(*before), nn.Sequential(*shuffles)
        self.ups = ("conv_up1", "conv_up2")[: upscale // 2] if self.upsampler == "nearest+conv" else ()
        for name in (*self.ups, "conv_hr") if self.ups else ():
            self.add_module(name, conv3(64, 64))
        self.conv_last = nn.Identity() if direct else conv3(dim, in_chans)
        for p in () if self.upsampler else self.conv_last.parameters():
            nn.init.zeros_(p)  # training begins at the identity: tenths of a dB in short runs

    def keep_buffers(self, state_dict: dict, prefix: str, *_: Any) -> None:
        """On loading: buffers follow from the arguments; files may lack them, or have another img_size's."""
        for k in [k for k in state_dict if k.endswith(BUFFERS)]:
            del state_dict[k]
        state_dict.update({prefix + k: v for k, v in self.state_dict().items() if k.endswith(BUFFERS)})

    def forward(self, x: Tensor) -> Tensor:
        (H, W), mean = x.shape[2:], self.mean.to(x.dtype)
        for dim, n in (2, H), (3, W):  # reflected up to whole windows, smaller images more than once
            if n % self.window_size:
                i = torch.arange(n + -n % self.window_size, device=x.device) % max(2 * n - 2, 1)
                x = x.index_select(dim, torch.minimum(i, (2 * n - 2 - i).abs()))
        x = (x - mean) * self.img_range
        first = self.conv_first(x)
        g = geometry(*first.shape[2:], self.window, self.shift, x.device)
        y = first.to(self.conv_first.weight.dtype)  # the residual stream: float32 even with autocast
        y = self.patch_embed(y.permute(0, 2, 3, 1).flatten(1, 2))  # (B, L, C)
        if self.absolute_pos_embed is not None:
            ape = self.absolute_pos_embed.unflatten(1, self.ape_size).permute(0, 3, 1, 2)
            y = y + F.interpolate(ape, g["size"], mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
        y = self.pos_drop(y)
        for layer in self.layers:
            y = layer(y, g)
        y = self.norm(y).unflatten(1, g["size"]).permute(0, 3, 1, 2)
        y = self.upsample(self.conv_before_upsample(self.conv_after_body(y) + first))
        for name in self.ups:
            y = F.leaky_relu(getattr(self, name)(F.interpolate(y, scale_factor=2)), 0.2)
        y = self.conv_last(F.leaky_relu(self.conv_hr(y), 0.2) if self.ups else y)
        y = (y if self.upsampler else x + y) / self.img_range + mean
        return y[:, :, : H * self.upscale, : W * self.upscale]


def portable(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy to save: contiguous CPU tensors under plain keys, the buffers in int8 and int16, and shared.
    Strict loading works in the official class, BasicSR's and spandrel's: they copy into their own buffers."""
    out = {PREFIX.sub("", k): v.detach().to("cpu", copy=True).contiguous() for k, v in state_dict.items()}
    for k in (k for k in out if k.endswith(BUFFERS)):
        v = out[k].to(torch.int8 if k.endswith("mask") else torch.int16)
        out[k] = shared.setdefault((v.shape, v.numpy().tobytes()), v)
    return out


def read_weights(path: str | Path, param_key: str) -> tuple[dict[str, Tensor], dict]:
    """(state dict, arguments or {}) of any checkpoint, unwrapped. Runs no code of the file; ValueError."""
    try:
        file = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
        others = "params-ema params state_dict model_state_dict".split() if param_key == "params_ema" else []
        weights = next((file[k] for k in [param_key, *others] if isinstance(file.get(k), dict)), file)
        weights = {PREFIX.sub("", k): v for k, v in weights.items() if isinstance(v, Tensor)}
        return weights, dict(file.get("arguments", {}))
    except Exception as e:  # unpickling a damaged file raises anything
        why = "refused: it is no checkpoint, or damaged, or holds more than tensors and plain values"
        raise ValueError(f"{path}: {getattr(e, 'strerror', '') or why}") from e


def load(path: str | Path, param_key: str = "params_ema", device: Any = "cpu") -> SwinIR:
    """The network in a file (ours, official, BasicSR, KAIR), in eval mode; ValueError says what is wrong.
    Arguments that don't show in the tensors' shapes are the file's own, or else the usual ones."""
    weights, stated = read_weights(path, param_key)
    try:
        dim, chans = weights["conv_first.weight"].shape[:2]
        layers = Counter(re.findall(r"^layers\.(\d+)\..*\.norm1\.weight$", "\n".join(weights), re.M))
        block = "layers.{}.residual_group.blocks.{}."
        tables = [weights[block.format(i, 0) + "attn.relative_position_bias_table"].shape for i in layers]
        w, hidden = (isqrt(tables[0][0]) + 1) // 2, len(weights[block.format(0, 0) + "mlp.fc1.bias"])
        shuffled = 64 if "conv_last.weight" in weights else chans
        shuffles = [isqrt(len(v) // shuffled) for k, v in weights.items() if re.match(r"upsample.*weight", k)]
        ups, ape = len({"conv_up1.weight", "conv_up2.weight"} & set(weights)), "absolute_pos_embed" in weights
        certain = {
            "in_chans": chans, "embed_dim": dim, "depths": list(layers.values()), "ape": ape,
            "num_heads": [t[1] for t in tables], "qkv_bias": block.format(0, 0) + "attn.qkv.bias" in weights,
            "patch_norm": "patch_embed.norm.weight" in weights, "upscale": 2**ups * prod(shuffles),
            "upsampler": HEADS[3 if ups else bool(shuffles) + ("conv_before_upsample.0.weight" in weights)],
            "resi_connection": "1conv" if "conv_after_body.weight" in weights else "3conv",
        }  # fmt: skip
        n = len(weights.get(block.format(0, 1) + "attn_mask", range((64 // w) ** 2)))
        size = isqrt(weights["absolute_pos_embed"].shape[1]) if ape else isqrt(n) * w
        ratio = hidden / dim if int(hidden / dim * dim) == hidden else (hidden + 0.5) / dim
        base = {"img_size": size, "window_size": w, "mlp_ratio": ratio, "img_range": 255.0 if w == 7 else 1.0}
        net = SwinIR(**base | stated | certain)  # img_range: spandrel's convention, after the JPEG networks
        net.load_state_dict(weights)
    except (RuntimeError, LookupError, TypeError, ValueError, ArithmeticError) as e:
        raise ValueError(f"{path}: holds no SwinIR known here: {' '.join(str(e).split())[:300]}") from e
    return net.to(device).eval()


def load_weights(net: SwinIR, path: str | Path, param_key: str = "params_ema", strict: bool = True) -> str:
    """Copies a file's tensors into `net`; says how many were taken, and which were left (strict=False only).
    Those are left that are missing or of another shape. ValueError: none taken, or strict and some left."""
    (weights, stated), own = read_weights(path, param_key), dict(net.named_parameters())
    taken = {k: v for k, v in weights.items() if k in own and v.shape == own[k].shape}
    left = [k for k in own | weights if k not in taken and not k.endswith(BUFFERS)]
    names = ", ".join(left[:5]) + f" and {len(left) - 5} more" * (len(left) > 5)
    other = "".join(f"; its {k} is {v!r}" for k, v in stated.items() if v != net.arguments.get(k))
    if not taken or (strict and left):
        raise ValueError(f"{path}: unfit: {names}; strict_load=False takes {len(taken)} of {len(own)}{other}")
    net.load_state_dict(taken, strict=False)
    return f"{path}: {len(taken)} of {len(own)} tensors taken" + f"; left: {names}" * bool(left) + other


def tiled(f: Any, x: Tensor, dim: int, size: int, lap: int, s: int) -> Tensor:
    """f(x), s times as large, in pieces along `dim`; each fades in, steeply but never from 0, over `lap`."""
    t = (torch.arange(lap * s, device=x.device, dtype=x.dtype) + 0.5) / (lap * s)
    fade = (t**8 / (t**8 + (1 - t) ** 8)).view(-1, *[1] * (3 - dim))
    out = x.new_empty(*x.shape[:2], x.shape[2] * s, x.shape[3] * s)
    steps, unit = range(0, max(x.shape[dim] - lap, 1), size - lap), "row" if dim == 2 else "tile"
    for start in tqdm(steps, unit=unit, leave=False, delay=3, disable=len(steps) < 2 or None):
        part = f(x.narrow(dim, start, min(size, x.shape[dim] - start)))
        if start > 0:
            head = part.narrow(dim, 0, lap * s)
            head.copy_(out.narrow(dim, start * s, lap * s).lerp(head, fade))
        out.narrow(dim, start * s, part.shape[dim]).copy_(part)
    return out


@torch.no_grad()
def restore(net: SwinIR, image: Tensor, tile: int | None = None, overlap=32, ensemble=False) -> Tensor:
    """The network's output for a float image (B, C, H, W) in [0, 1] of any size, on the image's device.
    tile, overlap: input pixels. Tiles stand on the window grid, at most two overlapping; without `tile`, and
    where it is too large for the memory, they are as large as fits. ensemble: mean of the 8 symmetries."""
    if image.shape[1:2] != net.mean.shape[1:2] or not image.is_floating_point():
        raise ValueError(f"give (B, {len(net.mean[0])}, H, W) floats, not {image.dtype} {[*image.shape]}")
    (B, C, H, W), cuda = image.shape, net.mean.is_cuda
    device, w, s = net.mean.device, net.window_size, net.upscale if net.upsampler else 1
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) if cuda else 0
    free = 0.7 * (torch.cuda.mem_get_info(device)[0] + cached) if cuda else 1.2e9  # bytes
    head = 3 * 64 if len(net.conv_before_upsample) else 2 * C  # channels at the output's size
    floats = B * (4 * net.arguments["embed_dim"] + 4 * w * w + 64 + head * s * s)  # per input pixel, measured
    limit = max(H, W) if H * W * floats * 4 <= free else isqrt(int(free / 4 / floats))
    size = max(min(tile if (tile or 0) > 0 else limit, limit) + w - 1, w) // w * w
    lap = max(min(overlap, size // 2), 0) // w * w

    def f(x: Tensor) -> Tensor:
        xs = ((x.flip(3) if k > 3 else x).rot90(k, (2, 3)) for k in range(8 if ensemble else 1))
        ys = [net(x.to(device)).rot90(-k, (2, 3)) for k, x in enumerate(xs)]
        return torch.stack([y.flip(3) if k > 3 else y for k, y in enumerate(ys)]).mean(0).to(image)

    try:
        return tiled(lambda strip: tiled(f, strip, 3, size, lap, s), image, 2, size, lap, s)
    except RuntimeError as e:
        if size == w or "memory" not in str(e):  # which each device says in its own way
            raise
    warnings.warn(f"out of memory: going on with tiles of {size // 2} pixels", stacklevel=3)
    return restore(net, image, size // 2, overlap, ensemble)


def read(path: str | Path) -> np.ndarray:
    """An image file as (H, W, C) uint8 or uint16, upright: C is 1 gray, 2 gray alpha, 3 RGB, 4 RGB alpha."""
    with Image.open(path) as im, Image.open(path) as low:
        args, deep = im.tile[0].args if im.tile else "", im.mode[0] == "I"
        raw, *rest = (args,) if isinstance(args, str) else args
        if im.mode in ("RGB", "RGBA") and ";16" in raw:
            # Pillow keeps the high bytes only: decode again as if the bytes came in the other order
            other = "RGBA" if raw == "LA;16B" else raw[:-1] + ("L" if raw[-1] == "B" else "B")
            low.tile = [t._replace(args=(other, *rest) if rest else other) for t in low.tile]
            high, low = (np.asarray(ImageOps.exif_transpose(i)).astype(np.uint16) for i in (im, low))
            return low[..., ::2] << 8 | low[..., 1::2] if other == "RGBA" else high << 8 | low
        if im.mode == "F" or (";16" in str(raw)) > deep or (deep and max(map(abs, im.getextrema())) >> 16):
            raise ValueError(f"can't be read exactly (mode {im.mode}, {raw}): save it with 8 or 16 bits")
        mode = ("L" if im.mode in ("1", "L", "LA") else "RGB") + "A" * im.has_transparency_data
        im = ImageOps.exif_transpose(im)
        return np.atleast_3d(np.asarray(im).astype(np.uint16) if deep else np.asarray(im.convert(mode)))


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """(H, W, C) uint8 or uint16 as from `read`; Pillow writes no 16-bit colour."""
    H, W, C = pixels.shape
    rows = np.ascontiguousarray(pixels, pixels.dtype.newbyteorder(">")).view(np.uint8).reshape(H, -1)
    up = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # PNG's filter 2: minus the row above
    header = np.array([W, H], ">u4").tobytes() + bytes([8 * pixels.itemsize, (0, 4, 2, 6)[C - 1], 0, 0, 0])
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in (b"IHDR", header), (b"IDAT", zlib.compress(np.insert(up, 0, 2, 1), 4)), (b"IEND", b""):
        data += len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")
    temporary = Path(path).with_name(f".{Path(path).name}.partial")
    temporary.write_bytes(data)
    temporary.replace(path)


def restore_pixels(net: SwinIR, pixels: np.ndarray, *options: Any) -> np.ndarray:
    """`restore` for the arrays of `read`: gray and colour through any network; alpha is only resized."""
    c, top, gray = (pixels.shape[2] - 1) // 2 * 2 + 1, int(np.iinfo(pixels.dtype).max), len(net.mean[0]) == 1
    x = torch.from_numpy(pixels.astype(np.float32)).div_(top).permute(2, 0, 1)[None]
    y = restore(net, x[:, :c].transpose(0, 1) if gray else x[:, :c].expand(-1, 3, -1, -1), *options)
    y = y.transpose(0, 1) if gray else y.mean(1, keepdim=True) if c == 1 else y
    alpha = F.interpolate(x[:, c:], y.shape[2:], mode="bicubic") if pixels.shape[2] > c else y[:, :0]
    y = torch.cat([y, alpha], 1).clamp_(0, 1).mul_(top).round_()
    return y[0].permute(1, 2, 0).numpy().astype(pixels.dtype)


def export_onnx(net: SwinIR, path: Path) -> str:
    """Writes opset 18 with dynamic batch, height and width; says how it compares with PyTorch."""
    from onnxruntime import InferenceSession

    w, C, axes = net.window_size, net.conv_first.in_channels, {"x": [0, 2, 3], "y": [0, 2, 3]}
    options = {"input_names": ["x"], "output_names": ["y"], "dynamic_axes": axes, "opset_version": 18}
    with warnings.catch_warnings(), torch.enable_grad():  # gradients: all windows at once
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.rand(1, C, w + 1, w + 2),), path, **options, dynamo=False)
    session, xs = InferenceSession(path), [torch.rand(1, C, 3 * w, 4 * w), torch.rand(2, C, w + 3, 2 * w - 1)]
    worst = max(abs(session.run(None, {"x": x.numpy()})[0] - restore(net, x).numpy()).max() for x in xs)
    assert worst < 1e-3 or path.unlink(), f"{path}: not fit for use: ONNX and PyTorch differ by {worst:.1e}"
    return f"opset 18, any size, within {worst:.1e} of PyTorch at two sizes"


def free_cores() -> int:
    """How many cores are idle, at least 1. OpenMP's threads wait for each other: two of them beside a busy
    process take up to twenty times as long as one."""
    cores, most = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(), 0.0
    if not cores or not Path("/proc/stat").exists():
        return os.cpu_count() or 1

    def times() -> np.ndarray:  # (cores, 2): idle and all, in ticks since the machine started
        lines = re.findall(r"^cpu(\d+) (.*)", Path("/proc/stat").read_text(), re.M)
        ticks = [[int(t) for t in line.split()[:8]] for core, line in lines if int(core) in cores]
        return np.array([[t[3] + t[4], sum(t)] for t in ticks])

    for _ in range(5):  # the best of five: what runs for an instant doesn't count
        before = times()
        time.sleep(0.1)
        idle, passed = (times() - before).T
        most = max(most, float((idle / np.maximum(passed, 1)).sum()))
        if round(most) >= len(cores):
            break
    return max(round(most), 1)


def main() -> int | str | None:
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    cli = argparse.ArgumentParser(description="Restores an image, or all in a folder, to PNG.")
    cli.add_argument("net", help="a SwinIR checkpoint: ours, official, BasicSR, KAIR")
    cli.add_argument("input", nargs="?", type=Path, help="an image or a folder")
    cli.add_argument("output", nargs="?", type=Path, help="a .png file or a folder")
    cli.add_argument("--tile", type=int, help="input pixels (default, 0: the whole, or what memory allows)")
    cli.add_argument("--overlap", type=int, default=32, help="of tiles, in input pixels (default: 32)")
    cli.add_argument("--ensemble", action="store_true", help="mean of the eight symmetries: 8 times as slow")
    cli.add_argument("--device", default=best, help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    cli.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster, a little less exact")
    cli.add_argument("--onnx", type=Path, metavar="FILE", help="write the network as ONNX instead")
    args, failed = cli.parse_intermixed_args(), []
    if file := args.onnx and args.onnx.with_suffix(".onnx"):
        return print(f"{file}: {export_onnx(load(args.net), file)}")
    source, target, suffix = args.input, args.output, args.output and args.output.suffix.lower()
    if target is None or (suffix in Image.registered_extensions() and (suffix != ".png" or source.is_dir())):
        cli.error("give NET INPUT OUTPUT: of an image to a .png file or a folder, of a folder to a folder")
    if args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(free_cores(), torch.get_num_threads()))
    net = load(args.net, device=args.device)
    jobs = [(source, target if suffix == ".png" else target / f"{source.stem}.png")]
    if source.is_dir():
        kinds = re.compile(r"(/[^.][^/]*)+\.(bmp|jpe?g|p[bgnp]m|png|tiff?|webp)", re.I)  # and nothing hidden
        found = (p.relative_to(source) for p in sorted(source.rglob("*")) if p.is_file())
        names = {p: str(p.with_suffix("")).lower() for p in found if kinds.fullmatch(f"/{p.as_posix()}")}
        same = Counter(names.values())  # of these, outputs keep the suffix
        jobs = [(source / p, target / p.with_suffix(p.suffix * (same[names[p]] > 1) + ".png")) for p in names]
    if not jobs or not source.exists():
        raise ValueError(f"{source}: " + ("holds no images" if source.exists() else "is not there"))
    here = source.resolve()
    if target.resolve() == here.parent or any(out.resolve().is_relative_to(here) for _, out in jobs):
        raise ValueError(f"{target}: the output must be neither {source}, nor its folder, nor in it")
    for path, out in tqdm(jobs, str(target), unit="image"):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.bf16):
                write_png(out, restore_pixels(net, read(path), args.tile, args.overlap, args.ensemble))
        except Exception as e:  # Pillow raises anything for a broken file
            failed.append(str(path))
            tqdm.write(f"{path}: {str(e) or type(e).__name__}", file=sys.stderr)
    return f"{len(failed)} of {len(jobs)} images failed: {', '.join(failed[:9])}" if failed else None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, RuntimeError, OSError, AssertionError, ImportError, KeyboardInterrupt) as e:
        sys.exit(f"error: {str(e) or 'stopped'}{': install onnx, onnxruntime' * isinstance(e, ImportError)}")
