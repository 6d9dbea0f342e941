"""Gather rows by index: out[r] = x[token_of_row[r]], bytes of any meaning, zeros for -1.

Portable CuTe DSL, bound by memory. Not for arithmetic on rows: ``combine_rows`` adds them up.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint8, Uint32
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops.kernels.launch.permute_rows import PermuteConfig
from nvfp4_ops.kernels.launch.tensors import WORD_BYTES
from nvfp4_ops.kernels.memory import follow_previous_kernel


@cute.jit
def divide(value: Int32, divisor: Int32):
    """Quotient and remainder of numbers >= 0."""
    quotient = Int32(Uint32(value) // Uint32(divisor))
    return quotient, value - quotient * divisor


class PermuteKernel:
    """out[r] = x[token_of_row[r]] where that is >= 0, else 0; rows as vectors of access_bytes.

    The vectors of the output are dealt to the threads in memory order, whatever the length of a
    row: stores are contiguous, loads contiguous within a row. The second dimension of the grid
    are slabs of rows, of less than 2^31 vectors each.

    Limits: x has a row, which is what the rows of -1 read and do not use.
    """

    def __init__(self, config: PermuteConfig) -> None:
        self.config = config
        self.is_bytes = config.access_bytes == 1
        self.element = Uint8 if self.is_bytes else Uint32
        self.num_elements = 1 if self.is_bytes else config.access_bytes // WORD_BYTES

    @cute.jit
    def __call__(
        self,
        mTokens: cute.Tensor,
        source: Int64,
        row_stride: Int64,
        target: Int64,
        vectors_per_row: Int32,
        rows_per_slab: Int32,
        stream: cuda_driver.CUstream,
    ):
        num_rows = Int32(mTokens.shape[0])
        slab = cutlass.min(rows_per_slab, num_rows) * vectors_per_row
        self.kernel(mTokens, source, row_stride, target, vectors_per_row, rows_per_slab).launch(
            grid=[
                cute.ceil_div(slab, self.config.vectors_per_cta),
                cute.ceil_div(num_rows, rows_per_slab),
                1,
            ],
            block=[self.config.threads, 1, 1],
            stream=stream,
            use_pdl=True,
            # Else ptxas saves registers by loading the last vector after the first stores.
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        mTokens: cute.Tensor,
        source: Int64,
        row_stride: Int64,
        target: Int64,
        vectors_per_row: Int32,
        rows_per_slab: Int32,
    ):
        config = self.config
        cta, slab, _ = cute.arch.block_idx()
        first = cta * config.vectors_per_cta + cute.arch.thread_idx()[0]
        first_row = slab * rows_per_slab
        num_rows = cutlass.min(Int32(mTokens.shape[0]) - first_row, rows_per_slab)
        width = config.access_bytes
        rows, cols, tokens, vectors = [], [], [], []
        for i in cutlass.range_constexpr(config.vectors_per_thread):
            row, col = divide(first + i * config.threads, vectors_per_row)
            rows.append(row)
            cols.append(col)
        follow_previous_kernel()
        for i in cutlass.range_constexpr(config.vectors_per_thread):
            # Past the end the last row again: no branch between the loads.
            tokens.append(Int32(mTokens[first_row + cutlass.min(rows[i], num_rows - 1)]))
        for i in cutlass.range_constexpr(config.vectors_per_thread):
            token = cutlass.max(tokens[i], Int32(0))
            rX = cute.make_rmem_tensor(cute.make_layout(self.num_elements), self.element)
            address = source + Int64(token) * row_stride + Int64(cols[i]) * width
            cute.autovec_copy(self._vector_at(address), rX)
            vectors.append(rX)
        for i in cutlass.range_constexpr(config.vectors_per_thread):
            rX = vectors[i]
            if tokens[i] < 0:
                rX.fill(0)
            if rows[i] < num_rows:
                before = Int64(first_row + rows[i]) * Int64(vectors_per_row)
                gX = self._vector_at(target + (before + Int64(cols[i])) * width)
                cute.autovec_copy(rX, gX)

    def _vector_at(self, address: Int64) -> cute.Tensor:
        pointer = cute.make_ptr(
            self.element,
            address,
            cute.AddressSpace.gmem,
            assumed_align=self.config.access_bytes,
        )
        return cute.make_tensor(pointer, cute.make_layout(self.num_elements))

    def compile(self, options: str = "") -> Callable[..., None]:
        return cute.compile(
            self,
            make_fake_compact_tensor(Int32, (cute.sym_int32(),), assumed_align=WORD_BYTES),
            Int64(0),
            Int64(0),
            Int64(0),
            Int32(1),
            Int32(1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: PermuteConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with a torch tensor and numbers."""
    return PermuteKernel(config).compile(options)
