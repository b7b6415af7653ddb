"""Which wing of ``nsc`` may import which; no circles; nobody takes another module's private names; names told apart."""

import ast
import graphlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nsc"
# Besides the files at the root of the package, which import no wing.
ALLOWED: dict[str, set[str]] = {
    "runtime": set(),
    "methods": set(),
    "bases": {"runtime"},
    "adapters": {"bases", "runtime"},
    "data": {"bases", "runtime"},
    "recipes": {"methods", "adapters"},
    "learning": {"methods", "adapters", "data", "bases", "runtime"},
    "export": {"recipes", "methods", "adapters", "data", "bases", "runtime"},
    "evaluation": {"learning", "methods", "recipes", "adapters", "data", "bases", "runtime"},
    "performance": {"learning", "adapters", "data", "bases", "runtime"},
    "merging": {"export", "evaluation", "methods", "learning", "recipes", "adapters", "data", "bases", "runtime"},
}
ALLOWED["cli"] = {*ALLOWED, "cli"}
OPEN = {"", "__main__", "tracking"}  # files at the root that stand above the wings
Import = tuple[str, str, str]  # importing module, imported module, name taken from it ("" for the module itself)


def imports(package: Path) -> list[Import]:
    """Every import of the package's own modules, wherever it stands, by names relative to the package."""
    return [found for path in sorted(package.rglob("*.py")) for found in imports_of(path, package)]


def imports_of(path: Path, package: Path) -> Iterator[Import]:
    here = module_name(path, package)
    tree = ast.parse(path.read_text())
    modules: dict[str, str] = {}  # local name -> module
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package.name:
            home = ".".join((node.module or "").split(".")[1:])
            for alias in node.names:
                inner = f"{home}.{alias.name}".strip(".")
                if is_module(inner, package):
                    modules[alias.asname or alias.name] = inner
                    yield here, inner, ""
                else:
                    yield here, home, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == package.name:
                    yield here, ".".join(alias.name.split(".")[1:]), ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield here, modules[node.value.id], node.attr


def module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str, package: Path) -> bool:
    place = package / name.replace(".", "/")
    return bool(name) and (place.with_suffix(".py").is_file() or (place / "__init__.py").is_file())


def wing(module: str) -> str:
    """The wing that a module lies in; "" at the root."""
    first = module.split(".")[0]
    return first if first in ALLOWED else ""


def forbidden(found: list[Import]) -> list[str]:
    """Imports that the table does not allow."""
    wrong = []
    for here, there, name in found:
        above = here in OPEN if wing(here) == "" else wing(there) in ("", wing(here), *ALLOWED[wing(here)])
        if not above and wing(there):
            wrong.append(f"{here} imports {name} from {there}")
    return wrong


def private(found: list[Import]) -> list[str]:
    """Private names, or names of private modules, that another module takes."""
    return [
        f"{here} takes {name or there} from {there}"
        for here, there, name in found
        if here != there and any(part.startswith("_") and part != "__version__" for part in (*there.split("."), name))
    ]


def circle(found: list[Import]) -> list[str]:
    """The modules of one circle of imports; none if there is no circle."""
    graph: dict[str, set[str]] = {}
    for here, there, _ in found:
        if here not in OPEN and here != there:
            graph.setdefault(here, set()).add(there)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def stem(word: str) -> str:
    """What is left of a word without its grammatical ending."""
    for ending in ("ations", "ation", "ings", "ing", "ions", "ion", "ers", "er", "ors", "or", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word.removesuffix(ending)
            break
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def alike(names: list[str]) -> list[tuple[str, str]]:
    """Pairs of modules whose names are forms of one word."""
    return [(a, b) for a, b in itertools.combinations(sorted(names), 2) if stem(a) == stem(b)]


def test_every_wing_is_in_the_table():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ALLOWED)


def test_no_wing_imports_what_the_table_does_not_allow():
    assert forbidden(imports(PACKAGE)) == []


def test_no_module_takes_the_private_names_of_another():
    assert private(imports(PACKAGE)) == []


def test_imports_run_in_no_circle():
    assert circle(imports(PACKAGE)) == []


def test_no_module_is_named_by_a_form_of_another_name():
    names = [path.parent.name if path.stem == "__init__" else path.stem for path in PACKAGE.rglob("*.py")]
    assert alike([name for name in names if name not in ("__main__", "nsc")]) == []


@pytest.mark.parametrize(
    ("file", "line", "check"),
    [
        ("bases/config.py", "from house.learning.loop import learn", forbidden),
        ("errors.py", "import house.bases.config", forbidden),
        ("data/rows.py", "def late():\n    from house.adapters import stack", forbidden),
        ("runtime/memory.py", "from house import errors\nerrors._hidden()", private),
        ("learning/loop.py", "from house.bases.config import _read", private),
        ("methods/ties.py", "from house.methods._blocks import rows", private),
        ("bases/config.py", "from house.bases import structure", circle),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_must_not_be_is_found(tmp_path, file, line, check):
    """A small package with the same wings, sound until ``line`` is put in by hand."""
    house = tmp_path / "house"
    sound = {
        "bases/config.py": "", "bases/structure.py": "from house.bases.config import read", "errors.py": "",
        "learning/loop.py": "from house.bases.config import read\nfrom house.errors import Wrong",
        "methods/_blocks.py": "", "methods/ties.py": "from house.errors import Wrong",
        "adapters/stack.py": "", "data/rows.py": "", "runtime/memory.py": "from house.errors import Wrong",
    }  # fmt: skip
    for name, text in sound.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(text)
        (house / name).with_name("__init__.py").touch()
    assert not any(find(imports(house)) for find in (forbidden, private, circle))
    (house / file).write_text(f"{(house / file).read_text()}\n{line}")
    assert check(imports(house))


def test_forms_of_one_word_are_found():
    assert alike(["combining", "combination", "merging", "merged", "state", "stack", "steps"]) == [
        ("combination", "combining"),
        ("merged", "merging"),
    ]
