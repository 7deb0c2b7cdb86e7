"""An assignment, and the versions of the scripts that it makes: blanked, answered in another way, wrong.

What the students write is named once, in NAME/assignment.toml beside this file; the scripts themselves carry no marks.
A function is found by its name and exchanged as a whole, with its decorators, by its place in the syntax tree.
Lines end at "\n" alone, as they do for Python.
"""

from __future__ import annotations

from fewshot.experiment import parse_python

import ast
import functools
import hashlib
import importlib.util
import json
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

FOLDER = Path(__file__).resolve().parent  # of the assignments and of the grader
HERE = FOLDER.parent  # the scripts
WIDTH = 120
# What decides a grade beside the assignment itself.
JUDGES = ("assignment.py", "checks.py", "guards.py", "sandbox.py")

# ------------------------------------------------------------------------------- an assignment


class Blank(NamedTuple):
    """Functions that the student writes, as assignment.toml lists them."""

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
        return FOLDER / self.name

    def solution(self) -> dict[str, str]:
        """The scripts that the students write in, as they are."""
        return {blank.file: (HERE / blank.file).read_text() for blank in self.blanks}

    def files(self) -> list[str]:
        """All scripts that these need, in order."""
        return closure(list(dict.fromkeys(blank.file for blank in self.blanks)))


# Of each entry of assignment.toml: the type of its value, and whether it may be missing.
KEYS = {
    "blank": {
        "question": (str, False),
        "title": (str, False),
        "file": (str, False),
        "functions": (list, False),
        "points": ((int, float), False),
        "prompt": (str, False),
        "hints": (list, False),
        "level": (str, True),
    },
    "written": {
        "question": (str, False),
        "title": (str, False),
        "points": ((int, float), False),
        "prompt": (str, False),
        "key": (list, False),
        "automatic": (bool, True),
    },
    "": {
        "title": (str, False),
        "smoke": (str, False),
        "commands": (list, False),
        "blank": (list, False),
        "written": (list, True),
    },
}


def check_entry(kind: str, entry: dict, where: str) -> None:
    """Missing, with the place and the key, unless the entry has the keys of its kind with values that make sense."""
    keys = KEYS[kind]
    for key in sorted({*keys, *entry}):
        if key not in keys:
            raise Missing(f"{where} has an unknown key {key!r}; it may have {', '.join(keys)}")
        wanted, optional = keys[key]
        if key not in entry:
            if not optional:
                raise Missing(f"{where} has no {key!r}")
            continue
        value = entry[key]
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
            word = (
                "a number" if wanted == (int, float) else {str: "a text", list: "a list", bool: "true or false"}[wanted]
            )
            raise Missing(f"{where}, {key} = {value!r}: not {word}")
        if key == "points" and not 0 < value < float("inf"):
            raise Missing(f"{where}, points = {value!r}: not above zero")
        if key in ("functions", "hints", "commands") and not all(isinstance(v, str) for v in value):
            raise Missing(f"{where}, {key} = {value!r}: not a list of texts")
        if key in ("functions", "blank") and not value:
            raise Missing(f"{where}, {key}: the list is empty")
    if entry.get("level", "easy") not in ("easy", "hard"):
        raise Missing(f"{where}, level = {entry['level']!r}: not 'easy' or 'hard'")


def read_toml(path: Path) -> dict:
    """assignment.toml, all its entries checked; Missing names the file and the key."""
    name = f"{path.parent.name}/{path.name}"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Missing(f"{name} cannot be read: {error.strerror}") from None
    except ValueError as error:  # also of the encoding
        raise Missing(f"{name} is no TOML: {error}") from None
    check_entry("", data, name)
    seen = set()
    for kind in ("blank", "written"):
        for number, entry in enumerate(data.get(kind, []), 1):
            if not isinstance(entry, dict):
                raise Missing(f"{name}, {kind} {number}: not a table [[{kind}]]")
            where = f"{name}, [[{kind}]] {entry.get('question', number)}"
            check_entry(kind, entry, where)
            if entry["question"] in seen:
                raise Missing(f"{where}, question: there are two of this name")
            seen.add(entry["question"])
            if kind == "blank":
                if Path(entry["file"]).is_absolute() or not (HERE / entry["file"]).is_file():
                    raise Missing(f"{where}, file = {entry['file']!r}: there is no such script")
                for function in entry["functions"]:
                    locate((HERE / entry["file"]).read_text(), function, f"{where}, functions: {entry['file']}")
            elif not entry.get("automatic"):
                good = all(isinstance(k, list) and len(k) == 2 and isinstance(k[1], str) for k in entry["key"])
                if not good or any(isinstance(k[0], (bool, str)) for k in entry["key"]):
                    raise Missing(f"{where}, key: not a list of [points, text]")
                if sum(points for points, _ in entry["key"]) != entry["points"]:
                    raise Missing(f"{where}, key: its points do not add up to points = {entry['points']}")
    return data


def load_assignment(name: str, level: str = "hard") -> Assignment:
    """Read the folder of `name`; Missing where it does not fit the scripts."""
    folder = FOLDER / name
    data = read_toml(folder / "assignment.toml")
    blanks = [Blank(**entry) for entry in data["blank"]]
    written = data.get("written", [])
    spec = importlib.util.spec_from_file_location(f"tests_of_{name}", folder / "tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    marked = [f for f in vars(module).values() if hasattr(f, "graded") and f.__module__ == spec.name]
    known = {blank.question for blank in blanks} | {w["question"] for w in written if w.get("automatic")}
    for test in marked:
        if test.graded["question"] not in known:
            raise Missing(f"{name}/tests.py, {test.__name__}: there is no graded question {test.graded['question']!r}")
        if not (test.graded["weight"] > 0 and test.graded["seconds"] > 0):
            raise Missing(f"{name}/tests.py, {test.__name__}: weight and seconds have to be above zero")
    if level == "easy":
        blanks = [blank for blank in blanks if blank.level == "easy"]
    questions = {blank.question for blank in blanks} | {w["question"] for w in written}
    tests = [f for f in marked if f.graded["question"] in questions]
    untested = {blank.question for blank in blanks} - {f.graded["question"] for f in tests}
    if untested:
        raise Missing(f"{name}/tests.py has no test of question {', '.join(sorted(untested))}")
    return Assignment(name, data["title"], blanks, written, data["commands"], data["smoke"], tests, level)


def sources(a: Assignment) -> str:
    """A digest of what the proof of an assignment covers: its scripts with questions, its own files, the grader."""
    files = sorted({HERE / blank.file for blank in a.blanks})
    files += [a.folder / name for name in ("assignment.toml", "tests.py", "right.py", "mutants.py")]
    files += [HERE / "homework.py", *(FOLDER / name for name in JUDGES)]
    texts = [path.read_text(encoding="utf-8") for path in files]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


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


def split_lines(text: str) -> list[str]:
    """The lines as Python counts them; str.splitlines ends them at form feeds and U+2028, too."""
    return text.removesuffix("\n").split("\n")


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
    return "\n".join(split_lines(text)[begin:end])


def put(text: str, name: str, source: str) -> str:
    """`text` with the definition of `name` replaced by `source`, indented as the old one."""
    return replaced(text, {name: source})


def graft(text: str, donor: str, functions: list[str], file: str = "the file") -> str:
    """`text` with these functions as `donor` has them, also those that `text` has lost; Missing where it cannot be."""
    lost = []
    for name in functions:
        try:
            locate(text, name, file)
        except Missing:
            lost.append(name)
    text = replaced(text, {name: cut(donor, name) for name in functions if name not in lost})
    for name in lost:
        text = added(text, name, cut(donor, name), file)
    return text


def added(text: str, name: str, source: str, file: str) -> str:
    """`text` with a function more, at the end of its class or of the file."""
    lines, *outer = split_lines(text), *name.split(".")[:-1]
    if not outer:
        return "\n".join([*lines, "", "", *split_lines(source)]) + "\n"
    node = locate(text, outer[0], file)
    return "\n".join([*lines[: node.end_lineno], "", *split_lines(source), *lines[node.end_lineno :]]) + "\n"


def indentation(line: str) -> str:
    """The white space that Python counts: behind the last form feed."""
    return re.match(r"(?:[ \t]*\f)*([ \t]*)", line)[1]


def replaced(text: str, sources: dict[str, str]) -> str:
    """`text` with other definitions, from the last to the first, so that the places stay right."""
    lines = split_lines(text)
    for (begin, end), source in sorted(((lines_of(text, name), s) for name, s in sources.items()), reverse=True):
        new, indent = split_lines(source), indentation(lines[begin])
        old = indentation(new[0])
        if old != indent:  # else nothing is touched, not even inside of texts of several lines
            new = [indent + line.removeprefix(old) if line.strip() else line for line in new]
        lines[begin:end] = new
    return "\n".join(lines) + "\n"


def emptied(text: str, blank: Blank) -> str:
    """`text` with the blank's functions reduced to signature, docstring and the question."""
    first = blank.prompt.strip().split("\n\n")[0]
    for name in blank.functions:
        node, lines = locate(text, name), split_lines(text)
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
    text, asked = (a.folder / "right.py").read_text(), {blank.question for blank in a.blanks}
    found: dict[str, tuple[str, str, dict[str, str]]] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            question, function, what = (ast.literal_eval(arg) for arg in node.decorator_list[0].args)
            if question not in asked and a.level == "easy":
                continue
            fits(a, question, function, node)
            lines = split_lines(text)[node.lineno - 1 : node.end_lineno]
            source = "\n".join([*decorators(a, question, function), *lines])
            source = source.replace(f"def {node.name}(", f"def {function.split('.')[-1]}(", 1)
            name = node.name.split("__")[0]
            found.setdefault(name, (question, what, {}))[2][function] = source
    return found


def fits(a: Assignment, question: str, function: str, node: ast.FunctionDef) -> None:
    """Missing unless the script's function has the same arguments as this answer to it."""
    where = f"{a.name}/right.py, {node.name}"
    blank = next((b for b in a.blanks if b.question == question), None)
    if blank is None or function not in blank.functions:
        raise Missing(f"{where}: {function} is not asked for in question {question}")
    ours = locate((HERE / blank.file).read_text(), function, blank.file).args
    for kind, theirs, wanted in (
        ("arguments", node.args, ours),
        ("defaults", node.args.defaults + node.args.kw_defaults, ours.defaults + ours.kw_defaults),
    ):
        names = lambda x: [d.arg for d in ast.walk(x) if isinstance(d, ast.arg)] if isinstance(x, ast.AST) else len(x)
        if names(theirs) != names(wanted):
            raise Missing(f"{where} no longer fits: its {kind} are not those of {function} in {blank.file}")


def decorators(a: Assignment, question: str, function: str) -> list[str]:
    """The decorator lines of the function that a variant takes the place of."""
    file = next(blank.file for blank in a.blanks if blank.question == question)
    lines = split_lines(cut((HERE / file).read_text(), function))
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

    An entry is (name of an answer in right.py, what is wrong, old text, new text). Missing where it no longer applies.
    """
    spec = importlib.util.spec_from_file_location(f"mutants_of_{a.name}", a.folder / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    right = variants(a)
    for name, wrong, old, new in module.MUTANTS:
        if name not in right and a.level == "easy":
            continue
        if name not in right:
            raise Missing(f"{a.name}/mutants.py, {wrong!r}: right.py has no {name}")
        question, _, functions = right[name]
        where = [f for f, source in functions.items() if old in source]
        if len(where) != 1 or functions[where[0]].count(old) != 1 or old == new:
            raise Missing(f"{a.name}/mutants.py, {wrong!r}: {old!r} is not exactly once in {name}")
        changed = {**functions, where[0]: functions[where[0]].replace(old, new)}
        yield question, wrong, answered(a, question, changed)
