"""`pip install .` and `pip install -e .` give the same package, usable from any other folder."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
import cutnmix.benchmarks, cutnmix.models, cutnmix.pipeline, cutnmix.trainer.methods
from cutnmix.configs import shipped
print(cutnmix.pipeline.__file__, sorted(shipped()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["regular", "editable"])
def test_installed_and_used_from_another_folder(mode, tmp_path):
    tree = tmp_path / "tree"
    ignore = shutil.ignore_patterns(".*", "build", "runs", "data", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, tree, ignore=ignore)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # The dependencies of the running tests serve here too; as a plain path, so its editable cutnmix is not seen.
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, *(["--editable"] if mode == "editable" else []), tree], check=True)

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    probe = subprocess.run([python, "-c", PROBE], cwd=elsewhere, check=True, capture_output=True, text=True)
    home = tree if mode == "editable" else Path(site) / "cutnmix"
    assert probe.stdout.split()[0] == str(home / "pipeline" / "__init__.py")
    assert "paper" in probe.stdout
    assert "quickstart" in probe.stdout
    command = tmp_path / "venv" / "bin" / "cutnmix"
    wrong = subprocess.run([command, "train", "quickstart", "epohcs=1"], cwd=elsewhere, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "did you mean epochs?" in wrong.stderr
