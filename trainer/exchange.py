"""What processes that share a step tell one another: sums over peers, means over the batch, the average gradient.

Over the peer axis, processes that see the same images and hold different peers, nothing but sums travels: of
probabilities, of mean features, of the teacher's logits. So what a step exchanges does not depend on J. Over the data
axis, processes that hold the same peers and see different images, the gradients are averaged.

Everything is the identity for a run of one process, `ALONE`, and leaves its numbers as they are to the last bit. All
processes of an axis get the same bits, so what they hold in common stays in common.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.distributed.distributed_c10d import GroupName

from cutnmix.pipeline.plan import part_of


class Exchange(NamedTuple):
    """The place of a process on the two axes, and what it can ask of the others there. A value; torch.compile takes it.

    An axis without a name has no other processes on it.
    """

    peer: GroupName | None = None  # name of the process group along the peer axis
    peer_index: int = 0
    peer_count: int = 1
    data: GroupName | None = None
    data_count: int = 1

    def own(self, J: int) -> range:
        """The numbers of the peers that live here."""
        return part_of(J, self.peer_index, self.peer_count)

    def peers(self, own: int) -> int:
        """J, where `own` peers live here: all processes hold equally many."""
        return self.peer_count * own

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sum over all peers, of tensors that are sums over the own ones; in one all-reduce. No gradients."""
        if self.peer is None:
            return parts
        whole = _sum(torch.cat([part.detach().flatten() for part in parts]), self.peer)
        sums = whole.split([part.numel() for part in parts])
        return tuple(flat.view(part.shape) for flat, part in zip(sums, parts, strict=True))

    def joined(self, own: Tensor) -> Tensor:
        """Sum over all peers, as `total`, with the gradient of the own part: each process has that of its own peers."""
        if self.peer is None:
            return own
        (whole,) = self.total(own)
        return whole + (own - own.detach())  # exactly 0, so that every process has the same bits

    def once(self, loss: Tensor) -> Tensor:
        """A loss that all processes of the peer axis compute alike: once in the sum over them, its gradient whole."""
        if self.peer is None:
            return loss
        return loss.detach() / self.peer_count + (loss - loss.detach())

    def batch_mean(self, mean: Tensor, count: int) -> Tensor:
        """Mean over the whole batch of a mean over the `count` images here, with the gradient of the latter.

        With w the share of the images here, the mean is m = w m_here + ..., and a loss l(m) has the gradient
        l'(m) w dm_here. A process weighs its loss by w n and the gradients of the n processes are averaged, which
        makes that factor: what is left for here is l'(m) dm_here.
        """
        if self.data is None:
            return mean
        known = mean.detach()
        whole = _sum(torch.cat([known.flatten() * count, known.new_full((1,), count)]), self.data)
        return (whole[:-1] / whole[-1]).view(mean.shape) + (mean - known)

    def of_batch(self) -> "Exchange":
        """The data axis alone."""
        return self._replace(peer=None, peer_index=0, peer_count=1)

    def average_(self, gradients: Iterable[Tensor]) -> None:
        """Mean over the data axis, in place and in one all-reduce.

        Not DistributedDataParallel: it lays its buckets out anew after the first backward pass, so sums over three and
        more processes would round differently before and after a resume.
        """
        if self.data is None:
            return
        flat = [_as_it_lies(gradient) for gradient in gradients]
        whole = _sum(torch.cat(flat), self.data) / self.data_count
        torch._foreach_copy_(flat, whole.split([gradient.numel() for gradient in flat]))


ALONE = Exchange()


def _as_it_lies(gradient: Tensor) -> Tensor:
    """Its memory in one dimension, no copy: those of channels_last weights are channels_last, in every process.

    Copies of unlike layouts would besides keep _foreach_copy_ from being one kernel.
    """
    return gradient.permute(sorted(range(gradient.dim()), key=gradient.stride, reverse=True)).view(-1)


def _sum(flat: Tensor, group: GroupName) -> Tensor:
    return wait_tensor(all_reduce(flat, "sum", group))
