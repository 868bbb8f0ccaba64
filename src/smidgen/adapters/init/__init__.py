"""How LoRA's factors start: one file each.

Every module has `initialise(weight, r, scaling)` for a weight matrix (out, in) in fp32. It answers
A (R, in), B (out, R) and whether the base is to answer without their product, so that the start is the base model.
"""
