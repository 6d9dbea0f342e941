"""A model with NVFP4 layers through Torch-TensorRT: ``python examples/compile_tensorrt.py``.

On a GPU the model is compiled, run and compared with eager. Without one it is partitioned, and its
engines are built for a GPU that is not here (SM120, by TensorRT-RTX, as `make test` installs it):
attention, norms and NVFP4Linear are engines, each NVFP4MoE is one piece of PyTorch between them.
Without torch_tensorrt it shows what TensorRT would be given.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

import nvfp4_ops
from nvfp4_ops.lowering import tensorrt as lowering

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 256, 128, 8, 2, 2
TARGET = "SM120"


class Block(nn.Module):
    """Attention, then experts; bf16 but for the NVFP4 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.out = nvfp4_ops.NVFP4Linear.from_float(nn.Linear(HIDDEN, HIDDEN))
        self.experts = nvfp4_ops.NVFP4MoE.from_float(
            torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN) / HIDDEN**0.5,
            torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) / INTERMEDIATE**0.5,
            router=nvfp4_ops.SoftmaxRouter(HIDDEN, EXPERTS, TOP_K),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, dim=-1)
        attention = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attention.squeeze(1))
        return x + self.experts(self.norm(x))


def run_on_gpu(model: nn.Module, x: Tensor) -> None:
    import torch_tensorrt

    lowering.register()
    model, x = model.cuda(), x.cuda()
    compiled = torch_tensorrt.compile(model, ir="dynamo", arg_inputs=[x], min_block_size=1)
    parts = [name for name, _ in compiled.named_children()]
    engines = sum(name.startswith("_run_on_acc") for name in parts)
    out, expected = compiled(x), model(x)
    error = (out - expected).float().norm() / expected.float().norm()
    print(f"{engines} engines, {len(parts) - engines} parts in PyTorch; error {error:.1e}")


def build_without_gpu(model: nn.Module, x: Tensor) -> None:
    sys.path.append(str(Path(__file__).parent.parent / "tests" / "trt_checks"))
    import without_gpu

    without_gpu.import_torch_tensorrt()
    from torch_tensorrt.dynamo.partitioning import construct_submodule_inputs

    lowering.register()
    with without_gpu.pretend((12, 0)):
        split = without_gpu.partition(model, x)
        children = [child for _, child in split.named_children()]
        for module, (kind, ops) in zip(children, without_gpu.parts_of(split), strict=True):
            if kind == "torch":
                print(f"PyTorch: {', '.join(ops)}")
                continue
            inputs = construct_submodule_inputs(module)
            interpreter = without_gpu.network_of(module, *inputs)
            engine = without_gpu.build(interpreter, TARGET)
            linears = ops.count("nvfp4_ops.linear")
            size = f"{engine.nbytes >> 10} KiB for {TARGET}"
            print(f"engine:  {len(ops)} ops, {linears} of them NVFP4Linear, {size}")


def show_graph(model: nn.Module, x: Tensor) -> None:
    graph_module = torch.export.export(model, (x,)).module()
    before = len(graph_module.graph.nodes)
    nodes = lowering.fuse(graph_module).graph.find_nodes
    ops = torch.ops.nvfp4_ops
    layers = [len(nodes(op="call_function", target=op.default)) for op in (ops.moe, ops.linear)]
    print(f"{before} nodes -> {len(graph_module.graph.nodes)}")
    print("{} NVFP4MoE and {} NVFP4Linear are one op each for TensorRT".format(*layers))


@torch.no_grad()
def main() -> None:
    model = nn.Sequential(*(Block() for _ in range(LAYERS))).to(torch.bfloat16).eval()
    x = torch.randn(1, 32, HIDDEN, dtype=torch.bfloat16)
    if find_spec("torch_tensorrt") is None:
        show_graph(model, x)
    elif torch.cuda.is_available():
        run_on_gpu(model, x)
    else:
        build_without_gpu(model, x)


if __name__ == "__main__":
    main()
