"""Features of one size, for what compares peers of different architectures."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cutnmix.models.peers import by_number
from cutnmix.trainer.losses import at_least_float32


class Projection(nn.Module):
    """The features stacked, (J, B, D); with `dim`, each first through a linear map of its own to that size.

    The maps belong to the method. What compares features by their distance must not train them: maps to 0 would make
    it 0. Then they stay as they were drawn, with orthonormal rows (or columns, where `dim` is more than D_j). Without
    `dim` features of one size pass unchanged.

    Args: `feature_dims` D_j of each peer, `dim` the common size or None, `term` what needs it, for the message,
    `trained` whether the maps are, `own` the numbers of the peers whose features come in, None for all.
    Raises: ValueError, naming `method.feature_dim`, if the sizes differ and `dim` is None.
    """

    def __init__(
        self, feature_dims: Sequence[int], dim: int | None, *, term: str, trained: bool, own: range | None = None
    ) -> None:
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
            if not trained:
                for linear in maps:
                    nn.init.orthogonal_(linear.requires_grad_(False).weight)
            own = range(len(maps)) if own is None else own
            self.maps = by_number(own, [maps[j] for j in own])

    @staticmethod
    def size(feature_dims: Sequence[int], dim: int | None) -> int:
        """D of what comes out."""
        return dim or feature_dims[0]

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """J features (B, D_j) to (J, B, D), at least float32 where they are mapped."""
        if self.maps is None:
            return torch.stack(tuple(features))
        with torch.autocast(features[0].device.type, enabled=False):
            return torch.stack(
                [linear(at_least_float32(feature)) for linear, feature in zip(self.maps, features, strict=True)]
            )
