"""The version, below everything that needs it; pyproject.toml says the same."""

__version__ = "0.2.0"
