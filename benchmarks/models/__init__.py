"""Known models as plain JAX functions of a tree of weights, for benchmarks and tests.

minilm          all-MiniLM-L6-v2, a small encoder of sentences
translator      an encoder and decoder of tokens
patch_encoder   a vision transformer
towers          matrix factorisation with side features
"""
