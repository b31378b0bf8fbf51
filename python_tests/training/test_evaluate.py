"""kNN and linear probe against brute force and scikit-learn."""

import math

import numpy
import pytest
import torch
from torch import Tensor
from training_helpers import blobs, settings

from spectral_kernels.training.augment import Normalize
from spectral_kernels.training.evaluate import (
    METRICS,
    Evaluator,
    features,
    fit_logistic_regression,
    knn_accuracy,
    linear_probe_accuracy,
)
from spectral_kernels.training.models import encoder


def clouds(n: int, seed: int, d: int = 6, classes: int = 4, spread: float = 1.2) -> tuple[Tensor, Tensor]:
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + spread * torch.randn(n, d, generator=generator), labels


def brute_force_knn(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor, k: int, temperature: float) -> float:
    right = 0
    for row, answer in zip(test.double(), truth, strict=True):
        votes = [0.0] * 4
        cosines = [float(row @ key / row.norm() / key.norm()) for key in train.double()]
        for place in sorted(range(len(cosines)), key=lambda i: -cosines[i])[:k]:
            votes[int(labels[place])] += math.exp(cosines[place] / temperature)
        right += votes.index(max(votes)) == int(answer)
    return right / len(test)


def test_knn_is_brute_force() -> None:
    train, labels = clouds(150, 0)
    test, truth = clouds(60, 1)
    found = knn_accuracy(train, labels, test, truth, k=(1, 20, 100), chunk=17)
    for k, accuracy in found.items():
        assert accuracy == pytest.approx(brute_force_knn(train, labels, test, truth, k, 0.07))
    assert knn_accuracy(train, labels, test, truth, k=(1, 20, 100), chunk=1000) == found


def test_knn_is_scikit_learns() -> None:
    neighbors = pytest.importorskip("sklearn.neighbors")
    train, labels = clouds(400, 2)
    test, truth = clouds(200, 3)
    model = neighbors.KNeighborsClassifier(20, metric="cosine", weights=lambda d: numpy.exp((1 - d) / 0.07))
    model.fit(train.numpy(), labels.numpy())
    expected = (torch.as_tensor(model.predict(test.numpy())) == truth).double().mean()
    assert knn_accuracy(train, labels, test, truth, k=(20,))[20] == pytest.approx(float(expected))


def test_temperature_matters() -> None:
    """Two near votes against three far ones: a cold vote follows the near ones, a warm one the many."""
    train = torch.tensor([[1.0, 0.05], [1.0, -0.05], [0.6, 0.8], [0.6, -0.8], [0.5, 0.8]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    query, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(train, labels, query, answer, k=(5,), temperature=0.07)[5] == 1
    assert knn_accuracy(train, labels, query, answer, k=(5,), temperature=100.0)[5] == 0


@pytest.mark.parametrize("l2", [1e-3, 1e-1])
def test_linear_probe_is_scikit_learns(l2: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, labels = clouds(600, 4, d=10)
    test, truth = clouds(300, 5, d=10)
    train = train @ torch.diag(torch.logspace(-3, 3, 10)) + 5  # features of every size
    test = test @ torch.diag(torch.logspace(-3, 3, 10)) + 5
    mean, std = train.double().mean(0), train.double().std(0, correction=0)
    x, y = (train - mean) / std, (test - mean) / std
    model = linear_model.LogisticRegression(C=1 / (l2 * len(train)), tol=1e-10, max_iter=10_000)
    model.fit(x.numpy(), labels.numpy())
    weight, bias = fit_logistic_regression(x, labels, l2, 1000)
    logits = torch.as_tensor(model.decision_function(y.numpy()))
    ours = y @ weight + bias
    centred = ours - ours.mean(1, keepdim=True)
    assert torch.allclose(centred, logits - logits.mean(1, keepdim=True), atol=1e-3)
    expected = float((torch.as_tensor(model.predict(y.numpy())) == truth).double().mean())
    assert linear_probe_accuracy(train, labels, test, truth, l2=l2) == pytest.approx(expected, abs=0.004)


def test_linear_probe_is_deterministic_and_fast_to_converge() -> None:
    train, labels = clouds(500, 6)
    test, truth = clouds(200, 7)
    first = linear_probe_accuracy(train, labels, test, truth)
    assert linear_probe_accuracy(train, labels, test, truth) == first
    assert linear_probe_accuracy(train, labels, test, truth, max_iterations=500) == pytest.approx(first, abs=0.005)


def test_linear_probe_of_collapsed_features() -> None:
    """Constant features leave the most frequent class, and no NaN."""
    labels = torch.tensor([0, 1, 1, 2] * 10)
    flat = torch.ones(40, 5)
    assert linear_probe_accuracy(flat, labels, flat, labels) == 0.5
    assert linear_probe_accuracy(torch.zeros(40, 5), labels, flat, labels, l2=0.0) == 0.5


def test_features_restore_the_mode() -> None:
    data = blobs()
    module, dim = encoder("conv4", 1, width=4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    out = features(module, data.test_images, Normalize(data.train_images), chunk=33)
    assert out.shape == (80, dim)
    assert module.training
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    whole = features(module, data.test_images, Normalize(data.train_images))
    assert torch.allclose(out, whole, atol=1e-5)


def test_evaluator_names_and_subsets() -> None:
    data = blobs(count=400)
    config = settings(evaluate={"train_images": 200, "test_images": 50})
    evaluator = Evaluator(data, config.evaluate, Normalize(data.train_images))
    assert len(evaluator.train) == 200
    assert len(evaluator.test) == 50
    scores = evaluator(encoder("conv4", 1, width=4)[0])
    assert tuple(scores) == METRICS
    assert all(0.2 < score <= 1 for score in scores.values())


def test_bad_arguments() -> None:
    train, labels = clouds(50, 0)
    test, truth = clouds(10, 1)
    with pytest.raises(ValueError, match="k must be between 1 and 50, got 200"):
        knn_accuracy(train, labels, test, truth)
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        knn_accuracy(train, labels, test, truth, k=(5,), temperature=0)
    with pytest.raises(ValueError, match="train row 3 holds NaN or Inf"):
        knn_accuracy(torch.where(torch.arange(50)[:, None] == 3, torch.nan, train), labels, test, truth, k=(5,))
    with pytest.raises(ValueError, match=r"test_labels must be int64 of shape \(10,\)"):
        linear_probe_accuracy(train, labels, test, truth.int())
    with pytest.raises(ValueError, match="test has d = 4, but train has d = 6"):
        linear_probe_accuracy(train, labels, test[:, :4], truth)
    with pytest.raises(ValueError, match="l2 must be at least 0, got -1"):
        linear_probe_accuracy(train, labels, test, truth, l2=-1)
