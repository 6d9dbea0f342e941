"""Torch-TensorRT: NVFP4 layers inside models that ``torch_tensorrt.compile`` takes.

    from nvfp4_ops.lowering import tensorrt
    tensorrt.register()
    compiled = torch_tensorrt.compile(model, ir="dynamo", arg_inputs=[x])

Attention and norms become engines, NVFP4MoE one PyTorch partition a layer, NVFP4Linear engine
layers where the GPU has FP4. TensorRT itself is imported by ``register`` alone.
"""

from nvfp4_ops.lowering.tensorrt.fusion import fuse
from nvfp4_ops.lowering.tensorrt.registration import register

__all__ = ["fuse", "register"]
