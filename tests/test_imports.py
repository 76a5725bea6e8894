import ast
import gc
import pkgutil
import subprocess
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path

import pytest

import edit
from edit.importing import uncollected

ROOT = Path(edit.__file__).parents[1]
MAY_IMPORT = {"edit": {"edit"}, "data": {"edit", "data"}, "recipes": {"edit", "data", "recipes"}}
HEAVY = ("lightning", "pytorch_lightning", "hydra", "triton", "deepspeed", "wandb")


def python(code: str) -> str:
    """Run code in a fresh interpreter in which none of HEAVY can be imported."""
    block = f"""
        import sys

        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {HEAVY!r}:
                    raise ModuleNotFoundError(f"No module named {{name!r}} (blocked by the test)", name=name)

        sys.meta_path.insert(0, Absent())
    """
    program = textwrap.dedent(block) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def modules() -> list[str]:
    return sorted(m.name for m in pkgutil.walk_packages(edit.__path__, "edit."))


@pytest.fixture(scope="module")
def imported() -> tuple[list[str], list[str]]:
    """Modules of edit that could be imported, and all that were loaded then."""
    each = f"for m in {modules()!r}: importlib.import_module(m); print(m, end=' ')"
    tried, loaded = python(f"import importlib, sys\n{each}\nprint()\nprint(*sys.modules)").splitlines()
    return tried.split(), loaded.split()


def test_every_module_of_edit_imports_without_lightning_hydra_triton_or_deepspeed(imported):
    assert {"edit.denoiser", "edit.backbones.dit", "edit.pruning.depth", "edit.tuning.lora"} <= set(modules())
    assert imported[0] == modules()


def test_the_block_of_this_file_does_block():
    with pytest.raises(AssertionError, match="blocked by the test"):
        python("import lightning")


def test_import_edit_and_all_it_offers_takes_under_three_seconds_beyond_torch():
    # processor time of the interpreter, so that a busy machine does not fail the test; measured 0.5 s
    took = python(
        """
        import time, torch
        start = time.process_time()
        import edit
        bare = time.process_time() - start
        for name in edit.__all__:
            getattr(edit, name)
        print(bare, time.process_time() - start)
        """
    )
    bare, everything = map(float, took.split())
    assert bare < 0.2 and everything < 3


def test_import_edit_alone_does_not_import_torch():
    assert python("import edit; print('torch' in sys.modules)") == "False"


def test_heavy_libraries_wait_for_the_function_that_needs_them(imported):
    loaded = {name.split(".")[0] for name in imported[1]}
    assert not loaded & {"diffusers", "transformers", "peft", "sklearn", "matplotlib", "torchmetrics", *HEAVY}


def test_the_collector_is_off_while_something_is_imported_and_as_before_afterwards():
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_name_that_edit_does_not_offer_is_refused_with_those_it_does():
    with pytest.raises(AttributeError, match="module 'edit' has no attribute 'laod'; it offers .*load"):
        edit.laod  # noqa: B018
    for name in edit.__all__:
        assert getattr(edit, name) is not None


# ---- the text of every file, without running it ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources() -> dict[str, ast.Module]:
    """Every module of edit, data and recipes by name, parsed."""
    found = {}
    for file in [f for package in MAY_IMPORT for f in (ROOT / package).rglob("*.py")]:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text(), str(file))
    return found


def imports(tree: ast.Module, known: Collection[str]) -> set[str]:
    """Modules that are imported, at any depth: in functions and TYPE_CHECKING blocks, too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in known else node.module for module in inside.values()}
    return found


def at_import(tree: ast.Module, known: Collection[str]) -> set[str]:
    """Modules that an import of this one imports: none in functions or TYPE_CHECKING blocks."""
    body = []
    for node in tree.body:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        body += [node] if not isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    return imports(ast.Module(body, []), known)


PLANNING = ("recipes.plan", "recipes.cost", "recipes.page", "recipes.sweep", "recipes.apply", "recipes.report.evaluate")
PROCEDURES = ("recipes.diffusion", "recipes.few_step", "recipes.rollout", "recipes.calibrate", "recipes.encoder")


@pytest.mark.parametrize("start", [*PLANNING, *PROCEDURES])
def test_commands_that_do_not_train_and_the_procedures_that_they_ask_import_no_lightning(sources, start):
    graph = {name: at_import(tree, sources) for name, tree in sources.items()}
    inside = {name: others & set(sources) for name, others in graph.items()}
    slow = ("lightning", "torchmetrics", "torch.distributed", "diffusers", "transformers")
    for name in sorted({start, *reached(inside, start)}):
        assert not [other for other in graph[name] if other.startswith(slow)], name


def test_commands_that_do_not_train_import_no_cache(sources):
    """The engine's classes are decorated by torch's compiler, which brings two seconds of torch._dynamo."""
    inside = {name: at_import(tree, sources) & set(sources) for name, tree in sources.items()}
    for start in PLANNING:
        assert "edit.caching.engine" not in reached(inside, start), start


def reached(graph: dict[str, set[str]], start: str) -> set[str]:
    seen, ahead = set(), [start]
    while ahead:
        for name in graph[ahead.pop()] - seen:
            seen.add(name)
            ahead.append(name)
    return seen


def test_no_import_circle(sources):
    graph = {name: imports(tree, sources) & set(sources) for name, tree in sources.items()}
    ahead = {name: reached(graph, name) for name in graph}
    circles = {tuple(sorted(other for other in seen if name in ahead[other])) for name, seen in ahead.items()} - {()}
    assert not circles, "\n".join(map(" <-> ".join, sorted(circles)))


def test_imports_point_one_way_at_any_depth(sources):
    wrong = []
    for name, tree in sources.items():
        for other in sorted(imports(tree, sources)):
            top, package = other.partition(".")[0], name.partition(".")[0]
            kernel = name.startswith("edit.kernels") and not other.startswith("edit.kernels")
            if top in MAY_IMPORT and (top not in MAY_IMPORT[package] or kernel):
                wrong.append(f"{name} imports {other}")
            elif kernel and top not in ("torch", "triton", *sys.stdlib_module_names):
                wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_file_above_500_lines():
    files = {f: len(f.read_text().splitlines()) for package in MAY_IMPORT for f in (ROOT / package).rglob("*.py")}
    long = [f"{file.relative_to(ROOT)}: {lines}" for file, lines in sorted(files.items()) if lines > 500]
    assert not long, "\n".join(long)


def test_no_function_above_60_lines(sources):
    long = []
    for name, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    long.append(f"{name}.{node.name}: {lines}")
    assert not long, "\n".join(sorted(long))
