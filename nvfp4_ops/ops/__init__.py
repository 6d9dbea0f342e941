"""The ops: one file each, with schema, check, fake kernel and kernels."""

from nvfp4_ops.ops.activate import activate_and_quantize_nvfp4
from nvfp4_ops.ops.dequantize import dequantize_nvfp4
from nvfp4_ops.ops.grouped_mm import grouped_scaled_mm
from nvfp4_ops.ops.per_token import quantize_per_token_nvfp4
from nvfp4_ops.ops.prepack import prepack_weight
from nvfp4_ops.ops.quantize import global_scale, quantize_nvfp4
from nvfp4_ops.ops.round import round_nvfp4, round_per_token_nvfp4
from nvfp4_ops.ops.swizzle import swizzle_sf, unswizzle_sf

__all__ = [
    "activate_and_quantize_nvfp4",
    "dequantize_nvfp4",
    "global_scale",
    "grouped_scaled_mm",
    "prepack_weight",
    "quantize_nvfp4",
    "quantize_per_token_nvfp4",
    "round_nvfp4",
    "round_per_token_nvfp4",
    "swizzle_sf",
    "unswizzle_sf",
]
