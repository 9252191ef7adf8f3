"""The contract between a method and the rest: what it may ask for, what it is built for, what it answers."""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from pydantic import AfterValidator, Field
from torch import Tensor

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.exchange import ALONE, Exchange

# What a key of a method may be, of finite numbers. A configuration is held to it before any data is read.
Temperature = Annotated[float, Field(ge=1e-3, le=1e4)]  # so that T, 1 / T and T^2 are finite in float32
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, lt=1)]  # neither none nor all
Size = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]  # counted from 0
RunPath = Annotated[str, AfterValidator(lambda path: path and os.path.abspath(os.path.expanduser(path)))]


class Needs(NamedTuple):
    """What a method asks of the other keys of a configuration. Checked before any work is done."""

    paper: str = ""  # authors, venue, year: what `cutnmix methods` shows
    min_peers: int = 1
    min_images: int = 1  # of a batch, where a process sees them: what its batch norms need
    form: Literal["branches"] | None = None  # the only peers.form that it is defined for
    second: Literal["image", "class"] | None = None  # a second view of each image, or of another one of its class
    refuses: Mapping[str, str] = {}  # mix.name -> why the two have no meaning together
    whole: Mapping[str, str] = {}  # axis of the mesh, data or peer -> why it cannot be split along that
    of_variant: Mapping[str, str] = {}  # key of the method -> the only `variant` under which it does something
    predicts: int = 0  # passes of an image through a network without gradients, beside the trained one; a teacher's not


class Task(NamedTuple):
    """What a method is built for."""

    J: int  # peers
    K: int  # classes
    feature_dims: tuple[int, ...]  # (D_0, ..., D_{J-1})
    trunk_dim: int | None  # E, of branches
    num_images: int  # N of the training set
    epochs: int
    peers: Peers | None  # with their initial weights; only for a method that copies them
    over: Exchange = ALONE  # with the processes that hold the other peers, or see the other images of a batch
    size: tuple[int, int] | None = None  # (H, W) of the views, where known
    data: Mapping[str, Sequence[str | float]] = {}  # classes (K names), mean and std of the training set, where known

    @property
    def own(self) -> range:
        """The numbers of the peers whose outputs come in: of all, but where they live in several processes."""
        return self.over.own(self.J)


def keys_of(method: type) -> dict[str, tuple[Any, Any]]:
    """The YAML keys of a method, its keyword-only arguments: name -> (type, default)."""
    parameters = _parameters(method)
    return {p.name: (p.annotation, p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}


def _parameters(method: Any) -> list[inspect.Parameter]:
    return [*inspect.signature(method, eval_str=True).parameters.values()]


def breach(method: Any) -> str | None:
    """What keeps a class from being a method, as far as it shows before one is built; None: nothing."""
    if not isinstance(getattr(method, "needs", None), Needs):
        return "it has no `needs`: write needs = Needs() in the class, with what the method asks for"
    if not callable(getattr(method, "predictions", None)):
        return "it has no `predictions`: write def predictions(self, outputs, batch): return {}"
    try:
        parameters = _parameters(method)
    except Exception as error:  # annotations are anybody's code
        return f"the annotations of its constructor cannot be evaluated ({type(error).__name__}: {error})"
    if not parameters or parameters[0].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return "its constructor takes no task: write def __init__(self, task, *, KEY: TYPE = DEFAULT)"
    for key in parameters[1:]:
        if key.kind is not key.KEYWORD_ONLY:
            return f"its key {key.name} is not keyword-only: write def __init__(self, task, *, {key.name}: TYPE = ...)"
        if key.annotation is key.empty:
            return f"its key {key.name} has no type, which says what is allowed: write {key.name}: NotNegative = ..."
        if key.default is key.empty:
            return f"its key {key.name} has no default"
    return None


class Method(Protocol):
    """An nn.Module, so that optimizer, device, compile and checkpoint need to know no more than that.

    Built as `METHODS[name](task, **keys)`: keyword-only arguments are the YAML keys under `method`, each with a
    default, its paper's or its authors' code's, and a type that says which values make sense, such as NotNegative.
    trainer/config.py refuses a configuration with others; who calls the class is believed. What only the task or
    another key can tell is a ValueError that names the key. Parameters are trained unless they ask for no gradient;
    buffers are what it remembers, and are in every checkpoint.

    A run may split peers and batches over processes, see exchange.py. Then outputs, targets and batch are those of the
    own peers and images, each loss is the sum over the own peers of a mean over the own images, and what needs others
    asks `task.over`; a method that cannot do with that says so in `needs.whole`. Modules of one peer are named by the
    peer's number (models.peers.by_number); a parameter that holds several peers' parts is named in `of_peers`.
    """

    needs: Needs
    of_peers: Mapping[str, tuple[int, Sequence[int]]]  # name -> axis, sizes along it of the parts of all J; or absent

    def __init__(self, task: Task) -> None: ...

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """Named scalar losses, already weighted; the step adds them up and calls backward once. No `total`, no `top1`.

        Each is a SUM over peers, so that peer j gets the gradient of its own objective L^j, whatever J is.
        At least float32, whatever autocast does around it. `peers` is for the methods that run the networks on more
        images than the batch's own (`batch.second_VBCHW`), or follow their weights; most do not look at it.
        """
        ...

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Logits (B, K) that the evaluation scores beside the peers, by name: a teacher, a leader. Often {}.

        Not by the evaluation's own names: peer0, peer1, ..., mean, best_peer, ensemble.

        Called as `forward` is: in eval mode, within the autocast that the peers ran in.
        """
        ...
