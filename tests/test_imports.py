"""The arrows between our modules, read from the source: who may import whom, and what."""

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
RECIPES_MAY = {f"audit.{name}" for name in (
    "accuracy", "attacks", "hypothesis", "learning", "pgd", "records", "resume", "supervised", "threat", "types",
)}  # fmt: skip

# The measuring command line: audit.commands.verbs and the files it is made of.
CLI = {
    "audit.commands.verbs", "audit.commands.attack", "audit.commands.certify", "audit.commands.features", "audit.commands.guess_first",
    "audit.commands.options", "audit.commands.reproduce", "audit.commands.around_runs", "audit.commands.inspect", "audit.commands.verify",
}  # fmt: skip
# Modules that may import a library, and no other: facts as found.
ONLY = {
    "timm": {"model_zoo.libraries"},
    "robustbench": {"model_zoo.libraries"},
    "pyautoattack": {"model_zoo.libraries", "audit.adversary.external"},
    "foolbox": {"audit.adversary.external"},
    "torchvision.models": {"model_zoo.libraries"},
    "ruamel": {"audit.config.yaml_source"},
    "yaml": set(),
    "click": {*CLI, "reports.cli"},
}
INSIDE_FUNCTIONS = ("timm", "robustbench", "pyautoattack", "foolbox", "torchvision", "sklearn", "huggingface_hub")
DYNAMIC = {"model_zoo.sources.files"}  # imports what a `file:` reference names, under --trust-code


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


@MODULES
def test_packages_import_each_other_along_the_arrows_only(module):
    package = module.partition(".")[0]
    others = {name for name in ours(imports(module)) if name.partition(".")[0] != package}
    legal = {"audit.errors"}
    if module in {"audit.run.run_loop", "audit.run.cell_runner", *CLI} or within(module, ["audit.studies"]):
        legal |= {name for name in PATHS if within(name, ["model_zoo"])}
    if module in CLI:
        legal |= {name for name in PATHS if within(name, ["reports"])}
    if package == "reports":
        legal |= {"audit.records", "audit.theory"}
    if module == "reports.cli":
        legal.add("audit.commands.verbs")
    if within(module, ["audit.studies.recipes"]):
        legal |= RECIPES_MAY
    assert others <= legal


@MODULES
def test_only_studies_and_command_lines_know_studies(module):
    if module not in CLI and not within(module, ["audit.studies"]):
        assert not [name for name in imports(module) if within(name, ["audit.studies"])]


def test_reports_reaches_the_measuring_commands_lazily():
    assert "audit.commands.verbs" in imports("reports.cli")
    assert "audit.commands.verbs" not in imports_on_loading("reports.cli")


@MODULES
def test_reports_and_records_import_no_torch(module):
    if within(module, ["reports", "audit.records", "audit.errors", "audit.theory", "audit.calibration.closed_forms"]):
        assert not any(within(name, ["torch", "torchvision", "timm", "robustbench"]) for name in imports(module))


@pytest.mark.parametrize("library", ONLY)
def test_a_library_has_its_one_place(library):
    found = {module for module in PATHS if any(within(name, [library]) for name in imports(module))}
    assert found <= ONLY[library]


@MODULES
def test_slow_libraries_are_imported_inside_functions(module):
    assert not [name for name in imports_on_loading(module) if within(name, INSIDE_FUNCTIONS)]


@MODULES
def test_only_command_lines_print(module):
    if module in {"reports.cli", "audit.commands.display", *CLI}:  # what the command line shows
        return
    prints = [n.lineno for n in ast.walk(tree(module)) if isinstance(n, ast.Call) and called(n) == "print"]
    assert not prints


def test_there_are_no_cycles():
    graph = {module: ours(imports(module)) - {module} for module in PATHS}
    # the commands of reports.cli live in audit.commands.verbs, which renders through reports: lazily, in both directions
    graph["reports.cli"] -= {"audit.commands.verbs"}
    tuple(TopologicalSorter(graph).static_order())


@MODULES
def test_there_is_no_import_for_type_checkers_only(module):
    assert not [n for n in ast.walk(tree(module)) if getattr(n, "id", getattr(n, "attr", "")) == "TYPE_CHECKING"]


@pytest.mark.parametrize("package", ["audit", "reports"])
def test_lazily_exported_names_point_to_modules_of_the_same_package(package):
    tables = [node.value for node in tree(package).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    homes = [v for t in tables if isinstance(t, ast.Dict) for v in map(ast.literal_eval, t.values)]
    assert homes
    assert all(within(home, [package]) for home in homes)


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
