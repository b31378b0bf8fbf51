"""What a call costs on the host before the driver is asked for anything: microseconds of Python and dispatch per op.

    python bench/bench_host.py              the table
    python bench/bench_host.py --profile covariance

No GPU is needed: the launcher, the device and the stream are stubs, and CPU tensors stand for those on a GPU. A driver adds
5 to 6 µs a launch, and its allocator is torch's CPU allocator here.
"""

import argparse
import cProfile
import os
import pstats
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET") == "1":
    raise SystemExit("bench_host.py times the way to a GPU: unset TRITON_INTERPRET")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import spectral_kernels as sk  # noqa: E402
from spectral_kernels.dispatch import backends  # noqa: E402
from spectral_kernels.kernels import launch  # noqa: E402

REPEATS, TURNS = 20, 300


class Compiled:
    """A compiled kernel that does nothing."""

    function = 0
    packed_metadata = (4, 1, 0)
    launches = 0

    def run(self, *_: Any) -> None:
        Compiled.launches += 1


def stub() -> None:
    """Makes CPU tensors pass for those on a GPU."""
    compiled = Compiled()
    zeros = torch.zeros(1 << 20)
    setattr(launch, "current_device", lambda: -1)  # noqa: B010 (mypy: a stub)
    setattr(launch, "current_stream", lambda device: 0)  # noqa: B010
    setattr(launch, "through_triton", lambda *_: compiled)  # noqa: B010
    setattr(backends, "why_unavailable", lambda *_: None)  # noqa: B010
    for module in [module for name, module in sys.modules.items() if name.startswith("spectral_kernels.")]:
        if hasattr(module, "counters"):
            setattr(module, "counters", lambda like, count: zeros)  # noqa: B010
    sk.set_checks(False)


def cases() -> dict[str, Callable[[], object]]:
    """One call of each op, forward and with its backward, by Triton."""
    # small, so that allocations of memory are as cheap as they are of a GPU's; the way is that of large ones
    z, small = torch.randn(512, 32), torch.randn(64, 32)
    pool, indices = torch.randn(512, 32), torch.randint(512, (8, 64))
    wanting = torch.randn(512, 32, requires_grad=True)
    given = {"backend": "triton"}

    def with_backward(call: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def both() -> None:
            call(wanting).sum().backward()
            wanting.grad = None

        return both

    return {
        "covariance": lambda: sk.covariance(z, **given),
        "covariance of 64 rows": lambda: sk.covariance(small, **given),
        "covariance with backward": with_backward(lambda x: sk.covariance(x, **given)),
        "effective_rank": lambda: sk.effective_rank(z, order=2, **given),
        "effective_rank with backward": with_backward(lambda x: sk.effective_rank(x, order=2, **given)),
        "batch_effective_rank": lambda: sk.batch_effective_rank(pool, indices, **given),
        "info_nce": lambda: sk.info_nce(z, z, reduction="none", **given),
        "info_nce with backward": with_backward(lambda x: sk.info_nce(x, z, reduction="none", **given)),
        "nt_xent": lambda: sk.nt_xent(z, z, reduction="none", **given),
        "nt_xent with backward": with_backward(lambda x: sk.nt_xent(x, z, reduction="none", **given)),
        "info_nce_grad_norms": lambda: sk.info_nce_grad_norms(z, z, **given),
        "greedy_select": lambda: sk.greedy_select(pool, 16, start=0, **given),
    }


def microseconds(call: Callable[[], object]) -> float:
    """Processor time of one call: the fastest of many turns, for what else the machine does only adds."""
    for _ in range(20):
        call()
    turns = []
    for _ in range(TURNS):
        start = time.process_time()
        for _ in range(REPEATS):
            call()
        turns.append((time.process_time() - start) / REPEATS * 1e6)
    return min(turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="", help="where the time of this case goes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stub()
    calls = cases()
    if options.profile:
        calls[options.profile]()
        with cProfile.Profile() as profile:
            for _ in range(2000):
                calls[options.profile]()
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
        return
    print(f"{'µs':>7}  {'launches':>8}  call")
    for name, call in calls.items():
        call()
        before = Compiled.launches
        call()
        launches = Compiled.launches - before
        print(f"{microseconds(call):7.1f}  {launches:8}  {name}")


if __name__ == "__main__":
    main()
