"""The README's figures are those of the committed result files, and its commands parse."""

import json
import re
import shlex
import sys

import pytest
from conftest import REPO

import benchmark
import hw1
import maml
import protonet
import transfer

sys.path.insert(0, str(REPO / "results"))
import table

README = (REPO / "README.md").read_text()


def test_the_tables_are_generated():
    assert table.render(README) == README, "run: python results/table.py"
    assert re.search(r"\| 1-shot 2-way \| above 90 \| \d\d\.\d ± \d\.\d \|", README)


def test_result_files_say_where_they_come_from():
    files = sorted((REPO / "results").glob("*/*.json"))
    assert files
    for file in files:
        metrics = json.loads(file.read_text())
        assert metrics["dataset"] == "omniglot" and metrics["num_test_tasks"] >= 600, file
        assert metrics["command"].startswith("python ") and str(metrics["seed"]) in file.name, file
        assert 0 < metrics["ci95"] < 0.02 and metrics["test_accuracy"] <= 1, file


COMMANDS = sorted(set(re.findall(r"python (?:hw1|protonet|maml|transfer)\.py [^`|\n]*", README)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command):
    _, script, *flags = shlex.split(command.replace(" K ", " 1 ").replace(" N ", " 5 "))
    if "DIR" in command or "--checkpoint" in command:
        pytest.skip("needs a run folder; covered by the tests of the script")
    module = {"hw1": hw1, "protonet": protonet, "maml": maml, "transfer": transfer}[script.removesuffix(".py")]
    assert module.parse_args(flags).command.startswith(f"python {script}")


@pytest.mark.parametrize("name", ["episodes", "mann", "protonet"])
def test_benchmarks_run(name, capsys):
    flags = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_classes", "2", "--num_query", "2"]
    result = benchmark.main([name, *flags])
    assert all(v["ms"] > 0 for v in result.values() if isinstance(v, dict))
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == result


def test_benchmark_of_maml_runs():
    flags = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--num_classes", "2", "--num_query", "1"]
    results = benchmark.main(["maml", *flags, "--meta_batch_size", "1"])
    assert len(results) == 8 and all(len(r) == 8 for r in results.values())
