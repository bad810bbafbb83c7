"""Every optimiser of optax that a rate constructs trains as in a plain loop."""

import functools
import inspect
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

NUM_STEPS = 5
# optax's own functions promote Python numbers and integers, which strict promotion
# refuses.
STANDARD = jax.numpy_dtype_promotion("standard")

# Those that fail in a plain loop too, on a tree with None leaves or for want of an
# argument: what `fit` says of them.
REFUSED = {
    "galore": "`optimizer` must accept a tree with None",
    "sophia": "obj_fn must be provided",
}
# Built without a rate, or out of parts that read the loss.
OTHERS = {
    "lbfgs with a line search": optax.lbfgs,
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(0.01), optax.contrib.reduce_on_plateau(patience=1)
    ),
    "backtracking": lambda: optax.chain(
        optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)
    ),
    "MultiSteps": lambda: optax.MultiSteps(
        optax.adam(0.01), 2
    ).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(0.01),
}


def make_problem():
    w = jax.random.normal(jax.random.key(0), (8, 6), jnp.float32)
    plan = jlora.make_plan({"w": w}, jlora.Rule("w", 2))
    adapted = jlora.adapt({"w": w}, plan, key=jax.random.key(1))
    x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
    return adapted, (x, np.ones((16, 6), np.float32))


def mean_square(params, batch):
    x, y = batch
    return jnp.mean((jlora.linear(x, params["w"]) - y) ** 2)


def list_optimizers():
    """Return [(name, make)] of the functions that give a transformation from a rate."""
    found = dict(OTHERS)
    for place in (optax, optax.contrib):
        for name in sorted(vars(place)):
            make = getattr(place, name)
            is_public = not name.startswith("_") and inspect.isfunction(make)
            if is_public and is_optimizer(make):
                found[name] = functools.partial(make, 0.01)
    return [pytest.param(name, make, id=name) for name, make in found.items()]


def is_optimizer(make):
    if "learning_rate" not in inspect.signature(make).parameters:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some want a key, some are deprecated
            return isinstance(make(0.01), optax.GradientTransformation)
    except (TypeError, ValueError):  # it needs more than a rate
        return False


def train_plainly(optimizer, adapted, batch):
    """Return the losses of an ordinary loop over the same trees."""
    trainable, frozen = jlora.split_trainable(adapted)
    optimizer = optax.with_extra_args_support(optimizer)

    def evaluate(trainable, frozen=frozen):
        return mean_square(jlora.join(trainable, frozen), batch)

    @jax.jit
    def step(trainable, state):
        value, gradient = jax.value_and_grad(evaluate)(trainable)
        extra = {"value": value, "grad": gradient, "value_fn": evaluate}
        parameters = inspect.signature(optimizer.update).parameters.values()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            names = {p.name for p in parameters}
            extra = {name: extra[name] for name in extra if name in names}
        updates, state = optimizer.update(gradient, state, trainable, **extra)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = optimizer.init(trainable), []
    for _ in range(NUM_STEPS):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    return np.asarray(losses)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "make"), list_optimizers())
def test_it_trains_as_in_a_plain_loop(name, make):
    adapted, batch = make_problem()
    batches = [batch] * NUM_STEPS
    with STANDARD:
        if name in REFUSED:
            with pytest.raises((TypeError, ValueError), match=REFUSED[name]):
                jlora.fit(mean_square, adapted, make(), batches, progress=False)
            return
        expected = train_plainly(make(), adapted, batch)
        result = jlora.fit(mean_square, adapted, make(), batches, progress=False)
    assert result.stop_reason is None
    np.testing.assert_allclose(result.losses, expected, rtol=1e-5)


def test_there_are_many():
    assert len(list_optimizers()) >= 40
