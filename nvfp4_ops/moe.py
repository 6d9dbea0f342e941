"""NVFP4MoE: the experts of a Mixture-of-Experts layer with NVFP4 weights, as one nn.Module.

T tokens, K = top_k, R = T * K routed rows, E experts, D hidden, F intermediate (suffixes of the
tensor names below). Flow: sort by expert -> permute (and round to NVFP4) -> grouped mm gate_up with
the activation -> (round) -> grouped mm down -> combine. Every step is one op, so that a compiled
graph computes the very bits of eager mode.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from nvfp4_ops import format as nvfp4
from nvfp4_ops.activation import Activation
from nvfp4_ops.calibration import AmaxObserver
from nvfp4_ops.operand import ActivationScale, check_activation_scale, make_operand
from nvfp4_ops.plans import Plans, record
from nvfp4_ops.projection import ExpertProjection
from nvfp4_ops.registry import check_shape, is_plain, is_planned
from nvfp4_ops.routing import combine, sort_by_expert
from nvfp4_ops.weight import quantize_weight

_FUSED = {
    ("silu", True): "silu_mul",
    ("silu", False): "silu",
    ("gelu_tanh", True): "gelu_tanh_mul",
    ("gelu_tanh", False): "gelu_tanh",
    ("relu2", True): "relu2_mul",
    ("relu2", False): "relu2",
    ("swiglu_oai", True): "swiglu_oai",
}
_NO_ACTIVATION = Activation()
_PLANS = Plans(num_tensors=15)
"""Of all layers: x, index and weights, and the state of both projections."""
_MAX_PLANNED_TOKENS = 1024
"""With more the GPU is behind the host anyway; a plan holds all intermediates to its end."""


class NVFP4MoE(nn.Module):
    """Experts with NVFP4 weights: a drop-in for the experts module of Hugging Face models.

    y[t] = sum over j of top_k_weights[t, j] * down_e(act(gate_up_e(x[t]))), e = top_k_index[t, j]

    Args:
        hidden_size, intermediate_size: D and F, multiples of 16.
        num_experts: E of this rank.
        activation: "silu", "gelu_tanh", "relu2" or "swiglu_oai" (fused, evaluated before any
            rounding), or a callable (R, 2F) -> (R, F) that runs on the rounded output of gate_up.
        activation_limit: clamp of silu (DeepSeek-V4) and swiglu_oai (default 7.0).
        activation_scale: how activations are quantized. None: not at all (weight-only).
            "per_token": global scale from each row's amax. "per_tensor": from the batch's amax.
            "static": the checkpoint's input scales, the largest of all experts for gate_up, each
            expert's own for down. Can be assigned later.
        gated: the first projection has 2F rows, gate first; False: F rows (Nemotron-H).
        bias: each projection adds a bias.
        router: module (T, D) -> (top_k_index, top_k_weights); then forward takes hidden states
            alone. ``nvfp4_ops.SoftmaxRouter`` and ``SigmoidRouter`` fit.
        device, dtype: of the new buffers; dtype is that of the biases only.

    Submodules: ``gate_up_proj`` (N = 2F, K = D; global scales (E, 2), the gate's and the up
    projection's own) or, without a gate, ``up_proj`` (N = F); ``down_proj`` (N = D, K = F). See
    ExpertProjection for the tensors they keep: the state dict is in canonical (ModelOpt) layout.

    Memory of a forward pass on Hopper beside weights, input and result, whatever the routing, for
    T tokens in R = T * top_k rows: rows of D and of F elements, R (D + F) of the dtype of
    hidden_states at once (W4A4: R (D + 2F)), and 8 R + 4 E bytes of routing (W4A4 per token: 4 R
    more for scales; beyond 4096 rows 4 E for each 1024 to 8192 rows while they are sorted).

    Without weights loaded the module multiplies by zero. For inference: backward raises.

    Raises:
        ValueError: an argument is out of range.
    """

    down_proj: ExpertProjection

    def __init__(  # noqa: PLR0913 - an expert layer has this many properties
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        *,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        activation_limit: float | None = None,
        activation_scale: ActivationScale | None = None,
        gated: bool = True,
        bias: bool = False,
        router: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        for name, size in (
            ("hidden_size", hidden_size),
            ("intermediate_size", intermediate_size),
        ):
            if size < 1 or size % nvfp4.BLOCK_SIZE:
                raise ValueError(
                    f"{name}: must be a positive multiple of {nvfp4.BLOCK_SIZE}, got {size}"
                )
        if num_experts < 1:
            raise ValueError(f"num_experts: must be positive, got {num_experts}")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_experts = num_experts
        self.gated = gated
        self.activation = activation
        self._fused = _fused_activation(activation, gated, activation_limit)
        self.router = router
        self._observer: AmaxObserver | None = None
        segments = 2 if gated else 1
        first = ExpertProjection(
            num_experts,
            intermediate_size * segments,
            hidden_size,
            num_segments=segments,
            gated=self._fused.gated,
            shared_input_scale=True,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self._first_name = "gate_up_proj" if gated else "up_proj"
        self.add_module(self._first_name, first)
        self.down_proj = ExpertProjection(
            num_experts, hidden_size, intermediate_size, bias=bias, device=device, dtype=dtype
        )
        self._activation_scale = check_activation_scale(activation_scale)
        if activation_scale == "static":
            for projection in self.projections().values():
                projection.reserve_input_scale()

    @property
    def first_proj(self) -> ExpertProjection:
        """gate_up_proj, or up_proj without a gate."""
        first: ExpertProjection = getattr(self, self._first_name)
        return first

    def projections(self) -> dict[str, ExpertProjection]:
        """Both projections by name, in the order of the flow."""
        return {self._first_name: self.first_proj, "down_proj": self.down_proj}

    @classmethod
    @torch.no_grad()
    def from_float(
        cls,
        gate_up_proj: Tensor,
        down_proj: Tensor,
        *,
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        gated: bool = True,
        **options: Any,
    ) -> Self:
        """Quantize the experts of a float model (see ``quantize_weight``).

        The gate's and the up projection's rows get global scales of their own.

        Args:
            gate_up_proj: (E, 2F, D), gate rows first, or (E, F, D) with ``gated`` False.
            down_proj: (E, D, F).
            gate_up_bias: (E, 2F) or (E, F). down_bias: (E, D). Both or none.
            gated, options: as the constructor's, but for device and dtype, which are those of
                the weights and biases, and "static", which needs ``calibrate`` first.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit, or weights are not finite.
        """
        if gate_up_proj.ndim != 3:
            raise ValueError(
                f"gate_up_proj: must be (E, 2F, D) or (E, F, D), got {tuple(gate_up_proj.shape)}"
            )
        num_experts, first_rows, hidden = gate_up_proj.shape
        if gated and first_rows % 2:
            raise ValueError(f"gate_up_proj: must have 2F rows, got {first_rows}")
        intermediate = first_rows // 2 if gated else first_rows
        if tuple(down_proj.shape) != (num_experts, hidden, intermediate):
            raise ValueError(
                f"down_proj: must be (E, D, F) = {(num_experts, hidden, intermediate)} to fit "
                f"gate_up_proj {tuple(gate_up_proj.shape)}, got {tuple(down_proj.shape)}"
            )
        if (gate_up_bias is None) != (down_bias is None):
            raise ValueError("gate_up_bias and down_bias: give both or none")
        if gate_up_bias is not None and down_bias is not None:
            check_shape("gate_up_bias", gate_up_bias, (num_experts, first_rows), "(E, N)")
            check_shape("down_bias", down_bias, (num_experts, hidden), "(E, D)")
        if options.get("activation_scale") == "static":
            raise ValueError(
                'activation_scale: "static" needs input scales; build the module, run it under '
                "nvfp4_ops.calibrate, then assign"
            )
        moe = cls(
            hidden,
            intermediate,
            num_experts,
            gated=gated,
            bias=gate_up_bias is not None,
            device=gate_up_proj.device,
            dtype=torch.bfloat16 if gate_up_bias is None else gate_up_bias.dtype,
            **options,
        )
        every_expert = slice(None)
        halves = gate_up_proj.chunk(2, dim=1) if gated else (gate_up_proj,)
        for segment, half in enumerate(halves):
            moe.first_proj.copy_segment(every_expert, segment, quantize_weight(half))
        moe.down_proj.copy_segment(every_expert, 0, quantize_weight(down_proj))
        for projection, bias in ((moe.first_proj, gate_up_bias), (moe.down_proj, down_bias)):
            if bias is not None:
                assert projection.bias is not None
                projection.bias.copy_(bias)
            projection.prepack()
        return moe

    @classmethod
    def from_checkpoint(cls, directory: str | Path, prefix: str, **options: Any) -> Self:
        """Load one layer's experts from a checkpoint; see ``nvfp4_ops.checkpoint.load_experts``."""
        from nvfp4_ops.checkpoint import load_experts

        return load_experts(directory, prefix, module=cls, **options)

    def warmup(self, max_tokens: int, **options: Any) -> int:
        """Load every kernel that 1 .. max_tokens tokens can need; see ``nvfp4_ops.warmup``."""
        from nvfp4_ops.warming import warmup

        return warmup(self, max_tokens, **options)

    @property
    def is_calibrating(self) -> bool:
        return self._observer is not None

    @property
    def activation_scale(self) -> ActivationScale | None:
        return self._activation_scale

    @activation_scale.setter
    def activation_scale(self, mode: ActivationScale | None) -> None:
        if check_activation_scale(mode) == "static":
            for name, projection in self.projections().items():
                projection.check_input_scale(name)
        self._activation_scale = mode

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
    ) -> Tensor:
        """Run the chosen experts.

        Args:
            hidden_states: (..., D) bf16, fp16 or fp32; any leading shape, T = 0 included.
            top_k_index: (..., top_k) int; num_experts or more drops the slot. None: ask the router.
            top_k_weights: (..., top_k) float.

        Returns:
            (..., D) of the dtype of hidden_states.
        """
        if hidden_states.ndim == 0 or hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states: last dimension must be {self.hidden_size}, "
                f"got shape {tuple(hidden_states.shape)}"
            )
        x_TD = _as_rows(hidden_states)
        if top_k_index is None and top_k_weights is None:
            if self.router is None:
                raise ValueError("top_k_index, top_k_weights: must be given, there is no router")
            index_TK, weights_TK = self.router(x_TD)
        elif top_k_index is None or top_k_weights is None:
            raise ValueError("top_k_index and top_k_weights: give both or none")
        else:
            if top_k_index.ndim == 0 or top_k_index.shape[-1] == 0:
                raise ValueError(
                    f"top_k_index: must be (..., top_k), top_k > 0, got {tuple(top_k_index.shape)}"
                )
            index_TK, weights_TK = _as_rows(top_k_index), _as_rows(top_k_weights)
        if index_TK.shape[0] != x_TD.shape[0]:
            raise ValueError(
                f"top_k_index: must have a row for each of the {x_TD.shape[0]} tokens, "
                f"got {index_TK.shape[0]}"
            )
        out_TD = self._run_experts(x_TD, index_TK, weights_TK)
        return out_TD if hidden_states.ndim == 2 else out_TD.reshape(hidden_states.shape)

    def _run_experts(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The flow; on a GPU by one plan of the whole of it, which costs the host half."""
        if torch.compiler.is_compiling() or not x_TD.is_cuda:
            return self._flow(x_TD, index_TK, weights_TK)
        if x_TD.shape[0] > _MAX_PLANNED_TOKENS or not self._may_plan():
            return self._flow(x_TD, index_TK, weights_TK)
        first, down, act = self.first_proj, self.down_proj, self._fused
        kind = (self._activation_scale, act.name, act.limit, self.num_experts, first.num_rows)
        inputs = (x_TD, index_TK, weights_TK, *first.state(), *down.state(), kind)
        run = _PLANS.find(inputs)
        if run is not None:
            return run(*inputs)
        with record() as recording:
            out_TD = self._flow(x_TD, index_TK, weights_TK)
        run = None if recording is None else recording.plan(inputs, out_TD)
        if run is not None and is_plain(inputs):
            _PLANS.keep(inputs, run)
        return out_TD

    def _may_plan(self) -> bool:
        """Whether there are only ops to run: nobody watches, nothing of the user's is called."""
        return (
            is_planned()
            and self._observer is None
            and isinstance(self.activation, str)
            and not _has_any_global_hook()
            and not _has_hooks(self.first_proj)
            and not _has_hooks(self.down_proj)
        )

    def _flow(self, x_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        offs_E, token_of_row_R, row_of_slot_TK = sort_by_expert(index_TK, self.num_experts)
        first, down = self.first_proj, self.down_proj
        mode = self._activation_scale
        # Weights may load early: what makes the operands waits for the sort, which wrote offs_E.
        # Operands have no names that would keep them for longer than it takes to multiply them.
        hidden_RF = first(
            *make_operand(first, x_TD, mode, token_of_row_R=token_of_row_R),
            offs_E,
            self._fused,
            x_TD.dtype,
            early_weights=True,
        )
        if callable(self.activation):
            # It may turn the zeros of rows without an expert into something else.
            row_R1 = torch.arange(hidden_RF.shape[0], device=hidden_RF.device).unsqueeze(1)
            hidden_RF = torch.where(row_R1 < offs_E[-1], self.activation(hidden_RF), 0)
        if self._observer is not None:
            self._observer.observe(x_TD, hidden_RF, offs_E)
        out_RD = down(
            *make_operand(down, hidden_RF, mode, offs_E),
            offs_E,
            _NO_ACTIVATION,
            x_TD.dtype,
            early_weights=True,
        )
        return combine(out_RD, row_of_slot_TK, weights_TK)

    def extra_repr(self) -> str:
        activation = self.activation if isinstance(self.activation, str) else "callable"
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, activation={activation}, gated={self.gated}, "
            f"activation_scale={self.activation_scale}"
        )


def _has_hooks(module: nn.Module) -> bool:
    # Some libraries put a forward of their own on the instance.
    own = "forward" in module.__dict__
    return bool(own or module._forward_pre_hooks or module._forward_hooks)


def _as_rows(x: Tensor) -> Tensor:
    """(..., N) as (rows, N)."""
    # A reshape that changes nothing costs the host as much as a launch.
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


def _fused_activation(
    activation: str | Callable[[Tensor], Tensor], gated: bool, limit: float | None
) -> Activation:
    if callable(activation):
        if limit is not None:
            raise ValueError("activation_limit: a callable does its own clamping")
        return Activation()
    if not isinstance(activation, str) or (activation, gated) not in _FUSED:
        known = ", ".join(f"{name} {'' if g else 'un'}gated" for name, g in _FUSED)
        raise ValueError(
            f"activation: must be a callable or one of {known}; "
            f"got {activation!r} {'' if gated else 'un'}gated"
        )
    return Activation(_FUSED[activation, gated], limit)
