"""Models from other packages, each built by a function here and measured in its own process.

theme               the table: it lists the models and starts their processes
run                 the program of a model's process: it checks agreement and measures time and memory
built               the type that a builder returns
reconfiguration     a theme of its own: steps of stochastic reconfiguration beside NetKet's
*_models, hugging_face   the builders, by the package of the modules

A builder is a function of the dtype of the model's parameters and inputs. `theme` lists it by name.
"""
