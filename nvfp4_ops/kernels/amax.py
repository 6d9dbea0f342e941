"""Dynamic global scales: the largest magnitude of each row, or of all, over 2688.

Portable CuTe DSL, bound by reading. A maximum does not depend on the order, so the result is the
same bits in every run. Not for weights, whose scales are made offline.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32
from cutlass.cute.runtime import make_fake_stream

from nvfp4_ops import format as nvfp4
from nvfp4_ops.kernels.blocks import FloatWords
from nvfp4_ops.kernels.launch.amax import VECTORS_PER_LANE, AmaxConfig
from nvfp4_ops.kernels.launch.tensors import VECTOR_BYTES, WARP, WORD_BYTES
from nvfp4_ops.kernels.memory import fake_rows, fake_vector, follow_previous_kernel, ptx, vector_at

WORDS = VECTOR_BYTES // WORD_BYTES


def global_scale_of(amax: Float32) -> Float32:
    """amax / 2688, correctly rounded and at least 2^-126; 1 where amax is 0 or Inf, NaN of NaN."""
    divisor = Float32(nvfp4.GLOBAL_SCALE_DIVISOR)
    quotient = ptx("div.rn.f32 {$w0}, {$r0}, {$r1};", Float32, amax, divisor)
    scale = cute.arch.fmax(quotient, nvfp4.GLOBAL_SCALE_MIN, nan=True)
    return _one_where_zero_or_inf(amax, scale)


@cute.jit
def _one_where_zero_or_inf(amax: Float32, scale: Float32) -> Float32:
    if amax == 0.0 or amax == Float32(float("inf")):
        scale = Float32(1.0)
    return scale


@cute.jit
def warps_amax(amax: Float32, num_warps: cutlass.Constexpr[int], warps: cutlass.Constexpr[int]):
    """Largest ``amax`` of the lanes of ``num_warps`` neighbouring warps, NaN where there is one.

    Collective of the CTA's ``warps`` warps where ``num_warps`` > 1.
    """
    for step in cutlass.range_constexpr(5):
        other = cute.arch.shuffle_sync_bfly(amax, 1 << step)
        amax = cute.arch.fmax(amax, other, nan=True)
    if cutlass.const_expr(num_warps > 1):
        smem = cutlass.memory.SmemAllocator()
        sAmax = smem.allocate_tensor(Float32, cute.make_layout(warps), byte_alignment=16)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if cute.arch.lane_idx() == 0:
            sAmax[warp] = amax
        cute.arch.sync_threads()
        first = warp // num_warps * num_warps
        for i in cutlass.range_constexpr(num_warps):
            amax = cute.arch.fmax(amax, Float32(sAmax[first + i]), nan=True)
    return amax


class AmaxKernel:
    """scale[r] = global_scale(x[r]), or part[c] = amax of the c-th share of x.

    A lane has ``VECTORS_PER_LANE`` loads of 16 bytes in flight; maxima are taken on packed pairs,
    then over lanes by shuffles and over warps in shared memory.

    Limits: rows start at multiples of 16 bytes, K is a multiple of 16.
    """

    def __init__(self, config: AmaxConfig) -> None:
        warps = config.threads // WARP
        if config.threads % WARP or not 0 < warps <= WARP:
            raise ValueError(f"threads: must be whole warps, up to 1024, got {config.threads}")
        if config.of not in ("row", "part") or warps % config.row_warps:
            raise ValueError(f"not an amax config: {config}")
        self.config, self.warps = config, warps
        self.words = FloatWords(config.dtype)

    @cute.jit
    def __call__(
        self, mX: cute.Tensor, mOut: cute.Tensor, grid: Int32, stream: cuda_driver.CUstream
    ):
        self.kernel(mX, mOut).launch(
            grid=[grid, 1, 1], block=[self.config.threads, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, mX: cute.Tensor, mOut: cute.Tensor):
        config, cta = self.config, cute.arch.block_idx()[0]
        warp, lane = cute.arch.make_warp_uniform(cute.arch.warp_idx()), cute.arch.lane_idx()
        follow_previous_kernel()
        if cutlass.const_expr(config.of == "part"):
            first, stride = cta * config.threads + warp * WARP + lane, cute.arch.grid_dim()[0]
            amax = self._amax_of_row(mX, Int32(0), first, stride * config.threads)
            amax = warps_amax(amax, self.warps, self.warps)
            if warp == 0 and lane == 0:
                mOut[cta] = amax
        else:
            # The CTA reduces together, so warps past the last row take part.
            row = cta * (self.warps // config.row_warps) + warp // config.row_warps
            amax = Float32(0.0)
            if row < Int32(mX.shape[0]):
                first = warp % config.row_warps * WARP + lane
                amax = self._amax_of_row(mX, row, first, Int32(config.row_warps * WARP))
            amax = warps_amax(amax, config.row_warps, self.warps)
            if row < Int32(mX.shape[0]) and warp % config.row_warps == 0 and lane == 0:
                mOut[row] = global_scale_of(amax)

    @cute.jit
    def _amax_of_row(self, mX: cute.Tensor, row: Int32, first: Int32, stride: Int32) -> Float32:
        """Of vectors first, first + stride, ... of a row."""
        num_vectors = Int32(Int64(mX.shape[1]) * self.words.element_bytes // VECTOR_BYTES)
        base = mX.iterator.toint() + Int64(row) * (mX.stride[0] * self.words.element_bytes)
        rMax = cute.make_rmem_tensor(cute.make_layout(WORDS), Uint32)
        rMax.fill(0)
        for start in cutlass.range(first, num_vectors, stride * VECTORS_PER_LANE, unroll=1):
            vectors = []
            for i in cutlass.range_constexpr(VECTORS_PER_LANE):
                # Past the end this lane's first vector counts once more.
                vector = start + i * stride
                if vector >= num_vectors:
                    vector = start
                rX = cute.make_rmem_tensor(cute.make_layout(WORDS), Uint32)
                cute.autovec_copy(vector_at(base + Int64(vector) * VECTOR_BYTES, WORDS), rX)
                vectors.append(rX)
            for rX in vectors:
                absolute = self.words.absolute([rX[j] for j in range(WORDS)])
                for j in cutlass.range_constexpr(WORDS):
                    rMax[j] = self.words.larger(rMax[j], absolute[j])
        return self.words.amax([rMax[j] for j in range(WORDS)])

    def compile(self, options: str = "") -> Callable[..., None]:
        return cute.compile(
            self,
            fake_rows(self.config.dtype),
            fake_vector(Float32),
            Int32(1),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def build(config: AmaxConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return AmaxKernel(config).compile(options)
