"""The main job, `python -m jaxgrad`, in its steps: data, training, evaluation, and what is written of it.

Needs the packages of the extra `examples`; nothing else in jaxgrad imports this package.
"""
