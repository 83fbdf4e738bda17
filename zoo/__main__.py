"""``python -m zoo`` lists the models: parameters and whether they are bijective, counted on the meta device."""

import sys

import torch
from rich.console import Console
from rich.table import Table

import zoo


def main() -> int:
    """Prints the table."""
    table = Table("model", "parameters", "bijective", "what it is")
    for name in zoo.names():
        with torch.device("meta"):
            net = zoo.create(name)
        bijective = "-" if not isinstance(net, zoo.IRevNet) else "yes" if net.body.bijective else "no"
        summary = (getattr(zoo, name).__doc__ or "").splitlines()[0]
        table.add_row(name, f"{sum(p.numel() for p in net.parameters()):,}", bijective, summary)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
