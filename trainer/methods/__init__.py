"""Methods: what peers learn from one another. One file each, one line each in METHODS.

A method is an nn.Module (optimizer, device, compile and checkpoint need to know no more than that) that keeps this
contract; tests/test_methods.py holds every entry of METHODS to it.
"""

from typing import Protocol

from torch import Tensor

from cutnmix.models.peers import Outputs, Sizes
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.methods.baseline import Baseline
from cutnmix.trainer.methods.cutnmix import CutnMixDistillation
from cutnmix.trainer.methods.dml import DML


class Method(Protocol):
    """Built as `METHODS[name](sizes, **keys)`: keyword-only arguments are the YAML keys under `method`.

    Each has a type and a default, the paper's. A value that makes no sense is a ValueError that names its key.
    """

    def __init__(self, sizes: Sizes) -> None: ...

    def forward(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Named scalar losses, already weighted; the step adds them up and calls backward once.

        Each is a SUM over peers, so that peer j gets the gradient of its own objective L^j, whatever J is.
        At least float32, whatever autocast does around it.
        """
        ...

    def teacher(self, outputs: Outputs) -> Tensor | None:
        """Logits (B, K) of the teacher that the method trains, for the evaluation; None where there is none."""
        ...


METHODS: dict[str, type] = {
    "baseline": Baseline,
    "dml": DML,
    "cutnmix": CutnMixDistillation,
}
