"""MACHINE floor: state over plain structs, inline and without Python (``.pxd`` only)."""
