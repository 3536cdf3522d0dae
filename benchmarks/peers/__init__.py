"""The same quantities computed by other libraries, the peers. Each has a small file here and runs in its own process.

theme                 the table: it writes the inputs, runs the peers and compares their results with jaxgrad's
run                   the program of a peer's process: it measures time and memory, and reports errors
quantities            the quantities in JAX
torch_models          the models of `benchmarks.models` in torch, with the same weights
curvlinops_kronecker  products with curvlinops' matrices, for tests/test_kronecker_peer.py

The peers, `run` and `torch_models` need torch and no JAX; `theme` and `quantities` need JAX and no torch.
"""
