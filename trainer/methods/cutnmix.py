"""Online distillation with CutnMix: Shen, Xu, Yang, Li, Guo, "Mixed Sample Augmentation for Online Distillation",
arXiv:2206.12370v2. The mix itself (Eq. 5-7) is pipeline/cutnmix.py; this is what peers learn from what it made.

    L^j = CE(z^j, y~) + alpha L_DML^j + beta L_MMD^j + gamma L_PT^j                      Eq. 8
    L_DML^j = T^2 / (J - 1) sum_{k != j} KL(p^k || p^j),    p = softmax(z / T)           Eq. 4
    L_MMD^j = 1 / (J - 1) sum_{k != j} ||mean_b f^j - mean_b f^k||^2                     Eq. 9
    L_PT^j  = T^2 KL(softmax(z^PT / T) || p^j),    z^PT = g(f^1, ..., f^J)               Eq. 10

and the peer teacher g learns by CE(z^PT, y~), Algorithm 1 lines 10 and 12.

Source: the paper; no code of its authors is public. Where it leaves a choice, or contradicts itself, ours:
- T^2 belongs to L_DML: Eq. 4 has it, Eq. 8 lacks it, Eq. 1 and 10 carry it with their KL. `tau2: false` reads Eq. 8
  to the letter, alpha KL without T^2.
- D(student, teacher) in Eq. 1, 4 and 10 is read as KL(teacher || student), the direction of Hinton et al. and of DML,
  which the paper builds on. All KL are means over the batch, though only Eq. 10 says so.
- L^j is "the objective function of j-th network", so its gradient goes to peer j alone: p^k, the mean feature of f^k
  and z^PT are held fixed in it. `mmd_detach: false` lets L_MMD^j pull f^k as well, which doubles its gradient.
- The MMD is the squared norm, a sum over the D features (not their mean), of the globally averaged features after the
  last ReLU. At beta = 0.3 it can outweigh the rest: watch its share of the loss.
- It compares features of one size. `feature_dim` projects others to one, by maps that are drawn and never trained:
  trained, they would shrink the distance in place of the peers.
- Features, logits and teacher all see the mixed images (Algorithm 1 mixes before it computes them), and the teacher is
  taught the mixed targets.
- g is one linear layer on the concatenated features, as in PCL (AAAI 2021), which the paper cites for it.
- Eq. 8 has no teacher term and Algorithm 1 updates peers and teacher apart, so the teacher's CE does not reach the
  peers, and gamma does not scale it. In PCL it does reach them: `pt_grad_to_peers: true`.
- Where the box rule gives every peer a target of its own (`clip_corrected`), the teacher's is their mean.
- One optimizer steps peers and teacher together. As no gradient crosses, that equals one optimizer each.
- Where peers live in several processes, each holds its own peers' columns of W, and b is in all of them.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import at_least_float32, cross_entropy, kl, mmd, mutual_kl
from cutnmix.trainer.method import Needs, NotNegative, Size, Task, Temperature
from cutnmix.trainer.projection import Projection


class CutnMixDistillation(nn.Module):
    """{"ce", "dml", "mmd", "pt", "pt_ce"}; a term of weight 0 is left out, and with gamma = 0 there is no teacher.

    Raises: ValueError for peers of different feature sizes under beta > 0 without `method.feature_dim`.
    """

    needs = Needs("Shen et al., arXiv 2022", min_peers=2)

    def __init__(
        self,
        task: Task,
        *,
        temperature: Temperature = 3.0,
        alpha: NotNegative = 0.6,
        beta: NotNegative = 0.3,
        gamma: NotNegative = 0.1,
        tau2: bool = True,
        mmd_detach: bool = True,
        pt_grad_to_peers: bool = False,
        feature_dim: Size | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.alpha, self.beta, self.gamma = alpha if tau2 else alpha / temperature**2, beta, gamma
        self.mmd_detach, self.pt_grad_to_peers = mmd_detach, pt_grad_to_peers
        self.over = task.over
        self.projection = self.peer_teacher = None
        if beta:
            self.projection = Projection(
                task.feature_dims, feature_dim, term="the MMD (method.beta)", trained=False, own=task.own
            )
        if gamma:
            self.peer_teacher = nn.Linear(sum(task.feature_dims), task.K)
            own = [self.peer_teacher.weight.split(task.feature_dims, 1)[j] for j in task.own]
            if len(own) < task.J:
                self.peer_teacher.weight = nn.Parameter(torch.cat(own, 1).detach())
            self.of_peers = {"peer_teacher.weight": (1, task.feature_dims)}

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """All but pt_ce are sums over peers: peer j gets exactly the gradient of L^j, the teacher that of pt_ce."""
        logits_JBK = outputs.logits_JBK
        losses = {"ce": cross_entropy(logits_JBK, batch.target_LBK).sum()}
        if self.alpha:
            losses["dml"] = self.alpha * mutual_kl(logits_JBK, self.temperature, self.over).sum()
        if self.projection is not None:
            losses["mmd"] = self.beta * mmd(self.projection(outputs.features), self.mmd_detach, self.over).sum()
        teacher_BK = self.teacher(outputs)
        if teacher_BK is not None:
            losses["pt"] = self.gamma * kl(teacher_BK, logits_JBK, self.temperature).sum()
            pt_ce = cross_entropy(teacher_BK[None], batch.target_LBK.mean(0, keepdim=True)).sum()
            losses["pt_ce"] = self.over.once(pt_ce)
        return losses

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """{"teacher"}: the peer teacher, where there is one."""
        teacher_BK = self.teacher(outputs)
        return {} if teacher_BK is None else {"teacher": teacher_BK}

    def teacher(self, outputs: Outputs) -> Tensor | None:
        """z^PT (B, K) = W concat_j f^j + b, the features detached unless `pt_grad_to_peers`; None if gamma = 0."""
        if self.peer_teacher is None:
            return None
        feature_BD = at_least_float32(torch.cat(outputs.features, dim=-1))
        if not self.pt_grad_to_peers:
            feature_BD = feature_BD.detach()
        if self.over.peer is None:
            return self.peer_teacher(feature_BD)
        own_BK = at_least_float32(linear(feature_BD, self.peer_teacher.weight))
        return self.over.joined(own_BK) + self.peer_teacher.bias
