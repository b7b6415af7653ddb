"""Every public name says what it is in a full sentence, then its arguments, results and errors, in one form.

``python tests/test_docstrings.py nsc/data`` lists what is missing below a folder.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("nsc", "nsc_kernels") for path in (ROOT / package).rglob("*.py"))
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):\n((?:    .*\n|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^    (\*{0,2}\w[*\w, ]*):", re.MULTILINE)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def problems(path: Path) -> list[str]:
    """What is missing in one file, a line each: place, name, what is wrong."""
    tree, found = ast.parse(path.read_text()), []
    for name, node in public(tree):
        where = f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        found += [f"{where}: {problem}" for problem in about(node, name, of_command_line(path))]
    return found


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, with the public methods of the latter."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Function) and (not inner.name.startswith("_") or inner.name == "__call__"):
                        yield f"{node.name}.{inner.name}", inner


def of_command_line(path: Path) -> bool:
    """Whether a file holds commands, whose docstring is their --help, and each option tells of itself."""
    return path.name.endswith("_command.py") or path.as_posix().endswith("nsc/cli/options.py")


def about(node: ast.AST, name: str, is_command: bool) -> Iterator[str]:
    """What is wrong with one docstring."""
    text = ast.get_docstring(node)
    if not text:
        yield "no docstring"
        return
    summary = text.split("\n\n")[0]
    if not re.search(r"[.:]$", summary) or len(summary.split()) < 3 or not re.match(r"[A-Z`]", summary):
        yield f"no full sentence first: {summary[:60]!r}"
    if is_command:
        return
    sections = {title: body for title, body in SECTION.findall(text + "\n")}
    if isinstance(node, ast.ClassDef):
        fields = [n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        constructor = next((n for n in node.body if isinstance(n, Function) and n.name == "__init__"), None)
        arguments = parameters(constructor) if constructor else []
        yield from lacking("Attributes", [f for f in fields if not f.startswith("_")], sections)
        yield from lacking("Args", arguments, sections)
        return
    yield from lacking("Args", parameters(node), sections)
    decorators = {ast.unparse(d).split("(")[0].rpartition(".")[2] for d in node.decorator_list}
    returns = ast.unparse(node.returns) if node.returns else "None"
    of_value = not decorators & {"property", "cached_property"} and returns not in ("None", "NoReturn")
    if of_value and not sections.keys() & {"Returns", "Yields"}:
        yield f"Returns is missing, of {returns}"
    if raises(node) and "Raises" not in sections:
        yield "Raises is missing"


def parameters(node: Function) -> list[str]:
    """The names of a function's parameters, without self and cls."""
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg) if x]
    return [name for name in names if name not in ("self", "cls") and not name.startswith("_")]


def lacking(title: str, names: list[str], sections: dict[str, str]) -> Iterator[str]:
    """Names that a section does not tell of, and names in it that there are not."""
    told = {part.strip().lstrip("*") for entry in ENTRY.findall(sections.get(title, "")) for part in entry.split(",")}
    if missing := [name for name in names if name not in told]:
        yield f"{title} lacks {', '.join(missing)}"
    if title == "Args" and (strange := sorted(told - set(names))):
        yield f"{title} tells of {', '.join(strange)}, which there is not"


def raises(node: Function) -> bool:
    """Whether a function itself, not one inside it, raises something else than NotImplementedError."""
    inner = {id(x) for n in ast.walk(node) if isinstance(n, Function) and n is not node for x in ast.walk(n)}
    raised = [n for n in ast.walk(node) if isinstance(n, ast.Raise) and n.exc and id(n) not in inner]
    return any("NotImplementedError" not in ast.unparse(n) for n in raised)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_names_are_documented(path):
    assert problems(path) == []


def test_what_is_missing_is_found(tmp_path, monkeypatch):
    code = '''
class Thing:
    """Of both."""
    size: int
def grow(thing, by):
    """Return a larger thing.

    Args:
        thing: what grows.
        old: gone.
    """
    raise ValueError
def told(x: int) -> int:
    """Return twice a number.

    Args:
        x: any number.

    Returns:
        Twice ``x``.
    """
    return 2 * x
'''
    (tmp_path / "thing.py").write_text(code)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    found = problems(tmp_path / "thing.py")
    assert [line.partition(" ")[2] for line in found] == [
        "Thing: no full sentence first: 'Of both.'",
        "Thing: Attributes lacks size",
        "grow: Args lacks by",
        "grow: Args tells of old, which there is not",
        "grow: Raises is missing",
    ]


if __name__ == "__main__":
    folders = [Path(place).resolve() for place in sys.argv[1:]] or [ROOT]
    print("\n".join(p for file in FILES if any(f in (file, *file.parents) for f in folders) for p in problems(file)))
