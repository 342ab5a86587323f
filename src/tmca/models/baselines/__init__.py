"""The other methods of the paper's Table 1, one file each."""
