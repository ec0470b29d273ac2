"""Who computes it: each backend answers a Problem with r, c and gradients, by `rows`, `gradients` and `total`.

choice       which backend serves a call, and why        reference    the n x m matrix: the definition
blocked      row blocks in pure PyTorch, everywhere      closed_form  sums that need no pairs: f = z, and z^2 by Gram matrices
native       the C++ and CUDA kernels                    extension    opening the library that holds them
sides        x, y and the four sums of the gradients     row_dot      <x_i, y_i> in one pass
"""
