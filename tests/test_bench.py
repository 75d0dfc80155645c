"""The benchmark runs, its report has a row for each recipe, and its remarks are true."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import bench
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("denoise", "classical", "lightweight", "jpeg", "tiny")


def run_bench(*options, cwd=ROOT):
    """The rows of each table: {its first cell: [[cell, ...], ...]}."""
    command = [sys.executable, ROOT / "tests/bench.py", "--quick", "--device=cpu", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    tables, rows = {}, []
    for line in done.stdout.splitlines():
        if line.startswith("| ---"):
            continue
        if line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        elif rows:
            tables[rows[0][0]] = rows[1:]
            rows = []
    if rows:
        tables[rows[0][0]] = rows[1:]
    return tables, done.stdout


def number(cell):
    return float(cell.replace(",", ""))


def test_quick_report_has_every_recipe(tmp_path):
    options = ("--modes", "float32", "--report", "report.md")
    tables, text = run_bench(*options, "--tables", "training", "inference", "loading", cwd=tmp_path)
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == text
    assert "commit " in text and torch.__version__ in text and "TFLOP/s" in text
    for recipe in RECIPES:
        (row,) = select(tables["Training step"], recipe)
        assert row[1] == "float32" and number(row[2]) > 0 and number(row[3]) > 0
        assert len(select(tables["Inference"], recipe)) == 3  # sizes
        (row,) = select(tables["Loading, 2 workers"], recipe)
        assert number(row[1]) > 0


def select(rows, recipe):
    return [row for row in rows if row[0].startswith(recipe + ",")]


def test_quick_peer_takes_turns_and_train_runs(tmp_path):
    """The tables attention and protocol are made in test_first_minutes.py."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/network_swinir.py").write_text("from model import SwinIR")
    names = ("peer", "inference", "end_to_end")
    options = ("--recipes", "tiny", "--modes", "float32", "bf16", "--tables", *names)
    tables, text = run_bench("--peer", tmp_path, *options)
    modes = [row[1:3] for row in tables["Training step"]]
    assert modes == [["float32", "float32"], ["bf16", "bf16"], ["bf16", "float32"]], text
    assert all(" to " in row[5] for row in tables["Training step"])
    assert len(tables["Inference"]) == 6 and all(" to " in row[4] for row in tables["Inference"])
    (row,) = tables["train.py, with loading"]
    assert number(row[2]) > 0, text


def test_quick_sizes_have_their_rows():
    tables, text = run_bench("--sizes", "--recipes", "tiny", "--modes", "float32")
    titles = [row[0] for row in tables["Size"]]
    assert sum("training step" in title for title in titles) == 3, text
    assert sum("restore" in title for title in titles) == 1, text


def make_bench(**changes):
    args = Namespace(device="cpu", quick=True, repeats=3)
    return SimpleNamespace(args=args, device="cpu", **changes)


def test_out_of_memory_is_a_result():
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = {"fits": bench.Run(lambda: torch.ones(8) * 2, "float32"), "not": bench.Run(fail, "bf16")}
    results = bench.race(make_bench(), runs)
    assert len(results["fits"].seconds) == 3 and results["fits"].extra >= 32
    assert results["not"].out_of_memory
    cells = bench.comparison(results["fits"], results["not"])
    assert cells[1:3] == ["out of memory", ""]
    with pytest.raises(RuntimeError, match="other"):
        bench.race(make_bench(), {"bad": bench.Run(lambda: fail_with("other"), "bf16")})


def fail_with(text):
    raise RuntimeError(text)


def test_eager_calls_do_not_pass_as_compiled():
    bench.release()
    bench.counters.clear()
    assert bench.describe_compilation() == "NOT COMPILED"
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    double(torch.ones(1, 2))
    assert bench.describe_compilation() == ""
    for size in range(3, 13):  # beyond the limit of recompilations
        double(torch.ones(1, size))
    assert bench.describe_compilation().endswith("frames EAGER")
    bench.release()
    bench.counters.clear()
    double(torch.ones(1, 13))
    assert bench.describe_compilation() == ""
