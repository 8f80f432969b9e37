"""Translate the names of NeMo AutoModel's guide into ours; each translation is reported in a note.

A name without a counterpart is an error that says what to write instead, never a silent drop.
"""

from __future__ import annotations

import re
from typing import Any

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import has_named_datasets
from amlaunch.recipes.format.targets import current_name
from amlaunch.recipes.format.yaml_reader import KeyPath

NEMO = re.compile(r"nemo_?automodel[./]", re.IGNORECASE)
FROM_CONFIG = re.compile(r"transformers\.(?!Auto)[A-Z]\w*\.from_config")
"""The guide's spelling of ``from_config``, which only the Auto classes of transformers have."""
TARGETS = {
    "gpt2.build_gpt2_model": "amlaunch.trainer.models.gpt2.build_gpt2_model",
    "gpt2.py:build_gpt2_model": "amlaunch.trainer.models.gpt2.build_gpt2_model",
    "nanogpt_dataset.nanogptdataset": "amlaunch.trainer.data.NanogptDataset",
    "masked_ce.maskedcrossentropy": "amlaunch.trainer.loss.MaskedCrossEntropy",
    "linear_ce.fusedlinearcrossentropy": "amlaunch.trainer.loss.LinearCrossEntropy",
    "nemoautomodelforcausallm.from_config": "transformers.AutoModelForCausalLM.from_config",
}
"""End of the guide's name in lower case -> our target; the guide's spelling of its package varies."""
STRATEGIES = {"fsdp2manager": "fsdp2", "ddpmanager": "ddp"}
FUSED_ADAM_ONLY = (
    "adam_w_mode",
    "bias_correction",
    "capturable",
    "exp_avg_dtype",
    "exp_avg_sq_dtype",
    "master_weight_dtype",
    "master_weights",
    "set_grad_none",
    "store_param_remainders",
    "use_decoupled_grad",
)
DROPPED: dict[KeyPath, str] = {
    ("recipe",): "amlaunch has one recipe class",
    ("dist_env", "backend"): "the device decides: nccl on GPUs, gloo on CPUs",
    ("dataloader", "collate_fn"): "all windows have the same length",
    ("dataloader", "drop_last"): "a step always has global_batch_size windows",
    ("dataloader", "persistent_workers"): "the threads that read ahead always persist",
    ("dataloader", "pin_memory"): "always on with a GPU",
    ("dataloader", "shuffle"): "dataset.shuffle_files shuffles all windows",
}
"""Keys of the guide that have no effect here -> the reason."""
MOVED: dict[KeyPath, KeyPath] = {
    ("rng", "seed"): ("seed",),
    ("dist_env", "timeout_minutes"): ("distributed", "timeout_minutes"),
    ("dataloader", "batch_size"): ("step_scheduler", "local_batch_size"),
}


class Translator:
    """Rewrites one recipe tree in place; ``lines`` follows the keys that move."""

    def __init__(self, tree: dict[str, Any], lines: dict[KeyPath, str]):
        self.tree = tree
        self.lines = lines
        self.notes: list[str] = []

    def note(self, path: KeyPath, text: str) -> None:
        """Record a translation of the key at ``path``."""
        self.notes.append(f"{self._place(path)}: {'.'.join(path)}: {text}")

    def run(self) -> list[str]:
        """Translate everything, and return the notes."""
        for path, reason in DROPPED.items():
            self._drop(path, reason)
        self._distributed()
        self._dataloader()
        self._rng()
        self._named_validation()
        self._targets(self.tree, ())
        self._optimizer()
        for old, new in MOVED.items():
            self._move(old, new)
        for emptied in ("rng", "dist_env"):
            if self.tree.get(emptied) == {}:
                del self.tree[emptied]
        return self.notes

    def _place(self, path: KeyPath) -> str:
        return self.lines.get(path, "recipe")

    def _section(self, path: KeyPath) -> dict[str, Any]:
        node: Any = self.tree
        for key in path:
            node = node.get(key) if isinstance(node, dict) else None
        return node if isinstance(node, dict) else {}

    def _drop(self, path: KeyPath, reason: str) -> None:
        section = self._section(path[:-1])
        if path[-1] in section:
            del section[path[-1]]
            self.note(path, f"ignored: {reason}")

    def _move(self, old: KeyPath, new: KeyPath) -> None:
        source = self._section(old[:-1])
        if old[-1] not in source:
            return
        value = source.pop(old[-1])
        target: Any = self.tree
        for key in new[:-1]:
            if target.get(key) is None:
                target[key] = {}
            target = target[key]
        if isinstance(target, dict):
            target.setdefault(new[-1], value)
            self.lines.setdefault(new, self._place(old))
            self.note(old, f"read as {'.'.join(new)}")

    def _targets(self, node: Any, path: KeyPath) -> None:
        if isinstance(node, list):
            for i, child in enumerate(node):
                self._targets(child, (*path, str(i)))
        if not isinstance(node, dict):
            return
        name = node.get("_target_")
        if isinstance(name, str):
            node["_target_"] = self._translated(name, (*path, "_target_"))
        for key, child in node.items():
            # An axis of a sweep.
            if str(key).endswith("._target_") and isinstance(child, list):
                points = enumerate(child)
                node[key] = [self._translated(str(point), (*path, str(key), str(i))) for i, point in points]
            self._targets(child, (*path, str(key)))

    def _translated(self, name: str, path: KeyPath) -> str:
        """Return our name of a target; other names stay as they are."""
        if NEMO.search(name):
            return self._counterpart(name, path)
        if FROM_CONFIG.fullmatch(name):
            ours = "transformers.AutoModelForCausalLM.from_config"
            self.note(path, f"{name} is read as {ours}, which builds the model that the config describes")
            return ours
        return current_name(name)

    def _counterpart(self, name: str, path: KeyPath) -> str:
        for end, ours in TARGETS.items():
            if name.lower().endswith(end):
                self.note(path, f"{name} is read as {ours}")
                return ours
        counterparts = ", ".join(sorted(set(TARGETS.values())))
        raise BadInput(
            f"{self._place(path)}: {'.'.join(path)}: {name} is a NeMo AutoModel target that amlaunch does not have. "
            f"Write one of {counterparts}, a class of torch or transformers, or your own file.py:object"
        )

    def _distributed(self) -> None:
        section = self._section(("distributed",))
        recompute = section.get("activation_checkpointing")
        if isinstance(recompute, bool):
            section["activation_checkpointing"] = "full" if recompute else "none"
        name = section.get("_target_")
        if name is None:
            return
        path = ("distributed", "_target_")
        strategy = STRATEGIES.get(str(name).lower().rpartition(".")[2])
        if strategy is None:
            raise BadInput(
                f"{self._place(path)}: distributed._target_: {name} is not supported; "
                "write strategy: fsdp2, ddp or none"
            )
        del section["_target_"]
        section.setdefault("strategy", strategy)
        self.note(path, f"{name} is read as strategy: {strategy}")

    def _dataloader(self) -> None:
        name = self._section(("dataloader",)).get("_target_")
        path = ("dataloader", "_target_")
        if name is None:
            return
        if not str(name).endswith("StatefulDataLoader"):
            raise BadInput(
                f"{self._place(path)}: dataloader._target_: {name} is not supported; remove it, because the order of "
                "the data is a function of seed and step"
            )
        self._drop(path, "the order of the data is a function of seed and step, so there is no state to save")

    def _rng(self) -> None:
        for key in ("_target_", "ranked"):
            self._drop(("rng", key), "randomness is a function of seed, step and rank")

    def _named_validation(self) -> None:
        """Read the guide's one section per validation set, ``validation_dataset_NAME``, as ``validation_dataset``."""
        for key in [key for key in self.tree if str(key).startswith("validation_dataset_")]:
            name = key.removeprefix("validation_dataset_")
            existing = self.tree.get("validation_dataset") or {}
            named = existing if not existing or has_named_datasets(existing) else {"default": existing}
            self.tree["validation_dataset"] = {**named, name: self.tree.pop(key)}
            for path in [path for path in self.lines if path[:1] == (key,)]:
                new_path: KeyPath = ("validation_dataset", name, *path[1:])
                self.lines[new_path] = self.lines[path]
            self.note((key,), f"read as validation_dataset.{name}")

    def _optimizer(self) -> None:
        section = self._section(("optimizer",))
        name = str(section.get("_target_", ""))
        if not (name.startswith("transformer_engine") and name.endswith("FusedAdam")):
            return
        path = ("optimizer", "_target_")
        section["_target_"] = "torch.optim.AdamW"
        self.note(
            path,
            f"{name} is read as torch.optim.AdamW (fused on GPUs; with float32 master weights, as FSDP2 keeps them)",
        )
        for key in FUSED_ADAM_ONLY:
            self._drop(("optimizer", key), "not a setting of torch.optim.AdamW")


def translate(tree: dict[str, Any], lines: dict[KeyPath, str]) -> list[str]:
    """Rewrite the guide's names in ``tree``, in place; return a note with its line for each change.

    Raises BadInput for an AutoModel name without a counterpart.
    """
    return Translator(tree, lines).run()
