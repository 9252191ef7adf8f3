"""What is exported is the network of the run, wherever it is loaded."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from cutnmix.models import NETWORKS, build_network
from cutnmix.models.network import Branch, Network
from cutnmix.models.peers import Outputs, Peers
from cutnmix.pipeline.dataset import DataError
from cutnmix.pipeline.datasets import load_splits
from cutnmix.trainer import checkpoint, cli, figures, picture, run
from cutnmix.trainer import export as exporter
from cutnmix.trainer.build import build
from cutnmix.trainer.config import load_config
from cutnmix.trainer.export import Ensemble, export
from cutnmix.trainer.folder import RunError, RunFolder

SIZE = ["data.classes=4", "data.images_per_class=12", "batch_size=8", "epochs=2", "device=cpu", "loader=resident"]
RUNS = {
    "nets": ["peers.network=[tiny,wide]", "method=dml", "precision=fp32"],
    "branches": ["peers.network=tiny", "peers.count=2", "peers.form=branches", "precision=fp32"],
    "bf16": ["peers.network=tiny", "peers.count=2", "precision=bf16", "channels_last=true"],
    "mine": ["peers.network=resnet20", "data.classes=10", "data.images_per_class=4", "epochs=1"],
}

# The README's own lines, run in a folder that holds runs/mine.
FROM_PYTHON = """\
from pathlib import Path
from cutnmix.trainer.export import export

export(Path("runs/mine"), "torch_export", "0")  # as cutnmix export runs/mine --format torch_export --peer 0
export(Path("runs/mine"), "onnx", "mean")
"""
PLAIN_TORCH = """\
import torch
program = torch.export.load("runs/mine/export/peer0.pt2").module()
logits = program(torch.rand(5, 3, 16, 16))
"""
CLASSES = """\
import json
files = {"classes": ""}
torch.export.load("runs/mine/export/peer0.pt2", extra_files=files)
classes = json.loads(files["classes"])
"""
PLAIN_ONNX = """\
from onnxruntime import InferenceSession
session = InferenceSession("runs/mine/export/mean.onnx")
(logits,) = session.run(["logits"], {"image": torch.rand(5, 3, 16, 16).numpy()})
"""


def tiny(num_classes: int, width: int = 6) -> Network:
    """With norms, so that a network in training mode gives other logits."""
    trunk = nn.Sequential(nn.Conv2d(3, 5, 5, stride=4), nn.BatchNorm2d(5), nn.ReLU())
    stage = nn.Sequential(nn.Conv2d(5, width, 3), nn.BatchNorm2d(width), nn.ReLU())
    return Network(trunk, Branch(stage, nn.Linear(width, num_classes), width), 5)


@pytest.fixture(autouse=True, scope="module")
def tiny_networks():
    with patch.dict(NETWORKS, {"tiny": tiny, "wide": lambda num_classes: tiny(num_classes, 9)}):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], RunFolder]:
    """The runs of RUNS by name, each trained once."""
    runs = tmp_path_factory.mktemp("home") / "runs"

    def folder(name: str) -> RunFolder:
        if not (runs / name).exists():
            with patch.object(picture, "draw_batch", lambda *_, **__: None), patch.object(figures, "draw_curves"):
                run.train(load_config("quickstart", [*SIZE, *RUNS[name], f"runs={runs}", f"name={name}"]))
        return RunFolder(runs / name)

    return folder


@pytest.fixture
def copy(trained, tmp_path) -> RunFolder:
    """A run to be damaged."""
    source = trained("nets").path
    return RunFolder(shutil.copytree(source, tmp_path / "copy", ignore=shutil.ignore_patterns("export")))


@torch.no_grad()
def evaluated(folder: RunFolder, path: Path, precision: str | None = None) -> tuple[Tensor, Tensor]:
    """The first five test images in [0, 1], and the logits_JBK that an evaluation of this checkpoint sees."""
    config = folder.read_config()
    parts = build(config.model_copy(update={"precision": precision or config.precision}))
    checkpoint.restore(checkpoint.load(path, parts.setting.device), parts.learner)
    plan = parts.test_plan()
    views = next(iter(parts.test_loader.epoch(plan)))
    parts.learner.peers.eval()
    _, outputs = parts.test_step.predict(parts.learner, views, plan.step(0))
    parts.close()
    return views.image_VBCHW[0, :5].float() / 255, outputs.logits_JBK[:, :5].float()


def expected(logits_JBK: Tensor, peer: str) -> Tensor:
    return logits_JBK.softmax(-1).mean(0).log() if peer == "mean" else logits_JBK[int(peer)]


def from_torch(path: Path, image_BCHW: Tensor) -> Tensor:
    return torch.export.load(path).module()(image_BCHW)


def from_onnx(path: Path, image_BCHW: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"image": image_BCHW.numpy()})[0])


LOAD = {"torch_export": from_torch, "onnx": from_onnx}


# Equal to the run


@pytest.mark.parametrize(
    ("name", "peer", "format"),
    [(*keys, "torch_export") for keys in product(["nets", "branches", "bf16"], ["0", "1", "mean"])]
    + [("nets", "mean", "onnx"), ("branches", "1", "onnx"), ("bf16", "0", "onnx")],
)
def test_a_program_gives_the_logits_of_the_evaluation(name, peer, format, trained, tmp_path):
    folder = trained(name)
    path, _ = export(folder.path, format, peer, out=tmp_path / f"x{exporter.FORMATS[format][0]}")
    image_BCHW, logits_JBK = evaluated(folder, folder.last, "fp32")
    for size in (5, 1):
        logits_BK = LOAD[format](path, image_BCHW[:size].contiguous())
        assert logits_BK.dtype == torch.float32 and not logits_BK.requires_grad
        torch.testing.assert_close(logits_BK, expected(logits_JBK, peer)[:size], rtol=1e-4, atol=1e-5)
    _, rounded_JBK = evaluated(folder, folder.last)  # autocast's rounding is all that may part them
    torch.testing.assert_close(logits_JBK, rounded_JBK, rtol=0.05, atol=0.05)


def test_a_program_carries_its_names(trained, tmp_path):
    folder, files = trained("branches"), {"classes": "", "network": ""}
    torch.export.load(export(folder.path, "torch_export", "1", tmp_path / "x.pt2")[0], extra_files=files)
    path, what = export(folder.path, "onnx", "1", tmp_path / "x.onnx")
    assert what == "peer 1 (tiny) of last.pt: image (B, 3, 16, 16) in [0, 1] -> logits (B, 4)"
    session = onnxruntime.InferenceSession(path)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(files["classes"]) == json.loads(metadata["classes"]) == [*"0123"]
    assert files["network"] == metadata["network"] == "tiny"
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, given.type) == ("image", ["batch", 3, 16, 16], "tensor(float)")
    assert (made.name, made.shape, made.type) == ("logits", ["batch", 4], "tensor(float)")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


@pytest.mark.parametrize("name", ["nets", "branches", "bf16"])
def test_weights_are_the_peers_to_the_last_bit_and_load_without_the_run(name, trained):
    folder = trained(name)
    config = folder.read_config()
    peers = Peers(config.peers.networks, num_classes=4, seed=0, form=config.peers.form)
    peers.load_state_dict(torch.load(folder.last, weights_only=True)["learner"]["peers"])
    image_BCHW, nets = torch.randn(2, 3, 16, 16), peers.eval()
    train = load_splits("digits16", classes=4, images_per_class=12).train
    for j in range(2):
        weights, metadata = read(export(folder.path, "safetensors", str(j))[0])
        at_the_end, same = read(folder.peers / f"peer{j}.safetensors")
        assert metadata == same and all(torch.equal(weights[key], at_the_end[key]) for key in weights | at_the_end)
        network = build_network(metadata["network"], int(metadata["num_classes"])).eval()
        network.load_state_dict(weights)
        assert torch.equal(network(image_BCHW)[0], nets.network(j)(image_BCHW)[0])
        told = {key: json.loads(metadata[key]) for key in ("classes", "mean", "std", "image_size")}
        assert told == {"classes": [*"0123"], "mean": [*train.mean], "std": [*train.std], "image_size": [16, 16]}
        assert (metadata["peer"], metadata["cutnmix"]) == (str(j), "0.1.0")

    weights, metadata = read(export(folder.path, "safetensors", "mean")[0])
    networks = json.loads(metadata["network"])
    ensemble = Ensemble(Peers(networks, num_classes=int(metadata["num_classes"]), seed=1, form=metadata["form"]))
    ensemble.load_state_dict(weights)
    logits_BK, feature_BD = ensemble.eval()(image_BCHW)
    outputs = [nets.network(j)(image_BCHW) for j in range(2)]
    torch.testing.assert_close(logits_BK.softmax(-1), sum(o[0].softmax(-1) for o in outputs) / 2)
    assert torch.equal(feature_BD, torch.cat([o[1] for o in outputs], -1))


def test_the_mean_of_probabilities_that_underflow_is_finite():
    class Sure(nn.Module):
        def forward(self, image_VBCHW: Tensor) -> Outputs:
            return Outputs(torch.tensor([[[0.0, 500.0]], [[0.0, 300.0]]]), (torch.zeros(1, 1),) * 2)

    logits_BK, _ = Ensemble(Sure())(torch.zeros(1, 3, 2, 2))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(logits_BK, torch.tensor([[-300.0 - math.log(2), 0.0]]))


# Which peer, which checkpoint


def test_best_is_the_peer_that_leads_in_the_checkpoints_own_evaluation(copy):
    tops = [(60, 10), (20, 30), (25, 15)]  # of peer 0 and peer 1; the best mean is epoch 1's
    tests = [
        {"peer0": {"top1": a}, "peer1": {"top1": b}, "mean": {"top1": (a + b) / 2}, "ensemble": {"top1": 99}}
        for a, b in tops
    ]
    for count, last in ((2, "peer1"), (3, "peer0")):
        copy.metrics.write_text("")
        for epoch, scores in enumerate(tests[:count], 1):
            copy.append({"kind": "test", "epoch": epoch, "step": epoch, "scores": scores})
            copy.append({"kind": "train", "epoch": epoch, "step": epoch})
        path, what = export(copy.path, "safetensors", "best")
        assert path == copy.path / "export" / f"{last}.safetensors"
        assert f"{last[:4]} {last[4]} (" in what and "the best on the test images, of last.pt: weights" in what
        for done, leader in ((1, "peer0"), (2, "peer1")):  # the latter: not the best on record
            torch.save(torch.load(copy.best, weights_only=True) | {"position": (done - 1, 6)}, copy.best)
            path, what = export(copy.path, "safetensors", "best", checkpoint="best")
            assert path == copy.path / "export" / f"{leader}-best-epoch.safetensors" and "of best.pt" in what


def test_the_checkpoint_that_is_named_is_the_one_that_is_exported(copy):
    state = torch.load(copy.last, weights_only=True)
    state["learner"]["peers"]["nets.1.branch.head.bias"][1:] += 7
    torch.save(state, copy.best)
    for name, path in (("last", copy.last), ("best", copy.best)):
        out, _ = export(copy.path, "torch_export", "1", checkpoint=name)
        image_BCHW, logits_JBK = evaluated(copy, path)
        torch.testing.assert_close(from_torch(out, image_BCHW), logits_JBK[1], rtol=1e-4, atol=1e-5)
    assert {path.name for path in out.parent.iterdir()} == {"peer1.pt2", "peer1-best-epoch.pt2"}


# Without cutnmix, without the data


def test_the_readmes_lines_need_nothing_but_torch_and_onnxruntime(trained, monkeypatch, tmp_path):
    folder = trained("mine")
    monkeypatch.chdir(folder.path.parents[1])
    exec(FROM_PYTHON, {})
    torch.save(image_BCHW := torch.rand(5, 3, 16, 16), tmp_path / "image.pt")
    plain = "\n".join([
        "import sys",
        "sys.modules['cutnmix'] = None  # importing it fails from here on",
        PLAIN_TORCH, CLASSES, PLAIN_ONNX,
        "assert logits.shape == (5, 10) and classes == [*'0123456789']",
        f"image = torch.load({str(tmp_path / 'image.pt')!r})",
        "made = [program(image), torch.from_numpy(session.run(None, {'image': image.numpy()})[0])]",
        f"torch.save(made, {str(tmp_path / 'made.pt')!r})",
    ])  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", plain], capture_output=True, text=True, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    peers = Peers(["resnet20"] * 2, num_classes=10, seed=0).eval()
    peers.load_state_dict(torch.load(folder.last, weights_only=True)["learner"]["peers"])
    train = load_splits("digits16", images_per_class=4).train
    mean_C11, std_C11 = (torch.tensor(value)[:, None, None] for value in (train.mean, train.std))
    with torch.no_grad():
        logits_JBK = peers(((image_BCHW - mean_C11) / std_C11)[None]).logits_JBK
    for made_BK, peer in zip(torch.load(tmp_path / "made.pt"), ["0", "mean"], strict=True):
        torch.testing.assert_close(made_BK, expected(logits_JBK, peer), rtol=1e-4, atol=1e-5)


def test_a_finished_run_of_files_is_exported_without_them(tmp_path):
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (data / place).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(data / place / f"{i}.png")
    keys = ["data=folder", f"data.root={data}", "distort.image_size=36", "peers.network=tiny", "epochs=1"]
    keys += ["batch_size=4", "device=cpu", "precision=fp32", f"runs={tmp_path}", "name=run"]
    folder = RunFolder(tmp_path / "run")
    with patch.object(picture, "draw_batch", lambda *_, **__: None), patch.object(figures, "draw_curves"):
        run.train(load_config("paper", keys))
    at_the_end = read(folder.peers / "peer0.safetensors")[1]
    shutil.rmtree(data)

    path, _ = export(folder.path, "torch_export", "0")
    peers = Peers(["tiny"] * 2, num_classes=2, seed=0).eval()
    peers.load_state_dict(torch.load(folder.last, weights_only=True)["learner"]["peers"])
    image_BCHW = torch.rand(2, 3, 36, 36)
    mean_C11, std_C11 = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    logits_BK, _ = peers.network(0)((image_BCHW - mean_C11) / std_C11)
    torch.testing.assert_close(from_torch(path, image_BCHW), logits_BK.detach(), rtol=1e-4, atol=1e-5)
    assert json.loads(at_the_end["classes"]) == ["a", "b"] and json.loads(at_the_end["image_size"]) == [36, 36]

    shutil.rmtree(folder.peers)
    with pytest.raises(DataError, match=r"data\.root"):
        export(folder.path, "torch_export", "0")


def test_a_run_that_still_trains_asks_its_data_set(copy):
    finished, unfinished = export(copy.path, "safetensors", "0")[0].read_bytes(), copy.peers / "peer0.safetensors"
    metadata = read(unfinished)[1]
    unfinished.unlink()
    path, _ = export(copy.path, "safetensors", "0")
    assert read(path)[1] == metadata and len(path.read_bytes()) == len(finished)


# Mistakes


@pytest.fixture
def command(monkeypatch, capsys):
    """The command in this process: (exit code, standard output, standard error)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cutnmix", "export", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), *capsys.readouterr()

    return call


def test_the_command_says_one_line_and_the_exporters_none(trained, command, tmp_path):
    out = tmp_path / "new" / "x.onnx"
    code, printed, error = command(trained("nets").path, "--format", "onnx", "--peer", "mean", "--out", out)
    said = "the mean of 2 peers (tiny, wide) of last.pt: image (B, 3, 16, 16) in [0, 1] -> logits (B, 4)"
    assert (code, printed, error) == (0, f"{out}: {said}\n", "")
    assert [path.name for path in out.parent.iterdir()] == ["x.onnx"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--format onx --peer 0", "--format: 'onx' is none of safetensors, torch_export, onnx"),
        ("--format onnx --peer 2", "--peer: '2' is none of best, mean, 0, 1"),
        ("--format onnx --peer=-1", "--peer: '-1' is none of best, mean, 0, 1"),
        ("--format onnx --peer worst", "--peer: 'worst' is none of best, mean, 0, 1"),
        ("--format onnx --peer 0 --checkpoint first", "--checkpoint: 'first' is neither last nor best"),
        ("--format onnx --peer 0 --out x.pt2", "--out: x.pt2 must end in .onnx, as files of the format onnx do"),
    ],
)
def test_what_has_no_meaning_is_refused_with_what_is_allowed(options, said, trained, command):
    assert command(trained("nets").path, *options.split()) == (2, "", f"error: {said}\n")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_onnx_the_extra_is_named(missing, trained, command, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    folder = trained("nets")
    code, _, error = command(folder.path, "--format", "onnx", "--peer", "0")
    assert (code, error) == (2, 'error: --format: onnx needs two packages more: pip install "cutnmix[onnx]"\n')


def test_a_run_that_lacks_what_is_asked_of_it_says_so(tmp_path, copy, command):
    options = ["--format", "safetensors", "--peer", "best"]
    assert command(tmp_path, *options) == (2, "", f"error: {tmp_path} is not a run: it has no config.yaml\n")
    with patch.dict(NETWORKS):
        del NETWORKS["wide"]
        code, _, error = command(copy.path, *options)
    assert code == 2 and error.startswith("error: peers.network: no 'wide'") and error.count("\n") == 1
    copy.metrics.write_text("")
    code, _, error = command(copy.path, *options)
    assert code == 2 and error.startswith("error: --peer: best is not known, for") and error.count("\n") == 1
    for name, path in (("last", copy.last), ("best", copy.best)):
        path.unlink()
        said = f"error: {path} is not there: the run has not saved that checkpoint\n"
        assert command(copy.path, *options, "--checkpoint", name) == (2, "", said)


def test_a_file_is_whole_or_as_it_was(copy, command, monkeypatch, tmp_path):
    def killed(descriptor: int) -> None:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        raise KeyboardInterrupt

    out = tmp_path / "x.safetensors"
    out.write_text("before")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", killed)
        export(copy.path, "safetensors", "0", out)
    assert out.read_text() == "before"

    with monkeypatch.context() as patched, pytest.raises(RunError, match=r"^/proc/none cannot be written: No such"):
        patched.setattr(exporter, "load_peers", lambda *_: pytest.fail("loaded"))
        export(copy.path, "safetensors", "0", Path("/proc/none/x.safetensors"))

    out.unlink()
    out.mkdir()
    options = ["--format", "safetensors", "--peer", "0", "--out", out]
    assert command(copy.path, *options) == (2, "", f"error: {out} cannot be written: Is a directory\n")
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "x.safetensors"}
