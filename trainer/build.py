"""From a Config to the parts of a run: data, loaders, peers, method, optimizer, step. Bad ones are refused here."""

from dataclasses import dataclass
from typing import Any

import torch

from cutnmix.models.cost import branches_cost, check_image_size
from cutnmix.models.peers import Peers, seeded
from cutnmix.pipeline.datasets import Dataset, Splits, load_splits
from cutnmix.pipeline.distort import view_size
from cutnmix.pipeline.loader import Loader, default_threads, make_loader
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Mix, Plan, make_plan
from cutnmix.trainer.config import Config, ConfigError
from cutnmix.trainer.device import Setting, choose, compile_modules
from cutnmix.trainer.method import Task
from cutnmix.trainer.methods import METHODS
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

    def plan(self, epoch: int) -> Plan:
        """The training plan of an epoch, on the device."""
        config, train = self.config, self.splits.train
        return make_plan(
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
        ).to(self.setting.device)

    def test_plan(self) -> Plan:
        """The test images in order, one view for all peers, nothing random."""
        config, test = self.config, self.splits.test
        return make_plan(
            seed=config.seed,
            epoch=0,
            num_images=len(test),
            size=view_size(test, config.distort),
            batch_size=config.eval_batch_size,
            distort=config.distort.evaluation(),
            mix=Mix(),
            num_views=1,
            num_peers=1,
            files=not test.in_memory,
            shuffle=False,
        ).to(self.setting.device)

    def close(self) -> None:
        """Release the loaders' threads."""
        self.loader.close()
        self.test_loader.close()


def build(config: Config) -> Parts:
    """Everything, on the device and checked; nothing is written.

    Raises:
        ConfigError, DataError: naming the key or the file.
    """
    setting = choose(config)
    data = config.data
    splits = load_splits(
        data.name,
        data.root,
        classes=data.classes,
        images_per_class=data.images_per_class,
        download=data.download,
        train=data.train,
        val=data.val,
    )
    if data.corrupt == "skip":
        from cutnmix.pipeline.check import without_corrupt  # here, because platforms without DALI can do without it

        splits = Splits(*(without_corrupt(split) for split in splits))
    if config.drop_last and len(splits.train) < config.batch_size:
        raise ConfigError(
            f"batch_size: {config.batch_size} is more than the {len(splits.train)} training images, "
            f"and drop_last drops a batch that is not full"
        )
    left_out = [_left_out(split) for split in splits if split.left_out]
    notes = [*setting.notes, *_checked_networks(config, splits.train), *left_out]
    learner = _learner(config, splits.train, setting)
    step = _step(config, splits.train, setting, graphed=config.images_per_step if setting.compile == "graph" else None)
    test_step = _step(config, splits.test, setting)
    compile_modules(setting.compile, *learner.peers.compile_units(), learner.method, step.mix, test_step.mix)

    def loader(split: Dataset, distort, num_views: int, batch_size: int) -> Loader:
        return make_loader(
            config.loader.name,
            split,
            distort,
            setting.device,
            num_views=num_views,
            batch_size=batch_size,
            num_threads=config.loader.threads or default_threads(split, setting.device),
            prefetch=config.loader.prefetch,
        )

    return Parts(
        config=config,
        setting=setting,
        notes=notes,
        splits=splits,
        loader=loader(splits.train, config.distort, config.num_views, config.images_per_step),
        test_loader=loader(splits.test, config.distort.evaluation(), 1, config.eval_batch_size),
        learner=learner,
        step=step,
        test_step=test_step,
    )


def _step(config: Config, split: Dataset, setting: Setting, graphed: int | None = None) -> Step:
    mix = MixBatch(
        mean=split.mean,
        std=split.std,
        size=view_size(split, config.distort),
        num_classes=len(split.classes),
        dtype=setting.dtype,
        channels_last=config.channels_last,
    ).to(setting.device)
    return Step(mix, setting.device.type, setting.dtype, compiled=setting.compile == "step", graphed=graphed)


def _left_out(split: Dataset) -> str:
    """What `data.corrupt: skip` skipped, as a line for the user."""
    names, total = split.left_out, len(split) + len(split.left_out)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{split.name}: left out {len(names)} of {total} images, which do not decode: {', '.join(names[:3])}{more}"


def _checked_networks(config: Config, train: Dataset) -> list[str]:
    """Refuse networks that do not take the views; what branches save, as a line for the user."""
    peers, num_classes, size = config.peers, len(train.classes), view_size(train, config.distort)
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


def _learner(config: Config, train: Dataset, setting: Setting) -> Learner:
    num_classes = len(train.classes)
    try:
        peers = Peers(config.peers.networks, num_classes=num_classes, seed=config.seed, form=config.peers.form)
        task = Task(
            J=len(peers),
            K=num_classes,
            feature_dims=peers.feature_dims,
            trunk_dim=peers.trunk_dim,
            num_images=len(train),
            epochs=config.epochs,
            peers=peers,
        )
        keys: dict[str, Any] = {key: value for key, value in config.method.items() if key != "name"}
        with seeded(config.seed, METHOD_STREAM):
            method: Any = METHODS[config.method["name"]](task, **keys)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    peers, method = peers.to(setting.device), method.to(setting.device)
    if config.channels_last:
        for module in (peers, method):  # a method may hold networks: a teacher, moving averages
            module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (missing in torch's stub)
    optimizer = torch.optim.SGD(
        [p for p in (*peers.parameters(), *method.parameters()) if p.requires_grad],
        lr=config.optimizer.lr,
        momentum=config.optimizer.momentum,
        nesterov=config.optimizer.nesterov,
        weight_decay=config.optimizer.weight_decay,
        fused=True,  # one kernel for all tensors; under fp16 the only form that skips an overflow without a host sync
    )
    scaler = torch.amp.GradScaler(setting.device.type, enabled=setting.dtype == torch.float16)
    return Learner(peers, method, optimizer, scaler)
