"""Records, plots and the README's tables made of them: a figure looks the same wherever it stands, and none is lost."""

from pathlib import Path

import pytest

from cutnmix.benchmarks import __main__ as commands
from cutnmix.benchmarks import plots, records, tables
from cutnmix.benchmarks.measure import Spread
from cutnmix.benchmarks.records import Sheet, make_record, number, read_records, sheets_of, text
from cutnmix.trainer.compare import Compared, Comparison, write_csv

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


def test_tables_round_trip(tmp_path):
    record = make_record("sample", [SHEET], {"rounds": 5}, ["a note"])
    records.write_json(tmp_path / "sample.json", record)
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- bench:sample -->\nstale\n<!-- /bench -->\n\nThe end | of it.\n")
    options = ["tables", f"--readme={readme}", f"--out={tmp_path}"]

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
    assert tables.fill(made, tmp_path) == made
    readme.write_text(made.replace("100 (93..110)", "90 (93..110)"))
    assert exit_code("--check") == 1
    readme.write_text(made.replace("bench:sample", "bench:other"))
    assert exit_code() == 2


def test_the_readme_is_as_the_records_have_it():
    readme = (ROOT / "README.md").read_text()
    assert tables.fill(readme, ROOT / "benchmarks" / "results") == readme


def test_accuracies_are_means_over_the_finished_runs_of_each_method(tmp_path):
    reading = "last_epoch_{}_top1".format
    heads = ["grid", "stamp", "method", "state", reading("mean"), reading("ensemble"), reading("teacher")]
    runs = [
        ["s1", "SCALE 1: short", "baseline", "done", 77.5, 77.5, ""],
        ["s1", "SCALE 1: short", "cutnmix", "done", 78, 80, 81],
        ["s1", "SCALE 1: short", "cutmix", "begun", "", "", ""],
        ["s1", "SCALE 1: short", "cutnmix", "done", 80, 81, 81],
        ["s1", "SCALE 1: short", "cutnmix", "to do", "", "", ""],
    ]
    (tmp_path / "short").mkdir()
    lines = [",".join(map(str, line)) for line in [heads, *[[f'"{cell}"' for cell in run] for run in runs]]]
    (tmp_path / "short" / "runs.csv").write_text("\n".join(lines) + "\n")
    readme = tables.fill("<!-- runs:short -->\nold\n<!-- /runs -->\n", tmp_path)
    assert readme.splitlines()[1:-1] == [
        "| SCALE 1: short | n | mean of the peers | their ensemble | peer teacher |",
        "| --- | --- | --- | --- | --- |",
        "| Baseline | 1 | 77.50 | | |",
        "| CutnMix + MMD + PT | 2 | 79.00 \u00b1 1.41 | 80.50 \u00b1 0.71 | 81.00 \u00b1 0.00 |",
    ]
    with pytest.raises(ValueError, match="no record of runs:long"):
        tables.fill("<!-- runs:long -->\n<!-- /runs -->\n", tmp_path)


def test_a_comparison_is_a_line_a_run(tmp_path):
    rows = [
        Compared("dml", "mean", 77.14, 0.54, None, None, None),
        Compared("dml", "ensemble", 78.46, 0.58, None, None, None),
        Compared("cutnmix", "mean", 78.371, 0.54, 1.231, 0.47, 0.009),
        Compared("cutnmix", "ensemble", 78, 0.57, -0.46, 0.5, 0.3),
        Compared("cutnmix", "teacher", 79.58, 0.57, None, None, None),
    ]
    write_csv(tmp_path / "short" / "compared.csv", Comparison(5000, rows), "unused")
    made = tables.fill("<!-- compared:short -->\n<!-- /compared -->\n", tmp_path).splitlines()
    assert made[1].startswith("| 5,000 training images that no run has used | mean of the peers | less `dml` |")
    assert made[3:5] == [
        "| `dml` | 77.14 \u00b1 0.54 | | 78.46 \u00b1 0.58 | |",
        "| `cutnmix` | 78.37 \u00b1 0.54 | +1.23 \u00b1 0.47 | 78.00 \u00b1 0.57 | -0.46 \u00b1 0.50 |",
    ]
