"""What the course hands out: the student's folder, the solution with its keys, and the grader for Gradescope."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

from assignment import FOLDER, HERE, JUDGES, Assignment, closure, starter


def public_tests(a: Assignment) -> str:
    """test_public.py: the public tests and what they use of tests.py."""
    text = (a.folder / "tests.py").read_text()
    lines, tree = text.splitlines(), ast.parse(text).body
    defined = {}
    for node in tree:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            names_of = [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            defined |= dict.fromkeys(names_of, node)
    wanted, names = [f.__name__ for f in a.tests if f.graded["public"]], set()
    for name in wanted:
        used = {n.id for n in ast.walk(defined[name]) if isinstance(n, ast.Name)}
        names |= used
        wanted += [n for n in used if n in defined and n not in wanted]
    told = [name for name in wanted if name.startswith("oracle")]
    if told:
        raise ValueError(f"a public test of {a.name} would give {', '.join(told)} to the students")
    parts = [f'"""Public tests of {a.name}. The grader has further ones."""', "from __future__ import annotations"]
    imports: dict[bool, list[str]] = {True: [], False: []}  # of Python itself, others
    for node in tree:
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__":
            kept = [n for n in node.names if (n.asname or n.name).split(".")[0] in names]
            if kept:
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                own = module.split(".")[0] in sys.stdlib_module_names
                imports[own].append(ast.unparse(type(node)(**{**vars(node), "names": kept})))
    parts += ["\n".join(block) for block in imports.values() if block]
    for node in dict.fromkeys(defined.values()):
        if any(defined[name] is node for name in wanted):
            begin = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
            parts.append("\n".join(lines[begin : node.end_lineno]))
            parts[-1] = parts[-1] if isinstance(node, ast.Assign) else "\n" + parts[-1]
    return "\n\n".join(parts) + "\n"


def quote(text: str) -> str:
    """`text` with {path.json:key.key:format} replaced by that number of the results."""

    def number(match: re.Match) -> str:
        file, keys, form = match.groups()
        try:
            value = json.loads((HERE / file).read_text())
            for key in keys.split("."):
                value = value[int(key) if isinstance(value, list) else key]
            return format(value, form)
        except (OSError, KeyError, IndexError, ValueError, TypeError):
            raise ValueError(f"{file} has no {keys}; mend the key of the written question") from None

    return re.sub(r"\{([\w/.-]+\.json):([\w.-]+):([^}]*)\}", number, text)


def handout(a: Assignment) -> str:
    """handout.md with the points, questions and commands filled in."""
    text = (a.folder / "handout.md").read_text()
    points = {b.question: b.points for b in a.blanks} | {w["question"]: w["points"] for w in a.written}
    where = {b.question: f"`{b.file}`: " + ", ".join(f"`{f}`" for f in b.functions) for b in a.blanks}
    rows = [f"| {b.question} | {b.title} | {where[b.question]} | {b.points:g} |" for b in a.blanks]
    for w in a.written:
        place = "graded by training" if w.get("automatic") else "`answers.md`"
        rows.append(f"| {w['question']} | {w['title']} | {place} | {w['points']:g} |")
    table = "| question | what | where | points |\n|---|---|---|---|\n" + "\n".join(rows)
    table += f"\n| | total | | {sum(points.values()):g} |"
    commands = "```\n" + "\n".join(a.commands) + "\n```"
    text = text.replace("{title}", a.title).replace("{questions}", table).replace("{commands}", commands)
    written = [f"**{w['question']}. {w['title']}** ({w['points']:g} points). {w['prompt'].strip()}" for w in a.written]
    return text.replace("{written}", "\n\n".join(written))


def answers(a: Assignment, keys: bool) -> str:
    """answers.md: the written questions with room for the answers, or with the keys point by point."""
    parts = [f"# {a.title}: written questions"]
    for w in [w for w in a.written if not w.get("automatic")]:
        parts.append(f"## {w['question']}. {w['title']} ({w['points']:g} points)\n\n{w['prompt'].strip()}")
        parts.append("\n".join(f"- ({p:g}) {quote(text)}" for p, text in w["key"]) if keys else "Your answer:")
    return "\n\n".join(parts) + "\n"


def notebook(a: Assignment) -> str:
    """colab.ipynb from colab.py, whose cells begin with # %%."""
    text = (FOLDER / "colab.py").read_text().replace("SCRIPT_AND_FLAGS", a.smoke)
    cells = []
    for cell in text.split("# %%")[1:]:
        kind, _, source = cell.partition("\n")
        lines = source.strip().splitlines(keepends=True)
        if "markdown" in kind:
            lines = [line.removeprefix("# ").replace("TITLE", a.title) for line in lines]
            cells.append({"cell_type": "markdown", "metadata": {}, "source": lines})
        else:
            cells.append({"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": lines})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 4}, indent=1) + "\n"


def changed_files(out: Path) -> list[str]:
    """Files in student/ and solution/ that are not as the last build wrote them, and new ones; caches do not count."""
    path = out / "built.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    found = []
    for file in sorted(file for folder in ("student", "solution") for file in (out / folder).rglob("*")):
        name = file.relative_to(out)
        if file.is_dir() or any(part.endswith("cache__") or part.endswith("_cache") for part in name.parts):
            continue
        if written.get(name.as_posix()) != hashlib.sha256(file.read_bytes()).hexdigest():
            found.append(name.as_posix())
    return found


def build(a: Assignment, out: Path) -> None:
    """Write student/, solution/ and autograder.zip to `out`."""
    shared = {"requirements.txt": (HERE / "requirements.txt").read_text()}
    for file in ("checks.py", "conftest.py", "pyproject.toml", "data.md"):
        shared[file] = (FOLDER / ("checks.py" if file == "checks.py" else f"student/{file}")).read_text()
    scripts = {file: (HERE / file).read_text() for file in a.files()}
    shared |= scripts | {"test_public.py": public_tests(a), "handout.md": handout(a), "colab.ipynb": notebook(a)}
    student = shared | starter(a) | {"answers.md": answers(a, keys=False)}
    solution = shared | {"answers.md": answers(a, keys=True)}
    written = {}
    for folder, files in (("student", student), ("solution", solution)):
        shutil.rmtree(out / folder, ignore_errors=True)
        (out / folder).mkdir(parents=True)
        for name, text in files.items():
            (out / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (out / folder / name).write_text(text, encoding="utf-8")
            written[f"{folder}/{name}"] = hashlib.sha256((out / folder / name).read_bytes()).hexdigest()
    (out / "built.json").write_text(json.dumps(written, indent=1) + "\n")
    grader = ["homework.py", *closure(["homework.py"])[1:], *scripts, "requirements.txt"]
    grader += [f"{FOLDER.name}/{name}" for name in ("build.py", *JUDGES)]
    grader += [f"{FOLDER.name}/{a.name}/{name}" for name in ("assignment.toml", "tests.py")]
    packed = {name: (HERE / name).read_text() for name in dict.fromkeys(grader)}
    for name in ("setup.sh", "run_autograder"):
        text = (FOLDER / "gradescope" / name).read_text()
        packed[name] = text.replace("ASSIGNMENT", f"{a.name} --level {a.level}")
    with zipfile.ZipFile(out / "autograder.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(packed.items()):
            info = zipfile.ZipInfo(name, (2000, 1, 1, 0, 0, 0))  # the same bytes from the same scripts
            info.external_attr = (0o755 if name in ("setup.sh", "run_autograder") else 0o644) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, text)
