"""The homework: what is built from the scripts, what the grader gives, and what no submission can do to it."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPO

from studies import warm

sys.path.insert(1, str(next(REPO.glob("*/assignment.py")).parent))  # the modules beside the assignments

from assignment import Missing, cut, emptied, graft, load_assignment, locate, put, sources, starter, variants
from build import build, public_tests
from checks import Wrong, close, shaped
from sandbox import Sandbox, decode, encode, source_of

import homework
from homework import Grader, by_question, gradescope, read_submission

ASSIGNMENT = "hw9"  # the quickest: no network is trained
HOSTILE = "5"  # its question, whose function the hostile submissions write
FUNCTION = "logistic_steps"
FILE = "feature_weights.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="the guards are those of Linux")


@pytest.fixture(scope="module")
def a():
    return load_assignment(ASSIGNMENT)


@pytest.fixture(scope="module")
def box():
    with Sandbox() as box:
        yield box


@pytest.fixture(scope="module")
def grader(a, box):
    """One for all tests of this file: what they share with the solution is graded once."""
    for test in a.tests:
        test.graded["seconds"] = 4
    grader = Grader(a, box)
    assert all(r["score"] == r["max"] for r in grader.grade(a.solution()))
    return grader


def lost(results):
    return {q for q, (score, most) in by_question(results).items() if score < most}


def messages(results, question):
    return " ".join(r["message"] for r in results if r["question"] == question)


# ---------------------------------------------------------------------------------- surgery

TEXT = '''"""A file."""

import functools


def first(x):
    """Kept."""
    return x + 1


class Thing:
    value = 3

    @functools.cache
    def method(self, y: int = 2):
        """Kept too.

        In two paragraphs.
        """
        z = y * 2
        return z


def last():
    return 0
'''


def test_a_function_is_exchanged_by_name():
    changed = put(TEXT, "Thing.method", "def method(self, y: int = 2):\n    return 7\n")
    assert "    def method(self, y: int = 2):\n        return 7\n\n\ndef last" in changed
    assert "functools.cache" not in changed and cut(changed, "first") == cut(TEXT, "first")
    assert graft(changed, TEXT, ["Thing.method"]) == TEXT
    with pytest.raises(Missing, match=r"Thing\.other"):
        locate(TEXT, "Thing.other")
    for name in ("first", "Thing.method"):  # lost functions are put back, with the right place and indentation
        begun = graft(TEXT.replace(cut(TEXT, name), "pass" if name == "first" else "    pass"), TEXT, [name])
        compile(begun, "text", "exec")
        assert cut(begun, name) == cut(TEXT, name)
    twice = TEXT + "\n\ndef first(x):\n    return 2\n"
    assert cut(twice, "first") == "def first(x):\n    return 2"  # as Python does


def test_a_blank_keeps_signature_decorators_and_docstring(a):
    blank = a.blanks[0]._replace(functions=["Thing.method", "last"], prompt="Do it.", hints=["Try."], question="2b")
    text = emptied(TEXT, blank)
    compile(text, "text", "exec")
    kept = (
        '    @functools.cache\n    def method(self, y: int = 2):\n        """Kept too.\n\n        In two paragraphs.\n'
    )
    assert kept in text and "z = y * 2" not in text
    assert text.count('raise NotImplementedError("question 2b: Do it.")') == 2 and "# Hint: Try." in text
    assert cut(text, "first") == cut(TEXT, "first")


@pytest.mark.parametrize("name", homework.NAMES)
def test_every_assignment_fits_the_scripts(name):
    a = load_assignment(name)
    assert len({b.question for b in a.blanks}) == len(a.blanks)
    assert {w["question"] for w in a.written}.isdisjoint(b.question for b in a.blanks)
    for w in a.written:
        assert w.get("automatic") or sum(points for points, _ in w["key"]) == w["points"], w["title"]
    for file, text in starter(a).items():
        compile(text, file, "exec")
        for blank in (b for b in a.blanks if b.file == file):
            assert f"question {blank.question}:" in text
    assert variants(a) and {v[0] for v in variants(a).values()} == {b.question for b in a.blanks}
    assert len(list(homework.mutants(a))) >= 16
    easy = load_assignment(name, "easy")
    assert len(easy.blanks) == sum(b.level == "easy" for b in a.blanks) > 0
    for blank in (b for b in a.blanks if b.level == "hard"):
        assert all(
            cut(starter(easy).get(blank.file, a.solution()[blank.file]), f) == cut(a.solution()[blank.file], f)
            for f in blank.functions
        )
    assert "oracle" not in public_tests(a)
    for command in [f"python {a.smoke}", *a.commands]:
        script, *flags = command.split()[1:]
        if command.startswith("python "):
            importlib.import_module(script.removesuffix(".py")).parse_args(flags)
    for test in a.tests:
        assert test.__doc__, test


def edited(folder, name, monkeypatch, change, file="assignment.toml"):
    """The assignment in another folder, with one file changed."""
    import assignment

    shutil.copytree(homework.FOLDER / name, folder / name)
    path = folder / name / file
    path.write_text(change(path.read_text()))
    monkeypatch.setattr(assignment, "FOLDER", folder)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("points = 10\n", "points = 0\n", ["[[blank]] 1a, points = 0"]),
        ("points = 10\n", "points = -3\n", ["[[blank]] 1a, points = -3"]),
        ("points = 10\n", 'points = "10"\n', ["[[blank]] 1a, points = '10'", "not a number"]),
        ("points = 10\n", "points = nan\n", ["[[blank]] 1a, points = nan"]),
        ("points = 10\n", "", ["[[blank]] 1a has no 'points'"]),
        ("points = 10\n", "points = 10\npoint = 3\n", ["unknown key 'point'"]),
        ('question = "1b"', 'question = "1a"', ["[[blank]] 1a, question"]),
        ('question = "1b"', "question = 1", ["[[blank]] 1, question = 1", "not a text"]),
        ('functions = ["draw_distinct"]', 'functions = ["draw_distinkt"]', ["episodes.py", "draw_distinkt"]),
        ('functions = ["draw_distinct"]', "functions = []", ["functions", "empty"]),
        ('file = "fewshot/tasks/episodes.py"', 'file = "load_date.py"', ["'load_date.py'", "no such script"]),
        ('level = "hard"', 'level = "harder"', ["level = 'harder'"]),
        ("[[blank]]", "[[blank]", ["assignment.toml is no TOML", "line"]),
        ('question = "5"\n', 'question = "8"\n', ["tests.py", "'5'"]),
    ],
)
def test_an_assignment_is_checked_when_read(tmp_path, monkeypatch, old, new, words):
    edited(tmp_path, "hw1", monkeypatch, lambda text: text.replace(old, new, 1))
    with pytest.raises(homework.UserError) as error:
        homework.main(["build", "hw1", "--out", str(tmp_path / "out")])
    assert all(word in str(error.value) for word in ["assignments/hw1/", *words]), error.value


def test_what_no_longer_fits_the_scripts_is_an_error(tmp_path, monkeypatch):
    """A right answer with other arguments than the script's function, and a mistake whose text is gone."""
    replaced = lambda old, new: lambda text: text.replace(old, new)
    edited(tmp_path / "a", "hw3", monkeypatch, replaced("watch=None, start=()):", "watch=None):"), "right.py")
    with pytest.raises(homework.UserError, match=r"hw3/right.py, adapt_plain no longer fits: its arguments"):
        homework.main(["check", "hw3"])
    edited(tmp_path / "b", "hw3", monkeypatch, replaced("new_c = f * c + i * g", "new_c = i * g + f * c"), "right.py")
    with pytest.raises(homework.UserError, match=r"hw3/mutants.py, 'gates swapped: input and forget'"):
        homework.main(["check", "hw3"])


# ---------------------------------------------------------------------------------- messages


def test_messages_carry_data_and_nothing_else():
    import torch

    value = {"a": torch.arange(6.0).view(2, 3), "b": [1, None, "x", 2.5, True], "c": torch.empty(0, 4), "d": {}}
    message = encode(value)
    text = int.from_bytes(message[:8], "little")
    back = decode(message[16 : 16 + text], message[16 + text :])
    assert torch.equal(back["a"], value["a"]) and back["b"] == value["b"] and back["c"].shape == (0, 4)
    with pytest.raises(TypeError, match="a set where a tensor"):
        encode({"a": {1, 2}})
    bad = [b'{"t":["float32",[1000000]]}', b'{"t":["object",[1]]}', b'{"t":["float32",[-1]]}', b"[" * 100_000, b"{"]
    for text in bad:
        with pytest.raises((ValueError, RecursionError, RuntimeError)):
            decode(text, b"\0" * 8)


def test_close_never_tells_the_expected_value():
    import torch

    expected = torch.tensor([0.1234567])
    for found in (torch.tensor([9.0]), torch.tensor([[9.0]]), torch.tensor([float("nan")]), None, "text"):
        with pytest.raises(Wrong) as error:
            close(found, expected, "it")
        assert "0.123" not in str(error.value)
    close(expected.double() * (1 + 1e-6), expected, "it")
    with pytest.raises(Wrong, match="not a tensor"):
        shaped(3.0, (), "it")


def test_a_probe_may_not_know_the_answer():
    with pytest.raises(ValueError, match="oracle_of_it"):
        source_of(probe_that_knows)


def oracle_of_it():
    return 42


def probe_that_knows():
    return oracle_of_it()


# ----------------------------------------------------------------------------------- grading


def test_starter_gets_nothing_and_the_solution_everything(a, grader):
    results = grader.grade(starter(a))
    assert not any(r["score"] for r in results) and lost(results) == {b.question for b in a.blanks}
    for r in results:
        assert "not written yet" in r["message"] and f"question {r['question']}" in r["message"]
    content = gradescope(a, grader.grade(a.solution()), 1.0)
    assert content["score"] == content["max_score"] == sum(b.points for b in a.blanks)
    assert {t["visibility"] for t in content["tests"]} == {"visible", "after_due_date"}


def write(a, body, file_end=""):
    """The solution with another body of the hostile question's function."""
    texts = a.solution()
    source = cut(texts[FILE], FUNCTION).splitlines()[0] + "\n" + "\n".join(f"    {line}" for line in body.splitlines())
    texts[FILE] = put(texts[FILE], FUNCTION, source) + file_end
    return texts


HOSTILE_BODIES = {
    "endless loop": ("while True:\n    pass", "processor time"),
    "exit": ("import sys\nsys.exit(0)", "sys.exit"),
    "hard exit": ("import os\nos._exit(0)", "ended without an answer"),
    "crash": ("import ctypes\nctypes.string_at(0)", "ended without an answer"),
    "10 GB": ("x = bytearray(10 * 2**30)\nreturn x", "memory"),
    "10 GB of tensors": ("x = [torch.empty(2**27) for _ in range(20)]\nreturn x", "memory"),
    "ten million lines": ("for _ in range(10**7):\n    print('spam')", "printed more"),
    "recursion": ("return logistic_steps(A, y, n, steps, lr)", "RecursionError"),
    "not a tensor": ("return {1, 2}", "AttributeError"),
    "nothing": ("return None", ""),
    "enormous answer": ("return torch.zeros(1, 1).expand(30000, 30000)", ""),
}


SLOW = {"endless loop"}
NAMED = [pytest.param(name, marks=pytest.mark.thorough) if name in SLOW else name for name in HOSTILE_BODIES]


@pytest.mark.parametrize("name", NAMED)
def test_a_hostile_function_costs_its_question_alone(a, grader, name):
    body, word = HOSTILE_BODIES[name]
    results = grader.grade(write(a, body))
    assert lost(results) == {HOSTILE}
    assert word in messages(results, HOSTILE), messages(results, HOSTILE)


def attempt(expression):
    """A function body that says by its exception whether something succeeded."""
    return f"""\
try:
    result = {expression}
except Exception as error:
    raise ValueError('HELD ' + type(error).__name__)
raise ValueError('NOT HELD ' + repr(result)[:40])"""


@pytest.mark.thorough
@linux
def test_nothing_outside_the_folder_is_read_or_changed(a, grader, tmp_path):
    victim, secret = tmp_path / "victim.txt", homework.FOLDER / ASSIGNMENT / "tests.py"
    victim.write_text("here")
    os.chmod(tmp_path, 0o777)
    before = victim.stat()
    grader.grade(a.solution())
    if "landlock" not in grader.guards:
        pytest.skip("this Linux has no Landlock")
    tries = {
        f"open({str(secret)!r}).read()": "PermissionError",
        f"open({str(REPO / FILE)!r}).read()": "PermissionError",
        f"__import__('os').listdir({str(REPO)!r})": "PermissionError",
        f"__import__('os').remove({str(victim)!r})": "PermissionError",
        f"__import__('shutil').rmtree({str(tmp_path)!r})": "PermissionError",
        f"open({str(victim)!r}, 'a')": "PermissionError",
        f"open({str(tmp_path / 'results.json')!r}, 'w')": "PermissionError",
        f"__import__('os').rename({str(victim)!r}, 'mine')": "Error",
        f"__import__('os').symlink('/', {str(tmp_path / 'link')!r})": "PermissionError",
        f"__import__('os').chmod({str(victim)!r}, 0)": "PermissionError",
        f"__import__('os').utime({str(victim)!r}, (0, 0))": "PermissionError",
        "open('/etc/shadow').read()": "PermissionError",
        "open('/proc/%d/mem' % __import__('os').getppid(), 'rb')": "Error",
        "open('/dev/shm/x', 'w')": "PermissionError",
        "__import__('os').fork()": "PermissionError",
        "__import__('subprocess').run(['true'])": "PermissionError",
        "__import__('socket').socket()": "PermissionError",
        "__import__('os').kill(__import__('os').getppid(), 9)": "PermissionError",
        "__import__('os').kill(-1, 9)": "PermissionError",
        "__import__('resource').prlimit(__import__('os').getppid(), 0, (1, 1))": "PermissionError",
        "__import__('resource').getrlimit(0)": "NOT HELD",
        "__import__('homework')": "ModuleNotFoundError",
        "__import__('checks')": "ModuleNotFoundError",
        "__import__('importlib.util')": "NOT HELD",
    }
    for expression, word in tries.items():
        results = grader.grade(write(a, attempt(expression)))
        text = messages(results, HOSTILE)
        assert lost(results) == {HOSTILE}, expression
        assert (word in text and "NOT HELD" not in text) or word == "NOT HELD", (expression, text)
    assert victim.read_text() == "here" and sorted(p.name for p in tmp_path.iterdir()) == ["victim.txt"]
    after = victim.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_ino) == (before.st_mode, before.st_mtime_ns, before.st_ino)


PATCHES = """

import sys
import types
import builtins

torch.equal = torch.allclose = lambda *_, **__: True
torch.Tensor.__eq__ = lambda *_: torch.ones(1, dtype=torch.bool)
for name in ("checks", "tests", "pytest", "homework"):
    sys.modules[name] = types.ModuleType(name)
    for word in ("close", "expect", "same", "shaped", "graded"):
        setattr(sys.modules[name], word, lambda *_, **__: None)
open("results.json", "w").write('{"score": 1000}')
main_module = sys.modules["__main__"]
main_module.describe = lambda *_: {"kind": "x", "message": "y", "where": None}
"""


@pytest.mark.thorough
def test_patching_what_compares_helps_nobody(a, grader):
    """A wrong answer stays wrong, right ones stay right."""
    results = grader.grade(write(a, "return A.new_zeros(A.shape[-1], y.shape[-1])", PATCHES))
    assert lost(results) == {HOSTILE}
    assert lost(grader.grade({FILE: a.solution()[FILE] + PATCHES.replace("torch.Tensor.__eq__", "_")})) == set()


def test_a_forged_answer_is_only_a_value(a, grader):
    """The process may write whatever it likes to its judge: without the right numbers it has nothing."""
    forged = """\
import os, json, struct
text = json.dumps({'d': [['result', {'d': [['beta', {'v': 1}], ['score', {'v': 100}]]}]]}).encode()
os.write(3, struct.pack('<QQ', len(text), 0) + text)
return A"""
    assert lost(grader.grade(write(a, forged))) == {HOSTILE}
    for message in (
        "b'\\xff' * 64",
        "struct.pack('<QQ', 2**40, 2**40)",
        "struct.pack('<QQ', 4, 0) + b'nope'",
        "struct.pack('<QQ', 10**5, 0) + b'[' * 10**5",
    ):
        body = f"import os, struct\nos.write(3, {message})\nreturn A"
        assert lost(grader.grade(write(a, body))) == {HOSTILE}


def test_files_that_are_no_python_or_not_there(a, grader):
    everything = {b.question for b in a.blanks}
    for texts, word in (
        ({}, "not in the submission"),
        ({FILE: "def broken(:\n"}, "no Python: SyntaxError in line 1"),
        ({FILE: a.solution()[FILE] + "\nimport nowhere\n"}, "cannot be imported"),
        ({FILE: a.solution()[FILE] + "\nraise SystemExit\n"}, "sys.exit"),
    ):
        results = grader.grade(texts)
        assert lost(results) == everything and word in results[0]["message"], results[0]["message"]
    renamed = {FILE: a.solution()[FILE].replace("def logistic_steps", "def my_steps")}
    results = grader.grade(renamed)
    assert lost(results) == {HOSTILE} and "has no logistic_steps" in messages(results, HOSTILE)


def test_own_helpers_are_taken_along_and_links_are_not(a, grader, tmp_path):
    body = "from my_helpers import one\nfrom mine.steps.all import steps_of\n"
    texts = write(a, body + "return one * steps_of(A, y, n, steps, lr)")
    (tmp_path / FILE).write_text(texts[FILE])
    source = cut(a.solution()[FILE], FUNCTION).replace(FUNCTION, "steps_of")
    (tmp_path / "mine" / "steps").mkdir(parents=True)
    (tmp_path / "mine" / "steps" / "all.py").write_text(f"import torch\n\n\n{source}\n")
    (tmp_path / "my_helpers.py").write_text("one = 1\n")
    (tmp_path / "fewshot").mkdir()
    (tmp_path / "fewshot" / "__init__.py").write_text("raise SystemExit\n")  # would hide ours
    (tmp_path / "secret.py").symlink_to("/etc/passwd")
    (tmp_path / "fewshot.py").write_text("raise SystemExit\n")  # ours is taken
    (tmp_path / "large.py").write_text("#" * 2**21)
    found, notes = read_submission(a, tmp_path)
    assert set(found) == {FILE, "my_helpers.py", "mine/steps/all.py"}
    assert "large.py is larger" in notes["large.py"]
    assert lost(grader.grade(found)) == set()


ODD = '\nsepara = "a\u2028b\x0cc"  # \u2028 a line for some, not for Python\n\x0c\ndef of_mine():\n    return 0\n'
FILES = {
    "byte-order mark": lambda text: text.encode("utf-8-sig"),
    "line separators and form feeds": lambda text: text.replace("\n\n\ndef", f"\n{ODD}\n\x0c\ndef", 1).encode(),
    "Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "latin-1": lambda text: ("# -*- coding: latin-1 -*-\n" + text + "\nname = 'M\xfcller'\n").encode("latin-1"),
    "latin-1 after a form feed": lambda text: ("\x0c\n# coding=latin-1\n" + text + "# \xe9\n").encode("latin-1"),
    "another question's function lost": lambda text: text.replace(cut(text, "regression_steps"), "").encode(),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_is_read_as_python_reads_it(a, grader, tmp_path, kind):
    (tmp_path / FILE).write_bytes(FILES[kind](a.solution()[FILE].encode("ascii", "replace").decode()))
    found, _ = read_submission(a, tmp_path)
    assert lost(grader.grade(found)) == ({"4"} if "lost" in kind else set())
    if kind == "latin-1":
        assert "'M\xfcller'" in found[FILE] and "coding" not in found[FILE].splitlines()[0]


@pytest.mark.parametrize(
    "names, which",
    [
        ([f"my homework/{FILE}"], 0),
        ([f"__MACOSX/._{FILE}", f"a/b/{FILE}"], 1),
        (["feature_weights (1).py"], 0),
        (["feature_weights (1).py", "feature_weights(2).py"], 1),
        (["feature_weights (1).py", FILE], 1),
        (["feature_weights - Copy.py"], 0),
        ([f"old/{FILE}", FILE], 1),
    ],
)
def test_the_file_is_found_where_it_lies(a, tmp_path, names, which):
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"number = {k}\n")
    found, notes = read_submission(a, tmp_path)
    assert found[FILE] == f"number = {which}\n" and not notes


def test_a_notebook_is_told_what_to_hand_in(a, grader, tmp_path):
    (tmp_path / "homework.ipynb").write_text("{}")
    texts, grader.notes = read_submission(a, tmp_path)
    results, grader.notes = grader.grade(texts), {}
    assert f"hand in {FILE} itself, not a notebook (homework.ipynb)" in results[0]["message"]


def test_classic_mistakes_and_right_answers_of_one_question(a, grader):
    """The whole proof is `check`; here the mistakes of one question."""
    cases = [m for m in homework.mutants(a) if m[0] == "4"]
    assert len(cases) >= 5
    for question, wrong, texts in cases:
        assert lost(grader.grade(texts)) == {question}, wrong
    for question, what, functions in variants(a).values():
        if question in ("4", "5"):
            assert lost(grader.grade(homework.answered(a, question, functions))) == set(), what


# ----------------------------------------------------------------------- what is handed out


@pytest.fixture(scope="module")
def built(a, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist") / ASSIGNMENT
    build(a, out)
    return out


def run(command, folder, **kwargs):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | kwargs.pop("env", {})
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600, **kwargs)


def test_the_students_folder(a, built):
    """The linter is content; pytest fails with the questions, and passes with the answers pasted in."""
    student = built / "student"
    if shutil.which("ruff"):
        result = run(["ruff", "check", "."], student)
        assert result.returncode == 0, result.stdout
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line"]
    result = run(tests, student)
    failed = re.findall(r"NotImplementedError: question (\w+)", result.stdout)
    public = [f for f in a.tests if f.graded["public"]]
    assert set(failed) == {b.question for b in a.blanks} and f"{len(public)} failed" in result.stdout, result.stdout
    assert "ImportError" not in result.stdout and "ModuleNotFoundError" not in result.stdout
    text = (student / FILE).read_text()
    for blank in a.blanks:
        text = graft(text, a.solution()[FILE], blank.functions)
    assert text == a.solution()[FILE]
    (student / FILE).write_text(text)
    result = run(tests, student)
    assert result.returncode == 0 and f"{len(public)} passed" in result.stdout, result.stdout
    (student / FILE).write_text(starter(a)[FILE])
    handout = (student / "handout.md").read_text()
    assert "{" not in handout and all(f"| {b.question} | {b.title} |" in handout for b in a.blanks)
    answers = (student / "answers.md").read_text()
    solution = (built / "solution" / "answers.md").read_text()
    assert answers.count("Your answer:") == len(a.written) and "Your answer:" not in solution
    assert "{results" not in solution and len(solution) > len(answers)


@pytest.mark.thorough
def test_the_notebook_runs_as_a_script(built, tmp_path):
    """Clones, installs, tests, trains and opens TensorBoard, which is only told so here."""
    notebook = json.loads((built / "student" / "colab.ipynb").read_text())
    assert notebook["nbformat"] == 4
    code = "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    assert "pip" in code and "clone" in code
    solution = tmp_path / "repository"
    shutil.copytree(built / "solution", solution)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=solution, check=True)
    stub = "import tensorboard.notebook\ntensorboard.notebook.start = lambda flags: print('TENSORBOARD', flags)\n"
    code = code.replace('"--quiet", "-r"', '"--quiet", "--dry-run", "--no-index", "-r"')  # nothing is installed here
    (tmp_path / "cells.py").write_text(stub + code)
    result = run([sys.executable, "cells.py"], tmp_path, env={"REPOSITORY": str(solution)})
    assert "TENSORBOARD --logdir runs" in result.stdout, (result.stdout[-2000:], result.stderr[-2000:])
    assert list((tmp_path / "homework" / "runs").iterdir())


@pytest.mark.thorough
def test_the_autograder_as_gradescope_runs_it(a, built, tmp_path):
    """Unpacked under another root: the same result as `grade` gives."""
    with zipfile.ZipFile(built / "autograder.zip") as archive:
        names = archive.namelist()
        assert "setup.sh" in names and "run_autograder" in names
        assert not [n for n in names if "mutants" in n or "right.py" in n or n.endswith("handout.md")]
        archive.extractall(tmp_path / "source")
    submission = tmp_path / "submission"
    shutil.copytree(built / "solution", submission)
    text = (submission / FILE).read_text()
    (submission / FILE).write_text(put(text, FUNCTION, cut(starter(a)[FILE], FUNCTION)))
    assert run(["bash", "-n", "setup.sh"], tmp_path / "source").returncode == 0
    result = run(["bash", "run_autograder"], tmp_path / "source", env={"AUTOGRADER_ROOT": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    theirs = json.loads((tmp_path / "results" / "results.json").read_text())
    out = tmp_path / "ours.json"
    ours = homework.main(["grade", ASSIGNMENT, "--submission", str(submission), "--json", str(out)])
    assert json.loads(out.read_text()) == ours
    for content in (theirs, ours):
        del content["execution_time"]
    assert theirs == ours and 0 < ours["score"] < ours["max_score"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["grade", "hw9"], ["--submission"]),
        (["grade", "all", "--submission", "."], ["one assignment"]),
        (["grade", "hw9", "--submission", "nowhere"], ["--submission", "nowhere"]),
        (["grade", "hw9", "--submission", ".", "--json", "no/where.json"], ["--json"]),
        (["build", "hw7"], ["hw7"]),
        (["check", "hw9", "--mutants", "5", "--out", "proof.json"], ["--mutants"]),
        (["build", "hw9", "--level", "medium"], ["--level"]),
    ],
)
def test_errors_in_one_line(argv, words):
    result = warm.run(REPO / "homework.py", *argv, cwd=REPO)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words)


def test_build_overwrites_nothing_else(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    build_again = lambda *more: homework.main(["build", ASSIGNMENT, "--out", str(tmp_path), *more])
    with pytest.raises(homework.UserError, match="--out"):
        build_again()
    (tmp_path / "thesis.txt").unlink()
    build_again()
    build_again()
    (tmp_path / "student" / "__pycache__").mkdir()
    (tmp_path / "student" / "__pycache__" / "x.pyc").write_text("not an edit")
    build_again()
    (tmp_path / "student" / "mine.txt").write_text("mine")
    (tmp_path / "solution" / "answers.md").write_text("better")
    with pytest.raises(homework.UserError, match=r"solution/answers.md, student/mine.txt"):
        build_again()
    assert (tmp_path / "student" / "mine.txt").read_text() == "mine"
    build_again("--force")
    assert "2 changed files go away: solution/answers.md, student/mine.txt" in capsys.readouterr().out
    assert not (tmp_path / "student" / "mine.txt").exists()


# ------------------------------------------------------------------------------------ the proof


def test_the_committed_proof_belongs_to_these_assignments():
    """results/homework.json names every mistake and right answer of today, all as expected."""
    proof = json.loads((REPO / "results" / "homework.json").read_text())
    text = Path(REPO / "docs" / "teaching.md").read_text()
    totals = {"mutant": 0, "right": 0}
    for name in homework.NAMES:
        a, cases = load_assignment(name), proof[name]["cases"]
        again = f"python homework.py check {name} --out results/homework.json"
        assert proof[name]["sources"] == sources(a), f"the proof of {name} is older than what it covers: {again}"
        assert all(case["as_expected"] for case in cases)
        of = lambda kind: [(c["question"], c["what"]) for c in cases if c["kind"] == kind]  # noqa: B023
        assert of("mutant") == [(q, wrong) for q, wrong, _ in homework.mutants(a)]
        assert of("right") == [(q, what) for q, what, _ in variants(a).values()]
        for kind in totals:
            totals[kind] += len(of(kind))
        row = f"| {name} | {len(a.blanks)} | {len(of('mutant'))} | {len(of('right'))} |"
        assert row in text, f"docs/teaching.md should say {row}"
    assert totals["mutant"] >= 80 and totals["right"] >= 15


@pytest.mark.thorough
@pytest.mark.parametrize("name", homework.NAMES)
def test_the_whole_proof(name):
    """python homework.py check NAME; its small form, with --mutants, has its own line in .ci/run."""
    found = homework.main(["check", name, "--jobs", "1"])
    assert all(case["as_expected"] for case in found[name]["cases"])
