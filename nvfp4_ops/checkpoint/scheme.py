"""Scheme: how a module of a checkpoint is quantized, and matching of module names."""

import re
from collections.abc import Iterable, Iterator
from fnmatch import translate
from typing import Literal, Self

Scheme = Literal["nvfp4", "w4a16_nvfp4", "mxfp4"]
"""nvfp4: weights and activations. w4a16_nvfp4: weights alone. mxfp4: weights in groups of 32 with
power-of-two scales, which are exact in NVFP4 and loaded as such. None stands for unquantized."""


class ModuleNames:
    """A set of modules, by names and regular expressions; whatever is part of one is in it too.

    names: exact names. patterns: matched from the beginning of a name.
    """

    def __init__(self, names: Iterable[str] = (), patterns: Iterable[str] = ()) -> None:
        self._names = frozenset(names)
        # One expression: a config lists hundreds, a checkpoint has tens of thousands of modules.
        joined = "|".join(f"(?:{pattern})" for pattern in patterns)
        self._pattern = re.compile(joined) if joined else None

    @classmethod
    def from_wildcards(cls, wildcards: Iterable[str]) -> Self:
        """From shell-style wildcards, as ModelOpt writes them."""
        wildcards = tuple(wildcards)
        wild = {name for name in wildcards if set(name) & set("*?[")}
        return cls(set(wildcards) - wild, map(translate, sorted(wild)))

    def __contains__(self, module: str) -> bool:
        return any(
            name in self._names or (self._pattern is not None and self._pattern.match(name))
            for name in _with_ancestors(module)
        )


def _with_ancestors(module: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while module:
        yield module
        module = module.rpartition(".")[0]
