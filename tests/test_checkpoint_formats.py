"""Every layout of every producer: exact values, schemes of modules, refusals by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    CT_GROUP,
    CT_NUMBERS,
    MX_GROUP,
    PREFIX,
    Tensors,
    assert_same_state,
    compressed,
    ct_config,
    decode_mxfp4,
    make_moe,
    mixtral_names,
    stacked,
    write_checkpoint,
)
from safetensors.torch import load_file
from torch import Tensor

from nvfp4_ops import CheckpointError, NVFP4MoE, dequantize_nvfp4, open_checkpoint, quantize_weight
from nvfp4_ops.checkpoint import expert_tensors, load_experts
from nvfp4_ops.checkpoint.mxfp4 import to_nvfp4

# directory: (source, experts of layer 0, projections in the source, scheme, input scales)
QWEN, MIXTRAL = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
MIXTRAL_PREFIX = "model.layers.0.block_sparse_moe.experts"
AUTHENTIC = {
    "models/modelopt_qwen3_moe_experts_only": ("base_qwen3_moe", PREFIX, QWEN, "nvfp4"),
    "modelopt_qwen3_moe_w4a16": ("base_qwen3_moe", PREFIX, QWEN, "w4a16_nvfp4"),
    "models/modelopt_mixtral": ("base_mixtral", MIXTRAL_PREFIX, MIXTRAL, "nvfp4"),
    "ct_qwen3_moe": ("base_qwen3_moe", PREFIX, QWEN, "nvfp4"),
    "models/ct_qwen3_moe_a16": ("base_qwen3_moe", PREFIX, QWEN, "w4a16_nvfp4"),
    "models/ct_mixtral": ("base_mixtral", MIXTRAL_PREFIX, MIXTRAL, "nvfp4"),
}


@pytest.mark.parametrize(("name", "entry"), AUTHENTIC.items(), ids=AUTHENTIC.keys())
def test_authentic_experts_decode_to_their_source(
    data: Path, name: str, entry: tuple[str, str, tuple[str, ...], str]
) -> None:
    """An error of 0.095 is what 4 bits cost; a swapped nibble or scale makes it far more."""
    source, prefix, projections, scheme = entry
    base = load_file(data / source / "model.safetensors")
    checkpoint = open_checkpoint(data / name)
    assert checkpoint.scheme(prefix) == scheme
    mode = "static" if scheme == "nvfp4" else None
    moe = checkpoint.load_experts(prefix, activation_scale=mode)
    assert (moe.first_proj.input_scale is not None) == (scheme == "nvfp4")
    first = dequantize_nvfp4(
        moe.first_proj.weight,
        moe.first_proj.weight_scale,
        torch.ones(moe.num_experts),
    ).unflatten(1, (2, -1)) * moe.first_proj.weight_scale_2.view(-1, 2, 1, 1)
    down = dequantize_nvfp4(
        *(getattr(moe.down_proj, n) for n in ("weight", "weight_scale")),
        moe.down_proj.weight_scale_2,
    )
    # Of Mixtral's source two experts are stored.
    stored = [e for e in range(moe.num_experts) if f"{prefix}.{e}.{projections[0]}.weight" in base]
    assert len(stored) >= 2
    for expert in stored:
        decoded = (first[expert, 0], first[expert, 1], down[expert])
        for projection, values in zip(projections, decoded, strict=True):
            w = base[f"{prefix}.{expert}.{projection}.weight"].float()
            assert 0.092 < float((values - w).norm() / w.norm()) < 0.098


@pytest.mark.parametrize("name", [n for n in AUTHENTIC if "ct_" in n])
def test_compressed_tensors_bytes_are_kept_and_scales_inverted(data: Path, name: str) -> None:
    prefix = AUTHENTIC[name][1]
    stored = load_file(data / name / "model.safetensors")
    exported = expert_tensors(load_experts(data / name, prefix), prefix)
    assert exported
    for key, tensor in exported.items():
        module, _, kind = key.rpartition(".")
        if kind == "weight":
            assert torch.equal(tensor, stored[f"{module}.weight_packed"])
        elif kind == "weight_scale":
            theirs = stored[f"{module}.weight_scale"]
            assert torch.equal(tensor.view(torch.uint8), theirs.view(torch.uint8))
        else:
            other = {"weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}
            assert torch.equal(tensor, 1 / stored[f"{module}.{other[kind]}"].reshape(()))


def powers_of_two(tensors: Tensors) -> Tensors:
    """With global scales whose reciprocals are exact."""
    return {name: torch.exp2(t.log2().round()) if t.ndim == 0 else t for name, t in tensors.items()}


@pytest.fixture
def moe() -> NVFP4MoE:
    return make_moe()


def rounded(moe: NVFP4MoE) -> NVFP4MoE:
    for projection in moe.projections().values():
        for scales in (projection.weight_scale_2, projection.input_scale):
            scales.copy_(torch.exp2(scales.log2().round()))
    return moe


@pytest.mark.parametrize("naming", [dict, mixtral_names], ids=["gate_proj", "w1"])
def test_compressed_tensors_loads_both_mixtral_namings(
    tmp_path: Path, moe: NVFP4MoE, naming: Callable[[Tensors], Tensors]
) -> None:
    tensors = naming(compressed(powers_of_two(expert_tensors(moe, MIXTRAL_PREFIX))))
    write_checkpoint(tmp_path, tensors, config=ct_config())
    loaded = load_experts(tmp_path, MIXTRAL_PREFIX, activation_scale="static")
    assert_same_state(loaded, rounded(moe))


def test_compressed_tensors_input_scales_are_inverted_before_the_largest_is_taken(
    tmp_path: Path, moe: NVFP4MoE
) -> None:
    tensors = compressed(expert_tensors(moe, PREFIX))
    write_checkpoint(tmp_path, tensors, config=ct_config())
    loaded = load_experts(tmp_path, PREFIX, activation_scale="static")
    stored = torch.cat([t for n, t in tensors.items() if "input" in n and "down" not in n])
    assert stored.numel() == 8
    assert float(loaded.first_proj.input_scale.amax()) == float(1 / stored.amin())


# Stacked experts


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "canonical"])
@pytest.mark.parametrize("model_type", ["gpt_oss", "llama4"])
@pytest.mark.parametrize("per_expert", [True, False], ids=["scale_each", "one_scale"])
def test_modelopt_stacked_experts_with_biases(
    tmp_path: Path, model_type: str, transposed: bool, per_expert: bool
) -> None:
    moe = make_moe(bias=True)
    interleaved = model_type == "gpt_oss"
    tensors = stacked(moe, interleaved=interleaved, transposed=transposed)
    for i, (name, projection) in enumerate(moe.projections().items()):
        count = 4 if per_expert else 1
        scale, input_scale = (torch.rand(count) + 0.5 for _ in range(2))
        shape = (count,) if per_expert else ()
        tensors[f"{PREFIX}.{name}_weight_scale_2"] = scale.reshape(shape)
        tensors[f"{PREFIX}.{name}_input_scale"] = input_scale.reshape(shape)
        lead = (4, 1) if i == 0 else (4,)
        projection.weight_scale_2.copy_(scale.expand(4).reshape(lead))
        projection.input_scale.copy_(input_scale.expand(4).reshape(lead))
    config = {"model_type": model_type, "quantization_config": {"quant_algo": "NVFP4"}}
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config=config))
    assert checkpoint.scheme(PREFIX) == "nvfp4"
    assert_same_state(checkpoint.load_experts(PREFIX, activation_scale="static"), moe)
    assert checkpoint.load_experts(PREFIX).down_proj.bias.dtype == torch.bfloat16


def stacked_checkpoint(directory: Path, **changes: Tensor | None) -> Path:
    """Of one-scale-for-all experts; changes: suffixes of tensors to set or to leave out."""
    tensors = stacked(make_moe(bias=True), interleaved=True)
    for name in ("gate_up_proj", "down_proj"):
        tensors[f"{PREFIX}.{name}_weight_scale_2"] = torch.tensor(0.5)
    for suffix, value in changes.items():
        if value is None:
            del tensors[f"{PREFIX}.{suffix}"]
        else:
            tensors[f"{PREFIX}.{suffix}"] = value
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_algo": "NVFP4"}}
    return write_checkpoint(directory, tensors, config=config)


BROKEN_STACKS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no_scales": ({"gate_up_proj_weight_scale": None}, "gate_up_proj_weight_scale is missing"),
    "no_global_scale": ({"down_proj_weight_scale_2": None}, "down_proj_weight_scale_2 is missing"),
    "no_down": ({"down_proj": None}, "down_proj is missing"),
    "one_bias": ({"down_proj_bias": None}, "down_proj_bias is missing"),
    "one_input_scale": (
        {"gate_up_proj_input_scale": torch.ones(())},
        "down_proj_input_scale is missing",
    ),
    "scales_of_too_few": (
        {"down_proj_weight_scale_2": torch.ones(3)},
        r"down_proj_weight_scale_2 must be one positive, finite float32, got .* \(3,\)",
    ),
    "fp32_scales": (
        {"down_proj_weight_scale": torch.ones(4, 2, 48)},
        r"weight_scale must be torch\.float8_e4m3fn \(4, 2, 48\), got torch\.float32",
    ),
    "nan_scale": (
        {"down_proj_weight_scale": torch.full((4, 2, 48), torch.nan).to(torch.float8_e4m3fn)},
        r"down_proj_weight_scale\[\d\] holds NaN or negative block scales",
    ),
    "bias_size": (
        {"down_proj_bias": torch.ones(4, 47)},
        r"down_proj_bias must be .* \(4, 48\), got torch\.float32 \(4, 47\)",
    ),
    "float_codes": (
        {"down_proj": torch.ones(4, 16, 48)},
        r"down_proj must be packed NVFP4, .*, got torch\.float32 \(4, 16, 48\)",
    ),
    "does_not_fit": (
        {
            "down_proj": torch.zeros(4, 8, 48, dtype=torch.uint8),
            "down_proj_weight_scale": torch.ones(4, 1, 48).to(torch.float8_e4m3fn),
        },
        r"down_proj must be \(E, N, K\) = \(4, 48, 32\) to fit .*, got \(4, 48, 16\)",
    ),
    "awq": ({"down_proj_pre_quant_scale": torch.ones(32)}, "_pre_quant_scale is not known here"),
    "both_layouts": ({"0.up_proj.weight": torch.ones(1)}, "both numbered and stacked experts"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN_STACKS.values(), ids=BROKEN_STACKS.keys())
def test_modelopt_stacked_experts_refused(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    checkpoint = open_checkpoint(stacked_checkpoint(tmp_path, **changes))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_experts(PREFIX)


def test_stacked_experts_of_an_unknown_model_need_to_be_told_how(tmp_path: Path) -> None:
    stacked_checkpoint(tmp_path)
    config = {"model_type": "new", "quantization_config": {"quant_algo": "NVFP4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="pass interleaved=True if its rows alternate"):
        checkpoint.load_experts(PREFIX)
    moe = make_moe(bias=True)
    alternating = checkpoint.load_experts(PREFIX, interleaved=True)
    assert torch.equal(alternating.first_proj.weight, moe.first_proj.weight)
    halves = checkpoint.load_experts(PREFIX, interleaved=False)
    assert torch.equal(halves.first_proj.weight[:, 0::2], moe.first_proj.weight[:, :32])


def test_experts_without_a_gate(tmp_path: Path) -> None:
    prefix = "backbone.layers.1.mixer.experts"
    up, down = (quantize_weight(torch.randn(4, *size)) for size in ((32, 48), (48, 32)))
    tensors = {}
    for expert in range(4):
        for name, w in (("up_proj", up), ("down_proj", down)):
            key = f"{prefix}.{expert}.{name}"
            tensors[f"{key}.weight"] = w.codes[expert].clone()
            tensors[f"{key}.weight_scale"] = w.block_scale[expert].clone()
            tensors[f"{key}.weight_scale_2"] = w.global_scale[expert].clone()
            tensors[f"{key}.input_scale"] = torch.tensor(0.5 + expert)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors))
    moe = checkpoint.load_experts(prefix, activation="relu2", activation_scale="static")
    assert not moe.gated
    assert torch.equal(moe.first_proj.weight, up.codes)
    assert torch.equal(moe.down_proj.weight_scale_2, down.global_scale)
    assert moe.first_proj.input_scale.tolist() == [0.5, 1.5, 2.5, 3.5]


# MXFP4


def random_mxfp4(num_rows: int, k: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Codes and exponent bytes, every power from 2^low to 2^high among them."""
    codes = torch.randint(0, 256, (num_rows, k // 2), dtype=torch.uint8)
    codes[:, ::16] |= 1  # No group is zero.
    exponents = torch.randint(low + 127, high + 128, (num_rows, k // 32)).to(torch.uint8)
    exponents.view(-1)[:2] = torch.tensor([low + 127, high + 127], dtype=torch.uint8)
    return codes, exponents


@pytest.mark.parametrize(
    ("low", "high", "global_scale"),
    [(-9, 8, 1), (-3, -3, 1), (0, 9, 2), (-10, -8, 0.5), (-7, 10, 4), (-60, -43, 2.0**-51)],
)
def test_mxfp4_is_exact_in_nvfp4(low: int, high: int, global_scale: float) -> None:
    codes, exponents = random_mxfp4(24, 128, low, high)
    weight = to_nvfp4("here", codes, exponents)
    assert weight.global_scale.dtype == torch.float32
    assert float(weight.global_scale) == global_scale
    decoded = dequantize_nvfp4(*weight).double()
    assert torch.equal(decoded, decode_mxfp4(codes, exponents))
    assert float(decoded.abs().amax()) > 0


def test_mxfp4_groups_of_zeros_have_any_scale() -> None:
    codes, exponents = random_mxfp4(4, 64, -9, 8)
    codes[1, :16], exponents[1, 0] = 0x08, 0
    codes[2, :16], exponents[2, 0] = 0x80, 254
    decoded = dequantize_nvfp4(*to_nvfp4("here", codes, exponents)).double()
    assert torch.equal(decoded, decode_mxfp4(codes, exponents))
    assert not decoded[1, :32].any()
    zeros = to_nvfp4("here", torch.zeros_like(codes), torch.zeros_like(exponents))
    assert float(zeros.global_scale) == 1
    assert not dequantize_nvfp4(*zeros).any()


def test_mxfp4_that_does_not_fit_is_refused() -> None:
    codes, exponents = random_mxfp4(4, 64, -10, 8)
    message = re.escape("here spans the scales 2^-10 to 2^8: NVFP4 holds 18 powers of two exactly")
    with pytest.raises(CheckpointError, match=message):
        to_nvfp4("here", codes, exponents)
    exponents[0, 0] = 255
    with pytest.raises(CheckpointError, match="here holds NaN scales"):
        to_nvfp4("here", codes, exponents)


def gpt_oss_tensors() -> Tensors:
    tensors: Tensors = {"lm_head.weight": torch.ones(4, 4, dtype=torch.bfloat16)}
    for name, n, k in (("gate_up_proj", 128, 96), ("down_proj", 96, 64)):
        parts = [random_mxfp4(n, k, -20 + expert, -8) for expert in range(3)]
        blocks = torch.stack([codes for codes, _ in parts]).unflatten(2, (k // 32, 16))
        tensors[f"{PREFIX}.{name}_blocks"] = blocks
        tensors[f"{PREFIX}.{name}_scales"] = torch.stack([exponents for _, exponents in parts])
        tensors[f"{PREFIX}.{name}_bias"] = torch.randn(3, n).bfloat16()
    return tensors


GPT_OSS = {
    "model_type": "gpt_oss",
    "quantization_config": {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
    },
}


def test_gpt_oss_experts_are_exact(tmp_path: Path) -> None:
    tensors = gpt_oss_tensors()
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config=GPT_OSS))
    assert checkpoint.scheme(PREFIX) == "mxfp4"
    assert checkpoint.scheme("lm_head") is None
    assert checkpoint.expert_prefixes() == [PREFIX]
    moe = checkpoint.load_experts(PREFIX, activation="swiglu_oai")
    order = torch.cat([torch.arange(0, 128, 2), torch.arange(1, 128, 2)])
    for expert in range(3):
        for name, projection in moe.projections().items():
            rows = order if name == "gate_up_proj" else slice(None)
            codes = tensors[f"{PREFIX}.{name}_blocks"][expert].flatten(1)
            expected = decode_mxfp4(codes, tensors[f"{PREFIX}.{name}_scales"][expert])[rows]
            scale = projection.weight_scale_2[expert].flatten()
            assert (scale == scale[0]).all()
            decoded = dequantize_nvfp4(
                projection.weight[expert], projection.weight_scale[expert], scale[0]
            )
            assert torch.equal(decoded.double(), expected)
            bias = tensors[f"{PREFIX}.{name}_bias"][expert, rows]
            assert torch.equal(projection.bias[expert], bias)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("down_proj_scales", None, "down_proj_scales is missing"),
        ("down_proj_bias", None, "down_proj_bias is missing"),
        (
            "down_proj_scales",
            torch.full((3, 96, 2), 255, dtype=torch.uint8),
            r"down_proj_scales\[\d\] holds NaN scales",
        ),
        (
            "gate_up_proj_blocks",
            torch.zeros(3, 128, 3, 8, dtype=torch.uint8),
            r"gate_up_proj_blocks must be torch\.uint8 \(E, N, K/32, 16\), got",
        ),
        ("down_proj_zero_points", torch.ones(1), "down_proj_zero_points is not known here"),
    ],
    ids=["no_scales", "one_bias", "nan", "group_of_16", "unknown"],
)
def test_gpt_oss_experts_refused(
    tmp_path: Path, name: str, value: Tensor | None, message: str
) -> None:
    tensors = gpt_oss_tensors()
    tensors.pop(f"{PREFIX}.{name}", None)
    if value is not None:
        tensors[f"{PREFIX}.{name}"] = value
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config=GPT_OSS))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_experts(PREFIX)


def test_compressed_tensors_mxfp4_is_exact(tmp_path: Path) -> None:
    tensors: Tensors = {}
    expected = {}
    for expert in range(2):
        for name, n, k in (("gate_proj", 64, 96), ("up_proj", 64, 96), ("down_proj", 96, 64)):
            key = f"{PREFIX}.{expert}.{name}"
            codes, exponents = random_mxfp4(n, k, -12, 3)
            tensors[f"{key}.weight_packed"], tensors[f"{key}.weight_scale"] = codes, exponents
            expected[expert, name] = decode_mxfp4(codes, exponents)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config=ct_config(MX_GROUP)))
    assert checkpoint.scheme(PREFIX) == "mxfp4"
    exported = expert_tensors(checkpoint.load_experts(PREFIX), PREFIX)
    for (expert, name), values in expected.items():
        key = f"{PREFIX}.{expert}.{name}.weight"
        parts = (exported[key + suffix] for suffix in ("", "_scale", "_scale_2"))
        assert torch.equal(dequantize_nvfp4(*parts).double(), values)


# Quantization configs


def linear(name: str, kind: str) -> Tensors:
    w = quantize_weight(torch.ones(16, 32))
    if kind == "bf16":
        return {f"{name}.weight": torch.ones(16, 32, dtype=torch.bfloat16)}
    if kind == "fp8":
        fp8 = torch.ones(16, 32).to(torch.float8_e4m3fn)
        return {f"{name}.weight": fp8, f"{name}.weight_scale": torch.ones(())}
    tensors = {
        f"{name}.weight": w.codes,
        f"{name}.weight_scale": w.block_scale,
        f"{name}.weight_scale_2": w.global_scale,
    }
    return compressed(tensors) if kind == "ct" else tensors


def modelopt(directory: Path, tensors: Tensors, **changes: Any) -> Any:
    return open_checkpoint(write_checkpoint(directory, tensors, modelopt=changes))


def test_modelopt_scheme_follows_wildcards_and_what_is_stored(tmp_path: Path) -> None:
    tensors = {
        **linear("model.layers.0.mlp.experts.0.gate_proj", "nvfp4"),
        **linear("model.layers.1.mlp.experts.0.gate_proj", "bf16"),
        **linear("model.layers.10.mlp.gate_proj", "nvfp4"),
        **linear("model.layers.0.self_attn.q_proj", "bf16"),
        **linear("lm_head", "bf16"),
        "model.norm.weight": torch.ones(4),
    }
    exclude = ["lm_head", "model.layers.*.self_attn*", "model.layers.1"]
    checkpoint = modelopt(tmp_path, tensors, exclude_modules=exclude)
    schemes = {
        "model.layers.0.mlp.experts": "nvfp4",
        "model.layers.0.mlp.experts.0.gate_proj": "nvfp4",
        "model.layers.1.mlp.experts": None,
        "model.layers.10.mlp.gate_proj": "nvfp4",
        "model.layers.0.self_attn.q_proj": None,
        "lm_head": None,
        "model.norm": None,
        "model.rotary": None,
    }
    assert {module: checkpoint.scheme(module) for module in schemes} == schemes


def test_modelopt_scheme_refuses_packed_weights_that_the_config_excludes(tmp_path: Path) -> None:
    tensors = linear("model.layers.0.mlp.experts.0.gate_proj", "nvfp4")
    checkpoint = modelopt(tmp_path, tensors, exclude_modules=["model.layers.0.mlp*"])
    with pytest.raises(CheckpointError, match="stored in 4 bits, but the quantization config exc"):
        checkpoint.scheme("model.layers.0.mlp.experts")


def test_modelopt_mixed_precision(tmp_path: Path) -> None:
    tensors = {
        **linear("a.experts.0.gate_proj", "nvfp4"),
        **linear("b.experts.0.gate_proj", "nvfp4"),
        **linear("c.q_proj", "fp8"),
        **linear("c.k_proj", "bf16"),
    }
    layers = {
        "a.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "b.experts.0.gate_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "c.q_proj": {"quant_algo": "FP8"},
    }
    changes = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    checkpoint = modelopt(tmp_path, tensors, **changes)
    assert checkpoint.scheme("a.experts") == "nvfp4"
    assert checkpoint.scheme("b.experts") == "w4a16_nvfp4"
    assert checkpoint.scheme("c.k_proj") is None
    with pytest.raises(CheckpointError, match=r"c\.q_proj: quant_algo must be one of .*'FP8'"):
        checkpoint.scheme("c.q_proj")


def test_modelopt_without_input_activations_is_weight_only(tmp_path: Path) -> None:
    """Some exports say NVFP4 and quantize no activations; only config.json tells."""
    tensors = linear("a.experts.0.gate_proj", "nvfp4")
    assert modelopt(tmp_path / "plain", tensors).scheme("a.experts") == "nvfp4"
    write_checkpoint(tmp_path / "weights", tensors)
    group = {"weights": {"num_bits": 4}, "input_activations": None, "targets": ["Linear"]}
    config = {"quantization_config": {"config_groups": {"group_0": group}}}
    (tmp_path / "weights" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "weights").scheme("a.experts") == "w4a16_nvfp4"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_algo": "NVFP4_AWQ"}, "got 'NVFP4_AWQ' .* export with NVFP4 instead"),
        ({"quant_algo": "NVFP4_SVD"}, "got 'NVFP4_SVD' .* low-rank inputs are not supported"),
        ({"quant_algo": "FP8"}, r"quant_algo must be one of \('NVFP4', .*, got 'FP8'"),
        ({"quant_algo": None}, "quant_algo must be one of .*, got None"),
        ({"group_size": 32}, "group_size must be 16, got 32"),
        ({"exclude_modules": "lm_head"}, "exclude_modules must be a list"),
    ],
    ids=["awq", "svd", "fp8", "none", "group_size", "exclude_modules"],
)
def test_modelopt_config_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"hf_quant_config\.json: .*{message}"):
        modelopt(tmp_path, linear("a.experts.0.gate_proj", "nvfp4"), **changes)


def test_compressed_tensors_groups(tmp_path: Path) -> None:
    """Named modules come before "Linear", whatever the order of the groups."""
    tensors = {
        **linear("a.experts.0.gate_proj", "ct"),
        **linear("a.q_proj", "ct"),
        **linear("b.q_proj", "fp8"),
        **linear("b.gate", "bf16"),
        **linear("b.norm", "bf16"),
    }
    weight_only = {**CT_GROUP, "targets": ["re:.*experts"], "input_activations": None}
    fp8 = {"format": "float-quantized", "targets": ["b.q_proj"], "weights": {"num_bits": 8}}
    config = ct_config(CT_GROUP, weight_only, fp8, ignore=["re:.*gate$", "lm_head"])
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config=config))
    assert checkpoint.scheme("a.experts") == "w4a16_nvfp4"
    assert checkpoint.scheme("a.q_proj") == "nvfp4"
    assert checkpoint.scheme("b.gate") is None
    assert checkpoint.scheme("b.norm") is None
    with pytest.raises(CheckpointError, match=r"b\.q_proj: format must be .*'float-quantized'"):
        checkpoint.scheme("b.q_proj")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ct_config(quantization_status="frozen"), "quantization_status must be 'compressed', got"),
        (
            ct_config(transform_config={"r1": {}}),
            "transform_config is not supported and can",
        ),
        (ct_config(sparsity_config={"format": "24"}), "sparsity_config is not supported"),
        (ct_config(config_groups={}), "has no config_groups"),
        (ct_config({**CT_GROUP, "format": "pack-quantized"}), "format must be .*'pack-quantized'"),
        (
            ct_config({**CT_GROUP, "weights": CT_NUMBERS | {"group_size": 32}}),
            "must be .* got {'group_size': 32}",
        ),
        (
            ct_config({**CT_GROUP, "weights": CT_NUMBERS | {"symmetric": False}}),
            "got asymmetric ones",
        ),
        (ct_config(ignore=["re:("]), r"'re:\(' is no regular expression"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method must be .*got 'gptq'"),
        ({"model_type": "llama"}, "has no quantization config: not NVFP4"),
    ],
    ids=[
        "status",
        "transform",
        "sparse",
        "no_groups",
        "format",
        "size",
        "zero",
        "re",
        "gptq",
        "no",
    ],
)
def test_compressed_tensors_config_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    write_checkpoint(tmp_path, linear("a.experts.0.gate_proj", "ct"), config=config)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        open_checkpoint(tmp_path)


def test_compressed_tensors_values_refused(tmp_path: Path, moe: NVFP4MoE) -> None:
    tensors = compressed(expert_tensors(moe, PREFIX))
    key = f"{PREFIX}.1.up_proj"
    for name, value, message in (
        ("weight_global_scale", torch.inf, "must be one positive, finite float32"),
        ("weight_global_scale", 0.0, "must be one positive, finite float32"),
        ("weight_global_scale", 1e-39, "its reciprocal is not a positive, finite float32"),
        ("input_global_scale", torch.nan, "must be .* or pass ignore_input_scale=True"),
    ):
        directory = tmp_path / f"{name}_{value}"
        changed = tensors | {f"{key}.{name}": torch.tensor([value])}
        write_checkpoint(directory, changed, config=ct_config())
        with pytest.raises(CheckpointError, match=rf"1\.up_proj\.{name}:? {message}"):
            load_experts(directory, PREFIX)
    del tensors[f"{key}.input_global_scale"]
    write_checkpoint(tmp_path / "missing", tensors, config=ct_config())
    with pytest.raises(CheckpointError, match=r"1\.up_proj\.input_global_scale is missing"):
        load_experts(tmp_path / "missing", PREFIX)
    loaded = load_experts(tmp_path / "missing", PREFIX, ignore_input_scale=True)
    assert loaded.down_proj.input_scale is None


def test_compressed_tensors_has_no_stacked_experts(tmp_path: Path) -> None:
    tensors = stacked(make_moe(), interleaved=True)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, config=ct_config()))
    with pytest.raises(CheckpointError, match="is stacked, as only ModelOpt and gpt-oss"):
        checkpoint.load_experts(PREFIX)
