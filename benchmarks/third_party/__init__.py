"""Models from other packages, compared with vmap(jax.grad): one builder for each, run in a process of its own.

theme               the rows: the list of models, and their processes
run                 the program of a model's process: agreement, how each parameter is held, time and memory
built               the type that a builder returns
*_models, hugging_face   the builders, by the package of the modules

A builder is a function of the dtype of the model's numbers; `theme` lists it by name.
"""
