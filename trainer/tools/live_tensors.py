"""Count the memory and operations of a computation on fake tensors, which have no contents."""

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


def local_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor, or of this rank's shard of it."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def count_flops(func: Any, args: Sequence[Any], result: Any) -> int:
    """Return the operations of one call by torch's formulas.

    torch has formulas for the GPU's attention kernels only; the CPU's is counted
    the same way, as if it were not causal.
    """
    # an operator that calls another one, such as replaying it with the same random numbers
    if isinstance(func, HigherOrderOperator):
        inner = next((i for i, arg in enumerate(args) if isinstance(arg, OpOverload)), None)
        return 0 if inner is None else count_flops(args[inner], args[inner + 1 :], result)
    packet = func._overloadpacket
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    return int(flop_registry[packet](*args, out_val=result)) if packet in flop_registry else 0


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all live storages created under this mode, and the floating-point operations."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes that are live now."""
        self.peak = 0
        self.flops = 0
        self._sizes: dict[int, int] = {}
        self._counts_memory = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let ``torch.compile`` compile under this mode, which is inactive while it traces."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        local_args = [arg.to_local() if hasattr(arg, "to_local") else arg for arg in args]
        self.flops += count_flops(func, local_args, result)
        if self._counts_memory:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.track(leaf)
        return result

    @contextlib.contextmanager
    def flops_only(self) -> Iterator[None]:
        """Count only operations in this context; the caller reports memory with :meth:`track`."""
        self._counts_memory = False
        try:
            yield
        finally:
            self._counts_memory = True

    def track(self, tensor: torch.Tensor) -> None:
        """Count the storage of ``tensor`` for as long as it is live."""
        # a DTensor has no storage; its inner tensors do
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                inner = getattr(tensor, name)
                if isinstance(inner, torch.Tensor):
                    self.track(inner)
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._sizes:
            self._sizes[storage._cdata] = 0
            self._set_size(storage._cdata, storage.nbytes())
            weakref.finalize(storage, self._remove, storage._cdata)

    def _set_size(self, key: int, size: int) -> None:
        self.live += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    @contextlib.contextmanager
    def tracking_resizes(self) -> Iterator[MemoryCounter]:
        """Activate this mode and also track storage resizes.

        FSDP2 frees gathered parameters by resizing their storage to 0, which is not an operator.
        """
        original: Callable[..., Any] = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            if storage._cdata in self._sizes:
                self._set_size(storage._cdata, size)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
