"""The loss formulae. All are means over the batch, in nats, one number a peer: (J,).

float16 and bfloat16 come in, float32 is computed with (float64 stays float64), inside autocast as well: only softmax,
sums and elementwise products are used, none of which autocast lowers.

The pairwise terms over J peers cost O(J): every peer meets all others through sums over peers. Those sums, marked
below, are the only places where peers see one another, and their size does not depend on J. Where peers live in several
processes, the logits and features are those of the own peers, and `over` adds up the sums.
"""

import torch
from torch import Tensor

from cutnmix.trainer.exchange import ALONE, Exchange


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers, in float32 if they came in a narrower type."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-softmax of logits / T over the last axis, at least float32."""
    return (at_least_float32(logits) / temperature).log_softmax(-1)


def cross_entropy(logits_JBK: Tensor, target_LBK: Tensor) -> Tensor:
    """CE_j = -mean_b sum_c target log softmax(z_j), for soft targets; returns (J,).

    L is 1 (all peers share their targets) or J.
    """
    return -(target_LBK * log_probs(logits_JBK)).sum(-1).mean(-1)


def kl(teacher_BK: Tensor, student_JBK: Tensor, temperature: float, detach: bool = True) -> Tensor:
    """T^2 mean_b KL(softmax(teacher / T) || softmax(student_j / T)); returns (J,).

    T^2 keeps the gradient's size when T changes (Hinton et al. 2015, arXiv:1503.02531, section 2).
    Args: logits; the teacher's may be (B, K), one teacher for all peers, or (J, B, K), one each. It gets no gradient
    unless `detach` is False.
    """
    log_teacher_BK = log_probs(teacher_BK.detach() if detach else teacher_BK, temperature)
    log_student_JBK = log_probs(student_JBK, temperature)
    return temperature**2 * (log_teacher_BK.exp() * (log_teacher_BK - log_student_JBK)).sum(-1).mean(-1)


def mutual_kl(logits_JBK: Tensor, temperature: float, over: Exchange = ALONE) -> Tensor:
    """T^2 / (J - 1) sum_{k != j} mean_b KL(p_k || p_j), p = softmax(z / T), p_k detached; returns (J,). J >= 2.

    With S = sum_k p_k and N = sum_k sum_c p_k log p_k, both detached, the pairs need not be visited:
        sum_{k != j} KL(p_k || p_j) = (N - N_j) - (S - p_j) . log p_j
    A difference of two entropies: where peers agree it may round in float32 to about -1e-7 T^2 instead of 0.
    Source: L_DML of Eq. 4 of CutnMix (arXiv:2206.12370v2) with its T^2.
    """
    log_p_JBK = log_probs(logits_JBK, temperature)
    return _kl_of_others(log_p_JBK.detach(), log_p_JBK, temperature, over)


def others_kl(teacher_JBK: Tensor, student_JBK: Tensor, temperature: float) -> Tensor:
    """T^2 / (J - 1) sum_{k != j} mean_b KL(softmax(t_k / T) || softmax(s_j / T)), t detached; returns (J,). J >= 2.

    As `mutual_kl`, with teachers that are not the students themselves.
    """
    log_teacher_JBK = log_probs(teacher_JBK.detach(), temperature)
    return _kl_of_others(log_teacher_JBK, log_probs(student_JBK, temperature), temperature)


def _kl_of_others(log_p_JBK: Tensor, log_q_JBK: Tensor, temperature: float, over: Exchange = ALONE) -> Tensor:
    """T^2 / (J - 1) sum_{k != j} mean_b KL(p_k || q_j), through sums over peers; returns (J,)."""
    p_JBK = log_p_JBK.exp()
    negentropy_JB = (p_JBK * log_p_JBK).sum(-1)
    p_BK, negentropy_B = over.total(p_JBK.sum(0), negentropy_JB.sum(0))  # over peers
    kl_JB = (negentropy_B - negentropy_JB) - ((p_BK - p_JBK) * log_q_JBK).sum(-1)
    return temperature**2 / (over.peers(len(log_p_JBK)) - 1) * kl_JB.mean(-1)


def mmd(feature_JBD: Tensor, detach: bool = True, over: Exchange = ALONE) -> Tensor:
    """1 / (J - 1) sum_{k != j} ||m_j - m_k||^2, m_j = mean_b f_j; returns (J,). J >= 2.

    The squared maximum mean discrepancy under a linear kernel, summed over the D features. Through the mean over peers,
        sum_k ||m_j - m_k||^2 = J ||m_j - mbar||^2 + sum_k ||m_k - mbar||^2
    which unlike the expansion into ||m||^2 does not cancel when the means are large and close.
    With `detach` the m_k of the others get no gradient, so that of entry j is 2 / (J - 1) sum_k (m_j - m_k) for peer j
    and none for the rest: it all comes from the first term, with mbar and the second held fixed. Without `detach`
    every m gets its share from every entry, and the sum of the entries has twice that gradient.
    m_j is the mean over the whole batch, also where the batch is shared by several processes. Where the peers are, the
    sum over k comes from sums of m_k and ||m_k||^2, in float64 because those do cancel; without `detach` an entry then
    has twice its gradient for its own peer, and none for the others: the same for the sum of the entries.
    Source: Eq. 9 of CutnMix (arXiv:2206.12370v2).
    """
    mean_JD = over.batch_mean(at_least_float32(feature_JBD).mean(1), feature_JBD.shape[1])
    num_peers = over.peers(len(feature_JBD))
    if over.peer is not None:
        known_JD = mean_JD.detach().double()
        sum_D, square = over.total(known_JD.sum(0), known_JD.square().sum())
        centre_D = sum_D / num_peers
        spread = (square - num_peers * centre_D.square().sum()).clamp(min=0).to(mean_JD.dtype)
        own_J = (num_peers * (mean_JD - centre_D.to(mean_JD.dtype)).square().sum(-1) + spread) / (num_peers - 1)
        return own_J if detach else own_J + (own_J - own_J.detach())
    others_JD = mean_JD.detach() if detach else mean_JD
    centre_D = others_JD.mean(0)  # over peers
    spread = (others_JD - centre_D).square().sum()  # over peers
    return (num_peers * (mean_JD - centre_D).square().sum(-1) + spread) / (num_peers - 1)


def ramp_up(epoch: Tensor, ramp_epochs: float) -> Tensor:
    """w(e) = exp(-5 (1 - min(e, R) / R)^2), e whole epochs done, R = `ramp_epochs`; 1 where R = 0. 0-D float32.

    e is `epoch` rounded down, as the authors' code raises the weight once an epoch. On the device of `epoch`.
    Source: Laine and Aila, ICLR 2017, arXiv:1610.02242; used by ONE, OKDDip and PCL with R = 80.
    """
    if not ramp_epochs:
        return torch.ones((), device=epoch.device)
    missing = 1 - (epoch.floor() / ramp_epochs).clamp(max=1)
    return (-5 * missing**2).exp().float()
