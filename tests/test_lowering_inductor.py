"""The pass in torch.compile: results, dynamic shapes, the cache, and being put in and taken out."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_bytes_equal
from test_lowering_patterns import COMMON, make_inputs, make_moe, public_ops
from torch import fx
from torch._dynamo.utils import counters
from torch._inductor import config, custom_graph_pass

import nvfp4_ops
from nvfp4_ops.lowering import inductor

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import public_ops_moe

REPO = Path(__file__).resolve().parent.parent
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FIRED = {"activation": 1, "values": 2, "gather": 1, "combine": 1}


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    with config.patch(force_disable_caches=True), torch.no_grad():
        yield
    inductor.disable()
    assert config.post_grad_custom_pre_pass is None
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mode", [None, "static"], ids=str)
def test_inductor_compiles_public_ops_to_the_fused_layer(mode: str | None, device: str) -> None:
    """The bits of NVFP4MoE at every number of tokens, and nothing is compiled twice."""
    moe = make_moe(mode).to(device)
    model = public_ops(moe)
    with inductor.enabled():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        inputs = [tensor.to(device) for tensor in make_inputs(13)]
        assert_bytes_equal(compiled(*inputs), moe(*inputs))
    assert inductor.counts() == COMMON | ({"values": 2} if mode else {})
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (40, 2, 129):
            inputs = [tensor.to(device) for tensor in make_inputs(tokens, dropped=True)]
            assert_bytes_equal(compiled(*inputs), moe(*inputs))


def test_example_compiles_public_ops(capsys: pytest.CaptureFixture[str]) -> None:
    public_ops_moe.main(16)
    out = capsys.readouterr().out
    assert f"rewrites: {FIRED}" in out
    assert float(out.split()[-1]) < 0.06


# In and out.


class UserPass(custom_graph_pass.CustomGraphPass):
    """Counts its calls, and what it sees of the rewrites."""

    def __init__(self, known: str | None = "user") -> None:
        self.calls, self.known, self.ops = 0, known, ""

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1
        self.ops = " ".join(str(node.target) for node in graph.nodes)

    def uuid(self) -> str | None:
        return self.known


def test_inductor_pass_keeps_the_users_pass() -> None:
    user = UserPass()
    with config.patch(post_grad_custom_pre_pass=user):
        with inductor.enabled():
            assert config.post_grad_custom_pre_pass is not user
            assert "user" in config.post_grad_custom_pre_pass.uuid()
            torch.compile(public_ops(make_moe("static")), fullgraph=True)(*make_inputs(13))
        assert config.post_grad_custom_pre_pass is user
    assert inductor.counts() == FIRED
    assert user.calls == 1
    assert "quantize_nvfp4" in user.ops


@pytest.mark.skipif(
    not hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass"),
    reason="this torch takes a single pass",
)
def test_inductor_pass_keeps_the_users_passes() -> None:
    told = []

    class Aware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph: fx.Graph, is_inference: bool) -> None:
            told.append(is_inference)

        def uuid(self) -> str:
            return "aware"

    user = [UserPass(), Aware()]
    with config.patch(post_grad_custom_pre_pass=user):
        with inductor.enabled():
            torch.compile(public_ops(make_moe()), fullgraph=True)(*make_inputs(13))
        assert config.post_grad_custom_pre_pass is user
    assert user[0].calls == 1
    assert told == [True]


@pytest.mark.parametrize("user", [UserPass(None), lambda graph: None], ids=["unknown", "function"])
def test_inductor_pass_is_not_cached_with_one_that_can_not_be(user: Any) -> None:
    with config.patch(post_grad_custom_pre_pass=user), inductor.enabled():
        assert config.post_grad_custom_pre_pass.uuid() is None


def test_inductor_pass_known_by_options_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for options in (
        {},
        {"decompose": not inductor.DECOMPOSE_BY_DEFAULT},
        {"patterns": False, "decompose": True},
    ):
        with inductor.enabled(**options):
            seen.add(config.post_grad_custom_pre_pass.uuid())
    monkeypatch.setattr(inductor, "source_hash", lambda: "of other sources")
    with inductor.enabled():
        seen.add(config.post_grad_custom_pre_pass.uuid())
    assert len(seen) == 4


def test_inductor_hashes_every_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops").mkdir()
    source = tmp_path / "ops" / "quantize.py"
    source.write_text("one")
    monkeypatch.setattr(inductor, "PACKAGE", tmp_path)
    hashes = {inductor.source_hash.__wrapped__()}
    source.write_text("two")
    hashes.add(inductor.source_hash.__wrapped__())
    source.rename(tmp_path / "quantize.py")
    hashes.add(inductor.source_hash.__wrapped__())
    assert len(hashes) == 3


def test_inductor_enabled_contexts_nest() -> None:
    assert inductor.current() is None
    with inductor.enabled():
        outer = inductor.current()
        with inductor.enabled(patterns=False, decompose=True):
            assert inductor.current() == inductor.Options(patterns=False, decompose=True)
        assert inductor.current() == outer
    assert inductor.current() is None
    inductor.disable()


def test_inductor_contexts_of_threads_do_not_disturb_each_other() -> None:
    """Whether settings are a thread's own (torch 2.13) or the process's, all is as before."""
    seen = []

    def in_another_thread() -> None:
        with inductor.enabled(patterns=False, decompose=True):
            seen.append(config.post_grad_custom_pre_pass.options)

    with inductor.enabled():
        outer = inductor.current()
        thread = threading.Thread(target=in_another_thread)
        thread.start()
        thread.join()
        assert seen == [inductor.Options(patterns=False, decompose=True)]
        assert inductor.current() == outer
        assert config.post_grad_custom_pre_pass.options == outer
    assert config.post_grad_custom_pre_pass is None


def test_inductor_disabled_pass_does_nothing_where_another_holds_it() -> None:
    inductor.enable()
    ours = config.post_grad_custom_pre_pass
    before = ours.uuid()

    class Wrapper(UserPass):
        def __call__(self, graph: fx.Graph) -> None:
            ours(graph)

    def swizzled(x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, sf = nvfp4_ops.quantize_nvfp4(x, scale)
        return codes, nvfp4_ops.swizzle_sf(sf)

    inputs = (torch.randn(5, 32), torch.tensor(0.01))
    with config.patch(post_grad_custom_pre_pass=Wrapper()):
        torch.compile(swizzled)(*inputs)
        assert inductor.counts() == {"swizzled": 1}
        torch._dynamo.reset()
        inductor.disable()
        torch.compile(swizzled)(*inputs)
    assert inductor.counts() == {"swizzled": 1}
    assert ours.uuid() != before
    config.post_grad_custom_pre_pass = None


def test_inductor_rejects_enabling_nothing() -> None:
    with pytest.raises(ValueError, match="patterns, decompose: at least one must be True"):
        inductor.enable(patterns=False, decompose=False)


# Processes.

IMPORT = """
import sys, torch
import nvfp4_ops.lowering.inductor
print("torch._inductor.compile_fx" in sys.modules)
from torch._inductor import config
print(config.post_grad_custom_pre_pass)
"""


def test_inductor_import_installs_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["False", "None"]


PROCESS = """
import json, sys
import torch
from torch._dynamo.utils import counters
import nvfp4_ops
from nvfp4_ops.lowering import inductor

how = sys.argv[1]
if how == "edited":
    inductor.source_hash = lambda: "of other sources"
if how != "disabled":
    inductor.enable()

def function(x, scale, offs, codes, sf, alpha):
    a, sf_a = nvfp4_ops.quantize_nvfp4(x, scale, offs)
    return nvfp4_ops.grouped_scaled_mm(a, codes, sf_a, sf, alpha, offs)

torch.manual_seed(0)
weight = nvfp4_ops.quantize_weight(torch.randn(2, 16, 32))
offs = torch.tensor([3, 5], dtype=torch.int32)
inputs = (torch.randn(6, 32), torch.tensor(0.01), offs, *weight)
with torch.no_grad():
    out = torch.compile(function, fullgraph=True)(*inputs)
print(json.dumps({
    "same": bool(torch.equal(out, function(*inputs))),
    "values": counters["nvfp4_ops"]["values"],
    "found": counters["inductor"]["fxgraph_cache_hit"] > 0
    or counters["aot_autograd"]["autograd_cache_hit"] > 0,
    "bypassed": counters["inductor"]["fxgraph_cache_bypass"] > 0,
}))
"""


def run_processes(directory: Path, *how: str) -> list[dict[str, Any]]:
    """Processes that run at the same time and share a cache directory."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(directory)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, each],
            cwd=REPO,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for each in how
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in processes]


def test_inductor_processes_share_the_cache_safely(tmp_path: Path) -> None:
    found = {"same": True, "values": 0, "found": True, "bypassed": False}
    made = found | {"found": False}
    # Whoever has the pass makes a graph of its own; who has not does not find it.
    assert run_processes(tmp_path, "enabled", "disabled") == [made | {"values": 1}, made]
    assert run_processes(tmp_path, "enabled", "edited") == [found, made | {"values": 1}]
