"""Spectra: the second moment (or the smaller Gram matrix) in float64 by Triton, its eigenvalues by torch."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from spectral_kernels.kernels.launch import AotCall
from spectral_kernels.kernels.moments import moments
from spectral_kernels.kernels.rows import dense_rows
from spectral_kernels.ops._rows import accumulation_dtype, is_negligible
from spectral_kernels.ops.spectrum.reference import eigenvalues


def gathered_spectrum(
    z: Tensor,
    index: Tensor | None,
    center: bool,
    normalize: bool,
    solve: Callable[[Tensor, torch.dtype], Tensor] = eigenvalues,
) -> Tensor:
    """Spectrum (b, d) of z (b, n, d), or of the rows of z (N, d) that index (b, n) names; last stride 1.

    `solve` takes float64 matrices and the dtype that their descending eigenvalues are to have.
    """
    n, d = z.shape[-2] if index is None else index.shape[1], z.shape[-1]
    # half precision goes by way of float32, exactly: Triton 3.6 compiles no float64 products of it
    rows = z if z.dtype == torch.float64 else z.float()
    found = moments(rows, index, center, normalize, acc=torch.float64, count=n, gram=n < d)
    matrix, mean = found.matrix, found.mean if found.mean is not None else found.statistics.mean()
    if center:
        assert mean is not None
        spread = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        noise = is_negligible(spread, spread + mean.square().sum(-1))
        matrix = torch.where(noise[..., None, None], 0.0, matrix)
    values = solve(matrix, accumulation_dtype(z.dtype))
    return pad(values, (0, d - values.shape[-1]))


def spectrum(z: Tensor, center: bool, normalize: bool) -> Tensor:
    return gathered_spectrum(dense_rows(z), None, center, normalize)


def aot_calls() -> list[AotCall]:
    """The float64 second moments of either side; eigenvalues are torch's."""

    def call(dtype: torch.dtype) -> None:
        for n, d, gram in ((4096, 512, False), (4096, 64, False), (64, 512, True)):
            z = torch.empty(1, n, d, dtype=dtype, device="meta")
            moments(z, None, False, True, acc=torch.float64, gram=gram)
            moments(z, None, False, False, acc=torch.float64, gram=gram)

    return [lambda: call(torch.float32), lambda: call(torch.float64)]
