"""The command line of the demo."""

from __future__ import annotations

import signal
import sys
from typing import Annotated

import typer
from rich.console import Console

from shop.demo.errors import DemoError
from shop.demo.show import Plan, show
from sqla_durable.errors import DurableError

_ALL = 511
_KILLS = 9  # a workflow that has lost ten workers fails: it may be what kills them


def demo(
    invoices: Annotated[int, typer.Option(min=1, max=_ALL, help="How many invoices of the file.")] = _ALL,
    workers: Annotated[int, typer.Option(min=1, help="How many workers at once.")] = 2,
    kills: Annotated[int, typer.Option(min=0, max=_KILLS, help="How often one of them is killed with SIGKILL.")] = 5,
    seed: Annotated[int, typer.Option(help="When, which one, and how the payment service fails.")] = 1,
    database: Annotated[
        str, typer.Option(help="The database made for it on the server; an old one of that name is dropped.")
    ] = "sqla_durable_shop_demo",
) -> None:
    """Run a shop on real invoices, kill its workers in the middle, and check every invoice afterwards.

    PostgreSQL comes from a wheel; set DATABASE_URL to use a server of your own.
    """
    console = Console()
    plan = Plan(invoices=invoices, workers=workers, kills=kills, seed=seed, database=database)
    try:
        differences = show(plan, console)
    except (DemoError, DurableError) as error:
        print(f"demo: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if differences:
        print("demo: not as the file says:", *differences, sep="\n  ", file=sys.stderr)
        raise typer.Exit(1)
    console.print(
        "\nStock, payments, refunds and shipments of every invoice are exactly what the file says, each once; "
        "of what failed or was called off, goods and money are back, each once."
    )


def main() -> None:
    """Run the demo; SIGTERM ends it as Ctrl-C does, with everything it started."""
    # Both: a shell that starts it in the background has SIGINT ignored.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.default_int_handler)
    try:
        typer.run(demo)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
