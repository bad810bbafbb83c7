"""`diagnose` against float64, and with planted intruders and rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from tests.helpers.adapted_trees import (
    EPS,
    KEY,
    PARAMS,
    adapt,
    get_change,
    train,
    view,
)

U, S, VT = np.linalg.svd(np.asarray(PARAMS["q"], np.float64))


def measure_matrix(w, change, base):
    """Return the expected diagnosis of one matrix with two directions, in float64."""
    (old, s, _), (new, *_) = np.linalg.svd(w), np.linalg.svd(base + change)
    norm, residual = np.linalg.norm(w), np.linalg.norm(w - change)
    cosines = old[:, :4].T @ new[:, :2]
    sine = np.linalg.norm(new[:, :2] - old[:, :2] @ cosines[:2], 2)

    return {
        "rank": 3,
        "energy_captured": 1 - (residual / norm) ** 2,
        "residual": residual / norm,
        "stable_rank": (norm / s[0]) ** 2,
        "change": np.linalg.norm(base + change - w) / norm,
        "angle": np.degrees(np.arctan2(sine, np.linalg.norm(cosines[:2], -2))),
        "num_intruders": np.sum(np.abs(cosines).max(axis=0) < 0.5),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_trained", [True, False])
def test_diagnosis_against_float64(dtype, is_trained):
    params = jax.tree.map(lambda w: w.astype(dtype), PARAMS)
    adapted = adapt(params, trainable="uv", scale=-2.0)
    adapted = train(adapted) if is_trained else adapted
    found = jlora.diagnose(params, adapted, key=KEY, num_directions=2)

    assert found.paths == ("q", "stack[0]", "stack[1]", "stack[2]", "torch")
    first_words = [line.split()[0] for line in str(found).splitlines()]
    assert first_words == ["path", *found.paths]

    for i, path in enumerate(("q", "stack", "stack", "stack", "torch")):
        parts = (
            view(params[path], path),
            get_change(adapted[path]),
            view(adapted[path].base, path),
        )
        w, change, base = (part[i - 1] for part in parts) if path == "stack" else parts

        for name, value in measure_matrix(w, change, base).items():
            # A few roundings. For singular vectors they are divided by the gaps, and
            # the angle is in degrees.
            atol = np.degrees(64 * EPS) if name == "angle" else 8 * EPS
            np.testing.assert_allclose(
                getattr(found, name)[i], value, rtol=1e-5, atol=atol
            )

        if not is_trained:
            norm, s = np.linalg.norm(w), np.linalg.svd(w, compute_uv=False)
            eps = float(jnp.finfo(dtype).eps) + 8 * EPS
            assert 0 < found.change[i] <= eps
            # Wedin: a subspace rotates by at most the change divided by the gap.
            assert found.angle[i] <= np.degrees(eps * norm / (s[1] - s[2]))
            assert found.num_intruders[i] == 0


def diagnose_delta(u, v):
    """Return (angle, number of intruders) after adding u @ v to the weight "q"."""
    slots = adapt({"q": PARAMS["q"]}, init="lora")
    factors = {"q": jlora.Factors(jnp.float32(u), jnp.float32(v))}
    swapped = jlora.adaptation.set_factors(slots, factors)
    found = jlora.diagnose(PARAMS, swapped, key=KEY, num_directions=2)
    return found.angle[0], found.num_intruders[0]


def test_planted_intruders_are_counted():
    # Left directions that the weight does not have, or has among its first four.
    for lefts, count in (([8], 1), ([9, 11], 2), ([0], 0), ([3], 0), ([3, 8], 1)):
        rights = 10 * S[0] * VT[: -1 - len(lefts) : -1]
        assert diagnose_delta(U[:, lefts], rights)[1] == count


@pytest.mark.parametrize("angle", [0.01, 1.0, 30.0, 75.0, 90.0])
def test_planted_rotations_are_measured(angle):
    radians = np.radians(angle)
    rotated = np.cos(radians) * U[:, 1] + np.sin(radians) * U[:, 9]
    found, count = diagnose_delta((rotated - U[:, 1])[:, None], S[1] * VT[1:2])
    # Rounding rotates singular vectors by itself, divided by the gap.
    np.testing.assert_allclose(
        found, angle, atol=np.degrees(16 * EPS * S[0] / (S[1] - S[2]))
    )
    assert count == (angle > 60)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda t: jlora.diagnose(PARAMS, t, key=0),
            TypeError,
            "`key` must be a typed PRNG key",
        ),
        (
            lambda t: jlora.diagnose(PARAMS, PARAMS, key=KEY),
            ValueError,
            "`adapted` must hold an",
        ),
        (
            lambda t: jlora.diagnose({}, t, key=KEY),
            ValueError,
            r"^q: `params` must hold this weight in shape \(12, 8\), got none",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, error, text):
    with pytest.raises(error, match=text):
        call(adapt(PARAMS, rank=4, init="lora"))
