"""MoCo-v2: its step by hand, and its queue."""

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from training_helpers import blobs, settings

from spectral_kernels.training.config import MoCoConfig
from spectral_kernels.training.loop import Run
from spectral_kernels.training.moco import MoCo, forward_moco


def model(queue: int = 10, momentum: float = 0.9) -> MoCo:
    torch.manual_seed(0)
    return MoCo(settings().model, MoCoConfig(queue=queue, momentum=momentum), 1)


def test_a_step_is_what_it_says() -> None:
    moco, views = model(), torch.randn(8, 1, 8, 8)
    before = moco.queue.clone()
    with torch.no_grad():
        for parameter in moco.encoder.parameters():  # apart from its copy
            parameter.mul_(1.5)
    slow = [
        0.9 * mine + 0.1 * fast
        for mine, fast in zip(moco.key_encoder.parameters(), moco.encoder.parameters(), strict=True)
    ]
    loss, first, second, remembered = forward_moco(moco, views, 0.2, amp=False)
    for mine, expected in zip(moco.key_encoder.parameters(), slow, strict=True):
        torch.testing.assert_close(mine, expected)
        assert not mine.requires_grad
    queries, keys = normalize(first, dim=1), normalize(second, dim=1)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ before.T], 1) / 0.2
    assert loss.item() == pytest.approx(cross_entropy(logits, torch.zeros(4, dtype=torch.int64)).item(), rel=1e-5)
    torch.testing.assert_close(moco.queue[:4], keys)
    torch.testing.assert_close(moco.queue[4:], before[4:])
    assert int(moco.cursor) == 4 and torch.equal(remembered, second)
    loss.backward()
    assert all(parameter.grad is None for parameter in moco.key_encoder.parameters())


def test_the_queue_goes_round() -> None:
    moco = model(queue=10)
    for number in range(4):
        moco.enqueue(torch.full((4, moco.queue.shape[1]), float(number)))
    assert moco.queue[:, 0].tolist() == [2, 2, 3, 3, 3, 3, 1, 1, 2, 2] and int(moco.cursor) == 6


def test_no_whitening() -> None:
    with pytest.raises(ValueError, match=r"train\.method = moco has no whitening, got whiten = 'zca'"):
        Run(settings(train={"method": "moco", "whiten": "zca"}), blobs())
