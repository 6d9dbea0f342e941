"""Activations between the two expert projections: which there are and what they mean.

The table is what fused epilogues are built from; ``apply`` is their meaning in plain PyTorch.
A *gated* activation reads 2I columns, the gate's in the first half and the up projection's in the
second, and writes I; the others work element by element.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

ActivationName = Literal[
    "none", "silu", "silu_mul", "gelu_tanh", "gelu_tanh_mul", "relu2", "relu2_mul", "swiglu_oai"
]
ACTIVATION_NAMES: tuple[str, ...] = get_args(ActivationName)

SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0
GELU_TANH_CUBIC = 0.044715


@dataclass(frozen=True)
class Activation:
    """A fused activation.

    name: one of ACTIVATION_NAMES. ``*_mul`` and ``swiglu_oai`` are gated.
    limit: clamp of the gate from above and of the up projection on both sides, for ``silu_mul``
        (DeepSeek-V4's clamped silu) and ``swiglu_oai`` (default 7.0); None otherwise.

    Raises ValueError for an unknown name, or a limit that is not positive or not supported.
    """

    name: str = "none"
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ACTIVATION_NAMES:
            raise ValueError(f"activation: must be one of {ACTIVATION_NAMES}, got {self.name!r}")
        if self.limit is None:
            if self.name == "swiglu_oai":
                object.__setattr__(self, "limit", SWIGLU_OAI_LIMIT)
        elif self.name not in ("silu_mul", "swiglu_oai"):
            raise ValueError(f"limit: only silu_mul and swiglu_oai are clamped, got {self.name!r}")
        elif not self.limit > 0:
            raise ValueError(f"limit: must be positive, got {self.limit}")
        else:
            # A compiled graph holds it as the op's schema does.
            object.__setattr__(self, "limit", float(self.limit))

    @property
    def gated(self) -> bool:
        return self.name.endswith("_mul") or self.name == "swiglu_oai"


def apply(activation: Activation, x: Tensor) -> Tensor:
    """Activation of x (..., N) -> (..., N / 2) where gated, else (..., N); dtype of x.

    With g, u the halves of x (clamped to ``limit`` where there is one):

    ===============  =========================================
    silu[_mul]       g * sigmoid(g) [* u]
    gelu_tanh[_mul]  0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) [* u]
    relu2[_mul]      max(g, 0)^2 [* u]
    swiglu_oai       g * sigmoid(1.702 g) * (u + 1)
    ===============  =========================================
    """
    gate, up = x.chunk(2, dim=-1) if activation.gated else (x, None)
    if up is not None and activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(min=-activation.limit, max=activation.limit)
    if activation.name == "none":
        return gate.clone()
    if activation.name == "swiglu_oai":
        assert up is not None
        return gate * torch.sigmoid(SWIGLU_OAI_ALPHA * gate) * (up + 1.0)
    if activation.name.startswith("silu"):
        activated = gate * torch.sigmoid(gate)
    elif activation.name.startswith("gelu_tanh"):
        inner = math.sqrt(2.0 / math.pi) * (gate + GELU_TANH_CUBIC * gate * gate * gate)
        activated = 0.5 * gate * (1.0 + torch.tanh(inner))
    else:
        activated = gate.clamp(min=0.0).square()
    return activated if up is None else activated * up
