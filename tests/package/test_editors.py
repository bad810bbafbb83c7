"""Editors and type checkers see the type that a call returns."""

import jedi
import pytest

SETUP = "import jax, jlora\nkey = jax.random.key(0)\n"
CALLS = {
    "jlora.randomized_svd(a, 2, key=key)": ["u", "s", "vt"],
    "jlora.truncated_svd(a, 2)": ["u", "s", "vt"],
    "jlora.recompress(factors, 2)": ["u", "s", "vt"],
    "jlora.updates.add_low_rank(svd, x, y)": ["u", "s", "vt"],
    "jlora.adaptive_svd(a, tolerance=0.1, max_rank=4, key=key)": ["svd", "rank"],
    "jlora.split_svd(svd)": ["u", "v"],
    "jlora.concatenate_factors([factors])": ["u", "v"],
    "jlora.choose_rank(a)": ["rank", "curve"],
    "jlora.make_plan(params, rules)": ["entries", "skipped"],
    "jlora.fit(loss, adapted, optimizer, batches)": ["adapted", "losses"],
    "jlora.diagnose(params, adapted, key=key)": ["paths", "change"],
}


@pytest.mark.parametrize("call", CALLS)
def test_an_editor_completes_the_fields_of_a_result(call):
    code = f"{SETUP}result = {call}\nresult."
    names = {found.name for found in jedi.Script(code).complete(4, len("result."))}
    assert set(CALLS[call]) <= names
    assert not {"lower", "trace", "eval_shape"} & names
