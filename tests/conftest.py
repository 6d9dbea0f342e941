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
