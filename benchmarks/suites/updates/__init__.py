"""Factors → factors: adapters resized, combined, extracted and balanced.

factors         random factors, and errors of products that are never formed
torch_methods   the ways in which torch truncates a product of factors
recompression   an adapter resized, several adapters combined
low_rank_term   a term of low rank added to an SVD
extraction      the adapter inside the difference of two weights
balance         both sides of factors made equally large
rank_budget     the ranks of all layers under one budget
"""

from benchmarks.run.cases import Case
from benchmarks.suites.updates.balance import make_balance_group
from benchmarks.suites.updates.extraction import make_extract_group
from benchmarks.suites.updates.low_rank_term import make_add_group
from benchmarks.suites.updates.rank_budget import make_allocate_group
from benchmarks.suites.updates.recompression import (
    make_combine_group,
    make_recompress_group,
)

_SHAPES = {  # level: a square layer and a wide one
    "quick": (("gpt-2-medium", "output"), ("gpt-2-medium", "output")),
    "full": (("llama-2-7b", "attention"), ("llama-2-7b", "mlp up")),
}


def list_groups(level_name, platform):
    """Return the groups of this suite."""
    square, wide = _SHAPES[level_name]
    rank = 16 if level_name == "quick" else 32
    return [
        make_add_group(Case(*square, 64, "factors")),
        make_allocate_group(),
        make_recompress_group(Case(*square, rank, "factors"), 4 * rank),
        make_combine_group(Case(*wide, 16, "factors")),
        make_extract_group(Case(*square, 32, "low rank plus noise"), platform),
        make_balance_group(Case(*square, 64, "factors")),
    ]
