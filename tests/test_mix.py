"""MixBatch: the fast path on bytes is the composition of the pure functions, in float64."""

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor

from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.cutnmix import mix_target, one_hot, paste
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Distort, Mix
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Draws

B, C, H, W, NUM_CLASSES, J = 6, 3, 8, 12, 5, 3
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)
MIXES = pytest.mark.parametrize("name", ["none", "cutmix", "cutnmix", "mixup", "cutout"])
VIEWS = pytest.mark.parametrize("V", [1, J])
TYPES = pytest.mark.parametrize("floats", [False, True])
HOLES = pytest.mark.parametrize("cutout", [0, 5])
SECOND = pytest.mark.parametrize("second", [None, "image"])


def draws_of(
    name: str = "cutnmix", V: int = J, cutout: int = 0, num_peers: int = J, second: str | None = None, **mix
) -> Draws:
    """Step 1 of a plan: its box is neither empty nor everything, and a blend is far from even."""
    if name == "cutout":
        mix, cutout = {"length": 5}, 0
    return make_plan(
        seed=3, epoch=0, num_images=2 * B, size=(H, W), batch_size=B, distort=Distort(cutout=cutout),
        mix=Mix(name=name, **mix), num_views=V, num_peers=num_peers, second=second,
    ).step(1)  # fmt: skip


def views_of(draws: Draws, floats: bool = False, channels: int = C) -> Views:
    """Bytes, or floats that colour drove out of [0, 255]."""
    V = draws.flip_VB.shape[0]
    rng = torch.Generator().manual_seed(0)
    size = len(draws.index_B)
    image = torch.randint(0, 256, (V, size, H, W, channels), generator=rng, dtype=torch.uint8)
    if floats:
        image = image * 1.3 - 40
    hole = None if draws.hole_VB4 is None else torch.from_numpy(oracle.holes(draws, H, W))
    label_B = torch.randint(NUM_CLASSES, (size,), generator=rng)
    return Views(image.permute(0, 1, 4, 2, 3), hole, label_B, draws.index_B)


def mixer(dtype: torch.dtype = torch.float32, channels: int = C) -> MixBatch:
    return MixBatch(mean=MEAN[:channels], std=STD[:channels], size=(H, W), num_classes=NUM_CLASSES, dtype=dtype)


def reference(views: Views, draws: Draws) -> tuple[Tensor, Tensor]:
    """Images and targets from the pure functions: normalise, erase, paste or blend, in float64."""
    channels = views.image_VBCHW.shape[2]
    mean, std = (torch.tensor(value[:channels], dtype=torch.float64).view(-1, 1, 1) for value in (MEAN, STD))
    image = (views.image_VBCHW.double().clamp(0, 255) / 255 - mean) / std
    if views.hole_VBHW is not None:
        image = torch.where(views.hole_VBHW[:, :, None], 0.0, image)
    if draws.partner_B is None:
        return image, one_hot(views.label_B, NUM_CLASSES)[None]
    target = mix_target(views.label_B, draws.partner_B, draws.lam_L, NUM_CLASSES)
    if draws.box_M4 is None:
        lam = draws.lam_L.double()
        return lam * image + (1 - lam) * image[:, draws.partner_B], target
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
    assert torch.equal(batch.epoch, draws.epoch) and batch.second_VBCHW is None


@HOLES
@pytest.mark.parametrize("name", ["cutnmix", "mixup"])
def test_is_the_loop_over_pixels(name, cutout):
    draws = draws_of(name, cutout=cutout)
    views = views_of(draws)
    channel = (1, 1, C, 1, 1)
    image = (views.image_VBCHW.double().numpy() / 255 - np.reshape(MEAN, channel)) / np.reshape(STD, channel)
    if cutout:
        image *= ~oracle.holes(draws, H, W)[:, :, None]
    expected = oracle.mix(image, draws)
    batch = mixer()(views, draws)
    np.testing.assert_allclose(batch.image_VBCHW.numpy(), expected, rtol=0, atol=2e-6)
    targets = oracle.targets(views.label_B.tolist(), draws.partner_B.tolist(), draws.lam_L.tolist(), NUM_CLASSES)
    np.testing.assert_allclose(batch.target_LBK.numpy(), targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "V", "views_out"), [("none", 1, 1), ("cutmix", 1, 1), ("cutnmix", 1, J), ("mixup", 1, 1), ("cutout", 1, 1)]
)
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


# Mixup


@pytest.mark.parametrize("V", [1, J])
def test_mixup_is_one_blend_of_all_views_with_the_same_images(V):
    """Each image is one number, so that both shares and the partner can be read in what comes out."""
    draws = draws_of("mixup", V)
    lam, number_B = draws.lam_L.double(), torch.arange(B)
    views = views_of(draws)._replace(
        pixels=(40 * number_B.to(torch.uint8)).view(1, B, 1, 1, 1).expand(V, B, C, H, W), label_B=number_B
    )
    flat = MixBatch(mean=(0.0,) * C, std=(1 / 255,) * C, size=(H, W), num_classes=B)
    batch = flat(views, draws)
    expected = 40 * (lam * number_B + (1 - lam) * number_B[draws.partner_B])
    assert 0.05 < lam < 0.95 and (draws.partner_B != number_B).any()
    made = batch.image_VBCHW.double()
    torch.testing.assert_close(made, expected.view(1, B, 1, 1, 1).expand_as(made), rtol=0, atol=1e-4)
    seen_B = (batch.target_LBK[0].double() * 40 * number_B).sum(-1)  # the target's mean number is the image's
    torch.testing.assert_close(seen_B, made[0, :, 0, 0, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_blend_of_all_or_nothing_is_exact(lam):
    draws = draws_of("mixup", cutout=5)._replace(lam_L=torch.tensor([lam]))
    views = views_of(draws)
    kept = torch.arange(B) if lam else draws.partner_B
    pure = Views(views.image_VBCHW[:, kept], views.hole_VBHW[:, kept], views.label_B[kept], kept)
    unmixed = mixer()(pure, draws_of("none", cutout=5))
    batch = mixer()(views, draws)
    assert torch.equal(batch.image_VBCHW, unmixed.image_VBCHW)
    assert torch.equal(batch.target_LBK, unmixed.target_LBK)


def test_a_batch_that_is_not_blended_is_as_without_a_mix():
    draws, plain = draws_of("mixup", probability=0.0), draws_of("none")
    batch, expected = mixer()(views_of(draws), draws), mixer()(views_of(plain), plain)
    assert torch.equal(batch.image_VBCHW, expected.image_VBCHW)
    assert torch.equal(batch.target_LBK, expected.target_LBK)


def test_a_hole_under_mixup_is_the_mean_colour_in_its_share_of_the_blend():
    draws = draws_of("mixup", cutout=5)
    views = views_of(draws)
    image = mixer()(views, draws).image_VBCHW
    own, partners = (views.hole_VBHW[:, rows][:, :, None].expand_as(image) for rows in (slice(None), draws.partner_B))
    whole = mixer()(views._replace(holes=None), draws_of("none")).image_VBCHW
    lam = draws.lam_L
    for where, expected in (
        (own & partners, torch.zeros_like(image)),
        (own & ~partners, (1 - lam) * whole[:, draws.partner_B]),
        (~own & partners, lam * whole),
    ):
        assert where.any()
        torch.testing.assert_close(image[where], expected[where], rtol=0, atol=2e-6)


# Cutout


@VIEWS
@TYPES
def test_cutout_is_the_mean_colour_and_leaves_pixels_and_label(V, floats):
    draws, plain = draws_of("cutout", V), draws_of("none", V)
    views = views_of(draws, floats)
    batch, whole = mixer()(views, draws), mixer()(views._replace(holes=None), plain)
    hole = torch.from_numpy(oracle.holes(draws, H, W))[:, :, None].expand(V, B, C, H, W)
    assert hole.any() and not hole.all()
    assert (batch.image_VBCHW[hole] == 0).all()
    assert torch.equal(batch.image_VBCHW[~hole], whole.image_VBCHW[~hole])
    assert torch.equal(batch.target_LBK, one_hot(views.label_B, NUM_CLASSES)[None])


# Second views


@MIXES
@VIEWS
@TYPES
@HOLES
def test_second_views_are_mixed_as_the_first(name, V, floats, cutout):
    """The batch comes out as if there were no second views, and the second views as a batch of their own would."""
    draws = draws_of(name, V, cutout, second="image")
    views = views_of(draws, floats)
    batch = mixer()(views, draws)
    for half, image in enumerate((batch.image_VBCHW, batch.second_VBCHW)):
        rows = slice(half * B, (half + 1) * B)
        hole = None if views.hole_VBHW is None else views.hole_VBHW[:, rows]
        part = Views(views.image_VBCHW[:, rows], hole, views.label_B[rows], views.index_B[rows])
        alone = mixer()(part, draws._replace(second=False))
        assert torch.equal(image, alone.image_VBCHW)
        torch.testing.assert_close(image.double(), reference(part, draws)[0], rtol=0, atol=2e-6)
        if half == 0:
            for field in ("target_LBK", "label_B", "index_B", "epoch"):
                assert torch.equal(getattr(batch, field), getattr(alone, field)), field
    assert not torch.equal(batch.image_VBCHW, batch.second_VBCHW)


@MIXES
def test_second_views_of_a_smaller_last_batch(name):
    plan = make_plan(
        seed=1, epoch=0, num_images=B + 1, size=(H, W), batch_size=B, distort=Distort(), mix=Mix(name=name),
        num_views=J, num_peers=J, second="image",
    )  # fmt: skip
    batch = mixer()(views_of(plan.step(1)), plan.step(1))
    assert len(batch.label_B) == batch.image_VBCHW.shape[1] == batch.second_VBCHW.shape[1] == batch.target_LBK.shape[1]
    assert len(batch.label_B) == 1


# Shapes, types, strides, compilation


@pytest.mark.parametrize("channels", [1, 2])
def test_other_numbers_of_channels(channels):
    draws = draws_of()
    views = views_of(draws, channels=channels)
    image, _ = reference(views, draws)
    torch.testing.assert_close(mixer(channels=channels)(views, draws).image_VBCHW.double(), image, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@MIXES
@TYPES
def test_half_precision_is_rounded_once_at_the_end(name, dtype, floats):
    draws = draws_of(name, cutout=5)
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
    draws = draws_of(name, V, cutout, second="image")
    batch = mixer(dtype)(views_of(draws, floats), draws)
    for image in (batch.image_VBCHW, batch.second_VBCHW):
        assert image.dtype == dtype
        assert image.permute(0, 1, 3, 4, 2).is_contiguous()
        assert all(view.is_contiguous(memory_format=torch.channels_last) for view in image)


@MIXES
@VIEWS
@TYPES
@SECOND
def test_views_are_not_changed_in_place(name, V, floats, second):
    draws = draws_of(name, V, cutout=5, second=second)
    views = views_of(draws, floats)
    before = views.image_VBCHW.clone(), views.hole_VBHW.clone()
    mixer()(views, draws)
    assert torch.equal(views.image_VBCHW, before[0]) and torch.equal(views.hole_VBHW, before[1])


def test_floats_within_range_are_not_changed_in_place_either():
    """No clamp, mix or cast need copy these; the multiply-add still must not write into them."""
    draws = draws_of("none")
    views = views_of(draws)._replace(pixels=views_of(draws).image_VBCHW.float())
    before = views.image_VBCHW.clone()
    mixer()(views, draws)
    assert torch.equal(views.image_VBCHW, before)


@MIXES
@VIEWS
@pytest.mark.parametrize(
    ("floats", "cutout", "second"), [(False, 0, None), (True, 0, None), (True, 5, None), (False, 5, "image")]
)
def test_compiled_is_eager(name, V, floats, cutout, second):
    torch._dynamo.reset()
    draws = draws_of(name, V, cutout, second=second)
    views = views_of(draws, floats)
    batch = torch.compile(mixer(), fullgraph=True, backend="aot_eager")(views, draws)
    expected = mixer()(views, draws)
    assert isinstance(batch, Batch)
    torch.testing.assert_close(batch.image_VBCHW, expected.image_VBCHW)
    assert batch.image_VBCHW.stride() == expected.image_VBCHW.stride()
    torch.testing.assert_close(batch.target_LBK, expected.target_LBK)
    torch.testing.assert_close(batch.second_VBCHW, expected.second_VBCHW)


@MIXES
@SECOND
def test_compiled_once_for_all_steps_of_a_plan(name, second):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(mixer(), fullgraph=True, backend=counter)
    plan = make_plan(
        seed=1, epoch=0, num_images=4 * B, size=(H, W), batch_size=B, distort=Distort(), mix=Mix(name=name),
        num_views=J, num_peers=J, second=second,
    )  # fmt: skip
    for s in range(len(plan)):
        compiled(views_of(plan.step(s)), plan.step(s))
    assert counter.frame_count == 1


@MIXES
@TYPES
@SECOND
def test_no_call_makes_the_host_wait(name, floats, second):
    draws, mix = draws_of(name, cutout=5, second=second), mixer()
    views = views_of(draws, floats)
    with oracle.Dispatches() as watched:
        mix(views, draws)
    assert watched.waits == []


def test_holds_nothing_that_a_checkpoint_would_keep():
    assert mixer().state_dict() == {}
