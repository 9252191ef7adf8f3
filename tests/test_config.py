"""A configuration means one thing, and what is wrong with it is said in full: the key, who set it, what is allowed."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from cutnmix.benchmarks.reproduce.grid import GRIDS, load_grid
from cutnmix.configs import shipped
from cutnmix.pipeline.laws import Mix
from cutnmix.trainer.config import dump_config, load_config, parse_config, yaml_of
from cutnmix.trainer.keys import Config, ConfigError, PeersGroup
from cutnmix.trainer.method import Needs, Task, breach
from cutnmix.trainer.methods import METHODS


def refusal(source: str | Path, *overrides: str) -> str:
    """What the user is told."""
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


class Demanding:
    """A method that asks for everything that one can ask for."""

    needs = Needs(
        "nobody", min_peers=3, form="branches", second="class", refuses={"mixup": "it is proud", "cutout": "it is shy"}
    )

    def __init__(self, task: Task, *, weight: float = 1.0) -> None:
        """Never built: only its signature is read."""

    def predictions(self, outputs, batch):
        return {}


@pytest.fixture
def demanding(monkeypatch) -> list[str]:
    """What the method that is there now is content with."""
    monkeypatch.setitem(METHODS, "demanding", Demanding)
    return ["method=demanding", "peers.count=3", "peers.form=branches"]


# What is there


@pytest.mark.parametrize("recipe", shipped())
def test_every_recipe_loads(recipe):
    assert isinstance(load_config(recipe), Config)


def test_the_paper_recipe_has_the_papers_numbers():
    config = load_config("paper")
    numbers = {"temperature": 3.0, "alpha": 0.6, "beta": 0.3, "gamma": 0.1, "feature_dim": None}
    choices = {"tau2": True, "mmd_detach": True, "pt_grad_to_peers": False}
    assert config.method == {"name": "cutnmix", **numbers, **choices}
    assert (config.mix.name, config.mix.rule, config.mix.alpha, config.mix.probability) == (
        "cutnmix", "clip_shared", 1.0, 1.0,
    )  # fmt: skip
    assert (config.views, config.peers.count, config.num_views) == ("per_peer", 2, 2)
    assert (config.seed, config.epochs, config.batch_size) == (95, 240, 64)
    sgd = {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "accumulate": 1}
    assert config.optimizer.model_dump() == sgd
    schedule = config.schedule
    assert (schedule.name, schedule.milestones, schedule.gamma) == ("step", [150, 180, 210], 0.1)
    assert schedule.warmup_epochs == 0
    assert (config.distort.pad, config.distort.flip, config.distort.cutout) == (4, 0.5, 0)
    assert not config.drop_last


def test_the_defaults_are_the_paper_recipe():
    named = load_config("paper", ["data.root=null"])
    assert named == Config(method=named.method)


# One other valid value for every key that a YAML file can hold.
OTHER = """
name: mine
runs: elsewhere
seed: 7
epochs: 3
batch_size: 10
drop_last: true
eval_batch_size: 11
views: shared
mix: {name: cutmix, alpha: 0.5, probability: 0.25, box_rule: inside}
method: {name: cutnmix, temperature: 2.5, alpha: 0.1, beta: 0.2, gamma: 0.3, tau2: false, mmd_detach: false, pt_grad_to_peers: true, feature_dim: 7}
data: {name: digits, root: somewhere, classes: [1, 5, '7'], images_per_class: 9, download: false}
distort: {pad: 2, flip: 0.25, colour: {brightness: 0.1, contrast: 0.2, saturation: 0.3, hue: 40.0}, rotation: 15.0, cutout: 8}
loader: {name: resident, threads: 3, prefetch: 4}
peers: {network: resnet20, count: 5, form: branches}
optimizer: {lr: 0.001, momentum: 0.5, nesterov: false, weight_decay: 0.0, accumulate: 2}
schedule: {name: step, milestones: [1.5, 2.0], gamma: 0.5, warmup_epochs: 0.5}
checkpoint: {every_epochs: 2, every_steps: 7, best: false}
device: cpu
precision: fp16
channels_last: false
compile: peers
deterministic: true
resume: auto
log_every: 5
eval_every: 2
imports: [json]
"""  # noqa: E501
FILES_ONLY = "distort: {image_size: 64, crop_scale: [0.5, 0.75], crop_ratio: [0.5, 2.0], region: centre}\ndata: folder"
SHARDS_ONLY = "data: {name: webdataset, train: 'a-{0..3}.tar', val: 'b-*.tar', corrupt: skip}"
CUTOUT_ONLY = "mix: {name: cutout, length: 5}"
NETS_ONLY = "mesh: {data: 2, peer: 2, sync_batch_norm: true, timeout_s: 30.0}\nmix: {name: cutnmix, groups: 4}"
SHORT = ["mix: cutout", "mix: mixup", "peers: {network: [resnet20, resnet32, resnet20]}"]  # completed as they are read


@pytest.mark.parametrize("text", [OTHER, FILES_ONLY, SHARDS_ONLY, CUTOUT_ONLY, NETS_ONLY, *SHORT])
def test_every_key_round_trips_through_yaml(text, tmp_path):
    config = load_config(write(tmp_path, text))
    assert parse_config(yaml.safe_load(yaml_of(config))) == config
    assert load_config(write(tmp_path, yaml_of(config))) == config


@pytest.mark.parametrize("recipe", shipped())
def test_every_recipe_written_out_is_the_same_recipe(recipe, tmp_path):
    config = load_config(recipe)
    assert load_config(write(tmp_path, yaml_of(config))) == config


def test_the_round_trips_left_out_no_key(tmp_path):
    defaults = flat(dump_config(load_config("paper", ["data.root=null"])))
    others = flat(yaml.safe_load(OTHER)) | flat(yaml.safe_load(FILES_ONLY)["distort"], "distort.")
    others |= {key: value for key, value in flat(yaml.safe_load(SHARDS_ONLY)).items() if key not in others}
    nets = yaml.safe_load(NETS_ONLY)
    others |= flat(nets["mesh"], "mesh.") | {"mix.groups": nets["mix"]["groups"]}
    others["mix.length"] = yaml.safe_load(CUTOUT_ONLY)["mix"]["length"]
    assert others.keys() == defaults.keys()
    same = {key for key, value in others.items() if defaults[key] == value}
    assert same == {"method.name", "schedule.name"}  # whose other keys have no meaning under other names


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_keys_are_complete_once_loaded(method):
    needs = METHODS[method].needs
    asked = [f"peers.form={needs.form or 'nets'}", f"peers.count={max(2, needs.min_peers)}", "mix=none"]
    config = load_config("paper", [f"method={method}", *asked])
    assert set(config.method) == {"name", *(METHODS[method].__init__.__kwdefaults__ or {})}


def test_a_bare_name_in_the_file_is_short_for_its_group(tmp_path):
    path = write(tmp_path, "method: dml\nmix: none\ndata: digits\nloader: resident\nschedule: cosine")
    config = load_config(path)
    groups = (config.mix, config.data, config.loader, config.schedule)
    assert [config.method["name"], *(group.name for group in groups)] == ["dml", "none", "digits", "resident", "cosine"]


@pytest.mark.parametrize(
    ("data", "length"), [("cifar100", 8), ("cifar10", 16), ("digits", 16), ("digits16", 8), ("folder", 16)]
)
def test_cutout_is_as_long_as_its_paper_chose_for_the_data(data, length):
    keys = [f"data={data}", "mix=cutout"]
    assert load_config("paper", keys).mix == Mix(name="cutout", length=length)
    assert load_config("paper", [*keys, "mix.length=5"]).mix.length == 5
    assert load_config("paper", [f"data={data}", "mix=none"]).mix.length is None


def test_peers_of_one_network_are_counted_and_those_of_a_list_are_listed(tmp_path):
    same = load_config("paper", ["peers.network=resnet20", "peers.count=3"])
    assert same.peers.networks == ["resnet20"] * 3
    listed = load_config(write(tmp_path, "peers: {network: [resnet20, resnet32, resnet20]}"))
    assert listed.peers.networks == ["resnet20", "resnet32", "resnet20"]
    assert listed.peers.count == listed.num_views == 3
    assert load_config("paper", ["peers.network=[resnet20]", "peers.count=1", "method=baseline"]).peers.count == 1


def test_a_list_of_networks_on_the_command_line_is_counted_whatever_the_file_says(tmp_path):
    path = write(tmp_path, "peers: {network: resnet20, count: 2}")
    assert load_config(path, ["peers.network=[resnet20, resnet32, resnet20]"]).peers.count == 3
    assert load_config(path, ["peers={network: [resnet20, resnet32, resnet20]}"]).peers.count == 3
    keys = ("peers.count=2", "peers.network=[resnet20, resnet32, resnet20]")
    assert "2 peers, but network lists 3: leave count out" in refusal(path, *keys)


def test_a_list_of_networks_in_python_is_counted_as_well():
    assert PeersGroup(network=["resnet20"] * 4).count == 4
    assert Config(peers=PeersGroup(network=["resnet20"] * 4)).num_views == 4


def test_second_views_double_what_the_loader_reads(demanding):
    assert load_config("paper", ["batch_size=10"]).images_per_step == 10
    assert load_config("paper", [*demanding, "batch_size=10"]).images_per_step == 20


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load_config(write(tmp_path, "")).epochs == Config().epochs


# Overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("epochs=3", "epochs", 3),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),  # which YAML 1.1 takes for a string
        ("distort.colour.hue=30", "distort.colour.hue", 30.0),
        ("schedule.milestones=[50, 60.5]", "schedule.milestones", [50, 60.5]),
        ("data.classes=[cat, 3]", "data.classes", ["cat", 3]),
        ("data.classes=20", "data.classes", 20),
        ("data.root=a=b", "data.root", "a=b"),
        ("loader.threads=null", "loader.threads", None),
        ("optimizer={lr: 1.5, nesterov: no}", "optimizer.nesterov", False),
        ("method.temperature=2", "method.temperature", 2.0),
    ],
)
def test_an_override_is_a_dotted_path_and_a_yaml_value(override, key, value):
    assert flat(dump_config(load_config("paper", [override])))[key] == value


def test_an_override_changes_nothing_else():
    before, after = (flat(dump_config(load_config("paper", given))) for given in ([], ["distort.colour.hue=30"]))
    assert {key for key in before if before[key] != after[key]} == {"distort.colour.hue"}


def test_the_later_override_wins():
    assert load_config("paper", ["epochs=3", "epochs=4"]).epochs == 4
    assert load_config("paper", ["optimizer.lr=1.0", "optimizer={lr: 2.0}"]).optimizer.lr == 2.0


@pytest.mark.parametrize(
    ("group", "name", "old"),
    [("method", "dml", "{beta: 9}"), ("mix", "cutmix", "{alpha: 9}"), ("schedule", "cosine", "{gamma: 0.9}")],
)
def test_a_new_method_mix_or_schedule_starts_from_its_own_defaults(group, name, old, tmp_path):
    renamed = load_config(write(tmp_path, f"{group}: {old}"), [f"{group}={name}"])
    assert getattr(renamed, group) == getattr(load_config("paper", [f"{group}={name}"]), group)


@pytest.mark.parametrize(
    "name", ["method=dml", "mix=none", "schedule=cosine", "data=cifar10", "loader=dali", "method=cutnmix"]
)
def test_a_name_by_its_own_key_is_the_bare_name(name):
    group, _, value = name.partition("=")
    assert load_config("quickstart", [f"{group}.name={value}"]) == load_config("quickstart", [name])


def test_the_same_method_by_name_keeps_its_keys(tmp_path):
    path = write(tmp_path, "method: {name: dml, temperature: 5}")
    assert load_config(path, ["method=dml"]).method["temperature"] == 5


def test_keys_after_a_new_method_are_its_own():
    config = load_config("paper", ["method.beta=9", "method=dml", "method.temperature=4"])
    assert config.method == {"name": "dml", "temperature": 4.0, "alpha": 1.0}


@pytest.mark.parametrize(("group", "name", "sibling"), [("data", "digits", "root"), ("loader", "dali", "prefetch")])
def test_a_new_data_set_or_loader_keeps_the_other_keys(group, name, sibling, tmp_path):
    path = write(tmp_path, "data: {root: here}\nloader: {prefetch: 5}")
    values = getattr(load_config(path, [f"{group}={name}"]), group)
    assert values.name == name
    assert str(getattr(values, sibling)) == {"root": "here", "prefetch": "5"}[sibling]


@pytest.mark.parametrize(
    ("text", "new", "kept"),
    [
        ("data: digits\ndistort: {pad: 2, flip: 0.25}", "folder", {"flip": 0.25}),
        ("distort: {pad: 2, flip: 0.25}", "webdataset", {"flip": 0.25}),
        ("data: digits\ndistort: {pad: 2, flip: 0.25}", "cifar100", {"pad": 2, "flip": 0.25}),
        ("data: folder\ndistort: {image_size: 64, region: centre, flip: 0.25}", "digits", {"flip": 0.25}),
        ("data: folder\ndistort: {image_size: 64, flip: 0.25}", "webdataset", {"image_size": 64, "flip": 0.25}),
    ],
)
def test_new_images_leave_the_distortions_of_the_other_kind(text, new, kept, tmp_path):
    path = write(tmp_path, text)
    made = load_config(path, [f"data={new}"])
    assert made == load_config(path, [f"data.name={new}"])
    assert made == load_config(write(tmp_path, yaml.safe_dump({"data": new, "distort": kept})))


def test_distortions_that_the_command_line_asks_for_are_never_left(tmp_path):
    path = write(tmp_path, "data: digits\ndistort: {pad: 2}")
    for override in ("distort.pad=3", "distort={pad: 3}"):
        assert "distort.pad (command line): would do nothing" in refusal(path, override, "data=folder")
    assert "distort.pad " in refusal(write(tmp_path, "data: folder\ndistort: {pad: 2}"), "data=folder")


def test_a_group_left_empty_in_the_file_can_be_named_on_the_command_line(tmp_path):
    assert load_config(write(tmp_path, "data:\nmethod:"), ["data=digits", "method=dml"]).data.name == "digits"


# Refusals: key, origin, and what is allowed

CASES = {
    "unknown top-level key": ("epoch: 3", "epoch ", "did you mean epochs?", "allowed here: name, runs, seed, epochs"),
    "unknown group": ("optimiser: {lr: 1}", "optimiser ", "did you mean optimizer?"),
    "unknown nested key": ("optimizer: {lrr: 1}", "optimizer.lrr ", "did you mean optimizer.lr?", "allowed here: lr, "),
    "unknown key two groups down": (
        "distort: {colour: {hu: 1}}",
        "distort.colour.hu ",
        "did you mean distort.colour.hue?",
        "allowed here: brightness, contrast, saturation, hue",
    ),
    "unknown method key": (
        "method: {name: dml, temprature: 2}",
        "method.temprature ",
        "did you mean method.temperature?",
        "allowed here: temperature, alpha",
    ),
    "key of a method that has none": (
        "method: {name: baseline, beta: 2}",
        "method.beta ",
        "unknown key; allowed here: none (the keys of baseline)",
    ),
    "key of another method": (
        "method: {name: dml, beta: 2}",
        "method.beta ",
        "unknown key; allowed here: temperature, alpha (the keys of dml)",
    ),
    "unknown method": ("method: cutnmx", "method.name ", "'cutnmx'", f"allowed: {', '.join(METHODS)}", "mean cutnmix?"),
    "wrong type": ("epochs: many", "epochs ", "valid integer", "'many'"),
    "wrong type of a method key": ("method: {name: dml, alpha: much}", "method.alpha ", "valid number", "'much'"),
    "fraction for an integer": ("batch_size: 2.5", "batch_size ", "valid integer", "2.5"),
    "value for a group": ("optimizer: adam", "optimizer ", "is a group of keys (lr, momentum, ", "got 'adam'"),
    "nothing for a group": ("peers:", "peers ", "is a group of keys (network, count, form), got None"),
    "value for a group in a group": ("distort: {colour: 1}", "distort.colour ", "a group of keys (brightness, ", "1"),
    "value for the method": ("method: 3", "method ", "is a group of keys (name, the keys of that method), got 3"),
    "key of a group at the top": ("lr: 0.1", "lr ", "unknown key; did you mean optimizer.lr?"),
    "key of the method at the top": ("temperature: 2", "temperature ", "did you mean method.temperature?"),
    "key of two groups at the top": ("alpha: 2", "alpha ", "did you mean mix.alpha or method.alpha?"),
    "group of a group at the top": ("colour: {hue: 1}", "colour ", "unknown key; did you mean distort.colour?"),
    "misspelt key of a group at the top": ("milestone: [1]", "milestone ", "did you mean schedule.milestones?"),
    "key of the top in a group": ("optimizer: {epochs: 2}", "optimizer.epochs ", "did you mean epochs?"),
    "key of another group among the method's": ("method: {name: dml, lr: 1}", "method.lr ", "mean optimizer.lr?"),
    "too small": ("peers: {count: 0}", "peers.count ", "greater than or equal to 1", "0"),
    "too large": ("distort: {flip: 1.5}", "distort.flip ", "less than or equal to 1", "1.5"),
    "true for a number": ("epochs: true", "epochs ", "should be a number", "got True"),
    "true in a list": ("schedule: {milestones: [1, true]}", "schedule.milestones ", "should be a number", "got True"),
    "true in a pair": (
        "data: folder\ndistort: {crop_scale: [0.5, true]}",
        "distort.crop_scale ",
        "should be a number",
        "got True",
    ),
    "false for a method's": ("method: {name: kd, alpha: false}", "method.alpha ", "should be a number", "got False"),
    "key of another variant": (
        "method: {name: kdcl, holdout: 0.1}",
        "method.holdout ",
        "do nothing",
        "variant: minlogit",
    ),
    "not finite": ("optimizer: {lr: .nan}", "optimizer.lr ", "finite"),
    "not ordered": ("data: folder\ndistort: {crop_scale: [0.9, 0.1]}", "distort ", "crop_scale", "low <= high", "0.9"),
    "bad literal": ("views: each", "views ", "'shared' or 'per_peer'", "'each'"),
    "bad name of a mix": ("mix: cutmx", "mix.name ", "'none', 'cutmix'", "got 'cutmx'"),
    "bad entry of a list": ("schedule: {milestones: [1, soon]}", "schedule.milestones ", "valid number", "'soon'"),
    "neither of two types": ("data: {classes: 1}", "data.classes ", "greater than or equal to 2", "1"),
    "mix keys under no mix": ("mix: {name: none, box_rule: inside}", "mix.box_rule ", "do nothing", "mix.name: none"),
    "padding of files": ("data: folder\ndistort: {pad: 2}", "distort.pad ", "do nothing", "data.name: folder"),
    "size of arrays": ("distort: {image_size: 64}", "distort.image_size ", "do nothing", "data.name: cifar100"),
    "no form": ("peers: {form: tree}", "peers.form ", "'nets' or 'branches'", "'tree'"),
    "a seed that the streams of several processes would share": ("seed: 4294967296", "seed ", "less than 4294967296"),
    "no network": ("peers: {network: 3}", "peers.network ", "valid string", "valid list", "got 3"),
    "one of the networks is none": ("peers: {network: [a, 3]}", "peers.network ", "valid string", "got 3"),
    "no networks at all": ("peers: {network: []}", "peers.network ", "at least 1 item", "got []"),
    "more networks than peers": (
        "peers: {network: [a, b, c], count: 2}",
        "peers ",
        "2 peers, but network lists 3",
        "leave count out",
    ),
    "fewer networks than peers": ("peers: {network: [a], count: 2}", "peers ", "2 peers, but network lists 1"),
    "boxes under mixup": ("mix: {name: mixup, box_rule: inside}", "mix.box_rule ", "do nothing", "mix.name: mixup"),
    "a hole under cutmix": ("mix: {name: cutmix, length: 8}", "mix.length ", "do nothing", "mix.name: cutmix"),
    "a blend under cutout": ("mix: {name: cutout, alpha: 0.5}", "mix.alpha ", "do nothing", "mix.name: cutout"),
    "a hole of no length": ("mix: {name: cutout, length: 0}", "mix.length ", "greater than or equal to 1", "0"),
    "cutout twice": ("mix: cutout\ndistort: {cutout: 8}", "distort.cutout ", "do nothing", "mix.name: cutout"),
    "nesterov alone": ("optimizer: {momentum: 0}", "optimizer ", "nesterov: true needs momentum > 0"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_key_in_the_file_is_named_with_the_file(case, tmp_path):
    text, key, *said = CASES[case]
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{key}({path}): ")
    assert all(part in message for part in said), message


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_key_on_the_command_line_is_named_with_the_command_line(case):
    text, key, *said = CASES[case]
    values = {name.removesuffix(".name"): value for name, value in flat(yaml.safe_load(text)).items()}
    overrides = [f"{name}={'null' if value is None else value}" for name, value in values.items()]
    message = refusal("paper", *overrides)
    assert message.startswith(f"{key}(command line): ")
    assert all(part in message for part in said if not part.startswith("allowed here: name"))


def test_every_wrong_key_gets_a_line_of_its_own(tmp_path):
    path = write(tmp_path, "epoch: 3\noptimizer: {lrr: 1}")
    lines = refusal(path, "views=each").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        f"epoch ({path})",
        f"optimizer.lrr ({path})",
        "views (command line)",
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("epochs", "epochs: write KEY=VALUE"),
        ("=3", "=3: write KEY=VALUE"),
        ("epochs.x=1", "epochs.x=1: epochs is a value, not a group"),
        ("optimizer.lr.x=1", "optimizer.lr.x=1: lr is a value, not a group"),
        ("epochs=[1", "epochs=[1: the value is not YAML"),
        ("name=2024-02-30", "name=2024-02-30: the value is not YAML: day is out of range for month"),
        (
            "distort={flip: 0.0, flip: 0.5}",
            "distort={flip: 0.0, flip: 0.5}: the value is not YAML: line 1: flip stands twice",
        ),
    ],
)
def test_an_override_that_cannot_be_applied_is_quoted(override, said):
    assert refusal("paper", override).startswith(said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: [", "expected the node content"),
        ("- epochs", "must be a mapping"),
        ("3", "must be a mapping"),
        ("epochs: 3\ndistort: {flip: 0.0}\ndistort:\n  pad: 2", "line 3: distort stands twice"),
        ("epochs: 3\ndistort: {flip: 0.0, pad: 2, flip: 0.5}", "line 2: flip stands twice"),
        ("1: 2", "Keys should be strings, got 1"),
        ("\0", "special characters are not allowed"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(text, said, tmp_path):
    path = write(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"{path}: ") and said in message


def test_a_binary_file_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x80")
    assert refusal(path).startswith(f"{path}: 'utf-8' codec can't decode")


def test_an_unknown_recipe_comes_with_the_nearest_and_all():
    message = refusal("papr")
    assert "papr: neither a YAML file nor a shipped recipe" in message
    assert "did you mean paper?" in message and all(name in message for name in shipped())


def test_a_missing_file_is_named(tmp_path):
    assert refusal(tmp_path / "gone.yaml").startswith(f"{tmp_path / 'gone.yaml'}: neither a YAML file")


@pytest.mark.parametrize("tree", [None, [], {"epoch": 3}, {1: 2}])
def test_a_damaged_resolved_configuration_is_refused_with_its_place(tree):
    with pytest.raises(ConfigError, match="runs/x/config"):
        parse_config(tree, "runs/x/config.yaml")


# The folder's name


def test_default_folder_names_tell_runs_apart():
    changes = ["seed=1", "method=dml", "mix=cutmix", "views=shared", "data=cifar10", "peers.count=4", "peers.network=x"]
    changes += ["peers.network=[x, y]", "peers.network=[y, x]", "peers.form=branches"]
    folders = {load_config("paper", [*given]).folder for given in ([], *([change] for change in changes))}
    assert len(folders) == 1 + len(changes)


@pytest.mark.parametrize(
    ("keys", "peers"),
    [
        (["peers.network=resnet20", "peers.count=3"], "resnet20x3"),
        (["peers.network=[resnet20, wrn_16_2]"], "resnet20-wrn_16_2"),
        (["peers.network=resnet20", "peers.form=branches"], "resnet20x2-branches"),
    ],
)
def test_a_folder_is_named_after_its_peers(keys, peers):
    expected = Path(f"runs/cifar100-{peers}-cutnmix-cutnmix-per_peer-seed95")
    assert load_config("paper", keys).folder == expected


def test_a_name_is_the_folder_under_runs():
    assert load_config("paper", ["name=mine", "runs=there"]).folder == Path("there/mine")


def test_schedule_keys_without_a_meaning_are_refused():
    with pytest.raises(ConfigError, match=r"schedule\.milestones \(command line\): .*schedule.name: cosine"):
        load_config("paper", ["schedule=cosine", "schedule.milestones=[1]"])


# What goes with what

USED = {
    "none": set(),
    "cutmix": {"alpha", "probability", "box_rule"},
    "cutnmix": {"alpha", "probability", "box_rule"},
    "mixup": {"alpha", "probability"},
    "cutout": {"length"},
}


@pytest.mark.parametrize("mix", USED)
@pytest.mark.parametrize(
    ("key", "value"), [("alpha", 0.5), ("probability", 0.5), ("box_rule", "inside"), ("length", 5)]
)
def test_a_mix_takes_its_own_keys_and_no_others(mix, key, value):
    overrides = [f"mix={mix}", f"mix.{key}={value}"]
    if key in USED[mix]:
        assert getattr(load_config("paper", overrides).mix, key) == value
    else:
        assert refusal("paper", *overrides) == f"mix.{key} (command line): would do nothing under mix.name: {mix}"


def test_all_stray_keys_of_a_mix_are_named_at_once():
    message = refusal("paper", "mix=none", "mix.length=5", "mix.alpha=0.5")
    assert message == "mix.alpha (command line), mix.length (command line): would do nothing under mix.name: none"


def test_all_stray_keys_of_a_method_are_named_at_once():
    message = refusal("paper", "method=tf_kd", "method.teacher=runs/x", "method.teacher_peer=1")
    named = "method.teacher (command line), method.teacher_peer (command line)"
    assert message == f"{named}: would do nothing under method.variant: reg"


REFUSED = {
    "peers: {form: branches, count: 2}": "peers.count ({}): demanding needs at least 3 peers, got 2",
    "peers: {form: branches, network: [x, x]}": "peers.network ({}): demanding needs at least 3 peers, got 2",
    "peers: {form: nets, count: 3}": "peers.form ({}): demanding is defined for branches only, got 'nets'",
    "mix: mixup": "mix ({}), method ({}): mixup has no meaning with demanding: it is proud",
    "mix: cutout": "mix ({}), method ({}): cutout has no meaning with demanding: it is shy",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_a_method_needs_is_said_in_full(text, demanding, tmp_path):
    peers = "" if text.startswith("peers") else "\npeers: {form: branches, count: 3}"
    path = write(tmp_path, f"method: demanding\n{text}{peers}")
    assert refusal(path) == REFUSED[text].replace("{}", str(path))
    overrides = [f"{key}={value}" for key, value in flat(yaml.safe_load(text + peers)).items()]
    path = write(tmp_path, "")
    assert refusal(path, "method=demanding", *overrides) == REFUSED[text].replace("{}", "command line")


def test_a_method_that_gets_what_it_needs_is_content(demanding):
    config = load_config("paper", demanding)
    assert config.method == {"name": "demanding", "weight": 1.0} and config.needs is Demanding.needs
    for mix in ("none", "cutmix", "cutnmix"):
        assert load_config("paper", [*demanding, f"mix={mix}"]).mix.name == mix


def test_what_a_run_folder_holds_is_held_to_the_same_needs(demanding):
    tree = dump_config(load_config("paper", demanding))
    tree["peers"]["count"] = 2
    with pytest.raises(ConfigError, match=r"peers\.count \(runs/x/config\.yaml\): demanding needs at least 3 peers"):
        parse_config(tree, "runs/x/config.yaml")


# A method of one's own


class Positional(Demanding):
    def __init__(self, task, weight: float = 1.0):
        """Never built."""


class Untyped(Demanding):
    def __init__(self, task, *, weight=1.0):
        """Never built."""


class WithoutDefault(Demanding):
    def __init__(self, task, *, weight: float):
        """Never built."""


class WithoutTask(Demanding):
    def __init__(self, *, weight: float = 1.0):
        """Never built."""


class Postponed(Demanding):
    def __init__(self, task: "Unheard", *, weight: float = 1.0):  # noqa: F821 # pyright: ignore
        """As under `from __future__ import annotations`, with an import for type checkers alone."""


BREACHES = {
    "types that are not there": (
        Postponed,
        "the annotations of its constructor cannot be evaluated (NameError: name 'Unheard'",
    ),
    "no needs": (type("Own", (), {"predictions": Demanding.predictions}), "it has no `needs`: write needs = Needs()"),
    "no predictions": (type("Own", (), {"needs": Needs()}), "it has no `predictions`: write def predictions(self, "),
    "a positional key": (Positional, "its key weight is not keyword-only: write def __init__(self, task, *, weight: "),
    "a key without a type": (Untyped, "its key weight has no type, "),
    "a key without a default": (WithoutDefault, "its key weight has no default"),
    "no task": (WithoutTask, "its constructor takes no task: "),
}


@pytest.mark.parametrize("case", BREACHES)
def test_what_a_method_of_ones_own_lacks_is_said_in_one_line(case, monkeypatch):
    method, said = BREACHES[case]
    monkeypatch.setitem(METHODS, "own", method)
    message = refusal("paper", "method=own")
    assert message.startswith(f"method.name (command line): METHODS['own'] is no method: {said}")
    assert "\n" not in message


@pytest.mark.parametrize("name", METHODS)
def test_our_own_methods_lack_nothing(name):
    assert breach(METHODS[name]) is None


@pytest.mark.parametrize(
    ("override", "lines"),
    [
        ("data.classes=1", ["data.classes (command line): Input should be greater than or equal to 2, got 1"]),
        (
            "peers.network=[]",
            ["peers.network (command line): List should have at least 1 item after validation, not 0"],
        ),
        ("peers.network=[resnet20, 3]", ["peers.network (command line): Input should be a valid string, got 3"]),
        ("peers.network=3", ["Input should be a valid string, got 3", "Input should be a valid list, got 3"]),
        ("data.classes=cat", ["Input should be a valid integer", "Input should be a valid list, got 'cat'"]),
    ],
)
def test_a_value_of_one_of_a_keys_types_is_not_told_that_it_is_none_of_another(override, lines):
    told = refusal("quickstart", override).splitlines()
    assert len(told) == len(lines) and all(line in said for line, said in zip(lines, told, strict=True))


def test_a_method_that_a_run_does_not_import_may_be_ones_own(tmp_path):
    tree = dump_config(load_config("quickstart", ["method=dml"]))
    tree["method"]["name"] = "ensemble"
    with pytest.raises(
        ConfigError, match=r"^method\.name \(runs/x\): 'ensemble' is not .*own\? name its module in imports$"
    ):
        parse_config(tree, "runs/x")
    assert not refusal("quickstart", "method=ensemble", "imports=[json]").endswith("imports")


def test_a_group_on_the_command_line_is_its_keys_one_by_one():
    at_once = ["mix={alpha: 0.5}", "schedule={warmup_epochs: 2}", "distort={colour: {hue: 3}}", "data={classes: 5}"]
    apart = ["mix.alpha=0.5", "schedule.warmup_epochs=2", "distort.colour.hue=3", "data.classes=5"]
    assert load_config("quickstart", at_once) == load_config("quickstart", apart)
    assert load_config("quickstart", ["mix={}"]) == load_config("quickstart")
    named = load_config("quickstart", ["method={temperature: 2, name: dml}"])
    assert named == load_config("quickstart", ["method=dml", "method.temperature=2"])
    assert "method (" in refusal("quickstart", "method=null")


@pytest.mark.parametrize("text", [".=3", "data..root=3", ".data=3", "data.=3"])
def test_a_key_with_a_part_left_out_is_refused_as_it_stands(text):
    assert refusal("quickstart", text).startswith(f"{text}: write KEY=VALUE")


def test_a_method_without_a_name_is_told_so(tmp_path):
    assert refusal(write(tmp_path, "method: {temperature: 3}")).startswith(
        f"method ({tmp_path / 'recipe.yaml'}): name is"
    )


@pytest.mark.parametrize("key", ["name", "runs", "data.root"])
def test_a_null_character_is_in_no_path(key):
    told = refusal("quickstart", f'{key}="a\\0b"')
    assert told == f"{key} (command line): no file can have a name with a null character"


@pytest.mark.parametrize("name", ["mine.py", "../mine", "/mine", ".mine"])
def test_a_path_for_a_module_is_told_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace())
    assert f"write the name of a module, such as my_methods, not '{name}'" in refusal("quickstart", f"imports=[{name}]")


def test_a_module_that_ends_the_process_is_an_error_as_others_are(tmp_path, monkeypatch):
    (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert "'leaving' cannot be imported (SystemExit: 0)" in refusal("quickstart", "imports=[leaving]")


@pytest.mark.parametrize("text", ["epochs: [1", "a: 'b", "\x00", "a: b: c", "- @", "a: 1\na: 2", "2023-02-30"])
def test_what_is_no_yaml_is_told_in_one_line(text, tmp_path):
    told = refusal(write(tmp_path, text))
    assert told.startswith(f"{tmp_path / 'recipe.yaml'}: ") and "\n" not in told and "<unicode" not in told


def test_a_grid_is_no_recipe_and_the_reverse():
    grid, recipe = GRIDS / "s1.yaml", shipped()["quickstart"]
    assert refusal(grid) == f"{grid}: is a grid of runs: cutnmix reproduce {grid}"
    with pytest.raises(ConfigError, match=f"^{recipe}: is the recipe of one run: cutnmix train {recipe}$"):
        load_grid(str(recipe))
