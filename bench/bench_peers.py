"""Selection, log-determinants, diversity scores and covariances: against the libraries one would install instead.

Those that are not installed are named as absent. The objective that each contender's rows reach stands beside its time:
farthest-point sampling has another aim, and stochastic optimisers give some of theirs away.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from bench_greedy import D, K, N, all_rows, check_all_rows, check_logdet, logdet, make_pool
from harness import Job
from torch import Tensor

import spectral_kernels as sk

PAUSE = 0.2  # OpenBLAS's threads spin for 0.1 s after a product


def rows_of(pool: Tensor, chosen: Any) -> Tensor:
    """The rows that a contender returns the numbers of."""
    return pool[torch.as_tensor(np.asarray(chosen), dtype=torch.int64)]


def _present(
    peers: dict[str, tuple[str, Callable[[Any], Callable[[], object]]]],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Contenders whose package is there, made from its module, and why the others are not."""
    calls, absent = {}, {}
    for label, (module, make) in peers.items():
        try:
            calls[label] = make(importlib.import_module(module))
        except Exception as error:  # a peer that does not import here is no contender
            absent[label] = f"{type(error).__name__}: {error}"
    return calls, absent


def jobs() -> Iterator[Job]:
    generator = torch.Generator().manual_seed(0)
    pool = make_pool(generator)
    unit = torch.nn.functional.normalize(pool)
    yield _effective_rank(pool, unit)
    yield _log_determinant(pool, unit)
    yield _diversity_score(pool[:1024])
    yield _covariance(torch.randn(65536, 128, generator=generator))


def _effective_rank(pool: Tensor, unit: Tensor) -> Job:
    array = unit.numpy()

    def apricot(optimizer: str) -> Callable[[Any], Callable[[], object]]:
        def make(module: Any) -> Callable[[], object]:
            def select() -> object:
                # Σ (xᵢ·xⱼ)² over pairs of the batch is what order 2 lowers: apricot's sum redundancy
                similarity = np.square(array @ array.T, dtype=np.float64)
                selector = module.SumRedundancySelection(K, metric="precomputed", optimizer=optimizer, random_state=0)
                return selector.fit(similarity).ranking

            return select

        return make

    peers: dict[str, tuple[str, Callable[[Any], Callable[[], object]]]] = {
        "apricot, naive": ("apricot", apricot("naive")),
        "apricot, lazy": ("apricot", apricot("lazy")),
        "apricot, stochastic": ("apricot", apricot("stochastic")),
        "fpsample, exact": ("fpsample", lambda module: lambda: module.fps_sampling(array, K, start_idx=0)),
        "torch-fps": ("torch_fps", lambda module: lambda: _torch_fps(module, unit)),
    }
    calls, absent = _present(peers)
    return Job(
        f"peers: {K} diverse rows of {N}x{D}",
        {"spectral_kernels": lambda: all_rows(pool), **calls},
        lambda: check_all_rows(pool),
        {label: 10.0 for label in calls if label.startswith("apricot")},
        objective=lambda chosen: float(sk.effective_rank(rows_of(pool, chosen).double(), order=2)),
        absent=absent,
        pause=PAUSE,
    )


def _torch_fps(module: Any, unit: Tensor) -> Tensor:
    chosen = module.farthest_point_sampling(unit[None], torch.ones(1, len(unit), dtype=torch.bool), K)
    return (chosen[0] if isinstance(chosen, tuple) else chosen).reshape(-1)


def fast_map_dpp(kernel: np.ndarray, k: int) -> list[int]:
    """Greedy MAP of a DPP by incremental Cholesky (Chen, Zhang & Zhou 2018, algorithm 1)."""
    factors = np.zeros((k, len(kernel)))
    gains = kernel.diagonal().copy()
    chosen = [int(gains.argmax())]
    while len(chosen) < k:
        last, step = chosen[-1], len(chosen) - 1
        row = (kernel[last] - factors[:step, last] @ factors[:step]) / np.sqrt(gains[last])
        factors[step] = row
        gains -= row**2
        gains[chosen] = -np.inf
        chosen.append(int(gains.argmax()))
    return chosen


def _log_determinant(pool: Tensor, unit: Tensor) -> Job:
    array = unit.double().numpy()

    def submodlib(optimizer: str) -> Callable[[Any], Callable[[], object]]:
        def make(module: Any) -> Callable[[], object]:
            def select() -> object:
                function = module.LogDeterminantFunction(
                    n=N, mode="dense", lambdaVal=1.0, sijs=(array @ array.T / 1e-3).astype(np.float32)
                )
                found = function.maximize(
                    budget=K, optimizer=optimizer, stopIfZeroGain=False, stopIfNegativeGain=False, verbose=False,
                    show_progress=False,
                )  # fmt: skip
                return [row for row, _gain in found]

            return select

        return make

    calls, absent = _present({"submodlib, lazy": ("submodlib", submodlib("LazyGreedy"))})

    def sherman_morrison() -> list[int]:
        """The best numpy form: gains by rank-one updates of the inverse."""
        inverse = np.eye(D) / 1e-3
        gains = np.square(array).sum(1) / 1e-3
        chosen: list[int] = []
        for _ in range(K):
            pick = int(gains.argmax())
            chosen.append(pick)
            v = inverse @ array[pick]
            scale = 1 + array[pick] @ v
            inverse -= np.outer(v, v / scale)
            gains -= np.square(array @ v) / scale
            gains[chosen] = -np.inf
        return chosen

    return Job(
        f"peers: log-determinant, {K} of {N}x{D}",
        {
            "spectral_kernels": lambda: all_rows(pool, "logdet"),
            "numpy, Sherman-Morrison": sherman_morrison,
            "fast-map-dpp's algorithm": lambda: fast_map_dpp(np.eye(N) + array @ array.T / 1e-3, K),
            **calls,
        },
        lambda: check_logdet(pool, rows_of(pool, sherman_morrison())),
        {"numpy, Sherman-Morrison": 4.0, "submodlib, lazy": 15.0},
        objective=lambda chosen: logdet(rows_of(pool, chosen)),
        absent=absent,
        pause=PAUSE,
    )


def _diversity_score(pool: Tensor) -> Job:
    unit = torch.nn.functional.normalize(pool)
    array = unit.numpy()

    def make(module: Any) -> Callable[[], object]:
        return lambda: module.score_dual(array, normalize=False)

    calls, absent = _present({"vendi-score, dual": ("vendi_score.vendi", make)})

    def ours() -> float:
        return float(sk.effective_rank(pool))

    def check() -> None:
        values = torch.linalg.eigvalsh(unit.double().T @ unit.double() / len(unit)).clamp_min(0)
        exact = float(torch.exp(-torch.xlogy(values, values).sum()))
        assert abs(ours() - exact) <= 1e-4 * exact, f"{ours()} is not {exact}"

    return Job(
        "peers: Vendi score (order-1 effective rank) of 1024x128",
        {"spectral_kernels": ours, **calls},
        check,
        {},
        objective=lambda score: float(score),
        absent=absent,
        pause=PAUSE,
    )


def _covariance(z: Tensor) -> Job:
    array = z.numpy()

    def make(module: Any) -> Callable[[], object]:
        return lambda: module.ssyrk(1 / len(array), array.T)

    calls, absent = _present({"scipy ssyrk, the product alone": ("scipy.linalg.blas", make)})

    def ours() -> Tensor:
        return sk.covariance(z, normalize=True)

    def check() -> None:
        x = torch.nn.functional.normalize(z.double())
        error = float((ours() - torch.cov(x.T, correction=0)).abs().max() / torch.cov(x.T).abs().max())
        assert error <= 1e-5, f"relative error {error:.1e}"

    return Job(
        "peers: normalise, centre, covariance 65536x128",
        {"spectral_kernels": ours, **calls},
        check,
        {},
        absent=absent,
        pause=PAUSE,
    )
