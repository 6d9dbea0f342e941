"""A progress bar over the parts of long work, where one is wanted."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def track(items: Sequence[Item], progress: bool, what: str) -> Iterable[Item]:
    """The items, with a bar if ``progress``, which needs tqdm."""
    if not progress:
        return items
    from tqdm import tqdm

    bar: Iterable[Item] = tqdm(items, desc=what)
    return bar
