"""load_experts: authentic checkpoints come out exact, broken ones are refused by name."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import (
    PREFIX,
    Tensors,
    assert_same_state,
    make_moe,
    mixtral_names,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

import nvfp4_ops
from nvfp4_ops import CheckpointError, NVFP4MoE
from nvfp4_ops.checkpoint import Checkpoint, expert_tensors, load, load_experts, open_checkpoint
from nvfp4_ops.checkpoint.experts import find_prefixes
from nvfp4_ops.projection import ExpertProjection

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def moe() -> NVFP4MoE:
    return make_moe()


def test_load_experts_reads_modelopt_bytes(data: Path) -> None:
    directory = data / "models" / "modelopt_qwen3_moe_experts_only"
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
    moe = NVFP4MoE.from_checkpoint(str(data / "models" / "modelopt_qwen3_moe_experts_only"), PREFIX)
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
    write_checkpoint(tmp_path, mixtral_names(expert_tensors(moe, prefix)))
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


def renamed_to(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.startswith(f"{PREFIX}.{old}")]:
            tensors[name.replace(f"{PREFIX}.{old}", f"{PREFIX}.{new}")] = tensors.pop(name)

    return change


def block_scale_byte(byte: int) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{PREFIX}.2.down_proj.weight_scale"].view(torch.uint8)[3, 1] = byte

    return change


def one_projection_in_bf16(tensors: Tensors) -> None:
    without("2.down_proj.")(tensors)
    with_value("down_proj.weight", torch.ones(48, 32, dtype=torch.bfloat16))(tensors)


ONE, NOT_ONE = torch.ones(()), r"must be one positive, finite float32, got"
EXPORT_AGAIN = "the checkpoint is broken here: export it again"
DYNAMIC = "or pass ignore_input_scale=True and quantize activations dynamically"

BROKEN: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing_scale": (
        without("1.up_proj.weight_scale_2"),
        r"tensor model\.layers\.0\.mlp\.experts\.1\.up_proj\.weight_scale_2 is missing",
    ),
    "missing_codes": (
        lambda tensors: tensors.pop(f"{PREFIX}.1.up_proj.weight"),
        r"1\.up_proj\.weight is missing",
    ),
    "missing_projection": (without("3.down_proj"), r"3\.down_proj\.weight is missing"),
    "missing_expert": (without("1."), r"mlp\.experts has no experts \[1\]; download or export"),
    "missing_first": (without("0."), r"mlp\.experts has no experts \[0\]"),
    "no_experts": (without(""), r"has no experts under model\.layers\.0\.mlp\.experts"),
    "missing_input_scale": (
        without("3.down_proj.input_scale"),
        rf"3\.down_proj\.input_scale is missing, .* sees a token, {DYNAMIC}",
    ),
    "first_has_no_input_scale": (
        without("0.gate_proj.input_scale"),
        r"0\.gate_proj\.input_scale is missing, though other experts have one",
    ),
    "zero_global_scale": (
        with_value("gate_proj.weight_scale_2", 0 * ONE),
        rf"model\.safetensors: .*2\.gate_proj\.weight_scale_2 {NOT_ONE} .* 0\.0; {EXPORT_AGAIN}$",
    ),
    "negative_global_scale": (
        with_value("gate_proj.weight_scale_2", -ONE),
        rf"2\.gate_proj\.weight_scale_2 {NOT_ONE} .* -1\.0; {EXPORT_AGAIN}$",
    ),
    "inf_input_scale": (
        with_value("up_proj.input_scale", torch.inf * ONE),
        rf"2\.up_proj\.input_scale {NOT_ONE} .* inf; .*{DYNAMIC}",
    ),
    "nan_global_scale": (
        with_value("down_proj.weight_scale_2", torch.nan * ONE),
        rf"2\.down_proj\.weight_scale_2 {NOT_ONE} .* nan",
    ),
    "vector_global_scale": (
        with_value("down_proj.weight_scale_2", torch.ones(3)),
        rf"2\.down_proj\.weight_scale_2 {NOT_ONE} torch\.float32 \(3,\)",
    ),
    "bf16_global_scale": (
        with_value("down_proj.weight_scale_2", ONE.bfloat16()),
        rf"2\.down_proj\.weight_scale_2 {NOT_ONE} torch\.bfloat16",
    ),
    "one_expert_unquantized": (
        with_value("down_proj.weight", torch.ones(48, 32, dtype=torch.bfloat16)),
        r"2\.down_proj\.weight must be packed NVFP4, .*, got torch\.bfloat16 \(48, 32\)",
    ),
    "one_projection_in_bf16": (
        one_projection_in_bf16,
        r"experts is quantized in different ways \(.*: nvfp4, .*2\.down_proj: None\)",
    ),
    "int8_codes": (
        with_value("down_proj.weight", torch.ones(48, 16, dtype=torch.int8)),
        r"2\.down_proj\.weight must be packed NVFP4, .*, got torch\.int8 \(48, 16\)",
    ),
    "wrong_shape": (
        with_value("up_proj.weight", torch.zeros(16, 24, dtype=torch.uint8)),
        r"2\.up_proj\.weight must be \(N, K\) = \(32, 48\) as in expert 0, got \(16, 48\)",
    ),
    "transposed_down": (
        with_value("down_proj.weight", torch.zeros(32, 24, dtype=torch.uint8)),
        r"2\.down_proj\.weight must be \(N, K\) = \(48, 32\) as in expert 0, got \(32, 48\)",
    ),
    "fp32_block_scale": (
        with_value("down_proj.weight_scale", torch.ones(48, 2)),
        r"2\.down_proj\.weight_scale must be torch\.float8_e4m3fn \(48, 2\), got torch\.float32",
    ),
    "swizzled_block_scale": (
        with_value("down_proj.weight_scale", torch.ones(128, 4).to(torch.float8_e4m3fn)),
        r"2\.down_proj\.weight_scale must be .* \(48, 2\), got .* \(128, 4\)",
    ),
    "nan_block_scale": (
        block_scale_byte(0x7F),
        rf"2\.down_proj\.weight_scale holds NaN or negative block scales; {EXPORT_AGAIN}",
    ),
    "negative_block_scale": (block_scale_byte(0xB8), r"weight_scale holds NaN or negative"),
    "awq": (
        with_value("up_proj.pre_quant_scale", torch.ones(48)),
        r"2\.up_proj\.pre_quant_scale is not known here .* export with plain NVFP4 instead",
    ),
    "svd": (
        with_value("up_proj.svdquant_lora_a", torch.ones(4, 48)),
        r"svdquant_lora_a is not known",
    ),
    "other_projection": (with_value("gate_bias.weight", ONE), r"2\.gate_bias\.weight is not known"),
    "stray_tensor": (with_value("scale", ONE), r"experts\.2\.scale is not known here"),
    "two_namings": (
        renamed_to("2.gate_proj", "2.w1"),
        r"must have projections \('gate_proj', .* or \('w1', .*, got \['down_proj', .* 'w1'\]",
    ),
    "no_gate_in_one": (without("2.gate_proj"), r"2\.gate_proj\.weight is missing"),
    "number_with_zeros": (renamed_to("3.", "03."), r"has \['03'\] among its experts' numbers"),
    "one_bias": (
        with_value("up_proj.bias", torch.ones(32)),
        r"2\.up_proj\.bias is there, unlike that of other projections",
    ),
    "wrong_bias": (
        lambda tensors: tensors.update({f"{PREFIX}.0.gate_proj.bias": torch.ones(48)}),
        r"0\.gate_proj\.bias must be .* \(32,\), got torch\.float32 \(48,\)",
    ),
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


def test_checkpoint_refuses_shards_that_do_not_fit_the_index(tmp_path: Path, moe: NVFP4MoE) -> None:
    tensors = expert_tensors(moe, PREFIX)
    first, second = list(tensors)[:2]
    index_file = "model.safetensors.index.json"

    def sharded(name: str) -> tuple[Path, dict[str, str]]:
        directory = write_checkpoint(tmp_path / name, tensors, shards=2)
        weight_map = json.loads((directory / index_file).read_text())["weight_map"]
        assert (weight_map[first], weight_map[second]) == (
            "model-0.safetensors",
            "model-1.safetensors",
        )
        return directory, weight_map

    def rewrite(directory: Path, weight_map: dict[str, str]) -> None:
        (directory / index_file).write_text(json.dumps({"weight_map": weight_map}))

    directory, weight_map = sharded("duplicate")
    shard = load_file(directory / "model-1.safetensors")
    save_file(shard | {first: tensors[first]}, directory / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=rf"model-1\.safetensors: holds {first}, which the"):
        open_checkpoint(directory)

    directory, weight_map = sharded("absent")
    rewrite(directory, weight_map | {"lm_head.weight": "model-0.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-0\.\w+: does not hold lm_head\.weight, whi"):
        open_checkpoint(directory)

    directory, weight_map = sharded("unlisted")
    del weight_map[first]
    rewrite(directory, weight_map)
    message = (
        rf"{first} is missing; model-0\.safetensors holds it, but {index_file} does not list it"
    )
    with pytest.raises(CheckpointError, match=message):
        load_experts(directory, PREFIX)


def test_checkpoint_reads_no_pickles(tmp_path: Path) -> None:
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "NVFP4"}}')
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only safetensors files are read"):
        open_checkpoint(tmp_path)


def test_load_experts_ignores_input_scales_when_asked_to(tmp_path: Path, moe: NVFP4MoE) -> None:
    tensors = expert_tensors(moe, PREFIX)
    tensors[f"{PREFIX}.1.up_proj.input_scale"].fill_(torch.nan)
    del tensors[f"{PREFIX}.2.down_proj.input_scale"]
    write_checkpoint(tmp_path, tensors)
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"1\.up_proj\.input_scale must be one positive"):
        checkpoint.load_experts(PREFIX)
    loaded = checkpoint.load_experts(PREFIX, ignore_input_scale=True)
    assert_same_state(loaded, make_moe(input_scale=False))
    with pytest.raises(CheckpointError, match='has no input_scale, which "static" needs'):
        checkpoint.load_experts(PREFIX, ignore_input_scale=True, activation_scale="static")


def test_load_experts_never_holds_two_copies(
    tmp_path: Path, moe: NVFP4MoE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where weights are prepacked, each expert is on its own: the module is never canonical."""
    packed_at_once = []
    prepack = ExpertProjection._prepacked

    def prepacked(self: ExpertProjection, codes: Tensor, block_scale: Tensor) -> Tensor:
        if not codes.is_meta:
            packed_at_once.append(codes.shape[0])
        return prepack(self, codes, block_scale)

    monkeypatch.setattr(ExpertProjection, "_gains_by_prepacking", lambda self, device: True)
    monkeypatch.setattr(ExpertProjection, "_prepacked", prepacked)
    write_checkpoint(tmp_path, expert_tensors(moe, PREFIX))
    loaded = load_experts(tmp_path, PREFIX, device="cpu")
    assert packed_at_once == [1] * 8
    for name, projection in loaded.projections().items():
        expected = moe.projections()[name]
        assert projection.prepacked
        assert projection.weight_scale is None
        assert torch.equal(projection.weight, prepack(expected, *expected.canonical()))
        assert torch.equal(projection.weight_scale_2, expected.weight_scale_2)
        assert torch.equal(projection.input_scale, expected.input_scale)


@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_load_experts_in_chunks_of_which_the_last_is_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepacked: bool, bias: bool
) -> None:
    monkeypatch.setattr(load, "_CHUNKS_PER_LAYER", 2)
    weights = torch.randn(5, 64, 32), torch.randn(5, 32, 32)
    biases = {"gate_up_bias": torch.randn(5, 64), "down_bias": torch.randn(5, 32)}
    expected, without_bias = (
        NVFP4MoE.from_float(*weights, **options) for options in (biases if bias else {}, {})
    )
    for moe in (expected, without_bias):
        moe.first_proj.set_input_scale(torch.linspace(0.1, 1.0, 10).view(5, 2))
        moe.down_proj.set_input_scale(torch.linspace(0.2, 2.0, 5))
    tensors = expert_tensors(without_bias, PREFIX)
    if bias:
        parts = (*biases["gate_up_bias"].chunk(2, dim=1), biases["down_bias"])
        for name, part in zip(("gate_proj", "up_proj", "down_proj"), parts, strict=True):
            tensors |= {f"{PREFIX}.{e}.{name}.bias": part[e].clone() for e in range(5)}
    write_checkpoint(tmp_path, tensors, shards=3)
    if prepacked:
        monkeypatch.setattr(ExpertProjection, "_gains_by_prepacking", lambda self, device: True)
    loaded = load_experts(tmp_path, PREFIX, device="cpu")
    assert loaded.down_proj.prepacked == prepacked
    assert_same_state(loaded, expected)


def test_load_experts_of_a_single_expert(tmp_path: Path) -> None:
    """Its scales are compact too, though every stride of one number counts as contiguous."""
    expected = NVFP4MoE.from_float(torch.randn(1, 64, 32), torch.randn(1, 32, 32))
    expected.first_proj.set_input_scale(torch.tensor([[0.25, 0.5]]))
    expected.down_proj.set_input_scale(torch.tensor([0.75]))
    write_checkpoint(tmp_path, expert_tensors(expected, PREFIX))
    loaded = load_experts(tmp_path, PREFIX, activation_scale="static")
    assert_same_state(loaded, expected)
    for projection in loaded.projections().values():
        assert projection.input_scale.stride() == projection.weight_scale_2.stride()


def test_load_experts_under_the_defaults_of_others(tmp_path: Path, moe: NVFP4MoE) -> None:
    """transformers sets default dtypes and devices while it builds a model."""
    write_checkpoint(tmp_path, expert_tensors(moe, PREFIX))
    with torch.inference_mode():
        assert_same_state(load_experts(tmp_path, PREFIX), moe)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            loaded = load_experts(tmp_path, PREFIX, device="cpu", activation_scale="static")
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_state(loaded, moe)


@pytest.mark.gpu
def test_load_experts_on_a_gpu_never_holds_two_copies(tmp_path: Path) -> None:
    """Same bytes as through the CPU, and beside the result only the experts being read."""
    generator = torch.Generator().manual_seed(0)
    sizes = (32, 2 * 512, 1024), (32, 1024, 512)
    w = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    moe = NVFP4MoE.from_float(*w)
    moe.first_proj.set_input_scale(torch.rand(32, 2) + 0.1)
    moe.down_proj.set_input_scale(torch.rand(32) + 0.1)
    write_checkpoint(tmp_path, expert_tensors(moe, PREFIX), shards=2)
    result_bytes = sum(buffer.nbytes for buffer in moe.buffers())
    for _ in range(2):  # Once to warm up.
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loaded = load_experts(tmp_path, PREFIX, device="cuda", activation_scale="static")
        used = torch.cuda.max_memory_allocated() - before
    # Prepacking an expert of 1.5 million weights takes some tens of MB, whatever their number.
    assert used < result_bytes + 80e6
    assert_same_state(loaded.cpu(), moe)
    x = torch.randn(16, 1024, dtype=torch.bfloat16)
    index, weights = nvfp4_ops.softmax_top_k(torch.randn(16, 32), 4)
    for mode in ("static", "per_token", None):
        loaded.cuda().activation_scale = mode
        moe.cuda().activation_scale = mode
        arguments = x.cuda(), index.cuda(), weights.cuda()
        assert torch.equal(loaded(*arguments), moe(*arguments))


def test_load_linear_reads_one_layer(tmp_path: Path) -> None:
    w = nvfp4_ops.quantize_weight(torch.randn(24, 32))
    q_proj = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{q_proj}.weight": w.codes,
        f"{q_proj}.weight_scale": w.block_scale,
        f"{q_proj}.weight_scale_2": w.global_scale,
        f"{q_proj}.input_scale": torch.tensor(0.25),
        f"{q_proj}.bias": torch.randn(24).bfloat16(),
        f"{q_proj}.k_scale": torch.tensor(2.0),
        "model.norm.weight": torch.ones(32),
    }
    linear = open_checkpoint(write_checkpoint(tmp_path / "good", tensors)).load_linear(q_proj)
    assert torch.equal(linear.codes, w.codes)
    assert torch.equal(linear.block_scale.view(torch.uint8), w.block_scale.view(torch.uint8))
    assert (linear.global_scale, linear.input_scale) == (w.global_scale, 0.25)
    assert torch.equal(linear.bias, tensors[f"{q_proj}.bias"])

    checkpoint = open_checkpoint(tmp_path / "good")
    assert checkpoint.load_linear(q_proj, "meta").codes.is_meta
    with pytest.raises(CheckpointError, match=r"model\.norm is not quantized"):
        checkpoint.load_linear("model.norm")
    tensors[f"{q_proj}.pre_quant_scale"] = torch.ones(32)
    bad = open_checkpoint(write_checkpoint(tmp_path / "awq", tensors))
    with pytest.raises(CheckpointError, match=r"q_proj\.pre_quant_scale is not known here"):
        bad.load_linear(q_proj)


def test_checkpoint_tells_of_its_tensors_without_reading(tmp_path: Path, moe: NVFP4MoE) -> None:
    tensors = expert_tensors(moe, PREFIX)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, tensors, shards=3))
    assert checkpoint.names() == sorted(tensors)
    name = f"{PREFIX}.3.down_proj.weight_scale"
    info = checkpoint.info(name)
    assert (info.dtype, info.shape) == (torch.float8_e4m3fn, (48, 2))
    assert name in load_file(tmp_path / info.file)
    assert name in checkpoint
    assert "lm_head.weight" not in checkpoint
    assert checkpoint.expert_prefixes() == [PREFIX]
    assert torch.equal(
        checkpoint.tensor(f"{PREFIX}.1.up_proj.weight"), moe.first_proj.weight[1, 32:]
    )


def test_expert_prefixes_are_in_the_order_of_the_layers() -> None:
    names = [
        "model.layers.10.mlp.experts.0.gate_proj.weight",
        "model.layers.2.mlp.experts.1.up_proj.weight_packed",
        "model.layers.2.mlp.shared_experts.gate_up_proj.weight",
        "model.layers.3.block_sparse_moe.experts.0.w1.weight",
        "model.layers.4.mlp.experts.gate_up_proj_blocks",
        "model.layers.5.mlp.gate_proj.weight",
        "experts.0.down_proj.weight",
    ]
    assert find_prefixes(names) == [
        "experts",
        "model.layers.2.mlp.experts",
        "model.layers.3.block_sparse_moe.experts",
        "model.layers.4.mlp.experts",
        "model.layers.10.mlp.experts",
    ]


MEMORY = """
import sys
from nvfp4_ops.checkpoint import open_checkpoint

def anonymous_mib():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(l.split()[1]) for l in lines if l.startswith("RssAnon:")) / 1024

checkpoint = open_checkpoint(sys.argv[1])
checkpoint.load_experts(sys.argv[3])  # What torch sets up once.
before, peak = anonymous_mib(), 0.0

import nvfp4_ops.checkpoint.experts as experts
read = experts.NumberedExperts.read
def watched(self, expert):
    global peak
    peak = max(peak, anonymous_mib())
    return read(self, expert)
experts.NumberedExperts.read = watched

moe = open_checkpoint(sys.argv[1]).load_experts(sys.argv[2])
peak = max(peak, anonymous_mib())
print(sum(b.nbytes for b in moe.buffers()) / 2**20, peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_load_experts_needs_little_more_than_the_result(tmp_path: Path) -> None:
    """Memory of the process itself: pages of the mapped files belong to the page cache."""
    num_experts, hidden, intermediate = 48, 2048, 1024
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    small = "model.layers.1.mlp.experts"
    for prefix, number, d, f in ((PREFIX, num_experts, hidden, intermediate), (small, 2, 64, 32)):
        for expert in range(number):
            for name, n, k in (("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)):
                key = f"{prefix}.{expert}.{name}"
                codes = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=generator)
                tensors[f"{key}.weight"] = codes
                tensors[f"{key}.weight_scale"] = torch.ones(n, k // 16).to(torch.float8_e4m3fn)
                tensors[f"{key}.weight_scale_2"] = torch.tensor(1e-4)
    write_checkpoint(tmp_path, tensors, shards=2)
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), PREFIX, small],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    result, used = map(float, run.stdout.split())
    assert 150 < result < 170
    assert used < 1.1 * result
