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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def markdown(columns: list[str], rows: list[list[str]], note: str) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), "", note, ""])


def measured(result: dict) -> str:
    m = result["machine"]
    return f"{m['cpu']}, {m['cores']} cores, torch {m['torch']}, {m['date']}; `{m['command']}`."


def accuracy(specs: list[str] | None = None) -> str:
    """One row per spec, one column per TP size."""
    result = load("perplexity")
    rows = {(r["spec"], r["tp"]): r for r in result["rows"]}
    tps = sorted({tp for _, tp in rows})
    lines = []
    for spec in specs or list(dict.fromkeys(r["spec"] for r in result["rows"])):
        cells = [f"{rows[spec, tps[0]]['times_fewer_bytes_than_bf16']:.2f}×",
                 f"{rows[spec, tps[-1]]['times_fewer_bytes_than_bf16']:.2f}×"]  # fmt: skip
        for tp in tps:
            row = rows[spec, tp]
            cells.append(f"{row['loss_percent']:+.2f} % ± {row['loss_percent_standard_error']:.2f}")
        lines.append([f"`{spec}`", *cells])
    columns = ["spec", f"fewer bytes than bf16, TP {tps[0]}", f"TP {tps[-1]}", *(f"perplexity, TP {tp}" for tp in tps)]
    note = (
        f"`{result['text']}` (SHA-256 `{result['text_sha256'][:12]}…`), the first {result['tokens']:,} tokens, "
        f"exact perplexity {result['rows'][0]['perplexity_exact']:.2f}; loss with one standard error of the paired "
        f"difference; TP 2 one-shot, else two-step, simulated bit for bit. {measured(result)}"
    )
    return markdown(columns, lines, note)


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


def threshold() -> str:
    result = load("threshold")
    rows = [[f"{r['bytes']:,}", f"{r['exact_ms']:.3f}", f"{r['compressed_ms']:.3f}",
             f"{r['exact_ms'] / r['compressed_ms']:.2f}×"] for r in result["rows"]]  # fmt: skip
    note = f"{result['ranks']} ranks, {result['link']}, gloo, medians. {measured(result)}"
    return markdown(["bytes (bf16)", "exact, ms", f"`{result['spec']}`, ms", "exact / compressed"], rows, note)


def formats(name: str) -> str:
    result = load(name)
    methods = list(result["rows"][0]["sqnr_db"])
    rows = [[r["data"], str(r["bits"]), *(f"{r['sqnr_db'][m]:.2f}" for m in methods)] for r in result["rows"]]
    return markdown(["data", "bits", *methods], rows, f"SQNR in dB, groups of {result['group']}. {measured(result)}")


def spike() -> str:
    result = load("spike_formats")
    rows = [[f"`{r['spec']}`", f"{r['bits_per_value']:.2f}", *(f"{v:.1f}" for v in r["sqnr_db"].values())]
            for r in result["specs"]]  # fmt: skip
    return markdown(["spec", "bits per value", *result["specs"][0]["sqnr_db"]], rows, f"SQNR in dB. {measured(result)}")


TABLES = {
    "accuracy": accuracy,
    "accuracy-short": lambda: accuracy(["int8:g128", "int6:g64", "int4:g32", "int3:g32", "int2:g32:sym"]),
    "demo": demo,
    "codecs": codecs,
    "threshold": threshold,
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
