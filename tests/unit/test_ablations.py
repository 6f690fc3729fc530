"""The comparison of trainings: what it changes is a valid job, and its table says what was measured."""

import json
import sys
from pathlib import Path

import pytest

from unmask_operator.launch.admission import admit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import ablations  # noqa: E402 (it lies outside the packages)


@pytest.fixture(params=[False, True], ids=["whole", "small"])
def rig(request, tmp_path):
    return ablations.Rig(tmp_path, small=request.param, divide=1 if request.param else 4, words=32)


def jobs(rig, variant):
    """The two jobs of a variant, not run."""
    made = []
    rig.train = lambda name, job: made.append(job) or Path(name)
    rig.answered(variant, 3, rig.converted(variant.conversion, 3, Path("seed3-pretrain")))
    for job in made:
        job["metadata"].pop("annotations")
        job["metadata"]["name"] = "job"
    return made


@pytest.mark.parametrize("variant", ablations.VARIANTS, ids=lambda variant: variant.name)
def test_each_variant_is_a_valid_job_that_differs_from_the_first(rig, variant):
    made = jobs(rig, variant)
    for job in made:
        assert admit(json.dumps(job)).spec.data.seed == 3
    if variant.name not in ("all", "merge"):
        assert made != jobs(rig, ablations.VARIANTS[0])


@pytest.mark.parametrize("variant", ablations.VARIANTS, ids=lambda variant: variant.name)
def test_each_variant_takes_as_many_steps(rig, variant):
    def steps(one):
        return [sum(stage["steps"] for stage in job["spec"]["stages"]) for job in jobs(rig, one)]

    assert steps(variant) == steps(ablations.VARIANTS[0])


def test_only_what_follows_the_autoregressive_stage_is_shortened(tmp_path):
    whole, short = (ablations.Rig(tmp_path, small=False, divide=divide, words=32) for divide in (1, 3))
    assert whole.part(0, 0, 1) == short.part(0, 0, 1)
    for first, end in ((1, 4), (4, 5)):
        stages = [rig.part(0, first, end, init=Path("x"))["spec"]["stages"] for rig in (whole, short)]
        for long, less in zip(*stages, strict=True):
            assert less["steps"] == long["steps"] // 3
            assert less["learningRate"].get("decaySteps", 0) == long["learningRate"].get("decaySteps", 0) // 3


def test_the_table_counts_the_seeds_that_rose_and_fell():
    def measured(exact, tpf):
        return {
            "perplexity": {"nll_per_token": 1.0},
            "largest_grad_norm": 2.0,
            "curve": [{"threshold": 0.9, "exact_match": exact, "tpf": tpf}],
        }

    variants = ablations.VARIANTS[:2]
    rows = {
        variants[0].name: [measured(0.4, 2.0), measured(0.5, 2.0)],
        variants[1].name: [measured(0.5, 1.0), measured(0.5, 1.5)],
    }
    table = ablations.as_table(variants, rows).splitlines()
    assert table[2] == "| all | 2.000 +- 0.000 | 1.000 +- 0.000 | 0.450 +- 0.071 | 2.000 +- 0.000 |"
    assert table[3].endswith("| 0.500 +- 0.000 (1 up, 0 down) | 1.250 +- 0.354 (0 up, 2 down) |")
    single = ablations.as_table(variants, {name: found[:1] for name, found in rows.items()}).splitlines()
    assert single[3] == "| no warm-up | 2.000 | 1.000 | 0.500 | 1.000 |", "one seed has no spread"
