"""`Registry`: names that recipes use -> classes, imported when they are asked for, built from plain YAML values."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from anyglot_tokenizers.errors import AnyglotError

T = TypeVar("T")


class Registry(Mapping[str, "type[T]"], Generic[T]):
    """A mapping of names to classes that are imported on first use.

    Args:
        kind: what they are, for messages: "source", "speech engine".
        error: raised for unknown names and arguments.
        places: name -> "module:Class".
        key: what holds the name in a recipe, `{engine: flite, voices: [slt]}`; `kind` otherwise.
    """

    def __init__(self, kind: str, error: type[AnyglotError], places: Mapping[str, str], key: str | None = None) -> None:
        self.kind, self.error, self.places, self.key = kind, error, dict(places), key or kind

    def __getitem__(self, name: str) -> type[T]:
        if name not in self.places:
            close = difflib.get_close_matches(str(name), self.places, n=1)
            use = f"; did you mean {close[0]!r}? Use" if close else "; use"
            raise self.error(f"there is no {self.kind} {name!r}{use} one of: {', '.join(self.places)}")
        module, _, attribute = self.places[name].partition(":")
        found: type[T] = getattr(importlib.import_module(module), attribute)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def make(self, config: Any, where: str = "recipe", **defaults: Any) -> T:
        """What a recipe describes: `{key: name, **options}`, or only the name. Raises `error`.

        Args:
            config: of the recipe.
            where: begins the message if it is neither.
            defaults: options for classes that have such, where the recipe does not give them.
        """
        config = {self.key: config} if isinstance(config, str) else config
        if not isinstance(config, Mapping) or not isinstance(config.get(self.key), str):
            raise self.error(
                f"{where}: {config!r} names no {self.kind}; write {{{self.key}: NAME, ...}} with one of: "
                f"{', '.join(self.places)}"
            )
        name = config[self.key]
        known = inspect.signature(self[name]).parameters
        options = {key: value for key, value in defaults.items() if key in known}
        return self.build(name, **options | {str(key): value for key, value in config.items() if key != self.key})

    def build(self, name: str, **options: Any) -> T:
        """One of that name, from keyword arguments. Raises `error` for names and arguments that are not known."""
        cls = self[name]
        known = inspect.signature(cls).parameters
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise self.error(f"{self.kind} {name!r} has no option {unknown[0]!r}; it has: {', '.join(known)}")
        needed = [p.name for p in known.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        missing = [option for option in needed if option not in options]
        if missing:
            raise self.error(f"{self.kind} {name!r} needs the option {missing[0]!r}; it has: {', '.join(known)}")
        return cls(**options)
