"""Knowledge distillation via collaborative learning: Guo, Wang, Wu, Yu, Liang, Hu, Luo, CVPR 2020.

    L^j = CE(z^j, y) + weight T^2 KL(softmax(z^t / T) || softmax(z^j / T)),    z^t one target for all peers, held fixed

`variant` says what makes the target of an image of what the peers' logits z^i and probs p^i = softmax(z^i) are:
    naive     z^t = z^k,    k = argmin_i CE(z^i, y)
    linear    z^t = sum_i a_i z^i,    a = argmin CE(sum_i a_i z^i, y) over the simplex, a >= 0 and sum_i a_i = 1
    minlogit  z^t_c = min_i (z^i_c - z^i_y)
    general   z^t = log sum_i w_i p^i,    w = C^-1 1 / (1^T C^-1 1),    C_ij = mean_n sum_c (p^i - y)_c (p^j - y)_c
              over held-out training images n, anew every epoch
    mean      z^t = 1 / J sum_i z^i, and L^j = (1 - weight) CE + weight T^2 KL

minlogit by hand, three classes, y the first: z^1 = (2, 1, 0) and z^2 = (1, -1, 0.5) become (0, -1, -2) and
(0, -2, -0.5), so z^t = (0, -2, -2): each wrong class gets the lowest score that any peer gave it.

Source: the paper, through the descriptions of others; no code of its authors is public. The public code that runs under
its name, shaoeric/Online-Knowledge-Distillation-via-Collaborative-Learning, is none of the paper's four variants but
`mean`, with T = 4 and weight = 0.5; it is the inferred KDCL of CutnMix's tables. Readings and deviations:
- Keys left out are None and mean T = 3 and weight = 1 (the paper's T and weight are not verified: T is that of ONE,
  OKDDip and PCL), or under `mean` T = 4 and weight = 0.5. In all variants weight 0 is plain cross-entropy.
- The paper gives each peer its own distortion of the images: `views: per_peer`.
- Soft targets, as a mix makes them: CE is the soft one; minlogit subtracts the mean of the logits under the target,
  sum_c y_c z_c, which on one class is that class' logit (our extension); general takes y as it is. Where the box rule
  gives every peer a target of its own (`clip_corrected`), the common z^t is made with their mean.
- linear solves per image: its formula is stated for one image's logits, and so each target is at least as good as that
  of naive, which picks one corner of the same simplex per image. See `linear` for how exactly.
- Peers are judged, combined and measured at temperature 1; the KL alone softens.
- general: `holdout` of the training images, at least one, drawn once, stand for the paper's validation split. They
  weigh nothing in any loss, and the losses are means over the rest. They are seen as all others are, distorted and with
  batch norm in training mode, and its statistics see them. Under a mix their pixels still reach training, pasted into
  others: C is a clean measure with `mix: none` alone.
- general: until the first epoch has ended, and after an epoch without any held-out image, the weights stay as they
  were, at first 1 / J. C + 0.001 (mean of its diagonal) I is inverted instead of C, which is singular for equal peers.
  Weights < 0, which would make probs < 0, are set to 0 and the rest scaled to sum to 1.
"""

from collections.abc import Callable
from math import ceil, inf
from typing import Literal

import torch
from torch import Tensor, nn

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch
from cutnmix.trainer.losses import at_least_float32, cross_entropy, kl, log_probs
from cutnmix.trainer.method import Needs, NotNegative, Share, Task, Temperature

PAIR_STEPS = 8  # of `linear` for every peer beyond the second
HALVINGS = 16
RIDGE = 1e-3


def naive(logits_JBK: Tensor, target_BK: Tensor) -> Tensor:
    """z^k (B, K) of the peer k with the smallest cross-entropy, image by image."""
    best_B = _cross_entropies(logits_JBK, target_BK).argmin(0)
    return _of_peer(logits_JBK, best_B)


def linear(logits_JBK: Tensor, target_BK: Tensor) -> Tensor:
    """sum_i a_i z^i (B, K), a = argmin_a CE(sum_i a_i z^i, y) over the simplex, image by image.

    The problem is convex. From the best single peer on, each step moves weight from one peer to another, the two
    between which the slope is steepest, to the lowest point in between: the slope grows along the way, so halving finds
    where it is 0, to 2^-16 of the way. For J = 2 one step is the whole problem. For J > 2 there are
    PAIR_STEPS (J - 2) + 1, and where three or more peers share an optimum they only come near it: on one-hot targets,
    for logits of standard deviation 4, to 1e-3 nats on 99 of 100 images (held to by tests/test_kdcl.py), never above
    `naive`. The number of steps does not depend on the numbers, so nothing is read back to the host. They are many, and
    torch.compile unrolls them: on a CPU core that takes most of a minute for J = 2, and more than two for J = 3. Then
    write `compile: none`.
    """
    num_peers = len(logits_JBK)
    best_B = _cross_entropies(logits_JBK, target_BK).argmin(0)
    weight_JB = (best_B == torch.arange(num_peers, device=best_B.device)[:, None]).to(logits_JBK.dtype)
    combined_BK = _of_peer(logits_JBK, best_B)
    for _ in range(PAIR_STEPS * (num_peers - 2) + 1):
        slope_JB = (logits_JBK * (combined_BK.softmax(-1) - target_BK)).sum(-1)  # of CE along a_i
        to_B = slope_JB.argmin(0)
        from_B = slope_JB.masked_fill(weight_JB <= 0, -inf).argmax(0)
        room_B = weight_JB.gather(0, from_B[None])[0]
        way_BK = _of_peer(logits_JBK, to_B) - _of_peer(logits_JBK, from_B)
        moved_B = torch.zeros_like(room_B)
        for halving in range(HALVINGS + 1):  # all the way first, so that a peer can end at 0 exactly
            further_B = torch.minimum(moved_B + room_B / 2**halving, room_B)
            residual_BK = (combined_BK + further_B[:, None] * way_BK).softmax(-1) - target_BK
            moved_B = torch.where((residual_BK * way_BK).sum(-1) < 0, further_B, moved_B)
        combined_BK = combined_BK + moved_B[:, None] * way_BK
        weight_JB = weight_JB.scatter_add(0, to_B[None], moved_B[None]).scatter_add(0, from_B[None], -moved_B[None])
    return combined_BK


def minlogit(logits_JBK: Tensor, target_BK: Tensor) -> Tensor:
    """min_i (z^i - sum_c y_c z^i_c) (B, K), class by class."""
    return (logits_JBK - (target_BK * logits_JBK).sum(-1, keepdim=True)).amin(0)


def mean(logits_JBK: Tensor, target_BK: Tensor) -> Tensor:
    """1 / J sum_i z^i (B, K)."""
    return logits_JBK.mean(0)


def general(logits_JBK: Tensor, weight_J: Tensor) -> Tensor:
    """Log sum_i w_i softmax(z^i) (B, K), w on the simplex."""
    return (weight_J.log()[:, None, None] + log_probs(logits_JBK)).logsumexp(0)


def general_weights(error_JJ: Tensor) -> Tensor:
    """C^-1 1 / (1^T C^-1 1) (J,), onto the simplex by clipping; C any multiple of the errors' correlations, not 0.

    Unclipped, the weights of sum 1 with the least w^T C w, the squared error of sum_i w_i p^i. Computed in float64.
    """
    c_JJ = error_JJ.double()
    ridge_JJ = RIDGE * c_JJ.diagonal().mean() * torch.eye(len(c_JJ), device=c_JJ.device)
    # inv_ex without its check leaves the verdict on the device; with the ridge it is always a success.
    weight_J = torch.linalg.inv_ex(c_JJ + ridge_JJ, check_errors=False).inverse.sum(1).clamp(min=0)
    return (weight_J / weight_J.sum()).to(error_JJ.dtype)


def _cross_entropies(logits_JBK: Tensor, target_BK: Tensor) -> Tensor:
    """CE of each peer on each image (J, B)."""
    return -(target_BK * log_probs(logits_JBK)).sum(-1)


def _of_peer(logits_JBK: Tensor, peer_B: Tensor) -> Tensor:
    """The logits (B, K) of one peer an image."""
    return logits_JBK.gather(0, peer_B[None, :, None].expand(1, -1, logits_JBK.shape[-1]))[0]


TARGETS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minlogit": minlogit,
    "naive": naive,
    "linear": linear,
    "mean": mean,
}


class KDCL(nn.Module):
    """{"ce", "kdcl"}; "kdcl" is left out where weight = 0, and "ce" under `mean` where weight = 1.

    Peers of any architectures: features are not looked at.
    Raises: ValueError for `method.weight` > 1 under `mean`, and a `method.holdout` that leaves nothing to train on.
    """

    needs = Needs("Guo et al., CVPR 2020", min_peers=2, of_variant={"holdout": "general"})

    held_out_N: Tensor
    weight_J: Tensor
    error_JJ: Tensor
    epoch: Tensor

    def __init__(
        self,
        task: Task,
        *,
        variant: Literal["minlogit", "naive", "linear", "general", "mean"] = "minlogit",
        temperature: Temperature | None = None,
        weight: NotNegative | None = None,
        holdout: Share = 0.02,
    ) -> None:
        super().__init__()
        if temperature is None:
            temperature = 4.0 if variant == "mean" else 3.0
        if weight is None:
            weight = 0.5 if variant == "mean" else 1.0
        if variant == "mean" and weight > 1:
            raise ValueError(f"method.weight must be <= 1 under method.variant: mean, got {weight}")
        if variant != "mean" and len(task.own) < task.J:
            raise ValueError(
                f"mesh.peer must be 1 under method.variant: {variant}, which needs every peer's logits; a mean of them "
                f"comes from sums: method.variant=mean"
            )
        if variant == "general" and task.over.data is not None:
            raise ValueError("mesh.data must be 1 under method.variant: general, which adds up errors over images")
        self.variant, self.temperature, self.weight, self.over = variant, temperature, weight, task.over
        self.ce_weight = 1 - weight if variant == "mean" else 1.0
        self.holdout = holdout if variant == "general" else 0.0
        if variant == "general":
            self.register_buffer("weight_J", torch.full((task.J,), 1 / task.J))  # in force
        if self.holdout:
            num_held_out = ceil(holdout * task.num_images)
            if num_held_out >= task.num_images:
                raise ValueError(f"method.holdout must leave images to train on: {holdout} of {task.num_images} is all")
            held_out_N = torch.zeros(task.num_images, dtype=torch.bool)
            held_out_N[torch.randperm(task.num_images)[:num_held_out]] = True
            self.register_buffer("held_out_N", held_out_N)
            self.register_buffer("error_JJ", torch.zeros(task.J, task.J))  # summed over the epoch's held-out images
            self.register_buffer("epoch", torch.zeros((), dtype=torch.float64))  # that the sums belong to

    def forward(self, outputs: Outputs, batch: Batch, peers: Peers) -> dict[str, Tensor]:
        """Both are sums over peers, and with z^t detached peer j gets exactly the gradient of L^j."""
        logits_JBK, target_LBK = at_least_float32(outputs.logits_JBK), batch.target_LBK
        known_JBK, target_BK = logits_JBK.detach(), target_LBK.mean(0)
        trained_B1, scale = None, 1.0  # all images, alike
        if self.holdout:
            held_out_B1 = self.held_out_N[batch.index_B][:, None]
            if self.training:
                self.remember(known_JBK, target_BK, held_out_B1, batch.epoch)
            trained_B1 = ~held_out_B1
            scale = len(trained_B1) / trained_B1.sum().clamp(min=1)  # a mean over the batch to one over these
            target_LBK = target_LBK * trained_B1
        losses = {}
        if self.ce_weight:
            losses["ce"] = scale * self.ce_weight * cross_entropy(logits_JBK, target_LBK).sum()
        if self.weight:
            teacher_BK = self.target(known_JBK, target_BK)
            if trained_B1 is not None:
                logits_JBK = torch.where(trained_B1, logits_JBK, teacher_BK)  # KL = 0, and no gradient
            losses["kdcl"] = scale * self.weight * kl(teacher_BK, logits_JBK, self.temperature).sum()
        return losses

    def target(self, logits_JBK: Tensor, target_BK: Tensor) -> Tensor:
        """z^t (B, K) of this variant."""
        if self.variant == "general":
            return general(logits_JBK, self.weight_J)
        if self.over.peer is not None:  # `mean`
            (sum_BK,) = self.over.total(logits_JBK.sum(0))
            return sum_BK / self.over.peers(len(logits_JBK))
        return TARGETS[self.variant](logits_JBK, target_BK)

    @torch.no_grad()
    def remember(self, logits_JBK: Tensor, target_BK: Tensor, held_out_B1: Tensor, epoch: Tensor) -> None:
        """Where an epoch begins, the sums of the last one become the weights; then add this batch's held-out images."""
        begins = epoch.floor() != self.epoch
        measured = self.error_JJ.diagonal().sum() > 0
        self.weight_J.copy_(torch.where(begins & measured, general_weights(self.error_JJ), self.weight_J))
        wrong_JBK = (log_probs(logits_JBK).exp() - target_BK) * held_out_B1
        error_JJ = (wrong_JBK[:, None] * wrong_JBK).sum((-2, -1))  # no matmul: autocast would lower it
        self.error_JJ.copy_(torch.where(begins, 0, self.error_JJ) + error_JJ)
        self.epoch.copy_(epoch.floor())

    def predictions(self, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """None but the peers'."""
        return {}
