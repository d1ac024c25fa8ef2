"""What all tests share."""

import importlib.util
from pathlib import Path

import torch
from hypothesis import settings

# No deadline: how long an example takes says nothing about whether the property holds.
settings.register_profile("snparam", deadline=None)
settings.load_profile("snparam")

# Small matrices: two threads wait for each other longer than one computes, on a busy machine forty
# times as long.
torch.set_num_threads(1)


def declare_torchvision_schemas() -> None:
    """Let a torchvision that was built for another torch be imported.

    Its Python code registers kernels for two operators that its binary declares, and whose binary
    does not load next to a CPU-only torch from another index.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    binaries = [path for path in Path(found.origin).parent.glob("_C*") if path.is_file()]
    try:
        for binary in binaries:
            torch.ops.load_library(str(binary))
    except OSError:
        binaries = []
    if not binaries:
        library = torch.library.Library("torchvision", "DEF")
        _LIBRARIES.append(library)
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_LIBRARIES: list[torch.library.Library] = []  # which undo their definitions when they are collected
declare_torchvision_schemas()
