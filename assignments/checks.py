"""What the tests of an assignment are written with; the same file lies in the student's folder.

A test takes `student`, lets a probe run on the student's code and judges what came back:

    def probe(points, centres):                      # runs where the student's code is; decides nothing
        import protonet
        return protonet.squared_distances(points, centres)

    @graded("1b", public=True)
    def test_distances_by_hand(student):             # runs where the expected values are
        found = student.run(probe, points=..., centres=...)
        close(found, expected, "the distances")

In the student's folder both run in pytest's process (`Here`); in the grader the probe alone runs in a sandbox.
"""

from __future__ import annotations

import torch


class Wrong(AssertionError):
    """The answer is not right; the message says what, never the expected value."""


def graded(question: str, public: bool = False, weight: float = 1, seconds: float = 10, whole: bool = False):
    """Mark a test as belonging to `question`; the tests of a question share its points by their weights.

    public: it also goes to the student. seconds: of processor time. whole: every answer that is right takes part,
    not that of `question` alone.
    """

    def mark(function):
        function.graded = {"question": question, "public": public, "weight": weight, "seconds": seconds, "whole": whole}
        return function

    return mark


def expect(condition, message: str) -> None:
    """Raise Wrong(message) unless the condition holds."""
    if not bool(condition):
        raise Wrong(message)


def shaped(found, shape, what: str) -> torch.Tensor:
    """`found` in float64 if it is a tensor of this shape without infinite or undefined numbers, else Wrong."""
    expect(isinstance(found, torch.Tensor), f"{what}: a {type(found).__name__}, not a tensor")
    expect(tuple(found.shape) == tuple(shape), f"{what}: shape {list(found.shape)}, wanted {list(shape)}")
    found = found.to(torch.float64)
    expect(found.isfinite().all(), f"{what}: not all numbers are finite")
    return found


def close(found, expected: torch.Tensor, what: str, tolerance: float = 1e-4) -> None:
    """Wrong unless every number is within `tolerance` of the expected one, relative to the largest expected one."""
    found = shaped(found, expected.shape, what)
    expected = expected.to(torch.float64)
    scale = expected.abs().max().clamp(min=1e-30) if expected.numel() else 1.0
    expect(((found - expected).abs() <= tolerance * scale).all(), f"{what}: wrong values")


def same(found, expected: torch.Tensor, what: str) -> None:
    """Wrong unless every number is the expected one."""
    found = shaped(found, expected.shape, what)
    expect((found == expected.to(torch.float64)).all(), f"{what}: wrong values")


class Here:
    """Runs probes in this process, for pytest in the student's folder."""

    def run(self, probe, **inputs):
        return probe(**inputs)
