"""The house itself: which file imports which, and how the files are written."""

import ast
import statistics
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
FILES = [path for path in sorted(TOP.rglob("*.py")) if "data" not in path.relative_to(TOP).parts]
FILES = [path for path in FILES if not any(part.startswith((".", "venv")) for part in path.parts)]
OWN = {path.stem for path in FILES}
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree):
    """The names of all modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_arrows_go_one_way():
    """tests -> train_gpt2.py -> prepro_tinyshakespeare.py, and no further."""
    prepro = imported(tree_of(TOP / "prepro_tinyshakespeare.py"))
    trainer = imported(tree_of(TOP / "train_gpt2.py"))
    proofs = imported(tree_of(TOP / "test_gpt2.py"))
    assert not prepro & OWN
    assert trainer & OWN == {"prepro_tinyshakespeare"}
    assert proofs & OWN == {"prepro_tinyshakespeare", "train_gpt2"}
    assert "torch" not in prepro | trainer and "torch" in proofs


@pytest.mark.parametrize("name", ["train_gpt2.py", "prepro_tinyshakespeare.py"])
def test_nothing_registers_itself_and_nothing_is_evaluated(name):
    text = (TOP / name).read_text(encoding="utf-8")
    for word in ("sys.modules", "eval(", "exec(", "pickle.load", "importlib.reload"):
        assert word not in text, word


def test_the_algorithm_knows_no_files_networks_processes_or_flags():
    """Sections 2 to 8 use no name that has to do with them."""
    text = (TOP / "train_gpt2.py").read_text(encoding="utf-8")
    first = text[: text.index("# 2. The layers")].count("\n")
    last = text[: text.index("# Here the algorithm ends")].count("\n")
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name) and first < node.lineno < last:
            names.add(node.id)
    outside = "os sys signal argparse glob shutil zlib json ctypes time threading open print"
    outside += " world World MPI comm Progress print_now"
    assert not names & set(outside.split())
    assert {"np", "matmul_forward", "carve"} <= names


@every_file
def test_lines_have_at_most_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100] == []


def test_most_lines_of_the_trainer_are_short():
    """The median of those that are not blank has at most 50 characters."""
    lines = (TOP / "train_gpt2.py").read_text(encoding="utf-8").splitlines()
    assert statistics.median(len(line) for line in lines if line.strip()) <= 50


@every_file
def test_one_statement_on_a_line(path):
    found = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.stmt):
            found.setdefault(node.lineno, []).append(type(node).__name__)
    assert {line: kinds for line, kinds in found.items() if len(kinds) > 1} == {}


@pytest.mark.parametrize("name", ["train_gpt2.py", "prepro_tinyshakespeare.py"])
def test_no_comprehension_has_two_loops_and_a_condition(name):
    for node in ast.walk(tree_of(TOP / name)):
        generators = getattr(node, "generators", [])
        conditions = sum(len(generator.ifs) for generator in generators)
        assert len(generators) < 2 or conditions == 0, node.lineno


@pytest.mark.parametrize("name", ["train_gpt2.py", "prepro_tinyshakespeare.py"])
def test_public_functions_say_what_they_do(name):
    for node in ast.walk(tree_of(TOP / name)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and isinstance(node.col_offset, int):
            public = not node.name.startswith("_") and node.col_offset == 0
            assert ast.get_docstring(node) or not public, node.name


def test_functions_fit_on_a_screen():
    """Of the trainer, without the docstring, blank lines and comments: at most 60 lines."""
    text = (TOP / "train_gpt2.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            of_body = lines[body[0].lineno - 1 : node.end_lineno] if body else []
            code = [line for line in of_body if line.strip() and not line.strip().startswith("#")]
            assert len(code) <= 60, node.name
