"""A batch norm over processes is that of the whole batch, asks no value of a GPU, and stays one compiled graph."""

import copy

import lowering
import oracle
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from cutnmix.trainer import norm


@pytest.fixture
def group():
    """Of two processes, the other of which never answers: what is summed stays what it was here."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_equal_shares_are_normalised_as_their_whole(affine, memory_format, group, monkeypatch):
    """Also far from zero, and with the gradient through the statistics of both."""
    torch.manual_seed(0)
    whole = nn.BatchNorm2d(3, affine=affine, momentum=0.3).double()
    ours = nn.Sequential(copy.deepcopy(whole).float())
    norm.synchronise(ours, group)
    monkeypatch.setattr(norm, "all_reduce", lambda sums, op, group: 2 * sums)
    monkeypatch.setattr(norm, "wait_tensor", lambda sums: sums)
    x = (100 + torch.randn(5, 3, 4, 6)).to(memory_format=memory_format).requires_grad_()
    twice = x.detach().double().repeat(2, 1, 1, 1).requires_grad_()
    weight = torch.randn(5, 3, 4, 6)
    y, expected = ours(x), whole(twice)
    assert y.is_contiguous(memory_format=memory_format)
    (y * weight).sum().backward()
    (expected * weight.repeat(2, 1, 1, 1)).sum().backward()
    assert isinstance(x.grad, Tensor) and isinstance(twice.grad, Tensor)
    near = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(y, expected[:5], **near)
    torch.testing.assert_close(x.grad, twice.grad[:5], **near)
    torch.testing.assert_close(dict(ours[0].named_buffers()), dict(whole.named_buffers()), **near)
    torch.testing.assert_close(ours.eval()(x), whole.eval()(twice)[:5], **near)


def stack(group: dist.ProcessGroup) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    norm.synchronise(net, group)
    return net


def test_on_a_gpu_no_value_is_read(group):
    with FakeTensorMode(allow_non_fake_inputs=True), lowering.cuda_autocast(), oracle.Dispatches() as watched:
        with torch.device("cuda"):
            made = stack(group)(torch.empty(2, 3, 8, 8))
    assert made.is_cuda and watched.waits == []


def test_a_network_with_it_is_one_graph(group):
    net, twin, x = stack(group), stack(group), torch.randn(2, 3, 8, 8)
    twin.load_state_dict(net.state_dict())
    torch._dynamo.reset()
    made, expected = torch.compile(twin, backend="aot_eager", fullgraph=True)(x), net(x)
    torch.testing.assert_close(made, expected)
    made.sum().backward()
    expected.sum().backward()
    for ours, theirs in zip(twin.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
