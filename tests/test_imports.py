"""The arrows between rooms, read from the source: which room may import which, and where a library may be imported."""

import ast
import os
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("audit", "model_zoo", "reports")

LEAVES = {
    "audit", "audit.errors", "audit.flags", "audit.hashing", "audit.proportion", "audit.random_keys", "audit.records",
    "audit.storage", "audit.theory", "audit.types",
}  # fmt: skip
_BASE = {"leaves", "adversary", "representation", "information"}
_MEASURING = {*_BASE, "training", "config", "calibration", "certificate"}
# Every room, and the rooms that it may import.
ARROWS = {
    "leaves": set(),
    "adversary": {"leaves"},
    "representation": {"leaves", "adversary"},
    "information": _BASE - {"information"},
    "calibration": _BASE,
    "attribution": _BASE,
    "training": _BASE,
    "config": _BASE,
    "certificate": {*_BASE, "training"},
    "run": {*_MEASURING, "model_zoo"},
    "studies": {*_MEASURING, "attribution", "run", "model_zoo"},
    "commands": {*_MEASURING, "attribution", "run", "studies", "model_zoo", "reports"},
    "model_zoo": {"leaves"},
    "reports": {"leaves"},
}
# The console script lives in reports.cli and mounts audit.commands, lazily; commands render through reports.
MOUNT = ("reports.cli", "commands")
LONGEST_CHAIN = 13  # files, imported at load time one after another

# Places that may import a library, and no other: modules, or rooms.
ONLY = {
    "timm": {"model_zoo.libraries"},
    "robustbench": {"model_zoo.libraries"},
    "pyautoattack": {"model_zoo.libraries", "audit.adversary.external"},
    "foolbox": {"audit.adversary.external"},
    "torchvision.models": {"model_zoo.libraries"},
    "open_clip": {"model_zoo.sources.open_clip_towers"},
    "transformers": {"model_zoo.sources.transformers_networks"},
    "onnx": {"model_zoo.sources.onnx_files"},
    "ruamel": {"audit.config.yaml_source"},
    "yaml": set(),
    "click": {"audit.commands", "reports.cli"},
}
INSIDE_FUNCTIONS = (
    "timm", "robustbench", "pyautoattack", "foolbox", "torchvision", "sklearn", "huggingface_hub", "open_clip",
    "transformers", "tokenizers", "onnx", "onnx2torch",
)  # fmt: skip
DYNAMIC = {
    "model_zoo.sources.files",  # imports what a `file:` reference names, under --trust-code
    "audit.information.estimator",  # imports the implementations of the registry
    "audit",  # imports the module of a public name from the table of a package, read below
}


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}
MODULES = pytest.mark.parametrize("module", PATHS)


@cache
def tree(module):
    return ast.parse(PATHS[module].read_text(encoding="utf-8"))


def imported(nodes, package):
    """Yield every module that some nodes import, `import_module("literal")` included, as absolute names."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}: relative import in line {node.lineno}"
            # `from package import module` imports the module
            yield from {full if (full := f"{node.module}.{a.name}") in PATHS else node.module for a in node.names}
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            target = node.args[0]
            if isinstance(target, ast.Constant):
                yield target.value
            elif not isinstance(target, ast.Subscript):  # a subscript is a lazy table of exports, read below
                assert package in DYNAMIC, f"{package}: line {node.lineno} imports a module by a computed name"


def called(node):
    function = node.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def within(name, names):
    """Return whether a dotted name is one of the names or lies inside one."""
    return any(name == top or name.startswith(f"{top}.") for top in names)


@cache
def imports(module):
    return frozenset(imported(ast.walk(tree(module)), module))


@cache
def imports_on_loading(module):
    """Return what loading a module imports: all but what stands inside functions."""
    nodes, todo = [], list(tree(module).body)
    while todo:
        node = todo.pop()
        nodes.append(node)
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))
    return frozenset(imported(nodes, module))


def ours(names):
    """Return the modules of ours among imported names."""
    return {name for name in names if name in PATHS}


def room_of(module):
    """Return the room that a module lives in."""
    package, _, rest = module.partition(".")
    if package != "audit":
        return package
    return "leaves" if module in LEAVES else rest.partition(".")[0]


@MODULES
def test_every_module_lives_in_a_room(module):
    assert room_of(module) in ARROWS


@MODULES
def test_rooms_import_each_other_along_the_arrows_only(module):
    room = room_of(module)
    found = {room_of(name) for name in ours(imports(module))} - {room}
    if (module, "commands") == MOUNT:
        found -= {"commands"}
    assert found <= ARROWS[room]


def test_the_arrows_have_no_cycle():
    tuple(TopologicalSorter(ARROWS).static_order())


def test_leaves_do_not_import_rooms():
    assert {module for module in PATHS if room_of(module) == "leaves"} == LEAVES


def test_reports_mounts_the_measuring_commands_lazily():
    assert any(within(name, ["audit.commands"]) for name in imports("reports.cli"))
    assert not any(within(name, ["audit.commands"]) for name in imports_on_loading("reports.cli"))


TORCH_FREE = [
    "reports", "audit.adversary.norms", "audit.records", "audit.errors", "audit.theory", "audit.flags", "audit.storage",
]  # fmt: skip


@MODULES
def test_reports_and_the_leaves_they_use_import_no_torch(module):
    if within(module, TORCH_FREE):
        assert not any(within(name, ["torch", "torchvision", "timm", "robustbench"]) for name in imports(module))


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_imported_in_its_one_place(library):
    found = {module for module in PATHS if any(within(name, [library]) for name in imports(module))}
    assert not [module for module in found if not within(module, ONLY[library])]


@MODULES
def test_slow_libraries_are_imported_inside_functions(module):
    assert not [name for name in imports_on_loading(module) if within(name, INSIDE_FUNCTIONS)]


@MODULES
def test_only_commands_print(module):
    if within(module, ["reports.cli", "audit.commands"]):
        return
    prints = [n.lineno for n in ast.walk(tree(module)) if isinstance(n, ast.Call) and called(n) == "print"]
    assert not prints


def test_there_are_no_cycles_between_modules():
    graph = {module: ours(imports(module)) - {module} for module in PATHS}
    graph["reports.cli"] = {name for name in graph["reports.cli"] if room_of(name) != "commands"}
    tuple(TopologicalSorter(graph).static_order())


@cache
def chain(module):
    """Return the longest chain of modules of ours that loading a module imports one after another."""
    before = ours(imports_on_loading(module)) - {module}
    return max((chain(name) for name in before), key=len, default=()) + (module,)  # noqa: RUF005


def test_no_chain_of_imports_at_load_time_is_long():
    longest = max(map(chain, PATHS), key=len)
    assert len(longest) <= LONGEST_CHAIN, " <- ".join(longest)


def folders():
    return sorted({path.parent for path in PATHS.values()})


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_room_can_be_read_in_an_hour(folder):
    files = sorted(folder.glob("*.py"))
    assert len(files) <= (10 if folder == ROOT / "audit" else 18)


@MODULES
def test_files_classes_and_functions_are_short(module):
    assert len(PATHS[module].read_text(encoding="utf-8").splitlines()) <= 300
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < 120, f"class {node.name}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert not body or body[-1].end_lineno - body[0].lineno < 45, f"function {node.name}"


@MODULES
def test_there_is_no_import_for_type_checkers_only(module):
    assert not [n for n in ast.walk(tree(module)) if getattr(n, "id", getattr(n, "attr", "")) == "TYPE_CHECKING"]


@pytest.mark.parametrize(
    "module", ["audit", "audit.records", "audit.errors", "audit.theory", "reports.cli", "reports.publish"]
)
def test_loading_it_does_not_load_torch(module):
    code = f"import sys, {module}; print(*sorted({{'torch', 'timm', 'torchvision', 'robustbench'}} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert answer.stdout.strip() == ""


READING = """
import sys
from pathlib import Path
from audit.records import AuditRecord, RecordStore
from reports.cli import main

text = "name: a\\ndataset: digits\\nmodels: [bundled:digits-vgg-standard]\\nthreats: {eps: 0.1}\\n"
Path("run").mkdir()
for place in ("b.yaml", "run/benchmark.yaml"):
    Path(place).write_text(text)
RecordStore(Path("run")).write(AuditRecord(
    cell_id="0" * 64, model="m", source="bundled", family="vgg", training="standard", trained_eps=0.0,
    dataset="digits", layer="logits", norm="linf", eps=0.1, weights_sha256="0", estimator="sandwich", attack="a",
    seeds=1, images=50, normal_nats=2.0, normal_nats_se=0.1, worst_nats=1.0, worst_nats_se=0.1, rv=1.0, rv_se=0.1,
    natural_accuracy=0.9, adversarial_accuracy=0.5, adversarial_gap=0.4))
for words in (["--help"], ["status", "run"], ["validate", "b.yaml", "--schema"], ["leaderboard", "run"],
              ["report", "run"]):
    code = main(words)
    print(words[0], code, *sorted({"torch", "timm", "torchvision", "robustbench"} & set(sys.modules)), file=sys.stderr)
"""


def test_commands_that_only_read_do_not_load_torch(tmp_path):
    search = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", READING], capture_output=True, text=True, check=True, cwd=tmp_path, env=search
    )
    told = [line for line in done.stderr.splitlines() if line[:1].islower() or line.startswith("--")]
    assert [line.split() for line in told if "0" in line.split()] == [
        [name, "0"] for name in ("--help", "status", "validate", "leaderboard", "report")
    ], done.stderr


def exports(package):
    """Return the table of lazily exported names of a package: name to module, or `module:attribute`."""
    tables = [n.value for n in tree(package).body if isinstance(n, ast.Assign) and n.targets[0].id == "_EXPORTS"]
    return ast.literal_eval(tables[0]) if tables else {}


@pytest.mark.parametrize("package", [name for name, path in PATHS.items() if path.name == "__init__.py"])
def test_lazily_exported_names_point_to_modules_of_the_same_package(package):
    homes = {home.partition(":")[0] for home in exports(package).values()}
    assert homes <= set(PATHS)
    assert all(within(home, [package]) for home in homes)
