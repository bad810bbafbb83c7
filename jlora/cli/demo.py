"""`jlora demo`: the main job, end to end, on text that every machine has."""


def add_parser(commands):
    return commands.add_parser(
        "demo",
        help="pretrain a small language model, adapt it to another domain, compare the ways",
        description=(
            "Pretrains a byte-level transformer on sources of the standard library, adapts it to "
            "another domain by factorising its layers (A = U V), training V alone and "
            "reconstructing, and compares that with classic LoRA and full fine-tuning."
        ),
    )


def run(arguments):
    # Imported here: building a model is no part of starting another command.
    from jlora.demo.story import run_demo

    run_demo()
