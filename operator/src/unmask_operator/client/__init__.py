"""Jobs and services on a cluster from Python, typed and without torch: for notebooks, scripts and ``unmask``.

>>> from unmask_operator.client import InferenceServices, TrainJobs
>>> jobs = TrainJobs.connect(namespace="ml")  # doctest: +SKIP
>>> job = jobs.submit("job.yaml")  # doctest: +SKIP
>>> for line in jobs.logs(job.name, follow=True):  # doctest: +SKIP
...     print(line.text)
>>> services = InferenceServices.connect(namespace="ml")  # doctest: +SKIP
>>> services.wait(services.submit("service.yaml").name).status.endpoint  # doctest: +SKIP
'chat.ml.svc:50051'

It lies beside the operator because both read the same custom resources. A client of the service that answers
with text is :mod:`unmask.client`.
"""

from unmask_operator.client.cluster import Cluster, connected
from unmask_operator.client.errors import (
    ClusterError,
    Conflicting,
    NameTaken,
    NoCluster,
    NotAllowed,
    NotDefined,
    NotFound,
    Refused,
    WaitedTooLong,
)
from unmask_operator.client.job_logs import Line
from unmask_operator.client.job_view import JobState, TrainJob
from unmask_operator.client.jobs import Manifest, TrainJobs
from unmask_operator.client.logs import PodLine
from unmask_operator.client.service_logs import Choice
from unmask_operator.client.service_view import InferenceService, ServiceState
from unmask_operator.client.services import InferenceServices, ServiceManifest

__all__ = [
    "Choice",
    "Cluster",
    "ClusterError",
    "Conflicting",
    "InferenceService",
    "InferenceServices",
    "JobState",
    "Line",
    "Manifest",
    "NameTaken",
    "NoCluster",
    "NotAllowed",
    "NotDefined",
    "NotFound",
    "PodLine",
    "Refused",
    "ServiceManifest",
    "ServiceState",
    "TrainJob",
    "TrainJobs",
    "WaitedTooLong",
    "connected",
]
