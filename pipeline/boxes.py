"""Where CutnMix cuts: the laws of lambda and of the boxes, as pure functions of uniform draws.

`lam` is, everywhere in this project, the share of its own pixels that an image KEEPS, and so the weight of its own
label; 1 - lam is the share of the partner pasted into the box. (Eq. 5-6 of the paper call the kept image x_k and the
pasted one x_i; Beta(1, 1) is symmetric, so only the names differ. Kornia's default is the other way round.)

A box is (x0, y0, x1, y1) in pixels, half open: it covers x0 <= x < x1 and y0 <= y < y1. It may be empty.

Four rules (W, H image size, l the draw from Beta(alpha, alpha), cut = floor((W, H) * sqrt(1 - l)) as in CutMix):

    clip_shared     a centre uniform over the pixels and the cut around it, clipped at the border, give w' x h' and
                    lam = 1 - w' h' / (W H), both SHARED by all peers; every peer places its w' x h' box uniformly
                    inside the image. CutMix's law of areas (mean lam 0.70 at 32 x 32) and Eq. 7, both exactly.
    inside          no clipping: every peer places a cut-sized box uniformly inside; lam = 1 - cut area, shared.
    clip_corrected  every peer clips a box around its own centre; lam is each peer's own share. With one box for all
                    peers it is CutMix as published (Yun et al. 2019, as corrected); with a box a peer it breaks Eq. 7.
    clip_nominal    the same boxes, but lam = l unclipped: CutMix's first release. The label is off by 0.20 on average.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

BoxRule = Literal["clip_shared", "inside", "clip_corrected", "clip_nominal"]
BOX_RULES: tuple[str, ...] = get_args(BoxRule)


def place_boxes(
    rule: str, nominal_lam: Tensor, centre_2: Tensor, place_J2: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """Boxes (..., J, 4) int32 and lam (..., L) float32 from uniform draws, by one of the four rules.

    Args:
        rule: one of BOX_RULES.
        nominal_lam: (...), the draw from Beta(alpha, alpha); 1 gives empty boxes, 0 the largest.
        centre_2: (..., 2), uniform in [0, 1): the shared centre (x, y), used by clip_shared.
        place_J2: (..., J, 2), uniform in [0, 1): each peer's own placement (or centre, for the other clip rules).
        width: W in pixels.
        height: H in pixels.

    Returns:
        Boxes, and lam with L = 1 (shared by all peers) or, under clip_corrected, L = J.
    """
    # (W, H), built on the device: torch.tensor([...], device=...) would copy from the host and wait for it.
    size_2 = torch.linspace(width, height, 2, device=nominal_lam.device)
    cut_2 = (size_2 * (1 - nominal_lam).sqrt().unsqueeze(-1)).floor()
    if rule in ("clip_shared", "inside"):
        extent_12 = cut_2.unsqueeze(-2)
        if rule == "clip_shared":
            start_2, stop_2 = _clipped(centre_2, cut_2, size_2)
            extent_12 = (stop_2 - start_2).unsqueeze(-2)
        room_12 = size_2 - extent_12
        # At most room: in floating point too, a uniform below 1 times an integer stays below that integer.
        start_J2 = (place_J2 * (room_12 + 1)).floor()
        stop_J2 = start_J2 + extent_12
        extent_L2 = extent_12
    else:
        start_J2, stop_J2 = _clipped(place_J2, cut_2.unsqueeze(-2), size_2)
        extent_L2 = stop_J2 - start_J2
    box_J4 = torch.cat([start_J2, stop_J2], dim=-1).to(torch.int32)
    if rule == "clip_nominal":
        return box_J4, nominal_lam.unsqueeze(-1).float()
    return box_J4, (1 - extent_L2.prod(dim=-1) / (width * height)).float()


def _clipped(centre_2: Tensor, cut_2: Tensor, size_2: Tensor) -> tuple[Tensor, Tensor]:
    """CutMix's box around a uniform pixel: centre -+ cut // 2, clipped to the image (odd cuts floor to even)."""
    pixel_2 = (centre_2 * size_2).floor()
    half_2 = cut_2 // 2
    return (pixel_2 - half_2).clamp(min=0), (pixel_2 + half_2).minimum(size_2)
