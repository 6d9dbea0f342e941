"""Scores of a few tokens for all experts: x @ weight.T, summed in fp64 and rounded once.

Portable CuTe DSL. Bound by what a launch and one trip to memory take; not for many tokens.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops.kernels.blocks import FloatWords
from nvfp4_ops.kernels.float64 import fma, warp_sum
from nvfp4_ops.kernels.launch.router_logits import THREADS, VECTOR_ELEMENTS, RouterLogitsConfig
from nvfp4_ops.kernels.launch.tensors import VECTOR_BYTES, WARP, WORD_BYTES
from nvfp4_ops.kernels.memory import DTYPES, follow_previous_kernel, vector_at

_WARPS = THREADS // WARP
# Sums of a token side by side: the next product need not wait for the last.
_CHAINS = 2


class RouterLogitsKernel:
    """logits[t, e] = sum over h of x[t, h] * weight[e, h].

    A CTA has an expert's row and up to ``tokens`` tokens, a thread every 128th vector of 8 elements
    of each. The order of a sum depends on H alone: not on how many tokens there are.
    """

    def __init__(self, config: RouterLogitsConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mWeight: cute.Tensor,
        mLogits: cute.Tensor,
        stream: cuda_driver.CUstream,
    ):
        num_tokens, num_experts = mLogits.shape
        self.kernel(mX, mWeight, mLogits).launch(
            grid=[Int32(num_experts), cute.ceil_div(Int32(num_tokens), self.config.tokens), 1],
            block=[THREADS, 1, 1],
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mWeight: cute.Tensor, mLogits: cute.Tensor):
        config = self.config
        expert, tile, _ = cute.arch.block_idx()
        thread, lane = cute.arch.thread_idx()[0], cute.arch.lane_idx()
        num_tokens, hidden = Int32(mX.shape[0]), Int32(mX.shape[1])
        first_token = tile * config.tokens
        smem = cutlass.memory.SmemAllocator()
        layout = cute.make_layout((config.tokens, _WARPS))
        sSums = smem.allocate_tensor(Float64, layout, byte_alignment=VECTOR_BYTES)
        rSums = cute.make_rmem_tensor(cute.make_layout((config.tokens, _CHAINS)), Float64)
        rSums.fill(0.0)
        follow_previous_kernel()
        # Few tokens: more vectors in flight, as far as registers allow.
        unroll = max(1, 4 // config.tokens)
        for vector in cutlass.range(thread, hidden // VECTOR_ELEMENTS, THREADS, unroll=unroll):
            weights = self._load(mWeight, config.weight_dtype, expert, vector)
            for t in cutlass.range_constexpr(config.tokens):
                # Past the last token the last again: no branch between the loads.
                token = cutlass.min(first_token + t, num_tokens - 1)
                x = self._load(mX, config.dtype, token, vector)
                for i in cutlass.range_constexpr(VECTOR_ELEMENTS):
                    chain = i % _CHAINS
                    rSums[t, chain] = fma(x[i], weights[i], rSums[t, chain])
        for t in cutlass.range_constexpr(config.tokens):
            total = warp_sum(rSums[t, 0] + rSums[t, 1])
            if lane == 0:
                sSums[t, thread // WARP] = total
        cute.arch.sync_threads()
        if thread < config.tokens and first_token + thread < num_tokens:
            total = Float64(0.0)
            for warp in cutlass.range_constexpr(_WARPS):
                total = total + sSums[thread, warp]
            mLogits[first_token + thread, expert] = Float32(total)

    def _load(self, mRows: cute.Tensor, dtype, row: Int32, vector: Int32) -> list[Float64]:
        size = VECTOR_ELEMENTS * dtype.itemsize
        row_bytes = Int64(mRows.shape[1]) * dtype.itemsize
        address = mRows.iterator.toint() + Int64(row) * row_bytes + Int64(vector) * size
        rWords = cute.make_rmem_tensor(cute.make_layout(size // WORD_BYTES), cutlass.Uint32)
        cute.autovec_copy(vector_at(address, size // WORD_BYTES), rWords)
        words = [rWords[i] for i in range(size // WORD_BYTES)]
        return [Float64(value) for value in FloatWords(dtype).unpack(words)]

    def compile(self, options: str = "") -> Callable[..., None]:
        config, tokens, experts = self.config, cute.sym_int32(), cute.sym_int32()
        hidden = cute.sym_int32(divisibility=VECTOR_ELEMENTS)

        def rows(dtype: type, count: cute.SymInt) -> cute.Tensor:
            return make_fake_compact_tensor(
                dtype, (count, hidden), stride_order=(1, 0), assumed_align=VECTOR_BYTES
            )

        return cute.compile(
            self,
            rows(DTYPES[config.dtype], tokens),
            rows(DTYPES[config.weight_dtype], experts),
            make_fake_compact_tensor(Float32, (tokens, experts), stride_order=(1, 0)),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: RouterLogitsConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return RouterLogitsKernel(config).compile(options)
