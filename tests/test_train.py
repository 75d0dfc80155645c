"""The trainer as users run it: options, resume, ranks, counts, errors."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train as trainer
from metrics import psnr
from model import load
from train import Config, load_config, lock_folder, lr_at

ROOT = Path(__file__).resolve().parents[1]
SMALL = "--gt_size=16 --batch_size=4 --embed_dim=12 --depths=2,2 --num_heads=2,2 --num_workers=0 --device=cpu"
SMALL += " --loss=l1 --lr=1e-3 --total_iters=6 --print_freq=2 --val_freq=0 --save_checkpoint_freq=2"
ENV = os.environ | {"OMP_NUM_THREADS": "1"}  # one core is plenty for networks of this size


def photos(folder, count=2, size=40, seed=0):
    """`count` smooth random images."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((size, size), Image.BICUBIC).save(folder / f"{i}.png")
    return folder


def train(cwd, *options, ranks=1, small=SMALL):
    """Runs the command in `cwd`. Returns (exit code, what it printed)."""
    if ranks == 1 and hasattr(os, "fork"):
        return forked(cwd, [*small.split(), *options])
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*start, str(ROOT / "train.py"), *small.split(), *options]
    done = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def forked(cwd, argv):
    """train.py's entry in a fork of this process: torch is imported already, which saves seconds."""
    with tempfile.TemporaryFile() as printed:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.chdir(cwd)
                for number in (1, 2):
                    os.dup2(printed.fileno(), number)
                sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
                sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
                code = trainer.run(argv)
            except SystemExit as stop:
                code = 1 if isinstance(stop.code, str) else stop.code or 0
                print(stop.code if code else "", file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        printed.seek(0)
        return os.waitstatus_to_exitcode(status), printed.read().decode()


def network(cwd, it, name="denoise_color25"):
    return torch.load(cwd / "experiments" / name / "models" / f"net_g_{it}.pth", weights_only=True)


def strict_json(line):
    """The object of a line. Python's parser would also take NaN and Infinity, which JSON lacks."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON: {line}")

    return json.loads(line, parse_constant=refuse)


def events(cwd, kind="train", name="denoise_color25"):
    lines = (cwd / "experiments" / name / "log.jsonl").read_text().splitlines()
    return [e for e in map(strict_json, lines) if e["event"] == kind]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One training of six iterations on two images, which several tests look at."""
    cwd = tmp_path_factory.mktemp("run")
    photos(cwd / "gt")
    code, text = train(
        cwd,
        "--dataroot_gt=gt",
        "--val_gt=gt",
        "--val_freq=3",
        "--save_img=True",
        "--drop_path_rate=0.3",
    )
    assert code == 0, text
    return cwd, text


# ---- options ----


@pytest.mark.parametrize(
    ("args", "name", "value"),
    [
        (["--lr=1"], "lr", 1.0),
        (["--lr=1e-4"], "lr", 1e-4),
        (["--grad_clip=None"], "grad_clip", None),
        (["--name=a=b"], "name", "a=b"),
        (["--name=123"], "name", "123"),
        (["--depths=2,2", "--num_heads=6,6"], "depths", (2, 2)),
        (["--use-rot=false"], "use_rot", False),
        (["--sigma=0,50"], "sigma", (0, 50)),
        (["--val_gt=a,b"], "val_gt", ("a", "b")),
        (["--milestones=5"], "milestones", (5,)),
    ],
)
def test_options_are_read_in_their_type(args, name, value):
    cfg = load_config(args)
    assert getattr(cfg, name) == value
    assert type(getattr(cfg, name)) is type(value)


@pytest.mark.parametrize(
    ("arg", "words"),
    [
        ("--batchsize=4", ["batchsize", "batch_size"]),
        ("--total_iter=4", ["total_iter", "total_iters"]),
        ("--num_worker_per_gpu=4", ["num_worker_per_gpu", "num_workers"]),
        ("--batch_size_per_gpu=4", ["batch_size_per_gpu", "batch_size"]),
        ("--manual_seed=4", ["manual_seed", "did you mean seed?"]),
        ("--val_GT=set", ["val_GT", "did you mean val_gt or"]),
        ("--dataroot=set", ["dataroot_gt", "dataroot_lq"]),
        ("--warmup_iter=4", ["warmup_iters"]),
        ("--lr=fast", ["error: --lr=fast: lr must be a number, not 'fast'"]),
        ("--lr", ["--lr=VALUE"]),
        ("--auto_resume", ["unknown option auto_resume"]),
        ("--batch_size=2.5", ["batch_size must be a whole number, not 2.5"]),
        ("--loss=l3", ["loss", "charbonnier", "l3"]),
        ("--depths=6,x", ["depths must be whole numbers as 10,40, not"]),
        (
            "--quality=10-40",
            ["quality must be a whole number or whole numbers as 10,40", "10-40", "--help"],
        ),
        ("configs/tiny.py --scale=0", ["scale=0 can't work: it must be at least 1"]),
        ("--scale=2", ["upsampler"]),
        ("--name=../up", ["name"]),
        ("--name=", ["name"]),
        ("--name=..", ["name"]),
        ("--gt_size=100", ["gt_size", "N x 8", "window_size"]),
        ("--degradation=bicubic", ["degradation", "scale > 1"]),
        ("--quality=200", ["quality", "at least 1, at most 100"]),
        ("--sigma=1,2,3 --total_iters=0", ["total_iters", "it must be at least 1"]),
        ("nowhere.py", ["nowhere.py"]),
        ("--datasets.val.dataroot_gt=set", ["did you mean val_gt?"]),
        ("--val_dataroot_lq=set", ["did you mean val_lq?"]),
        ("--datasets.train.dataroot_gt=set", ["did you mean dataroot_gt?"]),
        ("--val.metrics=psnr", ["did you mean measures?"]),
        ("--resume_state=100.state", ["delete its later training_states"]),
        ("--launcher=pytorch", ["torchrun"]),
        ("--total_iters 5", ["--total_iters=VALUE"]),
    ],
)
def test_a_wrong_option_is_named(arg, words):
    with pytest.raises(SystemExit) as stop:
        load_config(arg.split())
    assert all(word in str(stop.value) for word in words), stop.value


def test_a_config_file_is_checked_like_the_command_line(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "import math\n_half = 0.5\nlr = 1e-4\ngamma = _half\ndepths = [2] * 3\nnum_heads = 6, 6, 6\n"
    )
    cfg = load_config(["--lr=3e-4", str(path)])
    assert (cfg.lr, cfg.gamma, cfg.depths) == (3e-4, 0.5, (2, 2, 2))
    path.write_text("learning_rte = 1.0\n")
    with pytest.raises(SystemExit, match=r"c\.py: unknown option learning_rte"):
        load_config([str(path)])
    path.write_text("total_iters = 1e4\n")
    cfg = load_config([str(path), "--val_freq=1e3"])
    assert repr((cfg.total_iters, cfg.val_freq)) == "(10000, 1000)"
    path.write_text("batch_size = '64'\n")
    with pytest.raises(SystemExit, match=r"c\.py: batch_size must be a whole number, not '64'"):
        load_config([str(path)])


def test_a_config_file_may_let_options_follow_others(tmp_path):
    cfg = load_config([str(ROOT / "configs/lightweight_sr.py"), "--scale=4"])
    assert (cfg.name, cfg.gt_size, cfg.crop_border, cfg.lr) == ("lightweight_sr_x4", 256, 4, 2e-4)
    assert load_config([str(ROOT / "configs/lightweight_sr.py"), "--gt_size=96"]).gt_size == 96
    cfg = load_config([str(ROOT / "configs/tiny.py"), "--scale=4"])
    assert (cfg.name, cfg.gt_size, cfg.upsampler, cfg.degradation) == (
        "tiny_x4",
        160,
        "pixelshuffledirect",
        "bicubic",
    )
    assert (cfg.crop_border, cfg.test_y_channel) == (4, True)
    cfg = load_config([str(ROOT / "configs/jpeg.py"), "--quality=10", "--pretrain_network=f.pth"])
    assert (cfg.name, cfg.lr, cfg.milestones) == (
        "jpeg_10",
        1e-4,
        (400_000, 600_000, 700_000, 750_000),
    )
    path = tmp_path / "c.py"
    path.write_text("scale = lambda cfg: 2\nname = lambda cfg: f'{cfg.gt_size} {cfg.milestones}'\n")
    cfg = load_config(
        [str(ROOT / "configs/lightweight_sr.py"), str(path)]
    )  # rules that follow rules
    assert (cfg.name, cfg.scale, cfg.gt_size) == ("128 (250000, 400000, 450000, 475000)", 2, 128)
    path.write_text("lr = lambda cfg: 'fast'\n")
    with pytest.raises(SystemExit, match=r"lr must be a number, not 'fast'"):
        load_config([str(path)])


def test_help_lists_every_option():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(f"    {name}: " in done.stdout for name in vars(Config()))


def test_lr_is_the_formula():
    cfg = Config(lr=1e-3, warmup_iters=10, milestones=(40, 50), gamma=0.5, total_iters=60)
    assert lr_at(5, cfg) == pytest.approx(5e-4)
    assert [lr_at(it, cfg) for it in (10, 11, 40)] == [1e-3] * 3  # the warm-up reaches the base
    assert [lr_at(it, cfg) for it in (41, 50, 51, 60)] == [5e-4, 5e-4, 2.5e-4, 2.5e-4]
    assert lr_at(6, Config(lr=1e-3, warmup_iters=10, milestones=(5,))) == pytest.approx(6e-4)
    assert lr_at(10, Config(lr=1e-3, warmup_iters=10, milestones=(5,))) == pytest.approx(5e-4)
    cosine = Config(lr=1e-3, scheduler="cosine", warmup_iters=10, total_iters=110)
    assert lr_at(61, cosine) == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert 0 < lr_at(110, cosine) < 1e-6


# ---- a run ----


def test_a_run_writes_what_the_blueprint_says(run):
    cwd, _ = run
    folder = cwd / "experiments" / "denoise_color25"
    assert {p.name for p in folder.iterdir()} >= {
        "config.json",
        "log.txt",
        "log.jsonl",
        "models",
        "training_states",
    }
    assert {p.name for p in (folder / "models").iterdir()} == {
        "net_g_2.pth",
        "net_g_4.pth",
        "net_g_6.pth",
        "net_g_best.pth",
    }
    assert [e["iter"] for e in events(cwd)] == [2, 4, 6]
    train_keys = {"iter", "loss", "lr", "grad_norm", "time", "data_time", "img_per_s", "max_mem_gb"}
    assert all(train_keys <= e.keys() and e["loss"] > 0 for e in events(cwd))
    vals = events(cwd, "val")
    assert [e["iter"] for e in vals] == [3, 6]
    assert vals[1]["best_psnr"] == max(e["psnr"] for e in vals)
    assert 19 < vals[0]["input_psnr"] < 22  # sigma 25: 20.2 dB, a little more where pixels clip
    strip = Image.open(folder / "visualization" / "gt" / "0_6.png")
    assert strip.size == (3 * 160, 160)  # four times as large, so that the words fit


def test_validation_equals_the_metrics_of_the_saved_network(run):
    from metrics import psnr
    from model import load

    cwd, _ = run
    net, values = load(cwd / "experiments/denoise_color25/models/net_g_6.pth"), []
    for path in sorted((cwd / "gt").iterdir()):
        gt = np.asarray(Image.open(path))
        noise = np.random.RandomState(0).normal(0, 25 / 255, gt.shape)[
            ..., ::-1
        ]  # drawn in BGR order
        lq = torch.from_numpy((gt / 255 + noise).astype(np.float32)).permute(2, 0, 1)[None]
        with torch.no_grad():
            out = (net(lq)[0].clamp(0, 1) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        values.append(psnr(out, gt))
    assert events(cwd, "val")[-1]["psnr"] == pytest.approx(np.mean(values), abs=1e-3)


def test_stopped_and_continued_is_bit_identical(run, tmp_path):
    cwd, _ = run
    photos(tmp_path / "gt")
    options = ["--dataroot_gt=gt", "--val_gt=gt", "--val_freq=3", "--drop_path_rate=0.3"]
    for it in (1, 2, 3):  # stopped after one iteration, continued, stopped after the next...
        assert train(tmp_path, *options, "--max_hours=0")[0] == 0
        assert (tmp_path / f"experiments/denoise_color25/training_states/{it}.state").exists()
    code, text = train(tmp_path, *options)
    assert code == 0
    assert text.splitlines()[0].endswith("continuing after iteration 3")
    for file in ("models/net_g_6.pth", "training_states/6.state"):
        a, b = (
            torch.load(c / "experiments/denoise_color25" / file, weights_only=True)
            for c in (cwd, tmp_path)
        )
        flat = [
            torch.utils._pytree.tree_flatten({k: v for k, v in x.items() if k != "config"})[0]
            for x in (a, b)
        ]
        assert len(flat[0]) == len(flat[1])
        for x, y in zip(*flat, strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y
    assert [e["loss"] for e in events(cwd)] == [e["loss"] for e in events(tmp_path)]


def test_edited_options_are_told_and_impossible_ones_refused(run, tmp_path):
    photos(tmp_path / "gt")
    assert train(tmp_path, "--dataroot_gt=gt", "--total_iters=2")[0] == 0
    code, text = train(tmp_path, "--dataroot_gt=gt", "--total_iters=4", "--lr=5e-4")
    assert code == 0
    assert "lr: 0.001 -> 0.0005" in text
    assert events(tmp_path)[-1]["lr"] == 5e-4
    options = ["--total_iters=6", "--betas=0.5,0.6", "--weight_decay=0.1", "--amp=fp16", "--seed=0"]
    code, text = train(tmp_path, "--dataroot_gt=gt", *options)
    assert code == 0, text
    state = tmp_path / "experiments/denoise_color25/training_states/6.state"
    group = torch.load(state, weights_only=True)["optimizer"]["param_groups"][0]
    assert (group["betas"], group["weight_decay"]) == ((0.5, 0.6), 0.1)
    code, text = train(tmp_path, "--total_iters=8")
    assert code == 1 and "dataroot_gt: gt -> None can't change in a run that has started" in text
    for option in ("--sigma=15", "--pretrain_network=absent.pth"):
        code, text = train(tmp_path, "--dataroot_gt=gt", option)
        assert (code, f"{option[2:].split('=')[0]}: " in text, "can't change" in text) == (
            1,
            True,
            True,
        )
    code, text = train(tmp_path, "--dataroot_gt=gt", "--embed_dim=24")
    assert (code, "embed_dim: 12 -> 24 can't change" in text, "Traceback" in text) == (
        1,
        True,
        False,
    )
    code, text = train(tmp_path, "--dataroot_gt=gt", "--total_iters=6", "--lr=5e-4")
    assert (code, "nothing to do: 6 iterations are done, and total_iters=6" in text) == (0, True)
    code, text = train(tmp_path, "--dataroot_gt=gt", "--total_iters=2", "--resume=never")
    assert code == 0
    assert len(list((tmp_path / "experiments").iterdir())) == 2


def test_a_run_goes_on_from_its_folder_with_its_own_options(tmp_path):
    photos(tmp_path / "gt")
    assert train(tmp_path, "--dataroot_gt=gt", "--total_iters=2", "--name=mine")[0] == 0
    code, text = train(tmp_path, "experiments/mine", "--total_iters=4", small="")
    assert code == 0 and "options: total_iters: 2 -> 4" in text, text
    assert [e["iter"] for e in events(tmp_path, name="mine")] == [2, 4]
    code, text = train(tmp_path, "experiments/mine", small="")
    assert code == 0 and "nothing to do: 4 iterations are done" in text
    assert "use it:   python model.py experiments/mine YOUR_PHOTO.jpg" in text
    # What belongs to one start isn't taken over.
    path = tmp_path / "experiments/mine/config.json"
    options = json.loads(path.read_text())
    assert not {"resume", "max_hours", "eval_only"} & set(options)
    path.write_text(json.dumps(options | {"resume": "never", "max_hours": 0, "eval_only": True}))
    code, text = train(tmp_path, "experiments/mine", "--total_iters=6", small="")
    assert code == 0 and "continuing after iteration 4" in text and "finished" in text
    code, text = train(
        tmp_path, "experiments/mine/config.json", "--name=other", "--total_iters=2", small=""
    )
    assert code == 0 and "experiments/other: starting" in text
    assert network(tmp_path, 2, "other")["arguments"] == network(tmp_path, 6, "mine")["arguments"]

    (tmp_path / "experiments/mine").rename(tmp_path / "experiments/moved")
    code, text = train(tmp_path, "experiments/moved", small="")
    assert code == 1 and "experiments/moved is not experiments/mine" in text
    code, text = train(tmp_path, "gt", small="")
    assert code == 1 and "error: gt is no run's folder: it has no config.json" in text
    (tmp_path / "broken.json").write_text('{"lr": ')
    (tmp_path / "list.json").write_text("[1, 2]")
    for name, words in (("a.yml", "options are --key=value"), ("a.state", "name the run's folder")):
        (tmp_path / name).write_text("")
        code, text = train(tmp_path, name, small="")
        assert code == 1 and words in text
    for name in ("broken.json", "list.json"):
        code, text = train(tmp_path, name, small="")
        assert code == 1 and f"error: {name} is no config file" in text


def test_a_config_that_is_not_there_is_answered_with_near_ones(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match=r"error: .* did you mean configs/denoise.py"):
        load_config(["configs/denoize.py"])


def test_some_images_are_held_out_for_validation(tmp_path):
    """Without val_gt. Which ones follows from their names alone."""
    photos(tmp_path / "gt", count=12)
    options = ["--dataroot_gt=gt", "--val_freq=2", "--total_iters=2"]
    code, text = train(tmp_path, *options)
    assert code == 0, text
    names = re.search(r"data: 11 image\(s\); validation: 1 held out: (\S+)\n", text)[1]
    (val,) = events(tmp_path, "val")
    assert val["dataset"] == "held_out" and math.isfinite(val["psnr"])
    strip = f"visualization/held_out/{names.removesuffix('.png')}_2.png"
    assert f"look at:  experiments/denoise_color25/{strip}" in text
    assert (tmp_path / "experiments/denoise_color25" / strip).exists()
    for more in (["--val_gt=synthetic", "--name=a"], ["--val_freq=0", "--name=b"]):
        code, text = train(tmp_path, *options, *more)
        assert code == 0 and "data: 12 image(s); validation: " in text
    code, text = train(tmp_path, *options, "--eval_only=True")
    assert code == 0 and f"1 held out: {names}" in text and "options:" not in text
    # Of pairs, too; of less than four, none
    code, text = train(tmp_path, *options, "--dataroot_lq=gt", "--name=pairs")
    assert code == 0 and f"data: 11 pair(s); validation: 1 held out: {names}\n" in text
    assert events(tmp_path, "val", "pairs")[-1]["protocol"] == "RGB, border 0, pairs"
    photos(tmp_path / "few", count=3)
    code, text = train(
        tmp_path, "--dataroot_gt=few", "--dataroot_lq=few", "--name=few", "--total_iters=1"
    )
    assert code == 0 and "data: 3 pair(s); validation: none" in text


def test_a_damaged_image_is_left_out_of_those_held_out(tmp_path):
    photos(tmp_path / "gt", count=120)
    code, text = train(tmp_path, "--dataroot_gt=gt", "--total_iters=1", "--val_freq=1")
    name = re.search(r"validation: 8 held out: (\S+),", text)[1]
    path = tmp_path / "gt" / name
    path.write_bytes(path.read_bytes()[:-200])
    options = ["--dataroot_gt=gt", "--total_iters=1", "--val_freq=1", "--name=damaged"]
    code, text = train(tmp_path, *options)
    assert code == 0 and "validation: 7 held out" in text
    assert f"left out of validation: gt/{name}" in text


def test_if_all_that_is_held_out_is_damaged_nothing_starts(tmp_path):
    photos(tmp_path / "gt", count=6)
    code, text = train(tmp_path, "--dataroot_gt=gt", "--total_iters=1", "--val_freq=1")
    name = re.search(r"validation: 1 held out: (\S+)\n", text)[1]
    path = tmp_path / "gt" / name
    path.write_bytes(path.read_bytes()[:-200])
    code, text = train(tmp_path, "--dataroot_gt=gt", "--val_freq=1", "--name=damaged")
    assert code == 1 and f"gt/{name}" in text and "or give --val_gt" in text


def test_a_refused_start_leaves_everything_as_it_was(run, tmp_path):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)

    def content():
        return {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}

    before = content()
    for options, words in (
        (["--resume=never", "--pretrain_network=missing.pth"], "missing.pth"),
        (["--name=other", "--pretrain_network=missing.pth"], "missing.pth"),
        (["--name=other", "--accumulate=3"], "batch_size=4 is no multiple"),
        (["--name=other", "--eval_only=True"], "--pretrain_network"),
        (
            ["--dataroot_gt=gt", "--sigma=50"],
            "can't change in a run that has started: give the old value",
        ),
    ):
        code, text = train(tmp_path, *options)
        assert code == 1 and words in text and "Traceback" not in text, text
        assert content() == before, options


def test_pretrained_weights_are_not_forgotten_on_resume(run):
    """The recipes of configs/ depend on them: without, a restart would go on with another learning rate."""
    weights = "--pretrain_network=experiments/denoise_color25/models/net_g_6.pth"
    options = "--dataroot_gt=gt", "--drop_path_rate=0.3", "--name=fine", "--total_iters=2"
    code, text = train(run[0], *options, weights)
    assert code == 0 and "tensors taken" in text, text
    code, text = train(run[0], *options)
    assert code == 1 and "pretrain_network: experiments" in text and "can't change" in text, text


def test_another_protocol_has_its_own_best(tmp_path):
    photos(tmp_path / "gt")
    options = "--dataroot_gt=gt", "--val_gt=gt", "--val_freq=2", f"--seed={10**15}"
    assert train(tmp_path, *options, "--total_iters=2")[0] == 0
    for it, border in (4, 8), (6, 0):  # with a learning rate that spoils the network
        more = f"--crop_border={border}", f"--total_iters={it}", "--lr=0.5"
        assert train(tmp_path, *options, *more)[0] == 0
        entry = events(tmp_path, "val")[-1]
        assert (entry["psnr"], entry["iter"]) == (entry["best_psnr"], entry["best_iter"])
        assert network(tmp_path, "best")["iter"] == it
        assert network(tmp_path, f"best_before_{it}")["iter"] == it - 2


def test_the_best_network_is_that_of_the_first_set_given(tmp_path):
    """Also where it was validated before, but behind another."""
    for name in "ab":
        photos(tmp_path / name)
    for it, sets in (2, "a,b"), (4, "b"):
        options = (
            "--dataroot_gt=a",
            "--val_freq=2",
            f"--val_gt={sets}",
            f"--total_iters={it}",
            f"--lr={it / 8}",
        )
        assert train(tmp_path, *options)[0] == 0
    entry = events(tmp_path, "val")[-1]
    assert (entry["dataset"], entry["best_iter"], entry["best_psnr"]) == ("b", 4, entry["psnr"])
    assert (network(tmp_path, "best")["iter"], network(tmp_path, "best_before_4")["iter"]) == (4, 2)


def test_networks_without_their_training_state_are_not_written_over(tmp_path):
    photos(tmp_path / "gt")
    assert train(tmp_path, "--dataroot_gt=gt", "--total_iters=2")[0] == 0
    shutil.rmtree(tmp_path / "experiments/denoise_color25/training_states")
    assert train(tmp_path, "--dataroot_gt=gt", "--eval_only=True")[0] == 1
    code, text = train(tmp_path, "--dataroot_gt=gt", "--total_iters=1", "--val_freq=1")
    assert code == 0 and "was moved to" in text
    (old,) = (tmp_path / "experiments").glob("*_archived_*")
    assert (old / "models/net_g_2.pth").exists() and network(tmp_path, 1)["iter"] == 1


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    photos(tmp_path / "gt")
    assert train(tmp_path, "--dataroot_gt=gt", "--total_iters=4")[0] == 0
    path = tmp_path / "experiments/denoise_color25/models/net_g_4.pth"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 300] = bytes(300)
    path.write_bytes(content)
    code, text = train(tmp_path, "--dataroot_gt=gt")
    assert code == 0
    assert "net_g_4.pth is damaged" in text
    assert "continuing after iteration 2" in text
    state = tmp_path / "experiments/denoise_color25/training_states/6.state"
    with zipfile.ZipFile(state, "w") as file:  # whole, but no state
        file.writestr("x", "y")
    code, text = train(tmp_path, "--dataroot_gt=gt")
    assert code == 0 and "6.state is damaged" in text, text


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_files_from_a_gpu_continue_on_a_cpu(tmp_path):
    """Files of a CPU whose storages are said to be on cuda:0, which is all that differs in a GPU's."""
    photos(tmp_path / "gt")
    options = ["--dataroot_gt=gt", "--total_iters=4", "--save_checkpoint_freq=2"]
    assert train(tmp_path, *options)[0] == 0
    straight = network(tmp_path, 4)["params"]
    folder = tmp_path / "experiments/denoise_color25"
    (folder / "training_states/4.state").unlink()
    for path in (folder / "training_states/2.state", folder / "models/net_g_2.pth"):
        with zipfile.ZipFile(path) as file:
            parts = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, part in parts.items():
                file.writestr(name, part.replace(b"X\3\0\0\0cpu", b"X\6\0\0\0cuda:0"))
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    code, text = train(tmp_path, *options)
    assert (code, "continuing after iteration 2" in text) == (0, True), text
    again = network(tmp_path, 4)["params"]
    assert all(torch.equal(straight[k], again[k]) for k in straight)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_stops(tmp_path, number, code):
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *SMALL.split(),
        "--total_iters=100000",
        "--save_checkpoint_freq=100000",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    log = tmp_path / "experiments/denoise_color25/log.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and log.read_text()) and time.time() < deadline:
        time.sleep(0.2)
    second = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert (second.returncode, "in use by another run" in second.stderr) == (1, True)
    process.send_signal(number)
    text = process.communicate(timeout=120)[0].decode()
    assert process.returncode == code, text
    assert (
        len(list((tmp_path / "experiments/denoise_color25/training_states").glob("*.state"))) == 1
    )


@pytest.mark.parametrize(
    ("images", "batch", "ranks"),
    [(1, 8, 1), (3, 1, 1), (10, 16, 1), (100, 8, 1), (1, 8, 2), (3, 16, 2)],
)
def test_exactly_total_iters_steps(tmp_path, images, batch, ranks):
    photos(tmp_path / "gt", images, size=20)
    code, text = train(
        tmp_path, "--dataroot_gt=gt", f"--batch_size={batch}", "--total_iters=5", ranks=ranks
    )
    assert code == 0, text
    state = torch.load(
        tmp_path / "experiments/denoise_color25/training_states/5.state", weights_only=True
    )
    assert {int(s["step"]) for s in state["optimizer"]["state"].values()} == {5}


def test_two_ranks_equal_one_process(tmp_path):
    photos(tmp_path / "gt", 3)
    options = [
        "--dataroot_gt=gt",
        "--val_gt=gt",
        "--val_freq=6",
        "--drop_path_rate=0",
        "--amp=none",
    ]
    assert train(tmp_path, *options, "--name=one")[0] == 0
    code, text = train(tmp_path, *options, "--name=two", ranks=2)
    assert code == 0, text
    assert train(tmp_path, *options, "--name=accumulated", "--accumulate=2")[0] == 0
    one = network(tmp_path, 6, "one")["params"]
    for name in ("two", "accumulated"):
        other = network(tmp_path, 6, name)["params"]
        assert all(torch.allclose(one[k].float(), other[k].float(), atol=1e-5) for k in one), name
        a, b = (events(tmp_path, "val", n)[0] for n in ("one", name))
        assert a["psnr"] == pytest.approx(b["psnr"], abs=1e-2)
        losses = [[e["loss"] for e in events(tmp_path, name=n)] for n in ("one", name)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_without_fcntl_no_file_is_held_open(tmp_path, monkeypatch):
    """Windows has none, and doesn't rename a folder in which a file is open."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert lock_folder(tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_a_restart_of_three_ranks_is_exact(tmp_path):
    """Sums of three depend on their order: on DDP's buckets, which a restart makes anew."""
    options = ["--batch_size=3", "--embed_dim=24", "--total_iters=4"]
    code, text = train(tmp_path, *options, "--name=straight", ranks=3)
    assert code == 0, text
    shutil.copytree(tmp_path / "experiments/straight", tmp_path / "experiments/restarted")
    (tmp_path / "experiments/restarted/training_states/4.state").unlink()
    code, text = train(tmp_path, *options, "--name=restarted", ranks=3)
    assert code == 0 and "continuing after iteration 2" in text, text
    a, b = (network(tmp_path, 4, name) for name in ("straight", "restarted"))
    assert all(
        torch.equal(a[key][k], b[key][k]) for key in ("params", "params_ema") for k in a[key]
    )


def test_steps_without_a_finite_loss_are_skipped(tmp_path):
    """An lr this large makes the loss overflow; the steps are skipped, and training stops with advice."""
    code, text = train(
        tmp_path, "--lr=1e18", "--total_iters=60", "--save_checkpoint_freq=15", "--print_freq=20"
    )
    assert code != 0
    assert not list(
        tmp_path.glob("experiments/*/models/*")
    )  # spoilt weights would push out sound ones
    assert "loss nan" in text and "20 skipped" in text
    assert events(tmp_path)[-1]["loss"] is None  # not 0, which would look like success
    assert "no finite gradients" in text
    assert "Traceback" not in text

    # Fewer steps than stop a run: it must not end as if all were well.
    code, text = train(tmp_path, "--lr=1e18", "--total_iters=20", "--name=short")
    assert code == 1 and "finished, but not saved: restart with a lower --lr" in text
    assert "Traceback" not in text


# ---- mistakes: one sentence that names the file, exit code not 0, no traceback ----


def wrong(tmp_path, *options):
    code, text = train(tmp_path, "--val_freq=9", *options)
    assert code != 0
    assert "Traceback" not in text, text
    return text


def test_mistakes_with_data_are_named(tmp_path):
    assert "nowhere" in wrong(tmp_path, "--dataroot_gt=nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in wrong(tmp_path, "--dataroot_gt=empty")
    gt, lq = photos(tmp_path / "gt"), photos(tmp_path / "lq")
    (lq / "1.png").rename(lq / "other.png")
    assert "1.png" in wrong(tmp_path, "--dataroot_gt=gt", "--dataroot_lq=lq")
    Image.new("RGB", (20, 20)).save(lq / "1.png")
    (lq / "other.png").unlink()
    text = wrong(tmp_path, "--dataroot_gt=gt", "--dataroot_lq=lq")
    assert "1.png" in text
    assert "20x20" in text
    text = wrong(tmp_path, "--val_gt=gt", "--val_lq=lq")
    assert 'python data.py check "gt" "lq" --scale=1 --filename_tmpl={} names all' in text
    (gt / "1.png").write_bytes((gt / "1.png").read_bytes()[:-200])
    assert "1.png" in wrong(tmp_path, "--dataroot_gt=gt")
    assert "nothing.pth" in wrong(tmp_path, "--pretrain_network=nothing.pth")
    photos(tmp_path / "small", size=10)
    text = wrong(tmp_path, "--dataroot_gt=lq", "--val_gt=small")
    assert "small: images below 16 pixels" in text and "0.png" in text
    assert "below 16 pixels inside crop_border=15" in wrong(
        tmp_path, "--val_gt=lq", "--crop_border=15"
    )
    text = wrong(tmp_path, "--crop_border=130")
    assert "synthetic: images below 16 pixels" in text and "synthetic00" in text
    assert "give dataroot_lq" in wrong(tmp_path, "--degradation=real")
    assert "val_lq" in wrong(tmp_path, "--val_lq=gt")
    assert "eval_only: no checkpoint in experiments" in wrong(tmp_path, "--eval_only=True")


def test_a_mistake_in_a_degradation_keeps_its_traceback(tmp_path):
    photos(tmp_path / "gt")
    code = "import sys, numpy, data, train\n"
    code += "fail = lambda: numpy.zeros((2, 3)) @ numpy.zeros((2, 3))\n"  # of photos, not of the plain trial
    code += "wrong = lambda gt, rng, scale: gt if gt.min() == gt.max() else fail()\n"
    code += "data.DEGRADATIONS['wrong'] = data.Degradation(wrong)\n"
    code += "cfg = train.load_config(sys.argv[1:])\ncfg.degradation = 'wrong'\ntrain.main(cfg)"
    env = ENV | {"PYTHONPATH": str(ROOT)}
    for workers in "01":
        options = [*SMALL.split(), "--dataroot_gt=gt", f"--num_workers={workers}"]
        done = subprocess.run(
            [sys.executable, "-c", code, *options],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1 and "mend or remove" not in done.stdout
        assert "Traceback" in done.stderr and "matmul" in done.stderr, done.stderr


def test_waiting_for_data_is_hinted_at(tmp_path):
    """By a degradation that sleeps longer than a step takes."""
    code = "import time, data, train; noise = data.add_noise\n"
    code += "slow = lambda gt, rng, scale: time.sleep(0.1) or noise(gt, rng)\n"
    code += "data.DEGRADATIONS['noise'] = data.Degradation(slow)\n"
    options = [*SMALL.split(), f"--dataroot_gt={photos(tmp_path / 'gt')}"]
    code += f"train.main(train.load_config({options}))"
    env = ENV | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "waiting for data" in line]
    assert ["num_workers" in line for line in lines] == [False, True, True], (
        done.stdout
    )  # not while starting


def test_validation_folders_of_the_same_name_are_told_apart(tmp_path):
    photos(tmp_path / "a/HR", 1)
    photos(tmp_path / "b/HR", 2, seed=1)
    (tmp_path / "Set5").symlink_to(tmp_path / "a/HR")  # keeps the name that was given to it
    code, text = train(tmp_path, "--val_gt=a/HR,b/HR,Set5", "--dataroot_gt=a/HR", "--val_freq=6")
    assert code == 0 and "validation: HR (1), HR_2 (2), Set5 (1)" in text, text
    assert [e["dataset"] for e in events(tmp_path, "val")] == ["HR", "HR_2", "Set5"]


def test_captions_are_the_psnr_whatever_is_measured_first(tmp_path, monkeypatch):
    captions = []
    monkeypatch.setattr(trainer, "strip", lambda *a: captions.append(a[3:]))
    images = data.ValidationImages(None, n=1)
    cfg = Config(measures=("ssim", "psnr"), save_img=True)
    means, _ = trainer.evaluate(Same(), images, cfg)
    assert captions == [(means["input_psnr"], means["psnr"], 320)] and means["psnr"] > 20


class Same(torch.nn.Module):
    """What `restore` needs of a network, which returns its input."""

    in_chans, factor, multiple, floats_per_pixel = 3, 1, 8, 100

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.weight


def test_sets_are_compared_with_themselves_only(tmp_path):
    """Two folders HR are two sets, though both are called so in the log."""
    photos(tmp_path / "a/HR", 1)
    photos(tmp_path / "b/HR", 1, seed=1)
    keys = [trainer.best_key(data.ValidationImages(tmp_path / k / "HR"), Config()) for k in "ab"]
    assert keys[0] != keys[1]


def test_fp16_and_bf16_and_no_average_run(tmp_path):
    for options in (
        ["--amp=bf16"],
        ["--ema_decay=0", "--use_checkpoint=True"],
        ["--optimizer=adamw", "--weight_decay=0.01"],
    ):
        code, text = train(tmp_path, *options, "--total_iters=2", "--resume=never")
        assert code == 0, text


def test_evaluation_takes_nothing_back_from_the_log(run):
    cwd, _ = run
    folder = cwd / "experiments/stateless"
    shutil.copytree(cwd / "experiments/denoise_color25", folder)
    shutil.rmtree(folder / "training_states")
    before = (folder / "log.jsonl").read_text()
    options = (
        "--name=stateless",
        "--eval_only=True",
        f"--pretrain_network={folder}/models/net_g_6.pth",
    )
    code, text = train(cwd, *options)
    assert code == 0 and "stateless: evaluating" in text, text
    after = (folder / "log.jsonl").read_text()
    assert before and after.startswith(before) and after != before
    code, text = train(cwd, *options, "--resume=never")  # and moves nothing
    assert code == 0 and "moved" not in text, text
    assert (folder / "log.jsonl").read_text().startswith(after)


def test_without_validations_no_image_of_them_is_read(tmp_path):
    code, text = train(tmp_path, "--val_gt=nowhere", "--total_iters=1")
    assert code == 0 and "validation: none" in text, text


def test_evaluation_names_its_protocol_and_pads_like_the_paper(run, tmp_path):
    cwd, _ = run
    options = "--eval_only=True", "--pretrain_network=absent.pth", "--drop_path_rate=0.3"
    code, text = train(cwd, *options)  # in the folder of a run
    assert (code, "pretrain_network: None -> absent.pth" in text) == (1, True)
    for pad in (False, True):
        options = [
            "--eval_only=True",
            "--pretrain_network=experiments/denoise_color25/models/net_g_6.pth",
        ]
        options += [
            f"--name=eval{pad}",
            "--val_gt=gt",
            "--gt_size=16",
            f"--pad_window={pad}",
            "--amp=none",
        ]
        code, text = train(cwd, *options)
        assert code == 0, text
        entry = events(cwd, "val", f"eval{pad}")[0]
        protocol = "RGB, border 0, sigma 25, seed 0" + ", padded by a window" * pad
        assert entry["protocol"] == protocol and f"({protocol})" in text
        net, scores = load(cwd / "experiments/denoise_color25/models/net_g_6.pth"), []
        for path in sorted((cwd / "gt").iterdir()):
            gt = np.asarray(Image.open(path))
            noise = np.random.RandomState(0).normal(0, 25 / 255, gt.shape)[..., ::-1]
            lq = (
                (gt.astype(np.float32) / np.float32(255) + noise)
                .astype(np.float32)
                .transpose(2, 0, 1)
            )
            if pad:  # SwinIR's main_test_swinir.py: 40 pixels are five windows already, and a sixth is added
                lq = np.concatenate([lq, lq[:, ::-1]], 1)[:, :48]
                lq = np.concatenate([lq, lq[:, :, ::-1]], 2)[:, :, :48]
            with torch.no_grad():
                out = net(torch.from_numpy(lq.copy())[None])[0, :, :40, :40]
            out = (out.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            scores.append(psnr(out, gt))
        assert entry["psnr"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert events(cwd, "val", "evalTrue")[0]["psnr"] != events(cwd, "val", "evalFalse")[0]["psnr"]
    code, text = train(
        cwd, "--in_chans=1", "--test_y_channel=True", "--val_gt=gt", "--val_freq=6", "--name=gray"
    )
    assert code == 0 and "(gray, border 0, sigma 25, seed 0)" in text, text  # not Y: of 0 to 255


def test_any_option_gives_a_config_or_one_sentence(capsys):
    rng = np.random.default_rng(0)
    names = [*vars(Config()), "lr_", "", "total_iter", "ß"]
    words = [
        "",
        "0",
        "-1",
        "1e999",
        "nan",
        "[1,2]",
        "(",
        "{}",
        "None",
        "True",
        "1,2,3",
        "9" * 400,
        "a\0b",
        "'",
    ]
    words += [
        "__import__('os').remove('x')",
        "(" * 300,
        "1e-4",
        "6,6",
        "é",
        "-",
        "=",
        "[[[]]]",
        "0x10",
        "1_0",
    ]
    for _ in range(1000):
        name, word = names[rng.integers(len(names))], words[rng.integers(len(words))]
        cut = "".join(rng.permutation(list(word)).tolist()) if rng.random() < 0.3 else word
        try:
            assert isinstance(load_config([f"--{name}={cut}"]), Config)
        except SystemExit as error:
            assert (
                isinstance(error.code, str)
                and error.code.count("\n") == 0
                and name[:9] in error.code
            )


# ---- what lives across steps ----

ALIVE = """
import gc, json, sys
import torch
import train

lr_at, found = train.lr_at, []

def look(it, cfg):  # called once in each iteration, when nothing of the step before is needed any more
    gc.collect()
    objects = gc.get_objects()
    tensors = [x for x in objects if issubclass(type(x), torch.Tensor)]
    graphs = sum(x.grad_fn is not None for x in tensors)
    found.append((len(objects), len(tensors), graphs))
    return lr_at(it, cfg)

train.lr_at = look
train.main(train.load_config(sys.argv[1:]))
print(json.dumps(found))
"""


@pytest.mark.parametrize("options", [[], ["--accumulate=2", "--amp=fp16", "--use_checkpoint=True"]])
def test_nothing_that_lives_across_steps_grows_or_holds_a_graph(tmp_path, options):
    photos(tmp_path / "gt")
    options = ["--dataroot_gt=gt", "--val_gt=gt", "--val_freq=4", "--total_iters=24", *options]
    command = [sys.executable, "-c", ALIVE, *SMALL.split(), *options, "--save_checkpoint_freq=4"]
    env = ENV | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects, tensors, graphs = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    assert set(graphs) == {0}, graphs
    # After as many steps since the last validation and save; two batches may be on their way.
    assert abs(tensors[11] - tensors[23]) <= 4, tensors
    assert abs(objects[11] - objects[23]) < 40, objects


# ---- validation with an exact image, signals of a terminal, threads ----


def test_an_exact_image_decides_neither_the_mean_nor_the_best(tmp_path):
    """A black image without noise comes out exact, and its PSNR would be infinite."""
    photos(tmp_path / "gt")
    Image.new("RGB", (40, 40)).save(tmp_path / "gt/black.png")
    photos(tmp_path / "lq", seed=1)
    Image.new("RGB", (40, 40)).save(tmp_path / "lq/black.png")
    options = "--dataroot_gt=gt", "--val_gt=gt", "--val_lq=lq", "--val_freq=2", "--lr=1e-5"
    code, text = train(tmp_path, *options)
    assert code == 0 and ", 1 image(s) exact" in text, text
    entries = events(tmp_path, "val")
    assert [e["exact"] for e in entries] == [1, 1, 1]
    net = load(tmp_path / "experiments/denoise_color25/models/net_g_6.pth")
    values = [60.0]
    for name in "01":
        lq, gt = (
            np.asarray(Image.open(tmp_path / folder / f"{name}.png")) for folder in ("lq", "gt")
        )
        with torch.no_grad():
            out = net(torch.from_numpy(lq.copy()).permute(2, 0, 1)[None] / 255)[0]
        out = (out.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        values.append(psnr(out, gt))
    assert entries[-1]["psnr"] == pytest.approx(np.mean(values), abs=1e-3)
    best = max(entries, key=lambda e: e["psnr"])
    assert best["best_iter"] == best["iter"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a terminal of Linux")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_closed_terminal_loses_nothing(tmp_path, ranks):
    import pty

    photos(tmp_path / "gt")
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    options = (
        "--dataroot_gt=gt",
        "--total_iters=100000",
        "--save_checkpoint_freq=100000",
        "--num_workers=1",
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(sys.executable, [*start, str(ROOT / "train.py"), *SMALL.split(), *options], ENV)
    log = tmp_path / "experiments/denoise_color25/log.jsonl"
    deadline = time.time() + 120
    while not (log.exists() and log.read_text()):
        assert time.time() < deadline
        time.sleep(0.1)
    os.close(terminal)  # the kernel sends SIGHUP to all processes of the terminal
    while not os.waitpid(pid, os.WNOHANG)[0]:
        assert time.time() < deadline
        time.sleep(0.1)
    states = list((tmp_path / "experiments/denoise_color25/training_states").glob("*.state"))
    assert len(states) == 1 and "stopped after iteration" in (log.parent / "log.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="needs nohup")
def test_nohup_is_respected(tmp_path):
    command = [
        "nohup",
        sys.executable,
        str(ROOT / "train.py"),
        *SMALL.split(),
        "--total_iters=100000",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = tmp_path / "experiments/denoise_color25/log.jsonl"

    def count():
        return len(log.read_text().splitlines()) if log.exists() else 0

    deadline = time.time() + 120
    while not count() and time.time() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    before = count()
    while count() < before + 3:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs /proc/stat")
def test_threads_follow_the_free_cores_and_a_restart(tmp_path, monkeypatch):
    import model

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    busy = iter(
        [
            f"cpu0 {100 + 10 * k} 0 0 100 0 0 0 0 0 0\ncpu1 50 0 0 {100 + 10 * k} 0 0 0 0 0 0\n"
            for k in range(20)
        ]
    )
    monkeypatch.setattr(Path, "read_text", lambda path, *args: next(busy))
    assert model.free_cores() == 1
    idle = iter(
        [
            f"cpu0 9 0 0 {100 + 10 * k} 0 0 0 0 0 0\ncpu1 50 0 0 {100 + 10 * k} 0 0 0 0 0 0\n"
            for k in range(20)
        ]
    )
    monkeypatch.setattr(Path, "read_text", lambda path, *args: next(idle))
    assert model.free_cores() == 2
    monkeypatch.undo()

    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    code = "import model, sys, train; model.free_cores = train.free_cores = lambda: 1\n"
    code += "train.main(train.load_config(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *SMALL.split(), "--total_iters=1"]
    env["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "1 thread(s)" in done.stdout, done.stdout + done.stderr
    command = [sys.executable, str(ROOT / "train.py"), *SMALL.split(), "--total_iters=2"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "1 thread(s)" in done.stdout, (
        done.stdout + done.stderr
    )  # as before, though more may be free


@pytest.mark.parametrize(
    ("capability", "found", "words"),
    [((6, 1), {"gcc"}, "capability 6.1"), ((8, 0), set(), "C compiler"), ((8, 0), {"gcc"}, None)],
)
def test_why_not_compiled(capability, found, words, monkeypatch):
    monkeypatch.setattr(trainer.sys, "platform", "linux")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(trainer.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(trainer.shutil, "which", lambda name: name if name in found else None)
    monkeypatch.setattr(trainer.Path, "exists", lambda path: True)
    monkeypatch.delenv("CC", raising=False)
    reason = trainer.why_not_compiled(torch.device("cuda", 0))
    assert reason is None if words is None else words in reason
    assert "CUDA" in trainer.why_not_compiled(torch.device("cpu"))


# ---- parts that can be called alone ----


class Plain(torch.optim.SGD):
    """An optimizer without fused kernels, as those of researchers are."""


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.Adam(p, fused=True), lambda p: Plain(p, 0.1)]
)
def test_a_step_that_is_not_finite_changes_nothing_with_any_optimizer(make):
    from train import train_step

    net = torch.nn.Conv2d(3, 3, 1)
    optimizer = make(net.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    before = [p.clone() for p in net.parameters()]

    def step(value):
        loss = torch.nn.Identity()
        loss.forward = lambda pred, target: {"l1": (pred - target).abs().mean() * value}
        pairs = [[torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)]]
        return train_step(Config(), "none", net, loss, optimizer, scaler, pairs)

    for value in (math.nan, math.inf):
        figures, finite = step(value)
        assert not finite and not figures["loss"].isfinite()
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    figures, finite = step(1.0)
    assert finite and list(figures) == ["loss", "grad_norm"]
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adam():
    torch.manual_seed(0)
    network = trainer.build_network(Config(embed_dim=12, depths=(2,), num_heads=(2,), gt_size=16))
    cfg = Config(lr=0.01, betas=(0.8, 0.9), weight_decay=0.1)
    muon = trainer.OPTIMIZERS["muon"](network, cfg)
    named = dict(network.named_parameters())
    matrix = named["layers.0.residual_group.blocks.0.mlp.fc1.weight"]  # (24, 12)
    convolution = named["layers.0.conv.weight"]
    others = [named[name] for name in ("conv_first.weight", "norm.weight")]
    others.append(named["layers.0.residual_group.blocks.0.attn.relative_position_bias_table"])
    adam = torch.optim.AdamW(
        [p.detach().clone().requires_grad_() for p in others], cfg.lr, cfg.betas, weight_decay=0.1
    )
    copies = adam.param_groups[0]["params"]
    for _ in range(3):
        before = matrix.clone(), convolution.clone()
        for p in named.values():
            p.grad = torch.randn_like(p)
        for p, copied in zip(others, copies, strict=True):
            copied.grad = p.grad
        muon.step()
        adam.step()
    for p, copied in zip(others, copies, strict=True):
        torch.testing.assert_close(p, copied)
    for p, old, longest in ((matrix, before[0], 24), (convolution, before[1], 108)):
        update = (old * (1 - 0.01 * 0.1) - p).flatten(1) / (0.01 * 0.2 * longest**0.5)
        values = torch.linalg.svdvals(update)
        assert values.min() > 0.6 and values.max() < 1.3


def test_a_restart_with_muon_is_exact(tmp_path):
    options = ["--optimizer=muon", "--lr=1e-3", "--num_workers=0"]
    assert train(tmp_path, *options, "--name=straight")[0] == 0
    assert train(tmp_path, *options, "--name=stopped", "--max_hours=0")[0] == 0
    assert train(tmp_path, *options, "--name=stopped")[0] == 0
    a, b = network(tmp_path, 6, "straight"), network(tmp_path, 6, "stopped")
    for kind in ("params", "params_ema"):
        assert all(torch.equal(a[kind][key], b[kind][key]) for key in a[kind])


def test_the_average_shares_the_statistics_of_batch_norm():
    from train import build_average, update_average

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    average = build_average(net)
    first = average[0].weight.clone()
    with torch.no_grad():
        net[0].weight += 1
    for _ in range(3):
        net(torch.rand(2, 3, 8, 8))
    update_average(average, net, 10**6, 0.75)
    assert torch.allclose(average[0].weight, first + 0.25)
    assert (
        torch.equal(average[1].running_mean, net[1].running_mean)
        and average[1].running_mean.abs().sum() > 0
    )
    assert average[1].num_batches_tracked == 3 and not average[0].weight.requires_grad


def test_the_lr_reaches_all_parameter_groups():
    from train import set_lr

    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b], "lr_scale": 0.1}], 1.0)
    set_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]


def test_a_rule_that_follows_from_itself_is_refused(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("lr = lambda cfg: cfg.gamma\ngamma = lambda cfg: cfg.lr\n")
    with pytest.raises(SystemExit, match="this rule depends on itself"):
        load_config([str(path)])


def test_a_new_part_starts_afresh_in_an_old_run(tmp_path):
    """As a discriminator would that is added to a run."""
    photos(tmp_path / "gt")
    assert train(tmp_path, "--dataroot_gt=gt", "--total_iters=2")[0] == 0
    path = tmp_path / "experiments/denoise_color25/training_states/2.state"
    state = torch.load(path, weights_only=True)
    del state["meter"]
    torch.save(state, path)
    code, text = train(tmp_path, "--dataroot_gt=gt", "--total_iters=4")
    assert (
        code == 0 and "note: the checkpoint has no meter: it starts from the beginning" in text
    ), text


def test_a_restart_may_change_the_loss_and_the_measure(tmp_path):
    photos(tmp_path / "gt")
    options = "--dataroot_gt=gt", "--val_gt=gt", "--val_freq=2", "--print_freq=3"
    assert train(tmp_path, *options, "--total_iters=2", "--loss=l1+mse")[0] == 0
    code, text = train(tmp_path, *options, "--total_iters=4", "--measures=ssim,psnr")
    assert code == 0, text
    assert "best SSIM 0." in text and "best_psnr" not in events(tmp_path, "val")[-1]
    assert events(tmp_path, "val")[-1]["best_iter"] == 4  # 0.9 isn't compared with 20 dB
    assert network(tmp_path, "best_before_4")["iter"] == 2


def test_a_mistake_in_a_config_names_its_line(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("lr = 1e-4\ngamma = half\n")
    with pytest.raises(SystemExit, match=r"c\.py is no config file in line 2: NameError"):
        load_config([str(path)])
    path.write_text("lr = lambda cfg: cfg.batchsize / 8\n")
    with pytest.raises(SystemExit, match=r"lr: its rule fails: .*no option batchsize"):
        load_config([str(path)])


def test_a_batch_that_is_not_finite_leaves_running_statistics_alone():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.Adam(network.parameters(), 1e-2, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    criterion = trainer.WeightedLoss("l1")
    x = torch.rand(2, 3, 8, 8)
    step = (Config(), "none", network, criterion, optimizer, scaler)
    _, finite = trainer.train_step(*step, [[x, x]])
    assert finite and network[1].running_mean.any()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    del before["1.num_batches_tracked"]
    _, finite = trainer.train_step(*step, [[x * math.nan, x]])
    assert not finite
    after = network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_an_optimizer_of_ones_own_is_not_called_for_a_step_that_is_not_finite():
    """Whatever its options say: `fused` protects torch's own only."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            raise AssertionError

    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = Own([parameter], 1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    trainer.step_if_finite(optimizer, scaler, torch.tensor(False))


def test_stages_of_a_plan_are_checked_before_the_start(tmp_path, monkeypatch):
    plan = {1: (4, 16), 2: (6, 16), 3: (4, 20)}
    monkeypatch.setattr(trainer, "plan_of", lambda it, cfg: plan[min(it, 3)])
    with pytest.raises(SystemExit, match="gt_size=20 can't work: it must be N x 8"):
        load_config(["--total_iters=9"])
    cfg = load_config(["--total_iters=2"])
    with pytest.raises(ValueError, match="batch_size=6 is no multiple of ranks x accumulate, 4"):
        trainer.check_plan(cfg, 4)


# ---- GANs ----

GAN = [
    "--loss=l1+0.1*gan",
    "--discriminator_features=4",
    "--total_iters=40",
    "--print_freq=10",
    "--save_checkpoint_freq=5",
    "--keep_last=0",
]


def gan_weights(cwd, name, it=40):
    file = network(cwd, it, name)
    path = cwd / "experiments" / name / "training_states" / f"{it}.state"
    state = torch.load(path, weights_only=True)
    tensors = {f"{kind} {k}": v for kind in ("params", "params_ema") for k, v in file[kind].items()}
    tensors |= {f"discriminator {k}": v for k, v in state["discriminator"].items()}
    for optimizer in ("optimizer", "optimizer_d"):
        for i, values in state[optimizer]["state"].items():
            tensors |= {f"{optimizer} {i} {k}": v for k, v in values.items()}
    return tensors


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_gan_continues_exactly(tmp_path, num_workers):
    photos(tmp_path / "gt")
    options = [*GAN, "--dataroot_gt=gt", f"--num_workers={num_workers}"]
    code, text = train(tmp_path, *options, "--name=straight")
    assert code == 0, text
    for stop in (5, 15, 30):  # the newest files are gone, as after a kill
        code, text = train(tmp_path, *options, "--name=restarted", f"--total_iters={stop}")
        assert code == 0, text
    code, text = train(tmp_path, *options, "--name=restarted")
    assert code == 0 and "continuing after iteration 30" in text, text
    a, b = gan_weights(tmp_path, "straight"), gan_weights(tmp_path, "restarted")
    assert any("weight_u" in key for key in a) and any("optimizer_d" in key for key in a)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    last = events(tmp_path, name="straight")[-1]
    assert last == events(tmp_path, name="restarted")[-1] | {
        key: last[key] for key in ("time", "data_time", "img_per_s")
    }
    assert last["loss"] == pytest.approx(last["l1"] + last["gan"], rel=1e-5)
    assert last["d_skipped"] == 0 and all(f"d_{k}" in last for k in ("loss", "real", "fake"))

    code, text = train(tmp_path, *options, "--name=restarted", "--loss=l1", "--total_iters=42")
    assert code == 0 and "the checkpoint's discriminator isn't used, nor saved again" in text


def test_a_gan_on_two_ranks_is_that_of_one(tmp_path):
    options = [
        *GAN,
        "--total_iters=10",
        "--amp=none",
        "--lr=1e-4",
        "--warmup_iters=100",
    ]  # Adam takes signs
    for name, ranks in (("one", 1), ("two", 2)):
        code, text = train(tmp_path, *options, f"--name={name}", ranks=ranks)
        assert code == 0, text
    a, b = gan_weights(tmp_path, "one", 10), gan_weights(tmp_path, "two", 10)
    for key in a:
        if "optimizer" not in key:
            assert (a[key].float() - b[key].float()).abs().max() < 1e-5, key


def test_pretrained_weights_are_read_at_the_first_start_only(tmp_path):
    torch.manual_seed(0)
    network = trainer.DISCRIMINATORS["unet"](3, 4)
    torch.save({"params": network.state_dict()}, tmp_path / "d.pth")
    options = ["--loss=l1+0.1*gan", "--discriminator_features=4", "--val_freq=0", "--lr=0"]
    options += ["--pretrain_discriminator=d.pth", "--lr_d=1e-4", "--save_checkpoint_freq=1"]
    code, text = train(tmp_path, *options, "--total_iters=1")
    assert code == 0, text
    (tmp_path / "d.pth").unlink()
    code, text = train(tmp_path, *options, "--total_iters=2")
    assert code == 0 and "continuing after iteration 1" in text, text


@pytest.mark.parametrize("kind", ["vanilla", "lsgan", "hinge"])
def test_a_discriminator_learns_and_its_bad_steps_change_nothing(kind):
    cfg = Config(loss="l1+0.1*gan", gan_type=kind, discriminator_features=4, gt_size=16, lr=1e-3)
    hardware = trainer.Hardware(0, 1, torch.device("cpu"), "none")
    torch.manual_seed(0)
    adversary = trainer.Adversary(cfg, hardware)
    real, fake = torch.rand(2, 3, 16, 16), torch.full((2, 3, 16, 16), 0.5)
    losses = []
    for it in range(1, 21):
        adversary.generator_loss(fake)
        losses.append(adversary.step([real], it)["d_loss"].item())
    assert losses[-1] < losses[0]

    def everything():
        state = adversary.network.state_dict() | {
            f"{i} {key}": value
            for i, values in adversary.optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
        return {key: value.clone() for key, value in state.items()}

    before = everything()
    adversary.generator_loss(fake * math.nan)
    figures = adversary.step([real], 21)
    assert figures["d_skipped"] == 1 and not figures["d_loss"].isfinite()
    after = everything()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_discriminator_gives_gradients_to_the_network_alone():
    cfg = Config(loss="gan", discriminator_features=4, gt_size=16)
    adversary = trainer.Adversary(cfg, trainer.Hardware(0, 1, torch.device("cpu"), "none"))
    fake = torch.rand(2, 3, 16, 16, requires_grad=True)
    adversary.generator_loss(fake).backward()
    assert fake.grad.abs().max() > 0
    assert all(p.grad is None for p in adversary.network.parameters())


# ---- memory, and validation that doesn't wait ----

OUT_OF_MEMORY = """
import sys
sys.path.insert(0, {root!r})
import torch, model, train
forward, calls = model.SwinIR.forward, [0]

def limited(self, x):
    if self.training and torch.is_grad_enabled():
        calls[0] += 1
        if calls[0] >= {first} and len(x) > {fits} and {rank}:
            raise torch.OutOfMemoryError("CUDA out of memory. (injected)")
    return forward(self, x)

model.SwinIR.forward = limited
train.leave(train.run({options} + sys.argv[1:]))
"""


@pytest.mark.parametrize("first", [1, 4])
def test_a_step_without_memory_is_made_again_in_smaller_parts(tmp_path, first):
    options = [*SMALL.split(), "--drop_path_rate=0.5", "--loss=l1+0.1*gan", "--amp=none"]
    options += ["--discriminator_features=4", "--lr=1e-5"]
    script = tmp_path / "limited.py"
    values = {"root": str(ROOT), "first": first, "fits": 1, "rank": True}
    script.write_text(OUT_OF_MEMORY.format(options=[*options, "--name=limited"], **values))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stdout.splitlines() if "out of memory" in line]
    assert [line.split("a step has ")[1] for line in notes] == [
        "2 micro-batches from here on",
        "4 micro-batches from here on",
    ]
    assert "finished" in done.stdout
    # As if it had been so from the start, but for DropPath, which draws for each micro-batch.
    script.write_text(OUT_OF_MEMORY.format(options=[*options, "--name=limited"], **values))
    done = subprocess.run(
        [sys.executable, script, "--total_iters=8"],
        cwd=tmp_path,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert "1 rank(s) x 4 micro-batch(es)" in done.stdout  # a restart remembers


def test_ranks_find_together_what_fits_into_memory(tmp_path):
    """One of two ranks has less memory. Both take smaller micro-batches, with the same result."""
    script = tmp_path / "limited.py"
    values = {"root": str(ROOT), "first": 1, "fits": 1, "rank": "train.dist.get_rank() == 1"}
    options = [*SMALL.split(), "--amp=none", "--lr=1e-5", "--warmup_iters=100"]
    script.write_text(OUT_OF_MEMORY.format(options=[*options, "--name=two"], **values))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, script], cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 rank(s) x 2 micro-batch(es)" in done.stdout
    assert train(tmp_path, *options[len(SMALL.split()) :], "--name=one")[0] == 0
    a, b = network(tmp_path, 6, "one")["params"], network(tmp_path, 6, "two")["params"]
    assert all((a[key].float() - b[key].float()).abs().max() < 1e-5 for key in a)


def test_one_sample_that_does_not_fit_is_said(tmp_path):
    script = tmp_path / "limited.py"
    values = {"root": str(ROOT), "first": 3, "fits": 0, "rank": True}
    script.write_text(OUT_OF_MEMORY.format(options=SMALL.split(), **values))
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "out of memory with one sample at a time: --use_checkpoint=True" in done.stderr


def test_the_fewest_micro_batches_that_fit_are_chosen(monkeypatch):
    cfg = load_config([str(ROOT / "configs/denoise.py")])
    net = trainer.build_network(cfg)
    hardware = trainer.Hardware(0, 1, torch.device("cpu"), "bf16")
    one = trainer.expected_bytes(net, cfg, hardware, 1)
    # 4.5 GB for a patch were measured, with bfloat16 on the runtime of CUDA
    assert one == pytest.approx(4.5e9, rel=0.1)
    for gigabytes, count in ((100, 1), (25, 2), (10, 4), (5, 8)):
        monkeypatch.setattr(trainer, "free_memory", lambda _, gb=gigabytes: gb * 1e9)
        assert trainer.fit_memory(net, cfg, hardware, None) == count
        assert trainer.fit_memory(net, cfg, hardware, 2) == 2  # as before a restart
        assert not net.layers[0].use_checkpoint
    monkeypatch.setattr(trainer, "free_memory", lambda _: 3e9)
    assert trainer.fit_memory(net, cfg, hardware, None) == 8 and net.layers[0].use_checkpoint


def test_images_are_scored_while_the_next_one_is_restored(monkeypatch):
    """Both take as long here: together, about half of their sum."""

    def slow_restore(network, lq, gt, cfg):
        time.sleep(0.4)
        return gt

    def slow_psnr(*_):  # of the output, and of the input
        time.sleep(0.2)
        return 30.0

    monkeypatch.setattr(trainer, "restored_pixels", slow_restore)
    monkeypatch.setattr(trainer, "psnr", slow_psnr)
    monkeypatch.setitem(trainer.MEASURES, "psnr", slow_psnr)
    images = data.ValidationImages(None, n=10)
    images[0]  # the images are drawn before
    for i in range(10):
        images[i]
    begin = time.perf_counter()
    means, _ = trainer.evaluate(Same(), images, Config(measures=("psnr",), strips=0))
    assert means == {"psnr": 30.0, "input_psnr": 30.0, "exact": 10}
    assert time.perf_counter() - begin < (10 * 0.4 + 10 * 0.4) / 1.5


# ---- names, encodings and files that are not ours ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_configs_of_windows_editors(tmp_path, encoding):
    text = "# Größe\r\nlr = 3e-4\r\nbatch_size = 2\r\n"
    (tmp_path / "c.py").write_bytes(text.encode(encoding))
    assert (load_config([str(tmp_path / "c.py")]).lr, Config().lr) == (3e-4, 2e-4)
    (tmp_path / "c.py").write_bytes(text.encode("cp1252"))
    with pytest.raises(SystemExit, match=r"c\.py is not in UTF-8 .*: save it as UTF-8"):
        load_config([str(tmp_path / "c.py")])


def test_files_that_are_not_ours_are_ignored_with_a_note(tmp_path):
    photos(tmp_path / "gt")
    options = ["--dataroot_gt=gt", "--total_iters=4"]
    assert train(tmp_path, *options)[0] == 0
    folder = tmp_path / "experiments/denoise_color25"
    for name in ("9 copy.state", "9.sync-conflict-2026.state", "٩.state"):
        (folder / "training_states" / name).write_bytes(b"x")
    (folder / "models" / "net_g_best (1).pth").write_bytes(b"x")
    code, text = train(tmp_path, *options, "--total_iters=6")
    assert code == 0 and "continuing after iteration 4" in text, text
    assert "note: ignored in experiments/denoise_color25, as not written by train.py: " in text
    assert all(word in text for word in ("9 copy.state", "net_g_best (1).pth"))
    assert (folder / "training_states/9 copy.state").exists()

    shutil.rmtree(tmp_path / "experiments")
    folder.joinpath("models").mkdir(parents=True)
    (folder / "models/copied.pth").write_bytes(b"x")  # not a run: stays where it is
    assert train(tmp_path, *options)[0] == 0
    assert (folder / "models/copied.pth").exists()


def test_validation_images_with_the_longest_names_and_commas_in_their_folder(tmp_path):
    photos(tmp_path / "gt")
    long = "ä" * 125 + "x.png"  # 255 bytes
    (tmp_path / "a, b").mkdir()
    shutil.copy(tmp_path / "gt/0.png", tmp_path / "a, b" / long)
    options = ["--dataroot_gt=gt", "--val_gt=a, b", "--val_freq=2", "--save_img=True"]
    code, text = train(tmp_path, *options, "--total_iters=2")
    assert code == 0 and "validation: a, b (1)" in text, text
    (strip,) = (tmp_path / "experiments/denoise_color25/visualization/a, b").iterdir()
    assert len(os.fsencode(strip.name)) <= 255 and strip.suffix == ".png"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "experiments").mkdir(mode=0o500)
    code, text = train(tmp_path, "--total_iters=2")
    assert code == 1 and "experiments" in text and "Traceback" not in text


def test_a_vanished_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"models/net_g_2\.pth can't be written: .*check the permissions"
    ):
        trainer.write_file(Path("gone/models/net_g_2.pth"), {"a": 1})


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "EOPNOTSUPP", "EAGAIN"])
def test_only_a_lock_that_is_taken_refuses(tmp_path, monkeypatch, capsys, name):
    fcntl = pytest.importorskip("fcntl")

    def fail(*_):
        raise OSError(getattr(errno, name), "reason")

    monkeypatch.setattr(fcntl, "lockf", fail)
    if name == "EAGAIN":
        with pytest.raises(ValueError, match="is in use by another run"):
            lock_folder(tmp_path)
    else:
        assert lock_folder(tmp_path) is not None
        assert "can't be locked" in capsys.readouterr().out
