"""The benchmark runs, and every recipe has its rows."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_quick_benchmark_reports_every_recipe():
    recipes, modes = ("denoise", "classical", "lightweight", "jpeg", "tiny"), ("float32", "bf16")
    command = [
        sys.executable,
        "tests/bench.py",
        "--quick",
        "--device",
        "cpu",
        "--recipes",
        *recipes,
    ]
    command += ["--modes", *modes]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")
    ]
    for recipe in recipes:
        for mode in modes:  # training, and inference of three sizes
            assert sum(row[0].startswith(recipe + ",") and row[1] == mode for row in rows) == 4, (
                done.stdout
            )
        loaded = [row for row in rows if row[0].startswith(recipe + ",") and len(row) == 2]
        assert len(loaded) == 1 and float(loaded[0][1].replace(",", "")) > 0, done.stdout


def test_quick_sizes_have_their_rows():
    command = [
        sys.executable,
        "tests/bench.py",
        "--quick",
        "--sizes",
        "--device=cpu",
        "--recipes",
        "tiny",
        "lightweight",
        "--modes",
        "float32",
        "bf16",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    for recipe in ("tiny", "lightweight"):
        counts = [
            sum(f"| {recipe}, {what}" in row for row in rows)
            for what in ("training", "restore", "batch")
        ]
        assert counts == [2 * 3, 2 * 1, 1], done.stdout
