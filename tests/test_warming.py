"""warmup: every kernel is found, once, and the module does not notice."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_moe import EXPERTS, HIDDEN, TOP_K, make_inputs, make_moe
from torch import Tensor, nn

import nvfp4_ops
from nvfp4_ops import NVFP4MoE, warming
from nvfp4_ops.kernels import compile_cache, prepack_sm90

LADDERS: dict[str, tuple[int, ...]] = {
    "none": (),
    "one": (5,),
    "first": (1,),
    "narrow": (100, 101, 102, 700),
    "powers": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "last": (999,),
}


@pytest.mark.parametrize("limits", LADDERS.values(), ids=LADDERS.keys())
def test_warmup_visits_every_rung_of_a_ladder(limits: tuple[int, ...]) -> None:
    """A rung is the token counts up to a limit; the last is without one."""
    max_tokens, visited = 1000, set()

    def requests(num_tokens: int) -> frozenset[Any]:
        assert 1 <= num_tokens <= max_tokens
        visited.add(num_tokens)
        return frozenset([sum(num_tokens > limit for limit in limits)])

    warming.visit_changes(requests, max_tokens)
    assert {sum(n > limit for limit in limits) for n in visited} == set(range(len(limits) + 1))
    assert {limit for limit in limits} <= visited
    assert {limit + 1 for limit in limits} <= visited
    assert len(visited) < 100


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 64, 100])
def test_warmup_visits_both_ends(max_tokens: int) -> None:
    visited = set()
    warming.visit_changes(lambda n: visited.add(n) or frozenset(), max_tokens)
    assert {1, max_tokens} <= visited
    assert max(visited) == max_tokens


class Ran(list[dict[str, Any]]):
    """What a forward of a layer was called with, and a kernel for each power of two of tokens."""

    def __call__(self, layer: NVFP4MoE, x: Tensor, *routing: Tensor) -> Tensor:
        self.append({"layer": layer, "x": x, "routing": routing})
        rung = x.shape[0].bit_length()
        compile_cache.get("warmup_test", (layer.hidden_size, rung), "none", lambda: None)
        return x

    @property
    def layers(self) -> set[int]:
        return {id(call["layer"]) for call in self}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ran]:
    """As on a device with kernels, but that a layer only asks for one and computes nothing."""
    ran = Ran()
    monkeypatch.setattr(warming, "_has_kernels", lambda device: True)
    monkeypatch.setattr(NVFP4MoE, "forward", lambda self, *args: ran(self, *args))
    monkeypatch.setattr(compile_cache, "_memory", {})
    monkeypatch.setattr(compile_cache, "_load_or_build", lambda *args: lambda: None)
    return ran


def test_warmup_counts_the_kernels_that_were_missing(ran: Ran) -> None:
    moe = make_moe()
    assert nvfp4_ops.warmup(moe, 100, top_k=TOP_K) == 7
    assert {call["x"].shape[0].bit_length() for call in ran} == set(range(1, 8))
    assert moe.warmup(200, top_k=TOP_K) == 1
    assert nvfp4_ops.warmup(nn.Linear(2, 2), 100) == 0


def test_warmup_passes_tokens_and_slots_of_the_asked_dtypes(ran: Ran) -> None:
    dtypes = {
        "dtype": torch.float16,
        "index_dtype": torch.int32,
        "weights_dtype": torch.bfloat16,
    }
    make_moe().warmup(3, top_k=TOP_K, **dtypes)
    for call in ran:
        x, (index, weights) = call["x"], call["routing"]
        assert (x.dtype, index.dtype, weights.dtype) == tuple(dtypes.values())
        assert x.shape[1] == HIDDEN
        assert index.shape == weights.shape == (x.shape[0], TOP_K)
        assert 0 <= int(index.min()) <= int(index.max()) < EXPERTS


def test_warmup_runs_each_kind_of_layer_once(ran: Ran) -> None:
    same, other = make_moe(), make_moe(bias=True)
    quantized = make_moe("per_token")
    model = nn.ModuleDict(
        {"a": same, "b": make_moe(), "c": other, "d": quantized, "e": make_moe("per_token")}
    )
    assert nvfp4_ops.warmup(model, 4, top_k=TOP_K) == 3
    assert ran.layers == {id(same), id(other), id(quantized)}


def test_warmup_tells_layers_apart_by_more_than_their_tensors(ran: Ran) -> None:
    """A limit is in no tensor, and prepacked weights of several sizes have one shape."""

    def prepacked(hidden: int, intermediate: int, limit: float | None = None) -> NVFP4MoE:
        moe = NVFP4MoE(hidden, intermediate, EXPERTS, activation_limit=limit)
        for projection in moe.projections().values():
            assert projection.weight_scale is not None
            projection.weight = prepack_sm90.prepack(
                projection.weight, projection.weight_scale, gated=projection.gated
            )
            projection.weight_scale = None
        return moe

    layers = [
        prepacked(64, 64),
        prepacked(64, 64, limit=7.0),
        prepacked(64, 64, limit=10.0),
        prepacked(48, 64),
        prepacked(64, 48),
    ]
    nvfp4_ops.warmup(nn.ModuleList([*layers, prepacked(64, 64)]), 2, top_k=TOP_K)
    assert ran.layers == set(map(id, layers))


def test_warmup_uses_the_router_and_what_is_passed(ran: Ran) -> None:
    moe = make_moe(router=nvfp4_ops.SoftmaxRouter(HIDDEN, EXPERTS, TOP_K))
    moe.warmup(1)
    assert [call["routing"] for call in ran] == [()]
    moe.warmup(1, top_k=3)
    assert [call["routing"][0].shape for call in ran[2:]] == [(1, 3)]


def test_warmup_leaves_the_module_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "_has_kernels", lambda device: True)
    moe = make_moe("per_token", bias=True)
    before, state = copy.deepcopy(moe.state_dict()), torch.get_rng_state()
    hooks = []
    moe.register_forward_hook(lambda *_: hooks.append(1))
    nvfp4_ops.warmup(moe, 9, top_k=TOP_K)
    assert not hooks
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in moe.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert moe(*make_inputs(2)).shape == (2, HIDDEN)


def test_warmup_does_nothing_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warming, "_run", lambda *_: pytest.fail("a layer is run"))
    assert make_moe().warmup(1000, top_k=TOP_K) == 0


def calibrating(run: Callable[[NVFP4MoE], object]) -> Callable[[NVFP4MoE], object]:
    def calibrated(moe: NVFP4MoE) -> None:
        with nvfp4_ops.calibrate(moe):
            moe(*make_inputs(4))
            run(moe)

    return calibrated


WRONG: dict[str, tuple[Callable[[NVFP4MoE], object], str]] = {
    "tokens": (lambda m: m.warmup(0, top_k=2), "max_tokens: must be positive, got 0"),
    "no_top_k": (lambda m: m.warmup(8), "top_k: must be given, module has no router"),
    "name": (
        lambda m: nvfp4_ops.warmup(nn.ModuleDict({"experts": m}), 8),
        "top_k: must be given, experts has no router",
    ),
    "top_k": (lambda m: m.warmup(8, top_k=EXPERTS + 1), "top_k: must be between 1 and 8, got 9"),
    "meta": (lambda m: m.to("meta").warmup(8, top_k=2), "module: is on the meta device"),
    "calibrating": (calibrating(lambda m: m.warmup(8, top_k=2)), "module: is being calibrated"),
}


@pytest.mark.parametrize(("run", "message"), WRONG.values(), ids=WRONG.keys())
def test_warmup_rejects(run: Callable[[NVFP4MoE], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(make_moe())


@pytest.mark.usefixtures("ran")
def test_warmup_is_refused_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="warm up before the capture"):
        make_moe().warmup(4, top_k=TOP_K)


@pytest.mark.usefixtures("ran")
def test_warmup_shows_progress_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    make_moe().warmup(64, top_k=TOP_K)
    assert capsys.readouterr() == ("", "")
    # A quick one shows nothing either.
    make_moe().warmup(64, top_k=TOP_K, progress=True)
    assert "kernels" not in capsys.readouterr().out


# --- Run on a GPU -----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "per_token", "static"], ids=str)
def test_warmup_leaves_nothing_to_load_for_a_capture(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache, "_memory", {})
    moe = make_moe(mode).cuda()
    if not warming._has_kernels(moe.down_proj.weight.device):
        pytest.skip("no kernels for this GPU")
    # ``cuda`` has loaded what it took to prepack.
    assert moe.warmup(600, top_k=TOP_K) > 0
    monkeypatch.setattr(compile_cache, "_load_or_build", lambda *_: pytest.fail("not warm"))
    for num_tokens in (1, 2, 3, 7, 16, 17, 33, 64, 100, 129, 256, 300, 511, 600):
        inputs = [x.cuda() for x in make_inputs(num_tokens)]
        expected = moe(*inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = moe(*inputs)
        graph.replay()
        assert torch.equal(out, expected)
    assert moe.warmup(600, top_k=TOP_K) == 0


@pytest.mark.gpu
def test_warmup_advice_is_what_a_cold_capture_says(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = make_moe().cuda()
    inputs = [x.cuda() for x in make_inputs(4)]
    if not warming._has_kernels(moe.down_proj.weight.device):
        pytest.skip("no kernels for this GPU")
    torch.cuda.synchronize()
    monkeypatch.setattr(compile_cache, "_memory", {})
    with (
        pytest.raises(RuntimeError, match=r"call nvfp4_ops.warmup\(...\)"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        moe(*inputs)
    torch.cuda.synchronize()
