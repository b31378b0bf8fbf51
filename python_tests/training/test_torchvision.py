"""torchvision beside a torch that it was not built for: the package says so, and tests and examples get round it."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spectral_kernels import cli
from spectral_kernels.optional import import_torchvision
from spectral_kernels.training import data

ROOT = Path(__file__).parents[2]
SAID = "operator torchvision::nms does not exist"


@pytest.fixture
def unfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision that fails to import as one does whose binary part does not load."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in (
        ("torchvision/__init__.py", f"raise RuntimeError({SAID!r})"),
        ("torchvision-0.9.8.dist-info/METADATA", "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.9.8\n"),
    ):
        (tmp_path / "site" / name).parent.mkdir(parents=True)
        (tmp_path / "site" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


@pytest.mark.usefixtures("unfit")
def test_an_unfit_torchvision_is_named() -> None:
    for _ in range(2):
        with pytest.raises(ImportError) as caught:
            import_torchvision("models")
        message = f"torchvision 0.9.8 was not built for torch {torch.__version__} ({SAID}): install the build"
        assert str(caught.value).startswith(message)


@pytest.mark.usefixtures("unfit")
def test_the_command_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    words = ["train", "--out", str(tmp_path / "out"), "data.name=digits", "model.encoder=resnet50", "train.device=cpu"]
    assert cli.main([*words, "model.width=null"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"spectral-kernels: error: torchvision 0.9.8 was not built for torch {torch.__version__} ")


@pytest.mark.usefixtures("unfit")
def test_no_download_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "fashion_folders", lambda root: [tmp_path / "nowhere"])
    with pytest.raises(
        FileNotFoundError, match=r"torchvision cannot download it \(torchvision 0\.9\.8 was not built for"
    ):
        data.load("fashion_mnist", download=True)


def test_the_tool_runs_programs_beside_any_torch(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\nfrom torchvision import datasets, models\n"
        "print(__name__, sys.argv[1:], datasets.FashionMNIST.__name__, models.resnet50.__name__)\n"
    )
    command = [sys.executable, str(ROOT / "tools/torchvision_beside_cpu_torch.py"), str(program), "--epochs", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "__main__ ['--epochs', '4'] FashionMNIST resnet50\n"
