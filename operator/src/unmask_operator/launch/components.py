"""TorchX components: the only place that knows the workers' command lines.

A role is a pure function of its arguments, so that a job has one application wherever it runs; what differs
between a laptop and a cluster (how the nodes find each other, threads, resources) is added by who runs it, as
environment and resources of the role.

``unmask.train``, ``unmask.serve`` and ``unmask.shard`` are for ``torchx run`` on any of its schedulers.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torchx.specs import NULL_RESOURCE, AppDef, Resource, Role, macros

from unmask_api.inference_service import Group, Server
from unmask_operator.launch.admission import read_manifest
from unmask_operator.launch.amounts import resource

__all__ = ["MEETING", "copier", "engine", "expert_shard", "serve", "server", "shard", "train", "trainer"]

MEETING = "UNMASK_MEETING_HOST_IN"
"""Variable that names the one in which a scheduler of TorchX puts the first node's address."""
_MAIN = "unmask.cli.main"
_AGENT = "unmask_operator.launch.agent"


def trainer(
    job: str,
    *,
    nodes: int = 1,
    processes_per_node: int = 1,
    image: str = "",
    python: str = "python",
    module: str = _MAIN,
    launcher: str = _AGENT,
    min_nodes: int = 0,
    max_nodes: int = 0,
    max_restarts: int = 0,
    amounts: Resource = NULL_RESOURCE,
) -> Role:
    """Return the role that trains: one elastic agent per node, each with its worker processes.

    Args:
        job: path of the job file.
        nodes: machines that train together.
        processes_per_node: worker processes on each.
        image: container image.
        python: the interpreter.
        module: the module that each worker process runs.
        launcher: the module that runs torchrun.
        min_nodes: fewest machines to train on; 0 for neither fewer nor more than ``nodes``.
        max_nodes: most machines to train on, with ``min_nodes``.
        max_restarts: times that the worker processes are started again on their machines.
        amounts: what a node takes of its machine.
    """
    agent = {
        "nnodes": f"{min_nodes}:{max_nodes}" if min_nodes else nodes,
        "nproc-per-node": processes_per_node,
        "rdzv-backend": "c10d",
        "max-restarts": max_restarts,
    }
    options = [f"--{name}={value}" for name, value in agent.items()]
    return Role(
        name="trainer",
        image=image,
        entrypoint=python,
        args=["-m", launcher, *options, "-m", module, "train", "--job", job],
        num_replicas=nodes,
        resource=amounts,
    )


def server(
    model: str,
    *,
    image: str = "",
    port: int = 50051,
    metrics_port: int = 9090,
    name: str = "",
    rows: int = 8,
    device: str = "cpu",
    python: str = "python",
    amounts: Resource = NULL_RESOURCE,
) -> Role:
    """Return the role that answers generation requests.

    Args:
        model: folder of the model.
        image: container image.
        port: gRPC.
        metrics_port: Prometheus metrics.
        name: what requests call the model; empty for the folder's name.
        rows: requests that are decoded side by side.
        device: where to compute.
        python: the interpreter.
        amounts: what it takes of its machine.
    """
    options = {
        "host": "0.0.0.0",
        "port": port,
        "metrics-port": metrics_port,
        "rows": rows,
        "device": device,
    } | ({"name": name} if name else {})
    return Role(
        name="server",
        image=image,
        entrypoint=python,
        args=["-m", _MAIN, "serve", model, *(f"--{key}={value}" for key, value in options.items())],
        port_map={"grpc": port, "metrics": metrics_port},
        resource=amounts,
    )


def engine(
    model: str,
    name: str,
    answering: Server,
    group: Group,
    *,
    shards: Sequence[str] = (),
    shards_name: str = "",
    certificates: Mapping[str, str],
    image: str = "",
    device: str = "cpu",
    python: str = "python",
) -> Role:
    """Return the role of the engine of a group.

    Args:
        model: folder of the model.
        name: what requests call it.
        answering: how it answers.
        group: what else the group is.
        shards: HOST:PORT of each shard; empty where there are none.
        shards_name: what the certificate of shards has to name.
        certificates: folders of ``server``, ``clients`` and ``group``, as far as there is TLS.
        image: container image.
        device: where to compute.
        python: the interpreter.
    """
    options: dict[str, object] = {
        "host": "0.0.0.0",
        "port": answering.port,
        "metrics-port": answering.metrics_port,
        "http-port": answering.http_port,
        "name": name,
        "rows": answering.rows,
        "context": answering.context,
        "cache-mib": answering.cache_mib,
        "max-positions": answering.max_positions,
        "max-queue": answering.max_queue,
        "max-queue-tokens": answering.max_queue_tokens,
        "max-request-seconds": answering.max_request_seconds,
        "max-connection-age-seconds": answering.max_connection_age_seconds,
        "drain-seconds": answering.drain_seconds,
        "device": device,
        "quantization": None if answering.quantization == "None" else answering.quantization.lower(),
        "threads": answering.threads,
    }
    if answering.tls:
        options |= _pair("tls", certificates["server"])
        if answering.tls.client_ca_secret_name:
            options["tls-client-ca"] = f"{certificates['clients']}/{answering.tls.client_ca_key}"
            options["tls-allow"] = answering.tls.allow
    if shards:
        options |= {
            "experts": ",".join(shards),
            "experts-rows": group.rows.lower(),
            # An earlier engine does not know the option, and one part is what it does.
            "experts-micro-batches": group.micro_batches if group.micro_batches > 1 else None,
            "experts-wait-seconds": group.startup_timeout_seconds,
        }
        if group.tls:
            options |= _pair("experts-tls", certificates["group"])
            options["experts-tls-ca"] = f"{certificates['group']}/ca.crt"
            options["experts-tls-server-name"] = shards_name
    return Role(
        name="engine",
        image=image,
        entrypoint=python,
        args=["-m", _MAIN, "serve", model, *_flags(options)],
    )


def expert_shard(
    model: str,
    number: str,
    group: Group,
    *,
    port: int,
    metrics_port: int,
    certificates: Mapping[str, str],
    image: str = "",
    device: str = "cpu",
    threads: int = 0,  # TorchX reads the signatures of this module, and fails on a union in one
    python: str = "python",
) -> Role:
    """Return the role of a shard of a group.

    Args:
        model: folder of the model.
        number: which one, from 0; a macro or a variable of the pod.
        group: what else the group is.
        port: gRPC.
        metrics_port: Prometheus metrics.
        certificates: the folder of ``group``, where there is TLS.
        image: container image.
        device: where to compute.
        threads: CPU threads; 0 for torch's own.
        python: the interpreter.
    """
    options: dict[str, object] = {
        "shard": f"{number}/{group.shards}",
        "replication": group.replication,
        "host": "0.0.0.0",
        "port": port,
        "metrics-port": metrics_port,
        "drain-seconds": group.shard_drain_seconds,
        "device": device,
        "threads": threads or None,
    }
    if group.tls:
        # Only engines with a certificate of the same CA are let in.
        options |= _pair("tls", certificates["group"]) | {"tls-client-ca": f"{certificates['group']}/ca.crt"}
    return Role(
        name="shard",
        image=image,
        entrypoint=python,
        args=["-m", _MAIN, "shard", model, *_flags(options)],
    )


def copier(uri: str, folder: str, *, image: str = "", python: str = "python") -> Role:
    """Return the role that copies a model from an object store, once.

    Args:
        uri: where it is.
        folder: where it is to be; what is there already is whole and stays.
        image: container image.
        python: the interpreter.
    """
    args = ["-m", _MAIN, "fetch", uri, folder, "--if-missing"]
    return Role(name="fetch", image=image, entrypoint=python, args=args)


def _pair(prefix: str, folder: str) -> dict[str, object]:
    return {f"{prefix}-cert": f"{folder}/tls.crt", f"{prefix}-key": f"{folder}/tls.key"}


def _flags(options: Mapping[str, object]) -> list[str]:
    """Return options as they stand on a command line; ``None`` leaves one out, a tuple repeats it."""
    found = []
    for name, value in options.items():
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        found += [f"--{name}={one}" for one in values]
    return found


def train(
    job: str,
    image: str = "",
    nodes: int = 0,
    processes_per_node: int = 0,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,  # as TorchX spells it
    python: str = "python",
    port: int = 29400,
) -> AppDef:
    """Train a masked-diffusion language model.

    What is 0 or empty is as the job file says; give nodes and processes_per_node where the file cannot be
    read here. On schedulers other than kubernetes_unmask its paths must be absolute.

    Args:
        job: path of the job file, a DiffusionTrainJob manifest
        image: container image
        nodes: machines that train together
        processes_per_node: worker processes on each
        cpu: cores of each machine
        gpu: GPUs of each machine
        memMB: memory of each machine, in megabytes
        python: the interpreter
        port: port of the first machine at which the others meet it
    """
    asked = Resource(cpu=cpu or -1, gpu=gpu or -1, memMB=memMB or -1)
    if nodes and processes_per_node and not Path(job).is_file():
        role = trainer(
            job,
            nodes=nodes,
            processes_per_node=processes_per_node,
            image=image,
            python=python,
            amounts=asked,
        )
    else:
        spec = read_manifest(Path(job)).spec
        usual = resource(spec.resources)
        elastic = spec.elastic
        role = trainer(
            job,
            nodes=nodes or spec.parallelism.nodes,
            processes_per_node=processes_per_node or spec.parallelism.processes_per_node,
            image=image or spec.image or "",
            python=python,
            min_nodes=elastic.min_nodes if elastic else 0,
            max_nodes=elastic.max_nodes if elastic else 0,
            max_restarts=elastic.max_process_restarts if elastic else 0,
            amounts=Resource(
                cpu=cpu or usual.cpu,
                gpu=gpu or usual.gpu,
                memMB=memMB or usual.memMB,
            ),
        )
    role.env = {MEETING: macros.rank0_env, "UNMASK_MEETING_PORT": str(port), "PET_RDZV_ID": macros.app_id}
    return AppDef(name="train", roles=[role])


def serve(
    model: str,
    image: str = "",
    port: int = 50051,
    metrics_port: int = 9090,
    name: str = "",
    rows: int = 8,
    device: str = "",
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,  # as TorchX spells it
    python: str = "python",
) -> AppDef:
    """Answer generation requests over gRPC (unmask.v1.Generation).

    Args:
        model: folder with a masked-diffusion model
        image: container image
        port: gRPC
        metrics_port: Prometheus metrics
        name: what requests call the model; the folder's name where empty
        rows: requests that are decoded side by side
        device: where to compute; cuda with GPUs and cpu without where empty
        cpu: cores
        gpu: GPUs
        memMB: memory, in megabytes
        python: the interpreter
    """
    role = server(
        model,
        image=image,
        port=port,
        metrics_port=metrics_port,
        name=name,
        rows=rows,
        device=device or ("cuda" if gpu else "cpu"),
        python=python,
        amounts=Resource(cpu=cpu or -1, gpu=gpu or -1, memMB=memMB or -1),
    )
    return AppDef(name="serve", roles=[role])


def shard(
    model: str,
    shards: int = 1,
    replication: int = 1,
    image: str = "",
    port: int = 50061,
    metrics_port: int = 9091,
    device: str = "",
    threads: int = 0,
    cpu: int = 0,
    gpu: int = 0,
    memMB: int = 0,  # as TorchX spells it
    python: str = "python",
) -> AppDef:
    """Hold the routed experts of a model, for unmask serve --experts (unmask.v1.ExpertShard).

    Each shard has a machine of its own: all listen at the same port.

    Args:
        model: folder with a mixture of experts
        shards: how many there are
        replication: how many of them hold each part of the experts
        image: container image
        port: gRPC
        metrics_port: Prometheus metrics
        device: where to compute; cuda with GPUs and cpu without where empty
        threads: CPU threads of each; 0 for torch's own
        cpu: cores of each
        gpu: GPUs of each
        memMB: memory of each, in megabytes
        python: the interpreter
    """
    role = expert_shard(
        model,
        macros.replica_id,
        Group(shards=shards, replication=replication),
        port=port,
        metrics_port=metrics_port,
        certificates={},
        image=image,
        device=device or ("cuda" if gpu else "cpu"),
        threads=threads,
        python=python,
    )
    role.num_replicas = shards
    role.port_map = {"grpc": port, "metrics": metrics_port}
    role.resource = Resource(cpu=cpu or -1, gpu=gpu or -1, memMB=memMB or -1)
    return AppDef(name="shard", roles=[role])
