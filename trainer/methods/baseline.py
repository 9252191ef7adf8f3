"""The baseline: every peer alone, on cross-entropy.

    L^j = CE(z^j, y)

J = 1 is ordinary training; J > 1 is J runs at the price of one loader, and the fair control for a method with J peers:
same views, same mix, same steps, no exchange. Soft targets, so CutMix on top of it is `mix: cutmix`.
"""

from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import cross_entropy
from cutnmix.trainer.method import Needs, Task


class Baseline(nn.Module):
    """{"ce"}; no keys, any J."""

    needs = Needs()

    def __init__(self, task: Task) -> None:
        super().__init__()

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """The sum of CE_j over peers, so each peer trains as if it were alone."""
        return {"ce": cross_entropy(outputs.logits_JBK, batch.target_LBK).sum()}

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """None but the peers'."""
        return {}
