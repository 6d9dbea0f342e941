"""load_pretrained, from_pretrained and calibration: producers' checkpoints and their logits.

Random models amplify: a bf16 rounding that moves an activation across a boundary of e2m1 moves the
logits by percents. So bits are compared where every rounding is the producer's, which
``hf_models.fake_quantized`` and ``decoded_twin`` compute, and otherwise in fp32.
"""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hf_models
import pytest
import torch
from compare import assert_bytes_equal
from hf_models import build, decoded_twin, fake_quantized, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, PreTrainedModel

from nvfp4_ops import CheckpointError, NVFP4Linear, NVFP4MoE, quantize_checkpoint
from nvfp4_ops.huggingface import (
    calibrate_checkpoint,
    load_pretrained,
    replace_experts,
    set_activation_scale,
)

MODELS = Path(__file__).parent / "data" / "models"
W4A4 = ("ct_mixtral", "modelopt_mixtral", "modelopt_qwen3_moe_experts_only")
W4A16 = ("ct_qwen3_moe_a16",)
# fp32 of two orders of summation, through two layers.
SAME = 1e-5
NUM_LINEARS = {"modelopt_qwen3_moe_experts_only": 0}


def producers_logits(name: str) -> tuple[Tensor, Tensor]:
    """Token ids and what the producer's own fake-quantized model made of them, bf16."""
    tensors = load_file(MODELS / name / "producer_logits.safetensors")
    return tensors["input_ids"], tensors["logits"]


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


def float_model(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Transformers' own model of a checkpoint, with the weights that are not NVFP4."""
    config = AutoConfig.from_pretrained(directory)
    del config.quantization_config
    # Not .to(dtype), which would round the rotary frequencies too.
    stock = AutoModelForCausalLM.from_config(config, dtype=model.dtype).eval()
    stock.load_state_dict(dict(model.named_parameters()), strict=False)
    return stock


@pytest.mark.parametrize("name", [*W4A4, *W4A16])
def test_load_pretrained_builds_nvfp4_modules(name: str) -> None:
    model = load_pretrained(MODELS / name)
    assert count(model, NVFP4MoE) == 2
    assert count(model, NVFP4Linear) == NUM_LINEARS.get(name, 8)
    assert model.dtype == torch.bfloat16
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["ct_mixtral", "modelopt_qwen3_moe_experts_only"])
@torch.no_grad()
def test_load_pretrained_first_token_is_the_producers_to_the_bit(name: str) -> None:
    """Static W4A4 with every step rounded to bf16, as the producer's float model does.

    From the second token on, attention differs by summation order. modelopt_mixtral is not among
    these: its logits were made before its export gave q, k and v one global scale.
    """
    ids, logits = producers_logits(name)
    model = load_pretrained(MODELS / name, activation_scale="static")
    assert torch.equal(fake_quantized(model, "static")(ids).logits[:, 0], logits[:, 0])


@torch.no_grad()
def test_load_pretrained_weight_only_is_the_producers_to_the_bit() -> None:
    name = "ct_qwen3_moe_a16"
    ids, logits = producers_logits(name)
    model = load_pretrained(MODELS / name)
    twin = decoded_twin(model, float_model(model, MODELS / name))
    assert torch.equal(twin(ids).logits, logits)
    # Rounded less often, so near but not equal.
    assert relative_error(model(ids).logits, logits) < 0.02


@pytest.mark.parametrize("mode", ["static", "per_token"])
@pytest.mark.parametrize("name", [*W4A4, *W4A16])
@torch.no_grad()
def test_load_pretrained_computes_what_fake_quantization_does(name: str, mode: str) -> None:
    if mode == "static" and name in W4A16:
        pytest.skip("has no input scales")
    ids, _ = producers_logits(name)
    model = load_pretrained(MODELS / name, activation_scale=mode, dtype=torch.float32)
    assert relative_error(model(ids).logits, fake_quantized(model, mode)(ids).logits) < SAME


@pytest.mark.parametrize("name", [*W4A4, *W4A16])
@torch.no_grad()
def test_load_pretrained_weight_only_is_the_decoded_model(name: str) -> None:
    ids, _ = producers_logits(name)
    model = load_pretrained(MODELS / name, dtype=torch.float32)
    twin = decoded_twin(model, float_model(model, MODELS / name))
    assert relative_error(model(ids).logits, twin(ids).logits) < SAME


@pytest.mark.parametrize("name", ["modelopt_mixtral", "modelopt_qwen3_moe_experts_only"])
@torch.no_grad()
def test_from_pretrained_loads_modelopt_checkpoints(name: str) -> None:
    ids, _ = producers_logits(name)
    model = AutoModelForCausalLM.from_pretrained(MODELS / name)
    assert torch.equal(model(ids).logits, load_pretrained(MODELS / name)(ids).logits)
    set_activation_scale(model, "static")
    static = load_pretrained(MODELS / name, activation_scale="static")
    assert torch.equal(model(ids).logits, static(ids).logits)


@pytest.mark.parametrize("name", W4A4)
@torch.no_grad()
def test_replace_experts_takes_them_from_a_checkpoint(name: str) -> None:
    ids, _ = producers_logits(name)
    loaded = load_pretrained(MODELS / name, activation_scale="static")
    model = float_model(loaded, MODELS / name)
    replace_experts(model, MODELS / name, activation_scale="static")
    for module_name, linear in loaded.named_modules():
        if isinstance(linear, NVFP4Linear):
            model.set_submodule(module_name, linear)
    assert torch.equal(model(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize("name", ["modelopt_mixtral", "modelopt_qwen3_moe_experts_only"])
@torch.no_grad()
def test_load_pretrained_compiles_and_generates(name: str) -> None:
    torch._dynamo.reset()
    ids, _ = producers_logits(name)
    model = load_pretrained(MODELS / name, activation_scale="static", dtype=torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, model(ids).logits)
    tokens = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    logits = model(tokens[:, :-1]).logits[:, ids.shape[1] - 1 :]
    assert torch.equal(tokens[:, ids.shape[1] :], logits.argmax(dim=-1))


# Other families, quantized here


QUANTIZED = ("*.experts.*", "*.experts", "*self_attn.[qkvo]*_proj", "*shared_expert*_proj")
# Checkpoints of GraniteMoe have experts under names of their own.
LOADED = [family for family in hf_models.FAMILIES if family != "GraniteMoe"]


def save(
    model: PreTrainedModel,
    directory: Path,
    include: Sequence[str] = QUANTIZED,
    **options: Any,
) -> Path:
    """An NVFP4 checkpoint of a float model, with the names of the hub."""
    model.save_pretrained(directory / "float")
    quantize_checkpoint(directory / "float", directory / "nvfp4", include=include, **options)
    return directory / "nvfp4"


@pytest.mark.parametrize("family", LOADED)
@torch.no_grad()
def test_load_pretrained_family_is_its_decoded_twin(family: str, tmp_path: Path) -> None:
    model = build(family, tie_word_embeddings=family in ("Qwen3Moe", "DeepseekV3"))
    include = QUANTIZED[:2] if family == "DeepseekV4" else QUANTIZED
    loaded = load_pretrained(save(model, tmp_path, include), dtype=torch.float32)
    assert count(loaded, NVFP4MoE) >= 1
    assert count(loaded, NVFP4Linear) >= (0 if family == "DeepseekV4" else 4)
    twin = decoded_twin(loaded, model)
    for name, weight in twin.named_parameters():
        source = model.get_parameter(name)
        assert torch.equal(weight, source) or relative_error(weight, source) < 0.12, name
    ids = torch.randint(3, hf_models.VOCABULARY, (2, 12))
    assert relative_error(loaded(ids).logits, twin(ids).logits) < SAME


@torch.no_grad()
def test_load_pretrained_ties_weights(tmp_path: Path) -> None:
    model = build("Qwen3Moe", tie_word_embeddings=True)
    loaded = load_pretrained(save(model, tmp_path), dtype=torch.float32)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def as_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The experts of gpt-oss, random, as OpenAI stores them: blocks of 32 with exponents."""
    stored = {name: t for name, t in tensors.items() if "experts" not in name or "bias" in name}
    for name in tensors.keys() - stored.keys():
        num_experts, columns, rows = tensors[name].shape
        shape = (num_experts, rows, columns // 32)
        stored[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(121, 124, shape, dtype=torch.uint8)
    return stored


@torch.no_grad()
def test_load_pretrained_takes_the_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    model = build("GptOss")
    model.save_pretrained(tmp_path)
    tensors = as_mxfp4(load_file(tmp_path / "model.safetensors"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    change_config(tmp_path, quantization_config={"quant_method": "mxfp4"})
    loaded = load_pretrained(tmp_path, dtype=torch.float32)
    twin = decoded_twin(loaded, model)
    # Column, then row: gpt-oss' weights are (E, K, N).
    name = "model.layers.1.mlp.experts.down_proj"
    codes, scales = (tensors[f"{name}_{what}"][2, 5] for what in ("blocks", "scales"))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    signed = torch.cat([values, -values])
    decoded = signed[torch.stack([codes & 15, codes >> 4], dim=-1).long()].flatten(1)
    expected = decoded * torch.exp2(scales.float() - 127).unsqueeze(1)
    assert torch.equal(twin.get_parameter(name)[2, :, 5], expected.flatten())
    ids = torch.randint(3, hf_models.VOCABULARY, (2, 12))
    assert relative_error(loaded(ids).logits, twin(ids).logits) < SAME


class Words:
    """A tokenizer: a number for each letter."""

    def __call__(self, text: str, max_length: int, **_: Any) -> dict[str, Tensor]:
        ids = [3 + ord(letter) % 64 for letter in text][:max_length]
        return {"input_ids": torch.tensor([ids])}


@pytest.mark.parametrize("family", ["Mixtral", "Qwen2Moe", "GptOss"])
@torch.no_grad()
def test_calibrate_checkpoint_makes_static_scales(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path / "float")
    texts = ["a quick brown fox", "jumps over the lazy dog", "x"]
    amax = calibrate_checkpoint(tmp_path / "float", texts, max_tokens=16, tokenizer=Words())

    seen: dict[str, Tensor] = {}

    def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        name = names[module]
        seen[name] = torch.maximum(seen.get(name, torch.zeros(())), inputs[0].abs().amax())

    names = {module: name for name, module in model.named_modules()}
    for module in (layer.self_attn.q_proj for layer in model.model.layers):
        module.register_forward_pre_hook(observe)
    model.model.layers[0].mlp.experts.register_forward_pre_hook(observe)
    for text in texts:
        model(Words()(text, 16)["input_ids"])
    # The first layer is before any quantized expert.
    first = {name: float(value) for name, value in seen.items() if ".0." in name}
    for name, value in first.items():
        stored = [v for n, v in amax.items() if n == name or is_first_projection(n, name)]
        assert stored
        assert stored == pytest.approx([value] * len(stored), rel=1e-6)

    directory = save(model, tmp_path, input_amax=amax)
    loaded = load_pretrained(directory, activation_scale="static", dtype=torch.float32)
    ids = Words()(texts[0], 16)["input_ids"]
    assert relative_error(loaded(ids).logits, model(ids).logits) < 0.8


def is_first_projection(tensor: str, experts: str) -> bool:
    """Whether a checkpoint's module is the first projection of experts of the first layer."""
    parts = tensor.split(".")
    is_experts = "experts" in parts and parts[2] == experts.split(".")[2]
    return experts.endswith("experts") and is_experts and parts[-1] not in ("w2", "down_proj")


# On a GPU


SHIPPED = Path(__file__).parent.parent / "examples" / "checkpoint"


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "static", "per_token", "per_tensor"], ids=str)
@torch.no_grad()
def test_load_pretrained_on_gpu_is_as_near_float32_as_the_cpu(mode: str | None) -> None:
    """In bf16 a rounding that goes the other way moves whole codes, on either device."""
    ids = torch.randint(3, 2048, (2, 64))
    cpu, gpu, exact = (
        load_pretrained(SHIPPED, device=device, activation_scale=mode, dtype=dtype)
        for device, dtype in (("cpu", "auto"), ("cuda", "auto"), ("cpu", torch.float32))
    )
    assert {tensor.device.type for tensor in (*gpu.parameters(), *gpu.buffers())} == {"cuda"}
    expected = exact(ids).logits
    error_cpu = relative_error(cpu(ids).logits, expected)
    error_gpu = relative_error(gpu(ids.cuda()).logits.cpu(), expected)
    assert error_gpu < 1.3 * error_cpu + 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*W4A4, *W4A16])
@torch.no_grad()
def test_load_pretrained_linears_on_gpu_are_near_the_cpu(name: str) -> None:
    ids, _ = producers_logits(name)
    cpu, gpu = (load_pretrained(MODELS / name, device=device) for device in ("cpu", "cuda"))
    assert relative_error(gpu(ids.cuda()).logits.cpu(), cpu(ids).logits) < 0.05
    expected = cpu.state_dict()
    for tensor_name, tensor in gpu.state_dict().items():
        assert_bytes_equal(tensor.cpu(), expected[tensor_name])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "per_token"], ids=str)
@torch.no_grad()
def test_load_pretrained_generates_in_cuda_graphs(mode: str | None) -> None:
    torch._dynamo.reset()
    model = load_pretrained(SHIPPED, device="cuda", activation_scale=mode)
    ids = torch.randint(3, 2048, (1, 16), device="cuda")
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    options |= {"cache_implementation": "static"}
    eager = model.generate(ids, **options, disable_compile=True)
    config = CompileConfig(fullgraph=True, mode="reduce-overhead")
    compiled = model.generate(ids, **options, compile_config=config)
    # Inductor's attention and norms round differently: tokens may part, late.
    assert torch.equal(compiled[:, :20], eager[:, :20])


# What is refused


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of a checkpoint, to be broken."""
    return Path(shutil.copytree(MODELS / "modelopt_mixtral", tmp_path / "broken"))


def change_tensors(directory: Path, **changes: Any) -> None:
    """Keys with __ for dots; None removes."""
    tensors = load_file(directory / "model.safetensors")
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


Q_PROJ = "model__layers__1__self_attn__q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__norm__weight": None}, r"model\.norm\.weight is missing"),
        (
            {"model__norm__weight": torch.ones(7)},
            r"model\.norm\.weight must be \(128,\), got \(7,\)",
        ),
        (
            {"model__layers__0__input_layernorm__weight": torch.ones(128, dtype=torch.uint8)},
            r"input_layernorm\.weight is torch\.uint8, but belongs to no NVFP4 layer",
        ),
        ({f"{Q_PROJ}__input_scale": None}, r"layers\.1\.self_attn\.q_proj has no input scale"),
        (
            {f"{Q_PROJ}__weight_scale_2": torch.zeros(())},
            r"q_proj\.weight_scale_2 must be one positive, finite",
        ),
        (
            {
                f"{Q_PROJ}__weight": torch.zeros(64, 64, dtype=torch.uint8),
                f"{Q_PROJ}__weight_scale": torch.ones(64, 8).to(torch.float8_e4m3fn),
            },
            r"q_proj is \(N, K\) = \(64, 128\), the model's .* \(128, 128\)",
        ),
        (
            {"model__layers__1__self_attn__extra__weight_scale": torch.ones(2)},
            r"self_attn\.extra: MixtralForCausalLM has no such layer",
        ),
        (
            {"model__layers__0__block_sparse_moe__experts__3__w3__weight": None},
            r"experts\.3\.w3\.weight",
        ),
    ],
    ids=[
        "missing",
        "mismatched",
        "other format",
        "input scale",
        "scale",
        "size",
        "layer",
        "expert",
    ],
)
def test_load_pretrained_refuses_broken_tensors(
    broken: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    change_tensors(broken, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(broken, activation_scale="static")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # Transformers before 5.18 takes routers of any size; then those are found first.
        (
            {"num_local_experts": 4},
            r"num_experts is 8 in the checkpoint, 4 in the model|gate\.weight must be \(4, 128\)",
        ),
        ({"intermediate_size": 32}, "intermediate_size is 64 in the checkpoint, 32 in the model"),
        ({"num_hidden_layers": 1}, r"layers\.1.*has no such layer"),
    ],
    ids=["experts", "size", "layers"],
)
def test_load_pretrained_refuses_another_config(
    broken: Path, changes: dict[str, Any], message: str
) -> None:
    change_config(broken, **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(broken)


def test_load_pretrained_refuses_linears_that_are_more(broken: Path) -> None:
    """A router is a linear layer, too, but not only that."""
    from transformers.models.mixtral import modeling_mixtral

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Attention(modeling_mixtral.MixtralAttention):
        def __init__(self, config: Any, layer_idx: int) -> None:
            super().__init__(config, layer_idx)
            self.o_proj = Scaled(128, 128, bias=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mixtral, "MixtralAttention", Attention)
        with pytest.raises(CheckpointError, match=r"o_proj is a Scaled, which does more"):
            load_pretrained(broken)


def test_load_pretrained_refuses_static_without_input_scales() -> None:
    with pytest.raises(CheckpointError, match='no input_scale, which "static" needs'):
        load_pretrained(MODELS / "ct_qwen3_moe_a16", activation_scale="static")


def test_load_pretrained_refuses_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_pretrained(tmp_path)


def test_replace_experts_refuses_a_checkpoint_of_another_model() -> None:
    model = build("Mixtral")
    before = copy.copy(model.model.layers[0].mlp._modules)
    with pytest.raises(ValueError, match="num_experts is 8 in the checkpoint, 4 in the model"):
        replace_experts(model, MODELS / "modelopt_mixtral")
    assert model.model.layers[0].mlp._modules == before


def test_pretrained_model_does_not_save_as_something_else(tmp_path: Path) -> None:
    """Transformers would write NVFP4 tensors under names that nothing loads."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / "modelopt_qwen3_moe_experts_only")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
