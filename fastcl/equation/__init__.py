"""What is computed: the one equation as data, its pair functions, masks and reductions, and the checks before any work.

problem      z, r and c of one pairwise reduction        pairs        f and f', once for every backend
masks        which pairs are visited                     reductions   sum and log-sum-exp, and how parts merge
checks       every error, before memory is touched       codegen      pairs.py to C++, CUDA and Triton
intrinsics   the functions that f may call
"""
