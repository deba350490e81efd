"""Kernels of 4 or 8 bits a number: the weight, its codes and scales, and what makes one of an array."""
