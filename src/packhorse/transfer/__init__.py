"""Push and pull: where the files of a root and the objects of a store meet."""
