"""From plain data to the typed sections of a recipe, with every problem named at its line."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union

from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.format.placeholders import Unset, expand, expand_text, has_placeholder
from amlaunch.recipes.format.schema import is_named
from amlaunch.recipes.format.targets import Policy, Signature, check_target, signature
from amlaunch.recipes.format.yaml_reader import KeyPath

HINTS: dict[KeyPath, str] = {
    (
        "step_scheduler",
        "grad_acc_steps",
    ): "write global_batch_size: micro-steps x local_batch_size x data-parallel ranks",
    ("dataset", "num_workers"): "one thread reads ahead; see dataloader.prefetch_factor",
}
WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
TARGET_SECTIONS = ("model", "dataset", "validation_dataset", "optimizer", "loss_fn")
DATASET, MIXTURE = (
    {"_target_": "amlaunch.trainer.data.NanogptDataset"},
    {"_target_": "amlaunch.trainer.data.MixedDataset"},
)


class Checker:
    """Collects problems while it builds; ``known`` are the variables that placeholders may use.

    With ``job_start`` every placeholder must have a value. Before, one in a
    string may stay open: it may be a secret that only the job will see.
    """

    def __init__(self, lines: Mapping[KeyPath, str], known: Mapping[str, str], policy: Policy, job_start: bool):
        self.lines = lines
        self.known = known
        self.policy = policy
        self.job_start = job_start
        self.problems: list[str] = []

    def problem(self, path: KeyPath, text: str) -> None:
        """Note what is wrong with the value at ``path``, with the line of its nearest known parent."""
        where = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), "recipe")
        key = ".".join(path)
        self.problems.append(f"{where}: {key}: {text}" if key else f"{where}: {text}")

    def section(self, cls: Any, value: Any, path: KeyPath) -> Any:
        """``value`` as the dataclass ``cls``; None where it has problems."""
        if not isinstance(value, Mapping):
            self.problem(path, f"expected a section with keys, found {_shown(value)}")
            return None
        fields = {field.name: field for field in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls, include_extras=True)
        built = {}
        before = len(self.problems)
        for key, child in value.items():
            if key not in fields:
                self.problem((*path, key), f"unknown key; {HINTS.get((*path, key)) or did_you_mean(key, fields)}")
                continue
            if not path and key in TARGET_SECTIONS and isinstance(child, Mapping):
                child = _with_target(fields[key], child)
            built[key] = self.value(hints[key], child, (*path, key))
        for name, field in fields.items():
            if name not in value and field.default is field.default_factory is dataclasses.MISSING:
                self.problem(path, f"the section {name!r} is missing" if not path else f"{name!r} is missing")
        return cls(**built) if len(self.problems) == before else None

    def value(self, hint: Any, value: Any, path: KeyPath) -> Any:
        """``value`` as the type ``hint``, its placeholders expanded."""
        options = _options(hint)
        if len(path) == 1 and path[0] in TARGET_SECTIONS and isinstance(value, Mapping):
            if path[0] == "validation_dataset" and is_named(value):
                return {name: self.target(node, (*path, name)) for name, node in value.items()}
            return self.target(value, path)
        written = value
        if has_placeholder(value):
            value = self._expanded(
                value,
                path,
                needed=not any(_base(option) in (str, Any) for option in options),
                is_text=options == (str,),
            )
            if has_placeholder(value):
                return value
            options = tuple(option for option in options if not dataclasses.is_dataclass(option))
        if type(None) in options and (value is None or value == "none"):  # the guide writes dp_size: none
            return None
        for option in options:
            if option is not type(None):
                ok, found = self._convert(option, value, path)
                if ok:
                    return found
        self.problem(path, f"expected {_expected(_options(hint))}, {_found(written, value)}")
        return None

    def _expanded(self, value: Any, path: KeyPath, needed: bool, is_text: bool = False) -> Any:
        try:
            return (expand_text if is_text else expand)(value, self.known)
        except Unset as unset:
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
        ok, found = _plain(base, value)
        return ok and found >= (1 if rule == "positive" else 0), found

    def _list(self, item: Any, value: Any, path: KeyPath) -> tuple[bool, Any]:
        if not isinstance(value, (list, tuple)):
            return False, None
        return True, [self.value(item, child, (*path, str(i))) for i, child in enumerate(value)]

    def _mapping(self, item: Any, value: Any, path: KeyPath) -> tuple[bool, Any]:
        if not isinstance(value, Mapping):
            return False, None
        return True, {str(key): self.value(item, child, (*path, str(key))) for key, child in value.items()}

    def open(self, value: Any, path: KeyPath) -> Any:
        """A value whose keys belong to somebody else: expanded, nested targets checked."""
        if isinstance(value, Mapping):
            if "_target_" in value:
                return self.target(value, path)
            return {key: self.open(child, (*path, str(key))) for key, child in value.items()}
        if isinstance(value, list):
            return [self.open(child, (*path, str(i))) for i, child in enumerate(value)]
        return self._expanded(value, path, needed=False) if has_placeholder(value) else value

    def target(self, node: Mapping[str, Any], path: KeyPath) -> dict[str, Any]:
        """A mapping with ``_target_``: its name must be allowed, its keys must be the callable's own."""
        name = node.get("_target_")
        keys = {key: self.open(child, (*path, key)) for key, child in node.items() if key != "_target_"}
        if name is None:
            self.problem(path, "no _target_ that says what builds it")
            return {}
        wrong = check_target(name, self.policy)
        if wrong:
            self.problem((*path, "_target_"), wrong)
            return {}
        found = signature(name, self.policy)
        if found is not None:
            self._keywords(name, found, node, keys, path)
        return {"_target_": name, **keys}

    def _keywords(
        self, name: str, found: Signature, written: Mapping[str, Any], keys: Mapping[str, Any], path: KeyPath
    ) -> None:
        for key, value in keys.items():
            known = found.parameters.get(key)
            if known is None:
                if not found.open:
                    hint = HINTS.get((*path, key)) or did_you_mean(key, found.parameters)
                    self.problem((*path, key), f"unknown key of {name}; {hint}")
            elif not has_placeholder(value) and not fits(value, known.annotation):
                self.problem((*path, key), f"expected {known.annotation}, {_found(written[key], value)}")
        if path[0] == "model":
            for key, known in found.parameters.items():
                if known.required and key not in keys:
                    self.problem(path, f"{name} needs {key!r}")


def _with_target(field: dataclasses.Field[Any], section: Mapping[str, Any]) -> Mapping[str, Any]:
    """A section for which only some keys are given, and what they are added to."""
    if "_target_" in section:
        return section
    if field.name == "validation_dataset" and is_named(section):
        return {name: _with_target(field, node) for name, node in section.items()}
    if field.name.endswith("dataset"):
        return {**(MIXTURE if "sources" in section else DATASET), **section}
    return {**(field.default_factory() if field.default_factory is not dataclasses.MISSING else {}), **section}


def fits(value: Any, annotation: str) -> bool:
    """Whether ``value`` can be what a source annotation such as ``int | None`` says; unknown annotations fit all."""
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
    return any(option not in checks or checks[option](value) for option in options)


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _base(option: Any) -> Any:
    return str if typing.get_origin(option) is Literal else option


def _plain(option: Any, value: Any) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return option is bool, value
    if option is float and isinstance(value, (int, float)):
        return True, float(value)
    if option is int and isinstance(value, float) and value.is_integer():  # max_steps: 1e3
        return True, int(value)
    return isinstance(value, option), value


def _expected(options: tuple[Any, ...]) -> str:
    return " or ".join(_describe(option) for option in options if option is not type(None))


def _describe(option: Any) -> str:
    origin, args = typing.get_origin(option), typing.get_args(option)
    if origin is Annotated:
        if callable(args[1]):
            return _counted(args[1])
        return "a whole number of at least 1" if args[1] == "positive" else "a whole number, 0 or more"
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (list, dict):
        return "a list" if origin is list else "a section with keys"
    return WORDS.get(option, "a section with keys")


def _counted(rule: Any) -> str:
    try:
        rule(None)
    except ValueError as error:
        return str(error)
    return "a value"


def _found(written: Any, value: Any) -> str:
    """What stands there; of a variable its name alone, for its value may be a secret."""
    return f"which {written} is not" if has_placeholder(written) else f"found {_shown(value)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a section with keys"
    if isinstance(value, (list, tuple)):
        return f"a list ({', '.join(map(repr, value))[:60]})"
    return "nothing" if value is None else repr(value)


def refuse(problems: list[str]) -> None:
    """Raise BadInput with all of ``problems``, if there are any."""
    if problems:
        raise BadInput("\n".join(dict.fromkeys(problems)))
