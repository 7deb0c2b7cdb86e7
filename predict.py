"""Label your own pictures with a trained prototypical network (`protonet.py`).

DIR/support/<class name>/ holds one or more pictures of each class, DIR/query/ the pictures to label, of any size and
format. For a network of characters, photographs and scans of drawings are brought into the form of the training images
first: grey, ink on paper under even light, cut out around the strokes; for one of a folder of pictures, they are read
as that folder's were. Each query goes to the class whose mean embedding is nearest, with the softmax of the
negative squared distances as its probability (Snell et al. 2017, eq. 2).

    python predict.py DIR                             by the network that ships; prints a table, writes a picture of it
    python predict.py DIR --checkpoint RUN_DIR        by a network of yours
    python predict.py DIR --unknown                   a picture of no class is answered "none of these"
    python predict.py DIR --ink bright                chalk on a board; `auto` finds out for each picture
    python predict.py DIR --save_classes FILE         keeps the classes of DIR/support in one file
    python predict.py DIR --classes FILE              takes them from there; DIR holds query/ alone
    python predict.py --page                          opens a page to draw on in the browser; it asks no server
    python predict.py --export_page FILE              that page with a network of yours (--checkpoint), in one file
    python predict.py --export_onnx FILE              the network for other programs (requirements-onnx.txt)

Where query/ holds folders named after the classes, the table of right and wrong answers is printed too.
Everything else: docs/predict.md.
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError
from fewshot.images.drawings import prepare_as_trained, prepare_drawing
from fewshot.images.folders import contents, few, must_be_readable, plain_name, unread_note, walk
from fewshot.images.pictures import read_image

import csv
import io
import math
import sys
import webbrowser
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bench import export
from protonet import embed, make_encoder, squared_distances

# ------------------------------------------------------------------------- network and classes

NONE = "none of these"
SHIPPED = Path(__file__).with_name("pretrained") / "protonet.pt"  # made by bench/ship.py


class Network(NamedTuple):
    """A trained encoder and what is known of it: `flags` holds dataset, image_size, inverted, encoder and width."""

    encoder: nn.Module
    flags: dict
    channels: int
    threshold: float | None  # of `strangeness`, above which a picture is of no class; None where none was set
    dtype: torch.dtype
    device: torch.device


class Classes(NamedTuple):
    """A support set as data: prepared pictures [n, C, H, W] in [0, 1], their classes [n] int64 and the names."""

    names: list[str]
    images: torch.Tensor
    labels: torch.Tensor


def load_network(args) -> Network:
    """The network of --checkpoint, or the one that ships; sets args.dtype's meaning and the device."""
    if args.checkpoint:
        folder = Path(args.checkpoint)
        saved = experiment.read_flags(folder, "checkpoint", "image_size", "encoder", "width")
        if saved["script"] != "protonet":
            raise UserError(f"--checkpoint {folder} is a run of {saved['script']}.py, not of protonet.py")
        unknown = folder / "unknown.json"
        content = {
            "flags": saved["flags"] | {"dataset": saved["dataset"]},
            "model": experiment.load_checkpoint(folder / "best.pt")["model"],
            "unknown": experiment.read_json(unknown, "checkpoint", threshold=int | float) if unknown.exists() else None,
        }
    elif SHIPPED.exists():
        content = experiment.load_checkpoint(SHIPPED, ("flags", "model", "unknown"))
    else:
        raise UserError(f"{SHIPPED} is missing; restore it (git checkout pretrained) or name a run by --checkpoint")
    flags = {"inverted": False} | content["flags"]
    weights = content["model"]
    first = weights.get("weight0", weights.get("embed.weight"))
    if not isinstance(first, torch.Tensor) or first.ndim < 2:
        raise UserError(f"{args.checkpoint or SHIPPED} has no weights of an encoder; name another run by --checkpoint")
    channels = first.shape[1] // (1 if "weight0" in weights else 16)
    device = experiment.setup(Namespace(device=args.device, random_seed=1))
    encoder = make_encoder(Namespace(**flags), channels)
    experiment.load_state(encoder, weights, Path(args.checkpoint or SHIPPED))
    threshold = content["unknown"]["threshold"] if content["unknown"] else None
    return Network(encoder.to(device), flags, channels, threshold, experiment.precision(args, device), device)


def preparer(network: Network, ink: str):
    """The function that brings a picture uint8 [C, H, W] into the form of the network's training images."""
    flags = network.flags
    if flags["dataset"] == "folder":
        return lambda image: prepare_as_trained(image, network.channels, flags["inverted"], flags["image_size"])
    return lambda image: prepare_drawing(torch.from_numpy(image), ink, flags["image_size"])


@torch.no_grad()
def compare(network: Network, classes: Classes, query: torch.Tensor):
    """Prototypes [N, D] of the classes, features [M, D] of pictures [M, C, H, W], squared distances [M, N]."""
    both = torch.cat([classes.images, query]).to(network.device)
    features = embed(network.encoder, both[None], network.dtype)[0].cpu()
    support, features = features[: len(classes.images)], features[len(classes.images) :]
    one_hot = F.one_hot(classes.labels, len(classes.names)).float()
    centres = (one_hot.T @ support) / one_hot.sum(dim=0)[:, None]  # classes may differ in size
    return centres, features, squared_distances(features[None], centres[None])[0]


def strangeness(distances: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """How unlike every class a query is [..., M], from squared distances [..., M, N] and pictures a class [N].

    The distance to the nearest prototype, divided by 1 + 1/K: a prototype of K pictures is itself off the class's mean
    by 1/K of the variance of one picture, so a query of the class is on average off by 1 + 1/K of it.
    """
    nearest, place = distances.min(dim=-1)
    return nearest.clamp(min=0) / (1 + 1 / counts[place])  # rounding may bring it below zero


# ------------------------------------------------------------------------------------- reading


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and in the folders in it, without junk."""
    return [file for _, _, files in walk(folder) for file in files]


def read_pictures(folder: Path, files: list[Path], prepare) -> tuple[list[str], list[torch.Tensor]]:
    """Names, from `folder` on, of the readable pictures among its files, and what prepare(image) makes of each.

    The other files are counted and named.
    """
    found, unread = {}, []
    for file in files:
        name = plain_name(file.relative_to(folder).as_posix())
        try:
            if not file.is_file():
                raise UserError(f"cannot read the image {file}")
            found[name] = prepare(read_image(file, str(file)))
        except (UserError, OSError):
            unread.append(f"{plain_name(folder.name)}/{name}")
    if unread:
        print(f"note: {unread_note(unread)}", file=sys.stderr)
    if not found:
        raise UserError(f"{folder} has no pictures that can be read; put .png or .jpg files there")
    return list(found), list(found.values())


def read_support(root: Path, prepare) -> Classes:
    """The classes of DIR/support/CLASS/*, with the pictures that lie deeper in their folders."""
    folders, loose = contents(need(root, "support"))
    pictures: dict[str, list[torch.Tensor]] = {plain_name(folder.name): [] for folder in folders}
    if len(pictures) < 2:
        raise UserError(f"{root / 'support'} has {len(pictures)} class folders; it takes two or more")
    deeper = []
    for folder in folders:
        names, images = read_pictures(folder, files_below(folder), prepare)
        pictures[plain_name(folder.name)] += images
        deeper += [f"{plain_name(folder.name)}/{name}" for name in names if "/" in name]
    notes = {
        f"read as pictures of the class whose folder in {root / 'support'} they lie deeper in": deeper,
        f"in no class folder of {root / 'support'} and not used": [plain_name(p.name) for p in loose],
    }
    for what, names in notes.items():
        if names:
            print(f"note: {what}: {few(names)} ({len(names)} in all)", file=sys.stderr)
    labels = torch.repeat_interleave(torch.tensor([len(images) for images in pictures.values()]))
    return Classes(list(pictures), torch.stack([image for images in pictures.values() for image in images]), labels)


def read_query(root: Path, prepare) -> tuple[list[str], torch.Tensor, list[str | None]]:
    """Names, pictures and, where they lie in DIR/query/CLASS/ or deeper, true classes of the pictures to label."""
    folders, files = contents(need(root, "query"))
    of_class = [(plain_name(folder.name), folder, files_below(folder)) for folder in folders]
    of_class = [row for row in of_class if row[2]]  # an empty folder asks nothing
    names, images, truth = [], [], []
    for true, folder, those in [(None, root / "query", files)] * (bool(files) or not of_class) + of_class:
        found, pictures = read_pictures(folder, those, prepare)
        names += [f"{true}/{name}" if true else name for name in found]
        images, truth = images + pictures, truth + [true] * len(found)
    return names, torch.stack(images), truth


def need(root: Path, part: str) -> Path:
    must_be_readable(root, str(root))
    if not (root / part).is_dir():
        raise UserError(f"{root / part} is missing; DIR holds support/CLASS/*.png and query/*.png")
    return root / part


def kind_of(network: Network) -> str:
    """What pictures a network takes, in words: those prepared for one network suit every other of the same kind."""
    how = "as a folder's" if network.flags["dataset"] == "folder" else "as ink"
    turned = ", turned to white ink" if network.flags["inverted"] else ""
    return "{0} x {1} x {1}, ".format(network.channels, network.flags["image_size"]) + how + turned


def save_classes(path: Path, classes: Classes, network: Network) -> None:
    """Keep a support set as a .npz of plain arrays."""
    arrays = {"names": np.array(classes.names), "images": classes.images.numpy(), "labels": classes.labels.numpy()}
    arrays["kind"] = np.array(kind_of(network))
    if not path.parent.is_dir():
        raise UserError(f"--save_classes {path}: there is no folder {path.parent}; make it or name another FILE")
    experiment.write_atomically(path, lambda out: np.savez_compressed(out, **arrays), "FILE for --save_classes")


def load_classes(path: Path, network: Network) -> Classes:
    """The support set of a file by --save_classes; UserError where it is damaged or for another kind of network."""
    try:
        if path.exists() and not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
            names, images, labels, kind = (saved[name] for name in ("names", "images", "labels", "kind"))
        names, kind = [plain_name(str(name)) for name in names], str(kind)
        size = network.flags["image_size"]
        sound = (
            images.dtype == np.float32
            and np.issubdtype(labels.dtype, np.integer)
            and images.ndim == 4
            and labels.shape == images.shape[:1]
            and len(names) >= 2
            and set(labels.tolist()) == set(range(len(names)))
            and images.min() >= 0
            and images.max() <= 1
        )
        if not sound:
            raise ValueError("its arrays do not fit together")
    except Exception as error:  # numpy and zipfile raise many kinds for a damaged or hostile file
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"--classes {path} is not a file of --save_classes ({reason}); make it anew") from None
    if kind != kind_of(network) or images.shape[1:] != (network.channels, size, size):
        raise UserError(
            f"--classes {path} is for another network: its pictures are {kind}, this one takes {kind_of(network)}; "
            "make it anew from the pictures, or name its network by --checkpoint"
        )
    return Classes(names, torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))


# ------------------------------------------------------------------------------------ labelling


def predict(args, network: Network) -> list[dict]:
    """Label DIR/query by DIR/support or --classes; prints tables, writes predictions.csv and .png into args.out."""
    root, prepare = Path(args.directory), preparer(network, args.ink)
    classes = load_classes(Path(args.classes), network) if args.classes else read_support(root, prepare)
    if args.save_classes:
        save_classes(Path(args.save_classes), classes, network)
        print(f"written: {args.save_classes}, {len(classes.names)} classes, {len(classes.images)} pictures")
        if not (root / "query").is_dir():
            return []
    names, query, truth = read_query(root, prepare)
    _, _, distances = compare(network, classes, query)
    probability, guess = (-distances).softmax(dim=-1).max(dim=-1)
    strange = strangeness(distances, classes.labels.bincount()) / (network.threshold or math.nan)
    rows = []
    for i, name in enumerate(names):
        answer = NONE if args.unknown and strange[i] > 1 else classes.names[int(guess[i])]
        row = {"file": name, "predicted_class": answer, "probability": round(float(probability[i]), 4)}
        row |= {"strangeness": round(float(strange[i]), 3)} if args.unknown else {}
        rows.append(row | ({"true_class": truth[i] or ""} if any(truth) else {}))
    write_predictions(Path(args.out), rows, classes, query)
    print_rows(rows)
    if any(truth):
        print_confusion(rows, classes.names)
    print(f"written: {Path(args.out) / 'predictions.csv'}, {Path(args.out) / 'predictions.png'}")
    return rows


def write_predictions(folder: Path, rows: list[dict], classes: Classes, query: torch.Tensor) -> None:
    """predictions.csv and predictions.png; where no font has the names, the picture shows the table's numbers."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder} ({error}); choose another --out") from None
    fonts = fonts_for([*classes.names, *(row["file"] for row in rows)])
    figure = prediction_figure(classes, query, rows, fonts)
    if fonts is None:
        number = {name: k for k, name in enumerate(classes.names, start=1)}
        rows = [
            {"number": i, **row, "class_number": number.get(row["predicted_class"], "")}
            for i, row in enumerate(rows, 1)
        ]
        print(
            "note: no font has all characters of the names; predictions.png shows the table's numbers", file=sys.stderr
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    draw = lambda out: figure.savefig(out, dpi=120, format="png")
    experiment.write_atomically(folder / "predictions.csv", lambda out: out.write(text.getvalue().encode()), "--out")
    experiment.write_atomically(folder / "predictions.png", draw, "--out")


def fonts_for(names: list[str]) -> list[str] | None:
    """Font families that together have every character of the names, matplotlib's own first; None where some lack."""
    from matplotlib import font_manager

    missing, families = set("".join(names)), []
    installed = [font for font in font_manager.fontManager.ttflist if (font.weight, font.style) == (400, "normal")]
    # Last Resort, which comes with matplotlib, has a box for every character.
    plain = [(font.name, font.fname) for font in installed if not font.name.startswith("Last Resort")]
    for family, file in [("DejaVu Sans", font_manager.findfont("DejaVu Sans")), *plain]:
        try:
            font = font_manager.get_font(file)
            has = {c for c in missing if font.get_char_index(ord(c))}
        except (OSError, RuntimeError, ValueError):  # a damaged font
            continue
        if has or not families:
            families.append(family)
        missing -= has
        if not missing:
            return families
    return None


def print_rows(rows: list[dict]) -> None:
    width = max(len(row["file"]) for row in rows) + 2
    for row in rows:
        strange = f"{row['strangeness']:8.2f}" if "strangeness" in row else ""
        print(f"{row['file']:{width}}{row['predicted_class']:24}{row['probability']:.3f}{strange}")


def print_confusion(rows: list[dict], names: list[str]) -> None:
    """The table of true against predicted classes; pictures of a folder that is no class are of none of these."""
    true = lambda row: row["true_class"] if row["true_class"] in names else NONE
    rows = [row for row in rows if row["true_class"]]
    found = [(true(row), row["predicted_class"]) for row in rows]
    titles = [*names, *([NONE] if any(NONE in pair for pair in found) else [])]
    width = max(len(f"{title[:16]}") for title in titles) + 2
    print("\n" + "true \\ predicted".ljust(18) + "".join(title[:16].rjust(width) for title in titles))
    for title in titles:
        print(title[:16].ljust(18) + "".join(str(found.count((title, other))).rjust(width) for other in titles))
    right = sum(a == b for a, b in found)
    print(f"right: {right} of {len(found)} ({100 * right / len(found):.1f} %)\n")


def prediction_figure(classes: Classes, query: torch.Tensor, rows: list[dict], fonts=("DejaVu Sans",)):
    """One row a class: its first support image, then the queries it was chosen for; what is of none comes last.

    Names are written in the families `fonts`; where that is None, classes and queries have their numbers, from 1.
    """
    from matplotlib.figure import Figure

    chosen = [row["predicted_class"] for row in rows]
    names = [*classes.names, *([NONE] if NONE in chosen else [])]
    members = [[j for j, answer in enumerate(chosen) if answer == name][:8] for name in names]
    columns = 1 + max(1, *map(len, members))
    figure = Figure(figsize=(1.3 * columns, 1.45 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")

    def show(ax, image, title):
        image = image.permute(1, 2, 0).numpy()
        ax.imshow(1 - image if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=8, parse_math=False, family=fonts and list(fonts))

    for i, name in enumerate(names):
        if i < len(classes.names):
            show(axes[i, 0], classes.images[classes.labels == i][0], f"class {name[:14] if fonts else i + 1}")
        else:
            axes[i, 0].set_title(NONE, fontsize=8)
        for column, j in enumerate(members[i], start=1):
            name = rows[j]["file"][-14:] if fonts else f"#{j + 1}"
            show(axes[i, column], query[j], f"{name} {rows[j]['probability']:.2f}")
    return figure


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    parser = experiment.Parser(
        prog="predict.py", description=__doc__, formatter_class=experiment.Formatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("directory", metavar="DIR", nargs="?", help="the folder with support/CLASS/* and query/*")
    add("--checkpoint", metavar="RUN_DIR", help="a run of protonet.py (default: the network that ships)")
    add("--ink", choices=["auto", "dark", "bright"], default="auto", help="strokes against the paper")
    add("--unknown", action="store_true", help=f'answer "{NONE}" for pictures that are like no class')
    add("--save_classes", metavar="FILE", help="keep the classes of DIR/support in this file (.npz)")
    add("--classes", metavar="FILE", help="take the classes from a file of --save_classes instead of DIR/support")
    add("--out", metavar="DIR", help="folder of predictions.csv and .png (default: RUN_DIR, or runs/predict)")
    add("--page", action="store_true", help="open a page to draw on in the browser")
    page = "write that page, with the network in it, to this file"
    add("--export_page", metavar="FILE", type=experiment.new_file, help=page)
    onnx = "write embedding and comparison for other programs to this file (needs requirements-onnx.txt)"
    add("--export_onnx", metavar="FILE", type=experiment.new_file, help=onnx)
    add("--device", choices=experiment.DEVICES, default="auto", help="auto: cuda if there is one")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the convolutions")
    args = parser.parse_args(argv)
    exports = {"--page": args.page, "--export_page": args.export_page, "--export_onnx": args.export_onnx}
    given = [flag for flag, value in {"DIR": args.directory, **exports}.items() if value]
    if len(given) != 1:
        choice = "DIR, the folder of your pictures, --page, --export_page FILE or --export_onnx FILE"
        raise UserError(f"predict.py takes one of {choice}; got {' and '.join(given) or 'none'}")
    of_dir = ("classes", "save_classes", "out", "unknown")
    if given != ["DIR"] and (surplus := [f"--{flag}" for flag in of_dir if getattr(args, flag)]):
        raise UserError(f"{given[0]} takes no {' and no '.join(surplus)}; drop it")
    if args.classes and args.save_classes:
        raise UserError("--save_classes keeps DIR/support, but --classes takes a file in its place; drop one of them")
    args.out = args.out or args.checkpoint or str(Path("runs") / "predict")
    return args


def main(argv=None) -> list[dict]:
    args = parse_args(argv)
    network = load_network(args)
    if network.flags["dataset"] == "folder" and args.ink != "auto":
        raise UserError(
            f"--ink {args.ink}: {args.checkpoint} was trained on a folder's pictures as they are, and so yours are "
            "read; drop the flag"
        )
    if args.unknown and network.threshold is None:
        remedy = f"set it by python -m bench ship {args.checkpoint}"
        raise UserError(f"--unknown: {args.checkpoint} has no threshold; {remedy}")
    if args.export_onnx:
        export.onnx(network.encoder, network.channels, network.flags["image_size"], args.export_onnx)
        print(f"written: {args.export_onnx}")
    elif args.page or args.export_page:
        own = Path(args.checkpoint) if args.checkpoint else SHIPPED.parent
        path = args.export_page or own / "page.html"
        if args.export_page or args.checkpoint:  # the page of the network that ships is there
            export.write_page(network, path)
            print(f"written: {path}")
        if args.page and not webbrowser.open(path.resolve().as_uri()):
            print(f"no browser was found; open {path.resolve()} yourself", file=sys.stderr)
    else:
        return predict(args, network)
    return []


if __name__ == "__main__":
    experiment.run_script(main)
