"""A sweep: costs measured over a range of one flag, kept in a table that survives being killed, and how they grow."""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError

import csv
import io
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

SETTING = (
    "method",
    "engine",
    "inner_steps",
    "layers",
    "hidden_dim",
    "meta_batch_size",
    "num_perturbations",
    "num_shot",
    "num_query",
    "at_once",
    "outer_steps",
    "inner_lr",
    "device",
    "torch",
    "random_seed",
    "git_commit",
)
MEASURED = ("repeats", "seconds", "seconds_p10", "seconds_p90", "peak_bytes")
COLUMNS = ("sweep", *SETTING, *MEASURED, "runtime_fit", "memory_fit")


def fit(sweep: str, x: list[float], y: list[float]) -> dict:
    """How y grows with x: a line a + b x, or over hidden units a power a x^b; least squares, with R^2."""
    u, v = np.asarray(x, float), np.asarray(y, float)
    if sweep == "hidden_dim":
        u, v = np.log(u), np.log(v)
    slope, intercept = np.polyfit(u, v, 1)
    left = v - (intercept + slope * u)
    r2 = 1 - (left @ left) / max(((v - v.mean()) ** 2).sum(), 1e-300) if np.ptp(v) > 0 else 1.0
    form = "power" if sweep == "hidden_dim" else "line"
    a = math.exp(intercept) if form == "power" else intercept
    return {"form": form, "a": float(a), "b": float(slope), "r2": float(r2)}


def fit_text(f: dict, unit: str) -> str:
    if abs(f["b"]) < 1e-9:
        return f"{f['a']:.3g} {unit}, flat"
    if f["form"] == "power":
        return f"{f['a']:.3g} {unit} * x^{f['b']:.2f} (R2 {f['r2']:.3f})"
    return f"{f['a']:.3g} + {f['b']:.3g} x {unit} (R2 {f['r2']:.3f})"


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    experiment.write_atomically(path, lambda out: out.write(text.getvalue().encode()))


def read_csv(path: Path) -> list[dict]:
    """The rows of a sweep as text; UserError when the file is none of ours."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--out: cannot read {path} ({error}); choose another --out") from None
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in row or None in row.values() for row in rows):
        raise UserError(f"--out: {path} is not a table of this script; choose another --out")
    return rows


def output_folder(args) -> Path:
    folder = Path(args.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} is no folder to write to ({error}); choose another") from None
    return folder


def measure_points(args, points: list[tuple], measure, device: torch.device) -> list[dict]:
    """A row of COLUMNS for each of the points (sweep, method, engine, flags), found by measure(flags, method, engine).

    Until it is complete a sweep lives in costs.partial.csv; started again it does not measure those points again.
    """
    partial = output_folder(args) / "costs.partial.csv"
    key = lambda row: tuple(str(row[name]) for name in SETTING)  # of another commit: measured again
    known = {key(row): {name: row[name] for name in MEASURED} for row in read_csv(partial)}
    rows = []
    for sweep, method, engine, flags in tqdm(points, unit="point", disable=None):
        here = {"method": method, "engine": engine, "device": experiment.device_name(device)}
        here |= {"torch": torch.__version__, "git_commit": args.git_commit or "none"}
        row = {"sweep": sweep} | {name: here.get(name, vars(flags).get(name)) for name in SETTING}
        new = key(row) not in known  # a point may also be part of two sweeps
        if new:
            known[key(row)] = measure(flags, method, engine)
        rows.append(row | {name: float(value) for name, value in known[key(row)].items()})
        if new:
            write_csv(partial, rows)
    return rows


def fits_and_losses(rows: list[dict]) -> dict:
    """Fits of every curve (also written into the rows, printed), and where ES is not cheaper than MAML."""
    fits, dearer, found = [], [], {}
    for row in rows:  # in the order of the swept value
        found.setdefault((row["sweep"], row["method"], row["engine"]), []).append(row)
    for (sweep, method, engine), curve in found.items():
        x = [row[sweep] for row in curve]
        runtime = fit(sweep, x, [row["seconds"] * 1e3 for row in curve])
        memory = fit(sweep, x, [row["peak_bytes"] / 1e6 for row in curve])
        for row in curve:
            row |= {"runtime_fit": fit_text(runtime, "ms"), "memory_fit": fit_text(memory, "MB")}
        fits.append({"sweep": sweep, "method": method, "engine": engine, "runtime": runtime, "memory": memory})
        print(f"{sweep:12s} {method:10s} {engine:8s} {row['runtime_fit']:38s} {row['memory_fit']}")
    for (sweep, method, engine), curve in found.items():
        maml = found.get((sweep, "maml", engine)) if method == "es" else None
        for theirs, ours in zip(maml or [], curve, strict=False):
            for name in ("seconds", "peak_bytes"):
                if ours[name] > theirs[name]:
                    dearer.append(
                        {
                            "what": name,
                            "sweep": sweep,
                            "value": ours[sweep],
                            "engine": engine,
                            "es": ours[name],
                            "maml": theirs[name],
                        }
                    )
    return {"fits": fits, "es_dearer": dearer}


def write_sweep(args, rows: list[dict], summary: dict) -> None:
    """costs.csv and costs.json in --out; the partial table is no longer needed."""
    folder = output_folder(args)
    write_csv(folder / "costs.csv", rows)
    experiment.write_json(folder / "costs.json", summary)
    (folder / "costs.partial.csv").unlink(missing_ok=True)
    print(f"written: {folder / 'costs.csv'} and costs.json; pictures: python reproduce.py report --results {folder}")
