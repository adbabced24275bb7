"""`Registry`: names that recipes use -> classes, imported when they are asked for, built from plain YAML values."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import os
from collections.abc import Collection, Iterator, Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from anyglot_tokenizers.errors import AnyglotError

T = TypeVar("T")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
SCALARS: dict[Any, type] = {bool: bool, int: Integral, float: Real, str: str, NoneType: NoneType}


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
        options |= {str(key): value for key, value in config.items() if key != self.key}
        try:
            return self.build(name, **options)
        except AnyglotError as error:
            if len(error.args) == 1:  # says where, and stays what it is
                error.args = (f"{where}: {error}",)
            raise

    def build(self, name: str, /, **options: Any) -> T:
        """One of that name, from keyword arguments. Raises `error` for names, arguments and values that cannot be."""
        cls = self[name]
        known = inspect.signature(cls).parameters
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise self.error(f"{self.kind} {name!r} has no option {unknown[0]!r}; it has: {', '.join(known)}")
        needed = [p.name for p in known.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        missing = [option for option in needed if option not in options]
        if missing:
            raise self.error(f"{self.kind} {name!r} needs the option {missing[0]!r}; it has: {', '.join(known)}")
        made: T | None = None
        problem: Exception | None = None
        try:
            made = cls(**options)  # what it says itself about its values is said best
        except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            problem = error
        hints = _hints(cls)
        for option, value in options.items():
            if (number := _endless(value)) is not None:
                raise self.error(f"{self.kind} {name!r}: {option} holds {number}; give a number that ends")
            if option in hints and not _fits(value, hints[option]):
                message = f"{self.kind} {name!r}: {option} is {value!r}; give {_words(hints[option])}"
                raise self.error(message) from problem
        if problem is not None:
            given = ", ".join(f"{option}: {value!r}" for option, value in options.items())
            why = f"{type(problem).__name__}: {problem}"
            raise self.error(f"{self.kind} {name!r} cannot be set up with {given} ({why}); change one") from problem
        assert made is not None
        return made


def _hints(cls: Any) -> dict[str, Any]:
    """Types of the arguments of a class, as far as they are written down."""
    for place in (cls.__init__, cls):
        try:
            return get_type_hints(place)
        except NameError:  # of a module that is imported for type checkers only
            continue
    return {}


def _endless(value: Any) -> float | None:
    """The first infinity or NaN in a value of a recipe: no JSON can hold it, and so no job."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((number for one in inner if (number := _endless(one)) is not None), None)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a recipe has the type that an argument wants, as far as types say."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is Literal:
        return any(type(value) is type(one) for one in inner)
    if kind in SCALARS:
        return isinstance(value, SCALARS[kind]) and (kind is bool or not isinstance(value, bool))
    if (
        kind is Any
        or not isinstance(kind, type)
        or getattr(kind, "_is_protocol", False)
        or issubclass(kind, os.PathLike)
    ):
        return True
    if not issubclass(kind, Collection):
        return not isinstance(value, Real | str | NoneType | list | Mapping) or isinstance(value, kind)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and (len(inner) != 2 or all(_fits(one, inner[1]) for one in value.values()))
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Collection):
        return False
    inner = tuple(one for one in inner if one is not Ellipsis)
    return len(inner) != 1 or all(_fits(one, inner[0]) for one in value)


def _words(hint: Any) -> str:
    """A type in words."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in inner))
    if kind is Literal:
        return " or ".join(map(str, inner))
    if kind in WORDS:
        return WORDS[kind]
    if isinstance(kind, type) and issubclass(kind, Collection):
        what = "a mapping {key: value}" if issubclass(kind, Mapping) else "a list"
        known = [_words(one) for one in inner[-1:] if one in WORDS]
        return f"{what} of {known[0]}" if known else what
    return str(getattr(kind, "__name__", kind))
