"""``python docs/check_site.py docs/_build/html`` checks the built site and prints one line per fault.

Links, anchors and pictures exist; nothing is fetched from elsewhere; what of accessibility can be seen in the text and
the style sheets is right; every public name is in ``objects.inv``; no page has more than 500 kB. It needs no network.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1])]  # the library of this checkout

from site_checks import CHECKS, Site  # noqa: E402


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (Path(arguments[0]) / "index.html").is_file():
        print("usage: python docs/check_site.py FOLDER, that of a built site with its index.html", file=sys.stderr)  # noqa: T201
        return 2
    site = Site(Path(arguments[0]))
    faults = [f"{check.__name__}: {fault}" for check in CHECKS for fault in check(site)]
    print("".join(f"{fault}\n" for fault in faults) + f"{len(site.pages)} pages checked, faults: {len(faults)}")  # noqa: T201
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
