"""ESAM: SAM that moves some of the tensors, and looks again at some of the samples."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_real, type_name
from ..direction import Part, Share
from .accumulation import kept
from .optimizer import SharpnessAwareOptimizer
from .step import AGAIN, AS_IS, Passes, Step


class ESAM(SharpnessAwareOptimizer):
    r"""Efficient SAM: a random share of the tensors is perturbed, and the samples whose loss rose most are used.

    .. math::
        M &\sim \text{Bernoulli}(\beta) \text{ for each tensor}, \qquad
        e = \frac{\rho}{\beta} \, \frac{M g}{\|M g\|_2 + \epsilon}, \qquad g = \nabla L_B(w) \\
        B^+ &= \text{the share } \gamma \text{ of } B \text{ with the largest } \ell_i(w + e) - \ell_i(w), \qquad
        w \leftarrow \text{base}\bigl(w,\ \nabla L_{B^+}(w + e)\bigr)

    The radius is divided by :math:`\beta`, the share that is perturbed: a tensor moves more seldom, and farther. All
    are updated. A step that draws no tensor with a gradient is a plain one. In the others first gradients of tensors
    that were not drawn are ignored, even NaN. Of n samples :math:`\lfloor \gamma n \rfloor` are used, at least one; of
    equal rises those of the first samples, and one that is NaN counts as the largest; with ``maximize`` the falls
    count. Batch norm wants more than one sample: drop a last batch that is shorter than :math:`2 / \gamma`. With
    ``beta=1, gamma=1`` this is :class:`sharpkern.SAM` with ``perturb_eps=1e-7``.

    **The closure** of ``gamma`` below 1 does not call backward: ``closure()`` returns the losses of the batch's
    samples, of shape [samples]; ``closure(index)`` those of the samples ``index`` only, an int64 tensor. A step calls
    it three times: for the first gradient, that of the mean; without gradients at :math:`w + e`; and for the second
    gradient, of :math:`B^+` only, which takes a share :math:`\gamma` of a forward and backward pass. It returns the
    mean of the first losses; under ``step(closure, scaler=)`` the losses are not scaled, the step does it. With
    ``gamma=1``, and to finish a step that ``first_step`` began, a closure is that of any optimizer.

    Args:
        params: iterable of tensors, of dicts, or of (name, tensor) pairs.
        base_optimizer: optimizer class, as in :class:`sharpkern.SAM`.
        rho: radius of the ball; a group may have its own.
        beta: :math:`\beta`, in (0, 1]. What is drawn depends on ``seed``, the step and the parameter's place among all,
            so that every process draws the same, and a resumed run goes on where it was.
        gamma: :math:`\gamma`, in (0, 1].
        seed: of the draws.
        perturb_eps: :math:`\epsilon`.
        policy, model, max_grad_norm, skip_nonfinite, flatten, m_sharpness, master_weights: as in
            :class:`sharpkern.SAM`. With ``model`` the pass without gradients leaves no trace in its buffers either. An
            adaptive policy looks at the whole gradient.
        perturb: tensors that may be drawn, as in :class:`sharpkern.SAM`.
        **base_kwargs: options of the base optimizer.

    Raises:
        ValueError, TypeError: for arguments out of range, and in a step for a closure that does not return such losses,
            before anything changed.
        RuntimeError: for such a closure that calls backward.

    A step with draws cannot be captured in a CUDA graph.

    Example::

        opt = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

        def closure(index=slice(None)):
            return nn.functional.cross_entropy(model(x[index]), y[index], reduction="none")

        loss = opt.step(closure)

        losses = closure()  # or by hand
        losses.mean().backward()
        if opt.first_step(zero_grad=True):
            with torch.no_grad():
                index = opt.select(losses, closure())
            closure(index).mean().backward()
        opt.second_step(zero_grad=True)

    Source: Du et al. 2022, `Efficient Sharpness-aware Minimization for Improved Training of Neural Networks
    <https://arxiv.org/abs/2110.03141>`_.
    """

    direction = Part()

    def __init__(
        self,
        params: Any,
        base_optimizer: Any = torch.optim.SGD,
        rho: float = 0.05,
        *,
        beta: float = 0.5,
        gamma: float = 0.5,
        seed: int = 0,
        perturb_eps: float = 1e-7,
        **kwargs: Any,
    ) -> None:
        for name, share in (("beta", beta), ("gamma", gamma)):
            check_real(share, name)
            if not 0 < share <= 1:
                raise ValueError(f"Invalid {name}: {share}")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed should be an integer, but got {seed!r}")
        self.beta, self.gamma, self.seed = float(beta), float(gamma), seed
        self.direction = Share(self.beta)
        super().__init__(params, base_optimizer, {"rho": rho}, perturb_eps=perturb_eps, **kwargs)

    def passes(self, step: Step) -> Passes:
        """ESAM: the step of SAM, of the tensors that are drawn."""
        if self.wants_second_pass(step) and (self.beta == 1 or step.keep(self.draw(step.t))):
            step.norm()
            step.ascend()
            yield AGAIN
        else:
            yield AS_IS
        step.descend()

    @property
    def _course(self) -> list[str]:
        return super()._course or ["the number of steps"] * (self.beta < 1)

    def draw(self, t: int) -> Tensor:
        """Whether each parameter, in the order of the groups, is perturbed in step t: bool, on the CPU."""
        count = sum(len(group["params"]) for group in self.param_groups)
        # Of one hash: its first bytes are the same however many parameters follow.
        digest = bytearray(hashlib.shake_128(f"{self.seed}:{t}".encode()).digest(8 * count + 8))
        numbers = torch.frombuffer(digest, dtype=torch.int64, count=count + 1)[:count]
        return ((numbers >> 11) & (2**53 - 1)).double() * 2.0**-53 < self.beta

    @torch.no_grad()
    def select(self, before: Tensor, after: Tensor) -> Tensor:
        """The samples that the second pass takes, of their losses at w and at w + e. Waits for no device.

        Between ``first_step`` and ``second_step`` it takes the buffers of ``model`` back to what the first pass left.

        Args:
            before, after: of shape [samples].

        Returns:
            Their indices, int64 in ascending order. They are the share ``gamma``, rounded down, at least one.

        Raises:
            ValueError, TypeError: for what are no losses of the same samples.
        """
        for losses in (before, after):
            self._check_losses(losses, before.numel() if isinstance(before, Tensor) else None)
        if self._step.is_open:
            self._step.freeze()
        count = max(1, int(self.gamma * before.numel()))
        rises = before - after if self.param_groups[0].get("maximize") else after - before
        return rises.argsort(descending=True, stable=True)[:count].sort().values

    def accumulate(self, closure: Callable[[], Any]) -> Any:
        """As in every class, with ``gamma=1``."""
        if self.gamma < 1:
            raise RuntimeError(
                f"ESAM with gamma={self.gamma} compares the losses of all samples of a step, which are not accumulated "
                "one micro-batch at a time: call step(closure), or take gamma=1"
            )
        return super().accumulate(closure)

    def adapt(self, closure: Callable[..., Any]) -> Callable[[], Any]:
        """Of a closure that returns losses of samples one that calls backward."""
        if self.gamma == 1:
            return closure
        try:
            inspect.signature(closure).bind(None)
        except ValueError:  # it has none to look at
            pass
        except TypeError:
            raise TypeError(
                f"ESAM with gamma={self.gamma} calls closure() for the losses of all samples, and closure(index) for "
                "those of some: this one takes no index"
            ) from None
        first: list[Tensor] = []  # losses of the first pass

        def backward() -> Tensor:
            if not first:
                losses = self._check_losses(closure(), None, trained=True)
                params = (p for group in self.param_groups for p in group["params"])
                if not self._step.layouts.flatten and any(p.grad is not None for p in params):
                    raise RuntimeError(
                        f"ESAM with gamma={self.gamma} calls backward itself: its closure returns losses, and does not"
                    )
                first.append(kept(losses))
            else:
                with torch.no_grad():
                    after = closure()
                index = self.select(first[0], after)
                losses = self._check_losses(closure(index), index.numel(), trained=True)
            loss = losses.mean()
            self._step.unscaler.scaled(loss).backward()
            return loss.detach()

        return backward

    def _check_losses(self, losses: Any, count: int | None, trained: bool = False) -> Tensor:
        """Raise for what are no losses, of ``count`` samples where that is known."""
        said = f"ESAM with gamma={self.gamma} needs the losses of the samples"
        if not isinstance(losses, Tensor):
            raise TypeError(f"{said}, a tensor of shape [samples], but got {type_name(losses)}")
        if not losses.is_floating_point():
            raise TypeError(f"{said}, but got a tensor of {losses.dtype}")
        if losses.dim() != 1 or not losses.numel():
            raise ValueError(
                f"{said}, a tensor of shape [samples], but got one of shape {tuple(losses.size())}; "
                "gamma=1 takes a closure that calls backward and returns one loss"
            )
        if count is not None and losses.numel() != count:
            raise ValueError(f"{said}: {count} of them, but got {losses.numel()}")
        if trained and not losses.requires_grad:
            raise ValueError(f"{said}, without a call of backward, but got a tensor that requires no gradient")
        return losses
