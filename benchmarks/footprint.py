"""Import time, modules that an import loads, and peak memory of ``fit`` above the imports.

    OMP_NUM_THREADS=1 python benchmarks/footprint.py

Every figure comes from a fresh process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from _common import DEVELOPMENT_DATA, RESULTS

IMPORT = """
import sys, time
started = time.perf_counter()
import genejepa
seconds = time.perf_counter() - started
heavy = [m for m in ("torch", "scanpy", "anndata", "scvi", "lightning", "pandas") if m in sys.modules]
print(f"import genejepa: {seconds:.3f} s, heavy modules loaded: {heavy}")
"""

MEMORY = """
import sys, threading, time
import psutil
import anndata, scanpy, torch, pytorch_lightning, sklearn.linear_model, numba
import genejepa.model, genejepa.train.runner
import genejepa
torch.set_num_threads(1)
process = psutil.Process()
before = process.memory_info().rss
adata = anndata.read_h5ad(sys.argv[1])
peak, running = before, True
def watch():
    global peak
    while running:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.01)
thread = threading.Thread(target=watch); thread.start()
genejepa.fit(adata, progress_bar=False, train_options={"threads": 1})
running = False; thread.join()
print(f"fit: peak {(peak - before) / 1e9:.3f} GB above the imports ({before / 1e9:.3f} GB), data included")
"""

HELP = """
import sys, time, subprocess
started = time.perf_counter()
subprocess.run([sys.executable, "-m", "genejepa", "--help"], check=True, capture_output=True)
print(f"genejepa --help: {time.perf_counter() - started:.3f} s, interpreter start included")
"""


def main() -> None:
    """Run every measurement in its own process, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEVELOPMENT_DATA)
    args = parser.parse_args()
    lines = []
    for code in (IMPORT, HELP, MEMORY):
        command = [sys.executable, "-c", code, str(args.data / "pbmc_facs_zheng2017.h5ad")]
        lines.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    text = "\n".join(lines)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "footprint.txt").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
