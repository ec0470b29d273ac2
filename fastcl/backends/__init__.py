"""Who computes it: each backend answers a Problem with r, c and gradients, by `rows`, `gradients` and `total`.

choice       which backend serves a call, and why        reference    the n x m matrix: the definition
tiles        the schedule of those that go by tiles      blocked      its operations in pure PyTorch, everywhere
native       the C++ kernels, for the CPU                extension    opening the library that holds them
cuda         the CUDA kernels, in three forms            workspace    what tiles may take of memory
closed_form  sums that need no pairs: f = z, and z^2     sides        x, y and the four sums of the gradients
             by Gram matrices                            row_dot      <x_i, y_i> in one pass
"""
