"""The box rules: whatever is drawn, boxes lie inside the image and every label weighs what its pixels cover."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from cutnmix.pipeline.boxes import BOX_RULES, place_boxes
from cutnmix.pipeline.cutnmix import box_mask

RULES = pytest.mark.parametrize("rule", BOX_RULES)
SHARED = pytest.mark.parametrize("rule", ["clip_shared", "inside"])
ONE = float(np.nextafter(np.float32(1), np.float32(0)))  # the largest uniform that a float32 generator can draw
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)

sides = st.integers(1, 64)
# Multiples of 2^-20, 0.25 and 0.75 among them: torch's vectorised sqrt may be off by the last bit elsewhere.
lams = st.one_of(st.integers(0, 2**20).map(lambda n: n / 2**20), st.sampled_from([0.0, 0.25, 0.75, 1.0]))
uniforms = st.one_of(st.floats(0, ONE, width=32), st.sampled_from([0.0, 0.5, ONE]))


@st.composite
def draws(draw):
    """(lam, centre (2,), place (J, 2), W, H), in the precision of a plan (float64) or of a GPU's generator."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    num_peers = draw(st.integers(1, 5))
    points = draw(st.lists(uniforms, min_size=2 * num_peers + 2, max_size=2 * num_peers + 2))
    point_22 = torch.tensor(points, dtype=dtype).view(-1, 2)
    return torch.tensor(draw(lams), dtype=dtype), point_22[0], point_22[1:], draw(sides), draw(sides)


def many(rule: str, count: int, width: int = 32, height: int = 32, num_peers: int = 2, seed: int = 0):
    """Boxes (count, J, 4) and lam (count, L) of uniform draws."""
    rng = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, dtype=torch.float64)

    return place_boxes(rule, rand(count), rand(count, 2), rand(count, num_peers, 2), width, height)


def share(box_4: Tensor, width: int, height: int) -> float:
    """The share of the pixels outside the box, counted one by one."""
    x0, y0, x1, y1 = box_4.tolist()
    outside = sum(not (x0 <= x < x1 and y0 <= y < y1) for y in range(height) for x in range(width))
    return outside / (width * height)


def cutmix_rand_bbox(width: int, height: int, lam: float, cx: int, cy: int) -> list[int]:
    """`rand_bbox` of clovaai/CutMix-PyTorch, train.py, with its two randint draws passed in."""
    cut_rat = math.sqrt(1.0 - lam)
    cut_w, cut_h = int(width * cut_rat), int(height * cut_rat)
    corners = [(cx - cut_w // 2, width), (cy - cut_h // 2, height), (cx + cut_w // 2, width), (cy + cut_h // 2, height)]
    return [min(max(at, 0), limit) for at, limit in corners]


@RULES
@EXAMPLES
@given(drawn=draws())
def test_boxes_lie_inside_the_image(rule, drawn):
    *_, width, height = drawn
    x0, y0, x1, y1 = place_boxes(rule, *drawn)[0].unbind(-1)
    assert (x0 >= 0).all() and (x0 <= x1).all() and (x1 <= width).all()
    assert (y0 >= 0).all() and (y0 <= y1).all() and (y1 <= height).all()


@pytest.mark.parametrize("rule", [rule for rule in BOX_RULES if rule != "clip_nominal"])
@EXAMPLES
@given(drawn=draws())
def test_label_weight_is_the_measured_pixel_share_of_every_peer(rule, drawn):
    *_, width, height = drawn
    box_J4, lam_L = place_boxes(rule, *drawn)
    shares = torch.tensor([share(box_4, width, height) for box_4 in box_J4])
    torch.testing.assert_close(lam_L.expand(len(box_J4)), shares, rtol=0, atol=1e-6)


@EXAMPLES
@given(drawn=draws())
def test_clip_nominal_labels_with_the_draw_itself(drawn):
    assert place_boxes("clip_nominal", *drawn)[1].tolist() == [drawn[0].float().item()]


@SHARED
@EXAMPLES
@given(drawn=draws())
def test_shared_rules_give_all_peers_one_lam_and_one_extent(rule, drawn):
    box_J4, lam_L = place_boxes(rule, *drawn)
    extent_J2 = box_J4[:, 2:] - box_J4[:, :2]
    assert lam_L.shape == (1,)
    assert (extent_J2 == extent_J2[0]).all()


@EXAMPLES
@given(drawn=draws())
def test_clip_rules_give_the_boxes_of_cutmix_as_published(drawn):
    lam, _, place_J2, width, height = drawn = (drawn[0].double(), *drawn[1:])
    size = torch.tensor([width, height])
    expected = [cutmix_rand_bbox(width, height, lam.item(), *(place_2 * size).long().tolist()) for place_2 in place_J2]
    assert place_boxes("clip_corrected", *drawn)[0].tolist() == expected
    assert place_boxes("clip_nominal", *drawn)[0].tolist() == expected


@EXAMPLES
@given(drawn=draws())
def test_clip_shared_has_the_extent_of_cutmix_around_the_shared_centre(drawn):
    lam, centre_2, _, width, height = drawn = (drawn[0].double(), *drawn[1:])
    centre = (centre_2 * torch.tensor([width, height])).long().tolist()
    x0, y0, x1, y1 = cutmix_rand_bbox(width, height, lam.item(), *centre)
    box_J4, _ = place_boxes("clip_shared", *drawn)
    assert (box_J4[:, 2:] - box_J4[:, :2]).tolist() == [[x1 - x0, y1 - y0]] * len(box_J4)


@EXAMPLES
@given(drawn=draws())
def test_inside_cuts_as_much_as_was_drawn(drawn):
    lam, *_, width, height = drawn = (drawn[0].double(), *drawn[1:])
    cut = math.sqrt(1 - lam.item())
    box_J4, _ = place_boxes("inside", *drawn)
    assert (box_J4[:, 2:] - box_J4[:, :2]).tolist() == [[int(width * cut), int(height * cut)]] * len(box_J4)


@RULES
def test_lam_1_pastes_nothing(rule):
    box_J4, lam_L = place_boxes(rule, torch.tensor(1.0), torch.rand(2), torch.rand(3, 2), 32, 24)
    assert (box_J4[:, :2] == box_J4[:, 2:]).any(dim=1).all()
    assert (lam_L == 1).all()


def test_inside_with_lam_0_pastes_everything():
    box_J4, lam_L = place_boxes("inside", torch.tensor(0.0), torch.rand(2), torch.full((3, 2), ONE), 32, 24)
    assert box_J4.tolist() == [[0, 0, 32, 24]] * 3
    assert lam_L.tolist() == [0.0]


@RULES
def test_peers_have_different_boxes(rule):
    box_SJ4, _ = many(rule, 4000)
    different = (box_SJ4[:, 0] != box_SJ4[:, 1]).any(dim=-1)
    assert different.double().mean() > 0.95


@RULES
def test_peers_placements_are_independent(rule):
    """Beyond the extent they share: the left edges of two peers, as shares of the room left, do not correlate."""
    box_SJ4, _ = many(rule, 4000, width=256, height=256)
    room_SJ = (256 - (box_SJ4[..., 2] - box_SJ4[..., 0])).clamp(min=1)
    rank_SJ = (box_SJ4[..., 0] / room_SJ).numpy()
    assert stats.spearmanr(rank_SJ[:, 0], rank_SJ[:, 1]).pvalue > 0.01


@SHARED
@pytest.mark.parametrize("axis", [0, 1])
def test_placement_is_uniform_over_the_positions_inside(rule, axis):
    rng = torch.Generator().manual_seed(axis)
    place_SJ2 = torch.rand(4000, 2, 2, generator=rng)
    box_SJ4, _ = place_boxes(rule, torch.full((4000,), 0.75), torch.full((4000, 2), 0.5), place_SJ2, 32, 24)
    length = (32, 24)[axis] // 2
    counts = np.bincount(box_SJ4[..., axis].flatten(), minlength=length + 1)
    assert len(counts) == length + 1
    assert stats.chisquare(counts).pvalue > 0.01


@pytest.mark.parametrize(("width", "height"), [(32, 32), (40, 25)])
def test_clip_shared_keeps_cutmix_law_of_areas(width, height):
    rng = np.random.default_rng(0)
    theirs = [
        cutmix_rand_bbox(width, height, rng.uniform(), rng.integers(width), rng.integers(height)) for _ in range(8000)
    ]
    areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in theirs]
    _, lam_S1 = many("clip_shared", 8000, width, height)
    ours = (1 - lam_S1[:, 0].double()) * width * height
    assert stats.ks_2samp(ours.round().numpy(), areas).pvalue > 0.05


@pytest.mark.parametrize(("rule", "mean"), [("clip_shared", 0.70), ("inside", 0.52), ("clip_corrected", 0.70)])
def test_mean_lam_at_32(rule, mean):
    assert many(rule, 20000)[1].mean().item() == pytest.approx(mean, abs=0.01)


def test_clip_nominal_labels_are_wrong_by_a_fifth_on_average():
    box_SJ4, lam_S1 = many("clip_nominal", 20000)
    extent_SJ2 = (box_SJ4[..., 2:] - box_SJ4[..., :2]).double()
    assert (1 - extent_SJ2.prod(-1) / 1024 - lam_S1).abs().mean().item() == pytest.approx(0.20, abs=0.01)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_uniform_times_a_side_stays_below_it(dtype):
    """So a pixel or a start drawn as floor(uniform * count) needs no clamp, in images of any size."""
    count = np.arange(1, 1 << 16, dtype=dtype)
    assert (np.nextafter(dtype(1), dtype(0)) * count < count).all()


@RULES
def test_steps_are_computed_as_one_by_one(rule):
    rng = torch.Generator().manual_seed(3)
    lam_S, centre_S2, place_SJ2 = (torch.rand(*shape, generator=rng) for shape in [(9,), (9, 2), (9, 3, 2)])
    box_SJ4, lam_SL = place_boxes(rule, lam_S, centre_S2, place_SJ2, 20, 30)
    for step in range(9):
        box_J4, lam_L = place_boxes(rule, lam_S[step], centre_S2[step], place_SJ2[step], 20, 30)
        assert torch.equal(box_J4, box_SJ4[step]) and torch.equal(lam_L, lam_SL[step])


@RULES
@EXAMPLES
@given(drawn=draws())
def test_mask_covers_the_half_open_box(rule, drawn):
    *_, width, height = drawn
    box_J4, _ = place_boxes(rule, *drawn)
    expected = torch.zeros(len(box_J4), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(expected, box_J4.tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    assert torch.equal(box_mask(box_J4, width, height), expected)
