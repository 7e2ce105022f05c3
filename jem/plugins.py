"""Functions of the user's own, named in a configuration as `package.module:function`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from jem.errors import ConfigError, Problem


def load_function(name: str, key: str) -> Callable[..., Any]:
    """Import `package.module:function`; a ConfigError on the setting `key` says what was not found."""
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        remedy = "is it on PYTHONPATH, or in the folder the command is run from?"
        raise ConfigError([Problem(key, f"is {name!r}, but there is no module {error.name!r}; {remedy}")]) from error
    except AttributeError as error:
        problem = Problem(key, f"is {name!r}, but {module_name} has no {function_name!r}")
        raise ConfigError([problem]) from error
    if not callable(function):
        raise ConfigError([Problem(key, f"is {name!r}, which is {type(function).__name__}, not a function")])
    return function  # type: ignore[no-any-return]
