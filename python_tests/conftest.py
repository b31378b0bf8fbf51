"""Set-up for every test: the device, Hypothesis profiles, poisoned memory, a line of JSON for each result."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# workers share the cores, and so do what they start: a thread that waits for one of another worker's costs most of the time
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))

import pytest
import torch
from hypothesis import HealthCheck, settings

_slow_examples = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile(
    "quick", max_examples=60, deadline=None, derandomize=True, suppress_health_check=_slow_examples
)
settings.register_profile("long", max_examples=1000, deadline=None, suppress_health_check=_slow_examples)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
        help="where the op tests run; on the CPU Triton's kernels run under its interpreter",
    )  # fmt: skip
    parser.addoption("--results", help="file to which each test's result is added, a line of JSON")


def pytest_configure(config: pytest.Config) -> None:
    """Before spectral_kernels and triton are imported, which read the environment."""
    device = config.getoption("--device")
    if config.getoption("--results") and not hasattr(config, "workerinput"):
        os.environ["SPECTRAL_KERNELS_TEST_RESULTS"] = config.getoption("--results")
    # read by registry.py, also in the workers of pytest-xdist
    os.environ["SPECTRAL_KERNELS_TEST_DEVICE"] = device
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    else:
        os.environ.pop("TRITON_INTERPRET", None)
        # torch's deterministic products need it
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("SPECTRAL_KERNELS_TEST_RESULTS")
    # with pytest-xdist, in the process that the workers report to
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    lines = report.longreprtext.splitlines()
    why = next((line for line in reversed(lines) if line.startswith("E ")), lines[-1] if lines else "")
    line = {"phase": "right", "test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line | {"why": why[:300]}) + "\n")


@pytest.fixture(autouse=True)
def on_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a GPU the tests of a backend that runs there make their tensors there."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if os.environ["SPECTRAL_KERNELS_TEST_DEVICE"] == "cpu" or parameters.get("backend") not in ("triton", "cuda"):
        yield
        return
    with torch.device("cuda"):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is NaN or the largest integer, so that an element nobody wrote is seen."""
    torch.manual_seed(0)
    # some of torch's own CUDA ops have no deterministic form
    torch.use_deterministic_algorithms(True, warn_only=os.environ["SPECTRAL_KERNELS_TEST_DEVICE"] == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision can be imported, whichever torch it was built for."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    from torchvision_beside_cpu_torch import make_importable

    make_importable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A missing C++ library is a failed build, not a reason to leave its tests out; a missing GPU is."""
    from spectral_kernels.dispatch import backends

    if config.getoption("--device") == "cpu":
        # bench/gpu_check.py runs them where there is one
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("gpu")])
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    if backends.CPP_ERROR is not None and any("cpp" in item.nodeid for item in items):
        warnings.warn(f"the cpp tests will fail: {backends.CPP_ERROR}", stacklevel=1)
