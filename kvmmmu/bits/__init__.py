"""PURE floor: inline kernels over words and raw pointers (``.pxd`` only)."""
