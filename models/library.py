"""Networks of torchvision and timm by name, cut so that they give a feature beside their logits.

    image (B, C, H, W) -> body -> feature (B, D) -> head, the last Linear -> logits (B, K)

No weights are downloaded: they are drawn anew from torch's global generator, as those of our own networks are. There is
no trunk or branch here. The rest is as its makers built it: dropout, where it has some, draws from the device's
generator, and a stem made for 224 pixels leaves little of 32. Deviation: googlenet and inception_v3 are built without
their auxiliary classifiers.
"""

import inspect
import re
from collections.abc import Callable, Iterable
from difflib import SequenceMatcher, get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

LIBRARIES = ("torchvision", "timm")
INSTALL = 'pip install "cutnmix[timm]"'
PROBE_CLASSES = 7919  # a prime that no layer has for a width, so that only heads have so many outputs
LIKE = 0.5  # of SequenceMatcher: where a name is near enough to be meant
# Without their second classifiers, whose losses no method here knows; init_weights only because leaving it out warns.
ALONE = {"aux_logits": False, "init_weights": True}
KEYS = {"torchvision.googlenet": ALONE, "torchvision.inception_v3": ALONE}


class Borrowed(nn.Module):
    """(head(body(image)), body(image)): a network of another library whose head is taken off its body.

    The feature is exactly what the head sees: after its norm, activation and dropout, whatever they are there.

    Args: `net` is changed in place, `path` is where its head is in it.
    """

    def __init__(self, net: nn.Module, path: str) -> None:
        super().__init__()
        head = cast(nn.Linear, net.get_submodule(path))
        net.set_submodule(path, nn.Identity())
        self.body, self.head, self.feature_dim = net, head, head.in_features
        self.image_size = own_size(net)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(logits_BK, feature_BD)."""
        feature_BD = self.body(image_BCHW)
        return self.head(feature_BD), feature_BD


class _Seen(nn.Identity):
    """Keeps what passed it."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def forward(self, input: Tensor) -> Tensor:
        self.inputs.append(input)
        return input


def borrow(name: str, num_classes: int) -> Borrowed:
    """The network `torchvision.NAME` or `timm.NAME`, its weights drawn from torch's global generator.

    Raises: ValueError, naming the key `peers.network`, for one that cannot be cut into body and head.
    """
    return Borrowed(_make(name, num_classes), find_head(name))


def library_names(library: str) -> list[str]:
    """NAMEs of all image classifiers of `torchvision` or `timm`. ValueError where timm is not installed."""
    if library == "torchvision":
        import torchvision  # takes seconds, and our own networks need none of it

        return torchvision.models.list_models(module=torchvision.models)
    if find_spec("timm") is None:
        raise ValueError(f"peers.network: timm is not installed: {INSTALL}")
    import timm  # optional, and takes seconds

    return timm.list_models()


def nearest(name: str, ours: Iterable[str]) -> str | None:
    """The name most like it among ours and those of the libraries that are there; None where none is much like it.

    Of the library that it names, where that is one. Else one of ours that begins so (resnet18 is resnet18_cifar, for
    images of 32 pixels, sooner than torchvision's); else the very same name of a library; else one of ours that is much
    like it; else any, first by what stands behind the library's name, then by the library's; torchvision, which is
    always there, before timm.
    """
    ours, libraries = list(ours), [library for library in LIBRARIES if find_spec(library)]
    names = [*ours, *(f"{library}.{rest}" for library in libraries for rest in library_names(library))]
    rest, library = _parts(name)
    if library in libraries:
        names = [known for known in names if _parts(known)[1] == library]
    elif not library:
        longer = [known for known in ours if rest and known.startswith(rest)]
        same = [known for known in names if _parts(known)[0] == rest]
        names = longer or same or get_close_matches(rest, ours, n=9, cutoff=0.8) or names

    def likeness(known: str) -> tuple[float, int, float]:
        known_rest, known_library = _parts(known)
        alike = SequenceMatcher(None, rest, known_rest).ratio()
        in_place = sum(one == other for one, other in zip(rest, known_rest, strict=False))  # resnet21: 20, not 32
        return alike, in_place, SequenceMatcher(None, library, known_library).ratio()

    near = max(names, key=likeness)
    return near if likeness(near)[0] >= LIKE else None


def describe(name: str) -> str:
    """What the library says of `torchvision.NAME` or `timm.NAME`: the first paragraph, links written out."""
    library, _, rest = name.partition(".")
    if library == "torchvision":
        import torchvision

        builder = torchvision.models.get_model_builder(rest)
    else:
        import timm

        builder = timm.model_entrypoint(rest)
    text = " ".join((inspect.getdoc(builder) or "").partition("\n\n")[0].split())
    return re.sub(r"`([^`<]*?) ?<([^>]*)>`_+", r"\1, \2", text)


def own_size(net: nn.Module) -> int | None:
    """The side of the images that a network is made for, where it says so."""
    if isinstance(size := getattr(net, "image_size", None), int):  # torchvision's vision transformers
        return size
    return getattr(net, "default_cfg", {}).get("input_size", (None,))[-1]  # timm's networks


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """build() with shapes and no numbers, on the meta device; the CPU's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return build()
        except (RuntimeError, TypeError):  # many read widths or rates off tensors, so those need numbers
            with torch.device("cpu"):
                return build().to("meta")


@cache
def find_head(name: str) -> str:
    """The path of the Linear that ends a network, found and checked on the meta device.

    Raises: ValueError, naming the key `peers.network`, if there is none, or more than one, or something follows it.
    """
    net = on_meta(lambda: _make(name, PROBE_CLASSES))
    heads = [path for path, m in net.named_modules() if isinstance(m, nn.Linear) and m.out_features == PROBE_CLASSES]
    refusal = f"peers.network: {name} cannot be cut into a body that ends in a feature and a linear head"
    if not heads:
        raise ValueError(f"{refusal}: its classifier is no Linear layer")
    if len(heads) > 1:
        raise ValueError(f"{refusal}: it has {len(heads)} heads ({', '.join(heads)})")
    seen, size = _Seen(), own_size(net) or 224
    net.set_submodule(heads[0], seen)
    with torch.no_grad():
        out = net(torch.empty(2, 3, size, size, device="meta"))
    if len(seen.inputs) != 1 or out is not seen.inputs[0] or out.ndim != 2:
        raise ValueError(
            f"{refusal}: its output is not that of its last Linear layer, {heads[0]}, for one feature each"
        )
    return heads[0]


def _parts(name: str) -> tuple[str, str]:
    library, _, rest = name.partition(".")
    return (rest, library) if rest else (library, "")


def _make(name: str, num_classes: int) -> nn.Module:
    library, _, rest = name.partition(".")
    if library == "torchvision":
        import torchvision

        keys: dict[str, Any] = KEYS.get(name, {})
        return torchvision.models.get_model(rest, weights=None, num_classes=num_classes, **keys)
    import timm

    return timm.create_model(rest, pretrained=False, num_classes=num_classes)
