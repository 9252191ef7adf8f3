"""Class-wise self-knowledge distillation: Yun, Park, Lee, Shin, CVPR 2020, arXiv:2003.13964.

    L^j = CE(z^j, y) + weight T^2 KL(softmax(z'^j / T) || softmax(z^j / T)),    z' held fixed

z' are peer j's own logits of another image of the same class, so that a class is predicted alike whatever its image.

Source: the paper and the authors' alinlab/cs-kd. T = 4 and weight = 1 are theirs (weight = 3 on CUB). As in their code:
- The other image is drawn uniformly from the class, the image itself included, and distorted by draws of its own.
- It is seen without gradients, but in training mode and in a forward of its own: it is normalised by the statistics of
  the second batch, and those enter the running statistics too.
- It has no cross-entropy of its own. A step costs one forward more, and no backward.
Deviations and readings:
- B is the number of images that have a cross-entropy; B more are read. The authors train with 128 and 128.
- Refused under mixes that blend images of several classes. Cutout is none of them.
- Any J: each peer learns from itself alone.
"""

import torch
from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import cross_entropy, kl
from cutnmix.trainer.method import Needs, NotNegative, Task, Temperature

MIXED = "a mixed image has no one class that another image could be drawn from"


class CSKD(nn.Module):
    """{"ce", "kl"}; with weight = 0 "kl" is left out, and the second images are not looked at."""

    needs = Needs(
        "Yun et al., CVPR 2020",
        second="class",
        refuses={"mixup": MIXED, "cutmix": MIXED, "cutnmix": MIXED},
        predicts=1,
    )

    def __init__(self, task: Task, *, temperature: Temperature = 4.0, weight: NotNegative = 1.0) -> None:
        super().__init__()
        self.temperature, self.weight = temperature, weight

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """Both are sums over peers, and peer j gets exactly the gradient of L^j, through its first images alone."""
        losses = {"ce": cross_entropy(outputs.logits_JBK, batch.target_LBK).sum()}
        if self.weight:
            assert batch.second_VBCHW is not None
            with torch.no_grad():
                second = peers(batch.second_VBCHW)
            losses["kl"] = self.weight * kl(second.logits_JBK, outputs.logits_JBK, self.temperature).sum()
        return losses

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """None but the peers'."""
        return {}
