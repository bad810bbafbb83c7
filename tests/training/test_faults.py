"""Faults during training: what was trained is kept, and the reason is said."""

import gc
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora


def make_problem():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(keys[0], (12, 8), jnp.float32),
        "b": jax.random.normal(keys[1], (8, 6), jnp.float32),
        "bias": jnp.zeros(6, jnp.float32),
    }
    plan = jlora.make_plan(params, jlora.Rule("^(a|b)$", 3))
    adapted = jlora.adapt(params, plan, key=keys[2])
    x = np.random.default_rng(0).standard_normal((16, 12)).astype(np.float32)
    return adapted, (x, np.ones((16, 6), np.float32))


def mean_square(params, batch):
    x, y = batch
    hidden = jlora.linear(jlora.linear(x, params["a"]), params["b"])
    return jnp.mean((hidden + params["bias"][None] - y) ** 2)


def is_finite(tree):
    return all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(tree))


def fit(adapted, optimizer, batches, loss=mean_square, **settings):
    return jlora.fit(loss, adapted, optimizer, batches, progress=False, **settings)


def test_a_last_update_that_overflows_is_no_success():
    adapted, batch = make_problem()
    result = fit(adapted, optax.sgd(3e38), [batch])
    assert "the update of step 1 is not finite" in result.stop_reason
    assert is_finite(result.adapted)
    assert bool((result.adapted["a"].v == adapted["a"].v).all())


def test_arrays_that_the_loss_does_not_see_are_looked_at():
    adapted, _ = make_problem()

    def sometimes(params, number):
        root = jnp.sum(jnp.sqrt(jlora.linear(jnp.zeros((1, 12)), params["a"]) ** 2))
        return jnp.where(number > 0, 1.0, root)  # its gradient at 0 is NaN

    batches = [jnp.float32(number) for number in (0, 1, 1)]
    result = fit(adapted, optax.sgd(0.1), batches, sometimes)
    assert "the update of step 1 is not finite" in result.stop_reason
    assert is_finite(result.adapted)


def test_apply_if_finite_skips_a_bad_batch():
    adapted, (x, y) = make_problem()
    bad = (np.full_like(x, np.nan), y)
    optimizer = optax.apply_if_finite(optax.sgd(0.01), 5)
    result = fit(adapted, optimizer, [(x, y), bad, (x, y)])
    assert result.stop_reason is None
    assert np.isnan(result.losses[1])
    assert result.losses[2] < result.losses[0]
    assert is_finite(result.adapted)


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_of_the_batches_carries_the_result(error):
    adapted, batch = make_problem()

    def read():
        yield from [batch] * 5
        raise error

    with pytest.raises(type(error)) as caught:
        fit(adapted, optax.sgd(0.01, momentum=0.9), read())
    assert caught.value is error
    assert "fit had taken 5 steps" in error.__notes__[0]
    expected = fit(adapted, optax.sgd(0.01, momentum=0.9), [batch] * 5)
    found = error.fit_result
    assert (found.losses == expected.losses).all()
    for one, other in zip(
        jax.tree.leaves(found.adapted), jax.tree.leaves(expected.adapted), strict=True
    ):
        assert bool((one == other).all())


def test_two_runs_are_one():
    adapted, batch = make_problem()
    optimizer = optax.sgd(0.01, momentum=0.9)
    whole = fit(adapted, optimizer, [batch] * 10)
    first = fit(adapted, optimizer, [batch] * 5)
    second = fit(first.adapted, optimizer, [batch] * 5, opt_state=first.opt_state)
    assert (np.r_[first.losses, second.losses] == whole.losses).all()
    # The state of the first run was copied, and can be used again.
    again = fit(first.adapted, optimizer, [batch] * 5, opt_state=first.opt_state)
    assert (again.losses == second.losses).all()

    with pytest.raises(ValueError, match="`opt_state` must be a state of this"):
        fit(adapted, optax.sgd(0.1), [batch], opt_state=first.opt_state)


@pytest.mark.parametrize(
    ("loss", "got"),
    [
        (lambda p, b: (mean_square(p, b), 1), "got tuple"),
        (lambda p, b: mean_square(p, b)[None], r"got float32 of shape \(1,\)"),
        (lambda p, b: None, "got NoneType"),
        (lambda p, b: jnp.int32(3), r"got int32 of shape \(\)"),
        (lambda p, b: jnp.complex64(3), r"got complex64 of shape \(\)"),
    ],
)
def test_a_loss_that_is_no_number_is_named(loss, got):
    adapted, batch = make_problem()
    with pytest.raises(TypeError, match=f"`loss` must return one real .*{got}"):
        fit(adapted, optax.sgd(0.1), [batch], loss)


def test_a_loss_without_a_hash_is_named():
    class Loss:
        __hash__ = None

        def __call__(self, params, batch):
            return mean_square(params, batch)

    adapted, batch = make_problem()
    with pytest.raises(TypeError, match="`loss` must be hashable, got a Loss"):
        fit(adapted, optax.sgd(0.1), [batch], Loss())


class Tensor:
    """An array of another library: NumPy can read it, JAX cannot."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array, dtype)


def test_batches_of_another_library_are_converted():
    adapted, batch = make_problem()
    tensors = [tuple(map(Tensor, batch))] * 3
    expected = fit(adapted, optax.sgd(0.1), [batch] * 3)
    assert (fit(adapted, optax.sgd(0.1), tensors).losses == expected.losses).all()


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ({"x": 1}, "`batches` must be an iterable of batches, got dict"),
        ("abc", "`batches` must be an iterable of batches, got str"),
        (3, "`batches` must be an iterable of batches, got int"),
        ([{"x": np.ones(2), "text": "abc"}], r"got str at \['text'\]"),
    ],
)
def test_batches_that_are_none_are_named(batches, text):
    adapted, _ = make_problem()
    with pytest.raises(TypeError, match=text):
        fit(adapted, optax.sgd(0.1), batches)


@pytest.mark.parametrize(
    ("also_train", "error", "text"),
    [
        ("baias", ValueError, "must match a plain floating leaf, .* are: bias"),
        ("(", ValueError, "must be a regular expression, got '\\('"),
        (["bias"], TypeError, "must be a regular expression in a string, got list"),
        (True, TypeError, "must be a regular expression in a string, got bool"),
    ],
)
def test_also_train_that_matches_nothing_is_named(also_train, error, text):
    adapted, batch = make_problem()
    with pytest.raises(error, match=f"`also_train` {text}"):
        fit(adapted, optax.sgd(0.1), [batch], also_train=also_train)


def test_also_train_trains_a_bias():
    adapted, batch = make_problem()
    result = fit(adapted, optax.sgd(0.1), [batch] * 3, also_train="bias")
    assert bool((result.adapted["bias"] != 0).any())


def test_numpy_bases_are_sent_once():
    adapted, _ = make_problem()
    on_host = jax.tree.map(np.asarray, adapted)
    _, frozen = jlora.init_train(on_host, optax.sgd(0.1))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(frozen))


def test_fit_inside_of_jit_is_refused():
    adapted, batch = make_problem()
    with pytest.raises(TypeError, match=r"outside of jax\.jit.*train_step"):
        jax.jit(lambda tree: fit(tree, optax.sgd(0.1), [batch]).losses)(adapted)


def test_many_shapes_are_said_once(capsys):
    adapted, (x, y) = make_problem()
    fit(adapted, optax.sgd(0.1), [(x[:n], y[:n]) for n in range(1, 13)])
    assert capsys.readouterr().err.count("more than 8 shapes") == 1
    fit(adapted, optax.sgd(0.1), [(x[:n], y[:n]) for n in (4, 8, 4, 8)] * 3)
    assert "shapes" not in capsys.readouterr().err


@pytest.mark.usefixtures("standard_promotion")
def test_a_run_that_moves_nothing_is_said(capsys):
    adapted, batch = make_problem()
    fit(adapted, optax.MultiSteps(optax.sgd(0.1), 4), [batch] * 2)
    assert "no trained array changed in 2 steps" in capsys.readouterr().err
    fit(adapted, optax.MultiSteps(optax.sgd(0.1), 4), [batch] * 4)
    assert capsys.readouterr().err == ""


def test_programs_of_dropped_losses_are_freed():
    # Each program holds about 50 memory maps, and Linux gives a process 65,530.
    adapted, batch = make_problem()

    def count_maps(num_losses):
        for _ in range(num_losses):
            fit(adapted, optax.sgd(0.1), [batch], lambda p, b: mean_square(p, b))
        gc.collect()
        return len(pathlib.Path("/proc/self/maps").read_text().splitlines())

    before = count_maps(20)
    assert count_maps(20) < before + 100


def test_the_printed_result_is_one_line():
    adapted, batch = make_problem()
    text = str(fit(adapted, optax.sgd(0.01), [batch] * 3))
    assert text.startswith("FitResult(3 losses from ")
    assert text.endswith("stop_reason=None)")


@pytest.mark.parametrize("transform", ["fit", "jit", "checkpoint"])
def test_equinox_modules_with_functions_as_leaves_train(transform):
    equinox = pytest.importorskip("equinox")
    model = equinox.nn.MLP(12, 6, 16, 1, activation=jnp.tanh, key=jax.random.key(3))
    plan = jlora.make_plan(model, jlora.Rule("weight", 2, layout="oi"))
    adapted = jlora.adapt(model, plan, key=jax.random.key(4))
    _, batch = make_problem()

    def loss(model, batch):
        x, y = batch
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    if transform == "fit":
        result = fit(adapted, optax.sgd(0.1), [batch] * 5, jlora.lift(loss))
        assert result.losses[-1] < result.losses[0]
        assert result.adapted.activation is model.activation
        return

    trainable, frozen = jlora.split_trainable(adapted)

    def compute(trainable, frozen, batch):
        return jlora.lift(loss)(jlora.join(trainable, frozen), batch)

    wrapped = {"jit": jax.jit, "checkpoint": jax.checkpoint}[transform](compute)
    expected = loss(jlora.merge(adapted), batch)
    np.testing.assert_allclose(wrapped(trainable, frozen, batch), expected, rtol=1e-4)


@pytest.mark.usefixtures("standard_promotion")
def test_adamw_decays_the_weight_itself_and_add_decayed_delta_what_was_learned():
    adapted, batch = make_problem()

    def loss(params, batch):  # its gradient is zero
        return 0.0 * mean_square(params, batch)

    def find_change(optimizer, tree=adapted):
        result = fit(tree, optimizer, [batch] * 20, loss)
        old, new = (jlora.merge(t)["a"] for t in (adapted, result.adapted))
        return float(jnp.linalg.norm(new - old) / jnp.linalg.norm(old))

    assert find_change(optax.adamw(0.1, weight_decay=0.5)) > 0.3
    decay = optax.chain(
        optax.scale_by_adam(), jlora.optimizers.add_decayed_delta(0.5), optax.scale(-1)
    )
    assert find_change(decay) == 0.0

    # From a state that began at `adapted`, half of what was learned goes in each step.
    state, _ = jlora.init_train(adapted, decay)
    moved = jax.tree.map(lambda array: array + 1, state.trainable)
    updates, _ = decay.update(
        jax.tree.map(jnp.zeros_like, moved), state.opt_state, moved
    )
    np.testing.assert_allclose(updates["a"].v, -0.5, rtol=1e-6)
