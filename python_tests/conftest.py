"""Set-up for every test: the Triton interpreter, Hypothesis profiles, poisoned memory."""

import os
import warnings

# read when spectral_kernels and triton are imported; a GPU run unsets it
os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from spectral_kernels import backends

_slow_examples = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "quick", max_examples=60, deadline=None, derandomize=True, suppress_health_check=_slow_examples
)
settings.register_profile("long", max_examples=1000, deadline=None, suppress_health_check=_slow_examples)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is NaN or the largest integer, so that an element nobody wrote is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A missing C++ library is a failed build, not a reason to skip its tests."""
    if backends.CPP_ERROR is not None and any("cpp" in item.nodeid for item in items):
        warnings.warn(f"the cpp tests will fail: {backends.CPP_ERROR}", stacklevel=1)
