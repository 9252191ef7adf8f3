"""Lower functions of fake CUDA tensors to Triton and compile every kernel to cubin, with no GPU and no driver.

`lowered` takes a forward function; `joint_graph` and `lower_joint` one whose scalars are to be trained, through Dynamo,
AOTAutograd, Inductor's partitioner and Inductor, as torch.compile takes it. Patches internals of torch 2.14, and says
where it pretends:

- The autograd engine cannot run on fake CUDA tensors, so the joint graph is traced on the CPU, undecomposed, and all
  that comes after (decompositions, partition, lowering) works on its copy on fake CUDA tensors. That the CPU's autocast
  makes the forward that CUDA's makes, op for op and dtype for dtype, is held by a test in test_cuda_step.py.
- What Inductor runs or times on the GPU itself is left out: patterns of attention, which nobody uses here, the padding
  of matrices (the head's, of K columns) and the folding of constants. The real thing has no more kernels for it. The
  patterns are left out by never registering them, but a CPU compilation earlier in the process has done so: padding is
  turned off besides.
- Without a driver torch believes that there is no cuDNN, and so no convolution in channels_last: `pretended` answers by
  cuDNN's rule (channels_last if the input or the weight is).
"""

import contextlib
import copy
import importlib.util
import math
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

lowers = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="with a GPU the real thing is tested, and without Triton there is none",
)

_COMMON = dict(
    total_memory=80 << 30, warp_size=32, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
    max_threads_per_block=1024, shared_memory_per_block=49152, gcnArchName="", memory_bus_width=5120, is_integrated=0,
)  # fmt: skip
GPUS = {
    80: types.SimpleNamespace(
        name="NVIDIA A100", major=8, minor=0, multi_processor_count=108, shared_memory_per_block_optin=166912,
        shared_memory_per_multiprocessor=167936, L2_cache_size=40 << 20, clock_rate=1410000, memory_clock_rate=1215000,
        **_COMMON,
    ),
    90: types.SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, L2_cache_size=50 << 20, clock_rate=1980000, memory_clock_rate=2619000,
        **_COMMON,
    ),
}  # fmt: skip
ARCHS = pytest.mark.parametrize("arch", GPUS)


def _cudnn_format(input_: Tensor, weight: Tensor, _backend: Any) -> torch.memory_format:
    """cudnn_conv_suggest_memory_format of ATen/native/ConvUtils.h."""
    from torch._prims_common import suggest_memory_format

    formats = (suggest_memory_format(input_), suggest_memory_format(weight))
    return torch.channels_last if torch.channels_last in formats else torch.contiguous_format


@contextlib.contextmanager
def pretended(arch: int = 90) -> Iterator[None]:
    """torch and Triton believe that device 0 is a GPU of this architecture, with cuDNN."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.fx_passes import joint_graph as joint_graph_passes
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.utils import get_gpu_type
    from torch.utils._triton import has_triton, triton_backend
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    gpu = GPUS[arch]
    triton_driver = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=0: 0,
        get_active_torch_device=lambda: torch.device("cuda", 0),
        get_device_interface=lambda: torch.cuda,
    )
    answers = dict(
        is_available=lambda: True, device_count=lambda: 1, current_device=lambda: 0, _lazy_init=lambda: None,
        get_device_properties=lambda device=None: gpu, get_device_capability=lambda device=None: (gpu.major, gpu.minor),
        _get_device_properties=lambda device: gpu, get_device_name=lambda device=None: gpu.name,
        set_device=lambda device: None, synchronize=lambda device=None: None, is_bf16_supported=lambda *_, **__: True,
        _exchange_device=lambda device: 0, _maybe_exchange_device=lambda device: 0,
        get_rng_state=lambda device=None: torch.zeros(16, dtype=torch.uint8), set_rng_state=lambda *_: None,
    )  # fmt: skip
    with contextlib.ExitStack() as patches:
        for name, answer in answers.items():
            patches.enter_context(mock.patch.object(torch.cuda, name, answer, create=True))
        for target, name, answer in (
            (CudaInterface, "is_available", staticmethod(lambda: True)),
            (CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: gpu)),
            (CudaInterface.Worker, "current_device", staticmethod(lambda: 0)),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            (driver, "_active", triton_driver),
            (torch._C, "_conv_determine_backend_memory_format", _cudnn_format),
            (joint_graph_passes, "lazy_init", lambda device: None),
        ):
            patches.enter_context(mock.patch.object(target, name, answer))
        # Remembered across the tests of a process.
        for remembers in (has_triton, triton_backend, get_gpu_type, DeviceProperties.create):
            patches.callback(remembers.cache_clear)
            remembers.cache_clear()
        patches.callback(FakeTensorMode.cache_clear)  # the strides of convolutions
        FakeTensorMode.cache_clear()
        yield


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """torch.autocast("cuda") works without a driver, where it turns itself off without a word."""
    with (
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
    ):
        yield


# Graphs


def lowered(function: Callable[..., Any], arguments: tuple, fake: FakeTensorMode, arch: int = 90, **config: Any) -> str:
    """The wrapper code that Inductor writes for a function of (nested tuples of) fake CUDA tensors."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    leaves, spec = pytree.tree_flatten(arguments)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def flat(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        called = pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        return [leaf for leaf in pytree.tree_leaves(function(*called)) if isinstance(leaf, Tensor)]

    with pretended(arch), torch._guards.tracing(torch._guards.TracingContext(fake)):
        graph = make_fx(flat, decomposition_table=select_decomp_table(), tracing_mode="real")(*tensors)
        return _written(graph, tensors, config)


class Training(NamedTuple):
    """Inductor's code of the two graphs of a training function."""

    forward: str
    backward: str


class Joint(NamedTuple):
    """Forward and backward in one graph of undecomposed aten calls on the CPU, and how it is to be cut in two."""

    graph: torch.fx.GraphModule
    inputs: tuple[list, list]  # primals, tangents
    cut: dict[str, Any]


def joint_graph(function: Callable[..., Any], arguments: tuple) -> Joint:
    """What AOTAutograd traces of a function of CPU tensors under Dynamo, in one graph or not at all."""
    from torch._dynamo.backends.common import aot_autograd

    found: list[Joint] = []

    class Found(BaseException):
        """No ordinary error, which Dynamo would wrap."""

    def take(graph: torch.fx.GraphModule, inputs: tuple[list, list], **cut: Any) -> Any:
        found.append(Joint(copy.deepcopy(graph), inputs, cut))
        raise Found

    def never(graph: torch.fx.GraphModule, _: Any) -> Any:
        raise AssertionError("nothing asks for gradients")

    backend = aot_autograd(fw_compiler=never, bw_compiler=never, partition_fn=take, decompositions={})
    torch._dynamo.reset()
    with contextlib.suppress(Found):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    torch._dynamo.reset()
    return found[0]


def lower_joint(joint: Joint, arch: int = 90, **config: Any) -> Training:
    """Decompose, cut in two and lower a joint graph, all on fake CUDA tensors."""
    from torch._inductor import config as settings
    from torch._inductor.compile_fx import partition_fn
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = copy.deepcopy(joint.graph)
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    fake = FakeTensorMode()

    def on_cuda(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")

    def both(primals: list, tangents: list) -> Any:
        return graph(primals, tangents)

    with pretended(arch), torch._guards.tracing(torch._guards.TracingContext(fake)):
        with fake:
            inputs = pytree.tree_map(on_cuda, joint.inputs)
            whole = make_fx(both, decomposition_table=select_decomp_table(), tracing_mode="real")(*inputs)
        with settings.patch(joint_graph_constant_folding=False, shape_padding=False):
            parts = partition_fn(whole, inputs, **joint.cut)
        sources = []
        for part, is_backward in zip(parts, (False, True), strict=True):
            given = [node.meta["val"] for node in part.graph.nodes if node.op == "placeholder"]
            sources.append(_written(part, given, config, is_backward=is_backward))
    return Training(*sources)


def _written(graph: torch.fx.GraphModule, inputs: list, settings: dict[str, Any], is_backward: bool = False) -> str:
    """Inductor's code for a graph, up to where it would be loaded."""
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import InductorError
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []

    def write(graph: GraphLowering) -> None:
        sources.append(graph.codegen()[0].value)
        raise RuntimeError("Written: without a GPU it cannot be loaded")

    with (
        mock.patch.object(GraphLowering, "_compile_to_module", write),
        config.patch(fx_graph_cache=False, compile_threads=1, **settings),
        pytest.raises(InductorError, match="Written"),
    ):
        compile_fx_inner(graph, inputs, is_backward=is_backward)
    return sources[0]


# Code


_KERNEL = r"async_compile\.triton\('(\w+)', '''(.*?)'''"


def kernels(source: str, folder: Path, arch: int = 90) -> list[dict[str, Any]]:
    """What Triton's compiler makes of every kernel in Inductor's code."""
    import triton
    from torch._inductor.runtime import triton_heuristics
    from triton.backends.compiler import GPUTarget

    compiled = []
    for name, body in re.findall(_KERNEL, source, re.S):
        found: dict[str, Any] = {}

        def heuristic(*_: Any, found: dict[str, Any] = found, **arguments: Any):
            return lambda function: found.update(arguments, function=function)

        path = folder / f"{name}.py"
        path.write_text(body)
        with pretended(arch), contextlib.ExitStack() as patches:
            for kind in ("pointwise", "reduction", "persistent_reduction", "foreach"):
                patches.enter_context(mock.patch.object(triton_heuristics, kind, heuristic))
            spec = importlib.util.spec_from_file_location(name, path)
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
            signature = dict(found["triton_meta"]["signature"])
            block = {"XBLOCK": 32 if len(found["size_hints"]) > 1 else 256, "YBLOCK": 32, "R0_BLOCK": 256}
            constants = {key: block.get(key, 1) for key, kind in signature.items() if kind == "constexpr"}
            constants |= found["triton_meta"].get("constants", {})
            (attributes,) = found["triton_meta"]["configs"]
            tree = triton.compiler.ASTSource(found["function"], signature, constants, attributes)
            compiled.append(triton.compile(tree, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4}).asm)
    return compiled


def launches(source: str) -> int:
    """How often a run of Inductor's code launches a Triton kernel."""
    return len(re.findall(r"\.run\(", _call(source)))


def library_calls(source: str) -> list[str]:
    """The calls that a run of Inductor's code makes to cuDNN, cuBLAS and the rest of ATen, in order."""
    found = re.findall(r"extern_kernels\.(\w+)\(|torch\.ops\.aten\.(\w+)\.\w+\(", _call(source))
    return [ours or theirs for ours, theirs in found]


def transposes(source: str) -> int:
    """How often a run launches a kernel that reads images in one layout and writes them in another.

    Inductor tiles a pointwise kernel in two dimensions only where its loads and stores run along different axes.
    """
    tiled = re.findall(r"def (triton_poi_\w+)\([^)]*ynumel", source)
    return sum(len(re.findall(rf"\b{name}\.run\(", _call(source))) for name in tiled)


def maps(source: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape and strides of every feature map (B, C, H, W with C and H W above 1) that a run allocates."""
    found = re.findall(r"empty_strided_cuda\(\((\d+), (\d+), (\d+), (\d+)\), \(([\d, ]+)\)", _call(source))
    made = [(tuple(map(int, sizes)), tuple(map(int, strides.split(",")))) for *sizes, strides in found]
    return [(shape, strides) for shape, strides in made if shape[1] > 1 and shape[2] * shape[3] > 1]


_BYTES = {"u8": 1, "i8": 1, "i1": 1, "bf16": 2, "fp16": 2, "fp32": 4, "i32": 4, "i64": 8, "fp64": 8}


def bytes_moved(source: str) -> int:
    """What a run's kernels read and write, by their signatures: every buffer that a kernel is given, whole and once."""
    call = _call(source)  # and after it, what it is tried with: inputs and constants with their shapes
    sized = re.findall(r"(\w+) = (?:rand_strided|empty_strided_cuda)\(\(([\d, ]*)\)", call)
    elements = {name: math.prod(int(n) for n in shape.split(",") if n.strip()) for name, shape in sized}
    for name, old in re.findall(r"(\w+) = (\w+); del \w+  # reuse", call):
        elements[name] = elements[old]
    total = 0
    for name, body in re.findall(_KERNEL, source, re.S):
        (signature,) = re.findall(r"'signature': {([^}]*)}", body)
        kinds = re.findall(r": '(\*?)(\w+)'", signature)
        for given in re.findall(rf"\b{name}\.run\(([^)]*)\)", call):
            for (pointer, kind), argument in zip(kinds, given.split(","), strict=False):
                total += elements[argument.strip()] * _BYTES[kind] if pointer else 0
    return total


def _call(source: str) -> str:
    """The part of Inductor's code that runs every time."""
    return source[source.index("def call(") :]
