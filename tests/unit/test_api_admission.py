"""Local admission accepts good manifests with their defaults, and refuses bad ones in one helpful line."""

import json
from pathlib import Path

import pytest

from support.manifests import REFUSED, Refused, changed, train_job
from unmask_operator.launch.admission import AdmissionError, admit, read_manifest

HEAD = "apiVersion: unmask.dev/v1alpha1\nkind: DiffusionTrainJob\n"


def refusal_of(text: str) -> AdmissionError:
    with pytest.raises(AdmissionError) as caught:
        admit(text, source="job.yaml")
    return caught.value


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.why.replace(" ", "-"))
def test_a_bad_manifest_is_refused_in_one_line_naming_field_and_remedy(case: Refused) -> None:
    refusal = refusal_of(json.dumps(case.manifest))
    assert refusal.path == case.field
    assert case.says in str(refusal)
    assert "\n" not in str(refusal)
    assert str(refusal).startswith("job.yaml:1: " + case.field)


def test_left_out_fields_take_their_defaults_and_those_of_their_objective() -> None:
    spec = admit(json.dumps(train_job())).spec
    pretrain, blocks, full, answers = spec.stages
    assert pretrain.noise is None
    assert blocks.noise == full.noise
    assert blocks.noise is not None and (blocks.noise.low, blocks.noise.weight) == ("0.0", "Elbo")
    assert answers.noise is not None and (answers.noise.high, answers.noise.weight) == ("0.8", "Flat")
    assert [stage.supervise for stage in spec.stages] == ["All", "All", "All", "Response"]
    assert spec.optimizer.betas == ("0.9", "0.95")
    assert spec.total_steps == 32
    assert spec.data_of(blocks) is spec.data


def test_a_null_counts_as_left_out() -> None:
    nulls = {"spec.optimizer": None, "spec.evaluation": None, "spec.stages[3].supervise": None}
    spec = admit(json.dumps(changed(train_job(), nulls))).spec
    assert (spec.optimizer.epsilon, spec.evaluation, spec.stages[3].supervise) == ("1e-8", None, "Response")


def test_only_the_first_of_several_errors_is_told_and_the_others_are_counted() -> None:
    manifest = changed(train_job(), {"spec.stages[0].steps": 0, "spec.stages[2].length": 1})
    assert str(refusal_of(json.dumps(manifest))).endswith(
        "got 0; allowed: integer, 1 to 10000000 (and 1 more)"
    )


def test_a_refusal_names_the_line_of_the_field() -> None:
    text = HEAD + "metadata:\n  name: x\n  colour: red\nspec: {}\n"
    assert str(refusal_of(text)).startswith("job.yaml:5: metadata.colour is not a field")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kind: [", "not valid YAML"),
        ("kind: A\nkind: B\n", "line 2: the key kind occurs twice"),
        ("kind: A\n---\nkind: B\n", "another document"),
        ("- 1", "a manifest is a mapping"),
        ("", "got nothing"),
        (HEAD + "spec: {a: .inf}", "finite"),
    ],
)
def test_text_that_is_no_manifest_is_refused(text: str, says: str) -> None:
    assert says in str(refusal_of(text))


def test_an_unreadable_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match="none.yaml: cannot be read"):
        read_manifest(tmp_path / "none.yaml")


def test_the_inline_config_passes_through_unchanged() -> None:
    config = {"a": None, "rms_norm_eps": 1e-6, "rope": {"type": None}}
    job = admit(json.dumps(changed(train_job(), {"spec.model.init.config": config})))
    assert job.to_json_dict()["spec"]["model"]["init"]["config"] == config
