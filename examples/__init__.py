"""Programs that show fastcl at work; `python -m examples.train_images` (or `make demo`) is the main one."""
