"""Every test starts from one seed, on one thread, and draws the same examples each time."""

import os

import pytest
import torch
from hypothesis import settings

import invertible

collect_ignore = ["zoo/data/_server.py"]  # ignores signals where it is imported, and the tests' children would, too

settings.register_profile("fast", max_examples=20, deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", max_examples=500, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.set_num_threads(1)  # pytest runs two workers on two cores
    torch.manual_seed(0)


@pytest.fixture
def digits_once(tmp_path_factory, monkeypatch):
    """The embedded digits are written once for all tests, not once for each."""
    monkeypatch.setattr("zoo.data.opening.DIGITS", tmp_path_factory.getbasetemp() / "digits")


@pytest.fixture(autouse=True)
def _names_of_doctests(doctest_namespace):
    """Examples in docstrings see torch, nn and the library's public names, and begin with what they are about."""
    doctest_namespace.update({"torch": torch, "nn": torch.nn, "Tensor": torch.Tensor})
    doctest_namespace.update({name: getattr(invertible, name) for name in invertible.__all__})


def pytest_collection_modifyitems(config, items):
    """`gpu` tests skip themselves where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
