"""Weighted sums of expert rows, back in token order, each product and each sum rounded.

Portable CuTe DSL, bound by memory. The order of a token's sum is that of its slots: not of its
rows, of other tokens or of any schedule.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from nvfp4_ops.kernels.launch.combine_rows import CombineConfig
from nvfp4_ops.kernels.launch.tensors import WORD_BYTES
from nvfp4_ops.kernels.memory import DTYPES, follow_previous_kernel
from nvfp4_ops.kernels.permute_rows import divide


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
    The rows and weights of ``slots_in_flight`` slots are loaded before the first is added: two
    trips to memory, one for where the rows are. The second dimension of the grid are slabs of
    tokens, of less than 2^31 vectors each.

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
            # Else ptxas keeps to 32 registers, by loading each row right before it is added.
            min_blocks_per_mp=1,
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
        follow_previous_kernel()
        inside = in_slab and token < num_tokens
        # Threads past the end load the last token: no branch around the loads.
        token = cutlass.min(token, num_tokens - 1)
        rTotal = cute.make_rmem_tensor(cute.make_layout(size), Float32)
        rTotal.fill(0.0)
        for first in cutlass.range(0, top_k, config.slots_in_flight, unroll=1):
            rows, weights = self._load_slots(mSlots, mWeights, token * top_k, first, top_k)
            vectors = []
            for i in cutlass.range_constexpr(config.slots_in_flight):
                row = cutlass.max(rows[i], Int32(0))
                offset = Int64(row) * mRows.stride[0] + Int64(vector) * size
                vectors.append(self._load(mRows.iterator.toint() + offset * config.dtype.itemsize))
            for i in cutlass.range_constexpr(config.slots_in_flight):
                rX, weight = vectors[i], weights[i]
                # Adding 0 * 0 changes nothing, as no sum is -0.
                if rows[i] < 0:
                    rX.fill(0.0)
                    weight = Float32(0.0)
                values = rX.load().to(Float32)
                for j in cutlass.range_constexpr(size):
                    rTotal[j] = _add(rTotal[j], _multiply(values[j], weight))
        if inside:
            offset = Int64(token) * Int64(columns) + Int64(vector) * size
            rOut = cute.make_rmem_tensor(cute.make_layout(size), self.element)
            rOut.store(rTotal.load().to(self.element))
            target = self._vector_at(mOut.iterator.toint() + offset * config.dtype.itemsize)
            cute.autovec_copy(rOut, target)

    @cute.jit
    def _load_slots(
        self,
        mSlots: cute.Tensor,
        mWeights: cute.Tensor,
        first_slot: Int32,
        first: Int32,
        top_k: Int32,
    ) -> tuple[list, list]:
        """Row and weight of ``slots_in_flight`` slots of a token; row -1 past its last."""
        rows, weights = [], []
        for i in cutlass.range_constexpr(self.config.slots_in_flight):
            # Past the end the last slot again: no branch between the loads.
            slot = first_slot + cutlass.min(first + i, top_k - 1)
            rows.append(Int32(mSlots[slot]))
            weights.append(Float32(mWeights[slot]))
        for i in cutlass.range_constexpr(self.config.slots_in_flight):
            if first + i >= top_k:
                rows[i] = Int32(-1)
        return rows, weights

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
        align = config.access_bytes
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
