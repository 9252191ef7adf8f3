"""The laws that a plan draws by: a view's distortions and the mix, as a configuration names them."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cutnmix.pipeline.boxes import BoxRule


class _Law(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Colour(_Law):
    """Half-widths of the colour draws; all 0 = off. Hue in degrees."""

    brightness: Annotated[float, Field(ge=0, le=1)] = 0.0
    contrast: Annotated[float, Field(ge=0, le=1)] = 0.0
    saturation: Annotated[float, Field(ge=0, le=1)] = 0.0
    hue: Annotated[float, Field(ge=0, le=180)] = 0.0

    @property
    def active(self) -> bool:
        """Whether any colour is drawn."""
        return any((self.brightness, self.contrast, self.saturation, self.hue))


class Distort(_Law):
    """The law of one view's distortions (YAML group `distort`). Lengths in pixels, angles in degrees."""

    pad: Annotated[int, Field(ge=0)] = 4  # data sets held as arrays only; zero (black) padding, then a random crop
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    colour: Colour = Colour()
    rotation: Annotated[float, Field(ge=0, le=180)] = 0.0
    cutout: Annotated[int, Field(ge=0)] = 0
    # The rest is for data sets of image files: a random resized crop, or the centre for evaluation.
    image_size: Annotated[int, Field(ge=1)] = 224
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    region: Literal["random", "centre"] = "random"

    @model_validator(mode="after")
    def _ordered(self) -> "Distort":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must satisfy 0 < low <= high <= 1, not {self.crop_scale}")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio must satisfy 0 < low <= high, not {self.crop_ratio}")
        return self

    def evaluation(self) -> "Distort":
        """The same size with nothing random in it: what a test image goes through."""
        return Distort(pad=0, flip=0.0, image_size=self.image_size, region="centre")


class Mix(_Law):
    """The law of the mix (YAML group `mix`). The defaults are what each mix's paper says.

    cutmix   one box and one lambda a batch (Yun et al. 2019, arXiv:1905.04899)
    cutnmix  a box a peer, one lambda a batch (Shen et al. 2022, arXiv:2206.12370)
    mixup    lam x + (1 - lam) x[partner], one lambda a batch (Zhang et al. 2018, arXiv:1710.09412)
    cutout   one hole a view and image, filled with the mean colour; the label stays (DeVries and Taylor 2017)
    """

    name: Literal["none", "cutmix", "cutnmix", "mixup", "cutout"] = "none"
    alpha: Annotated[float, Field(gt=0)] = 1.0
    probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    box_rule: BoxRule | None = None  # cutmix, cutnmix
    length: Annotated[int, Field(ge=1)] | None = None  # cutout, pixels; None: 16, in a run on CIFAR-100 or digits16 8
    # Partners are drawn within each of so many parts of a batch, so that no pixel leaves its part. None: 1, and in a
    # run over several devices as many as the data axis has.
    groups: Annotated[int, Field(ge=1)] | None = None

    @property
    def has_boxes(self) -> bool:
        """Whether boxes are cut."""
        return self.name in ("cutmix", "cutnmix")

    @property
    def has_partner(self) -> bool:
        """Whether images and labels of two are mixed."""
        return self.has_boxes or self.name == "mixup"

    @property
    def rule(self) -> BoxRule:
        """`box_rule`, or the definition's own: clip_corrected for CutMix, clip_shared for CutnMix."""
        return self.box_rule or ("clip_shared" if self.name == "cutnmix" else "clip_corrected")
