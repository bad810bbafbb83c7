"""Weight (and data) → its first factors.

The functions return initializers for `jlora.Rule(init=...)`; the name of one, as a
string, is shorthand for calling it without arguments. Your own subclass of
`Initializer`, or any function like its `__call__`, works in the same place.

    base.py            `Initializer`, `InitialFactors`
    from_weight.py     lora, pissa, milora, olora, orthogonal, lora_xs, svf
    from_data.py       corda, eva, lora_ga, difference
    quantized.py       loftq, qpissa, qera
    second_moments.py  factors that keep a layer's outputs best on given inputs
    lookup.py          a name, a function or an initializer → an initializer
"""

from jlora.initializers.base import InitialFactors, Initializer
from jlora.initializers.from_data import corda, difference, eva, lora_ga
from jlora.initializers.from_weight import (
    lora,
    lora_xs,
    milora,
    olora,
    orthogonal,
    pissa,
    svf,
)
from jlora.initializers.quantized import loftq, qera, qpissa

__all__ = [
    "InitialFactors",
    "Initializer",
    "corda",
    "difference",
    "eva",
    "loftq",
    "lora",
    "lora_ga",
    "lora_xs",
    "milora",
    "olora",
    "orthogonal",
    "pissa",
    "qera",
    "qpissa",
    "svf",
]
