"""Launch of ``combine_rows``."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nvfp4_ops.kernels.launch.permute_rows import MAX_VECTORS
from nvfp4_ops.kernels.launch.tensors import FLOAT_DTYPES, VECTOR_BYTES, GetCompiled, Launch
from nvfp4_ops.kernels.limits import num_multiprocessors

# Of an access where there is little to do: more threads, each with less to add up.
NARROW_BYTES = 8

# Vectors of 16 bytes a multiprocessor below which accesses are narrow, and CTAs small.
NARROW_VECTORS_PER_SM, FEW_VECTORS_PER_SM = 64, 256


@dataclass(frozen=True)
class CombineConfig:
    """Static configuration.

    access_bytes: 16, 8 or one element; divides the length and the address of every row.
    slots_in_flight: rows that a thread loads before it adds the first of them.
    """

    dtype: torch.dtype
    weight_dtype: torch.dtype
    access_bytes: int
    slots_in_flight: int
    threads: int

    def __post_init__(self) -> None:
        for name in ("dtype", "weight_dtype"):
            if getattr(self, name) not in FLOAT_DTYPES:
                raise ValueError(f"{name}: must be one of {list(FLOAT_DTYPES)}, got {self}")
        widths = (self.dtype.itemsize, NARROW_BYTES, VECTOR_BYTES)
        if self.access_bytes not in widths:
            raise ValueError(f"access_bytes: must be in {widths}, got {self.access_bytes}")
        if self.slots_in_flight < 1 or not 1 <= self.threads <= 1024:
            raise ValueError(f"not a combine config: {self}")

    @property
    def vector_elements(self) -> int:
        return self.access_bytes // self.dtype.itemsize


# Made once: an eager call has microseconds to spend.
_config = lru_cache(CombineConfig)


def choose_config(
    rows: Tensor, weight_dtype: torch.dtype, top_k: int, num_tokens: int, multiprocessors: int
) -> CombineConfig:
    row_stride = rows.stride(0) if rows.shape[0] > 1 else 0
    together = (row_stride | rows.shape[1]) * rows.itemsize | rows.data_ptr()
    # Few tokens: more and smaller CTAs, for more multiprocessors to have a part.
    out_bytes = num_tokens * rows.shape[1] * rows.itemsize
    vectors_per_sm = out_bytes // VECTOR_BYTES // multiprocessors
    access_bytes = rows.itemsize
    if together % NARROW_BYTES == 0 and vectors_per_sm < NARROW_VECTORS_PER_SM:
        access_bytes = NARROW_BYTES
    elif together % VECTOR_BYTES == 0:
        access_bytes = VECTOR_BYTES
    threads = 64 if vectors_per_sm < FEW_VECTORS_PER_SM else 256
    return _config(rows.dtype, weight_dtype, access_bytes, 8 if top_k > 4 else 4, threads)


def prepare_combine(
    rows: Tensor, num_tokens: int, top_k: int, weight_dtype: torch.dtype, get_compiled: GetCompiled
) -> Launch:
    """out[t] = sum over j of top_k_weights[t, j] * rows[row_of_slot[t, j]]; see ``combine``.

    rows: (R, H) bf16, fp16 or fp32, R and H >= 1, stride 1 along H. num_tokens, top_k: >= 1.
    get_compiled: from a ``CombineConfig`` to what ``build`` returns for it.

    Returns launch(rows, row_of_slot (T, top_k) int32, top_k_weights (T, top_k) of weight_dtype,
    out (T, H) of the dtype of rows), all but rows contiguous, out at a multiple of 16 bytes.
    """
    multiprocessors = num_multiprocessors(rows.device)
    config = choose_config(rows, weight_dtype, top_k, num_tokens, multiprocessors)
    compiled = get_compiled(config)
    tokens_per_slab = max(1, MAX_VECTORS // (rows.shape[1] // config.vector_elements))

    def launch(rows: Tensor, row_of_slot: Tensor, top_k_weights: Tensor, out: Tensor) -> None:
        # Flat: the stride of a single token or slot means nothing.
        slots, weights = row_of_slot.ravel(), top_k_weights.ravel()
        compiled(rows, slots, weights, out, top_k, tokens_per_slab)

    return launch
