"""What `lift` is made of, on quax: imported by it alone, because quax is an extra."""

from jlora.adaptation.lifted import moves, products
from jlora.adaptation.lifted.calls import shield_custom_derivatives
from jlora.adaptation.lifted.weight import LiftedWeight, form

__all__ = ["LiftedWeight", "form", "moves", "products", "shield_custom_derivatives"]
