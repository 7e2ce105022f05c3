"""The type checker of the shapes in annotations: beartype, which makes each check once.

jaxtyping has a check made for every function as it is defined, and for one inside another that is at each call of the
outer one. What beartype is given holds no more than the signature, so that those of one signature can share a check.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype

_made: dict[tuple[str, str, str], Callable[..., Any]] = {}


def once(signature: Callable[..., Any]) -> Callable[..., Any]:
    """The check of a function's arguments, or of arguments and result."""
    key = (
        signature.__module__,
        signature.__qualname__,
        repr((signature.__code__.co_varnames, signature.__annotations__)),
    )
    if key not in _made:
        _made[key] = beartype(signature)
    return _made[key]
