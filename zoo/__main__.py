"""``python -m zoo`` lists the models, and ``python -m zoo NAME`` prints all that is known of one."""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

import zoo
from zoo.cards import HEADER, Card, cells
from zoo.flows.cards import FLOW_HEADER, FlowCard, flow_cells
from zoo.weights import WEIGHTS


def main(arguments: list[str] | None = None) -> int:
    """Prints the table or a card, and returns the exit code: 0, or 2 if there is no such model."""
    parser = argparse.ArgumentParser(prog="python -m zoo", description="Lists the models of the zoo.")
    parser.add_argument("name", nargs="?", help="print all that is known of this one; *, ? and [] select some")
    options = parser.parse_args(arguments)
    found = zoo.names(options.name or "*")
    if not found:
        print(f"error: no model {options.name!r}; there are {', '.join(zoo.names())}", file=sys.stderr)
        return 2
    console = Console(highlight=False)
    if found == [options.name]:
        return print_card(console, options.name)
    some = set(found)
    if classifiers := [name for name in zoo.names(kind="classifier") if name in some]:
        print_table(console, HEADER, map(cells, classifiers), left={0, 4})
        console.print(
            "GFLOP of one image's forward pass; top-1 error as reported, and as measured here", soft_wrap=True
        )
    if flows := [name for name in zoo.names(kind="flow") if name in some]:
        if classifiers:
            console.print()
        print_table(console, FLOW_HEADER, map(flow_cells, flows), left={0, 4})
        console.print("GFLOP of one log-density; megabytes of a training step for each datum", soft_wrap=True)
    return 0


def print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], *, left: set[int]) -> None:
    """Prints rows under their header, without lines."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, title in enumerate(header):
        table.add_column(title, justify="left" if i in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def print_card(console: Console, name: str) -> int:
    """Prints a card, or says that there is none."""
    try:
        card = zoo.card(name)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = card.lines() if isinstance(card, FlowCard) else lines_of(card)
    lines["weights"] = ", ".join(each.tag for each in WEIGHTS.values() if each.model == name) or "none"
    table = Table.grid(padding=(0, 2))
    for field, text in lines.items():
        table.add_row(field, text)
    console.print(table)
    return 0


def lines_of(card: Card) -> dict[str, str]:
    """The fields of a classifier's card as text."""
    lines = {key: str(value) for key, value in dataclasses.asdict(card).items() if isinstance(value, str)}
    lines |= {"parameters": f"{card.parameters:,}", "flops": f"{card.flops:,}", "size": f"{card.size} pixels"}
    lines["activations"] = ", ".join(f"{kept} {number:,}" for kept, number in card.activations.items()) + " bytes"
    lines["step"] = (
        ", ".join(f"{kept} {m:.2f} [{low:.2f}, {high:.2f}]" for kept, (m, low, high) in card.step.items()) or "-"
    )
    lines["reported"] = "\n".join(map(str, card.reported)) or "-"
    lines["measured"] = "\n".join(map(str, card.measured)) or "not run"
    lines["recipe"] = card.recipe or "-"
    return {each.name: lines[each.name] for each in dataclasses.fields(card)}


if __name__ == "__main__":
    sys.exit(main())
