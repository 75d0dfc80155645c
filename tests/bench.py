"""Times training, inference and loading of the published recipes, and writes Markdown tables.

    python tests/bench.py --report bench.md                         # everything, ours alone
    python tests/bench.py --report bench.md --peer ../SwinIR        # beside the authors' network
    python tests/bench.py --recipes tiny --modes bf16 --device cpu --tables training inference
    python tests/bench.py --sizes --recipes tiny                    # time and memory against size

The tables also appear on stdout as they are made. A training step is the one of train.py, with its
settings of PyTorch and of the memory allocator. Networks that are compared are in one process and
take turns. On a CPU, batches are small, and SwinIR-M restores large images only with --full.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, is silent

import bench_data  # it adds the repository to sys.path, so it comes first
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import model
from data import PairedImageDataset, Prefetcher, dataset_options, sample_batches, train_loader
from model import is_out_of_memory, restore
from train import (
    OPTIMIZERS,
    Config,
    autocast,
    build_average,
    build_loss,
    build_network,
    compile_layers,
    find_device,
    load_config,
    set_up_hardware,
    train_step,
    update_average,
    why_not_compiled,
)

ROOT = bench_data.ROOT


class Mode(NamedTuple):
    precision: str  # train.py's `amp`
    compiled: bool = False


MODES = {
    "float32": Mode("none"),
    "tf32": Mode("tf32"),
    "bf16": Mode("bf16"),
    "compiled": Mode("bf16", compiled=True),
}
# Options of train.py for each recipe.
RECIPES = {
    "denoise": ["configs/denoise.py"],
    "classical": ["configs/classical_sr.py", "--scale=4"],
    "lightweight": ["configs/lightweight_sr.py"],
    "jpeg": ["configs/jpeg.py"],
    "tiny": ["configs/tiny.py"],
}
CPU_BATCH = {"denoise": 1, "classical": 1, "lightweight": 2, "jpeg": 1, "tiny": 4}
CUDA_BATCHES = (1, 8, 32)  # besides the recipe's
WORKERS = (0, 1, 2, 4)


class Published(NamedTuple):
    """A row of traiNNer-redux: docs/source/benchmarks.md at commit 193c50c, x4, bf16."""

    arguments: list[str]  # the options of train.py that make this network
    frames_per_s: float
    gigabytes: float


PUBLISHED = {
    "SwinIR-M": Published(["configs/classical_sr.py"], 0.70, 2.64),
    "SwinIR-S": Published(["configs/lightweight_sr.py"], 1.09, 1.55),
}


@dataclass
class Bench:
    """What all tables need."""

    args: argparse.Namespace
    report: "Report"
    recipes: dict[str, Config]
    arguments: dict[str, list[str]]  # the options of train.py for each recipe
    modes: list[str]
    peer: type[nn.Module] | None  # the authors' class
    folder: Path  # of the images that are made
    peaks: dict[str, float] = field(
        default_factory=dict
    )  # FLOP/s of a matrix product, by precision

    @property
    def device(self) -> str:
        return self.args.device

    def batches(self, name: str) -> list[int]:
        if self.args.batches:
            return self.args.batches
        recipe = self.recipes[name].batch_size
        if self.device == "cuda" and not self.args.quick:
            return sorted({recipe, *CUDA_BATCHES})
        return [recipe]


# The tables


def training_table(bench: Bench) -> None:
    """One row for each recipe, batch and mode."""
    memory = memory_columns(bench)
    columns = ("mode", "ms", "img/s", "compilation, s", *memory, "GFLOP", "of peak FLOP/s")
    bench.report.head("Training step", *columns)
    for name, cfg in bench.recipes.items():
        flop_per_sample = count_flop(cfg)
        for batch, mode in product(bench.batches(name), bench.modes):
            result = measure_training(bench, cfg, mode, batch)
            title = f"{name}, batch {batch}"
            if result.out_of_memory:
                bench.report.row(title, mode, "out of memory")
                continue
            seconds = median(result.seconds)
            flop = flop_per_sample * batch
            share = flop / seconds / bench.peaks[MODES[mode].precision]
            bench.report.row(
                title,
                mode,
                milliseconds(seconds),
                f"{batch / seconds:.3g}",
                compilation(result),
                *memory_cells(bench, result),
                f"{flop / 1e9:,.4g}",
                f"{share:.0%}",
            )
    bench.report.text(MEMORY_NOTE[bench.device])
    bench.report.line(
        "GFLOP: of forward and backward, counted. Of peak: these per second, by those of the matrix "
        "product above in the same precision. Compilation: the first call without a later one, "
        '"cached" where files of an earlier compilation were used.'
    )


def peer_table(bench: Bench) -> None:
    """A training step beside the authors' network: each mode, and our best against theirs as it is
    shipped, in float32 or (on CUDA) TF32."""
    best = bench.modes[-1]
    pairs = [(mode, mode) for mode in bench.modes]
    for shipped in ("float32", "tf32"):
        if best != shipped and shipped in bench.modes:
            pairs.append((best, shipped))
    columns = ("ours in", "SwinIR in", "ours, ms", "SwinIR, ms", "SwinIR : ours (range)")
    bench.report.head("Training step", *columns, "GB besides weights", "SwinIR compiled")
    for (name, cfg), (mode, peer_mode) in product(bench.recipes.items(), pairs):
        release()
        ours, theirs = build_both(bench, cfg)
        batch = random_batch(bench, cfg, cfg.batch_size)
        runs = {
            "ours": Run(training_step(ours, cfg, mode, *batch), mode),
            "SwinIR": Run(training_step(theirs, cfg, peer_mode, *batch), peer_mode),
        }
        results = race(bench, runs)
        title = f"{name}, batch {cfg.batch_size}"
        cells = comparison(results["ours"], results["SwinIR"])
        bench.report.row(title, mode, peer_mode, *cells, compilation(results["SwinIR"]))


def attention_table(bench: Bench) -> None:
    """A training step with each route of model.ATTENTION, in the last of the modes."""
    mode = bench.modes[-1]
    routes = bench.args.attention
    columns = ("mode", "attention", "ms", f"ms : {routes[0]}'s (range)", "compilation, s")
    bench.report.head("Training step", *columns, "GB besides weights")
    for name, cfg in bench.recipes.items():
        release()
        runs = {}
        for route in routes:
            changed = replace(cfg, attention=route)
            net = build_ours(bench, changed)
            batch = random_batch(bench, cfg, cfg.batch_size)
            runs[route] = Run(training_step(net, changed, mode, *batch), mode)
        results = race(bench, runs)
        title = f"{name}, batch {cfg.batch_size}"
        for route, result in results.items():
            if result.out_of_memory:
                bench.report.row(title, mode, route, "out of memory")
                continue
            bench.report.row(
                title,
                mode,
                route,
                milliseconds(median(result.seconds)),
                ratio(results[routes[0]], result),
                compilation(result),
                gigabytes(result.extra),
            )


def inference_table(bench: Bench) -> None:
    """The training size, another size, and 1 megapixel, of one image. Nothing is compiled."""
    columns = ["mode", "ours, ms"]
    if bench.peer:
        columns += ["SwinIR, ms", "SwinIR : ours (range)"]
    bench.report.head("Inference", *columns, "GB besides weights")
    modes = [mode for mode in bench.modes if not MODES[mode].compiled]
    for (name, cfg), mode in product(bench.recipes.items(), modes):
        size = cfg.gt_size // cfg.scale
        large = 48 if bench.args.quick else 1024
        sides = [size, size * 3 // 2 + 3]  # the second is padded to whole windows
        if not is_slow(bench, cfg):
            sides.append(large)
        for side in sides:
            results = measure_inference(bench, cfg, mode, side, in_tiles=side == large)
            title = f"{name}, {side}x{side}"
            if bench.peer:
                bench.report.row(title, mode, *comparison(results["ours"], results["SwinIR"]))
            else:
                bench.report.row(title, mode, *cells_alone(results["ours"]))


def protocol_table(bench: Bench) -> None:
    """traiNNer-redux's protocol: one image of 480x640 pixels, x4, in bfloat16."""
    height, width = (16, 24) if bench.args.quick else (480, 640)
    halves = [mode for mode in bench.modes if MODES[mode] == Mode("bf16")]
    mode = halves[0] if halves else bench.modes[0]
    columns = ("parameters", "frames/s", "GB", "traiNNer: frames/s", "GB")
    bench.report.head(f"x4, {width}x{height} input, {mode}", *columns)
    for name, published in PUBLISHED.items():
        cfg = load_config([*absolute(published.arguments), "--scale=4"])
        if is_slow(bench, cfg) and not bench.args.quick:
            bench.report.row(name, "", "only with --full")
            continue
        if bench.args.quick:
            cfg = toy(cfg)
        release()
        net = build_ours(bench, cfg).eval()
        image = torch.rand(1, cfg.in_chans, height, width, device=bench.device)
        run = Run(partial(infer, net, image, bench.device, mode), mode)
        result = race(bench, {"ours": run})["ours"]
        cells = ["out of memory", ""]
        if not result.out_of_memory:
            used = result.allocated if bench.device == "cuda" else result.extra
            cells = [f"{1 / median(result.seconds):.3g}", gigabytes(used)]
        parameters = sum(p.numel() for p in net.parameters())
        theirs = (f"{published.frames_per_s:.2f}", f"{published.gigabytes:.2f}")
        bench.report.row(name, f"{parameters:,}", *cells, *theirs)
    bench.report.text(
        "traiNNer-redux's figures are of an RTX 4090 (docs/source/benchmarks.md, commit 193c50c), "
        "not measured here; its networks are swinir_m and swinir_s. GB: that tensors take, with "
        "weights on CUDA."
    )


def end_to_end_table(bench: Bench) -> None:
    """train.py itself, on packed generated images, with the recipe's workers."""
    columns = ("workers", "img/s", "ms", "waiting for data, ms", "GB allocated")
    bench.report.head("train.py, with loading", *columns)
    for name, cfg in bench.recipes.items():
        release()
        title = f"{name}, batch {cfg.batch_size}"
        workers = str(min(cfg.num_workers, os.cpu_count() or 1))
        events, error = run_trainer(bench, name, cfg)
        if error:
            bench.report.row(title, workers, error)
            continue
        seconds = mean(event["time"] for event in events)
        waiting = mean(event["data_time"] for event in events)
        memory = max(event["max_mem_gb"] or 0 for event in events)
        bench.report.row(
            title,
            workers,
            f"{cfg.batch_size / seconds:,.3g}",
            milliseconds(seconds),
            milliseconds(waiting),
            f"{memory:.3g}" if memory else "",
        )
    bench.report.text("Without the first interval of the log, which compiles and starts workers.")


def loading_table(bench: Bench) -> None:
    bench.report.head("Loading, 2 workers", "pairs per second")
    for name, cfg in bench.recipes.items():
        rate = measure_loading(bench, cfg, workers=2)
        bench.report.row(f"{name}, batch {cfg.batch_size}", f"{rate:,.0f}")


def sizes_table(bench: Bench) -> None:
    """Time and memory against patch, batch and image size, of our network alone."""
    quick = bench.args.quick
    columns = ("mode", "ms", "us per LQ pixel", "compilation, s", "GB besides weights")
    bench.report.head("Size", *columns)
    for (name, cfg), mode in product(bench.recipes.items(), bench.modes):
        w = cfg.window_size
        sides = (2 * w, 3 * w) if quick else (4 * w, 8 * w, 12 * w, 16 * w)
        shapes = [(cfg.batch_size, side) for side in sides]
        shapes += [(batch, 8 * w) for batch in ((1,) if quick else (1, 2, 4, 8))]
        for batch, side in shapes:
            changed = replace(cfg, gt_size=side * cfg.scale)
            result = measure_training(bench, changed, mode, batch)
            title = f"{name}, training step, batch {batch}, {side}x{side}"
            bench.report.row(title, mode, *size_cells(result, batch * side**2))
        if MODES[mode].compiled:
            continue  # inference isn't compiled
        sides = [32] if quick else [64, 128, 256, 512]
        if bench.args.full:
            sides.append(1024)
        for side in sides:
            result = measure_inference(bench, cfg, mode, side, in_tiles=True)["ours"]
            bench.report.row(f"{name}, restore, {side}x{side}", mode, *size_cells(result, side**2))


def size_cells(result: "Result", pixels: int) -> list[str]:
    if result.out_of_memory:
        return ["out of memory"]
    seconds = median(result.seconds)
    each = milliseconds(seconds / pixels * 1e3)  # a thousandth of milliseconds: microseconds
    return [milliseconds(seconds), each, compilation(result), gigabytes(result.extra)]


def workers_table(bench: Bench) -> None:
    bench.report.head("Loading, pairs per second", *(f"{n} workers" for n in WORKERS))
    for name, cfg in bench.recipes.items():
        rates = [measure_loading(bench, cfg, workers) for workers in WORKERS]
        bench.report.row(f"{name}, batch {cfg.batch_size}", *(f"{rate:,.0f}" for rate in rates))


def basicsr_table(bench: Bench) -> None:
    """tests/bench_data.py beside BasicSR's loader."""
    command = [sys.executable, str(ROOT / "tests/bench_data.py")]
    command += ["--basicsr", str(bench.args.basicsr)]
    if bench.args.quick:
        command.append("--seconds=0.1")
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    bench.report.line(done.stdout.rstrip())


TABLES = {
    "training": training_table,
    "peer": peer_table,
    "attention": attention_table,
    "inference": inference_table,
    "protocol": protocol_table,
    "end_to_end": end_to_end_table,
    "loading": loading_table,
    "sizes": sizes_table,
    "workers": workers_table,
}
MEMORY_NOTE = {
    "cuda": "GB: the peak that tensors take, and that PyTorch's allocator reserves, weights and "
    "optimizer included.",
    "cpu": "GB: the peak of a step, besides weights and optimizer.",
    "mps": "GB: not measured on MPS.",
}


# What is timed


def build_ours(bench: Bench, cfg: Config) -> nn.Module:
    torch.manual_seed(0)
    net = build_network(cfg)
    if not cfg.upsampler:
        # Training starts with zeros here, behind which all networks would seem equal.
        nn.init.trunc_normal_(net.conv_last.weight, std=0.02)
    return net.to(bench.device, memory_format=torch.channels_last)  # as train.py does


def build_both(bench: Bench, cfg: Config) -> tuple[nn.Module, nn.Module]:
    """Ours and the authors', with the same weights. Their outputs are compared on the CPU."""
    ours = build_ours(bench, cfg)
    arguments = {
        name: value
        for name, value in ours.arguments.items()
        if name not in ("init_std", "attention")
    }
    theirs = bench.peer(**arguments)
    theirs.load_state_dict(ours.state_dict())
    size = cfg.gt_size // cfg.scale
    image = torch.rand(1, cfg.in_chans, size, size)
    with torch.no_grad():
        outputs = [net.cpu().eval()(image) for net in (ours, theirs)]
    assert torch.allclose(*outputs, atol=1e-3), "the networks differ"
    return ours.to(bench.device), theirs.to(bench.device)


def random_batch(bench: Bench, cfg: Config, batch: int) -> tuple[Tensor, Tensor]:
    """(lq, gt)"""
    small = cfg.gt_size // cfg.scale
    lq = torch.rand(batch, cfg.in_chans, small, small, device=bench.device)
    gt = torch.rand(batch, cfg.in_chans, cfg.gt_size, cfg.gt_size, device=bench.device)
    return lq, gt


def training_step(
    net: nn.Module, cfg: Config, mode: str, lq: Tensor, gt: Tensor
) -> Callable[[], None]:
    """train.py's step and average on one batch."""
    precision, compiled = MODES[mode]
    average = build_average(net.train())
    criterion = build_loss(cfg, lq.device)
    adam = OPTIMIZERS["adam"](net, cfg)
    scaler = torch.amp.GradScaler(lq.device.type, enabled=False)
    if compiled:
        # Layer by layer, as in train.py: of the authors' network, too.
        compile_layers(net, replace(cfg, compile="on"), lq.device)

    def step() -> None:
        train_step(cfg, precision, net, criterion, adam, scaler, [[lq, gt]])
        update_average(average, net, 10**6, cfg.ema_decay)

    return step


def infer(f: Callable[[Tensor], Tensor], image: Tensor, device: str, mode: str) -> None:
    with torch.no_grad(), autocast(torch.device(device), MODES[mode].precision):
        f(image)


def measure_training(bench: Bench, cfg: Config, mode: str, batch: int) -> "Result":
    release()
    net = build_ours(bench, cfg)
    step = training_step(net, cfg, mode, *random_batch(bench, cfg, batch))
    return race(bench, {"ours": Run(step, mode)})["ours"]


def measure_inference(
    bench: Bench, cfg: Config, mode: str, side: int, in_tiles: bool
) -> dict[str, "Result"]:
    """One square image. in_tiles: by `restore`, which takes tiles if memory demands it. The
    authors' network always takes the whole."""
    release()
    if bench.peer:
        ours, theirs = build_both(bench, cfg)
        nets = {"ours": ours, "SwinIR": theirs}
    else:
        nets = {"ours": build_ours(bench, cfg)}
    image = torch.rand(1, cfg.in_chans, side, side, device=bench.device)
    runs = {}
    for name, net in nets.items():
        f = net.eval()
        if name == "ours" and in_tiles:
            f = partial(restore, f)
        runs[name] = Run(partial(infer, f, image, bench.device, mode), mode)
    return race(bench, runs)


def is_slow(bench: Bench, cfg: Config) -> bool:
    """SwinIR-M takes minutes for a large image on a CPU."""
    return bench.device == "cpu" and cfg.embed_dim == 180 and not bench.args.full


def run_trainer(bench: Bench, name: str, cfg: Config) -> tuple[list[dict[str, Any]], str]:
    """Trains in a process and a folder of its own. Returns (training events of the log without
    the first, ""), or ([], what went wrong)."""
    interval = 50 if bench.device == "cuda" else 3
    if bench.args.quick:
        interval = 1
    images = make_images(bench, cfg.scale) / "gt.npy"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "train.py"), *bench.arguments[name]]
        command += [f"--device={bench.device}", f"--batch_size={cfg.batch_size}", "--name=bench"]
        command += [f"--dataroot_gt={images}", "--val_freq=0", "--save_checkpoint_freq=1000000"]
        command += [f"--print_freq={interval}", f"--total_iters={3 * interval}"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            return [], f"failed: {last[:200]}"
        text = Path(folder, "experiments/bench/log.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    return [event for event in events if event["event"] == "train"][1:], ""


def make_images(bench: Bench, scale: int) -> Path:
    """A folder with packed images of 480x480 pixels, gt.npy, and their small partners, lq.npy."""
    folder = bench.folder / f"x{scale}"
    side, count = (96, 2) if bench.args.quick else (480, 24)
    if not folder.exists():
        with redirect_stdout(sys.stderr):
            bench_data.make_images(folder, (side, side), count, scale)
    return folder


def measure_loading(bench: Bench, cfg: Config, workers: int) -> float:
    """Pairs per second from packed images. For super-resolution, LQ is read, else it is made."""
    images = make_images(bench, cfg.scale)
    roots = {"dataroot_gt": images / "gt.npy", "dataroot_lq": None}
    if cfg.scale > 1:
        roots["dataroot_lq"] = images / "lq.npy"
    dataset = PairedImageDataset(**dataset_options(cfg) | roots)
    numbers = sample_batches(lambda it: (cfg.batch_size, cfg.gt_size))
    loader = train_loader(dataset, numbers, workers, pin=bench.device == "cuda")
    enough = 0.1 if bench.args.quick else 4  # seconds
    device = find_device(Config(device=bench.device))  # with its index
    with Prefetcher(loader, device) as batches:
        for _ in range(8):  # those that workers load while they start
            next(batches)
        pairs = 0
        spent = 0.0
        start = time.perf_counter()
        while spent < enough:
            pairs += len(next(batches)[0])
            spent = time.perf_counter() - start
    return pairs / spent


# How it is timed


class Run(NamedTuple):
    call: Callable[[], None]
    mode: str


@dataclass
class Result:
    seconds: list[float] = field(default_factory=list)  # per call, one value for each round
    out_of_memory: bool = False
    first: float = 0.0  # seconds of the first call
    second: float = 0.0  # of the second
    compiled: str | None = None  # how well; None where nothing was to be compiled
    extra: float = 0.0  # bytes: the peak of a call, besides what was there before
    allocated: float = 0.0  # bytes: the peak of all tensors (CUDA)
    reserved: float = 0.0  # bytes: the peak of PyTorch's allocator (CUDA)
    calls: int = 1  # in a round


def race(bench: Bench, runs: dict[str, Run]) -> dict[str, Result]:
    """Times all runs. In each round they take turns, so that what else the machine does meets all
    alike."""
    results = {name: first_calls(bench, run) for name, run in runs.items()}
    fit = [name for name in runs if not results[name].out_of_memory]
    rounds = bench.args.repeats
    if sum(results[name].second for name in fit) > 20:
        rounds = min(rounds, 3)
    for _ in range(rounds):
        for name in fit:
            use_mode(bench.device, runs[name].mode)
            seconds = timed(runs[name].call, bench.device, results[name].calls)
            results[name].seconds.append(seconds)
    return results


def first_calls(bench: Bench, run: Run) -> Result:
    """The first call, which compiles and chooses algorithms, and a second one for the memory."""
    result = Result()
    use_mode(bench.device, run.mode)
    counters.clear()
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        result.first = timed(run.call, bench.device)
        result.second = measure_memory(run.call, bench.device, result)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        result.out_of_memory = True
        return result
    if MODES[run.mode].compiled:
        result.compiled = describe_compilation()
    if not bench.args.quick:
        result.calls = max(1, min(100, round(0.2 / result.second)))
    return result


def use_mode(device: str, mode: str) -> None:
    """train.py's settings of TF32, of cuDNN, and of the memory that a CPU keeps."""
    set_up_hardware(Config(device=device, amp=MODES[mode].precision))


def timed(call: Callable[[], Any], device: str, calls: int = 1) -> float:
    """Seconds per call."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - start) / calls


def measure_memory(call: Callable[[], Any], device: str, result: Result) -> float:
    """Enters the peaks of a call into `result`. Returns its seconds."""
    if device == "cuda":
        result.reserved = torch.cuda.max_memory_reserved()  # of the first call, too
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = timed(call, device)
        result.allocated = torch.cuda.max_memory_allocated()
        result.extra = result.allocated - before
        result.reserved = max(result.reserved, torch.cuda.max_memory_reserved())
        return seconds
    if device != "cpu":
        result.extra = float("nan")
        return timed(call, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        seconds = timed(call, device)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    held = 0
    for event in events:
        held += event.nbytes()  # negative where memory is freed
        result.extra = max(result.extra, held)
    return seconds


def describe_compilation() -> str:
    """By the counters of Dynamo: "" if all went well, or what did not."""
    frames = counters["frames"]
    breaks = sum(counters["graph_break"].values())
    remarks = []
    if counters["stats"]["unique_graphs"] == 0:
        remarks.append("NOT COMPILED")
    elif frames["total"] > frames["ok"]:
        remarks.append(f"{frames['total'] - frames['ok']} of {frames['total']} frames EAGER")
    if breaks:
        remarks.append(f"{breaks} graph breaks")
    if counters["inductor"]["fxgraph_cache_hit"] and not counters["inductor"]["fxgraph_cache_miss"]:
        remarks.append("cached")
    return ", ".join(remarks)


def release() -> None:
    """Gives back the memory and the compiled code of the row before. Otherwise, the recompilation
    limit would leave the ninth shape eager."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # set_up_hardware() keeps what is freed


def count_flop(cfg: Config) -> int:
    """FLOP of forward and backward of one sample, from the shapes alone."""
    net = build_network(cfg).to("meta")
    size = cfg.gt_size // cfg.scale
    image = torch.empty(1, cfg.in_chans, size, size, device="meta")
    with FlopCounterMode(display=False) as counter:
        net(image).sum().backward()
    return counter.get_total_flops()


def matrix_flops(bench: Bench, precision: str) -> float:
    """FLOP/s of the fastest of some matrix products."""
    sides = (512, 1024, 2048) if bench.device == "cpu" else (4096, 8192)
    if bench.args.quick:
        sides = (256,)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    set_up_hardware(Config(device=bench.device, amp=precision))
    best = 0.0
    for side in sides:
        a = torch.rand(side, side, device=bench.device).to(dtype)
        products = [lambda a=a: a @ a]
        if bench.device == "cpu":  # oneDNN's 1x1 convolution may be faster than MKL
            image = a[None, None].permute(0, 3, 1, 2)
            kernel = a[..., None, None]
            products.append(partial(nn.functional.conv2d, image, kernel))
        for multiply in products:
            seconds = min(timed(multiply, bench.device) for _ in range(20))
            best = max(best, 2 * side**3 / seconds)
    return best


def copied_bytes(bench: Bench) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    count = 2**26 if bench.device == "cpu" else 2**28
    if bench.args.quick:
        count = 2**20
    source = torch.rand(count, device=bench.device)
    target = torch.empty_like(source)
    seconds = min(timed(lambda: target.copy_(source), bench.device) for _ in range(20))
    return 2 * source.nbytes / seconds


# The report


class Report:
    """Markdown, on stdout and in a file, as it is made."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path:
            path.write_text("", encoding="utf-8")

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    def text(self, text: str) -> None:
        self.line()
        self.line(text)

    def head(self, *cells: str) -> None:
        self.line()
        self.row(*cells)
        self.row("---", *["---:"] * (len(cells) - 1))

    def row(self, *cells: str) -> None:
        self.line(f"| {' | '.join(cells)} |")


def milliseconds(seconds: float) -> str:
    if seconds >= 0.1:
        return f"{seconds * 1e3:,.0f}"
    return f"{seconds * 1e3:.3g}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g}"


def memory_columns(bench: Bench) -> tuple[str, ...]:
    if bench.device == "cuda":
        return ("GB allocated", "GB reserved")
    return ("GB besides weights",)


def memory_cells(bench: Bench, result: Result) -> list[str]:
    if bench.device == "cuda":
        return [gigabytes(result.allocated), gigabytes(result.reserved)]
    return [gigabytes(result.extra)]


def compilation(result: Result) -> str:
    """Its seconds, and a remark; empty if nothing was to be compiled."""
    if result.out_of_memory or result.compiled is None:
        return ""
    text = f"{max(result.first - median(result.seconds), 0):.1f}"
    if result.compiled:
        text += f" ({result.compiled})"
    return text


def ratio(first: Result, second: Result) -> str:
    """Time of the second by that of the first: the median over the rounds, and the range."""
    if first.out_of_memory or second.out_of_memory:
        return ""
    ratios = [b / a for a, b in zip(first.seconds, second.seconds, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def cells_alone(result: Result) -> list[str]:
    if result.out_of_memory:
        return ["out of memory"]
    return [milliseconds(median(result.seconds)), gigabytes(result.extra)]


def comparison(ours: Result, theirs: Result) -> list[str]:
    """Milliseconds of both, their ratio, memory of both."""
    times = []
    for result in (ours, theirs):
        if result.out_of_memory:
            times.append("out of memory")
        else:
            times.append(milliseconds(median(result.seconds)))
    return [*times, ratio(ours, theirs), f"{gigabytes(ours.extra)} / {gigabytes(theirs.extra)}"]


def describe_machine(bench: Bench) -> None:
    """The command, hardware and versions, and what the hardware reaches."""
    report = bench.report
    report.line(f"`python {' '.join(sys.argv)}`")
    report.text(f"- {time.strftime('%Y-%m-%d %H:%M')}, commit {git_commit()}")
    if bench.device == "cuda":
        report.line(f"- GPU: {torch.cuda.get_device_name()}, driver {driver_version()}")
    threads = torch.get_num_threads()
    report.line(f"- CPU: {cpu_name()}, {os.cpu_count()} cores, {threads} threads used")
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if torch.version.cuda:
        versions += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    report.line(f"- {versions}")
    speeds = []
    for precision in dict.fromkeys(MODES[mode].precision for mode in bench.modes):
        bench.peaks[precision] = matrix_flops(bench, precision)
        name = "float32" if precision == "none" else precision
        speeds.append(f"{name} matrix product {bench.peaks[precision] / 1e12:.3g} TFLOP/s")
    speeds.append(f"copy {copied_bytes(bench) / 1e9:.3g} GB/s")
    report.line(f"- {', '.join(speeds)}")
    repeats = bench.args.repeats
    report.line(f"- medians of {repeats} rounds, of at most 3 where a round takes over 20 s")


def cpu_name() -> str:
    """Family and model, by which AMD's generations are known, are in Linux' /proc/cpuinfo only."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    values = {}
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    name = values.get("model name", platform.machine())
    if "cpu family" in values:
        name += f" (family {values['cpu family']}, model {values['model']})"
    return name


def git_commit() -> str:
    return output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*")


def driver_version() -> str:
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def output_of(*command: str) -> str:
    """The first line that the command prints, or "unknown"."""
    if shutil.which(command[0]) is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout.strip() or "unknown").splitlines()[0]


# The authors' network


class DropPath(nn.Module):
    """timm's, which the authors use for rates above 0."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.keep = 1 - rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty(len(x), 1, 1).bernoulli_(self.keep)
        return x * kept.div_(self.keep)


def import_peer(path: Path) -> type[nn.Module]:
    """The authors' class. What it takes from timm is replaced where timm isn't installed."""
    try:
        import timm.models.layers  # noqa: F401
    except ImportError:
        for name in ("timm", "timm.models", "timm.models.layers"):
            sys.modules[name] = types.ModuleType(name)
        layers = sys.modules["timm.models.layers"]
        layers.DropPath = DropPath
        layers.to_2tuple = lambda n: (n, n)
        layers.trunc_normal_ = nn.init.trunc_normal_
    sys.path.insert(0, str(path.resolve()))
    from models.network_swinir import SwinIR

    return SwinIR


# Command line


def absolute(arguments: list[str]) -> list[str]:
    """train.py's options with the paths of config files from the root on."""
    return [str(ROOT / a) if a.startswith("configs/") else a for a in arguments]


def toy(cfg: Config) -> Config:
    return replace(
        cfg, embed_dim=12, depths=(2,), num_heads=(2,), gt_size=2 * cfg.window_size * cfg.scale
    )


def toy_options(cfg: Config) -> list[str]:
    return ["--embed_dim=12", "--depths=2", "--num_heads=2", f"--gt_size={toy(cfg).gt_size}"]


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_modes(device: str) -> list[str]:
    """All on CUDA, the compiled one if it can be. On a CPU, compiling takes long."""
    if device == "cuda":
        modes = list(MODES)
        if why_not_compiled(torch.device(device, 0)):
            modes.remove("compiled")
        return modes
    if set_up_hardware(Config(device=device)).precision == "bf16":
        return ["float32", "bf16"]
    return ["float32"]


def parse_arguments() -> argparse.Namespace:
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("--report", type=Path, metavar="FILE", help="write all tables there, too")
    cli.add_argument("--tables", nargs="+", choices=TABLES, help="default: all but the last two")
    cli.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    cli.add_argument("--modes", nargs="+", choices=MODES, help="default: what train.py can use")
    cli.add_argument(
        "--batches", nargs="+", type=int, help="default: the recipe's; on CUDA 1, 8 and 32, too"
    )
    routes = list(model.ATTENTION)
    cli.add_argument("--attention", nargs="+", choices=routes, default=routes)
    cli.add_argument("--repeats", type=int, default=5, help="rounds, in which all take turns")
    cli.add_argument("--device", choices=("cuda", "mps", "cpu"), default=default_device())
    cli.add_argument("--peer", type=Path, help="a clone of JingyunLiang/SwinIR")
    cli.add_argument("--basicsr", type=Path, help="a clone of BasicSR, for tests/bench_data.py")
    cli.add_argument("--full", action="store_true", help="large images through SwinIR-M on a CPU")
    cli.add_argument(
        "--sizes", action="store_true", help="instead: time and memory against size, of ours alone"
    )
    cli.add_argument("--quick", action="store_true", help="toy networks, one round: does it run?")
    args = cli.parse_args()
    if args.sizes:
        args.peer = None
        args.tables = ["sizes", "workers"]
    if not args.tables:
        args.tables = [name for name in TABLES if name not in ("sizes", "workers")]
    if not args.peer and "peer" in args.tables:
        args.tables.remove("peer")
    if args.quick:
        args.repeats = 1
    return args


def main() -> None:
    args = parse_arguments()
    if args.basicsr:
        import lmdb  # noqa: F401  what would be missed only at the end
    with tempfile.TemporaryDirectory() as folder:
        make_tables(args, Path(folder))


def make_tables(args: argparse.Namespace, folder: Path) -> None:
    arguments = {}
    recipes = {}
    for name in args.recipes:
        arguments[name] = absolute(RECIPES[name])
        if args.quick:
            arguments[name] += toy_options(load_config(arguments[name]))
        recipes[name] = load_config(arguments[name])
        if args.device == "cpu" or args.quick:
            recipes[name].batch_size = CPU_BATCH[name]
    bench = Bench(
        args=args,
        report=Report(args.report),
        recipes=recipes,
        arguments=arguments,
        modes=args.modes or default_modes(args.device),
        peer=import_peer(args.peer) if args.peer else None,
        folder=folder,
    )
    describe_machine(bench)
    for name in args.tables:
        TABLES[name](bench)
    if args.basicsr:
        basicsr_table(bench)


if __name__ == "__main__":
    main()
