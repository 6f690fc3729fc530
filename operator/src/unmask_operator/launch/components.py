"""TorchX components: the only place that knows the workers' command lines.

A component is a pure function of its arguments, so that a job has one application wherever it runs; what
differs between a laptop and a cluster (how the nodes find each other, threads, resources) is added by who
runs it, as environment and resources of the role.
"""

from torchx.specs import AppDef, Role

__all__ = ["train"]


def train(
    job: str,
    nodes: int = 1,
    processes_per_node: int = 1,
    image: str = "",
    python: str = "python",
    module: str = "unmask.cli.main",
    launcher: str = "unmask_operator.launch.agent",
    min_nodes: int = 0,
    max_nodes: int = 0,
    max_restarts: int = 0,
) -> AppDef:
    """Train a diffusion language model: one elastic agent per node, each with its worker processes.

    Args:
        job: path of the job file
        nodes: machines that train together
        processes_per_node: worker processes on each
        image: container image
        python: the interpreter
        module: the module that each worker process runs
        launcher: the module that runs torchrun
        min_nodes: fewest machines to train on; 0 for neither fewer nor more than nodes
        max_nodes: most machines to train on, with min_nodes
        max_restarts: times that the worker processes are started again on their machines
    """
    agent = {
        "nnodes": f"{min_nodes}:{max_nodes}" if min_nodes else nodes,
        "nproc-per-node": processes_per_node,
        "rdzv-backend": "c10d",
        "max-restarts": max_restarts,
    }
    options = [f"--{name}={value}" for name, value in agent.items()]
    trainer = Role(
        name="trainer",
        image=image,
        entrypoint=python,
        args=["-m", launcher, *options, "-m", module, "train", "--job", job],
        num_replicas=nodes,
    )
    return AppDef(name="train", roles=[trainer])
