"""``unmask plan``: what it prints, and what it refuses."""

import json
from pathlib import Path

import pytest

from support.manifests import TINY_CONFIG, changed, train_job
from unmask.cli.main import main
from unmask.models.published import PUBLISHED
from unmask.training.sizing.devices import DEVICES

ROOT = Path(__file__).parents[2]
CONVERT = {"spec.stages[1].convertTo": "LLaDA2MoeModelLM"}
EXAMPLES = sorted(
    path for path in ROOT.glob("examples/**/*.yaml") if "kind: DiffusionTrainJob" in path.read_text("utf-8")
)


def run(capsys, *args):
    with pytest.raises(SystemExit) as end:
        main(["plan", *map(str, args)])
    return end.value.code, *capsys.readouterr()


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(changed(train_job(), CONVERT)))
    return path


def test_a_job_is_summed_up_stage_by_stage(capsys, manifest):
    code, out, err = run(capsys, "-f", manifest)
    assert (code, err) == (0, "")
    labels = [line[:12].strip() for line in out.splitlines()]
    stage = ["stage", "parameters", "tokens", "arithmetic", "memory", "time"]
    assert labels == ["job", *stage * 4, "total", "assumed"]
    assert "35% of 67 TFLOP/s reached; 4 of 79.6 GiB left to others" in out
    assert out.count("while converting") == 1


def test_json_holds_what_is_printed_and_more(capsys, manifest):
    code, out, _ = run(capsys, "-f", manifest, "--json", "--document-tokens", 8, "--prompt-tokens", 3)
    data = json.loads(out)
    assert code == 0 and data["fits"] and data["remedy"] is None and data["gpus"] == 1
    assert data["assumptions"]["documents"] == {"tokens": 8, "prompt": 3}
    assert data["useful_flops"] == sum(stage["useful_flops"] for stage in data["stages"])
    for stage in data["stages"]:
        memory = stage["memory"]
        assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
        assert stage["peak_bytes"] == max(memory["total"], stage["conversion_bytes"])
        assert stage["tokens"] == stage["tokens_per_step"] * stage["steps"]


def test_what_cannot_fit_is_refused_with_what_would_fit(capsys, manifest):
    manifest.write_text(json.dumps(changed(train_job(), CONVERT | {"spec.parallelism.microBatchRows": 4})))
    code, out, err = run(capsys, "-f", manifest, "--memory", 4.0009, "--peak-tflops", 1)
    assert code == 64 and err.count("\n") == 1
    assert err.startswith(f"error: {manifest}: stage ") and "GiB of each GPU (weights 0.0" in err
    assert "but custom has 0.0 GiB to give; parallelism.microBatchRows: " in err
    assert out.startswith("job")
    code, out, err = run(capsys, "-f", manifest, "--memory", 4.0009, "--peak-tflops", 1, "--json")
    assert code == 64 and not json.loads(out)["fits"]
    assert json.loads(out)["remedy"]["microBatchRows"] < 4


def test_what_fits_no_gpu_is_refused_plainly(capsys, manifest):
    code, _, err = run(capsys, "-f", manifest, "--config", "ling-flash")
    assert code == 64
    assert "stage blocks needs 2683.1 GiB of each GPU (2683.1 while it is converted)" in err
    assert "no other parallelism that was tried fits: take GPUs with more memory" in err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--gpu", "tpu"], "--gpu: got 'tpu', known are"),
        (["--config", "gpt"], "--config: got 'gpt'; known are llada2-mini"),
        (["--prompt-tokens", "3"], "give --document-tokens too"),
        (["--document-tokens", "17"], "rows of stage pretrain hold 16"),
        (["--mfu", "0"], "Invalid value for '--mfu'"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_64(capsys, manifest, args, says):
    code, _, err = run(capsys, "-f", manifest, *args)
    assert code == 64 and err.count("\n") == 1 and says in err


def test_a_model_on_a_volume_is_asked_for(capsys, manifest, tmp_path):
    job = changed(train_job(), CONVERT | {"spec.model": {"init": {"uri": "pvc://models/ling"}}})
    manifest.write_text(json.dumps(job))
    code, _, err = run(capsys, "-f", manifest)
    assert code == 64 and "spec.model.init.uri: pvc://models/ling is on a volume; give --config" in err
    (tmp_path / "config.json").write_text(json.dumps(TINY_CONFIG))
    assert run(capsys, "-f", manifest, "--config", tmp_path / "config.json")[0] == 0
    job["spec"]["model"]["init"]["uri"] = str(tmp_path)
    manifest.write_text(json.dumps(job))
    assert run(capsys, "-f", manifest)[0] == 0


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_can_be_planned(capsys, path):
    """From the shape that it holds, or else from one of a published model that it could start from."""
    refusals = []
    for start in [[], *(["--config", model] for model in PUBLISHED)]:
        code, out, err = run(capsys, "-f", path, "--gpu", "h200-141g", *start)
        if code == 0:
            assert out.count("arithmetic") >= 1
            return
        refusals.append(err)
    pytest.fail("\n".join(refusals))


RECIPES = {"llada2-mini": "ling-mini", "llada2-flash": "ling-flash", "llada-moe-7b-a1b": None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_published_models_are_valid_and_fit_from_what_they_start_from(capsys, recipe):
    path = ROOT / "examples" / "recipes" / f"{recipe}.yaml"
    with pytest.raises(SystemExit) as end:
        main(["validate", str(path)])
    assert end.value.code in (0, None)
    start = [] if RECIPES[recipe] is None else ["--config", RECIPES[recipe]]
    code, out, err = run(capsys, "-f", path, "--gpu", "h200-141g", "--json", *start)
    assert (code, err) == (0, "")
    plan = json.loads(out.partition("\n")[2] if not out.startswith("{") else out)
    assert plan["fits"] and plan["useful_flops"] > 1e20


@pytest.mark.parametrize(("page", "recipe"), [("learn-preferences", "dpo"), ("train-adapters", "dpo-lora")])
def test_the_memory_that_pages_tell_is_what_is_planned(capsys, page, recipe):
    path = ROOT / "examples" / "recipes" / f"{recipe}.yaml"
    _, out, _ = run(capsys, "-f", path, "--config", "llada2-mini", "--gpu", "h200-141g", "--json")
    told = (ROOT / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8")
    for stage in json.loads(out)["stages"]:
        assert f"{stage['peak_bytes'] / 2**30:.1f} GiB" in " ".join(told.split())


def test_help_names_every_published_model_and_every_gpu(capsys):
    _, out, _ = run(capsys, "--help")
    words = " ".join(out.split())
    assert all(name in words for name in [*PUBLISHED, *DEVICES])
