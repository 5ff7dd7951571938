"""How far the cost model is off: modelled times against our own shaped links, and against what others published.

Parameters of machines.json are fitted; of each source a part is held out, fitted without and then predicted. Nothing is
measured here: the same files, the same figures.

    python benchmarks/cost_model.py --machine mine.json    # as megatron_lowbit/tuning/machines.py describes
    python benchmarks/cost_model.py --fit --write      # after benchmarks/results/link.json was measured anew
    python benchmarks/cost_model.py --json benchmarks/results/cost_model.json --plot docs/cost_model.png
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import cost_model_cases
import cost_model_fit
from common import RESULTS, save, show
from cost_model_cases import Case

from megatron_lowbit.errors import ConfigError
from megatron_lowbit.tuning import cost_model, machines
from megatron_lowbit.tuning.cost_model import EXACT, LLAMA_3_70B, Way
from megatron_lowbit.tuning.machines import Machine

HELD_GBIT, HELD_RANKS = 1, 4
FITTED_TP = ("QuickReduce, TP 2", "QuickReduce, TP 8")  # the first also alone
LARGE = 1 << 20  # bytes, from which on bandwidth and codecs count for more than what it takes to start
SPEC = "int4:g32"
BYTES, TOKENS = 16 << 20, 4096


def compared(
    links: Sequence[Case], nodes: Sequence[Case] = (), prefills: Sequence[Case] = ()
) -> tuple[list[dict], list[dict]]:
    """(a row of errors for each part of each source, every single case)."""
    one, others = machines.shaped(1), cost_model_cases.published()
    on_links = lambda given: lambda case: cost_model_fit.shaped(one, case.rate, given)  # noqa: E731
    by_rate = [case for case in links if case.rate != HELD_GBIT]
    by_ranks = [case for case in links if case.world != HELD_RANKS]
    mesh = [case for case in others if case.machine == cost_model_fit.MI300X]
    switch = [case for case in others if case.machine == cost_model_fit.B200]
    known = machines.described()
    parts = [
        ("shaped links, all", links, "all of them", on_links(cost_model_fit.fit_shaped(links)), False),
        (f"shaped links, {HELD_GBIT} Gbit/s", _but(links, by_rate), "other rates",
         on_links(cost_model_fit.fit_shaped(by_rate)), True),
        (f"shaped links, {HELD_RANKS} ranks", _but(links, by_ranks), "2 ranks",
         on_links(cost_model_fit.fit_shaped(by_ranks)), True),
    ]  # fmt: skip
    for source in dict.fromkeys(case.source for case in mesh):
        own = [case for case in mesh if case.source == source]
        parts.append((f"MI300X, {source}", own, "QuickReduce, TP 2 and 8",
                      lambda case: known[case.machine], source not in FITTED_TP))  # fmt: skip
    given = cost_model_fit.fit_shaped(links)
    for name, cases, fitted_to in (("several nodes", nodes, "one node"), ("TTFT", prefills, "all-reduces alone")):
        if cases:
            parts.append((f"shaped links, {name}", cases, fitted_to,
                          lambda case: case.within(cost_model_fit.shaped(one, case.rate, given)), True))  # fmt: skip
    base = machines.named(cost_model_fit.MI300X)
    two = cost_model_fit.fit_mesh([case for case in mesh if case.source == FITTED_TP[0]])
    for source in dict.fromkeys(case.source for case in mesh if case.source != FITTED_TP[0]):
        own = [case for case in mesh if case.source == source]
        parts.append(
            (f"MI300X by TP 2 alone, {source}", own, FITTED_TP[0], lambda _: cost_model_fit.mesh(base, two), True)
        )
    for label, test in (("compressed, two-shot", _trained), ("BF16 and one-shot", lambda case: not _trained(case))):
        own = [case for case in switch if test(case)]
        parts.append((f"8 B200, NVFP4 benchmark, {label}", own, "compressed, two-shot",
                      lambda case: known[case.machine], test is not _trained))  # fmt: skip
    return [errors(*part) for part in parts], [
        {"source": name, "held_out": held, "case": case.name, "measured_ms": 1e3 * case.seconds,
         "modelled_ms": 1e3 * case.modelled(machine(case))}
        for name, cases, _, machine, held in parts for case in cases
    ]  # fmt: skip


def enough(links: Sequence[Case]) -> bool:
    """Whether there is something to fit to and something to hold out: not after a run on loopback."""
    by_rate, by_ranks = {case.rate == HELD_GBIT for case in links}, {case.world == HELD_RANKS for case in links}
    return len(by_rate) == len(by_ranks) == 2


def _but(cases: Sequence[Case], others: Sequence[Case]) -> list[Case]:
    return [case for case in cases if case not in others]


def _trained(case: Case) -> bool:
    """What B200's parameters are fitted to."""
    return case.way.algorithm == "two-step" and case.way.spec.scatter.name != "bf16"


def errors(name: str, cases: Sequence[Case], fitted: str, machine: Callable[[Case], Machine], held: bool) -> dict:
    found = [abs(case.modelled(machine(case)) / case.seconds - 1) for case in cases]
    worst = max(range(len(cases)), key=found.__getitem__)
    large = [error for error, case in zip(found, cases, strict=True) if case.bytes >= LARGE]
    return {
        "source": name, "fitted_to": fitted, "held_out": held, "cases": len(cases),
        "median_error": statistics.median(found), "median_error_large": statistics.median(large) if large else None,
        "worst_error": found[worst], "worst_case": cases[worst].name,
    }  # fmt: skip


def fitted(links: Sequence[Case]) -> list[Machine]:
    """The machines whose parameters are from measurements, as machines.json should have them."""
    base, others, given = machines.shaped(1), cost_model_cases.published(), cost_model_fit.fit_shaped(links)
    shaped = [
        cost_model_fit.shaped(machine, float(name.split()[1]), given)
        for name, machine in machines.described().items()
        if name.startswith(base.name.split()[0])
    ]
    mesh = cost_model_fit.fit_mesh([case for case in others if case.source in FITTED_TP])
    switch = cost_model_fit.fit_switch(
        [case for case in others if case.machine == cost_model_fit.B200 and _trained(case)]
    )
    found = [
        *shaped,
        cost_model_fit.mesh(machines.named(cost_model_fit.MI300X), mesh),
        cost_model_fit.switch(machines.named(cost_model_fit.B200), switch),
    ]
    return [cost_model_fit.rounded(machine) for machine in found]


def expected(own: Sequence[Machine]) -> list[dict]:
    """Modelled, for all known machines and `own`: what compression gains in an all-reduce, and in a Llama 3 70B."""
    rows, model = [], LLAMA_3_70B
    for machine in (*machines.described().values(), *own):
        world = 2 * machine.node if machine.node else 8 if machine.name == cost_model_fit.B200 else 4
        way = Way.of(SPEC, "hierarchical" if machine.node else "two-step")
        exact, low = (cost_model.all_reduce(machine, one, BYTES, world).total for one in (EXACT, way))
        row = {
            "machine": machine.name, "source": machine.source, "ranks": world, "algorithm": way.algorithm,
            "modelled_exact_ms": 1e3 * exact, "modelled_gain": exact / low,
        }  # fmt: skip
        if machine.flops and machine.memory:
            gate = lambda rows: cost_model.fastest(machine, [way], rows * model.hidden * 2, world)  # noqa: B023, E731
            first, least = (
                cost_model.time_to_first_token(machine, one, model, TOKENS, world) for one in (EXACT, gate(TOKENS))
            )
            token, shortest = (cost_model.time_per_token(machine, one, model, world) for one in (EXACT, gate(1)))
            row |= {
                "modelled_ttft_ms": 1e3 * first.total, "modelled_share": first.share,
                "modelled_ttft_gain": first.total / least.total, "modelled_token_ms": 1e3 * token.total,
                "modelled_token_gain": token.total / shortest.total,
            }  # fmt: skip
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=Path, default=RESULTS / "link.json", help="what benchmarks/link.py wrote")
    parser.add_argument(
        "--nodes", type=Path, default=RESULTS / "link_nodes.json", help="the same, of several nodes; may be missing"
    )
    parser.add_argument(
        "--ttft", type=Path, default=RESULTS / "ttft.json", help="what benchmarks/ttft.py wrote; may be missing"
    )
    parser.add_argument("--fit", action="store_true", help="print the machines as measurements say they are")
    parser.add_argument("--write", action="store_true", help="with --fit: into megatron_lowbit/tuning/machines.json")
    parser.add_argument("--machine", type=Path, nargs="+", default=[], metavar="FILE", help="of your own, in JSON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    if arguments.write and not arguments.fit:
        parser.error("--write writes what --fit finds: give both")
    measured = json.loads(arguments.link.read_text())
    links = cost_model_cases.shaped(measured["rows"])
    if not enough(links):
        print(f"{arguments.link} lacks shaped links of several rates and numbers of ranks: nothing is fitted or "
              "compared, machines and tables stay as they are", file=sys.stderr)  # fmt: skip
        return 0
    try:
        own = [machines.load(file) for file in arguments.machine]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.fit:
        found = fitted(links)
        print(json.dumps([machines.as_json(machine) for machine in found], indent=1))
        if arguments.write:
            cost_model_fit.write(found)
        return 0
    nodes, prefills = (
        json.loads(file.read_text()) if file.exists() else {"rows": []} for file in (arguments.nodes, arguments.ttft)
    )
    rows, cases = compared(links, cost_model_cases.shaped(nodes["rows"]), cost_model_cases.prefills(prefills))
    show(
        "error of modelled against measured times",
        ["source", "parameters fitted to", "", "cases", "median", "from 1 MiB", "worst", "the worst"],
        [[r["source"], r["fitted_to"], "held out" if r["held_out"] else "fitted", str(r["cases"]),
          f"{r['median_error']:.1%}", f"{r['median_error_large'] or math.nan:.1%}",
          f"{r['worst_error']:.0%}", r["worst_case"]] for r in rows],
    )  # fmt: skip
    expectations = expected(own)
    cell = lambda row, name, text: text.format(row[name]) if name in row else "not described"  # noqa: E731
    show(
        f"modelled: {SPEC}, an all-reduce of {BYTES >> 20} MiB, and {LLAMA_3_70B.name} with {TOKENS} tokens",
        ["machine", "ranks", "all-reduce, ms", "gain", "TTFT, ms", "share", "gain", "token, ms", "gain"],
        [[r["machine"], str(r["ranks"]), f"{r['modelled_exact_ms']:.3g}", f"{r['modelled_gain']:.2f}x",
          cell(r, "modelled_ttft_ms", "{:.4g}"), cell(r, "modelled_share", "{:.0%}"),
          cell(r, "modelled_ttft_gain", "{:.2f}x"), cell(r, "modelled_token_ms", "{:.3g}"),
          cell(r, "modelled_token_gain", "{:.2f}x")] for r in expectations],
    )  # fmt: skip
    about = {"spec": SPEC, "bytes": BYTES, "tokens": TOKENS, "model": LLAMA_3_70B.name}
    save(arguments.json, rows, link=measured["machine"], cases=cases, machines=expectations, **about)
    if arguments.plot:
        from cost_model_plot import plot

        plot(cases, arguments.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
