"""Snapshots as documents and bytes: manifest, placement, frames, packs, index. Knows no network."""
