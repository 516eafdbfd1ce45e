"""Fitted exponents, on data whose exponent is known; and that every axis is a work that can be done."""

import numpy as np
import pytest
import torch

from benchmarks.growth import fit_exponent, memory_axes, quantize_seconds, quick_time_axes, scaled, time_axes
from benchmarks.shapes import SIZES
from cbq.reconstruction.windows import SlidingWindows


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_exponent_of_a_power(exponent):
    sizes = [3, 5, 8, 20]
    assert fit_exponent(sizes, [7.0 * size**exponent for size in sizes]) == pytest.approx(exponent)


def test_exponent_with_noise_and_with_a_constant():
    generator = np.random.default_rng(0)
    sizes = np.arange(1, 200)
    noisy = sizes**1.5 * np.exp(generator.normal(0, 0.1, sizes.shape))
    assert fit_exponent(sizes, noisy) == pytest.approx(1.5, abs=0.03)
    assert 0 < fit_exponent([1, 2, 4], [11.0, 12.0, 14.0]) < 0.3  # most of it does not grow


def test_every_axis_grows_in_one_thing_and_can_be_planned():
    for axis in [*time_axes(), *memory_axes(), *quick_time_axes()]:
        assert len(axis.points) == len(axis.sizes) == len(set(axis.sizes)) > 1
        assert list(axis.sizes) == sorted(axis.sizes)
        for work in axis.points:
            plan = SlidingWindows(work.window, work.overlap).plan(work.blocks)
            assert {len(window) for window in plan} == {work.window}, "no shortened window"


def test_the_overlap_axis_counts_windows():
    (axis,) = (axis for axis in time_axes() if "overlap 0" in axis.name)
    assert axis.sizes == (2, 3, 5)  # 8 blocks in windows of 4, moving on by 4, 2 and 1


def test_width_scales_every_width():
    half = scaled(128)
    assert (half.hidden, half.intermediate, half.heads, half.kv_heads) == (128, 384, 2, 1)
    assert scaled(256) == SIZES["pico"]


def test_time_of_a_point():
    assert quantize_seconds(quick_time_axes()[0].points[0], torch.device("cpu"))() > 0
