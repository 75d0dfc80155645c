"""The first minutes on a GPU: what works, how fast it is, and what to look at, in one report.

    python tests/first_minutes.py report.md                # about 12 minutes at most
    python tests/first_minutes.py report.md --minutes 30   # all time limits are 2.5 times as long
    python tests/first_minutes.py report.md --quick        # tiny sizes, on a CPU, too

Each step is a process with a time limit of its own. If one fails or takes too long, the report says
so, and the next one starts. Runs of train.py go to a temporary folder.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import bench_data  # it adds the repository to sys.path, so it comes first
import torch

import train

ROOT = bench_data.ROOT
TRAIN = str(ROOT / "train.py")
DENOISE = [str(ROOT / "configs/denoise.py"), "--dataroot_gt=gt.npy", "--val_freq=0"]
DENOISE += ["--save_checkpoint_freq=1000000"]
TOY = ["--embed_dim=12", "--depths=2", "--num_heads=2", "--gt_size=16", "--num_workers=0"]
SPEEDRUN = ROOT / "configs/speedrun.py"
ONE_IMAGE = "One image a step, compiled: does the GPU wait for the CPU?"
LINES = 60  # of the output of a step, from its end


class Sizes(NamedTuple):
    side: int  # of the training images, in pixels
    training: list[str]  # options of train.py
    bench: list[str]  # options of bench.py
    tests: list[str]  # names of files, and what pytest's -k selects from them


FULL = Sizes(
    480,
    ["--total_iters=60", "--print_freq=20"],
    ["--recipes", "denoise", "lightweight", "--batches", "8", "--repeats", "3"],
    ["model", "train", "data", "gpu or attention or compiled or precision or prefetcher"],
)
QUICK = Sizes(
    96,
    [*TOY, "--total_iters=6", "--print_freq=2", "--batch_size=2"],
    ["--recipes", "tiny", "--quick"],
    ["model", "drops_weights"],
)


class Step(NamedTuple):
    title: str
    minutes: float  # time limit
    command: list[str]
    needs: str = ""  # what is missing here: the step is skipped
    report: Path | None = None  # Markdown that the step writes; shown instead of its output


def list_steps(folder: Path, sizes: Sizes, scale: float) -> list[Step]:
    """scale: of all time limits, which are 12 minutes together if it is 1."""
    no_gpu = "" if torch.cuda.is_available() else "no GPU"
    no_speedrun = "" if SPEEDRUN.exists() else f"{SPEEDRUN} isn't there"
    *names, selected = sizes.tests
    files = [str(ROOT / f"tests/test_{name}.py") for name in names]
    pytest = [sys.executable, "-m", "pytest", "-rs", *files, "-k", selected]
    eager = [*DENOISE, *sizes.training, "--compile=off"]
    compiled = [*DENOISE, *sizes.training, "--compile=on"]
    modes = ["float32"] if no_gpu else ["bf16", "compiled"]
    bench = [sys.executable, str(ROOT / "tests/bench.py"), *sizes.bench, "--modes", *modes]
    tables = [folder / "bench.md", folder / "attention.md"]
    speed = [*bench, "--report", str(tables[0]), "--tables", "training", "inference", "protocol"]
    attention = [*bench, "--report", str(tables[1]), "--tables", "attention"]
    # After most of its time the speed run saves, and stops by itself.
    speedrun = [sys.executable, TRAIN, str(SPEEDRUN), f"--max_hours={0.8 * scale / 60:.4f}"]
    agreement = TOY if sizes is QUICK else []
    return [
        Step("Versions", 0.3, inside("versions")),
        Step("Training images", 0.4, inside("images", str(sizes.side))),
        Step("Outputs on the GPU and on the CPU", 0.5, inside("agreement", *agreement), no_gpu),
        Step("Training, eager", 1, inside("train", *eager)),
        Step("Training, compiled", 1.5, inside("train", *compiled), no_gpu),
        Step("Tests of what a GPU runs", 1.5, pytest),
        Step("Benchmark", 2, speed, report=tables[0]),
        Step("Routes of attention", 1.3, attention, report=tables[1]),
        Step(ONE_IMAGE, 1, inside("profile", *compiled, "--batch_size=1"), no_gpu),
        Step("Lines that wait for the GPU", 0.5, inside("waits", *eager), no_gpu),
        Step("A restart has the same losses", 1, inside("restart", *DENOISE, *TOY)),
        Step("Speed run", 1, speedrun, no_speedrun),
    ]


# What runs inside a process of its own, in the temporary folder


def inside(name: str, *options: str) -> list[str]:
    """The command that calls one of INSIDE."""
    return [sys.executable, str(ROOT / "tests/first_minutes.py"), "--inside", name, *options]


def print_versions(options: list[str]) -> None:
    print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, {os.cpu_count()} cores")
    if torch.cuda.is_available():
        print(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
        print(torch.cuda.get_device_properties(0))
        missing = train.why_not_compiled(torch.device("cuda", 0))
        print(f"torch.compile: {missing or 'nothing is missing'}")
    if shutil.which("nvidia-smi"):
        print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
    else:
        print("there is no nvidia-smi")


def make_images(options: list[str]) -> None:
    """gt.npy: a few square images for all runs, so that drawing them takes no time."""
    side = int(options[0])
    bench_data.make_images(Path(), (side, side), 12, scale=1)


def compare_outputs(options: list[str]) -> None:
    """Relative differences to float32 on the CPU, of the output and of a gradient."""
    config = str(ROOT / "configs/lightweight_sr.py")
    cfg = train.load_config([config, *options, "--compile=on"])
    image = torch.rand(2, 3, 64, 64)
    reference = output_and_gradient(cfg, image, "cpu", "none", compiled=False)
    for amp, compiled in (("none", False), ("tf32", False), ("bf16", False), ("bf16", True)):
        tensors = output_and_gradient(cfg, image, "cuda", amp, compiled)
        pairs = zip(tensors, reference, strict=True)
        output, gradient = [((a - b).norm() / b.norm()).item() for a, b in pairs]
        how = "compiled" if compiled else "eager"
        print(f"{amp}, {how}: output {output:.1e}, gradient {gradient:.1e}", flush=True)


def output_and_gradient(
    cfg: train.Config, image: torch.Tensor, device: str, amp: str, compiled: bool
) -> list[torch.Tensor]:
    hardware = train.set_up_hardware(train.Config(device=device, amp=amp))
    torch.manual_seed(0)
    network = train.build_network(cfg).to(hardware.device).eval()
    if compiled:
        train.compile_layers(network, cfg, hardware.device)
    with train.autocast(hardware.device, amp):
        output = network(image.to(hardware.device)).float()
    output.square().mean().backward()
    return [output.detach().cpu(), network.conv_first.weight.grad.cpu()]


def train_and_show(options: list[str]) -> None:
    """Trains, and shows the speed of each interval: the first compiles and starts workers."""
    code = train.main(train.load_config([*options, "--name=trained", "--resume=never"]))
    for event in training_events("trained"):
        memory = event["max_mem_gb"] or float("nan")
        text = f"{event['img_per_s']:.1f} img/s, {event['time'] * 1e3:.1f} ms a step, of them "
        text += f"{event['data_time'] * 1e3:.1f} waiting for data, {memory:.3g} GB at most"
        print(f"until iteration {event['iter']}: {text}")
    sys.exit(code)


def profile_steps(options: list[str]) -> None:
    """Kernels of five steps, and how long the GPU is busy with them."""

    def show(profiler: torch.profiler.profile) -> None:
        kernels = [e for e in profiler.events() if e.device_type.name == "CUDA"]
        if not kernels:
            print("no kernels were recorded")
            return
        begin = min(kernel.time_range.start for kernel in kernels)
        end = max(kernel.time_range.end for kernel in kernels)
        busy = sum(kernel.time_range.elapsed_us() for kernel in kernels) / (end - begin)
        print(f"{len(kernels) / 5:,.0f} kernels a step, of {(end - begin) / 5e3:.1f} ms")
        verdict = "the CPU limits the speed" if busy < 0.8 else "the GPU limits the speed"
        print(f"the GPU is busy for {busy:.0%} of the time: {verdict}")

    activities = [torch.profiler.ProfilerActivity.CUDA]
    when = torch.profiler.schedule(wait=2, warmup=1, active=5, skip_first=25, repeat=1)
    profiler = torch.profiler.profile(activities=activities, schedule=when, on_trace_ready=show)
    with profiler:
        before_each_step(profiler.step)
        train_and_show(options)


def before_each_step(call: Callable[[], None]) -> None:
    next_batch = train.Prefetcher.__next__

    def call_and_next(self: train.Prefetcher) -> list[torch.Tensor]:
        call()
        return next_batch(self)

    train.Prefetcher.__next__ = call_and_next


def count_waits(options: list[str]) -> None:
    """Expected between the first and the last iteration: only those that are logged."""
    torch.cuda.set_sync_debug_mode("warn")
    starts = []  # how many warnings there were before each iteration
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before_each_step(lambda: starts.append(len(caught)))
        code = train.main(train.load_config([*options, "--name=waits"]))
    for i in range(1, len(starts) - 1):
        lines = Counter()
        for warning in caught[starts[i] : starts[i + 1]]:
            if "synchronizing" in str(warning.message):
                lines[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
        if lines:
            counts = [f"{count} x {line}" for line, count in lines.items()]
            print(f"iteration {i + 1} waits: {', '.join(counts)}")
    print(f"iterations 2 to {len(starts) - 1} were watched")
    sys.exit(code)


def compare_restart(options: list[str]) -> None:
    """40 iterations in one go, and in two halves."""
    command = [sys.executable, TRAIN, *options, "--print_freq=10"]
    for name, total in (("straight", 40), ("halves", 20), ("halves", 40)):
        run = [*command, f"--name={name}", f"--total_iters={total}", "--milestones=1000"]
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
    losses = [[e["loss"] for e in training_events(name)] for name in ("straight", "halves")]
    print("in one go:", *losses[0])
    print("restarted:", *losses[1])
    if None in losses[0]:
        print("NOT FINITE")
    else:
        print("equal" if losses[0] == losses[1] else "DIFFERENT")


def training_events(name: str) -> list[dict]:
    text = Path("experiments", name, "log.jsonl").read_text(encoding="utf-8")
    events = [json.loads(line) for line in text.splitlines()]
    return [event for event in events if event["event"] == "train"]


INSIDE = {
    "versions": print_versions,
    "images": make_images,
    "agreement": compare_outputs,
    "train": train_and_show,
    "profile": profile_steps,
    "waits": count_waits,
    "restart": compare_restart,
}


# Steps, and the report


def run_step(step: Step, folder: Path, seconds: float) -> tuple[str, str]:
    """(how it ended, its output)."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            step.command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            end = f"exit code {code}"
        except subprocess.TimeoutExpired:
            end = f"stopped by the time limit of {seconds:.0f} s"
        finally:
            if process.poll() is None:  # at Ctrl-C, too
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
                process.wait()
        output.seek(0)
        text = output.read()
    return f"{end}, {time.perf_counter() - begin:.1f} s", text


def essential(text: str) -> str:
    """The last lines, without the states of progress bars."""
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    lines = [line for line in lines if line and "it/s]" not in line and "s/it]" not in line]
    return "\n".join(lines[-LINES:])


def write_section(path: Path, step: Step, end: str, text: str) -> None:
    shown = [f"## {step.title}", f"`{shlex.join(step.command)}`", end]
    if step.report and step.report.exists():
        shown.append(step.report.read_text(encoding="utf-8").rstrip())
    if text and not (step.report and end.startswith("exit code 0")):
        shown.append(f"```\n{essential(text)}\n```")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" + "\n\n".join(shown) + "\n")


def main() -> None:
    cli = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli.add_argument("report", type=Path, help="the Markdown file to write")
    cli.add_argument("--minutes", type=float, default=12, help="for all steps together, at most")
    cli.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    args = cli.parse_args()
    if not args.quick and not torch.cuda.is_available():
        cli.error("PyTorch finds no GPU: add --quick to see what the script does")

    report = args.report.absolute()
    report.write_text(f"# First minutes\n\n{time.strftime('%Y-%m-%d %H:%M')}\n", encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scale = args.minutes / 12
        for step in list_steps(folder, QUICK if args.quick else FULL, scale):
            if step.needs:
                end, text = f"skipped: {step.needs}", ""
            else:
                end, text = run_step(step, folder, 60 * step.minutes * scale)
            print(f"{step.title}: {end}", flush=True)
            write_section(report, step, end, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        INSIDE[sys.argv[2]](sys.argv[3:])
    else:
        main()
