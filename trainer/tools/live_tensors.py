"""What a computation of tensors without contents would hold and do: bytes that live at each moment, and operations."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


def size_of(tensor: torch.Tensor) -> int:
    """Bytes of what this rank holds of a tensor."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def flops_of(func: Any, args: Sequence[Any], found: Any) -> int:
    """Of one call, by torch's own formulas; attention, of whose kernels those know the GPU's only, as if it were not causal."""
    if isinstance(func, HigherOrderOperator):  # one that calls another, such as with the same random numbers once more
        called = next((i for i, arg in enumerate(args) if isinstance(arg, OpOverload)), None)
        return 0 if called is None else flops_of(args[called], args[called + 1 :], found)
    name = func._overloadpacket
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if name is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return int(flop_registry[name](*args, out_val=found)) if name in flop_registry else 0


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that were made under it and still live, and floating-point operations."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self.flops = 0
        self._sizes: dict[int, int] = {}
        self._aside = False

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Have ``torch.compile`` compile under this mode, which is off while it traces."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        here = [arg.to_local() if hasattr(arg, "to_local") else arg for arg in args]
        self.flops += flops_of(func, here, found)
        for leaf in () if self._aside else tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return found

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Count operations alone: what lies in memory is said by :meth:`note`."""
        self._aside = True
        try:
            yield
        finally:
            self._aside = False

    def note(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor`` for as long as it lives."""
        if is_traceable_wrapper_subclass(tensor):  # a DTensor is what it is made of
            for name in tensor.__tensor_flatten__()[0]:
                inner = getattr(tensor, name)
                if isinstance(inner, torch.Tensor):
                    self.note(inner)
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            self._set(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._gone, storage._cdata)

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    @contextlib.contextmanager
    def watching_sizes(self) -> Iterator[Live]:
        """Count under this mode; FSDP2 frees what it gathered by giving its storage the size 0, which no operator sees."""
        plain: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            found = plain(storage, size)
            if storage._cdata in self._sizes:
                self._set(storage._cdata, size)
            return found

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
