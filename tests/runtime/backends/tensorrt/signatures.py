"""Follows our code with a Python module of TensorRT, in a process of its own: which of our calls does it not have?

Nothing is called. The code is read as a syntax tree; what an expression is, the module's own classes and docstrings
say, from the few names that ``KNOWN`` gives a class. A branch under ``hasattr`` is followed where the module has that
name, and a private function where something that is followed uses it.

Standard input: {"paths": folders of the module, "module": its name, "target": ours, "code": {file: text}}.
Standard output: {"version", "checked": names that were used, "absent": names asked for and not there, "wrong": lines}.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sys
from types import ModuleType
from typing import Any, NamedTuple

from runtime.bundle.targets import TARGETS

KNOWN = {
    "trt": "",
    "self.trt": "",
    "tensorrt.trt": "",
    "self._tensorrt.trt": "",
    "self._runtime": "Runtime",
    "engine": "ICudaEngine",
    "self._engine": "ICudaEngine",
    "self._context": "IExecutionContext",
    "self._cache": "IRuntimeCache",
    "context": "IExecutionContext",
    "parser": "OnnxParser",
    "error": "ParserError",
}
"""What holds something of TensorRT where no call shows it: attributes, and parameters; "" is the module."""

KNOWN_IN = {
    "_use_timing_cache": {"config": "IBuilderConfig"},
    "_keep_timing_cache": {"config": "IBuilderConfig"},
    "_write": {"plan": "IHostMemory"},
    "log": {"severity": "ILogger.Severity"},
}
"""The same of one function."""

RETURNS = {
    "get_plugin_registry": "IPluginRegistry",
    "create_runtime_cache": "IRuntimeCache",
    "get_error": "ParserError",
}
"""What calls give whose docstrings name no Python class."""


class Method(NamedTuple):
    """A call of TensorRT's: its name for people, its docstring, and whether its first parameter is given."""

    name: str
    text: str
    bound: bool


class Checker(ast.NodeVisitor):
    """Checks one file. ``visit`` also returns what an expression is: a module, the class of its value, a call, None."""

    def __init__(self, trt: ModuleType, target: object, file: str) -> None:
        self.trt, self.target, self.file = trt, target, file
        self.checked, self.absent, self.wrong = set[str](), set[str](), list[str]()
        self.names: dict[str, Any] = {"trt": trt}
        self.classes: list[type] = []
        self.used = set[str]()
        self.private: list[ast.FunctionDef] = []

    def check(self, text: str) -> None:
        """Follows a file."""
        self.visit(ast.parse(text))
        while found := next((function for function in self.private if function.name in self.used), None):
            self.private.remove(found)
            self.function(found)

    def follow(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def complain(self, node: ast.AST, what: str) -> None:
        self.wrong.append(f"{self.file}:{getattr(node, 'lineno', 0)}: {what}")

    def named(self, path: str) -> Any:
        found: Any = self.trt
        for name in filter(None, path.split(".")):
            found = getattr(found, name, None)
        return found

    # Names ------------------------------------------------------------------------------------------------------------

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name.startswith("_") and not node.name.endswith("__"):
            self.private.append(node)
        else:
            self.function(node)

    def function(self, node: ast.FunctionDef) -> None:
        outer, self.names = self.names, dict(self.names)
        for name, path in (KNOWN | KNOWN_IN.get(node.name, {})).items():
            if "." in name or path == "" or name in {argument.arg for argument in node.args.args}:
                self.names[name] = self.named(path)
        for argument in node.args.args:
            unknown = isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"
            if unknown and argument.arg not in self.names:
                self.complain(node, f"what is {argument.arg} of {node.name}? KNOWN should say")
        if self.classes and hasattr(self.classes[-1], node.name) and not node.name.startswith("__"):
            self.override(node)
        self.generic_visit(node)
        self.names = outer

    def override(self, node: ast.FunctionDef) -> None:
        """A method of ours that TensorRT calls has the parameters of the one that it overrides."""
        base = self.classes[-1]
        method = Method(f"{base.__name__}.{node.name}", getattr(base, node.name).__doc__ or "", bound=True)
        self.checked.add(method.name)
        self.fits(node, method, [None] * (len(node.args.args) - 1), {})

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        bases = [self.visit(base) for base in node.bases]
        ours = [base for base in bases if isinstance(base, type)]
        self.classes += ours
        self.follow(node.body)
        del self.classes[len(self.classes) - len(ours) :]

    def visit_Name(self, node: ast.Name) -> Any:
        self.used.add(node.id)
        if isinstance(node.ctx, ast.Store):  # of a loop: assignments do not come here
            self.names.pop(node.id, None)
        return self.names.get(node.id)

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.visit(node.value)
        for target in node.targets:
            self.assign(target, value, node.value)

    def assign(self, target: ast.expr, value: Any, given: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            parts = given.elts if isinstance(given, ast.Tuple) else [given] * len(target.elts)
            for one, part in zip(target.elts, parts, strict=True):
                self.assign(one, self.visit(part) if isinstance(given, ast.Tuple) else None, part)
        elif isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, ast.Attribute) and ast.unparse(target) not in self.names:
            owner = self.visit(target.value)
            if isinstance(owner, type):
                found = getattr(owner, target.attr, None)
                self.visit(target)
                if found is not None and getattr(found, "fset", None) is None:
                    self.complain(target, f"{owner.__name__}.{target.attr} cannot be set")

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        return [self.visit(node.test), self.visit(node.orelse), self.visit(node.body)][-1]

    # What is not in every TensorRT ------------------------------------------------------------------------------------

    def visit_If(self, node: ast.If) -> None:
        there = self.there(node.test)
        if there is None:
            self.visit(node.test)
        for statements, followed in ((node.body, there is not False), (node.orelse, there is not True)):
            self.follow(statements if followed else [])

    def there(self, test: ast.expr) -> bool | None:
        """Whether a condition about TensorRT holds here; None where it is about something else."""
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "hasattr":
            owner, name = self.visit(test.args[0]), test.args[1]
            assert owner is not None, ast.unparse(test)
            assert isinstance(name, ast.Constant)
            return self.asked(owner, name.value)
        if isinstance(test, ast.Attribute) and ast.unparse(test.value) == "target":
            return bool(getattr(self.target, test.attr))
        return None

    def asked(self, owner: Any, name: str) -> bool:
        has = hasattr(owner, name)
        (self.checked if has else self.absent).add(f"{_title(owner)}{name}")
        return has

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        self.used.add(node.attr)
        if ast.unparse(node) in self.names:
            return self.names[ast.unparse(node)]
        owner = self.visit(node.value)
        if not isinstance(owner, (type, ModuleType)):
            return None
        name = f"{_title(owner)}{node.attr}"
        if not hasattr(owner, node.attr):
            self.complain(node, f"there is no {name}")
            return None
        self.checked.add(name)
        return self.attribute(owner, node.attr, name)

    def attribute(self, owner: Any, attribute: str, name: str) -> Any:
        found = getattr(owner, attribute)
        if isinstance(found, (type, ModuleType)):
            return found
        if callable(found):
            return Method(name, found.__doc__ or "", bound=isinstance(owner, type))
        # A member of an enumeration is one of its class; what a property is, only few docstrings say.
        return type(found) if isinstance(owner, type) and isinstance(found, owner) else None

    # Calls ------------------------------------------------------------------------------------------------------------

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3:
            owner, name = self.visit(node.args[0]), node.args[1]
            self.visit(node.args[2])
            if owner is None or not isinstance(name, ast.Constant):
                return None
            has = self.asked(owner, name.value)
            return self.attribute(owner, name.value, f"{_title(owner)}{name.value}") if has else None
        function = self.visit(node.func)
        given = [self.visit(argument) for argument in node.args]
        keywords = {keyword.arg: self.visit(keyword.value) for keyword in node.keywords}
        if isinstance(function, type):
            self.fits(node, Method(function.__name__, function.__init__.__doc__ or "", bound=True), given, keywords)  # type: ignore[misc]
            return function
        if isinstance(function, Method):
            # A method called on its class, as ``trt.ILogger.__init__(self)``, is given its first parameter.
            through_class = function.name.endswith("__init__")
            self.fits(node, function._replace(bound=function.bound and not through_class), given, keywords)
            return self.returned(function)
        return None

    def returned(self, method: Method) -> Any:
        name = method.name.rpartition(".")[2]
        found = re.search(rf"\b{name}\(.*\) -> ([\w.]+)", method.text)
        path = RETURNS.get(name) or (found[1].rpartition(".")[2] if found else "")
        return self.named(path) if path else None

    def fits(self, node: ast.AST, method: Method, given: list[Any], keywords: dict[Any, Any]) -> None:
        """A call must fit a signature of the docstring, in number, and in classes where both are known."""
        name = method.name.rpartition(".")[2] if method.text.find("__init__(") < 0 else "__init__"
        signatures = re.findall(rf"^(?:\d+\. )?{name}\((.*)\)(?: -> .*)?$", method.text, re.MULTILINE)
        signatures = [text for text in signatures if text != "*args, **kwargs"]
        if not signatures:
            self.complain(node, f"{method.name} has no signature")
        elif not any(self._fits(_parameters(text)[method.bound :], given, keywords) for text in signatures):
            self.complain(node, f"{method.name} takes {' or '.join(signatures)}")

    def _fits(self, parameters: list[tuple[str, str, bool]], given: list[Any], keywords: dict[Any, Any]) -> bool:
        if len(given) > len(parameters):
            return False
        values = dict(zip((name for name, _, _ in parameters), given, strict=False)) | keywords
        needed = {name for name, _, optional in parameters if not optional}
        if not needed <= values.keys() <= {name for name, _, _ in parameters}:
            return False
        return all(self._is(values[name], kind) for name, kind, _ in parameters if name in values)

    def _is(self, value: Any, kind: str) -> bool:
        wanted = self.named(kind.rpartition(".")[2])
        known = isinstance(value, type) and isinstance(wanted, type)
        return not known or issubclass(value, wanted) or not hasattr(self.trt, value.__name__)


def _title(owner: Any) -> str:
    return "" if isinstance(owner, ModuleType) else f"{owner.__name__}."


def _parameters(text: str) -> list[tuple[str, str, bool]]:
    """Name, type and whether there is a default, of each parameter of a signature as pybind11 writes it."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([<{") - (letter in ")]>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    result = []
    for part in filter(str.strip, parts):
        declared, equals, _ = part.partition(" = ")
        name, _, kind = declared.partition(":")
        result.append((name.strip(), kind.strip(), bool(equals)))
    return result


def check(trt: ModuleType, target: object, code: dict[str, str]) -> dict[str, Any]:
    """Checks files, given by name and text."""
    checkers = [Checker(trt, target, file) for file in code]
    for checker, text in zip(checkers, code.values(), strict=True):
        checker.check(text)
    checked, absent = (
        sorted(set().union(*(getattr(checker, kind) for checker in checkers))) for kind in ("checked", "absent")
    )
    wrong = [line for checker in checkers for line in checker.wrong]
    return {"version": trt.__version__, "checked": checked, "absent": absent, "wrong": wrong}


if __name__ == "__main__":
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = json.load(sys.stdin)
    sys.path[:0] = job["paths"]
    json.dump(check(importlib.import_module(job["module"]), TARGETS[job["target"]], job["code"]), out)
