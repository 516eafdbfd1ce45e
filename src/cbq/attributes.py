"""Attributes that objects have for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def temporarily(objects: Iterable[object], name: str, value: object) -> Iterator[None]:
    """Let the attribute `name` of each of `objects` be `value` inside, and what it was before at the end."""
    before = [(one, getattr(one, name)) for one in objects]
    for one, _ in before:
        setattr(one, name, value)
    try:
        yield
    finally:
        for one, old in before:
            setattr(one, name, old)
