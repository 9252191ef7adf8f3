"""From a Config to the parts of a run: data, loaders, peers, method, optimizer, step. Bad ones are refused here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cutnmix.models import check_name
from cutnmix.models.cost import blueprint, branches_cost, check_image_size, trains_on_one
from cutnmix.models.peers import Peers, seeded
from cutnmix.pipeline.dataset import Dataset, Splits
from cutnmix.pipeline.datasets import TestImages, load_splits
from cutnmix.pipeline.distort import view_size
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Mix
from cutnmix.pipeline.loader import Loader, check_decoder, default_threads, make_loader
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Plan, part_of
from cutnmix.trainer.device import Setting, choose, compile_modules
from cutnmix.trainer.keys import Config, ConfigError, Data
from cutnmix.trainer.mesh import ONE, Mesh
from cutnmix.trainer.method import Task
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.norm import synchronise
from cutnmix.trainer.schedule import never_reached
from cutnmix.trainer.step import Learner, Step

METHOD_STREAM = 0x6D657468  # "meth": keeps a method's initial weights apart from the peers'


@dataclass(frozen=True)
class Parts:
    """All that the training loop and the evaluation work with."""

    config: Config
    setting: Setting
    notes: list[str]  # lines for the user
    splits: Splits
    loader: Loader
    test_loader: Loader
    learner: Learner
    step: Step
    test_step: Step
    mesh: Mesh = ONE

    @property
    def own(self) -> range:
        """The numbers of the peers that live here."""
        return self.mesh.over.own(self.config.peers.count)

    def plan(self, epoch: int) -> Plan:
        """The training plan of an epoch, on the device: what this process executes of it."""
        config, train = self.config, self.splits.train
        plan = make_plan(
            seed=config.seed,
            epoch=epoch,
            num_images=len(train),
            size=view_size(train, config.distort),
            batch_size=config.batch_size,
            distort=config.distort,
            mix=config.mix,
            num_views=config.num_views,
            num_peers=config.peers.count,
            second=config.needs.second,
            label_N=train.labels,
            files=not train.in_memory,
            drop_last=config.drop_last,
        )
        if self.mesh.size > 1:
            plan = plan.shard(self.mesh.data_index, self.mesh.data, self.own)
        return plan.to(self.setting.device)

    def test_plan(self) -> Plan:
        """The test images in order, one view for all peers, nothing random: this process's part of them."""
        config, test = self.config, self.splits.test
        part = part_of(len(test), self.mesh.data_index, self.mesh.data)
        plan = make_plan(
            seed=config.seed,
            epoch=0,
            num_images=len(part),
            size=view_size(test, config.distort),
            batch_size=_share(config.eval_batch_size, self.mesh),
            distort=config.distort.evaluation(),
            mix=Mix(),
            num_views=1,
            num_peers=1,
            files=not test.in_memory,
            shuffle=False,
        )
        return replace(plan, index_N=plan.index_N + part.start).to(self.setting.device)

    def close(self) -> None:
        """Release the loaders' threads."""
        self.loader.close()
        self.test_loader.close()


def build(config: Config, mesh: Mesh = ONE, test: TestImages = "test") -> Parts:
    """Everything that this process has, on the device and checked; nothing is written.

    `test`: what the peers are scored on, see load_splits.

    Raises:
        ConfigError, DataError: naming the key or the file.
    """
    setting = choose(config)
    try:
        for name in config.peers.networks:  # before data is downloaded for a misspelt one
            check_name(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    splits = load_data(config.data, test)
    check_decoder(splits.train)
    if config.data.corrupt == "skip":
        from cutnmix.pipeline.check import without_corrupt  # here, because platforms without DALI can do without it

        splits = Splits(*(without_corrupt(split) for split in splits))
    if config.drop_last and len(splits.train) < config.batch_size:
        raise ConfigError(
            f"batch_size: {config.batch_size} is more than the {len(splits.train)} training images, "
            f"and drop_last drops a batch that is not full"
        )
    _check_parts(config, splits, setting, mesh)
    _check_lengths(config, splits.train)
    left_out = [_left_out(split) for split in splits if split.left_out]
    notes = [*setting.notes, *never_reached(config.schedule, config.epochs)]
    notes += [*_checked_networks(config, splits.train), *left_out]
    _check_single(config, splits.train, mesh)
    train = splits.train
    data = {"classes": train.classes, "mean": train.mean, "std": train.std}
    learner = make_learner(
        config,
        setting,
        num_classes=len(train.classes),
        num_images=len(train),
        mesh=mesh,
        size=view_size(train, config.distort),
        data=data,
    )
    graphed = config.images_per_step if setting.compile == "graph" else None
    step = _step(config, splits.train, setting, mesh, graphed)
    test_step = _step(config, splits.test, setting, mesh)
    compile_modules(setting.compile, *learner.peers.compile_units(), learner.method, step.mix, test_step.mix)

    def loader(split: Dataset, distort, num_views: int, batch_size: int) -> Loader:
        return make_loader(
            config.loader.name,
            split,
            distort,
            setting.device,
            num_views=num_views,
            batch_size=min(batch_size, 2 * len(split)),  # all, and their second views
            num_threads=config.loader.threads or default_threads(split, setting.device),
            prefetch=config.loader.prefetch,
        )

    return Parts(
        config=config,
        setting=setting,
        notes=notes,
        splits=splits,
        loader=loader(
            splits.train,
            config.distort,
            1 if config.num_views == 1 else len(mesh.over.own(config.num_views)),
            config.images_per_step // mesh.data,
        ),
        test_loader=loader(splits.test, config.distort.evaluation(), 1, _share(config.eval_batch_size, mesh)),
        learner=learner,
        step=step,
        test_step=test_step,
        mesh=mesh,
    )


def load_data(data: Data, test: TestImages = "test") -> Splits:
    """What the keys under `data` name, with `test` as in load_splits."""
    return load_splits(
        data.name,
        data.root,
        classes=data.classes,
        images_per_class=data.images_per_class,
        download=data.download,
        train=data.train,
        val=data.val,
        test=test,
    )


def _share(batch_size: int, mesh: Mesh) -> int:
    """The part of an evaluation batch that a process sees."""
    return max(1, batch_size // mesh.data)


def _check_parts(config: Config, splits: Splits, setting: Setting, mesh: Mesh) -> None:
    """Refuse parts without images, and what processes with different peers would have to agree on."""
    left_over = _left_over(config, splits.train)
    if 0 < left_over < mesh.data:
        raise ConfigError(
            f"mesh.data: the last batch of an epoch has {left_over} images, too few for {mesh.data} processes; "
            f"drop_last=true leaves it out"
        )
    if len(splits.test) < mesh.data:
        raise ConfigError(f"mesh.data: {len(splits.test)} test images are too few for {mesh.data} processes")
    if mesh.size > 1 and setting.compile == "graph":
        raise ConfigError("compile: graph captures one process's step; with a mesh write auto, none, peers or step")
    if mesh.peer > 1 and setting.dtype == torch.float16:
        raise ConfigError(
            "precision: fp16 skips a step where a gradient overflows, and peers of several processes (mesh.peer) would "
            "skip apart; use bf16 or fp32"
        )


def _check_lengths(config: Config, train: Dataset) -> None:
    """Refuse holes larger than a view, and padding that leaves views without a pixel of their image."""
    distort, mix, (height, width) = config.distort, config.mix, view_size(train, config.distort)
    side = min(height, width)
    hole = ("mix.length", mix.length) if mix.name == "cutout" else ("distort.cutout", distort.cutout)
    padding = ("distort.pad", distort.pad if train.in_memory else 0)
    for (key, length), most in ((hole, side), (padding, side - 1)):
        if length and length > most:
            raise ConfigError(f"{key}: {length} pixels are too many for views of {height} x {width}; at most {most}")


def _left_over(config: Config, train: Dataset) -> int:
    """The images of an epoch's last batch where that is not full, or 0."""
    return 0 if config.drop_last else len(train) % config.batch_size


def _check_single(config: Config, train: Dataset, mesh: Mesh) -> None:
    """Refuse batches of one image where networks, which take the views, or the method cannot train on one."""
    left_over = _left_over(config, train)
    synchronised = config.mesh.sync_batch_norm and mesh.data > 1
    if synchronised or (left_over or config.batch_size) // mesh.data > 1:
        return
    num_classes, size = len(train.classes), view_size(train, config.distort)
    names = [name for name in dict.fromkeys(config.peers.networks) if not trains_on_one(name, num_classes, size)]
    if config.needs.min_images > 1:
        names.append(config.method["name"])
    if names:
        batch, advice = "a batch", "2 or more are needed"
        if left_over:
            batch, advice = "the last batch of an epoch", "drop_last=true leaves it out"
        raise ConfigError(
            f"batch_size: {batch} has 1 image{' a process' * (config.num_processes > 1)}, too few for "
            f"{' and '.join(names)} to train on; {advice}"
        )


def _step(config: Config, split: Dataset, setting: Setting, mesh: Mesh, graphed: int | None = None) -> Step:
    mix = MixBatch(
        mean=split.mean,
        std=split.std,
        size=view_size(split, config.distort),
        num_classes=len(split.classes),
        dtype=setting.dtype,
        channels_last=config.channels_last,
    ).to(setting.device)
    compiled = setting.compile == "step"
    return Step(mix, setting.device.type, setting.dtype, compiled=compiled, graphed=graphed, over=mesh.over)


def _left_out(split: Dataset) -> str:
    """What `data.corrupt: skip` skipped, as a line for the user."""
    names, total = split.left_out, len(split) + len(split.left_out)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{split.name}: left out {len(names)} of {total} images, which do not decode: {', '.join(names[:3])}{more}"


def _checked_networks(config: Config, train: Dataset) -> list[str]:
    """Refuse networks that do not take the views; what branches save, as a line for the user."""
    peers, num_classes, size = config.peers, len(train.classes), view_size(train, config.distort)
    if (channels := len(train.mean)) != 3:
        raise ConfigError(f"data.name: {train.name} has {channels} channel(s), and networks take 3; repeat a grey one")
    try:
        if peers.form == "nets":
            for name in dict.fromkeys(peers.networks):
                check_image_size(name, num_classes, size)
            return []
        costs = branches_cost(peers.networks[0], peers.count, num_classes, size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    nets, cut = costs.nets, costs.shared if config.views == "shared" else costs.per_peer
    return [
        f"{peers.count} branches of {peers.networks[0]}: {cut.parameters:,} parameters "
        f"({cut.parameters / nets.parameters:.0%} of whole networks'), "
        f"{cut.macs / 1e6:,.1f} M MACs an image ({cut.macs / nets.macs:.0%})"
    ]


def make_learner(
    config: Config,
    setting: Setting,
    *,
    num_classes: int,
    num_images: int,
    mesh: Mesh = ONE,
    size: tuple[int, int] | None = None,
    data: Mapping[str, Sequence[str | float]] = {},
) -> Learner:
    """Peers, method and optimizer as this process has them, on the device, for a training set of so many images.

    `size`, `data`: see Task.

    Raises:
        ConfigError: for a network or a key of the method that cannot be.
    """
    networks, over = config.peers.networks, mesh.over
    own = over.own(len(networks))
    try:
        peers = Peers(networks, num_classes=num_classes, seed=config.seed, form=config.peers.form, own=own)
        task = Task(
            J=len(networks),
            K=num_classes,
            feature_dims=_feature_dims(networks, num_classes) if len(own) < len(networks) else peers.feature_dims,
            trunk_dim=peers.trunk_dim,
            num_images=num_images,
            epochs=config.epochs,
            peers=peers,
            over=over,
            size=size,
            data=data,
        )
        keys: dict[str, Any] = {key: value for key, value in config.method.items() if key != "name"}
        with seeded(config.seed, METHOD_STREAM):
            method: Any = METHODS[config.method["name"]](task, **keys)
        if config.mesh.sync_batch_norm and mesh.data > 1 and mesh.data_group is not None:
            for module in (peers, method):
                synchronise(module, mesh.data_group)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    peers, method = peers.to(setting.device), method.to(setting.device)
    if config.channels_last:
        for module in (peers, method):  # a method may hold networks: a teacher, moving averages
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in torch's stub)
    optimizer = torch.optim.SGD(
        [
            (f"{part}.{name}", p)  # named, so that another mesh finds them in a checkpoint
            for part, module in (("peers", peers), ("method", method))
            for name, p in module.named_parameters()
            if p.requires_grad
        ],
        lr=config.optimizer.lr,
        momentum=config.optimizer.momentum,
        nesterov=config.optimizer.nesterov,
        weight_decay=config.optimizer.weight_decay,
        fused=True,  # one kernel for all tensors; under fp16 the only form that skips an overflow without a host sync
    )
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.dtype == torch.float16)
    learner = Learner(peers, method, optimizer, scaler)
    if scaler.is_enabled():
        learner.make_momentum()
    return learner


def _feature_dims(networks: list[str], num_classes: int) -> tuple[int, ...]:
    """(D_0, ..., D_{J-1}), also of peers that live elsewhere."""
    dims: dict[str, Any] = {name: blueprint(name, num_classes).feature_dim for name in dict.fromkeys(networks)}
    return tuple(dims[name] for name in networks)
