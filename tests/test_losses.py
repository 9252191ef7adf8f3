"""Every loss against the plainest possible reading of its equation: loops over peers and images, in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cutnmix.trainer.losses import cross_entropy, kl, mmd, mutual_kl

B, K, D = 5, 4, 6
PEERS = pytest.mark.parametrize("J", [2, 3, 4])


def randn(*shape: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def targets(*shape: int) -> Tensor:
    return randn(*shape).softmax(-1).detach()


def kl_by_hand(teacher_BK: Tensor, student_BK: Tensor, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for teacher_K, student_K in zip(teacher_BK.detach(), student_BK, strict=True):
        p, q = (teacher_K / temperature).softmax(0), (student_K / temperature).softmax(0)
        total = total + (p * (p / q).log()).sum()
    return temperature**2 * total / len(student_BK)


def mutual_kl_by_hand(logits_JBK: Tensor, temperature: float) -> Tensor:
    J = len(logits_JBK)
    rows = [[kl_by_hand(logits_JBK[k], logits_JBK[j], temperature) for k in range(J) if k != j] for j in range(J)]
    return torch.stack([sum(row, torch.zeros(())) / (J - 1) for row in rows])


def mmd_by_hand(feature_JBD: Tensor, detach: bool) -> Tensor:
    J, means = len(feature_JBD), [feature.mean(0) for feature in feature_JBD]
    others = [m.detach() for m in means] if detach else means
    rows = [[(means[j] - others[k]).square().sum() for k in range(J) if k != j] for j in range(J)]
    return torch.stack([sum(row, torch.zeros(())) / (J - 1) for row in rows])


def assert_same_values_and_gradients(actual_J: Tensor, expected_J: Tensor, x: Tensor):
    """Entry by entry, each with its gradient with respect to all peers, so that a detached one must be detached."""
    torch.testing.assert_close(actual_J, expected_J, rtol=1e-11, atol=1e-11)
    for actual, expected in zip(actual_J, expected_J, strict=True):
        (grad,) = torch.autograd.grad(actual, x, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected, x, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-11, atol=1e-11)


@PEERS
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_mutual_kl_is_the_double_loop_over_pairs(J, temperature):
    logits = randn(J, B, K)
    assert_same_values_and_gradients(mutual_kl(logits, temperature), mutual_kl_by_hand(logits, temperature), logits)


@PEERS
@pytest.mark.parametrize("detach", [True, False])
def test_mmd_is_the_double_loop_over_pairs(J, detach):
    feature = randn(J, B, D)
    assert_same_values_and_gradients(mmd(feature, detach), mmd_by_hand(feature, detach), feature)


@PEERS
def test_mmd_summed_over_peers_doubles_its_gradient_when_not_detached(J):
    feature = randn(J, B, D)
    grads = [torch.autograd.grad(mmd(feature, detach).sum(), feature)[0] for detach in (True, False)]
    torch.testing.assert_close(2 * grads[0], grads[1])


@PEERS
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", ["shared", "own"])
def test_kl_is_the_loop_over_peers(J, temperature, shape):
    student = randn(J, B, K)
    teacher = randn(B, K) if shape == "shared" else randn(J, B, K, scale=2.0)
    pairs = zip(teacher.expand(J, B, K), student, strict=True)
    expected = torch.stack([kl_by_hand(t, s, temperature) for t, s in pairs])
    actual = kl(teacher, student, temperature)
    assert_same_values_and_gradients(actual, expected, student)
    assert torch.autograd.grad(actual.sum(), teacher, allow_unused=True) == (None,)


@PEERS
def test_cross_entropy_of_soft_targets(J):
    logits = randn(J, B, K)
    for target in (targets(1, B, K), targets(J, B, K)):
        pairs = zip(logits, target.expand(J, B, K), strict=True)
        expected = torch.stack([F.cross_entropy(z, t) for z, t in pairs])
        assert_same_values_and_gradients(cross_entropy(logits, target), expected, logits)


def test_cross_entropy_of_one_hot_targets_is_that_of_labels():
    logits, label = randn(1, B, K), torch.tensor([0, 3, 1, 1, 2])
    actual = cross_entropy(logits, F.one_hot(label, K)[None].double())
    torch.testing.assert_close(actual[0], F.cross_entropy(logits[0], label))


def test_gradcheck():
    logits, feature, teacher, target = randn(3, B, K), randn(3, B, D), randn(B, K).detach(), targets(1, B, K)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, target), logits)
    assert torch.autograd.gradcheck(lambda z: kl(teacher, z, 3.0), logits)
    assert torch.autograd.gradcheck(lambda f: mmd(f, detach=False), feature)


def test_kl_direction_by_hand():
    fair, skewed = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert kl(fair, skewed[None], 1.0).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert kl(skewed, fair[None], 1.0).item() == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    # mutual_kl's entry j has peer j as the student.
    both = mutual_kl(torch.stack([fair, skewed]), 1.0)
    torch.testing.assert_close(both, torch.cat([kl(skewed, fair[None], 1.0), kl(fair, skewed[None], 1.0)]))


@PEERS
def test_kl_is_zero_iff_equal_and_blind_to_shifts(J):
    logits = randn(J, B, K).detach()
    assert (kl(logits, logits, 3.0) == 0).all()
    assert (kl(logits.roll(1, -1), logits, 3.0) > 0).all()
    assert (mutual_kl(logits, 3.0) > 0).all()
    same = logits[:1].repeat(J, 1, 1)
    torch.testing.assert_close(mutual_kl(same, 3.0), torch.zeros(J, dtype=torch.float64), rtol=0, atol=1e-14)
    shift = torch.arange(J, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(mutual_kl(logits + shift, 3.0), mutual_kl(logits, 3.0))


@PEERS
def test_mmd_is_zero_for_equal_means_whatever_the_features(J):
    feature = randn(J, B, D).detach()
    feature = feature - feature.mean(1, keepdim=True)
    torch.testing.assert_close(mmd(feature), torch.zeros(J, dtype=torch.float64), rtol=0, atol=1e-14)


def test_mmd_in_float32_does_not_cancel():
    feature = (100 + 0.01 * randn(3, 64, D).detach()).float()  # sum ||m||^2 - ... would be all rounding error here
    torch.testing.assert_close(mmd(feature).double(), mmd_by_hand(feature.double(), True), rtol=2e-2, atol=0)


def test_mutual_kl_in_float32_is_close_to_float64():
    logits = randn(4, 64, 100, scale=8.0).detach()
    torch.testing.assert_close(mutual_kl(logits.float(), 3.0).double(), mutual_kl(logits, 3.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 20.0, 100.0])
def test_mutual_kl_of_peers_that_agree_is_0_but_for_rounding_that_grows_with_t2(temperature):
    logits = randn(1, 64, 100, scale=8.0).detach().float().expand(8, -1, -1)
    assert mutual_kl(logits, temperature).abs().max() < 1e-6 * temperature**2


LOSSES = {
    "cross_entropy": lambda x: cross_entropy(x, targets(1, x.shape[1], x.shape[2]).float()),
    "kl": lambda x: kl(x.flip(0), x, 3.0),
    "mutual_kl": lambda x: mutual_kl(x, 3.0),
    "mmd": lambda x: mmd(x),
}
EACH = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_computed_in_float32(loss, dtype):
    x = randn(3, B, K).detach().to(dtype)
    expected = loss(x.float())
    assert expected.dtype == torch.float32
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for same in (x, x.float()):
                torch.testing.assert_close(loss(same), expected, rtol=0, atol=0)


@EACH
def test_extreme_float16_stays_finite(loss):
    x = torch.tensor([1e4, -1e4, 0.0, 6e4]).repeat(3, B, 1)
    x[1], x[2] = -x[1], x[2].roll(1, -1)
    x = x.half().requires_grad_()
    value = loss(x)
    value.sum().backward()
    assert x.isfinite().all() and value.isfinite().all()
    assert x.grad is not None


class CountAten(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@EACH
def test_number_of_aten_ops_does_not_grow_with_the_peers(loss):
    counts = []
    for J in (2, 8):
        x = randn(J, B, K)
        with CountAten() as ops:
            torch.autograd.grad(loss(x).sum(), x)
        counts.append(ops.count)
    assert counts[0] == counts[1]
