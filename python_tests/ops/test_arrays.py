"""numpy's numbers and arrays, DLPack, lists: taken as their tensors are."""

import numpy as np
import pytest
import torch

import spectral_kernels as sk
from spectral_kernels import checks


class Capsule:
    """An array that offers DLPack and nothing else."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **options: object) -> object:
        return self.tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> object:
        return self.tensor.__dlpack_device__()


OPS = {
    "covariance": lambda a, b: sk.covariance(a),
    "spectrum": lambda a, b: sk.spectrum(a),
    "effective_rank": lambda a, b: sk.effective_rank(a, order=2),
    "rankme": lambda a, b: sk.rankme(a),
    "effective_rank_error": lambda a, b: sk.effective_rank_error(a),
    "batch_effective_rank": lambda a, b: sk.batch_effective_rank(a, [[0, 1, 2], [3, 4, 5]]),
    "whiten": lambda a, b: sk.whiten(a),
    "greedy_select": lambda a, b: sk.greedy_select(a, 4, candidates=None, start=0).indices,
    "pool_select": lambda a, b: sk.pool_select(a, 4, generator=torch.Generator().manual_seed(0)).indices,
    "info_nce": lambda a, b: sk.info_nce(a, b, queue=a),
    "nt_xent": lambda a, b: sk.nt_xent(a, b),
    "info_nce_grad_norms": lambda a, b: sk.info_nce_grad_norms(a, b),
    "gradient_band": lambda a, b: sk.gradient_band(a, b).upper,
    "Whitening": lambda a, b: sk.Whitening(6)(a),
}


@pytest.mark.parametrize("name", OPS)
def test_arrays(name: str) -> None:
    a, b = torch.randn(12, 6), torch.randn(12, 6)
    expected = OPS[name](a, b)
    read_only = a.numpy().copy()
    read_only.flags.writeable = False
    big_endian = a.numpy().astype(">f4")
    backwards = a.flip(0).numpy()[::-1]
    for taken in (a.numpy(), read_only, big_endian, backwards, np.asfortranarray(a.numpy()), Capsule(a)):
        torch.testing.assert_close(OPS[name](taken, b.numpy()), expected)


def test_arrays_share_their_memory_and_warn_of_nothing(recwarn: pytest.WarningsRecorder) -> None:
    array = np.random.default_rng(0).standard_normal((5, 3), dtype=np.float32)
    array.flags.writeable = False
    assert checks.floating(array, "z").data_ptr() == array.ctypes.data
    assert not recwarn.list


@pytest.mark.parametrize(
    "indices",
    (
        [[0, 1, 2], [3, 4, 5]],
        ((0, 1, 2), (3, 4, 5)),
        np.arange(6).reshape(2, 3),
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.arange(6, dtype=np.uint8).reshape(2, 3),
        torch.arange(6, dtype=torch.int32).reshape(2, 3),
        torch.arange(6, dtype=torch.int16).reshape(2, 3),
    ),
)
def test_indices(indices: object) -> None:
    z = torch.randn(6, 4)
    expected = sk.batch_effective_rank(z, torch.arange(6).reshape(2, 3))
    torch.testing.assert_close(sk.batch_effective_rank(z, indices), expected)
    bank = sk.MemoryBank(6, 4)
    flat = torch.as_tensor(indices).flatten()
    bank.update(flat.numpy() if isinstance(indices, np.ndarray) else flat.tolist(), z.numpy())
    torch.testing.assert_close(bank.gather(flat.int()), torch.nn.functional.normalize(z))


def test_numbers() -> None:
    z, other = torch.randn(12, 6), torch.randn(12, 6)
    for number in (np.float32(0.25), np.float64(0.25), np.float16(0.25)):
        torch.testing.assert_close(sk.nt_xent(z, other, temperature=number), sk.nt_xent(z, other, temperature=0.25))
        sk.whiten(z, shrinkage=number)
        sk.NTXentLoss(number)
        sk.Whitening(6, momentum=number)
        sk.pool_select(z, 3, policy=number)
    torch.testing.assert_close(sk.effective_rank(z, order=np.int64(2)), sk.effective_rank(z, order=2))
    chosen = sk.greedy_select(z, np.int64(4), candidates=np.int32(3), start=np.uint8(0))
    assert len(chosen.indices) == 4
    mask = np.arange(12) < 5
    assert sk.greedy_select(z, 5, valid=mask).indices.max() < 5
    sk.pool_select(z, np.int16(3), draws=np.int64(2))
    sk.covariance(z, correction=np.int64(1))
    sk.gradient_band(z, other, rank=np.int64(2))
    sk.MemoryBank(np.int64(4), np.int32(2))
    sk.RandomBatchSampler(np.int64(8), np.int64(4), seed=np.int64(3))
