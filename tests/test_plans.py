"""Plans of eager calls: found for calls that are alike, and for no others."""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache
from typing import Any

import pretend_gpu
import pytest
import torch
from pretend_gpu import Launches
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import nvfp4_ops
from bench import host_cost
from nvfp4_ops import NVFP4MoE, plans, registry
from nvfp4_ops.kernels import compile_cache, prepack_sm90
from nvfp4_ops.plans import Plans, Recording

X, Y = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int32)


@pytest.fixture(autouse=True)
def _no_plans_of_others() -> Iterator[None]:
    plans.clear()
    yield
    plans.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    yield pretend_gpu.pretend(monkeypatch)
    plans.clear()


def run(*args: Any) -> str:
    return "planned"


def planned(*args: Any, num_tensors: int = 3) -> Plans:
    made = Plans(num_tensors, lambda *args: run)
    made.make(args)
    return made


# What a plan is found for.


def test_plans_find_calls_that_differ_in_memory_alone() -> None:
    made = planned(X, Y, None, "silu", 2)
    assert made.find((torch.ones(4, 32), torch.ones(4, dtype=torch.int32), None, "silu", 2)) is run
    with torch.no_grad():
        assert made.find((X, Y, None, "silu", 2)) is run


class Subclass(torch.Tensor):
    pass


OTHERS = {
    "shape": (torch.zeros(5, 32), Y, None, "silu", 2),
    "second shape": (X, torch.zeros(5, dtype=torch.int32), None, "silu", 2),
    "dtype": (X.double(), Y, None, "silu", 2),
    "second dtype": (X, Y.long(), None, "silu", 2),
    "strides": (torch.zeros(32, 4).t(), Y, None, "silu", 2),
    "address": (torch.zeros(129)[1:].view(4, 32), Y, None, "silu", 2),
    "which is None": (X, None, Y, "silu", 2),
    "how many are None": (X, Y, Y.clone(), "silu", 2),
    "number": (X, Y, None, "silu", 3),
    "missing": (X, Y, None, "silu"),
    "gradient": (X.clone().requires_grad_(), Y, None, "silu", 2),
    "subclass": (X.as_subclass(Subclass), Y, None, "silu", 2),
    "parameter": (torch.nn.Parameter(X, requires_grad=False), Y, None, "silu", 2),
    "meta": (X.to("meta"), Y, None, "silu", 2),
    "negated": (torch.imag(torch.zeros(4, 32, dtype=torch.cfloat).conj()), Y, None, "silu", 2),
    "no tensor": ([1.0], Y, None, "silu", 2),
    "no second tensor": (X, 3, None, "silu", 2),
    "no hash": (X, Y, None, "silu", [2]),
}


@pytest.mark.parametrize("args", OTHERS.values(), ids=OTHERS.keys())
def test_plans_do_not_find_other_calls(args: tuple[Any, ...]) -> None:
    assert planned(X, Y, None, "silu", 2).find(args) is None


def test_plans_do_not_find_a_fake_tensor() -> None:
    made = planned(X, Y, None)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(X)
    assert made.find((fake, Y, None)) is None


def test_plans_are_of_the_modes_they_were_made_in() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            return func(*args, **(kwargs or {}))

    made = planned(X, Y, None)
    with Mode():
        assert made.find((X, Y, None)) is None
    with torch.inference_mode():
        assert made.find((X, Y, None)) is None
        made.make((X, Y, None))
        assert made.find((X, Y, None)) is run
    seen = []
    torch.func.vmap(lambda x: seen.append(made.find((x, Y, None))) or x)(torch.zeros(2, 4, 32))
    assert seen == [None]
    assert made.find((X, Y, None)) is run


def test_plans_of_a_tensor_given_twice_are_not_kept() -> None:
    made = Plans(2, lambda *args: run)
    assert made.make((Y, Y)) is run
    assert len(made) == 0


def test_plans_of_tensors_that_require_gradients_are_not_kept() -> None:
    """No guard tells a call without gradients from one with."""
    x = X.clone().requires_grad_()
    made = Plans(2, lambda *args: run)
    with torch.no_grad():
        assert made.make((x, Y)) is run
    assert made.find((x, Y)) is None
    assert len(made) == 0


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MAX_KEYS", 3)
    made = Plans(2, lambda *args: run)
    for rows in range(1, 20):
        made.make((torch.zeros(rows, 16), Y))
        assert 1 <= len(made) <= 3
    for rows in range(1, 20):
        made.make((torch.zeros(1, 16), torch.zeros(rows)))
        assert len(made) <= plans.MAX_PLANS_PER_KEY + 3
    assert made.find((torch.zeros(1, 16), torch.zeros(19))) is run


def test_plans_without_a_run_are_not_kept() -> None:
    made = Plans(1, lambda *args: None)
    assert made.make((X,)) is None
    assert len(made) == 0


def test_plans_suspended_are_neither_found_nor_made() -> None:
    made = planned(X, Y, None)
    with plans.suspended():
        assert made.find((X, Y, None)) is None
        assert made.make((X.double(), Y, None)) is run
    assert made.find((X, Y, None)) is run
    assert len(made) == 1


# The ops, on a GPU that is none.

PLANNED = (
    "global_scale per_token",
    "quantize_nvfp4",
    "round_nvfp4",
    "round_per_token_nvfp4",
    "dequantize_nvfp4",
    "swizzle_sf",
    "grouped_scaled_mm bf16",
    "grouped_scaled_mm nvfp4",
    "router_logits",
    "softmax_top_k",
    "sigmoid_top_k",
    "sort_by_expert",
    "permute",
    "combine",
)


make_calls = cache(host_cost.make_calls)


def shapes(result: Any) -> list[Any]:
    tensors = result if isinstance(result, tuple) else (result,)
    return [pretend_gpu.describe(tensor) for tensor in tensors]


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_planned_op_launches_what_the_first_call_did(
    name: str, mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = make_calls("cpu")[name]
    expected = shapes(call())
    gpu = pretend_gpu.pretend(monkeypatch)
    with mode():
        first = call(), gpu.take()
        num_requests = gpu.num_requests
        again = call(), gpu.take()
    assert shapes(first[0]) == shapes(again[0]) == expected
    assert first[1] == again[1]
    assert first[1]
    assert gpu.num_requests == num_requests > 0


def test_planned_op_still_checks_what_is_new(gpu: Launches) -> None:
    x, scale = torch.zeros(4, 32).bfloat16(), torch.ones(4)
    nvfp4_ops.quantize_nvfp4(x, scale)
    nvfp4_ops.quantize_nvfp4(x, scale)
    with pytest.raises(TypeError, match="global_scale: must be float32, got float64"):
        nvfp4_ops.quantize_nvfp4(x, scale.double())
    with pytest.raises(TypeError, match=r"x: must be .*, got float64"):
        nvfp4_ops.quantize_nvfp4(x.double(), scale)
    with pytest.raises(ValueError, match="global_scale: must be"):
        nvfp4_ops.quantize_nvfp4(x, torch.ones(5))
    rows = torch.zeros(8, dtype=torch.int32)
    nvfp4_ops.permute(x, rows)
    with pytest.raises(NotImplementedError, match="is for inference and has no backward"):
        nvfp4_ops.permute(x.requires_grad_(), rows).sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_planned_call_without_gradients_leaves_the_next_its_backward(
    mode: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, (hidden, index, weights) = make_layer(None), routing()
    pretend_gpu.pretend(monkeypatch)
    hidden.requires_grad_()
    calls = (
        lambda: nvfp4_ops.permute(hidden, torch.zeros(8, dtype=torch.int32)),
        lambda: moe(hidden, index, weights),
    )
    for call in calls:
        for _ in range(2):
            with mode():
                call()
            with pytest.raises(NotImplementedError, match="is for inference and has no backward"):
                call().sum().backward()


def test_call_outlives_the_recording_of_another_thread(
    gpu: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may end between any two steps of this thread: here, as soon as it was looked at."""

    class Ending:
        def __getattr__(self, name: str) -> Any:
            return getattr(plans, name)

        @property
        def recording(self) -> Recording | None:
            return found.pop() if found else None

    def others() -> list[Recording]:
        with ThreadPoolExecutor(1) as pool:
            return [pool.submit(Recording).result()]

    found = others()
    monkeypatch.setattr(registry, "plans_module", Ending())
    rows = nvfp4_ops.permute(torch.zeros(4, 32), torch.zeros(8, dtype=torch.int32))
    assert rows.shape == (8, 32)
    assert not found


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_planned_op_leaves_nested_tensors_to_the_dispatcher() -> None:
    x = torch.nested.nested_tensor([torch.zeros(2, 32), torch.zeros(1, 32)])
    with pytest.raises(NotImplementedError, match=r"nvfp4_ops::permute.*Nested"):
        nvfp4_ops.permute(x, torch.zeros(8, dtype=torch.int32))


def test_planned_op_copies_rows_the_kernel_can_not_read(gpu: Launches) -> None:
    whole = torch.zeros(4 * 32 + 1).bfloat16()
    unaligned, strided = whole[1:].view(4, 32), torch.zeros(32, 4).bfloat16().t()
    scale = torch.ones(())
    nvfp4_ops.round_nvfp4(torch.zeros(4, 32).bfloat16(), scale)
    expected = gpu.take()
    for x in (unaligned, unaligned, strided, strided):
        nvfp4_ops.round_nvfp4(x, scale)
        assert gpu.take() == expected


def spread(x: Tensor) -> Tensor:
    """The same values with gaps between the elements."""
    spread = torch.stack([x.view(torch.uint8), x.view(torch.uint8)], dim=-1)
    return spread[..., 0] if x.element_size() == 1 else torch.stack([x, x], dim=-1)[..., 0]


RAGGED_OPS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "quantize": lambda x, offs: nvfp4_ops.quantize_nvfp4(x, torch.ones(()), offs),
    "per_token": lambda x, offs: nvfp4_ops.quantize_per_token_nvfp4(x, offs),
    "round": lambda x, offs: nvfp4_ops.round_nvfp4(x, torch.ones(()), offs),
    "round_per_token": lambda x, offs: nvfp4_ops.round_per_token_nvfp4(x, offs),
    "dequantize": lambda x, offs: nvfp4_ops.dequantize_nvfp4(
        x.view(torch.uint8), torch.zeros(4, 8).to(torch.float8_e4m3fn), torch.ones(()), offs
    ),
    "swizzle": lambda x, offs: nvfp4_ops.swizzle_sf(
        torch.zeros(4, 8).to(torch.float8_e4m3fn), offs
    ),
    "unswizzle": lambda x, offs: nvfp4_ops.unswizzle_sf(
        torch.zeros(3, 2, 32, 16).to(torch.float8_e4m3fn), (4, 8), offs
    ),
}


@pytest.mark.parametrize("op", RAGGED_OPS.values(), ids=RAGGED_OPS.keys())
def test_planned_op_gives_kernels_contiguous_offs(op: Callable[..., Any], gpu: Launches) -> None:
    """They refuse others."""
    x, offs = torch.zeros(4, 32).bfloat16(), torch.tensor([1, 2, 4], dtype=torch.int32)
    op(x, offs)
    expected = gpu.take()
    assert expected
    for _ in range(2):
        op(x, spread(offs))
        assert gpu.take() == expected


@pytest.mark.parametrize("which", ["weight", "offs", "row_scale"])
def test_planned_grouped_mm_gives_kernels_contiguous_operands(
    which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = make_layer(None).down_proj.weight
    gpu = pretend_gpu.pretend(monkeypatch)
    operands = {
        "weight": weight,
        "offs": torch.full((8,), 4, dtype=torch.int32),
        "row_scale": torch.ones(4, 1),
    }

    def launched(early_weights: bool, **operands: Tensor) -> list[Any]:
        nvfp4_ops.grouped_scaled_mm(
            torch.zeros(4, 64).bfloat16(),
            operands["weight"],
            None,
            None,
            torch.ones(8),
            operands["offs"],
            row_scale=operands["row_scale"],
            num_columns=64,
            early_weights=early_weights,
        )
        return gpu.take()

    # A copy is not complete when the kernel ahead of this one starts.
    is_early = which == "row_scale"
    expected = launched(is_early, **operands)
    assert launched(True, **{**operands, which: spread(operands[which])}) == expected
    assert launched(True, **operands) == launched(True, **operands)


def test_planned_op_is_dispatched_for_who_watches(gpu: Launches) -> None:
    x, token_of_row = torch.zeros(4, 32), torch.zeros(8, dtype=torch.int32)
    nvfp4_ops.permute(x, token_of_row)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        nvfp4_ops.permute(x, token_of_row)
    assert "nvfp4_ops.permute.default" in seen
    with torch.profiler.profile() as profile:
        nvfp4_ops.permute(x, token_of_row)
    assert "nvfp4_ops::permute" in {event.name for event in profile.events()}


def test_compile_cache_sees_every_request_while_it_watches(
    gpu: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, token_of_row = torch.zeros(4, 32), torch.zeros(8, dtype=torch.int32)
    for _ in range(2):
        nvfp4_ops.permute(x, token_of_row)
    assert gpu.num_requests == 1
    with compile_cache.watch():
        nvfp4_ops.permute(x, token_of_row)
    assert gpu.num_requests == 2
    monkeypatch.setattr(compile_cache, "_memory", {})
    compile_cache.clear_memory()
    nvfp4_ops.permute(x, token_of_row)
    assert gpu.num_requests == 3


# Layers.

MODES = (None, "per_token", "per_tensor", "static")


def make_layer(mode: Any, bias: bool = False, prepacked: bool = True) -> NVFP4MoE:
    gate_up, down = torch.randn(8, 128, 64), torch.randn(8, 64, 64)
    biases = {"gate_up_bias": torch.randn(8, 128), "down_bias": torch.randn(8, 64)} if bias else {}
    moe = NVFP4MoE.from_float(gate_up, down, **biases)
    for projection in moe.projections().values():
        projection.set_input_scale(torch.ones_like(projection.weight_scale_2))
        if prepacked:
            assert projection.weight_scale is not None
            projection.weight = prepack_sm90.prepack(
                projection.weight, projection.weight_scale, gated=projection.gated
            )
            projection.weight_scale = None
    moe.activation_scale = mode
    return moe


def routing(tokens: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    index = torch.arange(tokens * 2).view(tokens, 2) % 8
    return torch.randn(tokens, 64).bfloat16(), index, torch.rand(tokens, 2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_planned_layer_launches_what_the_first_call_did(
    mode: Any, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, inputs = make_layer(mode, bias), routing()
    gpu = pretend_gpu.pretend(monkeypatch)
    first = moe(*inputs), gpu.take()
    num_requests = gpu.num_requests
    monkeypatch.setattr(moe, "_flow", None)  # not called any more
    again = moe(*routing()), gpu.take()
    assert shapes(first[0]) == shapes(again[0])
    assert len(first[1]) >= 5
    assert first[1] == again[1]
    assert gpu.num_requests == num_requests
    # Any leading shape, and another layer of the same kind.
    x, index, weights = routing()
    assert moe(x.view(2, 2, 64), index.view(2, 2, 2), weights.view(2, 2, 2)).shape == (2, 2, 64)
    assert gpu.take() == first[1]


def test_planned_layer_is_of_its_tensors_and_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, inputs = make_layer(None), routing()
    gpu = pretend_gpu.pretend(monkeypatch)
    moe(*inputs)
    weight_only = gpu.take()
    moe.activation_scale = "per_token"
    moe(*inputs)
    per_token = gpu.take()
    assert per_token != weight_only
    moe(*routing(5))
    assert gpu.take() not in (weight_only, per_token)
    moe.activation_scale = None
    moe(*inputs)
    assert gpu.take() == weight_only
    with pytest.raises(ValueError, match="top_k_index: must have a row for each of the 5 tokens"):
        moe(routing(5)[0], *inputs[1:])
    with pytest.raises(TypeError, match="top_k_weights: must be"):
        moe(*inputs[:2], inputs[2].double())


def test_planned_layer_computes_with_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are shared by layers: what they hold must be no tensor."""
    seen: list[int] = []

    def get(op: str, *_: object) -> Callable[..., None]:
        return lambda *args: seen.append(args[0].data_ptr()) if op == "grouped_mm" else None

    layers, inputs = [make_layer(None) for _ in range(2)], routing()
    pretend_gpu.pretend(monkeypatch)
    monkeypatch.setattr(compile_cache, "get", get)
    for _ in range(2):
        for moe in layers:
            moe(*inputs)
            weights = [projection.weight for projection in moe.projections().values()]
            assert seen == [weight.data_ptr() for weight in weights]
            seen.clear()


def test_plans_keep_no_tensor_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, inputs = make_layer("per_token", bias=True), routing()
    pretend_gpu.pretend(monkeypatch)
    alive = [weakref.ref(tensor) for tensor in (*inputs, *moe.buffers(), moe(*inputs))]
    assert len(alive) > 8
    moe(*inputs)
    del moe, inputs
    gc.collect()
    assert not [ref for ref in alive if ref() is not None]


def test_layer_runs_the_hooks_of_its_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, inputs, calls = make_layer(None), routing(), []
    pretend_gpu.pretend(monkeypatch)
    moe(*inputs)
    handle = moe.down_proj.register_forward_hook(lambda *_: calls.append(1))
    moe(*inputs)
    moe(*inputs)
    handle.remove()
    moe(*inputs)
    assert len(calls) == 2


def test_layer_runs_a_forward_put_on_its_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, inputs, calls = make_layer(None), routing(), []
    pretend_gpu.pretend(monkeypatch)
    moe(*inputs)
    forward = moe.down_proj.forward
    monkeypatch.setattr(
        moe.down_proj, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw)
    )
    moe(*inputs)
    moe(*inputs)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_planned_layer_takes_parameters_for_buffers(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    moe, other, inputs = make_layer(None, bias=True), make_layer(None), routing()
    gpu = pretend_gpu.pretend(monkeypatch)
    other(*inputs)  # whose plan is without bias
    gpu.take()
    moe(*inputs)
    expected = gpu.take()
    buffer = getattr(moe.down_proj, name)
    setattr(moe.down_proj, name, torch.nn.Parameter(buffer, requires_grad=False))
    for _ in range(2):
        moe(*inputs)
        assert gpu.take() == expected


def test_layer_with_code_of_the_users_is_not_planned() -> None:
    moe = make_layer(None)
    assert moe._may_plan()
    with nvfp4_ops.calibrate(moe):
        assert not moe._may_plan()
        moe(*routing(8))
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not moe._may_plan()
    handle.remove()
    with torch.device("cpu"):  # a function mode
        assert not moe._may_plan()
    moe.activation = torch.relu
    assert not moe._may_plan()


# On a GPU that is one.


def assert_same(actual: Any, expected: Any) -> None:
    actual, expected = (t if isinstance(t, tuple) else (t,) for t in (actual, expected))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLANNED)
def test_planned_op_computes_what_the_first_call_did(name: str) -> None:
    call = make_calls("cuda")[name]
    with plans.suspended():
        expected = call()
    for _ in range(3):
        assert_same(call(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_planned_layer_computes_what_the_first_call_did(mode: Any) -> None:
    moe = make_layer(mode, bias=True, prepacked=False).cuda()
    for tokens in (1, 4, 300):
        moe(*(tensor.cuda() for tensor in routing(tokens)))
        inputs = [tensor.cuda() for tensor in routing(tokens)]
        with plans.suspended():
            expected = moe(*inputs)
        assert_same(moe(*inputs), expected)
        with torch.inference_mode():
            assert_same(moe(*inputs), expected)
            assert_same(moe(*inputs), expected)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            result = moe(*inputs)
        stream.synchronize()
        assert_same(result, expected)


# Recordings.


def test_recording_replays_steps_with_other_inputs() -> None:
    with plans.record() as recording:
        a = plans.step(torch.mul, X, 2)
        total = plans.step(torch.add, a, X)
    assert recording is not None
    replay = recording.plan((X, "kind"), total)
    assert replay is not None
    other = torch.rand(4, 32)
    assert torch.equal(replay(other, "kind"), other * 2 + other)


def test_recording_replays_a_step_of_one_argument() -> None:
    with plans.record() as recording:
        negated = plans.step(torch.neg, X)
    assert recording is not None
    replay = recording.plan((Y, X), negated)
    assert replay is not None
    other = torch.rand(4, 32)
    assert torch.equal(replay(Y, other), -other)


def test_recording_of_unknown_tensors_gives_no_plan() -> None:
    with plans.record() as recording:
        total = plans.step(torch.add, X, torch.ones(4, 32))
    assert recording is not None
    assert recording.plan((X,), total) is None
    assert recording.plan((X,), X) is None


def test_recording_of_a_step_without_plan_gives_none() -> None:
    recording = Recording()
    total = recording.run(torch.add, (X, X), is_plan=False)
    assert recording.plan((X,), total) is None


def test_recording_leaves_out_parts_of_steps_and_other_threads() -> None:
    def nested(x: Tensor) -> Tensor:
        return plans.step(torch.neg, x)

    with plans.record() as recording:
        total = plans.step(nested, X)
        thread = threading.Thread(target=plans.step, args=(torch.neg, Y))
        thread.start()
        thread.join()
        with plans.record() as inner:
            assert inner is None
    assert recording is not None
    assert len(recording._steps) == 1
    assert recording.plan((X,), total) is not None
