"""The README's Python runs as printed, top to bottom; what README and RESULTS.md link to is there."""

import re
from pathlib import Path

import pytest

from cutnmix.benchmarks.tables import DOCUMENTS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.slow
def test_every_python_block_runs(tmp_path, monkeypatch):
    from cutnmix.trainer.methods import METHODS

    monkeypatch.chdir(tmp_path)
    known = set(METHODS)
    names: dict = {}
    try:
        for block in BLOCKS:
            exec(block, names)
    finally:
        for name in set(METHODS) - known:
            del METHODS[name]
    assert names["image"].shape == (2, 64, 3, 32, 32)
    assert names["target"].shape == (64, 10)
    assert len(names["batch"].image_VBCHW) == 2
    assert 0 < names["result"]["headline"]["top1"] <= 100


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_and_heading_it_names_exists(name):
    document = ROOT / name
    targets = re.findall(r"\]\(([^):]+)\)", document.read_text())
    assert targets
    for target in targets:
        path, _, heading = target.partition("#")
        named = document.parent / path if path else document
        assert named.exists(), target
        assert not heading or heading in headings(named.read_text()), target


def headings(text: str) -> set[str]:
    """As GitHub names them in links."""
    lines = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_the_custom_method_is_about_twenty_lines():
    (block,) = [block for block in BLOCKS if "METHODS[" in block]
    body = block[block.index("class ") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
