"""reproduce.py: runs once what is not done, survives kills, and knows which results the code has left behind."""

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.images.omniglot import ARCHIVES

import gc
import hashlib
import json
import shlex
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import imageio.v3 as imageio
import numpy as np
import pytest
from conftest import REPO, one_line_error
from test_others import write_mnist

import reproduce
from studies import ledger, pulse, runner, status, warm
from studies.ledger import Case, cases_of, code_of, make_jobs

SMOKE = ["hw1", "--scale", "smoke", "--only", "K1N2", "--dataset", "glyphs", "--device", "cpu"]


def start(out, work, *flags):
    return warm.Process(REPO / "reproduce.py", *SMOKE, "--out", out, *flags, cwd=work)


def result(out):
    return json.loads((out / "hw1" / "K1N2_seed1.json").read_text())


@pytest.fixture(scope="module")
def done(work, tmp_path_factory):
    """The results of one uninterrupted run."""
    out = tmp_path_factory.mktemp("reproduce")
    child = start(out, work)
    _, err = child.communicate(timeout=3600)
    assert child.returncode == 0, err
    return out


def test_leaves_results_and_a_ledger(done):
    metrics, ledger = result(done), json.loads((done / "reproduce.json").read_text())
    assert metrics["dataset"] == "glyphs" and metrics["steps"] == 40
    assert [step for step, _ in metrics["curves"]["Accuracy/test"]] == [20, 40]
    assert ledger["hw1/K1N2_seed1"]["minutes"] > 0
    assert "python hw1.py" in ledger["hw1/K1N2_seed1"]["command"]
    assert len(metrics["accuracies"]) == metrics["num_test_tasks"] and metrics["flags"]["num_classes"] == 2
    assert "--run_name" not in metrics["command"] and "--log_dir" not in metrics["command"]


def test_a_second_time_nothing_runs(done, work):
    before = (done / "hw1" / "K1N2_seed1.json").stat().st_mtime_ns
    child = start(done, work)
    out, _ = child.communicate(timeout=3600)
    assert child.returncode == 0 and "1 of 1 runs are done already" in out
    assert (done / "hw1" / "K1N2_seed1.json").stat().st_mtime_ns == before


@pytest.mark.thorough
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_started_again_nothing_is_lost_or_twice(done, work, tmp_path, sent):
    """The run's process ends with reproduce.py, and the second start resumes it to the same figure."""
    child = start(tmp_path, work)
    runs = tmp_path / "runs"
    deadline = time.time() + 3600
    while not list(runs.glob("hw1_K1N2*/flags.json")) and child.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    child.send_signal(sent)
    child.communicate(timeout=3600)
    assert child.returncode == (-9 if sent == signal.SIGKILL else 130)
    again = start(tmp_path, work)
    _, err = again.communicate(timeout=3600)
    assert again.returncode == 0, err
    assert len(list(runs.glob("hw1_K1N2*/metrics.json"))) == 1 and len(list((tmp_path / "hw1").iterdir())) == 1
    assert result(tmp_path)["test_accuracy"] == result(done)["test_accuracy"]
    assert result(tmp_path)["curves"]["Accuracy/test"] == result(done)["curves"]["Accuracy/test"]


def test_the_ledger_counts_minutes_before_an_interruption(tmp_path, monkeypatch):
    """A run that trained for ten minutes and ended just before it was collected."""
    monkeypatch.setattr(status, "known_pulse", lambda case: PULSE)
    job = make_jobs(cases_of("hw1"), "cpu", "cpu", "auto")[0]
    folder = tmp_path / "runs" / job.folder
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"train_seconds": 600}))
    assert runner.run_all([job], set(), tmp_path, tmp_path / "runs", 1) == []
    assert json.loads((tmp_path / "reproduce.json").read_text())[job.name]["minutes"] == 10


PULSE = {"losses": [0.7, 0.6], "parameters": ["a"], "figures": {"test_accuracy": 0.5}, "on": {"processor": "p"}}


def test_the_key_is_of_script_flags_and_dataset():
    def keys(device="cpu", dataset="auto"):
        return [job.key for job in make_jobs(cases_of("hw1"), "cpu", device, dataset)]

    first = keys()
    assert keys() == first and len(set(first)) == len(first) > 15
    assert keys("cuda") == first  # the same figures are wanted there
    assert not set(keys(dataset="glyphs")) & set(first)


def test_where_two_pulses_part():
    other = PULSE | {"losses": [0.7, 0.61]}
    assert pulse.difference(PULSE, PULSE) is None
    assert pulse.difference(PULSE, other) == "loss of step 2: 0.6 -> 0.61"
    assert pulse.difference(PULSE, PULSE | {"parameters": ["b"]}) == "parameters after step 2"
    assert pulse.difference(PULSE, PULSE | {"figures": {"test_accuracy": 0.4, "new": 1}}) == "test_accuracy: 0.5 -> 0.4"
    assert pulse.difference(PULSE, PULSE | {"losses": [0.7]}) == "2 -> 1 steps"
    noise = [PULSE | {"figures": {"oracle": value}} for value in (1.0e-32, 1.2e-32, 1e-19)]
    assert pulse.difference(noise[0], noise[1]) is None
    assert pulse.difference(noise[0], noise[2]) == "oracle: 1e-32 -> 1e-19"


def test_threads_may_ask_for_the_digest_of_the_code_at_once():
    """While one reads the imports, the garbage collector lets another begin: Python 3.11 then raised SystemError."""
    seen, thresholds = [], gc.get_threshold()
    ledger.imports_of.cache_clear()
    gc.callbacks.append(lambda phase, info: (seen.append(phase), time.sleep(1e-4)))
    gc.set_threshold(100)
    try:
        with ThreadPoolExecutor(4) as pool:
            digests = list(pool.map(code_of, ["glyphs.py"] * 8))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.pop()
    assert seen and len(set(digests)) == 1


def test_status_tells_the_states_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cases = [
        Case(name, f"--num_classes {n}", script="hw1.py", method="hw1")
        for n, name in enumerate(("same", "confirmed", "drifted", "flag", "broken", "missing"), start=2)
    ]
    long = Case("long", "--num_classes 9", beyond=True, script="hw1.py", method="hw1")
    monkeypatch.setattr(ledger, "all_cases", lambda: (*cases, long))
    pulses = {case.name: PULSE for case in cases} | {"drifted": PULSE | {"losses": [0.7, 0.5]}}
    pulses["broken"] = {"error": "boom"}
    monkeypatch.setattr(status, "known_pulse", lambda case, take: pulses[case.name])
    kept = ledger.Ledger(tmp_path)
    jobs = make_jobs(cases, "cpu", "cpu", "auto")
    for job in jobs[:-1]:
        kept.add(job, 1.0, PULSE)
        flags = status.flags_now(job)
        ledger.collected(job, tmp_path).parent.mkdir(exist_ok=True)
        changed = {"learning_rate": 0.5} if job.case.name == "flag" else {"hidden_dim_of_old": 3}  # a name that is gone
        ledger.collected(job, tmp_path).write_text(json.dumps({"flags": flags | changed}))
    for job in jobs[1:-1]:
        kept.entries[job.name]["code"] = "another"
    experiment.write_json(kept.path, kept.entries)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["status", "--out", str(tmp_path), "--jobs", "2"])
    assert stop.value.code == 1  # of the one that cannot be told
    assert capsys.readouterr().out.splitlines() == [
        "waiting to be named by --only: hw1/long_seed1",
        "measured  hw1/same_seed1",
        "confirmed hw1/confirmed_seed1",
        "drifted   hw1/drifted_seed1: loss of step 2: 0.6 -> 0.5",
        "drifted   hw1/flag_seed1: --learning_rate 0.5 -> 0.004",
        "error     hw1/broken_seed1: the code of now gives no pulse: boom",
        "missing   hw1/missing_seed1: no result of this recipe",
        "1 measured, 1 confirmed, 2 drifted, 1 missing, 1 error",
    ]


def test_another_processor_compares_old_and_new_code_there(tmp_path, monkeypatch):
    """Bits that differ on another machine are no drift when the old code has the same bits there."""
    case = Case("case", script="hw1.py", method="hw1")
    (job,) = make_jobs([case], "cpu", "cpu", "auto")
    kept = ledger.Ledger(tmp_path)
    kept.add(job, 1.0, PULSE)
    here = PULSE | {"losses": [0.7, 0.60001], "on": {"processor": "q"}}
    monkeypatch.setattr(status, "known_pulse", lambda case, take: here)
    for old, drifted in ((here, None), (here | {"losses": [0.7, 0.60002]}, "loss of step 2: 0.60002 -> 0.60001")):
        monkeypatch.setattr(status, "pulse_at", lambda commit, case, take, old=old: old)
        assert status.drift(job, kept, tmp_path) == drifted
    # The slightest difference cannot be judged without the old code: nothing is tolerated.
    monkeypatch.setattr(status, "pulse_at", lambda commit, case, take: {"error": "boom"})
    with pytest.raises(status.CannotTell, match="gives no pulse: boom"):
        status.drift(job, kept, tmp_path)
    monkeypatch.setattr(status, "known_pulse", lambda case, take: here | {"on": PULSE["on"]})
    assert status.drift(job, kept, tmp_path) == "loss of step 2: 0.6 -> 0.60001"  # the same machine: bits count


def test_code_that_is_not_in_the_clone_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(status.CannotTell, match="000000000000 is not in this clone"):
        status.code_at("000000000000")


def test_a_case_that_moved_keeps_its_key_and_asks_old_code_by_its_old_name(tmp_path, monkeypatch):
    old = Case("a", "--memory attention --num_classes 3", script="hw1.py", method="hw1")
    moved = old._replace(
        recipe="--num_classes 3", script="attention.py", was="hw1.py --memory attention --num_classes 3"
    )
    (before,), (after,) = (make_jobs([case], "cpu", "cpu", "auto") for case in (old, moved))
    assert before.key == after.key
    assert after.command == before.command.replace("hw1.py --memory attention", "attention.py")
    elsewhere = old._replace(recipe=f"{old.recipe} --num_shot 2")
    assert make_jobs([elsewhere], "cpu", "cpu", "auto")[0].key != before.key
    asked = []
    kept = ledger.Ledger(tmp_path)
    kept.entries[after.name] = {"key": after.key, "pulse": "p", "command_then": before.command}
    kept.pulses["p"] = PULSE | {"commit": "c"}
    monkeypatch.setattr(status, "known_pulse", lambda case, take: PULSE | {"losses": [0.7, 0.61], "on": {}})
    monkeypatch.setattr(status, "pulse_at", lambda commit, case, take: asked.append(case) or PULSE)
    status.drift(after, kept, tmp_path)
    del kept.entries[after.name]["command_then"]  # measured since, under the new name
    status.drift(after, kept, tmp_path)
    assert [(case.script, case.recipe) for case in asked] == [
        ("hw1.py", "--memory attention --num_classes 3"),
        ("attention.py", "--num_classes 3"),
    ]


def test_the_ledger_was_only_renamed():
    """Keys are those of the recipes of today; what an entry was called before gives, word by word, its key of then."""
    entries = json.loads((REPO / "results" / "reproduce.json").read_text())
    pixels = hashlib.sha256(repr(ARCHIVES).encode()).hexdigest()[:16]
    jobs = {job.name: job for job in make_jobs(cases_of("all"), "cpu", "auto", "auto", "seed")}
    renamed = 0
    for name, entry in entries.items():
        job, (_, script, *flags) = jobs[name], shlex.split(entry.get("command_then", entry["command"]))
        assert entry["key"] == job.key and entry["command"] == job.command, name
        if "command_then" in entry or not job.start:
            words = json.dumps([script, flags[: flags.index("--device")], pixels])
            assert hashlib.sha256(words.encode()).hexdigest()[:16] == entry.get("key_then", entry["key"]), name
        path = REPO / "results" / f"{name}.json"
        if job.case.writes_its_own or not path.exists():
            continue
        result = json.loads(path.read_text())
        assert ("command_then" in result) == ("command_then" in entry), name
        if "command_then" in entry:
            renamed += 1
            assert result["command"].split()[1] == job.case.script and result["command_then"].split()[1] == script
    assert renamed >= 73


def test_the_digest_of_code_follows_packages(tmp_path):
    """Imports of modules, of names, of packages and relative ones; a change of any of them is a change of the code."""
    files = {
        "script.py": "import flat\nimport wing.room\nfrom wing import hall\nfrom wing.inner.deep import name\n",
        "flat.py": "import numpy\n",
        "wing/__init__.py": "",
        "wing/room.py": "from . import cellar\nfrom .inner import *\n",
        "wing/hall.py": "",
        "wing/cellar.py": "",
        "wing/inner/__init__.py": "from .. import attic\n",
        "wing/inner/deep.py": "from ..garden import tree\n",
        "wing/attic.py": "",
        "wing/garden.py": "",
        "wing/nobodys.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = code_of("script.py", tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(f"{text}# changed\n")
        assert (code_of("script.py", tmp_path) == before) == (name == "wing/nobodys.py"), name
        (tmp_path / name).write_text(text)


# Three recipes of two scripts, as short as can be.
TINY = {
    "hw1.py": "--num_classes 2 --hidden_dim 8 --meta_batch_size 4 --train_steps 2 --eval_freq 2 --num_val_tasks 8 "
    "--num_test_tasks 8",
    "protonet.py": "--width 4 --train_classes 5 --train_steps 3 --eval_freq 3 --num_val_tasks 4 --num_test_tasks 4 "
    "--views 1",
}


def warm_pulse(code, script, flags, scratch):
    """What pulse.take gives (a test compares the two), of a process that starts warm."""
    done = warm.run(REPO / "studies" / "pulse.py", code, script, *flags, cwd=scratch, env=pulse.STEADY)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"error": done.stderr}


@pytest.fixture(scope="module")
def copies(work, tmp_path_factory):
    """copies(edit): {script: its pulse} of a copy of the package whose files `edit` has changed."""

    def take(edit, scripts=tuple(TINY)):
        code = tmp_path_factory.mktemp("code")
        places = [
            *REPO.glob("*.py"),
            *(file for folder in ("fewshot", "bench") for file in REPO.glob(f"{folder}/**/*")),
        ]
        files = {
            file.relative_to(REPO).as_posix(): file.read_text() for file in places if file.suffix in (".py", ".csv")
        }
        for name, text in edit(files).items():
            (code / name).parent.mkdir(parents=True, exist_ok=True)
            (code / name).write_text(text)
        flags = "--dataset glyphs --dtype float32 --device cpu --log_dir"
        return {s: warm_pulse(code, s, [*f"{TINY[s]} {flags}".split(), str(code / "runs")], work) for s in scripts}

    return take


@pytest.fixture(scope="module")
def before(copies):
    return copies(lambda files: files)


def changed(files, file, old, new):
    assert old in files[file], (file, old)
    return files | {file: files[file].replace(old, new)}


def test_a_refactoring_leaves_every_pulse_alone(copies, before):
    """A function renamed, another moved to a file of its own, and the order of two turned around."""

    def refactor(files):
        files = {name: text.replace("draw_distinct", "draw_without_repeats") for name, text in files.items()}
        episodes = "fewshot/tasks/episodes.py"
        text = files[episodes]
        begin = text.index("def distort(")
        end = text.index("\nclass EpisodeSampler", begin)
        moved = "import torch\nimport torch.nn.functional as F\n\n\n" + text[begin:end]
        first = "from fewshot.experiment import"
        text = (text[:begin] + text[end:]).replace(first, f"from distortion import distort\n{first}", 1)
        return files | {"distortion.py": moved, episodes: text}

    after = copies(refactor)
    assert all("error" not in taken for taken in after.values()), after
    assert {script: pulse.difference(before[script], after[script]) for script in TINY} == dict.fromkeys(TINY)
    assert len(before["hw1.py"]["losses"]) == 2 and len(before["protonet.py"]["losses"]) == 3


def test_an_initialisation_changed_by_a_hundredth_shows_in_the_first_step_of_what_it_touches(copies, before):
    weight = 'nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")'
    after = copies(lambda files: changed(files, "fewshot/learners/conv4.py", weight, f"{weight}.mul_(1.01)"))
    assert pulse.difference(before["hw1.py"], after["hw1.py"]) is None
    assert pulse.difference(before["protonet.py"], after["protonet.py"]).startswith("loss of step 1: ")


def test_a_default_changed_by_a_hundredth_shows_in_the_second_step(copies, before):
    rate = '"--learning_rate", type=number(above=True), default=0.1'
    after = copies(lambda files: changed(files, "protonet.py", rate, rate + "01"), ["protonet.py"])
    assert pulse.difference(before["protonet.py"], after["protonet.py"]).startswith("loss of step 2: ")


def test_another_order_of_the_queries_shows_in_the_first_step(copies, before):
    order = "generator=g, device=device).argsort(dim=1)"
    after = copies(
        lambda files: changed(files, "fewshot/tasks/episodes.py", order, order[:-1] + ", descending=True)"), ["hw1.py"]
    )
    assert pulse.difference(before["hw1.py"], after["hw1.py"]).startswith("loss of step 1: ")


@pytest.mark.thorough
def test_a_pulse_is_the_same_twice_and_a_failure_is_named(before, work, tmp_path):
    flags = flags_of("hw1.py", tmp_path)
    again = pulse.take(REPO, "hw1.py", flags, work)
    assert again == before["hw1.py"] and again["parameters"][0] and again["figures"]["test_accuracy"] <= 1
    failed = pulse.take(REPO, "hw1.py", ["--learning_rate", "nan"], work)
    assert failed == {"error": failed["error"]} and "nan" in failed["error"]
    with pulse.WarmProcesses() as processes:  # one that stays warm has the same bits, however often it is asked
        ask = lambda script, flags: processes.take(REPO, script, flags, work)
        assert ask("protonet.py", flags_of("protonet.py", tmp_path)) == before["protonet.py"]
        assert [ask("hw1.py", flags) for _ in range(2)] == [again, again] and len(processes.idle) == 1
        assert ask("hw1.py", ["--learning_rate", "nan"]) == failed
        assert "no_such_script" in ask("no_such_script.py", [])["error"]
        assert ask("hw1.py", flags) == again


def flags_of(script, folder):
    return f"{TINY[script]} --dataset glyphs --dtype float32 --device cpu --log_dir {folder}".split()


def test_the_code_of_either_layout_is_asked(tmp_path, work):
    """Run lies in experiment.py at the top or in fewshot/experiment/run.py; a folder with neither says so."""
    run = "class Run:\n    tracked = {}\n    def record(self, loss): pass\n    def steps(self): yield 1\n"
    script = "\n\ndef main(flags):\n    run = Run()\n    for _ in run.steps():\n        run.record(float(flags[0]))\n"
    layouts = {"old": "experiment.py", "new": "fewshot/experiment/run.py"}
    for name, file in layouts.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text(run)
        module = file.removesuffix(".py").replace("/", ".")
        (tmp_path / name / "script.py").write_text(f"from {module} import Run{script}    return {{'figure': 3}}\n")
        taken = pulse.take(tmp_path / name, "script.py", ["0.5"], work)
        assert (taken["losses"], taken["figures"]) == ([0.5], {"figure": 3})
    assert "has no fewshot/experiment/run.py" in pulse.take(tmp_path, "script.py", [], work)["error"]


def test_every_pulse_crosses_the_phases_of_its_recipe():
    """Warm-up and MAML, halves of --query_norm, pre-training and fine-tuning, an evaluation before the last step."""
    for case in cases_of("all"):
        if case.writes_its_own or case.tests:  # a test has the pulse of the run it tests
            continue
        module = __import__(case.script.removesuffix(".py"))
        args = module.parse_args(f"{status.length_of(case)} {case.recipe}".split())
        assert args.eval_freq < args.train_steps, case
        if "--warmup_steps 0" in case.recipe:
            assert args.warmup_steps == 0
        elif case.script == "maml.py":
            assert 0 < args.warmup_steps < args.train_steps - args.eval_freq + 1, case
        if case.script == "transfer.py":
            assert args.finetune_steps >= 2 and args.train_steps - args.finetune_steps >= 2
        if case.script == "meta_lstm.py" and args.query_norm == "both":
            assert args.train_steps >= 4  # two steps of either half
        full = module.parse_args(f"{case.recipe} {case.cpu}".split())
        for flag in ("first_order", "head", "encoder", "recurrent", "query_norm", "second_order", "fixed_pool"):
            assert getattr(args, flag, None) == getattr(full, flag, None), (case, flag)  # the length changes no method


def test_only_chooses_runs_by_parts_of_their_names():
    def names(only: str) -> set[str]:
        return {job.name for job in make_jobs(cases_of("maml"), "cpu", "cpu", "auto", only)}

    assert names("anil_seed1,maml_seed1") == {f"maml/{m}_seed1" for m in ("anil", "maml", "fomaml", "protomaml")}
    assert names("maml/maml_seed1") == {"maml/maml_seed1"}
    assert len(names("seed")) > len(names("seed1")) > 3 and not names("nothing")


def test_what_three_hours_cannot_hold_waits_to_be_named():
    def names(scale: str, only: str = "") -> set[str]:
        return {job.name for job in make_jobs(cases_of("all"), scale, "cpu", "auto", only)}

    beyond = {f"maml/20way{case}_seed1" for case in ("1shot", "5shot", "5shot_muon")}
    beyond.add("memorization/basis_maml_none_seed1")
    assert not beyond & names("cpu") and beyond < names("full")
    some = "maml/20way1shot_seed1,maml/20way5shot_seed1,20way5shot_muon_seed1,basis_maml_none_seed1"
    assert names("cpu", some) == beyond
    assert sum(case.minutes * case.seeds for case in cases_of("all") if not case.beyond) <= 2 * 180


def test_the_smallest_form_leaves_out_what_only_has_other_numbers():
    def jobs(scale: str, dataset: str) -> list:
        return make_jobs(cases_of("all"), scale, "cpu", dataset, "seed")

    names = {job.name for job in jobs("smoke", "glyphs")}
    assert {"hw1/K1N2_seed1", "maml/5way5shot_seed1", "meta_lstm/5way1shot_pool_seed1"} < names
    assert not {"hw1/K2N2_seed1", "maml/20way1shot_seed1", "meta_lstm/5way5shot_seed1"} & names
    assert {job.case.script for job in jobs("smoke", "glyphs")} == {job.case.script for job in jobs("cpu", "omniglot")}


@pytest.fixture
def two_cases(tmp_path, monkeypatch):
    """A training as short as can be and a test of it on MNIST's digits; what they come to, and how to ask for them."""
    write_mnist(tmp_path / "digits")
    monkeypatch.setenv("MNIST_DIR", str(tmp_path / "digits"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(status, "known_pulse", lambda case, take=None: PULSE)
    own = {"beyond": True, "script": "protonet.py", "method": "protonet"}
    train = Case("a", f"{TINY['protonet.py']} --dataset glyphs", **own)
    recipe = "--test --dataset mnist --num_classes 3 --num_query 2 --num_test_tasks 4"
    test = Case("mnist_a", recipe, start="protonet/a", **own)
    monkeypatch.setattr(ledger, "all_cases", lambda: (test, train))

    def ask(only):
        reproduce.main(["protonet", "--only", only, "--out", str(tmp_path / "out"), "--device", "cpu", "--jobs", "2"])
        return [read_result(tmp_path, name) for name in ("a", "mnist_a")]

    return ask


def read_result(folder, name):
    path = folder / "out" / "protonet" / f"{name}_seed1.json"
    return json.loads(path.read_text()) if path.exists() else None


@pytest.mark.thorough
def test_a_test_trains_what_it_tests_where_that_is_not_there(two_cases, tmp_path):
    trained, tested = two_cases("mnist_a")
    assert trained["dataset"] == "glyphs" and tested["dataset"] == "mnist" and "curves" not in tested
    assert len(tested["accuracies"]) == 4 and (tested["N"], tested["flags"]["width"]) == (3, 4)
    assert "--checkpoint runs/reproduce_cpu/protonet_a_seed1_" in tested["command"]
    assert "--out" not in tested["command"] and "report_file" not in tested["flags"]
    ledger = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert set(ledger) == {"protonet/a_seed1", "protonet/mnist_a_seed1"}
    # Where its result stands in the ledger and only the weights are missing, they are made; the result stays.
    shutil.rmtree(tmp_path / "runs" / "reproduce_cpu")
    del ledger["protonet/mnist_a_seed1"]
    (tmp_path / "out" / "reproduce.json").write_text(json.dumps(ledger))
    (tmp_path / "out" / "protonet" / "mnist_a_seed1.json").unlink()
    kept = tmp_path / "out" / "protonet" / "a_seed1.json"
    kept.write_text(json.dumps(trained | {"remark": "of another machine"}))
    again, tested_again = two_cases("mnist_a")
    assert again["remark"] and tested_again["accuracies"] == tested["accuracies"]


@pytest.mark.thorough
def test_a_drifted_run_is_trained_anew_and_not_collected_again(two_cases, tmp_path, monkeypatch):
    two_cases("protonet/a")
    (run,) = (tmp_path / "runs" / "reproduce_cpu").glob("protonet_a_seed1_*")
    old = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(old | {"test_accuracy": 2}))
    ledger = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    ledger["protonet/a_seed1"]["code"] = "older"
    (tmp_path / "out" / "reproduce.json").write_text(json.dumps(ledger))
    monkeypatch.setattr(status, "known_pulse", lambda case, take=None: PULSE | {"losses": [0.7, 0.5]})
    trained, _ = two_cases("protonet/a")
    assert trained["test_accuracy"] == old["test_accuracy"]
    ledger = json.loads((tmp_path / "out" / "reproduce.json").read_text())
    assert ledger["protonet/a_seed1"]["code"] != "older"


@pytest.mark.thorough
def test_a_failed_start_is_named_once(two_cases, tmp_path, monkeypatch, capsys):
    test, train = ledger.all_cases()
    broken = train._replace(recipe=f"{train.recipe} --data_folder nowhere --dataset folder")
    monkeypatch.setattr(ledger, "all_cases", lambda: (test, broken))
    with pytest.raises(SystemExit):
        two_cases("mnist_a,protonet/a")
    assert capsys.readouterr().err.count("protonet/a_seed1: exit code 2") == 1


def test_a_run_that_starts_from_another_names_that_run():
    """The weights of the same seed; at smoke scale and for the pulse it starts afresh."""
    jobs = {job.name: job for job in make_jobs(cases_of("mae"), "cpu", "cpu", "omniglot", "seed")}
    before, after = jobs["mae/mae_seed2"], jobs["mae/vit_50_characters_from_mae_seed2"]
    assert after.flags[after.flags.index("--init_from") + 1] == f"runs/reproduce_cpu/mae_mae_seed2_{before.key}"
    afresh = jobs["mae/vit_50_characters_seed2"]
    assert "--init_from" not in afresh.flags and "--learning_rate" not in afresh.flags
    smoke = make_jobs(cases_of("mae"), "smoke", "cpu", "glyphs")
    assert not any("--init_from" in job.flags for job in smoke)


@pytest.mark.thorough
def test_a_failure_is_named_and_the_others_run(monkeypatch, tmp_path, capsys):
    bad = Case("bad", "--learning_rate nan", script="hw1.py", method="hw1")
    good = Case("good", "--num_classes 2", script="hw1.py", method="hw1")
    monkeypatch.setattr(ledger, "all_cases", lambda: (bad, good))
    flags = ["hw1", "--scale", "smoke", "--out", str(tmp_path), "--dataset", "glyphs", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(flags)
    assert stop.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "hw1/bad_seed1: exit code 2: error: " in line and "--learning_rate" in line
    assert (tmp_path / "hw1" / "good_seed1.json").exists() and not (tmp_path / "hw1" / "bad_seed1.json").exists()


ALL = cases_of("all", "mini imagenet")


@pytest.mark.parametrize(
    "job",
    make_jobs(ALL, "cpu", "cpu", "auto") + make_jobs(ALL, "full", "cpu", "auto"),
    ids=lambda job: job.name,
)
def test_every_command_parses(job, tmp_path, monkeypatch):
    module = __import__(job.case.script.removesuffix(".py"))
    if job.case.tests:  # it reads the flags of the run it tests
        flags = experiment.flags_of(module.parse_args(job.start.flags))
        saved = tmp_path / job.flags[job.flags.index("--checkpoint") + 1]
        saved.mkdir(parents=True)
        of_run = {"script": module.__name__, "dataset": "omniglot", "command": "", "flags": flags}
        experiment.write_json(saved / "flags.json", of_run)
        monkeypatch.chdir(tmp_path)
    args = module.parse_args(job.flags)
    assert args.random_seed == job.seed
    sinusoids = job.case.method in ("memorization", "bayes")
    # A character of Omniglot has 20 images.
    if getattr(args, "dataset", "folder") not in ("folder", "mnist") and not sinusoids:
        assert args.num_shot + max(getattr(args, "num_query", 1), getattr(args, "train_query", 0)) <= 20


@pytest.mark.slow  # its command runs in its smallest form among those of the pages
def test_mini_imagenet_is_measured_where_its_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for c in range(5):
            folder = tmp_path / "mini" / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(4):
                imageio.imwrite(folder / f"{i}.png", rng.integers(0, 255, (84, 84, 3), dtype=np.uint8))
    flags = ["--scale", "smoke", "--device", "cpu", "--out", str(tmp_path / "out"), "--only", "miniImagenet_5way1shot"]
    reproduce.main(["meta_lstm", *flags, "--mini_imagenet", str(tmp_path / "mini")])
    metrics = json.loads((tmp_path / "out" / "meta_lstm" / "miniImagenet_5way1shot_seed1.json").read_text())
    assert metrics["parameters"] == 32901  # the learner's on 84 x 84 colour images
    with pytest.raises(UserError, match="--mini_imagenet nowhere has no train/"):
        reproduce.parse_args(["meta_lstm", "--mini_imagenet", "nowhere"])


def test_bad_flags_get_one_line(run_script, tmp_path):
    one_line_error(run_script("reproduce.py", "run", "hw1", "--jobs", "0"), "--jobs")
    one_line_error(run_script("reproduce.py", "everything"), "everything")
    one_line_error(run_script("reproduce.py", "hw1", "--only", "nothing", "--out", tmp_path / "o"), "--only nothing")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a folder"):
        reproduce.parse_args(["hw1", "--out", str(tmp_path / "file")])


def test_the_parts_of_before_name_the_methods_of_now(capsys, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        reproduce, "status", lambda jobs, *_: asked.extend(jobs) or {j.name: ("measured", "") for j in jobs}
    )
    reproduce.main(["mann", "--only", "seed1", "--out", str(tmp_path)])
    assert {job.case.method for job in asked} == {"hw1", "attention", "external_memory"}
    assert capsys.readouterr().err.splitlines()[0] == "mann is now hw1, attention, external_memory"
