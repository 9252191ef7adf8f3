"""Data-distortion guided self-distillation: Xu, Liu, AAAI 2019, doi:10.1609/aaai.v33i01.33015565.

    L^j = CE(z^a, y) + CE(z^b, y)
          + kl_weight T^2 [KL(p^b || p^a) + KL(p^a || p^b)],    p = softmax(z / T), the first of each pair held fixed
          + mmd_weight ||mean_b f^a - mean_b f^b||^2

a and b are two distortions of the same images, both seen by peer j.

Source: the paper; no code of its authors is public. kl_weight = 1, mmd_weight = 5e-4 and T = 3 are those of the public
reimplementation youngerous/ddgsd-pytorch. Deviations and readings:
- KL sums over classes. The reimplementation means over them, and so has 1 / K of this weight.
- T^2 keeps the size of the KL's gradient when T changes, as everywhere here, and as in Self-KD-Lib's reimplementation;
  kl_weight = 1 / T^2 takes it away.
- In each KL the view that is named first is a target and gets no gradient.
- The MMD is between the D mean features (after the last ReLU). Public code puts the mean squared error of logits in its
  place, or the difference of two means over all features. Both views get its gradient: it is one objective.
- The views are two forwards, as in the reimplementation: batch norms take the statistics of each by itself, and both
  enter the running ones. One forward of 2 B images, as others do it, would have common statistics.
- CE is the sum over the two views, so the loss is twice that of the baseline, and a step costs twice as much.
- Under a mix both views have the same boxes or blend, hence the same target. The second is not a peer's view: V views
  have V second ones.
- Any J: each peer learns from itself alone.
"""

import torch
from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import cross_entropy, kl, mmd
from cutnmix.trainer.method import Needs, NotNegative, Task, Temperature


class DDGSD(nn.Module):
    """{"ce", "kl", "mmd"}; a term of weight 0 is left out. With both 0, cross-entropy on two views is what remains."""

    needs = Needs("Xu and Liu, AAAI 2019", second="image")

    def __init__(
        self,
        task: Task,
        *,
        temperature: Temperature = 3.0,
        kl_weight: NotNegative = 1.0,
        mmd_weight: NotNegative = 5e-4,
    ) -> None:
        super().__init__()
        self.temperature, self.kl_weight, self.mmd_weight = temperature, kl_weight, mmd_weight
        self.over = task.over.of_batch()

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """All are sums over peers, and peer j gets exactly the gradient of L^j, through both of its views."""
        assert batch.second_VBCHW is not None
        second = peers(batch.second_VBCHW)
        a_JBK, b_JBK = outputs.logits_JBK, second.logits_JBK
        losses = {"ce": (cross_entropy(a_JBK, batch.target_LBK) + cross_entropy(b_JBK, batch.target_LBK)).sum()}
        if self.kl_weight:
            both_J = kl(b_JBK, a_JBK, self.temperature) + kl(a_JBK, b_JBK, self.temperature)
            losses["kl"] = self.kl_weight * both_J.sum()
        if self.mmd_weight:
            # Each of the two entries of mmd is the squared distance, with its whole gradient.
            pairs = zip(outputs.features, second.features, strict=True)
            apart_J = torch.stack([mmd(torch.stack(pair), detach=False, over=self.over)[0] for pair in pairs])
            losses["mmd"] = self.mmd_weight * apart_J.sum()
        return losses

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """None but the peers'."""
        return {}
