"""What a person sees of a run (rank 0 only), and what is written for machines."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .job import Job

KEYS = {
    "exact": ("texts", "perplexity", "seconds", "bytes_sent"),
    "compressed": ("texts", "perplexity", "seconds", "bytes_sent", "token_agreement", "bytes_exact"),
}


def printable(text: str) -> str:
    """What a model says may hold control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


class Stream:
    """Shows one run's text as it comes."""

    def __init__(self, console: Console | None, title: str) -> None:
        self._console, self._title = console, title

    def begin(self, prompt: str) -> None:
        if self._console:
            self._console.print(Text.assemble((f"[{self._title}] ", "cyan"), (prompt, "bold")), end="", soft_wrap=True)

    def write(self, piece: str) -> None:
        if self._console:
            self._console.print(printable(piece), end="", markup=False, highlight=False, soft_wrap=True)

    def end(self, index: int) -> None:
        if self._console:
            self._console.print()


class Report:
    """Streams, tables and the JSON file of one job."""

    def __init__(self, job: Job, rank: int) -> None:
        self._job = job
        self._console = Console(highlight=False, emoji=False) if rank == 0 else None

    def stream(self, title: str) -> Stream:
        return Stream(self._console, title)

    def finish(self, results: dict[str, dict]) -> None:
        """results: "exact" and/or "compressed" -> measurements. Prints the tables, writes the JSON."""
        if self._console is None:
            return
        self._console.print()
        if len(results) == 2:
            self._console.print(self._side_by_side(results))
        self._console.print(self._figures(results))
        if self._job.json:
            self._job.json.write_text(json.dumps(self.as_json(results), indent=2) + "\n", encoding="utf-8")

    def as_json(self, results: dict[str, dict]) -> dict:
        """The documented JSON: see docs/generate.md."""
        spec = self._job.config.spec if self._job.config else "exact"
        return {
            "model": str(self._job.model),
            "engine": self._job.engine,
            "tp": self._job.tp,
            "comm": spec,
            **{name: {key: result[key] for key in KEYS[name] if key in result} for name, result in results.items()},
        }

    def _side_by_side(self, results: dict[str, dict]) -> Table:
        table = Table(show_lines=True, expand=True)
        table.add_column("prompt", style="bold", ratio=1)
        table.add_column("exact", ratio=2)
        table.add_column(
            f"{self._job.config.spec}{' (dim: no longer the same)' if self._console.is_terminal else ''}", ratio=2
        )
        for prompt, exact, compressed in zip(
            self._job.prompts, results["exact"]["texts"], results["compressed"]["texts"], strict=True
        ):
            same = next(
                (i for i, (a, b) in enumerate(zip(exact, compressed, strict=False)) if a != b),
                min(len(exact), len(compressed)),
            )
            table.add_row(
                Text(prompt),
                Text(exact.strip()),
                Text(compressed[:same].lstrip()) + Text(compressed[same:].rstrip(), "dim"),
            )
        return table

    def _figures(self, results: dict[str, dict]) -> Table:
        table = Table(title=f"{self._job.model.name} · {self._job.engine} · TP={self._job.tp}")
        table.add_column("")
        for name in results:
            table.add_column(self._job.config.spec if name == "compressed" else "exact", justify="right")
        rows = {
            "perplexity": [f"{r['perplexity']:.3f}" if r["perplexity"] is not None else "-" for r in results.values()],
            "bytes sent per rank": [f"{r['bytes_sent']:,}" for r in results.values()],
            "same tokens": [f"{r['token_agreement']:.1%}" if "token_agreement" in r else "" for r in results.values()],
            "generation, s": [f"{r['seconds']:.2f}" for r in results.values()],
        }
        if len(results) == 2:
            table.add_column("change", justify="right")
            exact, compressed = results.values()
            if exact["perplexity"]:
                rows["perplexity"].append(f"{compressed['perplexity'] / exact['perplexity'] - 1:+.2%}")
            if compressed["bytes_sent"]:
                rows["bytes sent per rank"].append(f"{exact['bytes_sent'] / compressed['bytes_sent']:.2f}x fewer")
            rows["generation, s"].append(f"{compressed['seconds'] / exact['seconds'] - 1:+.0%}")
        for label, cells in rows.items():
            if any(cells):
                table.add_row(label, *cells)
        return table
