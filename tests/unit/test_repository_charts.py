"""What is made from a chart's ``values.yaml``, and what charts have in common with the rest of the tree."""

from importlib import metadata

import jsonschema
import pytest
import yaml

import charts
from support.charts import CHARTS
from unmask_operator.resources import MANAGER

TEXT = """\
# About the file.

# How many.
# Two lines.
# @schema {minimum: 1}
count: 1
# A section.
section:
  # A word | or two.
  word: a
  # Free.
  # @schema {additionalProperties: {type: string}}
  free: {a: b}
# Nothing, or a number.
# @schema {type: [integer, "null"]}
none: null
"""


def test_values_have_descriptions_types_and_constraints():
    schema = charts.schema(charts.values(TEXT))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["count"] == {
        "type": "integer",
        "description": "How many. Two lines.",
        "default": 1,
        "minimum": 1,
    }
    check = jsonschema.Draft202012Validator(schema).is_valid
    assert check(yaml.safe_load(TEXT)) and check({}) and check({"global": {"a": 1}})
    for wrong in ({"count": 0}, {"count": "1"}, {"other": 1}, {"section": {"other": 1}}, {"none": "a"}):
        assert not check(wrong), wrong
    assert check({"section": {"free": {"c": "d"}}}) and not check({"section": {"free": {"c": 1}}})


def test_the_page_has_a_row_for_each_value():
    chart = {"name": "c", "description": "Does things", "kubeVersion": ">=1.30.0-0"}
    page = charts.markdown(chart, charts.values(TEXT))
    assert page.startswith("# c\n\n") and "Does things. Asks for Kubernetes >=1.30.0.\n" in page
    assert "| `count` | `1` | How many. Two lines. |\n| `section` |  | A section. |\n" in page
    assert '| `section.word` | `"a"` | A word \\| or two. |\n' in page
    assert '| `section.free` | `{"a": "b"}` | Free. |\n' in page and "`section.free.a`" not in page


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "a: has no comment; describe it above"),
        ("# Far away.\n\na: 1\n", "a: has no comment"),
        ("# Section.\na:\n  b: 1\n", "a.b: has no comment"),
        ("# Nothing.\na: null\n", "a: null has no type; add it to @schema"),
        ("# Bad.\n# @schema minimum\na: 1\n", "a: @schema has to be followed by"),
    ],
)
def test_a_value_that_is_not_described_is_an_error(text, message):
    with pytest.raises(ValueError, match=message):
        charts.schema(charts.values(text))


def test_what_looks_like_a_template_stays_text():
    assert charts._escaped("a {{ b }}") == 'a {{ "{{" }} b }}'


def test_charts_have_the_version_of_the_distribution():
    found = sorted(CHARTS.glob("*/Chart.yaml"))
    assert [path.parent.name for path in found] == ["unmask-inference", MANAGER]
    for path in found:
        chart = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert chart["version"] == chart["appVersion"] == metadata.version("unmask")
        assert chart["name"] == path.parent.name
