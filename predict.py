"""Label your own pictures with a trained prototypical network (`protonet.py`).

DIR/support/<class name>/ holds one or more pictures of each class, DIR/query/ the pictures to label, of any size and
format. For a network of characters, photographs and scans of drawings are brought into the form of the training images
first: grey, ink on paper under even light, cut out around the strokes; for one of a folder of pictures, they are read
as that folder's were. Each query goes to the class whose mean embedding is nearest, with the softmax of the
negative squared distances as its probability (Snell et al. 2017, eq. 2).

    python predict.py DIR --checkpoint RUN_DIR                 prints a table; writes predictions.csv and .png
    python predict.py DIR --checkpoint RUN_DIR --ink bright    chalk on a board; `auto` finds out for each picture
"""

from __future__ import annotations

import csv
import io
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import experiment
from experiment import UserError
from omniglot import contents, read_image, resize, unread_note
from protonet import embed, make_encoder, squared_distances


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
    surface = torch.zeros(degree + 1, degree + 1, dtype=torch.float64)
    for (a, b), weight in zip(order, weights, strict=True):
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


def read_pictures(folder: Path, prepare) -> tuple[list[Path], list[torch.Tensor]]:
    """The readable picture files of a folder, and what prepare(image) makes of each; the others are named."""
    found, unread = {}, []
    for file in contents(folder)[1]:
        try:
            if not file.is_file():
                raise UserError(f"cannot read the image {file}")
            found[file] = prepare(read_image(file, str(file)))
        except UserError:
            unread.append(f"{folder.name}/{file.name}")
    if unread:
        print(f"note: {unread_note(unread)}", file=sys.stderr)
    if not found:
        raise UserError(f"{folder} has no pictures that can be read; put .png or .jpg files there")
    return list(found), list(found.values())


def predict(args, encoder: nn.Module, channels: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Label DIR/query/* by DIR/support/CLASS/*; prints a table, writes predictions.csv and .png into the run folder."""
    root = Path(args.directory)
    for part in ("support", "query"):
        if not (root / part).is_dir():
            raise UserError(f"{root / part} is missing; DIR holds support/CLASS/*.png and query/*.png")
    classes = contents(root / "support")[0]
    if len(classes) < 2:
        raise UserError(f"{root / 'support'} has {len(classes)} class folders; it takes two or more")

    def prepare(image: np.ndarray) -> torch.Tensor:
        if args.dataset == "folder":
            return prepare_as_trained(image, channels, args.inverted, args.image_size)
        return prepare_drawing(torch.from_numpy(image), args.ink, args.image_size)

    support = [(i, image) for i, c in enumerate(classes) for image in read_pictures(c, prepare)[1]]
    files, query = read_pictures(root / "query", prepare)
    query = torch.stack(query).to(device)
    labels = torch.tensor([i for i, _ in support], device=device)
    with torch.no_grad():
        features = embed(encoder, torch.stack([image for _, image in support]).to(device)[None], dtype)[0]
        one_hot = F.one_hot(labels, len(classes)).float()
        centres = (one_hot.T @ features) / one_hot.sum(dim=0)[:, None]  # classes may differ in size
        logits = -squared_distances(embed(encoder, query[None], dtype), centres[None])[0]
    probability, guess = logits.softmax(dim=-1).max(dim=-1)
    rows = [
        {"file": file.name, "predicted_class": classes[int(g)].name, "probability": round(float(p), 4)}
        for file, g, p in zip(files, guess, probability, strict=True)
    ]
    folder = Path(args.checkpoint)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    experiment.write_atomically(folder / "predictions.csv", lambda out: out.write(text.getvalue().encode()))
    figure = prediction_figure(support, classes, query.cpu(), rows)
    experiment.write_atomically(folder / "predictions.png", lambda out: figure.savefig(out, dpi=120, format="png"))
    width = max(len(row["file"]) for row in rows) + 2
    for row in rows:
        print(f"{row['file']:{width}}{row['predicted_class']:24}{row['probability']:.3f}")
    print(f"written: {folder / 'predictions.csv'}, {folder / 'predictions.png'}")
    return rows


def prediction_figure(support, classes, query, rows):
    """One row a class: its first support image, then the queries it was chosen for."""
    from matplotlib.figure import Figure

    members = [[j for j, row in enumerate(rows) if row["predicted_class"] == c.name][:8] for c in classes]
    columns = 1 + max(1, *map(len, members))
    figure = Figure(figsize=(1.3 * columns, 1.45 * len(classes)), layout="constrained")
    axes = figure.subplots(len(classes), columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")

    def show(ax, image, title):
        image = image.permute(1, 2, 0).numpy()
        ax.imshow(1 - image if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
        ax.set_title(title, fontsize=8, parse_math=False)

    for i, c in enumerate(classes):
        show(axes[i, 0], next(image for label, image in support if label == i), f"class {c.name[:14]}")
        for column, j in enumerate(members[i], start=1):
            show(axes[i, column], query[j], f"{rows[j]['file'][:14]} {rows[j]['probability']:.2f}")
    return figure


def parse_args(argv=None):
    """The flags, and with them what the run says of its network: encoder, width and image_size."""
    parser = experiment._Parser(
        prog="predict.py", description=__doc__, formatter_class=experiment._Formatter, allow_abbrev=False
    )
    parser.add_argument("directory", metavar="DIR", help="the folder with support/CLASS/* and query/*")
    parser.add_argument("--checkpoint", metavar="RUN_DIR", required=True, help="the run of protonet.py that is used")
    parser.add_argument("--ink", choices=["auto", "dark", "bright"], default="auto", help="strokes against the paper")
    parser.add_argument("--device", choices=experiment.DEVICES, default="auto", help="auto: cuda if there is one")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the convolutions")
    args = parser.parse_args(argv)
    saved = experiment.read_json(Path(args.checkpoint) / "flags.json", "checkpoint")
    if saved.get("script") != "protonet":
        raise UserError(f"--checkpoint {args.checkpoint} is a run of {saved.get('script')}.py, not of protonet.py")
    if saved["dataset"] == "folder" and args.ink != "auto":
        raise UserError(
            f"--ink {args.ink}: {args.checkpoint} was trained on a folder's pictures as they are, and so yours are "
            "read; drop the flag"
        )
    flags = {"inverted": False} | saved["flags"] | vars(args) | {"dataset": saved["dataset"]}
    return Namespace(**flags)


def main(argv=None) -> list[dict]:
    args = parse_args(argv)
    device = experiment.setup(args)
    best = experiment.load_checkpoint(Path(args.checkpoint) / "best.pt")
    weights = best["model"]
    channels = weights["weight0"].shape[1] if "weight0" in weights else weights["embed.weight"].shape[1] // 16
    encoder = make_encoder(args, channels).to(device)
    experiment.load_best(args.checkpoint, encoder)
    return predict(args, encoder, channels, experiment.precision(args, device), device)


if __name__ == "__main__":
    experiment.run_script(main)
