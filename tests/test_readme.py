"""What README shows runs."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_snippets_run():
    names: dict = {}
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 2
    shapes = []
    for block in blocks:
        exec(block, names)
        shapes.append(names["found"].tokens.shape)
    assert [shape[0] for shape in shapes] == [8, 8]
    assert names["logits"].shape == (8, 15, 1000)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_the_links_lead_somewhere(link):
    assert (Path(__file__).parent.parent / link).exists()
