"""Lowering to other compilers: one module or package each, imported only when asked for."""
