"""The experiments of the papers whose losses fastcl computes, at a size that two cores do in minutes: docs/papers.md."""
