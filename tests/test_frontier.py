"""The picture of time against memory."""

from benchmarks.frontier import BUDGETS, OTHERS, OURS, draw, rival


def rows():
    """Contenders from the least memory to the most, each faster than the one before."""
    names = [*OTHERS, *reversed(OURS)]
    return {
        name: {"peak": 2**20 * (10 + 5 * i), "ratio": (2 - i / 20, 1.9 - i / 20, 2.1 - i / 20), "times": times(20 - i)}
        for i, name in enumerate(names)
    }


def times(seconds):
    return [{"forward": seconds / 3, "step": seconds}] * 4


def test_every_contender_is_in_the_legend_by_a_readers_name(tmp_path):
    draw({"stack": rows(), "irevnet_b": rows()}, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    for name in ("Store()", "Recompute(every=√depth)", "RevTorch", "torch's checkpoint, per block", "Budget, from"):
        assert picture.count(f"<!-- {name}") == 1  # matplotlib writes every text as a comment


def test_a_rival_is_the_fastest_of_ours_within_the_bytes():
    found = rows()
    assert rival(found, "revlib") is None  # the peers need less than all of ours here
    found["revlib"]["peak"] = found["store"]["peak"]
    assert rival(found, "revlib") == "store"
    found["revlib"]["peak"] = found[BUDGETS[0]]["peak"]
    assert rival(found, "revlib") == BUDGETS[0]
