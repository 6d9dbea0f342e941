"""One projection of all experts: its NVFP4 weight, its scales, and how they are kept safe."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from nvfp4_ops import format as nvfp4
from nvfp4_ops import kernels
from nvfp4_ops.activation import Activation
from nvfp4_ops.ops import grouped_scaled_mm, prepack_weight
from nvfp4_ops.weight import NVFP4Weight

_STATE = ("weight", "weight_scale", "weight_scale_2", "static_scale", "static_alpha", "bias")


class ExpertProjection(nn.Module):
    """Weights (E, N, K) in NVFP4, in the canonical layout and with ModelOpt's names.

    ==============  ==================  ========================================================
    weight          (E, N, K/2) uint8   codes, even k in the low nibble
    weight_scale    (E, N, K/16) e4m3   linear block scales
    weight_scale_2  (E,) fp32           global scales; (E, 2) with two segments of N/2 rows
    input_scale     as weight_scale_2   static global scale of the input, or None
    bias            (E, N)              or None
    ==============  ==================  ========================================================

    Derived from these whenever a method here writes them, and in no state dict: ``static_scale``,
    which static rows are rounded with, and ``static_alpha``, what their products are multiplied
    by. Both are None without input scales.

    ``.to(dtype)`` and the like cast the bias alone: ``model.to(torch.bfloat16)`` means the rest of
    the model. Loading a state dict checks dtypes and input scales rather than casting.

    On a GPU whose grouped mm wants prepacked weights, ``prepack`` replaces ``weight`` by those
    (rank 4, or 5 where ``gated``; scales within) and drops ``weight_scale``. Moves prepack and
    unpack by themselves, and the state dict is canonical either way.

    gated: the rows are a gate's and an up projection's, for a fused gated activation.
    shared_input_scale: all experts' rows are rounded with the largest input scale, which clips
    none, rather than with their own.
    """

    weight: Tensor
    weight_scale: Tensor | None
    weight_scale_2: Tensor
    input_scale: Tensor | None
    static_scale: Tensor | None
    static_alpha: Tensor | None
    bias: Tensor | None

    def __init__(  # noqa: PLR0913 - a projection has this many properties
        self,
        num_experts: int,
        num_rows: int,
        num_columns: int,
        *,
        num_segments: int = 1,
        gated: bool = False,
        shared_input_scale: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        self.num_segments = num_segments
        self.gated = gated
        self.shared_input_scale = shared_input_scale
        self.num_rows, self.num_columns = num_rows, num_columns
        lead = (num_experts, num_rows)
        # Zero codes and scales: without weights loaded the projection multiplies by zero.
        codes = torch.zeros(*lead, nvfp4.packed_size(num_columns), dtype=torch.uint8, device=device)
        sf = torch.zeros(*lead, nvfp4.num_blocks(num_columns), dtype=torch.uint8, device=device)
        global_scale = torch.ones(num_experts, num_segments, dtype=torch.float32, device=device)
        self.register_buffer("weight", codes)
        self.register_buffer("weight_scale", sf.view(torch.float8_e4m3fn))
        self.register_buffer("weight_scale_2", self._squeeze(global_scale))
        self.register_buffer("input_scale", None)
        self._derive_static()
        bias_EN = torch.zeros(lead, dtype=dtype, device=device) if bias else None
        self.register_buffer("bias", bias_EN)

    def _squeeze(self, scales: Tensor) -> Tensor:
        """(E, segments) -> (E,) where there is one segment."""
        return scales.squeeze(1) if self.num_segments == 1 else scales

    def segment_rows(self, segment: int) -> slice:
        """Weight rows of a segment."""
        num_rows = self.num_rows // self.num_segments
        return slice(segment * num_rows, (segment + 1) * num_rows)

    def segment(self, scales: Tensor) -> Tensor:
        """Scales of this projection as (E, segments), for indexing."""
        return scales.view(-1, self.num_segments)

    def forward(
        self,
        rows_RK: Tensor,
        alpha: Tensor,
        row_scale_R1: Tensor | None,
        offs_E: Tensor,
        activation: Activation,
        out_dtype: torch.dtype,
        *,
        early_weights: bool = False,
    ) -> Tensor:
        """Float rows times each one's expert; alpha as ``weight_scale_2``, which it includes."""
        weight, block_scale = self.weight, self.weight_scale
        return grouped_scaled_mm(
            rows_RK,
            weight,
            None,
            block_scale,
            alpha,
            offs_E,
            row_scale=row_scale_R1,
            bias=self.bias,
            activation=activation,
            out_dtype=out_dtype,
            num_columns=self.num_rows if block_scale is None else None,
            early_weights=early_weights,
        )

    def state(self) -> tuple[Any, ...]:
        """All that ``forward`` and ``make_operand`` take from here: six tensors or None."""
        # Not by nn.Module's look-up, which takes a microsecond of host time for each.
        get = self._buffers.__getitem__
        try:
            return tuple(map(get, _STATE))
        except KeyError:  # made a parameter by someone
            return tuple(getattr(self, name) for name in _STATE)

    @property
    def prepacked(self) -> bool:
        return self.weight.ndim in (kernels.PLAIN_RANK, kernels.GATED_RANK)

    def _gains_by_prepacking(self, device: torch.device) -> bool:
        num_experts = self.weight.shape[0]
        return device.type == "cuda" and kernels.why_no_grouped_mm(device, num_experts) is None

    def prepack(self) -> None:
        """Prepack if this device's grouped mm gains by it; the canonical tensors are freed."""
        if self.prepacked or not self._gains_by_prepacking(self.weight.device):
            return
        assert self.weight_scale is not None
        self.weight = self._prepacked(self.weight, self.weight_scale)
        self.weight_scale = None

    def _prepacked(self, codes: Tensor, block_scale: Tensor) -> Tensor:
        """Canonical weights of some experts in the layout of this projection's grouped mm."""
        return prepack_weight(codes, block_scale, gated=self.gated)

    def allocate(self, device: torch.device | str) -> None:
        """Make room on ``device`` for tensors that are on meta, in the layout it gains by.

        ``copy_experts`` then writes a few experts after the other, and there is never more than
        one copy of the weights.
        """
        assert self.weight.is_meta
        device = torch.device(device)
        if self._gains_by_prepacking(device):
            assert self.weight_scale is not None
            self.weight = self._prepacked(self.weight, self.weight_scale)
            self.weight_scale = None
        for name, buffer in self._buffers.items():
            if buffer is not None:
                self._buffers[name] = torch.empty_like(buffer, device=device)

    def canonical(self) -> tuple[Tensor, Tensor]:
        """weight and weight_scale in canonical layout."""
        if self.weight_scale is not None:
            return self.weight, self.weight_scale
        return kernels.unpack(self.weight, self.num_rows, self.num_columns)

    def unpack(self) -> None:
        """Undo ``prepack``."""
        self.weight, self.weight_scale = self.canonical()

    @torch.no_grad()
    def copy_segment(self, expert: int | slice, segment: int, weight: NVFP4Weight) -> None:
        """Write one segment of one expert, or of a slice of them; not when prepacked."""
        assert self.weight_scale is not None
        rows = self.segment_rows(segment)
        self.weight[expert, rows] = weight.codes.to(self.weight.device)
        # As bytes: not every device can assign float8.
        sf = self.weight_scale.view(torch.uint8)
        sf[expert, rows] = weight.block_scale.view(torch.uint8).to(sf.device)
        self.segment(self.weight_scale_2)[expert, segment] = weight.global_scale.to(sf.device)
        self._derive_static()

    @torch.no_grad()
    def copy_expert(
        self, expert: int, segments: Sequence[NVFP4Weight], bias: Tensor | None = None
    ) -> None:
        """Write all segments of one expert, in whichever layout the weights are, and its bias."""
        self.copy_experts(
            slice(expert, expert + 1),
            torch.cat([weight.codes for weight in segments])[None],
            torch.cat([weight.block_scale.view(torch.uint8) for weight in segments])[None],
            torch.stack([weight.global_scale for weight in segments])[None],
            None if bias is None else bias[None],
        )

    @torch.no_grad()
    def copy_experts(
        self,
        experts: slice,
        codes: Tensor,
        sf_bytes: Tensor,
        global_scale: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        """Write some experts, in whichever layout the weights are.

        codes (e, N, K/2), sf_bytes (e, N, K/16) uint8, global_scale (e, segments) and bias (e, N)
        are on any device and may be used again afterwards.
        """
        if self.prepacked:
            device = self.weight.device
            block_scale = sf_bytes.to(device).view(torch.float8_e4m3fn)
            self.weight[experts].copy_(self._prepacked(codes.to(device), block_scale))
        else:
            assert self.weight_scale is not None
            self.weight[experts].copy_(codes)
            # As bytes: not every device can assign float8.
            self.weight_scale.view(torch.uint8)[experts].copy_(sf_bytes)
        self.copy_small(experts, global_scale, bias)

    @torch.no_grad()
    def copy_small(self, experts: slice, global_scale: Tensor, bias: Tensor | None = None) -> None:
        """Write the global scales (e, segments) and biases (e, N) of some experts."""
        self.segment(self.weight_scale_2)[experts].copy_(global_scale)
        if bias is not None:
            assert self.bias is not None
            self.bias[experts].copy_(bias)
        self._derive_static()

    def _derive_static(self) -> None:
        """Once, not in every forward: a product of E numbers costs a decoding step a launch."""
        scale = alpha = None
        if self.input_scale is not None:
            scale = self.input_scale.amax() if self.shared_input_scale else self.input_scale
            alpha = self.weight_scale_2 * scale
        self.register_buffer("static_scale", scale, persistent=False)
        self.register_buffer("static_alpha", alpha, persistent=False)

    def reserve_input_scale(self) -> None:
        """Make room for input scales to be loaded.

        NaN until then: a forgotten input scale must not look like a result.
        """
        nan = torch.full_like(self.weight_scale_2, torch.nan)
        self.register_buffer("input_scale", nan)
        self._derive_static()

    def set_input_scale(self, scale: Tensor) -> None:
        """Set the static input scale, shaped like ``weight_scale_2``.

        Raises:
            ValueError: another shape, or a scale is not positive and finite.
        """
        if scale.shape != self.weight_scale_2.shape:
            raise ValueError(
                f"input_scale: must be {tuple(self.weight_scale_2.shape)}, got {tuple(scale.shape)}"
            )
        _check_scale("input_scale", scale)
        # In the layout of the others too: a copy of one number of a row would keep its stride.
        own = torch.empty_like(self.weight_scale_2).copy_(scale.detach())
        self.register_buffer("input_scale", own)
        self._derive_static()

    def check_input_scale(self, name: str) -> None:
        """Raise ValueError unless there are input scales, positive and finite."""
        if self.input_scale is None:
            raise ValueError(
                f'activation_scale: "static" needs {name}.input_scale, which this module does not '
                "have; load a checkpoint with input scales, or calibrate"
            )
        _check_scale(f"{name}.input_scale", self.input_scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.prepacked and not fn(self.weight_scale_2).is_cuda:
            self.unpack()
        own = dict(self._buffers)
        for name, buffer in own.items():
            if buffer is not None:
                moved = fn(buffer)
                castable = name == "bias" or moved.dtype == buffer.dtype
                own[name] = moved if castable else buffer.to(moved.device)
        # What others have attached to this module moves and is cast as ever.
        self._buffers.clear()
        super()._apply(fn, recurse)
        self._buffers.update(own)
        self.prepack()
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepacked:
            names = (f"{prefix}weight", f"{prefix}weight_scale")
            destination.update(zip(names, self.canonical(), strict=True))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        error_msgs: list[str] = args[-1]
        if self.prepacked:
            self.unpack()
        checked = {**self._buffers, "input_scale": self.weight_scale_2}
        for name, buffer in checked.items():
            loaded = state_dict.get(prefix + name)
            if buffer is None or loaded is None:
                continue
            if name != "bias" and loaded.dtype != buffer.dtype:
                error_msgs.append(f"{prefix}{name}: must be {buffer.dtype}, got {loaded.dtype}")
            elif name in ("input_scale", "weight_scale_2"):
                try:
                    _check_scale(prefix + name, loaded)
                except ValueError as error:
                    error_msgs.append(str(error))
        if f"{prefix}input_scale" in state_dict and not error_msgs:
            self.reserve_input_scale()
        if not error_msgs:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            self._derive_static()
        # Also where they were not before: a new module's zeros are not.
        self.prepack()

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.weight.shape[0]}, N={self.num_rows}, K={self.num_columns}, "
            f"input_scale={self.input_scale is not None}, bias={self.bias is not None}, "
            f"prepacked={self.prepacked}"
        )


def _check_scale(name: str, scale: Tensor) -> None:
    if scale.is_meta:
        return
    bad = ~(scale.isfinite() & (scale > 0))
    if bool(bad.any()):
        raise ValueError(
            f"{name}: must be positive and finite, got {scale[bad].flatten()[0].item()} at "
            f"{bad.nonzero()[0].tolist()}"
        )
