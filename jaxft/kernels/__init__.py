"""Every fast path, each beside its plain reference, and the one file that chooses by platform.

    what                                fast path                                reference, there or in the file named
    attention                           attention.py, by blocks of queries       `attention_reference`
                                        splash.py, JAX's kernel for TPUs         attention.py
                                        ring.py, sequences divided over devices  attention.py
    heads split, heads concatenated      heads.py, by tiles of a TPU              `plain`
    products with dequantized rows      dequantized.py, by units of rows         `plain`
    what adapters multiply an input by  joined.py, one product                   `products`
    gradients of stacked matrices       gradient_dtype.py                        the plain scan

`platform.py` chooses; `compiler_options.py` says the options of a TPU's compiler; `tensor_parallel.py`
what a program needs where kernels are divided; `remat.py` what the backward pass may keep; `jax_private.py` alone
reaches for functions that JAX does not promise to keep.
"""
