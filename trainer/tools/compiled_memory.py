"""Estimate the memory of compiled code on fake tensors, with inductor's graphs but without its kernels.

Inductor itself splits the model into a forward and a backward graph and decides
what the forward keeps for the backward. This module stops there and estimates
which results the kernels would write to memory, by the main rules that inductor
follows. A result that is computed inside the kernels that use it is not in memory.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from enum import Enum, auto
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from amlaunch.trainer.tools.live_tensors import MemoryCounter, local_bytes

MAX_RECOMPUTED_READS = 4
"""A result is recomputed in every kernel that uses it if it reads no more inputs (``realize_reads_threshold``)."""
LIBRARY_OPERATORS = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "convolution_backward"}
"""Operators that inductor lowers to kernels that read their inputs from memory."""
SCATTER_OPERATORS = {
    "index_put",
    "_unsafe_index_put",
    "scatter",
    "scatter_add",
    "index_add",
    "_unsafe_masked_index_put_accumulate",
}
"""Operators in fused kernels that always write to memory."""
REDUCTIONS = {"sum", "mean", "var_mean", "amax", "amin", "max", "min", "any", "prod"}


class NodeKind(Enum):
    """Implementation of a graph node by inductor."""

    INPUT = auto()
    """An input or attribute of the graph."""
    VIEW = auto()
    """Shares the memory of its input."""
    FUSED = auto()
    """Part of a generated kernel."""
    LIBRARY = auto()
    """A library kernel, which reads and writes memory."""


@contextlib.contextmanager
def count_compiled(counter: MemoryCounter) -> Iterator[None]:
    """Make ``torch.compile`` produce code whose memory ``counter`` can count."""
    from torch._inductor.compile_fx import compile_fx

    def compile_graph(graph: GraphModule, *_: Any, **__: Any) -> Any:
        return CountedGraph(graph, counter)

    backend = partial(compile_fx, inner_compile=compile_graph)
    original: Any = torch.compile

    def compile_with_backend(model: Any, *, dynamic: Any = None, **_: Any) -> Any:
        return original(model, backend=backend, dynamic=dynamic)

    torch.compile = compile_with_backend  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original


class CountedGraph:
    """A graph as a function of a list of tensors, which it empties, as inductor's compiled graphs do."""

    def __init__(self, module: GraphModule, counter: MemoryCounter):
        # AOTAutograd looks for this on the object, because torch copies an object's attributes
        self._boxed_call = True
        self._module = module
        self._counter = counter
        self._nodes = list(module.graph.nodes)
        self._inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._stored = stored_nodes(self._nodes)
        self._dead_after = dead_after(self._nodes, self._stored)

    def __call__(self, args: list[Any]) -> Any:
        """Return the graph's outputs, and count the results that its kernels would have in memory."""
        values: dict[Node, Any] = dict(zip(self._inputs, args, strict=True))
        args.clear()
        for node in self._nodes:
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], values.__getitem__)
            if node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(self._module)
            elif node.op != "placeholder":
                node_args = torch.fx.map_arg(node.args, values.__getitem__)
                node_kwargs = torch.fx.map_arg(node.kwargs, values.__getitem__)
                with self._counter.flops_only():
                    result = node.target(*node_args, **node_kwargs)
                # the arguments must not outlive this step
                del node_args, node_kwargs
                self._store(node, result, values)
                del result
            for dead in self._dead_after.get(node, ()):
                values.pop(dead, None)
        return None

    def _store(self, node: Node, result: Any, values: dict[Node, Any]) -> None:
        """Keep a result and count it if it is in memory.

        A fused kernel reuses the memory of an input of the same size that is not needed afterwards.
        """
        values[node] = result
        if node not in self._stored:
            return
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if kind_of(node) is NodeKind.FUSED:
            reused = self._reusable_input(node, sum(map(local_bytes, tensors)), values)
            if reused is not None:
                del values[reused]
        for tensor in tensors:
            self._counter.track(tensor)

    def _reusable_input(self, node: Node, size: int, values: dict[Node, Any]) -> Node | None:
        for dead in self._dead_after.get(node, ()):
            value = None if dead is node else values.get(dead)
            if isinstance(value, torch.Tensor) and local_bytes(value) == size:
                return dead
        return None


def kind_of(node: Node) -> NodeKind:
    """Return how inductor implements ``node``."""
    from torch._inductor.lowering import fallbacks, lowerings

    if node.op != "call_function":
        return NodeKind.INPUT
    target: Any = node.target
    if target is operator.getitem or getattr(target, "is_view", False) or operator_name(node) == "_unsafe_view":
        return NodeKind.VIEW
    is_lowered = target in lowerings and target not in fallbacks
    return NodeKind.FUSED if is_lowered and operator_name(node) not in LIBRARY_OPERATORS else NodeKind.LIBRARY


def stored_nodes(nodes: list[Node]) -> set[Node]:
    """Return the nodes whose results get their own memory."""
    reads, stages = _kernel_reads(nodes), _stages(nodes)
    in_memory: set[Node] = set()
    for node in reversed(nodes):
        always_stored = kind_of(node) is NodeKind.LIBRARY or operator_name(node) in SCATTER_OPERATORS
        if always_stored or any(_reads_memory(user, node, user in in_memory, reads, stages) for user in node.users):
            in_memory.add(node)
    return {node for node in in_memory if kind_of(node) in (NodeKind.FUSED, NodeKind.LIBRARY)}


def _reads_memory(
    user: Node, node: Node, is_user_stored: bool, reads: dict[Node, set[Node]], stages: dict[Node, int]
) -> bool:
    """Return True if ``user`` reads ``node`` from memory: it is in another kernel, and recomputing costs too much."""
    kind = kind_of(user)
    if kind is NodeKind.VIEW:
        return is_user_stored
    return kind is not NodeKind.FUSED or (stages[user] != stages[node] and reads[node] == {node})


def _kernel_reads(nodes: list[Node]) -> dict[Node, set[Node]]:
    """Return the nodes that a kernel would read to compute each node; the node itself if it is in memory."""
    reads: dict[Node, set[Node]] = {}
    for node in nodes:
        inputs = set().union(*(reads[source] for source in node.all_input_nodes))
        kind = kind_of(node)
        is_expensive = len(node.users) > 1 and len(inputs) > MAX_RECOMPUTED_READS
        is_inlined = kind is NodeKind.FUSED and operator_name(node) not in REDUCTIONS and not is_expensive
        reads[node] = inputs if kind is NodeKind.VIEW or is_inlined else {node}
    return reads


def _stages(nodes: list[Node]) -> dict[Node, int]:
    """Return the length of the longest chain of library kernels before each node."""
    stages: dict[Node, int] = {}
    for node in nodes:
        before = (stages[source] + (kind_of(source) is NodeKind.LIBRARY) for source in node.all_input_nodes)
        stages[node] = max(before, default=0)
    return stages


def operator_name(node: Node) -> str:
    """Return the operator's name without namespace and overload."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def dead_after(nodes: list[Node], stored: set[Node]) -> dict[Node, list[Node]]:
    """Map each node to the nodes that are not needed after it, neither directly nor through recomputation."""
    index = {node: i for i, node in enumerate(nodes)}
    last_use: dict[Node, int] = {}
    for node in reversed(nodes):
        uses = [
            last_use[user] if user not in stored and kind_of(user) in (NodeKind.VIEW, NodeKind.FUSED) else index[user]
            for user in node.users
        ]
        last_use[node] = max(uses, default=index[node])
    dead: dict[Node, list[Node]] = {}
    for node, i in last_use.items():
        dead.setdefault(nodes[i], []).append(node)
    return dead
