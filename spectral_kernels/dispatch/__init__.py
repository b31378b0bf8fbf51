"""How an op is registered, which implementation of it runs, and why another cannot."""

from spectral_kernels.dispatch.backends import Fit, choose, float64_needed, use_backend
from spectral_kernels.dispatch.derivatives import differentiate
from spectral_kernels.dispatch.registration import as_tensor, composed, cpp_call, define, op, overload

__all__ = [
    "Fit",
    "as_tensor",
    "choose",
    "composed",
    "cpp_call",
    "define",
    "differentiate",
    "float64_needed",
    "op",
    "overload",
    "use_backend",
]
