"""Every message that brainfm refuses with, read from its source: class, module, and the text with its placeholders."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice, product
from pathlib import Path

import brainfm
from brainfm import errors

PACKAGE = Path(brainfm.__file__).parent
CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.BrainfmError)
}
PLAIN = ("ValueError", "TypeError")  # what Python itself has for arguments that cannot be
MOST_FORMS = 12  # of one message, by what is put into it
DEEPEST = 5  # functions that a text is followed through


@dataclass(frozen=True)
class Refusal:
    """One message: the error's class, the module that raises it, and its text, placeholders as ‹name›."""

    error: str
    module: str
    text: str


@dataclass(frozen=True)
class _Module:
    """What a text in a module may be made of: its constants, and what its functions return."""

    name: str
    tree: ast.Module
    about: str
    constants: dict[str, ast.expr]


class _Source:
    """The source of the package, and the texts in it."""

    def __init__(self) -> None:
        self.modules = [_read(path) for path in sorted(PACKAGE.rglob("*.py"))]
        self.functions: dict[str, list[tuple[_Module, ast.FunctionDef]]] = {}
        for module in self.modules:
            for node in ast.walk(module.tree):
                if isinstance(node, ast.FunctionDef):
                    self.functions.setdefault(node.name, []).append((module, node))

    def refusals(self) -> Iterator[Refusal]:
        """Each error that is made, in the order of the modules."""
        for module in self.modules:
            functions = [node for node in ast.walk(module.tree) if isinstance(node, ast.FunctionDef)]
            inner_first = sorted(functions, key=lambda function: -function.lineno)
            for call in ast.walk(module.tree):
                error = _error_of(call)
                if error is None:
                    continue
                where = next((f for f in inner_first if f.lineno <= call.lineno <= (f.end_lineno or 0)), None)
                if error == "MissingExtraError":
                    yield Refusal(error, module.name, _missing(call))
                    continue
                for text in self.texts(call.args[0], module, where, DEEPEST):
                    if re.search(r"\w{3}", re.sub("‹[^›]*›", "", text)):
                        yield Refusal(error, module.name, " ".join(text.split()))

    def texts(self, node: ast.expr, module: _Module, where: ast.FunctionDef | None, depth: int) -> list[str]:
        """What an expression may read as; a placeholder where only a run can say."""
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            return self._joined(list(node.values), module, where, depth)
        if isinstance(node, ast.FormattedValue):
            return self.texts(node.value, module, where, depth)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([node.left, node.right], module, where, depth)
        if isinstance(node, ast.IfExp):
            forms = self.texts(node.body, module, where, depth) + self.texts(node.orelse, module, where, depth)
            return list(dict.fromkeys(forms))[:MOST_FORMS]
        if isinstance(node, ast.BoolOp) and all(isinstance(value, ast.Call) for value in node.values):
            return [text for value in node.values for text in self.texts(value, module, where, depth)]
        if isinstance(node, ast.Name):
            return self._named(node, module, where, depth)
        if isinstance(node, ast.Call) and depth > 0:
            return self._returned(node, module, depth) or [_placeholder(node)]
        return [_placeholder(node)]

    def _joined(self, parts: list[ast.expr], module: _Module, where: ast.FunctionDef | None, depth: int) -> list[str]:
        forms = product(*(self.texts(part, module, where, depth) for part in parts))
        return ["".join(form) for form in islice(forms, MOST_FORMS)]

    def _named(self, node: ast.Name, module: _Module, where: ast.FunctionDef | None, depth: int) -> list[str]:
        """The text under a name: a constant of the module, or what the function sets it to, where that is one text."""
        values = [module.constants[node.id]] if node.id in module.constants else []
        for inner in ast.walk(where) if where else ():
            targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
            named = any(isinstance(target, ast.Name) and target.id == node.id for target in targets)
            if named and isinstance(inner, ast.Assign | ast.NamedExpr | ast.AnnAssign) and inner.value is not None:
                values.append(inner.value)
            elif named:  # of a loop, or added to: only a run can say
                return [_placeholder(node)]
        is_text = (ast.Constant, ast.JoinedStr, ast.IfExp, ast.Call)
        if len(values) != 1 or depth < 1 or not isinstance(values[0], is_text):
            return [_placeholder(node)]
        found = self.texts(values[0], module, where, depth - 1)
        return (
            found if all(re.search(r"[^\W\d]", re.sub("‹[^›]*›", "", text)) for text in found) else [_placeholder(node)]
        )

    def _returned(self, call: ast.Call, module: _Module, depth: int) -> list[str]:
        """What a function returns, of the same module or the only one of that name, where it returns texts."""
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        known = self.functions.get(name, [])
        known = [(owner, function) for owner, function in known if owner is module] or known
        if len(known) != 1:
            return []
        module, function = known[0]
        if not (isinstance(function.returns, ast.Name) and function.returns.id == "str"):
            return []
        values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
        found = [text for value in values for text in self.texts(value, module, function, depth - 1) if text]
        return list(dict.fromkeys(found))[:MOST_FORMS]


def _read(path: Path) -> _Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    about = (ast.get_docstring(tree) or "").partition("\n\n")[0]
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.Constant | ast.JoinedStr)
    }
    return _Module(".".join(part for part in parts if part != "__init__"), tree, " ".join(about.split()), constants)


def _error_of(node: ast.AST) -> str | None:
    """The class of the error that a call makes, or None."""
    if not isinstance(node, ast.Call) or not node.args:
        return None
    name = getattr(node.func, "id", "")
    return name if name in CLASSES or name in PLAIN else None


def _missing(call: ast.Call) -> str:
    """The text of an error about optional packages, whose arguments are the package and its extra."""
    package, extra = (str(a.value) if isinstance(a, ast.Constant) else _placeholder(a) for a in call.args)
    return f"{package} is not installed; run: pip install {package} ‹what else the extra {extra} lacks›"


def _placeholder(node: ast.expr) -> str:
    """What stands for a value in a message, such as ‹path›."""
    while True:
        if isinstance(node, ast.BoolOp):
            node = node.values[0]
        elif isinstance(node, ast.FormattedValue):
            node = node.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.args:
            node = node.func.value
        elif isinstance(node, ast.Call) and node.args:
            node = node.args[-1] if getattr(node.func, "attr", "") != "join" else node.args[0]
        elif isinstance(node, ast.Starred | ast.Subscript | ast.GeneratorExp | ast.ListComp):
            node = node.elt if isinstance(node, ast.GeneratorExp | ast.ListComp) else node.value
        elif isinstance(node, ast.Attribute):
            return f"‹{node.attr.strip('_').replace('_', ' ')}›"
        else:
            name = getattr(node, "id", "")
            return f"‹{name.strip('_').replace('_', ' ')}›" if name else "‹…›"


@cache
def _source() -> _Source:
    return _Source()


@cache
def refusals() -> tuple[Refusal, ...]:
    """Every message once, in the order of the modules."""
    return tuple(dict.fromkeys(_source().refusals()))


def as_markdown() -> str:
    """The messages as a part of a page: a heading an error class, one a module, one line a message."""
    about = {module.name: module.about for module in _source().modules}
    parts = []
    for error in [*CLASSES, *PLAIN]:
        own = [refusal for refusal in refusals() if refusal.error == error]
        said = " ".join(_words_of(CLASSES[error]).split()) if error in CLASSES else _PLAINLY
        parts.append(f"### `{error}`\n\n{said}")
        if not own:
            parts.append("*It has no messages of its own.*")
        for module in dict.fromkeys(refusal.module for refusal in own):
            lines = [f"- {_line(refusal.text)}" for refusal in own if refusal.module == module]
            parts += [f"**`{module}`**: {_escaped(about[module])}", "\n".join(lines)]
    return "\n\n".join(parts)


_PLAINLY = "What Python has for an argument that cannot be. brainfm raises it where a program, not a scan, is wrong."


def _words_of(error: type) -> str:
    """Its docstring without the example, which is on the page of the API."""
    return (error.__doc__ or "").partition("Example:")[0]


def _line(text: str) -> str:
    """A message as Markdown, what follows its last semicolon in bold: by the rule of the house, what to do next."""
    cause, semicolon, rest = _escaped(text).rpartition("; ")
    return f"{cause}; **{rest.strip()}**" if semicolon and rest.strip() and "*" not in rest else _escaped(text)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>#|$~])", r"\\\1", text)
