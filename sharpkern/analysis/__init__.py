"""What sharpness-aware training is about, measured: the Hessian's spectrum, the sharpness, the loss around the weights.

The optimizers do not need it, nor what it is built on: ``pip install "sharpkern[analysis]"``.
"""

try:
    from .hessian import (
        Eigenpairs,
        Estimate,
        SpectralDensity,
        frobenius_norm,
        spectral_density,
        top_eigenpairs,
        top_eigenvalues,
        trace,
    )
    from .landscape import filter_normalized, loss_along, sgd_step_along
    from .sharpness import sharpness
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    raise ModuleNotFoundError(
        f'sharpkern.analysis needs {package}: pip install "sharpkern[analysis]"', name=package
    ) from None

__all__ = [
    "Eigenpairs",
    "Estimate",
    "SpectralDensity",
    "filter_normalized",
    "frobenius_norm",
    "loss_along",
    "sgd_step_along",
    "sharpness",
    "spectral_density",
    "top_eigenpairs",
    "top_eigenvalues",
    "trace",
]
