"""An assignment, and the versions of the scripts that it makes: blanked, answered in another way, wrong.

What the students write is named once, in homework/NAME/assignment.toml; the scripts themselves carry no marks. A
function is found by its name and exchanged as a whole, with its decorators, by its place in the syntax tree.
"""

from __future__ import annotations

from experiment import parse_python

import ast
import functools
import importlib.util
import json
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent  # the scripts
WIDTH = 120

# ------------------------------------------------------------------------------- an assignment


class Blank(NamedTuple):
    """Functions that the student writes, as homework/NAME/assignment.toml lists them."""

    question: str
    title: str
    file: str
    functions: list[str]  # "function" or "Class.method"
    points: float
    prompt: str
    hints: list[str]
    level: str = "easy"  # hard: left in place by --level easy


class Assignment(NamedTuple):
    name: str
    title: str
    blanks: list[Blank]
    written: list[dict]
    commands: list[str]
    smoke: str  # a complete run of seconds, offline
    tests: list  # functions marked by checks.graded
    level: str

    @property
    def folder(self) -> Path:
        return HERE / "homework" / self.name

    def solution(self) -> dict[str, str]:
        """The scripts that the students write in, as they are."""
        return {blank.file: (HERE / blank.file).read_text() for blank in self.blanks}

    def files(self) -> list[str]:
        """All scripts that these need, in order."""
        return closure(list(dict.fromkeys(blank.file for blank in self.blanks)))


def load_assignment(name: str, level: str = "hard") -> Assignment:
    """Read homework/`name`; ValueError where it does not fit the scripts."""
    folder = HERE / "homework" / name
    data = tomllib.loads((folder / "assignment.toml").read_text())
    blanks = [Blank(**entry) for entry in data["blank"]]
    for blank in blanks:
        for function in blank.functions:
            locate((HERE / blank.file).read_text(), function, f"{blank.file} (question {blank.question} of {name})")
    if level == "easy":
        blanks = [blank for blank in blanks if blank.level == "easy"]
    spec = importlib.util.spec_from_file_location(f"tests_of_{name}", folder / "tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    questions = {blank.question for blank in blanks} | {w["question"] for w in data.get("written", [])}
    marked = [f for f in vars(module).values() if hasattr(f, "graded") and f.__module__ == spec.name]
    tests = [f for f in marked if f.graded["question"] in questions]
    untested = {blank.question for blank in blanks} - {f.graded["question"] for f in tests}
    if untested:
        raise ValueError(f"homework/{name}/tests.py has no test of question {', '.join(sorted(untested))}")
    return Assignment(
        name, data["title"], blanks, data.get("written", []), data["commands"], data["smoke"], tests, level
    )


def closure(files: list[str]) -> list[str]:
    """The files and all scripts of this package that they import, directly or not."""
    found = list(files)
    for file in found:
        for node in ast.walk(ast.parse((HERE / file).read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names += [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
            parts = [name.split(".") for name in names]
            new = ["/".join(part[:n]) for part in parts for n in range(1, len(part) + 1)]
            new = [file for name in new for file in (f"{name}/__init__.py", f"{name}.py")]
            found += [f for f in dict.fromkeys(new) if f not in found and (HERE / f).exists()]
    return found


# ------------------------------------------------------------------------------ source surgery


class Missing(Exception):
    """A function is not where the assignment says."""


@functools.lru_cache(32)
def parsed(text: str) -> list[ast.stmt]:
    return parse_python(text).body  # the grader's threads ask at once


def locate(text: str, name: str, file: str = "the file") -> ast.FunctionDef:
    """The definition of "function" or "Class.method"; of several the last, which is the one that Python keeps."""
    body, node = parsed(text), None
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        node = next((n for n in reversed(body) if isinstance(n, kinds) and n.name == part), None)
        if node is None:
            raise Missing(f"{file} has no {name}; its name and place must stay as they were")
        body = node.body
    return node


def lines_of(text: str, name: str, file: str = "the file") -> tuple[int, int]:
    """First line, and the one behind the last, of a definition with its decorators; counted from 0."""
    node = locate(text, name, file)
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1, node.end_lineno


def cut(text: str, name: str) -> str:
    begin, end = lines_of(text, name)
    return "\n".join(text.splitlines()[begin:end])


def put(text: str, name: str, source: str) -> str:
    """`text` with the definition of `name` replaced by `source`, indented as the old one."""
    return replaced(text, {name: source})


def graft(text: str, donor: str, functions: list[str]) -> str:
    """`text` with these functions as `donor` has them; Missing when either lacks one."""
    return replaced(text, {name: cut(donor, name) for name in functions})


def replaced(text: str, sources: dict[str, str]) -> str:
    """`text` with other definitions, from the last to the first, so that the places stay right."""
    lines = text.splitlines()
    for (begin, end), source in sorted(((lines_of(text, name), s) for name, s in sources.items()), reverse=True):
        indent = lines[begin][: len(lines[begin]) - len(lines[begin].lstrip())]
        lines[begin:end] = textwrap.indent(textwrap.dedent(source), indent).splitlines()
    return "\n".join(lines) + "\n"


def emptied(text: str, blank: Blank) -> str:
    """`text` with the blank's functions reduced to signature, docstring and the question."""
    first = blank.prompt.strip().split("\n\n")[0]
    for name in blank.functions:
        node, lines = locate(text, name), text.splitlines()
        has_doc = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        keep = node.body[0].end_lineno if has_doc else node.body[0].lineno - 1
        indent = " " * (node.col_offset + 4)
        points = f"{blank.points:g} point{'s' * (blank.points != 1)}"
        comment = [f"Question {blank.question} ({points}): {' '.join(blank.prompt.split())}"]
        comment += [f"Hint: {' '.join(hint.split())}" for hint in blank.hints]
        body = [line for paragraph in comment for line in textwrap.wrap(paragraph, WIDTH - len(indent) - 2)]
        title = f"question {blank.question}: {' '.join(first.split())}"
        title = title if len(title) <= 72 else title[:69].rsplit(" ", 1)[0] + " ..."
        body = [f"# {line}" for line in body] + [f"raise NotImplementedError({json.dumps(title, ensure_ascii=False)})"]
        new = [*lines[:keep], *(indent + line for line in body), *lines[node.end_lineno :]]
        text = "\n".join(new) + "\n"
    return text


def starter(a: Assignment) -> dict[str, str]:
    """The student's version of the scripts."""
    texts = a.solution()
    for blank in a.blanks:
        texts[blank.file] = emptied(texts[blank.file], blank)
    return texts


def variants(a: Assignment) -> dict[str, tuple[str, str, dict[str, str]]]:
    """The right answers of right.py: name -> (question, what is different, {function: its source}).

    A definition there is marked @right(question, function, what is different); definitions of one name and question
    are one answer.
    """
    text = (a.folder / "right.py").read_text()
    found: dict[str, tuple[str, str, dict[str, str]]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            question, function, what = (ast.literal_eval(arg) for arg in node.decorator_list[0].args)
            lines = text.splitlines()[node.lineno - 1 : node.end_lineno]
            source = "\n".join([*decorators(a, question, function), *lines])
            source = source.replace(f"def {node.name}(", f"def {function.split('.')[-1]}(", 1)
            name = node.name.split("__")[0]
            found.setdefault(name, (question, what, {}))[2][function] = source
    return found


def decorators(a: Assignment, question: str, function: str) -> list[str]:
    """The decorator lines of the function that a variant takes the place of."""
    file = next(blank.file for blank in a.blanks if blank.question == question)
    lines = cut((HERE / file).read_text(), function).splitlines()
    return [line.strip() for line in lines if line.lstrip().startswith("@")]


def answered(a: Assignment, question: str, functions: dict[str, str]) -> dict[str, str]:
    """The solution with other definitions of some functions of `question`."""
    texts = a.solution()
    file = next(blank.file for blank in a.blanks if blank.question == question)
    for function, source in functions.items():
        texts[file] = put(texts[file], function, source)
    return texts


def mutants(a: Assignment):
    """(question, what is wrong, the files) of every mistake in mutants.py.

    An entry is (name of an answer in right.py, what is wrong, old text, new text); "" is the answer of the scripts,
    followed by question and function.
    """
    spec = importlib.util.spec_from_file_location(f"mutants_of_{a.name}", a.folder / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    right = variants(a)
    for name, wrong, old, new in module.MUTANTS:
        question, _, functions = right[name]
        where = [f for f, source in functions.items() if old in source]
        if len(where) != 1 or functions[where[0]].count(old) != 1:
            raise ValueError(f"homework/{a.name}/mutants.py: {old!r} is not exactly once in {name}")
        changed = {**functions, where[0]: functions[where[0]].replace(old, new)}
        yield question, wrong, answered(a, question, changed)
