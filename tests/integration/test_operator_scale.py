"""Many jobs at once on a real API server: what they take, and that at rest next to nothing is done."""

from pathlib import Path

import pytest

from support import counts, operator_scale


@pytest.mark.slow
@pytest.mark.real_api
def test_many_jobs_take_few_calls_each_and_at_rest_nothing_is_written_but_the_lease(
    tmp_path: Path, record_measurement
) -> None:
    jobs = counts.of(sample=40, full=1000)
    found = operator_scale.measure(tmp_path, jobs, idle=counts.of(sample=8, full=30))
    # Two events, two writes of the status, ConfigMap, Service and Job; the rest are the caches' lists.
    assert 7 <= found["calls_per_job"] < 7.5, found["calls"]
    assert set(found["idle_writes"]) == {"update leases"}, found["idle_writes"]
    for what in ("milliseconds_per_job", "cpu_milliseconds_per_job", "calls_per_job", "peak_memory_mib"):
        record_measurement(f"{jobs} jobs applied at once: {what}", found[what])
