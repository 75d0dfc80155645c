"""Golden curves: the losses of 30 iterations, which every commit has to reproduce.

    python tests/test_curves.py --renew     # after a change that is meant to alter results

The runs use float32 and one thread, and start from weights that NumPy draws, because PyTorch's
versions draw them in different ways. The tolerance allows for other roundings, of several threads,
versions of PyTorch and CPUs. A learning rate that is off by 0.1 % still fails, as a test shows.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402

FILE = ROOT / "tests/golden/curves.json"
TOLERANCE = 3e-5  # relative
USUAL = ["--amp=none", "--device=cpu", "--compile=off", "--num_workers=0", "--print_freq=1"]
USUAL += ["--val_freq=0", "--save_checkpoint_freq=1000", "--name=curve", "--resume=never"]
USUAL += ["--batch_size=2", "--lr=2e-4", "--warmup_iters=0", "--pretrain_network=start.pth"]
SMALL = ["--embed_dim=24", "--depths=2,2", "--num_heads=2,2"]
RUNS = {
    "denoising, synthetic images": ["configs/tiny.py"],
    "denoising, packed images": ["configs/tiny.py", "--dataroot_gt=packed.npy"],
    "super-resolution": ["configs/lightweight_sr.py", *SMALL, "--gt_size=64"],
    "JPEG": ["configs/jpeg.py", *SMALL, "--gt_size=42"],
    "GAN": [
        *("configs/real_sr_gan.py", *SMALL, "--gt_size=64", "--loss=l1+0.1*gan"),
        *("--discriminator_features=8", "--pretrain_discriminator=start_d.pth"),
    ],
}


def losses(folder: Path, options: list[str], iterations: int = 30) -> list[float]:
    """Of a run in `folder`, with several images in packed.npy there."""
    images = folder / "images"
    if not images.exists():
        images.mkdir()
        for i in range(4):
            Image.fromarray(data.dead_leaves(0, i, 96)).save(images / f"{i}.png")
        data.pack(images, folder / "packed.npy")
    config, *rest = options
    options = [*USUAL, *rest, f"--total_iters={iterations}"]
    cfg = train.load_config([str(ROOT / config), *options])
    write_weights(folder / "start.pth", train.build_network(cfg))
    torch.manual_seed(0)  # of its spectral normalisation
    discriminator = train.DISCRIMINATORS["unet"](cfg.in_chans, cfg.discriminator_features)
    write_weights(folder / "start_d.pth", discriminator)
    assert train.main(cfg) == 0
    lines = (folder / "experiments/curve/log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def write_weights(path: Path, network: torch.nn.Module) -> None:
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for p in network.parameters():
            if p.ndim > 1:
                p.copy_(torch.from_numpy(rng.normal(0, 0.02, p.shape)))
            elif (p != 1).any():  # not the scale of a norm
                p.zero_()
    torch.save({"params": network.state_dict()}, path)


def difference(curve: list[float], wanted: list[float]) -> float:
    """The largest relative one."""
    assert len(curve) == len(wanted) == 30
    return float(np.max(np.abs(np.array(curve) / np.array(wanted) - 1)))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_the_golden_ones(name, tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    assert difference(losses(tmp_path, RUNS[name]), json.loads(FILE.read_text())[name]) < TOLERANCE


def test_a_learning_rate_that_is_a_thousandth_higher_is_noticed(tmp_path, monkeypatch, one_thread):
    monkeypatch.chdir(tmp_path)
    name = "denoising, synthetic images"
    curve = losses(tmp_path, [*RUNS[name], "--lr=2.002e-4"])
    assert difference(curve, json.loads(FILE.read_text())[name]) > 2 * TOLERANCE


def renew() -> None:
    """Writes the file, and how far each curve is from the one before."""
    before = json.loads(FILE.read_text()) if FILE.exists() else {}
    curves = {}
    torch.set_num_threads(1)
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            curves[name] = losses(Path(folder), options)
            os.chdir(ROOT)
        if name in before:
            print(f"{name}: changed by {difference(curves[name], before[name]):.1e}")
    FILE.write_text(json.dumps(curves, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--renew"]:
        sys.exit(__doc__)
    renew()
