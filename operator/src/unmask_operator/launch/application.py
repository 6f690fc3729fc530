"""The application of a job, and the job of an application.

``of_job`` is what a laptop, the operator and TorchX run; it depends on the manifest and on what the place
adds: the path of the job file, the interpreter, the launcher and the image. ``to_job`` goes back, for an
application that ``torchx run`` made of a manifest and other numbers: ``of_job(to_job(app))`` is ``app``
again, but for the environment, which every place sets by itself.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torchx.specs import AppDef, Resource, Role

from unmask.errors import UsageError
from unmask_api.train_job import DiffusionTrainJob
from unmask_operator.launch.admission import admit
from unmask_operator.launch.amounts import limits, resource
from unmask_operator.launch.components import MEETING, trainer

__all__ = ["job_file_of", "of_job", "to_job"]

_MAIN = "unmask.cli.main"
_COMPONENT = "unmask.train"
_ADDED = re.compile(rf"TORCHX_|PET_|TORCHELASTIC_|{MEETING}$|UNMASK_MEETING_PORT$")
"""Variables that say where an application runs, and not what."""


def of_job(
    job: DiffusionTrainJob,
    job_file: str,
    *,
    image: str = "",
    python: str = "python",
    module: str = _MAIN,
    launcher: str = "unmask_operator.launch.agent",
    elastic: bool = True,
) -> AppDef:
    """Return the application of ``job``.

    Args:
        job: as admitted.
        job_file: path of its canonical form, where the workers run.
        image: container image of a job that names none.
        python: the interpreter.
        module: the module that each worker process runs.
        launcher: the module that runs torchrun.
        elastic: whether the number of nodes may change; a laptop has just as many as it starts.
    """
    spec = job.spec
    bounds = spec.elastic if elastic else None
    role = trainer(
        job_file,
        nodes=spec.parallelism.nodes,
        processes_per_node=spec.parallelism.processes_per_node,
        image=spec.image or image,
        python=python,
        module=module,
        launcher=launcher,
        min_nodes=bounds.min_nodes if bounds else 0,
        max_nodes=bounds.max_nodes if bounds else 0,
        max_restarts=bounds.max_process_restarts if bounds else 0,
        amounts=resource(spec.resources),
    )
    return AppDef(name="train", roles=[role])


def job_file_of(app: AppDef) -> str:
    """Return the path of the manifest that an application trains by; raises ``UsageError``."""
    role = _trainer(app)
    return str(role.args[role.args.index("--job") + 1])


def to_job(app: AppDef, manifest: DiffusionTrainJob) -> DiffusionTrainJob:
    """Return ``manifest`` with the numbers, the image and the variables of ``app``.

    Raises:
        UsageError: The application is none of ``unmask.train``, or the manifest's rules forbid the numbers.
    """
    role = _trainer(app)
    usual = of_job(manifest, "").roles[0]
    if role.entrypoint != usual.entrypoint:
        raise UsageError(f"python: got {role.entrypoint}; on a cluster it is the image's: drop it")
    document: dict[str, Any] = manifest.model_dump(
        mode="json", by_alias=True, exclude_unset=True, exclude_none=True
    )
    spec = document["spec"]
    options = _options(role)
    parallelism = spec.setdefault("parallelism", {})
    _set(parallelism, "nodes", role.num_replicas, usual.num_replicas)
    processes = int(options["nproc-per-node"])
    _set(parallelism, "processesPerNode", processes, manifest.spec.parallelism.processes_per_node)
    if role.image not in ("", usual.image):
        spec["image"] = role.image
    if changed := _changed_limits(role.resource, usual.resource):
        amounts = spec.setdefault("resources", {})
        amounts["limits"] = amounts.get("limits", {}) | changed
        for name in changed:
            amounts.get("requests", {}).pop(name, None)
    if options["nnodes"] != dict(_options(usual))["nnodes"]:
        _set_bounds(spec, options, role)
    if more := {name: value for name, value in role.env.items() if not _ADDED.match(name)}:
        kept = [one for one in spec.get("env", []) if one["name"] not in more]
        spec["env"] = [*kept, *({"name": name, "value": value} for name, value in more.items())]
    return admit(json.dumps(document), source=job_file_of(app))


def _trainer(app: AppDef) -> Role:
    if len(app.roles) == 1 and "--job" in app.roles[0].args[:-1]:
        role = app.roles[0]
        if role.args[-5:-1] == ["-m", _MAIN, "train", "--job"]:
            return role
    raise UsageError(
        f"this application ({app.name}) is no training job: unmask's operator runs {_COMPONENT} alone; to"
        " serve a model, install the chart deploy/helm/unmask-inference, or take another scheduler"
    )


def _options(role: Role) -> dict[str, str]:
    """Return torchrun's options."""
    return dict(arg[2:].partition("=")[::2] for arg in role.args if arg.startswith("--") and "=" in arg)


def _set(place: dict[str, Any], field: str, value: object, usual: object) -> None:
    if value != usual:
        place[field] = value


def _changed_limits(amounts: Resource, usual: Resource) -> Mapping[str, str]:
    before = limits(usual)
    return {name: value for name, value in limits(amounts).items() if before.get(name) != value}


def _set_bounds(spec: dict[str, Any], options: Mapping[str, str], role: Role) -> None:
    """Take over how far the number of nodes may change, where that is not as the manifest says."""
    least, _, most = options["nnodes"].partition(":")
    if not most:
        if "elastic" in spec and int(least) == role.num_replicas:
            del spec["elastic"]
        return
    bounds = {
        "minNodes": int(least),
        "maxNodes": int(most),
        "maxProcessRestarts": int(options["max-restarts"]),
    }
    spec["elastic"] = spec.get("elastic", {}) | bounds
