"""Pictures of results: described once, drawn as SVG for reports, as interactive pages, and as PNG."""
