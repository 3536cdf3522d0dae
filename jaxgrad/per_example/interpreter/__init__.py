"""How per-example gradients are found: the program that jax.grad has written, evaluated with its last products undone.

    walk         evaluate a program, equation by equation
    control      its loops and branches
    rules/       one record for each primitive, by family: what it makes a product of, and what it does to one
    through      what no rule can do to operands, as a map that all examples share
    moves        an undone product transposed, reshaped, sliced, put into something larger
    linear       one scaled, masked, summed, multiplied by a matrix
    undone       an undone product: two operands and which of their axes lie where
    values       what a variable may stand for during the walk

Of the algebra it knows the words for a convolution (`windows`) and for a map (`maps`), and nothing else.
"""
