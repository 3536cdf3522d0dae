"""Every public name has a docstring, an example that runs, types, and a place in the reference."""

import ast
import doctest
import functools
import importlib
import inspect
import itertools
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import jaxgrad
from jaxgrad.network import derivation

SOURCE = Path(jaxgrad.__file__).parent
REFERENCE = SOURCE.parent / "docs" / "reference"
INTERNAL = {"costs", "errors", "microbatches", "precision", "progress", "sharding"}  # used by the public modules only


def submodules() -> list[str]:
    """The names of the public modules directly in the package."""
    found = (module.name for module in pkgutil.iter_modules(jaxgrad.__path__))
    # jaxgrad.network is another name of jaxgrad.exercise
    return [name for name in found if not name.startswith("_") and name not in INTERNAL | {"network"}]


def public(module: ModuleType) -> dict[str, object]:
    """The public names of a module, with their values."""
    if module is derivation:  # it has no __all__: each function is one line of the derivation
        return {n: v for n, v in vars(module).items() if inspect.isfunction(v) and v.__module__ == module.__name__}
    return {name: getattr(module, name) for name in module.__all__}


def public_modules() -> list[ModuleType]:
    """The modules that a user imports from: the package, its submodules, and the modules that these export."""
    found = [jaxgrad, *(importlib.import_module(f"jaxgrad.{name}") for name in submodules())]
    for module in found:  # grows
        exported = [v for v in public(module).values() if inspect.ismodule(v) and v is not jaxgrad.network]
        found += [m for m in exported if m not in found]
    return found


MODULES = public_modules()
NAMES = {f"{module.__name__}.{name}": value for module in MODULES for name, value in public(module).items()}
FUNCTIONS = {f"{v.__module__}.{v.__qualname__}": v for v in NAMES.values() if inspect.isfunction(v)}
CLASSES = {f"{v.__module__}.{v.__qualname__}": v for v in NAMES.values() if inspect.isclass(v)}
BOTH = FUNCTIONS | CLASSES


def callables(name: str) -> dict[str, Callable]:
    """A function by its name; or a class by its name, with its public methods and properties."""
    value = BOTH[name]
    if name in FUNCTIONS:
        return {name: value}
    members = {n: v for n, v in vars(value).items() if not n.startswith("_") or n in ("__call__", "__getitem__")}
    plain = {n: v.fget if isinstance(v, property) else getattr(v, "__func__", v) for n, v in members.items()}
    return {name: value} | {f"{name}.{n}": v for n, v in plain.items() if inspect.isfunction(v)}


def explained(docstring: str) -> set[str]:
    """The names in the section Args: `a: …`, `a, b: …`, `*a: …`."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    names = re.findall(r"^    ((?:\*{0,2}\w+(?:, )?)+): ", section[1] if section else "", re.MULTILINE)
    return {name.strip("*") for group in names for name in group.split(", ")}


@functools.cache
def with_examples(module: str) -> set[str]:
    """The names for which `pytest --doctest-modules` finds examples."""
    return {test.name for test in doctest.DocTestFinder().find(sys.modules[module]) if test.examples}


def constants_with_a_docstring() -> set[str]:
    """The names that are assigned at the top level of a module and have a string below."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        for first, below in itertools.pairwise(body):
            string = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if string and isinstance(first, ast.Assign):
                found |= {target.id for target in first.targets if isinstance(target, ast.Name)}
    return found


def test_a_package_has_the_names_in_all_and_its_modules_and_nothing_else():
    for package in (module for module in MODULES if hasattr(module, "__path__")):
        modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
        names = {name for name in dir(package) if not name.startswith("_")} - {
            "jaxtyping"
        }  # added by the run-time type checks
        assert names - modules <= set(package.__all__) <= names


def test_the_exercise_can_be_imported_as_network():
    import jaxgrad.network.closed_form as closed_form

    assert closed_form is jaxgrad.network.closed_form is jaxgrad.exercise.closed_form
    assert all(getattr(jaxgrad.network, name) is getattr(jaxgrad.exercise, name) for name in jaxgrad.exercise.__all__)


def test_every_module_has_a_docstring():
    assert all(module.__doc__ for module in MODULES)
    assert with_examples(derivation.__name__) == {derivation.__name__}


@pytest.mark.parametrize("name", BOTH)
def test_a_function_or_class_has_an_example(name):
    if BOTH[name].__module__ != derivation.__name__:
        assert any(found == name or found.startswith(f"{name}.") for found in with_examples(BOTH[name].__module__))


@pytest.mark.parametrize("name", BOTH)
def test_functions_classes_and_methods_have_docstrings(name):
    assert not [path for path, value in callables(name).items() if not value.__doc__]


def test_a_constant_has_a_docstring():
    constants = {
        name.rpartition(".")[2]
        for name, value in NAMES.items()
        if not inspect.ismodule(value) and all(value is not other for other in BOTH.values())
    }
    assert {"ACTIVATIONS", "RTOL"} <= constants <= constants_with_a_docstring()


@pytest.mark.parametrize("name", BOTH)
def test_every_parameter_and_result_has_a_type(name):
    for path, value in callables(name).items():
        signature = inspect.signature(value)
        types = {p.name: p.annotation for p in signature.parameters.values()}
        if not inspect.isclass(value):
            types["return"] = signature.return_annotation
        missing = [
            n for n, annotation in types.items() if annotation is inspect.Parameter.empty and n not in ("self", "cls")
        ]
        assert not missing, path


@pytest.mark.parametrize("name", BOTH)
def test_the_docstring_explains_all_parameters_and_no_others(name):
    for path, value in callables(name).items():
        parameters, documented = set(inspect.signature(value).parameters), explained(value.__doc__)
        assert documented <= parameters, path
        assert path not in FUNCTIONS or documented in (set(), parameters), path


def test_every_module_has_a_page_in_the_reference_with_all_its_names():
    for module in MODULES:
        if module.__name__.count(".") < 2:
            page = (REFERENCE / f"{module.__name__.rpartition('.')[2]}.md").read_text()
            assert re.search(rf"^::: {module.__name__}$", page, re.MULTILINE)
            listed = re.findall(r"^        - (\w+)$", page, re.MULTILINE)
            assert not listed or set(listed) == {n for n, v in public(module).items() if v in BOTH.values()}
        else:
            assert f"\n::: {module.__name__}\n" in (REFERENCE / f"{module.__name__.split('.')[1]}.md").read_text()
