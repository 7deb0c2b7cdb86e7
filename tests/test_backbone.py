"""Conv4: the module equals a plain stack of torch layers, in each batch-norm mode."""

from fewshot.learners.batch_norm import EPS
from fewshot.learners.conv4 import Conv4, conv4, pool

import math

import pytest
import torch
from torch import nn


def plain(encoder, x, strided, training):
    """The textbook order: convolution, batch norm, ReLU, pooling."""
    for i in range(4):
        x = nn.functional.conv2d(x, getattr(encoder, f"weight{i}"), padding=1, stride=2 if strided else 1)
        mean, var = getattr(encoder, f"mean{i}").clone(), getattr(encoder, f"var{i}").clone()
        gamma, beta = getattr(encoder, f"gamma{i}"), getattr(encoder, f"beta{i}")
        x = nn.functional.batch_norm(x, mean, var, gamma, beta, training, eps=EPS).relu()
        x = x if strided else nn.functional.max_pool2d(x, 2)
    return x.mean((2, 3)) if strided else x.flatten(1)


def make(**options):
    torch.manual_seed(0)
    encoder = Conv4(width=8, **options).double()
    with torch.no_grad():  # batch norm with negative scales too
        for i in range(4):
            getattr(encoder, f"gamma{i}").normal_()
            getattr(encoder, f"beta{i}").normal_()
            getattr(encoder, f"mean{i}").normal_()
            getattr(encoder, f"var{i}").uniform_(0.5, 2)
    return encoder


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("channels, size", [(1, 28), (3, 28), (3, 84), (2, 35)])
def test_equals_plain_layers(strided, channels, size):
    encoder = make(channels=channels, image_size=size, strided=strided)
    x = torch.rand(5, channels, size, size, dtype=torch.float64)
    for norm, training in (("running", False), ("batch", True)):
        out = encoder(x, norm=norm)
        assert out.shape == (5, encoder.out_features)
        assert torch.allclose(out, plain(encoder, x, strided, training), atol=1e-10)
    parameters = {k: v.detach().clone() for k, v in encoder.named_parameters()}
    assert torch.equal(conv4(parameters, x, "batch", strided=strided), encoder(x, norm="batch"))


def test_usual_size():
    assert Conv4().out_features == 64 and Conv4(3, image_size=84).out_features == 1600
    assert Conv4(strided=True).out_features == 64
    with pytest.raises(ValueError, match="below 28"):
        Conv4(image_size=27)


def test_support_statistics():
    encoder = make()
    x = torch.rand(3, 7, 1, 28, 28, dtype=torch.float64)
    out = encoder(x, norm="support", num_support=5)
    assert out.shape == (3, 7, encoder.out_features)
    for b in range(3):  # the support images of one task are normalised as a batch of their own
        assert torch.allclose(out[b, :5], encoder(x[b, :5], norm="batch"), atol=1e-10)
    changed = x.clone()
    changed[:, 6] = 1.0
    again = encoder(changed, norm="support", num_support=5)
    assert torch.equal(again[:, :6], out[:, :6])  # a query influences no other image
    assert not torch.allclose(encoder(changed, norm="batch")[:, 5], encoder(x, norm="batch")[:, 5])
    with pytest.raises(ValueError, match="num_support"):
        encoder(x, norm="support")
    with pytest.raises(ValueError, match="unknown"):
        encoder(x, norm="train")


def test_running_averages_change_only_when_asked():
    encoder = make()
    x = torch.rand(6, 1, 28, 28, dtype=torch.float64)
    before = {k: v.clone() for k, v in encoder.named_buffers()}
    for norm in ("batch", "running"):
        encoder(x, norm=norm)
        assert all(torch.equal(v, before[k]) for k, v in encoder.named_buffers())
    encoder(x, norm="batch", momentum=0.1)
    mean = nn.functional.conv2d(x, encoder.weight0, padding=1).mean((0, 2, 3))
    assert torch.allclose(encoder.mean0, 0.9 * before["mean0"] + 0.1 * mean)


@pytest.mark.parametrize("side", [2, 7, 28])
def test_pooling_without_a_gradient_is_max_pooling(side):
    x = torch.randn(3, 5, side, side).round(decimals=1)  # with ties
    x[0, 0, 0, 1], x[1, 1, 1, 1] = math.nan, math.inf
    for images in (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16(), x.double()):
        with torch.no_grad():
            found = pool(images)
        assert torch.equal(found.nan_to_num(7), nn.functional.max_pool2d(images, 2).nan_to_num(7))
    asked = torch.ones(1, 1, 2, 2, requires_grad=True)
    pool(asked).sum().backward()
    assert asked.grad.flatten().tolist() == [1, 0, 0, 0]  # of equals the first, as PyTorch has it
