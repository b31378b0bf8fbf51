"""Batches, pools and statistics that are spread over the processes of a torch.distributed group.

Every function is a collective: all ranks of the group call it, in the same order. Gradients are those of one process
that held everything: where each rank's loss is the loss of the whole batch, DistributedDataParallel's mean over ranks is
the gradient of that loss.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch import op
from spectral_kernels.dispatch.backends import choose
from spectral_kernels.ops._rows import accumulation_dtype, is_negligible, read_rows
from spectral_kernels.ops._selection import Selection, check_generator, draw_seed, is_seen, row_keys
from spectral_kernels.ops.covariance import covariance
from spectral_kernels.ops.effective_rank import check_order, rank_of_spectrum, significant
from spectral_kernels.ops.greedy import OBJECTIVES, SPARE_DRAWS
from spectral_kernels.ops.greedy.reference import RIDGE, TIE, TIE_FLOOR
from spectral_kernels.ops.infonce import info_nce
from spectral_kernels.ops.infonce.arguments import check_rows, labels
from spectral_kernels.selection import MemoryBank

if not dist.is_available():
    raise ImportError("spectral_kernels.distributed needs torch.distributed, which this torch is built without")

from torch.distributed.nn import functional as collective

Group = dist.ProcessGroup | None


def gather_rows(z: Tensor, group: Group = None) -> Tensor:
    """Rows of all ranks, in the order of ranks; differentiable.

    With `loss = nt_xent(gather_rows(z0), gather_rows(z1))` on every rank, the gradients that DistributedDataParallel
    averages are exactly those of the whole batch.

    Args:
        z: (B, d), the same shape on every rank.

    Returns:
        (ranks · B, d).
    """
    z = checks.floating(z, "z", ndim=2)
    return torch.cat(collective.all_gather(z.contiguous(), group=group or dist.group.WORLD))


def gathered_info_nce(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    symmetric: bool = False,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    precision: str = "ieee",
    backend: str | None = None,
    group: Group = None,
) -> Tensor:
    """`info_nce` of this rank's queries whose negatives are the keys of all ranks: its own first, the others' behind them.

    Memory is O(ranks · B · d), and a rank does a share of the work, where `info_nce(gather_rows(query), gather_rows(key))`
    does all of it everywhere. The loss of one process is the mean over ranks (of "mean"), and its gradients are those that
    DistributedDataParallel averages, a learned temperature's included.

    Args:
        query, key: (B, d), the same shape on every rank.
        mask: bool (B, ranks · B), True where a pair is left out of the negatives; columns in the order of the keys: this
            rank's, then those of ranks 0, 1, ... without it. Not with symmetric, whose other half is on other ranks.
        groups: (B,) whole numbers: keys of an anchor's own group, on any rank, are none of its negatives.
        symmetric: the mean with the loss of this rank's keys against the queries of all ranks.
        temperature, reduction, precision, backend: as in `info_nce`.

    Returns:
        Scalar, or (B,) unreduced, of this rank's queries.

    Raises:
        ValueError: what `info_nce` raises; mask with symmetric.
    """
    if symmetric and mask is not None:
        raise ValueError("mask does not go with symmetric here: its other half is on other ranks")
    query, key, _ = check_rows(query, "query", key, "key", alone=dist.get_world_size(group) > 1)
    everyones = None
    if groups is not None:
        found = _gather(labels(groups, "groups", (len(query),), query), group)
        everyones = torch.cat(_own_first(list(found.split(len(query))), group))

    def one_way(anchors: Tensor, others: Tensor) -> Tensor:
        parts = list(collective.all_gather(others.contiguous(), group=group or dist.group.WORLD))
        return info_nce(
            anchors, torch.cat(_own_first(parts, group)), mask=mask, groups=everyones, temperature=temperature,
            reduction=reduction, precision=precision, backend=backend,
        )  # fmt: skip

    loss = one_way(query, key)
    return (loss + one_way(key, query)) / 2 if symmetric else loss


def _own_first(parts: list[Tensor], group: Group) -> list[Tensor]:
    return [parts.pop(dist.get_rank(group)), *parts]


def _sum(value: Tensor, group: Group) -> Tensor:
    total: Tensor = collective.all_reduce(value, group=group or dist.group.WORLD)
    return total


def distributed_covariance(
    z: Tensor, *, center: bool = True, normalize: bool = False, correction: int = 0, group: Group = None
) -> Tensor:
    """`covariance` of the rows of all ranks, from one all-reduce of d² numbers; differentiable.

    Each rank's covariance is taken about its own mean and moved to the common one (Chan, Golub & LeVeque 1983), the means
    in float64, so that a large mean does not cancel.

    Args:
        z: (n, d), n may differ between ranks. center, normalize, correction: as in `covariance`.

    Returns:
        (d, d), the same on every rank.

    Raises:
        ValueError: what `covariance` raises; not more rows in all than `correction`.
    """
    z = checks.floating(z, "z", ndim=2)
    correction = checks.integer(correction, "correction", 0)
    rows = read_rows(z, normalize)
    own = covariance(z, center=center, normalize=normalize)
    n = torch.full((1,), float(len(z)), dtype=torch.float64, device=z.device)
    mean = rows.mean(0, dtype=torch.float64)
    first = _sum(torch.cat([n, n * mean]) if center else n, group)
    count = float(first[0])
    if count <= correction:
        raise ValueError(f"correction must be below the {count:.0f} rows of all ranks, got {correction}")
    if center:
        shift = mean - first[1:] / count
        own = own + torch.outer(shift, shift).to(own.dtype)
    return _sum(len(z) / (count - correction) * own, group)


def distributed_effective_rank(
    z: Tensor, *, order: float = 1.0, center: bool = False, normalize: bool = True, group: Group = None
) -> Tensor:
    """`effective_rank` of the rows of all ranks; differentiable.

    Args:
        z: (n, d), n may differ between ranks. order, center, normalize: as in `effective_rank`.

    Returns:
        Scalar, the same on every rank; 0 where the rows have no spread.

    Raises:
        ValueError: what `distributed_covariance` raises; order below 0.
    """
    z = checks.floating(z, "z", ndim=2)
    order = check_order(order)
    # the rank does not depend on the scale; squares of squares do
    largest = _max(z.detach().abs().amax().double(), group)
    wide = z.double() / torch.where(largest > 0, largest, 1.0)
    matrix = distributed_covariance(wide, center=center, normalize=normalize, group=group)
    if center:
        rows = read_rows(wide.detach(), normalize)
        total, count = _sum(torch.stack([rows.square().sum(), rows.new_tensor(float(len(rows)))]), group)
        matrix = torch.where(is_negligible(matrix.trace(), total / count), 0.0, matrix)
    if order == 2:
        squares = matrix.square().sum()
        spread = squares > 0
        value = torch.where(spread, matrix.trace().square() / torch.where(spread, squares, 1.0), 0.0)
    else:
        values = torch.linalg.eigvalsh(matrix).flip(-1).clamp(min=0)
        value = rank_of_spectrum(significant(values), order)
    return value.to(accumulation_dtype(z.dtype))


class ShardedMemoryBank:
    """A `MemoryBank` whose rows are dealt out in blocks: rank r of R holds rows r·⌈n/R⌉ up to the next rank's.

    Args:
        n, d: of the whole bank. device: of the shard.

    Attributes:
        local: this rank's rows, a `MemoryBank`. first: the number of its first row. n, d.

    Raises:
        ValueError: n smaller than the number of ranks; d below 1.
    """

    def __init__(self, n: int, d: int, *, device: torch.device | str = "cpu", group: Group = None) -> None:
        self.group = group
        ranks = dist.get_world_size(group)
        self.n, self.d = checks.integer(n, "n", ranks), checks.integer(d, "d", 1)
        block = -(-n // ranks)
        self.first = min(n, dist.get_rank(group) * block)
        size = min(n, self.first + block) - self.first
        if size < 1:
            raise ValueError(f"n = {n} leaves rank {dist.get_rank(group)} of {ranks} without a row")
        self.local = MemoryBank(size, d, device=device)

    def update(self, indices: Tensor, z: Tensor) -> None:
        """Store embeddings by their numbers in the whole bank, wherever they live; one all-gather.

        Args:
            indices: (B,) int64. z: (B, d); the same B on every rank. Of a row given twice, the highest rank's wins.
        """
        indices = checks.row_indices(indices, "indices", self.n, 1)
        everywhere = _gather(indices, self.group)
        rows = _gather(z.detach().contiguous(), self.group)
        own = (everywhere >= self.first) & (everywhere < self.first + len(self.local.embeddings))
        if bool(own.any()):
            self.local.update(everywhere[own] - self.first, rows[own])

    def greedy_select(self, k: int, *, generator: torch.Generator, **options: object) -> Selection:
        """`sharded_greedy_select` of the rows seen so far."""
        return sharded_greedy_select(self.local.embeddings, k, generator=generator, group=self.group, **options)  # type: ignore[arg-type]


def _gather(value: Tensor, group: Group) -> Tensor:
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, value.contiguous(), group=group)
    return torch.cat(parts)


def _gather_ragged(value: Tensor, group: Group) -> list[Tensor]:
    """Each rank's rows, of which there may be another number on every rank."""
    count = torch.tensor([len(value)], device=value.device)
    counts = _gather(count, group).tolist()
    padded = value.new_zeros(max(counts), *value.shape[1:])
    padded[: len(value)] = value
    return [part[:n] for part, n in zip(_gather(padded, group).chunk(len(counts)), counts, strict=True)]


def sharded_greedy_select(
    shard: Tensor,
    k: int,
    *,
    candidates: int | None = 64,
    objective: str = "effective_rank",
    generator: torch.Generator,
    group: Group = None,
) -> Selection:
    """`greedy_select` from a pool whose rows are spread over the ranks; the picks are those of one process.

    With m candidates per step, all draws are known up front: the drawn rows, k·m at most, are gathered once, and every
    rank builds the batch by itself. With `candidates=None` every rank scores its own rows, and a pick costs two small
    collectives (the best score; then the row of the lowest key within its tie).

    Args:
        shard: (n, d), this rank's rows of the pool; n may differ between ranks, the pool is their concatenation.
        k, candidates, objective: as in `greedy_select`.
        generator: in the same state on every rank, and left in the same state.

    Returns:
        `Selection` with numbers of rows in the whole pool, the same on every rank.

    Raises:
        ValueError: what `greedy_select` raises.
    """
    shard = checks.floating(shard, "shard", ndim=2)
    checks.finite_rows(shard, "shard")
    checks.one_of(objective, "objective", OBJECTIVES)
    check_generator(generator)
    counts = _gather(torch.tensor([len(shard)]), group).tolist()
    total = checks.integer(sum(counts), "rows of all shards", 1)
    k = checks.integer(k, "k", 1, total)
    first = sum(counts[: dist.get_rank(group)])
    if candidates is None:
        return _all_rows(shard, k, first, total, objective, generator, group)
    candidates = checks.integer(candidates, "candidates", 1)
    return _drawn_rows(shard, k, first, total, candidates, objective, generator, group)


def _drawn_rows(
    shard: Tensor, k: int, first: int, total: int, candidates: int, objective: str, generator: torch.Generator,
    group: Group,
) -> Selection:  # fmt: skip
    # what greedy_select draws, in its order
    start = torch.randint(total, (1, SPARE_DRAWS), generator=generator, device=generator.device).to(shard.device)
    draws = torch.randint(total, (1, k, candidates), generator=generator, device=generator.device).to(shard.device)
    needed = torch.cat([start.reshape(-1), draws.reshape(-1)]).unique()
    own = needed[(needed >= first) & (needed < first + len(shard))] - first
    seed = draw_seed(shard.unsqueeze(0), generator)
    # a step that has nothing left to look at takes the seen row of the lowest key, or the row of the lowest
    order = row_keys(torch.arange(len(shard), device=shard.device) + first, total, seed).argsort()
    own = torch.cat([own, order[:k], order[is_seen(shard)[order]][:k]]).unique()
    numbers = torch.cat(_gather_ragged(own + first, group))
    rows = torch.cat(_gather_ragged(shard[own].detach(), group))
    # the gathered rows lie so that their order by key is what it is in the whole pool
    gathered = torch.arange(len(numbers), device=shard.device)
    place = torch.empty_like(gathered)
    place[row_keys(numbers, total, seed).argsort()] = row_keys(gathered, len(numbers), seed).argsort()
    rows, held = (torch.empty_like(part).index_copy(0, place, part) for part in (rows, numbers))
    chosen = op("greedy_select")(
        rows.unsqueeze(0), place[torch.searchsorted(numbers, start)], place[torch.searchsorted(numbers, draws)], None,
        seed, k, objective, True, choose("greedy_select", rows.device, None),
    )  # fmt: skip
    indices, ranks, objectives = (part[0] for part in chosen)
    return Selection(held[indices], ranks, objectives)


def _all_rows(
    shard: Tensor, k: int, first: int, total: int, objective: str, generator: torch.Generator, group: Group
) -> Selection:
    """The reference's steps (ops/greedy/reference.py), each rank scoring its own rows."""
    d = shard.shape[1]
    seen = is_seen(shard.detach())
    x = read_rows(shard.detach(), True, torch.float64).to(accumulation_dtype(shard.dtype)).double()
    left = torch.ones(len(x), dtype=torch.bool, device=x.device)
    s = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    q = (x != 0).any(-1).double() / RIDGE
    inverse = torch.eye(d, dtype=torch.float64, device=x.device) / RIDGE
    start = torch.randint(total, (1, SPARE_DRAWS), generator=generator, device=generator.device)[0].tolist()
    seed = draw_seed(shard.unsqueeze(0), generator)
    keys = row_keys(torch.arange(len(x), device=x.device) + first, total, seed)
    t = squares = gain = 0.0
    indices, ranks, objectives = [], [], []
    for step in range(k):
        score = q if objective == "logdet" else -s
        looked = left & seen
        if step == 0:
            mine = [row - first for row in start if first <= row < first + len(x) and bool(looked[row - first])]
            order = [start.index(row + first) for row in mine]
            proposal = (order[0], mine[0]) if mine else None
        else:
            best = score[looked].max() if bool(looked.any()) else torch.tensor(-math.inf, dtype=torch.float64)
            best = _max(best, group)
            proposal = _first(looked & (score >= best - TIE * best.abs() - TIE_FLOOR), keys)
        found = _lowest(proposal, x, s, q, first, group)
        if found is None:  # nothing seen is left to look at
            rest = looked if bool(_max(looked.any().double(), group)) else left
            found = _lowest(_first(rest, keys), x, s, q, first, group)
        assert found is not None
        pick, score_s, score_q, row = found
        if first <= pick < first + len(x):
            left[pick - first] = False
        length = float((row != 0).any())
        squares += 2 * score_s + length
        t += length
        gain += math.log1p(score_q)
        s += (x @ row).square()
        if objective == "logdet":
            v, scale = inverse @ row, 1 + score_q
            q = (q - (x @ v).square() / scale).clamp_min(0.0)
            inverse -= torch.outer(v, v) / scale
        indices.append(pick)
        ranks.append(t * t / squares if squares > 0 else 0.0)
        objectives.append(gain if objective == "logdet" else ranks[-1])
    wide = accumulation_dtype(shard.dtype)
    return Selection(
        torch.tensor(indices, device=x.device),
        torch.tensor(ranks, dtype=wide, device=x.device),
        torch.tensor(objectives, dtype=wide, device=x.device),
    )


def _max(value: Tensor, group: Group) -> Tensor:
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MAX, group=group)
    return value


def _first(rows: Tensor, keys: Tensor) -> tuple[int, int] | None:
    """The lowest of the keys of a mask of own rows, and its row."""
    if not bool(rows.any()):
        return None
    row = int(torch.where(rows, keys, 1 << 62).argmin())
    return int(keys[row]), row


def _lowest(
    proposal: tuple[int, int] | None, x: Tensor, s: Tensor, q: Tensor, first: int, group: Group
) -> tuple[int, float, float, Tensor] | None:
    """Of the ranks' proposals (key, own row) the one of the lowest key: its number in the pool, s, q and row."""
    packet = torch.zeros(4 + x.shape[1], dtype=torch.float64, device=x.device)
    packet[0] = math.inf
    if proposal is not None:
        key, row = proposal
        packet[:4] = torch.tensor([key, first + row, float(s[row]), float(q[row])], dtype=torch.float64)
        packet[4:] = x[row]
    packets = _gather(packet.unsqueeze(0), group)
    chosen = packets[packets[:, 0].argmin()]
    if math.isinf(float(chosen[0])):
        return None
    return int(chosen[1]), float(chosen[2]), float(chosen[3]), chosen[4:]
