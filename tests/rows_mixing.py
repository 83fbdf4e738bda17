"""Layers that mix, normalise or bend channels: their rows of the catalogue."""

from tests.rows import Row

ROWS: dict[str, Row] = {}
