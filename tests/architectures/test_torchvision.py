"""torchvision: detection models, whose forward takes lists, and what they are made of."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchvision")
import torchvision
from torchvision.models import detection

from .contract import Architecture, check

IMAGES = [torch.linspace(0, 40, 3 * 64 * 64).sin().abs().reshape(3, 64, 64) for _ in range(2)]
TARGETS = [
    {"boxes": torch.tensor([[4.0, 4.0, 40.0, 44.0]]), "labels": torch.tensor([1])} for _ in IMAGES
]


@pytest.fixture(autouse=True)
def _nms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Non-maximum suppression in Python: the operator's kernel is in a binary for another torch."""

    def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
        order, kept = scores.argsort(descending=True).tolist(), []
        overlaps = torchvision.ops.box_iou(boxes, boxes)
        while order:
            first, *order = order
            kept.append(first)
            order = [other for other in order if overlaps[first, other] <= iou_threshold]
        return torch.tensor(kept, dtype=torch.int64)

    monkeypatch.setattr(torchvision.ops.boxes, "nms", nms)
    # Instead of being compiled, which takes longer than all the rest.
    roi_align = sys.modules["torchvision.ops.roi_align"]
    eager = getattr(roi_align._roi_align, "__wrapped__", roi_align._roi_align)
    monkeypatch.setattr(roi_align, "_roi_align", eager)


def retinanet() -> nn.Module:
    backbone = detection.backbone_utils.mobilenet_backbone(
        backbone_name="mobilenet_v3_small", weights=None, fpn=True, trainable_layers=6
    )
    anchors = detection.anchor_utils.AnchorGenerator(((16,),) * 3, ((1.0,),) * 3)
    return detection.RetinaNet(
        backbone, num_classes=3, anchor_generator=anchors, min_size=64, max_size=64,
        topk_candidates=20,
    )  # fmt: skip


def faster_rcnn() -> nn.Module:
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 4, 1))
    backbone.out_channels = 8  # type: ignore[assignment]
    return detection.FasterRCNN(
        backbone, min_size=64, max_size=64,
        box_head=detection.faster_rcnn.TwoMLPHead(32, 16),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(16, 3),
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),)),
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], output_size=2, sampling_ratio=1),
        rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, box_detections_per_img=5,
    )  # fmt: skip


def detect(model: nn.Module) -> Any:
    """Losses in training; in eval what the head says, before boxes are chosen by threshold."""
    if model.training:
        return model(IMAGES, TARGETS)
    images, _ = model.transform(IMAGES)  # type: ignore[operator]
    features = model.backbone(images.tensors)  # type: ignore[operator]
    levels = list(features.values()) if isinstance(features, dict) else [features]
    head = model.head if hasattr(model, "head") else model.rpn.head  # type: ignore[union-attr]
    found = [head(levels)]  # type: ignore[operator]
    if hasattr(model, "roi_heads"):
        boxes = [target["boxes"] for target in TARGETS]
        roi: Any = model.roi_heads
        pooled = roi.box_roi_pool({"0": levels[0]}, boxes, images.image_sizes)
        found.append(roi.box_predictor(roi.box_head(pooled)))
    return found


ARCHITECTURES = [
    Architecture("RetinaNet", retinanet, detect),
    Architecture("Faster R-CNN", faster_rcnn, detect),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
def test_contract(architecture: Architecture) -> None:
    check(architecture)


@pytest.mark.parametrize("build", [retinanet, faster_rcnn])
def test_a_converted_detector_detects(build: Any) -> None:
    import snparam

    torch.manual_seed(0)
    model = build()
    snparam.convert_model(model, progress=False)
    with torch.no_grad():
        found = model.eval()(IMAGES)
    assert len(found) == 2
    assert all(set(one) == {"boxes", "labels", "scores"} for one in found)


def test_deformable_convolutions_are_read_like_convolutions() -> None:
    import snparam

    layer = torchvision.ops.DeformConv2d(4, 6, 3, groups=2)
    (row,) = snparam.plan_conversion(layer, blocks="auto")
    assert row.matrices == (2, 3, 18)
