"""The drop-in classes beside the originals, installed from PyPI: value and gradient, one process and several."""
