"""The house itself: which file imports which, and how the files are written."""

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
FILES = [path for path in sorted(TOP.rglob("*.py")) if "data" not in path.relative_to(TOP).parts]
FILES = [path for path in FILES if not any(part.startswith((".", "venv")) for part in path.parts)]
FILES = [path for path in FILES if path != TOP / "mine.py"]  # a student's copy of the work sheet
OWN = {path.stem for path in FILES} | {"extras"}
MAIN_FILES = ["train_gpt2.py", "prepro_tinyshakespeare.py", "test_gpt2.py"]
EXTRAS = [path.relative_to(TOP).as_posix() for path in FILES if path.parent.name == "extras"]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
every_program = pytest.mark.parametrize("name", [*MAIN_FILES[:2], *EXTRAS])


def text_of(name):
    return (TOP / name).read_text(encoding="utf-8")


def tree_of(name):
    return ast.parse(text_of(name))


def imports_of(name):
    """[(module, the function at the top of the file that imports it, or None), ...]

    "from extras import llmc" imports extras.llmc.
    """
    found = []
    for top in tree_of(name).body:
        function = top.name if isinstance(top, (ast.FunctionDef, ast.ClassDef)) else None
        for node in ast.walk(top):
            if isinstance(node, ast.Import):
                found += [(alias.name, function) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module == "extras":
                found += [(f"extras.{alias.name}", function) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: a relative import"
                found.append((node.module, function))
    return found


def own_imports(name):
    """Those of imports_of that are files of this project."""
    return {(module, where) for module, where in imports_of(name) if module.split(".")[0] in OWN}


# --------------------------------------------------------------------------------------------------
# Arrows


def test_nothing_else_lies_at_the_top():
    assert {path.name for path in FILES if path.parent == TOP} == set(MAIN_FILES)
    rooms = {path.relative_to(TOP).parts[0] for path in FILES if path.parent != TOP}
    assert rooms == {"extras", "tests", "figures"}


def test_the_trainer_needs_numpy_and_imports_ours_late_and_each_in_its_place():
    assert own_imports("train_gpt2.py") == {
        ("prepro_tinyshakespeare", "provide"),
        ("extras.llmc", "open_weights"),
        ("extras.hellaswag", "open_examples"),
        ("extras.hellaswag", "score_hellaswag"),
        ("extras.processes", "join_processes"),
    }
    assert "importlib" not in text_of("train_gpt2.py")  # which could hide an arrow
    others = {module.split(".")[0] for module, where in imports_of("train_gpt2.py") if not where}
    assert others - sys.stdlib_module_names == {"numpy"}


def test_what_the_algorithm_imports_stands_in_section_1():
    text = text_of("train_gpt2.py")
    end = text[: text.index("# 2. The layers")].count("\n")
    found = set()
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node.lineno < end:
            found |= {node.module} if isinstance(node, ast.ImportFrom) else {node.names[0].name}
    assert found <= {"functools", "itertools", "math", "os", "dataclasses", "types", "numpy"}


def test_prepro_imports_none_of_ours():
    assert own_imports("prepro_tinyshakespeare.py") == set()


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_imports_the_trainer_only_as_a_program(name):
    """What the trainer imports late must not import it in turn: there would be two of it."""
    late = {module for module, _ in own_imports("train_gpt2.py")}
    for module, where in own_imports(name):
        if module == "train_gpt2":
            is_late = name.removesuffix(".py").replace("/", ".") in late
            assert where == "main" or not is_late
        elif module == "prepro_tinyshakespeare":
            assert where is not None
        else:
            assert module.startswith("extras.")


def test_the_proofs_import_the_trainer_alone():
    assert {module for module, _ in own_imports("test_gpt2.py")} == {"train_gpt2"}


@every_file
def test_pytorch_serves_tests_and_figures_only(path):
    name = path.relative_to(TOP).as_posix()
    modules = {module.split(".")[0] for module, _ in imports_of(name)}
    of_tests = path.name == "test_gpt2.py" or path.parent.name in ("tests", "figures")
    assert of_tests or not modules & {"torch", "transformers", "pytest"}


WATCHED_RUN = """if True:
    import runpy, sys
    del sys.argv[0]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print(*sorted(name for name in sys.modules if "train_gpt2" in name))
        print(*sorted(name for name in sys.modules if name.startswith("extras")))
"""


FILES_OF_A_RUN = """if True:
    import os, struct
    from dataclasses import asdict
    import train_gpt2 as gpt2
    from extras import hellaswag, llmc
    model = gpt2.GPT2(gpt2.GPT2Config(32, 256, 1, 2, 8), 1, 8)
    llmc.write_model("model.bin", asdict(model.config), model.params)
    hellaswag.write("data/hellaswag_val.bin", [hellaswag.Example([1], [[3], [4], [5, 6], [7]], 0)])
    with open("tokens.bin", "wb") as file:
        file.write(struct.pack("<4i", 20240520, 1, 40, 256).ljust(1024, b"\\0") + bytes(80))
"""


def test_a_run_with_extras_has_one_copy_of_the_trainer(tmp_path):
    """It is __main__ there. An `import train_gpt2` in what it imports would make a second one."""
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    (tmp_path / "data").mkdir()
    command = [sys.executable, "-c", FILES_OF_A_RUN]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    flags = """--model model.bin --input_bin tokens.bin --input_val_bin tokens.bin --batch_size 1
        --sequence_length 8 --num_iterations 1 --val_max_steps 1 --hellaswag_eval 1""".split()
    command = [sys.executable, "-c", WATCHED_RUN, TOP / "train_gpt2.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "\nhellaswag " in done.stdout, done
    ours, extras = done.stdout.splitlines()[-2:]
    assert ours == "" and extras.split() == ["extras", "extras.hellaswag", "extras.llmc"]


# --------------------------------------------------------------------------------------------------
# The algorithm, and what comes behind the line


def parts_of_the_trainer():
    """(nodes of sections 2 to 8, nodes behind the line)."""
    text = text_of("train_gpt2.py")
    first = text[: text.index("# 2. The layers")].count("\n")
    last = text[: text.index("# Here the algorithm ends")].count("\n")
    nodes = ast.parse(text).body
    chapter = [node for node in nodes if first < node.lineno < last]
    return chapter, [node for node in nodes if node.lineno > last]


def names_in(nodes, *kinds):
    found = set()
    for node in nodes:
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, kinds):
                found.add(part.id)
            elif isinstance(part, ast.arg) and ast.Store in kinds:
                found.add(part.arg)
    return found


def bound_by(nodes):
    """The names that statements at the top of a file give to something."""
    found = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= names_in([node], ast.Store)
    return found


def test_the_algorithm_knows_no_files_networks_processes_or_flags():
    """Sections 2 to 8 use no name that has to do with them."""
    chapter, _ = parts_of_the_trainer()
    chapter = [node for node in chapter if getattr(node, "name", "") != "by_rows"]  # has *args
    names = names_in(chapter, ast.Load, ast.Store)
    outside = "os sys signal argparse glob shutil zlib json ctypes time threading open print"
    outside += " world World MPI comm rank size processes Progress print_now input"
    outside += " TokenFile open_shards provide prepro extras path args named flags run Run log Log"
    outside += " checkpoint tokenizer tiktoken text stopped environ"
    assert not names & set(outside.split())
    assert {"np", "matmul_forward", "carve"} <= names


def test_the_algorithm_uses_three_names_from_behind_the_line():
    chapter, behind = parts_of_the_trainer()
    used = names_in(chapter, ast.Load) - names_in(chapter, ast.Store)
    tool = bound_by(behind)
    assert {"argparse", "parallel", "GPT2Config", "main", "FLAGS"} - tool == {"GPT2Config"}
    assert used & tool == {"parallel", "load_pretrained", "save_huggingface"}


# --------------------------------------------------------------------------------------------------
# How the files are written


@every_program
def test_nothing_registers_itself_and_nothing_is_evaluated(name):
    text = text_of(name)
    for word in ("sys.modules", "eval(", "exec(", "pickle.load", "reload(", "__import__"):
        assert word not in text, word


@every_file
def test_lines_have_at_most_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if len(line) > 100] == []


def test_most_lines_of_the_trainer_are_short():
    """The median of those that are not blank has at most 46 characters."""
    lines = text_of("train_gpt2.py").splitlines()
    assert statistics.median(len(line) for line in lines if line.strip()) <= 46


@every_file
def test_one_statement_on_a_line(path):
    found = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.stmt):
            found.setdefault(node.lineno, []).append(type(node).__name__)
    assert {line: kinds for line, kinds in found.items() if len(kinds) > 1} == {}


@every_program
def test_no_comprehension_has_two_loops_and_a_condition(name):
    for node in ast.walk(tree_of(name)):
        generators = getattr(node, "generators", [])
        conditions = sum(len(generator.ifs) for generator in generators)
        assert len(generators) < 2 or conditions == 0, node.lineno


@every_program
def test_public_functions_say_what_they_do(name):
    tree = tree_of(name)
    assert ast.get_docstring(tree) or not tree.body
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@every_program
def test_functions_fit_on_a_screen(name):
    """Without the docstring, blank lines and comments: at most 60 lines."""
    lines = text_of(name).splitlines()
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            of_body = lines[body[0].lineno - 1 : node.end_lineno] if body else []
            code = [line for line in of_body if line.strip() and not line.strip().startswith("#")]
            assert len(code) <= 60, node.name
