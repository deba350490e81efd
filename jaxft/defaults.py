"""Defaults that functions and the command line share; what a run is configured by has its own in configs/."""

MAX_NEW_TOKENS = 128  # of an answer, at most
GROUP_SIZE = 64  # rows of a kernel that share a scale (arXiv 2305.14314)
DOUBLE_QUANT = True  # the scales of nf4 and fp4 are quantized too (arXiv 2305.14314, section 3)
PASSAGES = 4  # put before a question, at most
