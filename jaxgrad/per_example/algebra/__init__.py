"""What the gradients of one parameter are, and what can be asked of them.

factors      what they are made of: Outer, Rows, Windows, Dense
layout       where the entries of a factor lie in the parameter
windows      a convolution as a product: an image, and the windows of it that the kernel meets
mapped       what is behind a map that all examples share, and penalties: Mapped, Common
maps         such maps: recorded, applied, transposed
leaf         the gradients of one parameter: a sum of factors times one number an example

norms        of one parameter's gradients, and of several together
scaled       of what a map scales entry by entry
pairs        inner products of two factors, for every pair of kinds, and Gram matrices
moments      second moment and variance, element by element
rows         equal ids of an embedding's gradient brought together
boxes        one factor in place of many that lie side by side

sums         sums over very many examples, in blocks
scales       powers of two that keep squares in range
chunks       loops that write out no more at once than a stated number of bytes
"""
