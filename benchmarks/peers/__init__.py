"""The same numbers through other libraries: one small file for each peer, run in a process of its own.

theme               the rows: writes the numbers, runs the peers, holds what they return against jaxgrad
run                 what runs in a peer's process: the timing, the memory, and what went wrong
torch_models        the models of `benchmarks.models` in torch, from the same numbers

Everything but `theme` needs torch and no JAX.
"""
