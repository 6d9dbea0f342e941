"""Hugging Face models with NVFP4 experts; needs transformers >= 5.14.

Importing this makes ``AutoModelForCausalLM.from_pretrained`` load ModelOpt's NVFP4 checkpoints.
"""

from nvfp4_ops.huggingface.calibrate import calibrate_checkpoint
from nvfp4_ops.huggingface.load import load_pretrained
from nvfp4_ops.huggingface.quantizer import NVFP4Config, NVFP4Quantizer, register
from nvfp4_ops.huggingface.replace import replace_experts, set_activation_scale

__all__ = [
    "NVFP4Config",
    "NVFP4Quantizer",
    "calibrate_checkpoint",
    "load_pretrained",
    "replace_experts",
    "set_activation_scale",
]

register()
