"""The promises of the repository: size, packages, files that work alone, a README that holds."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = ("train.py", "model.py", "data.py", "metrics.py")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def lines(name):
    return (ROOT / name).read_text(encoding="utf-8").splitlines()


def test_files_stay_within_their_budget():
    counts = {name: len(lines(name)) for name in FILES}
    assert max(counts.values()) <= 500 and sum(counts.values()) <= 1800, counts
    assert all(len(line) <= 110 for name in FILES for line in lines(name))


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
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_requirements_are_the_four_packages():
    text = (ROOT / "requirements.txt").read_text()
    assert set(re.findall(r"^[a-z]+", text, re.M)) == {"torch", "numpy", "pillow", "tqdm"}


def test_the_readme_counts_its_lines_right():
    for name in FILES:
        count = re.search(rf"\| `{name}` \| (\d+) \|", README)
        assert count and int(count.group(1)) == len(lines(name)), name


def commands():
    blocks = "".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if "train.py" in line and not line.startswith("#")]


@pytest.mark.parametrize("command", commands())
def test_training_commands_of_the_readme_are_accepted(command, monkeypatch):
    from train import load_config

    monkeypatch.chdir(ROOT)
    words = shlex.split(command.split("#")[0].replace("&&", ";"))
    load_config(words[words.index("train.py") + 1 :])


PUBLISHED = json.loads((ROOT / "tests/golden/published_networks.json").read_text())
RECIPES = {
    ("denoise",): "denoise_color",
    ("denoise_gray",): "denoise_gray",
    ("jpeg",): "jpeg_gray",
    ("jpeg", "--in_chans=3"): "jpeg_color",
    ("real_sr",): "real_x4_M",
    ("classical_sr", "--scale=4", "--gt_size=256"): "classical_x4_s64",
    **{("classical_sr", f"--scale={s}"): f"classical_x{s}_s48" for s in (2, 3, 8)},
    **{("lightweight_sr", f"--scale={s}"): f"lightweight_x{s}" for s in (2, 3, 4)},
}


@pytest.mark.parametrize(("config", "published"), RECIPES.items())
def test_configs_make_the_published_networks(config, published):
    from model import SwinIR
    from train import load_config, options_of

    cfg = load_config([str(ROOT / f"configs/{config[0]}.py"), *config[1:]])
    net = SwinIR(img_size=cfg.gt_size // cfg.scale, upscale=cfg.scale, **options_of(SwinIR, cfg))
    wanted = PUBLISHED[published]
    assert {k: list(v.shape) for k, v in net.state_dict().items()} == wanted["state_dict"]
    assert net.img_range == wanted["config"]["img_range"]


def test_every_config_is_tried():
    files = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert files == {config[0] for config in RECIPES} | {"tiny"}
