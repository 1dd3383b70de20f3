"""``flexlora privacy``: epsilon of a federation with noise, or the noise that a budget needs."""

from __future__ import annotations

import math
from typing import Annotated, Any

from typer import Option

from flexlora.commands.options import PATH
from flexlora.errors import UserError
from flexlora.privacy.accounting import Mechanism, SamplingName, epsilon_of, noise_for

__all__ = ["privacy"]

NEIGHBOURS = {False: "a client joins or leaves", True: "a client is replaced"}


def privacy(
    clients: Annotated[int, Option(metavar="N", help="registered clients")],
    sample: Annotated[float, Option(metavar="SHARE", help="of the clients, in a round on average")],
    rounds: Annotated[int, Option(metavar="T", help="rounds of training")],
    delta: Annotated[float, Option(help="chance at which epsilon may fail, below 1/N")],
    noise: Annotated[
        float | None, Option(metavar="Z", help="deviation of the noise over the clip norm")
    ] = None,
    epsilon: Annotated[
        float | None, Option(metavar="BUDGET", help="find the noise for it, instead of --noise")
    ] = None,
    cap: Annotated[
        int, Option(metavar="COUNT", help="most clients of a Poisson round (0: no cap)")
    ] = 0,
    out: Annotated[
        str, Option(metavar="FILE.html", click_type=PATH, help="write a page with the picture")
    ] = "",
) -> None:
    if (noise is None) == (epsilon is None):
        given = "neither" if noise is None else "both"
        raise UserError(
            f"got {given} of --noise and --epsilon, expected one: the noise, to see its epsilon, "
            "or a budget epsilon, to find the noise."
        )
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}, expected at least 1.")
    if out and not out.endswith(".html"):
        raise UserError(f"--out is '{out}', expected a file name that ends in .html.")
    federation: dict[str, Any] = {"num_clients": clients, "sample_share": sample}
    ways = {"Poisson": federation}
    if cap:
        ways[f"Poisson, at most {cap}"] = {**federation, "cap": cap}
    names: dict[str, SamplingName] = {"fixed size": "fixed", "no amplification": "none"}
    ways |= {title: {**federation, "sampling": name} for title, name in names.items()}
    rows: list[tuple[str, Mechanism, float]] = []
    for title, keys in ways.items():
        if epsilon is not None:
            multiplier = _rounded_up(noise_for(epsilon, delta, rounds, **keys))
        else:
            assert noise is not None
            multiplier = noise
        mechanism = Mechanism(noise_multiplier=multiplier, **keys)
        rows.append((title, mechanism, epsilon_of([(mechanism, rounds)], delta)))
    _print(rows, rounds, delta)
    if out:
        from flexlora.report.privacy_page import write_privacy_page

        mechanisms = {title: mechanism for title, mechanism, _ in rows}
        print(f"Picture: {write_privacy_page(out, mechanisms, rounds, delta)}")


def _rounded_up(noise: float) -> float:
    """To the four digits that the table shows: rounded down, it might not keep the budget."""
    unit = 10.0 ** (math.floor(math.log10(noise)) - 3)
    return float(f"{math.ceil(noise / unit) * unit:.4g}")


def _print(rows: list[tuple[str, Mechanism, float]], rounds: int, delta: float) -> None:
    from rich.table import Table

    from flexlora.report.console import make_console

    first = rows[0][1]
    table = Table(
        title=f"{first.num_clients:,} clients, {first.sample_share:.4g} of them a round, "
        f"{rounds:,} rounds, delta {delta:g}"
    )
    table.add_column("sampling")
    table.add_column("noise multiplier", justify="right")
    table.add_column("epsilon", justify="right")
    table.add_column("protects where")
    for title, mechanism, spent in rows:
        noise, neighbours = mechanism.noise_multiplier, NEIGHBOURS[mechanism.replaces]
        table.add_row(title, f"{noise:.4g}", f"{spent:.4g}", neighbours)
    console = make_console()
    console.print(table)
    if delta * first.num_clients >= 1:
        console.print(
            f"delta is {delta:g} with {first.num_clients:,} clients: publishing the whole data of "
            f"one client would keep it. Use less than {1 / first.num_clients:.2g}.",
            soft_wrap=True,
        )
