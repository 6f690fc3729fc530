"""How many experts and parts the tokens of a forward hit, if all choices are equally likely.

Each token, whatever the others do, has G' of the router's G groups of experts to choose from, any of them as
likely as the next, and chooses K different experts of the E' = E G' / G that these have, again any. (LLaDA2
has 4 of 8 groups; without groups G = G' = 1.) Then everything here is a sum of binomial coefficients and
nothing has to be drawn at random.

Routers are not quite like that. LLaDA2's keeps the groups whose two best experts are best, so that most
groups that it keeps have one of the K: given random scores, a token of mini goes to 1.97, 3.13, 3.97 and 5.72
of 2, 4, 8 and 16 shards, where 1.93, 2.93, 3.63 and 5.34 are said here. And a trained router chooses less
evenly. What a server measures (``unmask_expert_imbalance``, ``unmask_expert_rows_total``) is worth more.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import comb, sqrt
from statistics import NormalDist

__all__ = ["Choice", "chance_imbalance", "copies_per_token", "experts_hit", "part_hit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What a router chooses for a token."""

    num_experts: int
    """E."""
    chosen: int
    """K."""
    groups: int = 1
    """G, of equal size."""
    chosen_groups: int = 1
    """G'."""

    @property
    def offered(self) -> int:
        """Experts that a token has to choose from, E'."""
        return self.num_experts // self.groups * self.chosen_groups


def experts_hit(choice: Choice, tokens: float) -> float:
    """How many different experts are chosen by any of so many tokens, on average.

    A token passes over an expert with probability 1 - K / E, with groups or without, so of E experts
    E (1 - (1 - K / E)^T) are hit.
    """
    missed = 1 - choice.chosen / choice.num_experts
    return float(choice.num_experts * (1 - missed**tokens))


def part_hit(choice: Choice, first: int, stop: int) -> float:
    """The probability that a token chooses one or more of the experts from ``first`` up to ``stop``.

    The sum over all ways to draw the groups: with n of the experts offered in the part, none of them is
    chosen in C(E' - n, K) of C(E', K) cases.
    """
    size = choice.num_experts // choice.groups
    ways: Counter[tuple[int, int]] = Counter({(0, 0): 1})
    """Groups drawn, and how many experts of the part they have -> in how many ways."""
    for group in range(choice.groups):
        here = max(0, min(stop, (group + 1) * size) - max(first, group * size))
        for (drawn, inside), count in list(ways.items()):
            if drawn < choice.chosen_groups:
                ways[drawn + 1, inside + here] += count
    passed = sum(
        count * comb(choice.offered - inside, choice.chosen)
        for (drawn, inside), count in ways.items()
        if drawn == choice.chosen_groups
    )
    return 1 - passed / (comb(choice.groups, choice.chosen_groups) * comb(choice.offered, choice.chosen))


def copies_per_token(choice: Choice, bounds: Sequence[int]) -> float:
    """To how many parts a token goes, on average; a part is the experts between two of ``bounds``."""
    return sum(part_hit(choice, first, stop) for first, stop in pairwise(bounds))


def chance_imbalance(hit: float, parts: int, tokens: float) -> float:
    """How much more rows the fullest of some equal parts has than the mean, by chance alone; 1: no more.

    The rows of a part are binomial, and the largest of S normal numbers lies about where the normal
    distribution is (S - 3/8) / (S + 1/4) (Blom 1958).

    Args:
        hit: The probability that a token goes to a part.
        parts: How many there are.
        tokens: T.
    """
    highest = NormalDist().inv_cdf((parts - 0.375) / (parts + 0.25))
    return min(1 / hit, 1 + highest * sqrt((1 - hit) / (hit * tokens)))
