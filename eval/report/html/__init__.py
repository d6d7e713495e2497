"""One self-contained HTML page of results: tables, plots, token maps, what is significant and how to repeat it."""

from vtok.eval.report.html.page import ReportOptions, write_report

__all__ = ["ReportOptions", "write_report"]
