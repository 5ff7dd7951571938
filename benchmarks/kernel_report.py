"""Tables and the picture of the kernel benchmark, out of its rows."""

from __future__ import annotations

from pathlib import Path

SMALL, LARGE = 1 << 20, 1 << 26
COLUMNS = ["operation", "spec", "1 MiB, µs", "64 MiB, µs", "GB/s", "of copy", "definition", "compiled", "peers"]


def comparison(rows: list[dict], code: bool = False) -> list[list[str]]:
    """COLUMNS for every operation and spec. Others' times are multiples of ours, at 64 MiB. code: names as Markdown."""
    found = {(r["operation"], r["spec"], r["bytes"], r["candidate"]): r for r in rows}
    lines = []
    for operation, spec in dict.fromkeys((r["operation"], r["spec"]) for r in rows if r["candidate"] == "ours"):
        small = found.get((operation, spec, SMALL, "ours"))
        large = {name: row for (op, s, size, name), row in found.items() if (op, s, size) == (operation, spec, LARGE)}
        ours = large.pop("ours", {})
        times = {name: best(row) / best(ours) for name, row in large.items() if best(row) and best(ours)}
        others = [f"{name} {_times(times, name, row)}" for name, row in large.items()
                  if name not in ("copy", "definition", "compiled")]  # fmt: skip
        lines.append([
            f"`{operation}`" if code else operation, f"`{spec}`" if code else spec, _us(small), _us(ours),
            f"{ours['gb_s']:,.0f}" if "gb_s" in ours else "", f"{times['copy']:.0%}" if "copy" in times else "",
            _times(times, "definition", large.get("definition")), _times(times, "compiled", large.get("compiled")),
            ", ".join(others),
        ])  # fmt: skip
    return lines


def best(row: dict | None) -> float | None:
    """Median µs, in a graph if there is such a figure."""
    return (row.get("graph_us") or row.get("eager_us") or [None])[0] if row else None


def show_summary(rows: list[dict], dry_run: bool) -> None:
    """The table, or of a dry run what went wrong."""
    from common import show

    if dry_run:
        failed = [[r["candidate"], r["spec"], r["operation"], r["failed"]] for r in rows if "failed" in r]
        show(f"Dry run: {len(rows)} rows, {len(failed)} failed", ["candidate", "spec", "operation", "why"], failed)
    else:
        show("Kernels: median µs in a CUDA graph; others' times as multiples of ours", COLUMNS, comparison(rows))


def plot(rows: list[dict], path: Path) -> None:
    """Write a PNG: our share of a copy's bandwidth against the message's size, a panel for each operation."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {(r["candidate"], r["operation"], r["spec"], r["bytes"]): best(r) for r in rows}
    operations = list(dict.fromkeys(r["operation"] for r in rows))
    specs = list(dict.fromkeys(r["spec"] for r in rows))
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.5), sharex=True, sharey=True, layout="constrained")
    for axis, operation in zip(axes.flat, operations):
        for index, spec in enumerate(specs):
            points = sorted(
                (size, found["copy", operation, spec, size] / time)
                for (candidate, op, s, size), time in found.items()
                if (candidate, op, s) == ("ours", operation, spec) and time and found.get(("copy", op, s, size))
            )
            style = {"color": pyplot.cm.tab20(index % 20), "linestyle": "-" if index < 20 else "--", "marker": "o"}
            axis.plot(*(zip(*points) if points else ((), ())), **style, markersize=3, linewidth=1.2, label=spec)
        axis.axhline(0.85, color="#7F7F7F", linestyle=":", linewidth=1)
        axis.set_title(operation, fontsize=11)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.2)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(operations) :]:
        axis.axis("off")
    figure.supxlabel("bytes of the message in bf16")
    figure.supylabel("share of the bandwidth of a copy of as many bytes")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right", fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _us(row: dict | None) -> str:
    if row and "failed" in row:
        return "wrong" if row["failed"] == "wrong" else "failed"
    return f"{best(row):,.1f}" if row else ""


def _times(times: dict[str, float], name: str, row: dict | None) -> str:
    if row and "failed" in row:
        return "wrong" if row["failed"] == "wrong" else "failed"
    return f"{times[name]:.2f}×" if name in times else ""
