"""How fast it is: bench."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from rich.table import Table
from tyro.conf import arg

from dynarep.cli.common import JsonArg, console, print_json, progress
from dynarep.errors import UserError


def bench(
    rounds: Annotated[int, arg(help="bursts of each kernel; medians are over them")] = 9,
    peers: Annotated[bool, arg(help="also other people's SAC, of requirements-bench.txt")] = False,
    processes: Annotated[bool, arg(help="also two processes of one thread against one of two")] = False,
    compiled: Annotated[bool, arg(help="compile our updates first, which takes minutes")] = False,
    json: JsonArg = False,
) -> None:
    """Time the updates beside the machine's matrix-multiply rate, on one thread, about a minute."""
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: at least 1.")
    from dynarep import bench as benchmarks  # PyTorch
    from dynarep.bench import processes as others

    parts: dict[str, Callable[..., Any]] = {"": benchmarks.run}
    if peers:
        others.require()
        parts["peers"] = others.peers
    if processes:
        others.require_two_cores()
        parts["processes"] = others.two_cores
    measured: dict[str, Any] = {"peers": [], "processes": []}
    for part, measure in parts.items():
        with progress(f"bench {part}".strip(), "rounds") as report:
            found = measure(rounds, compiled, lambda done, total, report=report: report(done, total, {}))
        measured |= {part: found} if part else found
    if json:
        print_json(measured)
        return
    _show(measured)


def _show(measured: dict[str, Any]) -> None:
    machine, screen = measured["machine"], console()
    how = f"MKL: {machine['mkl']}, updates {'compiled' if machine['compiled'] else 'eager'}"
    title = f"one thread, matrix products at {measured['gemm_gflops']:.0f} GFLOP/s ({how})"
    table = _table(title, "kernel", "ms", "GFLOP", "GFLOP/s", "of the matrix-multiply rate", "at least", "")
    for r in measured["rows"]:
        numbers = f"{r['ms']:.2f}", f"{r['gflop']:.3f}", f"{r['gflops']:.1f}", f"{r['efficiency']:.0%}"
        table.add_row(r["name"], *numbers, "" if r["target"] is None else f"{r['target']:.0%}", _verdict(r))
    screen.print(table)
    screen.print(_ratios("the same work in two ways", measured["ratios"]))
    if measured["peers"]:
        title = "beside other people's SAC: one thread each, optimisers included, replay sampling left out everywhere"
        screen.print(_ratios(title, measured["peers"]))
    if measured["processes"]:
        screen.print(_ratios("two cores, seconds of the clock per call", measured["processes"]))
    columns = "estimate with its interval", "ms", "rliable, ms", "times as long"
    table = _table("statistics, beside rliable", *columns)
    for r in measured["statistics"]:
        table.add_row(r["name"], *(f"{r[k] * 1e3:,.0f}" for k in ("seconds", "rliable_s")), f"{r['ratio']:,.0f}")
    screen.print(table)


def _ratios(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    columns = "ms", "other, ms", "times as fast", "rounds", "at least", ""
    table = _table(title, "what", *columns)
    for r in rows:
        numbers = f"{r['ms']:.2f}", f"{r['other_ms']:.2f}", f"{r['ratio']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}"
        table.add_row(r["name"], *numbers, "" if r["target"] is None else f"{r['target']:g}", _verdict(r))
    return table


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _verdict(row: dict[str, Any]) -> str:
    return "" if row["met"] is None else "met" if row["met"] else "missed"
