"""The command line: one line for what a person can mend, exit codes, and what is not imported."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from support.manifests import changed, train_job
from unmask.cli import main as cli_main
from unmask.cli.explain import page
from unmask.errors import DataError, UsageError


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli_main.main(args)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def failing_with(error: BaseException) -> click.Command:
    def fail() -> None:
        raise error

    return click.Command("check", callback=fail)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(train_job()))
    return path


def test_a_valid_manifest_is_summed_up(capsys: pytest.CaptureFixture[str], manifest: Path) -> None:
    assert run(capsys, "validate", str(manifest)) == (
        0,
        f"{manifest}: DiffusionTrainJob tiny is valid: 4 stages, 32 steps\n",
        "",
    )


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("spec.stages[1].blockSizes", [5], "every block size must divide length"),
        ("spec.stages[1].block_sizes", [4], "did you mean blockSizes?"),
        ("spec.model.init.config.hidden_size", "wide", "spec.model.init.config: "),
    ],
)
def test_each_bad_manifest_is_one_line_and_exit_code_64(
    capsys: pytest.CaptureFixture[str], manifest: Path, path: str, value: object, says: str
) -> None:
    bad = manifest.with_name("bad.yaml")
    bad.write_text(json.dumps(changed(train_job(), {path: value})))
    code, out, err = run(capsys, "validate", str(bad), str(manifest))
    assert code == 64
    assert err.startswith(f"error: {bad}:") and says in err and err.count("\n") == 1
    assert out.startswith(f"{manifest}: ")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["validate"], "Missing argument 'FILE...'. (see 'unmask validate --help')"),
        (["vaildate"], "No such command"),
        (["validate", "--colour"], "No such option"),
        (["run", "-f", "none.yaml"], "none.yaml: cannot be read"),
        (["run", "-f", "none.yaml", "--volume", "data"], "write NAME=DIR"),
        (["explain", "dtj.spec.stage"], "dtj.spec has no field stage; did you mean stages?"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_64(
    capsys: pytest.CaptureFixture[str], args: list[str], says: str
) -> None:
    code, _, err = run(capsys, *args)
    assert (code, err.count("\n")) == (64, 1)
    assert err.startswith("error: ") and says in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (DataError("a.jsonl:3: not JSON"), 65, "error: a.jsonl:3: not JSON\n"),
        (UsageError("two\nlines"), 64, "error: two lines\n"),
        (KeyboardInterrupt(), 130, "\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_how_errors_end_the_process(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    line: str,
) -> None:
    monkeypatch.setattr(cli_main.cli, "get_command", lambda *_: failing_with(error))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert run(capsys, "check")[::2] == (code, line)


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_main.cli, "get_command", lambda *_: failing_with(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli_main.main(["check"])


def test_what_needs_no_torch_imports_none(manifest: Path) -> None:
    program = (
        "import sys, unmask.cli.main as m\n"
        "run = ['run', '-f', sys.argv[1], '--dry-run', '--volume', 'data=.', '--volume', 'run=.']\n"
        "for args in (['--help'], ['validate', sys.argv[1]], ['explain'], run):\n"
        "    assert m._exit_code(args) == 0, args\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(manifest)], check=True, stdout=subprocess.DEVNULL)


def test_help_imports_no_command_and_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import sys, unmask.cli.main as m\nassert m._exit_code(['--help']) == 0\n"
        "assert not {'pydantic', 'rich', 'torchx', 'unmask.cli.run'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_every_command_is_a_module_with_a_command_of_its_name() -> None:
    context = click.Context(cli_main.cli)
    for name in cli_main.COMMANDS:
        command = cli_main.cli.get_command(context, name)
        assert command is not None and command.name == name


def test_explain_tells_type_default_rules_and_fields() -> None:
    assert page("dtj.spec.stages[0].blockSizes").startswith("dtj.spec.stages.blockSizes  <list of integer>")
    assert 'default: "1e-8"' in page("spec.optimizer.epsilon")
    noise = page("DiffusionTrainJob.spec.stages.noise")
    assert "low < high" in noise and "  low  <string>  required" in noise


def test_a_dry_run_prints_the_application_and_the_job_file(
    capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path
) -> None:
    code, out, _ = run(
        capsys,
        "run",
        "-f",
        str(manifest),
        "--dry-run",
        "--volume",
        f"data={tmp_path}",
        "--volume",
        f"run={tmp_path}",
    )
    assert code == 0
    assert "--nproc-per-node=1" in out and f"uri: {tmp_path}/train.jsonl" in out
    assert not (tmp_path / "tiny").exists()
