"""The selection drawn: where in the sequence each head keeps tokens, and how many of them stay from step to step."""

from pathlib import Path
from typing import Any

from lighthouse_core import figures
from lighthouse_core.profile.heads import HeadsView
from lighthouse_core.profile.selection import SelectionView

_LABELS = 32


def draw(view: SelectionView | HeadsView, path: Path) -> list[Path] | None:
    """Draw a heat map, as PNG and SVG. Of a selection, of the share of tokens at level 0, a row for every layer and KV
    head, and beside it the drift if there is any. Of heads, of their attention beyond the window, a row for a layer.

    Args:
        view: what is drawn.
        path: of the files, without suffix.

    Returns:
        The files; None where matplotlib is missing.
    """
    pyplot = figures.pyplot()
    if pyplot is None:
        return None
    if isinstance(view, HeadsView):
        return _draw_heads(pyplot, view, path)
    rows = [[100 * share for share in head] for layer in view.density for head in layer]
    names = [f"{layer}.{head}" for layer in view.layers for head in range(view.kv_heads)]
    size = (12 if view.drift else 7, min(12, max(4, 0.15 * len(rows) + 1)))
    figure, grid = pyplot.subplots(
        1, 2 if view.drift else 1, figsize=size, squeeze=False, width_ratios=[3, 2] if view.drift else None
    )
    axes = grid[0, 0]
    extent = (0, view.tokens, len(rows), 0)
    image = axes.imshow(rows, vmin=0, aspect="auto", interpolation="nearest", extent=extent)
    apart = -(-len(rows) // _LABELS)
    # Whole layers, where not every row can have a name.
    apart = apart if apart == 1 else -(-apart // view.kv_heads) * view.kv_heads
    axes.set_yticks([row + 0.5 for row in range(0, len(rows), apart)], names[::apart], fontsize=7)
    axes.set(
        xlabel="position (tokens)",
        ylabel="layer.KV head",
        title=f"{figures.label(view.run)} step {view.step}: what {view.scorer} keeps at level 0",
    )
    figure.colorbar(image, label="tokens at level 0 (%)")
    if view.drift:
        _draw_drift(pyplot, grid[0, 1], view)
    figure.tight_layout()
    return figures.save(figure, path)


def _draw_heads(pyplot: Any, view: HeadsView, path: Path) -> list[Path]:
    """The number of blocks stands in each field."""
    size = (min(12, max(5, 0.6 * view.kv_heads + 3)), min(12, max(4, 0.3 * len(view.layers) + 1)))
    figure, axes = pyplot.subplots(figsize=size)
    shares = [[100 * share for share in heads] for heads in view.beyond]
    image = axes.imshow(shares, vmin=0, aspect="auto", interpolation="nearest")
    for row, heads in enumerate(view.blocks):
        for head, number in enumerate(heads):
            axes.text(head, row, str(number), ha="center", va="center", color="white", fontsize=7)
    axes.set_yticks(range(len(view.layers)), view.layers, fontsize=7)
    axes.xaxis.get_major_locator().set_params(integer=True)
    title = f"{figures.label(view.run)} step {view.step}: blocks of each head"
    axes.set(xlabel="KV head", ylabel="layer", title=title)
    figure.colorbar(image, label="attention beyond the window (%)")
    figure.tight_layout()
    return figures.save(figure, path)


def _draw_drift(pyplot: Any, axes: Any, view: SelectionView) -> None:
    """A line over the layers for every two checkpoints, means over the heads; of the newest two each head is a dot."""
    assert view.drift is not None
    colors, newest = pyplot.get_cmap("viridis_r"), len(view.drift) - 1
    for number, pair in enumerate(view.drift):
        color = colors(number / newest if newest else 1.0)
        means = [100 * sum(heads) / len(heads) for heads in pair["share"]]
        # Of many lines the first and the last, as the ends of a scale.
        label = f"step {pair['first']} to {pair['last']}" if newest < 6 or number in (0, newest) else None
        axes.plot(view.layers, means, color=color, label=label)
    for layer, heads in zip(view.layers, view.drift[-1]["share"], strict=True):
        name = "its heads" if layer == view.layers[0] else None
        axes.plot([layer] * len(heads), [100 * share for share in heads], ".", color=color, label=name)
    axes.axhline(100 * view.drift[-1]["chance"], linestyle="--", color="gray", label="chance")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="layer", ylabel="tokens at level 0 that stay (%)", ylim=(0, 105), title="drift")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
