"""The main job, `python -m jaxgrad`, in its steps: data, training, evaluation, and what is printed and written.

Needs the packages of the extra `examples`; nothing else in jaxgrad imports this package.
"""
