"""Write the tables of README.md and docs/ from the JSON in benchmarks/results/, so that no number is typed by hand.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`.

    python benchmarks/tables.py            # rewrite
    python benchmarks/tables.py --check    # exit code 1 if a file would change
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import accuracy_tables
import cost_model_tables
import kernel_report
import link_tables
import speed_tables

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ("int8:g128", "gauss5:g256", "int4:g32", "gauss4:g128:trellis", "gauss3:g256", "int2:g32")
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def markdown(columns: list[str], rows: list[list[str]], note: str) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), "", note, ""])


def measured(result: dict) -> str:
    m = result["machine"]
    return f"{m['cpu']}, {m['cores']} cores, torch {m['torch']}, {m['date']}; `{m['command']}`."


def accuracy(what: Callable[[list[dict]], tuple[list[str], list[list[str]]]], only: tuple[str, ...] = ()) -> str:
    """A table of accuracy_tables.py; of the specs `only`, if any are named."""
    result = load("accuracy")
    rows = [row for row in result["rows"] if not only or row["spec"] in only]
    columns, lines = what(rows)
    first = rows[0]
    figures = "KL divergence in thousandths of a nat"
    if what is not accuracy_tables.divergences:
        figures = f"Perplexity above exact ({first['perplexity_exact']:.2f}) with its 95 % interval"
    note = (
        f"{figures}; `{result['text']}` (SHA-256 `{result['text_sha256'][:12]}…`), {first['tokens']:,} tokens in "
        f"{first['windows']} windows, {result['dtype']}, simulated bit for bit. {measured(result)}"
    )
    return markdown(columns, lines, note)


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def tasks() -> str:
    """One row per metric and spec, question by question against the exact run."""
    result = load("tasks")
    facts = {row["spec"]: row for row in result["perplexity"]}
    lines = []
    for r in result["rows"]:
        right = r["kind"] == "proportion"
        score, scale, unit = ("{:.1%}", 0.01, "") if right else ("{:,.0f}", r["exact"] / 100, " %")
        change, low, high = (value / scale for value in (r["change"], *r["change_interval"]))
        bits = facts[r["spec"]]["bits_per_value"]
        lines.append([f"{r['task']} {r['metric']}", f"`{r['spec']}`", f"{bits:.2f}", score.format(r["exact"]),
                      score.format(r["value"]), f"{r['value'] / r['exact']:.1%}", f"{change:+.1f}{unit}",
                      f"{low:+.1f} … {high:+.1f}{unit}", _p(r["p_value"])])  # fmt: skip
    counts = {r["task"]: r["samples"] for r in result["rows"]}
    asked = ", ".join(f"{count} questions of {task}" for task, count in counts.items())
    note = (
        f"TP {result['rows'][0]['tp']}, two-step; `{result['text']}` (SHA-256 `{result['tasks_text_sha256'][:12]}…`), "
        f"{asked}, lm_eval {result['lm_eval']}; changes in points, of perplexities in percent. {measured(result)}"
    )
    columns = ["task", "spec", "bits", "exact", "score", "kept", "change", "95 % interval", "p"]
    return markdown(columns, lines, note)


def accuracy_cheapest() -> str:
    rows = load("accuracy")["rows"]
    bits = {row["spec"]: row["bits_per_value"] for row in rows}
    names = ", ".join(f"`{spec}` ({bits[spec]:.4g} bits)" for spec in accuracy_tables.cheapest(rows))
    limit = f"{accuracy_tables.LOSS:.0%}"
    return f"Within {limit} with 95 % confidence at every TP size and algorithm, fewest bits first: {names}.\n"


def demo() -> str:
    result = load("demo")
    exact, compressed = result["exact"], result["compressed"]
    rows = [
        ["perplexity", f"{exact['perplexity']:.3f}", f"{compressed['perplexity']:.3f}",
         f"{compressed['perplexity'] / exact['perplexity'] - 1:+.2%}"],
        ["bytes sent per rank", f"{exact['bytes_sent']:,}", f"{compressed['bytes_sent']:,}",
         f"{exact['bytes_sent'] / compressed['bytes_sent']:.2f}× fewer"],
        ["same tokens", "", f"{compressed['token_agreement']:.1%}", ""],
        ["generation, s", f"{exact['seconds']:.2f}", f"{compressed['seconds']:.2f}", "loopback, no slow link"],
    ]  # fmt: skip
    return markdown(["", "exact (bf16)", f"`{result['comm']}`", ""], rows, measured(result))


def codecs() -> str:
    result = load("codecs")
    rows = [
        [f"`{r['spec']}`", r["backend"], r["dtype"], f"{r['bits_per_value']:.3f}", f"{r['encode_gb_s']:.2f}",
         f"{r['decode_gb_s']:.2f}"]
        for r in result["rows"]
    ]  # fmt: skip
    note = f"One core, {result['values']:,} values, bf16-equivalent, median of {result['repeats']}. " + measured(result)
    return markdown(
        ["spec", "backend", "input", "bits per value", "encode, GB/s", "decode-accumulate, GB/s"], rows, note
    )


def evaluating() -> str:
    """One row per spec, one column per dtype and TP size."""
    result = load("evaluating")
    ratio = {(r["spec"], r["dtype"], r["tp"]): r["ratio"] for r in result["rows"]}
    columns = list(dict.fromkeys((dtype, tp) for _, dtype, tp in ratio))
    specs = dict.fromkeys(spec for spec, *_ in ratio)
    lines = [[f"`{spec}`", *(f"{ratio[(spec, *column)]:.2f}×" for column in columns)] for spec in specs]
    note = (
        f"Time of one more spec as a multiple of a plain perplexity run; the bundled model, {result['windows']} "
        f"windows of {result['length']} tokens, {result['threads']} thread; medians of ratios measured in turns, "
        f"window by window, on a machine that others used too. {measured(result)}"
    )
    return markdown(["spec", *(f"{dtype}, TP {tp}" for dtype, tp in columns)], lines, note)


def formats(name: str) -> str:
    result = load(name)
    methods = list(result["rows"][0]["sqnr_db"])
    rows = [[r["data"], str(r["bits"]), *(f"{r['sqnr_db'][m]:.2f}" for m in methods)] for r in result["rows"]]
    return markdown(["data", "bits", *methods], rows, f"SQNR in dB, groups of {result['group']}. {measured(result)}")


def calibration() -> str:
    result = load("calibration")
    rows = [[str(r["tp"]), str(r["samples"]), f"{r['gamma']:g}", f"{r['overlap']:.0%}", f"{r['overlap_least']:.0%}",
             f"{r['times']:.1f}×", f"{r['times_most']:.1f}×", f"{r['sum_agreement']:.0%}"]
            for r in result["rows"]]  # fmt: skip
    note = (
        f"`{result['text']}` (SHA-256 `{result['text_sha256'][:12]}…`), windows of {result['window']} tokens; means "
        f"and medians over all sites; by chance the overlap would be {result['rows'][0]['chance']:.1%}. "
        f"{measured(result)}"
    )
    columns = ["TP", "windows", "gamma", "overlap", "at the worst site", "outliers' range / median range",
               "at the widest site", "outliers that are the sum's too"]  # fmt: skip
    return markdown(columns, rows, note)


def quality() -> str:
    """Known distributions, one hop."""
    result = load("quality")
    found = {(r["data"], r["spec"]): r for r in result["rows"] if not r["tp"]}
    names = list(dict.fromkeys(data for data, _ in found))
    lines = []
    for spec in dict.fromkeys(spec for _, spec in found):
        gaussian = found["Gaussian", spec]
        lines.append([f"`{spec}`", f"{gaussian['bits_per_value']:.3f}", f"{gaussian['shannon_db']:.1f}",
                      *(f"{found[name, spec]['sqnr_db']:.2f}" for name in names)])  # fmt: skip
    rows, features = result["shape"]
    note = f"SQNR in dB, one hop, {rows} × {features} values of bf16. {measured(result)}"
    return markdown(["spec", "bits", "bound", *names], lines, note)


def quality_model() -> str:
    """A model's partial sums, one row per spec."""
    result = load("quality")
    found = {(r["tp"], r["hop"], r["spec"]): r for r in result["rows"] if r["tp"]}
    tps = sorted({tp for tp, _, _ in found}, reverse=True)
    lines = []
    for spec in dict.fromkeys(spec for _, _, spec in found):
        sums = [found[tp, "two-step", spec] for tp in tps]
        cells = [f"{row['sqnr_db']:.2f}" for row in [*sums, found[tps[0], "one hop", spec]]]
        cells[1:1] = [f"{sums[0]['mean_of_sites_db']:.2f}", f"{sums[0]['worst_site_db']:.2f}"]
        lines.append([f"`{spec}`", f"{sums[0]['bits_per_value']:.3f}", *cells])
    columns = ["spec", "bits", f"TP {tps[0]}", "mean of sites", "worst site", *(f"TP {tp}" for tp in tps[1:])]
    note = (
        f"SQNR in dB of the sum after two-step, all sites' energies together; mean and worst of the sites at "
        f"TP {tps[0]}; one hop: of the partial sums themselves. `{result['text']}` (SHA-256 "
        f"`{result['text_sha256'][:12]}…`): calibrated on its first {result['tokens_calibrated']:,} tokens, measured "
        f"on the {result['tokens_measured']:,} that follow. {measured(result)}"
    )
    return markdown([*columns, f"one hop, TP {tps[0]}"], lines, note)


def quality_targets() -> str:
    result = load("quality")
    lines = [
        [g["goal"], f"{g['needed_db']:g}", f"{g['db']:.2f}", f"`{g['spec']}`", f"{g['bits_per_value']:.3f}",
         "yes" if g["met"] else "no"]
        for g in result["targets"]
    ]  # fmt: skip
    return markdown(["goal", "dB needed", "reached", "by", "bits", "met"], lines, measured(result))


def spike() -> str:
    result = load("spike_formats")
    rows = [[f"`{r['spec']}`", f"{r['bits_per_value']:.2f}", *(f"{v:.1f}" for v in r["sqnr_db"].values())]
            for r in result["specs"]]  # fmt: skip
    return markdown(["spec", "bits per value", *result["specs"][0]["sqnr_db"]], rows, f"SQNR in dB. {measured(result)}")


def alternatives() -> str:
    result = load("alternatives")
    rows = [[r["variant"], f"{r['bits_per_value']:.3f}", f"{r['sqnr_db']['Gaussian']:.2f}",
             f"{r['sqnr_db']['Student t(3)']:.2f}" if "Student t(3)" in r["sqnr_db"] else ""]
            for r in result["rows"]]  # fmt: skip
    note = f"SQNR in dB, one hop, {result['values']:,} values. {measured(result)}"
    return markdown(["variant", "bits", "Gaussian", "Student t(3)"], rows, note)


def kernels() -> str:
    """One row per operation and spec, once there are measurements."""
    if not (ROOT / "benchmarks" / "results" / "kernels.json").exists():
        return "**Nothing has been measured yet**: no GPU was at hand. `make bench-gpu` writes its table here.\n"
    result = load("kernels")
    m = result["machine"]
    note = (
        f"Medians in a CUDA graph, with cold memory; others' times as multiples of ours, at 64 MiB. {m['gpu']}, driver "
        f"{m['driver']}, torch {m['torch']}, triton {m['triton']}, {m['date']}; `{m['command']}`."
    )
    missing = ", ".join(result["missing"])
    note += f" Not installed there: {missing}." if missing else ""
    picture = (
        "\n![Share of the bandwidth of a copy against the size of the message, for every operation](kernels.png)\n"
    )
    return markdown(kernel_report.COLUMNS, kernel_report.comparison(result["rows"], code=True), note) + picture


def kernels_predicted() -> str:
    """One row per spec: µs of each operation, its share of a copy's speed, and what it would be bound by."""
    result = load("kernels_predicted")
    rows = {(r["spec"], r["operation"]): r for r in result["rows"]}
    operations = list(dict.fromkeys(operation for _, operation in rows))
    cell = lambda r: f"{r['predicted_us']:.1f} ({r['share_of_copy']:.0%}, {r['bound_by']})" if r else ""  # noqa: E731
    lines = [[f"`{spec}`", *(cell(rows.get((spec, operation))) for operation in operations)]
             for spec in dict.fromkeys(spec for spec, _ in rows)]  # fmt: skip
    given, m = result["assumptions"], result["machine"]
    note = (
        f"**Predicted, not measured**: µs for {result['bytes'] >> 20} MiB of bf16 on an {result['gpu'].split()[1]}, "
        f"{result['wires']} wires where several are read; the share of a copy's bandwidth that follows; what is "
        f"slowest. {given['copy_bandwidth'] / 1e12:g} TB/s, {given['sms']} SMs, {given['clock'] / 1e9:g} GHz; triton "
        f"{m['triton']}, {m['date']}; `{m['command']}`."
    )
    return markdown(["spec", *(operation.replace("_", "-") for operation in operations)], lines, note)


def plan() -> str:
    """Plans under their budgets, then each spec everywhere, by their bits."""
    result = load("plan")
    planned = sorted(
        (r for r in result["rows"] if r["plan"]), key=lambda r: (r["plan"].split()[0], r["bits_per_value"])
    )
    uniform = sorted((r for r in result["rows"] if not r["plan"]), key=lambda r: r["bits_per_value"])
    rows = []
    for r in [*planned, *uniform]:
        kind, _, value = (r["plan"] or "").partition(" ")
        name = f"`{r['spec']}`" if not kind else f"**plan, at most {value}{' bits' if kind == 'bits' else ''}**"
        predicted = f"{r['kl_predicted']:.5f}" if "kl_predicted" in r else ""
        low, high = r["loss_interval"]
        loss = f"{r['loss']:+.2%} ± {(high - low) / 2:.2%}"
        kl = f"{r['kl_mean']:.5f} ± {r['kl_error']:.5f}"
        rows.append([name, f"{r['bits_per_value']:.3f}", f"{r['bytes_per_token']:,.0f}", predicted, kl, loss])
    held = result["rows"][0]
    note = (
        f"{held['windows']} held-out windows of {result['window_length']} tokens of `{result['text']}` (SHA-256 "
        f"`{result['text_sha256'][:12]}…`); TP {result['tp']}, {result['algorithm']}, {result['dtype']}; KL divergence "
        f"with its standard error, loss with half of its 95 % interval. {measured(result)}"
    )
    return markdown(["", "bits", "bytes per token", "KL predicted", "KL, nats", "perplexity"], rows, note)


def thresholds() -> str:
    result = load("link")
    note = f"Bytes of the bf16 message; in brackets what `links.py` holds for this kind. {measured(result)}"
    return markdown(*speed_tables.thresholds(result["rows"]), note)


def ttft() -> str:
    result = load("ttft")
    return markdown(*speed_tables.first_tokens(result["rows"]), speed_tables.note(result) + measured(result))


def cost_model() -> str:
    result = load("cost_model")
    links = result["link"]
    note = (
        f"Error: modelled over measured time, less one; shaped links: {links['cpu']}, {links['cores']} cores, "
        f"{links['date']}; "
        f"others as published (`benchmarks/published_all_reduce.json`). `{result['machine']['command']}`."
    )
    return markdown(*cost_model_tables.errors(result), note)


def cost_machines() -> str:
    result = load("cost_model")
    note = (
        f"**Modelled, not measured**: `{result['spec']}`; {result['model']}, a prefill of {result['tokens']:,} tokens, "
        f"and a step of decoding one. `{result['machine']['command']}`."
    )
    return markdown(*cost_model_tables.machines(result), note)


TABLES = {
    "accuracy": lambda: accuracy(accuracy_tables.losses),
    "accuracy-short": lambda: accuracy(accuracy_tables.losses, SHORT),
    "accuracy-kl": lambda: accuracy(accuracy_tables.divergences),
    "accuracy-goals": lambda: accuracy(accuracy_tables.goals),
    "accuracy-halves": lambda: accuracy(accuracy_tables.halves),
    "accuracy-cheapest": accuracy_cheapest,
    "demo": demo,
    "tasks": tasks,
    "codecs": codecs,
    "cost-machines": cost_machines,
    "cost-model": cost_model,
    "evaluating": evaluating,
    "calibration": calibration,
    "alternatives": alternatives,
    "kernels": kernels,
    "link": lambda: markdown(*link_tables.sizes(load("link"), measured)),
    "link-short": lambda: markdown(*link_tables.largest(load("link"), measured)),
    "link-chunks": lambda: markdown(*link_tables.chunks(load("link_chunks"), measured)),
    "link-gate": lambda: markdown(*link_tables.gate(load("link"), measured)),
    "thresholds": thresholds,
    "ttft": ttft,
    "link-nodes": lambda: markdown(*link_tables.nodes(load("link_nodes"), measured)),
    "kernels-predicted": kernels_predicted,
    "plan": plan,
    "quality": quality,
    "quality-model": quality_model,
    "quality-targets": quality_targets,
    "scale-formats": lambda: formats("scale_formats"),
    "spike": spike,
    "spike-formats": lambda: formats("spike_formats"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for file in FILES:
        text = file.read_text()
        new = BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[3], text)
        if new != text:
            stale.append(file.name)
            if not check:
                file.write_text(new)
    print(f"{'stale' if check else 'rewritten'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
