"""One self-contained HTML page per run, and the result tables of README and docs."""

__all__ = ["write_report"]


def __getattr__(name: str):
    # The page pulls in scipy; `burnish report --help` and `burnish report results` do without.
    if name == "write_report":
        from burnish.report.page import write_report

        return write_report
    raise AttributeError(f"module 'burnish.report' has no attribute '{name}'")
