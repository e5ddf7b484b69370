"""The house itself: what imports what, and how large and how wide the files may be."""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
OUTSIDE = re.compile(r"mine\.py|(.*/)?(data|venv|\.[^/]*)/.*")  # what is not of this project
NAMES = sorted(path.relative_to(TOP).as_posix() for path in TOP.rglob("*.py"))
NAMES = [name for name in NAMES if not OUTSIDE.fullmatch(name)]
EXTRAS = [name for name in NAMES if name.startswith("extras/")]
OWN = {"train_gpt2", "prepro_tinyshakespeare", "test_gpt2", "extras"}


def text_of(name):
    return (TOP / name).read_text(encoding="utf-8")


def lines_of(name):
    return text_of(name).splitlines()


TEXT = text_of("train_gpt2.py")
CHAPTER, _, TOOL = TEXT.partition("\n# Here the algorithm ends")
LINES = {name: len(lines_of(name)) for name in NAMES}
LLAMA = LINES.get("extras/llama3.py", 0)

SIZES = {  # lines, and how many there may be
    "the chapter": (len(CHAPTER.splitlines()), 1280),
    "train_gpt2.py": (LINES["train_gpt2.py"], 3100),
    "prepro_tinyshakespeare.py": (LINES["prepro_tinyshakespeare.py"], 537),
    "test_gpt2.py": (LINES["test_gpt2.py"], 1600),
    "extras/, but for llama3.py": (sum(LINES[name] for name in EXTRAS) - LLAMA, 2150),
    "extras/llama3.py": (LLAMA, 577),
    "tests/": (sum(LINES[name] for name in NAMES if name.startswith("tests/")), 3894),
    "README.md": (len(lines_of("README.md")), 180),
}


@pytest.mark.parametrize("what", SIZES)
def test_no_part_outgrows_its_cap(what):
    """Whoever carries the work on must be able to hold the house in his head. So a new promise
    displaces something. Where a cap would hurt a text, the text is right and the cap is raised.
    """
    lines, cap = SIZES[what]
    assert lines <= cap


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_wider_than_100_columns(name):
    assert [line for line in lines_of(name) if len(line) > 100] == []


def test_most_lines_of_the_tool_are_short():
    """A line that a cap has made dense is harder to read than the two that it replaces. Prose, in
    docstrings and comments, fills its lines and does not count.
    """
    code = re.sub(r'(?s)""".*?"""', "", TOOL).splitlines()
    code = [line for line in code if line.strip() and not line.strip().startswith("#")]
    assert statistics.median(map(len, code)) <= 44


@pytest.mark.parametrize("name", ["train_gpt2.py", "prepro_tinyshakespeare.py", *EXTRAS])
def test_what_is_public_says_what_it_is(name):
    public = [node for node in ast.parse(text_of(name)).body if hasattr(node, "name")]
    assert [node.name for node in public if not ast.get_docstring(node)] == []


# --------------------------------------------------------------------------------------------------
# Arrows point down: extras and tests to the trainer, the trainer to prepro


def imports_of(text):
    """The modules that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_each_file_imports_only_those_below_it():
    allowed = {"train_gpt2.py": {"prepro_tinyshakespeare"}, "prepro_tinyshakespeare.py": set()}
    allowed |= {"test_gpt2.py": {"train_gpt2"}} | dict.fromkeys(EXTRAS, OWN - {"test_gpt2"})
    for name, below in allowed.items():
        imported = imports_of(text_of(name))
        assert imported & OWN <= below, name
        assert name == "test_gpt2.py" or not imported & {"torch", "transformers", "pickle"}, name


def test_nothing_else_lies_at_the_top():
    main_files = {"train_gpt2.py", "prepro_tinyshakespeare.py", "test_gpt2.py"}
    assert {name for name in NAMES if "/" not in name} == main_files
    assert {name.split("/")[0] for name in NAMES if "/" in name} == {"extras", "tests", "figures"}


def test_the_chapter_is_naked():
    """It knows nothing of threads, blocks, checked calls, kept keys, files and command lines."""
    assert imports_of(CHAPTER) == {"math", "dataclasses", "types", "numpy"}
    tokens = tokenize.generate_tokens(io.StringIO(CHAPTER).readline)
    names = {token.string for token in tokens if token.type == tokenize.NAME}
    tools = "parallel THREADS blocks lock interrupted stage keys require InputError GPT2"
    tools += " open os sys argparse args flags checkpoint tokenizer Progress"
    assert not names & set(tools.split())
    assert not [name for name in names if name.startswith("by_")]


def test_the_commands_that_are_shown_have_the_flags_that_there_are():
    shown = text_of("README.md") + text_of("figures/FORMATS.md")
    commands = re.findall(r"(?m)^    .*?\bpython (-m \S+|\S+\.py)\b(.*--.*)$", shown)
    assert len(commands) > 5
    helped = {}
    for program, rest in commands:
        if program not in helped:
            command = [sys.executable, *program.split(), "--help"]
            helped[program] = subprocess.run(command, cwd=TOP, capture_output=True, text=True)
        for flag in re.findall(r"--[a-z_]+", rest.partition("#")[0]):
            assert re.search(rf"{flag}\b", helped[program].stdout), (program, flag)


def test_the_readme_shows_lines_of_the_chapter():
    shown = text_of("README.md").split("```python\n")[1].split("```")[0].splitlines()
    lines = [line.strip() for line in CHAPTER.splitlines()]
    assert [line for line in shown if line and line.strip() not in lines] == []
