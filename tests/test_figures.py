"""The two pictures: written whole, of the right size, of whatever a run may hold; and pyplot is never touched."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cutnmix.pipeline.batch import Batch, Views
from cutnmix.pipeline.draw import make_plan
from cutnmix.pipeline.laws import Distort, Mix
from cutnmix.pipeline.mix import MixBatch
from cutnmix.pipeline.plan import Draws
from cutnmix.trainer import figures
from cutnmix.trainer.figures import draw_curves
from cutnmix.trainer.folder import RunError
from cutnmix.trainer.picture import draw_batch

CLASSES = ("owl", "$cat_{dog", "a class whose name is far too long for its column", "\u732b")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)


def run_records(num_peers: int = 2, epochs: int = 3, per_epoch: int = 4, teacher: bool = True) -> list[dict]:
    records = []
    for step in range(1, epochs * per_epoch + 1):
        loss = {name: weight / step for name, weight in (("ce", 2.0), ("dml", 0.1), ("mmd", 1e-3), ("total", 2.101))}
        epoch = step / per_epoch
        records.append({"kind": "train", "epoch": epoch, "step": step, "lr": 0.1, "loss": loss, "top1": None})
        if step % per_epoch == 0:
            names = [f"peer{j}" for j in range(num_peers)] + ["mean", "best_peer", "ensemble"] + ["teacher"] * teacher
            scores = {name: {"top1": 50.0 + step + i, "nll": 2.0 - i / 10} for i, name in enumerate(names)}
            records.append({"kind": "test", "epoch": step // per_epoch, "step": step, "scores": scores})
    return records


def curves(tmp_path: Path, records: list[dict], title: str = "runs/$x_1") -> np.ndarray:
    draw_curves(records, tmp_path / "curves.png", title)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    picture = Image.open(tmp_path / "curves.png")
    assert picture.format == "PNG" and picture.width == 1500
    return np.asarray(picture.convert("RGB"))


def shows(picture: np.ndarray, color: str) -> bool:
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((picture == rgb).all(-1).any())


@pytest.mark.parametrize("num_peers, teacher", [(1, False), (1, True), (2, True), (4, False), (5, True), (16, True)])
def test_curves_of_any_number_of_peers(tmp_path, num_peers, teacher):
    picture = curves(tmp_path, run_records(num_peers, teacher=teacher))
    assert shows(picture, figures.GREEN) == teacher
    assert shows(picture, figures.SKY) == shows(picture, figures.VERMILLION) == (num_peers > 1)


@pytest.mark.parametrize("num_records", [0, 1, 4, 5, 15])
def test_curves_of_a_run_that_has_just_begun(tmp_path, num_records):
    curves(tmp_path, run_records()[:num_records])


def test_curves_of_a_test_before_any_training(tmp_path):
    curves(tmp_path, [run_records()[4] | {"epoch": 0, "step": 0}])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1e-6, -3.0, 1e-30, 3e38, None])
def test_curves_of_odd_values(tmp_path, value):
    records = run_records()
    for i, record in enumerate(records):
        if record["kind"] == "train":
            record["loss"] |= {"ce": value} | ({"total": value} if i > 9 else {})
        else:
            record["scores"]["peer1"] = {"top1": value}
            record["scores"]["mean"] |= {"nll": value} if i > 9 else {}
    curves(tmp_path, records)


def test_a_value_that_is_not_finite_shows(tmp_path):
    records = [record for record in run_records() if record["kind"] == "train"]
    for record in records:
        record["loss"] = {"ce": 1.0, "dml": 1.0}
    before = curves(tmp_path, records)
    records[4]["loss"]["dml"] = math.nan
    assert shows(curves(tmp_path, records)[60:110], figures.ORANGE) and not shows(before[60:110], figures.ORANGE)


def test_curves_of_many_noisy_points_and_of_every_schedule(tmp_path):
    for rate in (lambda s: 0.1 / 10 ** (s // 200), lambda s: 0.1 * math.cos(s / 400), lambda s: 0.0):
        records = run_records(2, 3, 200)
        for record in (record for record in records if record["kind"] == "train"):
            record["lr"] = rate(record["step"])
        curves(tmp_path, records)


def test_curves_of_terms_that_come_and_go_or_that_nobody_foresaw(tmp_path):
    records = run_records()
    records[2]["loss"] = {"another": 1.0, "and_another": 2.0, "and_a_third": 0.5, "and_a_fourth": 0.1}
    records[3]["loss"] = {}
    curves(tmp_path, records)


def test_the_last_record_of_a_step_counts(tmp_path):
    records = run_records()
    wrong = [record | {"loss": {"ce": 50.0}} for record in records[:3]]
    assert (curves(tmp_path, wrong + records) == curves(tmp_path, records)).all()


def test_labels_are_kept_apart():
    figure = figures.Figure((5, 4), dpi=100)
    axes = figure.subplots()
    tied = [(f"line {i}", np.array([0.0, 1.0]), np.array([0.0, i / 1e6]), {"color": "k"}) for i in range(12)]
    figures._panel(axes, tied, "", "")
    figure.draw_without_rendering()
    boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
    assert len(boxes) == 12
    assert all(below.y1 <= above.y0 + 1 for below, above in pairwise(boxes))


def example(mix: Mix, num_views: int, num_peers: int, size=(8, 8), dtype=torch.float32, floats=False, holes=False):
    plan = make_plan(
        seed=1, epoch=0, num_images=7, size=size, batch_size=7, distort=Distort(pad=0), mix=mix,
        num_views=num_views, num_peers=num_peers,
    )  # fmt: skip
    draws = plan.step(0)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (num_views, 7, *size, 3), generator=generator, dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    hole = torch.rand(num_views, 7, *size, generator=generator) < 0.3 if holes else None
    views = Views(image.float() * 1.1 - 9 if floats else image, hole, draws.index_B % 4, draws.index_B)
    return views, MixBatch(mean=MEAN, std=STD, size=size, num_classes=4, dtype=dtype)(views, draws), draws


def batch_picture(path: Path, views: Views, batch: Batch, draws: Draws, num_images: int = 6) -> np.ndarray:
    draw_batch(views, batch, draws, classes=CLASSES, mean=MEAN, std=STD, path=path, num_images=num_images)
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("num_views, num_peers", [(1, 1), (2, 2), (1, 3), (6, 6)])
@pytest.mark.parametrize(
    "mix",
    [
        Mix(),
        Mix(name="cutmix"),
        Mix(name="cutnmix"),
        Mix(name="cutnmix", probability=0),
        Mix(name="cutnmix", box_rule="clip_corrected"),
        Mix(name="cutnmix", box_rule="clip_nominal"),
    ],
    ids=lambda mix: f"{mix.name}-{mix.rule}-{mix.probability}",
)
def test_batch_of_any_views_peers_and_mix(tmp_path, mix, num_views, num_peers):
    picture = batch_picture(tmp_path / "batch.png", *example(mix, num_views, num_peers), num_images=2)
    assert [path.name for path in tmp_path.iterdir()] == ["batch.png"]
    assert shows(picture, figures.BLUE) == (mix.name != "none")


@pytest.mark.parametrize("size", [(8, 8), (6, 12), (12, 6)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_batch_of_any_shape_and_dtype(tmp_path, size, dtype):
    parts = example(Mix(name="cutnmix"), 2, 2, size, dtype, floats=True, holes=True)
    picture = batch_picture(tmp_path / "batch.png", *parts)
    assert shows(picture, figures.BLUE) and shows(picture, figures.VERMILLION)


@pytest.mark.parametrize("num_images, width", [(1, 900), (6, 1500), (50, 1694)])
def test_batch_of_any_number_of_images(tmp_path, num_images, width):
    picture = batch_picture(tmp_path / "batch.png", *example(Mix(name="cutnmix"), 2, 2), num_images)
    assert abs(picture.shape[1] - width) <= 1


def test_batch_shows_the_pixels(tmp_path):
    """A red view and a green partner: the mixed image has both, and the label's lines have their colours."""
    views, _, draws = example(Mix(name="cutnmix"), 2, 2)
    red, green = torch.tensor([255.0, 0, 0]), torch.tensor([0, 255.0, 0])
    image = red[:, None, None].expand(2, 7, 3, 8, 8).clone()
    image[:, 1::2] = green[:, None, None]
    views = views._replace(pixels=image)
    assert draws.partner_B is not None
    draws = draws._replace(partner_B=(torch.arange(7) + 1) % 7)
    batch = MixBatch(mean=MEAN, std=STD, size=(8, 8), num_classes=4)(views, draws)
    picture = batch_picture(tmp_path / "batch.png", views, batch, draws)
    for color in ("#ff0000", "#00ff00", figures.BLUE, figures.VERMILLION):
        assert shows(picture, color)


@pytest.mark.gpu
def test_batch_on_a_gpu(tmp_path):
    parts = example(Mix(name="cutnmix"), 2, 2, dtype=torch.bfloat16)
    views, batch, draws = (type(p)(*(t.cuda() if torch.is_tensor(t) else t for t in p)) for p in parts)
    pictures = [batch_picture(tmp_path / "batch.png", *each) for each in ((views, batch, draws), parts)]
    assert np.array_equal(*pictures)


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    draw_curves(run_records(), path, "old")
    old = path.read_bytes()

    def torn(descriptor: int) -> None:
        os.ftruncate(descriptor, 7)
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", torn)
    with pytest.raises(RunError, match=f"{path} cannot be written: no space left"):
        draw_curves(run_records(), path, "new")
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_pyplot_is_never_imported_and_no_backend_is_needed(tmp_path):
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import conftest, test_figures
        from pathlib import Path
        test_figures.draw_curves(test_figures.run_records(), Path("curves.png"), "title")
        test_figures.batch_picture(Path("batch.png"), *test_figures.example(test_figures.Mix(name="cutnmix"), 2, 2))
        assert "matplotlib.pyplot" not in sys.modules
    """
    program = "\n".join(line.strip() for line in code.splitlines())
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, timeout=600)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batch.png", "curves.png"]
