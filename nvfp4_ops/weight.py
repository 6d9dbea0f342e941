"""Quantize weights offline: quantize_weight, by the rule NVFP4 checkpoints are made with."""

from typing import NamedTuple

import torch
from torch import Tensor

from nvfp4_ops import format as nvfp4
from nvfp4_ops import reference
from nvfp4_ops.registry import check_dtype, check_multiple, check_shape, shape_text


class NVFP4Weight(NamedTuple):
    """An NVFP4 matrix, or one per expert, in the canonical (ModelOpt) layout.

    codes: (N, K / 2) or (E, N, K / 2) uint8, even k in the low nibble.
    block_scale: (N, K / 16) or (E, N, K / 16) float8_e4m3fn, linear.
    global_scale: () or (E,) fp32, decode.
    """

    codes: Tensor
    block_scale: Tensor
    global_scale: Tensor


@torch.no_grad()
def quantize_weight(w: Tensor, global_scale: Tensor | None = None) -> NVFP4Weight:
    """Quantize a weight, or each expert's, by ModelOpt's rule bit for bit.

        global_scale = amax(w) / (6 * 448)                          1.0 where that is 0
        block_scale  = e4m3(clamp(amax(block) / (6 * global_scale), 2^-9, 448))
        code         = e2m1(w / (block_scale * global_scale))       a true division

    All in fp32, to nearest with ties to even. Where amax(block) / (6 * global_scale) is zero the
    block scale is 1.0; where the quotient of a code is zero, as for -0.0, the code is 0, and a
    negative that rounds to zero is code 8. With a ``global_scale`` of one's own the rule
    is the same, and then Inf saturates (block scale 448, code 7 or 15) and NaN makes its block
    NaN (block scale byte 0x7F, codes 7).

    Args:
        w: (N, K) or (E, N, K) bf16, fp16 or fp32; K a multiple of 16.
        global_scale: fp32 () or, for three dimensions, (E,), positive and finite, or None to
            take it from w. A checkpoint's own is never recomputed: pass it.

    Returns:
        NVFP4Weight, on the device of w.

    Raises:
        TypeError: another dtype.
        ValueError: another shape; w is not finite and its global scale is to be taken from it
            (the message names the expert); global_scale is not positive and finite.
    """
    check_dtype("w", w, torch.bfloat16, torch.float16, torch.float32)
    if w.ndim not in (2, 3):
        raise ValueError(f"w: must be (N, K) or (E, N, K), got {shape_text(w)}")
    check_multiple("w", "K", w.shape[-1], nvfp4.BLOCK_SIZE)
    if global_scale is None:
        global_scale = _weight_global_scale(w)
    else:
        check_dtype("global_scale", global_scale, torch.float32)
        check_shape("global_scale", global_scale, tuple(w.shape[:-2]), "() or (E,)")
        if not bool((global_scale.isfinite() & (global_scale > 0)).all()):
            raise ValueError(f"global_scale: must be positive and finite, got {global_scale}")
    if w.ndim == 2:
        return NVFP4Weight(*reference.quantize_weight(w, global_scale), global_scale)
    # Expert by expert: the fp32 temporaries of one expert are all that is ever alive.
    *lead, k = w.shape
    codes = w.new_empty((*lead, nvfp4.packed_size(k)), dtype=torch.uint8)
    block_scale = w.new_empty((*lead, nvfp4.num_blocks(k)), dtype=torch.float8_e4m3fn)
    for expert, expert_w in enumerate(w):
        codes[expert], block_scale[expert] = reference.quantize_weight(
            expert_w, global_scale[expert]
        )
    return NVFP4Weight(codes, block_scale, global_scale)


def _weight_global_scale(w: Tensor) -> Tensor:
    amax = w.abs().amax(dim=(-2, -1)).float() if w.numel() else w.new_zeros(w.shape[:-2]).float()
    if not bool(amax.isfinite().all()):
        where = (
            f" in experts {(~amax.isfinite()).nonzero().flatten().tolist()}" if w.ndim == 3 else ""
        )
        raise ValueError(f"w: must be finite, got Inf or NaN{where}")
    return reference.global_scale_of_amax(amax)
