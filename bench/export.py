"""A trained network for other programs: one static page that draws and answers, or a file in ONNX's form.

python predict.py --export_page page.html     draws, embeds and compares in any browser; asks nobody for anything
python predict.py --export_onnx net.onnx      embedding and comparison for other programs (requirements-onnx.txt)
"""

from __future__ import annotations

from fewshot import experiment
from fewshot.experiment import UserError

import base64
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

PARTS = Path(__file__).resolve().parent.parent / "pretrained" / "page"
EPS = 1e-5  # of batch norm


def folded(weights: dict[str, torch.Tensor]) -> np.ndarray:
    """The four blocks of a Conv4 as float32 [n]: of each block its kernels [out, in, 3, 3], then its biases [out].

    A norm by running averages is a scale and a shift for each channel, which the convolution before it can take over.
    """
    parts = []
    for i in range(4):
        scale = weights[f"gamma{i}"].double() / (weights[f"var{i}"].double() + EPS).sqrt()
        parts += [weights[f"weight{i}"].double() * scale[:, None, None, None]]
        parts += [weights[f"beta{i}"].double() - weights[f"mean{i}"].double() * scale]
    return torch.cat([part.flatten() for part in parts]).numpy().astype("<f4")


def page(weights: dict[str, torch.Tensor], size: int, threshold: float | None) -> str:
    """The page as text: markup, style and scripts of pretrained/page/ with the weights in them.

    A content-security policy in its head forbids the browser every request; it names the script and the style by their
    digests, so that nothing else runs.
    """
    read = lambda name: (PARTS / name).read_text(encoding="utf-8")
    network = {
        "size": size,
        "width": len(weights["gamma0"]),
        "threshold": threshold,
        "weights": base64.b64encode(folded(weights).tobytes()).decode(),
    }
    script = f"const NETWORK = {json.dumps(network)};\n{read('network.js')}\n{read('prepare.js')}\n{read('board.js')}"
    style = read("style.css")
    sha = lambda text: "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src '{sha(script)}'; style-src '{sha(style)}'; img-src data: blob:"
    text = read("page.html")
    for name, value in (
        ("POLICY", policy + "; base-uri 'none'; form-action 'none'"),
        ("STYLE", style),
        ("SCRIPT", script),
    ):
        text = text.replace("{{" + name + "}}", value)
    return text


def write_page(network, path: Path) -> None:
    """Write the page with a `predict.Network` in it to one file; UserError for a network that it cannot hold."""
    flags = network.flags
    if flags["encoder"] != "conv4" or flags["dataset"] == "folder":
        kind = f"--encoder {flags['encoder']}" if flags["encoder"] != "conv4" else "pictures of a folder"
        raise UserError(f"the page takes a network of characters by --encoder conv4, not of {kind}; name another run")
    text = page(network.encoder.state_dict(), flags["image_size"], network.threshold)
    experiment.write_atomically(path, lambda out: out.write(text.encode()))


class Compared(nn.Module):
    """What the ONNX file computes, all in float32.

    support [S, C, H, W] in [0, 1], one_hot [S, N], query [M, C, H, W] -> logits [M, N], minus the squared distances to
    the class means, and features [M, D] of the queries.
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, support, one_hot, query):
        temper = lambda features: features / features.shape[-1] ** 0.25  # as protonet.py does
        support, query = temper(self.encoder(support)), temper(self.encoder(query))
        centres = (one_hot.T @ support) / one_hot.sum(dim=0)[:, None]
        return -(query[:, None] - centres).square().sum(dim=-1), query


def onnx(encoder: nn.Module, channels: int, size: int, path: Path) -> None:
    """Write `Compared` to a file that any ONNX runtime reads; the numbers of pictures and of classes are free."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UserError("--export_onnx needs two packages: pip install -r requirements-onnx.txt") from None
    example = torch.rand(6, channels, size, size), torch.eye(3).repeat(2, 1), torch.rand(4, channels, size, size)
    pictures, classes, queries = (torch.export.Dim(name) for name in ("pictures", "classes", "queries"))
    program = torch.onnx.export(
        Compared(encoder.cpu()).eval(),
        example,
        dynamo=True,
        input_names=["support", "one_hot", "query"],
        output_names=["logits", "features"],
        dynamic_shapes=({0: pictures}, {0: pictures, 1: classes}, {0: queries}),
        verbose=False,
    )
    experiment.write_atomically(path, lambda out: out.write(program.model_proto.SerializeToString()))
