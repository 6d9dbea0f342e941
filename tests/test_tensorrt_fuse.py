"""Layers found in FX graphs and made one op each: needs torch alone."""

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from lowered_models import EXPERTS, HIDDEN, INTERMEDIATE, MODES, TOP_K, blocks, linear, moe
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx import GraphModule

import nvfp4_ops
from nvfp4_ops.lowering import tensorrt as lowering
from nvfp4_ops.lowering.tensorrt import versions
from nvfp4_ops.lowering.tensorrt.composite import LINEAR, MOE

each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


class Routed(nn.Module):
    """Experts with their routing given, as in models with a router of their own."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def routed(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """The last slot belongs to another rank."""
    index = torch.randint(EXPERTS, (num_tokens, TOP_K))
    index[-1:, -1:] = EXPERTS + 1
    return torch.randn(num_tokens, HIDDEN).to(dtype), index, torch.rand(num_tokens, TOP_K)


def exported(model: nn.Module, inputs: tuple[Tensor, ...], dynamic: bool = True) -> GraphModule:
    tokens = Dim("tokens", max=1024)
    shapes = tuple({0: tokens} for _ in inputs) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes).module()


def own_ops(graph_module: GraphModule) -> list[str]:
    names = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("nvfp4_ops")]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@each_mode
def test_fuse_makes_a_moe_one_op_of_the_same_bits(
    mode: Any, bias: bool, gated: bool, dynamic: bool
) -> None:
    model = Routed(moe(mode, bias=bias, gated=gated))
    fused = lowering.fuse(exported(model, routed(7), dynamic))
    assert own_ops(fused) == ["moe"]
    for num_tokens in (2, 7, 129) if dynamic else (7,):
        inputs = routed(num_tokens)
        assert_bytes_equal(fused(*inputs), model(*inputs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@each_mode
def test_fuse_makes_a_linear_layer_one_op_of_the_same_bits(
    mode: Any, bias: bool, dynamic: bool
) -> None:
    model = linear(mode, bias=bias, out_features=48)
    fused = lowering.fuse(exported(model, (torch.randn(5, 3, HIDDEN).bfloat16(),), dynamic))
    assert own_ops(fused) == ["linear"]
    for num_tokens in (2, 5, 50) if dynamic else (5,):
        x = torch.randn(num_tokens, 3, HIDDEN).bfloat16()
        assert_bytes_equal(fused(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_fuse_keeps_the_dtype(dtype: torch.dtype) -> None:
    model = Routed(moe("per_token", dtype=dtype))
    fused = lowering.fuse(exported(model, routed(7, dtype)))
    assert own_ops(fused) == ["moe"]
    inputs = routed(9, dtype)
    assert_bytes_equal(fused(*inputs), model(*inputs))


@pytest.mark.parametrize(
    "options", [{"activation": "swiglu_oai"}, {"activation_limit": 0.5}], ids=["oai", "limit"]
)
def test_fuse_keeps_activation_and_limit(options: dict[str, Any]) -> None:
    model = Routed(moe("per_token", **options))
    fused = lowering.fuse(exported(model, routed(7)))
    assert own_ops(fused) == ["moe"]
    inputs = routed(9)
    assert_bytes_equal(fused(*inputs), model(*inputs))


def test_fuse_takes_prepacked_weights() -> None:
    model = nn.ModuleList([moe("per_token"), linear("per_token")])
    for module in model.modules():
        if isinstance(module, nvfp4_ops.projection.ExpertProjection):
            module.weight = module._prepacked(module.weight, module.weight_scale)
            module.weight_scale = None
    fused = lowering.fuse(exported(Routed(model[0]), routed(7)))
    inputs = routed(9)
    assert own_ops(fused) == ["moe"]
    assert_bytes_equal(fused(*inputs), model[0](*inputs))
    fused = lowering.fuse(exported(model[1], inputs[:1]))
    assert own_ops(fused) == ["linear"]
    assert_bytes_equal(fused(inputs[0]), model[1](inputs[0]))


def test_fuse_takes_every_layer_of_a_model() -> None:
    model = blocks("static", 3)
    x = torch.randn(2, 5, HIDDEN).bfloat16()
    fused = lowering.fuse(exported(model, (x,), dynamic=False))
    assert own_ops(fused) == ["linear", "router_logits", "softmax_top_k", "moe"] * 3
    assert_bytes_equal(fused(x), model(x))


def test_fuse_takes_one_expert_for_a_moe() -> None:
    model = Routed(moe(None, num_experts=1))
    x, _, weights = routed(7)
    index = torch.zeros_like(weights, dtype=torch.int32)
    fused = lowering.fuse(exported(model, (x, index, weights)))
    assert own_ops(fused) == ["moe"]
    assert_bytes_equal(fused(x, index, weights), model(x, index, weights))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fuse_takes_graphs_of_torch_compile(dynamic: bool) -> None:
    """Where weights are inputs of the graph."""
    from torch._dynamo.backends.common import aot_autograd

    torch.compiler.reset()
    graphs = []

    def backend(graph_module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(lowering.fuse(graph_module))
        return graphs[-1].forward

    model = blocks("per_tensor", 1)
    compiled = torch.compile(
        model, backend=aot_autograd(fw_compiler=backend), dynamic=dynamic, fullgraph=True
    )
    x = torch.randn(2, 5, HIDDEN).bfloat16()
    with torch.no_grad():
        assert_bytes_equal(compiled(x), model(x))
    assert [own_ops(graph) for graph in graphs] == [
        ["linear", "router_logits", "softmax_top_k", "moe"]
    ]


# Graphs that look like a layer and are none.


def mm(rows: Tensor, projection: Any, offs: Tensor, **options: Any) -> Tensor:
    return nvfp4_ops.grouped_scaled_mm(
        rows,
        projection.weight,
        None,
        projection.weight_scale,
        options.pop("alpha"),
        offs,
        **options,
    )


class Unlike(nn.Module):
    """The ops of a MoE with one thing that is different."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.experts = moe("static", gated=False)
        self.register_buffer("ends", torch.arange(1, EXPERTS + 1, dtype=torch.int32))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        what, first, down = self.what, self.experts.up_proj, self.experts.down_proj
        offs, token_of_row, row_of_slot = nvfp4_ops.sort_by_expert(index, EXPERTS)
        others = nvfp4_ops.sort_by_expert(index.flip(0), EXPERTS)
        token = others[1] if what == "tokens of another sort" else token_of_row
        if what == "a row scale per row":
            scale = nvfp4_ops.global_scale(x, per_token=True)[token.clamp(min=0)]
            rows = nvfp4_ops.round_nvfp4(x, scale, token_of_row=token)
        elif what == "rows rounded with the ends":
            rows = nvfp4_ops.round_nvfp4(x, first.static_scale, offs, token_of_row=token)
        else:
            rows = nvfp4_ops.round_nvfp4(x, first.static_scale, token_of_row=token)
        hidden = mm(rows, first, offs, alpha=first.static_alpha, activation="relu2")
        if what == "an op between the projections":
            hidden = hidden * 2
        if what == "another mode":
            hidden, row_scale = nvfp4_ops.round_per_token_nvfp4(hidden, offs)
            out = mm(hidden, down, offs, alpha=down.weight_scale_2, row_scale=row_scale)
        else:
            ends = self.ends if what == "rounded with other ends" else offs
            hidden = nvfp4_ops.round_nvfp4(hidden, down.static_scale, ends)
            ends = others[0] if what == "ends of another sort" else offs
            activation = "silu" if what == "an activation at the end" else None
            out = mm(hidden, down, ends, alpha=down.static_alpha, activation=activation)
        return nvfp4_ops.combine(
            out, others[2] if what == "slots of another sort" else row_of_slot, weights
        )


@pytest.mark.parametrize(
    "what",
    [
        "tokens of another sort",
        "rows rounded with the ends",
        "an op between the projections",
        "another mode",
        "rounded with other ends",
        "ends of another sort",
        "an activation at the end",
        "slots of another sort",
    ],
)
def test_fuse_leaves_what_is_not_quite_a_moe(what: str) -> None:
    model = Unlike(what)
    graph = lowering.fuse(exported(model, routed(7)))
    assert "moe" not in own_ops(graph)
    assert own_ops(graph).count("grouped_scaled_mm") == 2
    inputs = routed(9)
    assert_bytes_equal(graph(*inputs), model(*inputs))


@pytest.mark.parametrize("what", ["nothing", "a row scale per row"])
def test_fuse_takes_the_model_of_these_differences(what: str) -> None:
    """Without a difference, or the tests above would prove nothing; or with scales of its own."""
    model = Unlike(what)
    graph = lowering.fuse(exported(model, routed(7)))
    assert own_ops(graph)[-1] == "moe"
    assert "round_nvfp4" not in own_ops(graph)
    inputs = routed(9)
    assert_bytes_equal(graph(*inputs), model(*inputs))


def test_fuse_leaves_an_activation_of_ones_own() -> None:
    def square(x: Tensor) -> Tensor:
        return x[:, :INTERMEDIATE].square()

    model = Routed(moe(None, activation=square))
    graph = lowering.fuse(exported(model, routed(7)))
    assert "moe" not in own_ops(graph)
    inputs = routed(9)
    assert_bytes_equal(graph(*inputs), model(*inputs))


class FewerRows(nn.Module):
    """A grouped mm with one expert whose last rows are of no expert."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = linear(None)

    def forward(self, x: Tensor) -> Tensor:
        offs = torch.full((1,), x.shape[0] - 1, dtype=torch.int32)
        projection = self.linear.projection
        return mm(x, projection, offs, alpha=projection.weight_scale_2)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fuse_leaves_a_grouped_mm_of_fewer_rows(dynamic: bool) -> None:
    model, x = FewerRows(), torch.randn(7, HIDDEN).bfloat16()
    graph = lowering.fuse(exported(model, (x,), dynamic))
    assert own_ops(graph) == ["grouped_scaled_mm"]
    assert_bytes_equal(graph(x), model(x))


@pytest.mark.parametrize("rows", [6, 7])
def test_fuse_reads_ends_that_were_folded_to_a_constant(rows: int) -> None:
    model, x = linear("static"), torch.randn(7, HIDDEN).bfloat16()
    graph = exported(model, (x,), dynamic=False)
    (full,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)
    graph.register_buffer("_frozen", torch.tensor([rows], dtype=torch.int32))
    with graph.graph.inserting_before(full):
        full.replace_all_uses_with(graph.graph.get_attr("_frozen"))
    assert own_ops(lowering.fuse(graph)) == (
        ["linear"] if rows == 7 else ["round_nvfp4", "grouped_scaled_mm"]
    )


class AlsoReturnsHidden(Unlike):
    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        offs, _, _ = nvfp4_ops.sort_by_expert(index, EXPERTS)
        return self.experts(x, index, weights), offs


def test_fuse_keeps_ops_that_others_use() -> None:
    model = AlsoReturnsHidden("nothing")
    graph = lowering.fuse(exported(model, routed(7)))
    assert sorted(own_ops(graph)) == ["moe", "sort_by_expert"]
    inputs = routed(9)
    for got, want in zip(graph(*inputs), model(*inputs), strict=True):
        assert_bytes_equal(got, want)


# The composite ops.


def composite_arguments(mode: Any, num_tokens: int) -> dict[Any, tuple[Any, ...]]:
    first, down = moe(mode, bias=True).projections().values()
    single = linear(mode).projection

    def tensors(projection: Any) -> tuple[Any, ...]:
        alpha = projection.static_alpha if mode == "static" else projection.weight_scale_2
        scale = projection.static_scale
        return projection.weight, projection.weight_scale, alpha, scale, projection.bias

    inputs = routed(num_tokens)
    return {
        MOE: (*inputs, *tensors(first), *tensors(down), mode, "silu_mul", None, None, None),
        LINEAR: (inputs[0], *tensors(single), mode, None),
    }


@pytest.mark.parametrize("op", [MOE, LINEAR], ids=str)
@each_mode
def test_composite_passes_opcheck(mode: Any, op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # The CPU has no allclose for float8.
    allclose = torch.allclose
    monkeypatch.setattr(
        torch,
        "allclose",
        lambda a, b, **k: (
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            if a.dtype == torch.float8_e4m3fn
            else allclose(a, b, **k)
        ),
    )
    torch.library.opcheck(op, composite_arguments(mode, 9)[op])


@pytest.mark.parametrize("num_tokens", [0, 1, 129])
@pytest.mark.parametrize("op", [MOE, LINEAR], ids=str)
def test_composite_fake_has_the_metadata_of_eager(op: Any, num_tokens: int) -> None:
    arguments = composite_arguments("per_token", num_tokens)[op]
    eager = op(*arguments)
    with FakeTensorMode() as mode:
        fake = op(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    assert (fake.shape, fake.dtype, fake.stride()) == (eager.shape, eager.dtype, eager.stride())
    assert eager.shape == (num_tokens, HIDDEN)


@pytest.mark.parametrize("prepacked", [False, True], ids=["canonical", "prepacked"])
def test_fuse_knows_the_size_of_experts_that_return_another(prepacked: bool) -> None:
    """A graph of the ops need not come from NVFP4MoE, whose output has the size of its input."""
    out_features = HIDDEN + 16
    w = nvfp4_ops.quantize_weight(torch.randn(EXPERTS, out_features, INTERMEDIATE).bfloat16())
    down = w.codes, w.block_scale, None
    if prepacked:
        down = nvfp4_ops.prepack_weight(w.codes, w.block_scale), None, out_features
    first = moe(None).first_proj

    class Experts(nn.Module):
        def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            offs, token_of_row, row_of_slot = nvfp4_ops.sort_by_expert(index, EXPERTS)
            hidden = nvfp4_ops.grouped_scaled_mm(
                nvfp4_ops.permute(x, token_of_row),
                first.weight,
                None,
                first.weight_scale,
                first.weight_scale_2,
                offs,
                activation="silu_mul",
            )
            rows = nvfp4_ops.grouped_scaled_mm(
                hidden, down[0], None, down[1], w.global_scale, offs, num_columns=down[2]
            )
            return nvfp4_ops.combine(rows, row_of_slot, weights)

    index, weights = nvfp4_ops.softmax_top_k(torch.randn(6, EXPERTS), TOP_K)
    inputs = (torch.randn(6, HIDDEN).bfloat16(), index, weights)
    model = Experts().eval()
    fused = lowering.fuse(torch.export.export(model, inputs).module())
    assert len(fused.graph.find_nodes(op="call_function", target=MOE)) == 1
    again = torch.export.export(fused, inputs)
    (output,) = again.graph.output_node().args[0]
    assert output.meta["val"].shape == (6, out_features)
    assert_bytes_equal(fused(*inputs), model(*inputs))


def test_composite_backward_raises_as_that_of_any_op() -> None:
    x, *others = composite_arguments(None, 3)[LINEAR]
    out = LINEAR(x.requires_grad_(), *others)
    with pytest.raises(NotImplementedError, match="for inference"):
        out.sum().backward()


# Importing and its errors.


def test_lowering_import_brings_no_tensorrt() -> None:
    code = (
        "import sys, nvfp4_ops.lowering.tensorrt\n"
        "print({'tensorrt', 'tensorrt_rtx', 'torch_tensorrt'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that just these are installed."""

    def pretend(torch_version: str, **packages: str) -> None:
        found = {name.replace("_", "-"): number for name, number in packages.items()}

        def version(name: str) -> str:
            if name not in found:
                raise versions.PackageNotFoundError(name)
            return found[name]

        def import_module(name: str) -> None:
            raise OSError("libnvinfer.so.10: cannot open shared object file")

        monkeypatch.setattr(versions, "version", version)
        monkeypatch.setattr(versions.torch, "__version__", torch_version)
        monkeypatch.setattr(versions.importlib, "import_module", import_module)

    return pretend


FITS_2_13 = (
    "torch 2.13.0 goes with torch-tensorrt==2.13.0 (TensorRT 11.0) or "
    "torch-tensorrt-rtx==2.13.0 (TensorRT-RTX 1.5), not with both"
)


@pytest.mark.parametrize(
    ("torch_version", "packages", "message"),
    [
        ("2.13.0", {}, f"torch-tensorrt is not installed; {FITS_2_13}"),
        (
            "2.13.0",
            {"torch_tensorrt": "2.11.0"},
            f"torch-tensorrt 2.11.0 is not made for torch 2.13.0; {FITS_2_13}",
        ),
        (
            "2.11.0+cu130",
            {"torch_tensorrt_rtx": "2.13.0"},
            "torch-tensorrt-rtx 2.13.0 is not made for torch 2.11.0+cu130; torch 2.11.0+cu130 goes "
            "with torch-tensorrt==2.11.0 (TensorRT 10.15)",
        ),
        (
            "2.15.0",
            {},
            "torch-tensorrt is not installed; no torch-tensorrt is known to fit torch 2.15.0; "
            "known are torch 2.11 with 2.11.0,",
        ),
        (
            "2.13.0",
            {"torch_tensorrt": "2.13.0", "torch_tensorrt_rtx": "2.13.0"},
            "torch-tensorrt 2.13.0 and torch-tensorrt-rtx 2.13.0 are both installed",
        ),
        (
            "2.13.0",
            {"torch_tensorrt": "2.13.0", "tensorrt": "10.9.0"},
            "torch-tensorrt 2.13.0 cannot be imported with tensorrt 10.9.0 (OSError: libnvinfer",
        ),
    ],
    ids=["absent", "older", "newer", "unknown", "both", "broken"],
)
def test_register_names_the_versions_that_fit(
    installed: Callable[..., None], torch_version: str, packages: dict[str, str], message: str
) -> None:
    installed(torch_version, **packages)
    with pytest.raises(ImportError, match=re.escape(message)):
        lowering.register()
