"""Parquet, saved data sets and FAISS indexes, written by the libraries that own them: right rows, bounded memory, refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spectral_kernels import cli
from spectral_kernels.files import chunked_rows
from spectral_kernels.files.embeddings import open_embeddings
from spectral_kernels.files.reading import FileError
from spectral_kernels.inspection.diagnosis import diagnose

if os.environ.get("SPECTRAL_KERNELS_PEERS") != "require":
    for name in ("pyarrow", "datasets", "faiss"):
        pytest.importorskip(name)
import datasets
import faiss
import pyarrow as pa
import pyarrow.parquet as pq

N, D = 1000, 6
Z = torch.randn(N, D, generator=torch.Generator().manual_seed(0))


def column(z: Tensor, fixed: bool, kind: Any = None) -> Any:
    kind = kind or pa.from_numpy_dtype(z.numpy().dtype)
    values = pa.array(z.numpy().reshape(-1), type=kind)
    if fixed:
        return pa.FixedSizeListArray.from_arrays(values, z.shape[1])
    return pa.ListArray.from_arrays(np.arange(0, z.numel() + 1, z.shape[1], dtype=np.int32), values)


def table(z: Tensor, fixed: bool = False) -> Any:
    return pa.table({"id": list(range(len(z))), "text": ["a"] * len(z), "z": column(z, fixed), "tags": [[1]] * len(z)})


def parquet(path: Path, z: Tensor, fixed: bool = False, group: int = 130) -> None:
    pq.write_table(table(z, fixed), path, row_group_size=group)


def shards(path: Path, z: Tensor, fixed: bool = False) -> Path:
    path.mkdir()
    for i, part in enumerate(z.split(350)):
        parquet(path / f"train-{i:05d}.parquet", part, fixed)
    return path


def check(found: Any, z: Tensor) -> None:
    assert found.shape == z.shape and found.dtype == z.dtype
    assert torch.equal(found[:], z)
    assert torch.equal(found[333:790], z[333:790]) and torch.equal(found[5:2], z[:0])
    assert torch.equal(torch.cat([found[i : i + 77] for i in range(0, N, 77)]), z)
    rows = torch.randint(N, (50,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(found[rows], z[rows])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_rows, "CHUNK", 50 * D * 4)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_parquet(dtype: torch.dtype, fixed: bool, tmp_path: Path) -> None:
    z = Z.to(dtype)
    parquet(tmp_path / "z.parquet", z, fixed)
    check(open_embeddings(tmp_path / "z.parquet"), z)
    folder = shards(tmp_path / "z", z, fixed)
    check(open_embeddings(folder), z)
    check(open_embeddings(folder / "*-*.parquet", "z"), z)
    assert open_embeddings(folder / "*-00001.parquet").shape == (350, D)


def test_saved_data_set(tmp_path: Path) -> None:
    data = datasets.Dataset(table(Z))
    data.save_to_disk(tmp_path / "lists", num_shards=3)
    check(open_embeddings(tmp_path / "lists"), Z)
    fixed = datasets.Features({"z": datasets.Sequence(datasets.Value("float32"), length=D)})
    datasets.Dataset.from_dict({"z": Z.numpy()}, features=fixed).save_to_disk(tmp_path / "fixed")
    check(open_embeddings(tmp_path / "fixed", "z"), Z)
    data.select(range(N - 1, -1, -1)).save_to_disk(tmp_path / "turned")
    check(open_embeddings(tmp_path / "turned"), Z.flip(0))
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "splits")
    check(open_embeddings(tmp_path / "splits" / "train"), Z)
    with pytest.raises(FileError, match="holds several data sets"):
        open_embeddings(tmp_path / "splits")


@pytest.mark.parametrize("kind", ["Flat", "FlatIP", "Lp", "HNSW8,Flat", "IVF4,Flat", "SQfp16", "PCA3,Flat"])
def test_index(kind: str, tmp_path: Path) -> None:
    z, path = Z.numpy(), tmp_path / "z.faiss"
    index = faiss.IndexFlat(D, faiss.METRIC_Lp) if kind == "Lp" else faiss.IndexFlatIP(D) if kind == "FlatIP" else None
    index = index or faiss.index_factory(D, kind)
    index.train(z)
    index.add(z)
    faiss.write_index(index, str(path))
    found = open_embeddings(path)
    check(found, torch.tensor(index.reconstruct_n(0, N)))
    if "SQ" not in kind and "PCA" not in kind:
        assert torch.equal(found[:], Z)


def test_index_whose_rows_are_gone(tmp_path: Path) -> None:
    lsh = faiss.IndexLSH(D, 16)
    lsh.add(Z.numpy())
    faiss.write_index(lsh, str(tmp_path / "z.index"))
    try:
        lsh.reconstruct_n(0, 1)
    except RuntimeError:
        with pytest.raises(FileError, match=r"z\.index is an index whose rows cannot be had back"):
            open_embeddings(tmp_path / "z.index")


def test_columns(tmp_path: Path) -> None:
    two = table(Z).append_column("w", column(Z + 1, True))
    pq.write_table(two, tmp_path / "z.parquet")
    check(open_embeddings(tmp_path / "z.parquet", "w"), Z + 1)
    for key, message in (
        (None, r"holds 2 columns.*\('z', 'w'\)"),
        ("id", "has no column 'id'"),
        ("z.list", "has no column"),
    ):
        with pytest.raises(FileError, match=message):
            open_embeddings(tmp_path / "z.parquet", key)


def bad_table(name: str) -> Any:
    lists = [[1.0, 2.0]] * 40
    kinds = {
        "null row": [*lists, None, *lists], "null value": [*lists, [1.0, None]], "long": [*lists, [1.0, 2.0, 3.0]],
        "balanced": [*lists, [1.0], [1.0, 2.0, 3.0]], "empty": [[]] * 3,
    }  # fmt: skip
    return pa.table({"z": pa.array(kinds[name], type=pa.list_(pa.float32()))})


@pytest.mark.parametrize("name", ["null row", "null value", "long", "balanced", "empty"])
@pytest.mark.parametrize("kind", ["parquet", "data set"])
def test_rows_that_are_no_matrix(name: str, kind: str, tmp_path: Path) -> None:
    if kind == "parquet":
        pq.write_table(bad_table(name), tmp_path / "z.parquet")
    else:
        datasets.Dataset(bad_table(name)).save_to_disk(tmp_path / "z.parquet")
    with pytest.raises(FileError, match=r"without value|unequal lengths|holds no numbers"):
        open_embeddings(tmp_path / "z.parquet")[:]


@pytest.mark.parametrize("kind", ["parquet", "data set", "index"])
def test_damaged_files(kind: str, tmp_path: Path) -> None:
    """Cut anywhere, or with bytes overwritten: other numbers or a FileError, and nothing else."""
    path = opened = tmp_path / "z.parquet"
    if kind == "parquet":
        parquet(path, Z)
    elif kind == "data set":
        datasets.Dataset(table(Z)).save_to_disk(tmp_path / "z")
        opened = tmp_path / "z"
        (path,) = opened.glob("*.arrow")
    else:
        path = opened = tmp_path / "z.faiss"
        faiss.write_index(faiss.index_factory(D, "SQ8"), str(path))
    content = path.read_bytes()
    refused = 0
    generator = np.random.default_rng(0)
    cuts = [content[: len(content) * i // 20] for i in range(20)]
    changed = []
    for _ in range(0 if kind == "index" else 60):
        damaged = bytearray(content)
        start = int(generator.integers(len(content)))
        damaged[start : start + 16] = generator.bytes(min(16, len(content) - start))
        changed.append(bytes(damaged))
    for damaged in cuts + changed:
        path.write_bytes(damaged)
        try:
            assert open_embeddings(opened)[:].shape[1] > 0
        except FileError:
            refused += 1
    assert refused >= len(cuts) if kind == "parquet" else refused > len(cuts) // 2


def test_changed_and_unequal_shards(tmp_path: Path) -> None:
    folder = shards(tmp_path / "z", Z)
    found = open_embeddings(folder)
    parquet(folder / "train-00001.parquet", Z[:350] + 1, group=100)
    assert torch.equal(found[:100], Z[:100])
    with pytest.raises(FileError, match=r"00001\.parquet was changed while it was read"):
        found[400:500]
    parquet(folder / "train-00002.parquet", Z[:, 1:])
    with pytest.raises(FileError, match=r"00002\.parquet has \('z', torch.float32, 5\), but the files before it"):
        open_embeddings(folder)


def test_files_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    pq.write_table(pa.table({"z": column(torch.zeros(2**19, 64), True)}), tmp_path / "z.parquet")
    with pytest.raises(FileError, match="is compressed by more than 100"):
        open_embeddings(tmp_path / "z.parquet")
    datasets.Dataset(table(Z)).save_to_disk(tmp_path / "z")
    state = json.loads((tmp_path / "z" / "state.json").read_text())
    for wrong in (
        {"_data_files": [{"filename": "../z.arrow"}]},
        {"_data_files": 3},
        [],
        {"_data_files": [{"filename": ".."}]},
    ):
        (tmp_path / "z" / "state.json").write_text(json.dumps(state | wrong if isinstance(wrong, dict) else wrong))
        with pytest.raises(FileError, match=r"names files outside|is not what datasets writes"):
            open_embeddings(tmp_path / "z")


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shards(tmp_path / "train", Z)
    for words in ([str(folder)], [str(folder / "*.parquet"), "--key", "z"]):
        assert cli.main(["inspect", *words, "--out", str(tmp_path / "out")]) == 0
        assert str(diagnose(Z)).partition("\n")[2] in capsys.readouterr().out
        assert (tmp_path / "out" / "train_spectrum.csv").exists()


SCRIPT = """
import sys, torch
from spectral_kernels.files.embeddings import open_embeddings
import pyarrow.parquet, pyarrow.ipc
def peak():
    # not ru_maxrss, which begins with what the process that started this one had
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
open_embeddings(sys.argv[2])[:8].double() @ torch.ones(64, 1).double()
before, rows, total = peak(), open_embeddings(sys.argv[1]), 0.0
for first in range(0, len(rows), 2**14):
    total += float(rows[first : first + 2**14].double().square().sum())
print(len(rows), total, peak() - before)
"""


@pytest.mark.parametrize("kind", ["shards", "one row group", "data set"])
def test_memory_is_bounded(kind: str, tmp_path: Path) -> None:
    """A million rows of 64, 256 MB; also where a row group is all of a file, as pyarrow and pandas write it."""
    z = torch.randn(2**20, 64, generator=torch.Generator().manual_seed(0))
    parquet(tmp_path / "small.parquet", z[:9])  # what reading takes at all
    whole = pa.table({"z": column(z, kind != "data set")})
    if kind == "data set":
        datasets.Dataset(whole).save_to_disk(tmp_path / "z")
    else:
        (tmp_path / "z").mkdir()
        for i in range(1 if kind == "one row group" else 4):
            rows = 2**20 if kind == "one row group" else 2**18
            pq.write_table(whole.slice(i * rows, rows), tmp_path / "z" / f"{i}.parquet", row_group_size=2**20)
    expected = float(z.double().square().sum())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "z"), str(tmp_path / "small.parquet")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows, total, rise = done.stdout.split()
    assert int(rows) == 2**20 and float(total) == pytest.approx(expected)
    assert float(rise) < 150, rise
