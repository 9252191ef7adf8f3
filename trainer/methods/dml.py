"""Deep mutual learning: Zhang, Xiang, Hospedales, Lu, CVPR 2018, arXiv:1706.00384.

    L^j = CE(z^j, y) + alpha T^2 / (J - 1) sum_{k != j} KL(p^k || p^j),    p = softmax(z / T), p^k held fixed

With T = 1 and alpha = 1 the paper's objective; T and alpha as in Eq. 4 of CutnMix (arXiv:2206.12370v2).
By hand, one image, T = 1, p^1 = (1/2, 1/2), p^2 = (1/4, 3/4):
    KL(p^2 || p^1) = 1/4 ln 1/2 + 3/4 ln 3/2 = 0.1308 is peer 1's term, KL(p^1 || p^2) = 1/2 ln 4/3 = 0.1438 peer 2's.

Source: the paper and the authors' YingZhangDUT/Deep-Mutual-Learning. Deviations and readings:
- All peers step at once, on the same batch and from the same forward passes. The authors' code updates one net after
  the other, each on a fresh batch.
- Divided by J - 1 as in the paper; the authors' code does not divide. The same at J = 2.
- The paper has no temperature, so the default is 1. Public reimplementations differ here (T = 2 or 3 with T^2).
- The others are detached, as the authors take each net's gradient with respect to its own weights alone.
- No epsilon within the logarithm: log-softmax needs none.
"""

from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import cross_entropy, mutual_kl
from cutnmix.trainer.method import Needs, NotNegative, Task, Temperature


class DML(nn.Module):
    """{"ce", "dml"}; "dml" is left out where alpha = 0."""

    needs = Needs("Zhang et al., CVPR 2018", min_peers=2)

    def __init__(self, task: Task, *, temperature: Temperature = 1.0, alpha: NotNegative = 1.0) -> None:
        super().__init__()
        self.temperature, self.alpha, self.over = temperature, alpha, task.over

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """Both are sums over peers, and with the others detached peer j gets exactly the gradient of L^j."""
        losses = {"ce": cross_entropy(outputs.logits_JBK, batch.target_LBK).sum()}
        if self.alpha:
            losses["dml"] = self.alpha * mutual_kl(outputs.logits_JBK, self.temperature, self.over).sum()
        return losses

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """None but the peers'."""
        return {}
