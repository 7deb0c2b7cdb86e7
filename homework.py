"""The homework made from the scripts: the student's version, and a grader that is itself put to the test.

The scripts of this package are the solution. An assignment (assignments/NAME/) only says which of their functions the
students write; the student's folder is made from the scripts of today, so that it cannot go out of date. The grader
compares with independent references and properties in a process that no submission can reach (sandbox.py there).
`check` proves it: unwritten code gets nothing, the solution everything, each of many classic mistakes loses at
exactly its question, and right answers written in other ways lose nothing.

    python homework.py build hw1 --out dist/hw1                  student/, solution/, autograder.zip for Gradescope
    python homework.py grade hw1 --submission DIR                the grader here; --json results.json for Gradescope
    python homework.py check all --out results/homework.json     the proof

How to teach with it: docs/teaching.md.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import queue
import random
import re
import stat
import sys
import time
import tokenize
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

# The expected values are small sums; the cores are for the students' processes.
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

HERE = Path(__file__).resolve().parent
FOLDER = HERE / "assignments"  # they, and the modules of the grader, which their tests.py import as the students do
sys.path.insert(0, str(FOLDER))

from fewshot.experiment import UserError, run_script, write_json  # noqa: E402

from assignment import (  # noqa: E402
    Assignment,
    Missing,
    answered,
    graft,
    load_assignment,
    locate,
    mutants,
    parsed,
    sources,
    starter,
    variants,
)
from build import build, changed_files  # noqa: E402
from checks import Wrong  # noqa: E402
from sandbox import Failed, Sandbox  # noqa: E402

NAMES = ("hw1", "hw2", "hw3", "hw4", "hw9")
FILE_LIMIT = 2**20  # bytes of a submitted file
FILES_LIMIT, DEPTH = 200, 4  # files of a submission, folders below each other
# What browsers and file managers make of a name that is there already.
COPY = re.compile(r"(.+?)(?: ?\(\d+\)| - Copy| - Kopie| copy(?: \d+)?)+\.py")

# ------------------------------------------------------------------------------------- grading


def read_python(path: Path) -> str:
    """The text of a file as Python reads it: byte-order mark, coding line, ends of lines. ValueError says why not."""
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with open(fd, "rb") as file:
            content = file.read(FILE_LIMIT + 1)
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
    if len(content) > FILE_LIMIT:
        raise ValueError(f"is larger than {FILE_LIMIT >> 20} MB")
    try:
        encoding, first = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"is no text that Python reads ({error})"[:200]) from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    for k in range(min(len(first), 2, len(lines))):  # it is written in UTF-8 from here on
        if re.match(r"[ \t\f]*#.*?coding[:=]", lines[k]):
            lines[k] = "#"
    return "\n".join(lines)


def read_submission(a: Assignment, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The student's files and packages by their paths, and why a file of the handout is missing; no links.

    The files may lie in a folder of the submission; "hw1 (1).py" counts as hw1.py where that is not there.
    """
    if not folder.is_dir():
        raise UserError(f"--submission {folder} is not a folder; name the one with the student's files")
    wanted = list(dict.fromkeys(blank.file for blank in a.blanks))
    paths, notebooks = [], []
    for place, folders, files in os.walk(folder):
        depth = len(Path(place).relative_to(folder).parts)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__")) and depth < DEPTH)
        paths += [Path(place, file) for file in sorted(files) if file.endswith(".py") and not file.startswith("._")]
        notebooks += [file for file in files if file.endswith(".ipynb") and file != "colab.ipynb"]
    paths = [path for path in paths if stat.S_ISREG(path.lstat().st_mode)]
    plain = lambda path: (COPY.fullmatch(path.name) or [None, path.stem])[1] + ".py"
    depth = lambda path: len(path.relative_to(folder).parts)
    chosen, notes = {}, {}
    for file in wanted:
        places = [path for path in paths if plain(path) == Path(file).name]
        # Where the handout has it; what lies higher up; the plain name before its copies, the newest copy (2 before 1).
        at_home = lambda path, file=file: ("/" + path.as_posix()).endswith("/" + file)
        order = lambda path, file=file: (depth(path), path.name != Path(file).name, [-ord(c) for c in path.name])
        places.sort(key=lambda path: (not at_home(path), order(path)))
        if places:
            chosen[file] = places[0]
        elif notebooks:
            notes[file] = f"{file} is not in the submission; hand in {file} itself, not a notebook ({notebooks[0]})"
    home = min((path.parent for path in chosen.values()), key=lambda place: len(place.parts), default=folder)
    ours = {*a.files(), "checks.py", "conftest.py", "test_public.py"}
    tops = {Path(file).parts[0].removesuffix(".py") for file in ours}
    for path in paths:
        if path.is_relative_to(home) and path not in chosen.values() and len(chosen) < FILES_LIMIT:
            name = path.relative_to(home)
            if name.parts[0].removesuffix(".py") not in tops:
                chosen.setdefault(name.as_posix(), path)
    texts = {}
    for file, path in chosen.items():
        try:
            texts[file] = read_python(path)
        except ValueError as error:
            notes[file] = f"{path.name} {error}"
    return texts, notes


class Outcome(NamedTuple):
    share: float  # of the test's points, 0 or 1
    message: str
    kind: str = ""  # "" when right, else why not: wrong, open, error, time, memory, output, exit
    measured: dict = {}  # for the leaderboard


def import_check(name: str) -> None:
    """A probe: that the student's file can be imported."""
    import importlib

    importlib.import_module(name)


class Grader:
    """Grades submissions of one assignment; equal files are tested once."""

    def __init__(self, a: Assignment, box: Sandbox, memo: dict | None = None):
        self.a, self.box, self.memo = a, box, {} if memo is None else memo
        self.package = {file: (HERE / file).read_text() for file in a.files()}
        self.guards: list[str] = []
        self.notes: dict[str, str] = {}  # why a file is missing

    def grafted(self, texts: dict[str, str], file: str, mine: list[str]) -> str:
        """The student's `file`, with our functions in all its questions but those of `mine`."""
        if file not in texts:
            raise Missing(self.notes.get(file, f"{file} is not in the submission"))
        try:
            parsed(texts[file])
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            line = getattr(error, "lineno", None)
            raise Missing(f"{file} is no Python: {type(error).__name__}{f' in line {line}' if line else ''}") from None
        here = [b for b in self.a.blanks if b.file == file]
        own = [f for b in here if b.question in mine for f in b.functions]
        for function in own:
            locate(texts[file], function, file)
        others = [f for b in here if b.question not in mine for f in b.functions]
        try:
            return graft(texts[file], self.package[file], others, file)
        except Missing:  # the class of another question's function is gone
            return graft(self.package[file], texts[file], own, file)

    def run(self, test, files: dict[str, str]) -> Outcome:
        """One test in a process of its own."""
        seconds = test.graded["seconds"]
        digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
        key = (test.__name__, getattr(test, "argument", ""), digest)
        if key not in self.memo:
            worker = None
            try:
                with self.box.student(files, seconds) as worker:
                    self.guards = worker.guards
                    measured = test(worker)
                outcome = Outcome(1.0, "", "", {**(measured or {}), "seconds": round(worker.seconds, 1)})
            except Wrong as error:
                outcome = Outcome(0.0, str(error), "wrong")
            except Failed as error:
                outcome = Outcome(0.0, str(error), error.kind)
                if error.kind == "exit" and worker.seconds > seconds - 0.5:
                    outcome = Outcome(0.0, f"more than {seconds:g} seconds of processor time", "time")
            except Exception as error:  # the answer has another form than the test reads
                outcome = Outcome(0.0, f"the answer has an unexpected form ({type(error).__name__})", "wrong")
            self.memo[key] = outcome
        return self.memo[key]

    def importable(self, texts: dict[str, str], file: str) -> str:
        """Why `file` cannot be imported, or nothing."""

        def test(student):
            student.run(import_check, name=file.removesuffix(".py").replace("/", "."))

        test.graded, test.argument = {"seconds": 10}, file
        question = next(b.question for b in self.a.blanks if b.file == file)
        try:
            extra = {f: t for f, t in texts.items() if f not in self.package}
            outcome = self.run(test, self.package | extra | {file: self.grafted(texts, file, [question])})
        except Missing as error:
            if f"{file} has no" in str(error):
                return ""  # the questions say so, each for itself
            return str(error)
        return "" if outcome.share else f"{file} cannot be imported: {outcome.message}"

    def grade(self, texts: dict[str, str]) -> list[dict]:
        """The result of every test, in the order of the questions."""
        broken = {file: self.importable(texts, file) for file in dict.fromkeys(b.file for b in self.a.blanks)}
        extra = {f: t for f, t in texts.items() if f not in self.package}
        results, lost, grafts = [], {}, {}
        for test in sorted(self.a.tests, key=lambda f: f.graded["whole"]):
            question = test.graded["question"]
            try:
                if test.graded["whole"]:
                    outcome = self.run(test, self.package | extra | self.whole(texts, broken, lost))
                else:
                    file = next(b.file for b in self.a.blanks if b.question == question)
                    if broken[file]:
                        raise Missing(broken[file])
                    if lost.get(question) == "time":
                        raise Missing("not run: an earlier test of this question took too long")
                    if question not in grafts:
                        grafts[question] = self.grafted(texts, file, [question])
                    outcome = self.run(test, self.package | extra | {file: grafts[question]})
            except Missing as error:
                outcome = Outcome(0.0, str(error), "open")
            if not outcome.share and not (lost.get(question) == "time"):
                lost[question] = outcome.kind
            same = [f for f in self.a.tests if f.graded["question"] == question]
            points = self.points(question) * test.graded["weight"] / sum(f.graded["weight"] for f in same)
            title = (test.__doc__ or test.__name__).strip().splitlines()[0].rstrip(".")
            results.append(
                {
                    "question": question,
                    "test": test.__name__,
                    "title": title,
                    "public": test.graded["public"],
                    "max": points,
                    "score": points * outcome.share,
                    "message": outcome.message,
                    "kind": outcome.kind,
                    "measured": outcome.measured if test.graded["whole"] else {},
                }
            )
        return sorted(results, key=lambda r: r["question"])

    def whole(self, texts: dict, broken: dict, lost: dict) -> dict[str, str]:
        """All right answers together, ours in place of wrong ones: a mistake costs once. Missing if one is open."""
        for blank in self.a.blanks:
            if broken[blank.file] or lost.get(blank.question) == "open":
                raise Missing(f"not run: question {blank.question} is not written yet")
        right = [b.question for b in self.a.blanks if b.question not in lost]
        return {file: self.grafted(texts, file, right) for file in broken}

    def points(self, question: str) -> float:
        points = {w["question"]: w["points"] for w in self.a.written} | {b.question: b.points for b in self.a.blanks}
        return points[question]


def by_question(results: list[dict]) -> dict[str, tuple[float, float]]:
    """(points, most points) of each question."""
    totals: dict[str, tuple[float, float]] = {}
    for r in results:
        score, most = totals.get(r["question"], (0.0, 0.0))
        totals[r["question"]] = (score + r["score"], most + r["max"])
    return {question: (round(score, 2), round(most, 2)) for question, (score, most) in totals.items()}


def print_table(a: Assignment, results: list[dict]) -> None:
    titles = {b.question: b.title for b in a.blanks} | {w["question"]: w["title"] for w in a.written}
    totals = by_question(results)
    for question, (score, most) in totals.items():
        print(f"{question:4s} {titles[question]:50s} {score:5g} of {most:g}")
        for r in results:
            if r["question"] == question and not r["score"]:
                print(f"       {r['title']}: {r['message']}")
    score, most = (sum(column) for column in zip(*totals.values(), strict=True))
    print(f"     {'total':50s} {score:5g} of {most:g}")
    for r in results:
        for name, value in r["measured"].items():
            print(f"     {name}: {value:g}")


def gradescope(a: Assignment, results: list[dict], seconds: float) -> dict:
    """results.json as Gradescope reads it; hidden tests show what failed, never a value."""
    tests = [
        {
            "number": r["question"],
            "name": r["title"],
            "score": round(r["score"], 2),
            "max_score": round(r["max"], 2),
            "output": r["message"] or "right",
            "visibility": "visible" if r["public"] else "after_due_date",
        }
        for r in results
    ]
    measured = {k: v for r in results for k, v in r["measured"].items()}
    board = [{"name": k, "value": v} | ({"order": "asc"} if k == "seconds" else {}) for k, v in measured.items()]
    return {
        "score": round(sum(r["score"] for r in results), 2),
        "max_score": round(sum(r["max"] for r in results), 2),
        "output": a.title,
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "execution_time": round(seconds),
        "tests": tests,
        "leaderboard": board,
    }


def grade(a: Assignment, submission: Path, out: Path | None) -> dict:
    """Grade a folder; prints the table, writes `out`, returns what Gradescope gets."""
    begin = time.perf_counter()
    texts, notes = read_submission(a, submission)
    with Sandbox() as box:
        grader = Grader(a, box)
        grader.notes = notes
        results = grader.grade(texts)
    print_table(a, results)
    held = {"limits", "landlock", "seccomp"} - set(grader.guards)
    if held and grader.guards:
        print(f"WARNING: this system has no {', '.join(sorted(held))}; see docs/teaching.md", file=sys.stderr)
    content = gradescope(a, results, time.perf_counter() - begin)
    if out:
        write_json(out, content)
    return content


# -------------------------------------------------------------------------------- the proof


def check(a: Assignment, jobs: int, sample: int | None = None) -> dict:
    """Grade unwritten code, the solution, right answers and mistakes; what each question gave each of them.

    sample: the small form, without the right answers and with so many of the mistakes, others every day.
    """
    full = {b.question: b.points for b in a.blanks}
    cases = [("starter", "", "", starter(a)), ("solution", "", "", a.solution())]
    right = [("right", q, what, answered(a, q, functions)) for q, what, functions in variants(a).values()]
    wrong = [("mutant", *mutant) for mutant in mutants(a)]
    if sample is not None:
        right, wrong = [], random.Random(time.strftime("%F") + a.name).sample(wrong, min(sample, len(wrong)))
    cases += right + wrong
    memo: dict = {}
    boxes: queue.SimpleQueue = queue.SimpleQueue()
    with ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        for _ in range(jobs):
            boxes.put(stack.enter_context(Sandbox(patience=10)))

        def judge(case):
            box = boxes.get()
            try:
                return Grader(a, box, memo).grade(case[3])
            finally:
                boxes.put(box)

        found = []
        # The solution first: what it shares with the others is then known.
        for case, results in zip(cases, [*map(judge, cases[:2]), *pool.map(judge, cases[2:])], strict=True):
            kind, question, what, _ = case
            totals = by_question(results)
            lost = {q: round(most - score, 2) for q, (score, most) in totals.items() if score < most}
            expected = {"starter": set(totals), "mutant": {question}}.get(kind, set())
            # A mistake that is only too slow, or ends its process, was not found by a comparison.
            accident = kind == "mutant" and any(r["kind"] not in ("", "wrong", "error") for r in results)
            good = (
                set(lost) == expected
                and not accident
                and (kind != "starter" or not any(score for score, _ in totals.values()))
            )
            failed = [f"{r['test']}: {r['message']}" for r in results if r["score"] < r["max"]]
            found.append(
                {
                    "kind": kind,
                    "question": question,
                    "what": what,
                    "lost": lost,
                    "as_expected": good,
                    "by": [line.split(":")[0] for line in failed] if kind == "mutant" else [],
                }
            )
            if not good:
                print(f"NOT AS EXPECTED: {a.name} {kind} {question} {what}: lost {lost}\n    " + "\n    ".join(failed))
    lines = []
    for kind, words in (
        ("starter", "nothing for the starter"),
        ("solution", "everything for the solution"),
        ("right", "right answers unharmed"),
        ("mutant", "mistakes found at their question alone"),
    ):
        good = [f["as_expected"] for f in found if f["kind"] == kind]
        lines.append(f"{words} {sum(good)} of {len(good)}")
    print(f"{a.name}: " + ", ".join(lines))
    return {"title": a.title, "points": full, "sources": sources(a), "cases": found}


# ---------------------------------------------------------------------------------- the script


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="homework.py",
        allow_abbrev=False,
    )
    parser.error = lambda message: (_ for _ in ()).throw(UserError(f"{message} (see python homework.py --help)"))
    parser.add_argument("command", choices=["build", "grade", "check"])
    parser.add_argument("name", choices=[*NAMES, "all"], help="the assignment")
    parser.add_argument("--level", choices=["easy", "hard"], default="hard", help="easy leaves fewer functions open")
    parser.add_argument(
        "--out", type=Path, help="build: the folder to write; check: the file whose proof of the assignment is replaced"
    )
    parser.add_argument("--submission", type=Path, help="grade: the folder with the student's files")
    parser.add_argument("--json", type=Path, help="grade: write the result for Gradescope here")
    parser.add_argument("--force", action="store_true", help="build: also over files that were changed since")
    parser.add_argument("--mutants", type=int, help="check: the small form, with so many mistakes, others every day")
    parser.add_argument("--jobs", type=int, default=2, help="check: submissions graded at once (default: 2)")
    args = parser.parse_args(argv)
    if args.mutants is not None and (args.command != "check" or args.out or args.mutants < 1):
        raise UserError("--mutants is for check without --out (a part is no proof), and 1 or more")
    if args.command == "grade" and (args.submission is None or args.name == "all"):
        raise UserError("grade takes one assignment and --submission DIR")
    if args.json and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; create it first")
    return args


def main(argv=None) -> dict:
    args = parse_args(argv)
    names = NAMES if args.name == "all" else [args.name]
    try:
        return run(args, [load_assignment(name, args.level) for name in names])
    except Missing as error:  # an assignment, a right answer or a mistake that no longer fits the scripts
        raise UserError(f"{FOLDER.name}/{error}; mend that file") from None


def run(args, assignments: list[Assignment]) -> dict:
    if args.command == "grade":
        return grade(assignments[0], args.submission, args.json)
    if args.command == "build":
        for a in assignments:
            out = args.out or Path("dist")
            out = out / a.name if args.name == "all" or not args.out else out
            if out.exists() and any(out.iterdir()) and not (out / "autograder.zip").exists():
                raise UserError(f"--out {out} holds other things; name a new folder")
            edited = changed_files(out)
            if edited and not args.force:
                some = ", ".join(edited[:3]) + (f" and {len(edited) - 3} more" if edited[3:] else "")
                raise UserError(f"--out {out} was changed since it was built ({some}); name a new folder")
            if edited:
                print(f"--force: {len(edited)} changed files go away: {', '.join(edited)}")
            build(a, out)
            print(f"written: {out}/student, {out}/solution, {out}/autograder.zip")
        return {}
    found = {a.name: check(a, max(1, args.jobs), args.mutants) for a in assignments}
    if args.out:
        before = json.loads(args.out.read_text()) if args.out.exists() else {}
        write_json(args.out, before | found)
    if not all(case["as_expected"] for result in found.values() for case in result["cases"]):
        raise UserError("the grader of these assignments is not right yet; see above")
    return found


if __name__ == "__main__":
    run_script(main)
