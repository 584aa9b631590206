import numpy as np

from dit_video.world.blobs import find_blobs


def flood(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Components by flood fill, as (frame, pixels, left, top, right, bottom)."""
    left_over, found = {tuple(place) for place in np.argwhere(mask)}, []
    while left_over:
        group, edge = [], [left_over.pop()]
        while edge:
            t, y, x = edge.pop()
            group.append((t, y, x))
            near = {(t, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left_over
            left_over -= near
            edge += near
        t, y, x = np.array(group).T
        found.append((t[0], len(group), x.min(), y.min(), x.max() + 1, y.max() + 1))
    return sorted(found)


def test_components_agree_with_flood_fill() -> None:
    rng = np.random.default_rng(0)
    for density in (0, 0.05, 0.2, 0.4, 0.6, 1):
        for shape in ((3, 7, 9), (1, 1, 1), (4, 12, 5), (2, 1, 8)):
            mask = rng.random(shape) < density
            found = find_blobs(mask)
            columns = (found.frame, found.pixels, found.left, found.top, found.right, found.bottom)
            assert sorted(zip(*columns, strict=True)) == flood(mask)
