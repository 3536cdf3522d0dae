"""The gradients of one parameter as factors, and operations on them.

place        where the entries of a product are in a larger array: an affine function for each axis
product      Product: two sides, whose axes have labels, and the place of their product
windows      the windows of an image under a convolution's kernel
layout       where the entries of a product's matrices are in the parameter
arrangement  the form in which products are held, and fewer of them
constructors
             products for a batch, by the names that `explain` prints: Outer, Rows, Dense
factors      what is asked of one factor: a product, or one that the examples share
mapped       factors passed through a linear map shared by all examples, and penalties: Mapped, Common
maps         these maps: recorded, applied, transposed
leaf         the gradients of one parameter: a sum of factors times one number per example

norms        norms of one parameter's gradients, and of several parameters together
scaled       norms of gradients that a shared map scales elementwise
inner_products
             inner products of two factors, for every pair of kinds, and Gram matrices
weighted     weighted sums of gradients
projection_sides
             the two matrices that project a weight's gradient; projected: the projections
moments      elementwise second moment and variance
rows         inner products and sums of an embedding's gradient, by combining equal ids

sums         sums over very many examples, in blocks
platforms    what is computed differently on a CPU and on an accelerator
complexes    complex parameters as pairs of real ones
scales       powers of two that keep squares in range
one_example  a function of a batch as one of an example, for use inside loops
chunks       loops that materialize at most a stated number of bytes at once
"""
