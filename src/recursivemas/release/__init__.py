"""The authors' released layout: read (from a directory or the hub), written, and explained in docs/checkpoints.md."""
