"""Label quotas: every batch within one row of the data set's shares, every row once, and batches still chosen."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampler_helpers import bank_of, through_a_file

import spectral_kernels as sk
from spectral_kernels.selection import RandomBatchSampler
from spectral_kernels.selection.quotas import QuotaBatchSampler, Quotas


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 50))
def test_quotas_round_the_shares(counts, batch_size):
    total = sum(counts)
    batch_size = min(batch_size, total)
    quotas = Quotas(torch.tensor(counts), batch_size)
    batches = [quotas.of(b) for b in range(-(-total // batch_size))]
    assert sum(batches).tolist() == counts
    for start, quota in zip(range(0, total, batch_size), batches, strict=True):
        size = min(batch_size, total - start)
        assert int(quota.sum()) == size
        for taken, count in zip(quota.tolist(), counts, strict=True):
            assert size * count // total <= taken <= -(-size * count // total)


def clustered(n: int = 3000) -> tuple[torch.Tensor, torch.Tensor]:
    """Within each of four classes, of unlike sizes, most rows lie near one direction."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.6, 0.25, 0.14, 0.01]), n, replacement=True, generator=generator)
    z = torch.randn(n, 24, generator=generator) * torch.arange(1, 25) ** -0.7
    return z + 1.5 * torch.eye(24)[labels], labels * 7 - 3


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("candidates", [8, None])
def test_epochs(drop_last, candidates):
    z, labels = clustered(1003)
    sampler = QuotaBatchSampler(z, 64, labels, drop_last=drop_last, candidates=candidates)
    for _ in range(2):
        batches = list(sampler)
        rows = [row for batch in batches for row in batch]
        assert len(set(rows)) == len(rows) == (960 if drop_last else 1003)
        for batch in batches:
            own, _ = labels[batch].sort()
            for label in labels.unique():
                assert abs(int((own == label).sum()) - len(batch) * float((labels == label).double().mean())) < 1


def test_batches_are_chosen():
    z, labels = clustered()

    def least(sampler) -> float:
        return float(min(sk.effective_rank(z[batch], order=2) for batch in sampler))

    shuffled = least(RandomBatchSampler(len(z), 64))
    assert least(QuotaBatchSampler(z, 64, labels)) > 1.05 * shuffled


def test_resumes():
    z, labels = clustered(400)
    whole = list(QuotaBatchSampler(z, 32, labels, drop_last=False))
    sampler = QuotaBatchSampler(z, 32, labels, drop_last=False)
    first = [batch for batch, _ in zip(sampler, range(5), strict=False)]
    other = QuotaBatchSampler(z, 32, labels, drop_last=False)
    other.load_state_dict(through_a_file(sampler.state_dict(consumed=5)))
    assert first + list(other) == whole


def test_bad_arguments():
    z, labels = clustered(100)
    with pytest.raises(ValueError, match=r"labels has shape \(99,\), but there are 100 rows"):
        QuotaBatchSampler(z, 8, labels[1:])
    z[3] = 0
    with pytest.raises(ValueError, match="need an embedding of every row"):
        QuotaBatchSampler(bank_of(z), 8, labels)
