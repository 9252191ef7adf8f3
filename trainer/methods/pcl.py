"""PCL, peer collaborative learning: Wu and Gong, AAAI 2021, arXiv:2006.04147. CutnMix has its peer teacher from here.

    L = CE(z^en, y) + sum_j [ CE(z^j, y) + w(e) T^2 KL(p^en || p^j) + w(e) / (J - 1) sum_{k != j} T^2 KL(p~^k || p^j) ]
    z^en = W concat_j f^j + b,    p = softmax(z / T)
    p~^k of mean teacher k, whose weights are the moving average of those of peer k:
    theta~ <- a theta~ + (1 - a) theta,    a = min(1 - 1 / (step + 1), decay)

w is the ramp-up of losses.ramp_up over the first 80 epochs; T = 3, decay = 0.999.

Source: the paper and the public reimplementation shaoeric/Peer-Collaborative-Learning-for-Online-Knowledge-
Distillation. Readings and deviations:
- p^en and p~^k are held fixed; CE(z^en, y) reaches the peers, as in the paper (in CutnMix it does not by default).
- Mean teacher k sees the view of peer k. It is in train mode while the peers train, and its batch norms keep running
  statistics of their own: only parameters are averaged. Evaluation uses those statistics.
- The average is taken at the beginning of a step, of the weights that the last step left. So the mean teachers that are
  evaluated or saved are one update behind the peers. Up to step 1 / (1 - decay) it is the plain mean of all weights so
  far, the initial ones among them, which the reimplementation forgets at once.
- Every batch counts as a step, also where `optimizer.accumulate` makes one update of several.
- The paper has three branches on one trunk with a view each (`peers.form: branches`, `views: per_peer`); whole networks
  work as well.
- The reimplementation divides the epoch by the weight instead of by 80, which keeps w near 0 and then at 1. Not here.
- Where the box rule gives every peer a target of its own (`clip_corrected`), the ensemble's is their mean.
"""

import copy

import torch
from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import at_least_float32, cross_entropy, kl, others_kl, ramp_up
from cutnmix.trainer.method import BelowOne, Needs, NotNegative, Task, Temperature


class PCL(nn.Module):
    """{"ce", "en_ce", "en_kl", "mean_kl"}; a KL whose weight is 0 is left out, and with it the mean teachers."""

    needs = Needs(
        "Wu and Gong, AAAI 2021",
        min_peers=2,
        whole={"peer": "its ensemble and mean teachers are made of all peers"},
        predicts=1,
    )
    step: Tensor

    def __init__(
        self,
        task: Task,
        *,
        temperature: Temperature = 3.0,
        en_weight: NotNegative = 1.0,
        mean_weight: NotNegative = 1.0,
        decay: BelowOne = 0.999,
        ramp_epochs: NotNegative = 80.0,
    ) -> None:
        super().__init__()
        self.temperature, self.en_weight, self.mean_weight = temperature, en_weight, mean_weight
        self.decay, self.ramp_epochs = decay, ramp_epochs
        self.ensemble = nn.Linear(sum(task.feature_dims), task.K)
        self.mean_teachers = None
        if mean_weight:
            assert task.peers is not None
            self.mean_teachers = copy.deepcopy(task.peers).requires_grad_(False)
            self.register_buffer("step", torch.zeros((), dtype=torch.float64))

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """Sums over peers, and the ensemble's own cross-entropy against the mean target."""
        teacher_BK = self.teacher(outputs)
        losses = {
            "ce": cross_entropy(outputs.logits_JBK, batch.target_LBK).sum(),
            "en_ce": cross_entropy(teacher_BK[None], batch.target_LBK.mean(0, keepdim=True)).sum(),
        }
        ramp = ramp_up(batch.epoch, self.ramp_epochs)
        if self.en_weight:
            losses["en_kl"] = self.en_weight * ramp * kl(teacher_BK, outputs.logits_JBK, self.temperature).sum()
        if self.mean_teachers is not None:
            if self.training:
                self._follow(peers)
            with torch.no_grad():
                mean_JBK = self.mean_teachers(batch.image_VBCHW).logits_JBK
            losses["mean_kl"] = (
                self.mean_weight * ramp * others_kl(mean_JBK, outputs.logits_JBK, self.temperature).sum()
            )
        return losses

    @torch.no_grad()
    def _follow(self, peers: Peers) -> None:
        """theta~ <- a theta~ + (1 - a) theta; at the first step a = 0."""
        assert self.mean_teachers is not None
        means: list[Tensor] = [*self.mean_teachers.parameters()]
        weights: list[Tensor] = [*peers.parameters()]
        share = (1 / (self.step + 1)).clamp(min=1 - self.decay).to(means[0].dtype)  # 1 - a
        # A few kernels for all tensors, not one each; _foreach_lerp_ would read `share` back to the host.
        way = torch._foreach_sub(weights, means)
        torch._foreach_mul_(way, share)
        torch._foreach_add_(means, way)
        self.step += 1

    def teacher(self, outputs: Outputs) -> Tensor:
        """z^en (B, K), with gradients to the features."""
        return self.ensemble(at_least_float32(torch.cat(outputs.features, dim=-1)))

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """{"teacher", "mean_teacher0", "mean_teacher1", ...}; the paper reports the first mean teacher."""
        made = {"teacher": self.teacher(outputs)}
        if self.mean_teachers is not None:
            image_VBCHW = at_least_float32(batch.image_VBCHW)  # which needs no autocast around this
            mean_JBK = self.mean_teachers(image_VBCHW).logits_JBK
            made |= {f"mean_teacher{j}": mean_BK for j, mean_BK in enumerate(mean_JBK)}
        return made
