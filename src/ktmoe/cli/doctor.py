"""``ktmoe doctor``: what this machine is, which kernels will run, and what stands in the way."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.markup import escape
from rich.table import Table

from ktmoe.cli import console
from ktmoe.cli.checks import ERROR, INFO, OK, WARN, Row, run_checks

HELP = "Check this machine: CPU and kernels, cores, memory, packages. Exit code 1 if something cannot work."

_STYLE = {OK: "green", INFO: "dim", WARN: "yellow", ERROR: "bold red"}


def doctor(as_json: bool = typer.Option(False, "--json", help="Print the rows as JSON.")) -> None:
    """Prints one row per check; exits with 1 if a row is an error."""
    rows = run_checks()
    if as_json:
        # Not through rich: it would wrap the text to the width of the terminal.
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        console.out.print(_table(rows))
        console.out.print(_summary(rows))
    if any(row.verdict == ERROR for row in rows):
        raise typer.Exit(1)


def _table(rows: list[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("check", "found", "verdict", "fix"):
        table.add_column(title, overflow="fold", no_wrap=title in ("check", "verdict"))
    for row in rows:
        style = _STYLE[row.verdict]
        table.add_row(row.check, escape(row.found), f"[{style}]{row.verdict}[/]", escape(row.fix))
    return table


def _summary(rows: list[Row]) -> str:
    errors = sum(row.verdict == ERROR for row in rows)
    warnings = sum(row.verdict == WARN for row in rows)
    if errors:
        return f"\n[bold red]{errors} error(s)[/], {warnings} warning(s)"
    return f"\n[green]Ready.[/] {warnings} warning(s)" if warnings else "\n[green]Ready.[/]"
