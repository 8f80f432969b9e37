"""``_target_``: from the name of a callable to what it builds, and what names are allowed.

Recipes are data that colleagues pass around, so a name is not an invitation to
import anything. What a model or an optimizer is made of resolves (:data:`KNOWN`),
so do our own targets and what files in the recipe's own folder define; anything
else must be allowed by name. A list of what is forbidden would have holes:
torch alone ships shells, downloaders and unpicklers. Reading a recipe imports
nothing; signatures of our own code and of the user's files are read from the
source with :mod:`ast`.
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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from amlaunch.recipes.errors import BadInput, did_you_mean

OURS = {
    "amlaunch.trainer.models.gpt2.build_gpt2_model": "trainer/models/gpt2.py",
    "amlaunch.trainer.models.llama.build_llama_model": "trainer/models/llama.py",
    "amlaunch.trainer.models.pretrained.load_pretrained_model": "trainer/models/pretrained.py",
    "amlaunch.trainer.data.NanogptDataset": "trainer/data/datasets.py",
    "amlaunch.trainer.data.MixedDataset": "trainer/data/datasets.py",
    "amlaunch.trainer.loss.MaskedCrossEntropy": "trainer/loss.py",
    "amlaunch.trainer.loss.LinearCrossEntropy": "trainer/loss.py",
}
"""amlaunch's own targets, and the file that defines each, relative to the package."""
KNOWN = {
    "torch": r"torch\.(nn|optim)(\.[a-z_0-9]+)*\.[A-Z]\w*",
    "transformers": r"transformers\.(Auto(Config|Model|ModelForCausalLM)|[A-Z]\w*(Config|Model|ForCausalLM))(\.from_config|\.from_pretrained)?",
    "torchdata": r"torchdata(\.[a-z_0-9]+)*\.[A-Z]\w*",
}
"""Of each known library, the names of what models, optimizers and loaders are made of: classes, and how they are built."""

OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip
"""Of torch 2.13, less LBFGS (wants a closure) and SparseAdam (sparse gradients); a newer one is let in by --allow-target."""
OPTIMIZER_KEYS: dict[str, dict[str, str]] = {
    "torch.optim.AdamW": dict.fromkeys(("lr", "eps", "weight_decay"), "float")
    | {"betas": "list"}
    | dict.fromkeys(("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused"), "bool"),
    "torch.optim.SGD": dict.fromkeys(("lr", "momentum", "dampening", "weight_decay"), "float")
    | dict.fromkeys(("nesterov", "maximize", "foreach", "differentiable", "fused"), "bool"),
}
OPTIMIZER_KEYS["torch.optim.Muon"] = dict.fromkeys(("lr", "weight_decay", "momentum", "eps"), "float") | {
    "nesterov": "bool",
    "ns_coefficients": "list",
    "ns_steps": "int",
    "adjust_lr_fn": "str | None",
}
OPTIMIZER_KEYS["torch.optim.Adam"] = OPTIMIZER_KEYS["torch.optim.AdamW"] | {"decoupled_weight_decay": "bool"}
"""What the common optimizers take (torch 2.13), so that a typo is found where torch is not installed."""
OUR_KEYS = {"torch.optim.Muon": {"others": "an optimizer"}}
"""What the trainer itself takes: Muon is for hidden matrices alone, and ``others`` is given the rest."""


@dataclass(frozen=True)
class Policy:
    """What a recipe's targets may reach."""

    folder: Path | None = None
    """The recipe's own folder."""
    allow: tuple[str, ...] = ()
    """Further roots (``my_lib``), full names, or files that the user allowed by name."""


@dataclass(frozen=True)
class Parameter:
    """One keyword of a callable, as its source states it."""

    annotation: str
    required: bool
    default: Any = None


@dataclass(frozen=True)
class Signature:
    """The keywords of a callable; ``open``: it takes others too (``**kwargs``)."""

    parameters: Mapping[str, Parameter]
    open: bool


def split_target(text: str) -> tuple[str, str]:
    """``(file, object)`` of ``file.py:object``, or ``("", dotted)`` of an import path."""
    file, colon, name = text.rpartition(":")
    return (file, name) if colon else ("", text)


def check_target(text: Any, policy: Policy) -> str | None:
    """What is wrong with a target's name, without importing anything; None where nothing is."""
    if not isinstance(text, str) or not text.strip():
        return "_target_ must be an import path or file.py:object"
    file, name = split_target(text)
    if not all(part.isidentifier() for part in name.split(".")):
        return f"{text!r} is neither an import path (package.module.object) nor file.py:object"
    private = [part for part in name.split(".") if part.startswith("_")]
    if private:
        return f"{text!r} reaches for the private name {private[0]!r}"
    return _check_file(file, name, text, policy) if file else _check_dotted(text, policy)


def _check_file(file: str, name: str, text: str, policy: Policy) -> str | None:
    path = file_of(file, policy)
    if path.suffix != ".py" or not path.is_file():
        return f"{text!r}: there is no Python file {path}"
    inside = policy.folder is not None and path.resolve().is_relative_to(policy.folder.resolve())
    if not inside and file not in policy.allow and str(path) not in policy.allow:
        return f"{text!r} lies outside the recipe's folder; if you trust it, add --allow-target {file}"
    names = _definitions(path)
    if name.split(".")[0] not in names:
        return f"{path} defines no {name!r}; {did_you_mean(name, names)}"
    return None


def _check_dotted(text: str, policy: Policy) -> str | None:
    root = text.split(".")[0]
    if text in OURS or _allowed(text, policy):
        return None
    if "." not in text:
        return f"{text!r} is a package, not a callable in one"
    if root in KNOWN:
        if text.startswith("torch.optim.") and text.rpartition(".")[2] not in OPTIMIZERS:
            return (
                f"torch has no optimizer {text!r}; {did_you_mean(text, [f'torch.optim.{name}' for name in OPTIMIZERS])}"
            )
        if re.fullmatch(KNOWN[root], text):
            return None
        return f"{text!r} is not among the classes of {root} that recipes build; if you trust it, add --allow-target {text}"
    if root == "amlaunch":
        return f"amlaunch offers no target {text!r}; {did_you_mean(text, OURS)}"
    known = ", ".join(("amlaunch", *KNOWN))
    return f"{text!r} is outside the known libraries ({known}); if you trust it, add --allow-target {root}"


def _allowed(text: str, policy: Policy) -> bool:
    return any(text == name or text.startswith(name + ".") for name in policy.allow)


def file_of(file: str, policy: Policy) -> Path:
    """The path that a ``file.py:object`` target names: absolute, or relative to the recipe."""
    return (policy.folder or Path.cwd()) / os.path.expanduser(file)


@lru_cache(maxsize=64)
def _tree(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except (SyntaxError, ValueError) as error:
        raise BadInput(f"{path}:{getattr(error, 'lineno', 1) or 1}: not valid Python: {error}") from None


def _definitions(path: Path) -> list[str]:
    """Names that a module itself defines at its top level; what it only imports (``os``) is not its own."""
    names = []
    for node in _tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def code_digest(text: str, policy: Policy) -> str:
    """Stands for the code of a file target and of the neighbours it imports; comments and layout do not count."""
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
        waiting += [found for name in sorted(_imports(tree)) if (found := path.parent / f"{name}.py").is_file()]
    return digest.hexdigest()


def _imports(tree: ast.Module) -> set[str]:
    """First parts of the names of all modules that a module imports."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def current_name(text: str) -> str:
    """Return the name that a target has today; until version 0.5 our own ones had no ``amlaunch.`` before them."""
    return f"amlaunch.{text}" if f"amlaunch.{text}" in OURS else text


def stable_names(value: Any) -> Any:
    """Return plain data with our own targets under the names they had first, so that identities outlast a renaming."""
    if isinstance(value, Mapping):
        return {key: stable_names(child) for key, child in value.items()}
    if isinstance(value, list):
        return [stable_names(child) for child in value]
    return value.removeprefix("amlaunch.") if isinstance(value, str) and value in OURS else value


def _source(text: str) -> tuple[Path, str] | None:
    """Return ``(file, object)`` of one of our own targets, without importing it."""
    if text not in OURS:
        return None
    return Path(__file__).resolve().parents[2] / OURS[text], text.rpartition(".")[2]


def signature(text: str, policy: Policy) -> Signature | None:
    """The keywords of a target in our own packages, in the user's file, or of a common optimizer.

    None where only importing would tell: then the callable itself complains when it is built.
    """
    if text in OPTIMIZER_KEYS:
        known = OPTIMIZER_KEYS[text] | OUR_KEYS.get(text, {})
        keys = {name: Parameter(kind, required=False) for name, kind in known.items()}
        return Signature(keys, open=False)
    file, name = split_target(text)
    found = (file_of(file, policy), name) if file else _source(text)
    if found is None:
        return None
    for node in _tree(found[0]).body:
        if getattr(node, "name", None) == found[1]:
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
    plain = [*spec.posonlyargs, *spec.args][skip:]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)[
        -len(plain) or None :
    ]
    pairs = [*zip(plain, defaults, strict=False), *zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    parameters = {arg.arg: _parameter(arg, default) for arg, default in pairs if not arg.arg.startswith("_")}
    return Signature(parameters, open=spec.kwarg is not None)


def _parameter(arg: ast.arg, default: ast.expr | None) -> Parameter:
    annotation = ast.unparse(arg.annotation).strip("'\"") if arg.annotation else ""
    try:
        value = ast.literal_eval(default) if default is not None else None
    except ValueError:
        value = None
    return Parameter(annotation, required=default is None, default=value)


def resolve(text: str, policy: Policy) -> Any:
    """The callable behind a target's name, imported now.

    Raises BadInput for a name that is refused, missing, not callable, or that
    turns out to live outside the known libraries (``torch.os.system``).
    """
    problem = check_target(text, policy)
    if problem:
        raise BadInput(problem)
    file, name = split_target(text)
    if file:
        found: Any = _attribute(_import_file(file_of(file, policy)), name, text)
    else:
        found = _import_dotted(text, policy)
    if not callable(found):
        raise BadInput(f"{text!r} is a {type(found).__name__}, not something to call")
    return found


def _attribute(module: ModuleType, name: str, text: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
        if found is None or isinstance(found, ModuleType):
            raise BadInput(f"{text!r}: there is no {part!r} of the file's own")
    return found


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
    spec.loader.exec_module(module)
    return module


def _import_dotted(text: str, policy: Policy) -> Any:
    parts = text.split(".")
    found: Any = _import_module(parts[0], text)
    for depth, part in enumerate(parts[1:], start=2):
        name = ".".join(parts[:depth])
        found = _step(found, part, name, text)
        _refuse_stranger(found, name, text, policy)
    return found


def _step(found: Any, part: str, module: str, text: str) -> Any:
    """An attribute, or a submodule that nobody has imported yet."""
    if hasattr(found, part):
        return getattr(found, part)
    if isinstance(found, ModuleType):
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError:
            pass
    names = [name for name in dir(found) if not name.startswith("_")]
    raise BadInput(f"{text!r}: {module.rpartition('.')[0]} has no {part!r}; {did_you_mean(part, names)}")


def _import_module(root: str, text: str) -> ModuleType:
    try:
        return importlib.import_module(root)
    except ModuleNotFoundError as error:
        raise BadInput(f"{text!r} needs the package {error.name!r}, which is not installed here") from None


def _refuse_stranger(found: Any, name: str, text: str, policy: Policy) -> None:
    """A module's namespace also holds what it imported (``torch.nn.functional.torch``): that is not its own."""
    is_module = isinstance(found, ModuleType)
    home = found.__name__ if is_module else getattr(found, "__module__", None) or ""
    own = home == name if is_module else home.split(".")[0] == text.split(".")[0]
    if own or _allowed(text, policy):
        return
    raise BadInput(
        f"{text!r} belongs to {home!r}, outside the known libraries; if you trust it, add --allow-target {text}"
    )


def build(node: Mapping[str, Any], policy: Policy, *args: Any, **extra: Any) -> Any:
    """Call what ``node["_target_"]`` names with the other keys; nested targets are built first.

    ``args`` and ``extra`` come from the program and win over the recipe's keys.
    Raises BadInput where the callable refuses its keywords.
    """
    found = resolve(node["_target_"], policy)
    keywords = {
        key: _build_nested(value, policy) for key, value in node.items() if key != "_target_" and key not in extra
    }
    _refuse_remote_code(node, policy)
    _refuse_unknown_settings(found, node["_target_"], keywords)
    try:
        return found(*args, **keywords, **extra)
    except Exception as error:
        if not _is_about_input(error):
            raise
        raise BadInput(f"{node['_target_']}: {error}") from error


def _is_about_input(error: Exception) -> bool:
    """Whether a callable complains of what it was given: values, keywords, a configuration's own validation."""
    if isinstance(error, TypeError):
        return "argument" in str(error)
    return isinstance(error, ValueError) or type(error).__name__.endswith("ValidationError")


def _refuse_unknown_settings(found: Any, name: str, keywords: Mapping[str, Any]) -> None:
    """A configuration of transformers takes any keyword and keeps it: a typo would go unnoticed."""
    if not (isinstance(found, type) and name.startswith("transformers.") and name.endswith("Config")):
        return
    known = {*inspect.signature(found).parameters, *getattr(found, "attribute_map", {})}
    try:
        known |= set(found().to_dict())
    except Exception:  # a configuration made of others has no default: its own constructor judges
        return
    for key in keywords:
        if key not in known:
            raise BadInput(f"{name} has no setting {key!r}; {did_you_mean(key, known)}")


def _build_nested(value: Any, policy: Policy) -> Any:
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, policy)
        return {key: _build_nested(child, policy) for key, child in value.items()}
    if isinstance(value, list):
        return [_build_nested(child, policy) for child in value]
    return value


def _refuse_remote_code(node: Mapping[str, Any], policy: Policy) -> None:
    if node.get("trust_remote_code") and "trust_remote_code" not in policy.allow:
        raise BadInput(
            "trust_remote_code runs code from the hub; if you trust it, add --allow-target trust_remote_code"
        )
