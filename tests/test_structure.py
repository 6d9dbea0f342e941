"""The rules of the code base that a reader relies on: who imports whom, sizes, names, versions."""

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import nvfp4_ops

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "nvfp4_ops"
MODULES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((REPO / "examples").glob("*.py"))

MAX_FILE_LINES, MAX_KERNEL_FILE_LINES = 400, 800
MAX_FUNCTION_LINES, MAX_KERNEL_FUNCTION_LINES = 60, 150
MAX_IMPORT_SECONDS = 0.45

# What each part of the package may import of the others; parts not named here are free.
MAY_IMPORT = {
    "format": set(),
    "activation": set(),
    "plans": set(),
    "registry": {"plans"},
    "reference": {"format", "activation"},
    "kernels": {"format", "plans"},
    "ops": {"format", "activation", "reference", "plans", "registry", "kernels"},
    "routing": {"plans", "registry", "kernels"},
    "expert_parallel": {"registry", "routing"},
    "lowering": {"format", "activation", "ops", "routing"},
}

# Packages that are absent on many machines, and the part of the package that may import them.
OPTIONAL = {
    "cutlass": "kernels",
    "tensorrt": "lowering",
    "torch_tensorrt": "lowering",
    "transformers": "huggingface",
}


def relative(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def part_of(path: Path) -> str:
    """Part of the package: ``ops/quantize.py`` belongs to ``ops``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a module imports, anywhere in it: ``from a import b`` is ``a.b``."""
    package = path.relative_to(REPO).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{origin}.{name.name}" for name in node.names)


def imported_parts(path: Path) -> set[str]:
    parts = {part_of(module) for module in MODULES}
    names = (name.split(".") for name in imports(path))
    # ``from nvfp4_ops import Name`` imports the root, which imports everything.
    return {
        name[1] if len(name) > 1 and name[1] in parts else "__init__"
        for name in names
        if name[0] == PACKAGE.name
    }


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_structure_imports_point_down(path: Path) -> None:
    part = part_of(path)
    if part in MAY_IMPORT:
        upward = imported_parts(path) - MAY_IMPORT[part] - {part}
        assert not upward, f"{relative(path)} must not import {sorted(upward)}"


def test_structure_import_rules_name_existing_parts() -> None:
    optional = {"kernels", "lowering", "expert_parallel"}
    assert set(MAY_IMPORT) - optional <= {part_of(path) for path in MODULES}
    # The rules would hold of nothing if no import was found.
    assert imported_parts(PACKAGE / "ops" / "dequantize.py") == {
        "plans",
        "format",
        "kernels",
        "ops",
        "reference",
        "registry",
    }


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_structure_optional_packages_stay_in_their_part(path: Path) -> None:
    for name in imports(path):
        owner = OPTIONAL.get(name.split(".")[0])
        assert owner in (None, part_of(path)), f"{relative(path)} imports {name}"


IMPORT_AND_TIME = f"""
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import nvfp4_ops
print(time.perf_counter() - start)
print(*sorted({set(OPTIONAL)!r} & (set(sys.modules) - before)))
"""


def test_structure_import_is_light() -> None:
    """No optional package, and quick; the best of three, as the machine may be busy."""
    seconds = []
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "-c", IMPORT_AND_TIME],
            cwd=REPO,
            capture_output=True,
            text=True,
            check=True,
        )
        time, optional = run.stdout.split("\n")[:2]
        assert optional == "", f"import nvfp4_ops imports {optional}"
        seconds.append(float(time))
        if seconds[-1] < MAX_IMPORT_SECONDS:
            break
    assert min(seconds) < MAX_IMPORT_SECONDS


RUN_A_LAYER = """
import sys, torch, nvfp4_ops
moe = nvfp4_ops.NVFP4MoE(32, 32, 4)
inputs = torch.ones(3, 32), torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
with torch.no_grad():
    for moe.activation_scale in (None, "per_token", "per_tensor"):
        moe(*inputs)
print("sympy" in sys.modules)
"""


def test_structure_a_first_call_imports_no_algebra() -> None:
    """torch._check and its kin import sympy, for a second or two, to see that True is true."""
    command = [sys.executable, "-c", RUN_A_LAYER]
    run = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def in_kernels(path: Path) -> bool:
    return part_of(path) == "kernels"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_structure_files_are_short(path: Path) -> None:
    limit = MAX_KERNEL_FILE_LINES if in_kernels(path) else MAX_FILE_LINES
    assert len(path.read_text().splitlines()) <= limit


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """From ``def`` to the last line, without the docstring."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    if ast.get_docstring(node) is not None:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_structure_functions_are_short(path: Path) -> None:
    limit = MAX_KERNEL_FUNCTION_LINES if in_kernels(path) else MAX_FUNCTION_LINES
    too_long = {
        node.name: function_lines(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and function_lines(node) > limit
    }
    assert not too_long


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_structure_modules_say_what_they_are_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text()))


def repository_files() -> list[Path]:
    """Text files that are, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = (REPO / line for line in listed.stdout.splitlines())
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:4096]]


# Each matches no spelling of itself.
MACHINE_SPECIFIC = {
    "absolute path": re.compile(r"(?<![\w.$}~-])/(?:home|work|root|Users|mnt|scratch)/\w"),
    "package index": re.compile(
        r"--(?:extra-)?index-[u]rl|PIP_INDEX_[U]RL|https?://[^\s/]*(?:pypi|artifactory|nexus|simple)"
    ),
}


@pytest.mark.parametrize("what", MACHINE_SPECIFIC, ids=lambda what: what.replace(" ", "-"))
def test_structure_files_name_no_machine(what: str) -> None:
    found = [
        f"{relative(path)}:{number}: {line.strip()[:100]}"
        for path in repository_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if MACHINE_SPECIFIC[what].search(line)
    ]
    assert not found, f"{what} in\n" + "\n".join(found)


def test_structure_tool_versions_are_pinned_alike() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extra = dict(
        line.split("==") for line in project["optional-dependencies"]["test"] if "==" in line
    )
    hooks = dict(
        re.findall(
            r"repo: \S+/(?:mirrors-)?(ruff|mypy)(?:-pre-commit)?\n\s+rev: v(\S+)",
            (REPO / ".pre-commit-config.yaml").read_text(),
        )
    )
    assert set(hooks) == {"ruff", "mypy"}
    assert hooks == {name: extra.get(name) for name in hooks}


@pytest.mark.parametrize("name", nvfp4_ops.__all__)
def test_structure_public_name_is_documented(name: str) -> None:
    public = getattr(nvfp4_ops, name)
    docstring = public.__doc__
    assert docstring
    # A dataclass or NamedTuple without a docstring gets its signature for one.
    assert not docstring.startswith(f"{name}(")
    if inspect.isfunction(public):
        missing = [
            argument
            for argument in inspect.signature(public).parameters
            if not re.search(rf"\b{argument}\b", docstring)
        ]
        assert not missing, f"{name} does not document {missing}"


def test_structure_public_names_are_sorted_and_unique() -> None:
    assert nvfp4_ops.__all__ == sorted(set(nvfp4_ops.__all__))


def test_structure_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_structure_example_has_main(path: Path) -> None:
    module = ast.parse(path.read_text())
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body)
    assert "__main__" in ast.unparse(module.body[-1])


@pytest.mark.parametrize("path", EXAMPLES, ids=relative)
def test_structure_example_imports_nothing_private(path: Path) -> None:
    private = [name for name in imports(path) if re.search(r"\._[a-z]", name)]
    assert not private
