"""What `auto` means here, what cannot be had, and that a compiled run is the eager one."""

import sys
import sysconfig
from contextlib import contextmanager

import pytest
import torch
from tasks import tiny
from torch import Tensor, nn

from cutnmix.models import NETWORKS
from cutnmix.trainer import device, run
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.device import Setting, choose
from cutnmix.trainer.keys import ConfigError
from cutnmix.trainer.step import Tally

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def chosen(*overrides: str) -> Setting:
    return choose(load_config("quickstart", overrides))


# auto


@no_gpu
def test_auto_without_a_gpu_is_the_cpu_uncompiled():
    setting = chosen()
    assert (setting.device, setting.compile, setting.notes) == (torch.device("cpu"), "none", [])


@pytest.mark.parametrize(("avx512", "amx", "name"), [(0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16"), (1, 1, "bf16")])
def test_auto_is_bf16_only_where_the_cpu_multiplies_it(avx512, amx, name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert chosen("device=cpu").dtype == DTYPES[name]


@pytest.mark.parametrize("precision", DTYPES)
def test_a_precision_that_is_asked_for_is_given(precision):
    assert chosen("device=cpu", f"precision={precision}").dtype == DTYPES[precision]


@pytest.fixture
def two_gpus(monkeypatch) -> list[bool]:
    """Whether each of them multiplies bf16: for a test to set. The first is the current one."""
    hardware, current = [True, True], [0]

    @contextmanager
    def at(where: torch.device):
        before, current[0] = current[0], current[0] if where.index is None else where.index
        yield
        current[0] = before

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "device": at,
        "is_bf16_supported": lambda including_emulation: hardware[current[0]] and not including_emulation,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(device, "_missing_compiler", lambda _: None)
    return hardware


@pytest.mark.parametrize(("hardware", "name"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_bf16_or_else_fp16_compiled_by_peer(hardware, name, two_gpus):
    two_gpus[:] = [hardware, hardware]
    assert chosen() == Setting(torch.device("cuda"), DTYPES[name], "peers", [])
    assert chosen("device=cuda:1", "compile=none").device == torch.device("cuda:1")


@pytest.mark.parametrize(
    ("hardware", "first", "second"), [([True, False], "bf16", "fp16"), ([False, True], "fp16", "bf16")]
)
def test_auto_asks_the_gpu_that_the_run_is_on(hardware, first, second, two_gpus):
    two_gpus[:] = hardware
    assert [chosen(f"device={name}").dtype for name in ("cuda", "cuda:0", "cuda:1")] == [
        DTYPES[first], DTYPES[first], DTYPES[second]
    ]  # fmt: skip


@pytest.mark.gpu
def test_auto_with_a_gpu_is_the_gpu():
    assert chosen().device.type == "cuda"


# What is not there


@pytest.mark.parametrize("name", ["gpu0", "cuda:x", "meta", "mps", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_with_its_key(name):
    with pytest.raises(ConfigError, match=rf"^device: '?{name}'? is "):
        chosen(f"device={name}")


@no_gpu
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match="device: cuda is not here; torch sees 0 CUDA devices"):
        chosen("device=cuda")


@pytest.mark.parametrize("grain", ["peers", "step"])
@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("PATH", "", "clang++" if sys.platform == "darwin" else "g++"),
        ("CXX", "/nowhere/g++ -O2", "/nowhere/g++ -O2"),
        ("CXX", "", ""),
    ],
)
def test_without_a_compiler_the_run_is_eager_after_one_clear_line(grain, variable, value, said, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    setting = chosen("device=cpu", f"compile={grain}")
    assert setting.compile == "none"
    (note,) = setting.notes
    assert note.startswith(f"torch.compile needs a C++ compiler ({said}), which is not here: running eagerly")


def test_without_pythons_headers_the_run_is_eager(tmp_path, monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda command: command)
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    setting = chosen("device=cpu", "compile=peers")
    assert setting.compile == "none" and "Python's headers" in setting.notes[0]


def test_a_compiler_with_options_is_one(monkeypatch):
    monkeypatch.setattr(device.shutil, "which", lambda command: command if command == "ccache" else None)
    monkeypatch.setenv("CXX", "ccache g++")
    assert chosen("device=cpu", "compile=peers").compile == "peers"


@no_gpu
def test_a_gpu_needs_triton():
    assert device._missing_compiler(torch.device("cuda")) == "Triton"


@pytest.mark.parametrize(("found", "lacks"), [("clang", None), ("gcc", None), ("g++", "a C compiler (gcc or clang)")])
def test_triton_needs_a_c_compiler(found, lacks, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(device.shutil, "which", lambda command: command if command == found else None)
    monkeypatch.delenv("CC", raising=False)
    assert device._missing_compiler(torch.device("cuda")) == lacks


def test_the_note_is_shown_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(NETWORKS, "tiny", Tiny)
    monkeypatch.setenv("CXX", "/nowhere/g++")
    keys = [
        "device=cpu",
        "compile=peers",
        "peers.network=tiny",
        "data.images_per_class=4",
        "epochs=1",
        f"runs={tmp_path}",
    ]
    result = run.train(load_config("quickstart", keys))
    assert result["compile"] == "none"
    assert capsys.readouterr().out.count("running eagerly") == 1


# Compiled


class Tiny(nn.Module):
    feature_dim = 4

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 5, stride=4), nn.BatchNorm2d(4), nn.Linear(4, num_classes)

    def forward(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        feature_BD = self.norm(self.conv(image_BCHW)).relu().mean((2, 3))
        return self.head(feature_BD), feature_BD


def test_peers_of_several_architectures_are_all_compiled(monkeypatch):
    """Each in four ways: training and evaluation, a whole batch and the last. Dynamo's own limit is 8."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    nets = [tiny(10, width) for width in (4, 5, 6)]
    device.compile_modules("peers", nn.Identity())
    for net in nets:
        net.compile(backend="eager", dynamic=False)
        for training in (True, False):
            for size in (3, 2):
                with torch.set_grad_enabled(training):
                    net.train(training)(torch.rand(size, 3, 8, 8))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4 * len(nets)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor's and Dynamo's own
@pytest.mark.parametrize("grain", ["peers", "step"])
def test_a_compiled_step_is_the_eager_one(grain, monkeypatch):
    """With Inductor and the compiler of this machine, and build's own wiring."""
    monkeypatch.setitem(NETWORKS, "tiny", Tiny)
    keys = ["device=cpu", "precision=fp32", "peers.network=tiny", "data.images_per_class=3", "batch_size=15"]
    trained = {}
    for compile in ("none", grain):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        parts = build(load_config("quickstart", [*keys, "loader=resident", f"compile={compile}"]))
        if compile == grain and parts.setting.notes:
            pytest.skip(parts.setting.notes[0])
        assert parts.setting.compile == compile
        plan, tally = parts.plan(0), Tally([])
        for s, views in enumerate(parts.loader.epoch(plan)):
            parts.step.train(parts.learner, views, plan.step(s), tally, lr=0.05, share=1.0, update=True)
        trained[compile] = tally.read(), parts.learner.peers.state_dict()
    (eager_losses, eager), (losses, compiled) = trained.values()
    assert losses == pytest.approx(eager_losses, rel=1e-5)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
