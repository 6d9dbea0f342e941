"""replace_experts: every experts class of transformers, whole models, and what is refused."""

import copy
import importlib
import re
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_models
import pytest
import torch
import transformers
from hf_models import build, decode_experts, decoded_twin, relative_error
from torch import Tensor, nn
from transformers import PreTrainedModel

import nvfp4_ops
from nvfp4_ops import NVFP4MoE
from nvfp4_ops.huggingface import replace, replace_experts, set_activation_scale
from nvfp4_ops.huggingface.families import experts_spec
from nvfp4_ops.huggingface.replace import quantize_experts

TRANSFORMERS = Path(transformers.__file__).parent
HIDDEN, INTERMEDIATE, EXPERTS = 64, 32, 4
# fp32 of two orders of summation; a wrong row, scale or activation is off by 0.1 at least.
SAME = 2e-6

# Under every name that an experts class reads its sizes by.
CONFIG: dict[str, Any] = {
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS
    ),
    **dict.fromkeys(("hidden_size", "moe_hidden_size"), HIDDEN),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INTERMEDIATE),
    "hidden_act": "silu",
    "hidden_activation": "gelu_pytorch_tanh",
    "mlp_hidden_act": "relu2",
    "moe_latent_size": None,
    "swiglu_limit": 7.0,
    "swiglu_alpha": 1.702,
    "mlp_gate_softcap": 10.0,
    "mlp_up_softcap": 10.0,
    "post_norm_eps": 1e-6,
    "_experts_implementation": "eager",
}


def experts_classes() -> list[Any]:
    """(module, class) of whatever is decorated with use_experts_implementation."""
    decorated = re.compile(r"^@use_experts_implementation.*\n(?:@.*\n)*class (\w+)", re.M)
    classes = []
    for path in sorted(TRANSFORMERS.glob("models/*/modeling_*.py")):
        for name in decorated.findall(path.read_text(encoding="utf-8")):
            module = ".".join(path.relative_to(TRANSFORMERS).with_suffix("").parts)
            classes.append(pytest.param(f"transformers.{module}", name, id=name))
    return classes


def random_experts(cls: type[nn.Module], **changes: Any) -> nn.Module:
    experts = cls(SimpleNamespace(**{**CONFIG, **changes})).eval().requires_grad_(False)
    for parameter in experts.parameters():
        parameter.normal_(std=0.3)
    return experts


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens large enough to meet the clamps."""
    return torch.randn(10, HIDDEN) * 4, torch.randint(0, EXPERTS, (10, 2)), torch.rand(10, 2)


@pytest.mark.parametrize(("module", "name"), experts_classes())
def test_experts_class_is_read_as_it_computes(module: str, name: str) -> None:
    """Layout, biases and activation of each class there is, by its own eager forward."""
    experts = random_experts(getattr(importlib.import_module(module), name))
    if getattr(experts, "has_post_expert_norm", False):
        with pytest.raises(ValueError, match=f"{name}.*has_post_expert_norm"):
            experts_spec("experts", experts)
        return
    spec = experts_spec("experts", experts)
    moe = quantize_experts(spec, experts, "cpu")
    twin = copy.deepcopy(experts)
    decode_experts(moe, spec, twin)
    for parameter, source in zip(twin.parameters(), experts.parameters(), strict=True):
        assert relative_error(parameter, source) < 0.12
    tokens = routed()
    assert relative_error(moe(*tokens), twin(*tokens)) < SAME


def test_experts_classes_are_found() -> None:
    assert len(experts_classes()) > 40


def gpt_oss(**changes: Any) -> nn.Module:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return random_experts(GptOssExperts, **changes)


def mixtral(**changes: Any) -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    return random_experts(MixtralExperts, **changes)


@pytest.mark.parametrize("limit", [0.5, 7.0, 100.0])
def test_spec_finds_the_clamp(limit: float) -> None:
    experts = gpt_oss()
    experts.limit = limit
    spec = experts_spec("experts", experts)
    assert (spec.activation, spec.activation_limit) == ("swiglu_oai", limit)


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu2"])
def test_spec_finds_the_activation(act: str) -> None:
    spec = experts_spec("experts", mixtral(hidden_act=act))
    assert spec.activation == {"gelu_pytorch_tanh": "gelu_tanh"}.get(act, act)


def test_spec_runs_an_unknown_activation_as_it_is() -> None:
    """gelu by erf is near gelu by tanh, but not the same."""
    experts = mixtral(hidden_act="gelu")
    spec = experts_spec("experts", experts)
    assert callable(spec.activation)
    moe, twin = quantize_experts(spec, experts, "cpu"), copy.deepcopy(experts)
    decode_experts(moe, spec, twin)
    tokens = routed()
    assert relative_error(moe(*tokens), twin(*tokens)) < SAME
    assert not any(parameter.ndim == 3 for parameter in moe.parameters()), "float weights kept"


def test_spec_reads_the_activation_of_models_on_meta() -> None:
    """As the loader does: under a default device and dtype that are not those of values."""
    with torch.device("meta"):
        experts = mixtral()
        assert experts_spec("experts", experts).activation == "silu"


def with_parameter(experts: nn.Module) -> None:
    experts.scale = nn.Parameter(torch.ones(HIDDEN))


def undecorated(experts: nn.Module) -> None:
    del experts.is_concatenated


@pytest.mark.parametrize(
    ("experts", "change", "message"),
    [
        (mixtral, {"_is_expert_parallel": True}, "_is_expert_parallel is set"),
        (mixtral, {"has_post_expert_norm": True}, "has_post_expert_norm is set"),
        (mixtral, {"has_bias": True}, r"must have the parameters \['down_proj', 'down_proj_bias'"),
        (mixtral, with_parameter, r"has \['down_proj', 'gate_up_proj', 'scale'\]"),
        (mixtral, undecorated, "does not follow the experts interface"),
        (gpt_oss, {"alpha": 1.5}, "interleaved gate and up rows"),
    ],
)
def test_spec_refuses_and_says_what(experts: Any, change: Any, message: str) -> None:
    module = experts()
    if callable(change):
        change(module)
    else:
        for name, value in change.items():
            setattr(module, name, value)
    with pytest.raises(ValueError, match=rf"layer\.experts \({type(module).__name__}\).*{message}"):
        experts_spec("layer.experts", module)


@pytest.mark.parametrize("size", ["hidden_size", "intermediate_size"])
def test_spec_refuses_sizes(size: str) -> None:
    with pytest.raises(ValueError, match=f"{size.replace('_', ' ')} must be a multiple of 16"):
        experts_spec("experts", mixtral(**{size: 24}))


# Whole models


def input_ids() -> Tensor:
    return torch.randint(3, hf_models.VOCABULARY, (2, 12))


def replaced(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    quantized = copy.deepcopy(model)
    names = replace_experts(quantized, **options)
    assert names
    assert all(isinstance(quantized.get_submodule(name), NVFP4MoE) for name in names)
    return quantized


@pytest.mark.parametrize("family", hf_models.FAMILIES)
@torch.no_grad()
def test_replaced_model_is_its_decoded_twin(family: str) -> None:
    model, ids = build(family), input_ids()
    quantized = replaced(model)
    twin = decoded_twin(quantized, model)
    got, expected = quantized(ids).logits, twin(ids).logits
    assert relative_error(got, expected) < 10 * SAME
    assert relative_error(got, model(ids).logits) > 0.01, "the experts do not matter"


@torch.no_grad()
def test_replaced_model_quantizes_activations() -> None:
    model, ids = build("Qwen3Moe"), input_ids()
    quantized = replaced(model, activation_scale="per_token")
    got = quantized(ids).logits
    expected = hf_models.fake_quantized(quantized, "per_token")(ids).logits
    assert relative_error(got, expected) < 10 * SAME
    set_activation_scale(quantized, None)
    assert relative_error(quantized(ids).logits, got) > 0.01


def test_replace_experts_drops_each_layers_float_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Mixtral")
    weights = [weakref.ref(layer.mlp.experts.gate_up_proj) for layer in model.model.layers]
    alive = []

    def count_alive(*args: Any) -> NVFP4MoE:
        alive.append(sum(weight() is not None for weight in weights))
        return quantize_experts(*args)

    monkeypatch.setattr(replace, "quantize_experts", count_alive)
    replace_experts(model)
    assert alive == [2, 1]
    assert all(weight() is None for weight in weights)


@torch.no_grad()
def test_replaced_model_keeps_routers_and_shared_experts() -> None:
    model = build("Qwen2Moe")
    quantized = replaced(model)
    kept = {n: p for n, p in model.named_parameters() if ".experts." not in n}
    assert any("shared_expert" in name for name in kept)
    assert kept.keys() == dict(quantized.named_parameters()).keys()
    for name, parameter in quantized.named_parameters():
        assert torch.equal(parameter, kept[name])


@torch.no_grad()
def test_replaced_model_records_router_logits() -> None:
    for family in ("Qwen3Moe", "Llama4Text"):
        quantized = replaced(build(family))
        out = quantized(input_ids(), output_router_logits=True)
        if hasattr(out, "router_logits"):
            assert len(out.router_logits) == 2


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Llama4Text"])
@torch.no_grad()
def test_replaced_model_compiles_as_one_graph(family: str) -> None:
    torch._dynamo.reset()
    quantized, ids = replaced(build(family), activation_scale="per_token"), input_ids()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids, use_cache=False).logits, quantized(ids).logits)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_replaced_model_generates_compiled_as_eager(family: str) -> None:
    torch._dynamo.reset()
    quantized = replaced(build(family), activation_scale="per_token")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"cache_implementation": "static"}
    ids = input_ids()
    eager = quantized.generate(ids, **options)
    quantized.forward = torch.compile(quantized.forward, fullgraph=True, backend="aot_eager")
    compiled = quantized.generate(ids, **options)
    assert eager.shape == (2, 18)
    assert torch.equal(compiled, eager)


@torch.no_grad()
def test_replaced_model_calibrates_to_static() -> None:
    quantized, ids = replaced(build("Mixtral")), input_ids()
    moe = quantized.model.layers[0].mlp.experts
    moe.activation_scale = "per_token"
    with pytest.raises(ValueError, match=r'model\.layers\.0\.mlp\.experts: .*"static" needs'):
        set_activation_scale(quantized, "static")
    assert moe.activation_scale == "per_token"
    with nvfp4_ops.calibrate(quantized):
        quantized(ids)
    set_activation_scale(quantized, "static")
    expected = hf_models.fake_quantized(quantized, "static")(ids).logits
    assert relative_error(quantized(ids).logits, expected) < 10 * SAME


def test_families_are_found() -> None:
    assert len(hf_models.FAMILIES) >= 14


def test_replace_experts_refuses_and_changes_nothing() -> None:
    model = build("Mixtral")
    before = dict(model.named_modules())
    model.model.layers[1].mlp.experts.has_post_expert_norm = True
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts.*has_post_expert_norm"):
        replace_experts(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_replace_experts_finds_weights_that_are_not_finite_before_it_begins(value: float) -> None:
    model = build("Mixtral", torch.bfloat16)
    before = dict(model.named_modules())
    model.model.layers[1].mlp.experts.gate_up_proj.data[3, 5, 7] = value
    message = r"model\.layers\.1\.mlp\.experts\.gate_up_proj: must be finite"
    with pytest.raises(ValueError, match=message):
        replace_experts(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_replace_experts_refuses_other_dtypes_before_it_begins(dtype: torch.dtype) -> None:
    model = build("Mixtral", torch.bfloat16)
    before = dict(model.named_modules())
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(dtype), requires_grad=False)
    message = rf"model\.layers\.1\.mlp\.experts\.down_proj: must be bfloat16.*got {dtype}"
    with pytest.raises(ValueError, match=message):
        replace_experts(model)
    assert dict(model.named_modules()) == before


def test_replace_experts_refuses_models_without_weights_or_experts() -> None:
    with torch.device("meta"):
        model = build("Mixtral")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.experts: has no weights"):
        replace_experts(model)
    with pytest.raises(ValueError, match="Linear has no experts that can be replaced"):
        replace_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match='"static" needs input scales'):
        replace_experts(build("Mixtral"), activation_scale="static")
