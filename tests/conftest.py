"""Shared by all tests: a scratch working directory with a warm data cache, and data whose answer is known."""

import contextlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from fewshot import experiment  # noqa: E402
from fewshot.images import omniglot  # noqa: E402
from fewshot.tasks.splits import Dataset  # noqa: E402

import torch  # noqa: E402

from studies import warm  # noqa: E402

has_omniglot = pytest.mark.skipif(not os.environ.get("OMNIGLOT_DIR"), reason="needs OMNIGLOT_DIR")


FIELD = ("test_field.py", "test_environment.py", "test_leaks.py")  # faults that people report
# What RECORD=1 writes to results/: which cases of FIELD were right, what the tests of
# test_faults.py counted (record_property("group/name", value)), and what a run of all
# tests gave on this Python and torch.
outcomes: dict[str, str] = {}
counted: dict[str, dict] = {}


def pytest_runtest_logreport(report):
    of_field = report.nodeid.split("::")[0].rsplit("/", 1)[-1] in FIELD
    if of_field and (report.when == "call" or report.outcome != "passed"):
        outcomes[report.nodeid.split("::")[1]] = report.outcome
    if "test_faults.py" in report.nodeid and report.when == "call" and report.passed:
        for name, value in report.user_properties:
            group, _, name = name.partition("/")
            counted.setdefault(group, {})[name] = value


def pytest_terminal_summary(terminalreporter, config):
    if not os.environ.get("RECORD"):
        return
    results = REPO / "results"
    if outcomes:
        kinds: dict[str, dict] = {}
        for test, outcome in sorted(outcomes.items()):
            kind, _, case = test.removeprefix("test_").partition("[")
            if outcome != "skipped":
                row = kinds.setdefault(kind.replace("_", " "), {"tried": 0, "right": 0, "cases": []})
                row["tried"], row["right"] = row["tried"] + 1, row["right"] + (outcome == "passed")
                row["cases"] += [case.removesuffix("]")] if case else []
        command = f"RECORD=1 pytest -n 0 -m 'not slow' {' '.join(f'tests/{file}' for file in FIELD)}"
        experiment.write_json(results / "field.json", {"command": command, "kinds": kinds})
    path = results / "faults.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for group, values in counted.items():
        found[group] = dict(sorted((found.get(group, {}) | values).items()))
    if not config.option.keyword and config.args == ["tests"]:  # all of them
        ended = ((kind, len(terminalreporter.stats.get(kind, []))) for kind in ("passed", "skipped", "failed", "error"))
        versions = experiment.versions()
        row = {"result": ", ".join(f"{n} {kind}" for kind, n in ended if n), "processor": experiment.processor()}
        found.setdefault("versions", {})[f"{versions['python']}, torch {versions['torch']}"] = row
    if found:
        experiment.write_json(path, found)


LONG = ["faults", "readme", "homework", "mae", "field", "hw1", "predict", "meta_lstm", "maml", "reproduce", "protonet"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The long files first, so that both test processes end at about the same time."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A working directory whose ./data caches, for all test processes, what the first test that needs it packs."""
    base = tmp_path_factory.getbasetemp()
    data = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "data"
    data.mkdir(exist_ok=True)
    folder = tmp_path_factory.mktemp("work")
    (folder / "data").symlink_to(data, target_is_directory=True)
    return folder


@pytest.fixture(autouse=True)
def _in_work(work, monkeypatch):
    monkeypatch.chdir(work)
    # Refused at once: no test waits for, or depends on, the network.
    monkeypatch.setattr(omniglot, "DOWNLOAD_URL", "http://127.0.0.1:9/")


@pytest.fixture(scope="session")
def run_script(work):
    """run_script("hw1.py", "--smoke", ...) in the working directory; returns the CompletedProcess.

    cold: in an interpreter of its own, for what Python reads when it starts.
    """

    def run(script, *args, env=None, cwd=work, cold=False):
        if not cold:
            return warm.run(REPO / script, *args, cwd=cwd, env=env)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
        command = [sys.executable, str(REPO / script), *map(str, args)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=3600)

    return run


@pytest.fixture(scope="session")
def trained_protonet(work, tmp_path_factory):
    """A small network trained on the glyphs for some seconds, by the first test process that asks for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "proto"
    with lock(folder.with_suffix(".lock")):
        if not (folder / "returned.json").exists():
            metrics = train_protonet(work, folder)
            (folder / "returned.json").write_text(json.dumps(metrics))
    return folder / "small", json.loads((folder / "returned.json").read_text())


@contextlib.contextmanager
def lock(path):
    """One test process at a time."""
    import fcntl

    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train_protonet(work, folder):
    import protonet

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        return protonet.main(
            [
                "--smoke",
                "--dataset",
                "glyphs",
                "--device",
                "cpu",
                "--width",
                "32",
                "--train_steps",
                "120",
                "--eval_freq",
                "60",
                "--train_classes",
                "30",
                "--num_test_tasks",
                "60",
                "--views",
                "1",
                "--log_dir",
                str(folder),
                "--run_name",
                "small",
            ]
        )


def draw_folder(folder, names, size):
    """Two noise images of size x size in a folder for each name."""
    for name in names:
        bits = np.random.default_rng(zlib.crc32(f"{folder.name}/{name}".encode()))  # no picture in two places
        (folder / name).mkdir(parents=True)
        for i in range(2):
            iio.imwrite(folder / name / f"{i}.png", bits.integers(0, 256, (size, size), np.uint8))


def known_dataset(num_classes=30, drawings=20, split=None):
    """Images that say what they are: pixel 0 is the class, pixel 1 the drawing (times 1/255)."""
    images = np.zeros((num_classes * drawings, 1, 28, 28), np.uint8)
    images[:, 0, 0, 0] = np.repeat(np.arange(num_classes), drawings)
    images[:, 0, 0, 1] = np.tile(np.arange(drawings), num_classes)
    names = [f"alphabet{c // 10}/character{c:03d}" for c in range(num_classes)]
    everything = np.arange(num_classes)
    splits = split or {"train": everything, "val": everything, "test": everything}
    counts = np.full(num_classes, drawings)
    return Dataset("folder", images, counts, names, splits, "made by a test", "0" * 64, Path("none"))


def one_line_error(result, *words):
    """Assert exit code 2, one `error:` line on stderr with all `words`, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])


def refused_in_one_line(main, flags, words, capsys):
    """Assert that main(flags) on the glyphs ends with exit code 2 and one `error:` line with these words."""
    with pytest.raises(SystemExit) as stop:
        experiment.run_script(lambda: main(["--dataset", "glyphs", *flags]))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def stirred(module, scale=0.3, seed=0):
    """The module in float64, no parameter at a special value: zero-started layers would hide what they do."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module
