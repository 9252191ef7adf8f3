"""Knowledge distillation in two stages: Hinton, Vinyals, Dean, 2015, arXiv:1503.02531.

    L^j = (1 - alpha) CE(z^j, y) + alpha T^2 KL(softmax(z^t / T) || softmax(z^j / T)),    z^t of a trained network

The teacher is a peer of another run, and sees the very images that the peers see: distorted and mixed alike. So what a
mix does to a teacher and to whom it teaches is a matter of the mix of each run, no more.

Source: the paper, section 2. It names no T and no weights; T = 4 and alpha = 0.9 are those in wide use, of
HobbitLong/RepDistiller and its tables. Readings:
- The teacher is in eval mode: its batch norms use what they learned, whatever the batch. It never changes.
- Where each peer has views of its own, the teacher answers each of them: V forwards.
- It must tell the same classes apart, in the same order, and have learned pixels normalised alike: use one data set.
- Its weights are in every checkpoint, but its file is read again, from the same place, when the run is resumed or
  evaluated.
"""

import os
from pathlib import Path

from torch import Tensor, nn

from cutnmix.models.cost import check_image_size
from cutnmix.models.peers import Outputs, Peers
from cutnmix.models.saved import Frozen, load_network, network_name
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import at_least_float32, cross_entropy, kl
from cutnmix.trainer.method import Fraction, Index, Needs, RunPath, Task, Temperature


class KD(nn.Module):
    """{"ce", "kl"}; with alpha = 0 "kl" is left out, with alpha = 1 "ce".

    Args: `teacher` is a finished run's folder, whose peer `teacher_peer` it is, or one .safetensors file of a peer.
    Raises: ValueError for a `method.teacher` that is not there, cannot be read, has another number of classes, or says
    that it was trained on others, on these in another order or on pixels normalised otherwise.
    """

    needs = Needs("Hinton et al., arXiv 2015")

    def __init__(
        self,
        task: Task,
        *,
        teacher: RunPath = "",
        teacher_peer: Index = 0,
        temperature: Temperature = 4.0,
        alpha: Fraction = 0.9,
    ) -> None:
        super().__init__()
        self.temperature, self.alpha = temperature, alpha
        self.teacher = load_teacher(task, teacher, teacher_peer)

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """Both are sums over peers, so peer j gets exactly the gradient of L^j; the teacher gets none."""
        logits_JBK, losses = outputs.logits_JBK, {}
        if self.alpha < 1:
            losses["ce"] = (1 - self.alpha) * cross_entropy(logits_JBK, batch.target_LBK).sum()
        if self.alpha:
            losses["kl"] = self.alpha * kl(self.teacher(batch.image_VBCHW), logits_JBK, self.temperature).sum()
        return losses

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """{"teacher"}."""
        return {"teacher": teacher_logits(self.teacher, batch)}


def load_teacher(task: Task, teacher: str, teacher_peer: int) -> Frozen:
    """The network that the two keys name. Raises: ValueError, naming the key."""
    if not teacher:
        raise ValueError("method.teacher must be a finished run's folder or a .safetensors file, got ''")
    path = Path(os.path.expanduser(teacher))
    if teacher_peer and path.is_file():
        raise ValueError(f"method.teacher_peer must be left out where method.teacher is a file, got {teacher_peer}")
    try:
        network = load_network(path, peer=teacher_peer, num_classes=task.K, data=task.data)
        if task.size is not None:
            check_image_size(network_name(path, peer=teacher_peer), task.K, task.size)
    except ValueError as error:
        raise ValueError(f"method.teacher: {str(error).removeprefix('peers.network: ')}") from error
    return Frozen(network)


def teacher_logits(teacher: Frozen, batch: Batch) -> Tensor:
    """(B, K) of the first view; the evaluation has but one. Images as float32, which need no autocast around this."""
    return teacher(at_least_float32(batch.image_VBCHW[:1]))[0]
