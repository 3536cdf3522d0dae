"""What the compilers of an H100 and of a TPU make of a program, on a machine that has neither."""
