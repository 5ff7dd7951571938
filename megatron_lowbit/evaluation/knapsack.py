"""The multiple-choice knapsack problem: one option from every group, the least cost in all, weights within a limit.

Solved exactly by branch and bound (Kellerer, Pferschy, Pisinger, Knapsack Problems, chapter 11; scipy's HiGHS). What
another option of its group beats in both cost and weight is dropped before.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError

SECONDS = 30.0  # then the best that was found is taken
GAP = 1e-6  # of the cost, relative
SCALE = 1e4  # HiGHS tolerates 1e-6 beyond a limit: next to this it is nothing


def check_installed() -> None:
    """Raise ConfigError if there is no scipy."""
    try:
        import scipy.optimize  # noqa: F401
    except ImportError as error:
        raise ConfigError("a plan needs scipy: pip install 'megatron-lowbit[eval]'") from error


def choose(costs: Sequence[Sequence[float]], weights: Sequence[Sequence[float]], limit: float) -> list[int]:
    """costs, weights: of the options of each group, from 0 up -> the index of the option to take of each.

    Raises ConfigError if even the lightest options exceed the limit, and without scipy.
    """
    check_installed()
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    lightest = sum(map(min, weights))
    if lightest > limit * (1 + 1e-9):
        raise ConfigError(f"the least possible weight is {lightest:.6g}, above the limit of {limit:.6g}")
    spare = [limit - lightest + min(group) for group in weights]  # what an option may weigh, at most
    kept = [
        [
            index
            for index in _undominated(cost, weight)
            if weight[index] <= most * (1 + 1e-9) or weight[index] == min(weight)
        ]
        for cost, weight, most in zip(costs, weights, spare, strict=True)
    ]
    where = [(group, index) for group, indices in enumerate(kept) for index in indices]
    cost = np.array([costs[group][index] for group, index in where])
    weight = np.array([weights[group][index] for group, index in where])
    columns = np.arange(len(where))
    once = csr_array((np.ones(len(where)), ([group for group, _ in where], columns)))
    result = milp(
        cost * (SCALE / (cost.max() or 1)),
        integrality=np.ones(len(where)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(csr_array(weight[None] * (SCALE / (limit or 1))), -np.inf, SCALE * (1 + 1e-9)),
        ],
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    if result.x is None:
        raise ConfigError(f"no choice was found in {SECONDS:.0f} s ({result.message}): give fewer candidates")
    return [index for (_, index), taken in zip(where, result.x, strict=True) if taken > 0.5]


def _undominated(costs: Sequence[float], weights: Sequence[float]) -> list[int]:
    """Indices of the options that no other of the group beats or equals in both."""
    kept, least = [], float("inf")
    for index in sorted(range(len(costs)), key=lambda i: (weights[i], costs[i])):
        if costs[index] < least:
            kept.append(index)
            least = costs[index]
    return kept
