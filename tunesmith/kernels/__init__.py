"""One file per operation: the plain torch reference, and beside it the Triton kernel that must equal it."""
