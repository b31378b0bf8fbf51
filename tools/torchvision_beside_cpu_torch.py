"""Runs a program that imports torchvision, beside a torch that its binary part was not built for.

    python tools/torchvision_beside_cpu_torch.py examples/lightly_moco.py --epochs 4

The build that a package index gives is for one torch, here one for the CPU is beside it, and torchvision does not import
without the operators of its binary part. Tests and examples call none of them: a schema of each is enough. Not for users,
who get an error in the place of an operator: the package itself asks for the torchvision that fits.
"""

import importlib
import runpy
import sys
from pathlib import Path

import torch

_libraries: list[torch.library.Library] = []  # a Library that is collected takes its definitions with it


def make_importable() -> None:
    """Import torchvision, if need be with schemas for the operators that it looks up on import."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)
        importlib.import_module("torchvision")


if __name__ == "__main__":
    make_importable()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as Python does
    runpy.run_path(sys.argv[0], run_name="__main__")
