"""Which module imports which when it is loaded, read from the sources. Imports within functions do not count."""

import ast
from collections.abc import Iterator
from pathlib import Path

Graph = dict[str, set[str]]


def import_graph(root: Path, packages: list[str]) -> Graph:
    """module → modules of `packages` that loading it loads.

    `import a.b.c` loads a, a.b and a.b.c. Packages that hold the importing module itself are left out, unless it names
    them: they are being loaded already.
    """
    files = {name_of(path, root): path for package in packages for path in sorted((root / package).rglob("*.py"))}
    graph: Graph = {}
    for module, path in files.items():
        graph[module] = set()
        for names in imports(path, module):
            found = next((name for name in names if name in files), None)
            if found is not None and found != module:
                graph[module] |= {found, *(name for name in ancestors(found) if name not in ancestors(module))}
        graph[module].discard(module)
    return graph


def name_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def ancestors(module: str) -> list[str]:
    """The packages that hold a module, and itself."""
    parts = module.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def imports(path: Path, module: str) -> Iterator[list[str]]:
    """For every import the names that it may mean, the longest first: `from a import b` is of a.b or of a."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in module_level(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield [alias.name]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield [f"{base}.{alias.name}", base]


def module_level(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is loaded; those of `if TYPE_CHECKING` do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from module_level(node)


def circles(graph: Graph) -> list[list[str]]:
    """Groups of modules each of which loads, by way of others, all the others."""
    reached = {module: reachable(graph, module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return sorted(list(group) for group in groups)


def reachable(graph: Graph, start: str) -> set[str]:
    """Modules that can be reached in one step or more."""
    found: set[str] = set()
    todo = list(graph[start])
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += graph[module]
    return found
