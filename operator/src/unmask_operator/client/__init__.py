"""Training jobs on a cluster from Python, typed and without torch: for notebooks, scripts and ``unmask``.

>>> from unmask_operator.client import TrainJobs
>>> jobs = TrainJobs.connect(namespace="ml")  # doctest: +SKIP
>>> job = jobs.submit("job.yaml")  # doctest: +SKIP
>>> for line in jobs.logs(job.name, follow=True):  # doctest: +SKIP
...     print(line.text)

It lies beside the operator because both read the same custom resources. A client of the service that answers
with text is :mod:`unmask.client`.
"""

from unmask_operator.client.errors import (
    ClusterError,
    NameTaken,
    NoCluster,
    NotAllowed,
    NotFound,
    Refused,
    WaitedTooLong,
)
from unmask_operator.client.jobs import Manifest, TrainJobs
from unmask_operator.client.logs import Line
from unmask_operator.client.view import JobState, TrainJob

__all__ = [
    "ClusterError",
    "JobState",
    "Line",
    "Manifest",
    "NameTaken",
    "NoCluster",
    "NotAllowed",
    "NotFound",
    "Refused",
    "TrainJob",
    "TrainJobs",
    "WaitedTooLong",
]
