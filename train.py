"""Train SwinIR. One file, one loop; every option is a line of Config.

    python train.py configs/tiny.py                            # a denoiser in minutes on a laptop, no data needed
    python train.py configs/denoise.py --dataroot_gt=DIV2K_HR --val_gt=CBSD68 --lr=1e-4
    torchrun --nproc_per_node=8 train.py configs/denoise.py    # batch_size is global: the recipe stays the same

Results go to experiments/<name>/. The same command again continues where it stopped.
"""

import ast
import contextlib
import copy
import difflib
import inspect
import json
import math
import os
import re
import runpy
import signal
import sys
import time
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import PairedImageDataset, Prefetcher, SampleNumbers, ValidationImages, train_loader
from metrics import LOSSES, psnr, ssim
from model import SwinIR, load_weights, portable, restore


@dataclass
class Config:
    # run
    name: str = "denoise_color25"  # results go to experiments/<name>
    seed: int = 0  # of all that is drawn: initial weights, samples, DropPath
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    resume: Literal["auto", "never"] = "auto"  # never: the old folder is moved to <name>_archived_<time>
    eval_only: bool = False  # validate pretrain_network, or the last checkpoint, and stop
    max_hours: float | None = None  # save and stop after this time; None: no limit

    # data: folders or files made by data.py pack; several are separated by commas
    dataroot_gt: str | tuple | None = None  # clean images; None: synthetic ones
    dataroot_lq: str | tuple | None = None  # their degraded partners; None: made by `degradation`
    dataset_weights: tuple | None = None  # how often to draw from each dataroot_gt; None: by number of images
    filename_tmpl: str = "{}"  # name of the partner of {}: {}x4 pairs baby.png with babyx4.png
    meta_info_file: str | None = None  # lists the names to use, one a line; None: all
    degradation: str = "noise"  # noise, jpeg, bicubic: see DEGRADATIONS in data.py
    sigma: float | tuple = 25.0  # noise: standard deviation of 255, or a range as 0,50
    quality: float | tuple = 40.0  # jpeg: quality from 1 to 100, or a range as 10,40
    gt_size: int = 128  # side of the ground-truth patch in pixels
    use_hflip: bool = True  # horizontal flips
    use_rot: bool = True  # vertical flips and transpositions: with use_hflip, all eight symmetries
    num_workers: int | None = None  # loader processes per rank; None: 8 at most on a GPU, 1 on a CPU

    # network: SwinIR-M
    scale: int = 1  # upscaling factor
    in_chans: Literal[3, 1] = 3  # 3: RGB, 1: gray
    embed_dim: int = 180
    depths: tuple = (6, 6, 6, 6, 6, 6)
    num_heads: tuple = (6, 6, 6, 6, 6, 6)
    window_size: int = 8
    mlp_ratio: float = 2.0
    upsampler: Literal["", "pixelshuffle", "pixelshuffledirect", "nearest+conv"] = ""  # '': for scale 1
    resi_connection: Literal["1conv", "3conv"] = "1conv"
    img_range: float = 1.0
    drop_path_rate: float = 0.1  # stochastic depth
    use_checkpoint: bool = False  # recompute activations in the backward pass: less memory, more time
    pretrain_network: str | None = None  # weights to start from: ours, official, BasicSR's or KAIR's
    param_key: str = "params_ema"  # which weights of that file
    strict_load: bool = True  # False: take what fits

    # optimisation
    batch_size: int = 8  # global: samples per step over all ranks and micro-batches
    accumulate: int | None = None  # micro-batches per step and rank; None: 1, on a CPU as its memory demands
    total_iters: int = 1_600_000
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 2e-4
    betas: tuple = (0.9, 0.999)
    weight_decay: float = 0.0
    loss: Literal[tuple(LOSSES)] = "charbonnier"  # see LOSSES in metrics.py
    scheduler: Literal["multistep", "cosine"] = (
        "multistep"  # lr * gamma after each milestone; to 0 at the end
    )
    milestones: tuple = (800_000, 1_200_000, 1_400_000, 1_500_000)
    gamma: float = 0.5
    warmup_iters: int = 0  # the lr grows linearly and reaches its value at this iteration
    grad_clip: float | None = None  # largest norm of the gradient; None: no clipping
    ema_decay: float = 0.999  # of the averaged weights, which are validated; 0: no averaging
    max_bad_steps: int = 50  # stop after so many steps in a row without a finite loss and gradient

    # validation and files
    val_gt: str | tuple | None = None  # validation sets; None: synthetic images, unless dataroot_lq is given
    val_lq: str | tuple | None = None  # their degraded partners; None: made by `degradation`
    val_sigma: float | None = None  # None: sigma, or the end of its range
    val_quality: float | None = None  # None: quality, or the start of its range
    val_freq: int = 5000  # iterations between validations; 0: never
    crop_border: int = 0  # pixels cut off on each side before PSNR and SSIM
    test_y_channel: bool = False  # PSNR and SSIM on the Y channel of YCbCr
    save_img: bool = False  # also write a strip (input, output, ground truth) for each validation image
    print_freq: int = 100
    save_checkpoint_freq: int = 5000
    keep_last: int = 3  # checkpoints kept besides the best weights; 0: all

    # speed
    amp: Literal["auto", "bf16", "fp16", "none"] = "auto"  # auto: bf16 where the hardware computes in it
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA on Linux
    tf32: bool = True  # TensorFloat-32 for the float32 products of CUDA


# ---- options: defaults, then config files, then --key=value ----

HINTS = get_type_hints(Config)
LOWEST = dict.fromkeys(
    "seed num_workers warmup_iters val_freq crop_border keep_last lr weight_decay ema_decay".split(), 0
)
LOWEST |= dict.fromkeys(
    "gt_size scale embed_dim window_size batch_size accumulate total_iters print_freq".split(), 1
)
LOWEST |= dict.fromkeys("save_checkpoint_freq max_bad_steps".split(), 1) | {
    "mlp_ratio": 0.01,
    "grad_clip": 1e-9,
}
BASICSR = {
    "total_iter": "total_iters", "num_worker_per_gpu": "num_workers", "batch_size_per_gpu": "batch_size",
    "manual_seed": "seed", "warmup_iter": "warmup_iters", "pretrain_network_g": "pretrain_network",
    "param_key_g": "param_key", "strict_load_g": "strict_load", "eta_min": "scheduler", "accum_iter": "accumulate",
}  # fmt: skip


def coerce(value: Any, name: str, source: str) -> Any:
    """`value` as Config declares it; text comes from the command line. SystemExit if it is of another type."""
    hint = HINTS[name]
    choices = getattr(hint, "__origin__", None) is Literal and get_args(hint)
    kinds = {type(c) for c in choices} if choices else set(get_args(hint) or (hint,))
    if source.startswith("-") and value in ("None", "none") and NoneType in kinds:
        value = None
    elif source.startswith("-") and str not in kinds:
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    elif source.startswith("-") and tuple in kinds and "," in value:
        value = tuple(value.split(","))
    value = tuple(value) if isinstance(value, list) else str(value) if isinstance(value, Path) else value
    if type(value) is int and int not in kinds and float in kinds and abs(value) < 1e300:
        value = float(value)
    if type(value) not in kinds or (choices and value not in choices):
        wanted = " or ".join(repr(c) for c in choices) if choices else inspect.formatannotation(hint)
        raise SystemExit(f"{source}: {name} must be {wanted}, not {value!r:.60} ({type(value).__name__})")
    return value


def load_config(argv: list[str]) -> Config:
    """The Config of a command line: config files, --key=value. SystemExit with a sentence if anything is wrong."""
    cfg = Config()
    for arg in sorted(argv, key=lambda arg: arg.startswith("-")):  # files first
        if arg in ("-h", "--help"):
            raise SystemExit(
                print(
                    f"{__doc__}\nOptions, in a config file or as --key=value:\n\n{inspect.getsource(Config)}"
                )
            )
        key, equals, text = arg.lstrip("-").partition("=")
        pairs = {key.replace("-", "_"): text}
        if not arg.startswith("-"):
            try:
                pairs = {
                    k: v for k, v in runpy.run_path(arg).items() if k[0] != "_" and type(v) is not ModuleType
                }
            except BaseException as error:
                raise SystemExit(f"{arg} is no config file: {type(error).__name__}: {error}") from None
        elif not equals:
            raise SystemExit(f"{arg}: options are written as --key=value")
        for key, value in pairs.items():
            if key not in HINTS:
                near = [BASICSR[key]] if key in BASICSR else difflib.get_close_matches(key, HINTS, 1)
                advice = f"did you mean {near[0]}?" if near else "python train.py --help lists them all"
                raise SystemExit(f"{arg}: unknown option {key}; {advice}")
            setattr(cfg, key, coerce(value, key, arg))
    check(cfg)
    return cfg


def check(cfg: Config) -> None:
    """SystemExit with a sentence if options have values that can't work, alone or together."""

    def ensure(fine: bool, name: str, why: str) -> None:
        if not fine:
            raise SystemExit(f"{name}={getattr(cfg, name)!r:.60} can't work: it must be {why}")

    def numbers(value: Any, kind: Any = (int, float)) -> bool:
        return all(isinstance(v, kind) and math.isfinite(v) for v in value)

    for name, lowest in LOWEST.items():
        value = getattr(cfg, name)
        ensure(value is None or lowest <= value < 2**63, name, f"at least {lowest}")
    for name, value in vars(cfg).items():
        ensure(not isinstance(value, float) or math.isfinite(value), name, "finite")
    for name in ("depths", "num_heads", "milestones"):
        value = getattr(cfg, name)
        ensure(
            numbers(value, int) and all(v > 0 for v in value),
            name,
            "a tuple of whole numbers, such as 6,6,6,6",
        )
    ensure(len(cfg.depths) == len(cfg.num_heads), "num_heads", f"as long as depths={cfg.depths}")
    ensure(
        all(cfg.embed_dim % h == 0 for h in cfg.num_heads),
        "num_heads",
        f"divisors of embed_dim={cfg.embed_dim}",
    )
    for name, low, high in (("sigma", 0, math.inf), ("quality", 1, 100)):
        pair = v if isinstance(v := getattr(cfg, name), tuple) else (v, v)
        fine = len(pair) == 2 and numbers(pair) and low <= pair[0] <= pair[1] <= high
        ensure(fine, name, f"a number from {low} to {high}, or a range such as 10,40")
    ensure(
        len(cfg.betas) == 2 and numbers(cfg.betas) and all(0 <= b < 1 for b in cfg.betas),
        "betas",
        "two numbers below 1",
    )
    ensure(cfg.ema_decay < 1, "ema_decay", "below 1")
    ensure(0 <= cfg.drop_path_rate < 1, "drop_path_rate", "from 0 to below 1")
    ensure(cfg.img_range > 0, "img_range", "above 0")
    ensure(
        re.fullmatch(r"\w[\w.+= -]{,99}", cfg.name) is not None,
        "name",
        "a folder name of letters, digits and .+=-_",
    )
    ensure(cfg.gt_size % cfg.scale == 0, "gt_size", f"a multiple of scale={cfg.scale}")
    ensure(
        (cfg.upsampler == "") == (cfg.scale == 1),
        "upsampler",
        f"{'set' if cfg.scale > 1 else 'empty'} for scale={cfg.scale}",
    )
    made = not cfg.dataroot_lq and cfg.scale > 1
    ensure(
        not made or cfg.degradation == "bicubic",
        "degradation",
        f"bicubic for scale={cfg.scale}, or give dataroot_lq",
    )


def options_of(function: Any, cfg: Config) -> dict[str, Any]:
    """The options that are arguments of `function`, by name."""
    return {k: v for k, v in vars(cfg).items() if k in inspect.signature(function).parameters}


# ---- schedules ----


def lr_at(it: int, cfg: Config) -> float:
    """Learning rate of iteration `it`, counted from 1. A milestone m acts from iteration m + 1 on, as in BasicSR."""
    if it < cfg.warmup_iters:
        return cfg.lr * it / cfg.warmup_iters
    if cfg.scheduler == "cosine":
        done = (it - 1 - cfg.warmup_iters) / max(cfg.total_iters - cfg.warmup_iters, 1)
        return cfg.lr * (1 + math.cos(math.pi * min(max(done, 0), 1))) / 2
    return cfg.lr * cfg.gamma ** sum(it > m for m in cfg.milestones)


def ema_decay_at(it: int, cfg: Config) -> float:
    """Grows to its value: at once, 0.999 would keep a third of the initial weights after 1000 iterations."""
    return min(cfg.ema_decay, (1 + it) / (10 + it))


# ---- hardware ----


def choose_device(cfg: Config) -> torch.device:
    kind = cfg.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("device=cuda: PyTorch finds no CUDA GPU here; --device=auto takes what there is")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, cfg.tf32
        torch.set_float32_matmul_precision("high" if cfg.tf32 else "highest")
    return torch.device(kind, torch.cuda.current_device() if kind == "cuda" else None)


def choose_amp(cfg: Config, device: torch.device) -> str:
    if cfg.amp != "auto":
        return cfg.amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "none"
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, hence the care
    fast = device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)
    return "bf16" if fast else "none"


def choose_accumulate(cfg: Config, device: torch.device, world: int) -> int:
    """Micro-batches per step. On a CPU, the fewest whose activations (13 C and the attention a block) fit in 4 GB."""
    share, rest = divmod(cfg.batch_size, world * (cfg.accumulate or 1))
    if rest:
        ranks = f"{world} ranks x accumulate={cfg.accumulate or 1}"
        raise SystemExit(f"batch_size={cfg.batch_size} can't be shared by {ranks}: make it a multiple")
    if cfg.accumulate or device.type != "cpu":
        return cfg.accumulate or 1
    heads = zip(cfg.depths, cfg.num_heads, strict=True)
    values = sum(depth * (13 * cfg.embed_dim + h * cfg.window_size**2) for depth, h in heads)
    fitting = max(int(4e9 / (4 * values * (cfg.gt_size / cfg.scale) ** 2)), 1)
    return next(a for a in range(1, share + 1) if share % a == 0 and share / a <= fitting or a == share)


# ---- signals and files ----


class Wishes:
    """What signals and the clock ask for (0: go on, 1: save, 2: save and stop), agreed on by all ranks.

    Ranks hear of a signal at different iterations but must save and stop after the same one. The votes of an
    iteration are collected at the next, on the CPU, so that nobody waits for them.
    """

    def __init__(self, max_hours: float | None, group: Any) -> None:
        self.wish, self.code, self.vote, self.group = 0, 0, None, group
        self.end = time.monotonic() + 3600 * (math.inf if max_hours is None else max_hours)
        for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                signal.signal(getattr(signal, name), self.hear)

    def hear(self, number: int, frame: Any) -> None:
        if number not in (signal.SIGTERM, signal.SIGINT):
            self.wish = max(self.wish, 1)
            return
        if self.code:
            os._exit(self.code)
        self.wish, self.code = 2, 128 + number
        os.write(2, b"\nfinishing this iteration to save it; the same signal again stops at once\n")

    def agreed(self) -> int:
        wish, self.wish = 2 if time.monotonic() > self.end else self.wish, 0
        if self.group is None:
            return wish
        before, tensor = self.vote, torch.tensor(wish)
        self.vote = tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group, async_op=True)
        if before is None:
            return 0
        before[1].wait()
        return int(before[0])


def lock(folder: Path) -> Any:
    """Holds the folder for as long as the returned file is open; the end of the process, however it comes, frees it."""
    file = open(folder / ".lock", "w")
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise SystemExit(
            f"{folder} is in use by another run: wait for it, or give this one another --name"
        ) from None
    return file


def write(path: Path, content: Any) -> None:
    """Writes text, or an object by torch.save, so that `path` is always whole: the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        why = f"{path} can't be written ({str(error).splitlines()[0]})"
        raise SystemExit(
            f"{why}: make room, then the same command continues from the checkpoint before"
        ) from None


def last_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(state, weights) of the newest checkpoint that is whole, with a warning for each that isn't; or (start, {})."""
    for state in sorted(folder.glob("training_states/*.state"), key=lambda p: int(p.stem), reverse=True):
        files = []
        for path in (state, folder / "models" / f"net_g_{state.stem}.pth"):
            try:
                with zipfile.ZipFile(path) as archive:  # torch.load doesn't compare checksums
                    assert archive.testzip() is None
                files.append(torch.load(path, map_location="cpu", weights_only=True))
            except Exception:
                print(
                    f"warning: {path} is damaged or missing: using the checkpoint before it", file=sys.stderr
                )
                break
        if len(files) == 2:
            return files[0], files[1]
    return {"iter": 0, "best": {}}, {}


class Log:
    """Lines for people (terminal, log.txt) and for programs (log.jsonl), written by rank 0."""

    def __init__(self, folder: Path, rank: int, start: int) -> None:
        self.folder, self.mute, lines = folder, rank > 0, []
        if not self.mute and (folder / "log.jsonl").exists():
            for line in (folder / "log.jsonl").read_text().splitlines(keepends=True):
                with contextlib.suppress(ValueError):  # a crash can cut the last line
                    lines += [line] if json.loads(line)["iter"] <= start else []  # the rest will come again
            write(folder / "log.jsonl", "".join(lines))

    def line(self, text: str) -> None:
        if not self.mute:
            tqdm.write(text)
            with open(self.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def event(self, **fields: Any) -> None:
        if not self.mute:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(fields) + "\n")


# ---- validation ----


def to_pixels(x: torch.Tensor, dtype: Any) -> np.ndarray:
    """(C, H, W) in [0, 1] to (H, W, C) uint8 or uint16, rounded."""
    peak = np.iinfo(dtype).max
    return (x.float().clamp(0, 1) * peak).round().permute(1, 2, 0).cpu().numpy().astype(dtype)


def validate(
    net: SwinIR, images: Any, cfg: Config, rank: int, world: int, group: Any, strips: Path | None
) -> list:
    """Mean PSNR and SSIM of the outputs, and mean PSNR of the inputs (nan where sizes differ), over whole images.

    Each rank takes every world-th image; the means run over all in file order, so they don't depend on the ranks.
    """
    scores = torch.zeros(len(images), 3, dtype=torch.float64)
    for i in range(rank, len(images), world):
        name, lq, gt = (images[i][k] for k in ("name", "lq", "gt"))
        out, lq = to_pixels(restore(net, lq[None])[0], gt.dtype), to_pixels(lq, gt.dtype)
        scores[i, 0] = psnr(out, gt, cfg.crop_border, cfg.test_y_channel)
        scores[i, 1] = ssim(out, gt, cfg.crop_border, cfg.test_y_channel)
        same = lq.shape == gt.shape
        scores[i, 2] = psnr(lq, gt, cfg.crop_border, cfg.test_y_channel) if same else math.nan
        if strips:
            bytes_ = [
                (a if a.dtype == np.uint8 else a >> 8).astype(np.uint8).squeeze() for a in (lq, out, gt)
            ]
            strip = [np.asarray(Image.fromarray(a).resize(gt.shape[1::-1], Image.NEAREST)) for a in bytes_]
            strips.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.hstack(strip)).save(strips / f"{name.replace('/', '_')}.png")
    if world > 1:
        dist.all_reduce(scores, group=group)  # a score plus zeros: exact
    return scores.mean(0).tolist()


# ---- the training ----


def main(cfg: Config) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(cfg)
    cuda, cpu = device.type == "cuda", device.type == "cpu"
    amp, accumulate = choose_amp(cfg, device), choose_accumulate(cfg, device, world)
    group = None  # of the ranks' CPUs
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        group = dist.new_group(backend="gloo")

    # Data. Opened first, for most mistakes are made here.
    dataset = PairedImageDataset(**options_of(PairedImageDataset, cfg))
    sigma = cfg.sigma[1] if isinstance(cfg.sigma, tuple) else cfg.sigma
    quality = cfg.quality[0] if isinstance(cfg.quality, tuple) else cfg.quality
    given = {
        "sigma": sigma if cfg.val_sigma is None else cfg.val_sigma,
        "quality": cfg.val_quality or quality,
    }
    roots, partners = ([*v] if isinstance(v, tuple) else [v] for v in (cfg.val_gt, cfg.val_lq))
    if cfg.val_lq and len(partners) != len(roots):
        raise SystemExit(f"val_lq={cfg.val_lq} must have one entry for each of val_gt={cfg.val_gt}")
    val_sets = {}
    for i, root in enumerate(roots if cfg.val_gt or not cfg.dataroot_lq else []):
        made = (
            options_of(ValidationImages, cfg)
            | given
            | {"val_gt": root, "val_lq": partners[i] if cfg.val_lq else None}
        )
        val_sets[Path(root).resolve().stem if root else "synthetic"] = ValidationImages(**made)

    # Folder: start, or continue.
    folder = Path("experiments") / cfg.name
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        held = lock(folder)
        if cfg.resume == "never" and (folder / "config.json").exists():
            folder.rename(
                archive := folder.with_name(f"{cfg.name}_archived_{time.strftime('%Y%m%d_%H%M%S')}")
            )
            print(f"the run before is kept as {archive}")
            folder.mkdir()
            held = lock(folder)  # noqa: F841  (held until this function ends)
        for name in ("models", "training_states"):
            (folder / name).mkdir(exist_ok=True)
    if world > 1:
        dist.barrier(group)
    state, weights = last_checkpoint(folder)
    start, best, saved = state["iter"], state["best"], state.get("config", vars(Config()))
    changed = {k: (saved[k], v) for k, v in vars(cfg).items() if k in saved and saved[k] != v}
    fixed = changed.keys() & {*options_of(SwinIR, cfg), "scale", "seed", "batch_size", "optimizer"} - {
        "use_checkpoint"
    }
    if start and fixed:
        was = ", ".join(f"{k}={saved[k]}" for k in sorted(fixed))
        raise SystemExit(
            f"{folder} was trained with {was}: keep that, or use another --name or --resume=never"
        )

    # Network, its average, optimizer.
    torch.manual_seed(cfg.seed)
    net = SwinIR(img_size=cfg.gt_size // cfg.scale, upscale=cfg.scale, **options_of(SwinIR, cfg))
    taken = (
        load_weights(net, cfg.pretrain_network, cfg.param_key, cfg.strict_load)
        if cfg.pretrain_network and not start
        else ""
    )
    if start:
        net.load_state_dict(weights["params"])
    net.to(device, memory_format=torch.channels_last if cuda else torch.preserve_format)
    ema = copy.deepcopy(net).requires_grad_(False).eval() if cfg.ema_decay else net
    if start and cfg.ema_decay:
        ema.load_state_dict(weights["params_ema"])
    params, averages = list(net.parameters()), list(ema.parameters())
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    optimizer = kind(params, cfg.lr, cfg.betas, weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    sums = torch.zeros(
        4, device=device
    )  # since the last log line: loss, gradient norm, bad steps; bad ones in a row
    if start:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        sums += state["sums"][rank % len(state["sums"])].to(device)
    if cfg.compile == "on" or (cfg.compile == "auto" and cuda and sys.platform == "linux"):
        for layer in net.layers:  # in place: no wrapper, no prefix in the state dict; alike, so compiled once
            layer.compile()
    model = DistributedDataParallel(net, [device.index] if cuda else None) if world > 1 else net

    log = Log(folder, rank, start)
    log.line(f"{folder}: " + (f"continuing after iteration {start:,}" if start else "starting"))
    told = [f"{k}: {a} -> {b}" if start else f"{k}={b}" for k, (a, b) in changed.items()]
    log.line("options: " + (", ".join(told) or ("as before" if start else "the defaults")))
    source = f"{len(dataset):,} images" if cfg.dataroot_gt else "synthetic images (no dataroot_gt given)"
    log.line(
        f"data: {source}; validation: "
        + (", ".join(f"{k} ({len(v)})" for k, v in val_sets.items()) or "none")
    )
    log.line(f"network: {sum(map(torch.Tensor.numel, params)):,} parameters; {device.type}, "
             f"{amp if amp != 'none' else 'float32'}, {world} rank(s) x {accumulate} micro-batch(es)")  # fmt: skip
    for note in (*dataset.notices, *([taken] if taken else [])):
        log.line(f"note: {note}")
    if rank == 0:
        about = {"torch": torch.__version__, "command": " ".join(sys.argv)}
        write(folder / "config.json", json.dumps(vars(cfg) | {"about": about}, indent=1))

    def checkpoint(it: int) -> dict[str, Any]:
        return {"params": portable(net.state_dict()), "params_ema": portable(ema.state_dict()),
                "arguments": net.arguments, "iter": it}  # fmt: skip

    def validate_all(it: int) -> None:
        means = []
        for name, images in val_sets.items():
            strips = folder / "visualization" / name / f"{it}" if cfg.save_img else None
            score, similarity, before = validate(ema.eval(), images, cfg, rank, world, group, strips)
            best[name] = max(best.get(name, [-math.inf, it]), [score, it], key=lambda b: b[0])
            means.append(score)
            log.event(event="val", iter=it, dataset=name, psnr=score, ssim=similarity, best_psnr=best[name][0],
                      best_iter=best[name][1], input_psnr=None if math.isnan(before) else before)  # fmt: skip
            protocol = f"{'Y' if cfg.test_y_channel else 'RGB' if cfg.in_chans == 3 else 'gray'}, border {cfg.crop_border}"
            log.line(f"validation {name}: {score:.2f} dB, SSIM {similarity:.4f}"
                     + ("" if math.isnan(before) else f" (input {before:.2f} dB)")
                     + f"; best {best[name][0]:.2f} dB at {best[name][1]:,}; {protocol}")  # fmt: skip
        net.train()
        if sum(means) / len(means) > best.get("", [-math.inf])[0]:  # "": of all sets together
            best[""] = [sum(means) / len(means), it]
            if rank == 0 and not cfg.eval_only:
                write(folder / "models" / "net_g_best.pth", checkpoint(it))

    def save(it: int) -> None:
        table = torch.zeros(world, len(sums))
        table[rank] = sums.cpu()
        if world > 1:
            dist.all_reduce(table, group=group)
        if rank == 0:
            write(folder / "models" / f"net_g_{it}.pth", checkpoint(it))
            content = {"iter": it, "best": best, "sums": table, "config": vars(cfg)}
            content |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            write(folder / "training_states" / f"{it}.state", content)
            states = sorted(folder.glob("training_states/*.state"), key=lambda p: int(p.stem))
            for old in states[: -cfg.keep_last] if cfg.keep_last else []:  # once the latest is whole
                old.unlink()
                (folder / "models" / f"net_g_{old.stem}.pth").unlink(missing_ok=True)

    if cfg.eval_only:
        return validate_all(start)
    if start >= cfg.total_iters:
        return log.line(
            f"finished: {start:,} iterations are done; --total_iters={2 * start} goes on, --resume=never starts afresh"
        )

    workers = min(8, (os.cpu_count() or 1) // world) if cuda else 1
    loader = train_loader(
        dataset, SampleNumbers(cfg.batch_size, rank, world, start, accumulate),
        workers if cfg.num_workers is None else cfg.num_workers, pin=cuda,
    )  # fmt: skip
    autocast = torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16, amp != "none")
    criterion, wishes, wish = LOSSES[cfg.loss], Wishes(cfg.max_hours, group), 0
    layout = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    bar = tqdm(
        total=cfg.total_iters,
        initial=start,
        disable=None if rank == 0 else True,
        unit="it",
        bar_format=layout,
    )
    with bar, Prefetcher(loader, device) as batches:
        since, waited, steps = time.perf_counter(), 0.0, 0
        net.train()
        for it in range(start + 1, cfg.total_iters + 1):
            # The step.
            torch.manual_seed(
                (cfg.seed * 1_000_003 + it) * 4099 + rank
            )  # DropPath: drawn from (seed, it, rank)
            lr = optimizer.param_groups[0]["lr"] = lr_at(it, cfg)
            total = 0.0
            for micro in range(accumulate):
                lq, gt = next(batches)
                waited += batches.wait
                reduced = (
                    contextlib.nullcontext() if world == 1 or micro == accumulate - 1 else model.no_sync()
                )
                with reduced:
                    with autocast:
                        loss = criterion(model(lq), gt) / accumulate
                    # A loss that isn't finite spoils the gradients, and so the sum of them on all ranks.
                    scaler.scale(loss * (1 + 0 * loss.detach())).backward()
                total += loss.detach()
                bar.update(1 / accumulate)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in params])
            if cfg.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(params, cfg.grad_clip, norm)
            optimizer.found_inf = bad = (
                ~norm.isfinite()
            ).float()  # where 1, the fused step leaves all as it is
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if cfg.ema_decay:
                torch._foreach_lerp_(averages, params, 1 - ema_decay_at(it, cfg))

            # What was seen.
            good = bad == 0
            sums += torch.stack([total.where(good, 0), norm.where(good, 0), bad, bad])
            sums[3] *= bad
            steps += 1
            if it == start + 1 or cpu or it % cfg.print_freq == 0:  # reading the loss waits for a GPU
                bar.set_postfix_str(f"loss {total.item():.2e}, lr {lr:.1e}")
            if (
                it == start + 1
                and cpu
                and (took := time.perf_counter() - since) * cfg.total_iters > 2 * 86400
            ):
                days = took * (cfg.total_iters - start) / 86400
                log.line(f"An iteration takes {took:.0f} s on this CPU, all of them {days:,.0f} days; "
                         "configs/tiny.py trains a small denoiser in minutes.")  # fmt: skip
            if it % cfg.print_freq == 0 or it == cfg.total_iters:
                mean = sums.clone()
                if world > 1:
                    dist.all_reduce(mean, dist.ReduceOp.AVG if cuda else dist.ReduceOp.SUM)
                    mean /= 1 if cuda else world
                mean, spent = mean.tolist(), time.perf_counter() - since
                done = max((it - 1) % cfg.print_freq + 1 - mean[2], 1)
                speed, share = cfg.batch_size * steps / spent, waited / spent
                log.event(event="train", iter=it, loss=mean[0] / done, lr=lr, grad_norm=mean[1] / done,
                          time=spent / steps, data_time=waited / steps, img_per_s=speed, skipped=int(mean[2]),
                          max_mem_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else None)  # fmt: skip
                log.line(f"iter {it:,}/{cfg.total_iters:,}: loss {mean[0] / done:.4e}, lr {lr:.2e}, "
                         f"{speed:.1f} img/s, waiting for data {share:.0%}"
                         + (f", {mean[2]:.0f} steps skipped" if mean[2] else ""))  # fmt: skip
                if mean[3] >= cfg.max_bad_steps:
                    raise SystemExit(f"stopped: the last {mean[3]:.0f} steps had no finite loss and gradient, and were "
                                     "skipped: try a lower --lr, --grad_clip=1 or --amp=none")  # fmt: skip
                if share > 0.2 and steps > 20:
                    log.line(
                        "note: training waits for data; more --num_workers or python data.py pack may help"
                    )
                sums[:3] = 0
                since, waited, steps = time.perf_counter(), 0.0, 0
            wish, paused = wishes.agreed(), time.perf_counter()
            if wish < 2 and val_sets and cfg.val_freq and (it % cfg.val_freq == 0 or it == cfg.total_iters):
                validate_all(it)
            if wish or it % cfg.save_checkpoint_freq == 0 or it == cfg.total_iters:
                save(it)
            since += time.perf_counter() - paused
            if wish == 2:
                log.line(f"stopped and saved after iteration {it:,}: the same command continues")
                break
    if world > 1:
        dist.destroy_process_group()
    sys.exit(wishes.code if wish == 2 else 0)


if __name__ == "__main__":
    try:
        main(load_config(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except ValueError as error:  # ours are sentences for the user; others keep their traceback
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parent != Path(__file__).parent:
            raise
        sys.exit(f"error: {error}")
