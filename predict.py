"""Label your own pictures with a trained prototypical network (`protonet.py`).

DIR/support/<class name>/ holds one or more pictures of each class, DIR/query/ the pictures to label, of any size and
format. Photographs and scans of drawings are brought into the form of the training images first: grey, ink on paper,
cut out around the strokes. Each query goes to the class whose mean embedding is nearest, with the softmax of the
negative squared distances as its probability (Snell et al. 2017, eq. 2).

    python predict.py DIR --checkpoint RUN_DIR                 prints a table; writes predictions.csv and .png
    python predict.py DIR --checkpoint RUN_DIR --ink bright    chalk on a board; `auto` finds out for each picture
"""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import experiment
from experiment import UserError
from omniglot import IMAGE_SUFFIXES, read_image, resize
from protonet import embed, make_encoder, squared_distances


def prepare_drawing(image: torch.Tensor, ink: str, size: int) -> torch.Tensor:
    """A photographed or drawn character [C, H, W] in 0..255 as the training images look: [1, size, size].

    Grey; bright strokes on dark paper (`ink` says how it is now: dark, bright, or auto, which takes the
    border for paper); contrast stretched; cut out around the ink, with a margin.
    """
    grey = image.float().mean(dim=0)
    border = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).median()
    if ink == "auto":
        ink = "dark" if border > grey.mean() else "bright"
    level = (border - grey if ink == "dark" else grey - border).clamp(min=0)
    level = level / level.max().clamp(min=1)
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


def read_pictures(folder: Path, what: str) -> list[Path]:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    if not files:
        raise UserError(f"{what} {folder} has no pictures; put .png or .jpg files there")
    return files


def predict(args, encoder: nn.Module, channels: int, dtype: torch.dtype, device: torch.device) -> list[dict]:
    """Label DIR/query/* by DIR/support/CLASS/*; prints a table, writes predictions.csv and .png into the run folder."""
    root = Path(args.directory)
    for part in ("support", "query"):
        if not (root / part).is_dir():
            raise UserError(f"{root / part} is missing; DIR holds support/CLASS/*.png and query/*.png")
    classes = sorted(p for p in (root / "support").iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(classes) < 2:
        raise UserError(f"{root / 'support'} has {len(classes)} class folders; it takes two or more")

    def load(path: Path) -> torch.Tensor:
        image = torch.from_numpy(read_image(path, str(path)))
        if channels == 1:
            return prepare_drawing(image, args.ink, args.image_size)
        small = resize(image.expand(channels, -1, -1)[None].numpy(), args.image_size)
        return torch.from_numpy(small)[0].float() / 255

    support = [(i, load(file)) for i, c in enumerate(classes) for file in read_pictures(c, "class")]
    files = read_pictures(root / "query", "folder")
    query = torch.stack([load(file) for file in files]).to(device)
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
    width = max(len(row["file"]) for row in rows) + 2
    for row in rows:
        print(f"{row['file']:{width}}{row['predicted_class']:24}{row['probability']:.3f}")
    folder = Path(args.checkpoint)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    experiment.write_atomically(folder / "predictions.csv", lambda out: out.write(text.getvalue().encode()))
    figure = prediction_figure(support, classes, query.cpu(), rows)
    experiment.write_atomically(folder / "predictions.png", lambda out: figure.savefig(out, dpi=120, format="png"))
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
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the convolutions")
    args = parser.parse_args(argv)
    saved = experiment.read_json(Path(args.checkpoint) / "flags.json", "checkpoint")
    if saved.get("script") != "protonet":
        raise UserError(f"--checkpoint {args.checkpoint} is a run of {saved.get('script')}.py, not of protonet.py")
    return Namespace(**{k: saved["flags"][k] for k in ("encoder", "width", "image_size", "random_seed")} | vars(args))


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
