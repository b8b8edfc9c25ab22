"""Watching: disks and memory while packhorse works."""
