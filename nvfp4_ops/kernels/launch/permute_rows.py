"""Launch of ``permute_rows``."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from torch import Tensor

from nvfp4_ops.kernels.launch.tensors import VECTOR_BYTES, WORD_BYTES, GetCompiled, Launch
from nvfp4_ops.kernels.limits import num_multiprocessors

MAX_VECTORS = (1 << 31) - (1 << 16)
"""Of one slab of rows, so that positions in it are 32-bit numbers."""


@dataclass(frozen=True)
class PermuteConfig:
    """Static configuration.

    access_bytes: width of a load and a store; divides the length and the address of every row.
    vectors_per_thread: loads that a thread has in flight.
    """

    access_bytes: Literal[1, 4, 16]
    vectors_per_thread: int
    threads: int

    def __post_init__(self) -> None:
        if self.access_bytes not in (1, WORD_BYTES, VECTOR_BYTES):
            raise ValueError(f"access_bytes: must be 1, 4 or 16, got {self.access_bytes}")
        if self.vectors_per_thread < 1 or self.threads < 1 or self.threads > 1024:
            raise ValueError(f"not a permute config: {self}")

    @property
    def vectors_per_cta(self) -> int:
        return self.threads * self.vectors_per_thread


@lru_cache(maxsize=1024)
def choose_config(access_bytes: int, num_vectors: int, num_multiprocessors: int) -> PermuteConfig:
    """One small CTA an SM is quick; where there is more to do, more bytes a thread in flight."""
    if num_vectors <= 4 * 256 * num_multiprocessors:
        return PermuteConfig(access_bytes, 1, 128)
    return PermuteConfig(access_bytes, 4, 256)


def prepare_permute(x: Tensor, num_rows: int, get_compiled: GetCompiled) -> Launch:
    """out[r] = x[token_of_row[r]], zeros where that is -1.

    x: (T, C) any dtype, T and C >= 1, stride 1 along C. num_rows: R >= 1.
    get_compiled: from a ``PermuteConfig`` to what ``build`` returns for it.

    Returns launch(x, token_of_row (R,) int32, out (R, C) of the dtype of x), both contiguous, out
    at a multiple of 16 bytes.
    """
    row_bytes = x.shape[1] * x.itemsize
    # The stride of a single row means nothing.
    stride_bytes = x.stride(0) * x.itemsize if x.shape[0] > 1 else row_bytes
    together = row_bytes | stride_bytes | x.data_ptr()
    access_bytes = next(width for width in (VECTOR_BYTES, WORD_BYTES, 1) if together % width == 0)
    vectors_per_row = row_bytes // access_bytes
    config = choose_config(access_bytes, num_rows * vectors_per_row, num_multiprocessors(x.device))
    compiled = get_compiled(config)
    rows_per_slab = max(1, MAX_VECTORS // vectors_per_row)

    def launch(x: Tensor, token_of_row: Tensor, out: Tensor) -> None:
        compiled(
            token_of_row,
            x.data_ptr(),
            stride_bytes,
            out.data_ptr(),
            vectors_per_row,
            rows_per_slab,
        )

    return launch
