"""Audit: looking inside a system. It reads systems and worlds and changes neither."""
