"""Teacher-free knowledge distillation: Yuan, Tay, Li, Wang, Feng, CVPR 2020, arXiv:1909.11723.

    L^j = (1 - alpha) CE(z^j, y) + alpha multiplier D^j

`variant` says who stands in for the teacher:
    reg     a virtual one, u = `correct` on the class of the image and (1 - correct) / (K - 1) on each other. `formula`:
              code    D^j = KL(softmax(u / T) || softmax(z^j))                             (T = 20, alpha = 0.1)
              paper   D^j = T^2 KL(softmax(log u / T) || softmax(z^j / T))                 Eq. 9
    self    D^j = T^2 KL(softmax(z^t / T) || softmax(z^j / T)),                            (T = 6, alpha = 0.95)
            z^t of a trained copy of the same network, on the very images that the peers see: kd.py with other numbers

Source: the paper and the authors' yuanli2333/Teacher-free-Knowledge-Distillation, whose T and alpha for ResNet-18 on
CIFAR-100 are the defaults. Deviations and readings:
- reg: in the paper both distributions are at T. In the code one is softmax of PROBABILITIES / T, nearly uniform: by
  hand, T = 20 gives the class e^0.0495 / (e^0.0495 + 9 e^0.00006) = 0.1045 for K = 10, and 0.0105 for K = 100. The
  other is at temperature 1, which "works better" on CIFAR-100 (their issue 3). The code made the published numbers, so
  it is the default.
- reg, `paper`: u has no logits, so softening it is read as that of logits log u. Eq. 9 has no T^2; the authors call it
  necessary where both sides have T (their issue 14), and without it T = 20 leaves next to nothing of the term.
- Their KL is a mean over classes too, times a multiplier for each network, from 1 to 100. Ours sums over classes, so
  `multiplier` is theirs / K. The default is the paper's 1, theirs for reg with ResNet-18; for its self theirs is 0.5.
- Soft targets, as a mix makes them: the virtual teacher's distribution is the mean of those of the classes, weighed by
  y, so that D's gradient interpolates that of the labels, as CutMix interpolates its loss.
- self: the teacher is a peer of another run, see kd.py. One for all peers, so they must be of its network.
"""

from math import exp
from typing import Literal

import torch
from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import cross_entropy, kl, log_probs
from cutnmix.trainer.method import Fraction, Index, Needs, NotNegative, RunPath, Share, Task, Temperature
from cutnmix.trainer.methods.kd import load_teacher, teacher_logits


def virtual_share(num_classes: int, correct: float, temperature: float, formula: str) -> float:
    """What the virtual teacher gives to the class of the image once it is softened; the others share the rest."""
    other = (1 - correct) / (num_classes - 1)
    if formula == "code":
        ratio = exp((other - correct) / temperature)
    else:
        ratio = (other / correct) ** (1 / temperature)
    return 1 / (1 + (num_classes - 1) * ratio)


def virtual_kl(target_LBK: Tensor, share: float, logits_JBK: Tensor, temperature: float) -> Tensor:
    """mean_b KL(share y + (1 - share) (1 - y) / (K - 1) || softmax(z_j / T)); returns (J,)."""
    teacher_LBK = share * target_LBK + (1 - share) / (target_LBK.shape[-1] - 1) * (1 - target_LBK)
    log_p_JBK = log_probs(logits_JBK, temperature)
    return (torch.xlogy(teacher_LBK, teacher_LBK) - teacher_LBK * log_p_JBK).sum(-1).mean(-1)


class TfKD(nn.Module):
    """{"ce", "kl"}; with alpha = 0 or multiplier = 0 "kl" is left out, with alpha = 1 "ce".

    Args: `correct`, `formula` are of reg, `teacher`, `teacher_peer` of self (a finished run's folder and its peer, or
    one .safetensors file); None is the number above.
    Raises: ValueError for `method.correct` <= 1 / K, weights that leave no loss, and under self a `method.teacher` that
    is not there, cannot be read, is of other data (see kd.py) or is another network than the peers.
    """

    needs = Needs(
        "Yuan et al., CVPR 2020",
        of_variant={"correct": "reg", "formula": "reg", "teacher": "self", "teacher_peer": "self"},
    )

    def __init__(
        self,
        task: Task,
        *,
        variant: Literal["reg", "self"] = "reg",
        temperature: Temperature | None = None,
        alpha: Fraction | None = None,
        multiplier: NotNegative = 1.0,
        correct: Share = 0.99,
        formula: Literal["code", "paper"] = "code",
        teacher: RunPath = "",
        teacher_peer: Index = 0,
    ) -> None:
        super().__init__()
        if temperature is None:
            temperature = 20.0 if variant == "reg" else 6.0
        if alpha is None:
            alpha = 0.1 if variant == "reg" else 0.95
        if correct <= 1 / task.K:
            raise ValueError(f"method.correct must be > 1 / K, K = {task.K}, got {correct}")
        if alpha == 1 and not multiplier:
            raise ValueError("method.multiplier must be > 0 under method.alpha: 1, which leaves no other loss")
        self.alpha, self.weight = alpha, alpha * multiplier
        self.share = virtual_share(task.K, correct, temperature, formula)
        self.temperature = 1.0 if variant == "reg" and formula == "code" else temperature  # of the peers
        self.teacher = None if variant == "reg" else load_teacher(task, teacher, teacher_peer)
        if self.teacher is not None and task.peers is not None:
            _check_same(self.teacher.network, [task.peers.network(j) for j in task.own], teacher)

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """Both are sums over peers, so peer j gets exactly the gradient of L^j; a teacher gets none."""
        logits_JBK, losses = outputs.logits_JBK, {}
        if self.alpha < 1:
            losses["ce"] = (1 - self.alpha) * cross_entropy(logits_JBK, batch.target_LBK).sum()
        if self.weight:
            if self.teacher is not None:
                kl_J = kl(self.teacher(batch.image_VBCHW), logits_JBK, self.temperature)
            else:
                kl_J = self.temperature**2 * virtual_kl(batch.target_LBK, self.share, logits_JBK, self.temperature)
            losses["kl"] = self.weight * kl_J.sum()
        return losses

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """{"teacher"} under self."""
        return {} if self.teacher is None else {"teacher": teacher_logits(self.teacher, batch)}


def _check_same(network: nn.Module, nets: list[nn.Module], teacher: str) -> None:
    """Refuse a teacher that is no copy of what it teaches."""
    shapes, *others = ({name: weight.shape for name, weight in net.state_dict().items()} for net in (network, *nets))
    if any(other != shapes for other in others):
        raise ValueError(
            f"method.teacher must be the peers' own network under method.variant: self, and {teacher} is another; "
            f"method.name: kd takes any"
        )
