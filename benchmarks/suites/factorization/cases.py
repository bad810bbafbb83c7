"""The matrices that the factorization suite decomposes."""

from benchmarks.run.cases import Case

SEEDS_CASES = [
    *(Case("llama-3.2-1b", "attention", rank) for rank in (16, 64, 128)),
    Case("llama-2-7b", "attention", 64),
    Case("minilm-l6", "mlp down", 16, "pretrained", layers=6),
]
CHOICE_CASES = [
    *(Case("llama-3.2-1b", "attention", rank) for rank in (8, 16, 32, 64, 128)),
    Case("llama-3.2-1b", "attention", 64, "flat"),
    *(Case("llama-2-7b", "attention", rank) for rank in (16, 64, 128)),
    Case("minilm-l6", "attention", 16, "pretrained", layers=6),
    Case("minilm-l6", "mlp up", 16, "pretrained", layers=6),
    Case("minilm-l6", "mlp down", 16, "pretrained", layers=6),
    # The rank is a large part of the full rank.
    Case("minilm-l6", "attention", 64, "pretrained", layers=6),
    Case("minilm-l6", "mlp down", 64, "pretrained", layers=6),
    Case("gpt-2", "output", 128),
]
SPLIT_CASE = Case("llama-2-7b", "attention", 64)


def list_quick_cases():
    """Return the cases of a quick run."""
    return [
        Case("gpt-2-medium", "output", 16, "spiked"),
        Case("gpt-2-medium", "output", 64, "spiked"),
        Case("bert-base", "mlp up", 16, "flat"),
        Case("bert-base", "attention", 16, "exponential"),
        Case("bert-base", "attention", 16, "spiked", layers=4),
        Case("minilm-l6", "mlp up", 16, "pretrained", layers=6),
    ]


def list_full_cases(platform):
    """Return the cases of a full run, small matrices first."""
    return [*_list_small_cases(), *_list_large_cases(platform)]


def _list_small_cases():
    square, stack = ("llama-3.2-1b", "attention"), ("gpt-2-medium", "output")
    pretrained = [
        Case("minilm-l6", layer, rank, "pretrained", layers=6)
        for layer in ("attention", "mlp up", "mlp down")
        for rank in (16, 64)
    ]

    return [
        *(Case(*square, rank, "spiked") for rank in (16, 64, 128)),
        Case(*square, 64, "flat"),
        Case(*square, 64, "exponential"),
        Case(*square, 64, "low rank plus noise"),
        *(Case(*stack, rank, "spiked", layers=8) for rank in (16, 64)),
        *pretrained,
    ]


def _list_large_cases(platform):
    square = ("llama-2-7b", "attention")
    cases = [
        *(Case(*square, rank, "spiked") for rank in (16, 64, 128)),
        Case(*square, 64, "flat"),
        Case(*square, 64, "exponential"),
        *(Case("llama-2-7b", "mlp up", rank, "spiked") for rank in (16, 64, 128)),
        Case("llama-2-7b", "mlp down", 64, "spiked"),
        Case(*square, 64, "spiked", "bfloat16"),
    ]

    if platform != "cpu":
        cases += [
            Case(*square, 64, "spiked", "bfloat16", layers=8),
            Case(*square, 64, "spiked", layers=8),
        ]
    return cases
