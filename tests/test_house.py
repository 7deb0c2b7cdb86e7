"""The house: which room may call which, how large the front door is, that nothing stands twice, and that every
committed result tells where it comes from."""

import ast
import json
import re
from collections import defaultdict

import pytest
from conftest import REPO

FLOORS = [  # a room imports only from floors below its own; ground rooms import experiment.py at most
    {"experiment", "replay"},
    {"backbone", "omniglot", "glyphs"},
    {"memory", "leaks"},
    {"load_data", "mlp"},
    {"tasks"},
    {"hw1", "attention", "external_memory", "protonet", "transfer", "maml", "meta_lstm", "profile_costs",
      "feature_weights", "memorization", "bayes", "mae"},
    {"page", "peers"},
    {"predict", "benchmark", "homework"},
    {"reproduce", "ship", "growth"},
]  # fmt: skip
FLOOR = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(path) -> set[str]:
    """Rooms that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
    return found & FLOOR.keys()


def test_every_script_says_first_how_threads_wait():
    """experiment.py sets OMP_WAIT_POLICY, which counts only before torch is loaded."""
    scripts = [path for path in REPO.glob("*.py") if "experiment.run_script(" in path.read_text()]
    assert len(scripts) > 12
    for path in scripts:
        if path.name == "experiment.py":
            continue
        nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [getattr(node, "module", None) or node.names[0].name for node in nodes]
        assert names[:2] == ["__future__", "experiment"], path.name


def test_every_room_has_a_floor_and_no_arrow_runs_upwards():
    rooms = {path.stem for path in REPO.glob("*.py")}
    assert rooms == FLOOR.keys(), "a new file at the top needs a floor here and a line in the README's tree"
    upwards = [
        f"{room} -> {other}"
        for room in rooms
        for other in imports_of(REPO / f"{room}.py")
        if FLOOR[other] >= FLOOR[room]
    ]
    assert not upwards


def test_a_study_imports_no_method():
    """It reads results and names scripts; the images of load_data.py, for a picture, are no method."""
    methods = {path.stem for path in (REPO / "studies").glob("*.py")} & FLOOR.keys() - {"load_data"}
    assert len(methods) > 8
    for path in (REPO / "studies").glob("*.py"):
        assert not imports_of(path) & methods, path.name
        assert len(path.read_text().splitlines()) <= 450, path.name


def test_the_front_door_is_small_and_names_every_room():
    readme = (REPO / "README.md").read_bytes()
    assert len(readme) <= 12_500
    missing = [room for room in FLOOR if f"{room}.py" not in readme.decode()]
    assert not missing


def code_lines(path) -> list[tuple[int, str]]:
    """The lines that count, without white space: no blank lines, comments, imports or lone punctuation."""
    lines = [(n, "".join(line.split())) for n, line in enumerate(path.read_text().splitlines(), start=1)]
    return [(n, line) for n, line in lines if re.search(r"\w", line) and not line.startswith(("#", "import", "from"))]


def test_no_run_of_ten_lines_stands_twice(run=10):
    places = defaultdict(set)
    for path in [*REPO.glob("*.py"), *REPO.glob("homework/*.py")]:
        lines = code_lines(path)
        for i in range(len(lines) - run + 1):
            places["\n".join(line for _, line in lines[i : i + run])].add(f"{path.name}:{lines[i][0]}")
    assert not [sorted(found) for found in places.values() if len(found) > 1]


RESULTS = sorted((REPO / "results").glob("*/*_seed*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_result_tells_the_whole_truth_of_its_run(path):
    result = json.loads(path.read_text())
    assert result["command"].startswith("python ") and "--resume" not in result["command"]
    assert not re.search(r"--(log_dir|run_name)|/tmp/", result["command"])
    assert re.fullmatch(r"[0-9a-f]{7,40}", result["git_commit"]), "the tree was dirty"
    assert result["flags"]["random_seed"] == result["seed"] and result["processor"] and result["versions"]["torch"]
    if result["script"] in ("hw1", "attention", "external_memory", "protonet", "maml", "meta_lstm", "transfer", "mae"):
        of_digits, only_tested = path.stem.startswith("mnist_"), "--test" in result["command"]
        assert re.fullmatch(r"[0-9a-f]{64}", result["dataset_digest"])
        assert result["dataset"] == ("mnist" if of_digits else "omniglot")
        assert result["num_test_tasks"] >= 600 and (only_tested or result["curves"]) and only_tested >= of_digits
        assert len(result["accuracies"]) == result["num_test_tasks"]
        mean = sum(result["accuracies"]) / len(result["accuracies"])
        assert mean == pytest.approx(result["test_accuracy"], abs=1e-4)


def test_every_race_and_every_study_tells_its_command_and_commit():
    read = lambda name: json.loads((REPO / "results" / name).read_text())
    told = [*read("speed.json"), read("profile_costs/costs.json"), read("growth.json"), read("shipped.json")]
    told += [*read("profile_costs/costs_train.json").values(), *read("feature_weights/features.json").values()]
    for result in told:
        assert result["command"].startswith("python ") and "--resume" not in result["command"]
        assert re.fullmatch(r"[0-9a-f]{7,40}", result["git_commit"]), "the tree was dirty"


def test_every_result_stands_in_the_ledger():
    ledger = json.loads((REPO / "results" / "reproduce.json").read_text())
    pulses = json.loads((REPO / "results" / "pulses.json").read_text())
    assert all(entry["pulse"] in pulses for entry in ledger.values())
    assert all("+" not in (pulse["commit"] or "+") for pulse in pulses.values())
    named = {f"{path.parent.name}/{path.stem}" for path in RESULTS}
    assert named <= ledger.keys()
