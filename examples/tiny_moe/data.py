"""The corpus: Python source of the standard library, split into train and held-out by module path.

A module is held out or not for ever: the decision hashes its path inside the library, so it changes
neither with the Python version nor with the machine. Near-duplicates across the split are left in.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

HELD_OUT_PERCENT = 3
MAX_FILE_BYTES = 1_000_000
# With fewer letters a file is a table (codecs, Unicode ranges, HTML entities), not a program.
MIN_LETTER_SHARE = 0.5
EXCLUDED = (
    "*site-packages/*",
    "*dist-packages/*",
    "*__pycache__/*",
    "config-*",
    "_sysconfigdata*",  # build settings of one machine
    "lib2to3/tests/data/*",  # Python 2 and wrong syntax on purpose
    "test/*bad_coding*",
    "test/*badsyntax*",
    "pydoc_data/*",
)
GENERATED_CODEC = "decoding_table"


def stdlib_directory() -> Path:
    """Root of the standard library of the running Python."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(path: str) -> bool:
    """Whether the module at `path` (relative, with `/`) belongs to the held-out split."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def python_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (path relative to `root`, text) of every program below `root`, sorted by path."""
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        path = file.relative_to(root).as_posix()
        if any(fnmatch(path, pattern) for pattern in EXCLUDED) or not file.is_file():
            continue
        if file.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not is_table(path, text):
            yield path, text


def is_table(path: str, text: str) -> bool:
    """Whether a file holds data rather than code; true of an empty file."""
    if path.startswith("encodings/") and GENERATED_CODEC in text:
        return True
    visible = "".join(text.split())
    letters = sum(map(str.isalpha, visible))
    return letters <= MIN_LETTER_SHARE * len(visible)


def train_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the modules to train on."""
    return (file for file in python_files(root) if not is_held_out(file[0]))


def held_out_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (path, text) of the modules never trained on."""
    return (file for file in python_files(root) if is_held_out(file[0]))
