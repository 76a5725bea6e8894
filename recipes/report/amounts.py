"""Numbers as people read them: counts with a prefix, times in the unit that fits."""


def short(n: float) -> str:
    """A count with its SI prefix: 118,621,421,568 -> 118.62 G."""
    for scale, prefix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= scale:
            return f"{n / scale:.2f}{prefix}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """A time in the unit that fits: 75 -> 1.2 minutes."""
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} seconds"
