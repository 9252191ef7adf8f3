"""A run's configuration: a YAML file and KEY=VALUE overrides in, one validated Config or one clear ConfigError out.

An unknown key is refused with the nearest valid one, a wrong value with the allowed ones, and each message says whether
the file or the command line is to blame. Whether data, networks and a method's keys fit together is up to build.py,
which writes nothing.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from cutnmix.configs import shipped
from cutnmix.pipeline.laws import Distort, Mix
from cutnmix.trainer.method import Needs, breach, keys_of
from cutnmix.trainer.methods import METHODS


class ConfigError(Exception):
    """The configuration is wrong; the message names the key, where it was set, and what is allowed."""


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _without_nul(path: Any) -> Any:
    if "\0" in str(path):
        raise ValueError("no file can have a name with a null character")
    return path


_can_name_a_file = AfterValidator(_without_nul)
FileName = Annotated[str, _can_name_a_file]
PathName = Annotated[Path, _can_name_a_file]


class Data(_Group):
    """Which images."""

    name: str = "cifar100"  # an entry of cutnmix.pipeline.datasets.DATASETS
    root: PathName | None = None
    classes: Annotated[int, Field(ge=2)] | list[int | str] | None = None
    images_per_class: Annotated[int, Field(ge=1)] | None = None
    download: bool = True
    train: str | None = None  # webdataset: patterns of the shards below root; None: train/*.tar and val/*.tar
    val: str | None = None
    corrupt: Literal["refuse", "skip"] = "refuse"  # image files; skip: leave out, counted, what does not decode

    @property
    def own_files(self) -> bool:
        """Whether the images are files of the user's own: nothing but root says which they are."""
        return self.name in ("folder", "webdataset")

    @property
    def absolute_root(self) -> Path | None:
        """The same place from any working folder."""
        return self.root and Path(os.path.expanduser(self.root)).absolute()


class Loader(_Group):
    """How they reach the device. auto: dali where it is installed, resident elsewhere; both give the same pixels."""

    name: Literal["auto", "dali", "resident"] = "auto"
    threads: Annotated[int, Field(ge=1)] | None = (
        None  # of DALI; None: 1 beside CPU training, else a share of the cores
    )
    prefetch: Annotated[int, Field(ge=1)] = 2


class PeersGroup(_Group):
    """Who learns."""

    network: str | Annotated[list[str], Field(min_length=1)] = "resnet32"  # a list: one each
    count: Annotated[int, Field(ge=1)] = 2  # of a list: its length
    form: Literal["nets", "branches"] = "nets"  # branches share all but their last stage and head

    @model_validator(mode="before")
    @classmethod
    def _count_of_a_list(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("network"), list) and tree["network"]:
            tree = {"count": len(tree["network"]), **tree}
        return tree

    @model_validator(mode="after")
    def _one_network_each(self) -> "PeersGroup":
        if isinstance(self.network, list) and len(self.network) != self.count:
            raise ValueError(
                f"{self.count} peers, but network lists {len(self.network)}: leave count out, or make it so"
            )
        return self

    @property
    def networks(self) -> list[str]:
        """The network of each peer."""
        return self.network if isinstance(self.network, list) else [self.network] * self.count


class MeshGroup(_Group):
    """Over how many processes of torchrun, data * peer in all; 1 x 1 is one process, without torchrun."""

    data: Annotated[int, Field(ge=1)] = 1  # parts of a batch
    peer: Annotated[int, Field(ge=1)] = 1  # parts of the peers
    sync_batch_norm: bool = False  # statistics over the whole batch; False: over the images of a process
    timeout_s: Annotated[float, Field(gt=0)] = 600.0  # how long a process waits for another before the run ends


class Optimizer(_Group):
    """SGD. `accumulate` batches, of equal weight, make one update."""

    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    accumulate: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Optimizer":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov: true needs momentum > 0")
        return self


class Schedule(_Group):
    """The factor on lr over time, see trainer/schedule.py. Milestones and warm-up in epochs."""

    name: Literal["step", "cosine", "constant"] = "step"
    milestones: list[Annotated[float, Field(ge=0)]] = [150, 180, 210]
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0


class Checkpoint(_Group):
    """When the state is written; always at the end of the run and on SIGTERM."""

    every_epochs: Annotated[int, Field(ge=1)] = 1
    every_steps: Annotated[int, Field(ge=1)] | None = None  # at the first update so many steps after the last time
    best: bool = True  # keep best.pt too: the best TEST accuracy of the peers' mean, named as such


_KEYS_OF_MIX = {
    "none": set(),
    "cutmix": {"alpha", "probability", "box_rule", "groups"},
    "cutnmix": {"alpha", "probability", "box_rule", "groups"},
    "mixup": {"alpha", "probability", "groups"},
    "cutout": {"length"},
}


def _idle_distortions(data: Data) -> set[str]:
    """The keys under `distort` that do nothing for images of that data set."""
    return {"pad"} if data.own_files else {"image_size", "crop_scale", "crop_ratio", "region"}


def _refuse_stray(group: str, values: BaseModel, keys: set[str], under: str) -> None:
    """Refuse keys of a group that do nothing here, where they are not at their defaults. For a validator to call."""
    fields = type(values).model_fields
    if stray := [f"{group}.{key}" for key in sorted(keys) if getattr(values, key) != fields[key].default]:
        raise PydanticCustomError("stray", "would do nothing under {under}", {"under": under, "keys": stray})


class Config(_Group):
    """All of a run. The defaults are the paper's recipe."""

    name: FileName | None = None  # the run's folder under `runs`; None: made from the keys that tell runs apart
    runs: PathName = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 95
    epochs: Annotated[int, Field(ge=1)] = 240
    batch_size: Annotated[int, Field(ge=1)] = 64
    drop_last: bool = False  # the last batch of an epoch, if it is not full
    eval_batch_size: Annotated[int, Field(ge=1)] = 256
    views: Literal["shared", "per_peer"] = "per_peer"
    mix: Mix = Mix(name="cutnmix")
    method: dict[str, Any] = {"name": "cutnmix"}
    data: Data = Data()
    distort: Distort = Distort()
    loader: Loader = Loader()
    peers: PeersGroup = PeersGroup()
    mesh: MeshGroup = MeshGroup()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Checkpoint()
    device: str = "auto"
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    channels_last: bool = True
    compile: Literal["auto", "none", "peers", "step", "graph"] = "auto"  # see trainer/device.py
    deterministic: bool = False
    resume: Literal["never", "auto"] = "never"
    log_every: Annotated[int, Field(ge=1)] = 50  # steps
    eval_every: Annotated[int, Field(ge=1)] = 1  # epochs; the last one is always evaluated
    imports: list[str] = []  # modules to import first: what adds entries to METHODS, NETWORKS or DATASETS

    @property
    def num_views(self) -> int:
        """V."""
        return self.peers.count if self.views == "per_peer" else 1

    @property
    def num_processes(self) -> int:
        """How many share the run."""
        return self.mesh.data * self.mesh.peer

    @property
    def needs(self) -> Needs:
        """What the method asks of the other keys."""
        return METHODS[self.method["name"]].needs

    @property
    def images_per_step(self) -> int:
        """Images that the loader reads a training step: the batch, and its second views where the method needs them."""
        return self.batch_size * (2 if self.needs.second else 1)

    @property
    def folder(self) -> Path:
        """The run's folder."""
        network = self.peers.network
        peers = "-".join(network) if isinstance(network, list) else f"{network}x{self.peers.count}"
        if self.peers.form != "nets":
            peers += f"-{self.peers.form}"
        parts = (self.data.name, peers, self.method["name"], self.mix.name, self.views, f"seed{self.seed}")
        return Path(os.path.expanduser(self.runs)) / (self.name or "-".join(parts))

    @model_validator(mode="after")
    def _keys_that_belong_together(self) -> "Config":
        unused = set(Mix.model_fields) - {"name"} - _KEYS_OF_MIX[self.mix.name]
        _refuse_stray("mix", self.mix, unused, f"mix.name: {self.mix.name}")
        if self.mix.name == "cutout":
            _refuse_stray("distort", self.distort, {"cutout"}, "mix.name: cutout, which has its own length")
        _refuse_stray("distort", self.distort, _idle_distortions(self.data), f"data.name: {self.data.name}")
        files = self.data.own_files
        unused = ({"corrupt"} if not files else set()) | ({"train", "val"} if self.data.name != "webdataset" else set())
        _refuse_stray("data", self.data, unused, f"data.name: {self.data.name}")
        if self.schedule.name != "step":
            _refuse_stray("schedule", self.schedule, {"milestones", "gamma"}, f"schedule.name: {self.schedule.name}")
        return self


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
        for key in _idle_distortions(Data(name=name)):
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
        raise ConfigError(_explained(error, origin, _known_keys(tree))) from None
    name = config.method.get("name")
    if alone and isinstance(name, str) and name not in METHODS:
        return config
    method = _checked_method(config.method, origin, _known_keys(tree), config.imports)
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


def _find(source: str | Path) -> Path:
    recipes = shipped()
    if str(source) in recipes:
        return recipes[str(source)]
    if os.path.isfile(source):
        return Path(source)
    hint = _did_you_mean(str(source), recipes)
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
    if isinstance(parsed, dict) and (key == "method" or _fields_at(key.split("."))):
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
            f"allowed: {', '.join(METHODS)}{_did_you_mean(str(name), METHODS)}{own}"
        )
    if reason := breach(METHODS[name]):
        raise ConfigError(f"method.name ({origin('method.name')}): METHODS[{name!r}] is no method: {reason}")
    keys: dict[str, Any] = keys_of(METHODS[name])
    of_variant = METHODS[name].needs.of_variant

    def belong_together(values: Any) -> Any:
        if stray := {key for key, variant in of_variant.items() if values.variant != variant}:
            _refuse_stray("method", values, stray, f"method.variant: {values.variant}")
        return values

    together: dict[str, Any] = {"together": model_validator(mode="after")(belong_together)}
    schema = create_model(name, __config__=ConfigDict(extra="forbid"), __validators__=together, **keys)
    try:
        checked = schema(**{key: value for key, value in method.items() if key != "name"})
    except ValidationError as error:
        raise ConfigError(_explained(error, origin, known, name)) from None
    return {"name": name, **checked.model_dump()}


def _explained(error: ValidationError, origin: Callable[[str], str], known: list[str], method: str = "") -> str:
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
    groups = 1 if method else len([*takewhile(lambda n: _fields_at(path[:n]), range(1, len(path) + 1))])
    return list(takewhile(str.isidentifier, path[: groups + 1]))


def _explain(path: list[str], item: Any, origin: Callable[[str], str], known: list[str], method: str) -> str:
    """One line for one of pydantic's complaints."""
    if item["type"] == "stray":  # a complaint of the whole about some of its keys
        named = ", ".join(f"{key} ({origin(key)})" for key in item["ctx"]["keys"])
        return f"{named}: {item['msg']}"
    key = ".".join(path)
    where = f"{key} ({origin(key)})" if key else origin("")
    if item["type"] == "extra_forbidden":
        allowed = list(keys_of(METHODS[method])) if method else _fields_at(path[:-1])
        listed = (", ".join(allowed) or "none") + (f" (the keys of {method})" if method else "")
        return f"{where}: unknown key{_meant(path, allowed, known)}; allowed here: {listed}"
    if item["type"] in ("model_type", "dict_type") and path:
        fields = _fields_at(path) or ["name", "the keys of that method"]
        return f"{where}: is a group of keys ({', '.join(fields)}), got {item['input']!r}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" + (f", got {item['input']!r}" if item["type"] != "value_error" else "")


def _meant(path: list[str], allowed: list[str], known: list[str]) -> str:
    """The key of that name in other groups; else the nearest in its own; else one much like it in others."""
    *group, key = path
    places: dict[str, list[str]] = {}
    for dotted in known:
        places.setdefault(dotted.rpartition(".")[2], []).append(dotted)
    if key not in places and (hint := _did_you_mean(key, allowed, ".".join(group))):
        return hint
    near = difflib.get_close_matches(key, places, n=1, cutoff=0.8)  # the key itself, where it is one
    return f"; did you mean {' or '.join(places[near[0]])}?" if near else ""


def _known_keys(tree: Any) -> list[str]:
    """All keys, dotted, those of the tree's method too. Without names, which are of their groups alone."""
    method = tree.get("method", Config.model_fields["method"].default) if isinstance(tree, dict) else None
    name = method.get("name") if isinstance(method, dict) else method
    known = METHODS.get(name) if isinstance(name, str) else None
    own = {} if known is None or breach(known) else keys_of(known)
    return [*_dotted(), *(f"method.{key}" for key in own)]


def _dotted(*path: str) -> Iterator[str]:
    """The groups and keys below a path of groups."""
    for key in _fields_at(path):
        if key != "name":
            yield ".".join((*path, key))
            yield from _dotted(*path, key)


def _fields_at(path: Sequence[str]) -> list[str]:
    """The keys of the group at a dotted path of Config."""
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _did_you_mean(word: str, allowed, group: str = "") -> str:
    near = difflib.get_close_matches(word, list(allowed), n=1)
    return f"; did you mean {group + '.' if group else ''}{near[0]}?" if near else ""
