"""What can be known of the CUDA path without a GPU: on fake CUDA tensors, and lowered to Triton for an H100.

Fake tensors raise where a value would be read (`.item()`, a bool, a mask's nonzero) and where devices are mixed up;
`oracle.Dispatches` catches the copies between devices that they let through.
"""

from collections.abc import Iterator
from dataclasses import replace

import kornia.augmentation as K
import oracle
import pytest
import torch
from lowering import ARCHS, kernels, launches, library_calls, lowered, lowers
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cutnmix.pipeline.boxes import BOX_RULES
from cutnmix.pipeline.cutnmix import CutnMix
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Colour, Distort, Mix
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Draws, Plan
from cutnmix.pipeline.resident import ResidentLoader

H, W, BATCH, J = 32, 32, 8, 3
COLOUR = Colour(brightness=0.4, contrast=0.4, saturation=0.4, hue=40)
DISTORTIONS = pytest.mark.parametrize(
    "distort",
    [Distort(), Distort(cutout=8), Distort(colour=COLOUR), Distort(rotation=30.0, colour=COLOUR, cutout=8)],
    ids=["crop flip", "cutout", "colour", "everything"],
)
MIXES = pytest.mark.parametrize("name", ["none", "cutmix", "cutnmix", "mixup", "cutout"])
SECOND = pytest.mark.parametrize("second", [None, "image", "class"])


@pytest.fixture
def fake() -> Iterator[FakeTensorMode]:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def on_cuda(plan: Plan) -> Plan:
    """As Plan.to, which would pin memory: that needs a driver."""
    return replace(plan, **{name: field.to("cuda") for name, field in vars(plan).items() if isinstance(field, Tensor)})


def build(
    distort: Distort, name: str = "cutnmix", V: int = J, batch: int = BATCH, second: str | None = None
) -> tuple[ResidentLoader, MixBatch, Draws]:
    """Loader, mix and the draws of one step on the fake GPU."""
    dataset = oracle.images(2 * batch, H, W)
    plan = make_plan(
        seed=0, epoch=0, num_images=len(dataset), size=(H, W), batch_size=batch, distort=distort, mix=Mix(name=name),
        num_views=V, num_peers=J, second=second, label_N=dataset.labels,
    )  # fmt: skip
    mix = MixBatch(mean=dataset.mean, std=dataset.std, size=(H, W), num_classes=5, dtype=torch.bfloat16).to("cuda")
    return ResidentLoader(dataset, distort, "cuda"), mix, on_cuda(plan).step(0)


@DISTORTIONS
@MIXES
@pytest.mark.parametrize("V", [1, J])
@SECOND
def test_resident_and_mix_stay_on_the_gpu_and_read_nothing(distort, name, V, second, fake):
    loader, mix, draws = build(distort, name, V, second=second)
    with oracle.Dispatches() as watched:
        views = loader.views(draws)
        batch = mix(views, draws)
    assert watched.waits == []
    assert views.image_VBCHW.is_cuda and (views.hole_VBHW is None or views.hole_VBHW.is_cuda)
    assert all(field is None or field.is_cuda for field in batch)
    assert views.image_VBCHW.permute(0, 1, 3, 4, 2).is_contiguous()
    assert (batch.second_VBCHW is None) == (second is None)
    for image in (batch.image_VBCHW, batch.second_VBCHW)[: 1 if second is None else 2]:
        assert image.permute(0, 1, 3, 4, 2).is_contiguous()
        assert image.dtype == torch.bfloat16 and image.shape[1] == BATCH


@pytest.mark.parametrize("rule", BOX_RULES)
@pytest.mark.parametrize("num_peers", [1, J])
def test_cutnmix_draws_on_the_gpu_and_reads_nothing(rule, num_peers, fake):
    """alpha = 1 only: fake tensors cannot draw from a Dirichlet."""
    image = torch.empty(BATCH, 3, H, W, device="cuda")
    label_B = torch.empty(BATCH, dtype=torch.long, device="cuda")
    mix = CutnMix(num_peers, p=0.5, box_rule=rule, num_classes=5, data_keys=["input", "class"])
    with oracle.Dispatches() as watched:
        mixed, target = mix(image, label_B)
    assert watched.waits == []
    assert mixed.is_cuda and target.is_cuda
    assert all(mix._params[key].is_cuda for key in ("partner", "box", "lam"))


def test_cutnmix_takes_parameters_that_were_drawn_on_the_host(fake):
    """As Kornia's containers draw them until they are moved to the GPU themselves."""
    image = torch.empty(BATCH, 3, H, W, device="cuda")
    assert K.AugmentationSequential(CutnMix(2), data_keys=["input"])(image).is_cuda
    mix = CutnMix(2, num_classes=5)
    params = mix.generate_parameters(tuple(image.shape))
    assert not params["box"].is_cuda
    labels = torch.empty(BATCH, dtype=torch.long, device="cuda")
    mixed, target = mix(image, labels, params=params, data_keys=["input", "class"])
    assert mixed.is_cuda and target.is_cuda


class AsyncCopies(oracle.Dispatches):
    """Notes the devices of copies that do not wait."""

    def __init__(self):
        super().__init__()
        self.to: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("non_blocking"):
            self.to.append(kwargs["device"].type)
        return super().__torch_dispatch__(func, types, args, kwargs)


@MIXES
def test_a_plan_comes_back_to_the_host_only_when_it_is_whole(name, fake):
    """A copy from GPU to host that does not wait lets DALI's feed read numbers that are not there yet."""
    plan = on_cuda(make_plan(
        seed=0, epoch=0, num_images=BATCH, size=(H, W), batch_size=BATCH, distort=Distort(), mix=Mix(name=name),
        num_views=J, num_peers=J, second="image",
    ))  # fmt: skip
    with AsyncCopies() as watched:
        back = plan.to("cpu")
    assert not any(field.is_cuda for field in vars(back).values() if isinstance(field, Tensor))
    assert back.second and back.batch_size == plan.batch_size
    assert len(watched.waits) > 0 and watched.to == []


@MIXES
def test_a_plan_goes_to_the_gpu_without_waiting_and_once(name, fake, monkeypatch):
    def pin_memory(tensor: Tensor) -> Tensor:  # the real one needs a driver
        assert not tensor.is_cuda, "only what lies on the host can be pinned"
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    plan = make_plan(
        seed=0, epoch=0, num_images=4 * BATCH, size=(H, W), batch_size=BATCH, distort=Distort(), mix=Mix(name=name),
        num_views=J, num_peers=J, second="image",
    )  # fmt: skip
    with AsyncCopies() as watched:
        moved = plan.to("cuda")
    for draws in map(moved.step, range(4)):
        read = draws.lam_L, draws.epoch, draws.box_M4  # by the compiled mix, which else gets copies of them
        assert all(x is None or x.storage_offset() * x.element_size() % 16 == 0 for x in read)
    num_tensors = sum(isinstance(field, Tensor) for field in vars(plan).values())
    assert watched.to == ["cuda"] * num_tensors
    draws = moved.step(0)
    assert all(field.is_cuda for field in draws if isinstance(field, Tensor)) and draws.second
    with AsyncCopies() as watched:
        moved.to("cuda")
    assert "_to_copy" not in watched.calls


# Lowered by Inductor to Triton and compiled to cubin: see lowering.py.


@lowers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("distort", "name", "second", "alone", "whole", "library"),
    [
        (Distort(), "cutnmix", None, 1, 1, []),  # the paper's recipe
        (Distort(), "cutmix", None, 1, 1, []),
        (Distort(), "none", None, 1, 1, []),
        (Distort(), "cutout", None, 1, 1, []),
        (Distort(), "mixup", None, 2, 2, []),
        (Distort(cutout=8), "cutnmix", None, 2, 2, []),
        (Distort(cutout=8), "cutnmix", "class", 2, 2, []),
        (Distort(), "cutout", "image", 1, 1, []),
        (Distort(colour=COLOUR), "mixup", "image", 2, 4, ["bmm"]),
        (Distort(rotation=30.0, colour=COLOUR, cutout=8), "cutnmix", None, 2, 5, ["bmm", "bmm"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@ARCHS
def test_mix_alone_and_with_the_distortions_lowers_to_few_kernels_that_compile(
    arch, distort, name, second, alone, whole, library, fake, tmp_path
):
    """With the options that MixBatch.compile sets."""
    loader, mix, draws = build(distort, name, second=second)
    views = loader.views(draws)
    for given, expected, calls in ((views.made(), alone, []), (views, whole, library)):
        source = lowered(mix, (given, draws), fake, arch, combo_kernels=True)
        assert all("cubin" in assembly for assembly in kernels(source, tmp_path, arch))
        assert (launches(source), library_calls(source)) == (expected, calls)
