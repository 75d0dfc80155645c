"""Times training, inference and data loading for the published recipes, beside the authors' network.

    python tests/bench.py                                           # nanoSwinIR alone
    python tests/bench.py --peer ../SwinIR --basicsr ../BasicSR     # beside the authors' network and loader
    python tests/bench.py --recipes tiny --modes bf16 --device cpu --peer ../SwinIR
    python tests/bench.py --sizes --recipes tiny                    # time and memory against size

Both networks have the same weights, take turns within one process, and go through the training step of
train.py, with its settings of cuDNN and of the allocator. Prints Markdown. On a CPU batches are small, and
SwinIR-M restores 1 megapixel only with --full.
"""

import argparse
import ctypes
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from statistics import median

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # of the profiler, which counts memory: silent

import bench_data  # finds the repository, so it comes first
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data import PairedImageDataset, Prefetcher, dataset_options, sample_batches, train_loader
from model import SwinIR, restore
from train import (
    OPTIMIZERS,
    Config,
    autocast,
    build_average,
    build_loss,
    build_network,
    load_config,
    set_up_hardware,
    train_step,
    update_average,
)

RECIPES = {  # the options of train.py that make them
    "denoise": ["configs/denoise.py"],
    "classical": ["configs/classical_sr.py", "--scale=4"],
    "lightweight": ["configs/lightweight_sr.py"],
    "jpeg": ["configs/jpeg.py"],
    "tiny": ["configs/tiny.py"],
}
CPU_BATCH = {"denoise": 1, "classical": 1, "lightweight": 2, "jpeg": 1, "tiny": 4}
WORKERS = (0, 1, 2, 4)
MODES = {"float32": torch.float32, "bf16": torch.bfloat16, "compiled": torch.bfloat16}


class DropPath(nn.Module):
    """timm's, which the authors use for rates above 0."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.keep = 1 - rate

    def forward(self, x: Tensor) -> Tensor:
        return (
            x * x.new_empty(len(x), 1, 1).bernoulli_(self.keep).div_(self.keep)
            if self.training
            else x
        )


def import_peer(path: Path) -> type[nn.Module]:
    """The authors' class. What it takes from timm is put in its place where timm isn't installed."""
    try:
        import timm.models.layers  # noqa: F401
    except ImportError:
        for name in ("timm", "timm.models", "timm.models.layers"):
            sys.modules[name] = types.ModuleType(name)
        used = {
            "DropPath": DropPath,
            "to_2tuple": lambda n: (n, n),
            "trunc_normal_": nn.init.trunc_normal_,
        }
        vars(sys.modules["timm.models.layers"]).update(used)
    sys.path.insert(0, str(path.resolve()))
    from models.network_swinir import SwinIR as Official

    return Official


def networks(cfg: Config, args: argparse.Namespace) -> dict[str, nn.Module]:
    """Ours and the peer's, with the same weights and, as is asserted, the same outputs."""
    if (
        sys.platform == "linux"
    ):  # back to the system, what set_up_hardware() has kept of the recipe before
        ctypes.CDLL(None).malloc_trim(0)
    torch.manual_seed(0)
    size = cfg.gt_size // cfg.scale
    nets = {"ours": build_network(cfg)}
    if (
        not cfg.upsampler
    ):  # at zero, where training begins, it would hide the rest from the assertion
        nn.init.trunc_normal_(nets["ours"].conv_last.weight, std=0.02)
    if args.peer:
        nets["SwinIR"] = args.peer(**nets["ours"].arguments)
        nets["SwinIR"].load_state_dict(nets["ours"].state_dict())
    nets["ours"].to(memory_format=torch.channels_last)  # as train.py
    x = torch.rand(1, cfg.in_chans, size, size, device=args.device)
    with torch.no_grad():
        outputs = [net.to(args.device).eval()(x) for net in nets.values()]
    assert torch.allclose(outputs[0], outputs[-1], atol=1e-2), (
        "the networks differ"
    )  # TF32 has 11 bits
    return nets


def training_step(net: nn.Module, cfg: Config, mode: str, lq: Tensor, gt: Tensor) -> Callable:
    """step(): train.py's own step and average. step(False): its forward pass alone."""
    device = lq.device
    average = build_average(net.train())
    criterion = build_loss(cfg, device)
    adam = OPTIMIZERS["adam"](net, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    precision = "none" if mode == "float32" else "bf16"
    if mode == "compiled":  # as train.py; of the authors', the whole
        for layer in net.layers if isinstance(net, SwinIR) else [net]:
            layer.compile()

    def step(backward: bool = True) -> Tensor | None:
        if not backward:
            with autocast(device, precision):
                return sum(criterion(net(lq), gt).values())
        train_step(cfg, precision, net, criterion, adam, scaler, [(lq, gt)])
        update_average(average, net, 10**6, cfg.ema_decay)
        return None

    return step


def milliseconds(s: float) -> str:
    return f"{s * 1e3:,.0f}" if s >= 0.1 else f"{s * 1e3:.3g}"


def row(*cells: str, head: bool = False) -> None:
    table = [cells, ["---", *["---:"] * (len(cells) - 1)]] if head else [cells]
    print("\n" * head + "\n".join(f"| {' | '.join(cells)} |" for cells in table), flush=True)


def timed(run: Callable, device: str, calls: int = 1) -> float:
    """Seconds per call."""
    wait = torch.get_device_module(device).synchronize
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    wait()
    return (time.perf_counter() - start) / calls


def peak_memory(run: Callable, device: str) -> tuple[float, float]:
    """(the most bytes that a call holds of PyTorch's allocator, besides those held before, its seconds)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, seconds = torch.cuda.memory_allocated(), timed(run, device)
        return torch.cuda.max_memory_allocated() - before, seconds
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        seconds = timed(run, device)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [
        e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())
    ]  # below 0 where it is freed
    return max(accumulate(sizes)) if device == "cpu" else float("nan"), seconds


def race(runs: dict[str, Callable], args: argparse.Namespace) -> tuple[list[float], list[str]]:
    """Median seconds; table cells: milliseconds, the ratio with its range over the rounds, peak memory.
    In each round all take turns, so that what else the machine does meets all alike."""
    peaks, calls, seconds = {}, {}, {name: [] for name in runs}
    for name, run in runs.items():
        run()  # compiles, chooses algorithms
        peaks[name] = peak_memory(run, args.device)
        calls[name] = 1 if args.quick else max(1, min(100, round(0.2 / peaks[name][1])))
    slow = sum(spent for _, spent in peaks.values()) > 20
    for _ in range(min(args.repeats, 3) if slow else args.repeats):
        for name, run in runs.items():
            seconds[name].append(timed(run, args.device, calls[name]))
    medians, (first, *other) = [median(s) for s in seconds.values()], seconds.values()
    cells = [milliseconds(s) for s in medians]
    if other:
        ratios = sorted(b / a for a, b in zip(first, *other, strict=True))
        cells += [f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"]
    return medians, [*cells, " / ".join(f"{peak / 1e9:.3g}" for peak, _ in peaks.values())]


def count(net: nn.Module, step: Callable, lq: Tensor) -> tuple[float, float]:
    """FLOP of forward and backward, from the shapes. Bytes moved, if no more than once: what is saved for
    backward is written and read, and of the weights there are 14 passes: 2 by forward and backward, the
    gradient is written and read for its norm, Adam reads 4 and writes 3, the average takes 3."""
    saved = {}
    with FlopCounterMode(display=False) as counter:
        SwinIR(**net.arguments).to("meta")(lq.to("meta")).sum().backward()

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()  # views share one
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = step(False)  # kept, so that all it saves is alive at once, at different addresses
    del loss
    weights = {p.untyped_storage().data_ptr(): p.nbytes for p in net.parameters()}
    kept = sum(size for pointer, size in saved.items() if pointer not in weights)
    return counter.get_total_flops(), 2 * kept + 14 * sum(weights.values())


def bench_training(name: str, cfg: Config, mode: str, args: argparse.Namespace) -> None:
    torch.compiler.reset()  # lest recipes together reach the limit of recompilations
    nets, (B, C, small) = (
        networks(cfg, args),
        (cfg.batch_size, cfg.in_chans, cfg.gt_size // cfg.scale),
    )
    lq = torch.rand(B, C, small, small, device=args.device)
    gt = torch.rand(B, C, cfg.gt_size, cfg.gt_size, device=args.device)
    steps = {k: training_step(net, cfg, mode, lq, gt) for k, net in nets.items()}
    try:
        seconds, cells = race(steps, args)
    except torch.OutOfMemoryError:
        return row(f"{name}, batch {B}", mode, "out of memory: try a smaller --batch")
    flop, moved = count(nets["ours"], steps["ours"], lq)
    least = [flop / args.flops[MODES[mode]], moved / args.bandwidth]  # seconds
    cells += [f"{flop / 1e9:,.4g}", f"{moved / 1e9:.3g}", milliseconds(max(least))]
    row(f"{name}, batch {B}", mode, *cells, " / ".join(f"{least[0] / s:.0%}" for s in seconds))


def inference(device: str, mode: str, f: Callable, x: Tensor) -> None:
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, mode != "float32"):
        f(x)


def bench_inference(name: str, cfg: Config, mode: str, args: argparse.Namespace) -> None:
    nets, size, large = networks(cfg, args), cfg.gt_size // cfg.scale, 48 if args.quick else 1024
    slow = args.device == "cpu" and cfg.embed_dim == 180 and not args.full

    infer = partial(inference, args.device, mode)
    for side in (size, size * 3 // 2 + 3, *[large] * (not slow)):  # both pad to whole windows
        x = torch.rand(1, cfg.in_chans, side, side, device=args.device)
        runs = {k: partial(infer, net, x) for k, net in nets.items()}
        if (
            side == large
        ):  # ours takes tiles if memory demands it; the authors' script takes the whole
            runs["ours"] = partial(infer, partial(restore, nets["ours"]), x)
        try:
            cells = race(runs, args)[1]
        except torch.OutOfMemoryError:  # of the authors', for restore() takes smaller tiles
            cells = []
        if not cells:  # not above, where the exception still holds the memory
            ours, memory = race({"ours": runs["ours"]}, args)[1]
            cells = [ours, "out of memory", "", memory]
        row(f"{name}, {side}x{side}", mode, *cells)


def bench_sizes(name: str, cfg: Config, mode: str, args: argparse.Namespace) -> None:
    """Time and memory against patch, batch and image size, of our network alone."""
    net, w, C = networks(cfg, args)["ours"], cfg.window_size, cfg.in_chans
    patches = [
        (cfg.batch_size, side)
        for side in ((2 * w, 3 * w) if args.quick else range(4 * w, 17 * w, 4 * w))
    ]
    batches = [(batch, 8 * w) for batch in ((1,) if args.quick else (1, 2, 4, 8))]
    for batch, side in [*patches, *batches]:
        lq = torch.rand(batch, C, side, side, device=args.device)
        gt = torch.rand(batch, C, side * cfg.scale, side * cfg.scale, device=args.device)
        (seconds,), cells = race({"ours": training_step(net, cfg, mode, lq, gt)}, args)
        each = milliseconds(seconds / batch / side**2 * 1e3) + " us"
        row(f"{name}, training step, batch {batch}, {side}x{side}", mode, *cells, each)
    net.eval()
    for side in (32,) if args.quick else (64, 128, 256, 512, *[1024] * args.full):
        x = torch.rand(1, C, side, side)
        run = partial(inference, args.device, mode, partial(restore, net), x)
        (seconds,), cells = race({"ours": run}, args)
        row(
            f"{name}, restore, {side}x{side}",
            mode,
            *cells,
            milliseconds(seconds / side**2 * 1e3) + " us",
        )


def bench_loading(cfg: Config, folder: Path, args: argparse.Namespace, workers: int = 2) -> float:
    """Pairs per second from packed 480x480 images; for SR, LQ is read too, else it is made."""
    if not (folder / "gt.npy").exists():
        with redirect_stdout(sys.stderr):
            bench_data.make_images(folder, (480, 480), 4 if args.quick else 24, cfg.scale)
    roots = {
        "dataroot_gt": folder / "gt.npy",
        "dataroot_lq": folder / "lq.npy" if cfg.scale > 1 else None,
    }
    dataset = PairedImageDataset(**dataset_options(cfg) | roots)
    batches = sample_batches(lambda it: (cfg.batch_size, cfg.gt_size))
    loader = train_loader(dataset, batches, workers, args.device == "cuda")
    with Prefetcher(loader, args.device) as batches:
        for _ in range(8):  # those that workers load while they start
            next(batches)
        start, pairs = time.perf_counter(), 0
        while (spent := time.perf_counter() - start) < (0.1 if args.quick else 4):
            pairs += len(next(batches)[0])
    return pairs / spent


def describe(args: argparse.Namespace) -> None:
    """Prints the command, hardware and versions, and measures what the hardware reaches."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = info.partition("model name\t: ")[2].partition("\n")[0] or sys.platform
    name = torch.cuda.get_device_name() if args.device == "cuda" else name
    print(f"`python {' '.join(sys.argv)}`\n\n{name}, {torch.get_num_threads()} threads", end="; ")
    sides, large = ((512, 1024, 2048), 2**26) if args.device == "cpu" else ((4096, 8192), 2**28)
    sides, large = ((256,), 2**20) if args.quick else (sides, large)
    a, args.flops = torch.rand(2, large, device=args.device), {}
    args.bandwidth = a.nbytes / min(timed(lambda: a[0].copy_(a[1]), args.device) for _ in range(20))
    ways = [lambda b: b @ b]
    if args.device == "cpu":  # oneDNN's 1x1 convolution may be faster than MKL
        ways.append(
            lambda b: nn.functional.conv2d(b[None, None].permute(0, 3, 1, 2), b[..., None, None])
        )
    for dtype in dict.fromkeys(MODES[mode] for mode in ["float32", *args.modes]):
        factors = [a[0, : n * n].view(n, n).to(dtype) for n in sides]  # the best size and way count
        runs = [(partial(way, b), 2 * len(b) ** 3) for b in factors for way in ways]
        args.flops[dtype] = max(
            flop / timed(run, args.device) for run, flop in runs for _ in range(20)
        )
        print(f"{str(dtype)[6:]} matrix product {args.flops[dtype] / 1e12:.3g} TFLOP/s", end="; ")
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    print(f"copy {args.bandwidth / 1e9:.3g} GB/s; {versions}.")
    print(
        f"Medians of {args.repeats} rounds, at most 3 if they take over 20 s. a / b: ours / SwinIR."
    )


def main() -> None:
    best = (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    cli.add_argument("--recipes", nargs="+", choices=RECIPES, default=[*RECIPES])
    cli.add_argument(
        "--modes", nargs="+", choices=MODES, help="default: all; a CPU's: float32, bf16 if fast"
    )
    cli.add_argument(
        "--batch", type=int, help="default: the recipe's; on a CPU 1, lightweight 2, tiny 4"
    )
    cli.add_argument("--repeats", type=int, default=5, help="rounds, in which all take turns")
    cli.add_argument("--device", choices=("cuda", "mps", "cpu"), default=best)
    cli.add_argument("--peer", type=Path, help="a clone of JingyunLiang/SwinIR")
    cli.add_argument(
        "--basicsr", type=os.path.abspath, help="a clone of BasicSR, for tests/bench_data.py"
    )
    cli.add_argument(
        "--full", action="store_true", help="1 megapixel through SwinIR-M on a CPU, too"
    )
    cli.add_argument(
        "--sizes", action="store_true", help="instead: time and memory against size, of ours alone"
    )
    cli.add_argument(
        "--quick", action="store_true", help="toy networks, one round: shows that it runs"
    )
    args = cli.parse_args()
    if args.basicsr:
        import lmdb  # noqa: F401  what would be missed only at the end
    args.peer = args.peer and import_peer(args.peer)
    os.chdir(bench_data.ROOT)
    recipes = {name: load_config(RECIPES[name]) for name in args.recipes}
    for name, cfg in recipes.items():
        cfg.batch_size = args.batch or (CPU_BATCH[name] if args.device == "cpu" else cfg.batch_size)
        if args.quick:
            cfg.gt_size, args.repeats = 2 * cfg.window_size * cfg.scale, 1
            cfg.embed_dim, cfg.depths, cfg.num_heads = 12, (2,), (2,)
    amp = set_up_hardware(
        Config(device=args.device)
    ).precision  # as train.py: cuDNN's search, a CPU's freed memory
    usual = (
        3 if args.device != "cpu" else 2 if amp == "bf16" else 1
    )  # on a CPU compiling takes long
    modes = args.modes = args.modes or [*MODES][:usual]
    torch.set_float32_matmul_precision("highest")  # PyTorch's default: TF32 in convolutions alone
    describe(args)
    if args.sizes:
        args.peer = None
        row("Size", "mode", "ms", "peak GB", "per LQ pixel", head=True)
        for name, mode in product(recipes, modes):
            bench_sizes(name, recipes[name], mode, args)
        row("Loading, pairs per second", *(f"{n} workers" for n in WORKERS), head=True)
        for name, cfg in recipes.items():
            with tempfile.TemporaryDirectory() as folder:
                rates = [bench_loading(cfg, Path(folder), args, n) for n in WORKERS]
            row(f"{name}, batch {cfg.batch_size}", *(f"{rate:,.0f}" for rate in rates))
        return
    columns = [
        "mode",
        "ours, ms",
        *["SwinIR, ms", "SwinIR : ours (range)"] * bool(args.peer),
        "peak GB",
    ]
    row("Training step", *columns, "GFLOP", "GB moved", "floor, ms", "of peak FLOP/s", head=True)
    for name, mode in product(recipes, modes):
        bench_training(name, recipes[name], mode, args)
    print(
        "\nPeak: memory besides weights and optimizer. GFLOP: of forward and backward, counted. GB moved:"
    )
    print(
        "what is saved for backward, written and read, and 14 passes over the weights. Floor: the longer"
    )
    print(
        "of both at the speeds above. Of peak: counted FLOP per second, by those of the matrix product."
    )
    row("Inference", *columns, head=True)
    for name, mode in product(
        recipes, [m for m in modes if m != "compiled"]
    ):  # neither compiles for it
        bench_inference(name, recipes[name], mode, args)
    row("Data loading, 2 workers", "pairs per second", head=True)
    for name, cfg in recipes.items():
        with tempfile.TemporaryDirectory() as folder:
            row(f"{name}, batch {cfg.batch_size}", f"{bench_loading(cfg, Path(folder), args):,.0f}")
    if args.basicsr:
        sys.argv[1:] = ["--basicsr", args.basicsr, *["--seconds=0.1"] * args.quick]
        bench_data.main()


if __name__ == "__main__":
    main()
