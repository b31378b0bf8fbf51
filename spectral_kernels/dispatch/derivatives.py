"""Derivatives of a registered op: first ones by its backward, all others by its reference."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from spectral_kernels import checks
from spectral_kernels.dispatch.registration import LIBRARY, PLAIN, overload, without_autocast


class _Existing(torch.autograd.Function):
    """The identity, which raises where a derivative comes back as NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if checks.readable(grad) and bool(grad.isnan().any()):
            raise RuntimeError(f"{ctx.name} has no second derivative here: torch has none where eigenvalues repeat")
        return grad, None


def differentiate(
    name: str,
    *,
    tensors: int = 1,
    keep: Callable[..., tuple[Tensor | None, ...]] = lambda inputs, outputs: (),
    backward: Callable[..., tuple[Tensor | None, ...]] | Literal["reference"] | None = "reference",
) -> None:
    """Register the derivatives of an op; only its first output has one.

    First derivatives in reverse mode are `backward`'s. All others (second and higher ones, forward mode, the transforms of
    torch.func) are those of the reference, which is plain PyTorch, whatever the backend.

    Args:
        tensors: how many of the op's first arguments are tensors; these may have gradients.
        keep: from all arguments and the outputs (a tuple) to what the backward needs besides the tensors.
        backward: `backward(grad, tensors, kept, options, wanted)`, options being the other arguments, to a gradient or None
            for each tensor. "reference": that of the reference; None: outside transforms the result has no gradient.
    """
    registered = overload(name)
    plain = PLAIN[name]

    def below(keyset: Any, inputs: Sequence[Any]) -> Any:
        # as torch.library.register_autograd gets there, which has no forward mode; nothing public does
        with torch._C._AutoDispatchBelowAutograd():
            return registered.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)  # type: ignore[attr-defined]

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, keyset: Any, *inputs: Any) -> Any:
            result = below(keyset, inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            # numbers among the options are tensors, a few bytes without a gradient
            ctx.options = inputs[tensors:]
            ctx.save_for_backward(*inputs[:tensors], *keep(inputs, outputs))
            ctx.mark_non_differentiable(*outputs[1:])
            return result

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
            inputs, kept = ctx.saved_tensors[:tensors], ctx.saved_tensors[tensors:]
            wanted = ctx.needs_input_grad[1 : 1 + tensors]
            # create_graph=True: whoever differentiates this gradient needs plain operations
            found = backward if callable(backward) and not torch.is_grad_enabled() else _plain_backward
            gradients = found(grad, inputs, kept, ctx.options, wanted)
            return (None, *gradients, *[None] * len(ctx.options))

    def _plain_backward(
        grad: Tensor, inputs: Sequence[Any], _: Any, options: Sequence[Any], wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        places = [place for place, want in enumerate(wanted) if want]

        def first_output(*differentiated: Tensor) -> Tensor:
            arguments = list(inputs)
            for place, tensor in zip(places, differentiated, strict=True):
                arguments[place] = tensor
            result = plain(*arguments, *options)
            output: Tensor = result[0] if isinstance(result, tuple) else result
            return output

        differentiated = (_Existing.apply(inputs[place], name) for place in places)  # type: ignore[no-untyped-call]
        pull = torch.func.vjp(first_output, *differentiated)[1]
        gradients = dict(zip(places, without_autocast(pull, (grad,)), strict=True))
        return tuple(gradients.get(place) for place in range(tensors))

    def autograd(keyset: Any, *inputs: Any) -> Any:
        if checks.transformed():
            return plain(*inputs)
        if (
            backward is not None
            and torch.is_grad_enabled()
            and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
        ):
            return Derivative.apply(keyset, *inputs)  # type: ignore[no-untyped-call]
        return below(keyset, inputs)

    LIBRARY.impl(name, autograd, "Autograd", with_keyset=True)
