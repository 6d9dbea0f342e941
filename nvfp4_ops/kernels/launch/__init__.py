"""How each kernel is launched: its configurations, which one serves which sizes, its arguments.

One file a kernel, of the same name. Imports no DSL: that takes longer to import than all kernels of
a layer to load, and is needed to compile only. A ``prepare_*`` function does what a launch needs
once for all tensors that differ in their memory alone, and returns the function that launches.
"""
