"""Models that come out of packages, held against vmap(jax.grad): one builder for each, run in a process of its own.

theme               the rows: which models there are, and their processes
run                 what runs in a model's process: agreement, what is done with each parameter, time and memory
built               what a builder returns
*_models, hugging_face   the builders, by the package that the modules come from

A builder is a function of the dtype that its numbers are to have; `theme` names it.
"""
