# SPDX-License-Identifier: Apache-2.0
"""What the contenders printed → medians, ratios and bounds; a table and a picture of them."""

from __future__ import annotations

import statistics
from pathlib import Path

import work

# forward 1, backward 2, and the forward again where activations are not kept
RECOMPUTED = {"trl_default": 4 / 3}
MIB = 2**20


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def pace(run: dict, clock: str, number: int) -> float:
    """``number`` things a second over the whole pass, of which the timed steps computed a share of the tokens."""
    timed = sum(run["tokens"][run["warmup_steps"] :]) / sum(run["tokens"])
    return number * timed / run[f"{clock}_seconds"]


def summarize(runs: dict[str, list[dict]], pairs: list[work.Pair], ours: list[str]) -> dict[str, dict]:
    """Name → the numbers of a contender.

    Args:
        runs: by name, for each round what peers.py printed, and as "limit" what limit.py did.
        ours: names of the variants that the others are measured by.
    """
    useful, listed = work.tokens_once(pairs), work.tokens_once_a_list(pairs)
    on_gpu = next(iter(runs.values()))[0]["limit"]["device"] == "cuda"
    clock = "wall" if on_gpu else "cpu"
    paces = {name: [pace(run, clock, len(pairs)) for run in rounds] for name, rounds in runs.items()}
    rows = {}
    for name, rounds in runs.items():
        # an order of its own each time, perhaps: the median
        computed = statistics.median(sum(run["tokens"]) for run in rounds) * RECOMPUTED.get(name, 1)
        tokens = [pace(run, clock, useful) for run in rounds]
        rows[name] = {
            "pairs_per_cpu_second": spread([pace(run, "cpu", len(pairs)) for run in rounds]),
            "pairs_per_second": spread([pace(run, "wall", len(pairs)) for run in rounds]),
            "tokens_per_second": spread(tokens),
            "share_of_limit": spread([t / run["limit"]["tokens_per_second"] for t, run in zip(tokens, rounds)]),
            "memory": statistics.median(run["cuda_memory" if on_gpu else "memory"] for run in rounds),
            "memory_before": statistics.median(run["memory_before"] for run in rounds),
            "bound": computed / useful,
            "bound_of_lists": computed / listed,
            "ours_faster": {v: spread([a / b for a, b in zip(paces[v], paces[name])]) for v in ours},
        }
    return rows


def show(rows: dict[str, dict], limits: list[dict], with_lists: bool) -> None:
    """Print the table."""
    second = "s" if limits[0]["device"] == "cuda" else "CPU s"
    lines = [{"": name} | cells(row, second, with_lists) for name, row in rows.items()]
    table = [list(lines[0]), *[list(line.values()) for line in lines]]
    widths = [max(map(len, column)) for column in zip(*table)]
    for name, *rest in table:
        print(name.ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(rest, widths[1:])], sep="  ")
    tokens, operations = (spread([limit[f"{name}_per_second"] for limit in limits]) for name in ("tokens", "flops"))
    print(
        f"limit: {tokens['median']:,.0f} tokens/{second} [{tokens['min']:,.0f}–{tokens['max']:,.0f}] "
        f"in products of {limits[0]['rows']} rows, {operations['median'] / 1e9:,.0f} GFLOP/{second}"
    )


def cells(row: dict, second: str, with_lists: bool) -> dict[str, str]:
    """Heading → text."""
    speeds = {"pairs/CPU s": written(row["pairs_per_cpu_second"]), "pairs/s": written(row["pairs_per_second"])}
    numbers = {
        f"tokens/{second}": f"{row['tokens_per_second']['median']:,.0f}",
        "of limit": f"{row['share_of_limit']['median']:.0%}",
        "peak MiB": f"{row['memory'] / MIB:,.0f}",
        "before": f"{row['memory_before'] / MIB:,.0f}",
    }
    ratios = {f"{variant} ÷": written(values) for variant, values in row["ours_faster"].items()}
    bounds = {"bound": f"{row['bound']:.2f}"}
    if with_lists:
        bounds["bound of lists"] = f"{row['bound_of_lists']:.2f}"
    return speeds | numbers | ratios | bounds


def written(values: dict[str, float]) -> str:
    if values["min"] == values["max"]:
        return f"{values['median']:.2f}"
    return f"{values['median']:.2f} [{values['min']:.2f}–{values['max']:.2f}]"


def draw(rows: dict[str, dict], limits: list[dict], tokens_a_pair: float, file: Path, title: str) -> None:
    """A bar for each contender, and beside it what it would reach with no pad and no token computed twice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    on_gpu = limits[0]["device"] == "cuda"
    figure, axes = pyplot.subplots(figsize=(8, 0.6 * len(rows) + 1.6), layout="constrained")
    for height, (name, row) in enumerate(rows.items()):
        speed = row["pairs_per_second" if on_gpu else "pairs_per_cpu_second"]
        whiskers = [[speed["median"] - speed["min"]], [speed["max"] - speed["median"]]]
        color = "tab:blue" if name in row["ours_faster"] else "lightgrey"
        axes.barh(height, speed["median"], xerr=whiskers, color=color, capsize=4)
        reached = speed["median"] * row["bound"]
        axes.plot([reached] * 2, [height - 0.4, height + 0.4], color="black", linestyle=":")
    axes.plot([], [], color="black", linestyle=":", label="at this speed per token, each of P + C + R computed once")
    rate = statistics.median(limit["tokens_per_second"] for limit in limits) / tokens_a_pair
    axes.axvline(rate, color="tab:red", label="matrix products of the model's layers alone")
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel(f"pairs per {'second' if on_gpu else 'CPU second'}: median, least and most")
    axes.set_title(title, fontsize="medium")
    figure.legend(loc="outside lower center", fontsize="small", frameon=False)
    figure.savefig(file, dpi=120)
