"""What can be known of a training step on a GPU without one: its kernels, their number and layouts, and its waiting.

Launches of `compile: peers`, the default on a GPU, where J peers run the kernels of one compiled network:
    launches(J) = J * (forward + backward of the network) + (forward + backward of the method)
ResNet-32, all losses of CutnMix, batch 128: 357 J + 22 (J = 2) or + 26 (J = 8), and 66 J convolutions of cuDNN.
"""

import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lowering
import oracle
import pytest
import torch
from lowering import (
    Joint,
    Training,
    joint_graph,
    kernels,
    launches,
    library_calls,
    lower_joint,
    lowers,
    maps,
    transposes,
)
from tasks import TINY, keys_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from cutnmix.models import NETWORKS, build_network
from cutnmix.models.peers import Outputs, Peers
from cutnmix.models.resnet import basic, resnet
from cutnmix.pipeline.batch import Views
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Distort, Mix
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Draws
from cutnmix.pipeline.resident import ResidentLoader
from cutnmix.trainer.mesh import ONE
from cutnmix.trainer.method import Task
from cutnmix.trainer.methods import METHODS
from cutnmix.trainer.metrics import _metrics, _update
from cutnmix.trainer.step import Learner, Step, Tally

pytestmark = pytest.mark.filterwarnings("ignore")  # Dynamo's and Inductor's own
EACH = pytest.mark.parametrize("method", METHODS)
BF16 = torch.bfloat16
FORWARD, BACKWARD = 187, 170  # Triton launches of a ResNet-32 beside its 33 convolutions, each way


def host_step(
    method: str, J: int, network: str, batch: int, num_classes: int, folder: Path, dtype: torch.dtype = BF16
) -> tuple[Step, Learner, Views, Draws]:
    """A step as build makes it, and the views and draws of one batch, on the CPU. Uncompiled, without an optimizer."""
    needs, dataset = METHODS[method].needs, oracle.images(2 * batch, 32, 32)
    name = "none" if "cutnmix" in needs.refuses else "cutnmix"
    plan = make_plan(
        seed=0, epoch=0, num_images=len(dataset), size=(32, 32), batch_size=batch, distort=Distort(cutout=8),
        mix=Mix(name=name), num_views=J, num_peers=J, second=needs.second, label_N=dataset.labels,
    )  # fmt: skip
    mix = MixBatch(mean=dataset.mean, std=dataset.std, size=(32, 32), num_classes=num_classes, dtype=dtype)
    with patch.dict(NETWORKS, TINY):
        peers = Peers([network] * J, num_classes=num_classes, seed=0, form=needs.form or "nets")
        task = Task(J, num_classes, peers.feature_dims, peers.trunk_dim, len(dataset), epochs=2, peers=peers)
        made = METHODS[method](task, **keys_of(method, folder))
    for module in (peers, made):
        module.to(memory_format=torch.channels_last)
    learner = Learner(peers, made, None, None)  # pyright: ignore[reportArgumentType]
    return (
        Step(mix, "cpu", dtype),
        learner,
        ResidentLoader(dataset, Distort(cutout=8)).views(plan.step(0)),
        plan.step(0),
    )


# Waiting


def moved(x: Any, device: str) -> Any:
    """A named tuple's tensors, or in place a module's, as fake ones of the same strides. In a FakeTensorMode."""
    if isinstance(x, Tensor):
        fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)
        return nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
    if isinstance(x, nn.Module):
        for module in x.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: moved(tensor, device) for name, tensor in tensors.items()})
        return x
    return x._make(moved(field, device) for field in x) if hasattr(x, "_make") else x


class Watch(oracle.Dispatches):
    """Also the calls in order, with the dtypes of what they make. All ways to normalise a batch are one."""

    def __init__(self):
        super().__init__()
        self.made: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        dtypes = [x.dtype for x in tree_leaves((made, *args[:3])) if isinstance(x, Tensor)]
        if "batch_norm" in name:
            self.made.append(("batch_norm", made[0].dtype, *dtypes[-3:]))
        elif isinstance(made, Tensor) and name != "detach":
            self.made.append((name, *dtypes))
        return made


def watched_forward(device: str, step: Step, learner: Learner, *batch: Any) -> tuple[Watch, Any]:
    """A forward pass, its losses and the tally of them on fake tensors of a device, with autocast on."""
    parts = copy.deepcopy((step.mix, learner.peers, learner.method))
    with FakeTensorMode(allow_non_fake_inputs=True):
        mix, peers, method, views, draws = (moved(x, device) for x in (*parts, *batch))
        there, tally = Step(mix, device, step.dtype), Tally([])
        with lowering.cuda_autocast(), Watch() as watch:
            made = there.forward(Learner(peers, method, None, None), views, draws)  # pyright: ignore[reportArgumentType]
            tally.add(made[2], made[1].logits_JBK, made[0].target_LBK)
    return watch, (*made, tally)


def peers_of(method: str) -> int:
    return max(2, METHODS[method].needs.min_peers)


@EACH
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_forward_losses_and_tally_on_a_gpu_read_no_value_and_cross_no_device(method, dtype, tmp_path):
    """On fake CUDA tensors, where reading a value raises. The backward pass: below."""
    watch, (batch, outputs, losses, tally) = watched_forward(
        "cuda", *host_step(method, peers_of(method), "tiny", 5, 4, tmp_path, dtype)
    )
    assert watch.waits == []
    convolutions = {dtype for name, *dtypes in watch.made if name == "convolution" for dtype in dtypes}
    assert convolutions == {dtype}  # so autocast is really on
    assert batch.image_VBCHW.dtype == outputs.logits_JBK.dtype == dtype and outputs.logits_JBK.is_cuda
    assert all(loss.dtype == torch.float32 and loss.is_cuda for loss in losses.values())
    assert tally.sums is not None and tally.sums.is_cuda


def test_without_force_autocast_would_be_off_and_the_test_above_red(tmp_path, monkeypatch):
    monkeypatch.setattr(lowering, "cuda_autocast", lambda: pytest.warns(UserWarning))
    if torch.cuda.is_available():
        pytest.skip("autocast works here")
    with pytest.raises(RuntimeError):  # bfloat16 images meet float32 weights
        watched_forward("cuda", *host_step("baseline", 1, "tiny", 5, 4, tmp_path))


@pytest.mark.parametrize("num_classes", [4, 100])
def test_an_evaluation_reads_nothing_until_its_end(num_classes):
    metrics = _metrics(num_classes, torch.device("cpu"), ONE)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for metric in metrics.values(copy_state=False):
            for name in metric._defaults:
                state = getattr(metric, name)
                setattr(metric, name, moved(state, "cuda") if isinstance(state, Tensor) else [])
        with oracle.Dispatches() as watched:
            label_B = torch.empty(8, dtype=torch.int64, device="cuda")
            _update(metrics, torch.empty(8, num_classes, device="cuda"), label_B)
    assert watched.waits == []


@EACH
def test_a_whole_step_with_its_backward_has_no_call_that_waits(method, tmp_path):
    """In the joint graph of forward and backward, which is one graph or Dynamo refuses."""
    step, learner, views, draws = host_step(method, peers_of(method), "tiny", 5, 4, tmp_path)
    joint = joint_graph(lambda views, draws: step.forward(learner, views, draws)[2], (views, draws))
    calls = [node for node in joint.graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    names = {node.target.overloadpacket.__name__ for node in calls}
    assert names & oracle.Dispatches.WAITS == set()
    assert {"convolution", "convolution_backward"} <= names
    for node in calls:  # none between devices, none by a mask
        values = [x.meta["val"] for x in tree_leaves(node.args) if isinstance(x, torch.fx.Node)]
        assert not oracle.Dispatches._by_mask(node.target.overloadpacket.__name__, tuple(node.args))
        assert {x.device.type for x in values if isinstance(x, Tensor)} <= {"cpu"}


# Kernels


def test_the_cpus_trace_is_the_one_of_cuda(tmp_path):
    """Op for op and dtype for dtype: what is lowered below is what torch.autocast("cuda") makes of a step."""
    made = host_step("cutnmix", 2, "resnet20", 4, 100, tmp_path)
    cuda, cpu, uncast = (
        watched_forward(device, Step(made[0].mix, device, dtype), *made[1:])[0].made
        for device, dtype in (("cuda", BF16), ("cpu", BF16), ("cuda", torch.float32))
    )
    assert cpu == cuda
    assert {"convolution", "batch_norm", "addmm"} <= {name for name, *_ in cpu} and cuda != uncast


def network_graph(net: nn.Module, memory_format: torch.memory_format = torch.channels_last, batch: int = 128) -> Joint:
    """One network on its batch, as `compile: peers` compiles it."""
    net = net.to(memory_format=memory_format)
    image_BCHW = torch.rand(batch, 3, 32, 32).to(BF16).contiguous(memory_format=memory_format)

    def forward(image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", BF16):
            return net(image_BCHW)

    return joint_graph(forward, (image_BCHW,))


def method_graph(name: str, J: int, folder: Path) -> Joint:
    """The losses of J peers of ResNet-32's sizes on a batch of 128."""
    step, learner, views, draws = host_step(name, J, "resnet32", 128, 100, folder)
    batch = step.mix(views, draws)
    logits_JBK = torch.randn(J, 128, 100).to(BF16).requires_grad_()
    features = tuple(torch.randn(128, 64).to(BF16).requires_grad_() for _ in range(J))

    def losses(logits_JBK: Tensor, *features: Tensor) -> dict[str, Tensor]:
        with step.autocast():
            return learner.method(Outputs(logits_JBK, features), batch, learner.peers)

    return joint_graph(losses, (logits_JBK, *features))


def small(num_classes: int = 100) -> nn.Module:
    """A ResNet-8: each kind of block once."""
    return resnet(basic, [1, 1, 1], num_classes, 3)


@pytest.fixture(scope="module")
def resnet8() -> Training:
    return lower_joint(network_graph(small()), 80)


@lowers
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "depth"), [(80, 8), (90, 32)])
def test_a_peers_kernels_compile_and_none_changes_a_layout(arch, depth, resnet8, tmp_path):
    made = resnet8 if depth == 8 else lower_joint(network_graph(build_network("resnet32", 100)), arch)
    convolutions = depth + 1  # two shortcuts have one too, and the head is none
    for source in made:
        assert all("cubin" in assembly for assembly in kernels(source, tmp_path, arch))
        assert transposes(source) == 0
        assert all(strides[1] == 1 for _, strides in maps(source))  # every feature map is channels_last
    assert library_calls(made.forward) == ["convolution"] * convolutions + ["addmm"]
    assert library_calls(made.backward).count("convolution_backward") == convolutions
    if depth == 32:
        assert (launches(made.forward), launches(made.backward)) == (FORWARD, BACKWARD)


@lowers
@pytest.mark.slow
def test_lowering_times_nothing_on_a_gpu_whatever_was_compiled_before():
    """Compiling on the CPU registers the patterns that pad matrices, which time themselves where they match."""
    head = nn.Linear(64, 100)
    torch.compile(lambda x: head(x).sum())(torch.rand(4, 64)).backward()
    made = lower_joint(network_graph(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 100))), 80)
    assert library_calls(made.forward) == ["addmm"] and "mm" in library_calls(made.backward)


@lowers
@pytest.mark.slow
def test_the_count_of_layout_changes_would_see_one():
    """NCHW networks, where Inductor is made to optimise layouts: it copies before and after convolutions."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    graph = network_graph(net, torch.contiguous_format, batch=32)
    forced, left = (lower_joint(graph, force_layout_optimization=force) for force in (True, False))
    assert transposes(forced.forward) > 0 and transposes(forced.backward) > 0
    assert [*map(transposes, left)] == [0, 0]
    assert all(strides[1] > 1 for source in left for _, strides in maps(source))


@lowers
@pytest.mark.slow
def test_channels_last_networks_need_no_layout_optimisation_of_inductor(resnet8):
    """Inductor 2.14 leaves it out in backward graphs (pytorch#189239): a loss to networks in NCHW, none to ours."""
    forced = lower_joint(network_graph(small()), 80, force_layout_optimization=True)
    assert [*map(launches, forced)] == [*map(launches, resnet8)] and [*map(maps, forced)] == [*map(maps, resnet8)]
    assert [*map(transposes, resnet8)] == [0, 0]


@lowers
@pytest.mark.slow
def test_a_methods_kernels_compile_and_hardly_grow_in_number_with_peers(tmp_path):
    counts = {}
    for J in (2, 8):
        made = lower_joint(method_graph("cutnmix", J, tmp_path))
        counts[J] = launches(made.forward) + launches(made.backward)
        assert library_calls(made.forward) == ["addmm"] and library_calls(made.backward) == ["mm"]  # the peer teacher
        if J == 2:
            assert all("cubin" in assembly for source in made for assembly in kernels(source, tmp_path))
    assert all(count <= 20 + J for J, count in counts.items()), counts


@lowers
@pytest.mark.slow
def test_a_whole_step_of_two_peers_in_one_graph(resnet8, tmp_path, monkeypatch):
    """`compile: step`: mix, two ResNet-8, all losses, and the backward pass. No more launches than peer by peer."""
    monkeypatch.setitem(NETWORKS, "resnet8", small)
    step, learner, views, draws = host_step("cutnmix", 2, "resnet8", 128, 100, tmp_path)

    def forward(views: Views, draws: Draws) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        batch, outputs, losses = step.forward(learner, views, draws)
        return losses, outputs.logits_JBK.detach(), batch.target_LBK

    made = lower_joint(joint_graph(forward, (views, draws)), 80)
    for source in made:
        assert all("cubin" in assembly for assembly in kernels(source, tmp_path, 80))
        assert transposes(source) == 0
        maps_of_images = [
            strides for shape, strides in maps(source) if shape[0] == 128
        ]  # rows of mixed views: (2, 128, ...)
        assert maps_of_images and all(strides[1] == 1 for strides in maps_of_images)
    assert library_calls(made.forward).count("convolution") == 2 * 9
    assert library_calls(made.backward).count("convolution_backward") == 2 * 9
    assert launches(made.forward) <= 2 * launches(resnet8.forward) + 25
    assert launches(made.backward) <= 2 * launches(resnet8.backward) + 15


# Bytes


@lowers
@pytest.mark.parametrize("J", [1, 4])
def test_the_mix_moves_hardly_more_than_it_must(J, capsys):
    """Least: each view's bytes in once, the bfloat16 images and the targets out once."""
    dataset, batch = oracle.images(256, 32, 32), 128
    plan = make_plan(
        seed=0, epoch=0, num_images=256, size=(32, 32), batch_size=batch, distort=Distort(), mix=Mix(name="cutnmix"),
        num_views=J, num_peers=J,
    )  # fmt: skip
    mix = MixBatch(mean=dataset.mean, std=dataset.std, size=(32, 32), num_classes=100, dtype=BF16)
    views = ResidentLoader(dataset, Distort()).views(plan.step(0)).made()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        mix, views, draws = (moved(x, "cuda") for x in (mix, views, plan.step(0)))
        source = lowering.lowered(mix, (views, draws), fake)
    pixels = J * batch * 32 * 32 * 3
    least = pixels + 2 * pixels + 4 * batch * 100
    moved_bytes = lowering.bytes_moved(source)
    with capsys.disabled():
        print(f"\nmix, J = {J}, B = {batch}: {moved_bytes:,} bytes, {moved_bytes / least:.4f} x the least")
    assert 1 <= moved_bytes / least < 1.05
