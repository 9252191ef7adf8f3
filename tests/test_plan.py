"""The plan: a pure function of (seed, epoch), with the laws that its docstring states."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import stats
from torch import Tensor

from cutnmix.pipeline.draw import Stream, generator, make_plan
from cutnmix.pipeline.laws import Colour, Distort, Mix
from cutnmix.pipeline.plan import Plan, _in_rows

EVERYTHING = Distort(
    colour=Colour(brightness=0.4, contrast=0.3, saturation=0.2, hue=30.0), rotation=15.0, cutout=8, image_size=24
)
N, BATCH = 50, 8  # six full batches and one of 2
CLASSES = np.array([0, 2, 2, 5, 5, 5, 5] + [7] * 43)[np.random.default_rng(0).permutation(N)]  # sizes 1, 2, 4, 43
SECOND = pytest.mark.parametrize("second", ["image", "class"])


def plan(**changes) -> Plan:
    arguments = dict(
        seed=7, epoch=3, num_images=N, size=(24, 32), batch_size=BATCH, distort=EVERYTHING, mix=Mix(name="cutnmix"),
        num_views=2, num_peers=2,
    )  # fmt: skip
    return make_plan(**(arguments | changes))


def fields(plan: Plan) -> dict[str, Tensor]:
    return {name: field for name, field in vars(plan).items() if isinstance(field, Tensor)}


def with_second(second: str, **changes) -> Plan:
    labels = CLASSES[: changes.get("num_images", N)]
    return plan(second=second, label_N=labels if second == "class" else None, **changes)


def halves(made: Plan) -> tuple[Plan, Plan]:
    """The plan of the first views and that of the second ones, position by position, as plans without second views."""
    steps = [made.positions(s * made.batch_size, (s + 1) * made.batch_size) for s in range(len(made))]
    plans = []
    for half in range(2):
        parts = {}
        for name in fields(made):
            stem, axes = name.split("_")
            if "N" in axes and name != "partner_N":
                axis = axes.index("N")
                whole = [getattr(step, f"{stem}_{axes.replace('N', 'B')}") for step in steps]
                parts[name] = torch.cat([draws.chunk(2, axis)[half] for draws in whole], axis)
        plans.append(replace(made, batch_size=made.batch_size // 2, second=False, **parts))
    return plans[0], plans[1]


def per_view(name: str) -> bool:
    """Whether a field has a row a view: `crop_VN2`."""
    return name.split("_")[1].startswith("V")


def differing(one: Plan, other: Plan) -> set[str]:
    """Names of the fields in which two plans differ, but for the law that they were drawn by."""
    ours, theirs = vars(one), vars(other)
    equal = {
        name: torch.equal(ours[name], theirs[name]) if isinstance(ours[name], Tensor) else ours[name] == theirs[name]
        for name in ours
        if isinstance(ours[name], Tensor) == isinstance(theirs[name], Tensor)
    }
    return {name for name in ours if not equal.get(name, False)} - {"distort"}


# A pure function of (seed, epoch), stream by stream


@pytest.mark.parametrize("files", [False, True])
def test_same_arguments_give_the_same_plan(files):
    assert differing(plan(files=files), plan(files=files)) == set()


@pytest.mark.parametrize("other", [{"seed": 8}, {"epoch": 4}, {"seed": 3, "epoch": 7}])
@pytest.mark.parametrize("files", [False, True])
def test_another_seed_or_epoch_changes_every_draw(files, other):
    unchanged = {"distort", "size", "batch_size", "second", "files", "weight_S"}  # what is not drawn at all
    unchanged |= {"crop_VN2"} if files else {"region_VN4"}
    unchanged |= set() if "epoch" in other else {"epoch_S"}
    assert differing(plan(files=files), plan(files=files, **other)) == set(vars(plan())) - unchanged


def test_every_stream_draws_its_own_numbers():
    first = {generator(1, 2, stream, view).random() for stream in Stream for view in range(8)}
    assert len(first) == 8 * len(Stream)


def test_stream_numbers_are_part_of_a_runs_identity():
    names = "ORDER CROP FLIP REGION COLOUR ROTATION CUTOUT PARTNER LAMBDA PLACE SECOND".split()
    assert {stream.name: stream.value for stream in Stream} == {name: i for i, name in enumerate(names)}


@pytest.mark.parametrize("rule", ["clip_shared", "inside", "clip_corrected", "clip_nominal"])
@pytest.mark.parametrize("files", [False, True])
def test_the_draws_of_two_peers_stay_when_there_are_four(rule, files):
    mix = Mix(name="cutnmix", box_rule=rule)
    two, four = (plan(mix=mix, files=files, num_views=J, num_peers=J) for J in (2, 4))
    first = {name: field[:2] for name, field in fields(four).items() if per_view(name)}
    first |= {"box_SM4": four.box_SM4[:, :2], "lam_SL": four.lam_SL[:, : two.lam_SL.shape[1]]}
    assert differing(two, replace(four, **first)) == set()


def test_peers_draws_differ():
    four = plan(num_views=4, num_peers=4)
    for name, field in fields(four).items():
        peers = field.unbind(1) if name == "box_SM4" else field.unbind(0) if per_view(name) else []
        assert not any(torch.equal(a, b) for i, a in enumerate(peers) for b in peers[:i]), name


@pytest.mark.parametrize(
    ("off", "touched"),
    [
        ({"pad": 0}, "crop_VN2"),
        ({"flip": 0.0}, "flip_VN"),
        ({"colour": Colour()}, "colour_VN4"),
        ({"rotation": 0.0}, "angle_VN"),
        ({"cutout": 0}, "hole_VN4"),
    ],
)
def test_switching_a_distortion_off_leaves_the_other_draws(off, touched):
    assert differing(plan(), plan(distort=EVERYTHING.model_copy(update=off))) == {touched}


def test_switching_the_mix_off_leaves_the_distortions():
    assert differing(plan(), plan(mix=Mix())) == {"partner_N", "lam_SL", "box_SM4"}


def test_probability_leaves_the_draws_of_the_batches_that_stay_mixed():
    always, sometimes = plan(), plan(mix=Mix(name="cutnmix", probability=0.5))
    mixed = (sometimes.lam_SL < 1).flatten()
    assert 0 < mixed.sum() < len(always)
    assert torch.equal(always.box_SM4[mixed], sometimes.box_SM4[mixed])
    assert torch.equal(always.partner_N, sometimes.partner_N)


def test_the_batch_size_leaves_order_and_distortions():
    touched = {"batch_size", "partner_N", "lam_SL", "box_SM4", "epoch_S"}
    assert differing(plan(), plan(batch_size=16)) == touched


def test_golden_values():
    """Whoever changes a stream or a law changes every run and breaks its resume: change these numbers knowingly."""
    arrays, files = plan(), plan(files=True)
    assert arrays.index_N[:6].tolist() == [33, 42, 14, 3, 0, 36]
    assert arrays.crop_VN2[:, :2].tolist() == [[[0, 8], [7, 1]], [[0, 4], [0, 3]]]
    assert arrays.flip_VN[:, :6].int().tolist() == [[0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 1, 0]]
    assert arrays.hole_VN4[:, 0].tolist() == [[21, 14, 29, 22], [7, 2, 15, 10]]
    assert arrays.partner_N[:8].tolist() == [4, 5, 1, 3, 7, 0, 2, 6]
    assert arrays.box_SM4[0].tolist() == [[17, 15, 29, 23], [17, 11, 29, 19]]
    assert arrays.lam_SL[:3, 0].tolist() == pytest.approx([0.875, 0.627604, 0.9375], abs=1e-5)
    assert arrays.angle_VN[:, 0].tolist() == pytest.approx([4.291754, -11.888322], abs=1e-5)
    assert arrays.colour_VN4[1, 0].tolist() == pytest.approx([1.383309, 0.854641, 1.007595, 0.917366], abs=1e-5)
    assert files.region_VN4[1, 0].tolist() == pytest.approx([0.715969, 1.255644, 0.352929, 0.858399], abs=1e-5)


# Order, batches and partners


def test_every_image_comes_once():
    index_N = plan().index_N
    assert index_N.tolist() != sorted(index_N.tolist())
    assert sorted(index_N.tolist()) == list(range(N))


def test_without_shuffling_the_order_is_the_data_sets():
    assert plan(shuffle=False).index_N.tolist() == list(range(N))


@pytest.mark.parametrize(("num_images", "sizes"), [(50, [8] * 6 + [2]), (48, [8] * 6), (5, [5])])
def test_the_last_batch_holds_what_is_left(num_images, sizes):
    made = plan(num_images=num_images)
    assert [len(made.step(s).index_B) for s in range(len(made))] == sizes


@pytest.mark.parametrize(("num_images", "steps"), [(50, 6), (48, 6), (5, 0)])
def test_drop_last_drops_what_does_not_fill_a_batch(num_images, steps):
    kept, dropped = plan(num_images=num_images), plan(num_images=num_images, drop_last=True)
    assert len(dropped) == steps
    assert torch.equal(dropped.index_N, kept.index_N[: steps * BATCH])


@pytest.mark.parametrize("num_images", [N, 41, 3])
def test_partner_is_a_permutation_within_every_batch(num_images):
    made = plan(num_images=num_images)
    for s in range(len(made)):
        draws = made.step(s)
        assert sorted(draws.partner_B.tolist()) == list(range(len(draws.index_B)))


def test_partner_permutations_are_uniform():
    partner = plan(num_images=3 * 6000, batch_size=3).partner_N.view(-1, 3)
    _, counts = np.unique(partner.numpy(), axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("files", [False, True])
def test_the_steps_put_together_are_the_plan(files):
    made = plan(files=files)
    steps = [made.step(s)._asdict() for s in range(len(made))]
    for name, whole in fields(made).items():
        stem, axes = name.split("_")
        (key,) = [key for key in steps[0] if key.split("_")[0] == stem]
        parts = [step[key] for step in steps]
        joined = torch.stack(parts) if axes[0] == "S" else torch.cat(parts, dim=axes.index("N"))
        assert torch.equal(joined, whole), name


def test_a_step_copies_nothing():
    made = plan()
    assert made.step(1).crop_VB2.untyped_storage().data_ptr() == made.crop_VN2.untyped_storage().data_ptr()


def test_what_is_off_is_none():
    bare = plan(distort=Distort(), mix=Mix())
    assert set(fields(bare)) == {"index_N", "crop_VN2", "flip_VN", "epoch_S"}
    there = {"index_B", "crop_VB2", "flip_VB", "epoch", "second"}
    assert {name for name, field in bare.step(0)._asdict().items() if field is not None} == there


def test_evaluation_draws_nothing():
    made = plan(distort=EVERYTHING.evaluation(), mix=Mix(), shuffle=False, num_views=1, files=True)
    assert made.crop_VN2.sum() == 0 and not made.flip_VN.any()
    assert set(fields(made)) == {"index_N", "crop_VN2", "flip_VN", "epoch_S"}


def test_shapes_and_dtypes():
    made = plan(num_views=1, num_peers=3, files=True)
    S = len(made)
    assert made.num_views == 1
    assert {name: (tuple(field.shape), field.dtype) for name, field in fields(made).items()} == {
        "index_N": ((N,), torch.int64),
        "crop_VN2": ((1, N, 2), torch.int32),
        "flip_VN": ((1, N), torch.bool),
        "region_VN4": ((1, N, 4), torch.float32),
        "colour_VN4": ((1, N, 4), torch.float32),
        "angle_VN": ((1, N), torch.float32),
        "hole_VN4": ((1, N, 4), torch.int32),
        "partner_N": ((N,), torch.int64),
        "lam_SL": ((S, 1), torch.float32),
        "box_SM4": ((S, 3, 4), torch.int32),
        "epoch_S": ((S,), torch.float64),
    }


@pytest.mark.parametrize(
    ("mix", "num_boxes", "num_lams"),
    [
        (Mix(name="cutmix"), 1, 1),
        (Mix(name="cutmix", box_rule="clip_shared"), 1, 1),
        (Mix(name="cutnmix"), 3, 1),
        (Mix(name="cutnmix", box_rule="inside"), 3, 1),
        (Mix(name="cutnmix", box_rule="clip_nominal"), 3, 1),
        (Mix(name="cutnmix", box_rule="clip_corrected"), 3, 3),
    ],
)
def test_one_box_for_all_peers_under_cutmix_and_one_a_peer_under_cutnmix(mix, num_boxes, num_lams):
    made = plan(mix=mix, num_peers=3)
    assert made.box_SM4.shape[1] == num_boxes
    assert made.lam_SL.shape[1] == num_lams


def test_to_the_same_device_is_the_same_plan():
    assert differing(plan(), plan().to("cpu")) == set()


def test_a_plan_remembers_the_one_on_the_host_that_it_was_copied_from():
    made = plan()
    there = made.to("meta")
    assert there.index_N.is_meta
    assert there.host is there.to("meta").host is made.host is made
    assert replace(there, index_N=made.index_N).host is not made  # another plan: it must not be taken for the first


# Laws: thousands of draws, a fixed seed


def large(**changes) -> Plan:
    """A batch an image: as many draws of the mix as of the distortions."""
    return plan(**({"num_images": 20000, "batch_size": 1} | changes))


def is_uniform(values: Tensor, low: float, high: float) -> bool:
    return stats.kstest(values.flatten().numpy(), stats.uniform(low, high - low).cdf).pvalue > 0.01


@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crops_are_uniform_over_all_positions(pad):
    crop_N2 = large(distort=Distort(pad=pad)).crop_VN2.flatten(0, 1)
    positions, counts = np.unique(crop_N2.numpy(), axis=0, return_counts=True)
    assert len(positions) == (2 * pad + 1) ** 2
    assert positions.min() == 0 and positions.max() == 2 * pad
    assert pad == 0 or stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize("flip", [0.0, 0.3, 0.5, 1.0])
def test_flips_come_as_often_as_asked_for(flip):
    flips = large(distort=Distort(flip=flip)).flip_VN
    assert stats.binomtest(int(flips.sum()), flips.numel(), flip).pvalue > 0.01


def test_regions_follow_their_law():
    scale, ratio, x, y = large(files=True).region_VN4.unbind(-1)
    assert is_uniform(scale, 0.08, 1)
    assert is_uniform(ratio.log(), np.log(3 / 4), np.log(4 / 3))
    assert is_uniform(x, 0, 1) and is_uniform(y, 0, 1)


def test_colours_follow_their_law():
    brightness, contrast, saturation, hue = large().colour_VN4.unbind(-1)
    assert is_uniform(brightness, 0.6, 1.4)
    assert is_uniform(contrast, 0.7, 1.3)
    assert is_uniform(saturation, 0.8, 1.2)
    assert is_uniform(hue, -30, 30)


def test_angles_follow_their_law():
    assert is_uniform(large().angle_VN, -15, 15)


@pytest.mark.parametrize("length", [1, 7, 8, 40])
@pytest.mark.parametrize("as_mix", [False, True])
def test_holes_are_squares_around_a_uniform_pixel_clipped(as_mix, length):
    """DeVries and Taylor: y1 = clip(y - length // 2, 0, h), y2 = clip(y + length // 2, 0, h); odd lengths stay odd."""
    width, height = 32, 24
    laws = {"mix": Mix(name="cutout", length=length)} if as_mix else {"distort": Distort(cutout=length)}
    x0, y0, x1, y1 = large(**laws).hole_VN4.flatten(0, 1).unbind(-1)
    for start, stop, side in ((x0, x1, width), (y0, y1, height)):
        expected = Counter((max(at - length // 2, 0), min(at - length // 2 + length, side)) for at in range(side))
        drawn = Counter(zip(start.tolist(), stop.tolist(), strict=True))
        assert set(drawn) == set(expected)
        share = drawn.total() / side
        counts = [(drawn[pair], expected[pair] * share) for pair in expected]
        assert len(counts) == 1 or stats.chisquare(*zip(*counts, strict=True)).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("mix", [{"name": "cutnmix", "box_rule": "clip_nominal"}, {"name": "mixup"}])
def test_the_nominal_lam_is_a_beta_draw(mix, alpha):
    lam = large(mix=Mix(**mix, alpha=alpha)).lam_SL
    assert lam.shape == (20000, 1) and lam.dtype == torch.float32
    assert stats.kstest(lam[:, 0].numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


def test_inside_keeps_the_beta_law_but_for_whole_pixels():
    lam = large(size=(4096, 4096), mix=Mix(name="cutnmix", alpha=0.7, box_rule="inside")).lam_SL
    assert stats.kstest(lam[:, 0].numpy(), stats.beta(0.7, 0.7).cdf).statistic < 0.015


@pytest.mark.parametrize(
    ("mix", "mean"),
    [
        (Mix(name="cutnmix"), 0.70),
        (Mix(name="cutnmix", box_rule="inside"), 0.52),
        (Mix(name="cutmix"), 0.70),
    ],
)
def test_mean_lam_at_32(mix, mean):
    assert large(size=(32, 32), mix=mix).lam_SL.mean().item() == pytest.approx(mean, abs=0.01)


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("rule", ["clip_shared", "inside", "clip_corrected", "clip_nominal"])
def test_a_batch_is_mixed_with_the_probability_asked_for(rule, probability):
    made = large(size=(4096, 4096), mix=Mix(name="cutnmix", probability=probability, box_rule=rule))
    mixed = (made.lam_SL != 1).any(dim=1)
    assert stats.binomtest(int(mixed.sum()), len(made), probability).pvalue > 0.01
    area_SM = (made.box_SM4[..., 2:] - made.box_SM4[..., :2]).prod(dim=-1)
    assert (area_SM[~mixed] == 0).all()


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_mixup_blends_with_the_probability_asked_for(probability):
    mixed = large(mix=Mix(name="mixup", probability=probability)).lam_SL != 1
    assert stats.binomtest(int(mixed.sum()), len(mixed), probability).pvalue > 0.01


def test_shared_views_still_get_a_box_a_peer():
    made = plan(num_views=1, num_peers=4)
    assert made.flip_VN.shape[0] == 1
    assert made.box_SM4.shape[1] == 4


# Mixup and cutout


def test_mixup_is_cutmix_without_boxes_and_before_its_box_rule():
    mixup, cutmix = (plan(mix=mix) for mix in (Mix(name="mixup"), Mix(name="cutmix", box_rule="clip_nominal")))
    assert differing(mixup, cutmix) == {"box_SM4"} and mixup.box_SM4 is None
    draws = mixup.step(2)
    assert draws.box_M4 is None and draws.lam_L is not None and draws.partner_B is not None


@pytest.mark.parametrize(("num_views", "num_peers"), [(1, 1), (1, 4), (4, 4)])
def test_mixup_has_one_lam_and_one_partner_whatever_peers_there_are(num_views, num_peers):
    made = plan(mix=Mix(name="mixup"), num_views=num_views, num_peers=num_peers)
    assert torch.equal(made.lam_SL, plan(mix=Mix(name="mixup")).lam_SL)
    assert torch.equal(made.partner_N, plan(mix=Mix(name="mixup")).partner_N)


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize(("length", "as_distortion"), [(5, 5), (None, 16)])
def test_cutout_as_a_mix_cuts_the_holes_of_cutout_as_a_distortion(length, as_distortion, num_views):
    """And a length that was left open is CIFAR-10's 16; the configuration fills in 8 for CIFAR-100."""
    plain = EVERYTHING.model_copy(update={"cutout": 0})
    made = plan(distort=plain, mix=Mix(name="cutout", length=length), num_views=num_views)
    holes = plan(distort=plain.model_copy(update={"cutout": as_distortion}), mix=Mix(), num_views=num_views)
    assert differing(made, holes) == set()
    assert made.hole_VN4.shape[0] == num_views


# Second views: of the same image, or of one of its class


@SECOND
@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("name", ["none", "cutnmix", "mixup", "cutout"])
def test_second_views_leave_the_first_as_they_are(second, files, drop_last, num_views, name):
    changes = dict(files=files, drop_last=drop_last, num_views=num_views, mix=Mix(name=name))
    made = with_second(second, **changes)
    assert made.batch_size == 2 * BATCH and made.second
    assert differing(plan(**changes), halves(made)[0]) == set()
    for s in range(len(made)):  # what is drawn a step, or for the mix
        for name, field in plan(**changes).step(s)._asdict().items():
            if name in ("partner_B", "lam_L", "box_M4", "epoch"):
                assert field is getattr(made.step(s), name) is None or torch.equal(field, getattr(made.step(s), name))


@SECOND
@pytest.mark.parametrize(
    ("num_images", "sizes"), [(50, [16] * 6 + [4]), (48, [16] * 6), (5, [10]), (49, [16] * 6 + [2])]
)
def test_a_step_holds_the_batch_then_its_second_views(second, num_images, sizes):
    made = with_second(second, num_images=num_images)
    assert [len(made.step(s).index_B) for s in range(len(made))] == sizes
    assert [len(made.step(s).partner_B) for s in range(len(made))] == [size // 2 for size in sizes]
    assert all(made.step(s).second and made.step(s).flip_VB.shape[1] == size for s, size in enumerate(sizes))


@pytest.mark.parametrize(("num_images", "steps"), [(50, 6), (48, 6), (5, 0)])
def test_dropping_the_last_batch_drops_its_second_views(num_images, steps):
    kept, dropped = (plan(num_images=num_images, second="image", drop_last=drop) for drop in (False, True))
    assert len(dropped) == steps
    assert torch.equal(dropped.index_N, kept.index_N[: steps * 2 * BATCH])


@SECOND
@pytest.mark.parametrize("start", [0, 3, 6])
def test_the_positions_of_a_step_are_its_draws_but_for_the_mix(second, start):
    """A loader reads several steps at once by their positions."""
    made = with_second(second)
    read = made.positions(start * made.batch_size, (start + 2) * made.batch_size)
    steps = [made.step(s) for s in range(start, min(start + 2, len(made)))]
    assert read.second
    for name in ("index_B", "crop_VB2", "flip_VB", "colour_VB4", "angle_VB", "hole_VB4"):
        axis = 0 if name == "index_B" else 1
        assert torch.equal(getattr(read, name), torch.cat([getattr(draws, name) for draws in steps], axis)), name


def test_second_views_of_images_are_of_the_same_images():
    first, second = halves(with_second("image"))
    assert torch.equal(first.index_N, second.index_N)


def test_second_views_of_a_class_are_of_its_images():
    first, second = halves(with_second("class"))
    assert (CLASSES[first.index_N] == CLASSES[second.index_N]).all()
    assert not torch.equal(first.index_N, second.index_N)
    alone = int(np.flatnonzero(CLASSES == 0)[0])
    assert second.index_N[first.index_N == alone].tolist() == [alone]


def test_another_image_of_the_class_is_drawn_uniformly_and_independently():
    """For every image over all of its class, itself included, whatever else is in the batch and in the epoch."""
    epochs = [halves(with_second("class", epoch=epoch)) for epoch in range(400)]
    other_EN = np.array([second.index_N[first.index_N.argsort()].tolist() for first, second in epochs])  # of image n
    for label in (2, 5, 7):
        members = np.flatnonzero(CLASSES == label)
        counts = np.array([[(other_EN[:, n] == m).sum() for m in members] for n in members])
        assert counts.sum() == 400 * len(members)
        assert stats.chisquare(counts.flatten()).pvalue > 0.01
    twos = np.flatnonzero(CLASSES == 2)
    together = (other_EN[:, twos[0]] == other_EN[:, twos[1]]).sum()
    assert stats.binomtest(int(together), 400, 0.5).pvalue > 0.01


@pytest.mark.parametrize(
    "changes", [{"drop_last": True}, {"num_peers": 4, "num_views": 4}, {"mix": Mix()}, {"batch_size": 5}]
)
def test_the_images_drawn_of_a_class_depend_on_seed_and_epoch_alone(changes):
    made, other = (halves(with_second("class", **given))[1].index_N for given in ({}, changes))
    assert torch.equal(made[: len(other)], other)


@SECOND
@pytest.mark.parametrize("files", [False, True])
def test_second_views_are_distorted_on_their_own(second, files):
    """Under the same laws, and unlike any first view."""
    first, other = halves(with_second(second, files=files))
    drawn = {name for name in fields(first) if per_view(name)} - ({"crop_VN2"} if files else set())
    for name in drawn:
        views = [*getattr(first, name), *getattr(other, name)]
        assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i]), name
    assert differing(first, other) == drawn | ({"index_N"} if second == "class" else set())


def test_the_distortions_of_first_and_second_views_are_independent():
    first, second = halves(large(second="image", batch_size=100))
    assert is_uniform(second.angle_VN, -15, 15)
    for ours, theirs in zip(first.angle_VN, second.angle_VN, strict=True):
        assert stats.pearsonr(ours.numpy(), theirs.numpy()).pvalue > 0.01
    table = np.zeros((2, 2), dtype=int)
    np.add.at(table, (first.flip_VN[0].int().numpy(), second.flip_VN[0].int().numpy()), 1)
    assert stats.chi2_contingency(table).pvalue > 0.01
    x = first.crop_VN2[..., 0].flatten() * 9 + second.crop_VN2[..., 0].flatten()
    assert stats.chisquare(np.bincount(x.numpy(), minlength=81)).pvalue > 0.01


@SECOND
def test_the_second_views_of_two_peers_stay_when_there_are_four(second):
    two, four = (with_second(second, num_views=J, num_peers=J) for J in (2, 4))
    first = {name: field[:2] for name, field in fields(four).items() if per_view(name)}
    assert differing(two, replace(four, **first, box_SM4=four.box_SM4[:, :2])) == set()


@pytest.mark.parametrize(
    ("off", "touched"),
    [({"pad": 0}, "crop_VN2"), ({"colour": Colour()}, "colour_VN4"), ({"rotation": 0.0}, "angle_VN")],
)
def test_switching_a_distortion_off_leaves_the_other_draws_of_the_second_views(off, touched):
    plans = (with_second("class", distort=distort) for distort in (EVERYTHING, EVERYTHING.model_copy(update=off)))
    assert differing(*plans) == {touched}


def test_golden_values_of_second_views():
    """As test_golden_values: these numbers are part of a run."""
    made = halves(with_second("class"))[1]
    assert made.index_N[:6].tolist() == [41, 1, 20, 5, 17, 30]
    assert made.crop_VN2[:, :2].tolist() == [[[7, 0], [8, 8]], [[5, 5], [1, 0]]]
    assert made.angle_VN[:, 0].tolist() == pytest.approx([0.349486, 7.124459], abs=1e-5)


def test_a_class_without_labels_is_refused():
    with pytest.raises(ValueError, match="label_N"):
        plan(second="class")


# Time


@pytest.mark.parametrize("epoch", [0, 3, 239])
@pytest.mark.parametrize("changes", [{}, {"drop_last": True}, {"num_images": 5}, {"second": "image"}])
def test_a_step_knows_how_many_epochs_were_done_before_it(epoch, changes):
    made = plan(epoch=epoch, **changes)
    S = len(made)
    assert [made.step(s).epoch.item() for s in range(S)] == [epoch + s / S for s in range(S)]
    assert made.step(0).epoch.shape == () and made.step(0).epoch.dtype == torch.float64


def test_an_epoch_without_steps_has_no_time():
    assert plan(num_images=5, drop_last=True).epoch_S.tolist() == []


# What is refused


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        (Distort, {"pad": -1}),
        (Distort, {"flip": 1.1}),
        (Distort, {"flip": float("nan")}),
        (Distort, {"rotation": 181.0}),
        (Distort, {"cutout": -1}),
        (Distort, {"image_size": 0}),
        (Distort, {"crop_scale": (0.5, 0.1)}),
        (Distort, {"crop_scale": (0.0, 1.0)}),
        (Distort, {"crop_scale": (0.5, 1.5)}),
        (Distort, {"crop_ratio": (2.0, 1.0)}),
        (Distort, {"crop_ratio": (0.0, 1.0)}),
        (Distort, {"crop_ratio": (1.0, float("inf"))}),
        (Distort, {"region": "corner"}),
        (Distort, {"padding": 4}),
        (Distort, {"colour": {"brightness": 1.5}}),
        (Distort, {"colour": {"hue": -1.0}}),
        (Mix, {"name": "cutnmixx"}),
        (Mix, {"alpha": 0.0}),
        (Mix, {"alpha": -1.0}),
        (Mix, {"alpha": float("nan")}),
        (Mix, {"alpha": float("inf")}),
        (Mix, {"probability": 1.5}),
        (Mix, {"length": 0}),
        (Mix, {"box_rule": "clip"}),
        (Mix, {"beta": 1.0}),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_of_its_field(law, wrong):
    (name,) = wrong
    with pytest.raises(ValidationError, match=name):
        law(**wrong)


def test_laws_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError, match="frozen"):
        Mix().alpha = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("mix", "rule"),
    [
        (Mix(name="cutnmix"), "clip_shared"),
        (Mix(name="cutmix"), "clip_corrected"),
        (Mix(name="cutnmix", box_rule="inside"), "inside"),
        (Mix(name="cutmix", box_rule="clip_nominal"), "clip_nominal"),
    ],
)
def test_the_box_rule_is_the_mixs_own_unless_it_is_given(mix, rule):
    assert mix.rule == rule


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_moved_apart_are_the_same_rows(rows, shape, dtype):
    field = torch.randn(rows, *shape, dtype=dtype)
    moved = []
    apart = _in_rows(field, lambda rows: moved.append(rows) or rows.clone())
    assert torch.equal(apart, field) and len(moved) == 1 and moved[0].is_contiguous()
    assert apart.dtype == dtype and (rows < 2 or apart.stride(0) * field.element_size() % 16 == 0)
