"""Faults of places and ways to run: names, repositories, locks, other people's folders, signals, consoles.

Counted with test_field.py in results/field.json: each test is named kind[case].
"""

from fewshot import experiment
from fewshot.experiment import UserError, files
from fewshot.experiment import run as run_folder
from fewshot.images import mnist, omniglot
from fewshot.tasks.splits import load_dataset

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, one_line_error
from PIL import Image
from test_field import TEN, draw, refused

import hw1
import predict
from studies import runner

TINY = ["--smoke", "--dataset", "glyphs", "--device", "cpu", "--hidden_dim", "8", "--meta_batch_size", "4"]
TINY += ["--train_steps", "4", "--eval_freq", "2", "--num_val_tasks", "4", "--num_test_tasks", "4", "--run_name", "a"]


def NFC(name):
    return unicodedata.normalize("NFC", name)


def NFD(name):
    return unicodedata.normalize("NFD", name)


def put(path: Path, value: int = 0) -> None:
    """A small grey picture of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)


def values(image: np.ndarray) -> torch.Tensor:
    """For predict's readers: a picture as the one value it holds."""
    return torch.tensor([int(image.flat[0])])


# ------------------------------------------------------------------------- every picture of predict.py

SUPPORT = {  # file in support/ -> value of its pixels
    "one folder deeper": ({"a/1.png": 1, "a/more/2.png": 2, "b/1.png": 3}, {"a": [1, 2], "b": [3]}, "a/more/2.png"),
    "only deeper": (
        {"a/x/y/1.png": 1, "a/x/2.png": 2, "b/1.png": 3},
        {"a": [2, 1], "b": [3]},
        "a/x/2.png, a/x/y/1.png",
    ),
    "loose": ({"a/1.png": 1, "b/1.png": 3, "loose.png": 4, "k.jpg": 5}, {"a": [1], "b": [3]}, "k.jpg, loose.png (2 in"),
    "deeper and hidden": ({"a/1.png": 1, "a/.x/2.png": 2, "b/1.png": 3}, {"a": [1], "b": [3]}, ""),
}


@pytest.mark.parametrize("case", SUPPORT)
def test_no_picture_of_the_classes_vanishes(case, tmp_path, capsys):
    files, expected, said = SUPPORT[case]
    for file, value in files.items():
        put(tmp_path / "support" / file, value)
    classes = predict.read_support(tmp_path, values)
    found = {name: classes.images[classes.labels == i, 0].tolist() for i, name in enumerate(classes.names)}
    assert found == {name: pytest.approx(v, abs=2) for name, v in expected.items()}
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == bool(said), err


QUERY = {
    "deeper": (["a/1.png", "a/monday/2.png"], ["a", "a"]),
    "deeper alone": (["a/x/y/1.png", "b/1.png"], ["a", "b"]),
    "loose and deeper": (["1.png", "zoo/x/2.png"], [None, "zoo"]),
}


@pytest.mark.parametrize("case", QUERY)
def test_no_picture_to_label_vanishes(case, tmp_path, capsys):
    files, expected = QUERY[case]
    for i, file in enumerate(files):
        put(tmp_path / "query" / file, i)
    (tmp_path / "query" / "empty").mkdir()
    names, images, truth = predict.read_query(tmp_path, values)
    assert (names, truth, images[:, 0].tolist()) == (files, expected, list(range(len(files))))
    (tmp_path / "query" / "zz").mkdir()
    put(tmp_path / "query" / "zz" / "1.png")
    (tmp_path / "query" / "zz" / "deep").mkdir()
    (tmp_path / "query" / "zz" / "deep" / "no.png").write_text("text")
    assert len(predict.read_query(tmp_path, values)[0]) == len(files) + 1
    assert "1 file could not be read as pictures: zz/deep/no.png" in capsys.readouterr().err


# ------------------------------------------------------------------------------ one name, two forms

NAMES = ["é", "ü", "가"]


@pytest.mark.parametrize("support, query", [(NFC, NFD), (NFD, NFC)])
def test_answers_are_compared_in_one_normal_form(support, query, tmp_path):
    for i, name in enumerate(NAMES):
        put(tmp_path / "support" / support(name) / "1.png", i)
        put(tmp_path / "query" / query(name) / "1.png", i)
    classes = predict.read_support(tmp_path, values)
    names, _, truth = predict.read_query(tmp_path, values)
    assert classes.names == truth == [NFC(name) for name in NAMES] and names[0] == f"{NFC('é')}/1.png"


def test_two_folders_of_one_name_are_one_class(tmp_path):
    for form in (NFC, NFD):
        put(tmp_path / "support" / form("é") / f"{len(form('é'))}.png", 9)
        draw(tmp_path / "d", [form("é")], each=2, first=len(form("é")))
    put(tmp_path / "support" / "b" / "1.png", 1)
    classes = predict.read_support(tmp_path, values)
    assert classes.names == ["b", NFC("é")] and classes.labels.tolist() == [0, 1, 1]
    draw(tmp_path / "d", TEN[:3])
    data = load_dataset("folder", str(tmp_path / "d"), image_size=12)
    assert dict(zip(data.names, data.counts.tolist(), strict=True)) == {"c0": 4, "c1": 4, "c2": 4, NFC("é"): 4}


def test_saved_classes_have_one_normal_form(tmp_path):
    network = types.SimpleNamespace(flags={"dataset": "x", "image_size": 8, "inverted": False}, channels=1)
    images = torch.zeros(2, 1, 8, 8)
    predict.save_classes(tmp_path / "c.npz", predict.Classes([NFD("é"), "b"], images, torch.arange(2)), network)
    assert predict.load_classes(tmp_path / "c.npz", network).names == [NFC("é"), "b"]


@pytest.mark.parametrize("form", [NFC, NFD])
def test_data_do_not_depend_on_the_normal_form(form, tmp_path):
    """Order, division and digest are those of the composed names: é sorts behind z, e with an accent before f."""
    names = ["e", "é", "f", "ü", "z", "が", "가", "ab"]
    draw(tmp_path / "plain", [NFC(name) for name in names])
    draw(tmp_path / "d", [form(name) for name in names])
    plain, data = (load_dataset("folder", str(tmp_path / folder)) for folder in ("plain", "d"))
    assert data.names == plain.names and data.digest == plain.digest
    assert all(np.array_equal(data.splits[part], plain.splits[part]) for part in plain.splits)


@pytest.mark.parametrize("table, disk", [(NFC, NFD), (NFD, NFC)])
def test_tables_find_pictures_and_classes_in_every_form(table, disk, tmp_path, capsys):
    labels = {"train": "aéi", "val": "ö", "test": "ü"}
    for part, letters in labels.items():
        rows = ["filename,label\n"]
        for letter in letters:
            for i in range(2):
                put(tmp_path / "d" / "images" / disk("ñ") / disk(f"{letter}{i}.png"), 100 + i)
                rows.append(f"{table('ñ')}/{table(letter)}{i}.png,{(NFC, NFD)[i](letter)}\n")
        (tmp_path / "d" / f"{part}.csv").write_text("".join(rows), encoding="utf-8")
    data = load_dataset("folder", str(tmp_path / "d"))
    assert data.names == [
        f"{part}/{NFC(x)}" for part, letters in (("test", "ü"), ("train", "aié"), ("val", "ö")) for x in letters
    ]
    assert data.counts.tolist() == [2] * 5 and capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------- the commit


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True
    ).stdout.strip()


def repository(folder: Path, *files: str) -> str:
    """A repository with these files; its commit, in twelve digits."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q")
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("x = 1\n")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first", "--allow-empty")
    return git(folder, "rev-parse", "--short=12", "HEAD")


COMMITS = {  # folder of the package, what is done there, modules that are imported, the ending of the commit or None
    "its own": ("own", "", [], ""),
    "a changed file": ("own", "change", [], "+"),
    "a new module": ("own", "", ["mine.py"], "+"),
    "a new module in a folder": ("own", "", ["rooms/mine.py"], "+"),
    "a new module of the environment": ("own", "", [".venv/lib/site-packages/torch.py"], ""),
    "a new file that nobody imports": ("own", "add", [], ""),
    "an untracked copy": ("course/copy", "", [], None),
    "an ignored copy": ("course/copy", "ignore", [], None),
    "a copy that the course has committed": ("course/kept", "", [], ""),
    "outside": ("outside", "", [], None),
}


FILES = "fewshot/experiment/files.py"  # asks git for the commit


@pytest.mark.parametrize("named", [False, True], ids=["", "GIT_DIR"])
@pytest.mark.parametrize("case", COMMITS)
def test_the_commit_is_that_of_the_code(case, named, tmp_path, monkeypatch):
    where, what, modules, ending = COMMITS[case]
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    own = repository(tmp_path / "own", FILES, "hw1.py")
    course = repository(tmp_path / "course", "homework.txt", f"kept/{FILES}")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    folder = tmp_path / where
    (folder / FILES).parent.mkdir(parents=True, exist_ok=True)
    (folder / FILES).write_text("x = 1\n")
    if what == "change":
        (folder / "hw1.py").write_text("x = 2\n")
    if what == "add":
        (folder / "new.py").write_text("x = 2\n")
    if what == "ignore":
        (tmp_path / "course" / ".gitignore").write_text("copy\n")
    for number, name in enumerate(modules):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x = 3\n")
        module = types.ModuleType(f"imported{number}")
        module.__file__ = str(folder / name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    if named:
        monkeypatch.setenv("GIT_DIR", str(tmp_path / "course" / ".git"))
        monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "course"))
    monkeypatch.setattr(files, "__file__", str(folder / FILES))
    commit = own if where == "own" else course
    assert experiment.git_commit() == (None if ending is None else commit + ending)


# ---------------------------------------------------------------------------------------- no locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    for _ in range(2):
        files.hold(tmp_path)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and os.strerror(number) in err and str(tmp_path) in err
    files.release(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number, goes_on", [(errno.ENOLCK, True), (errno.EOPNOTSUPP, True), (errno.EAGAIN, False)])
def test_reproduce_without_locks(number, goes_on, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open(tmp_path / "lock", "w") as file:
        with contextlib.nullcontext() if goes_on else pytest.raises(OSError):
            runner.lock(file, wait=False)
    assert ("no locks on this file system" in capsys.readouterr().err) == goes_on


def test_threads_that_write_one_file_do_not_meet(tmp_path):
    """Each writes a temporary file of its own; the last one stays."""
    texts = [f"{n}" * 100_000 for n in range(8)]
    write = lambda text: files.write_atomically(tmp_path / "x", lambda out: out.write(text.encode()))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, texts * 5))
    assert (tmp_path / "x").read_text() in texts and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_full_disk_is_told_with_a_flag_that_is_there(tmp_path):
    refused(lambda: files.write_atomically(tmp_path / "no" / "x", lambda _: None), "choose another place")
    refused(lambda: files.write_json(tmp_path / "no" / "x", {}, "--log_dir"), "choose another --log_dir")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EAGAIN])
def test_a_run_that_another_process_trains(number, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    refused(lambda: files.hold(tmp_path), "--resume", "another process")


# ----------------------------------------------------------------------------- folders of other users


@contextlib.contextmanager
def another_user():
    """As a user who does not own what is there: root becomes nobody for a while; others just lose their rights."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def shared(monkeypatch):
    """A working folder that every user may enter and write to; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp()).resolve()
    folder.chmod(0o777)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)
    monkeypatch.delenv("MNIST_DIR", raising=False)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o777)
    shutil.rmtree(folder)


def close(path: Path) -> None:
    path.chmod(0o000)


def open_dataset(name="folder", **options):
    return lambda: load_dataset(name, **options)


CLOSED = {  # what is closed, what is done, words of the error
    "data_folder": ("d", open_dataset(data_folder="d"), ["--data_folder d", "Permission denied"]),
    "inside it": ("d/c3", open_dataset(data_folder="d"), ["d/c3", "make it readable"]),
    "Omniglot": ("d", open_dataset("omniglot", data_folder="d"), ["--data_folder d", "Permission denied"]),
    "MNIST": ("d", open_dataset("mnist", data_folder="d"), ["--data_folder d", "Permission denied"]),
    "data": ("data", open_dataset("omniglot"), ["./data cannot be read", "Permission denied"]),
    "predict": ("d", lambda: predict.read_support(Path("d"), values), ["d cannot be read", "make it readable"]),
    "its support": ("p/support", lambda: predict.read_support(Path("p"), values), ["support", "make it readable"]),
    "weights": ("best.pt", lambda: experiment.load_checkpoint(Path("best.pt")), ["cannot read best.pt"]),
    "an archive": ("a.zip", lambda: omniglot.read_archive(Path("a.zip"), "x"), ["cannot read a.zip"]),
}


@pytest.mark.parametrize("case", CLOSED)
def test_what_another_user_has_closed(case, shared):
    path, call, words = CLOSED[case]
    draw(shared / "d", TEN)
    put(shared / "p" / "support" / "a" / "1.png")
    (shared / "data").mkdir()
    for name in ("best.pt", "a.zip"):
        (shared / name).write_bytes(b"content")
    close(shared / path)
    with another_user():
        refused(call, *words)


@pytest.mark.parametrize("variable, name", [("OMNIGLOT_DIR", "omniglot"), ("MNIST_DIR", "mnist")])
def test_what_a_variable_names_is_closed(variable, name, shared, monkeypatch):
    (shared / "d").mkdir()
    close(shared / "d")
    monkeypatch.setenv(variable, str(shared / "d"))
    with another_user():
        refused(lambda: load_dataset(name), f"${variable} {shared / 'd'} cannot be read")


@pytest.mark.parametrize("closed", ["cache", "folder"])
def test_a_cache_of_another_user_is_not_damaged(closed, shared, capsys):
    draw(shared / "d", TEN)
    os.system(f"chmod -R a+rX {shared / 'd'}")
    first = load_dataset("folder", "d")
    content = first.cache_file.read_bytes()
    close(first.cache_file if closed == "cache" else shared / "data")
    capsys.readouterr()
    with another_user():
        again = load_dataset("folder", "d")
    err = capsys.readouterr().err
    assert np.array_equal(again.images, first.images) and again.names == first.names
    assert err.count("\n") == 1 and "cannot read the cache" in err and "damaged" not in err
    (shared / "data").chmod(0o700)
    first.cache_file.chmod(0o600)
    assert first.cache_file.read_bytes() == content


def test_closed_data_leave_the_glyphs(shared, capsys):
    (shared / "data").mkdir()
    close(shared / "data")
    with another_user():
        assert load_dataset("auto").name == "glyphs"
    assert "./data cannot be read" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- strange names

BYTES = {"a query": b"query/caf\xe9.png", "a folder": b"query/\xff\xfe/1.png", "a class": b"support/k\xe9/1.png"}


@pytest.mark.parametrize("case", BYTES)
def test_names_that_are_no_utf8(case, tmp_path):
    for name, size in (("a", 3), ("b", 6)):
        put(tmp_path / "support" / name / "1.png", 30 * size)
    put(tmp_path / "query" / "1.png", 90)
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + BYTES[case]))
    put(path, 90)
    predict.main([str(tmp_path), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "predictions.csv").read_bytes().decode("utf-8")
    shown = {"a query": "caf\\xe9.png", "a folder": "\\xff\\xfe/1.png", "a class": ""}[case]
    assert shown in text and len(text.splitlines()) == 1 + (2 if case != "a class" else 1)
    if case == "a class":
        assert "k\\xe9" in predict.read_support(tmp_path, values).names


def test_a_class_folder_that_is_no_utf8(tmp_path):
    draw(tmp_path / "d", TEN)
    os.rename(tmp_path / "d" / "c3", os.fsencode(tmp_path / "d") + b"/c3\xe9")
    (tmp_path / "d" / "c4" / "0.png").rename(os.fsdecode(os.fsencode(tmp_path / "d" / "c4") + b"/\xe9.png"))
    for _ in range(2):  # packed, and from the cache
        data = load_dataset("folder", str(tmp_path / "d"))
        assert data.names[3] == "c3\\xe9" and data.counts.tolist() == [4] * 10


@pytest.mark.parametrize("name", ["日本", "café"])
def test_the_table_has_names_that_the_locale_lacks(name, tmp_path, run_script):
    for folder, value in ((name, 40), ("b", 90)):
        put(tmp_path / "support" / folder / "1.png", value)
    put(tmp_path / "query" / name / f"{name}.png", 40)
    env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_script("predict.py", tmp_path, "--out", tmp_path / "out", env=env, cold=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert f"{name}/{name}.png" in (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- signals


def run_of(tmp_path, steps=6):
    args = hw1.parse_args(["--log_dir", str(tmp_path), "--run_name", "a", "--train_steps", str(steps)])
    run = experiment.Run(args, "hw1", "glyphs")
    run.track(model=torch.nn.Linear(1, 1))
    return run


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGXCPU", "SIGTERM"])
def test_a_signal_saves(name, times, tmp_path, capsys):
    if name == "SIGTERM" and times == 2:
        pytest.skip("asked twice it does not wait")
    number, run = getattr(signal, name), run_of(tmp_path)
    before = signal.signal(number, signal.SIG_DFL)  # whatever the tests were started by
    try:
        with pytest.raises(SystemExit) as end:
            for step in run.steps():
                if step == 3:
                    for _ in range(times):
                        os.kill(os.getpid(), number)
    finally:
        assert signal.signal(number, before) == signal.SIG_DFL
    assert end.value.code == 128 + number
    assert experiment.load_checkpoint(tmp_path / "a" / "checkpoint.pt", ("objects", "rng"))["step"] == 3
    assert "interrupted at step 3; continue with: python " in capsys.readouterr().err
    files.release(run.folder)


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_what_nohup_ignores_stays_ignored(name, tmp_path):
    number, run = getattr(signal, name), run_of(tmp_path)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        for step in run.steps():
            if step == 3:
                os.kill(os.getpid(), number)
    finally:
        assert signal.signal(number, before) == signal.SIG_IGN
    assert run.step == 6
    files.release(run.folder)


# ------------------------------------------------------------------------------------------ consoles

CONSOLES = {
    "stdout closed": "{run} >&-",
    "stderr closed": "{run} 2>&-",
    "both closed": "{run} >&- 2>&-",
    "a pipe that closes early": "{run} | head -1",
    "a pipe that nobody reads": "{run} 2>&1 | true",
    "a full disk": "{run} >/dev/full 2>&1",
    "unbuffered": "export PYTHONUNBUFFERED=1; {run} | true",
}
MUCH = """
import sys
sys.path.insert(0, {repo!r})
from fewshot import experiment
from tqdm import tqdm
def main():
    bar = tqdm(range(3), disable=False)
    for i in bar:
        print("x" * 100_000, flush=i == 1)
        print("y" * 10_000, file=sys.stderr)
        bar.write("z")
    bar.close()
    import warnings
    warnings.warn("said")
    open("done", "w").write("whole")
experiment.run_script(main)
"""


@pytest.mark.thorough
@pytest.mark.parametrize("case", CONSOLES)
def test_no_print_ends_a_program(case, tmp_path):
    (tmp_path / "much.py").write_text(MUCH.format(repo=str(REPO)))
    line = CONSOLES[case].format(run="{ python much.py; echo $? >code; }".replace("python", sys.executable))
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert (tmp_path / "code").read_text().strip() == "0" and (tmp_path / "done").read_text() == "whole"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_what_can_be_printed_is_printed(tmp_path):
    (tmp_path / "much.py").write_text(MUCH.format(repo=str(REPO)))
    done = subprocess.run([sys.executable, "much.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count("x") == 300_000 and done.stderr.count("y" * 10_000) == 3 and "said" in done.stderr


STREAMS = {"as ever": "", "stdout closed": " >&-", "a pipe that closes early": " | head -1"}


@pytest.mark.thorough
@pytest.mark.parametrize("case", STREAMS)
def test_a_training_needs_no_console(case, work, tmp_path):
    """The whole run, with its locale, and warnings of our own modules as errors; the same figures each time."""
    files = [*REPO.glob("*.py"), *REPO.glob("fewshot/**/*.py")]
    names = [".".join(path.relative_to(REPO).with_suffix("").parts) for path in files]
    ours = ",".join(f"error:::{name}" for name in [*names, "__main__"])
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONWARNINGS": ours}
    line = f"{sys.executable} {REPO / 'hw1.py'} {' '.join(TINY)} --log_dir {tmp_path}" + STREAMS[case]
    done = subprocess.run(["bash", "-c", line], cwd=work, env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr[-600:]
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert metrics["steps"] == 4 and metrics["curves"]["Loss/train"][-1][0] == 4
    whole = hw1.main([*TINY, "--log_dir", str(tmp_path / "here")])
    assert whole["curves"] == metrics["curves"] and whole["accuracies"] == metrics["accuracies"]


# --------------------------------------------------------------------------------------------- small


@pytest.mark.parametrize("word", ["--log_dir=~/x", "--data_folder=~/x", "--out=~/x"])
def test_a_tilde_is_the_home_folder(word, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flag, value = word.split("=")
    name = {"--log_dir": "log_dir", "--data_folder": "data_folder", "--out": "report_file"}[flag]
    for argv in ([word], [flag, value]):  # the shell expands neither, the second where it is quoted
        assert str(getattr(hw1.parse_args(argv), name)) == str(tmp_path / "x")
    assert predict.parse_args(["~", "--out=~/x"]).out == str(tmp_path / "x")


@pytest.mark.parametrize("variable", ["OMNIGLOT_DIR", "MNIST_DIR"])
def test_a_tilde_in_a_variable(variable, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(variable, "~/here")
    (tmp_path / "here" / "images_background").mkdir(parents=True)
    locate = {"OMNIGLOT_DIR": omniglot.locate_omniglot, "MNIST_DIR": mnist.locate_mnist}[variable]
    refused(lambda: locate(None), str(tmp_path / "here"))


@pytest.mark.parametrize("name", ["hw1_mine.py", "my copy.py"])
def test_the_resume_line_is_of_the_script_that_runs(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / name), "--smoke"])
    hw1.parse_args()
    assert str(tmp_path / name) in run_folder.resume_command("hw1", Path("runs/a"))
    hw1.parse_args(["--smoke"])  # called by another program
    assert str(REPO / "hw1.py") in run_folder.resume_command("hw1", Path("runs/a"))


RANKS = {  # the environment -> whether torchrun has started this process, or words of the error
    "RANK=0": False,
    "WORLD_SIZE=4": False,
    "RANK=0 WORLD_SIZE=1": False,
    "RANK= WORLD_SIZE=": False,
    "RANK=0 WORLD_SIZE=2": "no MASTER_ADDR and MASTER_PORT",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost": "no MASTER_PORT",
    "RANK=zero WORLD_SIZE=2": "RANK=zero",
    "RANK=3 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1": "RANK=3 and WORLD_SIZE=2",
    "RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=1": True,
}


@pytest.mark.parametrize("case", RANKS)
def test_variables_of_torchrun_that_were_left_over(case, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in case.split():
        monkeypatch.setenv(*word.split("="))
    if isinstance(RANKS[case], str):
        refused(experiment.started_by_torchrun, RANKS[case], "unset RANK and WORLD_SIZE")
    else:
        assert experiment.started_by_torchrun() is RANKS[case]


@pytest.mark.parametrize("script", ["hw1.py", "protonet.py"])
def test_a_left_over_address_is_one_line(script, run_script):
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "nonsense"}
    one_line_error(run_script(script, "--smoke", "--dataset", "glyphs", env=env), "unset RANK and WORLD_SIZE")


@pytest.mark.parametrize("flag", ["--out", "--save_classes"])
def test_predict_advises_flags_that_it_has(flag, tmp_path, monkeypatch):
    for name, value in (("a", 40), ("b", 90)):
        put(tmp_path / "support" / name / "1.png", value)
        put(tmp_path / "query" / f"{name}.png", value)

    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(UserError, match=f"choose another .*{flag}") as error:
        predict.main([str(tmp_path), flag, str(tmp_path / "x")])
    assert "--log_dir" not in str(error.value)


def outside_the_font() -> str:
    """A character that matplotlib's own font lacks and another one that comes with matplotlib has."""
    from matplotlib import font_manager

    fonts = {
        font.name: font.fname
        for font in font_manager.fontManager.ttflist
        if (font.weight, font.style) == (400, "normal")
    }
    has = {name: set(font_manager.get_font(fonts[name]).get_charmap()) for name in ("DejaVu Sans", "STIXGeneral")}
    return chr(max(has["STIXGeneral"] - has["DejaVu Sans"]))


@pytest.mark.parametrize("names", ["installed", "nowhere"])
def test_class_names_that_matplotlib_lacks(names, tmp_path, capsys):
    strange = outside_the_font() if names == "installed" else "\U000f0000"  # no font has a private character
    for name, value in ((strange, 40), ("b", 90)):
        put(tmp_path / "support" / name / "1.png", value)
        put(tmp_path / "query" / f"{name}.png", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = predict.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert {row["file"] for row in rows} == {f"{strange}.png", "b.png"}
    fonts = predict.fonts_for(["b", strange])
    assert fonts[0] == "DejaVu Sans" and len(fonts) == 2 if names == "installed" else fonts is None
    head, *lines = (tmp_path / "out" / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert head.startswith("number,file,") == head.endswith(",class_number") == (names == "nowhere")
    assert ("predictions.png shows the table's numbers" in capsys.readouterr().err) == (names == "nowhere")
    if names == "nowhere":
        assert [line.split(",")[0] for line in lines] == ["1", "2"]


@pytest.mark.thorough
@pytest.mark.parametrize("command", ["load_data.py --dataset glyphs", "hw1.py --help", "predict.py --help"])
def test_without_docstrings(command, tmp_path):
    done = subprocess.run([sys.executable, "-OO", REPO / command.split()[0], *command.split()[1:]], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-400:]
