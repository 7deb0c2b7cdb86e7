"""Labelling one's own pictures: the network that ships, uneven light, the page."""

from __future__ import annotations

from pathlib import Path

from studies.results import processor, read_if, table, with_interval


def light(out: Path) -> str:
    """Prediction on photographs under uneven light, from prediction_light.json."""
    found = read_if(out / "prediction_light.json").get("accuracy", {})
    rows = [[what, *(f"{100 * value:.1f}" for value in row.values())] for what, row in found.items()]
    return table("accuracy in % | " + " | ".join(f"{share} %" for share in next(iter(found.values()), ())), rows)


def shipped(out: Path) -> str:
    """ "None of these" by the network that ships, on validation and test tasks, from shipped.json."""
    found, rows = read_if(out / "shipped.json"), []
    for part, split in (("val", "validation"), ("test", "test")) if found else ():
        for name, row in found[part].items():
            shares = ("kept_of_known", "refused_of_unknown", "refused_at_kept", "accuracy_of_known")
            cells = [with_interval(100 * row[key], 100 * row[f"{key}_ci95"]) for key in shares]
            setting = name.replace("way", "-way ").replace("shot", "-shot")
            rows.append([split, setting, f"{row['area_under_curve']:.3f}", *cells])
    titles = "classes of | setting | area under the curve | known kept | unknown refused | refused at 90 % kept "
    commands = [f"`{found[key]}`" for key in ("trained_by", "command") if found]
    return table(titles + "| accuracy without `--unknown`", rows, commands)


def drawings(out: Path) -> str:
    """Right answers on real drawings without data and network, from shipped_drawings.json."""
    found = read_if(out / "shipped_drawings.json")
    pairs = zip(found.get("right", ()), found.get("cpu_seconds", ()), strict=True)
    rows = [[f"{n} of {found['of']}", f"{seconds:g}", processor(found)] for n, seconds in pairs]
    return table("right | seconds of one processor | on", rows, [f"`{found.get('command')}`"])


def page(out: Path) -> str:
    """What the browser's tests of the page have found, from page.json."""
    found = read_if(out / "page.json")
    if not found:
        return table("", [], [])
    tasks = f"{found['known']} of {found['tasks']}"
    row = [f"{found['bytes']:,}", f"{found['drawings_right']} of {found['drawings']}", f"{found['right']} of {tasks}",
           f"{found['median_ms']:g}", f"{found['most_ms']:g}", f"{found['browser']}, {found['processor']}"]  # fmt: skip
    titles = "bytes | drawings right | known queries right, of so many tasks | median ms of an answer | most | on"
    return table(titles, [row], [f"`{found['command']}`"])
