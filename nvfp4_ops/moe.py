"""NVFP4MoE: the experts of a Mixture-of-Experts layer with NVFP4 weights, as one nn.Module.

T tokens, K = top_k, R = T * K routed rows, E experts, D hidden, F intermediate (suffixes of the
tensor names below). Flow: sort by expert -> (quantize) -> permute -> grouped mm gate_up with the
activation -> (quantize) -> grouped mm down -> combine. Every step is one op, so that a compiled
graph computes the very bits of eager mode.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
from torch import Tensor, nn

from nvfp4_ops import format as nvfp4
from nvfp4_ops.activation import Activation
from nvfp4_ops.calibration import AmaxObserver
from nvfp4_ops.ops import global_scale, grouped_scaled_mm, quantize_nvfp4
from nvfp4_ops.routing import combine, permute, sort_by_expert
from nvfp4_ops.weight import NVFP4Weight, quantize_weight

ActivationScale = Literal["static", "per_token", "per_tensor"]
ACTIVATION_SCALES: tuple[str, ...] = get_args(ActivationScale)

_FUSED = {
    ("silu", True): "silu_mul",
    ("silu", False): "silu",
    ("gelu_tanh", True): "gelu_tanh_mul",
    ("gelu_tanh", False): "gelu_tanh",
    ("relu2", True): "relu2_mul",
    ("relu2", False): "relu2",
    ("swiglu_oai", True): "swiglu_oai",
}


class _QuantizedRows(NamedTuple):
    """Operand A of a grouped mm: with sf None the float rows themselves."""

    a: Tensor
    sf: Tensor | None
    scale: Tensor | None
    """Global scale that goes into alpha: () or (E,)."""
    row_scale: Tensor | None
    """Global scale of each row, (R, 1)."""


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
        gated: gate_up has 2F rows, gate first; False: F rows (Nemotron-H).
        bias: each projection adds a bias.
        router: module (T, D) -> (top_k_index, top_k_weights); then forward takes hidden states
            alone. ``nvfp4_ops.SoftmaxRouter`` and ``SigmoidRouter`` fit.
        device, dtype: of the new buffers; dtype is that of the biases only.

    State (canonical ModelOpt layout, here for a gated module; ``up_proj`` (E, F, ...) otherwise):
        gate_up_proj (E, 2F, D/2) uint8; gate_up_proj_weight_scale (E, 2F, D/16) e4m3;
        gate_up_proj_weight_scale_2 (E, 2) fp32, gate's and up's global scales, both kept exact;
        gate_up_proj_input_scale (E, 2) fp32, where there are input scales;
        gate_up_proj_bias (E, 2F), with ``bias``; down_proj... (E, D, F/2), (E, D, F/16), (E,),
        (E,), (E, D) likewise. ``.to(dtype)`` leaves codes and scales as they are.

    Without weights loaded the module multiplies by zero. Not differentiable.

    Raises:
        ValueError: an argument is out of range, or static is asked for without input scales.
    """

    down_proj: Tensor
    down_proj_input_scale: Tensor | None

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
        self._unfused = activation if callable(activation) else None
        self._fused = _fused_activation(activation, gated, activation_limit)
        self.router = router
        self._observer: AmaxObserver | None = None
        for name, rows, columns in self._projection_shapes():
            self._register(name, rows, columns, bias, device, dtype)
        self._activation_scale = _check_activation_scale(activation_scale)
        if activation_scale == "static":
            for name, _, _ in self._projection_shapes():
                self._register_input_scale(name, device)

    @property
    def first_proj(self) -> str:
        """Name of the first projection: gate_up_proj, or up_proj without a gate."""
        return "gate_up_proj" if self.gated else "up_proj"

    def _projection_shapes(self) -> Iterator[tuple[str, int, int]]:
        """Name, N and K of both projections."""
        rows = self.intermediate_size * (2 if self.gated else 1)
        yield self.first_proj, rows, self.hidden_size
        yield "down_proj", self.hidden_size, self.intermediate_size

    def _register(
        self,
        name: str,
        rows: int,
        columns: int,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        lead = (self.num_experts, rows)
        codes = torch.zeros(*lead, nvfp4.packed_size(columns), dtype=torch.uint8, device=device)
        scale_bytes = torch.zeros(
            *lead, nvfp4.num_blocks(columns), dtype=torch.uint8, device=device
        )
        self.register_buffer(name, codes)
        self.register_buffer(f"{name}_weight_scale", scale_bytes.view(torch.float8_e4m3fn))
        scale_2 = torch.ones(self._global_scale_shape(name), device=device, dtype=torch.float32)
        self.register_buffer(f"{name}_weight_scale_2", scale_2)
        self.register_buffer(f"{name}_input_scale", None)
        biases = torch.zeros(lead, dtype=dtype, device=device) if bias else None
        self.register_buffer(f"{name}_bias", biases)

    def _register_input_scale(self, name: str, device: torch.device | str | None) -> None:
        # NaN until loaded: a forgotten input scale must not look like a result.
        scale = torch.full(self._global_scale_shape(name), torch.nan, device=device)
        self.register_buffer(f"{name}_input_scale", scale.float())

    def _global_scale_shape(self, name: str) -> tuple[int, ...]:
        two = name == "gate_up_proj"
        return (self.num_experts, 2) if two else (self.num_experts,)

    @classmethod
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
            gated, options: as the constructor's; the weights' device is used.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit, or weights are not finite.
        """
        num_experts, first_rows, hidden = gate_up_proj.shape
        intermediate = first_rows // 2 if gated else first_rows
        if tuple(down_proj.shape) != (num_experts, hidden, intermediate):
            raise ValueError(
                f"down_proj: must be (E, D, F) = {(num_experts, hidden, intermediate)} to fit "
                f"gate_up_proj {tuple(gate_up_proj.shape)}, got {tuple(down_proj.shape)}"
            )
        if (gate_up_bias is None) != (down_bias is None):
            raise ValueError("gate_up_bias and down_bias: give both or none")
        has_bias = gate_up_bias is not None
        moe = cls(
            hidden,
            intermediate,
            num_experts,
            gated=gated,
            bias=has_bias,
            device=gate_up_proj.device,
            dtype=gate_up_bias.dtype if gate_up_bias is not None else torch.bfloat16,
            **options,
        )
        halves = gate_up_proj.chunk(2, dim=1) if gated else (gate_up_proj,)
        quantized = [quantize_weight(half) for half in halves]
        first = NVFP4Weight(
            torch.cat([half.codes for half in quantized], dim=1),
            torch.cat([half.block_scale.view(torch.uint8) for half in quantized], dim=1).view(
                torch.float8_e4m3fn
            ),
            torch.stack([half.global_scale for half in quantized], dim=1).view(
                moe._global_scale_shape(moe.first_proj)
            ),
        )
        for name, weight, bias in (
            (moe.first_proj, first, gate_up_bias),
            ("down_proj", quantize_weight(down_proj), down_bias),
        ):
            getattr(moe, name).copy_(weight.codes)
            getattr(moe, f"{name}_weight_scale").copy_(weight.block_scale)
            getattr(moe, f"{name}_weight_scale_2").copy_(weight.global_scale)
            if bias is not None:
                getattr(moe, f"{name}_bias").copy_(bias)
        return moe

    @classmethod
    def from_checkpoint(cls, directory: str, prefix: str, **options: Any) -> "NVFP4MoE":
        """Load one layer's experts from a checkpoint; see ``nvfp4_ops.checkpoint.load_experts``."""
        from nvfp4_ops.checkpoint import load_experts

        return load_experts(directory, prefix, **options)

    @property
    def activation_scale(self) -> ActivationScale | None:
        return self._activation_scale

    @activation_scale.setter
    def activation_scale(self, mode: ActivationScale | None) -> None:
        if _check_activation_scale(mode) == "static":
            for name, _, _ in self._projection_shapes():
                scale = getattr(self, f"{name}_input_scale")
                if scale is None:
                    raise ValueError(
                        f'activation_scale: "static" needs {name}_input_scale, which this module '
                        "does not have; load a checkpoint with input scales, or calibrate"
                    )
                _check_input_scale(f"{name}_input_scale", scale)
        self._activation_scale = mode

    def set_input_scales(self, first: Tensor, down: Tensor) -> None:
        """Set the static input scales: first (E, 2), or (E,) without a gate; down (E,); fp32.

        Raises:
            ValueError: a shape does not fit, or a scale is not positive and finite.
        """
        for name, scale in ((self.first_proj, first), ("down_proj", down)):
            if tuple(scale.shape) != self._global_scale_shape(name):
                raise ValueError(
                    f"{name}_input_scale: must be {self._global_scale_shape(name)}, "
                    f"got {tuple(scale.shape)}"
                )
            _check_input_scale(f"{name}_input_scale", scale)
            device = getattr(self, name).device
            self.register_buffer(f"{name}_input_scale", scale.to(device, torch.float32).clone())

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
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden_states: last dimension must be {self.hidden_size}, "
                f"got shape {tuple(hidden_states.shape)}"
            )
        x_TD = hidden_states.reshape(-1, self.hidden_size)
        if top_k_index is None and top_k_weights is None:
            if self.router is None:
                raise ValueError("top_k_index, top_k_weights: must be given, there is no router")
            index_TK, weights_TK = self.router(x_TD)
        elif top_k_index is None or top_k_weights is None:
            raise ValueError("top_k_index and top_k_weights: give both or none")
        else:
            index_TK = top_k_index.reshape(-1, top_k_index.shape[-1])
            weights_TK = top_k_weights.reshape(-1, top_k_weights.shape[-1])
        if index_TK.shape[0] != x_TD.shape[0]:
            raise ValueError(
                f"top_k_index: must have a row for each of the {x_TD.shape[0]} tokens, "
                f"got {index_TK.shape[0]}"
            )
        offs_E, token_of_row_R, row_of_slot_TK = sort_by_expert(index_TK, self.num_experts)
        routed = self._quantize_tokens(x_TD, token_of_row_R)
        hidden_RF = self._mm(self.first_proj, routed, offs_E, self._fused, x_TD.dtype)
        if self._unfused is not None:
            hidden_RF = self._unfused(hidden_RF)
        if self._observer is not None:
            self._observer.observe(x_TD, hidden_RF, offs_E)
        out_RD = self._mm(
            "down_proj", self._quantize_rows(hidden_RF, offs_E), offs_E, Activation(), x_TD.dtype
        )
        return combine(out_RD, row_of_slot_TK, weights_TK).reshape(hidden_states.shape)

    def _quantize_tokens(self, x_TD: Tensor, token_of_row_R: Tensor) -> _QuantizedRows:
        """Each token is quantized once, then its bytes are copied to its rows."""
        mode = self._activation_scale
        if mode is None:
            return _QuantizedRows(permute(x_TD, token_of_row_R), None, None, None)
        if mode == "static":
            # A token is quantized once for all its experts: the largest scale clips none.
            scale = getattr(self, f"{self.first_proj}_input_scale").amax()
        else:
            scale = global_scale(x_TD, per_token=mode == "per_token")
        codes, sf = quantize_nvfp4(x_TD, scale)
        per_row = permute(scale, token_of_row_R) if mode == "per_token" else None
        return _QuantizedRows(
            permute(codes, token_of_row_R),
            permute(sf, token_of_row_R),
            None if mode == "per_token" else scale,
            per_row,
        )

    def _quantize_rows(self, hidden_RF: Tensor, offs_E: Tensor) -> _QuantizedRows:
        mode = self._activation_scale
        if mode is None:
            return _QuantizedRows(hidden_RF, None, None, None)
        if mode == "static":
            scale = self.down_proj_input_scale
            assert scale is not None
        else:
            scale = global_scale(hidden_RF, per_token=mode == "per_token")
        codes, sf = quantize_nvfp4(hidden_RF, scale, offs_E)
        if mode == "per_token":
            return _QuantizedRows(codes, sf, None, scale)
        return _QuantizedRows(codes, sf, scale, None)

    def _mm(
        self,
        name: str,
        rows: _QuantizedRows,
        offs_E: Tensor,
        activation: Activation,
        dtype: torch.dtype,
    ) -> Tensor:
        alpha = getattr(self, f"{name}_weight_scale_2")
        if rows.scale is not None:
            alpha = alpha * rows.scale
        return grouped_scaled_mm(
            rows.a,
            getattr(self, name),
            rows.sf,
            getattr(self, f"{name}_weight_scale"),
            alpha,
            offs_E,
            row_scale=rows.row_scale,
            bias=getattr(self, f"{name}_bias"),
            activation=activation,
            out_dtype=dtype,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but never cast, codes and scales: ``model.to(torch.bfloat16)`` means the rest."""

        for name, buffer in self._buffers.items():
            if buffer is None:
                continue
            moved = fn(buffer)
            castable = name.endswith("_bias") or moved.dtype == buffer.dtype
            self._buffers[name] = moved if castable else buffer.to(moved.device)
        if recurse:
            for child in self.children():
                child._apply(fn)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Copying casts in silence, and cast codes or scales are garbage: compare dtypes first."""
        error_msgs: list[str] = args[-1]
        for name, _, _ in self._projection_shapes():
            if f"{prefix}{name}_input_scale" in state_dict:
                self._register_input_scale(name, getattr(self, name).device)
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if buffer is None or loaded is None:
                continue
            if not name.endswith("_bias") and loaded.dtype != buffer.dtype:
                error_msgs.append(f"{prefix}{name}: must be {buffer.dtype}, got {loaded.dtype}")
            elif name.endswith("input_scale"):
                try:
                    _check_input_scale(prefix + name, loaded)
                except ValueError as error:
                    error_msgs.append(str(error))
        if not error_msgs:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        activation = self.activation if isinstance(self.activation, str) else "callable"
        return (
            f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, "
            f"num_experts={self.num_experts}, activation={activation}, gated={self.gated}, "
            f"activation_scale={self.activation_scale}"
        )


def _fused_activation(
    activation: str | Callable[[Tensor], Tensor], gated: bool, limit: float | None
) -> Activation:
    if callable(activation):
        if limit is not None:
            raise ValueError("activation_limit: a callable does its own clamping")
        return Activation()
    if (activation, gated) not in _FUSED:
        known = ", ".join(f"{name} {'' if g else 'un'}gated" for name, g in _FUSED)
        raise ValueError(
            f"activation: must be a callable or one of {known}; "
            f"got {activation!r} {'' if gated else 'un'}gated"
        )
    return Activation(_FUSED[activation, gated], limit)


def _check_activation_scale(mode: ActivationScale | None) -> ActivationScale | None:
    if mode is not None and mode not in ACTIVATION_SCALES:
        raise ValueError(
            f"activation_scale: must be None or one of {ACTIVATION_SCALES}, got {mode!r}"
        )
    return mode


def _check_input_scale(name: str, scale: Tensor) -> None:
    bad = ~(scale.isfinite() & (scale > 0))
    if not scale.is_meta and bool(bad.any()):
        raise ValueError(
            f"{name}: must be positive and finite, got {scale[bad].flatten()[0].item()} at "
            f"{bad.nonzero()[0].tolist()}"
        )
