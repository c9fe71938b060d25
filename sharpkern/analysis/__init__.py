"""What sharpness-aware training is about, measured: the Hessian's spectrum, the sharpness, the loss around the weights.

The optimizers do not need it, nor what it is built on: ``pip install "sharpkern[analysis]"``.
"""

try:
    from .hessian import Eigenpairs, top_eigenpairs, top_eigenvalues
    from .landscape import filter_normalized, loss_along, sgd_step_along
    from .monitor import SharpnessMonitor
    from .sharpness import sharpness
    from .spectrum import Estimate, SpectralDensity, frobenius_norm, spectral_density, trace
except ModuleNotFoundError as error:
    package = str(error.name).partition(".")[0]
    raise ModuleNotFoundError(
        f'sharpkern.analysis needs {package}: pip install "sharpkern[analysis]"', name=package
    ) from None

__all__ = [
    "Eigenpairs",
    "Estimate",
    "SharpnessMonitor",
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
