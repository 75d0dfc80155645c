"""Train SwinIR: one file, one loop. Results go to experiments/<name>/.

    python train.py configs/tiny.py                           # a denoiser in minutes on a laptop, no data
    python train.py configs/denoise.py --dataroot_gt=DIV2K_HR --val_gt=CBSD68 --lr=1e-4
    torchrun --nproc_per_node=8 train.py configs/denoise.py   # batch_size is global: the recipe is the same
The same command again continues where it stopped.
"""

import ast
import atexit
import contextlib
import copy
import ctypes
import difflib
import importlib.util
import inspect
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import PairedImageDataset, Prefetcher, SampleNumbers, ValidationImages, imresize, need, train_loader
from metrics import LOSSES, Log, psnr, psnrb, ssim, strip
from model import SwinIR, free_cores, load_weights, portable, restore

MOST_PSNR = 60.0  # dB: what an image counts at most in a validation, lest an exact one decide it


@dataclass
class Config:
    name: str = "denoise_color25"  # results go to experiments/<name>
    seed: int = 0  # of all that is drawn: initial weights, samples, DropPath
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    resume: Literal["auto", "never"] = "auto"  # never: the old folder is moved to <name>_archived_<time>
    eval_only: bool = False  # validate pretrain_network, or the last checkpoint, and stop
    max_hours: float | None = None  # save and stop after this time; None: no limit
    amp: Literal["auto", "bf16", "fp16", "tf32", "none"] = "auto"  # auto: bf16 where computed by hardware
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on for CUDA on Linux
    # data: folders or files made by data.py pack; several are separated by commas
    dataroot_gt: str | tuple | None = None  # clean images; None: synthetic ones
    dataroot_lq: str | tuple | None = None  # their degraded partners; None: made by `degradation`
    dataset_weights: tuple | None = None  # how often to draw from each dataroot_gt; None: by number of images
    filename_tmpl: str = "{}"  # name of the partner of {}: {}x4 pairs baby.png with babyx4.png
    meta_info_file: str | None = None  # lists the files to use, as a/1.png below dataroot_gt; None: all
    degradation: str = "noise"  # noise, jpeg, bicubic: see DEGRADATIONS in data.py
    sigma: float | tuple = 25.0  # noise: deviation of 255, or a range as 0,50, whose end is validated
    quality: int | tuple = 40  # jpeg: 1 to 100, or a range as 10,40, whose start is validated
    gt_size: int = 128  # side of the ground-truth patch in pixels: a multiple of scale x window_size
    use_hflip: bool = True  # horizontal flips
    use_rot: bool = True  # vertical flips and transpositions: with use_hflip, all eight symmetries
    num_workers: int = 4  # loader processes per rank, at most one per core
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
    init_std: float = 0.02  # deviation of the initial weights of linear layers
    use_checkpoint: bool = False  # recompute activations: less memory, more time; on if a CPU needs it
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
    scheduler: Literal["multistep", "cosine"] = "multistep"  # cosine: to 0 at total_iters
    milestones: tuple = (800_000, 1_200_000, 1_400_000, 1_500_000)  # after each the lr is multiplied
    gamma: float = 0.5  # by this
    warmup_iters: int = 0  # the lr grows linearly and reaches its value at this iteration
    grad_clip: float | None = None  # largest norm of the gradient; None: no clipping
    ema_decay: float = 0.999  # of the averaged weights, which are validated; 0: no averaging
    # validation and files
    val_gt: str | tuple | None = None  # validation sets; None: synthetic images, unless dataroot_lq is given
    val_lq: str | tuple | None = None  # their degraded partners; None: made by `degradation`
    val_freq: int = 5000  # iterations between validations; 0: never
    crop_border: int = 0  # pixels cut off on each side before PSNR and SSIM
    test_y_channel: bool = False  # PSNR and SSIM on the Y channel of YCbCr
    pad_window: bool = False  # pad a window more than needed, as the script behind SwinIR's published figures
    save_img: bool = False  # also write a strip (input, output, ground truth) for each validation image
    use_tb_logger: bool = False  # log to TensorBoard too, in experiments/<name>/tensorboard
    wandb: str | None = None  # log to this project of Weights & Biases too
    print_freq: int = 100
    save_checkpoint_freq: int = 5000
    keep_last: int = 3  # checkpoints kept besides the best weights; 0: all


def coerce(value: Any, name: str, source: str) -> Any:
    """`value` as Config declares it, or SystemExit. From the command line it comes as text."""
    hint = get_type_hints(Config)[name]
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    kinds = {type(choice) for choice in choices} or set(get_args(hint)) or {hint}
    if source.startswith("-") and str in kinds:
        value = None if value == "None" and type(None) in kinds else value
        value = tuple(map(str.strip, value.split(","))) if tuple in kinds and "," in str(value) else value
    elif source.startswith("-"):
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            value = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
    value = tuple(value) if isinstance(value, list) else str(value) if isinstance(value, Path) else value
    value = (value,) if kinds <= {tuple, type(None)} and type(value) in (int, float) else value
    value = float(value) if type(value) is int and float in kinds and abs(value) < 2**63 else value
    value = int(value) if type(value) is float and int in kinds and value.is_integer() else value  # 1e4
    if type(value) not in kinds or (choices and value not in choices):
        wanted = " or ".join(map(repr, choices)) or inspect.formatannotation(hint)
        raise SystemExit(f"{source}: {name} must be {wanted}, not {value!r:.60} (see train.py --help)")
    return value


def load_config(argv: list[str]) -> Config:
    """The Config of a command line. SystemExit with a sentence if anything is wrong with it."""
    cfg = Config()
    for arg in sorted(argv, key=lambda arg: arg.startswith("-") * ("=" in arg or -1)):  # files, options
        if arg in ("-h", "--help"):
            raise SystemExit(print(f"{__doc__}\nAll options:\n\n{inspect.getsource(Config)}", flush=True))
        key, equals, text = arg.lstrip("-").partition("=")
        pairs = {key.replace("-", "_"): text}
        if not arg.startswith("-"):
            try:
                pairs = {k: v for k, v in run_path(arg).items() if k[0] != "_" and not inspect.ismodule(v)}
            except BaseException as error:
                raise SystemExit(f"{arg} is no config file (options are --key=value): {error!r}") from None
        for key, value in pairs.items():
            if key not in vars(cfg):
                near = difflib.get_close_matches({"manual_seed": "seed"}.get(key, key.lower()), vars(cfg), 2)
                advice = f"did you mean {' or '.join(near)}?" if near else "train.py --help lists them all"
                raise SystemExit(f"{arg}: unknown option {key}; {advice}")
            if arg.startswith("-") and not equals:
                raise SystemExit(f"{arg}: options are written with their value, as {arg}=VALUE")
            setattr(cfg, key, value if inspect.isfunction(value) else coerce(value, key, arg))
    view = type("", (), {"__getattr__": lambda v, k: x(v) if inspect.isfunction(x := getattr(cfg, k)) else x})
    for key in vars(cfg):  # lr = lambda cfg: ... may ask for options that are such rules themselves
        setattr(cfg, key, coerce(getattr(view(), key), key, "a config file"))
    check(cfg)
    return cfg


def check(cfg: Config) -> None:
    """SystemExit with a sentence for values that can't work. Network and data check theirs themselves."""

    def must(fine: Any, name: str, what: str) -> None:
        if not fine:
            raise SystemExit(f"{name}={getattr(cfg, name)!r:.60} can't work: it must be {what}")

    for name, value in sorted(vars(cfg).items(), key=lambda kv: kv[0] != "scale"):  # others follow from it
        numbers = [v for v in (value if isinstance(value, tuple) else [value]) if type(v) in (int, float)]
        must(type(value) is not tuple or "_" in name or len(numbers) == len(value), name, "numbers, as 6,6")
        default = getattr(Config, name)  # what is at least 1 by default makes no sense at 0
        low = int(type(default) is int and default > 0 and name[:4] not in ("num_", "val_", "keep"))
        high = {"betas": 1, "ema_decay": 1, "drop_path_rate": 1, "quality": 101}.get(name, 2.0**63)
        must(all(low <= v < high for v in numbers), name, f"at least {low}{f', below {high}' * (high < 999)}")
    must(len(cfg.betas) == 2, "betas", "two numbers")
    for name in ("depths", "num_heads"):
        must(all(type(v) is int and v > 0 for v in getattr(cfg, name)), name, "positive whole numbers")
    must("" != Path(cfg.name).name == cfg.name.rstrip(".") and cfg.name.isprintable(), "name", "a plain name")
    must((cfg.upsampler == "") == (cfg.scale == 1), "upsampler", "'' for scale=1, else as in configs/*_sr.py")
    flat = {"noise": True, "jpeg": True, "bicubic": False}.get(cfg.degradation, cfg.scale == 1)
    must(cfg.dataroot_lq or flat == (cfg.scale == 1), "degradation", "bicubic or your own for scale > 1 only")
    must(not cfg.gt_size % (n := cfg.scale * cfg.window_size), "gt_size", f"N x {n} (scale x window_size)")


def options_of(function: Any, cfg: Config) -> dict[str, Any]:
    """The options that are arguments of `function`, by name."""
    return {k: v for k, v in vars(cfg).items() if k in inspect.signature(function).parameters}


def lr_at(it: int, cfg: Config) -> float:
    """Learning rate of iteration `it` >= 1. A milestone m acts from iteration m + 1 on, as in BasicSR."""
    if it < cfg.warmup_iters:
        return cfg.lr * it / cfg.warmup_iters
    if cfg.scheduler == "cosine":
        done = (it - 1 - cfg.warmup_iters) / max(cfg.total_iters - cfg.warmup_iters, 1)
        return cfg.lr * (1 + math.cos(math.pi * min(max(done, 0), 1))) / 2
    return cfg.lr * cfg.gamma ** sum(it > m for m in cfg.milestones)


def hardware(cfg: Config, world: int) -> tuple[torch.device, str, int]:
    """What `auto` and None stand for here: the device, the precision, the micro-batches per step and rank."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k, there in found.items() if there) if cfg.device == "auto" else cfg.device
    need(found[kind], f"device={kind}: PyTorch finds none here; --device=auto takes what there is")
    bf16 = kind == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, cfg.amp != "none"
        torch.set_float32_matmul_precision("highest" if cfg.amp == "none" else "high")
        bf16 = torch.cuda.get_device_capability() >= (8, 0)
    if kind == "cpu" and sys.platform == "linux":  # freed memory is kept: new pages can cost half of a step
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # glibc's M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(option, value)
    kept = 4 * 15 * cfg.embed_dim * sum(cfg.depths) * (cfg.gt_size / cfg.scale) ** 2  # bytes a sample, about
    heavy = kind == "cpu" and cfg.batch_size // world * kept > 4e9
    accumulate = cfg.accumulate or (cfg.batch_size // world if heavy else 1)
    cfg.use_checkpoint |= heavy and kept > 4e9
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    auto = "bf16" if bf16 else "tf32" if kind == "cuda" else "none"
    return device, auto if cfg.amp == "auto" else cfg.amp, accumulate


def why_not_compiled(device: torch.device) -> str | None:
    """What torch.compile lacks here, in words; None if nothing. On a CPU it takes long and gains little."""
    if device.type != "cuda" or sys.platform != "linux":
        return "only on CUDA under Linux, unless compile=on"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 7:
        return f"the GPU has capability {major}.{minor}, Triton needs 7.0"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is missing"
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cc")))):
        return "no C compiler is found (install gcc)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing (install python3-dev)"
    return None


def open_data(cfg: Config) -> tuple[PairedImageDataset, dict[str, ValidationImages]]:
    """The training pairs, and the validation sets by name."""
    gt, lq = (v if isinstance(v, tuple) else (v,) for v in (cfg.val_gt, cfg.val_lq))
    need(not cfg.val_lq or (cfg.val_gt and len(lq) == len(gt)), "give one val_lq for each val_gt")
    val_sets, shared = {}, {k: getattr(cfg, k) for k in ("degradation", "scale", "in_chans", "filename_tmpl")}
    shared |= {"sigma": np.max(cfg.sigma), "quality": np.min(cfg.quality), "crop_border": cfg.crop_border}
    wanted = (cfg.val_freq or cfg.eval_only) and (cfg.val_gt or not cfg.dataroot_lq)
    for i, root in enumerate(gt if wanted else ()):
        name = Path(os.path.abspath(root)).stem if root else "synthetic"
        name += f"_{i + 1}" * (name in val_sets)  # folders of the same name
        val_sets[name] = ValidationImages(root, lq[i] if cfg.val_lq else None, **shared)
    return PairedImageDataset(**options_of(PairedImageDataset, cfg) if not cfg.eval_only else {}), val_sets


def open_folder(folder: Path, cfg: Config, file: Any = None) -> Any:
    """Makes experiments/<name>; the open file locks it until the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(ImportError):  # Windows has no fcntl, and so no lock
        import fcntl

        try:
            fcntl.lockf(file := open(folder / ".lock", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder} is in use by another run: wait, or give this one a --name") from None
    bare = any(folder.glob("models/*.pth")) and not any(folder.glob("training_states/*.state"))
    if not cfg.eval_only and (bare or (cfg.resume == "never" and (folder / "config.json").exists())):
        archive = folder.rename(folder.with_name(f"{cfg.name}_archived_{time.strftime('%Y%m%d_%H%M%S')}"))
        print(f"{folder} {'has no training states, so it ' * bare}was moved to {archive}")
        return open_folder(folder, cfg)
    return file


def write(path: Path, content: Any) -> None:
    """Writes text, or an object by torch.save, so that `path` is always whole: the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(content) if isinstance(content, str) else torch.save(content, partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        raise SystemExit(f"{path} can't be written: {error}\nThe same command goes on") from None


def set_threads(device: torch.device, before: int | None) -> int:
    """Threads for the CPU: OMP_NUM_THREADS, or as many as `before` a restart, or as cores are free."""
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(before or free_cores(), torch.get_num_threads()))
    return torch.get_num_threads()


def last_checkpoint(folder: Path) -> tuple[dict, dict]:
    """(state, weights) of the newest checkpoint that is whole, with a warning for those that aren't."""
    for state in sorted(folder.glob("training_states/*.state"), key=lambda p: int(p.stem), reverse=True):
        try:
            for path in (paths := (state, folder / "models" / f"net_g_{state.stem}.pth")):
                need(not zipfile.ZipFile(path).testzip(), "damaged")  # torch.load compares no checksums
            return tuple(torch.load(path := p, map_location="cpu", weights_only=True) for p in paths)
        except Exception:
            print(f"warning: {path} is damaged or missing: the one before is used, if any", file=sys.stderr)
    return {"iter": 0, "best": {}, "config": vars(Config()), "sums": torch.zeros(1, 5)}, {}


def main(cfg: Config) -> int | None:
    """Trains; returns the exit code: None or 0, 1 for a damaged image, 128 + the signal that stopped it."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, amp, accumulate = hardware(cfg, world)
    cuda, cpu = device.type == "cuda", device.type == "cpu"
    dataset, val_sets = open_data(cfg)
    torch.manual_seed(cfg.seed)
    net = SwinIR(img_size=cfg.gt_size // cfg.scale, upscale=cfg.scale, **options_of(SwinIR, cfg))
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")  # each for the tensors there

    def reduced(x: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
        if world > 1:
            dist.all_reduce(x, op)
        return x

    folder = Path("experiments") / cfg.name  # what must be refused is, before it is touched
    state, weights = last_checkpoint(folder if cfg.resume == "auto" or cfg.eval_only else folder / "moved")
    start, best, before = (state[k] for k in ("iter", "best", "config"))
    threads = set_threads(device, state.get("threads"))
    how, at = ("{}: {} -> {}", f" iteration {start:,}") if start else ("{0}={2}", "")
    changed = {k: how.format(k, before[k], v) for k, v in vars(cfg).items() if before.get(k, v) != v}
    fixed = {*options_of(SwinIR, cfg), "scale", *["pretrain_network"] * bool(cfg.pretrain_network)}
    if not cfg.eval_only:
        numbers = SampleNumbers(cfg.batch_size, rank, world, start, accumulate)
        fixed |= {"seed", "batch_size", "optimizer", "degradation", "sigma", "quality", "pretrain_network"}
        fixed |= set() if cfg.dataroot_gt else {"dataroot_gt"}  # it may have been forgotten
    else:
        need(start or cfg.pretrain_network, f"eval_only: no checkpoint in {folder}; give --pretrain_network")
        need(val_sets, "eval_only: give val_gt and val_lq")
    if start and (fixed := [text for k, text in changed.items() if k in fixed - {"use_checkpoint"}]):
        raise SystemExit(f"{', '.join(fixed)} must stay: give the old one, another --name, or --resume=never")
    if cfg.pretrain_network and not start:
        dataset.notices += [load_weights(net, cfg.pretrain_network, cfg.param_key, cfg.strict_load)]
    _lock = open_folder(folder, cfg) if reduced(torch.ones(1)) and rank == 0 else None  # once all have read
    kept = 2**62 if cfg.eval_only else start  # an evaluation takes nothing back
    log = Log(folder, kept, cfg.use_tb_logger, cfg.wandb, vars(cfg)) if rank == 0 else lambda *x, **y: None
    log(f"{folder}: {'evaluating' if cfg.eval_only else 'continuing after' if start else 'starting'}{at}")
    log(f"options: {', '.join(changed.values()) or ('as before' if start else 'the defaults')}")
    found = f"{len(dataset):,} {'pair' if cfg.dataroot_lq else 'image'}(s)" if dataset.pairs else "synthetic"
    sets = ", ".join(f"{k} ({len(v)})" for k, v in val_sets.items()) or "none"
    log("\nnote: ".join([f"data: {found}; " * (not cfg.eval_only) + f"validation: {sets}", *dataset.notices]))
    net.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).requires_grad_(False) if cfg.ema_decay else net
    params, averages = list(net.parameters()), list(ema.parameters())
    adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    optimizer = adam(params, cfg.lr, cfg.betas, weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    sums = state["sums"][rank % len(state["sums"])].to(device)  # loss, norm, good, bad steps; bad in a row
    if start:
        ema.load_state_dict(weights["params_ema"])
        net.load_state_dict(weights["params"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    model = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net
    if world > 1:  # a first backward sets its buckets, and so how sums round: a restart must agree in them
        model(torch.zeros(1, cfg.in_chans, *[cfg.window_size] * 2, device=device)).sum().backward()
    missing = why_not_compiled(device) if cfg.compile == "auto" else None
    if cfg.compile == "on" or (cfg.compile == "auto" and not missing):
        for layer in net.layers:  # in place: no prefix in the state dict; alike: one compilation serves all
            layer.compile()
    model.broadcast_buffers = False  # DDP's; as an argument it is deprecated, and its new name too new
    work = f"{device}, {amp}, {world} rank(s) x {accumulate} micro-batch(es)"
    work += (
        f", {torch.get_num_threads()} thread(s)" if cpu else f"; not compiled: {missing}" if missing else ""
    )
    log(f"network: {sum(p.numel() for p in params):,} parameters; torch {torch.__version__}, {work}")

    def validate(it: int) -> None:
        """Each rank takes every world-th image; means run over all in order, whatever the number of ranks."""
        made = {"noise": f"sigma {np.max(cfg.sigma):g}, seed 0", "jpeg": f"quality {np.min(cfg.quality):g}"}
        made = "pairs" if cfg.val_lq else made.get(cfg.degradation, cfg.degradation)
        colour = "gray" if cfg.in_chans == 1 else "Y" if cfg.test_y_channel else "RGB"
        protocol = f"{colour}, border {cfg.crop_border}, {made}" + ", padded by a window" * cfg.pad_window
        window, measures = cfg.window_size, (psnr, ssim, psnrb) if cfg.degradation == "jpeg" else (psnr, ssim)
        for dataset, images in val_sets.items():
            pictures, scores = {}, torch.zeros(len(images), 1 + len(measures), dtype=torch.float64)
            exact = torch.zeros(len(images))
            for i in range(rank, len(images), world):
                name, lq, gt = images[i].values()
                x, (h, w), peak = lq[None], gt.shape[:2], np.iinfo(gt.dtype).max
                for dim in (2, 3) if cfg.pad_window else ():
                    x = torch.cat([x, x.flip(dim)], dim).split((x.shape[dim] // window + 1) * window, dim)[0]
                pair = (i.clamp(0, 1).mul(peak).round() for i in (lq, restore(ema.eval(), x)[0, :, :h, :w]))
                lq, out = (i.permute(1, 2, 0).numpy().astype(gt.dtype) for i in pair)
                lq = imresize(lq, cfg.scale) if cfg.scale > 1 else lq
                how = gt, cfg.crop_border, cfg.test_y_channel
                values = [psnr(lq, *how)] + [measure(out, *how) for measure in measures]
                exact[i] = math.isinf(values[1])
                # An exact image would be infinite: 60 dB, about what rounding to 8 bits alone leaves
                scores[i] = scores.new_tensor([min(value, MOST_PSNR) for value in values])
                if cfg.save_img:
                    path = folder / "visualization" / dataset / f"{name}_{it}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pictures[f"{dataset}/{name}"] = picture = strip(lq, out, gt, *scores[i, :2].tolist())
                    picture.save(path)
            key, decides = f"{dataset}: {protocol}", dataset == next(iter(val_sets))
            if decides and key != next(iter(best), 0) and not cfg.eval_only:  # its first key is net_g_best's
                best.clear()
                if rank == 0 and (old := folder / "models" / "net_g_best.pth").exists():
                    old.rename(old.with_stem(f"net_g_best_before_{it}"))
            before, value, similar, *unblocked = reduced(scores).mean(0).tolist()  # sums with zeros: exact
            perfect = int(reduced(exact).sum())
            top, when = best[key] = max(best.get(key, [value, it]), [value, it], key=lambda b: b[0])
            entry = {"psnr": value, "ssim": similar} | dict(zip(["psnrb"], unblocked, strict=False))
            entry |= {"input_psnr": before, "best_psnr": top, "best_iter": when, "protocol": protocol}
            entry["exact"] = perfect
            text = f"validation {dataset}: {value:.2f} dB, SSIM {similar:.4f}"
            text += "".join(f", PSNR-B {x:.2f} dB" for x in unblocked) + f"; input {before:.2f} dB"
            text += f", {perfect} image(s) exact" * (perfect > 0)
            text += f", best {top:.2f} dB at {when:,}" * (it > 0 and not cfg.eval_only) + f" ({protocol})"
            log(text, pictures, event="val", iter=it, dataset=dataset, eval_only=cfg.eval_only, **entry)
            if when == it and decides:
                save_network("best", it)
        net.train()

    def save_network(name: Any, it: int) -> None:
        if rank == 0 and not cfg.eval_only:
            both = {"params": portable(net.state_dict()), "params_ema": portable(ema.state_dict())}
            write(folder / "models" / f"net_g_{name}.pth", both | {"arguments": net.arguments, "iter": it})

    def save(it: int) -> None:
        save_network(it, it)
        content = {"iter": it, "best": best, "config": vars(cfg), "scaler": scaler.state_dict()}
        content["threads"] = threads
        content["sums"] = reduced(torch.eye(world)[rank, :, None] * sums.cpu())  # a row for each rank
        if rank == 0:
            write(folder / "training_states" / f"{it}.state", content | {"optimizer": optimizer.state_dict()})
            saved = sorted(i for p in folder.glob("training_states/*.state") if (i := int(p.stem)) <= it)
            for old in saved[: -cfg.keep_last] if cfg.keep_last else []:  # later ones would be damaged
                (folder / "models" / f"net_g_{old}.pth").unlink(missing_ok=True)  # found again if killed here
                (folder / "training_states" / f"{old}.state").unlink()

    if cfg.eval_only:
        return validate(start)
    if rank == 0 and start < cfg.total_iters:
        write(folder / "config.json", json.dumps(vars(cfg), indent=1))
    asked, code = {"code": 0}, 0
    end = time.perf_counter() + 3600 * (math.inf if cfg.max_hours is None else cfg.max_hours)

    def hear(number: int, frame: Any) -> None:
        asked["save"] = True
        if number != getattr(signal, "SIGUSR1", None):
            asked["code"] = 128 + number
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # at once; not SIGTERM, of which Slurm sends several
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(
                    2, b"\nstopping after this iteration or validation; Ctrl-C again: at once, unsaved\n"
                )

    for name in {"SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"} & set(dir(signal)):
        if name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(getattr(signal, name), hear)
    loader = train_loader(dataset, numbers, min(cfg.num_workers, os.cpu_count() or 1), cuda)
    autocast = torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16, "16" in amp)
    form = "{l_bar}{bar}| {n:.0f}/{total} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
    bar = tqdm(total=cfg.total_iters, initial=start, disable=None if rank == 0 else True, bar_format=form)
    with bar, Prefetcher(loader, device) as batches:
        since, seen = time.perf_counter(), start
        for it in range(start + 1, cfg.total_iters + 1):
            try:
                pairs = [next(batches) for _ in range(accumulate)]
            except OSError as error:  # a damaged image
                asked["code"] = max(asked["code"], 1)
                (log if rank == 0 else print)(f"error: {error}; mended or removed, the same command goes on")
            wish = torch.tensor([asked.pop("save", 0), time.perf_counter() > end, asked["code"]])
            save_now, late, code = reduced(wish, dist.ReduceOp.MAX).tolist()  # the same on all ranks
            if it > start + 1 and (save_now or late or code):
                save(it - 1)
            if code or (late and it > start + 1):
                log(f"stopped after iteration {it - 1:,}" + ", saved: the same command continues" * (it > 1))
                break
            # The step. DropPath draws from (seed, iteration, rank).
            torch.manual_seed(((cfg.seed * 1_000_003 + it) * 4099 + rank) % 2**63)
            optimizer.zero_grad()
            lr = optimizer.param_groups[0]["lr"] = lr_at(it, cfg)
            total = 0.0
            for micro, (lq, gt) in enumerate(pairs):
                model.require_backward_grad_sync = micro == accumulate - 1  # DDP's: the last sums over ranks
                with autocast:
                    loss = LOSSES[cfg.loss](model(lq), gt) / accumulate
                # A loss that isn't finite spoils the gradients, and by their sum those of all ranks.
                scaler.scale(loss * (1 + 0 * loss.detach())).backward()
                total += (loss := loss.detach())
                bar.update(1 / accumulate)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(params, cfg.grad_clip or math.inf)
            bad = 1 - (good := norm.isfinite().float())
            optimizer.found_inf = bad if cuda or cpu else None  # 1: the fused step does nothing, but on MPS
            (cuda or cpu or good) and scaler.step(optimizer)
            scaler.update()
            if cfg.ema_decay:  # it grows to its value: in short runs 0.999 would keep the initial weights
                with torch.no_grad():  # else each average drags a graph of all steps before
                    torch._foreach_lerp_(averages, params, 1 - min(cfg.ema_decay, (1 + it) / (10 + it)))
            sums += torch.stack([total.where(good > 0, 0), norm.where(good > 0, 0), good, bad, bad])
            sums[4] *= bad
            # The rest looks, tells and saves. Only reading values waits for the GPU.
            steps, last = it - seen, it == cfg.total_iters
            if it % cfg.print_freq == 0 or last:
                loss, norm, good, bad, row = reduced(sums / world).tolist()
                spent = time.perf_counter() - since  # after the line above has waited for the device
                loss, norm = (x / good if good else math.nan for x in (loss, norm))
                speed, gb = cfg.batch_size * steps / spent, torch.cuda.max_memory_allocated() / 1e9 or None
                entry = {"loss": loss, "lr": lr, "grad_norm": norm, "skipped": bad, "time": spent / steps}
                entry |= {"data_time": batches.wait / steps, "img_per_s": speed, "max_mem_gb": gb}
                text = f"iter {it:,}/{cfg.total_iters:,}: loss {loss:.4e}, lr {lr:.2e}, {speed:.1f} img/s, "
                text += f"{tqdm.format_interval(spent / steps * (cfg.total_iters - it))} left, "
                text += f"{batches.wait / spent:.0%} waiting for data" + f", {bad:.0f} skipped" * (bad > 0)
                text += " (try data.py pack or --num_workers)" * (batches.wait > spent / 4 and seen > start)
                log(text, event="train", iter=it, **entry)
                need(row < 50, "stopped: no finite loss in 50 steps; try lower lr, grad_clip=1, resume=never")
                sums[:4] = 0
                since, batches.wait, seen = time.perf_counter(), 0.0, it
            validates = val_sets and (it % cfg.val_freq == 0 or last)
            saves = (
                it % cfg.save_checkpoint_freq == 0 and sums[4] < 9
            ) or last  # not when weights are spoilt
            if validates or saves:
                sums.tolist()  # waits: steps that are queued aren't part of the pause
            paused = time.perf_counter()
            if validates:
                bar.set_postfix_str("validating")
                validate(it)
            if saves:
                save(it)
            since += time.perf_counter() - paused
            if cpu or it == start + 1 or it % cfg.print_freq == 0:
                bar.set_postfix_str(f"loss {total.item():.2e}, lr {lr:.1e}")
        else:
            log(f"finished: the weights are in {folder / 'models'}; to go on, raise --total_iters")
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save
    try:
        code = main(load_config(sys.argv[1:]))
    except (OSError, RuntimeError, ValueError) as error:  # what isn't a sentence keeps its traceback
        own = type(error) is ValueError and Path(inspect.trace()[-1].filename).parent == Path(__file__).parent
        if not (own or isinstance(error, OSError) or "DataLoader worker" in str(error)):
            raise
        sys.exit(f"error: {error}")
    if dist.is_initialized():  # DDP keeps threads of gloo, which can abort a Python that is ending
        dist.destroy_process_group()
        atexit._run_exitfuncs()  # W&B's
        os._exit(print(end="", flush=True) or code or 0)
    sys.exit(code)
