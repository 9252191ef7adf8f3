"""One training step: mix, J forwards, the method's losses, one backward, one optimizer over all peers.

No branch on the method, and no host synchronisation: what is logged stays on the device until somebody reads it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Draws
from cutnmix.trainer.exchange import ALONE, Exchange
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.graph import Graphed
from cutnmix.trainer.mesh import ONE, Mesh


@dataclass
class Learner:
    """Everything that a step changes, and so everything that a checkpoint must hold."""

    peers: Peers
    method: Any  # an nn.Module that keeps the contract of cutnmix.trainer.method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    def state_dict(self) -> dict[str, Any]:
        """Nested state dicts, by field name."""
        return {name: getattr(self, name).state_dict() for name in ("peers", "method", "optimizer", "scaler")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for name in ("peers", "method", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.load_scaler(state["scaler"])

    def load_scaler(self, state: dict[str, Any]) -> None:
        """The scale of fp16; a run that was in another precision so far has none, {}, and begins with a new one."""
        if state:
            self.scaler.load_state_dict(state)

    def make_momentum(self) -> None:
        """Zeros where there is no momentum buffer yet: the first update is then what it is without them.

        torch's fused SGD makes them in its first step, and leaves them unwritten where that step overflows (fp16).
        """
        for group in self.optimizer.param_groups:
            for p in group["params"] if group["momentum"] else ():
                self.optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))


@dataclass
class Tally:
    """Sums over the steps since the last reading: each loss, the total, and the target weight of the predicted class.

    The tensor is a running sum on the device, the count a number on the host; `read` is the only synchronisation.
    """

    names: list[str]
    sums: Tensor | None = None
    steps: int = 0

    def add(self, losses: dict[str, Tensor], logits_JBK: Tensor, target_LBK: Tensor, weight: float = 1.0) -> None:
        """Add one step. Under a mix, predicting a class counts by its share of the target, so lam-weighted top-1.

        `weight`: of the images here in the mean over all, see Plan.weight.
        """
        self.names = [*losses, "top1"]
        guess_JB1 = logits_JBK.detach().argmax(-1, keepdim=True)
        target_JBK = target_LBK.expand(logits_JBK.shape[0], -1, -1)
        hit = 100 * target_JBK.gather(-1, guess_JB1).mean()
        values = torch.stack([*(loss.detach().float() for loss in losses.values()), hit])
        self.sums = values * weight if self.sums is None else self.sums.add(values, alpha=weight)
        self.steps += 1

    def over_all(self, mesh: Mesh) -> Tensor | None:
        """The sums of one process that had all peers and images: losses add up over peers, all else is a mean."""
        if self.sums is None or mesh.size == 1:
            return self.sums
        sums = mesh.sum(self.sums) / mesh.data
        sums[-1] /= mesh.peer  # top1
        return sums

    def read(self, mesh: Mesh = ONE) -> dict[str, float]:
        """Means since the last reading, and start anew: {loss names ..., "total", "top1" in percent}."""
        sums = self.over_all(mesh)
        if sums is None:
            return {}
        means = dict(zip(self.names, (sums / self.steps).tolist(), strict=True))
        top1 = means.pop("top1")
        self.sums, self.steps = None, 0
        return {**means, "total": sum(means.values()), "top1": top1}


class Step:
    """`predict`: one batch's outputs. `forward`: its losses too. `train`: the same, and the update.

    Args:
        mix: Views and Draws to Batch.
        device_type: of autocast.
        dtype: of autocast; float32 means none.
        compiled: compile mix, peers and method as one graph.
        graphed: captures `gradients` in a CUDA graph, for batches of so many images (see graph.py); None does not.
        over: with the processes that see the batch's other images.
    """

    def __init__(
        self,
        mix: MixBatch,
        device_type: str,
        dtype: torch.dtype,
        *,
        compiled: bool = False,
        graphed: int | None = None,
        over: Exchange = ALONE,
    ):
        self.mix, self.device_type, self.dtype, self.over = mix, device_type, dtype, over
        self._forward = torch.compile(self.forward, dynamic=False) if compiled else self.forward
        self._gradients: Callable[..., tuple[dict[str, Tensor], Tensor, Tensor]] = (
            self.gradients if graphed is None else Graphed(self.gradients, graphed)
        )
        self._keeps_gradients = graphed is not None  # a graph adds to them where they are

    def predict(self, learner: Learner, views: Views, draws: Draws) -> tuple[Batch, Outputs]:
        """One batch through the mix and the peers."""
        batch = self.mix(views, draws)
        with self.autocast():
            return batch, learner.peers(batch.image_VBCHW)

    def forward(self, learner: Learner, views: Views, draws: Draws) -> tuple[Batch, Outputs, dict[str, Tensor]]:
        """One batch through the mix, the peers and the method. The losses are float32 whatever autocast does."""
        batch, outputs = self.predict(learner, views, draws)
        with self.autocast():
            return batch, outputs, learner.method(outputs, batch, learner.peers)

    def autocast(self) -> torch.autocast:
        """The context of all forwards."""
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def gradients(
        self, learner: Learner, views: Views, draws: Draws, share: float | Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Add one batch's gradients, weighed by `share`; returns losses, logits_JBK and target_LBK, without a graph.

        Raises: RunError, naming the method, where it returns no scalars, or by names that the record has for its own.
        """
        batch, outputs, losses = self._forward(learner, views, draws)
        _check_losses(learner.method, losses)
        total = torch.stack(list(losses.values())).sum()
        learner.scaler.scale(total * share).backward()
        return {name: loss.detach() for name, loss in losses.items()}, outputs.logits_JBK.detach(), batch.target_LBK

    def train(
        self,
        learner: Learner,
        views: Views,
        draws: Draws,
        tally: Tally,
        *,
        lr: float,
        share: float,
        update: bool,
        weight: float = 1.0,
    ) -> None:
        """One batch's gradients, weighed by `share` (1 / the batches of this update); then the update, if it is due.

        `weight`: of the images here in the mean over all, see Plan.weight.
        """
        tally.add(*self._gradients(learner, views, draws, share * weight), weight)
        if update:
            parameters = (p for group in learner.optimizer.param_groups for p in group["params"])
            self.over.average_(p.grad for p in parameters if p.grad is not None)
            for group in learner.optimizer.param_groups:
                group["lr"] = lr
            learner.scaler.step(learner.optimizer)
            learner.scaler.update()
            learner.optimizer.zero_grad(set_to_none=not self._keeps_gradients)


_TAKEN = {"total", "top1"}  # what a record has beside the losses


def _check_losses(method: Any, losses: Any) -> None:
    """Refuse what cannot be added up: a method may be anybody's. Shapes are known without waiting for the device."""
    told: Any = type(losses).__name__
    if isinstance(losses, dict):
        told = {name: tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for name, x in losses.items()}
        if taken := _TAKEN & told.keys():
            raise RunError(f"method: no loss of {type(method).__name__} may be named {taken.pop()}, as in the record")
        if told and all(shape == () for shape in told.values()):
            return
    raise RunError(
        f"method: forward of {type(method).__name__} must return named losses, each a tensor of shape (), such as a "
        f"sum over the peers; it returns {told}"
    )
