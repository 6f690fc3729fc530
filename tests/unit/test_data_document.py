"""What the page about data shows is so: its manifest is admitted, its formats are those that are read."""

import re
from pathlib import Path
from typing import get_args

from unmask.training.records import Format
from unmask_operator.launch.admission import admit

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "prepare-data.md").read_text(encoding="utf-8")


def test_the_manifest_of_the_page_is_admitted():
    (manifest,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    assert [source.share for source in admit(manifest).spec.data.train] == ["0.7", "0.25", "0.05"]


def test_the_page_tells_of_every_format():
    table = PAGE.partition("| `format` | record |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.M) == list(get_args(Format))
