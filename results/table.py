"""Write the tables of the README from the committed result files; nothing in them is typed by hand.

    python results/table.py            rewrites README.md between its markers
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

RESULTS = Path(__file__).resolve().parent
README = RESULTS.parent / "README.md"
# setting -> what the course or the slides report, and the best published figure where there is one
MANN = {"K1N2": "above 90", "K2N2": "above 90", "K1N3": "about 80", "K1N4": "about 70", "conv_K1N5": "not tried"}


def load(name: str) -> list[dict]:
    """The metrics of all seeds of a setting, in the order of the seeds."""
    return [json.loads(p.read_text()) for p in sorted(RESULTS.glob(f"{name}_seed*.json"))]


def mean_of_seeds(runs: list[dict], key: str, ci: str) -> str:
    """Mean over seeds in per cent, with the 95 % interval over their test tasks.

    The seeds share their test tasks, so their errors go together: the interval does not shrink with seeds.
    """
    values, halves = [100 * r[key] for r in runs], [100 * r[ci] for r in runs]
    half = sum(halves) / len(runs)
    return f"{sum(values) / len(values):.1f} ± {half:.1f}"


def mann_table() -> str:
    rows = ["| MANN, course split | course | ours | each seed | queries asked alone | minutes |", "|---" * 6 + "|"]
    for setting, course in MANN.items():
        runs = load(f"mann/{setting}")
        if not runs:
            continue
        seeds = ", ".join(f"{100 * r['test_accuracy']:.1f}" for r in runs)
        minutes = sum(r["train_seconds"] for r in runs) / len(runs) / 60
        ours = mean_of_seeds(runs, "test_accuracy", "ci95")
        alone = mean_of_seeds(runs, "test_accuracy_alone", "ci95_alone")
        first = runs[0]
        name = f"{first['K']}-shot {first['N']}-way" + (", conv encoder" if "conv" in setting else "")
        rows.append(f"| {name} | {course} | {ours} | {seeds} | {alone} | {minutes:.0f} |")
    runs = load("mann/K1N2")
    return "\n".join(rows) + (
        f"\n\nTest accuracy in per cent, mean of {len(runs)} seeds ± 95 % interval over "
        f"{runs[0]['num_test_tasks']} fixed tasks each; minutes of training on one of two CPU cores, both busy. "
        "Command of the first row:\n"
        f"`{runs[0]['command']}`."
    )


def memorisation_text() -> str:
    (run,) = load("mann/memorisation")
    return (
        f"With `--fixed_labels` every training character keeps one label. The network then answers "
        f"{100 * run['train_accuracy']:.1f} % of the training tasks right, and {100 * run['test_accuracy']:.1f} ± "
        f"{100 * run['ci95']:.1f} % of the tasks with new characters, where guessing gives {100 / run['N']:.1f} %: it "
        f"has memorised the characters and has not learned to learn.\n`{run['command']}`"
    )


def protonet_text() -> str:
    (run,) = load("protonet/5way1shot")
    return (
        f"5-way 1-shot, seed {run['seed']}: {100 * run['test_accuracy']:.1f} ± {100 * run['ci95']:.1f} % on "
        f"{run['num_test_tasks']} test tasks after {run['train_seconds']:.0f} seconds of training on two CPU cores "
        f"(the paper: 98.8 %).\n`{run['command']}`"
    )


def speed_table() -> str:
    rows = ["| what | contestant | ms | ratio |", "|---|---|---|---|"]
    for race in json.loads((RESULTS / "speed.json").read_text()):
        for name, value in race.items():
            if isinstance(value, dict):
                rows.append(f"| {race['title']} | {name} | {value['ms']:.2f} | {value['ratio']:.2f}x |")
    return "\n".join(rows)


def growth(f: dict, unit: str) -> str:
    """A fit of results/costs.json in words: a line a + b x, or a power x^b."""
    if f["form"] == "power":
        return f"x^{f['b']:.2f}"
    if abs(f["b"]) < 1e-9:
        return f"{f['a']:.1f} {unit}, flat"
    return f"{f['a']:.1f} {'+' if f['b'] > 0 else '-'} {abs(f['b']):.2f} x {unit}"


def costs_text() -> str:
    """How MAML's and ES's costs grow, where ES is the dearer one, and what its gradient is worth."""
    summary = json.loads((RESULTS / "costs.json").read_text())
    with open(RESULTS / "costs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = {"maml": "MAML", "es": "ES", "fomaml": "first-order MAML", "checkpoint": "checkpointed MAML"}
    sweeps = {"inner_steps": "inner steps", "layers": "hidden layers", "hidden_size": "hidden units"}
    fits = {(f["sweep"], f["method"], f["engine"]): f for f in summary["fits"]}
    lines = ["| engine `vmap`, x = | method | runtime | R² | peak memory | R² |", "|---" * 6 + "|"]
    for (sweep, method, engine), f in fits.items():
        if engine == "vmap":
            time, memory = f["runtime"], f["memory"]
            lines.append(f"| {sweeps[sweep]} | {names[method]} | {growth(time, 'ms')} | {time['r2']:.3f} | "
                         f"{growth(memory, 'MB')} | {memory['r2']:.3f} |")  # fmt: skip
    first = rows[0]
    lines += ["", f"Medians on {summary['device']}, {first['meta_batch_size']} tasks; ES compares "
              f"{first['num_perturbations']} perturbed networks, so both adapt the same number of them. With x^b "
              f"twice the units cost 2^b times as much. Command: `{summary['command']}`.", ""]  # fmt: skip
    lines += ["| at 512 units | engine | ms | MB |", "|---|---|---|---|"]
    for row in rows:
        if row["sweep"] == "hidden_size" and row["hidden_size"] == "512" and row["method"] in ("maml", "es"):
            ms, mb = 1e3 * float(row["seconds"]), float(row["peak_bytes"]) / 1e6
            lines.append(f"| {names[row['method']]} | {row['engine']} | {ms:.0f} | {mb:.1f} |")
    lines += ["", dearer_text(summary, rows, sweeps), "", cosine_text(summary, rows)]
    if (RESULTS / "costs_train.json").exists():
        lines += ["", training_text(names)]
    return "\n".join(lines)


def dearer_text(summary: dict, rows: list[dict], sweeps: dict) -> str:
    """The settings at which ES costs more than MAML, by engine and kind of cost."""
    parts = []
    for engine in ("vmap", "loop"):
        total = sum(row["method"] == "es" and row["engine"] == engine for row in rows)
        for what, word in (("seconds", "time"), ("peak_bytes", "memory")):
            found = [d for d in summary["es_dearer"] if (d["engine"], d["what"]) == (engine, what)]
            at = ", ".join(f"{sweeps[d['sweep']]} {d['value']}: {d['es'] / d['maml']:.2f} times" for d in found)
            parts.append(f"{word}, engine `{engine}`: {len(found)} of {total}" + (f" ({at})" if at else ""))
    return "Points of the sweeps at which ES costs more than MAML: " + "; ".join(parts) + "."


def cosine_text(summary: dict, rows: list[dict]) -> str:
    """What the estimate is worth, also at the number of perturbations that takes as long as MAML's exact gradient."""
    found = summary["es_cosine"]
    shown = ", ".join(f"{c['cosine']:.3f} with {c['perturbations']} ({c['expected']:.3f})" for c in found)
    D, m = found[0]["parameters"], found[0]["disagreement"]
    base = {"sweep": "inner_steps", "engine": "vmap", "inner_steps": "5"}
    maml, es = (next(r for r in rows if base.items() <= r.items() and r["method"] == m) for m in ("maml", "es"))
    pairs = float(es["num_perturbations"]) / 2 * float(maml["seconds"]) / float(es["seconds"])
    return (
        "Cosine between the ES estimate and the exact meta-gradient at the initialisation by the number of perturbed "
        f"networks, at {D} parameters, 5 inner steps and m = {m:.1f} (what the formula below expects): {shown}. In the "
        f"time of one MAML step ES can compare {2 * pairs:.0f} networks; the cosine to expect of them is "
        f"{(1 + m * (D + 1) / pairs) ** -0.5:.3f}."
    )


def training_text(names: dict) -> str:
    runs = json.loads((RESULTS / "costs_train.json").read_text())
    parts = [
        f"{names[m]} {r['test_loss']:.4f} ± {r['ci95']:.4f} after {r['steps']} outer steps and "
        f"{r['train_seconds']:.0f} s (before adaptation {r['test_loss_before']:.2f})"
        for m, r in runs.items()
    ]
    run = runs["maml"]
    return (
        f"Trained (`{run['command']}`), mean squared error on {run['num_test_tasks']} test tasks after "
        f"{run['inner_steps']} inner steps: " + "; ".join(parts) + "."
    )


def render(text: str) -> str:
    """README text with everything between its markers written anew."""
    tables = {"results": mann_table, "memorisation": memorisation_text, "protonet": protonet_text, "speed": speed_table,
              "costs": costs_text}  # fmt: skip
    for name, table in tables.items():
        pattern = re.compile(f"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda m, table=table: m[1] + table() + m[2], text)
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
