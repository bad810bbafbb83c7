"""What `lift` is made of, on quax: imported by it alone, because quax is an extra."""

from jlora.adaptation.lifted import moves, products
from jlora.adaptation.lifted.calls import run_program
from jlora.adaptation.lifted.weight import LiftedWeight

__all__ = ["LiftedWeight", "moves", "products", "run_program"]
