"""Import torch_tensorrt, or say which version of it fits this torch."""

import importlib
import re
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import NamedTuple

import torch


class Fit(NamedTuple):
    """What goes with one minor version of torch."""

    torch_tensorrt: str
    tensorrt: str
    torch_tensorrt_rtx: str
    tensorrt_rtx: str


FITS = {
    (2, 11): Fit("2.11.0", "10.15", "2.11.0", "1.4"),
    (2, 12): Fit("2.12.1", "10.16", "2.12.1", "1.4"),
    (2, 13): Fit("2.13.0", "11.0", "2.13.0", "1.5"),
    (2, 14): Fit("2.14.0", "11.1", "2.14.0", "1.6"),
}

PACKAGES = ("torch-tensorrt", "torch-tensorrt-rtx")


def _minor(text: str) -> tuple[int, int]:
    number = re.match(r"(\d+)\.(\d+)", text)
    assert number is not None
    return int(number[1]), int(number[2])


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def advice(torch_version: str) -> str:
    """What to install beside this torch."""
    fit = FITS.get(_minor(torch_version))
    if fit is None:
        pairs = ", ".join(f"torch {a}.{b} with {FITS[a, b].torch_tensorrt}" for a, b in FITS)
        return f"no torch-tensorrt is known to fit torch {torch_version}; known are {pairs}"
    return (
        f"torch {torch_version} goes with torch-tensorrt=={fit.torch_tensorrt} "
        f"(TensorRT {fit.tensorrt}) or torch-tensorrt-rtx=={fit.torch_tensorrt_rtx} "
        f"(TensorRT-RTX {fit.tensorrt_rtx}), not with both"
    )


def import_torch_tensorrt() -> ModuleType:
    """The module torch_tensorrt.

    Raises:
        ImportError: it is absent, is made for another torch, or cannot be imported here. The
            message names the versions that fit.
    """
    found = installed(PACKAGES)
    if not found:
        raise ImportError(f"torch-tensorrt is not installed; {advice(torch.__version__)}")
    listed = " and ".join(f"{name} {number}" for name, number in found.items())
    if len(found) > 1:
        raise ImportError(
            f"{listed} are both installed and overwrite each other's files; uninstall both, then "
            f"install one: {advice(torch.__version__)}"
        )
    (number,) = found.values()
    if _minor(number) != _minor(torch.__version__):
        raise ImportError(
            f"{listed} is not made for torch {torch.__version__}; {advice(torch.__version__)}"
        )
    try:
        return importlib.import_module("torch_tensorrt")
    except Exception as error:  # ImportError, OSError, RuntimeError, AttributeError: all were seen
        libraries = installed(("tensorrt", "tensorrt-cu13", "tensorrt-rtx"))
        with_what = ", ".join(f"{name} {x}" for name, x in libraries.items()) or "no TensorRT"
        raise ImportError(
            f"{listed} cannot be imported with {with_what} ({type(error).__name__}: {error}). It "
            f"needs an NVIDIA GPU with its driver, and its own TensorRT: "
            f"{advice(torch.__version__)}"
        ) from error
