"""Shared by all tests: a scratch working directory with a warm data cache, and data whose answer is known."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import experiment  # noqa: E402

import warm  # noqa: E402

import load_data  # noqa: E402
import omniglot  # noqa: E402

has_omniglot = pytest.mark.skipif(not os.environ.get("OMNIGLOT_DIR"), reason="needs OMNIGLOT_DIR")


# What RECORD=1 writes to results/: of test_field.py and test_environment.py which cases were right, of test_faults.py
# what its tests counted (record_property("group/name", value)), and of a run of all tests what this Python and torch
# gave.
outcomes: dict[str, str] = {}
counted: dict[str, dict] = {}


def pytest_runtest_logreport(report):
    of_field = "test_field.py" in report.nodeid or "test_environment.py" in report.nodeid
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
        command = "RECORD=1 pytest -m 'not slow' tests/test_field.py tests/test_environment.py"
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


# Parts of the names of tests that together take nearly as long as all others: rare accidents, whole trainings, races.
# `pytest` leaves them out, .ci/run has them.
THOROUGH = (
    "benchmark",
    "test_two_processes_have_the_meta_gradient_of_one",
    "test_two_processes_train_the_network_of_one",
    "test_a_killed_worker_ends_the_whole_run",
    "test_images_of_one_and_of_25_million_pixels_are_read[5000]",
    "test_batch_norm_over_two_processes",
    "test_the_autograder_as_gradescope_runs_it",
    "test_the_notebook_runs_as_a_script",
    "test_the_threshold_is_of_validation_classes_alone",
    "test_interrupted_and_started_again_nothing_is_lost_or_twice",
    "test_float32_and_bfloat16_agree",
    "test_the_courses_own_loop_learns",
    "test_it_learns_and_metadata_helps",
    "test_workers_of_every_kind[spawn",
    "test_protonet_starts_from_the_encoder",
    "test_cosine_grows_as_the_formula_says",
    "test_meta_lstm.py::test_every_flag_in_a_smoke_run[flags2]",
    "test_mae.py::test_every_flag_in_a_smoke_run[flags0]",
    "test_what_needs_the_support_set_fails_without_it",
    "test_lakes_trials_in_the_report_of_other_methods[hw1",
    "test_a_test_trains_what_it_tests_where_that_is_not_there",
    "test_a_drifted_run_is_trained_anew_and_not_collected_again",
    "test_fifty_real_drawings_of_a_fresh_folder",
    "test_every_table_comes_back_bit_for_bit",
    "test_every_picture_comes_back",
    "test_smoke_runs_leave_their_figures",
    "test_attention_on_mnist_needs_no_word_of_its_memory",
    "test_a_failure_is_named_and_the_others_run",
    "test_a_pulse_is_the_same_twice_and_a_failure_is_named",
    "test_a_saved_run_tests_the_same_and_at_other_n",
    "test_the_resume_line_can_be_typed",
    "test_every_script_says_on_which_split_it_was[mae]",
    "test_every_preset_in_smoke_form[10way20shot]",
    "test_memory_grows_with_inner_steps_for_maml_and_not_for_es[loop]",
    "test_ridge_head_on_several_threads",
    "test_the_time_of_an_answer",
    "test_killed_sweep_resumes_and_a_complete_one_measures_anew",
    "test_concurrent_first_runs_share_one_cache",
    "test_how_threads_wait_is_the_users_choice",
    "test_a_hostile_function_costs_its_question_alone[endless loop]",
    "test_nothing_outside_the_folder_is_read_or_changed",
    "test_patching_what_compares_helps_nobody",
    "test_a_failed_start_is_named_once",
    "test_threads_doze_while_other_processes_need_the_cores",
    "test_denormal_numbers_count_as_zero_in_every_thread",
    "test_a_training_needs_no_console",
    "test_no_print_ends_a_program",
    "test_without_docstrings",
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    """The long files first, so that both test processes end at about the same time; the thorough tests marked."""
    place = {f"test_{name}.py": i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONG)))
    for item in items:
        if any(part in item.nodeid for part in THOROUGH):
            item.add_marker("thorough")


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
    bits = np.random.default_rng(0)
    for name in names:
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
    return load_data.Dataset("folder", images, counts, names, splits, "made by a test", "0" * 64, Path("none"))


def one_line_error(result, *words):
    """Assert exit code 2, one `error:` line on stderr with all `words`, no traceback."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], (word, lines[0])
