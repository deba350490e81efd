"""Every fast path, each beside its plain reference, and the one place that chooses by platform.

    what                                fast path                                reference, there or in the file named
    attention                           attention.py, by blocks of queries       `attention_reference`
                                        splash.py, JAX's kernel for TPUs         attention.py
                                        ring.py, sequences divided over devices  attention.py
    heads apart, beside each other      heads.py, by tiles of a TPU              `plain`
    products with dequantized rows      dequantized.py, by units of rows         `plain`
    what adapters multiply an input by  joined.py, one product                   `products`
    gradients of stacked matrices       gradient_dtype.py                        the plain scan

`platform.py` chooses; `compiler_options.py` says what a TPU's compiler is told beside the program; `tensor_parallel.py`
what a program needs where kernels are divided; `remat.py` what is kept for the backward pass; `jax_private.py` alone
reaches for functions that JAX does not promise to keep.
"""
