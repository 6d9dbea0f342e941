"""load_experts: authentic checkpoints come out exact, broken ones are refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import CheckpointError, NVFP4MoE
from nvfp4_ops.checkpoint import Checkpoint, expert_tensors, load_experts, quantization_config

PREFIX = "model.layers.0.mlp.experts"
Tensors = dict[str, Tensor]


def write_checkpoint(directory: Path, tensors: Tensors, *, shards: int = 1) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config = {"quantization": quantization_config(["lm_head"], static=True)}
    (directory / "hf_quant_config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for shard in set(weight_map.values()):
        part = {name: t for name, t in tensors.items() if weight_map[name] == shard}
        save_file(part, directory / shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def moe() -> NVFP4MoE:
    generator = torch.Generator().manual_seed(5)
    moe = NVFP4MoE.from_float(
        torch.randn(4, 64, 48, generator=generator), torch.randn(4, 48, 32, generator=generator)
    )
    moe.first_proj.set_input_scale(torch.rand(4, 2, generator=generator) + 0.1)
    moe.down_proj.set_input_scale(torch.rand(4, generator=generator) + 0.1)
    return moe


def assert_same_state(actual: NVFP4MoE, expected: NVFP4MoE) -> None:
    expected_state = expected.state_dict()
    assert actual.state_dict().keys() == expected_state.keys()
    for name, tensor in actual.state_dict().items():
        assert tensor.dtype == expected_state[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), expected_state[name].view(torch.uint8)), name


def test_load_experts_reads_modelopt_bytes(data: Path) -> None:
    directory = data / "modelopt_qwen3_moe"
    stored = load_file(directory / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        moe = load_experts(directory, prefix, activation_scale="static")
        assert (moe.num_experts, moe.hidden_size, moe.intermediate_size) == (8, 128, 64)
        exported = expert_tensors(moe, prefix)
        wanted = {name: t for name, t in stored.items() if name.startswith(prefix + ".")}
        assert exported.keys() == wanted.keys()
        for name, tensor in exported.items():
            assert tensor.dtype == wanted[name].dtype, name
            assert torch.equal(
                tensor.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8)
            ), name


def test_load_experts_computes_the_layer_of_the_bf16_source(data: Path) -> None:
    """End to end on a producer's own bytes: the output is near that of the float experts."""
    stored = load_file(data / "base_qwen3_moe" / "model.safetensors")
    weights = {
        name: torch.stack([stored[f"{PREFIX}.{e}.{name}.weight"] for e in range(8)]).float()
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    x = torch.randn(64, 128)
    index, top_k_weights = nvfp4_ops.softmax_top_k(torch.randn(64, 8), 2)
    expected = torch.zeros(64, 128)
    for t in range(64):
        for j in range(2):
            e = index[t, j]
            gate, up = weights["gate_proj"][e] @ x[t], weights["up_proj"][e] @ x[t]
            h = torch.nn.functional.silu(gate) * up
            expected[t] += top_k_weights[t, j] * (weights["down_proj"][e] @ h)
    moe = NVFP4MoE.from_checkpoint(str(data / "modelopt_qwen3_moe"), PREFIX)
    errors = {}
    for mode in (None, "per_token", "per_tensor"):
        moe.activation_scale = mode
        error = moe(x, index, top_k_weights) - expected
        errors[mode] = float(error.norm() / expected.norm())
    # The weights' own error is 0.095 a matrix; quantized activations add theirs.
    assert 0.12 < errors[None] < 0.2
    assert errors[None] < errors["per_token"] < 0.28
    assert errors[None] < errors["per_tensor"] < 0.28


@pytest.mark.parametrize("shards", [1, 3])
def test_expert_tensors_round_trip(tmp_path: Path, moe: NVFP4MoE, shards: int) -> None:
    write_checkpoint(tmp_path, expert_tensors(moe, PREFIX), shards=shards)
    assert_same_state(load_experts(tmp_path, PREFIX), moe)


def test_load_experts_reads_mixtral_names(tmp_path: Path, moe: NVFP4MoE) -> None:
    prefix = "model.layers.3.block_sparse_moe.experts"
    renamed = {}
    for name, tensor in expert_tensors(moe, prefix).items():
        for old, new in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            name = name.replace(old, new)
        renamed[name] = tensor
    write_checkpoint(tmp_path, renamed)
    assert_same_state(load_experts(tmp_path, prefix), moe)


def test_load_experts_without_input_scale_is_weight_only(tmp_path: Path, moe: NVFP4MoE) -> None:
    tensors = {k: t for k, t in expert_tensors(moe, PREFIX).items() if "input_scale" not in k}
    write_checkpoint(tmp_path, tensors)
    loaded = load_experts(tmp_path, PREFIX)
    assert loaded.first_proj.input_scale is None
    assert load_experts(tmp_path, PREFIX, activation_scale="per_token").activation_scale
    with pytest.raises(CheckpointError, match='has no input_scale, which "static" needs'):
        load_experts(tmp_path, PREFIX, activation_scale="static")


def with_value(suffix: str, value: Tensor) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{PREFIX}.2.{suffix}"] = value

    return change


def without(suffix: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{PREFIX}.{suffix}")]:
            del tensors[name]

    return change


def nan_block_scale(tensors: Tensors) -> None:
    tensors[f"{PREFIX}.2.down_proj.weight_scale"].view(torch.uint8)[3, 1] = 0x7F


BROKEN: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing_scale": (
        without("1.up_proj.weight_scale_2"),
        r"tensor model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight_scale_2 is missing",
    ),
    "missing_expert": (without("1."), r"mlp\.experts has no experts \[1\]"),
    "no_experts": (without(""), r"has no experts under model\.layers\.0\.mlp\.experts"),
    "missing_input_scale": (
        without("3.down_proj.input_scale"),
        r"3\.down_proj\.input_scale is mis",
    ),
    "zero_global_scale": (
        with_value("gate_proj.weight_scale_2", torch.tensor(0.0)),
        r"2\.gate_proj\.weight_scale_2 must be one positive, finite float32, got .* 0\.0",
    ),
    "inf_input_scale": (
        with_value("up_proj.input_scale", torch.tensor(torch.inf)),
        r"2\.up_proj\.input_scale must be one positive, finite float32, got .* inf",
    ),
    "nan_global_scale": (
        with_value("down_proj.weight_scale_2", torch.tensor(torch.nan)),
        r"2\.down_proj\.weight_scale_2 must be one positive, finite float32, got .* nan",
    ),
    "vector_global_scale": (
        with_value("down_proj.weight_scale_2", torch.ones(3)),
        r"2\.down_proj\.weight_scale_2 must be one positive",
    ),
    "bf16_global_scale": (
        with_value("down_proj.weight_scale_2", torch.ones((), dtype=torch.bfloat16)),
        r"2\.down_proj\.weight_scale_2 must be one positive, finite float32, got torch\.bfloat16",
    ),
    "unquantized": (
        with_value("down_proj.weight", torch.ones(48, 32, dtype=torch.bfloat16)),
        r"2\.down_proj\.weight must be packed NVFP4, .*, got torch\.bfloat16 \(48, 32\)",
    ),
    "wrong_shape": (
        with_value("up_proj.weight", torch.zeros(16, 24, dtype=torch.uint8)),
        r"2\.up_proj\.weight must be \(N, K\) = \(32, 48\) as in expert 0, got \(16, 48\)",
    ),
    "fp32_block_scale": (
        with_value("down_proj.weight_scale", torch.ones(48, 2)),
        r"2\.down_proj\.weight_scale must be torch\.float8_e4m3fn \(48, 2\), got torch\.float32",
    ),
    "nan_block_scale": (nan_block_scale, r"2\.down_proj\.weight_scale holds NaN"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_load_experts_refuses(
    tmp_path: Path, moe: NVFP4MoE, change: Callable[[Tensors], None], message: str
) -> None:
    tensors = expert_tensors(moe, PREFIX)
    change(tensors)
    write_checkpoint(tmp_path, tensors or {"lm_head.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match=message):
        load_experts(tmp_path, PREFIX)


def test_checkpoint_refuses_what_it_can_not_read(tmp_path: Path, moe: NVFP4MoE) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"has no hf_quant_config\.json or config\.json"):
        Checkpoint(tmp_path)
    good = write_checkpoint(tmp_path / "good", expert_tensors(moe, PREFIX))

    def copy(name: str) -> Path:
        return shutil.copytree(good, tmp_path / name)

    truncated = copy("truncated")
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"truncated/model\.safetensors: can not be read"):
        load_experts(truncated, PREFIX)

    (copy("awq") / "hf_quant_config.json").write_text(
        '{"quantization": {"quant_algo": "NVFP4_AWQ"}}'
    )
    with pytest.raises(CheckpointError, match=r"quant_algo must be one of .*, got 'NVFP4_AWQ'"):
        Checkpoint(tmp_path / "awq")

    (copy("no_json") / "hf_quant_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"hf_quant_config\.json: can not be read"):
        Checkpoint(tmp_path / "no_json")

    sharded = write_checkpoint(tmp_path / "sharded", expert_tensors(moe, PREFIX), shards=2)
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names model-1\.safetensors, missing from the dir"):
        load_experts(sharded, PREFIX)


def test_expert_tensors_refuses_other_layouts() -> None:
    ungated = NVFP4MoE(32, 16, 2, activation="relu2", gated=False)
    with pytest.raises(ValueError, match="only gated experts without biases"):
        expert_tensors(ungated, PREFIX)


def test_load_experts_makes_the_class_that_is_asked_for(tmp_path: Path, moe: NVFP4MoE) -> None:
    class Special(NVFP4MoE):
        pass

    write_checkpoint(tmp_path, expert_tensors(moe, PREFIX))
    assert type(Special.from_checkpoint(tmp_path, PREFIX)) is Special
    with pytest.raises(ValueError, match="bias, gated: the checkpoint decides on it"):
        NVFP4MoE.from_checkpoint(tmp_path, PREFIX, bias=True, gated=False)


@pytest.mark.parametrize("content", ['{"quantization": null}', '{"quantization": []}', "{}"])
def test_checkpoint_refuses_configs_without_quantization(tmp_path: Path, content: str) -> None:
    (tmp_path / "hf_quant_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="has no quantization config: not NVFP4"):
        Checkpoint(tmp_path)


def test_checkpoint_refuses_a_broken_index(tmp_path: Path, moe: NVFP4MoE) -> None:
    write_checkpoint(tmp_path, expert_tensors(moe, PREFIX), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(CheckpointError, match=r"index\.json: has no weight_map"):
        Checkpoint(tmp_path)
