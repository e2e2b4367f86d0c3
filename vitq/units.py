"""Numbers with their units, for people; decimal prefixes, as everywhere in vitq."""


def in_units(value: float, unit: str) -> str:
    """A number with a decimal prefix: 1_450_000 and "B" -> "1.45 MB"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}" if abs(value) < 999.5 * size else f"{value / size:.0f} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def in_decimals(value: float) -> str:
    """A loss or a KL in four decimals, in two figures where these would show nothing: 0.01234 -> "0.0123", 0.00001234 -> "1.2e-05"."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 1e-4 else f"{value:.2g}"


def counted(number: int, noun: str) -> str:
    """How many there are: (1, "image") -> "1 image", (3, "class") -> "3 classes"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith(('s', 'ch')) else 's'}"


def in_minutes(seconds: float) -> str:
    """A time for people: 42 -> "42 s", 600 -> "10 min"."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
