"""What each family computes, in plain torch and fp64, written for reading: the truth that kernels are held against."""
