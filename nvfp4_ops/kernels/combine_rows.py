"""Weighted sums of expert rows, back in token order, each product and each sum rounded.

Portable CuTe DSL, bound by memory. The order of a token's sum is that of its slots: not of its
rows, of other tokens or of any schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor
from torch import Tensor

from nvfp4_ops.kernels.limits import num_multiprocessors
from nvfp4_ops.kernels.permute_rows import MAX_VECTORS, divide
from nvfp4_ops.kernels.swizzle_sf import VECTOR_BYTES, WORD_BYTES, GetCompiled

SLOTS_IN_FLIGHT = 4
DTYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
}


@dataclass(frozen=True)
class CombineConfig:
    """Static configuration.

    vectorized: 16 bytes an access, which must divide the length and the address of every row;
    else one element.
    """

    dtype: torch.dtype
    weight_dtype: torch.dtype
    vectorized: bool
    threads: int

    def __post_init__(self) -> None:
        for name in ("dtype", "weight_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name}: must be one of {list(DTYPES)}, got {self}")
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"threads: must be 1 to 1024, got {self.threads}")

    @property
    def vector_elements(self) -> int:
        return VECTOR_BYTES // self.dtype.itemsize if self.vectorized else 1


def _multiply(a: Float32, b: Float32) -> Float32:
    """Rounded by itself: with ``.rn`` it is never fused into the sum."""
    return cute.arch.inline_ptx(
        "mul.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b]
    )


def _add(a: Float32, b: Float32) -> Float32:
    return cute.arch.inline_ptx(
        "add.rn.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[a, b]
    )


class CombineKernel:
    """out[t] = sum over j of weights[t, j] * rows[row_of_slot[t, j]], j rising, -1 left out.

    A thread has one vector of one token; the vectors are dealt out in memory order, whatever H is.
    The rows of ``SLOTS_IN_FLIGHT`` slots are loaded before the first of them is added. The second
    dimension of the grid are slabs of tokens, of less than 2^31 vectors each.

    mSlots and mWeights are flat, slot j of token t at t * top_k + j.

    Limits: there is a row, which is what the slots of -1 read and do not use; T * top_k < 2^31.
    """

    def __init__(self, config: CombineConfig) -> None:
        self.config = config
        self.element = DTYPES[config.dtype]

    @cute.jit
    def __call__(
        self,
        mRows: cute.Tensor,
        mSlots: cute.Tensor,
        mWeights: cute.Tensor,
        mOut: cute.Tensor,
        top_k: Int32,
        tokens_per_slab: Int32,
        stream: cuda_driver.CUstream,
    ):
        num_tokens, columns = Int32(mOut.shape[0]), Int32(mOut.shape[1])
        vectors = cutlass.min(tokens_per_slab, num_tokens) * (
            columns // self.config.vector_elements
        )
        self.kernel(mRows, mSlots, mWeights, mOut, top_k, tokens_per_slab).launch(
            grid=[
                cute.ceil_div(vectors, self.config.threads),
                cute.ceil_div(num_tokens, tokens_per_slab),
                1,
            ],
            block=[self.config.threads, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(
        self,
        mRows: cute.Tensor,
        mSlots: cute.Tensor,
        mWeights: cute.Tensor,
        mOut: cute.Tensor,
        top_k: Int32,
        tokens_per_slab: Int32,
    ):
        config = self.config
        size = config.vector_elements
        cta, slab, _ = cute.arch.block_idx()
        num_tokens, columns = Int32(mOut.shape[0]), Int32(mOut.shape[1])
        token, vector = divide(cta * config.threads + cute.arch.thread_idx()[0], columns // size)
        in_slab = token < tokens_per_slab
        token = slab * tokens_per_slab + token
        cute.arch.griddepcontrol_wait()
        cute.arch.griddepcontrol_launch_dependents()
        if in_slab and token < num_tokens:
            rTotal = cute.make_rmem_tensor(cute.make_layout(size), Float32)
            rTotal.fill(0.0)
            for first in cutlass.range(0, top_k, SLOTS_IN_FLIGHT, unroll=1):
                rows, weights, vectors = [], [], []
                for i in cutlass.range_constexpr(SLOTS_IN_FLIGHT):
                    # Past the end the last slot again: no branch between the loads.
                    slot = token * top_k + cutlass.min(first + i, top_k - 1)
                    row = Int32(mSlots[slot])
                    if first + i >= top_k:
                        row = Int32(-1)
                    rows.append(row)
                    weights.append(Float32(mWeights[slot]))
                for i in cutlass.range_constexpr(SLOTS_IN_FLIGHT):
                    row = cutlass.max(rows[i], Int32(0))
                    address = (
                        mRows.iterator.toint()
                        + (Int64(row) * mRows.stride[0] + Int64(vector) * size)
                        * config.dtype.itemsize
                    )
                    vectors.append(self._load(address))
                for i in cutlass.range_constexpr(SLOTS_IN_FLIGHT):
                    if rows[i] >= 0:
                        rX = vectors[i].load().to(Float32)
                        for j in cutlass.range_constexpr(size):
                            rTotal[j] = _add(rTotal[j], _multiply(rX[j], weights[i]))
            address = (
                mOut.iterator.toint()
                + (Int64(token) * Int64(columns) + Int64(vector) * size) * config.dtype.itemsize
            )
            rOut = cute.make_rmem_tensor(cute.make_layout(size), self.element)
            rOut.store(rTotal.load().to(self.element))
            cute.autovec_copy(rOut, self._vector_at(address))

    def _vector_at(self, address: Int64) -> cute.Tensor:
        size = self.config.vector_elements
        pointer = cute.make_ptr(
            self.element,
            address,
            cute.AddressSpace.gmem,
            assumed_align=size * self.config.dtype.itemsize,
        )
        return cute.make_tensor(pointer, cute.make_layout(size))

    @cute.jit
    def _load(self, address: Int64) -> cute.Tensor:
        rX = cute.make_rmem_tensor(cute.make_layout(self.config.vector_elements), self.element)
        cute.autovec_copy(self._vector_at(address), rX)
        return rX

    def compile(self, options: str = "") -> Callable[..., None]:
        config = self.config
        num_slots = cute.sym_int32()
        columns = cute.sym_int32(divisibility=config.vector_elements)
        align = VECTOR_BYTES if config.vectorized else config.dtype.itemsize
        return cute.compile(
            self,
            # No divisibility: the stride of a single row means nothing.
            make_fake_tensor(
                self.element,
                (cute.sym_int32(), columns),
                (cute.sym_int64(), 1),
                assumed_align=align,
            ),
            make_fake_compact_tensor(Int32, (num_slots,), assumed_align=WORD_BYTES),
            make_fake_compact_tensor(
                DTYPES[config.weight_dtype],
                (num_slots,),
                assumed_align=config.weight_dtype.itemsize,
            ),
            make_fake_compact_tensor(
                self.element,
                (cute.sym_int32(), columns),
                stride_order=(1, 0),
                assumed_align=align,
            ),
            Int32(1),
            Int32(1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: CombineConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return CombineKernel(config).compile(options)


# Made once: an eager call has microseconds to spend.
_config = lru_cache(CombineConfig)


def choose_config(
    rows: Tensor, weight_dtype: torch.dtype, out: Tensor, num_multiprocessors: int
) -> CombineConfig:
    row_stride = rows.stride(0) if rows.shape[0] > 1 else 0
    together = (row_stride | rows.shape[1]) * rows.itemsize | rows.data_ptr() | out.data_ptr()
    vectorized = together % VECTOR_BYTES == 0
    # Few tokens: more and smaller CTAs, for more multiprocessors to have a part.
    few = out.numel() * out.itemsize <= 256 * VECTOR_BYTES * num_multiprocessors
    return _config(rows.dtype, weight_dtype, vectorized, 64 if few else 256)


def launch_combine(
    *,
    rows: Tensor,
    row_of_slot: Tensor,
    top_k_weights: Tensor,
    out: Tensor,
    get_compiled: GetCompiled,
) -> None:
    """out[t] = sum over j of top_k_weights[t, j] * rows[row_of_slot[t, j]]; see ``combine``.

    rows: (R, H) bf16, fp16 or fp32, R and H >= 1, stride 1 along H. row_of_slot: (T, top_k)
    int32, contiguous, both >= 1. top_k_weights: (T, top_k) fp32, bf16 or fp16, contiguous.
    out: (T, H) of the dtype of rows, contiguous.
    get_compiled: from a ``CombineConfig`` to what ``build`` returns for it.
    """
    config = choose_config(rows, top_k_weights.dtype, out, num_multiprocessors(rows.device))
    vectors_per_token = rows.shape[1] // config.vector_elements
    tokens_per_slab = max(1, MAX_VECTORS // vectors_per_token)
    # Flat: the stride of a single token or slot means nothing.
    slots, weights = row_of_slot.view(-1), top_k_weights.view(-1)
    get_compiled(config)(rows, slots, weights, out, row_of_slot.shape[1], tokens_per_slab)
