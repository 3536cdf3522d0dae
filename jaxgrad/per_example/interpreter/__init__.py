"""Evaluate the program that jax.grad has written, leaving its last products unevaluated.

    walk             evaluates a program, equation by equation
    control          its loops and branches
    as_map           a loop or branch as one linear map shared by all examples
    shards           shard_map
    rules/           one record for each primitive, by family: which products it makes, and how it acts on one
    registered       primitives with a rule that a user registered
    through          linear operations that no rule can apply to the operands, as a linear map shared by all examples
    moves            transposes, reshapes, slices and pads an unevaluated product
    linear           scales, masks and sums one, or multiplies it by a matrix
    products         makes unevaluated products from arrays: a `Product` of the algebra, for one example
    values           what a variable may stand for during the walk
    measuring        norms of gradients, taken where a gradient is complete, as inside a loop
    tied             a table that is looked up and multiplied with, measured before the lookups' gradient is there
    as_written       what the program itself computes, for values that are not held as products
    loop_constants   arrays that every step of a loop repeats, such as an attention mask
    views            which arrays are one array, so that a bias's cotangents are recognized as its weight's

    cost_model       whether a product is kept factored or materialized
    reasons          why it is not: what `explain` and `strict` say
    dependence       which results of a program depend on which operands
    cotangent_check  whether a backward pass is linear in its cotangent, as `clipped_grad(passes=2)` needs

From the algebra, the interpreter uses only the types for a product (`product`, `place`, `windows`) and for a linear map
(`maps`).
"""
