"""Records, plots and the tables made of them: a figure looks the same wherever it stands, and none is lost."""

import csv
import re
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cutnmix.benchmarks import __main__ as commands
from cutnmix.benchmarks import plots, records, tables
from cutnmix.benchmarks.measure import Spread
from cutnmix.benchmarks.records import Sheet, make_record, number, read_records, sheets_of, text
from cutnmix.benchmarks.reproduce.grid import load_grid
from cutnmix.trainer.compare import Compared, Comparison, write_csv
from cutnmix.trainer.folder import csv_text

ROOT = Path(__file__).parent.parent

SHEET = Sheet(
    "Steps",
    "ms",
    "J",
    {"cutnmix": {"1": Spread(100.4, 93.0, 110.0, 5), "2": 7}, "plain way": {"1": None, "2": 0.0123456}},
)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0123456, "0.0123"),
        (0.957, "0.957"),
        (1.0189, "1.019"),
        (12.34, "12.3"),
        (4042.7, "4,043"),
        (7, "7"),
        (1234, "1,234"),
    ],
)
def test_numbers(value, said):
    assert number(value) == said


def test_a_cell_has_the_decimals_of_its_median():
    assert text(Spread(12.34, 9.876, 101.2, 5)) == "12.3 (9.9..101.2)"
    assert text(Spread(12.34, 12.34, 12.34, 1)) == "12.3"
    assert text(None) == "not installed"


def test_a_record_survives_its_file(tmp_path):
    record = make_record("sample", [SHEET], {"rounds": 5}, ["a note"])
    assert sheets_of(record)[0].rows["plain way"]["2"] == 0.0123456
    records.write_json(tmp_path / "sample.json", record)
    (tmp_path / "old.json").write_text('{"benchmark": "sample", "rates": {}}')
    assert read_records(tmp_path) == {"sample": record}
    assert sheets_of(record) == [SHEET]
    assert '"1": [100.4, 93.0, 110.0, 5]' in (tmp_path / "sample.json").read_text()


def test_a_plot_of_what_may_be_missing(tmp_path):
    nothing = Sheet("None", "ms", "J", {"timm": {"1": None, "2": None}})
    one = Sheet("One", "ms", "J", {"timm": {"1": None}, "cutnmix": {"1": 0.0}})
    plots.draw_record(make_record("sample", [SHEET, nothing, one], {}), tmp_path / "sample.png")
    assert [path.name for path in tmp_path.iterdir()] == ["sample.png"]


def test_millions_leave_room_for_their_unit(monkeypatch, tmp_path):
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, _: drawn.append(figure))
    rows = {"2 x 1": {"1": 1_092_496, "8": 8_741_740}, "1 x 2": {"1": 3_208, "8": 3_208}}
    plots.draw_record(make_record("sample", [Sheet("What it takes", "bytes", "J", rows)], {}), tmp_path / "sample.png")
    FigureCanvasAgg(drawn[0]).draw()
    (axes,) = drawn[0].axes
    ticks = [label for label in axes.get_yticklabels() if label.get_text()]
    assert {"10k", "100k", "1M", "10M"} <= {label.get_text() for label in ticks}
    assert all(label.get_window_extent().x0 >= 0 for label in [axes.yaxis.label, *ticks])


def test_tables_round_trip(tmp_path):
    record = make_record("sample", [SHEET], {"rounds": 5}, ["a note"])
    records.write_json(tmp_path / "sample.json", record)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- bench:sample -->\nstale\n<!-- /bench -->\n\nThe end | of it.\n")
    options = ["tables", f"--document={readme}", f"--out={tmp_path}"]

    def exit_code(*more: str) -> int:
        with pytest.raises(SystemExit) as left:
            commands.app([*options, *more])
        return left.value.code or 0

    assert exit_code("--check") == 1
    assert "stale" in readme.read_text()
    assert exit_code() == 0 == exit_code("--check")
    made = readme.read_text()
    assert made.startswith("# Title\n\n<!-- bench:sample -->\n![")
    assert made.endswith(f"commit {record['commit']}, {record['date']}.\n<!-- /bench -->\n\nThe end | of it.\n")
    assert "| | J = 1 | J = 2 |\n| --- | --- | --- |\n| **cutnmix** | 100 (93..110) | 7 |\n" in made
    assert "| not installed | 0.0123 |" in made
    assert tables.fill(readme, tmp_path) == made
    readme.write_text(made.replace("100 (93..110)", "90 (93..110)"))
    assert exit_code("--check") == 1
    readme.write_text(made.replace("bench:sample", "bench:other"))
    assert exit_code() == 2
    readme.unlink()
    assert exit_code() == 2


def test_both_documents_are_made_or_checked(tmp_path, monkeypatch):
    """Plots are found from where a document lies."""
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    records.write_json(results / "sample.json", make_record("sample", [SHEET], {}))
    monkeypatch.setattr(commands, "checkout", lambda: tmp_path)
    for name in tables.DOCUMENTS:
        (tmp_path / name).write_text("<!-- bench:sample -->\n<!-- /bench -->\n")
    for options, code in ((["--check"], 1), ([], 0), (["--check"], 0)):
        with pytest.raises(SystemExit) as left:
            commands.app(["tables", *options])
        assert (left.value.code or 0) == code
    plots = [re.findall(r"\]\((.+)\)", (tmp_path / name).read_text()) for name in tables.DOCUMENTS]
    assert plots == [["benchmarks/results/sample.png"], ["results/sample.png"]]


@pytest.mark.parametrize("name", tables.DOCUMENTS)
def test_the_documents_are_as_the_records_have_them(name):
    assert tables.fill(ROOT / name, ROOT / "benchmarks" / "results") == (ROOT / name).read_text()


def filled(folder: Path, markers: str) -> list[str]:
    """The lines of a document of two markers."""
    (folder / "README.md").write_text(f"<!-- {markers} -->\nold\n<!-- /{markers.partition(':')[0]} -->\n")
    return tables.fill(folder / "README.md", folder).splitlines()


def test_grids_that_share_a_run_have_the_same_record_of_it():
    """A run of one record whose method is a row of another's grid stands there too, figure by figure."""
    paths = sorted((ROOT / "benchmarks" / "results").glob("*/runs.csv"))
    read = [list(csv.DictReader(path.read_text().splitlines())) for path in paths]
    names = ("data", "network", "method", "seed", "epochs")
    records = {runs[0]["grid"]: {tuple(run[name] for name in names): run for run in runs} for runs in read}
    shared = 0
    for one, other in permutations(records, 2):
        rows = {row.name for row in load_grid(other).rows}
        for key, run in records[one].items():
            if run["method"] in rows:
                assert key in records[other], f"{other} lacks {run['method']} with seed {run['seed']}, which {one} has"
                theirs = records[other][key]
                of_both = run.keys() & theirs.keys() - {"grid", "stamp"}
                assert {name: run[name] for name in of_both} == {name: theirs[name] for name in of_both}, (one, other)
                shared += 1
    assert shared >= 18


def runs_of(*runs: tuple) -> list[dict]:
    """Lines of report.csv: method, seed, state, and top-1 of the mean, the ensemble and the teacher."""
    heads = ["method", "seed", "state", *map("last_epoch_{}_top1".format, ["mean", "ensemble", "teacher"])]
    same = {"grid": "s1", "stamp": "SCALE 1: short", "data": "cifar100", "network": "resnet20"}
    return [same | dict(zip(heads, run, strict=True)) for run in runs]


def write_runs(folder: Path, runs: list[dict]) -> None:
    (folder / "short").mkdir()
    (folder / "short" / "runs.csv").write_text(csv_text(runs))


def test_accuracies_are_means_over_the_finished_runs_of_each_method(tmp_path):
    runs = runs_of(
        ("baseline", 95, "done", 77.5, 77.5, ""),
        ("cutnmix", 95, "done", 78, 80, 81),
        ("cutmix", 95, "begun", "", "", ""),
        ("cutnmix", 96, "done", 80, 81, 81),
        ("cutnmix", 97, "to do", "", "", ""),
    )
    write_runs(tmp_path, runs)
    assert filled(tmp_path, "runs:short")[1:-1] == [
        "| SCALE 1: short | n | mean of the peers | their ensemble | peer teacher |",
        "| --- | --- | --- | --- | --- |",
        "| Baseline | 1 | 77.50 | | |",
        "| CutnMix + MMD + PT | 2 | 79.00 \u00b1 1.41 | 80.50 \u00b1 0.71 | 81.00 \u00b1 0.00 |",
    ]
    with pytest.raises(ValueError, match="no record of runs:long"):
        filled(tmp_path, "runs:long")


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"data": "cifar10"}, "more than one data: cifar100, cifar10"),
        ({"network": "resnet110"}, "more than one network: resnet20, resnet110"),
        ({"stamp": "SCALE 0.02: 5 epochs"}, "more than one stamp: SCALE 1: short, SCALE 0.02: 5 epochs"),
        ({"grid": "ablation/views"}, "more than one grid: s1, ablation/views"),
        ({"seed": 95}, "more than one run of cutnmix with seed 95"),
    ],
)
def test_accuracies_are_not_averaged_over_what_is_not_alike(other, said, tmp_path):
    one, two = runs_of(("cutnmix", 95, "done", 78, 80, 81), ("cutnmix", 96, "done", 80, 81, 81))
    write_runs(tmp_path, [one, two | other])
    with pytest.raises(ValueError, match=f"short/runs.csv: .*{said}"):
        filled(tmp_path, "runs:short")


def lines_of(*runs: tuple[str, float, str, float | None]) -> list[dict]:
    """Lines of compare --csv: run, top-1, what it is less, and the difference."""
    rows = [
        Compared(f"cifar100-resnet20-{run}", "mean", top1, 0.54, less and f"cifar100-resnet20-{less}", *rest, 1, None)
        for run, top1, less, difference in runs
        for rest in [(difference, less and 0.33, less and 0.04)]
    ]
    return [{"on": "unused", "images": 5000, **row._asdict()} for row in rows]


def write_lines(folder: Path, lines: list[dict]) -> None:
    (folder / "short").mkdir(exist_ok=True)
    (folder / "short" / "compared.csv").write_text(csv_text(lines))


def test_comparisons_are_a_line_a_method_and_a_column_a_seed(tmp_path):
    lines = lines_of(
        ("dml_cutmix-seed95", 79.12, "", None),
        ("dml_cutnmix-seed95", 77.74, "dml_cutmix-seed95", -1.38),
        ("cutnmix_t1-seed95", 77, "dml_cutmix-seed95", -2.12),  # a row of another grid
        ("dml-seed95", 77.14, "", None),
        ("dml_cutmix-seed95", 79.12, "dml-seed95", 1.98),  # side by side, the other way round
        ("baseline-seed95", 74.96, "dml-seed95", -2.18),
        ("dml_cutmix-seed97", 80, "", None),
        ("baseline-seed97", 75, "", None),  # on another machine
        ("baseline-seed96", 76, "", None),  # whose seed the first method lacks
    )
    write_lines(tmp_path, lines)
    assert filled(tmp_path, "compared:short")[1:-1] == [
        "| 5,000 training images that no run has used | seed 95 | seed 96 | seed 97 |",
        "| --- | --- | --- | --- |",
        "| DML + CutMix | 79.12 | | 80.00 |",
        "| Baseline | 74.96 (-4.16) | 76.00 | 75.00 (-5.00) |",
        "| DML | 77.14 (-1.98 \u00b1 0.33) | | |",
        "| DML + CutnMix, a view and a box each | 77.74 (-1.38 \u00b1 0.33) | | |",
        "| `cutnmix_t1` | 77.00 (-2.12 \u00b1 0.33) | | |",
    ]


def test_comparisons_are_drawn_as_differences(tmp_path, monkeypatch):
    """Points and errors as the table has them; none for the first method, and for what has no pair."""
    lines = lines_of(
        ("dml_cutmix-seed95", 79, "", None),
        ("dml_cutmix-seed96", 80, "", None),
        ("baseline-seed95", 75, "dml_cutmix-seed95", -4),
        ("baseline-seed96", 80, "", None),
        ("dml-seed97", 77, "", None),
        ("dml-seed96", 77.5, "dml_cutmix-seed96", -2.5),
    )
    write_lines(tmp_path, lines)
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append((figure, path)))
    plots.draw_compared(tables.read_compared(tmp_path / "short" / "compared.csv"), tmp_path / "made.png")
    ((figure, path),) = figures
    (axes,) = figure.axes
    assert path == tmp_path / "made.png"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Baseline", "DML"]
    points = {line.get_label(): np.asarray(line.get_xydata()).round(2).tolist() for line in axes.lines}
    found = {seed: points[f"seed {seed}"] for seed in (95, 96, 97)}
    assert found == {95: [[-4, -0.25]], 96: [[0, 0], [-2.5, 1]], 97: []}
    errors = np.concatenate([drawn.get_segments() for drawn in axes.collections])
    assert np.round(errors, 2).tolist() == [[[-4.33, -0.25], [-3.67, -0.25]], [[-2.83, 1], [-2.17, 1]]]
    assert "DML + CutMix with the same seed" in figure.texts[0].get_text()


def test_a_picture_is_drawn_beside_what_a_document_has_compared(tmp_path):
    write_lines(tmp_path, lines_of(("dml-seed95", 77, "", None), ("baseline-seed95", 75, "dml-seed95", -2)))
    document, picture = tmp_path / "README.md", tmp_path / "short" / "compared.png"
    document.write_text("<!-- compared:short -->\n<!-- /compared -->\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "compared.csv").write_text("no document has it\n")

    def made(*options: str) -> tuple[int, bool]:
        with pytest.raises(SystemExit) as left:
            commands.app(["tables", "--document", str(document), "--out", str(tmp_path), *options])
        return int(left.value.code or 0), picture.exists()

    assert [made("--check"), made(), made("--check")] == [(1, False), (0, True), (0, True)]
    picture.unlink()
    write_lines(tmp_path, lines_of(("dml-seed95", 77, "", None)))
    assert made() == (0, False)  # nothing to put beside it


def test_a_table_is_made_of_what_compare_writes(tmp_path):
    rows = [
        Compared("cifar10-vgg16-dml-seed1", "mean", 77.14, 0.54, None, None, None, None, 1, None),
        Compared("cifar10-vgg16-dml-seed1", "ensemble", 78.46, 0.58, None, None, None, None, 1, None),
        Compared(
            "cifar10-vgg16-dml_per_peer-seed1", "mean", 78.371, 0.54, "cifar10-vgg16-dml-seed1", 1.2, 0.5, 0.0, 1, None
        ),
    ]
    write_csv(tmp_path / "short" / "compared.csv", Comparison(5000, rows, []), "test")
    made = filled(tmp_path, "compared:short")
    assert made[1] == "| 5,000 test images | seed 1 |"
    assert made[3:5] == ["| DML | 77.14 |", "| DML, a view each | 78.37 (+1.20 \u00b1 0.50) |"]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"top1": 70.0}, "dml-seed95 has two values of top1: 77.14 and 70.0"),
        ({"images": 4999}, "its lines are of other images"),
        ({"run": "cifar10-resnet20-dml-seed95"}, "or of another data set or network"),
        ({"run": "mine"}, "'mine' is not of the form DATA-NETWORK-ROW-seedN"),
    ],
)
def test_lines_that_do_not_belong_together_are_refused(other, said, tmp_path):
    one, two = lines_of(("dml-seed95", 77.14, "", None), ("dml-seed95", 77.14, "", None))
    write_lines(tmp_path, [one, two | other])
    with pytest.raises(ValueError, match=f"short/compared.csv: .*{said}"):
        filled(tmp_path, "compared:short")
