"""Layers that change the size of space, pad, or draw random numbers: their rows of the catalogue."""

from tests.rows import Row

ROWS: dict[str, Row] = {}
