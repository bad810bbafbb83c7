"""Plans: rules, layouts, the printed table, and ranks by rule or under a budget."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.initializers.lookup import as_initializer, list_names
from jlora.layouts import restore_layout, view_matrix

KEY = jax.random.key(0)
M, N = 12, 9  # one shape for every decomposition, so that few programs compile


def draw(seed, *shape, decay=1.0):
    a = np.random.default_rng(seed).standard_normal(shape)
    return (a * decay ** np.arange(shape[-1])).astype(np.float32)


Q, V = draw(0, M, N, decay=0.7), draw(1, M, N, decay=0.4)
STACK = np.stack(
    [draw(seed, M, N, decay=decay) for seed, decay in ((2, 0.6), (3, 0.9), (4, 0.5))]
)
PARAMS = {"q": Q, "v": V, "stack": STACK}
ABSTRACT = {"q": jax.ShapeDtypeStruct((M, N), jnp.float32)}
# A rank that is chosen from the values, and is 3 for any values.
CHOSEN = jlora.RankRule(minimum=3, maximum=3)


def ranks(params, rules, **settings):
    plan = jlora.make_plan(params, rules, **settings)
    return {entry.path: entry.rule.rank for entry in plan.entries}


def test_the_scale_of_a_rule_follows_from_alpha_and_rank():
    assert (jlora.Rule("q", 4).scale, jlora.Rule("q", 4, scale=-2).scale) == (1, -2)
    for is_stabilized, divisor in ((False, 4), (True, 2)):
        settings = {"alpha": 6, "rank_stabilized": is_stabilized}
        assert jlora.Rule("q", 4, **settings).scale == 6 / divisor
        open_rule = jlora.Rule("q", jlora.RankRule(minimum=4, maximum=4), **settings)
        assert open_rule.scale is None  # unknown until the rank is chosen
        chosen = jlora.make_plan(PARAMS, open_rule).entries[0].rule
        assert (chosen.rank, chosen.scale) == (4, 6 / divisor)


@pytest.mark.parametrize("init", list_names())
def test_each_initialisation_declares_its_trainable_arrays(init):
    assert jlora.Rule("q", 2, init=init).trainable == {
        "svf": "s",
        "lora_xs": "core",
    }.get(init, "v")

    # With v = 0, u and a core have no gradient. svf and lora_xs train their own core.
    refused = {
        "svf": "v u uv core",
        "lora_xs": "v u uv s",
        "lora": "u core s",
        "eva": "u core s",
    }

    for part in refused.get(init, "").split():
        with pytest.raises(
            ValueError, match=rf"`trainable \(with init='{init}'\)` .*got '{part}'"
        ):
            jlora.Rule("q", 2, init=init, trainable=part)
    assert all(
        jlora.Rule("q", 2, init=init, trainable=p).trainable == p
        for p in as_initializer(init).trainable
    )

    assert (jlora.Rule("q", 2, init=init).quantize is None) == (
        init not in ("loftq", "qpissa", "qera")
    )


def prepare_plan(params=PARAMS, pattern="q", rank=2, **settings):
    return lambda data=None: jlora.make_plan(
        params, jlora.Rule(pattern, rank, **settings), data=data
    )


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (
            prepare_plan(exclude="["),
            ValueError,
            r"`exclude` must be a regular expression, got '\['",
        ),
        (
            prepare_plan(alpha=0.0),
            ValueError,
            "`alpha` must be finite and not zero, got 0.0",
        ),
        (
            prepare_plan(alpha=4, scale=1.0),
            ValueError,
            "`scale` must be left out where `alpha` is given",
        ),
        (
            prepare_plan(rank_stabilized=True),
            ValueError,
            "`alpha` must be given with rank_stabilized",
        ),
        (prepare_plan(layout=2), TypeError, "`layout` must be a string, got int"),
        (
            prepare_plan(layout="ix"),
            ValueError,
            "`layout` must name each axis 'b', 'i' or 'o'.*got 'ix'",
        ),
        (
            prepare_plan(layout="bi"),
            ValueError,
            "with an input and an output, got 'bi'",
        ),
        (
            prepare_plan(quantize=jlora.quantization.quantize_int8),
            ValueError,
            "`quantize` must be a format with init='pissa', got function",
        ),
        (
            prepare_plan(quantize="int3", init="loftq"),
            ValueError,
            "`quantize` must be one of .*, got 'int3'",
        ),
        (
            lambda: jlora.initializers.loftq(num_rounds=0),
            ValueError,
            "`num_rounds` must be at least 1, got 0",
        ),
        (
            lambda: jlora.RankRule("magic"),
            ValueError,
            "`rule` must be one of 'energy', 'tail'",
        ),
        (
            lambda: jlora.RankRule(minimum=4, maximum=3),
            ValueError,
            "`maximum` must be at least 4",
        ),
        (
            lambda: jlora.RankBudget(0),
            ValueError,
            "`parameters` must be at least 1, got 0",
        ),
        (
            lambda: jlora.make_plan(PARAMS, []),
            ValueError,
            "`rules` must hold at least one jlora.Rule",
        ),
        (
            lambda: jlora.make_plan(PARAMS, [jlora.Rule("q|v", 2), jlora.Rule("v", 3)]),
            ValueError,
            "`rules` must each match a matrix that no earlier rule took, got pattern",
        ),
        (
            prepare_plan(PARAMS, "stak", 2),
            ValueError,
            "pattern 'stak' without one.* paths are: stack, (q|v)",
        ),
        (
            prepare_plan(PARAMS, "stack", 10),
            ValueError,
            r"stack: `rank` must be at most min\(m, n\) = 9",
        ),
        (
            prepare_plan(PARAMS, "v", 5, init="lora_ga"),
            ValueError,
            "v: `rank` must be at most 4 for init='lora_ga' .* got 5",
        ),
        (
            prepare_plan({"w": 0 * Q}, "w", jlora.RankRule(minimum=0)),
            ValueError,
            "`rules` must leave a wei",
        ),
        (
            prepare_plan(PARAMS, "v", jlora.RankRule(energy=2.0)),
            ValueError,
            "v: `energy` must lie in",
        ),
        (
            prepare_plan({"w": Q * np.nan}, "w", CHOSEN),
            ValueError,
            "`w` must be finite, got 108 NaN or Inf",
        ),
        (
            lambda: prepare_plan(rank=CHOSEN, init="eva")({"q": Q.T * np.nan}),
            ValueError,
            r"data.*be finite",
        ),
        (
            prepare_plan(PARAMS, "q", CHOSEN, init="orthogonal"),
            ValueError,
            "q: `rank` must be .*multiple",
        ),
        (
            prepare_plan(ABSTRACT, "q", CHOSEN),
            TypeError,
            "q: `params` must hold arrays where a rank is cho",
        ),
        (
            lambda: jax.eval_shape(lambda w: prepare_plan({"q": w}, "q", CHOSEN)(), Q),
            TypeError,
            "`q` must be a concrete array, got a traced one",
        ),
        (
            lambda: jax.eval_shape(
                lambda x: prepare_plan(PARAMS, "q", CHOSEN, init="lora_ga")({"q": x}), Q
            ),
            TypeError,
            r"`data\['q'\]` must be a concrete array, got a traced one",
        ),
    ],
)
def test_impossible_plans_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_the_first_match_wins_and_an_exclusion_is_none():
    rules = [
        jlora.Rule("q|v", 2, exclude="v"),
        jlora.Rule("v|st", 3),
        jlora.Rule(".*", 4),
    ]
    assert ranks(PARAMS | {"out": Q}, rules) == {"q": 2, "v": 3, "stack": 3, "out": 4}
    assert ranks(ABSTRACT, rules[:1]) == {"q": 2}


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize(
    ("layout", "shape", "order", "viewed"),
    [
        ("io", (4, 3), (0, 1), (4, 3)),
        ("oi", (4, 3), (1, 0), (3, 4)),
        ("ioo", (4, 3, 2), (0, 1, 2), (4, 6)),
        ("iio", (4, 3, 2), (0, 1, 2), (12, 2)),
        ("iiio", (3, 2, 4, 5), (0, 1, 2, 3), (24, 5)),
        ("oiii", (5, 4, 3, 2), (1, 2, 3, 0), (24, 5)),
        ("oio", (5, 4, 3), (1, 0, 2), (4, 15)),
        ("ibo", (4, 3, 2), (1, 0, 2), (3, 4, 2)),
    ],
)
def test_the_matrix_view_is_a_transpose_and_a_reshape(
    layout, shape, order, viewed, batch
):
    order = (*range(len(batch)), *(len(batch) + axis for axis in order))
    a = draw(0, *batch, *shape)
    expected = a.transpose(order).reshape(batch + viewed)

    for array in (a, jnp.asarray(a)):
        found = view_matrix(array, layout)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(restore_layout(found, layout, a.shape), a)

    entry = jlora.make_plan({"w": a}, jlora.Rule("w", 2, layout=layout)).entries[0]
    assert (entry.shape, entry.matrix_shape) == (a.shape, expected.shape)
    assert entry.num_parameters == 2 * np.prod(expected.shape[:-2]) * sum(
        expected.shape[-2:]
    )


def test_a_plan_prints_its_table_and_the_skipped_weights():
    params = {"a": Q, "b": STACK, "c": draw(0, 6, 4, 3), "d": draw(0, 3), "e": 0 * Q}
    rules = [
        jlora.Rule("a", 2, num_columns=4),
        jlora.Rule("b", 3, init="svf"),
        jlora.Rule("c|d", 3, trainable="core", layout="ooi"),
        jlora.Rule("e", jlora.RankRule(minimum=0)),
    ]
    plan = jlora.make_plan(params, rules)

    # `num_columns` does not change the number of parameters.
    sizes = [
        2 * (M + N),
        3 * (3 * (M + N) + 3),
        3 * (3 + 24) + 3**2,
    ]
    assert [entry.num_parameters for entry in plan.entries] == sizes

    cells = [
        [cell.strip() for cell in line.split("  ") if cell]
        for line in str(plan).splitlines()
    ]
    assert cells == [
        ["path", "shape", "rank", "parameters", "init", "trainable"],
        ["a", "12×9", "2", str(sizes[0]), "pissa", "v, last 4 columns"],
        ["b", "3×12×9", "3", str(sizes[1]), "svf", "s"],
        ["c", "6×4×3 as 3×24", "3", str(sizes[2]), "pissa", "core"],
        ["d: not adapted, it has shape (3,), fewer than three axes (layout 'ooi')"],
        ["e: not adapted, it gets rank 0"],
    ]

    assert hash(plan) == hash(jlora.make_plan(params, rules))
    assert plan != jlora.make_plan(params, rules[:3])


@pytest.mark.parametrize(
    ("limits", "limit_rank"),
    [
        ({}, lambda rank: max(rank, 1)),
        ({"minimum": 7}, lambda rank: max(rank, 7)),
        ({"minimum": 20}, lambda rank: N),
        ({"maximum": 3}, lambda rank: max(1, min(rank, 3))),
        (
            {"multiple_of": 4, "maximum": 6},
            lambda rank: min(6, -(-max(rank, 1) // 4) * 4),
        ),
    ],
)
@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("energy", {"energy": 0.97}),
        ("tail", {"tolerance": 0.1}),
        ("stable", {}),
        ("effective", {}),
        ("gavish_donoho", {"noise": 0.05}),
        ("marchenko_pastur", {"noise": 0.05, "margin": 0.2}),
    ],
)
def test_a_rank_rule_is_choose_rank_on_each_matrix_within_limits(
    rule, settings, limits, limit_rank
):
    free = {
        path: max(
            jlora.choose_rank(a, rule, **settings).rank for a in w.reshape(-1, M, N)
        )
        for path, w in PARAMS.items()
    }
    assert len(set(free.values())) > 1  # equal ranks would hide mixed-up weights
    rules = jlora.Rule(".*", jlora.RankRule(rule, **settings, **limits))
    expected = {path: limit_rank(rank) for path, rank in free.items()}
    assert ranks(PARAMS, rules) == expected


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("energy", {"energy": 0.9}),
        ("energy", {"energy": 1.0}),
        ("tail", {"tolerance": 0.3}),
        ("stable", {}),
        ("gap", {}),
        ("gavish_donoho", {"noise": 0.01}),
    ],
)
# The largest gap lies below, at, and beyond the maximum.
@pytest.mark.parametrize("num_large", [6, 8, 12])
def test_leading_values_choose_the_rank_that_all_choose(rule, settings, num_large):
    # The matrix is so large that its projection is smaller than itself.
    u, v = np.linalg.qr(draw(0, 100, 90))[0], np.linalg.qr(draw(1, 90, 90))[0]
    s = np.r_[
        np.ones(4),
        np.full(num_large - 4, 0.55),
        1e-3 * 0.8 ** np.arange(90 - num_large),
    ]
    a = ((u * s) @ v.T).astype(np.float32)
    expected = jlora.choose_rank(a, rule, max_rank=8, **settings).rank
    rules = jlora.Rule("w", jlora.RankRule(rule, maximum=8, **settings))
    found = [ranks({"w": a}, rules, key=key)["w"] for key in (None, KEY)]
    assert found == [expected, expected]


@pytest.mark.parametrize("layout", ["io", "oi"])
@pytest.mark.parametrize(
    ("init", "find_decomposed"),
    [
        ("pissa", lambda w, x: w),
        ("corda", lambda w, x: x @ w),
        ("difference", lambda w, x: x - w),
        ("eva", lambda w, x: x),
        ("lora_ga", lambda w, x: x),
    ],
)
def test_a_budget_is_shared_by_energy_a_parameter(init, find_decomposed, layout):
    params, data, spectra = {}, {}, {}
    for size, (path, w) in zip((1, 9, 3), PARAMS.items(), strict=True):
        # The data's sizes differ from the weights', so energies of the weights would
        # give other ranks.
        shape = (20, M) if init in ("eva", "corda") else (M, N)
        x = size * draw(size, *w.shape[:-2], *shape, decay=0.8)
        values = np.linalg.svd(
            find_decomposed(np.float64(w), np.float64(x)), compute_uv=False
        )

        # A stack has one spectrum. The spectrum of activations has no unit.
        values = np.linalg.norm(values.reshape(-1, values.shape[-1]), axis=0)
        values = values / np.linalg.norm(values) if init == "eva" else values
        spectra[path] = values[: N // 2 if init == "lora_ga" else N]

        # Data with the shape of the weight are stored in the weight's layout.
        params[path] = w if layout == "io" else w.mT
        data[path] = x.mT @ x if init == "corda" else x
        if layout == "oi" and init in ("lora_ga", "difference"):
            data[path] = x.mT

    shapes = {"q": (M, N), "v": (M, N), "stack": (3 * M, 3 * N)}
    expected = jlora.allocate_ranks(spectra, budget=400, shapes=shapes, minimum=1)
    rules = [
        jlora.Rule(path, jlora.RankBudget(400), init=init, layout=layout)
        for path in ("q|v", "stack")
    ]
    plan = jlora.make_plan(params, rules, data=data)
    assert {entry.path: entry.rule.rank for entry in plan.entries} == expected
    assert sum(entry.num_parameters for entry in plan.entries) <= 400


def test_each_rule_has_its_own_budget_and_may_give_a_weight_nothing():
    rules = [
        jlora.Rule("q", jlora.RankBudget(42)),
        jlora.Rule("v", jlora.RankBudget(106)),
    ]
    assert ranks(PARAMS, rules) == {"q": 2, "v": 5}  # not shared

    # The minimum of 5 becomes 3 for a weight with three columns.
    budget = jlora.RankBudget(5 * (M + N) + 3 * (M + 3), minimum=5)
    assert ranks({"q": Q, "thin": Q[:, :3]}, jlora.Rule(".*", budget)) == {
        "q": 5,
        "thin": 3,
    }

    rule = jlora.Rule(".*", jlora.RankBudget(M + N, minimum=0))
    plan = jlora.make_plan({"large": 2 * Q, "small": Q}, rule)
    assert [entry.path for entry in plan.entries] == ["large"]
    assert plan.skipped == (("small", "gets rank 0"),)


def test_a_budget_below_the_minimum_names_the_least_that_suffices():
    needed = 5 * 4 * (M + N)  # rank 4 for each of five matrices, three in the stack
    least = {"minimum": 2, "multiple_of": 4}
    text = f"`parameters` of RankBudget must cover rank 2 of all 3 w.* {needed} numbers"
    with pytest.raises(ValueError, match=text):
        jlora.make_plan(PARAMS, jlora.Rule(".*", jlora.RankBudget(needed - 1, **least)))
    enough = jlora.RankBudget(needed, **least)
    assert ranks(PARAMS, jlora.Rule(".*", enough)) == {"q": 4, "v": 4, "stack": 4}


# A fixed rank is refused by `adapt`, a chosen one by `make_plan` already.
@pytest.mark.parametrize("rank", [2, CHOSEN])
@pytest.mark.parametrize(
    ("init", "shape", "text"),
    [
        (
            "eva",
            None,
            r"q: `data` must hold an array at this path.*activations, \[..., t, m\]",
        ),
        (
            "corda",
            None,
            "second moments of the inputs.*got none. Pass data={path: array}",
        ),
        ("lora_ga", None, "the gradient, of the weight's shape"),
        ("difference", None, "the fine-tuned weight, of the weight's shape"),
        ("eva", (20, N), r"`data\['q'\]` must have shape \(20, 12\).*got \(20, 9\)"),
        ("eva", (M,), r"`data\['q'\]` must have shape \(1, 12\)"),
        ("corda", (2, M, M), r"`data\['q'\]` must have shape \(12, 12\)"),
        ("difference", (N, M), r"`data\['q'\]` must have shape \(12, 9\)"),
    ],
)
def test_data_that_is_missing_or_of_another_shape_is_refused(init, shape, text, rank):
    data = None if shape is None else {"q": np.ones(shape, np.float32)}
    rule = jlora.Rule("q", rank, init=init)
    with pytest.raises(ValueError, match=text):
        jlora.adapt(
            PARAMS, jlora.make_plan(PARAMS, rule, data=data), key=KEY, data=data
        )


def test_activations_give_no_more_ranks_than_they_have_rows():
    data = {"q": draw(0, 4, M)}
    for rank in (
        jlora.RankRule(energy=1.0, multiple_of=3),
        jlora.RankBudget(999, minimum=5),
    ):
        assert ranks(PARAMS, jlora.Rule("q", rank, init="eva"), data=data) == {"q": 4}
