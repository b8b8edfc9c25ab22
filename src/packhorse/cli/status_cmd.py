"""`packhorse status`: the root, the disks, memory, the store, and what it costs."""

from __future__ import annotations

import os
import shutil
from datetime import datetime, timezone
from typing import Any

import click

from packhorse.cli import console, context


@click.command("status")
@click.option(
    "--price",
    type=console.Finite(0),
    help="US dollars for a GB and month, where the provider's list price is not right.",
)
@console.shared_options
def command(price: float | None) -> None:
    """Show the root by directory, the OS disk, memory, whether the root equals what the tag points to, and what
    the store holds and costs a month."""
    from packhorse.root import EPHEMERAL, PERSISTENT
    from packhorse.transfer.setup import Setup
    from packhorse.watch.disk import usage
    from packhorse.watch.memory import memory

    setup = Setup(context.load(), os.environ)
    root = setup.root
    directories = {}
    for name in (*PERSISTENT, *EPHEMERAL):
        files, size = usage(root.path / name)
        directories[name] = {"files": files, "bytes": size}
    os_disk, root_disk, used = shutil.disk_usage("/"), shutil.disk_usage(root.path), memory()
    facts: dict[str, Any] = {
        "root": str(root.path),
        "state": root.state().state,
        "directories": directories,
        "root_bytes": sum(directory["bytes"] for directory in directories.values()),
        "root_disk": {"used": root_disk.used, "free": root_disk.free, "total": root_disk.total},
        "os_disk": {"used": os_disk.used, "free": os_disk.free, "total": os_disk.total},
        "root_on_os_disk": root.on_os_disk,
        "memory": {"used": used.used, "limit": used.limit},
        "tag": setup.config.storage.tag,
        "environment": _environment(setup),
        "lock": _lock(setup),
        "store": _store(setup, price),
    }
    console.result(facts, _text(facts))


def _environment(setup: Any) -> dict[str, str] | None:
    """The fingerprint of what is configured, or why it cannot be told; None where nothing is configured."""
    from packhorse.errors import ConfigError

    try:
        return {"fingerprint": setup.fingerprint} if setup.config.environment.configured else None
    except ConfigError as error:
        return {"error": str(error)}


def _lock(setup: Any) -> dict[str, str] | None:
    """The lock file and whether it fits the requirements; None where none is configured."""
    from packhorse.errors import ConfigError
    from packhorse.install import locked

    environment = setup.config.environment
    if not environment.lock:
        return None
    try:
        return {"path": environment.lock, "state": locked.state(environment, setup.environ)}
    except ConfigError as error:
        return {"path": environment.lock, "state": "unreadable", "reason": error.what}


def _store(setup: Any, price: float | None) -> dict[str, Any]:
    """The store's side; a store that cannot be reached is a fact too."""
    from packhorse.errors import ConfigError, IntegrityError, NoSuchSnapshotError, StorageError
    from packhorse.store import credentials, prices
    from packhorse.transfer.compare import compare

    storage = setup.config.storage
    facts: dict[str, Any] = {"url": storage.url}
    try:
        listing = setup.store.list("")
        facts["objects"], facts["bytes"] = len(listing), sum(item.size for item in listing)
        try:
            facts["tag"] = compare(setup)
        except (NoSuchSnapshotError, ConfigError) as error:  # a requirements file that is not there
            facts["tag"] = None
            facts["reason"] = error.what
    except (StorageError, IntegrityError) as error:
        facts["error"] = str(error)
        return facts
    listed = prices.price_of(storage, credentials.endpoint_of(storage, setup.environ))
    dollars = price if price is not None else listed.dollars if listed else None
    facts["provider"] = listed.provider if listed else None
    facts["dollars_gb_month"] = dollars
    facts["dollars_month"] = None if dollars is None else round(facts["bytes"] / 1e9 * dollars, 4)
    facts["price_dated"] = prices.DATED if price is None and listed else None
    return facts


def _text(facts: dict[str, Any]) -> str:
    size = console.megabytes
    on_os_disk = "  on the OS disk" if facts["root_on_os_disk"] else ""
    lines = [f"Root      {facts['root']} ({facts['state']}), {size(facts['root_bytes'])}{on_os_disk}"]
    for name, directory in facts["directories"].items():
        noun = "file " if directory["files"] == 1 else "files"
        lines.append(f"  {name:10}{directory['files']:>9,} {noun}{size(directory['bytes']):>10}")
    for title, key in (("Root disk", "root_disk"), ("OS disk", "os_disk")):
        disk = facts[key]
        lines.append(
            f"{title:10}{size(disk['used'])} used, {size(disk['free'])} free of {size(disk['total'])}"
        )
    lines.append(f"Memory    {size(facts['memory']['used'])} used of {size(facts['memory']['limit'])}")
    if "error" in (facts["environment"] or {}):
        lines.append(f"Packages  {facts['environment']['error']}")
    if lock := facts["lock"]:
        said = {
            "fits": "it fits the requirements",
            "stale": "the requirements, wheels or the Python changed since: run `packhorse lock`",
            "of another tool": "made by another tool: `packhorse install --locked` holds it against the requirements",
        }
        lines.append(f"Lock      {lock['path']}: {said.get(lock['state']) or lock['reason']}")
    lines += _store_text(facts["tag"], facts["store"])
    return "\n".join(lines)


def _store_text(tag: str, store: dict[str, Any]) -> list[str]:
    lines = [f"Store     {store['url']}"]
    if "error" in store:
        return [*lines, f"  {store['error']}"]
    cost = "price unknown (--price says it)"
    if store["dollars_month"] is not None:
        cost = f"${store['dollars_month']:,.2f} a month"
        if store["provider"]:
            cost += f" at {store['provider']}'s list price"
        if store["price_dated"]:
            cost += f" of {store['price_dated']}"
    objects = console.counted(store["objects"], "object")
    lines.append(f"  {objects}, {console.megabytes(store['bytes'])}: {cost}")
    compared = store["tag"]
    if compared is None:
        return [*lines, f"  {store['reason']}"]
    when = datetime.fromtimestamp(compared.time, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    lines.append(f"Tag       {tag} → {compared.snapshot[:12]}, written {when}")
    if compared.equal:
        lines.append("  The root equals it.")
    else:
        differences = [
            "" if compared.packages_equal else "packages/ differs",
            _entries(compared.unsaved, "", "not saved"),
            _entries(compared.missing, " of the tag", "missing or older here"),
        ]
        lines.append(f"  The root differs: {', '.join(filter(None, differences)) or 'it is not complete'}.")
    return lines


def _entries(count: int, of: str, what: str) -> str:
    noun, verb = ("entry", "is") if count == 1 else ("entries", "are")
    return f"{count:,} shared {noun}{of} {verb} {what}" if count else ""
