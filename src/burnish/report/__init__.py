"""One self-contained HTML page per run, and figures."""
