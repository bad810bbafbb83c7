"""Other libraries that jlora is measured against.

svd   truncated SVDs of torch, scikit-learn, fbpca, SciPy, matfree, CuPy, JAX and NumPy
"""
