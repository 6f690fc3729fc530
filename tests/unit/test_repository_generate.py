"""What `make generate` writes and `make verify` compares."""

import sys
from pathlib import Path

import click
import pytest

SCRIPTS = str(Path(__file__).parents[2] / "scripts")


@pytest.fixture
def generate(monkeypatch, tmp_path):
    """The generator, at work on an empty tree."""
    monkeypatch.syspath_prepend(SCRIPTS)
    import generate

    monkeypatch.setattr(generate, "ROOT", tmp_path)
    monkeypatch.setattr(generate, "generated", lambda: {"docs/reference/a.md": "a\n", "b.txt": "b\n"})
    return generate


def run(generate, monkeypatch, mode):
    monkeypatch.setattr(sys, "argv", ["generate.py", mode])
    return generate.main()


def test_what_was_written_is_up_to_date(generate, monkeypatch, capsys):
    assert run(generate, monkeypatch, "check") == 1
    assert run(generate, monkeypatch, "write") == 0
    capsys.readouterr()
    assert run(generate, monkeypatch, "check") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("b.txt", lambda path: path.write_text("edited by hand\n")),
        ("docs/reference/a.md", lambda path: path.unlink()),
        ("docs/reference/no-longer-made.md", lambda path: path.write_text("old\n")),
    ],
)
def test_a_file_that_was_edited_removed_or_left_over_is_named_and_mended(
    generate, monkeypatch, capsys, name, change
):
    run(generate, monkeypatch, "write")
    change(generate.ROOT / name)
    assert run(generate, monkeypatch, "check") == 1
    assert f"verify: {name} is not what `make generate` writes" in capsys.readouterr().err
    assert run(generate, monkeypatch, "write") == 0
    assert run(generate, monkeypatch, "check") == 0


def test_the_command_line_page_has_every_command_with_its_options(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import cli_reference

    @click.group()
    def top():
        """The whole."""

    @top.command()
    @click.argument("folder")
    @click.option("--rows", default=8, show_default=True, help="How many | at once.")
    def serve(folder, rows):
        """Serve FOLDER."""

    @top.command(hidden=True)
    def secret():
        """Not told of."""

    page = cli_reference.markdown(top, "unmask")
    assert "## unmask serve\n\n```text\nunmask serve [OPTIONS] FOLDER\n```\n\nServe FOLDER.\n" in page
    assert "| `--rows INTEGER` | How many \\| at once. [default: 8] |" in page
    assert "secret" not in page
