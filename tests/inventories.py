"""Hypothesis strategies for inventories of target modules, and what every allocation must satisfy."""

from hypothesis import strategies as st

import rankscope as rs

SIDES = st.sampled_from([1, 2, 3, 5, 8, 13])


@st.composite
def inventories(draw: st.DrawFn, max_size: int = 8, equal_costs: bool = False) -> tuple[rs.TargetModule, ...]:
    """Between 1 and `max_size` target modules with names in no particular order."""
    names = draw(st.lists(st.text("abcxyz.", min_size=1, max_size=4), min_size=1, max_size=max_size, unique=True))
    shapes = [(6, 6)] * len(names) if equal_costs else [(draw(SIDES), draw(SIDES)) for _ in names]
    return tuple(
        rs.TargetModule(name=n, in_features=i, out_features=o) for n, (i, o) in zip(names, shapes, strict=True)
    )


def vit_inventory(n_blocks: int = 6) -> tuple[rs.TargetModule, ...]:
    """The 36 modules of the digits transformer: four of 64 x 64 and two of 64 x 256 a block."""
    roles = {
        "q_proj": (64, 64),
        "k_proj": (64, 64),
        "v_proj": (64, 64),
        "o_proj": (64, 64),
        "fc1": (64, 256),
        "fc2": (256, 64),
    }
    return tuple(
        rs.TargetModule(name=f"layers.{b}.{role}", in_features=i, out_features=o, block=b, role=role)
        for b in range(n_blocks)
        for role, (i, o) in roles.items()
    )


def check_feasible(
    allocation: rs.RankAllocation,
    budget: rs.ParameterBudget,
    min_rank: dict[str, int] | int = 0,
    max_rank: dict[str, int] | int | None = None,
) -> None:
    """Within budget and bounds, and no rank could still be placed."""
    assert allocation.parameters == sum(
        (t.in_features + t.out_features) * r for t, r in zip(allocation.targets, allocation.vector, strict=True)
    )
    slack = budget.limit - allocation.parameters
    assert slack >= 0
    for target, rank in zip(allocation.targets, allocation.vector, strict=True):
        low = min_rank.get(target.name, 0) if isinstance(min_rank, dict) else min_rank
        full = min(target.in_features, target.out_features)
        bound = max_rank.get(target.name, full) if isinstance(max_rank, dict) else max_rank
        high = full if bound is None else min(bound, full)
        assert low <= rank <= high
        assert rank == high or target.in_features + target.out_features > slack
