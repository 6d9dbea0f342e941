"""NVFP4MoE: against a plain float64 layer on the decoded weights, in every mode and form."""

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from torch import Tensor, nn

import nvfp4_ops
from nvfp4_ops import NVFP4MoE
from nvfp4_ops.projection import ExpertProjection

MODES = (None, "per_token", "per_tensor", "static")
BATCH_INVARIANT = (None, "per_token", "static")
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 64, 48, 8, 2

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {},
    "clamped_silu": {"activation": "silu", "activation_limit": 0.5},
    "swiglu_oai": {"activation": "swiglu_oai"},
    "gelu_tanh": {"activation": "gelu_tanh"},
    "relu2": {"activation": "relu2", "gated": False},
    "silu_ungated": {"activation": "silu", "gated": False},
}


def make_moe(mode: str | None = None, *, bias: bool = False, **options: Any) -> NVFP4MoE:
    rows = INTERMEDIATE * (2 if options.get("gated", True) else 1)
    generator = torch.Generator().manual_seed(1)
    biases = {}
    if bias:
        biases = {
            "gate_up_bias": torch.randn(EXPERTS, rows, generator=generator),
            "down_bias": torch.randn(EXPERTS, HIDDEN, generator=generator),
        }
    moe = NVFP4MoE.from_float(
        torch.randn(EXPERTS, rows, HIDDEN, generator=generator) * 0.3,
        torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator) * 0.3,
        **biases,
        **options,
    )
    if mode == "static":
        with nvfp4_ops.calibrate(moe):
            moe(*make_inputs(256, seed=9))
    moe.activation_scale = mode
    return moe


def make_inputs(
    tokens: int, *, seed: int = 2, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    index, weights = nvfp4_ops.softmax_top_k(
        torch.randn(tokens, EXPERTS, generator=generator), TOP_K
    )
    return x, index, weights


def decoded(moe: NVFP4MoE, name: str) -> Tensor:
    """(E, N, K) float64 weights; gate and up with their own global scale."""
    projection = moe.projections()[name]
    one = torch.ones(())
    values = nvfp4_ops.dequantize_nvfp4(*projection.canonical(), one).double()
    scales = projection.weight_scale_2.view(moe.num_experts, -1, 1, 1).double()
    return (values.unflatten(1, (scales.shape[1], -1)) * scales).flatten(1, 2)


def act_float64(h: Tensor, case: dict[str, Any]) -> Tensor:
    name, limit = case.get("activation", "silu"), case.get("activation_limit")
    if not case.get("gated", True):
        return h.relu().square() if name == "relu2" else nn.functional.silu(h)
    gate, up = h.chunk(2, dim=-1)
    if name == "swiglu_oai":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if name == "gelu_tanh":
        return nn.functional.gelu(gate, approximate="tanh") * up
    return nn.functional.silu(gate) * up


def fake_quantize(x: Tensor, scale: Tensor) -> Tensor:
    codes, sf = nvfp4_ops.quantize_nvfp4(x, scale)
    return nvfp4_ops.dequantize_nvfp4(codes, sf, scale).double()


def oracle(
    moe: NVFP4MoE, x: Tensor, index: Tensor, weights: Tensor, case: dict[str, Any]
) -> Tensor:
    """The layer slot by slot in float64, rounding only where NVFP4MoE documents a rounding."""
    first, down = (decoded(moe, name) for name in moe.projections())
    mode = moe.activation_scale
    tokens, top_k = index.shape
    slots = [(t, j) for t in range(tokens) for j in range(top_k) if index[t, j] < moe.num_experts]
    quantized_x = x.double()
    if mode == "static":
        quantized_x = fake_quantize(x, moe.first_proj.input_scale.amax())
    elif mode is not None:
        quantized_x = fake_quantize(x, nvfp4_ops.global_scale(x, mode == "per_token"))
    hidden = {}
    for t, j in slots:
        expert = int(index[t, j])
        h = first[expert] @ quantized_x[t]
        bias = moe.first_proj.bias
        h = h if bias is None else h + bias[expert].double()
        hidden[t, j] = act_float64(h, case).float().to(x.dtype)
    amax = max((h.abs().max() for h in hidden.values()), default=torch.zeros(()))
    out = torch.zeros(tokens, moe.hidden_size, dtype=torch.float64)
    for t, j in slots:
        expert, h = int(index[t, j]), hidden[t, j].unsqueeze(0)
        if mode is None:
            row = h.double()
        elif mode == "static":
            assert moe.down_proj.input_scale is not None
            row = fake_quantize(h, moe.down_proj.input_scale[expert])
        else:
            source = h if mode == "per_token" else amax.reshape(1, 1).to(h.dtype)
            row = fake_quantize(h, nvfp4_ops.global_scale(source))
        y = down[expert] @ row[0]
        if moe.down_proj.bias is not None:
            y = y + moe.down_proj.bias[expert].double()
        out[t] += weights[t, j].double() * y.float().to(x.dtype).double()
    return out


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("case", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_moe_equals_float64_layer(mode: str | None, case: dict[str, Any], bias: bool) -> None:
    moe = make_moe(mode, bias=bias, **case)
    x, index, weights = make_inputs(19)
    expected = oracle(moe, x, index, weights, case)
    actual = moe(x, index, weights)
    # One bf16 rounding of the sum, and that of the products before it.
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2**-9)


def forward_of_codes(moe: NVFP4MoE, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The layer in codes and block scales, as tensor cores with FP4 multiply them."""
    mode, first, down = moe.activation_scale, moe.first_proj, moe.down_proj
    per_token = mode == "per_token"
    offs, token_of_row, row_of_slot = nvfp4_ops.sort_by_expert(index, moe.num_experts)

    def multiply(
        projection: ExpertProjection,
        rows: tuple[Tensor, Tensor],
        scale: Tensor,
        activation: nvfp4_ops.Activation | None,
    ) -> Tensor:
        alpha = projection.weight_scale_2
        return nvfp4_ops.grouped_scaled_mm(
            rows[0],
            projection.weight,
            rows[1],
            projection.weight_scale,
            alpha if per_token else alpha * scale,
            offs,
            row_scale=scale if per_token else None,
            bias=projection.bias,
            activation=activation,
            out_dtype=x.dtype,
        )

    def scale_of(rows: Tensor, static: Tensor | None) -> Tensor:
        return static if mode == "static" else nvfp4_ops.global_scale(rows, per_token)

    scale = scale_of(x, first.input_scale.amax() if mode == "static" else None)
    codes, sf = (nvfp4_ops.permute(t, token_of_row) for t in nvfp4_ops.quantize_nvfp4(x, scale))
    scale = nvfp4_ops.permute(scale, token_of_row) if per_token else scale
    hidden = multiply(first, (codes, sf), scale, moe._fused)
    scale = scale_of(hidden, down.input_scale)
    out = multiply(down, nvfp4_ops.quantize_nvfp4(hidden, scale, offs), scale, None)
    return nvfp4_ops.combine(out, row_of_slot, weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", ["static", "per_token", "per_tensor"])
def test_moe_rounds_to_the_bits_of_codes(mode: str, dtype: torch.dtype) -> None:
    for options in ({}, {"bias": True, "activation": "relu2", "gated": False}):
        moe = make_moe(mode, **options)
        x, index, weights = make_inputs(40, dtype=dtype)
        x[1], x[2, 5], x[3, 7] = 0.0, 1e4, -torch.inf
        index[6, 1], index[7, :] = EXPERTS, EXPERTS
        expected = forward_of_codes(moe, x, index, weights)
        assert expected[8:].isfinite().all()
        assert expected[8:].abs().amax() > 0
        assert_bytes_equal(moe(x, index, weights), expected)


def test_moe_static_scales_follow_what_they_are_derived_from() -> None:
    moe, other = make_moe("static"), make_moe("static", bias=True)
    inputs = make_inputs(10)
    for projection in moe.projections().values():
        projection.set_input_scale(projection.input_scale * 1.7)
        weight = nvfp4_ops.quantize_weight(
            torch.randn(projection.segment_rows(0).stop, projection.num_columns)
        )
        projection.copy_segment(3, 0, weight)
    assert_bytes_equal(moe(*inputs), forward_of_codes(moe, *inputs))
    assert not any("static" in name for name in moe.state_dict())
    fresh = make_moe()
    fresh.load_state_dict(moe.state_dict())
    fresh.activation_scale = "static"
    assert_bytes_equal(fresh(*inputs), moe(*inputs))
    other.to(torch.float16)
    assert_bytes_equal(other(*inputs), forward_of_codes(other, *inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_keeps_dtype_of_hidden_states(mode: str | None, dtype: torch.dtype) -> None:
    moe = make_moe(mode)
    x, index, weights = make_inputs(11, dtype=dtype)
    actual = moe(x, index, weights)
    assert actual.dtype == dtype
    tolerance = 2.0 ** {torch.bfloat16: -8, torch.float16: -10, torch.float32: -20}[dtype]
    expected = oracle(moe, x, index, weights, {})
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_moe_quantization_error_is_that_of_nvfp4() -> None:
    """Against the float weights themselves: weight-only about 16 %, W4A4 about 22 %."""
    generator = torch.Generator().manual_seed(1)
    gate_up = torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN, generator=generator)
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator)
    moe = NVFP4MoE.from_float(gate_up, down)
    x, index, weights = make_inputs(64)
    expected = torch.zeros(64, HIDDEN, dtype=torch.float64)
    for t in range(64):
        for j in range(TOP_K):
            h = act_float64(gate_up[index[t, j]].double() @ x[t].double(), {})
            expected[t] += weights[t, j] * (down[index[t, j]].double() @ h)
    errors = {}
    for mode in (None, "per_token"):
        moe.activation_scale = mode
        error = moe(x, index, weights).double() - expected
        errors[mode] = float(error.norm() / expected.norm())
    assert 0.1 < errors[None] < 0.2
    assert errors[None] < errors["per_token"] < 0.3


@pytest.mark.parametrize("mode", BATCH_INVARIANT, ids=str)
def test_moe_is_batch_invariant(mode: str | None) -> None:
    moe = make_moe(mode)
    x, index, weights = make_inputs(37)
    together = moe(x, index, weights)
    for t in (0, 17, 36):
        alone = moe(x[t : t + 1], index[t : t + 1], weights[t : t + 1])
        assert torch.equal(alone[0], together[t])
    order = torch.randperm(37)
    assert torch.equal(moe(x[order], index[order], weights[order]), together[order])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_gives_same_bits_twice(mode: str | None) -> None:
    moe = make_moe(mode)
    inputs = make_inputs(33)
    assert torch.equal(moe(*inputs), moe(*inputs))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_nan_token_stays_alone(mode: str | None) -> None:
    moe = make_moe(mode)
    x, index, weights = make_inputs(9)
    clean = moe(x, index, weights)
    x[4, 3] = torch.nan
    poisoned = moe(x, index, weights)
    assert poisoned[4].isnan().all()
    if mode == "per_tensor":
        # One scale for the whole batch: NaN in it is NaN everywhere.
        assert poisoned.isnan().all()
    else:
        others = torch.arange(9) != 4
        assert torch.equal(poisoned[others], clean[others])


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_accepts_any_leading_shape(mode: str | None) -> None:
    moe = make_moe(mode)
    x, index, weights = make_inputs(12)
    flat = moe(x, index, weights)
    shaped = moe(x.view(2, 3, 2, HIDDEN), index.view(2, 3, 2, TOP_K), weights.view(2, 3, 2, TOP_K))
    assert torch.equal(shaped.view(12, HIDDEN), flat)
    # Hugging Face flattens the tokens of the routing but not always those of the states.
    assert torch.equal(moe(x.view(3, 4, HIDDEN), index, weights).view(12, HIDDEN), flat)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_moe_accepts_no_tokens(mode: str | None, shape: tuple[int, ...]) -> None:
    moe = make_moe(mode)
    x = torch.empty(*shape, HIDDEN, dtype=torch.bfloat16)
    index = torch.empty(*shape, TOP_K, dtype=torch.int64)
    out = moe(x, index, torch.empty(*shape, TOP_K))
    assert out.shape == x.shape
    assert out.dtype == x.dtype


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_drops_slots_of_other_ranks(mode: str | None) -> None:
    moe = make_moe(mode)
    x, index, weights = make_inputs(8)
    weights = weights.clone()
    index[2, 1], weights[2, 1] = EXPERTS, torch.nan
    index[5, :] = EXPERTS
    expected = oracle(moe, x, index, weights, {})
    actual = moe(x, index, weights)
    torch.testing.assert_close(actual.double(), expected, rtol=2**-8, atol=2**-9)
    assert (actual[5] == 0).all()


def test_moe_keeps_gate_and_up_scales_apart() -> None:
    """An up projection 1000 times the gate's loses nothing to a shared scale."""
    generator = torch.Generator().manual_seed(3)
    gate = torch.randn(EXPERTS, INTERMEDIATE, HIDDEN, generator=generator)
    up = torch.randn(EXPERTS, INTERMEDIATE, HIDDEN, generator=generator) * 1000
    down = torch.randn(EXPERTS, HIDDEN, INTERMEDIATE, generator=generator)
    moe = NVFP4MoE.from_float(torch.cat([gate, up], dim=1), down)
    halves = decoded(moe, "gate_up_proj").chunk(2, dim=1)
    for half, source in zip(halves, (gate, up), strict=True):
        alone = nvfp4_ops.quantize_weight(source)
        expected = nvfp4_ops.dequantize_nvfp4(*alone).double()
        torch.testing.assert_close(half, expected, rtol=2**-23, atol=0)
    assert (
        moe.gate_up_proj.weight_scale_2[:, 1] > 100 * moe.gate_up_proj.weight_scale_2[:, 0]
    ).all()


def test_moe_callable_activation_runs_unfused() -> None:
    def silu_mul(gate_up: Tensor) -> Tensor:
        assert gate_up.dtype == torch.bfloat16
        gate, up = gate_up.float().chunk(2, dim=-1)
        return (nn.functional.silu(gate) * up).bfloat16()

    fused, unfused = make_moe(), make_moe(activation=silu_mul)
    inputs = make_inputs(21)
    error = (unfused(*inputs) - fused(*inputs)).float().norm() / fused(*inputs).float().norm()
    # One more bf16 rounding, of gate_up's output.
    assert 0 < error < 2**-7


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_compiles_to_the_same_bits(mode: str | None) -> None:
    torch._dynamo.reset()
    moe = make_moe(
        mode, bias=mode == "static", router=nvfp4_ops.SoftmaxRouter(HIDDEN, EXPERTS, TOP_K)
    )
    compiled = torch.compile(moe, fullgraph=True, dynamic=True)
    x = make_inputs(40)[0]
    assert torch.equal(compiled(x[:13]), moe(x[:13]))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (40, 2, 29):
            assert torch.equal(compiled(x[:tokens]), moe(x[:tokens]))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_exports_with_dynamic_tokens(mode: str | None) -> None:
    moe = make_moe(mode)
    tokens = torch.export.Dim("tokens", min=0, max=4096)
    dynamic = ({0: tokens}, {0: tokens}, {0: tokens})
    program = torch.export.export(moe, make_inputs(5), dynamic_shapes=dynamic)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for count in (1, 5, 64):
        inputs = make_inputs(count)
        assert torch.equal(loaded(*inputs), moe(*inputs))


def test_moe_state_dict_round_trips() -> None:
    source = make_moe("static", bias=True)
    target = NVFP4MoE(HIDDEN, INTERMEDIATE, EXPERTS, bias=True, dtype=torch.float32)
    target.load_state_dict(source.state_dict())
    target.activation_scale = "static"
    inputs = make_inputs(10)
    assert torch.equal(target(*inputs), source(*inputs))
    assert torch.equal(copy.deepcopy(source)(*inputs), source(*inputs))


def test_moe_prepacks_what_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a module that was built on the GPU would pack its weights anew in every call."""
    saved, built = make_moe(), NVFP4MoE(HIDDEN, INTERMEDIATE, EXPERTS)
    state = saved.state_dict()
    monkeypatch.setattr(
        ExpertProjection, "_gains_by_prepacking", lambda self, device: device.type != "meta"
    )
    on_meta = NVFP4MoE(HIDDEN, INTERMEDIATE, EXPERTS, device="meta")
    for moe, assign in ((built, False), (on_meta, True)):
        moe.load_state_dict(state, assign=assign)
        assert moe.first_proj.prepacked
        assert moe.down_proj.prepacked
        assert moe.state_dict().keys() == state.keys()
        for name, tensor in moe.state_dict().items():
            assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name


def prepack_here(projection: ExpertProjection) -> None:
    """What ``prepack`` does on a GPU that gains by it."""
    projection.weight = nvfp4_ops.prepack_weight(
        projection.weight, projection.weight_scale, gated=projection.gated
    )
    projection.weight_scale = None


@pytest.mark.parametrize(
    ("options", "rank"),
    [({}, 5), ({"activation": "relu2", "gated": False}, 4), ({"activation": torch.tanh}, 4)],
    ids=["gated", "ungated", "callable"],
)
def test_moe_prepacked_computes_saves_and_loads_the_same(
    options: dict[str, Any], rank: int
) -> None:
    if callable(options.get("activation")):
        options = {"activation": lambda h: torch.tanh(h.chunk(2, dim=-1)[0])}
    moe, packed = make_moe(**options), make_moe(**options)
    for projection in packed.projections().values():
        prepack_here(projection)
        assert projection.prepacked
    assert packed.first_proj.weight.ndim == rank
    assert packed.down_proj.weight.ndim == 4
    inputs = make_inputs(11)
    assert torch.equal(packed(*inputs), moe(*inputs))
    for name, tensor in moe.state_dict().items():
        saved = packed.state_dict()[name]
        assert torch.equal(saved.view(torch.uint8), tensor.view(torch.uint8)), name
    packed.load_state_dict(moe.state_dict())
    assert not packed.first_proj.prepacked  # the CPU does not gain by it
    assert torch.equal(packed(*inputs), moe(*inputs))


@pytest.mark.parametrize(
    "cast",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.float()],
    ids=["bf16", "half", "double", "float"],
)
def test_moe_casting_the_model_leaves_codes_and_scales(
    cast: Callable[[nn.Module], nn.Module],
) -> None:
    moe = make_moe("static", bias=True, router=nvfp4_ops.SoftmaxRouter(HIDDEN, EXPERTS, TOP_K))
    before = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    cast(nn.ModuleDict({"moe": moe}))
    for name, tensor in moe.state_dict().items():
        if "bias" in name or "router" in name:
            continue
        assert tensor.dtype == before[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    wanted = cast(nn.Linear(1, 1)).weight.dtype
    assert moe.gate_up_proj.bias.dtype == wanted
    assert moe.router is not None
    assert moe.router.weight.dtype == wanted


def test_moe_load_rejects_cast_scales() -> None:
    moe = make_moe()
    state = moe.state_dict()
    state["down_proj.weight_scale"] = state["down_proj.weight_scale"].float()
    with pytest.raises(RuntimeError, match=r"down_proj.weight_scale: must be torch.float8_e4m3fn"):
        make_moe().load_state_dict(state)


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan], ids=str)
def test_moe_load_rejects_bad_input_scale(value: float) -> None:
    state = make_moe("static").state_dict()
    state["down_proj.input_scale"][3] = value
    message = r"down_proj.input_scale: must be positive and finite, got .* at \[3\]"
    with pytest.raises(RuntimeError, match=message):
        make_moe().load_state_dict(state)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "hidden": ({"hidden_size": 40}, "hidden_size: must be a positive multiple of 16, got 40"),
    "intermediate": ({"intermediate_size": 0}, "intermediate_size: must be a positive multiple"),
    "experts": ({"num_experts": 0}, "num_experts: must be positive, got 0"),
    "activation": ({"activation": "mish"}, "activation: must be a callable or one of silu gated"),
    "ungated": ({"activation": "swiglu_oai", "gated": False}, "got 'swiglu_oai' ungated"),
    "limit": ({"activation_limit": -1.0}, "limit: must be positive, got -1.0"),
    "limit_of_gelu": ({"activation": "gelu_tanh", "activation_limit": 1.0}, "limit: only silu_mul"),
    "limit_of_callable": (
        {"activation": nn.functional.silu, "activation_limit": 1.0},
        "activation_limit: a callable does its own clamping",
    ),
    "mode": ({"activation_scale": "dynamic"}, "activation_scale: must be None or one of"),
}


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS.keys())
def test_moe_rejects_argument(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 48, "num_experts": 4}
    with pytest.raises(ValueError, match=message):
        NVFP4MoE(**(arguments | change))


def test_moe_rejects_bad_inputs() -> None:
    moe = make_moe()
    x, index, weights = make_inputs(6)
    with pytest.raises(ValueError, match=r"hidden_states: last dimension must be 64, got shape"):
        moe(x[:, :32], index, weights)
    with pytest.raises(ValueError, match=r"top_k_index: must have a row for each of the 6 tokens"):
        moe(x, index[:5], weights[:5])
    with pytest.raises(ValueError, match="there is no router"):
        moe(x)
    with pytest.raises(ValueError, match="give both or none"):
        moe(x, index)
    with pytest.raises(ValueError, match="top_k_index: must be 0 to 7"):
        moe(x, index - EXPERTS, weights)
    with pytest.raises(TypeError, match="x: must be bfloat16 or float16 or float32, got float64"):
        make_moe("per_token")(x.double(), index, weights)


def test_moe_static_without_input_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"static" needs gate_up_proj\.input_scale'):
        make_moe().activation_scale = "static"
    # Asked for at construction, for a state dict to come: NaN until it is loaded.
    empty = NVFP4MoE(HIDDEN, INTERMEDIATE, EXPERTS, activation_scale="static")
    assert empty(*make_inputs(3)).isnan().all()


def test_moe_from_float_rejects_shapes() -> None:
    gate_up, down = torch.randn(4, 64, 32), torch.randn(4, 32, 48)
    with pytest.raises(ValueError, match=r"down_proj: must be \(E, D, F\) = \(4, 32, 32\)"):
        NVFP4MoE.from_float(gate_up, down)
    with pytest.raises(ValueError, match="give both or none"):
        NVFP4MoE.from_float(gate_up, down[..., :32], down_bias=torch.zeros(4, 32))
    gate_up[2, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"w: must be finite, got Inf or NaN in experts \[2\]"):
        NVFP4MoE.from_float(gate_up, down[..., :32])


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_moe_with_router_equals_routed_by_hand(kind: str) -> None:
    router: nn.Module = nvfp4_ops.SoftmaxRouter(HIDDEN, EXPERTS, TOP_K, renormalize=False)
    if kind == "sigmoid":
        router = nvfp4_ops.SigmoidRouter(
            HIDDEN, EXPERTS, TOP_K, num_groups=4, top_groups=2, scaling_factor=2.5
        )
    moe = make_moe(router=router)
    x = make_inputs(15)[0]
    assert torch.equal(moe(x.view(3, 5, HIDDEN)).view(15, HIDDEN), make_moe()(x, *router(x)))
    assert any(name.startswith("router.") for name in moe.state_dict())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_moe_backward_raises_and_forward_does_not(mode: str | None) -> None:
    moe = make_moe(mode)
    x, index, weights = make_inputs(4, dtype=torch.float32)
    out = moe(x.requires_grad_(), index, weights)
    assert torch.equal(out.detach(), make_moe(mode)(x.detach(), index, weights))
    with pytest.raises(NotImplementedError, match=r"nvfp4_ops\.combine is for inference"):
        out.sum().backward()


def test_moe_from_float_under_meta_default_device() -> None:
    """As when a model is built on meta and its layers are filled one by one."""
    expected = make_moe()
    with torch.device("meta"):
        empty = NVFP4MoE(HIDDEN, INTERMEDIATE, EXPERTS)
        weight = nvfp4_ops.quantize_weight(torch.randn(8, 32, device="cpu"))
    assert all(buffer.is_meta for buffer in empty.buffers())
    assert weight.codes.device.type == "cpu"
    moe = empty.to_empty(device="cpu")
    moe.load_state_dict(expected.state_dict())
    inputs = make_inputs(7)
    assert torch.equal(moe(*inputs), expected(*inputs))


def test_moe_static_takes_the_largest_scale_of_all_experts() -> None:
    """Unequal input scales, as checkpoints have them: the oracle takes gate_up's maximum."""
    moe = make_moe()
    generator = torch.Generator().manual_seed(11)
    moe.first_proj.set_input_scale(torch.rand(EXPERTS, 2, generator=generator) * 1e-2 + 1e-4)
    moe.down_proj.set_input_scale(torch.rand(EXPERTS, generator=generator) * 1e-2 + 1e-4)
    moe.activation_scale = "static"
    x, index, weights = make_inputs(23)
    expected = oracle(moe, x, index, weights, {})
    torch.testing.assert_close(moe(x, index, weights).double(), expected, rtol=2**-8, atol=2**-9)


def test_moe_from_parameters_keeps_no_graph() -> None:
    """The weights of a model that is not frozen: copies, nothing that remembers them."""
    gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE, HIDDEN))
    down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE))
    biases = {
        "gate_up_bias": nn.Parameter(torch.randn(EXPERTS, 2 * INTERMEDIATE)),
        "down_bias": nn.Parameter(torch.randn(EXPERTS, HIDDEN)),
    }
    moe = NVFP4MoE.from_float(gate_up, down, **biases)
    x, index, weights = make_inputs(6, dtype=torch.float32)
    with nvfp4_ops.calibrate(moe):
        moe(x.clone().requires_grad_(), index, weights)
    moe.activation_scale = "static"
    assert not any(buffer.requires_grad for buffer in moe.buffers())
    assert torch.equal(copy.deepcopy(moe)(x, index, weights), moe(x, index, weights))


def test_moe_callable_that_moves_zero_leaves_other_ranks_rows_out() -> None:
    """cos(0) = 1 in the rows of dropped slots must not reach the batch's amax."""
    moe = make_moe("per_tensor", gated=False, activation=lambda h: 1e-3 * torch.cos(h))
    x, index, weights = make_inputs(8)
    alone = moe(x[:4], index[:4], weights[:4])
    index[4:] = EXPERTS
    x[4:] = 0
    assert torch.equal(moe(x, index, weights)[:4], alone)


def test_moe_module_activation_is_registered_once() -> None:
    moe = NVFP4MoE(32, 16, 2, gated=False, activation=nn.PReLU())
    assert [name for name in moe.state_dict() if "activation" in name] == ["activation.weight"]


def test_moe_moves_what_is_attached_to_a_projection() -> None:
    moe = make_moe()
    moe.down_proj.adapter = nn.Linear(4, 4)
    moe.to(torch.bfloat16)
    assert moe.down_proj.adapter.weight.dtype == torch.bfloat16


def test_moe_with_sigmoid_router_goes_through_meta() -> None:
    source = make_moe(router=nvfp4_ops.SigmoidRouter(HIDDEN, EXPERTS, TOP_K))
    with torch.device("meta"):
        router = nvfp4_ops.SigmoidRouter(HIDDEN, EXPERTS, TOP_K)
        empty = NVFP4MoE(HIDDEN, INTERMEDIATE, EXPERTS, router=router)
    loaded = empty.to_empty(device="cpu")
    loaded.load_state_dict(source.state_dict())
    x = make_inputs(5)[0]
    assert torch.equal(loaded(x), source(x))


def test_projection_refuses_bad_input_scales() -> None:
    projection = make_moe().down_proj
    with pytest.raises(ValueError, match=r"input_scale: must be \(8,\), got \(3,\)"):
        projection.set_input_scale(torch.ones(3))
    scale = torch.ones(EXPERTS)
    scale[2] = 0
    with pytest.raises(ValueError, match=r"must be positive and finite, got 0.0 at \[2\]"):
        projection.set_input_scale(scale)
    assert projection.input_scale is None


@pytest.mark.parametrize("name", ["down_proj.input_scale", "gate_up_proj.weight_scale_2"])
def test_moe_load_refuses_bad_scales_and_keeps_its_own(name: str) -> None:
    state = make_moe("static").state_dict()
    state[name].view(-1)[1] = torch.nan
    moe = make_moe()
    before = {k: t.clone() for k, t in moe.state_dict().items()}
    with pytest.raises(RuntimeError, match=f"{name}: must be positive and finite, got nan"):
        moe.load_state_dict(state)
    part = name.split(".")[0]
    for key, tensor in moe.state_dict().items():
        if key.startswith(part):
            assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8)), key


def test_moe_from_float_rejects_more() -> None:
    gate_up, down = torch.randn(4, 64, 32), torch.randn(4, 32, 32)
    with pytest.raises(ValueError, match="gate_up_proj: must have 2F rows, got 63"):
        NVFP4MoE.from_float(gate_up[:, :63], down)
    with pytest.raises(ValueError, match=r"gate_up_proj: must be \(E, 2F, D\)"):
        NVFP4MoE.from_float(gate_up[0], down)
    with pytest.raises(ValueError, match='"static" needs input scales; build the module'):
        NVFP4MoE.from_float(gate_up, down, activation_scale="static")
    with pytest.raises(ValueError, match=r"gate_up_bias: must be \(E, N\) .*, got shape \(64,\)"):
        NVFP4MoE.from_float(gate_up, down, gate_up_bias=torch.ones(64), down_bias=torch.ones(32))
    with pytest.raises(ValueError, match="activation: must be a callable or one of"):
        NVFP4MoE(32, 16, 2, activation=["silu"])  # type: ignore[arg-type]


def test_moe_rejects_scalar_and_empty_routing() -> None:
    moe = make_moe()
    x, index, weights = make_inputs(6)
    with pytest.raises(ValueError, match="hidden_states: last dimension must be 64"):
        moe(torch.ones(()), index, weights)
    with pytest.raises(ValueError, match=r"top_k_index: must be \(..., top_k\), top_k > 0"):
        moe(x, index[:, :0], weights[:, :0])


@pytest.mark.parametrize("mode", MODES, ids=str)
@torch.no_grad()
def test_moe_frees_the_routed_rows_before_it_makes_the_outputs(mode: str | None) -> None:
    """As the class says of its memory: they are as large as the outputs."""
    moe = make_moe(mode)
    routed: list[weakref.ref[Tensor]] = []
    alive = []
    moe.first_proj.register_forward_pre_hook(lambda _, args: routed.append(weakref.ref(args[0])))
    moe.down_proj.register_forward_pre_hook(lambda *_: alive.append(routed[-1]() is not None))
    moe(*make_inputs(5))
    assert alive == [False]
