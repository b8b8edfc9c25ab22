"""Says how much was brought back, and where it is imported from."""

from pathlib import Path

import cowsay
import humanize

packages = Path(cowsay.__file__).parent.parent
size = sum(file.stat().st_size for file in packages.rglob("*") if file.is_file())
cowsay.cow(f"{humanize.naturalsize(size)} of packages")
print(f"imported from {packages}")
