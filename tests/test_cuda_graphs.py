"""Layers in CUDA graphs, on streams and compiled for a GPU, as decoding loops use them."""

from typing import Any

import pytest
import torch
from test_cuda import no_sync
from test_moe import EXPERTS, MODES, make_inputs, make_moe
from torch import Tensor, nn

import nvfp4_ops

pytestmark = pytest.mark.gpu


def routed_moe(mode: str | None = None, seed: int = 0) -> nvfp4_ops.NVFP4MoE:
    torch.manual_seed(seed)
    return make_moe(mode, router=nvfp4_ops.SoftmaxRouter(64, EXPERTS, 2)).cuda()


def capture(layer: nn.Module, x: Tensor, stream: Any = None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = layer(x)
    return graph, out


class Decoder(nn.Module):
    """Layers as a model has them: normalized, added to the residual."""

    def __init__(self, mode: str | None, num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(routed_moe(mode, seed) for seed in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.rms_norm(x, (64,)))
        return x


@pytest.mark.parametrize("mode", MODES, ids=str)
@torch.no_grad()
def test_graph_replays_hundreds_of_steps_with_the_bits_of_eager(mode: str | None) -> None:
    """Every step has the last one's output for its input: other values, other routings."""
    model = Decoder(mode)
    start = make_inputs(4)[0].cuda()
    static_x = start.clone()
    graph, out = capture(model, static_x)
    eager = start.clone()
    for step in range(300):
        with no_sync():
            graph.replay()
            eager = model(eager)
            # Kept bounded, and different in every step.
            eager = nn.functional.rms_norm(eager, (64,)).roll(step, dims=-1)
            static_x.copy_(nn.functional.rms_norm(out, (64,)).roll(step, dims=-1))
        assert torch.equal(static_x, eager), f"step {step}"


@pytest.mark.parametrize("mode", MODES, ids=str)
@torch.no_grad()
def test_graphs_of_several_sizes_share_a_layer(mode: str | None) -> None:
    layer = routed_moe(mode)
    sizes = (1, 5, 64, 300)
    inputs = {size: make_inputs(size, seed=size)[0].cuda() for size in sizes}
    graphs = {size: capture(layer, inputs[size]) for size in sizes}
    for seed in range(3):
        for size in (*sizes, *reversed(sizes)):
            inputs[size].copy_(make_inputs(size, seed=100 + seed)[0])
            graph, out = graphs[size]
            graph.replay()
            assert torch.equal(out, layer(inputs[size])), (size, seed)


@torch.no_grad()
def test_graph_is_captured_on_a_side_stream() -> None:
    layer, x = routed_moe(), make_inputs(9)[0].cuda()
    graph, out = capture(layer, x, torch.cuda.Stream())
    x.copy_(make_inputs(9, seed=7)[0])
    graph.replay()
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("mode", MODES, ids=str)
@torch.no_grad()
def test_layers_on_two_streams_do_not_disturb_each_other(mode: str | None) -> None:
    layers = [routed_moe(mode, seed) for seed in (1, 2)]
    inputs = [make_inputs(200, seed=seed)[0].cuda() for seed in (3, 4)]
    expected = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    outs: list[list[Tensor]] = [[], []]
    torch.cuda.synchronize()
    for _ in range(50):
        for i in range(2):
            with torch.cuda.stream(streams[i]):
                outs[i].append(layers[i](inputs[i]))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(torch.equal(out, expected[i]) for out in outs[i])


@pytest.mark.parametrize("compile_mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
@torch.no_grad()
def test_layer_compiles_in_every_mode_without_recompiling(compile_mode: str) -> None:
    torch._dynamo.reset()
    layer = routed_moe("per_token")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, mode=compile_mode)
    with torch._dynamo.config.patch(error_on_recompile=False):
        for tokens in (33, 40):
            compiled(make_inputs(tokens)[0].cuda())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (17, 200, 33):
            x = make_inputs(tokens, seed=tokens)[0].cuda()
            assert torch.equal(compiled(x).clone(), layer(x)), tokens
