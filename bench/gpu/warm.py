"""Every case called once, by many processes that share one cache: Triton's kernels are compiled before they are timed."""

import os
import subprocess
import sys
import time

import torch

from gpu.context import Context


def one(context: Context, share: int, shares: int) -> int:
    """This process's part of the cases."""
    generator = torch.Generator(device=context.device).manual_seed(0)
    for case in context.cases()[share::shares]:
        begin = time.monotonic()
        try:
            inputs = case.make(generator, context.device)
            for call in (case.ours, *case.routes.values()):
                call(*inputs)
        except Exception as error:  # the other cases are still to be compiled
            context.write(case=case.name, failed=f"{type(error).__name__}: {error}"[:300])
        context.write(case=case.name, compiled_s=round(time.monotonic() - begin, 1))
    return 0


def run(context: Context) -> int:
    if context.plant == "hang":
        time.sleep(3600)
    share = os.environ.get("GPU_CHECK_SHARE")
    if share is not None:
        return one(context, *map(int, share.split("/")))
    shares = 2 if context.tiny else min(14, os.cpu_count() or 1)
    # the same process session: the parent ends all of them when time is up
    workers = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"GPU_CHECK_SHARE": f"{i}/{shares}"})
        for i in range(shares)
    ]
    return max(abs(worker.wait()) for worker in workers)
