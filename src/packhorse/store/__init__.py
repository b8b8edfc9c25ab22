"""The store: objects behind a URL, the tags in it, leases, prices. Knows no files of a root."""
