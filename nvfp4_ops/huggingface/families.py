"""What an experts module of transformers is: its layout, its sizes and its activation.

Families are told apart by what their modules say and do, not by a list of names: the flags of
``transformers.integrations.moe.use_experts_implementation`` tell the layout, and the activation
is found by evaluating the module's own on probe values. Whatever is left unexplained is refused.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nvfp4_ops import activation as activations
from nvfp4_ops import format as nvfp4
from nvfp4_ops.activation import Activation
from nvfp4_ops.moe import NVFP4MoE

GATED = {"silu": "silu_mul", "gelu_tanh": "gelu_tanh_mul", "relu2": "relu2_mul"}
CLAMPED = {"silu": "silu_mul", "swiglu_oai": "swiglu_oai"}
UNGATED = {"silu": "silu", "gelu_tanh": "gelu_tanh", "relu2": "relu2"}

PROBE_ROWS, PROBE_COLUMNS, PROBE_DECADES = 64, 32, (-1.0, 4.0)
"""Values of the probe: a row for each magnitude from 0.1 to 1e4, so that every clamp shows."""


@dataclass(frozen=True)
class ExpertsSpec:
    """How to read an experts module, and the NVFP4MoE that computes the same.

    gated: the first projection holds gate and up rows. transposed: weights are (E, K, N), not
    (E, N, K). interleaved: rows are gate, up, gate, up, ... rather than all gate rows first.
    activation, activation_limit: as NVFP4MoE's.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: str | Callable[[Tensor], Tensor]
    activation_limit: float | None
    gated: bool
    bias: bool
    transposed: bool
    interleaved: bool

    @property
    def first_name(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    def options(self) -> dict[str, Any]:
        """Keyword arguments of NVFP4MoE that a checkpoint's tensors do not tell."""
        return {"activation": self.activation, "activation_limit": self.activation_limit}

    def build(self, **options: Any) -> NVFP4MoE:
        """An empty NVFP4MoE of this kind; options: activation_scale, device, dtype."""
        return NVFP4MoE(
            self.hidden_size,
            self.intermediate_size,
            self.num_experts,
            gated=self.gated,
            bias=self.bias,
            **self.options(),
            **options,
        )

    def rows(self, weight: Tensor, expert: int) -> Tensor:
        """Weight of one expert as (N, K)."""
        return weight[expert].T if self.transposed else weight[expert]

    def segments(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows of the first projection, or of its bias, as (gate, up) or (up,)."""
        if not self.gated:
            return (rows,)
        return (rows[0::2], rows[1::2]) if self.interleaved else rows.chunk(2)


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Experts modules by name: stacked weights (E, ., .) of two projections.

    Shared experts may be stacked too, but every token takes them: they are not among these.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if _is_stacked(module) and (_has_flags(module) or name.rpartition(".")[2] == "experts")
    }


def _is_stacked(module: nn.Module) -> bool:
    weights = [getattr(module, name, None) for name in ("gate_up_proj", "up_proj", "down_proj")]
    stacked = [isinstance(w, Tensor) and w.ndim == 3 for w in weights]
    return stacked[2] and (stacked[0] or stacked[1])


def _has_flags(module: nn.Module) -> bool:
    """Set on classes decorated with use_experts_implementation."""
    return hasattr(module, "is_concatenated")


def experts_spec(name: str, module: nn.Module) -> ExpertsSpec:
    """Read an experts module.

    Args:
        name: of the module, for messages.
        module: follows the experts interface of transformers, or is Llama4TextExperts; its
            weights may be on the meta device.

    Raises:
        ValueError: a flag, a parameter, a size or an activation that NVFP4MoE does not have; the
            message names module, class and which.
    """
    where = f"{name} ({type(module).__name__})"
    flags = _flags(where, module)
    names = {"gate_up_proj" if flags["gated"] else "up_proj", "down_proj"}
    if flags["bias"]:
        names |= {f"{weight}_bias" for weight in names}
    own = {own for own, _ in (*module.named_parameters(), *module.named_buffers())}
    if own != names:
        raise ValueError(
            f"{where}: must have the parameters {sorted(names)}, has {sorted(own)}: this kind of "
            "experts is not supported"
        )
    down = module.get_parameter("down_proj")
    hidden, intermediate = down.shape[1:][::-1] if flags["transposed"] else down.shape[1:]
    for what, size in (("hidden size", hidden), ("intermediate size", intermediate)):
        if size % nvfp4.BLOCK_SIZE:
            raise ValueError(
                f"{where}: {what} must be a multiple of {nvfp4.BLOCK_SIZE} for NVFP4, got {size}"
            )
    activation, limit = _activation(where, module, flags["gated"], flags["interleaved"])
    return ExpertsSpec(
        num_experts=down.shape[0],
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=activation,
        activation_limit=limit,
        **flags,
    )


def is_llama4(module: nn.Module) -> bool:
    """Llama 4 experts, which are given every token once for each expert."""
    return type(module).__name__ == "Llama4TextExperts"


def _flags(where: str, module: nn.Module) -> dict[str, bool]:
    if is_llama4(module):
        return {"gated": True, "bias": False, "transposed": True, "interleaved": False}
    if not _has_flags(module):
        raise ValueError(
            f"{where}: does not follow the experts interface of transformers (its class is not "
            "decorated with use_experts_implementation): not supported"
        )
    for flag in ("has_post_expert_norm", "_is_expert_parallel"):
        if getattr(module, flag, False):
            raise ValueError(f"{where}: {flag} is set, which is not supported")
    return {
        "gated": getattr(module, "has_gate", True),
        "bias": bool(module.has_bias),
        "transposed": bool(module.is_transposed),
        "interleaved": not module.is_concatenated,
    }


def _activation(
    where: str, module: nn.Module, gated: bool, interleaved: bool
) -> tuple[str | Callable[[Tensor], Tensor], float | None]:
    """The fused activation that equals the module's, or else the module's own."""
    own = _own_activation(module, gated)
    # Models are often built under a default device and dtype of meta and bf16.
    kind: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    generator = torch.Generator("cpu").manual_seed(0)
    halves = torch.randn(
        2 if gated else 1, PROBE_ROWS, PROBE_COLUMNS, generator=generator, **kind
    ) * torch.logspace(*PROBE_DECADES, PROBE_ROWS, **kind).unsqueeze(1)
    probe = torch.cat(tuple(halves), dim=-1)
    seen = torch.stack(tuple(halves), dim=-1).flatten(1) if interleaved else probe
    expected = own(seen)
    for name, limit in _candidates(module, gated):
        fused = (CLAMPED if limit is not None else GATED)[name] if gated else UNGATED[name]
        if torch.allclose(activations.apply(Activation(fused, limit), probe), expected, 1e-5, 1e-5):
            return name, limit
    if interleaved:
        raise ValueError(
            f"{where}: its activation is none that NVFP4MoE has, and with interleaved gate and up "
            "rows the module's own can not be used"
        )
    return own, None


def _candidates(module: nn.Module, gated: bool) -> list[tuple[str, float | None]]:
    if not gated:
        return [(name, None) for name in UNGATED]
    limits = {getattr(module, name, None) for name in ("limit", "swiglu_limit")}
    clamps = [float(x) for x in limits if isinstance(x, int | float) and 0 < x < math.inf]
    return [(name, None) for name in GATED] + [(n, limit) for n in CLAMPED for limit in clamps]


def _own_activation(module: Any, gated: bool) -> Callable[[Tensor], Tensor]:
    """The module's activation, without keeping its weights alive."""
    if not gated:
        activation: Callable[[Tensor], Tensor] = module.act_fn
        return activation
    if is_llama4(module):
        act_fn = module.act_fn
        return lambda gate_up: act_fn(gate_up.chunk(2, dim=-1)[0]) * gate_up.chunk(2, dim=-1)[1]
    shell = copy.copy(module)
    shell._parameters = {}
    gate: Callable[[Tensor], Tensor] = shell._apply_gate
    return gate
