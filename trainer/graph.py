"""`compile: graph`: mix, J forwards, losses and backward as one CUDA graph, launched whole instead of kernel by kernel.

One capture for all peers, on purpose not torch.compile's mode "reduce-overhead": there each compiled module is a graph
of its own, whose outputs the next one's replay writes over while the losses still need them (pytorch#160281, #170604),
and gradients of several batches fail (#169545). The peers are compiled one by one, as under `compile: peers`; what is
captured is all that they and the method launch.

What holds, for any method:
- A captured graph reads and writes fixed places in memory. A batch is copied into them (`Fixed`), gradients are added
  to tensors that stay where they are, and what leaves a replay is a copy: nothing that anybody holds is written over.
- The first steps run eagerly, as real steps of the run, and the capture itself executes nothing. So no step is trained
  twice, and batch norms and a method's memory are what they are without a graph.
- A batch of other shapes (the last of an epoch, if it is smaller) runs eagerly.
- The update stays outside: it is a few launches, and the learning rate changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.plan import Draws

WARMUP = 3  # steps, in which compilers compile and libraries choose their algorithms


class Fixed:
    """Tensors that stay at their places in memory, with the shapes and dtypes of an example; `tree` has its structure.

    Args: `example` is a nested tuple of tensors, numbers and None. What is no tensor must stay as it is.
    """

    def __init__(self, example: Any):
        leaves, self.spec = pytree.tree_flatten(example)
        self.leaves = [torch.empty_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.tree = pytree.tree_unflatten(self.leaves, self.spec)

    def fits(self, tree: Any) -> bool:
        """Whether `fill` can take it."""
        leaves, spec = pytree.tree_flatten(tree)
        return spec == self.spec and [*map(_kind, leaves)] == [*map(_kind, self.leaves)]

    def fill(self, tree: Any) -> None:
        """Copy the tensors in. No host synchronisation."""
        for place, leaf in zip(self.leaves, pytree.tree_leaves(tree), strict=True):
            if isinstance(place, Tensor):
                place.copy_(leaf)


def _kind(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


class Graphed:
    """`gradients(learner, views, draws, share)` of one learner: captured once, then replayed for every full batch.

    Args:
        gradients: adds one batch's gradients to those that are there; returns a nested tuple or dict of tensors.
        num_images: that the loader reads for a full batch.
    """

    def __init__(self, gradients: Callable[..., Any], num_images: int):
        self.gradients, self.num_images = gradients, num_images
        self.steps = 0
        self.inputs: Fixed | None = None
        self.replay: Callable[[], Any] | None = None

    def __call__(self, learner: Any, views: Views, draws: Draws, share: float) -> Any:
        """What `gradients` returns; of a replay a copy, which no later replay touches."""
        if len(views.index_B) != self.num_images:
            return self.gradients(learner, views, draws, share)
        views = views.made()  # not a resident data set, whole, is copied into its fixed place, but the batch
        if self.inputs is None:
            self.inputs = Fixed((views, draws))
            self.share = torch.empty((), device=views.index_B.device)
            self.stream = torch.cuda.Stream(self.share.device)
        if not self.inputs.fits((views, draws)):
            return self.gradients(learner, views, draws, share)
        self.inputs.fill((views, draws))
        self.share.fill_(share)
        if self.steps < WARMUP:
            self.steps += 1
            return self._beside(learner)
        if self.replay is None:
            self.replay = self._capture(learner)
        return self.replay()

    def _on_inputs(self, learner: Any) -> Any:
        assert self.inputs is not None
        return self.gradients(learner, *self.inputs.tree, self.share)

    def _beside(self, learner: Any) -> Any:
        """Eagerly, on the stream of the capture: autograd remembers where it first met a parameter."""
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            made = self._on_inputs(learner)
        here.wait_stream(self.stream)
        return made

    def _capture(self, learner: Any) -> Callable[[], Any]:
        """Executes nothing; what comes back does, and returns copies."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's threads may allocate meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            made = self._on_inputs(learner)

        def replay() -> Any:
            graph.replay()
            return pytree.tree_map(torch.clone, made)

        return replay
