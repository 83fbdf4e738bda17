"""What fits: the search, on functions that are known, and on a small network."""

import pytest
import torch

from benchmarks import fits
from invertible import Reconstruct, Store


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("memory", [0, 99, 140, 1000, 12_345, 10**9])
def test_the_largest_is_found_in_a_few_steps(power, memory):
    asked = []

    def count(n):
        asked.append(n)
        return 100 + 7 * n**power + n % 3 * 5 + (40 if n > 20 else 0)  # not quite on the curve

    found, used = fits.largest(count, memory, power=power)
    assert found == 0 or used == count(found) <= memory
    assert count(found + 1) > memory
    assert len(asked) < 15


def test_a_line_is_checked():
    assert fits.line(lambda n: 100 + 7 * n, 10**4) == (1414, 9998)
    with pytest.raises(ArithmeticError, match="400 blocks are not on the line through 50 and 100"):
        fits.line(lambda n: n * n, 10**4)


def test_the_bytes_of_a_step():
    """Weights, gradients, momentum, statistics and the input are there; a strategy adds its own."""
    net, x = fits.tower(3)[0], torch.rand(2, 96, 4, 4, device="meta")
    weights = sum(p.numel() for p in net.parameters())
    statistics = sum(b.numel() * b.element_size() for b in net.buffers())
    assert fits.weights_of(net, x) == 12 * weights + statistics + 4 * x.numel()
    found = [fits.bytes_of_step((net, x), each) for each in (Store(), None, Reconstruct())]
    assert found[0] > max(found[1:])
    assert min(found) > fits.weights_of(net, x)


@pytest.mark.slow
def test_a_question_is_answered(monkeypatch):
    small = ("small", lambda n: fits.network("irevnet_small", n, 32), 1)
    monkeypatch.setitem(fits.QUESTIONS, "batch_b", small)
    batches = {name: fits.answer("batch_b", name, 20 * 10**6) for name in fits.STRATEGIES}
    assert batches["store"][0] < batches["recompute"][0] < batches["reconstruct"][0]
    assert batches["store"][0] < batches["budget"][0]
    assert all(used <= 20 * 10**6 for _, used in batches.values())
    monkeypatch.setitem(
        fits.QUESTIONS, "blocks", ("", lambda n: (fits.tower(n)[0], torch.rand(2, 96, 4, 4, device="meta")), 1)
    )
    monkeypatch.setattr(fits.line, "__kwdefaults__", {"at": (2, 4, 6)})
    assert fits.answer("blocks", "store", 10**7)[0] < fits.answer("blocks", "reconstruct", 10**7)[0]
