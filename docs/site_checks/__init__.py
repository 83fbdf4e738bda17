"""Checks of the built site, each a function that takes a :class:`Site` and yields one line per fault."""

from .access import inaccessible
from .contents import heavy_files, missing_names
from .contrast import low_contrast
from .links import dead_links, outside_requests
from .page import Page, Site

CHECKS = (dead_links, outside_requests, inaccessible, low_contrast, missing_names, heavy_files)

__all__ = ["CHECKS", "Page", "Site"]
