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
) -> AppDef:
    """Train a diffusion language model: one elastic agent per node, each with its worker processes.

    Args:
        job: path of the job file
        nodes: machines that train together
        processes_per_node: worker processes on each
        image: container image
        python: the interpreter
        module: the module that each worker process runs
    """
    agent = {
        "nnodes": nodes,
        "nproc-per-node": processes_per_node,
        "rdzv-backend": "c10d",
        "max-restarts": 0,
    }
    options = [f"--{name}={value}" for name, value in agent.items()]
    trainer = Role(
        name="trainer",
        image=image,
        entrypoint=python,
        args=["-m", "unmask_operator.launch.agent", *options, "-m", module, "train", "--job", job],
        num_replicas=nodes,
    )
    return AppDef(name="train", roles=[trainer])
