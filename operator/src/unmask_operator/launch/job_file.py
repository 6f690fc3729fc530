"""The file the trainer reads: the job, defaulted and with paths resolved, as JSON in one canonical form."""

import json

from unmask_api.train_job import DiffusionTrainJob

__all__ = ["canonical"]


def canonical(job: DiffusionTrainJob) -> bytes:
    """Return ``job`` as bytes that depend on nothing but its name and spec.

    ``DiffusionTrainJob.from_json`` reads them back.
    """
    document = job.to_json_dict()
    kept = {key: document[key] for key in ("apiVersion", "kind", "spec")}
    kept["metadata"] = {"name": job.metadata.name}
    return (json.dumps(kept, sort_keys=True, indent=1, ensure_ascii=True) + "\n").encode()
