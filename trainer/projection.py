"""Features of one size, for what compares peers of different architectures."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cutnmix.models.peers import by_number
from cutnmix.trainer.losses import at_least_float32


class Projection(nn.Module):
    """The features stacked, (J, B, D); where their sizes differ, each first through a linear map of its own to `dim`.

    The maps are trained with the peers and belong to the method. Without `dim` features of one size pass unchanged.

    Args: `feature_dims` D_j of each peer, `dim` the common size or None, `term` what needs it, for the message, `own`
    the numbers of the peers whose features come in, None for all.
    Raises: ValueError, naming `method.feature_dim`, if the sizes differ and `dim` is None.
    """

    def __init__(self, feature_dims: Sequence[int], dim: int | None, *, term: str, own: range | None = None) -> None:
        super().__init__()
        if dim is None and len(set(feature_dims)) > 1:
            sizes = ", ".join(map(str, feature_dims))
            raise ValueError(
                f"method.feature_dim: {term} compares features, but those of the peers have {sizes} numbers; "
                f"set the key to project them to one size, or switch the term off"
            )
        self.maps = None
        if dim:
            maps = [nn.Linear(D, dim, bias=False) for D in feature_dims]  # all, as each draws after the last
            own = range(len(maps)) if own is None else own
            self.maps = by_number(own, [maps[j] for j in own])

    @staticmethod
    def size(feature_dims: Sequence[int], dim: int | None) -> int:
        """D of what comes out."""
        return dim or feature_dims[0]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """J features (B, D_j) to (J, B, D)."""
        if self.maps is None:
            return torch.stack(tuple(features))
        return torch.stack(
            [linear(at_least_float32(feature)) for linear, feature in zip(self.maps, features, strict=True)]
        )
