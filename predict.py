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

import experiment
from experiment import UserError

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
from omniglot import contents, read_image, resize, unread_note
from protonet import embed, make_encoder, squared_distances

# ------------------------------------------------------------------------------------ pictures


def paper_of(grey: torch.Tensor, degree: int = 4, side: int = 64) -> torch.Tensor:
    """The brightness that the paper of a picture [H, W] (0..255) has at each place, under uneven light: [H, W].

    A polynomial in x and y, fitted to most of the pixels of a small copy; strokes, far from it and fewer, drop out.
    """

    powers = lambda n: torch.linspace(-1, 1, n, dtype=torch.float64)[:, None] ** torch.arange(degree + 1)
    size = [max(1, round(n * min(1.0, side / max(grey.shape)))) for n in grey.shape]
    small = F.adaptive_avg_pool2d(grey[None, None], size)[0, 0].double().flatten()
    order = sorted(((a, b) for a in range(degree + 1) for b in range(degree + 1 - a)), key=sum)  # of y^a x^b
    ys, xs = map(powers, size)
    terms = torch.stack([torch.outer(ys[:, a], xs[:, b]).flatten() for a, b in order], dim=1)  # [pixels, 15]
    paper = small.median().expand_as(small)
    for now in (0, 1, 2, 2, 2, 2, *[degree] * 5):
        off = (small - paper).abs()
        used = (off <= 2.5 * max(1.4826 * off.median().item(), 2.0)).double()  # 1.4826 median: a standard deviation
        basis = terms[:, : (now + 1) * (now + 2) // 2]
        kept = basis * used[:, None]
        weights = torch.linalg.solve(basis.T @ kept + 1e-6 * torch.eye(basis.shape[1]), kept.T @ small)
        paper = basis @ weights
        if ((small - paper).abs() * used).max() < 0.01:  # grey levels: nothing is left for more bends, as in a drawing
            break
    surface = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
    for (a, b), weight in zip(order, weights, strict=False):
        surface[a, b] = weight
    return (powers(grey.shape[0]) @ surface @ powers(grey.shape[1]).T).float()


def prepare_drawing(image: torch.Tensor, ink: str, size: int) -> torch.Tensor:
    """A photographed or drawn character [C, H, W] in 0..255 as the training images look: [1, size, size].

    Grey, as a share of what the paper would be there; bright strokes on dark paper (`ink` says how it is now: dark,
    bright, or auto, which takes what most of the picture is for paper); contrast stretched; cut out around the ink,
    with a margin.
    """
    grey = image.float().mean(dim=0)
    paper = paper_of(grey)
    level = (grey - paper) / paper.clamp(min=8)  # light changes paper and ink in proportion
    if ink == "auto":
        noise = 3 * 1.4826 * level.abs().median()
        darker, brighter = ((sign * level - noise).clamp(min=0).sum() for sign in (-1, 1))
        ink = "dark" if darker > brighter else "bright"
    level = (-level if ink == "dark" else level).clamp(min=0)
    level = level / level.max().clamp(min=1 / 255)
    ys, xs = (level > 0.4).nonzero(as_tuple=True)
    if len(ys) == 0:
        return torch.zeros(1, size, size)
    top, bottom, left, right = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
    side = int(1.35 * max(bottom - top, right - left)) + 2
    canvas = torch.zeros(side, side)
    y, x = (side - (bottom - top)) // 2, (side - (right - left)) // 2
    canvas[y : y + bottom - top, x : x + right - left] = level[top:bottom, left:right]
    small = F.interpolate(canvas[None, None], size=(size, size), mode="bilinear", antialias=True)[0]
    return (small / small.max()).clamp(0, 1)  # thin strokes lose contrast when they shrink


def prepare_as_trained(image: np.ndarray, channels: int, inverted: bool, size: int) -> torch.Tensor:
    """A picture uint8 [C, H, W] as a run on a folder of pictures had its own: float32 [channels, size, size]."""
    if channels == 1:
        image = image.mean(axis=0, keepdims=True).round().astype(np.uint8)
    small = torch.from_numpy(resize(np.broadcast_to(image, (channels, *image.shape[1:]))[None].copy(), size))[0]
    return (255 - small if inverted else small).float() / 255


# ------------------------------------------------------------------------- network and classes

NONE = "none of these"
SHIPPED = Path(__file__).with_name("pretrained") / "protonet.pt"  # made by ship.py


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


def read_pictures(folder: Path, prepare, above: str = "") -> tuple[list[str], list[torch.Tensor]]:
    """Names of the readable picture files of a folder, and what prepare(image) makes of each; the others are named."""
    found, unread = {}, []
    for file in contents(folder)[1]:
        try:
            if not file.is_file():
                raise UserError(f"cannot read the image {file}")
            found[above + file.name] = prepare(read_image(file, str(file)))
        except UserError:
            unread.append(f"{folder.name}/{file.name}")
    if unread:
        print(f"note: {unread_note(unread)}", file=sys.stderr)
    if not found:
        raise UserError(f"{folder} has no pictures that can be read; put .png or .jpg files there")
    return list(found), list(found.values())


def read_support(root: Path, prepare) -> Classes:
    """The classes of DIR/support/CLASS/*."""
    folders = contents(need(root, "support"))[0]
    if len(folders) < 2:
        raise UserError(f"{root / 'support'} has {len(folders)} class folders; it takes two or more")
    pictures = [read_pictures(folder, prepare)[1] for folder in folders]
    labels = torch.repeat_interleave(torch.tensor([len(images) for images in pictures]))
    images = torch.stack([image for of_class in pictures for image in of_class])
    return Classes([folder.name for folder in folders], images, labels)


def read_query(root: Path, prepare) -> tuple[list[str], torch.Tensor, list[str | None]]:
    """Names, pictures and, where they lie in DIR/query/CLASS/, true classes of the pictures to label."""
    folders, files = contents(need(root, "query"))
    folders = [folder for folder in folders if contents(folder)[1]]  # an empty one asks nothing
    names, images, truth = [], [], []
    for folder, true in [(root / "query", None)] * (bool(files) or not folders) + [(f, f.name) for f in folders]:
        found, pictures = read_pictures(folder, prepare, f"{true}/" if true else "")
        names, images, truth = names + found, images + pictures, truth + [true] * len(found)
    return names, torch.stack(images), truth


def need(root: Path, part: str) -> Path:
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
    experiment.write_atomically(path, lambda out: np.savez_compressed(out, **arrays))


def load_classes(path: Path, network: Network) -> Classes:
    """The support set of a file by --save_classes; UserError where it is damaged or for another kind of network."""
    try:
        if path.exists() and not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz")
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
            names, images, labels, kind = (saved[name] for name in ("names", "images", "labels", "kind"))
        names, kind = [str(name) for name in names], str(kind)
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder} ({error}); choose another --out") from None
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    experiment.write_atomically(folder / "predictions.csv", lambda out: out.write(text.getvalue().encode()))
    figure = prediction_figure(classes, query, rows)
    experiment.write_atomically(folder / "predictions.png", lambda out: figure.savefig(out, dpi=120, format="png"))


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


def prediction_figure(classes: Classes, query: torch.Tensor, rows: list[dict]):
    """One row a class: its first support image, then the queries it was chosen for; what is of none comes last."""
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
        ax.set_title(title, fontsize=8, parse_math=False)

    for i, name in enumerate(names):
        if i < len(classes.names):
            show(axes[i, 0], classes.images[classes.labels == i][0], f"class {name[:14]}")
        else:
            axes[i, 0].set_title(NONE, fontsize=8)
        for column, j in enumerate(members[i], start=1):
            show(axes[i, column], query[j], f"{rows[j]['file'][-14:]} {rows[j]['probability']:.2f}")
    return figure


# ------------------------------------------------------------------------------------- exporting


def export_page(network: Network, path: Path) -> None:
    """Write the page to draw on, with the network in it, to one file; UserError for a network that it cannot hold."""
    flags = network.flags
    if flags["encoder"] != "conv4" or flags["dataset"] == "folder":
        kind = f"--encoder {flags['encoder']}" if flags["encoder"] != "conv4" else "pictures of a folder"
        raise UserError(f"the page takes a network of characters by --encoder conv4, not of {kind}; name another run")
    text = export.page(network.encoder.state_dict(), flags["image_size"], network.threshold)
    experiment.write_atomically(path, lambda out: out.write(text.encode()))


# ------------------------------------------------------------------------------------ the script


def parse_args(argv=None):
    parser = experiment._Parser(
        prog="predict.py", description=__doc__, formatter_class=experiment._Formatter, allow_abbrev=False
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
    others = {
        "--classes": args.classes,
        "--save_classes": args.save_classes,
        "--out": args.out,
        "--unknown": args.unknown,
    }
    if given != ["DIR"] and (surplus := [flag for flag, value in others.items() if value]):
        raise UserError(f"{given[0]} takes no {', '.join(surplus)}; drop it")
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
        raise UserError(f"--unknown: {args.checkpoint} has no threshold; set it by python ship.py {args.checkpoint}")
    if args.export_onnx:
        export.onnx(network.encoder, network.channels, network.flags["image_size"], args.export_onnx)
    elif args.page or args.export_page:
        path = args.export_page or (
            Path(args.checkpoint) / "page.html" if args.checkpoint else SHIPPED.with_name("page.html")
        )
        if args.export_page or args.checkpoint:
            export_page(network, path)
        if args.page and not webbrowser.open(path.resolve().as_uri()):
            print("no browser was found; open the file yourself", file=sys.stderr)
    if args.directory is None:
        print(f"{'opened' if args.page and not args.checkpoint else 'written'}: {args.export_onnx or path}")
        return []
    return predict(args, network)


if __name__ == "__main__":
    experiment.run_script(main)
