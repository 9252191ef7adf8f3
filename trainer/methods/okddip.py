"""OKDDip, online knowledge distillation with diverse peers: Chen, Mei, Wang, Feng, Chen, AAAI 2020, arXiv:1912.00350.

The last peer is the group leader; the m - 1 others, its auxiliary peers a, teach each other and together teach it:

    L = sum_j CE(z^j, y) + w(e) [ sum_a T^2 KL(softmax(t^a / T) || softmax(z^a / T))
                                  + T^2 KL(softmax(zbar / T) || softmax(z^leader / T)) ]
    t^a = sum_b A_ab z^b,    A_ab = softmax_b(q_a . k_b),    q_a = W_q f^a,  k_a = W_k f^a
    zbar = 1 / (m - 1) sum_a z^a

W_q and W_k (D -> D / 8, no bias) are shared by the auxiliary peers; the attention is an image's own, includes the peer
itself and is not scaled; w is the ramp-up of losses.ramp_up over the first 80 epochs; T = 3.

Source: the paper and the authors' DefangChen/OKDDip. Readings and deviations:
- The authors detach nothing: t^a and zbar get gradients too, and only so do W_q and W_k learn. `detach_logits: true`
  holds the z^b in both targets fixed and lets the gradient into A alone.
- m = `peers.count`. The paper has m = 4. CutnMix's "two branches" are read as two auxiliary peers and a leader, m = 3;
  read to the letter, m = 2, the lone peer attends to itself, A = 1, and its KL is 0.
- The leader is what the paper reports: it is the last peer of a run, and `leader` among its scores.
- `peers.form: branches` is the paper's main form, `nets` its network-based one.
- No epsilon within the logarithm: log-softmax needs none.
"""

from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import at_least_float32, cross_entropy, kl, ramp_up
from cutnmix.trainer.method import Needs, NotNegative, Size, Task, Temperature
from cutnmix.trainer.projection import Projection


class OKDDip(nn.Module):
    """{"ce", "peer_kl", "leader_kl"}; the KL are left out where weight = 0.

    Raises: ValueError for auxiliary peers of different feature sizes without `method.feature_dim`.
    """

    needs = Needs(
        "Chen et al., AAAI 2020", min_peers=2, whole={"peer": "each peer's target is another mean of all peers' logits"}
    )

    def __init__(
        self,
        task: Task,
        *,
        temperature: Temperature = 3.0,
        weight: NotNegative = 1.0,
        ramp_epochs: NotNegative = 80.0,
        detach_logits: bool = False,
        feature_dim: Size | None = None,
    ) -> None:
        super().__init__()
        self.temperature, self.weight, self.ramp_epochs = temperature, weight, ramp_epochs
        self.detach_logits = detach_logits
        self.projection = self.query = self.key = None
        if weight:
            dims = task.feature_dims[:-1]
            self.projection = Projection(dims, feature_dim, term="the attention of okddip", trained=True)
            D = Projection.size(dims, feature_dim)
            self.query = nn.Linear(D, max(1, D // 8), bias=False)
            self.key = nn.Linear(D, max(1, D // 8), bias=False)

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """All three are sums over the peers that they are of."""
        losses = {"ce": cross_entropy(outputs.logits_JBK, batch.target_LBK).sum()}
        if self.weight:
            logits_JBK = at_least_float32(outputs.logits_JBK)
            own_ABK, leader_BK = logits_JBK[:-1], logits_JBK[-1]
            source_ABK = own_ABK.detach() if self.detach_logits else own_ABK
            share_AAB = self.attention(outputs.features[:-1]).permute(1, 2, 0)
            target_ABK = (share_AAB[..., None] * source_ABK).sum(1)  # no matmul: autocast would lower it
            ramp = self.weight * ramp_up(batch.epoch, self.ramp_epochs)
            losses["peer_kl"] = ramp * kl(target_ABK, own_ABK, self.temperature, detach=False).sum()
            losses["leader_kl"] = ramp * kl(source_ABK.mean(0), leader_BK, self.temperature, detach=False)
        return losses

    def attention(self, features: tuple[Tensor, ...]) -> Tensor:
        """A (B, m - 1, m - 1) of the auxiliary peers' features; rows sum to 1. At least float32."""
        assert self.projection is not None and self.query is not None and self.key is not None
        feature_BAD = at_least_float32(self.projection(features)).transpose(0, 1)
        query_BAE, key_BAE = at_least_float32(self.query(feature_BAD)), at_least_float32(self.key(feature_BAD))
        return (query_BAE[:, :, None] * key_BAE[:, None]).sum(-1).softmax(-1)

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """{"leader"}: the last peer, which the paper reports."""
        return {"leader": outputs.logits_JBK[-1]}
