"""Launch of ``router_logits``."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvfp4_ops.kernels.launch.tensors import FLOAT_DTYPES, GetCompiled, Launch

THREADS = 128
VECTOR_ELEMENTS = 8
# Beyond either, a matrix product in fp64 tensor cores makes up for what its casts cost.
MAX_TOKENS, MAX_PRODUCTS = 128, 1 << 26
MAX_TOKENS_PER_CTA = 8


@dataclass(frozen=True)
class RouterLogitsConfig:
    """tokens: that a CTA multiplies with its expert's row."""

    dtype: torch.dtype
    weight_dtype: torch.dtype
    tokens: int

    def __post_init__(self) -> None:
        for name in ("dtype", "weight_dtype"):
            if getattr(self, name) not in FLOAT_DTYPES:
                raise ValueError(f"{name}: must be one of {list(FLOAT_DTYPES)}, got {self}")
        if not 1 <= self.tokens <= MAX_TOKENS_PER_CTA:
            raise ValueError(f"tokens: must be 1 to {MAX_TOKENS_PER_CTA}, got {self.tokens}")


def why_no_router_logits(x: Tensor, weight: Tensor) -> str | None:
    """Why the kernel does not multiply x (T, H) by weight (E, H), or None where it does."""
    num_tokens, hidden = x.shape
    if num_tokens > MAX_TOKENS or num_tokens * weight.numel() > MAX_PRODUCTS:
        return f"the kernel is not for {num_tokens} tokens and a weight of {weight.numel()}"
    if hidden % VECTOR_ELEMENTS:
        return f"the kernel takes H in multiples of {VECTOR_ELEMENTS}, got {hidden}"
    return None


def prepare_router_logits(x: Tensor, weight: Tensor, get_compiled: GetCompiled) -> Launch:
    """logits = x @ weight.T, summed in fp64.

    x: (T, H), T and H positive, weight: (E, H), with ``why_no_router_logits`` None. get_compiled:
    from a ``RouterLogitsConfig`` to what ``build`` returns for it.

    Returns launch(x, weight, logits (T, E) fp32), all contiguous, x and weight at multiples of 16
    bytes.
    """
    reason = why_no_router_logits(x, weight)
    if reason is not None:
        raise ValueError(f"x: {reason}")
    tokens = min(1 << (x.shape[0] - 1).bit_length(), MAX_TOKENS_PER_CTA)
    return get_compiled(RouterLogitsConfig(x.dtype, weight.dtype, tokens))
