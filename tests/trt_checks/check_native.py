"""NVFP4Linear as TensorRT's own layers: engines built for a GPU that is not here, and numerics.

TensorRT-RTX builds without a GPU. Nothing here runs an engine: numerics are those of the network's
layers, computed by torch as TensorRT documents them.
"""

from typing import Any

import pytest
import torch
import without_gpu
from compare import assert_gemm_close
from lowered_models import INPUT_SCALE, hidden_states, linear
from torch import Tensor
from torch.export import Dim

import nvfp4_ops
from nvfp4_ops import reference

without_gpu.import_torch_tensorrt()

import tensorrt as trt  # noqa: E402
from torch_tensorrt import Input  # noqa: E402

from nvfp4_ops.lowering import tensorrt as lowering  # noqa: E402

K, N, MAX_TOKENS = 64, 48, 4096
QUANTIZED = ["DYNAMIC_QUANTIZE", "DEQUANTIZE", "DEQUANTIZE"]
WEIGHT = ["DEQUANTIZE", "DEQUANTIZE"]

each_mode = pytest.mark.parametrize("mode", [None, "static"], ids=str)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda x: str(x)[6:]
)


@pytest.fixture(autouse=True)
def _register() -> None:
    lowering.register()


def interpreter_of(layer: Any, x: Tensor, dynamic: bool = False) -> Any:
    """The layer as a whole is one engine."""
    shapes = ({0: Dim("tokens", max=MAX_TOKENS)},) if dynamic else None
    with without_gpu.pretend((12, 0)):
        split = without_gpu.partition(layer, x, dynamic_shapes=shapes)
        ((kind, names),) = without_gpu.parts_of(split)
        assert kind == "engine"
        assert "nvfp4_ops.linear" in names
        if dynamic:
            least, most = ((size, *x.shape[1:]) for size in (1, MAX_TOKENS))
            spec = Input(
                min_shape=least, opt_shape=x.shape, max_shape=most, dtype=x.dtype, name="x"
            )
        else:
            spec = Input(x.shape, dtype=x.dtype, name="x")
        (engine,) = [module for _, module in split.named_children()] or [split]
        return without_gpu.network_of(engine, spec)


def layer_types(network: Any, *kinds: str) -> list[str]:
    names = [network.get_layer(i).type.name for i in range(network.num_layers)]
    return [name for name in names if name in kinds]


@pytest.mark.parametrize(
    ("dynamic", "bias"), [(False, False), (True, True)], ids=["static_m", "dynamic_m-bias"]
)
@each_dtype
@each_mode
def test_native_builds_for_sm120_and_not_for_sm89(
    mode: Any, dtype: torch.dtype, bias: bool, dynamic: bool
) -> None:
    layer = linear(mode, out_features=N, bias=bias, dtype=dtype)
    interpreter = interpreter_of(layer, torch.randn(6, K, dtype=dtype), dynamic)
    layers = layer_types(
        interpreter.ctx.net, "DYNAMIC_QUANTIZE", "DEQUANTIZE", "MATRIX_MULTIPLY", "ELEMENTWISE"
    )
    expected = (QUANTIZED if mode else []) + WEIGHT + ["MATRIX_MULTIPLY"]
    assert layers == expected + ["ELEMENTWISE"] * bias
    engine = without_gpu.build(interpreter, "SM120")
    assert engine is not None
    assert engine.nbytes > N * K // 2
    # A GPU without FP4: the builder itself refuses, so the layers are indeed FP4.
    assert without_gpu.build(interpreter, "SM89") is None


def test_native_builds_with_leading_dimensions() -> None:
    interpreter = interpreter_of(linear("static"), hidden_states(2, 3), dynamic=True)
    assert without_gpu.build(interpreter, "SM120") is not None


# Numerics.


def round_e2m1(values: Tensor) -> Tensor:
    """To nearest, ties to the even code."""
    size = values.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return (torch.round(size / step) * step).clamp(max=6.0).copysign(values)


def dynamic_quantize(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and block scales, as floats."""
    blocks = x.float().unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(dim=-1, keepdim=True)
    block_scale = (amax / 6 / scale).clamp(max=448).to(torch.float8_e4m3fn).float()
    codes = round_e2m1(blocks / (block_scale * scale))
    return torch.where(block_scale == 0, 0, codes).flatten(-2), block_scale.squeeze(-1)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if scale.ndim:
        scale = scale.repeat_interleave(16, dim=-1)
    return (codes.float() * scale.float()).to(dtype)


def constant(tensor: Tensor, dtype: Any) -> Tensor:
    if dtype == trt.DataType.FP4:
        return reference.decode_e2m1(reference.unpack_codes(tensor))
    return tensor


def run_network(interpreter: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output and every tensor by name; each layer as TensorRT documents it."""
    network = interpreter.ctx.net
    values = {network.get_input(0).name: x}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        inputs = [values[layer.get_input(j).name] for j in range(layer.num_inputs)]
        kind, out = layer.type.name, layer.get_output(0)
        if kind == "CONSTANT":
            results = (constant(interpreter.ctx.weight_refit_map[layer.name], out.dtype),)
        elif kind == "DYNAMIC_QUANTIZE":
            results = dynamic_quantize(*inputs)
        elif kind == "DEQUANTIZE":
            results = (dequantize(*inputs, x.dtype),)
        elif kind == "MATRIX_MULTIPLY":
            results = ((inputs[0].double() @ inputs[1].double().T).to(x.dtype),)
        elif kind == "ELEMENTWISE":
            results = (inputs[0] + inputs[1],)
        else:
            assert kind in ("SHUFFLE", "CAST", "IDENTITY"), kind
            results = (inputs[0].reshape(tuple(out.shape)),)
        values |= {layer.get_output(j).name: result for j, result in enumerate(results)}
    return values[network.get_output(0).name], values


def decoded_operands(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and weight that the layer multiplies, in float64."""
    projection = layer.projection
    weight = nvfp4_ops.dequantize_nvfp4(
        projection.weight, projection.weight_scale, projection.weight_scale_2
    )[0].double()
    if layer.activation_scale is None:
        return x.double(), weight
    rows = nvfp4_ops.round_nvfp4(x, projection.static_scale.squeeze())
    return rows.double() * projection.static_scale.double(), weight


@each_mode
def test_native_computes_what_the_layer_computes(mode: Any) -> None:
    layer, x = linear(mode, out_features=N), torch.randn(129, K).bfloat16()
    out, _ = run_network(interpreter_of(layer, x), x)
    rows, weight = decoded_operands(layer, x)
    exact = rows @ weight.T
    bf16_pytorch = rows.bfloat16() @ weight.bfloat16().T
    assert_gemm_close(layer(x), exact, bf16_pytorch)
    assert_gemm_close(out, exact, bf16_pytorch)


def test_native_adds_the_bias() -> None:
    layer, x = linear("static", out_features=N, bias=True), torch.randn(5, K).bfloat16()
    with_bias, _ = run_network(interpreter_of(layer, x), x)
    layer.projection.bias.zero_()
    without, _ = run_network(interpreter_of(layer, x), x)
    layer.projection.bias.copy_(torch.arange(N))
    plus, _ = run_network(interpreter_of(layer, x), x)
    assert not torch.equal(with_bias, without)
    torch.testing.assert_close(plus, without + torch.arange(N).bfloat16(), rtol=0, atol=0)


def test_native_rounds_to_the_codes_of_quantize_nvfp4() -> None:
    x = torch.randn(129, K).bfloat16()
    x[0], x[1, :16], x[2, 0] = 0.0, 0.0, 1e4
    interpreter = interpreter_of(linear("static"), x)
    _, values = run_network(interpreter, x)
    network = interpreter.ctx.net
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    (quantize,) = [layer for layer in layers if layer.type.name == "DYNAMIC_QUANTIZE"]
    codes, block_scale = (values[quantize.get_output(i).name] for i in range(2))
    own_codes, own_scale = nvfp4_ops.quantize_nvfp4(x, torch.tensor(INPUT_SCALE))
    assert torch.equal(block_scale, own_scale.float())
    different = codes != reference.decode_e2m1(reference.unpack_codes(own_codes))
    # Ties that another order of fp32 operations decides.
    assert different.float().mean() < 1e-3


def test_native_constants_are_the_checkpoint_s_own() -> None:
    """Low nibble first, linear scales, global scales in the direction of decoding."""
    layer = linear("static")
    constants = interpreter_of(layer, hidden_states(3)).ctx.weight_refit_map
    by_end = {name.rsplit("linear_default", 1)[-1]: tensor for name, tensor in constants.items()}
    projection = layer.projection
    assert torch.equal(by_end["_weight"], projection.weight[0])
    assert torch.equal(
        by_end["_weight_scale"].view(torch.uint8), projection.weight_scale[0].view(torch.uint8)
    )
    torch.testing.assert_close(by_end["_weight_scale_2"], projection.weight_scale_2[0])
    assert by_end["_input_scale"] == torch.tensor(INPUT_SCALE)


# Why not.


def refused(layer: Any, x: Tensor) -> str:
    """The reason, of a GPU with FP4."""
    from nvfp4_ops.lowering.tensorrt import native

    native.warn_of_torch.cache_clear()
    with without_gpu.pretend((12, 0)), pytest.warns(UserWarning, match="stays in") as caught:
        split = without_gpu.partition(layer, x)
    assert ("torch", ["nvfp4_ops.linear"]) in without_gpu.parts_of(split)
    (message,) = {str(w.message) for w in caught if "stays in PyTorch" in str(w.message)}
    return message


def test_native_refuses_prepacked_weights() -> None:
    layer = linear("static")
    projection = layer.projection
    projection.weight = projection._prepacked(projection.weight, projection.weight_scale)
    projection.weight_scale = None
    assert "weights are prepacked" in refused(layer, hidden_states(3))


class GivenScale(torch.nn.Module):
    """A static scale that is computed, or a weight that is, or two scales for two halves."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.linear = what, linear("static")

    def forward(self, x: Tensor) -> Tensor:
        projection = self.linear.projection
        scale, weight = projection.static_scale, projection.weight
        if self.what == "input_scale":
            scale = scale * x.float().amax().clamp(min=1.0)
        if self.what == "weight":
            weight = weight + (x.amax() > 1e9).to(torch.uint8)
        alpha = projection.static_alpha
        if self.what == "alpha":
            alpha = torch.stack([alpha, 2 * alpha], dim=-1)
        offs = torch.full((1,), x.shape[0], dtype=torch.int32)
        return nvfp4_ops.grouped_scaled_mm(
            nvfp4_ops.round_nvfp4(x, scale, offs),
            weight,
            None,
            projection.weight_scale,
            alpha,
            offs,
        )


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("input_scale", "its input_scale is not a constant of the graph"),
        ("weight", "its weight is not a constant of the graph"),
        ("alpha", "its alpha has 2 numbers, and TensorRT takes one"),
    ],
)
def test_native_refuses_scales_and_weights_of_another_kind(what: str, reason: str) -> None:
    assert reason in refused(GivenScale(what), hidden_states(3))
