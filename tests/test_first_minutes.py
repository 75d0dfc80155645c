"""The first minutes on a GPU, on a CPU: a section for each step, whatever becomes of it."""

import os
import subprocess
import sys
from pathlib import Path

import first_minutes
from first_minutes import FULL, QUICK, Step, list_steps, run_step, write_section

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_quick_report_has_every_step(tmp_path):
    command = [sys.executable, ROOT / "tests/first_minutes.py", "report.md", "--quick"]
    command += ["--minutes=60"]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sections = (tmp_path / "report.md").read_text(encoding="utf-8").split("\n## ")[1:]
    titles = [section.splitlines()[0] for section in sections]
    assert titles == [step.title for step in list_steps(tmp_path, QUICK, 1)]
    content = dict(zip(titles, sections, strict=True))
    for title in ("Training, compiled", first_minutes.ONE_IMAGE, "Lines that wait for the GPU"):
        assert "skipped: no GPU" in content[title]
    assert "until iteration 6" in content["Training, eager"]
    assert "passed" in content["Tests of what a GPU runs"]
    assert "| tiny, batch 4 | float32 |" in content["Benchmark"]
    assert "| SwinIR-M | " in content["Benchmark"]
    assert "| sdpa |" in content["Routes of attention"]
    assert "\nequal\n" in content["A restart has the same losses"]
    assert not list(tmp_path.glob("experiments"))


def test_a_step_that_fails_or_hangs_has_its_section(tmp_path):
    report = tmp_path / "report.md"
    started = [sys.executable, "-c"]
    fails = Step("Fails", 1, [*started, "print('a reason'); raise SystemExit(3)"])
    hangs = Step("Hangs", 1, [*started, "import time; print('begun', flush=True); time.sleep(99)"])
    for step in (fails, hangs):
        write_section(report, step, *run_step(step, tmp_path, seconds=5))
    failed, hung = report.read_text().split("## ")[1:]
    assert "exit code 3" in failed and "a reason" in failed
    assert "stopped by the time limit of 5 s" in hung and "begun" in hung


def test_limits_are_12_minutes(tmp_path):
    assert round(sum(step.minutes for step in list_steps(tmp_path, FULL, 1)), 1) == 12
