"""Building, installing and importing the package."""
