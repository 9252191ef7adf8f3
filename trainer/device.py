"""`auto` keys resolved: on a CPU by what was measured (benchmarks/LOG.md), on a GPU without one to measure on."""

import os
import platform
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from cutnmix.trainer.keys import Config, ConfigError


class Setting(NamedTuple):
    """The resolved device keys of a run."""

    device: torch.device
    dtype: torch.dtype  # of autocast; float32 means none
    compile: str  # none, peers, step or graph
    notes: list[str]  # lines for the user about what could not be had


def choose(config: Config) -> Setting:
    """Resolve device, precision and compile.

    Precision: bf16 where the hardware multiplies it, else fp16 on a GPU and fp32 on a CPU. Compile: one graph a peer on
    a GPU (compile time does not grow with J; chosen without a GPU to measure on); nothing on a CPU, where compiling
    takes most of a minute and gains little. `graph` is `peers`, captured (see graph.py): not measured yet, so not auto.

    Raises:
        ConfigError: for a device that is not there, or a CUDA graph on another one than CUDA.
    """
    device = find_device(config.device)
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = dtypes.get(config.precision) or _fast_dtype(device)
    grain, notes = config.compile, []
    if grain == "auto":
        grain = "peers" if device.type == "cuda" else "none"
    if grain == "graph" and device.type != "cuda":
        raise ConfigError(
            f"compile: graph needs a CUDA device, and this run is on {device}; write auto, none, peers or step"
        )
    if grain != "none" and (missing := _missing_compiler(device)):
        notes.append(f"torch.compile needs {missing}, which is not here: running eagerly, with the same results")
        grain = "none"
    return Setting(device, dtype, grain, notes)


def compile_modules(grain: str, *modules: nn.Module) -> None:
    """Compile each module in place where the grain is `peers` or `graph`; state dict keys stay as they are."""
    if grain == "none":
        return
    # Dynamo compiles one function 8 times, then runs it eagerly. All networks share theirs, and each architecture needs
    # four: training and evaluation, whole batches and the last.
    torch._dynamo.config.recompile_limit = 64
    if grain in ("peers", "graph"):
        for module in modules:
            module.compile(dynamic=False)


def find_device(name: str) -> torch.device:
    """The device of this process: of the processes that torchrun starts on a machine, each takes a GPU of its own.

    Raises:
        ConfigError: for a device that is not there.
    """
    started = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and started > 1:
        if started > (found := torch.cuda.device_count()):
            raise ConfigError(f"device: {started} processes need a GPU each; torch sees {found} CUDA devices here")
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is no device; write auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: {name!r} is not supported; write auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and started > 1:
        raise ConfigError(f"device: {name} is one GPU for {started} processes; write auto or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: {name} is not here; torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        with torch.cuda.device(device):  # of a machine's GPUs only one may be able to, and torch asks the current one
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def _missing_compiler(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, or None.

    Inductor builds its CPU kernels in C++, Triton its launchers in C, both against Python's headers. Looked for where
    the two look.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "Triton"
        language, names = "C", [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    else:
        default = {"Windows": "cl", "Darwin": "clang++"}.get(platform.system(), "g++")
        language, names = "C++", [os.environ.get("CXX", default)]
    # A name may carry options ("ccache g++"); on Windows it is a path with backslashes and spaces.
    commands = names if platform.system() == "Windows" else [(shlex.split(name) or [""])[0] for name in names]
    if not any(shutil.which(command) for command in commands):
        return f"a {language} compiler ({' or '.join(names)})"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    return None if headers.exists() else f"Python's headers ({headers})"
