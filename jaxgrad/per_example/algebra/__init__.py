"""The gradients of one parameter as factors, and operations on them.

factors      the kinds of factors: Outer, Rows, Windows, Dense
layout       where the entries of a factor are in the parameter
windows      a convolution as a product: an image, and its windows under the kernel
mapped       factors followed by a linear map shared by all examples, and penalties: Mapped, Common
maps         these maps: recorded, applied, transposed
leaf         the gradients of one parameter: a sum of factors times one number per example

norms        norms of one parameter's gradients, and of several parameters together
scaled       norms of gradients that a shared map scales elementwise
pairs        inner products of two factors, for every pair of kinds, and Gram matrices
moments      elementwise second moment and variance
rows         inner products and sums of an embedding's gradient, by combining equal ids
boxes        one factor in place of many adjacent ones

sums         sums over very many examples, in blocks
scales       powers of two that keep squares in range
chunks       loops that materialize at most a stated number of bytes at once
"""
