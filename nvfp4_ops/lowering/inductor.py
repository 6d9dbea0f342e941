"""torch.compile with Inductor: a graph pass that fuses what models write with the public ops.

    from nvfp4_ops.lowering import inductor

    with inductor.enabled():
        compiled = torch.compile(model)
        compiled(x)                       # compiled here, within the context

Nothing is installed at import. A function keeps the code it was compiled to, which the modules of a
class share: enable before the first call, and ``torch.compiler.reset()`` to compile anew.
From torch 2.13 on Inductor's settings are a thread's own: enable in the thread that compiles.
``counts`` tells how often each rewrite fired; a graph that Inductor finds in its cache was
rewritten when it was put there, and is not counted again.

Inductor's cache of compiled graphs knows the pass by a hash of this package's sources and of the
options, so a graph is found again only by the very code that made it.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import fx

PACKAGE = Path(__file__).resolve().parent.parent
COUNTERS = "nvfp4_ops"

DECOMPOSE_BY_DEFAULT = False
"""On an H200 a kernel and Inductor's own beside it take 0.64 to 1.00 of the time of the fused one
(``python -m bench.lowering``)."""


@dataclass(frozen=True)
class Options:
    """What the pass does: rewrites of ``patterns``, decompositions of ``decompose``."""

    patterns: bool
    decompose: bool


_last: ContextVar[Any] = ContextVar("nvfp4_ops.lowering.inductor", default=None)
"""The pass that this thread enabled last: another that was put in its place may still call it."""


def _installed() -> Any:
    """The pass that is in force, or None.

    Inductor's settings tell, which belong to the process or, in newer versions, to the thread.
    """
    from torch._inductor import config

    for each in (config.post_grad_custom_pre_pass, _last.get()):
        if isinstance(getattr(each, "options", None), Options):
            return each
    return None


def enable(*, patterns: bool = True, decompose: bool = DECOMPOSE_BY_DEFAULT) -> None:
    """Install the pass, for what is compiled from now on; replaces the options of an earlier call.

    A pass that the user has in ``torch._inductor.config.post_grad_custom_pre_pass`` stays and runs
    first.

    Args:
        patterns: rewrite chains of public ops to the fused ops (see ``lowering.patterns``). Their
            results round less often than the chain's: compare with a tolerance.
        decompose: turn ops with elementwise neighbours into aten, where the result has the same
            bytes, so that Inductor fuses them (see ``lowering.decompose``).

    Raises:
        ValueError: there is nothing to enable.
    """
    if not patterns and not decompose:
        raise ValueError("patterns, decompose: at least one must be True; disable() removes both")
    disable()
    from torch._inductor import config

    previous = config.post_grad_custom_pre_pass
    installed = _make_pass(Options(patterns, decompose), previous)
    _last.set(installed)
    config.post_grad_custom_pre_pass = installed


def disable() -> None:
    """Remove the pass and leave what it found; nothing if it is not installed.

    Where another pass has been put in its place that still calls this one, this one does nothing
    from now on.
    """
    from torch._inductor import config

    installed: Any = _installed()
    if installed is None:
        return
    installed.options = None
    previous = installed.previous
    if config.post_grad_custom_pre_pass is installed:
        config.post_grad_custom_pre_pass = previous


def current() -> Options | None:
    """The options in force, or None."""
    installed = _installed()
    options: Options | None = None if installed is None else installed.options
    return options


def counts() -> dict[str, int]:
    """How often each rewrite has fired in this process, or since Dynamo's counters were cleared."""
    from torch._dynamo.utils import counters

    return {name: count for name, count in counters[COUNTERS].items() if count}


@contextlib.contextmanager
def enabled(*, patterns: bool = True, decompose: bool = DECOMPOSE_BY_DEFAULT) -> Iterator[None]:
    """``enable`` within a context; afterwards all is as before."""
    before = current()
    enable(patterns=patterns, decompose=decompose)
    try:
        yield
    finally:
        disable()
        if before is not None:
            enable(patterns=before.patterns, decompose=before.decompose)


@functools.cache
def source_hash() -> str:
    """Hash of this package's sources: fake kernels and rewrites are part of a compiled graph."""
    total = sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        total.update(f"{path.relative_to(PACKAGE)}\n".encode())
        total.update(sha256(path.read_bytes()).digest())
    return total.hexdigest()


def rewrite(graph: fx.Graph, options: Options) -> dict[str, int]:
    """Rewrite a graph after autograd in place; returns how often each rewrite fired."""
    from nvfp4_ops.lowering.decompose import decompose
    from nvfp4_ops.lowering.patterns import REWRITES

    fired = {}
    if options.patterns:
        for name, fuse in REWRITES.items():
            fired[name] = fuse(graph)
    if options.decompose:
        fired["decomposed"] = decompose(graph)
    if any(fired.values()):
        graph.eliminate_dead_code()
        graph.lint()
    return fired


@functools.cache
def _pass_class() -> Any:
    """A class, made late: its base is Inductor's, which takes seconds to import."""
    from torch._dynamo.utils import counters
    from torch._inductor import custom_graph_pass

    plain = custom_graph_pass.CustomGraphPass
    # Newer versions tell such passes whether the graph is for inference: a previous pass may ask.
    aware = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)

    class FusedOps(aware or plain):  # type: ignore[misc]
        """The previous passes, then ours."""

        def __init__(self, options: Options, previous: Any) -> None:
            self.options: Options | None = options
            self.previous = previous

        def __call__(self, graph: fx.Graph, is_inference: bool = True) -> None:
            for earlier in self._earlier():
                if aware is not None and isinstance(earlier, aware):
                    earlier(graph, is_inference)
                else:
                    earlier(graph)
            if self.options is not None:
                for name, count in rewrite(graph, self.options).items():
                    counters[COUNTERS][name] += count

        def uuid(self) -> tuple[Any, ...] | None:
            earlier = []
            for each in self._earlier():
                known = each.uuid() if isinstance(each, plain) else None
                if known is None:
                    # Inductor can not cache what such a pass makes, hence nothing of ours either.
                    return None
                earlier.append(known)
            return ("nvfp4_ops", source_hash(), repr(self.options), *earlier)

        def _earlier(self) -> list[Any]:
            if self.previous is None:
                return []
            return (
                list(self.previous) if isinstance(self.previous, list | tuple) else [self.previous]
            )

    return FusedOps


def _make_pass(options: Options, previous: Any) -> Any:
    return _pass_class()(options, previous)
