"""Trains a tiny network for thousands of iterations and prints the resident memory of the process,
which must not grow.

    python tests/soak.py                      # 3,000 iterations, about two minutes
    python tests/soak.py 10000                # 10,000
    python tests/soak.py 3000 --amp=bf16      # any option of train.py

There is a validation and a checkpoint every 250 iterations. Linux only: memory is read from /proc.
"""

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

OPTIONS = [
    "--embed_dim=12",
    "--gt_size=16",
    "--num_heads=1,1,1",
    "--batch_size=2",
    "--amp=none",
    "--device=cpu",
]
OPTIONS += ["--val_freq=250", "--save_checkpoint_freq=250", "--print_freq=250", "--resume=never"]


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(total: int, options: list[str]) -> None:
    lr_at, marks = train.lr_at, {}
    wanted = {*range(500, total, 1000), total}

    def look(it: int, cfg: train.Config) -> float:  # called once in each iteration
        if it in wanted:
            marks[it] = resident_mb()
        return lr_at(it, cfg)

    train.lr_at = look
    config = str(ROOT / "configs/tiny.py")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        train.main(train.load_config([config, f"--total_iters={total}", *OPTIONS, *options]))
        os.chdir(ROOT)
    for it, megabytes in marks.items():
        print(f"iteration {it:>7,}: {megabytes:,.1f} MB resident")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    total = int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 3000
    main(total, arguments)
