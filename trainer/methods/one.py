"""ONE, on-the-fly native ensemble: Lan, Zhu, Gong, NeurIPS 2018, arXiv:1806.04606.

    L = sum_j CE(z^j, y) + CE(z^e, y) + w(e) sum_j T^2 KL(softmax(z^e / T) || softmax(z^j / T))
    z^e = sum_j g_j z^j,    g = softmax(relu(BN(W mean_hw(map) + b)))

The peers are branches on one trunk; the gate g (J numbers an image) reads the trunk's map; w is the ramp-up of
losses.ramp_up over the first 80 epochs; T = 3.

Source: the paper and the authors' Lan1991Xu/ONE_NeurIPS2018. Readings and deviations:
- z^e is held fixed in the KL, as the authors do by wrapping it anew. The copy of ONE in DefangChen/OKDDip lets the
  gradient through. The gate learns from CE(z^e, y) alone, which reaches the peers and the trunk as well.
- No epsilon within the logarithm: log-softmax needs none.
- The authors pool the map by 16 x 16, which is all of it for their ResNets; here it is always all of it.
- All branches see the same view in the paper (`views: shared`). Where they see their own, the gate reads the mean.
- The paper has three branches (`peers.count: 3`), CutnMix compares with two.
- The heads are those of the base network; the copy in OKDDip gives VGG's branches a dropout that the base lacks.
"""

from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import at_least_float32, cross_entropy, kl, ramp_up
from cutnmix.trainer.method import Needs, NotNegative, Task, Temperature


class ONE(nn.Module):
    """{"ce", "teacher_ce", "kl"}; "kl" is left out where weight = 0."""

    needs = Needs(
        "Lan et al., NeurIPS 2018",
        min_images=2,
        min_peers=2,
        form="branches",
        whole={"peer": "its branches share one trunk"},
    )

    def __init__(
        self, task: Task, *, temperature: Temperature = 3.0, weight: NotNegative = 1.0, ramp_epochs: NotNegative = 80.0
    ) -> None:
        super().__init__()
        assert task.trunk_dim is not None  # `needs` says branches
        self.temperature, self.weight, self.ramp_epochs = temperature, weight, ramp_epochs
        self.gate = nn.Sequential(nn.Linear(task.trunk_dim, task.J), nn.BatchNorm1d(task.J), nn.ReLU())

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """Sums over peers, and the teacher's own cross-entropy against the mean target."""
        teacher_BK = self.teacher(outputs)
        losses = {
            "ce": cross_entropy(outputs.logits_JBK, batch.target_LBK).sum(),
            "teacher_ce": cross_entropy(teacher_BK[None], batch.target_LBK.mean(0, keepdim=True)).sum(),
        }
        if self.weight:
            ramp = self.weight * ramp_up(batch.epoch, self.ramp_epochs)
            losses["kl"] = ramp * kl(teacher_BK, outputs.logits_JBK, self.temperature).sum()
        return losses

    def teacher(self, outputs: Outputs) -> Tensor:
        """z^e (B, K) = sum_j g_j z^j, at least float32."""
        assert outputs.shared_VBE is not None
        gate_BJ = self.gate(at_least_float32(outputs.shared_VBE).mean(0))
        share_BJ = at_least_float32(gate_BJ).softmax(-1)
        return (share_BJ.T[..., None] * at_least_float32(outputs.logits_JBK)).sum(0)

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """{"teacher"}: the gated ensemble."""
        return {"teacher": self.teacher(outputs)}
