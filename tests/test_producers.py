"""Tensors of the producers of NVFP4 checkpoints: stored ones (tests/data) and live ones.

ModelOpt's bytes are reproduced exactly. compressed-tensors stores the reciprocal of the global
scale and takes its statistics in bf16, so its values are decoded, not its bytes reproduced.
torchao's block scales have another floor; its codes agree but for elements next to a tie.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import independent
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_ops import (
    NVFP4Weight,
    dequantize_nvfp4,
    global_scale,
    quantize_nvfp4,
    quantize_weight,
)

LAYERS, EXPERTS = 2, 8
Tensors = dict[str, Tensor]

each_expert = pytest.mark.parametrize("expert", range(EXPERTS))
each_layer = pytest.mark.parametrize("layer", range(LAYERS))


def load(directory: Path) -> Tensors:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensors]:
    data = Path(__file__).parent / "data"
    directories = {
        "base_qwen3_moe": data / "base_qwen3_moe",
        "modelopt_qwen3_moe": data / "models" / "modelopt_qwen3_moe_experts_only",
        "ct_qwen3_moe": data / "ct_qwen3_moe",
    }
    return {name: load(directory) for name, directory in directories.items()}


def name_of(layer: int, expert: int, projection: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}"


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected.float()).norm() / expected.float().norm())


# ModelOpt, as stored


@each_layer
@each_expert
def test_quantize_weight_reproduces_a_modelopt_expert(
    stored: dict[str, Tensors], layer: int, expert: int
) -> None:
    """All three matrices of each of the 16 experts, from their bf16 source.

    ModelOpt's export gives gate and up one global scale, that of the larger amax. So the two are
    quantized as the one matrix they are in the model; nothing is read back from the export.
    """
    base, exported = stored["base_qwen3_moe"], stored["modelopt_qwen3_moe"]
    gate, up, down = (
        base[f"{name_of(layer, expert, p)}.weight"] for p in ("gate_proj", "up_proj", "down_proj")
    )
    gate_up = quantize_weight(torch.cat([gate, up]))
    rows = len(gate)
    results = {
        "gate_proj": (gate_up.codes[:rows], gate_up.block_scale[:rows], gate_up.global_scale),
        "up_proj": (gate_up.codes[rows:], gate_up.block_scale[rows:], gate_up.global_scale),
        "down_proj": quantize_weight(down),
    }
    for projection, (codes, block_scale, scale) in results.items():
        name = name_of(layer, expert, projection)
        assert torch.equal(codes, exported[f"{name}.weight"])
        assert same_bytes(block_scale, exported[f"{name}.weight_scale"])
        assert torch.equal(scale, exported[f"{name}.weight_scale_2"])


def test_quantize_weight_reproduces_modelopt_from_its_stored_scales(
    stored: dict[str, Tensors],
) -> None:
    """All experts of a projection at once, with the scales of the checkpoint passed explicitly."""
    base, exported = stored["base_qwen3_moe"], stored["modelopt_qwen3_moe"]
    for layer in range(LAYERS):
        for projection in ("gate_proj", "up_proj", "down_proj"):
            names = [name_of(layer, expert, projection) for expert in range(EXPERTS)]
            w, codes, block_scale, scale = (
                torch.stack([tensors[f"{name}.{suffix}"] for name in names])
                for tensors, suffix in (
                    (base, "weight"),
                    (exported, "weight"),
                    (exported, "weight_scale"),
                    (exported, "weight_scale_2"),
                )
            )
            got = quantize_weight(w, scale)
            assert torch.equal(got.codes, codes)
            assert same_bytes(got.block_scale, block_scale)


# compressed-tensors, as stored


def compressed(stored: dict[str, Tensors], expert: int, projection: str) -> NVFP4Weight:
    """The stored tensors with the global scale turned into a decode scale."""
    name, tensors = name_of(0, expert, projection), stored["ct_qwen3_moe"]
    reciprocal = tensors[f"{name}.weight_global_scale"]
    return NVFP4Weight(
        tensors[f"{name}.weight_packed"],
        tensors[f"{name}.weight_scale"],
        (1.0 / reciprocal).reshape(()),
    )


@each_expert
def test_dequantize_compressed_tensors_is_near_its_source(
    stored: dict[str, Tensors], expert: int
) -> None:
    """A global scale taken the wrong way round would be off by a factor of 1e8."""
    for projection in ("gate_proj", "up_proj", "down_proj"):
        got = dequantize_nvfp4(*compressed(stored, expert, projection))
        source = stored["base_qwen3_moe"][f"{name_of(0, expert, projection)}.weight"]
        assert 0.08 < relative_error(got, source) < 0.1


@each_expert
def test_quantize_weight_of_bf16_statistics_reproduces_compressed_tensors(
    stored: dict[str, Tensors], expert: int
) -> None:
    """llm-compressor takes amax / 6 and the global scale in bf16. Its scales come out of that; its
    codes are then those of the same division."""
    base = stored["base_qwen3_moe"]
    gate, up, down = (
        base[f"{name_of(0, expert, p)}.weight"] for p in ("gate_proj", "up_proj", "down_proj")
    )
    for projection, w, shared in (
        ("gate_proj", gate, torch.cat([gate, up])),
        ("up_proj", up, torch.cat([gate, up])),
        ("down_proj", down, down),
    ):
        codes, block_scale, scale = compressed(stored, expert, projection)
        encode = (2688 / shared.abs().amax()).bfloat16().float()
        assert torch.equal(scale, 1 / encode)
        sixth = w.unflatten(1, (-1, 16)).abs().amax(2) / 6
        assert sixth.dtype == torch.bfloat16
        sf_bytes = independent.encode_e4m3((encode * sixth.float()).numpy())
        np.testing.assert_array_equal(block_scale.view(torch.uint8).numpy(), sf_bytes)
        step = (block_scale.float() / encode).repeat_interleave(16, 1)
        quotient = (w.float() / step).numpy()
        np.testing.assert_array_equal(
            codes.numpy(), independent.pack(independent.encode_e2m1(quotient))
        )


@each_expert
def test_dequantize_equals_compressed_tensors_decompression(
    stored: dict[str, Tensors], expert: int
) -> None:
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.nvfp4.helpers", exc_type=ImportError
    )
    lifecycle = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    args = quantization.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True
    )
    for projection in ("gate_proj", "up_proj", "down_proj"):
        codes, block_scale, scale = compressed(stored, expert, projection)
        rows, num_bytes = codes.shape
        values = helpers.unpack_fp4_from_uint8(codes, rows, 2 * num_bytes, torch.float32)
        ones = torch.ones_like(block_scale)
        assert torch.equal(values, dequantize_nvfp4(codes, ones, torch.ones(()))), "nibble order"
        name = f"{name_of(0, expert, projection)}.weight_global_scale"
        theirs = lifecycle.dequantize(
            x_q=values,
            scale=block_scale.float(),
            args=args,
            global_scale=stored["ct_qwen3_moe"][name],
        )
        # They divide by the reciprocal: three roundings against our two.
        ours = dequantize_nvfp4(codes, block_scale, scale)
        torch.testing.assert_close(ours, theirs, rtol=2.0**-22, atol=0)


# ModelOpt, live


@pytest.fixture(scope="module")
def modelopt() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("modelopt.torch.quantization.qtensor", exc_type=ImportError)


def spread(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.exp2(torch.empty(shape).uniform_(low, high))


LIVE: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(64, 256) * 0.02,
    "small integers": lambda: torch.randint(-12, 13, (64, 256)).float(),
    "spread rows": lambda: torch.randn(64, 256) * spread((64, 1), -14, 14),
    "spread elements": lambda: torch.randn(64, 256) * spread((64, 256), -14, 14),
    "zero rows and -0": lambda: torch.randn(64, 256) * torch.tensor([0.0, -0.0, 1.0, -1.0] * 64),
    "underflowing rows": lambda: torch.randn(64, 256) * spread((64, 1), -120, 120),
    "underflowing elements": lambda: torch.randn(64, 256) * spread((64, 256), -120, 120),
    "subnormal": lambda: torch.randn(64, 256) * 2.0**-128,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LIVE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_quantize_weight_equals_modelopt(
    modelopt: ModuleType, dtype: torch.dtype, kind: str
) -> None:
    w = LIVE[kind]().to(dtype)
    got = quantize_weight(w)
    theirs, block_scale, scale = modelopt.NVFP4QTensor.quantize(w.clone(), 16)
    assert torch.equal(got.global_scale, scale)
    assert torch.equal(got.codes, theirs._quantized_data)
    assert same_bytes(got.block_scale, block_scale)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scale", [1.0, 0.01, 1e-3, 1e-41, 1e37], ids=str)
def test_quantize_weight_equals_modelopt_with_an_explicit_scale(
    modelopt: ModuleType, scale: float
) -> None:
    """Inf and NaN too. Only the sign of a NaN scale differs: ours is always 0x7F."""
    w = torch.randn(64, 256) * spread((64, 1), -20, 20)
    w[0], w[1] = 0.0, -0.0
    w[2, 5], w[3, 40], w[3, 41], w[4, 80], w[4, 81] = np.nan, np.inf, -1.0, -np.inf, np.nan
    got = quantize_weight(w, torch.tensor(scale))
    theirs, block_scale, _ = modelopt.NVFP4QTensor.quantize(
        w.clone(), 16, weights_scaling_factor_2=torch.tensor(scale)
    )
    assert torch.equal(got.codes, theirs._quantized_data)
    sf_bytes = block_scale.view(torch.uint8)
    is_nan = block_scale.float().isnan()
    assert is_nan.nonzero().tolist() == [[2, 0], [4, 5]]
    assert torch.equal(got.block_scale.view(torch.uint8), torch.where(is_nan, 0x7F, sf_bytes))


@pytest.mark.filterwarnings("ignore")
def test_dequantize_equals_modelopt(modelopt: ModuleType) -> None:
    """They multiply the two scales first, so fp32 values differ by a rounding."""
    w = torch.randn(64, 256) * 0.02
    got = quantize_weight(w)
    theirs = modelopt.NVFP4QTensor(w.shape, torch.float32, got.codes).dequantize(
        scale=got.block_scale, double_scale=got.global_scale, block_sizes={-1: 16}
    )
    torch.testing.assert_close(dequantize_nvfp4(*got), theirs, rtol=2.0**-22, atol=0)


# torchao, live


E2M1_TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)


def is_near(values: Tensor, tie: Tensor) -> Tensor:
    return (values - tie).abs() <= 1e-6 * tie


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_quantize_agrees_with_torchao(dtype: torch.dtype) -> None:
    """Same codes, in the same nibbles, but next to ties; same scales but at e4m3 midpoints."""
    torchao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", exc_type=ImportError)
    x = torch.randn(128, 512).to(dtype)
    scale = global_scale(x)
    codes, block_scale = quantize_nvfp4(x, scale)
    assert float(block_scale.float().min()) > 2.0**-6, "above torchao's floor"
    their_scale, their_codes = torchao.nvfp4_quantize(x, 16, scale)
    same_scale = block_scale.view(torch.uint8) == their_scale.view(torch.uint8)
    assert same_scale.float().mean() > 0.98
    exact = x.double().unflatten(1, (-1, 16)).abs().amax(2) / (6 * scale.double())
    midpoint = (block_scale.double() + their_scale.double()) / 2
    assert (same_scale | is_near(exact, midpoint)).all()

    ours, theirs = (
        torch.from_numpy(independent.unpack(packed.view(torch.uint8).numpy()))
        for packed in (codes, their_codes)
    )
    step = (block_scale.double() * scale.double()).repeat_interleave(16, 1)
    next_to_tie = is_near((x.double() / step).abs().unsqueeze(-1), E2M1_TIES).any(-1)
    other_scale = ~same_scale.repeat_interleave(16, 1)
    assert ((ours == theirs) | next_to_tie | other_scale).all()
