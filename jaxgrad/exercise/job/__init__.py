"""The main job, `python -m jaxgrad`: load data, train, evaluate, print and write the results.

The job needs the packages of the extra `examples`; of jaxgrad's other modules only `__main__` imports it.
"""
