"""Progressive self-knowledge distillation: Kim, Ji, Yoon, Hwang, ICCV 2021, arXiv:2006.12000.

    L^j = CE(z^j, (1 - alpha_t) y + alpha_t p^j),    alpha_t = alpha_T (t + 1) / E in epoch t = 0, ..., E - 1

p^j is what peer j itself predicted of the image in the epoch before, at temperature 1.
By hand, E = 10, alpha_T = 0.8, second epoch: alpha_1 = 0.16, and y = (1, 0), p = (1/4, 3/4) give (0.88, 0.12).

Source: the paper and the authors' lgcnsai/PS-KD-Pytorch, alpha_T = 0.8. As in their code p is what the training forward
gave: of the image as it was distorted then, in training mode, in float32, held fixed. Deviations and readings:
- An image that has not been seen yet keeps its y, as all do in the first epoch. The authors begin with p = y, which is
  the same; what `drop_last` leaves out of the first epoch has no p in the second.
- The table has J N K float32 numbers and stays on the device, where the authors' is on the CPU: 40 MB for two peers on
  CIFAR-100, 10 GB on ImageNet. It is part of every checkpoint.
- Refused under mixes that blend images: their paper has none, and what was predicted belongs to another mixture.
- Any J: each peer learns from itself alone.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import cross_entropy, log_probs
from cutnmix.trainer.method import Fraction, Needs, Task

MIXED = "what a peer predicted an epoch ago, it predicted of a mixture with another partner"


class PSKD(nn.Module):
    """{"ce"}; alpha_T = 0 is the baseline, without a table."""

    needs = Needs(
        "Kim et al., ICCV 2021",
        refuses={"mixup": MIXED, "cutmix": MIXED, "cutnmix": MIXED},
        whole={"data": "what was predicted of an image lies with the process that saw it an epoch ago"},
    )

    past_JNK: Tensor

    def __init__(self, task: Task, *, alpha_T: Fraction = 0.8) -> None:
        super().__init__()
        self.alpha_T, self.epochs = alpha_T, task.epochs
        if alpha_T:
            self.register_buffer("past_JNK", torch.zeros(len(task.own), task.num_images, task.K))  # 0: never seen
            self.of_peers = {"past_JNK": (0, [1] * task.J)}

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """A sum over peers. In training mode this forward's predictions take the place of those that it has read."""
        target_LBK = batch.target_LBK
        if self.alpha_T:
            target_LBK = self.target(target_LBK, batch)
            if self.training:
                self.remember(outputs.logits_JBK, batch.index_B)
        return {"ce": cross_entropy(outputs.logits_JBK, target_LBK).sum()}

    def target(self, target_LBK: Tensor, batch: Batch) -> Tensor:
        """(1 - alpha_t) y + alpha_t p (J, B, K), or y where there is no p yet."""
        # By embedding, whose result torch.compile keeps: where N <= 4 B, it would read an index again in the backward
        # graph, when the table has been written over (pytorch#197039).
        past_JBK = torch.stack([embedding(batch.index_B, past_NK) for past_NK in self.past_JNK])
        seen_JB1 = past_JBK.sum(-1, keepdim=True) > 0
        share_JB1 = self.alpha_T * (batch.epoch.floor() + 1) / self.epochs * seen_JB1.to(past_JBK.dtype)
        return (1 - share_JB1) * target_LBK + share_JB1 * past_JBK

    @torch.no_grad()
    def remember(self, logits_JBK: Tensor, index_B: Tensor) -> None:
        """These predictions are the past of the next epoch."""
        self.past_JNK.index_copy_(1, index_B, log_probs(logits_JBK).exp().to(self.past_JNK.dtype))

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """None but the peers'."""
        return {}
