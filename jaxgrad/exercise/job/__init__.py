"""The steps of the main job, `python -m jaxgrad`: data, training, evaluation, and printed and written output.

The job needs the packages of the extra `examples`; nothing else in jaxgrad imports this package.
"""
