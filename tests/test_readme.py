"""The README's Python runs as printed, top to bottom."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
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


def test_every_path_it_names_exists():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target


def test_the_custom_method_is_about_twenty_lines():
    (block,) = [block for block in BLOCKS if "METHODS[" in block]
    body = block[block.index("class ") :]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
