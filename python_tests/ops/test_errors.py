"""What kernels note of bad data: the first row, named, and raised where nobody waits for it. Triton's run in the interpreter,
whose words are ordinary memory and are read after each call; a GPU's timing is acted.
"""

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulation_helpers import chip_select
from launch_helpers import meta
from torch import Tensor

import spectral_kernels as sk
from spectral_kernels import errors
from spectral_kernels.dispatch import overload
from spectral_kernels.errors import CLEAN, STRIDE
from spectral_kernels.kernels.launch import recording
from spectral_kernels.ops.covariance import triton as covariance
from spectral_kernels.ops.effective_rank import triton as effective_rank
from spectral_kernels.ops.greedy import triton as greedy
from spectral_kernels.ops.infonce import triton as infonce

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")


def rows(*shape: int, bad: tuple[int, ...] = (), value: float = math.nan) -> Tensor:
    """Random rows, those in `bad` of the last batch spoilt, at either end."""
    z = torch.randn(shape)
    for place, row in enumerate(bad):
        z.view(-1, *shape[-2:])[-1, row, -1 if place % 2 else 0] = value
    return z


BAD = (70, 90)
# whole rows, tiles, tiles of the Gram matrix; one launch and several parts
CALLS: dict[str, tuple[Callable[[Tensor], object], tuple[int, ...], str]] = {
    "covariance": (lambda z: sk.covariance(z), (2, 100, 5), "covariance: z batch 1 row 70"),
    "covariance, parts": (lambda z: sk.covariance(z, center=False), (3000, 5), "covariance: z row 70"),
    "covariance, tiles": (lambda z: sk.covariance(z, normalize=True), (100, 130), "covariance: z row 70"),
    "covariance, plain tiles": (lambda z: sk.covariance(z, center=False), (100, 130), "covariance: z row 70"),
    "rank": (lambda z: sk.effective_rank(z, order=2), (2, 100, 5), "effective_rank: z batch 1 row 70"),
    "rank, Gram": (lambda z: sk.effective_rank(z, order=2), (140, 150), "effective_rank: z row 70"),
    "rank, unbiased": (lambda z: sk.effective_rank(z, order=2, unbiased=True), (100, 140), "effective_rank: z row 70"),
    "spectrum": (lambda z: sk.spectrum(z), (100, 5), "spectrum: z row 70"),
    "whiten": (lambda z: sk.whiten(z), (2, 100, 5), "whiten: z batch 1 row 70"),
    "greedy, Gram": (lambda z: sk.greedy_select(z, 3, candidates=None), (2, 100, 5), "greedy_select: pool batch 1 row 70"),
    "greedy, rows": (lambda z: sk.greedy_select(z, 1, candidates=None), (100, 5), "greedy_select: pool row 70"),
    "greedy, draws": (lambda z: sk.greedy_select(z, 3, candidates=2), (2, 100, 5), "greedy_select: pool batch 1 row 70"),
    "query": (lambda z: sk.info_nce(z, rows(100, 5)), (100, 5), "info_nce: query row 70"),
    "key": (lambda z: sk.info_nce(rows(100, 5), z), (100, 5), "info_nce: key row 70"),
    "key beside a queue": (lambda z: sk.info_nce(rows(100, 5), z, queue=rows(9, 5)), (100, 5), "info_nce: key row 70"),
    "queue": (lambda z: sk.info_nce(rows(9, 5), rows(9, 5), queue=z), (100, 5), "info_nce: queue row 70"),
    "z0": (lambda z: sk.nt_xent(z, rows(100, 5)), (100, 5), "nt_xent: z0 row 70"),
    "z1": (lambda z: sk.nt_xent(rows(100, 5), z), (100, 5), "nt_xent: z1 row 70"),
    "norms": (lambda z: sk.info_nce_grad_norms(rows(100, 5), z), (100, 5), "info_nce_grad_norms: key row 70"),
    "norms of a queue": (
        lambda z: sk.info_nce_grad_norms(rows(9, 5), rows(9, 5), queue=z), (100, 5), "info_nce_grad_norms: queue row 70",
    ),
    "norms of nt_xent": (
        lambda z: sk.info_nce_grad_norms(z, rows(100, 5), loss="nt_xent"), (100, 5), "info_nce_grad_norms: query row 70",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_blocks", {})


# C++ reads no row that is not drawn
@pytest.mark.parametrize("name", [name for name in CALLS if name != "greedy, draws"])
@pytest.mark.parametrize("value", (math.nan, -math.inf))
@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_the_host_names_the_first_bad_row(backend: str, name: str, value: float) -> None:
    call, shape, message = CALLS[name]
    with sk.use_backend(backend), pytest.raises(ValueError, match=f"^{message.split(': ')[1]} holds NaN or Inf$"):
        call(rows(*shape, bad=BAD, value=value))


@pytest.mark.parametrize("value", (math.nan, -math.inf))
@pytest.mark.parametrize("name", CALLS)
def test_the_first_bad_row_is_named(name: str, value: float) -> None:
    call, shape, message = CALLS[name]
    with sk.use_backend("triton"):
        with pytest.raises(ValueError, match=f"^{message} holds NaN or Inf, or"):
            call(rows(*shape, bad=BAD, value=value))
        # it is forgotten, and good rows are none
        call(rows(*shape))
    sk.check()


@pytest.mark.parametrize("d", (5, 150))
def test_rows_of_a_pool_are_named_by_their_place_there(d: int) -> None:
    pool, indices = rows(100, d, bad=BAD), torch.tensor([[1, 2, 3], [4, 90, 70]])
    for order in (1, 2):
        with pytest.raises(ValueError, match=r"^batch_effective_rank: pool row 70 holds NaN or Inf, or"):
            sk.batch_effective_rank(pool, indices, order=order, backend="triton")
    # what no batch names is not read
    sk.batch_effective_rank(pool, indices[:1], backend="triton")


@pytest.mark.parametrize("d", (5, 150))
@pytest.mark.parametrize("op", ("batch_effective_rank2", "batch_spectrum"))
def test_an_index_outside_the_pool_is_named_by_its_batch(op: str, d: int) -> None:
    indices = torch.tensor([[1, 2, 3], [4, -1, 1 << 40]])
    with pytest.raises(ValueError, match=r"^batch_effective_rank: indices batch 1 holds an index outside the pool$"):
        overload(op)(rows(100, d), indices, False, True, "triton")


@pytest.mark.parametrize("all_rows", (True, False))
def test_a_mask_of_too_few_is_named_by_its_batch(all_rows: bool) -> None:
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 2:] = False
    start, draws = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 3, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^greedy_select: valid batch 1 leaves fewer rows than are to be picked$"):
        overload("greedy_select")(
            rows(2, 20, 4), start, None if all_rows else draws, valid, start[:, 0], 3, "effective_rank", True, "triton"
        )


def test_products_that_overflow_name_a_row() -> None:
    with pytest.raises(ValueError, match=r"^covariance: z row 0 holds NaN or Inf, or its squares leave float32"):
        sk.covariance(1e30 * rows(100, 5), backend="triton")


def test_in_inference_mode_and_after_it() -> None:
    for mode in (True, False):
        with torch.inference_mode(mode), pytest.raises(ValueError, match="covariance: z row 70"):
            sk.covariance(rows(100, 5, bad=BAD), backend="triton")


def test_the_words_are_in_the_hosts_memory_whatever_the_default_device() -> None:
    with torch.device("meta"):
        assert errors._Block(torch.device("cpu")).of_op["covariance"].device.type == "cpu"


def test_compiled_calls_raise_too() -> None:
    call = torch.compile(lambda z: sk.covariance(z, backend="triton") * 2, backend="eager", fullgraph=True)
    with pytest.raises(ValueError, match="covariance: z row 70"):
        call(rows(100, 5, bad=BAD))


# --- the search costs nothing where it is off -------------------------------------------------------------------------


@pytest.fixture
def _unchecked() -> Iterator[None]:
    sk.set_checks(False)
    yield
    sk.set_checks(True)


def launched() -> list[Any]:
    z, start = meta(200, 150), meta(1, 1, dtype=torch.int64)
    with recording() as records:
        covariance.covariance(z[None], True, True, 0, "ieee")
        covariance.covariance(z[None, :, :5], True, True, 0, "ieee")
        effective_rank.batch_effective_rank2(z, meta(3, 9, dtype=torch.int64), False, True)
        greedy.greedy_select(z[None], start, None, None, start[0], 1, "effective_rank", True)
        infonce.nt_xent(z, z, 0.5, None, "ieee")
        infonce.info_nce_grad_norms(z, z, None, 0.5, "info_nce", "ieee")
    return [record for record in records if "errors" in record.signature]


def test_kernels_have_words() -> None:
    assert len(launched()) == 7
    assert {record.signature["errors"] for record in launched()} == {"*i64"}


@pytest.mark.usefixtures("_unchecked")
def test_kernels_without_checks_have_none() -> None:
    assert {record.signature["errors"] for record in launched()} == {"constexpr"}
    assert {record.constants["errors"] for record in launched()} == {None}
    assert sk.covariance(rows(100, 5, bad=BAD), backend="triton").isnan().any()


# --- when it is raised on a GPU ---------------------------------------------------------------------------------------


class Gpu:
    """A device whose kernels run when it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device, self.capturing, self.waits, self.calls = torch.device("cuda", 0), False, 0, 0
        self.launched: list[tuple[Tensor, int]] = []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: self.synchronize())
        block = errors._Block(torch.device("cpu"))
        block.device = self.device
        monkeypatch.setitem(errors._blocks, self.device, block)

    def synchronize(self) -> None:
        self.waits += 1
        self.run()

    def run(self) -> None:
        for word, value in self.launched:
            word.clamp_(max=value)
        self.launched = []

    def call(self, op: str, notes: int | None = None) -> None:
        """An op; its kernel will note something."""

        def launch(z: Any) -> None:
            self.calls += 1
            found = errors.words(z)
            assert found is not None
            if notes is not None:
                self.launched.append((found[:1], notes))

        errors.noting(op, launch)(SimpleNamespace(device=self.device))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_the_next_call_of_any_op_raises_without_a_wait_before(gpu: Gpu) -> None:
    gpu.call("covariance", notes=17)
    gpu.call("whiten")  # the kernel is not yet done
    assert gpu.waits == 0
    gpu.run()
    with pytest.raises(
        ValueError, match=r"^covariance: z row 17 holds NaN or Inf, or its squares leave float32 \(noted on cuda:0\)$"
    ):
        gpu.call("whiten")
    assert gpu.calls == 2
    gpu.call("whiten")
    assert gpu.calls == 3


def test_the_first_row_is_waited_for(gpu: Gpu) -> None:
    gpu.call("covariance", notes=30)
    gpu.run()
    gpu.launched.append((errors._blocks[gpu.device].of_op["covariance"][:1], 17))
    with pytest.raises(ValueError, match="row 17"):
        gpu.call("whiten")


def test_check_waits_and_raises_once(gpu: Gpu) -> None:
    sk.check()
    assert gpu.waits == 1
    gpu.call("covariance", notes=(2 << 32) + 5)
    with pytest.raises(ValueError, match="covariance: z batch 2 row 5 holds NaN or Inf"):
        sk.check()
    sk.check()


def test_a_capture_is_not_broken_and_its_replays_note(gpu: Gpu) -> None:
    gpu.call("covariance", notes=1)
    gpu.run()
    gpu.capturing = True
    gpu.call("whiten", notes=4)
    assert gpu.calls == 2 and gpu.waits == 0
    replayed = list(gpu.launched)
    gpu.capturing = False
    with pytest.raises(
        ValueError, match=r"^covariance: z row 1 holds NaN or Inf, or its squares leave float32; whiten: z row 4 holds"
    ):
        sk.check()
    gpu.launched = replayed
    with pytest.raises(ValueError, match=r"^whiten: z row 4"):
        sk.check()


# --- csrc/greedy_cuda.h, on the host ----------------------------------------------------------------------------------


def test_the_chip_notes_rows_and_masks() -> None:
    pool, valid = rows(2, 40, 5, bad=(33, 39)), torch.ones(2, 40, dtype=torch.bool)
    valid[0, 2:] = False
    start = torch.zeros(2, 1, dtype=torch.int64)
    for part, good, noted in ((pool, valid, [(1 << 32) + 33, 2, CLEAN, CLEAN]), (pool[:1], valid[1:], [CLEAN] * 4)):
        words = torch.full((4 * STRIDE,), CLEAN)
        chip_select(part, start[: len(part)], None, good, start[: len(part), 0], 4, words=words)
        assert words[::STRIDE].tolist() == noted


@pytest.mark.parametrize("center", (False, True))
def test_wide_covariances_note_rows(center: bool) -> None:
    """Those that kernels/wide.py makes."""
    with pytest.raises(ValueError, match="z row 17 holds NaN or Inf"):
        sk.covariance(rows(1100, 140, bad=(17, 1099)), center=center, backend="triton")
