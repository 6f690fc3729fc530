"""``unmask check`` on the recorded vectors, and on vectors that were tampered with."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from unmask.cli.main import main

GOLDEN = Path(__file__).parent.parent / "golden"


def check(folder, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check", str(folder)])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


@pytest.mark.parametrize(("name", "checks"), [("llada2_a", 24), ("llada2_b", 24), ("lladamoe_a", 2)])
def test_recorded_vectors_are_reproduced(name, checks, capsys):
    code, out, _ = check(GOLDEN / name, capsys)
    assert code == 0
    assert f"{checks} of {checks} agree with the reference" in out


def tampered(tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "llada2_b", folder)
    vectors = load_file(folder / "golden.safetensors")
    change(vectors)
    save_file(vectors, folder / "golden.safetensors")
    return folder


def add_to(name, amount):
    return lambda vectors: vectors[name].add_(amount)


@pytest.mark.parametrize(
    "name",
    [
        "forward.logits",
        "causal.logits",
        "bdlm.logits",
        "bdlm.token_nll",
        "bdlm.mean_masked_nll",
        "bdlm_ragged.logits",
    ],
)
def test_a_difference_is_a_miss(name, tmp_path, capsys):
    code, out, _ = check(tampered(tmp_path, add_to(name, 1e-2)), capsys)
    assert code == 1
    assert f"MISS  {name}: largest difference 1.0e-02" in out
    assert "23 of 24 agree" in out


@pytest.mark.parametrize("name", ["output", "forwards"])
def test_other_tokens_or_forwards_are_a_miss(name, tmp_path, capsys):
    code, out, _ = check(tampered(tmp_path, add_to(f"generate.0.{name}", 1)), capsys)
    assert code == 1
    assert all(f"MISS  generate.0 {way}" in out for way in ("uncached", "cached", "served"))


def test_what_cannot_be_checked_is_said_in_one_line(tmp_path, capsys):
    code, _, err = check(tmp_path / "nowhere", capsys)
    assert code == 66
    assert err.count("\n") == 1 and "nowhere: no such folder" in err
    folder = tampered(tmp_path, lambda vectors: vectors.update({"odd.thing": vectors["bdlm.mask"].clone()}))
    code, _, err = check(folder, capsys)
    assert code == 66
    assert err.count("\n") == 1 and "vectors 'odd' are of no kind that can be checked" in err
    (folder / "golden.safetensors").unlink()
    code, _, err = check(folder, capsys)
    assert code == 66
    assert "a check needs recorded vectors beside the model" in err
