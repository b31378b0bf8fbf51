"""The shipped recipes end to end on tiny trees in the true format, and LARS against its formula."""

from pathlib import Path

import pytest
import torch
from test_image_files import write_cifar, write_tree
from torch import nn

from spectral_kernels import cli
from spectral_kernels.training.config import OptimizerConfig
from spectral_kernels.training.folder import imagenet100_classes
from spectral_kernels.training.lars import LARS
from spectral_kernels.training.models import encoder
from spectral_kernels.training.simclr import make_optimizer

QUICK = ["train.steps=3", "evaluate.every=3", "train.checkpoint_every=2", "train.device=cpu"]
QUICK += ["model.hidden=16", "model.dim=8"]
pytestmark = pytest.mark.filterwarnings("ignore:the memory bank is cold")


@pytest.mark.parametrize("name, method", [("cifar10_simclr", []), ("cifar10_moco", ["moco.queue=50"])])
def test_cifar10(name: str, method: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(tmp_path, count=64)
    words = ["train", "--config", name, "--out", str(tmp_path / "out"), f"data.root={tmp_path}", *QUICK, *method]
    code = cli.main([*words, "train.batch_size=32", "model.width=8", "selection.min_seen=0.1"])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "Training on cifar10 with greedy-64 batches" in out and (tmp_path / "out" / "monitor.csv").exists()


@pytest.mark.usefixtures("torchvision")
def test_imagenet100_simclr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tree(tmp_path, imagenet100_classes(), count=2)
    words = ["train", "--config", "imagenet100_simclr", "--out", str(tmp_path / "out"), f"data.root={tmp_path}", *QUICK]
    words += ["data.size=32", "train.batch_size=16", "selection.min_seen=0.05", "evaluate.train_images=null"]
    assert cli.main(words) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "Decoded 200 images" in out and "Training on imagenet100 with greedy-64 batches" in out


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize(("name", "features"), [("resnet18", 512), ("resnet50", 2048)])
@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resnets(name: str, features: int, stem: str, channels: int) -> None:
    network, dim = encoder(name, channels, stem=stem)
    assert dim == features and network(torch.randn(2, channels, 32, 32)).shape == (2, features)
    stride = 1 if stem == "cifar" else 2
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert first.stride == (stride, stride)
    with pytest.raises(ValueError, match="width must be 64 with name = 'resnet50'"):
        encoder("resnet50", channels, width=32)


def test_lars_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias = (nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((4, 3), (4,)))
    config = OptimizerConfig(name="lars", lr=0.5, momentum=0.9, eta=0.02, weight_decay=0.1)
    optimizer = make_optimizer(nn.ParameterList([weight, bias]), config)
    assert isinstance(optimizer, LARS)
    expected, buffers = [weight.detach().clone(), bias.detach().clone()], [0.0, 0.0]
    for _ in range(3):
        for place, parameter in enumerate((weight, bias)):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.clone()
            w = expected[place]
            if place == 0:
                rate = 0.02 * w.norm() / (gradient.norm() + 0.1 * w.norm())
                gradient = (gradient + 0.1 * w) * min(float(rate) / 0.5, 1.0)
            buffers[place] = 0.9 * buffers[place] + gradient
            expected[place] = w - 0.5 * buffers[place]
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected[0])
    torch.testing.assert_close(bias.detach(), expected[1])


def test_lars_on_zeros() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = LARS([weight], 0.1)
    weight.grad = torch.ones(2, 2)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), -0.1))
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert bool(weight.isfinite().all())
    with pytest.raises(ValueError, match="eta above 0"):
        LARS([weight], 0.1, eta=0)
