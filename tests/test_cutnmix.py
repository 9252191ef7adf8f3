"""CutnMix: every pixel from self or partner, every target worth its pixels, for the functions and the Kornia class."""

import doctest
import re

import kornia.augmentation as K
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from cutnmix.pipeline import cutnmix
from cutnmix.pipeline.boxes import BOX_RULES
from cutnmix.pipeline.cutnmix import CutnMix, mix_target, one_hot, paste

B, C, H, W, NUM_CLASSES = 6, 3, 10, 14, 7
RULES = pytest.mark.parametrize("rule", BOX_RULES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
PEERS = pytest.mark.parametrize("J", [1, 2, 4])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=rng(seed), dtype=torch.float64).to(dtype)


def labels(batch: int = B) -> Tensor:
    return torch.randint(NUM_CLASSES, (batch,), generator=rng(1))


def mixer(J: int = 2, seed: int | None = 0, **changes) -> CutnMix:
    arguments = dict(num_classes=NUM_CLASSES, generator=None if seed is None else rng(seed))
    return CutnMix(J, data_keys=["input", "class"], **(arguments | changes))


@st.composite
def cases(draw):
    """(images (V, B, C, H, W), boxes (M, 4), partner (B,)) of any small shape, boxes of any size, empty ones too."""
    num_peers, batch, channels = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    num_views, num_boxes = draw(st.sampled_from([(num_peers, num_peers), (1, num_peers), (num_peers, 1)]))
    corner = st.tuples(*(st.integers(0, side) for side in (width, height, width, height)))
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in draw(st.tuples(*[corner] * num_boxes))]
    partner = draw(st.permutations(range(batch)))
    dtype = draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8]))
    image = (255 * noise(num_views, batch, channels, height, width)).to(dtype)
    return image, torch.tensor(boxes, dtype=torch.int32), torch.tensor(partner)


# The pure functions


@settings(max_examples=200, deadline=None, derandomize=True)
@given(case=cases())
def test_every_pixel_is_the_images_own_or_its_partners_as_the_box_says(case):
    image, box_M4, partner_B = case
    mixed = paste(image, box_M4, partner_B)
    assert mixed.dtype == image.dtype
    assert torch.equal(mixed.double(), torch.from_numpy(oracle.paste(image.double().numpy(), box_M4, partner_B)))


@pytest.mark.parametrize("num_views", [1, 3])
@pytest.mark.parametrize("num_boxes", [1, 3])
def test_paste_keeps_channels_last(num_views, num_boxes):
    image = noise(num_views, B, H, W, C).permute(0, 1, 4, 2, 3)
    mixed = paste(image, torch.tensor([[1, 2, 5, 6]] * num_boxes), torch.arange(B).flip(0))
    assert all(view.is_contiguous(memory_format=torch.channels_last) for view in mixed)
    assert mixed.permute(0, 1, 3, 4, 2).is_contiguous()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data(), batch=st.integers(1, 6), lams=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=3))
def test_targets_are_the_weighted_one_hot_rows(data, batch, lams):
    label_B = data.draw(st.lists(st.integers(0, NUM_CLASSES - 1), min_size=batch, max_size=batch))
    partner_B = data.draw(st.permutations(range(batch)))
    made = mix_target(torch.tensor(label_B), torch.tensor(partner_B), torch.tensor(lams), NUM_CLASSES)
    assert made.dtype == torch.float32
    expected = torch.from_numpy(oracle.targets(label_B, list(partner_B), lams, NUM_CLASSES)).float()
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(made.sum(-1), torch.ones(len(lams), batch), rtol=0, atol=1e-6)


def test_one_hot_is_torchs():
    assert torch.equal(one_hot(labels(), NUM_CLASSES), torch.nn.functional.one_hot(labels(), NUM_CLASSES).float())


# The Kornia augmentation: what comes out


@RULES
@PEERS
@pytest.mark.parametrize("per_peer", [False, True])
def test_images_and_targets_follow_the_parameters(rule, J, per_peer):
    mix, image = mixer(J, box_rule=rule), noise(J if per_peer else 1, B, C, H, W)
    mixed, target = mix(image, labels())
    drawn = mix._params
    expected = oracle.paste(image.numpy(), drawn["box"], drawn["partner"])
    assert np.array_equal(mixed.numpy(), expected)
    weights = oracle.targets(labels().tolist(), drawn["partner"].tolist(), drawn["lam"].tolist(), NUM_CLASSES)
    np.testing.assert_allclose(target.numpy(), weights.squeeze(0) if len(weights) == 1 else weights, atol=1e-6)


@pytest.mark.parametrize("rule", [rule for rule in BOX_RULES if rule != "clip_nominal"])
@pytest.mark.parametrize("seed", range(5))
def test_targets_weigh_by_the_measured_share_of_pixels(rule, seed):
    """Each image is filled with its own number, so that the pixels of each can be counted in what comes out."""
    image = torch.arange(float(B)).view(1, B, 1, 1, 1).expand(3, B, C, H, W)
    mixed, target = mixer(3, seed=seed, box_rule=rule, num_classes=B)(image, torch.arange(B))
    counted_JBK = one_hot(mixed[:, :, 0].flatten(), B).view(3, B, H * W, B).mean(2)
    torch.testing.assert_close(target.expand(3, B, B), counted_JBK, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["clip_shared", "inside", "clip_nominal"])
def test_all_peers_share_one_target(rule):
    _, target = mixer(4, box_rule=rule)(noise(4, B, C, H, W), labels())
    assert target.shape == (B, NUM_CLASSES)
    torch.testing.assert_close(target.sum(-1), torch.ones(B))


def test_clip_corrected_gives_every_peer_its_own_target():
    _, target = mixer(4, box_rule="clip_corrected")(noise(4, B, C, H, W), labels())
    assert target.shape == (4, B, NUM_CLASSES)
    torch.testing.assert_close(target.sum(-1), torch.ones(4, B))


def test_peers_differ_only_by_their_boxes():
    mix, image = mixer(2, seed=3), noise(B, C, H, W)
    mixed, _ = mix(image, labels())
    assert not torch.equal(mixed[0], mixed[1])
    assert ((mixed == image) | (mixed == image[mix._params["partner"]])).all()


def test_identical_boxes_are_cutmix():
    """Against torchvision's v2.CutMix: roll the batch, copy the box, weigh by the area."""
    image, label_B = noise(B, C, H, W), labels()
    x1, y1, x2, y2 = 2, 3, 9, 8
    lam = 1 - (x2 - x1) * (y2 - y1) / (W * H)
    theirs = image.clone()
    theirs[..., y1:y2, x1:x2] = image.roll(1, 0)[..., y1:y2, x1:x2]
    their_target = one_hot(label_B.roll(1, 0), NUM_CLASSES).mul(1 - lam).add(one_hot(label_B, NUM_CLASSES) * lam)

    params = {
        "partner": torch.arange(B).roll(1, 0),
        "box": torch.tensor([[x1, y1, x2, y2]] * 3),
        "lam": torch.tensor([lam]),
    }
    mixed, target = mixer(3)(image, label_B, params=params)
    assert all(torch.equal(peer, theirs) for peer in mixed)
    torch.testing.assert_close(target, their_target)


def kornia_cutmix() -> K.RandomCutMixV2:
    return K.RandomCutMixV2(same_on_batch=True, use_correct_lambda=True, data_keys=["input", "class"])


@pytest.mark.parametrize("seed", range(4))
def test_one_peer_inside_is_kornias_cutmix(seed):
    """Same pixels and same label rows as RandomCutMixV2, given its box and its pairs."""
    torch.manual_seed(seed)
    image, label_B, kornia = noise(B, C, H, W), labels(), kornia_cutmix()
    theirs, their_rows = kornia(image, label_B)
    first, last = kornia._params["crop_src"][0, 0, 0], kornia._params["crop_src"][0, 0, 2]
    box_14 = torch.cat([first, last + 1])[None].int()
    params = {
        "partner": kornia._params["mix_pairs"][0],
        "box": box_14,
        "lam": 1 - (box_14[:, 2:] - box_14[:, :2]).prod(-1) / (H * W),
    }
    ours, our_rows = mixer(1, num_classes=None)(image, label_B, params=params)
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(our_rows, their_rows)


def test_without_num_classes_labels_become_kornias_rows():
    mix = mixer(2, num_classes=None)
    _, rows = mix(noise(B, C, H, W), labels())
    partner, lam = mix._params["partner"], mix._params["lam"]
    assert rows.shape == (1, B, 3)
    expected = torch.stack([labels().float(), labels()[partner].float(), lam.expand(B)], dim=-1)
    assert torch.equal(rows[0], expected)


def test_under_clip_corrected_kornias_rows_come_for_each_peer():
    mix = mixer(3, num_classes=None, box_rule="clip_corrected")
    _, rows = mix(noise(B, C, H, W), labels())
    assert rows.shape == (3, B, 3)
    assert torch.equal(rows[..., 2], mix._params["lam"][:, None].expand(3, B))


# Shapes, types, strides


@PEERS
def test_a_batch_without_views_gives_a_view_a_peer(J):
    mixed, _ = mixer(J)(noise(B, C, H, W), labels())
    assert mixed.shape == ((B, C, H, W) if J == 1 else (J, B, C, H, W))


@PEERS
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_number_of_channels(J, channels):
    mix, image = mixer(J), noise(J, B, channels, H, W)
    mixed, _ = mix(image, labels())
    assert np.array_equal(mixed.numpy(), oracle.paste(image.numpy(), mix._params["box"], mix._params["partner"]))


@DTYPES
def test_any_float_type_is_kept_and_draws_alike(dtype):
    image = noise(2, B, C, H, W, dtype=dtype)
    mixed, target = mixer(2)(image, labels())
    reference, same = mixer(2)(image.double(), labels())
    assert mixed.dtype == dtype
    assert torch.equal(mixed.double(), reference)
    assert target.dtype == torch.float32 and torch.equal(target, same)


@PEERS
def test_channels_last_is_kept(J):
    image = noise(B, C, H, W).contiguous(memory_format=torch.channels_last)
    mixed, _ = mixer(J)(image, labels())
    peers = mixed if mixed.dim() == 5 else mixed[None]
    assert all(peer.is_contiguous(memory_format=torch.channels_last) for peer in peers)


def test_images_are_not_changed_in_place():
    image = noise(2, B, C, H, W)
    before = image.clone()
    mixer(2)(image, labels())
    assert torch.equal(image, before)


# Draws


def test_a_generator_makes_draws_reproducible_and_leaves_the_default_one_alone():
    image, state = noise(B, C, H, W), torch.get_rng_state()
    first, again, other = (mixer(2, seed=seed)(image, labels()) for seed in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_the_seed_of_torch_decides():
    image, mix = noise(B, C, H, W), mixer(2, seed=None)
    torch.manual_seed(11)
    first = mix(image, labels())[0]
    torch.manual_seed(11)
    assert torch.equal(first, mix(image, labels())[0])
    assert not torch.equal(first, mix(image, labels())[0])


@RULES
def test_parameters_left_by_a_call_are_replayed(rule):
    mix, image = mixer(2, box_rule=rule), noise(2, B, C, H, W)
    mixed, target = mix(image, labels())
    state = mix.generator.get_state()
    again = mix(image, labels(), params=mix._params)
    assert torch.equal(mixed, again[0]) and torch.equal(target, again[1])
    assert torch.equal(mix.generator.get_state(), state)


def test_parameters_of_one_instance_replay_in_another_on_labels_alone():
    mix = mixer(2)
    _, target = mix(noise(B, C, H, W), labels())
    assert torch.equal(mixer(2, seed=9)(labels(), params=mix._params, data_keys=["class"]), target)


def test_data_keys_may_come_in_any_order_and_with_the_call():
    image = noise(B, C, H, W)
    mixed, target = mixer(2)(image, labels())
    swapped = mixer(2)(labels(), image, data_keys=["class", "input"])
    assert torch.equal(swapped[0], target) and torch.equal(swapped[1], mixed)
    assert torch.equal(CutnMix(2, generator=rng())(image), mixed)


@RULES
def test_p_0_changes_nothing(rule):
    image = noise(2, B, C, H, W)
    mixed, target = mixer(2, p=0.0, box_rule=rule)(image, labels())
    assert torch.equal(mixed, image)
    assert torch.equal(target.expand(2, B, -1), one_hot(labels(), NUM_CLASSES).expand(2, B, -1))


def drawn_lams(count: int, **changes) -> Tensor:
    mix = mixer(1, **changes)
    return torch.cat([mix.generate_parameters((1, 1, 2048, 2048))["lam"] for _ in range(count)])


def test_p_is_the_probability_that_a_batch_is_mixed():
    mixed = drawn_lams(1000, p=0.5) < 1
    assert stats.binomtest(int(mixed.sum()), 1000, 0.5).pvalue > 0.01


def test_the_gate_is_no_part_of_the_law_of_lam():
    lam = drawn_lams(3000, p=0.5, box_rule="clip_nominal")
    assert stats.kstest(lam[lam < 1].numpy(), stats.uniform.cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.4, 1.0, 3.0])
def test_lam_is_a_beta_draw(alpha):
    lam = drawn_lams(1500, alpha=alpha, box_rule="clip_nominal")
    assert stats.kstest(lam.numpy(), stats.beta(alpha, alpha).cdf).pvalue > 0.01


@pytest.mark.parametrize("alpha", [0.02, 0.001])
def test_a_small_alpha_gives_next_to_no_lam_in_the_middle(alpha):
    lam = drawn_lams(1500, alpha=alpha, box_rule="clip_nominal").numpy()
    law = stats.beta(alpha, alpha)
    middle = ((lam > 0.1) & (lam < 0.9)).sum()
    assert stats.binomtest(int(middle), 1500, law.cdf(0.9) - law.cdf(0.1)).pvalue > 0.01
    assert stats.binomtest(int((lam < 0.5).sum()), 1500, 0.5).pvalue > 0.01


def test_partners_are_uniform_permutations():
    mix = mixer(2)
    partners = torch.stack([mix.generate_parameters((3, 1, 8, 8))["partner"] for _ in range(1800)])
    _, counts = np.unique(partners.numpy(), axis=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 0.01


# Refusals


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_peers": 0}, "num_peers"),
        ({"num_peers": 2.0}, "num_peers must be a whole number of at least 1, not 2.0"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"alpha": float("inf")}, "alpha"),
        ({"p": -0.1}, "p must"),
        ({"p": 1.1}, "p must"),
        ({"box_rule": "clip"}, "box_rule.*clip_shared.*'clip'"),
        ({"num_classes": 0}, "num_classes must be None or a whole number of at least 1, not 0"),
        ({"num_classes": 2.5}, r"num_classes .* not 2\.5"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        CutnMix(**arguments)


@pytest.mark.parametrize(
    ("shape", "dtype", "said"),
    [
        ((C, H, W), torch.float32, r"\(3, 10, 14\)"),
        ((2, 2, B, C, H, W), torch.float32, "6, 3, 10, 14"),
        ((2, B, C, H, W), torch.uint8, "uint8"),
        ((3, B, C, H, W), torch.float32, "3 views for num_peers=2"),
    ],
)
@pytest.mark.parametrize("replay", [False, True])
def test_wrong_images_are_refused_with_their_shape_or_type(shape, dtype, said, replay):
    mix = mixer(2)
    mix(noise(B, C, H, W), labels())
    params = mix._params if replay else None
    with pytest.raises((ValueError, TypeError), match=said):
        mix(torch.zeros(shape, dtype=dtype), labels(), params=params)


@pytest.mark.parametrize(
    ("J", "shape", "said"),
    [
        (2, (2, B, C, W, H), f"are of 2 peers, {B} images, {H} x {W}; not of 2, {B}, {W} x {H}"),
        (2, (2, B + 1, C, H, W), f"not of 2, {B + 1}, {H} x {W}"),
        (2, (B - 1, C, H, W), f"not of 2, {B - 1}, {H} x {W}"),
        (3, (B, C, H, W), f"not of 3, {B}, {H} x {W}"),
    ],
)
def test_parameters_of_other_images_or_peers_are_not_replayed(J, shape, said):
    """The pasted share would not be what their lambda says."""
    mix = mixer(2)
    mix(noise(B, C, H, W), labels())
    with pytest.raises(ValueError, match=re.escape(said)):
        mixer(J)(noise(*shape), params=mix._params, data_keys=["input"])


@pytest.mark.parametrize(
    "wrong",
    [one_hot(labels(), NUM_CLASSES), labels()[:, None], labels() + 0.5, labels(B - 1)],
    ids=["one-hot", "a column", "fractions", "too few"],
)
@pytest.mark.parametrize("num_classes", [None, NUM_CLASSES])
def test_wrong_labels_are_refused_with_their_shape_and_type(wrong, num_classes):
    said = re.escape(f"labels as {B} whole numbers, one an image, not {tuple(wrong.shape)} of {wrong.dtype}")
    with pytest.raises(ValueError, match=said):
        mixer(num_classes=num_classes)(noise(B, C, H, W), wrong)


def test_no_input_is_dropped_for_want_of_a_key():
    mix = CutnMix(2, num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match=r"2 inputs for 1 data_keys \(image\)"):
        mix(noise(B, C, H, W), labels())
    with pytest.raises(ValueError, match="without images there is nothing to draw for"):
        mix(labels(), data_keys=["class"])
    mix(noise(B, C, H, W))
    assert mix(labels(), data_keys=["class"], params=mix._params).shape == (B, NUM_CLASSES)


@pytest.mark.parametrize("key", ["mask", "bbox", "keypoints"])
def test_other_data_keys_are_refused_by_name(key):
    with pytest.raises(ValueError, match=key):
        CutnMix(2)(noise(B, C, H, W), torch.zeros(B, 1, H, W), data_keys=["input", key])


# In Kornia's house


def test_the_documented_example_is_true():
    tested = doctest.testmod(cutnmix)
    assert tested.attempted > 0 and tested.failed == 0


def test_repr_says_what_is_set():
    shown = repr(CutnMix(3, alpha=0.5, p=0.7, box_rule="inside"))
    assert shown.startswith("CutnMix(")
    assert all(part in shown for part in ("num_peers=3", "alpha=0.5", "p_batch=0.7", "box_rule=inside"))


@pytest.mark.parametrize("J", [1, 2])
def test_works_as_the_last_step_of_kornias_sequential(J):
    """On images. Kornia's container refuses class labels to every mix: its labels come from the parameters."""
    sequential = K.AugmentationSequential(K.RandomHorizontalFlip(p=0.5), CutnMix(J), data_keys=["input"])
    image = noise(B, C, H, W)
    mixed = sequential(image)
    assert mixed.shape == ((B, C, H, W) if J == 1 else (J, B, C, H, W))
    assert torch.equal(sequential(image, params=sequential._params), mixed)
    flip, drawn = (item.data for item in sequential._params)
    flipped = torch.where(flip["batch_prob"].bool()[:, None, None, None], image.flip(-1), image)
    expected = oracle.paste(flipped[None].numpy(), drawn["box"], drawn["partner"])
    assert np.array_equal(mixed.numpy().reshape(expected.shape), expected)


# Gradients


def test_gradients_flow_to_the_pixels_that_were_kept():
    mix, image = mixer(2), noise(2, B, C, H, W, dtype=torch.float64).requires_grad_()
    mixed, _ = mix(image, labels())
    weight = noise(2, B, C, H, W, dtype=torch.float64, seed=1)
    (mixed * weight).sum().backward()
    expected = torch.zeros_like(weight)
    partner = mix._params["partner"].tolist()
    for j, (x0, y0, x1, y1) in enumerate(mix._params["box"].tolist()):
        inside = torch.zeros(H, W, dtype=torch.bool)
        inside[y0:y1, x0:x1] = True
        for b in range(B):
            expected[j, b] += weight[j, b] * ~inside
            expected[j, partner[b]] += weight[j, b] * inside
    torch.testing.assert_close(image.grad, expected)


def test_gradcheck():
    mix = mixer(2)
    image = noise(2, 3, 1, 3, 4, dtype=torch.float64).requires_grad_()
    mix(image, labels(3))
    assert torch.autograd.gradcheck(lambda x: mix(x, labels(3), params=mix._params)[0], image)


# Compiled, and what it costs


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("J", [1, 3])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_drawing_compiles_to_one_graph_with_the_same_results(backend, J, alpha):
    torch._dynamo.reset()
    eager, image = mixer(J, seed=None, alpha=alpha), noise(B, C, H, W)
    compiled = torch.compile(mixer(J, seed=None, alpha=alpha), fullgraph=True, backend=backend)
    torch.manual_seed(4)
    expected = eager(image, labels())
    torch.manual_seed(4)
    made = compiled(image, labels())
    assert torch.equal(made[0], expected[0])
    torch.testing.assert_close(made[1], expected[1])


@RULES
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_replaying_compiles_to_one_graph_with_the_same_results(rule, backend):
    torch._dynamo.reset()
    mix, image = mixer(2, box_rule=rule), noise(2, B, C, H, W)
    expected = mix(image, labels())
    params = dict(mix._params)

    @torch.compile(fullgraph=True, backend=backend)
    def replay(image, label_B, params):
        return mix(image, label_B, params=params)

    made = replay(image, labels(), params)
    assert torch.equal(made[0], expected[0])
    torch.testing.assert_close(made[1], expected[1])


def test_compiled_once_for_every_batch():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(mixer(2, seed=None), fullgraph=True, backend=counter)
    for seed in range(4):
        compiled(noise(B, C, H, W, seed=seed), labels())
    assert counter.frame_count == 1


@RULES
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("p", [1.0, 0.5])
def test_no_call_makes_the_host_wait(rule, alpha, p):
    mix, image = mixer(2, seed=None, alpha=alpha, p=p, box_rule=rule), noise(2, B, C, H, W)
    with oracle.Dispatches() as watched:
        mix(image, labels())
    assert watched.waits == []


def test_takes_less_than_a_third_of_kornias_aten_calls():
    image, label_B = noise(128, 3, 32, 32), torch.randint(10, (128,))
    ours, theirs = mixer(2, seed=None, num_classes=10), kornia_cutmix()
    counts = []
    for mix in (ours, theirs):
        mix(image, label_B)  # what is made once is not counted
        with oracle.Dispatches() as watched:
            mix(image, label_B)
        counts.append(len(watched.calls))
    assert counts[0] < counts[1] / 3, counts
    assert watched.waits != []  # Kornia's does wait, so the watcher sees
