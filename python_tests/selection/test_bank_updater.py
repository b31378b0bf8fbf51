"""A bank that follows a model, in one process; python_tests/integrations has it under trainers, in two."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spectral_kernels import GlobalBatchSampler, GreedyBatchSampler, MemoryBank, RandomBatchSampler
from spectral_kernels.files.reading import FileError
from spectral_kernels.integrations import BankUpdater
from spectral_kernels.selection.batch_sampler import BaseBatchSampler

N, D, BATCH = 23, 4, 5


def rows() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(3))


def greedy(size: int = BATCH) -> GreedyBatchSampler:
    return GreedyBatchSampler(MemoryBank(N, D), size, candidates=4, replacement=False, drop_last=False, min_seen=0.5)


def trained(updater: BankUpdater, encoder: nn.Module, batches: int, workers: int = 0) -> list[int]:
    loader = DataLoader(TensorDataset(torch.arange(N), rows()), batch_sampler=updater.sampler, num_workers=workers)
    seen = []
    for (numbers, x), _ in zip(loader, range(batches), strict=False):
        half = len(x) // 2
        encoder.eval()(x + 2)  # not trained on
        encoder.train()
        for part in (x[:half], x[half:], x + 1):  # a batch in two parts, and then a second view
            encoder(part)
        updater.batch_end()
        seen += numbers.tolist()
    return seen


@pytest.mark.filterwarnings("ignore:the memory bank is cold")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["own", "global"])
def test_bank_holds_what_the_model_made_of_the_rows_trained_on(kind: str, workers: int) -> None:
    sampler = greedy()
    encoder = nn.Identity()
    updater = BankUpdater(sampler if kind == "own" else GlobalBatchSampler(sampler), encoder)
    seen = trained(updater, encoder, 3, workers)
    bank = sampler.bank
    assert sorted(bank.seen.nonzero()[:, 0].tolist()) == sorted(seen) and bank.step == 3
    torch.testing.assert_close(bank.embeddings[seen], nn.functional.normalize(rows())[seen])


@pytest.mark.filterwarnings("ignore:the memory bank is cold")
@pytest.mark.parametrize("kind", ["own", "global"])
def test_resumes_after_the_last_batch_that_ended(kind: str, tmp_path: Path) -> None:
    def made() -> tuple[BankUpdater, nn.Module]:
        encoder = nn.Identity()
        return BankUpdater(greedy() if kind == "own" else GlobalBatchSampler(greedy()), encoder), encoder

    whole, encoder = made()
    expected = trained(whole, encoder, 9)
    first, encoder = made()
    begun = trained(first, encoder, 2)
    first.save(tmp_path)
    second, encoder = made()
    second.load(tmp_path)
    assert begun + trained(second, encoder, 9) == expected and sorted(expected) == list(range(N))
    torch.testing.assert_close(second.bank.embeddings, whole.bank.embeddings)


@pytest.mark.filterwarnings("ignore:the memory bank is cold")
def test_batches_that_a_trainer_skips_stand_for_those_before() -> None:
    sampler = greedy()
    sampler.will_be_skipped(2)
    batches = list(sampler)
    assert batches[:2] == [[0] * BATCH] * 2 and sorted(row for batch in batches[2:] for row in batch) == list(range(N))
    assert len(list(sampler)) == len(sampler)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    sampler, encoder = greedy(), nn.Identity()
    with pytest.raises(ValueError, match="sampler is a RandomBatchSampler, which has no bank"):
        BankUpdater(RandomBatchSampler(N, BATCH), encoder)
    updater = BankUpdater(sampler, encoder)
    with pytest.raises(ValueError, match="sampler has an updater already"):
        BankUpdater(sampler, encoder)
    with pytest.raises(RuntimeError, match="did not hand out"):
        updater.batch_end()
    with pytest.warns(UserWarning, match="cold"):
        next(iter(sampler))
    encoder(rows()[:3])
    with pytest.raises(RuntimeError, match="a batch of 5 rows ended, but module gave the embeddings of 3"):
        updater.batch_end()
    updater.close()
    other = BankUpdater(sampler, nn.Linear(D, 2), embedding=lambda output: output)
    (tmp_path / "spectral_kernels.pt").write_bytes(b"PK")
    with pytest.raises(FileError, match=r"spectral_kernels\.pt"):
        other.load(tmp_path)
    torch.save({"bank": {}}, tmp_path / "spectral_kernels.pt")
    with pytest.raises(FileError, match="is no state of a BankUpdater"):
        other.load(tmp_path)
    with pytest.raises(ValueError, match="the state is of 3 processes, but there are 1"):
        other.load_state_dict({"bank": {}, "samplers": [1, 2, 3]})


def test_an_output_without_embeddings_is_refused() -> None:
    sampler, module = greedy(), nn.GRU(D, D)
    BankUpdater(sampler, module)
    with pytest.warns(UserWarning, match="cold"):
        next(iter(sampler))
    with pytest.raises(TypeError, match=r"the module gave a tuple, in which embedding= must find"):
        module(rows())


@pytest.mark.parametrize("sampler", [RandomBatchSampler, GreedyBatchSampler])
def test_a_sampler_in_the_place_of_rows_is_the_error_that_lightning_explains(sampler: type[BaseBatchSampler]) -> None:
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        sampler(torch.utils.data.RandomSampler(range(N)), BATCH)  # type: ignore[arg-type, call-arg]


def test_global_batches_need_a_sampler_of_all_ranks() -> None:
    with pytest.raises(ValueError, match="sampler deals out its rows to 2 ranks"):
        GlobalBatchSampler(RandomBatchSampler(N, BATCH, num_replicas=2, rank=0))
