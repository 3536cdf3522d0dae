"""The same quantities computed by other libraries: one small file for each peer, run in a process of its own.

theme               the rows: writes the numbers, runs the peers, compares their results with jaxgrad's
run                 the program of a peer's process: the timing, the memory, and what went wrong
torch_models        the models of `benchmarks.models` in torch, from the same numbers

Everything but `theme` needs torch and no JAX.
"""
