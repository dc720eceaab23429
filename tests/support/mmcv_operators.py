"""Replacements of the compiled mmcv operators that detectors need, so that mmdetection runs on a CPU."""

from __future__ import annotations

import sys
import types

import torch
import torchvision


def nms(boxes, scores, iou_threshold, offset):
    assert offset == 0
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def roi_align_forward(input, rois, output, *arguments, spatial_scale, sampling_ratio, aligned, **options):
    size = tuple(output.shape[-2:])
    output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(gradient, rois, *arguments, spatial_scale, sampling_ratio, aligned, **options):
    result = arguments[-1]
    size = gradient.shape[-2:]
    options = (spatial_scale, *size, *result.shape, sampling_ratio, aligned)
    result.copy_(torch.ops.torchvision._roi_align_backward(gradient, rois, *options))


def softnms(boxes, scores, dets, iou_threshold, sigma, min_score, method, offset):
    """Soft-NMS with the linear method."""
    assert (method, offset) == (1, 0)
    left, kept = {index: score.item() for index, score in enumerate(scores)}, []
    while left:
        best = max(left, key=left.__getitem__)
        if left[best] < min_score:
            break
        dets[len(kept)] = torch.tensor([*boxes[best].tolist(), left.pop(best)])
        kept.append(best)
        overlaps = torchvision.ops.box_iou(boxes[best][None], boxes)[0].tolist()
        left = {
            index: score * (1 - overlaps[index] * (overlaps[index] > iou_threshold)) for index, score in left.items()
        }
    return torch.tensor(kept, dtype=torch.long)


def missing(name):
    def refuse(*args, **kwargs):
        raise NotImplementedError(f"there is no {name} here")

    return refuse


def install() -> None:
    """Put the operators where mmcv looks for its own. Others raise when they are called."""
    module = types.ModuleType("mmcv._ext")
    for function in (nms, roi_align_forward, roi_align_backward, softnms):
        setattr(module, function.__name__, function)

    def other(name):
        if name.startswith("__"):
            raise AttributeError(name)
        return missing(name)

    module.__getattr__ = other
    sys.modules["mmcv._ext"] = module
