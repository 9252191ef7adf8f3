"""What pydantic says of a run's keys, in one line each: the key, where it was set, what is allowed, what was meant."""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any

from pydantic import BaseModel, ValidationError

from cutnmix.trainer.keys import Config
from cutnmix.trainer.method import breach, keys_of
from cutnmix.trainer.methods import METHODS


def explained(error: ValidationError, origin: Callable[[str], str], known: list[str], method: str = "") -> str:
    """A line for each of pydantic's complaints, of the method's keys where it is named.

    Where a key may be of several types and the value is of one of them, nothing is said of the others.
    """
    items = [(_path_of(item, method), item) for item in error.errors()]
    of_a_type = [path for path, item in items if _is_of_its_type(item, len(path), method)]
    told = ((path, item) for path, item in items if path not in of_a_type or _is_of_its_type(item, len(path), method))
    return "\n".join(_explain(path, item, origin, known, method) for path, item in told)


def _is_of_its_type(item: Any, depth: int, method: str) -> bool:
    """Whether a complaint about a key at that depth is of its value or of a part, not of the type of the whole."""
    below = len(item["loc"]) + bool(method) > depth + 1  # the one is the name of a union's part
    return below or not item["type"].endswith(("_type", "_parsing"))


def _path_of(item: Any, method: str) -> list[str]:
    """Groups, then one key, without list indices and pydantic's names of a union's parts."""
    path = [*(["method"] if method else []), *(str(part) for part in item["loc"])]
    if item["type"] == "extra_forbidden":
        return path
    groups = 1 if method else len([*takewhile(lambda n: fields_at(path[:n]), range(1, len(path) + 1))])
    return list(takewhile(str.isidentifier, path[: groups + 1]))


def _explain(path: list[str], item: Any, origin: Callable[[str], str], known: list[str], method: str) -> str:
    """One line for one of pydantic's complaints."""
    if item["type"] == "stray":  # a complaint of the whole about some of its keys
        named = ", ".join(f"{key} ({origin(key)})" for key in item["ctx"]["keys"])
        return f"{named}: {item['msg']}"
    key = ".".join(path)
    where = f"{key} ({origin(key)})" if key else origin("")
    if item["type"] == "extra_forbidden":
        allowed = list(keys_of(METHODS[method])) if method else fields_at(path[:-1])
        listed = (", ".join(allowed) or "none") + (f" (the keys of {method})" if method else "")
        return f"{where}: unknown key{_meant(path, allowed, known)}; allowed here: {listed}"
    if item["type"] in ("model_type", "dict_type") and path:
        fields = fields_at(path) or ["name", "the keys of that method"]
        return f"{where}: is a group of keys ({', '.join(fields)}), got {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + (f", got {item['input']!r}" if item["type"] != "value_error" else "")


def _meant(path: list[str], allowed: list[str], known: list[str]) -> str:
    """The key of that name in other groups; else the nearest in its own; else one much like it in others."""
    *group, key = path
    places: dict[str, list[str]] = {}
    for dotted in known:
        places.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    if key not in places and (hint := did_you_mean(key, allowed, ".".join(group))):
        return hint
    near = difflib.get_close_matches(key, places, n=1, cutoff=0.8)  # the key itself, where it is one
    return f"; did you mean {' or '.join(places[near[0]])}?" if near else ""


def known_keys(tree: Any) -> list[str]:
    """All keys, dotted, those of the tree's method too. Without names, which are of their groups alone."""
    method = tree.get("method", Config.model_fields["method"].default) if isinstance(tree, dict) else None
    name = method.get("name") if isinstance(method, dict) else method
    known = METHODS.get(name) if isinstance(name, str) else None
    own = {} if known is None or breach(known) else keys_of(known)
    return [*_dotted(), *(f"method.{key}" for key in own)]


def _dotted(*path: str) -> Iterator[str]:
    """The groups and keys below a path of groups."""
    for key in fields_at(path):
        if key != "name":
            yield ".".join((*path, key))
            yield from _dotted(*path, key)


def fields_at(path: Sequence[str]) -> list[str]:
    """The keys of the group at a dotted path of Config."""
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def did_you_mean(word: str, allowed: Iterable[str], group: str = "") -> str:
    """The end of a sentence that refuses a word: the nearest of those allowed, or nothing."""
    near = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean {group + '.' if group else ''}{near[0]}?" if near else ""
