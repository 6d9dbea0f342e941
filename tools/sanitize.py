"""Run the GPU tests marked ``sanitize`` under compute-sanitizer: ``make sanitize``.

    python tools/sanitize.py [memcheck] [racecheck] [-- PYTEST_ARGS]

Both tools by default. Exits nonzero if one finds an error, a test fails or none ran, or there is no
compute-sanitizer or no GPU. Torch's caching allocator is off, for memcheck to see where each
tensor ends.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
NAME = "compute-sanitizer"
# Not one that pytest or Python returns.
FOUND_ERRORS = 86
NO_TESTS_RAN = 5


def find_sanitizer() -> Path | None:
    """On PATH, in a CUDA toolkit, or in a Python package."""
    if on_path := shutil.which(NAME):
        return Path(on_path)
    toolkits = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    for toolkit in filter(None, toolkits):
        for path in (Path(toolkit) / "bin" / NAME, Path(toolkit) / NAME / NAME):
            if path.is_file():
                return path
    packages = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    return next((path for path in sorted(packages.rglob(NAME)) if path.is_file()), None)


def why_not() -> str | None:
    """Why nothing can run here, or None."""
    if find_sanitizer() is None:
        return f"{NAME} is not on PATH, in CUDA_HOME, in /usr/local/cuda or in a Python package"
    import torch

    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return None


def command(tool: str, pytest_args: Sequence[str]) -> list[str]:
    sanitizer = [str(find_sanitizer()), "--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
    # A worker process would not be watched, and each test takes long.
    pytest = ["-m", "pytest", "-m", "sanitize", "-p", "no:xdist", "-o", "timeout=0"]
    return [*sanitizer, sys.executable, *pytest, *pytest_args]


def run(tool: str, pytest_args: Sequence[str]) -> str | None:
    """What is wrong, or None."""
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    returncode = subprocess.run(command(tool, pytest_args), env=environment).returncode
    if returncode == 0:
        return None
    reasons = {FOUND_ERRORS: "found errors", NO_TESTS_RAN: "no test ran"}
    return reasons.get(returncode, f"tests failed, or {NAME} did (exit status {returncode})")


def main(arguments: Sequence[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    tools, pytest_args = arguments[:split] or TOOLS, arguments[split + 1 :]
    if unknown := set(tools) - set(TOOLS):
        print(f"sanitize: tools are {', '.join(TOOLS)}, got {', '.join(sorted(unknown))}")
        return 2
    if reason := why_not():
        print(f"sanitize: cannot run: {reason}")
        return 2
    results = {}
    for tool in tools:
        print(f"== {tool}", flush=True)
        results[tool] = run(tool, pytest_args)
    for tool, wrong in results.items():
        print(f"sanitize: {tool}: {wrong or 'no errors'}")
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
