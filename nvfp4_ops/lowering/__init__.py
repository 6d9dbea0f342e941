"""Lowering: what compilers and exporters need to know of the ops; nothing here runs at import."""
