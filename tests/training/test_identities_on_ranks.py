"""The identities of the two-copy forward on models that 1, 2 and 4 processes hold together."""

import pytest

from support.identities import BOUND, IDENTITIES, differences
from support.sharding import block_job

pytestmark = pytest.mark.training

WORLDS = {
    "one": (1, {}),
    "two, each a half": (2, {"shard": "Full"}),
    "four, experts spread over two": (4, {"shard": "Full", "expertParallel": 2}),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identities")
    return {
        name: differences(block_job(folder, name, parallelism), ranks=ranks)
        for name, (ranks, parallelism) in WORLDS.items()
    }


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("identity", IDENTITIES)
def test_the_two_sides_are_one_number_to_float32(found, identity, name, record_measurement):
    record_measurement(f"{identity}, {name}", found[name][identity])
    assert found[name][identity] < 2e-5


@pytest.mark.parametrize("name", WORLDS)
def test_the_bound_in_blocks_of_one_is_the_likelihood_on_average(found, name, record_measurement):
    record_measurement(f"{BOUND}, standard errors, {name}", found[name][BOUND])
    assert 0 < found[name][BOUND] < 3
