"""How many processes hold one model, and whether a model can be shared out that way."""

from collections.abc import Sequence
from dataclasses import dataclass

from unmask.errors import UsageError
from unmask.models.config import ModelConfig
from unmask.models.loading import build
from unmask.models.moe import Experts
from unmask_api.train_job import Parallelism

__all__ = ["ShardingPlan", "check_experts", "check_parallelism", "expert_dimension", "sharding_plan"]


@dataclass(frozen=True, slots=True)
class ShardingPlan:
    """Processes as a box: replicas x parts x experts, the last varying fastest.

    A parameter is cut into parts x experts pieces inside each replica. Experts are shared
    out over the last dimension, and each expert is cut into ``parts`` pieces.
    """

    replicas: int
    """Groups that each hold the whole model."""
    parts: int
    """Pieces that each expert is cut into."""
    experts: int
    """Processes that share out the experts of a layer."""


def sharding_plan(parallelism: Parallelism, *, processes: int) -> ShardingPlan | None:
    """What ``processes`` do under ``parallelism``; None: each holds everything.

    Raises:
        UsageError: The processes cannot be divided that way.
    """
    if parallelism.shard == "None" or processes == 1:
        return None
    replicas, experts = parallelism.replicas or 1, parallelism.expert_parallel
    if processes % (replicas * experts):
        raise UsageError(
            f"spec.parallelism: replicas {replicas} x expertParallel {experts} must divide the number of "
            f"processes, which is {processes}; change nodes, processesPerNode, replicas or expertParallel"
        )
    return ShardingPlan(replicas, processes // (replicas * experts), experts)


def check_parallelism(parallelism: Parallelism, config: ModelConfig, *, processes: int) -> None:
    """Refuse a model whose experts cannot be shared out as ``parallelism`` says.

    Raises:
        UsageError: Naming the field and what it may be.
    """
    plan = sharding_plan(parallelism, processes=processes)
    if plan is None or plan.experts == 1:
        return
    layers = [module for module in build(config, device="meta").modules() if isinstance(module, Experts)]
    check_experts(plan, [[tuple(parameter.shape) for parameter in layer.parameters()] for layer in layers])


def check_experts(plan: ShardingPlan, layers: Sequence[Sequence[tuple[int, ...]]]) -> None:
    """Refuse experts that ``plan`` cannot share out.

    Args:
        plan: With more than one process for the experts of a layer.
        layers: For each layer with experts, the shapes (E, O, I) of its stacked parameters.

    Raises:
        UsageError: Naming the field and what it may be.
    """
    at = "spec.parallelism.expertParallel"
    if not layers:
        raise UsageError(f"{at}: got {plan.experts}, but the model has no experts; leave it at 1")
    for shapes in layers:
        number = shapes[0][0]
        if number % plan.experts:
            allowed = ", ".join(str(one) for one in range(1, number + 1) if number % one == 0)
            raise UsageError(
                f"{at}: got {plan.experts}, which does not divide the {number} experts; use one of {allowed}"
            )
        for shape in shapes:
            expert_dimension(shape, plan.parts)


def expert_dimension(shape: tuple[int, ...], parts: int) -> int:
    """The dimension along which stacked experts (E, O, I) are cut, beside that of the experts themselves.

    Raises:
        UsageError: ``parts`` divides neither O nor I.
    """
    for dimension in (1, 2):
        if shape[dimension] % parts == 0:
            return dimension
    raise UsageError(
        f"spec.parallelism: experts of shape {list(shape[1:])} cannot be cut into {parts} equal parts "
        "(processes / replicas / expertParallel); raise expertParallel or replicas, or take fewer processes"
    )
