"""Thresholds for singular values of noise."""

import numpy as np
import pytest

from jlora.rank_selection.noise import median_of_squares, optimal_threshold


@pytest.mark.parametrize(
    ("beta", "omega"), [(1, 2.8582), (0.5, 2.1711), (0.25, 1.8370), (0.125, 1.6500)]
)
def test_threshold_over_the_median(beta, omega):
    # Gavish and Donoho 2014, table IV and the exact values behind it, for ω(β).
    found = optimal_threshold(beta * 1e6, 1e6, 1.0) / np.sqrt(
        1e6 * median_of_squares(beta)
    )
    assert found == pytest.approx(omega, rel=2e-4)
