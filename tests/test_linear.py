"""NVFP4Linear: values, state dict, modes, compilation and errors."""

import copy

import pytest
import torch
from compare import assert_bytes_equal
from torch import Tensor, nn

from nvfp4_ops import (
    NVFP4Linear,
    NVFP4Weight,
    dequantize_nvfp4,
    global_scale,
    quantize_nvfp4,
    quantize_weight,
)

IN, OUT = 96, 48
MODES = (None, "static", "per_token", "per_tensor")


def float_linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(IN, OUT, bias=bias, dtype=torch.float32)


def calibrated(linear: nn.Linear, mode: str | None) -> NVFP4Linear:
    return NVFP4Linear.from_weight(
        quantize_weight(linear.weight),
        input_scale=torch.tensor([0.01]),
        bias=linear.bias,
        activation_scale=mode,
    )


def expected(linear: nn.Linear, x: Tensor, mode: str | None) -> Tensor:
    """By the definitions: decoded weight, decoded input, in fp64."""
    if mode is not None:
        scale = torch.tensor(0.01) if mode == "static" else global_scale(x, mode == "per_token")
        codes, sf = quantize_nvfp4(x, scale)
        x = dequantize_nvfp4(codes, sf, scale)
    weight = dequantize_nvfp4(*quantize_weight(linear.weight))
    out = x.double() @ weight.double().T
    return (out if linear.bias is None else out + linear.bias.double()).float()


@pytest.mark.parametrize("rows", [0, 1, 127, 129])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@torch.no_grad()
def test_linear_is_the_decoded_product(bias: bool, mode: str | None, rows: int) -> None:
    linear, x = float_linear(bias), torch.randn(rows, IN)
    got = calibrated(linear, mode)(x)
    torch.testing.assert_close(got, expected(linear, x, mode), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_linear_from_float_is_from_weight() -> None:
    linear, x = float_linear(), torch.randn(5, IN)
    assert torch.equal(NVFP4Linear.from_float(linear)(x), calibrated(linear, None)(x))


@torch.no_grad()
def test_linear_takes_any_leading_shape_and_strides() -> None:
    layer = calibrated(float_linear(), "per_token")
    x = torch.randn(3, IN, 2, 4).movedim(1, -1)
    assert not x.is_contiguous()
    flat = layer(x.reshape(-1, IN))
    assert_bytes_equal(layer(x), flat.reshape(3, 2, 4, OUT))
    assert_bytes_equal(layer(x[0, 0, 0]), flat[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_linear_returns_the_dtype_of_its_input(dtype: torch.dtype) -> None:
    layer, x = calibrated(float_linear(), "static"), torch.randn(4, IN).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), layer(x.float()).to(dtype), rtol=0, atol=0)


def test_linear_state_dict_is_modelopts() -> None:
    linear = float_linear()
    weight = quantize_weight(linear.weight)
    state = nn.Sequential(calibrated(linear, "static")).state_dict()
    want = {
        "0.weight": weight.codes,
        "0.weight_scale": weight.block_scale,
        "0.weight_scale_2": weight.global_scale,
        "0.input_scale": torch.tensor(0.01),
        "0.bias": linear.bias.detach(),
    }
    assert state.keys() == want.keys()
    for name, tensor in want.items():
        assert_bytes_equal(state[name], tensor, name)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_linear_state_dict_round_trips(mode: str | None) -> None:
    source, x = calibrated(float_linear(), mode), torch.randn(3, IN)
    target = NVFP4Linear(IN, OUT, bias=True, activation_scale=mode, dtype=torch.float32)
    target.load_state_dict(source.state_dict())
    assert_bytes_equal(target(x), source(x))
    assert_bytes_equal(copy.deepcopy(target)(x), source(x))


def test_linear_load_state_dict_refuses_other_dtypes() -> None:
    layer = NVFP4Linear(IN, OUT)
    state = layer.state_dict() | {"weight_scale_2": torch.ones((), dtype=torch.float64)}
    with pytest.raises(RuntimeError, match=r"weight_scale_2: must be torch\.float32"):
        layer.load_state_dict(state)


def test_linear_casts_its_bias_alone() -> None:
    layer = calibrated(float_linear(), "static").to(torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in layer.state_dict().items()}
    assert dtypes == {
        "weight": torch.uint8,
        "weight_scale": torch.float8_e4m3fn,
        "weight_scale_2": torch.float32,
        "input_scale": torch.float32,
        "bias": torch.bfloat16,
    }


@pytest.mark.parametrize("mode", MODES, ids=str)
@torch.no_grad()
def test_linear_compiles_as_one_dynamic_graph(mode: str | None) -> None:
    torch._dynamo.reset()
    layer = calibrated(float_linear(), mode)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        x = torch.randn(2, rows, IN)
        assert_bytes_equal(compiled(x), layer(x))


def test_linear_without_weights_is_zero() -> None:
    assert not NVFP4Linear(IN, OUT)(torch.randn(2, IN)).any()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((40, 48), "in_features: must be a positive multiple of 16, got 40"),
        ((48, 24), "out_features: must be a positive multiple of 16, got 24"),
        ((48, 0), "out_features: must be a positive multiple of 16, got 0"),
    ],
)
def test_linear_rejects_sizes(sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NVFP4Linear(*sizes)


def test_linear_rejects_static_without_input_scale() -> None:
    layer = NVFP4Linear.from_float(float_linear())
    with pytest.raises(ValueError, match=r'"static" needs linear\.input_scale'):
        layer.activation_scale = "static"
    assert layer.activation_scale is None
    with pytest.raises(ValueError, match="activation_scale: must be None or one of"):
        layer.activation_scale = "dynamic"


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_linear_rejects_broken_input_scales(scale: float) -> None:
    weight = NVFP4Weight(*quantize_weight(float_linear().weight))
    with pytest.raises(ValueError, match="input_scale: must be positive and finite"):
        NVFP4Linear.from_weight(weight, input_scale=torch.tensor(scale))


def test_linear_rejects_another_width() -> None:
    with pytest.raises(ValueError, match=rf"x: last dimension must be {IN}, got shape \(2, 5\)"):
        NVFP4Linear(IN, OUT)(torch.randn(2, 5))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=str)
@torch.no_grad()
def test_linear_on_gpu_is_near_the_cpu(mode: str | None) -> None:
    layer = calibrated(float_linear(), mode).to(torch.bfloat16)
    state = layer.state_dict()
    for rows in (1, 17, 300):
        x = torch.randn(rows, IN).bfloat16()
        want = layer.cpu()(x).float()
        got = layer.cuda()(x.cuda()).float().cpu()
        assert float((got - want).norm() / want.norm()) < 4e-3
    for name, tensor in layer.state_dict().items():
        assert_bytes_equal(tensor.cpu(), state[name], name)
