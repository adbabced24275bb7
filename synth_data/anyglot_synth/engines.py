"""Names of engines in recipes: `{engine: folder, path: photos}` becomes an object, and wrong names get a clear answer.

A registry maps names to `module:Class`; a module is imported when its engine is asked for. Which engines there are is
said by the packages that hold them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from anyglot_tokenizers.errors import AnyglotError


def build(registry: Mapping[str, str], config: Any, what: str, key: str = "engine") -> Any:
    """The object that a recipe describes.

    Args:
        registry: `{name: "module:Class"}`.
        config: `{"engine": name, **arguments}`, or only the name.
        what: of the message: "pictures", "music".
        key: what names the engine in `config`.

    Raises:
        AnyglotError: an unknown engine or argument, or one that is missing; it names the choices.
    """
    config = {key: config} if isinstance(config, str) else config
    if not isinstance(config, Mapping) or not isinstance(config.get(key), str):
        raise AnyglotError(f"{what}: {config!r} names no {key}; write {key}: one of {', '.join(registry)}")
    arguments = {name: value for name, value in config.items() if name != key}
    name = config[key]
    if name not in registry:
        raise AnyglotError(f"{what}: there is no {key} {name!r}; use one of {', '.join(registry)}")
    module, _, attribute = registry[name].partition(":")
    cls = getattr(importlib.import_module(module), attribute)
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        known = ", ".join(inspect.signature(cls).parameters) or "no arguments"
        raise AnyglotError(f"{what}: {key} {name}: {error}; it takes {known}") from None
    return cls(**arguments)
