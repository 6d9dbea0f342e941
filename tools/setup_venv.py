"""Set up .venv for `make demo` or `make test`; does nothing when it is already set up.

    python3 tools/setup_venv.py demo|test

A torch >= 2.11 that the running Python already has is reused, through a .pth file, because
`--system-site-packages` shows only the base installation and that Python may itself be a virtual
environment. Otherwise TORCH is installed. A machine that has torch but reaches no package index
goes on with the packages it has. Nothing is written outside .venv, but for pip's cache and
nvfp4_ops.egg-info.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

TORCH = "torch==2.13.0"
OLDEST_REUSED_TORCH = (2, 11)

REPO = Path(__file__).resolve().parent.parent
VENV = REPO / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STATE = VENV / "setup_venv.json"  # which Python made .venv, and what is installed in it

# The extras of pyproject.toml that each profile installs; `test` contains `demo`.
EXTRAS = {"demo": ["demo"], "test": ["demo", "test"]}
# Added to them with the torch that it is made for.
TENSORRT_EXTRA, TENSORRT_TORCH = "tensorrt-test", "2.13."

# Without network a profile needs these and does without the rest.
REQUIRED = {
    "demo": {"torch", "safetensors", "numpy", "rich", "tqdm", "matplotlib", "tokenizers"},
    "test": {"torch", "safetensors", "numpy", "pytest"},
}
WITHOUT = {
    "nvidia-cutlass-dsl": "GPU kernels cannot run; what needs them is skipped",
    "ruff": "the lint step is skipped",
    "mypy": "the types step is skipped",
    "pytest-xdist": "tests run in one process",
    "pytest-timeout": "tests run without a time limit",
}

# Run by .venv's Python, which has pip: prints those of its arguments that are not satisfied.
PRINT_MISSING = """
import sys
from importlib.metadata import PackageNotFoundError, version
from pip._vendor.packaging.requirements import Requirement
for line in sys.argv[1:]:
    requirement = Requirement(line)
    if requirement.marker and not requirement.marker.evaluate():
        continue
    try:
        found = requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        found = False
    if not found:
        print(line)
"""


def say(text: str) -> None:
    print(f"== setup: {text}", flush=True)


def stop(text: str) -> NoReturn:
    sys.exit(f"== setup: ERROR: {text}")


def torch_to_reuse() -> str | None:
    """Version of the running Python's torch, or None where it has none that is new enough."""
    try:
        installed = version("torch")
    except PackageNotFoundError:
        return None
    number = re.match(r"(\d+)\.(\d+)", installed)
    if number is None or (int(number[1]), int(number[2])) < OLDEST_REUSED_TORCH:
        say(f"{sys.executable} has torch {installed}, which is too old to reuse")
        return None
    return installed


def package_folders() -> list[str]:
    """Folders from which the running Python imports torch and its other packages."""
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    torch = find_spec("torch")
    if torch is not None and torch.origin is not None:
        folders.append(str(Path(torch.origin).parent.parent))
    return list(dict.fromkeys(folders))


def create_venv(python: dict[str, str | None]) -> None:
    with_pip = find_spec("ensurepip") is not None
    if not with_pip and not (python["torch"] and find_spec("pip")):
        stop(f"{sys.executable} cannot make virtual environments; on Debian install python3-venv")
    say(f"creating .venv with {sys.executable} (Python {python['version']})")
    VENV.mkdir()
    STATE.write_text(json.dumps({"python": None, "ready": {}}))  # ours, but unfinished
    venv.create(VENV, symlinks=True, with_pip=with_pip)
    if python["torch"]:
        # addsitedir, not a bare path: packages there may need .pth files of their own.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in package_folders()]
        (site_packages() / "reused_torch.pth").write_text("".join(lines))
    STATE.write_text(json.dumps({"python": python, "ready": {}}))


def site_packages() -> Path:
    where = {"base": str(VENV), "platbase": str(VENV)}
    return Path(sysconfig.get_path("purelib", "venv", where))


def pip(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=REPO, **options)


def index_is_reachable() -> bool:
    """Whether pip can fetch a small package that every index has."""
    with tempfile.TemporaryDirectory() as folder:
        fetch = ["download", "--no-deps", "--timeout=5", "--retries=0", "-d", folder, "setuptools"]
        try:
            return pip(*fetch, capture_output=True, timeout=60).returncode == 0
        except subprocess.TimeoutExpired:
            return False


def install(extras: list[str], torch: str | None) -> None:
    """Install the package and its extras; a reused torch stays as it is."""
    say(f"installing nvfp4_ops with [{','.join(extras)}] in .venv; the first time takes minutes")
    (site_packages() / "nvfp4_ops_repo.pth").unlink(missing_ok=True)
    constraints = VENV / "constraints.txt"
    constraints.write_text(f"torch=={torch}\n" if torch else f"{TORCH}\n")
    command = ["install", "--constraint", str(constraints), "--editable", f".[{','.join(extras)}]"]
    if sys.stdout.isatty():
        done = pip(*command)
    else:
        done = pip(*command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode != 0:
            print(*done.stdout.decode(errors="replace").splitlines()[-40:], sep="\n", flush=True)
    if done.returncode != 0:
        stop("pip could not install what is needed; its message is above")


def extras_of(profile: str, torch: str | None) -> list[str]:
    """Extras of a profile with this torch; None is TORCH."""
    if profile != "test":
        return EXTRAS[profile]
    torch = torch or TORCH.split("==")[1]
    if torch.startswith(TENSORRT_TORCH):
        return [*EXTRAS[profile], TENSORRT_EXTRA]
    say(f"tests of TensorRT are skipped: what they need goes with torch {TENSORRT_TORCH}x")
    return EXTRAS[profile]


def use_what_is_there(profile: str, extras: list[str]) -> None:
    """Without network: import nvfp4_ops from the checkout and name what is missing."""
    say("no package index can be reached: going on with the packages that are installed")
    (site_packages() / "nvfp4_ops_repo.pth").write_text(f"{REPO}\n")
    command = [str(VENV_PYTHON), "-c", PRINT_MISSING, *requirements(extras)]
    missing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    blocking = []
    for requirement in missing.splitlines():
        name = re.split(r"[^\w.-]", requirement)[0]
        if name in REQUIRED[profile]:
            blocking.append(requirement)
        else:
            say(f"  missing {requirement}: {WITHOUT.get(name, 'what needs it is skipped')}")
    if blocking:
        stop(f"`make {profile}` cannot do without: {', '.join(blocking)}")


def requirements(extras: list[str]) -> list[str]:
    """Requirements of the package with these extras, as pyproject.toml lists them."""
    import tomllib

    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    listed = list(project["dependencies"])
    todo = list(extras)
    while todo:
        for requirement in project["optional-dependencies"][todo.pop()]:
            own_extras = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            if own_extras:
                todo += own_extras[1].split(",")
            else:
                listed.append(requirement)
    return list(dict.fromkeys(listed))


def hint_about_compiler() -> None:
    """torch.compile on CPU builds C++ that includes Python.h."""
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        say("HINT: Python.h is missing, so torch.compile fails on CPU; on Debian: python3-dev")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        say("HINT: no C++ compiler, so torch.compile fails on CPU; on Debian install g++")


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (this script runs before any check of versions)
        stop(f"{sys.executable} is older than Python 3.11; pass another: make PYTHON=python3.11")
    if len(sys.argv) != 2 or sys.argv[1] not in EXTRAS:
        stop("usage: setup_venv.py demo|test")
    profile = sys.argv[1]

    if VENV.exists() and not STATE.exists():
        stop("there is a .venv that this script did not make; move it away first")
    state = json.loads(STATE.read_text()) if STATE.exists() else None
    if state and Path(sys.prefix).resolve() == VENV:  # .venv is activated: go back to its maker
        maker = state["python"]["path"]
        os.execv(maker, [maker, *sys.argv])

    torch = torch_to_reuse()
    python = {"path": sys.executable, "version": sys.version.split()[0], "torch": torch}
    if state and (state["python"] != python or not VENV_PYTHON.exists()):
        say("the Python in use has changed: making .venv anew")
        shutil.rmtree(VENV)
        state = None

    inputs = (REPO / "pyproject.toml").read_bytes() + Path(__file__).read_bytes()
    digest = hashlib.sha256(inputs).hexdigest()
    ready = state["ready"] if state else {}
    if digest in (ready.get(profile), ready.get("test")):
        say(".venv is up to date")
    else:
        if state is None:
            create_venv(python)
        if torch:
            say(f"reusing torch {torch} of {sys.executable}")
        extras = extras_of(profile, torch)
        if torch and not index_is_reachable():
            use_what_is_there(profile, extras)
        else:
            install(extras, torch)
        ready[profile] = digest
        STATE.write_text(json.dumps({"python": python, "ready": ready}))
        say(".venv is ready")
    hint_about_compiler()


if __name__ == "__main__":
    main()
