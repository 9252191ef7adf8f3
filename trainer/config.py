"""A run's configuration: a YAML file and KEY=VALUE overrides in, one validated Config or one clear ConfigError out.

An unknown key is refused with the nearest valid one, a wrong value with the allowed ones, and each message says whether
the file or the command line is to blame. Whether data, networks and a method's keys fit together is up to build.py,
which writes nothing.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, ValidationError, create_model, model_validator

from cutnmix.configs import shipped
from cutnmix.pipeline.laws import Mix
from cutnmix.trainer.complaints import did_you_mean, explained, fields_at, known_keys
from cutnmix.trainer.keys import Config, ConfigError, Data, idle_distortions, refuse_stray
from cutnmix.trainer.method import breach, keys_of
from cutnmix.trainer.methods import METHODS

# A bare name at one of these is short for {name: ...}. Under the second kind the other keys belong to the old name, so
# a new name drops them; under the first kind they stay.
_KEEP_ON_RENAME = ("data", "loader")
_DROP_ON_RENAME = ("mix", "method", "schedule")


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The Config of a YAML file, or of a shipped recipe by name, with KEY=VALUE overrides applied in order.

    Keys are dotted paths (`optimizer.lr=0.1`), values YAML; `mix={alpha: 0.5}` is `mix.alpha=0.5`. A bare name at data,
    loader, mix, method or schedule sets its `name` (`method=dml`), and `method.name=dml` says the same. Of the file's
    keys those go that have a meaning only under the name that it gave: those of its method, mix or schedule, and the
    distortions of its kind of images.

    Raises:
        ConfigError: naming the key, where it was set, and what is allowed.
    """
    path = _find(source)
    try:
        tree = read_yaml(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of keys, such as `epochs: 240`")
    if {"rows", "seeds"} <= tree.keys():
        raise ConfigError(f"{path}: is a grid of runs: cutnmix reproduce {source}")
    for group in (*_KEEP_ON_RENAME, *_DROP_ON_RENAME):
        if isinstance(tree.get(group), str):
            tree[group] = {"name": tree[group]}
    named = _data_named(tree)
    overridden = [key for text in overrides for key in _override(tree, text)]
    if (name := _data_named(tree)) != named:
        _leave_distortions(tree, name, overridden)
    peers = tree.get("peers")
    if isinstance(peers, dict) and isinstance(peers.get("network"), list):
        if "peers.network" in overridden and "peers.count" not in overridden:
            peers.pop("count", None)  # the file's, of other networks: a list says how many they are

    def origin(key: str) -> str:
        related = any(f"{key}.".startswith(f"{k}.") or k.startswith(f"{key}.") for k in overridden)
        return "command line" if key and related else str(path)

    return _validated(tree, origin)


def _data_named(tree: dict[str, Any]) -> Any:
    values = tree.get("data")
    return values.get("name") if isinstance(values, dict) else None


def _leave_distortions(tree: dict[str, Any], name: Any, overridden: Sequence[str]) -> None:
    """Drop the file's distortions that do nothing for images of the data set now named; none of the command line's."""
    distort = tree.get("distort")
    if isinstance(distort, dict) and "distort" not in overridden and isinstance(name, str):
        for key in idle_distortions(Data(name=name)):
            if f"distort.{key}" not in overridden:
                distort.pop(key, None)


def read_yaml(text: str) -> Any:
    """What a YAML text says. Raises: YAMLError, also for a key that stands twice, of which YAML keeps the last."""
    try:
        return yaml.load(text, _Once)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise yaml.YAMLError(f"{line}{error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # such as the 30th of February
        raise yaml.YAMLError(" ".join(str(error).split()).replace('in "<unicode string>",', "at")) from error


class _Once(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} stands twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_config(tree: Any, source: str = "config", *, alone: bool = False) -> Config:
    """The Config of an already resolved tree, such as a run folder's config.yaml.

    `alone`: to be read, not to be built, where the run's own modules may not be. Nothing is imported, and a method that
    is not known stays as it stands.
    """
    return _validated(tree, lambda _: source, alone)


def _validated(tree: Any, origin: Callable[[str], str], alone: bool = False) -> Config:
    """The Config of a tree; `origin` says of a key where it was set."""
    if not alone:
        _import(tree, origin)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explained(error, origin, known_keys(tree))) from None
    name = config.method.get("name")
    if alone and isinstance(name, str) and name not in METHODS:
        return config
    method = _checked_method(config.method, origin, known_keys(tree), config.imports)
    config = config.model_copy(update={"method": method, "mix": _complete(config)})
    if truths := [*_truths_for_numbers(tree, config.model_dump(), ())]:
        lines = (f"{key} ({origin(key)}): Input should be a number, got {value}" for key, value in truths)
        raise ConfigError("\n".join(lines))
    _check_needs(config, origin)
    _check_mesh(config, origin)
    return config


def _truths_for_numbers(given: Any, read: Any, path: tuple[str, ...]) -> Iterator[tuple[str, bool]]:
    """The keys where true or false was read as a number, which pydantic does."""
    if isinstance(given, dict) and isinstance(read, dict):
        for key in given:
            yield from _truths_for_numbers(given[key], read.get(key), (*path, key))
    elif isinstance(given, list) and isinstance(read, list | tuple):
        for one, other in zip(given, read, strict=True):
            yield from _truths_for_numbers(one, other, path)
    elif isinstance(given, bool) and not isinstance(read, bool):
        yield ".".join(path), given


def _import(tree: Any, origin: Callable[[str], str]) -> None:
    """The modules that a tree asks for, from the working folder or the environment, before names are looked up."""
    names = tree.get("imports", []) if isinstance(tree, dict) else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return  # which validation says
    if names and (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # a console script has its own folder there instead
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # it is anybody's code
            if name.endswith(".py") or "/" in name or name.startswith("."):
                raise ConfigError(
                    f"imports ({origin('imports')}): write the name of a module, such as my_methods, not {name!r}"
                ) from error
            raise ConfigError(
                f"imports ({origin('imports')}): {name!r} cannot be imported ({type(error).__name__}: {error}); "
                f"modules are looked for in {Path.cwd()} and where Python finds its packages"
            ) from error


def _complete(config: Config) -> Mix:
    """The mix with what its paper chose by data set, half a side at most, and as many groups as the batch has parts."""
    if config.mix.has_partner and config.mix.groups is None and config.mesh.data > 1:
        return config.mix.model_copy(update={"groups": config.mesh.data})
    if config.mix.name == "cutout" and config.mix.length is None:
        return config.mix.model_copy(update={"length": 8 if config.data.name in ("cifar100", "digits16") else 16})
    return config.mix


def _check_needs(config: Config, origin: Callable[[str], str]) -> None:
    """Refuse what the method cannot work with."""
    name, needs, peers = config.method["name"], config.needs, config.peers
    if peers.count < needs.min_peers:
        key = "peers.network" if isinstance(peers.network, list) else "peers.count"  # where the number comes from
        raise ConfigError(f"{key} ({origin(key)}): {name} needs at least {needs.min_peers} peers, got {peers.count}")
    if needs.form and peers.form != needs.form:
        raise ConfigError(
            f"peers.form ({origin('peers.form')}): {name} is defined for {needs.form} only, got {peers.form!r}"
        )
    if reason := needs.refuses.get(config.mix.name):
        raise ConfigError(
            f"mix ({origin('mix')}), method ({origin('method')}): "
            f"{config.mix.name} has no meaning with {name}: {reason}"
        )


def _check_mesh(config: Config, origin: Callable[[str], str]) -> None:
    """Refuse what cannot be cut into equal parts, or not at all."""
    mesh, name, count, groups = config.mesh, config.method["name"], config.peers.count, config.mix.groups or 1
    for axis in ("data", "peer"):
        if getattr(mesh, axis) > 1 and (reason := config.needs.whole.get(axis)):
            raise ConfigError(f"mesh.{axis} ({origin(f'mesh.{axis}')}): {name} cannot be split along it: {reason}")
    if count % mesh.peer:
        raise ConfigError(f"mesh.peer ({origin('mesh.peer')}): {count} peers cannot be cut into {mesh.peer} parts")
    if mesh.peer > 1 and config.peers.form == "branches":
        raise ConfigError(f"mesh.peer ({origin('mesh.peer')}): branches share one trunk; use peers.form=nets")
    if mesh.peer > 1 and config.mix.name == "cutnmix" and config.mix.rule == "clip_corrected":
        raise ConfigError(
            f"mix.box_rule ({origin('mix.box_rule')}): clip_corrected gives every peer a target of its own, and the "
            f"peers of several processes (mesh.peer) know only their own"
        )
    parts = (("mesh.data", mesh.data), ("mix.groups", groups))
    for key, number in parts:
        if config.batch_size % number:
            raise ConfigError(f"{key} ({origin(key)}): batch_size {config.batch_size} is no multiple of {number}")
    if config.mix.has_partner and groups == config.batch_size:
        key = "batch_size" if groups == 1 else "mesh.data" if groups == mesh.data else "mix.groups"
        raise ConfigError(
            f"{key} ({origin(key)}): a batch of {config.batch_size} in {groups} part(s), mix.groups, leaves every "
            f"image to be mixed with itself; 2 images a part are needed, or mix=none"
        )
    if config.mix.has_partner and groups % mesh.data:
        raise ConfigError(
            f"mix.groups ({origin('mix.groups')}): {groups} is no multiple of mesh.data, {mesh.data}: "
            f"images would be mixed with those of another process"
        )


def dump_config(config: Config) -> dict[str, Any]:
    """The resolved tree, plain YAML types only; `parse_config` gives the same Config back."""
    return config.model_dump(mode="json")


def yaml_of(config: Config) -> str:
    """All keys of a Config as a YAML file; `load_config` gives the same Config back."""
    return yaml.safe_dump(dump_config(config), sort_keys=False)


def _find(source: str | Path) -> Path:
    recipes = shipped()
    if str(source) in recipes:
        return recipes[str(source)]
    if os.path.isfile(source):
        return Path(source)
    hint = did_you_mean(str(source), recipes)
    raise ConfigError(f"{source}: neither a YAML file nor a shipped recipe ({', '.join(recipes)}){hint}")


def _override(tree: dict[str, Any], text: str) -> list[str]:
    """Apply one KEY=VALUE to the tree; returns the keys that it set."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{text}: write KEY=VALUE, such as epochs=10 or optimizer.lr=0.1")
    try:
        parsed = read_yaml(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{text}: the value is not YAML: {error}") from error
    return _set(tree, key, parsed, text)


def _set(tree: dict[str, Any], key: str, parsed: Any, text: str) -> list[str]:
    """A group of keys is set key by key, its name first."""
    if isinstance(parsed, dict) and (key == "method" or fields_at(key.split("."))):
        parts = sorted(parsed, key=lambda part: part != "name")
        return [one for part in parts for one in _set(tree, f"{key}.{part}", parsed[part], text)]
    if isinstance(parsed, str) and key.removesuffix(".name") in (*_KEEP_ON_RENAME, *_DROP_ON_RENAME):
        key = key.removesuffix(".name")  # method.name=dml is method=dml
    *groups, last = key.split(".")
    node = tree
    for group in groups:
        child = node.setdefault(group, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{text}: {group} is a value, not a group of keys")
        node = child
    if isinstance(parsed, str) and key in _DROP_ON_RENAME:
        if not isinstance(tree.get(key), dict) or tree[key].get("name") != parsed:
            tree[key] = {"name": parsed}
    elif isinstance(parsed, str) and key in _KEEP_ON_RENAME:
        group = tree.get(key)
        tree[key] = {**(group if isinstance(group, dict) else {}), "name": parsed}
    else:
        node[last] = parsed
    return [key]


def _checked_method(
    method: dict[str, Any], origin: Callable[[str], str], known: list[str], imports: list[str]
) -> dict[str, Any]:
    """The method's keys, complete with defaults, checked against its constructor's signature."""
    name = method.get("name")
    if name is None:
        raise ConfigError(f"method ({origin('method')}): name is missing; allowed: {', '.join(METHODS)}")
    if not isinstance(name, str) or name not in METHODS:
        own = "" if imports else "; one of your own? name its module in imports"
        raise ConfigError(
            f"method.name ({origin('method.name')}): {name!r} is not a method; "
            f"allowed: {', '.join(METHODS)}{did_you_mean(str(name), METHODS)}{own}"
        )
    if reason := breach(METHODS[name]):
        raise ConfigError(f"method.name ({origin('method.name')}): METHODS[{name!r}] is no method: {reason}")
    keys: dict[str, Any] = keys_of(METHODS[name])
    of_variant = METHODS[name].needs.of_variant

    def belong_together(values: Any) -> Any:
        if stray := {key for key, variant in of_variant.items() if values.variant != variant}:
            refuse_stray("method", values, stray, f"method.variant: {values.variant}")
        return values

    together: dict[str, Any] = {"together": model_validator(mode="after")(belong_together)}
    schema = create_model(name, __config__=ConfigDict(extra="forbid"), __validators__=together, **keys)
    try:
        checked = schema(**{key: value for key, value in method.items() if key != "name"})
    except ValidationError as error:
        raise ConfigError(explained(error, origin, known, name)) from None
    return {"name": name, **checked.model_dump()}
