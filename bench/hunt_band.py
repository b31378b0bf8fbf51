"""Hunt for an anchor outside its gradient band: random batches of every family, and hill climbing towards the bounds.

    python bench/hunt_band.py --minutes 10

Prints what was tried; the exit status is 1 and the batch's arguments are printed where an anchor is outside.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "python_tests" / "theory"))
from batches import FAMILIES, LOSSES, Batch, batch


def draw(generator: torch.Generator) -> dict[str, object]:
    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    large = integer(0, 30) == 0
    return {
        "family": FAMILIES[integer(0, len(FAMILIES) - 1)],
        "loss": LOSSES[integer(0, len(LOSSES) - 1)],
        "n": integer(2, 4096) if large else int(2 ** uniform(1, 9)),
        "d": integer(2, 512) if large else int(2 ** uniform(1, 7)),
        "temperature": 10 ** uniform(-2, 1),
        "closeness": uniform(0, 1) if integer(0, 3) else 1 - 10 ** uniform(-12, 0),
        "seed": integer(0, 2**31),
        "dtype": (torch.float64, torch.float32)[integer(0, 1)],
    }


def climb(made: Batch, rank: int, steps: int, generator: torch.Generator) -> tuple[int, int]:
    """Move rows to where a norm comes nearer to its bound; anchors tried, and how many were outside."""
    nearest, anchors, outside = 0.0, 0, 0
    for step in range(steps):
        size = 0.5 * 0.97**step
        parts = [made.query, made.key, *([] if made.queue is None else [made.queue])]
        moved = [part + size * torch.randn(part.shape, generator=generator).to(part.dtype) for part in parts]
        other = Batch(moved[0], moved[1], None if made.queue is None else moved[2], made.loss, made.temperature)
        band, norms = other.band(rank=rank), other.norms()
        slack = 1e-8 * norms + 1e-12
        outside += int(((norms < band.lower - slack) | (norms > band.upper + slack)).sum())
        anchors += len(norms)
        now = float(torch.maximum(norms / band.upper, band.lower / norms.clamp(min=1e-30)).max())
        if now > nearest:
            made, nearest = other, now
    return anchors, outside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time, printed")
    arguments = parser.parse_args()
    seed = int(time.time()) if arguments.seed is None else arguments.seed
    generator = torch.Generator().manual_seed(seed)
    print(f"seed {seed}", flush=True)
    until = time.monotonic() + 60 * arguments.minutes
    batches = anchors = outside = climbed = 0
    while time.monotonic() < until:
        given = draw(generator)
        made = batch(**given)  # type: ignore[arg-type]
        d = made.query.shape[1]
        for options in ({"rank": int(torch.randint(0, d + 1, (), generator=generator))}, {"kind": "a_priori"}):
            found = made.outside(**options)
            if found:
                print(f"OUTSIDE: {found} anchors of {given}, {options}", flush=True)
            outside += found
            anchors += len(made.query) * (2 if made.loss == "nt_xent" else 1)
        batches += 1
        if batches % 20 == 0:
            given |= {"n": 2 + batches % 7, "d": 2 + batches % 5, "dtype": torch.float64}
            tried, found = climb(batch(**given), int(batches % 3 > 0), 60, generator)  # type: ignore[arg-type]
            if found:
                print(f"OUTSIDE while climbing: {found} anchors from {given}", flush=True)
            climbed, anchors, outside = climbed + 1, anchors + tried, outside + found
    print(f"{batches} batches and {climbed} climbs of 60 steps, {anchors} anchors: {outside} outside")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
