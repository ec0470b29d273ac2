"""`fastcl bench` and `fastcl cost`: what a loss takes here, in time and memory, beside the same loss written in PyTorch."""
