"""NVFP4Linear: one nn.Linear with an NVFP4 weight, as attention and shared experts need it.

A linear layer is a grouped mm with one expert, so it runs on the ops of the experts.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from nvfp4_ops import format as nvfp4
from nvfp4_ops.activation import Activation
from nvfp4_ops.operand import ActivationScale, check_activation_scale, make_operand
from nvfp4_ops.projection import ExpertProjection
from nvfp4_ops.weight import NVFP4Weight, quantize_weight

_TENSORS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "bias")


class NVFP4Linear(nn.Module):
    """A linear layer whose weight is NVFP4: y = x W^T + bias.

    Args:
        in_features, out_features: K and N, multiples of 16.
        bias: add a bias.
        activation_scale: how the input is quantized. None: not at all (weight-only).
            "per_token": global scale from each row's amax. "per_tensor": from the batch's amax.
            "static": the checkpoint's ``input_scale``. Can be assigned later.
        device, dtype: of the new buffers; dtype is that of the bias only.

    The state dict has ModelOpt's names and layout, whatever the layout on the device:

    ==============  ================  =====================================
    weight          (N, K/2) uint8    codes, even k in the low nibble
    weight_scale    (N, K/16) e4m3    linear block scales
    weight_scale_2  () fp32           global scale
    input_scale     () fp32           static global scale of x, or absent
    bias            (N,)              or absent
    ==============  ================  =====================================

    Without weights loaded the module multiplies by zero. For inference: backward raises.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        activation_scale: ActivationScale | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size < 1 or size % nvfp4.BLOCK_SIZE:
                raise ValueError(
                    f"{name}: must be a positive multiple of {nvfp4.BLOCK_SIZE}, got {size}"
                )
        self.in_features, self.out_features = in_features, out_features
        self.projection = ExpertProjection(
            1, out_features, in_features, bias=bias, device=device, dtype=dtype
        )
        self._activation_scale = check_activation_scale(activation_scale)
        if activation_scale == "static":
            self.projection.reserve_input_scale()
        self.register_state_dict_post_hook(_name_as_linear)
        self.register_load_state_dict_pre_hook(_name_as_projection)

    @classmethod
    @torch.no_grad()
    def from_float(
        cls, linear: nn.Linear, *, activation_scale: ActivationScale | None = None
    ) -> Self:
        """Quantize a float layer (see ``quantize_weight``).

        Args:
            linear: weight (N, K) bf16, fp16 or fp32.
            activation_scale: as the constructor's, but for "static", which needs an input scale.

        Raises:
            TypeError, ValueError: shape or dtype does not fit, or a weight is not finite.
        """
        weight = quantize_weight(linear.weight)
        return cls.from_weight(weight, bias=linear.bias, activation_scale=activation_scale)

    @classmethod
    @torch.no_grad()
    def from_weight(
        cls,
        weight: NVFP4Weight,
        *,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
        activation_scale: ActivationScale | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build a layer of tensors that are quantized already, on their device.

        Args:
            weight: codes (N, K / 2), block scales (N, K / 16), global scale ().
            input_scale: fp32, one element, positive and finite; "static" needs it.
            bias: (N,). activation_scale: as the constructor's.
            dtype: that of the bias; None: as it is.

        Raises:
            ValueError: a scale is not positive and finite, or "static" has no input scale.
        """
        out_features, packed = weight.codes.shape
        layer = cls(
            packed * nvfp4.CODES_PER_BYTE,
            out_features,
            bias=bias is not None,
            device=weight.codes.device,
            dtype=dtype or (torch.bfloat16 if bias is None else bias.dtype),
        )
        layer.projection.copy_segment(0, 0, weight)
        if bias is not None:
            assert layer.projection.bias is not None
            layer.projection.bias.copy_(bias)
        if input_scale is not None:
            layer.projection.set_input_scale(input_scale.reshape(1))
        layer.activation_scale = activation_scale
        layer.projection.prepack()
        return layer

    @property
    def activation_scale(self) -> ActivationScale | None:
        return self._activation_scale

    @activation_scale.setter
    def activation_scale(self, mode: ActivationScale | None) -> None:
        if check_activation_scale(mode) == "static":
            self.projection.check_input_scale("linear")
        self._activation_scale = mode

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., K) bf16, fp16 or fp32 -> (..., N) of the same dtype."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"x: last dimension must be {self.in_features}, got shape {tuple(x.shape)}"
            )
        x_TK = x.reshape(-1, self.in_features)
        offs_1 = torch.full((1,), x_TK.shape[0], dtype=torch.int32, device=x.device)
        operand = make_operand(self.projection, x_TK, self._activation_scale, offs_1)
        out_TN = self.projection(*operand, offs_1, Activation(), x.dtype)
        return out_TN.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"activation_scale={self.activation_scale}"
        )


def _name_as_linear(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """``projection.weight`` (1, N, K/2) is ``weight`` (N, K/2) to the outside."""
    for name in _TENSORS:
        tensor = state_dict.pop(f"{prefix}projection.{name}", None)
        if tensor is not None:
            state_dict[prefix + name] = tensor.squeeze(0)


def _name_as_projection(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any
) -> None:
    for name in _TENSORS:
        tensor = state_dict.pop(prefix + name, None)
        if tensor is not None:
            state_dict[f"{prefix}projection.{name}"] = tensor.unsqueeze(0)
