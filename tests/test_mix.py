"""MixBatch: the fast path on bytes is the composition of the pure functions, in float64."""

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.cutnmix import mix_target, one_hot, paste
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Distort, Draws, Mix, make_plan

B, C, H, W, NUM_CLASSES, J = 6, 3, 8, 12, 5, 3
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
MIXES = pytest.mark.parametrize("name", ["none", "cutmix", "cutnmix"])
VIEWS = pytest.mark.parametrize("V", [1, J])
TYPES = pytest.mark.parametrize("floats", [False, True])
HOLES = pytest.mark.parametrize("cutout", [0, 5])


def draws_of(name: str = "cutnmix", V: int = J, cutout: int = 0, num_peers: int = J, **mix) -> Draws:
    """Step 1 of a plan: its box is neither empty nor everything."""
    return make_plan(
        seed=1, epoch=0, num_images=2 * B, size=(H, W), batch_size=B, distort=Distort(cutout=cutout),
        mix=Mix(name=name, **mix), num_views=V, num_peers=num_peers,
    ).step(1)  # fmt: skip


def views_of(draws: Draws, floats: bool = False, channels: int = C) -> Views:
    """Bytes, or floats that colour drove out of [0, 255]."""
    V = draws.flip_VB.shape[0]
    rng = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (V, B, H, W, channels), generator=rng, dtype=torch.uint8)
    if floats:
        image = image * 1.3 - 40
    hole = None if draws.hole_VB4 is None else torch.from_numpy(oracle.holes(draws, H, W))
    label_B = torch.randint(NUM_CLASSES, (B,), generator=rng)
    return Views(image.permute(0, 1, 4, 2, 3), hole, label_B, draws.index_B)


def mixer(dtype: torch.dtype = torch.float32, channels: int = C) -> MixBatch:
    return MixBatch(mean=MEAN[:channels], std=STD[:channels], size=(H, W), num_classes=NUM_CLASSES, dtype=dtype)


def reference(views: Views, draws: Draws) -> tuple[Tensor, Tensor]:
    """Images and targets from the pure functions: normalise, erase, paste, in float64."""
    channels = views.image_VBCHW.shape[2]
    mean, std = (torch.tensor(value[:channels], dtype=torch.float64).view(-1, 1, 1) for value in (MEAN, STD))
    image = (views.image_VBCHW.double().clamp(0, 255) / 255 - mean) / std
    if views.hole_VBHW is not None:
        image = torch.where(views.hole_VBHW[:, :, None], 0.0, image)
    if draws.box_M4 is None:
        return image, one_hot(views.label_B, NUM_CLASSES)[None]
    target = mix_target(views.label_B, draws.partner_B, draws.lam_L, NUM_CLASSES)
    return paste(image, draws.box_M4, draws.partner_B), target


@MIXES
@VIEWS
@TYPES
@HOLES
def test_is_the_composition_of_the_pure_functions(name, V, floats, cutout):
    draws = draws_of(name, V, cutout)
    views = views_of(draws, floats)
    batch = mixer()(views, draws)
    image, target = reference(views, draws)
    torch.testing.assert_close(batch.image_VBCHW.double(), image, rtol=0, atol=2e-6)
    assert torch.equal(batch.target_LBK, target)
    assert torch.equal(batch.label_B, views.label_B) and torch.equal(batch.index_B, views.index_B)


@HOLES
def test_is_the_loop_over_pixels(cutout):
    draws = draws_of(cutout=cutout)
    views = views_of(draws)
    channel = (1, 1, C, 1, 1)
    image = (views.image_VBCHW.double().numpy() / 255 - np.reshape(MEAN, channel)) / np.reshape(STD, channel)
    if cutout:
        image *= ~oracle.holes(draws, H, W)[:, :, None]
    expected = oracle.paste(image, draws.box_M4, draws.partner_B)
    batch = mixer()(views, draws)
    np.testing.assert_allclose(batch.image_VBCHW.numpy(), expected, rtol=0, atol=2e-6)
    targets = oracle.targets(views.label_B.tolist(), draws.partner_B.tolist(), draws.lam_L.tolist(), NUM_CLASSES)
    np.testing.assert_allclose(batch.target_LBK.numpy(), targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "V", "views_out"), [("none", 1, 1), ("cutmix", 1, 1), ("cutnmix", 1, J)])
def test_one_view_stays_one_until_boxes_differ(name, V, views_out):
    draws = draws_of(name, V)
    assert mixer()(views_of(draws), draws).image_VBCHW.shape[0] == views_out


def test_clip_corrected_has_a_target_a_peer():
    draws = draws_of(box_rule="clip_corrected")
    batch = mixer()(views_of(draws), draws)
    assert batch.target_LBK.shape == (J, B, NUM_CLASSES)
    torch.testing.assert_close(batch.target_LBK.sum(-1), torch.ones(J, B))


def test_a_hole_is_the_mean_colour_and_moves_with_its_pixels():
    draws = draws_of(cutout=5)
    views = views_of(draws)
    image = mixer()(views, draws).image_VBCHW
    own, partners = views.hole_VBHW[:, :, None], views.hole_VBHW[:, draws.partner_B][:, :, None]
    removed = paste(own, draws.box_M4, draws.partner_B).expand_as(image)
    assert (image[removed] == 0).all()
    assert not torch.equal(removed, own.expand_as(image)) and not torch.equal(removed, partners.expand_as(image))


@pytest.mark.parametrize("channels", [1, 2])
def test_other_numbers_of_channels(channels):
    draws = draws_of()
    views = views_of(draws, channels=channels)
    image, _ = reference(views, draws)
    torch.testing.assert_close(mixer(channels=channels)(views, draws).image_VBCHW.double(), image, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@TYPES
def test_half_precision_is_rounded_once_at_the_end(dtype, floats):
    draws = draws_of(cutout=5)
    views = views_of(draws, floats)
    batch = mixer(dtype)(views, draws)
    assert torch.equal(batch.image_VBCHW, mixer()(views, draws).image_VBCHW.to(dtype))
    assert batch.target_LBK.dtype == torch.float32


@MIXES
@VIEWS
@TYPES
@HOLES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comes_out_channels_last(name, V, floats, cutout, dtype):
    draws = draws_of(name, V, cutout)
    image = mixer(dtype)(views_of(draws, floats), draws).image_VBCHW
    assert image.permute(0, 1, 3, 4, 2).is_contiguous()
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in image)


@MIXES
@VIEWS
@TYPES
def test_views_are_not_changed_in_place(name, V, floats):
    draws = draws_of(name, V, cutout=5)
    views = views_of(draws, floats)
    before = views.image_VBCHW.clone(), views.hole_VBHW.clone()
    mixer()(views, draws)
    assert torch.equal(views.image_VBCHW, before[0]) and torch.equal(views.hole_VBHW, before[1])


def test_floats_within_range_are_not_changed_in_place_either():
    """No clamp, mix or cast need copy these; the multiply-add still must not write into them."""
    draws = draws_of("none")
    views = views_of(draws)._replace(image_VBCHW=views_of(draws).image_VBCHW.float())
    before = views.image_VBCHW.clone()
    mixer()(views, draws)
    assert torch.equal(views.image_VBCHW, before)


@MIXES
@VIEWS
@TYPES
@HOLES
def test_compiled_is_eager(name, V, floats, cutout):
    torch._dynamo.reset()
    draws = draws_of(name, V, cutout)
    views = views_of(draws, floats)
    batch = torch.compile(mixer(), fullgraph=True, backend="aot_eager")(views, draws)
    expected = mixer()(views, draws)
    assert isinstance(batch, Batch)
    torch.testing.assert_close(batch.image_VBCHW, expected.image_VBCHW)
    assert batch.image_VBCHW.stride() == expected.image_VBCHW.stride()
    torch.testing.assert_close(batch.target_LBK, expected.target_LBK)


def test_compiled_once_for_all_steps_of_a_plan():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(mixer(), fullgraph=True, backend=counter)
    plan = make_plan(
        seed=1, epoch=0, num_images=4 * B, size=(H, W), batch_size=B, distort=Distort(), mix=Mix(name="cutnmix"),
        num_views=J, num_peers=J,
    )  # fmt: skip
    for s in range(len(plan)):
        compiled(views_of(plan.step(s)), plan.step(s))
    assert counter.frame_count == 1


@MIXES
@TYPES
def test_no_call_makes_the_host_wait(name, floats):
    draws, mix = draws_of(name, cutout=5), mixer()
    views = views_of(draws, floats)
    with oracle.Dispatches() as watched:
        mix(views, draws)
    assert watched.waits == []


def test_holds_nothing_that_a_checkpoint_would_keep():
    assert mixer().state_dict() == {}
