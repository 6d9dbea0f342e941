"""Which kernel serves which op on which device, and why: backend_info()."""

from collections.abc import Sequence

import torch

from nvfp4_ops import kernels
from nvfp4_ops.registry import registered_ops

REFERENCE = "PyTorch reference"
HAVE_KERNELS = {
    "quantize_nvfp4": "",
    "activate_and_quantize_nvfp4": "",
    "quantize_per_token_nvfp4": "",
    "round_nvfp4": "",
    "round_per_token_nvfp4": "",
    "global_scale": " (a multiple of 16 elements, or of 16 a row; else the reference)",
    "dequantize_nvfp4": "",
    "swizzle_sf": "",
    "unswizzle_sf": "",
    "prepack_weight": "",
    "router_logits": " (a few tokens, rows of a multiple of 8 elements; else a product in fp64)",
    "softmax_top_k": " (at most 32 experts of 1024; else the reference)",
    "sigmoid_top_k": " (at most 32 experts of 1024, 32 groups; else the reference)",
    "sort_by_expert": "",
    "permute": "",
    "combine": "",
    "grouped_scaled_mm": " (bf16 or NVFP4 rows, bf16 or fp32 out; else the reference)",
}


def device_types() -> Sequence[str]:
    """Device types this process could run on: the CPU, and CUDA where a GPU is visible."""
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def backend_info() -> dict[str, dict[str, str]]:
    """Implementation of every op on every device type of this machine, and why.

    Returns:
        {op name: {device type: implementation}}. "PyTorch reference" is correct everywhere and
        meant for tests, tracing and debugging; on a GPU it multiplies every row with every
        expert, so that nothing waits for the host.
    """
    info = {name: dict.fromkeys(device_types(), REFERENCE) for name in registered_ops()}
    if "cuda" in device_types():
        reason = kernels.why_no_kernels(torch.device("cuda", 0))
        for name, limits in HAVE_KERNELS.items():
            kernel = f"CuTe DSL {kernels.ARCHITECTURE}{limits}"
            info[name]["cuda"] = kernel if reason is None else f"{REFERENCE}: {reason}"
    return info
