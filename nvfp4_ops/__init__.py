"""NVFP4 (4-bit) Mixture-of-Experts for PyTorch."""

from typing import TYPE_CHECKING, Any

from nvfp4_ops.activation import Activation
from nvfp4_ops.backend import backend_info
from nvfp4_ops.calibration import calibrate
from nvfp4_ops.checkpoint import (
    CheckpointError,
    inspect_checkpoint,
    open_checkpoint,
    quantize_checkpoint,
)
from nvfp4_ops.linear import NVFP4Linear
from nvfp4_ops.moe import NVFP4MoE
from nvfp4_ops.ops import (
    activate_and_quantize_nvfp4,
    dequantize_nvfp4,
    global_scale,
    grouped_scaled_mm,
    prepack_weight,
    quantize_nvfp4,
    quantize_per_token_nvfp4,
    round_nvfp4,
    round_per_token_nvfp4,
    swizzle_sf,
    unswizzle_sf,
)
from nvfp4_ops.routing import (
    SigmoidRouter,
    SoftmaxRouter,
    combine,
    permute,
    router_logits,
    sigmoid_top_k,
    softmax_top_k,
    sort_by_expert,
)
from nvfp4_ops.warming import warmup
from nvfp4_ops.weight import NVFP4Weight, quantize_weight

if TYPE_CHECKING:
    from nvfp4_ops.huggingface import calibrate_checkpoint as calibrate_checkpoint
    from nvfp4_ops.huggingface import load_pretrained as load_pretrained
    from nvfp4_ops.huggingface import replace_experts as replace_experts

__all__ = [
    "Activation",
    "CheckpointError",
    "NVFP4Linear",
    "NVFP4MoE",
    "NVFP4Weight",
    "SigmoidRouter",
    "SoftmaxRouter",
    "activate_and_quantize_nvfp4",
    "backend_info",
    "calibrate",
    "combine",
    "dequantize_nvfp4",
    "global_scale",
    "grouped_scaled_mm",
    "inspect_checkpoint",
    "open_checkpoint",
    "permute",
    "prepack_weight",
    "quantize_checkpoint",
    "quantize_nvfp4",
    "quantize_per_token_nvfp4",
    "quantize_weight",
    "round_nvfp4",
    "round_per_token_nvfp4",
    "router_logits",
    "sigmoid_top_k",
    "softmax_top_k",
    "sort_by_expert",
    "swizzle_sf",
    "unswizzle_sf",
    "warmup",
]
__version__ = "0.1.0"

# What needs transformers, which takes seconds to import and is absent on many machines; not in
# __all__, or a star import would import it.
_HUGGINGFACE = ("calibrate_checkpoint", "load_pretrained", "replace_experts")


def __getattr__(name: str) -> Any:
    if name in _HUGGINGFACE:
        from nvfp4_ops import huggingface

        return getattr(huggingface, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
