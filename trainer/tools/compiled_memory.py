"""What a compiled part would hold at each moment, of tensors without contents: inductor's graphs without its kernels.

Inductor itself takes the model to two graphs, forward and backward, and decides what the one keeps for the other. There
it ends: which results its kernels would write to memory is an estimate, by the rules that it follows for the most part.
A result that other kernels' inputs are made of on the way is nowhere in memory.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from amlaunch.trainer.tools.live_tensors import Live, size_of

MOST_READS = 4
"""Computed again for each kernel that wants it is what reads no more than that (inductor's ``realize_reads_threshold``)."""
LIBRARY = {"mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "convolution", "convolution_backward"}
"""Lowered by inductor, but to kernels that take their inputs from memory."""
WRITTEN = {
    "index_put",
    "_unsafe_index_put",
    "scatter",
    "scatter_add",
    "index_add",
    "_unsafe_masked_index_put_accumulate",
}
"""Parts of kernels that write to memory in any case."""
REDUCTIONS = {"sum", "mean", "var_mean", "amax", "amin", "max", "min", "any", "prod"}


@contextlib.contextmanager
def compiling(live: Live) -> Iterator[None]:
    """Have what ``torch.compile`` is given here compiled to what ``live`` can count."""
    from torch._inductor.compile_fx import compile_fx

    def fused(graph: GraphModule, *_: Any, **__: Any) -> Any:
        return Fused(graph, live)

    backend = partial(compile_fx, inner_compile=fused)
    real: Any = torch.compile
    torch.compile = lambda model, *, dynamic=None, **_: real(model, backend=backend, dynamic=dynamic)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


class Fused:
    """A graph as a function of a list of tensors, which it takes out of the list, as inductor's are."""

    def __init__(self, module: GraphModule, live: Live):
        self._boxed_call = True  # AOTAutograd's word for it; of the object, for torch copies what an object has
        self._module = module
        self._live = live
        self._nodes = list(module.graph.nodes)
        self._given = [node for node in self._nodes if node.op == "placeholder"]
        self._stored = stored(self._nodes)
        self._over = over(self._nodes, self._stored)

    def __call__(self, args: list[Any]) -> Any:
        """The graph's outputs; counts what its kernels would have in memory."""
        env: dict[Node, Any] = dict(zip(self._given, args, strict=True))
        args.clear()
        for node in self._nodes:
            if node.op == "output":
                return torch.fx.map_arg(node.args[0], env.__getitem__)
            if node.op == "get_attr":
                env[node] = operator.attrgetter(node.target)(self._module)
            elif node.op != "placeholder":
                with self._live.aside():
                    found = node.target(
                        *torch.fx.map_arg(node.args, env.__getitem__), **torch.fx.map_arg(node.kwargs, env.__getitem__)
                    )
                self._keep(node, found, env)
            for left in self._over.get(node, ()):
                env.pop(left, None)
        return None

    def _keep(self, node: Node, found: Any, env: dict[Node, Any]) -> None:
        """Count a result that lies in memory; a kernel writes it where an input lay that is as large and wanted no more."""
        env[node] = found
        if node not in self._stored:
            return
        tensors = [leaf for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        if kind_of(node) == "fused":
            size = sum(map(size_of, tensors))
            for left in self._over.get(node, ()):
                if (
                    left is not node
                    and left in env
                    and isinstance(env[left], torch.Tensor)
                    and size_of(env[left]) == size
                ):
                    del env[left]
                    break
        for tensor in tensors:
            self._live.note(tensor)


def kind_of(node: Node) -> str:
    """``given`` to the graph or of it, ``same`` memory as an input, part of a ``fused`` kernel, or of a ``library``."""
    from torch._inductor.lowering import fallbacks, lowerings

    if node.op != "call_function":
        return "given"
    target: Any = node.target
    if target is operator.getitem or getattr(target, "is_view", False) or name_of(node) == "_unsafe_view":
        return "same"
    return "fused" if target in lowerings and target not in fallbacks and name_of(node) not in LIBRARY else "library"


def stored(nodes: list[Node]) -> set[Node]:
    """Those whose results lie in memory of their own."""
    reads, stages = _reads(nodes), _stages(nodes)
    wanted: set[Node] = set()
    for node in reversed(nodes):
        always = kind_of(node) == "library" or name_of(node) in WRITTEN
        if always or any(_from_memory(user, node, user in wanted, reads, stages) for user in node.users):
            wanted.add(node)
    return {node for node in wanted if kind_of(node) in ("fused", "library")}


def _from_memory(user: Node, node: Node, wanted: bool, reads: dict[Node, set[Node]], stages: dict[Node, int]) -> bool:
    """Whether ``user``, itself ``wanted`` in memory or not, takes ``node`` from there: another kernel, for which it is too dear to compute again."""
    kind = kind_of(user)
    if kind == "same":
        return wanted
    return kind != "fused" or (stages[user] != stages[node] and reads[node] == {node})


def _reads(nodes: list[Node]) -> dict[Node, set[Node]]:
    """What a kernel would read that computes each on the way; itself, where it lies in memory instead."""
    found: dict[Node, set[Node]] = {}
    for node in nodes:
        inputs = set().union(*(found[source] for source in node.all_input_nodes))
        often = len(node.users) > 1 and len(inputs) > MOST_READS
        passed = kind_of(node) == "same" or (kind_of(node) == "fused" and not _reduces(node) and not often)
        found[node] = inputs if passed else {node}
    return found


def _stages(nodes: list[Node]) -> dict[Node, int]:
    """How many kernels of libraries each comes after, one after the other."""
    found: dict[Node, int] = {}
    for node in nodes:
        found[node] = max(
            (found[source] + (kind_of(source) == "library") for source in node.all_input_nodes), default=0
        )
    return found


def name_of(node: Node) -> str:
    """The operator's name, without its namespace and overload."""
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "")


def _reduces(node: Node) -> bool:
    return name_of(node) in REDUCTIONS


def over(nodes: list[Node], kept: set[Node]) -> dict[Node, list[Node]]:
    """After each, what is wanted no more: neither itself nor what is made of it on the way."""
    index = {node: i for i, node in enumerate(nodes)}
    last: dict[Node, int] = {}
    for node in reversed(nodes):
        passed = [
            last[user] if user not in kept and kind_of(user) in ("same", "fused") else index[user]
            for user in node.users
        ]
        last[node] = max(passed, default=index[node])
    found: dict[Node, list[Node]] = {}
    for node, i in last.items():
        found.setdefault(nodes[i], []).append(node)
    return found
