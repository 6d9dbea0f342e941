"""The experts of a token by softmax or sigmoid scores, and their weights, in one launch.

Portable CuTe DSL. In fp64 like the reference, so that rounding chooses nobody: a token's scores
are few, and what a launch costs is more than what they do.
"""

from collections.abc import Callable

import cuda.bindings.driver as cuda_driver
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Float64, Int32, Int64, Uint32, Uint64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream

from nvfp4_ops.kernels.float64 import exp, key_of, value_of, warp_largest, warp_sum
from nvfp4_ops.kernels.launch.choose_experts import (
    EXPERTS_SCORING_A_GROUP,
    RENORMALIZE_EPSILON,
    WARPS,
    ChooseConfig,
)
from nvfp4_ops.kernels.launch.tensors import WARP
from nvfp4_ops.kernels.memory import DTYPES, follow_previous_kernel


class ChooseKernel:
    """index, weights = softmax_top_k(logits) or sigmoid_top_k(logits, bias, ...).

    A warp has a token, a lane the experts lane, lane + 32, ... as 64-bit keys that order scores.
    Each choice is the largest key of the warp, which its lane then takes out: key 0. Lane j keeps
    choice j and weighs it.

    Limits: 1024 experts, 32 choices, 32 groups.
    """

    def __init__(self, config: ChooseConfig) -> None:
        self.config = config

    @cute.jit
    def __call__(
        self,
        mLogits: cute.Tensor,
        mBias: cute.Tensor | None,
        mIndex: cute.Tensor,
        mWeights: cute.Tensor,
        num_groups: Int32,
        top_groups: Int32,
        scaling_factor: Float64,
        stream: cuda_driver.CUstream,
    ):
        self.kernel(
            mLogits, mBias, mIndex, mWeights, num_groups, top_groups, scaling_factor
        ).launch(
            grid=[cute.ceil_div(Int32(mLogits.shape[0]), WARPS), 1, 1],
            block=[WARPS * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    @cute.kernel
    def kernel(
        self,
        mLogits: cute.Tensor,
        mBias: cute.Tensor | None,
        mIndex: cute.Tensor,
        mWeights: cute.Tensor,
        num_groups: Int32,
        top_groups: Int32,
        scaling_factor: Float64,
    ):
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        token = cute.arch.block_idx()[0] * WARPS + warp
        num_tokens, num_experts = Int32(mLogits.shape[0]), Int32(mLogits.shape[1])
        top_k = Int32(mIndex.shape[1])
        follow_previous_kernel()
        if token < num_tokens:
            rLogits = self._load(mLogits, token, lane, num_experts)
            rKeys = cute.make_rmem_tensor(cute.make_layout(self.config.experts_per_lane), Uint64)
            for i in cutlass.range_constexpr(self.config.experts_per_lane):
                expert = lane + i * WARP
                rKeys[i] = Uint64(0)
                if expert < num_experts:
                    rKeys[i] = key_of(self._score(rLogits[i], mBias, expert))
            if cutlass.const_expr(self.config.grouped):
                self._leave_groups(rKeys, lane, num_experts, num_groups, top_groups)
            chosen, largest = Int32(0), Float64(0.0)
            for choice in cutlass.range(top_k, unroll=1):
                key, best = self._take_largest(rKeys, lane)
                if choice == 0:
                    largest = value_of(key)
                if lane == choice:
                    chosen = best
            # Lanes without a choice weigh expert 0, and do not tell.
            logit = Float64(Float32(mLogits[token, chosen]))
            weight = self._weigh(rLogits, largest, logit, lane, top_k, num_experts)
            if lane < top_k:
                mIndex[token, lane] = Int64(chosen)
                mWeights[token, lane] = Float32(weight * scaling_factor)

    @cute.jit
    def _load(self, mLogits: cute.Tensor, token: Int32, lane: Int32, num_experts: Int32):
        """This lane's logits; -Inf past the last expert."""
        rLogits = cute.make_rmem_tensor(cute.make_layout(self.config.experts_per_lane), Float32)
        rLogits.fill(-float("inf"))
        for i in cutlass.range_constexpr(self.config.experts_per_lane):
            expert = lane + i * WARP
            if expert < num_experts:
                rLogits[i] = Float32(mLogits[token, expert])
        return rLogits

    @cute.jit
    def _score(self, logit: Float32, mBias: cute.Tensor | None, expert: Int32) -> Float64:
        """What an expert is chosen by."""
        score = Float64(logit)
        if cutlass.const_expr(self.config.rule == "sigmoid"):
            score = _sigmoid(score)
            if cutlass.const_expr(mBias is not None):
                score = score + Float64(Float32(mBias[expert]))
        return score

    @cute.jit
    def _take_largest(self, rKeys: cute.Tensor, lane: Int32):
        """The warp's largest key and its expert, the lowest of several; it is then taken out."""
        key, own = Uint64(rKeys[0]), lane
        for i in cutlass.range_constexpr(1, self.config.experts_per_lane):
            if Uint64(rKeys[i]) > key:
                key, own = Uint64(rKeys[i]), lane + i * WARP
        key, best = warp_largest(key, own)
        for i in cutlass.range_constexpr(self.config.experts_per_lane):
            if best == lane + i * WARP:
                rKeys[i] = Uint64(0)
        return key, best

    @cute.jit
    def _leave_groups(
        self,
        rKeys: cute.Tensor,
        lane: Int32,
        num_experts: Int32,
        num_groups: Int32,
        top_groups: Int32,
    ):
        """Experts outside of the best groups come to have the score -Inf."""
        group_size = num_experts // num_groups
        rGroup = cute.make_rmem_tensor(cute.make_layout(self.config.experts_per_lane), Uint64)
        # Lane g has the key of group g's score, the sum of its two best.
        group_key = Uint64(0)
        for group in cutlass.range(num_groups, unroll=1):
            for i in cutlass.range_constexpr(self.config.experts_per_lane):
                rGroup[i] = rKeys[i]
                if not _is_in_group(lane + i * WARP, group, group_size):
                    rGroup[i] = Uint64(0)
            score = Float64(0.0)
            for _ in cutlass.range_constexpr(EXPERTS_SCORING_A_GROUP):
                key, _ = self._take_largest(rGroup, lane)
                score = score + value_of(key)
            if lane == group:
                group_key = key_of(score)
        chosen = Uint32(0)
        for _ in cutlass.range(top_groups, unroll=1):
            _, best = warp_largest(group_key, lane)
            chosen = chosen | (Uint32(1) << Uint32(best))
            if lane == best:
                group_key = Uint64(0)
        for group in cutlass.range(num_groups, unroll=1):
            if (chosen >> Uint32(group)) & Uint32(1) == Uint32(0):
                for i in cutlass.range_constexpr(self.config.experts_per_lane):
                    if _is_in_group(lane + i * WARP, group, group_size):
                        rKeys[i] = key_of(Float64(-float("inf")))

    @cute.jit
    def _weigh(
        self,
        rLogits: cute.Tensor,
        largest: Float64,
        logit: Float64,
        lane: Int32,
        top_k: Int32,
        num_experts: Int32,
    ) -> Float64:
        """Weight of this lane's choice, of which ``logit`` is; largest: of all logits."""
        if cutlass.const_expr(self.config.rule == "sigmoid"):
            weight = _sigmoid(logit)
        else:
            total = Float64(0.0)
            for i in cutlass.range_constexpr(self.config.experts_per_lane):
                if lane + i * WARP < num_experts:
                    total = total + exp(Float64(rLogits[i]) - largest)
            weight = exp(logit - largest) / warp_sum(total)
        if cutlass.const_expr(self.config.renormalize):
            chosen = Float64(0.0)
            if lane < top_k:
                chosen = weight
            total_chosen = warp_sum(chosen)
            if cutlass.const_expr(self.config.rule == "sigmoid"):
                total_chosen = total_chosen + Float64(RENORMALIZE_EPSILON)
            weight = weight / total_chosen
        return weight

    def compile(self, options: str = "") -> Callable[..., None]:
        config = self.config
        tokens, experts, choices = (cute.sym_int32() for _ in range(3))

        def matrix(dtype: type, columns: cute.SymInt) -> cute.Tensor:
            return make_fake_compact_tensor(dtype, (tokens, columns), stride_order=(1, 0))

        return cute.compile(
            self,
            matrix(DTYPES[config.dtype], experts),
            None
            if config.bias is None
            else make_fake_compact_tensor(DTYPES[config.bias], (experts,)),
            matrix(Int64, choices),
            matrix(Float32, choices),
            Int32(1),
            Int32(1),
            Float64(1.0),
            make_fake_stream(use_tvm_ffi_env_stream=True),
            options=f"--enable-tvm-ffi {options}",
        )


def _sigmoid(value: Float64) -> Float64:
    return Float64(1.0) / (Float64(1.0) + exp(-value))


@cute.jit
def _is_in_group(expert: Int32, group: Int32, group_size: Int32) -> cutlass.Boolean:
    first = group * group_size
    return first <= expert and expert < first + group_size


def build(config: ChooseConfig, options: str = "") -> Callable[..., None]:
    """Compile for ``CUTE_DSL_ARCH`` or the present GPU; called with torch tensors."""
    return ChooseKernel(config).compile(options)
