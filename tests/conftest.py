"""Shared fixtures: GPU tests are skipped where there is no GPU; fixed seeds everywhere."""

import os
import tempfile
from pathlib import Path

import pytest
import torch

from nvfp4_ops.lowering.inductor import source_hash

# Inductor's cache does not know what an op is made of: with other sources, other graphs.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"nvfp4_ops_tests_{os.getuid()}_{source_hash()[:16]}"),
)

# Each worker of pytest -n has its share of the cores, and so have the processes that it starts.
if (workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT")) and "OMP_NUM_THREADS" not in os.environ:
    threads = max(1, (os.cpu_count() or 1) // int(workers))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

DATA = Path(__file__).parent / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def data() -> Path:
    """Small authentic checkpoints; tests/data/README.md says who made them."""
    return DATA
