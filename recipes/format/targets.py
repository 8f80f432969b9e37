"""Resolve ``_target_``: check which names are allowed, and build what they name.

Recipes are data that colleagues pass around, so a name must not import just anything. Allowed are the building blocks
of models and optimizers (:data:`LIBRARY_TARGETS`), our own targets, and what files in the recipe's own folder define;
anything else must be allowed by name. A list of forbidden names would have holes: torch alone ships shells,
downloaders and unpicklers. Reading a recipe imports nothing; signatures of our own code and of the user's files are
read from the source with :mod:`ast`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.suggestions import did_you_mean, similar_name

OWN_TARGETS = {
    "amlaunch.trainer.models.gpt2.build_gpt2_model": "trainer/models/gpt2.py",
    "amlaunch.trainer.models.llama.build_llama_model": "trainer/models/llama.py",
    "amlaunch.trainer.models.pretrained.load_pretrained_model": "trainer/models/pretrained.py",
    "amlaunch.trainer.data.NanogptDataset": "trainer/data/datasets.py",
    "amlaunch.trainer.data.MixedDataset": "trainer/data/datasets.py",
    "amlaunch.trainer.loss.MaskedCrossEntropy": "trainer/loss.py",
    "amlaunch.trainer.loss.LinearCrossEntropy": "trainer/loss.py",
}
"""amlaunch's own targets -> the file that defines each, relative to the package."""
EARLIER_PACKAGES = ("trainer", "preprocess", "recipes", "containers", "launcher")
"""Our packages, as code beside earlier recipes imports them."""
LIBRARY_TARGETS = {
    "torch": r"torch\.(nn|optim)(\.[a-z_0-9]+)*\.[A-Z]\w*",
    "transformers": (
        r"transformers\.(Auto(Config|Model|ModelForCausalLM)|[A-Z]\w*(Config|Model|ForCausalLM))"
        r"(\.from_config|\.from_pretrained)?"
    ),
    "torchdata": r"torchdata(\.[a-z_0-9]+)*\.[A-Z]\w*",
}
"""Known library -> names of the classes, and their constructors, that models, optimizers and loaders consist of."""

OPTIMIZERS = (
    "ASGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Muon",
    "NAdam",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SGD",
)
"""Optimizers of torch 2.13, except LBFGS (needs a closure) and SparseAdam (sparse gradients).

Allow a newer one with --allow-target.
"""


def _types(annotation: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, annotation)


OPTIMIZER_KEYS: dict[str, dict[str, str]] = {
    "torch.optim.AdamW": {
        **_types("float", "lr", "eps", "weight_decay"),
        **_types("bool", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"),
        "betas": "tuple[float, float]",
    },
    "torch.optim.SGD": {
        **_types("float", "lr", "momentum", "dampening", "weight_decay"),
        **_types("bool", "nesterov", "maximize", "foreach", "differentiable", "fused"),
    },
    "torch.optim.Muon": {
        **_types("float", "lr", "weight_decay", "momentum", "eps"),
        "nesterov": "bool",
        "ns_coefficients": "tuple[float, float, float]",
        "ns_steps": "int",
        "adjust_lr_fn": "str | None",
    },
}
OPTIMIZER_KEYS["torch.optim.Adam"] = {**OPTIMIZER_KEYS["torch.optim.AdamW"], "decoupled_weight_decay": "bool"}
"""Keywords of the common optimizers (torch 2.13), so that a typo is found on machines without torch."""
TRAINER_OPTIMIZER_KEYS = {"torch.optim.Muon": {"others": "an optimizer"}}
"""Keywords that the trainer itself takes: Muon optimizes hidden matrices only, and ``others`` the rest."""


@dataclass(frozen=True)
class TargetPolicy:
    """The names that a recipe's targets may use."""

    folder: Path | None = None
    """The recipe's own folder."""
    allow: tuple[str, ...] = ()
    """Additional roots (``my_lib``), full names, or files that the user allowed by name."""


@dataclass(frozen=True)
class Parameter:
    """One keyword of a callable, as its source declares it."""

    annotation: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Signature:
    """The keywords of a callable; ``open``: it also takes others (``**kwargs``)."""

    parameters: Mapping[str, Parameter]
    open: bool


def split_target(text: str) -> tuple[str, str]:
    """Split ``file.py:object`` into ``(file, object)``; an import path becomes ``("", path)``."""
    file, colon, name = text.rpartition(":")
    return (file, name) if colon else ("", text)


def check_target(text: Any, policy: TargetPolicy) -> str | None:
    """Return why a target's name is refused, or None if it is allowed; imports nothing."""
    if not isinstance(text, str) or not text.strip():
        return "_target_ must be an import path or file.py:object"
    file, name = split_target(text)
    if not all(part.isidentifier() for part in name.split(".")):
        return f"{text!r} is neither an import path (package.module.object) nor file.py:object"
    private = [part for part in name.split(".") if part.startswith("_")]
    if private:
        return f"{text!r} uses the private name {private[0]!r}; name a public object"
    return _check_file(file, name, text, policy) if file else _check_dotted(text, policy)


def _check_file(file: str, name: str, text: str, policy: TargetPolicy) -> str | None:
    path = file_of(file, policy)
    if path.suffix != ".py" or not path.is_file():
        suggestion = _complete_name(text, file, name, policy) or _similar_file_target(file, name, policy)
        hint = f"; did you mean {suggestion!r}?" if suggestion else ""
        return f"{text!r}: {path} is not an existing Python file{hint}"
    is_beside_recipe = policy.folder is not None and path.resolve().is_relative_to(policy.folder.resolve())
    if not is_beside_recipe and file not in policy.allow and str(path) not in policy.allow:
        return f"{text!r} is outside the recipe's folder; if you trust it, add --allow-target {file}"
    names = _definitions(path)
    if name.split(".")[0] not in names:
        return f"{path} defines no {name!r}; {did_you_mean(name, names)}"
    return None


def _check_dotted(text: str, policy: TargetPolicy) -> str | None:
    root = text.split(".")[0]
    if text in OWN_TARGETS or _allowed(text, policy):
        return None
    if suggestion := _complete_name(text, root, text.partition(".")[2], policy):
        return f"{text!r} is not a complete name; did you mean {suggestion!r}?"
    if "." not in text:
        return f"{text!r} is a package; name a callable in it"
    if root == "amlaunch":
        return f"amlaunch has no target {text!r}; {did_you_mean(text, OWN_TARGETS)}"
    if root in EARLIER_PACKAGES and (own := _similar_target(text, OWN_TARGETS)):
        return f"amlaunch has no target {text!r}; did you mean {own!r}?"
    if root not in LIBRARY_TARGETS:
        libraries = ", ".join(("amlaunch", *LIBRARY_TARGETS))
        return f"{text!r} is outside the known libraries ({libraries}); if you trust it, add --allow-target {root}"
    if text.startswith("torch.optim.") and text.rpartition(".")[2] not in OPTIMIZERS:
        return f"unknown optimizer {text!r}; {did_you_mean(text, [f'torch.optim.{name}' for name in OPTIMIZERS])}"
    if re.fullmatch(LIBRARY_TARGETS[root], text):
        return None
    if root == "torch" and (optimizer := _similar_target(text, OPTIMIZERS)):
        return f"{text!r} is not a class that recipes may build; did you mean 'torch.optim.{optimizer}'?"
    return f"{text!r} is not a class of {root} that recipes may build; if you trust it, add --allow-target {text}"


def _complete_name(text: str, module: str, name: str, policy: TargetPolicy) -> str | None:
    """Return the target that was probably meant: an object of a file beside the recipe, or a name without its path."""
    file = f"{module}.py"
    path = file_of(file, policy)
    if name and path.is_file() and name.split(".")[0] in _definitions(path):
        return f"{file}:{name}"
    known = [*OWN_TARGETS, *(f"torch.optim.{optimizer}" for optimizer in OPTIMIZERS)]
    return next((target for target in known if target.rpartition(".")[2] == text), None)


def _similar_target(text: str, known: Iterable[str]) -> str | None:
    """Return the known target whose last part is similar to that of ``text``; None if none is near."""
    targets = {target.rpartition(".")[2]: target for target in known}
    nearest = similar_name(text.rpartition(".")[2], targets)
    return targets[nearest] if nearest else None


def _similar_file_target(file: str, name: str, policy: TargetPolicy) -> str | None:
    """Return a target with similar names in the folder of ``file``, else in the recipe's; None if none is near."""
    path = file_of(file, policy)
    for folder, prefix in ((path.parent, Path(file).parent), (file_of("", policy), Path())):
        neighbours = {neighbour.name: neighbour for neighbour in sorted(folder.glob("*.py"))}
        nearest_file = similar_name(path.name, neighbours)
        if nearest_file is None:
            continue
        with suppress(BadInput, OSError):
            definitions = _definitions(neighbours[nearest_file])
            nearest_name = name if name.split(".")[0] in definitions else similar_name(name, definitions)
            if nearest_name:
                return f"{prefix / nearest_file}:{nearest_name}"
    return None


def _allowed(text: str, policy: TargetPolicy) -> bool:
    return any(text == name or text.startswith(name + ".") for name in policy.allow)


def file_of(file: str, policy: TargetPolicy) -> Path:
    """Return the path of a ``file.py:object`` target's file, which is absolute or relative to the recipe."""
    return (policy.folder or Path.cwd()) / os.path.expanduser(file)


@lru_cache(maxsize=64)
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"{path}:{getattr(error, 'lineno', 1) or 1}: not valid Python: {error}") from None


def _definitions(path: Path) -> list[str]:
    """Return the public names that a module defines at its top level; names that it imports (``os``) do not count."""
    names = []
    for node in _tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def code_digest(text: str, policy: TargetPolicy) -> str:
    """Return a digest of a file target's code and of the neighbours it imports; comments and layout do not count."""
    file, _ = split_target(text)
    waiting, seen = [file_of(file, policy)], set()
    digest = hashlib.sha256()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        tree = _tree(path)
        digest.update(ast.dump(tree).encode())
        neighbours = (path.parent / f"{name}.py" for name in sorted(_imports(tree)))
        waiting += [neighbour for neighbour in neighbours if neighbour.is_file()]
    return digest.hexdigest()


def _imports(tree: ast.Module) -> set[str]:
    """Return the first parts of the names of all modules that a module imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def current_name(text: str) -> str:
    """Return a target's current name; in earlier recipes our own targets do not begin with ``amlaunch.``."""
    return f"amlaunch.{text}" if f"amlaunch.{text}" in OWN_TARGETS else text


def stable_names(value: Any) -> Any:
    """Return plain data with our own targets under their first names, so that run identities survive the renaming."""
    if isinstance(value, Mapping):
        return {key: stable_names(child) for key, child in value.items()}
    if isinstance(value, list):
        return [stable_names(child) for child in value]
    return value.removeprefix("amlaunch.") if isinstance(value, str) and value in OWN_TARGETS else value


def _source(text: str) -> tuple[Path, str] | None:
    """Return ``(file, object)`` of one of our own targets, without importing it."""
    if text not in OWN_TARGETS:
        return None
    return Path(__file__).resolve().parents[2] / OWN_TARGETS[text], text.rpartition(".")[2]


def signature(text: str, policy: TargetPolicy) -> Signature | None:
    """Return the keywords of a target in our own packages, in the user's file, or of a common optimizer.

    None if they cannot be read without an import: then the callable reports wrong keywords when it is called.
    """
    if text in OPTIMIZER_KEYS:
        annotations = OPTIMIZER_KEYS[text] | TRAINER_OPTIMIZER_KEYS.get(text, {})
        parameters = {name: Parameter(annotation, required=False) for name, annotation in annotations.items()}
        return Signature(parameters, open=False)

    file, name = split_target(text)
    source = (file_of(file, policy), name) if file else _source(text)
    if source is None:
        return None
    path, definition = source
    for node in _tree(path).body:
        if getattr(node, "name", None) == definition:
            if isinstance(node, ast.FunctionDef):
                return _read_arguments(node, skip=0)
            if isinstance(node, ast.ClassDef):
                return _class_signature(node)
    return None


def _class_signature(node: ast.ClassDef) -> Signature | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return _read_arguments(item, skip=1)
    return None


def _read_arguments(function: ast.FunctionDef, skip: int) -> Signature:
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args][skip:]
    missing = len(positional) - len(spec.defaults)
    defaults: list[ast.expr | None] = [*[None] * max(0, missing), *spec.defaults[max(0, -missing) :]]
    pairs = [*zip(positional, defaults, strict=True), *zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    parameters = {arg.arg: _parameter(arg, default) for arg, default in pairs if not arg.arg.startswith("_")}
    return Signature(parameters, open=spec.kwarg is not None)


def _parameter(arg: ast.arg, default: ast.expr | None) -> Parameter:
    annotation = ast.unparse(arg.annotation).strip("'\"") if arg.annotation else ""
    try:
        value = ast.literal_eval(default) if default is not None else None
    except ValueError:
        value = None
    return Parameter(annotation, required=default is None, default=value)


def resolve(text: str, policy: TargetPolicy) -> Any:
    """Import and return the callable that a target names.

    Raises BadInput for a name that is refused, missing, not callable, or defined outside the known libraries
    (``torch.os.system``).
    """
    refusal = check_target(text, policy)
    if refusal:
        raise BadInput(refusal)
    file, name = split_target(text)
    if file:
        target: Any = _attribute(_import_file(file_of(file, policy)), name, text)
    else:
        target = _import_dotted(text, policy)
    if not callable(target):
        raise BadInput(f"{text!r} is a {type(target).__name__}, which cannot be called; name a class or a function")
    return target


def _attribute(module: ModuleType, name: str, text: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part, None)
        if value is None or isinstance(value, ModuleType):
            raise BadInput(f"{text!r}: the file does not define {part!r}")
    return value


def _import_file(path: Path) -> ModuleType:
    """Import a user's file under a name of its own; its folder joins the end of ``sys.path`` for its neighbours."""
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = f"amlaunch_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadInput(f"{path}: not a Python file that can be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        _refuse_earlier_name(error, path)
        raise
    return module


def _refuse_earlier_name(error: ModuleNotFoundError, path: Path) -> None:
    """Raise BadInput if a user's file imports one of our packages by the bare name that it once had."""
    missing = str(error.name)
    if missing.split(".")[0] in EARLIER_PACKAGES:
        raise BadInput(f"{path}: no module {missing!r}; if you mean amlaunch's, import amlaunch.{missing}") from None


def _import_dotted(text: str, policy: TargetPolicy) -> Any:
    parts = text.split(".")
    value: Any = _import_module(parts[0], text)
    for depth, part in enumerate(parts[1:], start=2):
        name = ".".join(parts[:depth])
        value = _attribute_or_submodule(value, part, name, text)
        _refuse_foreign(value, name, text, policy)
    return value


def _attribute_or_submodule(parent: Any, part: str, module: str, text: str) -> Any:
    """Return an attribute, or a submodule that has not been imported yet."""
    if hasattr(parent, part):
        return getattr(parent, part)
    if isinstance(parent, ModuleType):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            pass
    names = [name for name in dir(parent) if not name.startswith("_")]
    raise BadInput(f"{text!r}: {module.rpartition('.')[0]} has no {part!r}; {did_you_mean(part, names)}")


def _import_module(root: str, text: str) -> ModuleType:
    try:
        return importlib.import_module(root)
    except ModuleNotFoundError as error:
        raise BadInput(f"{text!r} needs the package {error.name!r}, which is not installed; install it") from None


def _refuse_foreign(value: Any, name: str, text: str, policy: TargetPolicy) -> None:
    """Refuse what a module only imported: its namespace holds ``torch.nn.functional.torch``, too."""
    if isinstance(value, ModuleType):
        origin = value.__name__
        is_own = origin == name
    else:
        origin = getattr(value, "__module__", None) or ""
        is_own = origin.split(".")[0] == text.split(".")[0]
    if is_own or _allowed(text, policy):
        return
    raise BadInput(
        f"{text!r} is defined in {origin!r}, outside the known libraries; if you trust it, add --allow-target {text}"
    )


def build(node: Mapping[str, Any], policy: TargetPolicy, *args: Any, **extra: Any) -> Any:
    """Call the target ``node["_target_"]`` with the other keys; nested targets are built first.

    ``args`` and ``extra`` come from the program and replace the recipe's keys. Raises BadInput if the callable
    refuses its keywords.
    """
    name = node["_target_"]
    target = resolve(name, policy)
    recipe_keys = {key: value for key, value in node.items() if key != "_target_" and key not in extra}
    keywords = {key: _build_nested(value, policy) for key, value in recipe_keys.items()}
    _refuse_remote_code(node, policy)
    _refuse_unknown_settings(target, name, keywords)
    try:
        return target(*args, **keywords, **extra)
    except Exception as error:
        # On one line, because a status shows the first line of a reason.
        text = " ".join(str(error).split())
        if name.startswith("transformers.") and isinstance(error, OSError) and error.errno is None:
            source = next((f" {value}" for value in (*args, *keywords.values()) if isinstance(value, str)), "")
            raise BadInput(
                f"{name}{source}: {text} Download it where there is a network (hf download{source}), "
                "or name a local folder"
            ) from error
        if not _is_about_input(error):
            raise
        raise BadInput(f"{name}: {text}") from error


def _is_about_input(error: Exception) -> bool:
    """Return True if a callable rejected its input: values, keywords, a configuration's own validation."""
    if isinstance(error, TypeError):
        return "argument" in str(error)
    return isinstance(error, ValueError) or type(error).__name__.endswith("ValidationError")


def _refuse_unknown_settings(target: Any, name: str, keywords: Mapping[str, Any]) -> None:
    """Refuse unknown keywords of a transformers configuration, which would accept and keep any typo."""
    if not (isinstance(target, type) and name.startswith("transformers.") and name.endswith("Config")):
        return
    known = {*inspect.signature(target).parameters, *getattr(target, "attribute_map", {})}
    try:
        known |= set(target().to_dict())
    except Exception:
        # A configuration composed of others has no default: its own constructor must judge.
        return
    for key in keywords:
        if key not in known:
            raise BadInput(f"{name} has no setting {key!r}; {did_you_mean(key, known)}")


def _build_nested(value: Any, policy: TargetPolicy) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, policy)
        return {key: _build_nested(child, policy) for key, child in value.items()}
    if isinstance(value, list):
        return [_build_nested(child, policy) for child in value]
    return value


def _refuse_remote_code(node: Mapping[str, Any], policy: TargetPolicy) -> None:
    if node.get("trust_remote_code") and "trust_remote_code" not in policy.allow:
        raise BadInput(
            "trust_remote_code runs code from the hub; if you trust it, add --allow-target trust_remote_code"
        )
