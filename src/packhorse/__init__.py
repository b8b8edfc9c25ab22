"""packhorse keeps heavy Python environments in object storage and brings them back at boot."""

__version__ = "0.1.0"
