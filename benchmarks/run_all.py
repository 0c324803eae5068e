"""Every CPU benchmark, one after the other: what ``birl bench`` does, from a checkout.

    python benchmarks/run_all.py [CASE …] [--threads 2] [--quick] [--out DIR]

The results go to benchmarks/results/cpu_*.json, .md and .png unless --out says otherwise. The
exit status is 1 if an answer of ours was wrong. The suite itself is `benchmarks/birl_bench`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from birl_bench import suite

if __name__ == "__main__":
    os.chdir(Path(__file__).resolve().parents[1])  # the default of --out is a folder of this tree
    sys.exit(suite.main(prog="python benchmarks/run_all.py"))
