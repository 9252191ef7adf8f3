"""Batch norms whose statistics are those of the whole batch, over the processes that hold the same peers."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_reduce, wait_tensor
from torch.nn.functional import batch_norm

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def synchronise(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Make every batch norm within a WholeBatchNorm.

    Raises: ValueError, naming the key, for layers that are more than a batch norm, which would lose the rest.
    """
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    if more := sorted({type(layer).__name__ for layer in norms if type(layer) not in PLAIN}):
        raise ValueError(
            f"mesh.sync_batch_norm: a network has {', '.join(more)}, which does more than a batch norm and cannot be "
            f"synchronised; write false, or take another network"
        )
    nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    for layer in module.modules():
        if isinstance(layer, nn.SyncBatchNorm):
            layer.__class__ = WholeBatchNorm  # the same parameters, buffers and settings; another forward


class WholeBatchNorm(nn.SyncBatchNorm):
    """nn.SyncBatchNorm with one sum over the processes in place of a gather.

    Torch's own looks for empty shares of the batch: its boolean index makes the host wait for a GPU at every norm and
    parts the compiled graph there; and it refuses a CPU. Nobody's share is empty here.

    Means and variances of the shares are float32, and are joined in float64 with gradients through both.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) -> the same, normalised by the statistics over B of all processes and over all but C."""
        assert self.momentum is not None and self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.process_group is not None
        if not self.training:
            return batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        axes = [axis for axis in range(input.dim()) if axis != 1]
        x = input.float()
        count = x[:, 0].numel()
        here_var_C, here_mean_C = (each.double() for each in torch.var_mean(x, axes, correction=0))
        square_C = here_var_C + here_mean_C.square()
        here = count * torch.stack([here_mean_C, square_C, torch.ones_like(square_C)])
        sum_C, square_C, count_C = wait_tensor(all_reduce(here, "sum", self.process_group))
        mean_C = sum_C / count_C
        var_C = (square_C / count_C - mean_C.square()).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            unbiased_C = var_C * count_C / (count_C - 1)
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased_C.to(self.running_var.dtype), self.momentum)
        shape = [1, -1] + [1] * (input.dim() - 2)
        scale_C = (var_C + self.eps).rsqrt().float()
        normal = (x - mean_C.float().view(shape)) * scale_C.view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)
