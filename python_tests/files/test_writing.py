"""What is written is whole or not there, whatever happens meanwhile; a folder has one writer."""

import gc
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import in_a_child, is_held, said_by

from spectral_kernels import cli
from spectral_kernels.files import lock
from spectral_kernels.files.writing import replacing, sweep, write_csv, write_json, write_text
from spectral_kernels.training import checkpoint
from spectral_kernels.training.checkpoint import CheckpointError

FIELDS = {"step": int, "tensors": dict}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    write_text(path, "one\n")
    os.chmod(path, 0o600)
    with pytest.raises(TypeError), replacing(path) as file:
        [file.write(b"half"), file.write(b"", "no such argument")]
    assert path.read_text() == "one\n" and names(path.parent) == ["a.txt"]
    write_json(path, {"a": [1]})
    write_csv(tmp_path / "b.csv", [{"x": 1, "y": "ä"}, {"x": 2, "y": ","}])
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    assert (tmp_path / "b.csv").read_text(encoding="utf-8") == 'x,y\n1,ä\n2,","\n'
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=f"directory: '{tmp_path}/folder'"):
        write_text(tmp_path / "folder", "text")
    with pytest.raises(OSError, match=f"'{tmp_path}/b.csv/c'"):
        write_text(tmp_path / "b.csv" / "c", "text")
    assert names(tmp_path) == ["b.csv", "folder", "new"]


def content(step: int, size: int = 20_000) -> dict[str, object]:
    """Numbers that all say which step wrote them."""
    tensors = {str(i): torch.full((size,), float(step)) for i in range(4)}
    return {"step": step, "tensors": tensors, "floats": [0.5, float("inf")], "nested": {"a": (1, None, True, b"x")}}


@pytest.mark.parametrize("limit", [0, 1, 1000, 100_000, 320_000])
def test_no_space(limit: int, tmp_path: Path) -> None:
    """A limit on the size of a file, which the system reports as it does a full disk, through torch and Python."""
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, content(1))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        checkpoint.save(path, content(2))

    assert said_by(*in_a_child(work)) == f"OSError: [Errno 27] File too large: '{path}'"
    assert checkpoint.load(path, FIELDS)["step"] == 1
    assert names(tmp_path) == ["last.ckpt"]


def test_a_full_disk(tmp_path: Path) -> None:
    """A small file system of memory, where one may be mounted."""
    code = """
import sys
from spectral_kernels import cli
sys.exit(cli.main(["train", "--config", "tiny", "--no-monitor", "--out", "disk", "train.steps=4", "evaluate.every=2"]))
"""
    (tmp_path / "disk").mkdir()
    (tmp_path / "code.py").write_text(code)
    mounted = f"mount -t tmpfs -o size=40k none disk && PYTHONPATH={Path.cwd()} exec {sys.executable} code.py"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.returncode == 1, done.stderr
    assert "No space left on device: 'disk/last.ckpt'" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """150 kills of a process that saves without a pause: the checkpoint is whole, and no older than was said."""
    path = tmp_path / "last.ckpt"

    def work() -> None:
        held = lock.hold(tmp_path)
        if len(names(tmp_path)) < 4:  # some are left, to be swept below
            sweep(tmp_path)
        step = checkpoint.load(path, FIELDS)["step"] if path.exists() else 0
        while held:
            step += 1
            checkpoint.save(path, content(step))
            os.write(1, f"{step}\n".encode())

    generator, leftovers, before = torch.Generator().manual_seed(0), 0, 0
    for _ in range(150):
        child, reading = in_a_child(work)
        time.sleep(float(torch.rand((), generator=generator)) * 0.05)
        os.kill(child, signal.SIGKILL)
        said = [int(line) for line in said_by(child, reading).split("\n")[:-1]]
        if path.exists():
            found = checkpoint.load(path, FIELDS)
            assert found["step"] >= max(said, default=before)
            assert all(bool((value == found["step"]).all()) for value in found["tensors"].values())
            before = found["step"]
        leftovers += any(name.endswith(".tmp") for name in names(tmp_path))
    assert leftovers > 10 and before > 20
    held = lock.hold(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == [".lock", "last.ckpt"] and held


def test_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, content(3, size=20))
    whole = path.read_bytes()
    found = checkpoint.load(path, FIELDS)
    assert found["nested"] == {"a": (1, None, True, b"x")} and found["floats"] == [0.5, float("inf")]
    assert torch.load(path, weights_only=True)["step"] == 3  # torch reads it too
    generator = torch.Generator().manual_seed(0)
    places = range(len(whole))
    for place in places:
        bit = 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=rf"{path} cannot be read as a checkpoint: .*(damaged|digest)"):
            checkpoint.load(path, FIELDS)
    for change in (whole[:-1], whole + b"\0", whole[1:], whole[: len(whole) // 2], whole + whole, b""):
        path.write_bytes(change)
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            checkpoint.load(path, FIELDS)


@pytest.mark.parametrize("value", [None, 3.0, True, "3", [3], torch.ones(())])
def test_fields_of_another_type(value: object, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", {"step": value, "tensors": {}})
    with pytest.raises(CheckpointError, match="has a field 'step' that is a"):
        checkpoint.load(tmp_path / "a", FIELDS)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    held, again = lock.hold(tmp_path / "a"), lock.hold(tmp_path / "a" / ".." / "a")
    assert held is again

    def forget() -> None:
        nonlocal held, again
        held = again = None  # type: ignore[assignment]
        gc.collect()

    assert said_by(*in_a_child(forget)) == ""  # a child that was forked does not end it
    assert is_held(tmp_path / "a") and not is_held(tmp_path / "b")
    del held
    gc.collect()
    assert is_held(tmp_path / "a")
    del again
    gc.collect()
    assert not is_held(tmp_path / "a")


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    def work() -> None:
        held = lock.hold(tmp_path)
        os.write(1, b"held")
        time.sleep(60)
        del held

    child, reading = in_a_child(work)
    assert os.read(reading, 4) == b"held"
    with pytest.raises(lock.FolderInUse, match=f"is in use by process {child} on "):
        lock.hold(tmp_path)
    waiting = in_a_child(lambda: [lock.hold(tmp_path, wait=True), os.write(1, b"mine")])
    time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    said_by(child, reading)
    assert said_by(*waiting) == "mine"
    held = lock.hold(tmp_path)
    assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    del held


def test_locks_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match=r"\.lock"):
        lock.hold(tmp_path)
    assert not (tmp_path / "victim").exists()
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.warns(UserWarning, match="cannot be locked against other processes"):
        lock.hold(tmp_path / "b")


def test_two_runs_in_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second is refused and told by whom; the first goes on."""
    words = ["--config", "tiny", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "spectral_kernels.cli", "train", *words, "train.steps=null", "train.seconds=600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as first:
        while not (tmp_path / "monitor.csv").exists():
            assert first.poll() is None
            time.sleep(0.02)
        for other in (["train"], ["train", "--fresh"], ["compare"], ["band"], ["variance"]):
            assert cli.main([*other, *words]) == 1
            said = capsys.readouterr().err
            assert f"is in use by process {first.pid} on " in said and "train --config tiny" in said
            assert said.count("\n") == 1
        assert first.poll() is None and (tmp_path / "last.ckpt").exists()
        first.terminate()
        first.communicate(timeout=60)
    assert first.returncode == 143
