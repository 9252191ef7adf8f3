"""What a run predicts of each image, as a value and as a file that stands for the run.

The file is safetensors, one integer an image: `label`, and `of.NAME` for every name of metrics.predict (of.peer0, ...,
of.ensemble, and the method's own, such as of.teacher). Its metadata, all strings, say what that is of:

    predictions    "1", the version of this format
    run            the name of the run's folder
    config         its configuration, JSON, without the places of its machine (runs, data.root)
    checkpoint     last or best: which of its checkpoints
    epochs         that it had trained
    on             test or unused: the images, see load_splits
    digest         of these images and their labels, see Dataset.digest
    cutnmix        the version that wrote it

So runs that were trained on several machines can be put beside each other on one that has neither their checkpoints nor
their data.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cutnmix.pipeline.datasets import TestImages
from cutnmix.trainer.config import dump_config, parse_config
from cutnmix.trainer.folder import RunError, RunFolder, name_of, write_atomically
from cutnmix.trainer.keys import Config
from cutnmix.trainer.metrics import is_peer, predict
from cutnmix.trainer.run import trained

_VERSION = "1"
_OF = "of."  # before a prediction's name, so that none can be taken for the labels


class Predicted(NamedTuple):
    """The predictions of one run on N images."""

    run: str  # the folder's name
    config: Config
    checkpoint: str  # last or best
    epochs: float
    on: TestImages
    digest: str  # of the images and their labels
    label_N: np.ndarray
    class_N: dict[str, np.ndarray]  # by name: peer0, ..., ensemble, the method's own

    def hits(self) -> dict[str, np.ndarray]:
        """Of each image the share of the peers that are right about it (`mean`), and 1 or 0 for what is no peer.

        float64 (N,) each: `mean`, `ensemble`, then the method's own.
        """
        hit_N = {name: (class_N == self.label_N).astype(np.float64) for name, class_N in self.class_N.items()}
        mean_N = np.mean([found_N for name, found_N in hit_N.items() if is_peer(name)], axis=0)
        return {"mean": mean_N} | {name: found_N for name, found_N in hit_N.items() if not is_peer(name)}


def predict_run(
    run: Path, *, best: bool = False, test: TestImages = "test", root: Path | None = None, device: str | None = None
) -> Predicted:
    """The predictions of a run's last checkpoint, or of best.pt, on the images that `test` names; see run.trained.

    Raises: RunError where there is no such checkpoint.
    """
    labels: list[torch.Tensor] = []
    found: dict[str, list[torch.Tensor]] = {}
    with trained(run, best=best, test=test, root=root, device=device) as (parts, epochs):
        plan = parts.test_plan()
        for log_probs, label_B in predict(parts.learner, parts.test_step, parts.test_loader.epoch(plan), plan):
            labels.append(label_B)
            for name, log_prob_BK in log_probs.items():
                found.setdefault(name, []).append(log_prob_BK.argmax(-1))
        images = parts.splits.test
    return Predicted(
        name_of(run),
        RunFolder(run).read_config(),  # its own, where it was scored on another device
        "best" if best else "last",
        epochs,
        test,
        images.digest(),
        torch.cat(labels).cpu().numpy(),
        {name: torch.cat(parts_of_N).cpu().numpy() for name, parts_of_N in found.items()},
    )


def write(path: Path, predicted: Predicted) -> None:
    """Leave a file that stands for the run, whole or not at all. Raises: RunError."""
    arrays = {"label": predicted.label_N} | {f"{_OF}{name}": found for name, found in predicted.class_N.items()}
    small = all(array.max(initial=0) < 256 for array in arrays.values())
    dtype = torch.uint8 if small else torch.int32
    config = dump_config(predicted.config)
    del config["runs"], config["data"]["root"]
    metadata = {
        "predictions": _VERSION,
        "run": predicted.run,
        "config": json.dumps(config),
        "checkpoint": predicted.checkpoint,
        "epochs": repr(predicted.epochs),
        "on": predicted.on,
        "digest": predicted.digest,
        "cutnmix": version("cutnmix"),
    }
    write_atomically(path, save({key: torch.from_numpy(array).to(dtype) for key, array in arrays.items()}, metadata))


def read(path: Path) -> Predicted:
    """What `write` left.

    Raises:
        RunError: it is no such file, or damaged.
        ConfigError: its configuration is none that this version knows.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            if "predictions" not in facts:
                raise ValueError("its metadata say nothing of predictions")
            if facts["predictions"] != _VERSION:
                raise ValueError(f"its format is {facts['predictions']!r}, not {_VERSION!r}")
            arrays = {key: file.get_tensor(key).long().numpy() for key in file.keys()}
        label_N, tree = arrays.pop("label"), json.loads(facts["config"])
        class_N = {key.removeprefix(_OF): array for key, array in arrays.items()}
        test, checkpoint, epochs = facts["on"], facts["checkpoint"], float(facts["epochs"])
        known = get_args(TestImages)
        if test not in known or checkpoint not in ("last", "best"):
            raise ValueError(f"its predictions are of {checkpoint!r} on {test!r}")
        if not label_N.size or any(array.shape != (label_N.size,) for array in (label_N, *class_N.values())):
            raise ValueError("it has not one number an image")
        if not {"peer0", "ensemble"} <= class_N.keys():
            raise ValueError("it lacks the peers or their ensemble")
        run, digest = facts["run"], facts["digest"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else f"{error}"
        raise RunError(f"{path} is damaged, or no file of cutnmix compare --keep ({reason})") from error
    config = parse_config(tree, str(path), alone=True)  # predictions need neither the method nor its module
    return Predicted(run, config, checkpoint, epochs, known[known.index(test)], digest, label_N, class_N)
