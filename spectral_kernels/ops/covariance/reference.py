"""Covariance as its definition (docs/theory.md, notation)."""

import torch
from torch import Tensor

from spectral_kernels.ops._rows import (
    accumulation_dtype,
    center_rows,
    in_range,
    is_negligible,
    read_rows,
    read_rows_backward,
    too_narrow,
)


def covariance(z: Tensor, center: bool, normalize: bool, correction: int, precision: str) -> Tensor:
    dtype = accumulation_dtype(z.dtype)
    rows = read_rows(z, normalize)
    x = center_rows(rows, center)
    if too_narrow(z, rows.square().sum((-2, -1)), x.square().sum((-2, -1))):
        matrix = second_moment64(z, center, normalize) * (z.shape[-2] / (z.shape[-2] - correction))
        in_range(matrix.diagonal(dim1=-2, dim2=-1), dtype)
        return matrix.to(dtype)
    return x.mT @ x / (z.shape[-2] - correction)


def covariance_backward(
    grad: Tensor, z: Tensor, center: bool, normalize: bool, correction: int, precision: str
) -> Tensor:
    x = center_rows(read_rows(z, normalize), center)
    dx = x @ (grad + grad.mT) / (z.shape[-2] - correction)
    # dx has no mean when x has none, up to rounding
    return read_rows_backward(center_rows(dx, center), z, normalize)


def second_moment64(z: Tensor, center: bool, normalize: bool) -> Tensor:
    """M or C in float64, exactly 0 where C is rounding noise."""
    rows = read_rows(z, normalize, torch.float64)
    x = center_rows(rows, center)
    moment = x.mT @ x
    if center:
        spread = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
        noise = is_negligible(spread, rows.square().sum((-2, -1)))
        moment = torch.where(noise[..., None, None], 0.0, moment)
    return moment / z.shape[-2]
