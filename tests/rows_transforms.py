"""Couplings by what they do to a stream: their rows of the catalogue."""

from tests.rows import Row

ROWS: dict[str, Row] = {}
