"""What every network of this project is: a trunk, and a branch that ends in logits and a feature.

    image (B, C, H, W) -> trunk -> map (B, E, h, w) -> branch: last stage, global average, head -> (logits, feature)

The cut stands before the last stage, where ONE (NeurIPS 2018), OKDDip (AAAI 2020) and PCL (AAAI 2021) cut: peers of the
form `branches` share the trunk and have a branch each (peers.py).
"""

from collections.abc import Sequence

from torch import Tensor, nn


class Branch(nn.Module):
    """(logits_BK, feature_BD) of a map: head(feature), feature = the global average of stage(map).

    Args:
        stage: the last stage, with the norm and the ReLU that belong before the average.
        head: feature to logits.
        feature_dim: D.
    """

    def __init__(self, stage: nn.Module, head: nn.Module, feature_dim: int) -> None:
        super().__init__()
        self.stage, self.head, self.feature_dim = stage, head, feature_dim

    def forward(self, map_BEHW: Tensor) -> tuple[Tensor, Tensor]:
        """The feature is what follows the last ReLU, so it is never negative."""
        feature_BD = self.stage(map_BEHW).mean((2, 3))
        return self.head(feature_BD), feature_BD


class Network(nn.Module):
    """branch(trunk(image)).

    Args:
        trunk: image to map.
        branch: map to (logits, feature).
        trunk_dim: E, the channels of the map.
    """

    def __init__(self, trunk: nn.Module, branch: Branch, trunk_dim: int) -> None:
        super().__init__()
        self.trunk, self.branch, self.trunk_dim = trunk, branch, trunk_dim

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.branch.feature_dim

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_BK, feature_BD)."""
        return self.branch(self.trunk(image_BCHW))


def preactivation(stages: Sequence[nn.Module], width: int, trunk_dim: int, num_classes: int) -> Network:
    """The network of stages whose blocks begin with their norms, so that a last BN and relu stand before the average.

    They belong to the branch, as the last stage does, which ends in `width` channels. The bias of the head begins at 0.
    """
    last = nn.Sequential(stages[-1], nn.BatchNorm2d(width), nn.ReLU(inplace=True))
    head = nn.Linear(width, num_classes)
    nn.init.zeros_(head.bias)
    return Network(nn.Sequential(*stages[:-1]), Branch(last, head, feature_dim=width), trunk_dim)
