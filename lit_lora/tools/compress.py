"""``lit-lora compress``: an adapter at a lower rank, and what that loses."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lit_lora.interchange.compressed import Compressed


def compress(adapter: str, output: str, r: int | None = None, max_error: float | None = None) -> Compressed:
    """Write an adapter at lower ranks, the best approximation of each layer; the base is not needed.

    Args:
        adapter: folder in PEFT's format, or an id on the Hub.
        output: folder to write to.
        r: the highest rank of a layer.
        max_error: in place of r, the relative error that a layer may have, such as 0.05.

    Returns:
        Ranks and errors by layer.
    """
    from lit_lora.interchange.compressed import compress_adapter

    found = compress_adapter(adapter, output, r=r, max_error=max_error)
    width = max(len(name) for name in found.errors)
    print(f"{'layer':<{width}}  rank  error (Frobenius norm of what is lost, relative to the adapter's change)")
    for name, error in found.errors.items():
        print(f"{name:<{width}}  {found.ranks[name]:>4}  {error:.4f}")
    print(f"{'all':<{width}}  {max(found.ranks.values()):>4}  {found.error:.4f}")
    print(f"compressed in {found.folder}")
    return found
