"""The buffers of a model, left alone for a while: all of them, or the running statistics of norm layers."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@contextmanager
def frozen_batch_stats(model: nn.Module) -> Iterator[None]:
    """Within the block, norm layers of ``model`` that track running statistics do not update them.

    Nothing else changes: a layer in training mode normalizes with the batch's statistics, one in evaluation
    mode with the running ones. ``running_mean``, ``running_var`` and ``num_batches_tracked`` come out as they
    went in, to the bit. Nests, and survives exceptions. :func:`sharpkern.frozen_buffers` is for all other buffers, too.

    SAM's second pass runs at perturbed weights; its batch statistics are not those of the model.
    """
    tracking = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    # The forward of batch norm updates only what it tracks; evaluation mode reads the buffers all the same.
    # Instance norm updates whatever buffers it has: it gets copies to spoil.
    flags = [m for m in tracking if isinstance(m, _BatchNorm)]
    swapped = [
        (m, name, buffer)
        for m in tracking
        if not isinstance(m, _BatchNorm)
        for name, buffer in m._buffers.items()
        if buffer is not None and name in _STATISTICS
    ]

    def thaw() -> None:
        for norm in flags:
            norm.track_running_stats = True
        for module, name, buffer in swapped:
            module._buffers[name] = buffer

    try:
        try:
            for norm in flags:
                norm.track_running_stats = False
            for module, name, buffer in swapped:
                module._buffers[name] = buffer.clone()
            yield
        finally:
            thaw()
    except BaseException:
        thaw()  # an interrupt may have come in the middle of it
        raise


@contextmanager
def frozen_buffers(model: nn.Module) -> Iterator[None]:
    """After the block every buffer of ``model`` is what it was before it: the same tensor, memory and bits.

    Within it the model computes with its buffers and changes them as always: batch norm's statistics, spectral norm's u
    and v, observers, codebooks, counters; in place, anew (``self.buffer = new``), in another size, or None. A buffer
    that is registered within the block stays. One in the memory of a parameter is left to who trains that. Tensors that
    are no registered buffers are not looked after. Nests, and survives exceptions.

    It costs a copy of every buffer when the block begins and one back when it ends, 4 bytes of traffic a byte of
    buffer, and as much memory within the block as the buffers take: nothing tells beforehand which of them a pass will
    change, and some change unseen (``buffer.data``). Where there are large constants among them, quantized weights in
    buffers, say, hand over the module whose buffers change. Nothing is read on the host, and no address changes.
    """
    buffers = Buffers(model)
    try:
        try:
            yield
        finally:
            buffers.restore()
    except BaseException:
        buffers.restore()  # an interrupt may have come in the middle of it
        raise


class _Home(NamedTuple):
    """Where a buffer lies: an alias of it, its address, and its version when that was noted."""

    buffer: Tensor
    alias: Tensor
    address: int
    version: int | None

    def enter(self) -> None:
        """Let the buffer lie there again, whatever size or memory it was given."""
        self.buffer.data = self.alias
        if self.alias.data_ptr() == 0 != self.address:  # freed, too
            begin, end = _span(self.alias)
            offset = int(self.alias.storage_offset()) * self.alias.element_size()
            self.alias.untyped_storage().resize_(offset + end - begin)


class Buffers:
    """The buffers of a model as they are, to go back to. Making one changes nothing; ``restore`` may be called again.

    The model keeps its own tensors meanwhile and copies are written back: whoever holds a buffer or its address (a
    wrapper that broadcasts, a captured or compiled forward, another module with a view) shares in it, and nothing is
    recompiled.

    Args:
        trained: tensors beside the model's parameters that keep what is written to them.
    """

    def __init__(self, model: nn.Module, trained: Iterable[Tensor] = ()) -> None:
        modules = list(model.modules())
        self._places = [(m._buffers, name, buffer) for m in modules for name, buffer in m._buffers.items()]
        self._homes: list[_Home] = []
        self._copies: dict[int, Tensor] = {}  # of every buffer with elements, by id
        self._other: list[Tensor] = []  # those that torch copies one by one
        # Memory without elements that repeat, and its copies, of every device and dtype.
        self._memory: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        buffers = list({id(b): b for _, _, b in self._places if b is not None}.values())
        plain = [b for b in buffers if _is_plain(b) and (b.data_ptr() or not b.numel())]
        storages = {_storage(b) for b in plain}
        params = (p for m in modules for _, p in m._parameters.items() if p is not None)
        beside = {id(t): t for t in itertools.chain(params, trained)}.values()
        taken = _Spans(t for t in beside if _is_plain(t) and _storage(t) in storages)
        with torch.inference_mode():
            for buffer in plain:
                if buffer not in taken:
                    self._keep(buffer)
            for memory, copies in self._memory.values():
                torch._foreach_copy_(copies, memory)
            for buffer in buffers:
                if not (is_lazy(buffer) or buffer.is_meta or _is_plain(buffer)):
                    self._other.append(buffer)
                    self._copies[id(buffer)] = buffer.clone()

    def _keep(self, buffer: Tensor) -> None:
        alias = buffer.data
        version = None if buffer.is_inference() else buffer._version
        self._homes.append(_Home(buffer, alias, buffer.data_ptr(), version))
        for dim, stride in enumerate(alias.stride()):
            if stride == 0:
                alias = alias.narrow(dim, 0, 1)
        memory, copies = self._memory.setdefault((buffer.device, buffer.dtype), ([], []))
        memory.append(alias)
        copies.append(torch.empty_like(alias))
        self._copies[id(buffer)] = copies[-1]

    def restore(self) -> None:
        """Every buffer is what it was, in its place and in its memory."""
        for names, name, buffer in self._places:
            now = names[name] if name in names else None  # noqa: SIM401 (a scripted module's have no get)
            if now is buffer:
                continue
            if _is_moved(now, buffer) and id(buffer) in self._copies:
                now.data.copy_(self._copies[id(buffer)])
            else:
                names[name] = buffer
        for home in self._homes:
            home.enter()
        with torch.inference_mode():
            for memory, copies in self._memory.values():
                torch._foreach_copy_(memory, copies)
            for buffer in self._other:
                buffer.copy_(self._copies[id(buffer)])
        # A graph over what is gone raises, as in torch; one over a buffer that never changed does not.
        changed = [h.buffer for h in self._homes if h.version is not None and h.buffer._version != h.version]
        if changed:
            torch.autograd.graph.increment_version(changed)


def _is_moved(now: Tensor | None, then: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a tensor is in another one's place because the model was moved or cast."""
    if now is None or then is None or (now.device, now.dtype) == (then.device, then.dtype):
        return False
    return now.size() == then.size()


def _is_plain(t: Tensor) -> bool:
    """Whether its elements lie in memory as they are."""
    if is_lazy(t) or t.is_meta or t.is_nested or t.layout != torch.strided:
        return False
    return not (
        t.is_quantized or t.is_conj() or t.is_neg() or type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__
    )


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _span(t: Tensor) -> tuple[int, int]:
    """First address and the one behind the last."""
    begin = t.data_ptr()
    if t.is_contiguous() or not t.numel():
        return begin, begin + t.nbytes
    last = sum((n - 1) * stride for n, stride in zip(t.size(), t.stride(), strict=True))
    return begin, begin + (last + 1) * t.element_size()


class _Spans:
    """Memory of tensors, to ask whether another one lies in it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        spans = sorted(map(_span, tensors))
        self.begins = [begin for begin, _ in spans]
        self.ends = list(itertools.accumulate((end for _, end in spans), max))

    def __contains__(self, t: Tensor) -> bool:
        begin, end = _span(t)
        before = bisect_left(self.begins, end)
        return before > 0 and self.ends[before - 1] > begin
