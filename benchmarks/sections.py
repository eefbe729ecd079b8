"""Pages that several benchmarks write, a section each."""

from pathlib import Path


def write_section(path: Path, text: str) -> str:
    """Put a section, which begins with its heading, in the place of the one that is there, or at
    the end of the page; returns the section."""
    heading = text.partition("\n")[0]
    page = path.read_text() if path.exists() else "# Asking runs\n\n"
    before, found, rest = page.partition(f"{heading}\n")
    _, has_more, later = rest.partition("\n## ")
    after = f"## {later}" if found and has_more else ""
    path.write_text("\n".join(part.strip("\n") + "\n" for part in (before, text, after) if part))
    return text
