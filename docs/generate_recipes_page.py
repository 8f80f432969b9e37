"""Write the tables of ``docs/recipes.md`` from the schema of recipes.

    python docs/generate_recipes_page.py

Keys, types, defaults and descriptions come from ``recipes/format/schema.py`` (and, for data sets and losses, from the
signatures of the classes); examples are below. The text around the tables is written by hand in the page. A test fails
if the page is out of date.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from amlaunch.recipes.format import schema
from amlaunch.recipes.format.targets import TargetPolicy, signature
from amlaunch.recipes.format.units import parse_count, parse_memory, parse_minutes, parse_positive_count

PAGE = Path(__file__).resolve().parent / "recipes.md"
MAX_CELL = 200
RULES = {
    parse_count: "count",
    parse_positive_count: "count ≥ 1",
    parse_minutes: "time",
    parse_memory: "memory",
    (int, "positive"): "integer ≥ 1",
    (int, "natural"): "integer ≥ 0",
    (float, "positive"): "number > 0",
    (float, "natural"): "number ≥ 0",
}
PLAIN_TYPES = {int: "integer", float: "number", str: "text", bool: "boolean", dict: "mapping", list: "list"}
ANNOTATIONS = {"int": "integer", "float": "number", "str": "text", "bool": "boolean", "list[str]": "list of text"}

EXAMPLES = {
    "name": "gpt2-baseline",
    "seed": "1337",
    "sdpa_method": "[flash_attention, math]",
    "sweep": "{optimizer.lr: [1e-4, 3e-4]}",
    "wandb": "{project: my-project}",
    "step_scheduler.global_batch_size": "512",
    "step_scheduler.local_batch_size": "16",
    "step_scheduler.max_steps": "10000",
    "step_scheduler.num_epochs": "2",
    "step_scheduler.ckpt_every_steps": "500",
    "step_scheduler.val_every_steps": "250",
    "step_scheduler.val_batches": "8",
    "step_scheduler.max_skipped_steps": "3",
    "lr_scheduler.lr_warmup_steps": "500",
    "lr_scheduler.lr_warmup_tokens": "500M",
    "lr_scheduler.lr_decay_steps": "10000",
    "lr_scheduler.lr_decay_tokens": "10B",
    "lr_scheduler.lr_wsd_decay_steps": "2000",
    "lr_scheduler.lr_wsd_decay_tokens": "1B",
    "lr_scheduler.init_lr": "1e-7",
    "lr_scheduler.min_lr": "6e-5",
    "parameter_groups.match": '"wte.*"',
    "parameter_groups.lr": "1e-3",
    "parameter_groups.lr_scale": "0.5",
    "parameter_groups.weight_decay": "0.0",
    "distributed.dp_size": "8",
    "distributed.dp_replicate_size": "4",
    "distributed.tp_size": "2",
    "distributed.cp_size": "2",
    "distributed.timeout_minutes": "30",
    "distributed.hang_seconds": "300",
    "checkpoint.checkpoint_dir": "/lustre/checkpoints",
    "checkpoint.max_recent_checkpoints": "3",
    "checkpoint.keep_every_steps": "10000",
    "checkpoint.restore_from": "best",
    "packed_sequence.packed_sequence_size": "2048",
    "dataloader.num_workers": "2",
    "dataloader.prefetch_factor": "4",
    "clip_grad_norm.max_norm": "0.5",
    "fp8.exclude": '["*.c_proj", "h.0.*"]',
    "preprocess.dataset": "HuggingFaceFW/fineweb",
    "preprocess.set_name": "sample-10BT",
    "preprocess.split": "validation",
    "preprocess.revision": "main",
    "preprocess.data_files": '"text/**/*.jsonl.zst"',
    "preprocess.exclude": '["**/test/**"]',
    "preprocess.source": "{_target_: my_data.py:documents}",
    "preprocess.data_cache_dir": "/scratch/hub",
    "preprocess.text_column": "content",
    "preprocess.encoding": "latin-1",
    "preprocess.tokenizer": "cl100k_base",
    "preprocess.max_tokens": "10B",
    "preprocess.val_tokens": "5M",
    "preprocess.shard_tokens": "50M",
    "preprocess.parts": "64",
    "preprocess.elements": "16",
    "preprocess.num_workers": "32",
    "preprocess.chunk_size": "64",
    "preprocess.output_dir": "/lustre/shards/fineweb",
    "resources.nodes": "4",
    "resources.gpus_per_node": "8",
    "resources.tasks_per_node": "2",
    "resources.cpus": "64",
    "resources.mem": "256G",
    "resources.time": '"1-12:00:00"',
    "resources.hang_minutes": "60",
    "container.image": "nvcr.io/nvidia/pytorch:26.06-py3",
    "container.mounts": '["/lustre/data:/data:ro"]',
    "container.env": "{NCCL_DEBUG: INFO}",
    "container.workdir": "/workspace",
    "container.runtime": "apptainer",
    "container.stages": "{preprocess: none}",
    "tensorboard.log_dir": "/lustre/tensorboard",
    "profile.start_step": "50",
    "profile.steps": "5",
    "export.prompt": '"Once upon a time"',
    "export.max_new_tokens": "200",
    "export.temperature": "1.0",
    "export.top_k": "200",
}
"""One example for each key, as YAML; booleans and choices get theirs from the schema."""

DATASET_KEYS = {
    "file_pattern": (
        "data/*.bin",
        "Shards: a glob, a list of globs, or a `manifest.json`. `null`: those of `preprocess`.",
    ),
    "seq_len": ("2048", "Tokens of a window."),
    "shuffle_files": ("true", "Shuffle all samples, as a function of the seed."),
    "align_to_bos": ("true", "Begin every window with a document; the tokens up to the next document are skipped."),
    "bos_token": ("50256", "Token that begins a document, for `align_to_bos` if the shards have no index."),
    "split": ("val", "Split of the manifest, `train` or `val`."),
    "format": ("raw", "`bin`: shards with a header; `raw`: bare uint16."),
    "drop_last": ("true", "The guide's key; no effect, because a step always has its full batch."),
    "infinite": ("true", "The guide's key; no effect, because epochs repeat until the last step."),
}
LOSS_KEYS = {
    "amlaunch.trainer.loss.MaskedCrossEntropy": {
        "ignore_index": ("-1", "Label that does not count."),
        "fp32_upcast": ("false", "Compute the loss of half-precision logits in float32."),
        "vocab_size": ("50257", "Number of real tokens; the model's further rows are padding and are ignored."),
    },
    "amlaunch.trainer.loss.LinearCrossEntropy": {
        "ignore_index": ("-1", "Label that does not count."),
        "vocab_size": ("50257", "Number of real tokens; the model's further rows are padding and are ignored."),
        "chunk_tokens": ("4096", "Rows of logits to compute at a time."),
        "implementation": ("torch", "`chunked` (amlaunch's), or `torch` for torch's own if it has one."),
    },
}


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring of each field of a schema class, as one line of Markdown."""
    tree = ast.parse(Path(schema.__file__).read_text(encoding="utf-8"))
    node = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    docs = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        is_field = isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        if is_field and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[statement.target.id] = one_line(str(following.value.value))
    return docs


def one_line(text: str) -> str:
    """Return a docstring as one line of Markdown."""
    return " ".join(text.replace("``", "`").split())


def type_name(hint: Any) -> str:
    """Return the type of a key in a word or two."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(type_name(option) for option in typing.get_args(hint) if option is not type(None))
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return RULES[args[1] if callable(args[1]) else args]
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin is list:
        item = type_name(args[0])
        return "list of sections" if item == "section" else f"list of {item}"
    if dataclasses.is_dataclass(hint):
        return "section"
    return PLAIN_TYPES[origin or hint]


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return the default of a key as YAML; empty for a required key."""
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        value = field.default
    if value is dataclasses.MISSING:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**6 and value % 10**6 == 0:
        return f"`{value // 10**6}M`"
    if isinstance(value, str) and re.fullmatch(r"[\w.-]+", value):
        return f"`{value}`"
    if dataclasses.is_dataclass(value):
        return "its defaults"
    if isinstance(value, dict) and "_target_" in value:
        keywords = [f"{key}: {child}" for key, child in value.items() if key != "_target_"]
        return ", ".join(f"`{text}`" for text in (value["_target_"].rpartition(".")[2], *keywords))
    return f"`{json.dumps(value)}`"


def example_of(name: str, field: dataclasses.Field[Any], hint: Any) -> str:
    """Return an example value of a key as YAML; empty if its section has a table of its own."""
    if name in EXAMPLES:
        return EXAMPLES[name]
    if isinstance(field.default, bool):
        return str(not field.default).lower()
    options = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = [
        choice for option in options if typing.get_origin(option) is Literal for choice in typing.get_args(option)
    ]
    return next((str(choice) for choice in choices if choice != field.default), "")


def sections() -> dict[str, type]:
    """Return the sections that have a table of their own: key path -> schema class."""
    hints = typing.get_type_hints(schema.Recipe, include_extras=True)
    found: dict[str, type] = {}
    for name, hint in hints.items():
        options = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
        if name == "resources":
            found[name] = schema.StageResources
        elif options:
            found[name] = typing.cast(type, options[0])
    return found


def rows(prefix: str, cls: type) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield key, type, default, example and description of every key of a section."""
    docs = field_docs(cls)
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        example = example_of(prefix + field.name, field, hints[field.name])
        shown = f"`{example}`" if example else ""
        yield f"`{field.name}`", type_name(hints[field.name]), default_of(field), shown, docs[field.name]


def table(header: tuple[str, ...], lines: Iterator[tuple[str, ...]]) -> list[str]:
    """Return a Markdown table. Raises ValueError for a cell over ``MAX_CELL`` characters."""
    text = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for cells in lines:
        for cell in cells:
            if len(cell) > MAX_CELL:
                raise ValueError(f"{cells[0]}: a cell of {len(cell)} characters: {cell}")
        text.append(f"| {' | '.join(cells)} |")
    return text


HEADER = ("key", "type", "default", "example", "description")


def section_tables() -> str:
    """Return the table of the sections, and one table for each section."""
    own_table = sections()
    docs = field_docs(schema.Recipe)
    hints = typing.get_type_hints(schema.Recipe, include_extras=True)

    def overview() -> Iterator[tuple[str, ...]]:
        for field in dataclasses.fields(schema.Recipe):
            name = f"[`{field.name}`](#{field.name})" if field.name in own_table else f"`{field.name}`"
            example = "" if field.name in own_table else example_of(field.name, field, hints[field.name])
            kind = type_name(hints[field.name])
            kind = "list of the four kernels" if field.name == "sdpa_method" else kind
            yield name, kind, default_of(field), f"`{example}`" if example else "", docs[field.name]

    text = table(HEADER, overview())
    for name, cls in own_table.items():
        description = one_line(cls.__doc__ or "")
        text += ["", f"### {name}", "", *textwrap.wrap(description, 120), "", *table(HEADER, rows(f"{name}.", cls))]
    return "\n".join(text)


def target_table(target: str, keys: dict[str, tuple[str, str]]) -> list[str]:
    """Return the table of one of our targets. Raises ValueError if its keywords are not those described."""
    known = signature(target, TargetPolicy())
    parameters = dict(known.parameters) if known else {}
    parameters.pop("data_dir", None)
    if set(parameters) != set(keys):
        raise ValueError(f"{target} has {sorted(parameters)}; described are {sorted(keys)}")

    def lines() -> Iterator[tuple[str, ...]]:
        for key, (example, description) in keys.items():
            options = [option.strip() for option in parameters[key].annotation.split("|")]
            kind = " or ".join(ANNOTATIONS[option] for option in options if option != "None")
            default = parameters[key].default
            shown = default if isinstance(default, str) else json.dumps(default)
            yield f"`{key}`", kind, f"`{shown}`", f"`{example}`", description

    return table(HEADER, lines())


def blocks() -> dict[str, str]:
    """Return the generated text of the page by the name of its markers."""
    dataset = target_table("amlaunch.trainer.data.NanogptDataset", DATASET_KEYS)
    losses = []
    for target, keys in LOSS_KEYS.items():
        losses += ["", f"`{target}`:", "", *target_table(target, keys)]
    return {"sections": section_tables(), "dataset": "\n".join(dataset), "losses": "\n".join(losses[1:])}


def render(page: str) -> str:
    """Return the page with its generated blocks renewed. Raises ValueError if a marker is missing."""
    for name, text in blocks().items():
        begin, end = f"<!-- begin {name}: generated by docs/generate_recipes_page.py -->", f"<!-- end {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise ValueError(f"{PAGE.name}: expected one {begin} and one {end}")
        before, rest = page.split(begin)
        after = rest.split(end)[1]
        page = f"{before}{begin}\n\n{text}\n\n{end}{after}"
    return page


def main() -> None:
    """Renew the page on disk."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
