"""Every command of the README and of docs/ runs, in its smallest form; so does the method of docs/add_a_method.md."""

import importlib
import json
import re
import shlex
import shutil
import subprocess

import imageio.v3 as imageio
import numpy as np
import pytest
from conftest import REPO

import reproduce
from bench import races
from studies import report, warm

DOCUMENTS = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
GLYPHS = "--dataset glyphs --device cpu"
# What makes a run small; these flags replace those of a command, all others stay.
SMALLEST = {
    **dict.fromkeys(
        ("attention.py", "external_memory.py"),
        f"--train_steps 2 --eval_freq 1 --num_val_tasks 4 --num_test_tasks 4 --meta_batch_size 2 {GLYPHS}",
    ),
    "hw1.py": f"--train_steps 2 --eval_freq 1 --num_val_tasks 4 --num_test_tasks 4 --meta_batch_size 2 {GLYPHS}",
    "protonet.py": "--train_steps 2 --eval_freq 1 --num_val_tasks 2 --num_test_tasks 2 --meta_batch_size 1 --width 8 "
    f"--num_query 1 --views 1 --train_classes 5 {GLYPHS}",
    "transfer.py": "--train_steps 4 --finetune_steps 2 --eval_freq 2 --num_test_tasks 2 --width 4 --meta_batch_size 32 "
    f"--head_steps 2 {GLYPHS}",
    "maml.py": "--train_steps 2 --warmup_steps 1 --eval_freq 1 --num_val_tasks 2 --num_test_tasks 2 --width 4 "
    f"--meta_batch_size 1 --num_query 1 --train_query 1 --train_classes 5 {GLYPHS}",
    "meta_lstm.py": "--train_steps 2 --eval_freq 1 --num_val_tasks 2 --num_test_tasks 2 --meta_batch_size 1 "
    f"--inner_epochs 1 --num_query 1 --train_query 1 {GLYPHS}",
    "mae.py": f"--smoke --train_steps 2 --eval_freq 2 --width 8 --depth 1 --meta_batch_size 4 --views 1 "
    f"--whitening_images 20 {GLYPHS}",
    "memorization.py": f"--smoke --train_steps 2 --eval_freq 1 --num_val_tasks 2 --num_test_tasks 2 {GLYPHS}",
    "bayes.py": f"--smoke --train_steps 2 --eval_freq 1 --num_val_tasks 2 --num_test_tasks 2 --test_samples 2 {GLYPHS}",
    "profile_costs.py": "--smoke --outer_steps 2 --meta_batch_size 2 --hidden_dim 8",
    "feature_weights.py": "--smoke --train_steps 2 --eval_freq 1 --num_test_tasks 4 --alias_steps 20 --max_points 33",
}


def commands() -> list[str]:
    """The commands in code spans and code blocks, K and N filled in, each once."""
    found = set()
    for page in DOCUMENTS:
        text = re.sub(r"```python .*?```", "", page.read_text(), flags=re.DOTALL)  # the skeleton has its own test
        text = re.sub(r"runs/reproduce_\w+/\w+", "RUN_DIR", text)
        for name, rest in re.findall(r"(?:python3?|nproc_per_node=\d) (\w+\.py)([^`|\n&]*)", text):
            found.add(f"{name} {rest.replace(' K ', ' 1 ').replace(' N ', ' 2 ').strip()}".strip())
    return sorted(found)


def smallest(script: str, flags: list[str]) -> list[str]:
    """`flags` with those of SMALLEST in place of theirs."""
    small = shlex.split(SMALLEST[script])
    kept, typed = [], iter(flags)
    for flag in typed:
        if flag.startswith("--") and flag in small and flag != "--smoke":
            value = next(typed)
            if (flag, value) == ("--warmup_steps", "0") or (flag, value) == ("--dataset", "folder"):
                small[small.index(flag) + 1] = value
        elif flag != "--smoke":
            kept.append(flag)
    return kept + small


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """DIR, a folder of class folders of 84 x 84 colour pictures, and RUN_DIR by script, made when first asked for."""
    base, runs = tmp_path_factory.mktemp("documents"), {}
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for c in range(10):
            (base / "DIR" / split / f"class{c}").mkdir(parents=True)
            for i in range(7):
                picture = rng.integers(0, 255, (84, 84, 3), dtype=np.uint8)
                imageio.imwrite(base / "DIR" / split / f"class{c}" / f"{i}.png", picture)

    def run_dir(script: str, *shape: str) -> str:
        if (script, *shape) not in runs:
            name = "_".join([script.removesuffix(".py"), *shape])
            names = ["--log_dir", str(base), "--run_name", name]
            importlib.import_module(script.removesuffix(".py")).main([*shlex.split(SMALLEST[script]), *shape, *names])
            runs[script, *shape] = str(base / name)
        return runs[script, *shape]

    return base, run_dir


def different_commands() -> list[str]:
    """One command of each smallest form: lengths and seeds do not count."""
    found = {}
    for command in commands():
        script, *flags = shlex.split(command.removesuffix(" --random_seed 1"))
        if script in SMALLEST:
            found.setdefault((script, *smallest(script, flags)), command)
    # The transformer's commands with few characters take long and differ in nothing else: test_mae.py has one of them.
    slow = lambda command: "--encoder vit" in command and "--train_characters" in command
    front = (REPO / "README.md").read_text()
    marks = lambda command: (
        [pytest.mark.slow] if slow(command) else [] if f"python {command}" in front else [pytest.mark.thorough]
    )
    return [pytest.param(command, marks=marks(command)) for command in found.values()]


@pytest.mark.parametrize("command", different_commands())
def test_every_command_runs_in_its_smallest_form(command, folders):
    base, run_dir = folders
    script, *flags = shlex.split(command)
    data = str(base / "DIR")
    filled = [data if flag in ("DIR", "miniImagenet") else flag for flag in flags]
    if "RUN_DIR" in flags:
        starts, transformer = "--init_from" in flags, "vit" in flags
        owner = "mae.py" if transformer and starts else "protonet.py" if starts or script == "predict.py" else script
        shape = ()
        if starts:  # of the size and the split of what goes on from it
            shape = ("--depth", "4") if transformer else ("--width", "4")
            shape += ("--split", "vinyals") if "vinyals" in flags else ()
        filled = [run_dir(owner, *shape) if flag == "RUN_DIR" else flag for flag in filled]
    if "--resume" in flags:
        final = filled  # a resumed run keeps its flags
    elif "--help" in flags:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script.removesuffix(".py")).main(filled)
        assert stop.value.code == 0
        return
    else:
        final = [*smallest(script, filled), "--log_dir", str(base)]
        if "--out" in flags:
            out = final.index("--out") + 1
            final[out] = str(base / final[out] if final[out].endswith(".json") else base)
    assert importlib.import_module(script.removesuffix(".py")).main(final)  # its metrics


def test_the_other_commands_are_known(run_script, tmp_path):
    """Those of the roof: they parse; reproduce.py's smallest form and the benchmarks have tests of their own."""
    for command in commands():
        script, *flags = shlex.split(command)
        if flags[:1] == ["report"]:
            report.parse_args(
                [str(tmp_path) if flag.startswith(("runs/", "RUN_DIR", "DIR")) else flag for flag in flags[1:]]
            )
        elif script == "reproduce.py":
            reproduce.parse_args([flag for flag in flags if flag not in ("--mini_imagenet", "DIR")])
        elif script == "races.py":
            assert flags[0] in ("NAME", *races.BENCHMARKS)
        else:
            assert script in SMALLEST or script in ("load_data.py", "linear.py") or (REPO / script).exists(), command


def test_the_set_up_lines_are_there():
    """.ci/run takes the second one from the README."""
    readme = (REPO / "README.md").read_text().splitlines()
    assert sum(line.startswith("python3 -m venv .venv && . .venv/bin/activate && pip install") for line in readme) == 1
    assert readme.count(". .venv/bin/activate && pytest") == 1


def test_the_method_of_the_page_trains_resumes_and_passes_its_own_test(tmp_path):
    page = (REPO / "docs" / "add_a_method.md").read_text()
    blocks = dict(re.findall(r"```python (\S+)\n(.*?)```", page, flags=re.DOTALL))
    for name, text in blocks.items():
        (tmp_path / name).write_text(text)
    assert blocks["linear.py"].strip().count("\n") < 75
    own_test = ["-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path]
    done = warm.run(*own_test, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{REPO}"})
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout + done.stderr
    if shutil.which("ruff"):
        lint = ["ruff", "check", "--ignore", "I001", "--config", str(REPO / "pyproject.toml"), str(tmp_path)]
        checked = subprocess.run(lint, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


def test_result_files_say_where_they_come_from():
    files = sorted((REPO / "results").glob("*/*_seed*.json"))
    assert files
    for file in files:
        metrics = json.loads(file.read_text())
        assert metrics["num_test_tasks"] >= 600, file
        assert metrics["command"].startswith("python ") and str(metrics["seed"]) in file.name, file
        if file.parent.name not in ("memorization", "bayes"):  # whose figures are errors, likelihoods and accuracies
            assert 0 < metrics["ci95"] < 0.02 and metrics["test_accuracy"] <= 1, file


@pytest.mark.parametrize("name", ["episodes", "mann", "protonet"])
def test_benchmarks_run(name, capsys):
    flags = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_classes", "2", "--num_query", "2"]
    [result] = races.main([name, *flags])
    assert all(v["ms"] > 0 for v in result.values() if isinstance(v, dict) and "ms" in v)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == result


def test_benchmark_of_maml_runs():
    flags = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_classes", "2", "--num_query", "1"]
    results = races.main(["maml", *flags, "--meta_batch_size", "1"])
    assert len(results) == 8 and all(len(race) == 8 for race in results)
