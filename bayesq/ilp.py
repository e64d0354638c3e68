"""The bit allocation as an integer linear program: the least predicted risk within a budget, by HiGHS.

    min sum_bk risk_bk z_bk   with   sum_bk bits_bk z_bk <= capacity,   sum_k z_bk = 1,   z_bk in {0, 1}

This is the multiple-choice knapsack that `bayesq.knapsack` solves greedily. With a price p per bit, the Lagrangian
bound

    L(p) = sum_b min_k (risk_bk + p bits_bk) - p capacity

is no larger than the optimum, and a choice whose risk_bk + p bits_bk exceeds its block's minimum by more than the
greedy total exceeds L(p) is in no optimum. Nearly all choices are ruled out like this before the program is solved.
"""

import numpy as np
import torch
from torch import Tensor

from bayesq.errors import Refused
from bayesq.knapsack import greedy_knapsack

# The search ends when the risk exceeds a proven lower bound by less than this share of it. With 1e-6 a run of MiniLM
# took many minutes longer, for the same KL (analysis/README.md at commit 92e1880).
GAP = 1e-4
# It also ends after this many nodes of the branch-and-bound tree; a limit in seconds would make results depend on the
# machine's load.
NODES = 2000
# Halvings of the interval that contains the best price: to the last bit of a float64.
PRICE_STEPS = 100


def ilp_knapsack(risk: Tensor, bits: Tensor, capacity: float) -> Tensor:
    """The choices of least total risk, up to GAP; arguments, result and errors as in `greedy_knapsack`."""
    greedy = greedy_knapsack(risk, bits, capacity)
    r, b = risk.to(torch.float64).numpy(), bits.to(torch.float64).numpy()
    price = best_price(r, b, capacity)
    priced = r + price * b
    reduced = priced - priced.min(1, keepdims=True)  # at least 0; 0 for a block's best choice at this price
    least = float(priced.min(1).sum() - price * capacity)  # L(price)
    excess = _total(r, b, capacity, greedy.numpy()) - least
    if excess <= GAP * abs(least):
        return greedy
    possible = reduced <= excess + 1e-12 * abs(least)
    # a total risk is L + sum of reduced + price * (unspent bits): the program minimises what comes after L
    solved = _solve(reduced, b, price, capacity, possible, GAP * abs(least) / excess)
    # HiGHS accepts a total that exceeds the capacity by its tolerance, and it may end early
    if solved is None or _total(r, b, capacity, solved) > _total(r, b, capacity, greedy.numpy()):
        return greedy
    return torch.from_numpy(solved)


def best_price(risk: np.ndarray, bits: np.ndarray, capacity: float) -> float:
    """The price per bit that maximises L(price): the least one at which the best choices fit the capacity."""

    def spent(price: float) -> float:
        return float(np.take_along_axis(bits, (risk + price * bits).argmin(1)[:, None], 1).sum())

    if spent(0.0) <= capacity:
        return 0.0
    finite = risk[np.isfinite(risk)]
    low, high = 0.0, float(finite.max() - finite.min()) / float(np.diff(bits, axis=1).min())
    for _ in range(PRICE_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= capacity else (middle, high)
    return high


def _solve(
    reduced: np.ndarray, bits: np.ndarray, price: float, capacity: float, possible: np.ndarray, gap: float
) -> np.ndarray | None:
    """The program over the possible choices: int64 [B], or None if HiGHS has no solution at its limit of nodes.

    Args:
        gap: relative to the objective, the total excess over L(price).

    Raises:
        Refused: HiGHS fails.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # here, because it takes a fifth of a second
    from scipy.sparse import csr_array

    single = possible.sum(1) == 1
    best: np.ndarray = possible.argmax(1)
    left = capacity - float(bits[np.nonzero(single)[0], best[single]].sum())
    open_blocks = np.nonzero(~single)[0]
    if not len(open_blocks):
        return best
    block, choice = np.nonzero(possible[open_blocks])
    size, excess = bits[open_blocks[block], choice], reduced[open_blocks[block], choice]
    # the last variable is the share of `left` that stays unspent
    count = len(block) + 1
    cost = np.append(excess, price * left)
    once = csr_array((np.ones(count - 1), (block, np.arange(count - 1))), shape=(len(open_blocks), count))
    budget = csr_array(np.append(size / left, 1.0)[None])
    solved = milp(
        cost / cost.max(),
        integrality=np.append(np.ones(count - 1), 0),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(budget, 1, 1)],
        options={"mip_rel_gap": gap, "node_limit": NODES},
    )
    if solved.x is None:
        if solved.status == 1:
            return None
        raise Refused(f"allocator=ilp: HiGHS gives no allocation ({solved.message})")
    chosen = solved.x[:-1] > 0.5
    best[open_blocks[block[chosen]]] = choice[chosen]
    return best


def _total(risk: np.ndarray, bits: np.ndarray, capacity: float, choice: np.ndarray) -> float:
    """Total risk of a choice [B]; infinite if it exceeds the capacity."""
    picked = np.arange(len(choice)), choice
    return float(risk[picked].sum()) if bits[picked].sum() <= capacity else np.inf
