"""What goes wrong while training: kills, signals, full disks, lost workers, losses that aren't finite."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import ENV, ROOT, SMALL, events, photos, train
from torch.utils._pytree import tree_flatten

from data import PairedImageDataset

resource = pytest.importorskip("resource")  # signals, limits and /proc are of Linux
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
FOLDER = Path("experiments/denoise_color25")
ENDLESS = ["--dataroot_gt=gt", "--total_iters=100000", "--save_checkpoint_freq=100000"]


@contextlib.contextmanager
def started(cwd, *options):
    """The command as a process that leads a group, and a function for what it has printed."""
    with open(cwd / "printed.txt", "wb") as out:
        command = [sys.executable, str(ROOT / "train.py"), *SMALL.split(), *options]
        process = subprocess.Popen(
            command, cwd=cwd, env=ENV, stdout=out, stderr=out, start_new_session=True
        )
    try:
        yield process, (cwd / "printed.txt").read_text
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def until(happened, what, seconds=120):
    deadline = time.time() + seconds
    while not happened():
        assert time.time() < deadline, what
        time.sleep(0.01)


def states(cwd):
    return sorted(int(path.stem) for path in (cwd / FOLDER).glob("training_states/*.state"))


def lines(cwd):
    log = cwd / FOLDER / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def content(cwd, file):
    flat, _ = tree_flatten(torch.load(cwd / FOLDER / file, weights_only=True))
    return [x.numpy().tobytes() if torch.is_tensor(x) else x for x in flat]


def test_killed_at_random_moments_it_continues_exactly(tmp_path):
    rng = np.random.default_rng(0)
    options = [
        "--dataroot_gt=gt",
        "--val_gt=gt",
        "--val_freq=5",
        "--drop_path_rate=0.3",
        "--num_workers=2",
    ]
    options += ["--total_iters=40", "--save_checkpoint_freq=3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for cwd in (whole, killed):
        photos(cwd / "gt")
    assert train(whole, *options)[0] == 0
    for k in range(2):
        with started(killed, *options) as (process, printed):
            words = "iter" if k else "network"  # once before the first step
            until(
                lambda p=printed, w=words: f"\n{w} " in p() or f"\n{w}:" in p(),
                "nothing is printed",
            )
            time.sleep(rng.uniform(0, 0.3))
            (os.kill if k else os.killpg)(process.pid, signal.SIGKILL)  # once without its workers
            assert process.wait() in (-9, 0)
            assert "in use" not in train(killed, *options, "--max_hours=0")[1]  # they hold no lock
    code, text = train(killed, *options)
    assert code == 0, text
    assert "damaged" not in text
    for file in ("models/net_g_40.pth", "models/net_g_best.pth", "training_states/40.state"):
        assert content(whole, file) == content(killed, file), file
    for keys, kind in ((("iter", "loss", "lr", "grad_norm"), "train"), (("iter", "psnr"), "val")):
        a, b = ([[e[key] for key in keys] for e in events(cwd, kind)] for cwd in (whole, killed))
        assert a == b


def test_a_new_checkpoint_is_kept_where_a_later_one_is_damaged(tmp_path):
    photos(tmp_path / "gt")
    options = ["--dataroot_gt=gt", "--keep_last=1"]
    assert train(tmp_path, *options)[0] == 0
    path = tmp_path / FOLDER / "training_states/6.state"
    path.write_bytes(path.read_bytes()[:-100])
    code, text = train(tmp_path, *options, "--total_iters=2")
    assert (code, text.count("6.state is damaged")) == (0, 1), text
    assert states(tmp_path) == [2, 6]


def test_a_full_disk_is_told_and_harms_no_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk: one stops the weights, one the log."""
    photos(tmp_path / "gt")
    assert train(tmp_path, "--dataroot_gt=gt", "--total_iters=2")[0] == 0
    command = [sys.executable, str(ROOT / "train.py"), *SMALL.split(), "--dataroot_gt=gt"]
    for limit, words in (
        (50_000, "net_g_4.pth can't be written"),
        (1_000, "config.json can't be written: [Errno 27]"),
    ):

        def full(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        done = subprocess.run(
            command, cwd=tmp_path, env=ENV, capture_output=True, text=True, preexec_fn=full
        )
        assert done.returncode == 1
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert states(tmp_path) == [2]
        assert not list((tmp_path / FOLDER).rglob("*.partial"))
    code, text = train(tmp_path, "--dataroot_gt=gt")
    assert (code, "continuing after iteration 2" in text, "damaged" in text) == (0, True, False)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_killed_worker_ends_the_run_with_a_sentence(tmp_path):
    photos(tmp_path / "gt")
    with started(tmp_path, *ENDLESS, "--num_workers=1", "--save_checkpoint_freq=1") as (
        process,
        printed,
    ):
        until(lambda: lines(tmp_path), "no step")
        worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
        os.kill(int(worker), signal.SIGKILL)
        assert process.wait(60) == 1
        assert "DataLoader worker" in printed()
        assert "Traceback" not in printed()


def test_signals_to_the_whole_group_leave_the_workers_to_the_trainer(tmp_path):
    """As torchrun, Slurm and timeout send them."""
    photos(tmp_path / "gt")
    with started(tmp_path, *ENDLESS, "--num_workers=1") as (process, printed):
        for saved in (1, 2):
            seen = lines(tmp_path)
            until(lambda seen=seen: lines(tmp_path) > seen + 1, "no step")
            os.killpg(process.pid, signal.SIGUSR1)
            until(lambda saved=saved: len(states(tmp_path)) == saved, "SIGUSR1 doesn't save")
        seen = lines(tmp_path)
        until(lambda: lines(tmp_path) > seen + 1, "it doesn't go on")
        for _ in range(2):
            os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143, printed()
        assert f"stopped after iteration {states(tmp_path)[-1]:,}, saved: " in printed()
    assert len(states(tmp_path)) == 3


SPOILED = """
import os, runpy, sys
import torch
sys.path.insert(0, {root!r})
import metrics

loss, seed, now = metrics.LOSSES["l1"], torch.manual_seed, [0]

def manual_seed(number):  # the trainer seeds each iteration
    now[0] = number // 4099
    return seed(number)

def spoiled(x, y):
    return loss(x, y) * (float("nan") if now[0] in (3, 4, 5) and os.environ["RANK"] == "1" else 1)

torch.manual_seed, metrics.LOSSES["l1"] = manual_seed, spoiled
sys.argv[0] = {root!r} + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path):
    photos(tmp_path / "gt")
    (tmp_path / "spoiled.py").write_text(SPOILED.format(root=str(ROOT)))
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "spoiled.py",
    ]
    command = [*start, *SMALL.split(), "--dataroot_gt=gt", "--save_checkpoint_freq=6"]
    done = subprocess.run(
        command, cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [e["skipped"] for e in events(tmp_path)] == [0, 2, 1]
    state = torch.load(tmp_path / FOLDER / "training_states/6.state", weights_only=True)
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {3}
    network = torch.load(tmp_path / FOLDER / "models/net_g_6.pth", weights_only=True)
    assert all(
        x.isfinite().all() for key in ("params", "params_ema") for x in network[key].values()
    )


@pytest.mark.parametrize(
    ("ranks", "options"), [(1, []), (1, ["--accumulate=2", "--num_workers=2"]), (2, [])]
)
def test_a_damaged_image_ends_the_run_after_what_came_before_is_saved(tmp_path, ranks, options):
    gt = photos(tmp_path / "gt", 8)
    options = ["--dataroot_gt=gt", *options]
    assert train(tmp_path, *options, "--name=straight", ranks=ranks)[0] == 0
    dataset = PairedImageDataset(gt, gt_size=16)
    dataset[0]  # draws the order of the first epoch
    image = gt / f"{dataset.order[7]}.png"  # the second iteration's last, drawn by the last rank
    good = image.read_bytes()
    image.write_bytes(good[:-300])
    for _ in range(2):  # a second try changes nothing
        begin = time.time()
        code, text = train(tmp_path, *options, ranks=ranks)
        assert time.time() - begin < 30 and "Alarm" not in text  # workers, left alone, would wait
        assert code == 1 and image.name in text and states(tmp_path) == [1], text
    image.write_bytes(good)
    code, text = train(tmp_path, *options, ranks=ranks)
    assert code == 0, text
    assert content(tmp_path, "models/net_g_6.pth") == content(
        tmp_path, "../straight/models/net_g_6.pth"
    )
