"""A new op needs its reference and nothing else: schema, fake implementation and derivatives come from there."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from spectral_kernels.dispatch import as_tensor, backends, define, differentiate, op, overload


def weighted_gram(z: Tensor, weight: Tensor | None, power: float, count: int) -> tuple[Tensor, Tensor]:
    rows = z if weight is None else z * weight[:, None]
    gram = rows.mT @ rows / count**power
    return gram, gram.diagonal()


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # an op of the tests, which the registry's completeness is not about
        patch.setattr(backends, "OPS", dict(backends.OPS))
        patch.setattr(backends, "SHARED", dict(backends.SHARED))
        define(weighted_gram, cpp="reference", triton=False)
        differentiate("weighted_gram", tensors=2)
        yield


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_schema_is_the_signature_with_numbers_as_tensors() -> None:
    assert str(overload("weighted_gram")._schema) == (
        "spectral_kernels::weighted_gram(Tensor z, Tensor? weight, Tensor power, SymInt count, str backend)"
        " -> (Tensor, Tensor)"
    )


@pytest.mark.parametrize("weight", [True, False])
def test_op_passes_opcheck(weight: bool) -> None:
    arguments = (rows(5, 3), rows(5) if weight else None, as_tensor(1.5), 4, "cpp")
    torch.library.opcheck(overload("weighted_gram"), arguments)


def test_derivatives_are_those_of_the_reference() -> None:
    z, weight = rows(5, 3), rows(5)

    def first(z: Tensor, weight: Tensor) -> Tensor:
        found: Tensor = op("weighted_gram")(z, weight, as_tensor(1.5), 4, "reference")[0]
        return found

    assert torch.autograd.gradcheck(first, (z, weight)) and torch.autograd.gradgradcheck(first, (z, weight))
    forward = torch.func.jvp(first, (z, weight), (z, weight))[1]
    torch.testing.assert_close(forward, 4 * first(z, weight))


def test_compiles_with_dynamic_shapes() -> None:
    compiled = torch.compile(lambda z: op("weighted_gram")(z, None, 0.5, 4, "reference"), fullgraph=True, dynamic=True)
    for n in (5, 9):
        z = rows(n, 3)
        torch.testing.assert_close(compiled(z), weighted_gram(z, None, 0.5, 4))


def test_an_annotation_that_no_schema_has_is_refused() -> None:
    def untyped(z: list[Tensor]) -> Tensor:
        return z[0]

    with pytest.raises(TypeError, match=r"untyped: argument z is a list\[torch.Tensor\], which an op cannot take"):
        define(untyped)
