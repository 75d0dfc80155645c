"""The promises of the repository: size, packages, files that work alone, a README that holds."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_metrics import random_vgg
from test_train import ENV, photos

ROOT = Path(__file__).resolve().parents[1]
FILES = ("train.py", "model.py", "data.py", "metrics.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")
HACKING = (ROOT / "HACKING.md").read_text(encoding="utf-8")


def lines(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", FILES)
def test_only_four_packages_are_imported(name):
    allowed = {"torch", "numpy", "PIL", "tqdm"}
    allowed |= {"model", "data", "metrics"} if name == "train.py" else set()
    for node in ast.parse("\n".join(lines(name))).body:
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            assert module.split(".")[0] in allowed | sys.stdlib_module_names, module


@pytest.mark.parametrize("name", ("model.py", "data.py", "metrics.py"))
def test_each_file_works_alone(name, tmp_path):
    shutil.copy(ROOT / name, tmp_path)
    code = f"import {name[:-3]}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_requirements_are_the_four_packages():
    text = (ROOT / "requirements.txt").read_text()
    assert set(re.findall(r"^[a-z]+", text, re.M)) == {"torch", "numpy", "pillow", "tqdm"}


SMALL = "--gt_size=32 --batch_size=2 --embed_dim=12 --depths=2,2 --num_heads=2,2 --num_workers=0 --device=cpu"
SMALL = [*SMALL.split(), "--total_iters=2", "--save_checkpoint_freq=1"]


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", README + HACKING, re.S)


def small_network():
    from train import build_network, load_config

    return build_network(load_config([str(ROOT / "configs/denoise.py"), *SMALL]))


@pytest.fixture
def newcomer(tmp_path):
    """A copy of the files, and the folders of images that the README speaks of."""
    for name in (*FILES, "configs"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    pairs = "high low val_high val_low clean noisy"
    for folder in f"photos testset DIV2K Flickr2K originals {pairs}".split():
        photos(tmp_path / folder, count=6, size=10 if "low" in folder else 40)
    official = tmp_path / "005_colorDN_DFWB_s128w8_SwinIR-M_noise25.pth"
    torch.save({"params": small_network().state_dict()}, official)
    shutil.copy(tmp_path / "photos/0.png", tmp_path / "holiday.jpg")
    random_vgg(tmp_path / "experiments/pretrained_models/vgg19-dcbb9e9d.pth")
    return tmp_path


def test_every_command_of_the_readme_runs(newcomer):
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    lines = [line.split("#")[0] for line in lines if "requirements.txt" not in line]
    lines = [
        line for line in lines if line.strip() and "pytest" not in line and "tests/" not in line
    ]
    assert len(lines) > 12
    if not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))):
        lines = [line for line in lines if ".onnx" not in line]
    if not importlib.util.find_spec("safetensors"):
        lines = [line for line in lines if ".safetensors" not in line]
    for line in lines:
        nodes = 2 if "--nnodes=2" in line else 1
        line = line.replace("nproc_per_node=8", f"nproc_per_node={2 // nodes}")
        words = shlex.split(line.replace("total_iters=4000", "total_iters=3"))
        assigned = dict(words.pop(0).split("=") for word in words[:1] if "=" in word)
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        command = (torchrun if words[0] == "torchrun" else [sys.executable]) + words[1:]
        if "train.py" in words and not any("experiments/" in word for word in words):
            command += SMALL  # the folder of a run has its own options
        options = {
            "cwd": newcomer,
            "env": ENV | assigned,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
        }
        started = [subprocess.Popen(command, text=True, **options) for _ in range(nodes)]
        for process in started:
            text = process.communicate(timeout=200)[0]
            assert process.returncode == 0, f"{line}\n{text}"
    assert len(list((newcomer / "restored").iterdir())) == 12  # .png and .jpg of six
    assert (newcomer / "sheet.png").exists() and (newcomer / "holiday_restored.png").exists()


def test_the_readme_takes_ten_minutes():
    assert len(README.splitlines()) <= 300


def test_the_python_of_the_readme_runs(newcomer):
    """Without train.py. Fewer steps and smaller networks than printed."""
    (newcomer / "train.py").unlink()
    (whole,) = (block for block in blocks("python") if "SwinIR(" in block)
    assert len(whole.splitlines()) <= 40
    short = whole.replace("steps, batch_size = 200, 4", "steps, batch_size = 8, 2")
    short = short.replace('"embed_dim": 32', '"embed_dim": 8').replace("gt_size=48", "gt_size=16")
    assert short.count("= 8, 2") == short.count('"embed_dim": 8') == short.count("gt_size=16") == 1
    done = run_code(newcomer, short)
    assert done.stdout.count("input") == 4, done.stdout

    (use,) = (block for block in blocks("python") if "load(" in block and "SwinIR(" not in block)
    assert use.count("experiments/mine") == 1
    use = use.replace("experiments/mine", "net.pth")
    done = run_code(newcomer, f"import torch\nnoisy = clean = torch.rand(2, 3, 24, 24)\n{use}")
    assert 5 < float(done.stdout) < 60


def run_code(folder, code):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def apply_diff(folder, diff):
    """Applies a diff of the README: "# file.py" names a file, "@@" parts hunks."""
    for part in re.split(r"^(?=# \w+\.py\n)", diff, flags=re.M)[1:]:
        title, _, body = part.partition("\n")
        path = folder / title.removeprefix("# ")
        whole = path.read_text()
        for hunk in filter(None, re.split(r"^@@\n", body, flags=re.M)):
            lines = hunk.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in f" {c}") for c in "-+")
            if old:
                assert whole.count(old) == 1, hunk
                whole = whole.replace(old, new)
        path.write_text(whole)


USED = {  # a word of each diff: options that use it
    "def huber": ["--loss=l1+0.5*huber"],
    "def lose_pixels": ["--degradation=lost", "--lost=0.05,0.2"],
    "def noisy_jpeg": ["--degradation=noisy_jpeg", "--sigma=5,15", "--quality=30,90"],
    "def mae": ["--measures=psnr,ssim,mae"],
    "class PlainCNN": ["--network=cnn"],
    "nn.SiLU": [],
    "class Lion": ["--optimizer=lion"],
    "def linear": ["--scheduler=linear"],
    "4 * cfg.batch_size": ["--milestones=2"],
    "add_histogram": ["--use_tb_logger=True"],
}


@pytest.mark.parametrize("word", USED)
def test_every_change_of_the_readme_works(newcomer, word):
    """Trained in one go, and with a restart in between: the same weights."""
    if word == "add_histogram":
        pytest.importorskip("tensorboard")
    (diff,) = (block for block in blocks("diff") if word in block)
    apply_diff(newcomer, diff)
    options = [*SMALL, "--total_iters=4", "--dataroot_gt=photos", "--val_gt=testset"]
    options += ["--print_freq=1", "--val_freq=2", *USED[word]]
    runs = [["--name=straight"], ["--name=restarted", "--max_hours=0"], ["--name=restarted"]]
    code = f"import train\nfor more in {runs}: train.main(train.load_config({options} + more))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=newcomer, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continuing after iteration 1" in done.stdout
    weights = []
    for name in ("straight", "restarted"):
        file = torch.load(newcomer / f"experiments/{name}/models/net_g_4.pth", weights_only=True)
        weights.append(file["params"] | {f"ema {k}": v for k, v in file["params_ema"].items()})
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])

    text = (newcomer / "experiments/straight/log.jsonl").read_text()
    log = [json.loads(line) for line in text.splitlines()]
    if word == "def huber":
        assert log[0]["loss"] == pytest.approx(log[0]["l1"] + log[0]["huber"], rel=1e-5)
    if word == "def lose_pixels":
        assert "lost, lost 0.05-0.2" in text
        command = [sys.executable, "train.py", *options, "--name=straight", "--lost=0.3"]
        done = subprocess.run(command, cwd=newcomer, env=ENV, capture_output=True, text=True)
        assert "lost: (0.05, 0.2) -> 0.3 can't change" in done.stderr
    if word == "def mae":
        assert all(0 < e["mae"] < 255 for e in log if e["event"] == "val")
    if word == "class PlainCNN":
        network = "experiments/straight/models/net_g_best.pth"
        command = [sys.executable, "model.py", network, "photos", "out", "--device=cpu"]
        done = subprocess.run(command, cwd=newcomer, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0 and len(list((newcomer / "out").iterdir())) == 6, done.stderr


def test_every_change_of_the_readme_is_tried():
    assert len(blocks("diff")) == len(USED)
    assert all(sum(word in block for word in USED) == 1 for block in blocks("diff"))


PUBLISHED = json.loads((ROOT / "tests/golden/published_networks.json").read_text())
RECIPES = {
    ("denoise",): "denoise_color",
    ("denoise_gray",): "denoise_gray",
    ("jpeg",): "jpeg_gray",
    ("jpeg", "--in_chans=3"): "jpeg_color",
    ("real_sr",): "real_x4_M",
    ("real_sr_gan",): "real_x4_M",
    ("classical_sr", "--scale=4", "--gt_size=256"): "classical_x4_s64",
    **{("classical_sr", f"--scale={s}"): f"classical_x{s}_s48" for s in (2, 3, 8)},
    **{("lightweight_sr", f"--scale={s}"): f"lightweight_x{s}" for s in (2, 3, 4)},
}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("denoise.py --sigma=0,50", "denoise_color0-50"),
        ("denoise_gray.py --sigma=15", "denoise_gray15"),
        ("jpeg.py --quality=10,40", "jpeg_10-40"),
        ("jpeg.py", "jpeg_40"),
    ],
)
def test_runs_have_names_that_a_shell_takes(arguments, name):
    from train import load_config

    config, *options = arguments.split()
    assert load_config([str(ROOT / "configs" / config), *options]).name == name


@pytest.mark.parametrize(("config", "published"), RECIPES.items())
def test_configs_make_the_published_networks(config, published):
    from train import build_network, load_config

    cfg = load_config([str(ROOT / f"configs/{config[0]}.py"), *config[1:]])
    net = build_network(cfg)
    wanted = PUBLISHED[published]
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == wanted["state_dict"]
    assert net.img_range == wanted["config"]["img_range"]


def test_every_config_is_tried():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {config[0] for config in RECIPES} | {"tiny", "tiny_real_sr", "speedrun"}
