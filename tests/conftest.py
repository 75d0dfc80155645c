import os
import sys
from pathlib import Path

# Before torch is imported: networks this small, and tests side by side, only wait for more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
