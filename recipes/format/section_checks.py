"""Turn plain data into the typed sections of a recipe, and report every problem with its line."""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.placeholders import UnsetVariable, expand, expand_text, has_placeholder
from amlaunch.recipes.format.schema import has_named_datasets
from amlaunch.recipes.format.targets import Signature, TargetPolicy, check_target, signature
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.suggestions import cluster_profile_hint, did_you_mean

HINTS: dict[KeyPath, str] = {
    ("step_scheduler", "grad_acc_steps"): (
        "write global_batch_size: micro-steps x local_batch_size x data-parallel ranks"
    ),
    ("dataset", "num_workers"): "write dataloader.num_workers (threads that read ahead)",
}
TYPE_NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
RANGE_NAMES = {
    (int, "positive"): "an integer of at least 1",
    (int, "natural"): "an integer of at least 0",
    (float, "positive"): "a number above 0",
    (float, "natural"): "a number of at least 0",
}
ANNOTATION_NAMES = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "None": "null",
    "list": "a list",
    "list[str]": "a list of text",
}
TARGET_SECTIONS = ("model", "dataset", "validation_dataset", "optimizer", "loss_fn")
DATASET = {"_target_": "amlaunch.trainer.data.NanogptDataset"}
MIXTURE = {"_target_": "amlaunch.trainer.data.MixedDataset"}


class Checker:
    """Build typed sections, and collect the problems; ``known`` holds the variables that placeholders may use.

    With ``job_start`` every placeholder must have a value. Before that, a placeholder in text may stay unexpanded: it
    may be a secret that only the job sees.
    """

    def __init__(
        self,
        lines: Mapping[KeyPath, str],
        known: Mapping[str, str],
        policy: TargetPolicy,
        job_start: bool,
        has_shards: bool = False,
    ):
        self.lines = lines
        self.known = known
        self.policy = policy
        self.job_start = job_start
        self.has_shards = has_shards
        """True if a folder of shards was given beside the recipe."""
        self.problems: list[str] = []

    def problem(self, path: KeyPath, text: str) -> None:
        """Record a problem with the value at ``path``, at the line of its nearest known parent."""
        parents = (path[:length] for length in range(len(path), -1, -1))
        place = next((self.lines[parent] for parent in parents if parent in self.lines), "recipe")
        key = ".".join(path)
        self.problems.append(f"{place}: {key}: {text}" if key else f"{place}: {text}")

    def section(self, cls: Any, value: Any, path: KeyPath) -> Any:
        """Return ``value`` as the dataclass ``cls``; None if it has problems."""
        if not isinstance(value, Mapping):
            self.problem(path, f"expected a section with keys, got {_shown(value)}")
            return None
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls, include_extras=True)
        built = {}
        problems_before = len(self.problems)
        for key, child in value.items():
            if key not in fields:
                self.problem((*path, key), f"unknown key; {_key_hint((*path, key), fields)}")
                continue
            if not path and key in TARGET_SECTIONS and isinstance(child, Mapping):
                child = _with_target(fields[key], child)
            built[key] = self.value(hints[key], child, (*path, key))
        for name, field in fields.items():
            is_required = field.default is field.default_factory is dataclasses.MISSING
            if is_required and name not in value:
                self.problem(path, f"the key {name!r} is missing" if path else f"the section {name!r} is missing")
        return cls(**built) if len(self.problems) == problems_before else None

    def value(self, hint: Any, value: Any, path: KeyPath) -> Any:
        """Return ``value`` as the type ``hint``, with its placeholders expanded."""
        options = _options(hint)
        if len(path) == 1 and path[0] in TARGET_SECTIONS and isinstance(value, Mapping):
            if path[0] == "validation_dataset" and has_named_datasets(value):
                return {name: self.target(node, (*path, name)) for name, node in value.items()}
            return self.target(value, path)

        written = value
        if has_placeholder(value):
            may_stay = any(_base(option) in (str, Any) for option in options)
            value = self._expanded(value, path, needed=not may_stay, is_text=options == (str,))
            if has_placeholder(value):
                return value
            options = tuple(option for option in options if not dataclasses.is_dataclass(option))

        # The guide writes `dp_size: none`.
        if type(None) in options and (value is None or value == "none"):
            return None
        for option in options:
            if option is not type(None):
                ok, converted = self._convert(option, value, path)
                if ok:
                    return converted
        self.problem(path, _type_problem(_options(hint), written, value))
        return None

    def _expanded(self, value: Any, path: KeyPath, needed: bool, is_text: bool = False) -> Any:
        try:
            return (expand_text if is_text else expand)(value, self.known)
        except UnsetVariable as unset:
            if self.job_start or needed:
                self.problem(path, f"{unset}; export it, or write ${{{unset.name}:-default}}")
            return value

    def _convert(self, option: Any, value: Any, path: KeyPath) -> tuple[bool, Any]:
        if dataclasses.is_dataclass(option):
            return True, self.section(option, value, path)
        origin, args = typing.get_origin(option), typing.get_args(option)
        if origin is Annotated:
            return self._annotated(args[0], args[1], value)
        if origin is Literal:
            return value in args, value
        if origin is list:
            return self._list(args[0], value, path)
        if origin is dict:
            return self._mapping(args[1], value, path)
        if option is Any:
            return True, self.open(value, path)
        return _plain(option, value)

    def _annotated(self, base: Any, rule: Any, value: Any) -> tuple[bool, Any]:
        if callable(rule):
            try:
                return True, rule(value)
            except ValueError:
                return False, None
        ok, number = _plain(base, value)
        if not ok or base is int:
            return ok and number >= (1 if rule == "positive" else 0), number
        return (number > 0 if rule == "positive" else number >= 0) and number < math.inf, number

    def _list(self, item: Any, value: Any, path: KeyPath) -> tuple[bool, Any]:
        if not isinstance(value, (list, tuple)):
            return False, None
        return True, [self.value(item, child, (*path, str(i))) for i, child in enumerate(value)]

    def _mapping(self, item: Any, value: Any, path: KeyPath) -> tuple[bool, Any]:
        if not isinstance(value, Mapping):
            return False, None
        return True, {str(key): self.value(item, child, (*path, str(key))) for key, child in value.items()}

    def open(self, value: Any, path: KeyPath) -> Any:
        """Return a value whose keys belong to somebody else: placeholders expanded, nested targets checked."""
        if isinstance(value, Mapping):
            if "_target_" in value:
                return self.target(value, path)
            return {key: self.open(child, (*path, str(key))) for key, child in value.items()}
        if isinstance(value, list):
            return [self.open(child, (*path, str(i))) for i, child in enumerate(value)]
        return self._expanded(value, path, needed=False) if has_placeholder(value) else value

    def target(self, node: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        """Check a mapping with ``_target_``: its name must be allowed, and its keys must be the callable's keywords."""
        name = node.get("_target_")
        keywords = {key: self.open(child, (*path, key)) for key, child in node.items() if key != "_target_"}
        if name is None:
            self.problem(path, "no _target_; name the callable that builds it")
            return {}
        refusal = check_target(name, self.policy)
        if refusal:
            self.problem((*path, "_target_"), refusal)
            return {}
        known = signature(name, self.policy)
        if known is not None:
            self._check_keywords(name, known, node, keywords, path)
        return {"_target_": name, **keywords}

    def _check_keywords(
        self, name: str, known: Signature, written: Mapping[str, Any], keywords: Mapping[str, Any], path: KeyPath
    ) -> None:
        for key, value in keywords.items():
            parameter = known.parameters.get(key)
            if parameter is None:
                if not known.open:
                    hint = _key_hint((*path, key), known.parameters)
                    self.problem((*path, key), f"unknown key of {name}; {hint}")
            elif not has_placeholder(value) and not matches_annotation(value, parameter.annotation):
                self.problem((*path, key), annotation_problem(parameter.annotation, value, written[key]))
        if path[0] == "model":
            for key, parameter in known.parameters.items():
                if parameter.required and key not in keywords:
                    self.problem(path, f"{name} needs {key!r}")


def _key_hint(path: KeyPath, known: typing.Iterable[str]) -> str:
    """Return a clause that says what to write instead of an unknown key."""
    if path in HINTS:
        return HINTS[path]
    profile_hint = cluster_profile_hint(path[2], path[1]) if path[0] == "resources" and len(path) == 3 else None
    return profile_hint or did_you_mean(path[-1], known)


def _with_target(field: dataclasses.Field[Any], section: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the default ``_target_`` and keys to a section that sets only some keys."""
    if "_target_" in section:
        return section
    if field.name == "validation_dataset" and has_named_datasets(section):
        return {name: _with_target(field, node) for name, node in section.items()}
    if field.name.endswith("dataset"):
        return {**(MIXTURE if "sources" in section else DATASET), **section}
    default = {} if field.default_factory is dataclasses.MISSING else field.default_factory()
    return {**default, **section}


def matches_annotation(value: Any, annotation: str) -> bool:
    """Return True if ``value`` matches a source annotation such as ``int | None``; unknown annotations match all."""
    checks: dict[str, Any] = {
        "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
        "bool": lambda v: isinstance(v, bool),
        "str": lambda v: isinstance(v, str),
        "None": lambda v: v is None,
        "list": lambda v: isinstance(v, list),
        "list[str]": lambda v: isinstance(v, list) and all(isinstance(item, str) for item in v),
    }
    options = [option.strip() for option in annotation.split("|")]
    return any(
        _matches_tuple(value, items)
        if (items := _tuple_items(option))
        else option not in checks or checks[option](value)
        for option in options
    )


def _matches_tuple(value: Any, items: list[str]) -> bool:
    return isinstance(value, list) and len(value) == len(items) and all(map(matches_annotation, value, items))


def _tuple_items(annotation: str) -> list[str] | None:
    """Return the annotations of the items of ``tuple[float, float]``; None for anything but a flat tuple's length."""
    match = re.fullmatch(r"[Tt]uple\[([^\[\].]+)\]", annotation)
    return [item.strip() for item in match[1].split(",")] if match else None


def annotation_problem(annotation: str, value: Any, written: Any = None) -> str:
    """Return the message for a value that does not match a source annotation."""
    options = [option.strip() for option in annotation.split("|")]
    wanted = " or ".join(_annotation_name(option) for option in options)
    return _mismatch(wanted, bool({"int", "float"} & set(options)), written, value)


def _annotation_name(option: str) -> str:
    items = _tuple_items(option)
    return f"a list of {len(items)} numbers" if items else ANNOTATION_NAMES.get(option, option)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _base(option: Any) -> Any:
    return str if typing.get_origin(option) is Literal else option


def _plain(option: Any, value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return option is bool, value
    if option is float and isinstance(value, (int, float)):
        return True, float(value)
    # max_steps: 1e3
    if option is int and isinstance(value, float) and value.is_integer():
        return True, int(value)
    return isinstance(value, option), value


def _type_problem(options: tuple[Any, ...], written: Any, value: Any) -> str:
    """Return the message for a value of the wrong type."""
    wanted = " or ".join(describe_type(option) for option in options if option is not type(None))
    return _mismatch(wanted, any(_is_number_type(option) for option in options), written, value)


def _mismatch(wanted: str, wants_number: bool, written: Any, value: Any) -> str:
    """Return what was expected and what was written, with the fix for a number in quotes."""
    is_number = isinstance(value, str) and value.strip().lstrip("+-").replace(".", "", 1).isdecimal()
    if wants_number and is_number and not has_placeholder(written):
        return f'expected {wanted}, got the string "{value}"; remove the quotes'
    return f"expected {wanted}, {_got(written, value)}"


def _is_number_type(option: Any) -> bool:
    if typing.get_origin(option) is Annotated:
        return not callable(typing.get_args(option)[1])
    return option in (int, float)


def describe_type(option: Any) -> str:
    """Return the values that a type of the schema allows, in words."""
    origin, args = typing.get_origin(option), typing.get_args(option)
    if origin is Annotated:
        return _rule_text(args[1]) if callable(args[1]) else RANGE_NAMES[args[0], args[1]]
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (list, dict):
        return "a list" if origin is list else "a section with keys"
    return TYPE_NAMES.get(option, "a section with keys")


def _rule_text(rule: Any) -> str:
    """Return what a parsing rule accepts: the text of its own error."""
    try:
        rule(None)
    except ValueError as error:
        return str(error)
    return "a value"


def _got(written: Any, value: Any) -> str:
    """Return the value that was written; of a variable only the name, because its value may be a secret."""
    return f"but {written} is something else" if has_placeholder(written) else f"got {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a section with keys"
    if isinstance(value, (list, tuple)):
        return f"a list ({', '.join(map(repr, value))[:60]})"
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing" if value is None else repr(value)


def raise_problems(problems: list[str]) -> None:
    """Raise BadInput with all problems, one a line; does nothing if there are none."""
    if problems:
        raise BadInput("\n".join(dict.fromkeys(problems)))
