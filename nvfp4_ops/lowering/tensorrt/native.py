"""NVFP4Linear as TensorRT's own layers: dynamic quantize, dequantize, matrix multiply.

TensorRT recognises the pattern and runs it on tensor cores with FP4. Its rule of rounding
activations is that of ``round_nvfp4`` but for the order of fp32 operations, so a code differs now
and then. Where a GPU has no kernel for the pattern, as weight-only, weights are decoded to the
dtype of x, block scale times global scale first, which TensorRT wants in that dtype too.
Imports TensorRT: only ``register`` imports this.
"""

import warnings
from functools import cache
from typing import Any

import tensorrt as trt
import torch
from torch import Tensor
from torch.fx import Node
from torch_tensorrt.dynamo.conversion import ConversionContext

from nvfp4_ops import format as nvfp4
from nvfp4_ops.lowering.tensorrt.composite import LINEAR
from nvfp4_ops.lowering.tensorrt.constants import add_constant, constants_of

OLDEST_WITH_FP4 = (10, 0)
"""Compute capability."""

LINEAR_RANK = 3
"""Of linear block scales (E, N, K/16); swizzled ones have rank 4."""

_MODE = [x.name for x in LINEAR._schema.arguments].index("activation_scale")


def why_no_native_linear(node: Node, settings: Any = None) -> str | None:
    """Why TensorRT cannot run this nvfp4_ops::linear itself; None where it can.

    settings: torch_tensorrt's CompilationSettings, whose device is asked.
    """
    device = settings.device.gpu_id if settings is not None else None
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_WITH_FP4:
        return "TensorRT has FP4 from compute capability {}.{} on, this GPU has {}.{}".format(
            *OLDEST_WITH_FP4, *capability
        )
    if not getattr(settings, "use_explicit_typing", True):
        return "FP4 needs torch_tensorrt's use_explicit_typing=True"
    tensors = constants_of(node)
    if isinstance(tensors, str):
        return tensors
    mode = node.args[_MODE]
    if mode not in (None, "static"):
        return (
            f'activation_scale is "{mode}", and TensorRT wants the global scale of activations at '
            'build time: use "static" or None'
        )
    if tensors["weight_scale"] is None:
        return "its weights are prepacked for the grouped mm of this package"
    if tensors["weight_scale"].ndim != LINEAR_RANK:
        return "its weight scales are swizzled"
    for name in ("alpha", "input_scale"):
        scale = tensors[name]
        if scale is not None and scale.numel() != 1:
            return f"its {name} has {scale.numel()} numbers, and TensorRT takes one"
    return None


@cache
def warn_of_torch(reason: str) -> None:
    """Once a reason: what was to be in the engine and is not must not look as if it were."""
    warnings.warn(f"NVFP4Linear stays in PyTorch: {reason}", stacklevel=2)


def convert_linear(
    ctx: ConversionContext,
    target: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    name: str,
) -> trt.ITensor:
    """x (M, K) -> (M, N) of the same dtype."""
    x, weight, weight_scale, alpha, input_scale, bias, mode, _ = args
    weight_global = alpha
    if mode == "static":
        weight_global = alpha / input_scale
        x = _round(ctx, x, input_scale, name)
    weight_NK = _decode_weight(ctx, weight[0], weight_scale[0], weight_global, x.dtype, name)
    product = ctx.net.add_matrix_multiply(
        x, trt.MatrixOperation.NONE, weight_NK, trt.MatrixOperation.TRANSPOSE
    )
    product.name = name
    out = product.get_output(0)
    if bias is None:
        return out
    bias_1N = _cast(ctx, add_constant(ctx, bias, f"{name}_bias"), out.dtype)
    added = ctx.net.add_elementwise(out, bias_1N, trt.ElementWiseOperation.SUM)
    added.name = f"{name}_add_bias"
    return added.get_output(0)


def _round(ctx: ConversionContext, x: trt.ITensor, input_scale: Tensor, name: str) -> trt.ITensor:
    """x to NVFP4 and back: codes and block scales are inputs of the same fused layer."""
    axis = len(x.shape) - 1
    scale = _global_scale(ctx, input_scale, f"{name}_input_scale")
    quantize = ctx.net.add_dynamic_quantize(
        x, axis, nvfp4.BLOCK_SIZE, trt.DataType.FP4, trt.DataType.FP8
    )
    quantize.set_input(1, scale)
    quantize.name = f"{name}_quantize"
    block_scale = _dequantize(ctx, quantize.get_output(1), scale, x.dtype, f"{name}_block_scale")
    return _dequantize(ctx, quantize.get_output(0), block_scale, x.dtype, f"{name}_dequantize")


def _decode_weight(
    ctx: ConversionContext,
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    dtype: trt.DataType,
    name: str,
) -> trt.ITensor:
    """(N, K) of dtype, from codes (N, K/2) and linear block scales (N, K/16)."""
    n, packed_k = codes.shape
    shape = (n, packed_k * nvfp4.CODES_PER_BYTE)
    scale = _global_scale(ctx, global_scale, f"{name}_weight_scale_2")
    # Both formats keep the even element in the low nibble.
    packed = add_constant(ctx, codes, f"{name}_weight", trt.DataType.FP4, shape)
    block_scales = add_constant(ctx, block_scale, f"{name}_weight_scale")
    decoded = _dequantize(ctx, block_scales, scale, dtype, f"{name}_weight_scale_dequantize")
    return _dequantize(ctx, packed, decoded, dtype, f"{name}_weight_dequantize")


def _global_scale(ctx: ConversionContext, scale: Tensor, name: str) -> trt.ITensor:
    return add_constant(ctx, scale.float().reshape(()), name)


def _dequantize(
    ctx: ConversionContext, codes: trt.ITensor, scale: trt.ITensor, dtype: trt.DataType, name: str
) -> trt.ITensor:
    layer = ctx.net.add_dequantize(codes, scale, dtype)
    layer.axis = len(codes.shape) - 1
    layer.name = name
    return layer.get_output(0)


def _cast(ctx: ConversionContext, tensor: trt.ITensor, dtype: trt.DataType) -> trt.ITensor:
    return tensor if tensor.dtype == dtype else ctx.net.add_cast(tensor, dtype).get_output(0)
