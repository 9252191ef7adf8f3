"""CutnMix: J views of one batch, each cut and mixed with its own box, one lambda and one partner for all (Eq. 5-7).

    image_j[i]  = inside box_j: view_j[partner[i]], outside: view_j[i]                                        (5)
    target_j[i] = lam * y[i] + (1 - lam) * y[partner[i]]                                                      (6)
    lam_j       = lam for every peer j                                                                        (7)

Source: Shen et al., "Mixed Sample Augmentation for Online Distillation". `boxes.py` defines lam and the boxes. All here
is tensors on the images' device: no host synchronisation, one graph under torch.compile, channels_last kept.
"""

import math
from numbers import Integral
from typing import Any

import torch
from kornia.augmentation import MixAugmentationBaseV2
from kornia.constants import DataKey
from kornia.geometry.bbox import bbox_generator, bbox_to_mask
from torch import Tensor

from cutnmix.pipeline.boxes import BOX_RULES, place_boxes


def box_mask(box_M4: Tensor, width: int, height: int) -> Tensor:
    """(M, 4) half-open boxes (x0, y0, x1, y1) to (M, H, W) bool masks, True inside."""
    x0, y0, x1, y1 = box_M4.float().unbind(-1)
    return bbox_to_mask(bbox_generator(x0, y0, x1 - x0, y1 - y0), width, height).bool()


def paste(image_VBCHW: Tensor, box_M4: Tensor, partner_B: Tensor) -> Tensor:
    """Eq. 5: each view with its partner's pixels inside its box. Any dtype; (max(V, M), B, C, H, W), strides kept.

    V and M are J or 1: one view under J boxes gives J images, J views under one box are all cut alike (CutMix).
    """
    height, width = image_VBCHW.shape[-2:]
    mask_MHW = box_mask(box_M4, width, height)
    return torch.where(mask_MHW[:, None, None], image_VBCHW[:, partner_B], image_VBCHW)


def mix_target(label_B: Tensor, partner_B: Tensor, lam_L: Tensor, num_classes: int) -> Tensor:
    """Eq. 6: lam * onehot(y) + (1 - lam) * onehot(y[partner]), (L, B, K) float32; each row sums to 1."""
    own_BK = one_hot(label_B, num_classes)
    return torch.lerp(own_BK[partner_B], own_BK, lam_L[:, None, None])


def one_hot(label_B: Tensor, num_classes: int) -> Tensor:
    """(B, K) float32, without the int64 of F.one_hot and its look at the values on a CPU."""
    return (label_B[:, None] == torch.arange(num_classes, device=label_B.device)).float()


class CutnMix(MixAugmentationBaseV2):
    """CutnMix as a Kornia augmentation: draws its parameters on the images' device, or replays the ones passed.

    >>> mix = CutnMix(num_peers=2, num_classes=10, data_keys=["input", "class"])
    >>> image, target = mix(torch.rand(2, 64, 3, 32, 32), torch.randint(10, (64,)))   # (J, B, C, H, W), (B,)
    >>> image.shape, target.shape
    (torch.Size([2, 64, 3, 32, 32]), torch.Size([64, 10]))

    Input images: (J, B, C, H, W), a view a peer; (1, B, C, H, W) or (B, C, H, W), one view for all peers. float16,
    bfloat16, float32 or float64, any C, H, W and strides. Output: (J, B, C, H, W); with num_peers=1 and a 4-D input
    (B, C, H, W), which is CutMix. Gradients flow to the pixels that were kept.

    Input "class": (B,) integer labels; that they are within 0..K-1 is up to the caller: nothing here looks at their
    values. Output: soft targets (B, K) float32 where `num_classes` is given; otherwise Kornia's (1, B, 3) rows (label,
    partner's label, lam), lam being the weight of the FIRST of the two. Under clip_corrected with several peers lam
    differs between them: (J, B, K) or (J, B, 3).

    Args:
        num_peers: J, the number of boxes.
        alpha: of Beta(alpha, alpha), > 0.
        p: probability that a batch is mixed at all; a batch that is not has lam = 1 and empty boxes.
        box_rule: see cutnmix.pipeline.boxes.
        num_classes: K, or None for Kornia's label rows.
        generator: of the draws, on the images' device; None uses that device's default generator.
        data_keys: what the positional inputs are, of "input" and "class".

    Raises:
        ValueError: for arguments or shapes outside what is said here.
    """

    def __init__(
        self,
        num_peers: int = 2,
        *,
        alpha: float = 1.0,
        p: float = 1.0,
        box_rule: str = "clip_shared",
        num_classes: int | None = None,
        generator: torch.Generator | None = None,
        data_keys: list[str | int | DataKey] | None = None,
    ):
        super().__init__(p=1.0, p_batch=p, same_on_batch=True, data_keys=data_keys)
        if not isinstance(num_peers, Integral) or num_peers < 1:
            raise ValueError(f"num_peers must be a whole number of at least 1, not {num_peers!r}")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite, not {alpha}")
        if not 0 <= p <= 1:
            raise ValueError(f"p must lie in [0, 1], not {p}")
        if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
            raise ValueError(f"num_classes must be None or a whole number of at least 1, not {num_classes!r}")
        if box_rule not in BOX_RULES:
            raise ValueError(f"box_rule must be one of {', '.join(BOX_RULES)}, not {box_rule!r}")
        self.num_peers = num_peers
        self.alpha = alpha
        self.box_rule = box_rule
        self.num_classes = num_classes
        self.generator = generator
        self.flags = {"num_peers": num_peers, "alpha": alpha, "box_rule": box_rule}  # what repr() shows

    def generate_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Draw partner (B,), box (J, 4) and lam (L,) on `self.device`, without a host synchronisation.

        Beside them `size`, (0, H, W), whose shape says for which images: a shape is known without a look at the device.
        """
        device, generator = self.device, self.generator
        batch, height, width = batch_shape[-4], batch_shape[-2], batch_shape[-1]
        uniforms = torch.rand(batch + 4 + 2 * self.num_peers, device=device, generator=generator)
        key_B, gate, beta, centre_2, place = uniforms.split([batch, 1, 1, 2, 2 * self.num_peers])
        if self.alpha != 1:  # Beta(1, 1) is U(0, 1)
            # G / (G + G') of G ~ Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha), in logarithms: for a small alpha that
            # power of U is 0 to a float, and torch's own Dirichlet then gives 1/2.
            gamma_2 = torch._standard_gamma(torch.full((2,), self.alpha + 1, device=device), generator)
            log_2 = gamma_2.log() + torch.rand(2, device=device, generator=generator).log() / self.alpha
            beta = (log_2[:1] - log_2[1:]).sigmoid()
        nominal_lam = torch.where(gate < self.p_batch, beta, 1.0).squeeze()
        place_J2 = place.view(self.num_peers, 2)
        box_J4, lam_L = place_boxes(self.box_rule, nominal_lam, centre_2, place_J2, width, height)
        # Sorting uniforms is a uniform permutation; torch.randperm waits for a GPU.
        size_0HW = box_J4.new_empty(0, height, width)
        return {"partner": key_B.argsort(), "box": box_J4, "lam": lam_L, "size": size_0HW}

    def forward_parameters(self, batch_shape: tuple[int, ...]) -> dict[str, Tensor]:
        """What Kornia's containers ask for. The gate p is drawn with the rest, and no per-sample gate is needed."""
        return self.generate_parameters(batch_shape)

    def forward(  # type: ignore[override]
        self,
        *input: Tensor,
        params: dict[str, Tensor] | None = None,
        data_keys: list[str | int | DataKey] | None = None,
    ) -> Tensor | list[Tensor]:
        """Mix the inputs; `params` (as left in `_params` by an earlier call) are replayed instead of drawn.

        Raises: ValueError for params of another batch or image size, or of another number of peers.
        """
        keys = self.data_keys if data_keys is None else [DataKey.get(key) for key in data_keys]
        if len(input) != len(keys):  # Kornia pairs them up and drops the rest
            names = ", ".join(key.name.lower() for key in keys)
            raise ValueError(f"got {len(input)} inputs for {len(keys)} data_keys ({names}): name every input there")
        if params is None:
            if DataKey.INPUT not in keys:
                raise ValueError("without images there is nothing to draw for: pass 'input' too, or params")
            image = self.transform_tensor(input[keys.index(DataKey.INPUT)])
            self.device = image.device
            params = self.forward_parameters(tuple(image.shape))
        return super().forward(*input, params=params, data_keys=data_keys)

    def transform_tensor(self, input: Tensor, **_: Any) -> Tensor:
        """Check the images' rank and dtype, nothing else."""
        if input.dim() not in (4, 5) or not input.is_floating_point():
            raise ValueError(
                f"CutnMix takes floating point images (J, B, C, H, W) or (B, C, H, W), "
                f"not {tuple(input.shape)} of {input.dtype}"
            )
        if input.dim() == 5 and input.shape[0] not in (1, self.num_peers):
            raise ValueError(f"got {input.shape[0]} views for num_peers={self.num_peers}: pass 1 or {self.num_peers}")
        return input

    def transform_input(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any]) -> Tensor:
        """Eq. 5. The gate p is already in the boxes, so there is nothing to branch on."""
        image = self.transform_tensor(input)
        views_VBCHW = image if image.dim() == 5 else image[None]
        _, batch, _, *size = views_VBCHW.shape
        own, drawn = [self.num_peers, batch, *size], [len(params["box"]), len(params["partner"]), *size]
        if "size" in params:  # not in those made by hand
            drawn[2:] = params["size"].shape[1:]
        if drawn != own:
            raise ValueError("params are of {} peers, {} images, {} x {}; not of {}, {}, {} x {}".format(*drawn, *own))
        # Kornia's containers draw on the host unless they were moved; on the images' own device `to` does nothing.
        box_J4, partner_B = (params[name].to(image.device) for name in ("box", "partner"))
        mixed_JBCHW = paste(views_VBCHW, box_J4, partner_B)
        return mixed_JBCHW[0] if image.dim() == 4 and self.num_peers == 1 else mixed_JBCHW

    def transform_class(self, input: Tensor, params: dict[str, Tensor], flags: dict[str, Any]) -> Tensor:
        """Eq. 6."""
        if input.shape != params["partner"].shape or input.dtype.is_floating_point or input.dtype.is_complex:
            raise ValueError(
                f"CutnMix takes labels as {len(params['partner'])} whole numbers, one an image, "
                f"not {tuple(input.shape)} of {input.dtype}"
            )
        partner_B, lam_L = (params[name].to(input.device) for name in ("partner", "lam"))
        if self.num_classes is None:
            own_B, lam_L1 = input.float(), lam_L[:, None]
            return torch.stack(torch.broadcast_tensors(own_B, own_B[partner_B], lam_L1), dim=-1)
        target_LBK = mix_target(input, partner_B, lam_L, self.num_classes)
        return target_LBK[0] if target_LBK.shape[0] == 1 else target_LBK

    def _validate_data_key(self, key: DataKey) -> None:
        if key not in (DataKey.INPUT, DataKey.CLASS):
            raise ValueError(f"CutnMix mixes data keys 'input' and 'class', not {key.name.lower()!r}")
